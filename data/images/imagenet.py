"""ImageNet (ILSVRC2012) from a folder of yours: images that are read, cropped and resized while the model learns.

    images = ImageNet("/data/imagenet", size=224, device="cuda")   # in it: train/<class>/*.JPEG and val/<class>/*.JPEG
    for x, y in images.training_batches(128, seed=1, first_step=1):        # uint8 (128, 3, 224, 224), int64 (128,)

Its 140 GB fit into no memory, and a GPU learns from images faster than one core can decode them: worker processes do
that ahead of time. Any folder of this layout will do, so a course can work on a subset of ten classes.
Nobody has the labels of ImageNet's own test set. So the folder val/ is the test set here, as in the papers, for one
look at the end, and the validation images are a part of the training images.
Mirroring, MixUp and normalisation follow on the device: data/augment.py.
"""
import hashlib
import itertools
import math
import os
import signal
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.download import say
from data.images import rows_of

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)      # of the training images, in 0 ... 1, by colour
ENDINGS = (".jpeg", ".jpg", ".png")                           # and in capitals
LAYOUT = "expected are train/<class>/*.JPEG and val/<class>/*.JPEG"


class ImageNet:
    """The images under `folder`: some to learn from, some to validate on, some to test on.

    size       height and width of what the model sees
    val_size   this many of the training images become validation images, the same ones in every run
    device     where the batches go
    workers    processes that read images; None: one for each core but one, at most 8; 0: the main process reads

    unreadable: {file: why}, the damaged or missing files met so far. Batches do without them.
    Raises ValueError in one line if the folder is of another layout.
    """

    def __init__(self, folder, *, size=224, val_size=10_000, device="cpu", workers=None):
        self.name, self.size, self.mean, self.std = "imagenet", size, MEAN, STD
        self.folder, self.device, self.unreadable = Path(folder), torch.device(device), {}
        # the cores that this process may use, where the system tells: a job on a cluster often has a few of many
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.workers = min(8, cores - 1) if workers is None else workers
        self.class_names, (train_files, train_labels), test, digest = listed(self.folder)
        self.n_classes, n = len(self.class_names), len(train_files)
        if val_size >= n:
            raise ValueError(f"val_size={val_size}: {self.folder / 'train'} has only {n:,} images to take them from; "
                             f"a tenth would be val_size={max(1, n // 10)}")
        order = np.random.default_rng(0).permutation(n)
        rows = {"train": np.sort(order[val_size:]), "val": np.sort(order[:val_size])}
        self.parts = {part: (train_files[chosen], train_labels[chosen]) for part, chosen in rows.items()}
        # shuffled, too: the first of them, of which train_vit.py shows some, shall not all be of the first class
        self.parts["test"] = tuple(array[np.random.default_rng(0).permutation(len(test[0]))] for array in test)
        self.facts = {"data": self.name, "sha256": digest, "classes": self.n_classes,
                      **{part: len(labels) for part, (_, labels) in self.parts.items()}}

    def training_batches(self, batch_size, seed, first_step, grad_accum=1):
        """From `first_step` on, without end, grad_accum batches a step: randomly cropped images uint8
        (B, 3, size, size), labels int64 (B,).

        Step s is a function of (seed, s), however many workers there are and wherever a run began.
        """
        n = len(self.parts["train"][1])
        yield from self._read("train", (
            (rows[first:first + batch_size], (seed, step, first)) for step in itertools.count(first_step)
            for rows in [rows_of(step, n, batch_size * grad_accum, seed)] for first in range(0, len(rows), batch_size)))

    def batches(self, part, batch_size):
        """Once through "val" or "test", in order: the middle of each image."""
        n = len(self.parts[part][1])
        yield from self._read(part, ((np.arange(first, min(first + batch_size, n)), None)
                                     for first in range(0, n, batch_size)))

    def _read(self, part, requests):
        """The batch of every request (see Reader), on the device. The workers end with this generator, also halfway.

        Raises ValueError for two or more images, a whole batch, of which none could be read.
        """
        loader = DataLoader(Reader(self.folder, *self.parts[part], self.size), sampler=requests, batch_size=None,
                            num_workers=self.workers, worker_init_fn=leave_ctrl_c_to_the_main_process,
                            pin_memory=self.device.type == "cuda",
                            # else it draws from PyTorch's own, on which dropout and data/augment.py depend
                            generator=torch.Generator())
        for images, labels, unreadable in self._out_of(loader):
            if not len(labels) and len(unreadable) > 1:
                file, why = next(iter(unreadable.items()))
                raise ValueError(f"none of the {len(unreadable):,} images of a batch could be read, {file} for one "
                                 f"({why}): is the disk with {self.folder} still there?")
            for file in unreadable:
                if file not in self.unreadable:
                    say(f"{self.folder / file} is left out: {unreadable[file]}")
            self.unreadable.update(unreadable)
            if len(labels):
                yield tuple(array.to(self.device, non_blocking=True) for array in (images, labels))


    def _out_of(self, loader):
        """What it gives; a worker that was killed, or has no room to hand its batch over, is one line."""
        try:
            yield from loader
        except RuntimeError as error:
            raise ValueError(f"a process that reads images ended ({' '.join(str(error).split())[:200]}); go on with "
                             f"--resume, with --workers=0 if there is too little shared memory") from None


# ---- the folder ------------------------------------------------------------------------------------------------------

def listed(folder):
    """-> names of the classes, training (files (N,), labels int64 (N,)), the same of val/, checksum in hex.

    files: paths inside `folder` as bytes in one array: a million Python objects would be copied into every worker.
    The checksum is of names and sizes, as hashing 140 GB is out of the question: it tells subsets and other versions
    apart, but would miss an image replaced by one of the same length.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}")
    for part in ("train", "val"):
        if not (folder / part).is_dir():
            raise ValueError(f"{folder} has no folder {part}/: {LAYOUT}")
    digest, arrays = hashlib.sha256(), []
    try:
        classes = class_folders(folder)
        for part in ("train", "val"):
            files, labels = [], []
            for label, name in enumerate(tqdm(classes, f"listing {part}", unit=" folders", disable=None, leave=False)):
                place = f"{part}/{name}"
                images = sorted((f"{place}/{entry.name}", n_bytes(entry)) for entry in images_in(folder / place))
                if not images:
                    raise ValueError(f"no images in {folder / place}: add some ({', '.join(ENDINGS)}), or remove "
                                     f"the class from train/ and val/")
                digest.update(b"".join(os.fsencode(f"{file} {size}\n") for file, size in images))
                files += [os.fsencode(file) for file, _ in images]
                labels += [label] * len(images)
            arrays.append((np.array(files), np.array(labels)))
    except OSError as error:
        raise ValueError(f"cannot list {error.filename}: {error.strerror}") from None
    return classes, *arrays, digest.hexdigest()


def class_folders(folder):
    """The sorted names of the folders in train/. ValueError unless they are two or more, and val/ has the same."""
    train, val = ({entry.name for entry in entries(folder / part) if entry.is_dir()} for part in ("train", "val"))
    if len(train) < 2:
        raise ValueError(f"{folder / 'train'} has {len(train)} class folders, but two are the least: {LAYOUT}")
    if not val and (flat := len(images_in(folder / "val"))):
        raise ValueError(f"{folder / 'val'} has {flat:,} images, but no class folders, and an image's folder is its "
                         f"label: sort them into val/<class>/, as the script valprep.sh of "
                         f"github.com/soumith/imagenetloader.torch does")
    for part, lacking in (("val", sorted(train - val)), ("train", sorted(val - train))):
        if lacking:
            more = f" and {len(lacking) - 3:,} more" if len(lacking) > 3 else ""
            raise ValueError(f"{folder / part} has no class folder {', '.join(lacking[:3])}{more}: train/ and val/ "
                             f"must have the same classes")
    return sorted(train)


def entries(folder):
    """What is in it, but nothing hidden: a Mac leaves a ._x.JPEG beside x.JPEG."""
    with os.scandir(folder) as found:
        return [entry for entry in found if not entry.name.startswith(".")]


def images_in(folder):
    return [entry for entry in entries(folder) if entry.name.lower().endswith(ENDINGS)]


def n_bytes(entry):
    """-1 for a link that leads nowhere: it will count as unreadable."""
    try:
        return entry.stat().st_size
    except OSError:
        return -1


# ---- one image -------------------------------------------------------------------------------------------------------

def decoded(path):
    """The image as RGB, whatever its format and colours. (EXIF's orientation is ignored, as always with ImageNet.)"""
    with warnings.catch_warnings(), open(path, "rb") as file:
        warnings.simplefilter("ignore")        # of odd metadata, which ImageNet has: every worker would, in every epoch
        with Image.open(file) as image:
            if image.mode[0] in "IF":
                raise ValueError("more than 8 bits per colour, which PIL would turn white")
            return image.convert("RGB")


def random_box(width, height, rng):
    """left, top, right, bottom of a piece of the image: 8% to 100% of its area, 3/4 to 4/3 as wide as high.

    Szegedy et al. (2015), in the form of torchvision's RandomResizedCrop: should ten such pieces not fit into the
    image, the largest in its middle whose shape is allowed.
    """
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))          # as often wide as high
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def random_piece(image, size, rng):
    """For training. Cut, then resized: PIL's resize(box=...) would let pixels from outside the box in at its edge."""
    return image.crop(random_box(*image.size, rng)).resize((size, size), Image.Resampling.BILINEAR)


def middle(image, size):
    """For evaluation: the shorter side becomes size * 256 / 224, and the middle (size, size) is cut out."""
    short, goal = min(image.size), round(size * 256 / 224)
    w, h = (goal * side // short for side in image.size)
    left, top = round((w - size) / 2), round((h - size) / 2)
    return image.resize((w, h), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))


# ---- batches of them, in worker processes ----------------------------------------------------------------------------

class Reader:
    """What a worker knows of one part: where its images lie, and their labels. What it is asked for is a batch."""

    def __init__(self, folder, files, labels, size):
        self.folder, self.files, self.labels, self.size = folder, files, labels, size

    def __getitem__(self, request):
        """-> images uint8 (b, 3, size, size), labels int64 (b,), and {file: why} of the B - b that are unreadable.

        request: rows (B,), and (seed, step, the first one's place in the step) for random pieces or None for the middle
        """
        (rows, draw), pixels, labels, unreadable = request, [], [], {}
        # from 1 on: [seed, x, 0] is to NumPy the [seed, x] that shuffles epoch x
        for place, row in enumerate(rows, draw[2] + 1 if draw else 1):
            file = os.fsdecode(self.files[row])
            try:
                image = decoded(self.folder / file)
            except Exception as error:         # PIL says OSError, SyntaxError, ValueError, IndexError ... of bad files
                why = getattr(error, "strerror", None) or str(error).split(" <")[0] or type(error).__name__
                unreadable[file] = " ".join(why.split())
                continue
            # drawn by place, so that a damaged neighbour changes nothing
            image = (random_piece(image, self.size, np.random.default_rng([*draw[:2], place])) if draw
                     else middle(image, self.size))
            pixels.append(np.asarray(image))
            labels.append(self.labels[row])
        images = np.array(pixels, np.uint8).reshape(-1, self.size, self.size, 3).transpose(0, 3, 1, 2)
        return torch.from_numpy(np.ascontiguousarray(images)), torch.tensor(labels, dtype=torch.int64), unreadable


def leave_ctrl_c_to_the_main_process(worker):
    """The terminal sends it to all; the main process may want some more batches, to end its step, and ends the rest."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
