"""ImageNet (ILSVRC2012) from a folder: images are read, cropped and resized during training.

    images = ImageNet("/data/imagenet", size=224, device="cuda")   # with train/<class>/*.JPEG and val/<class>/*.JPEG
    for x, y in images.training_batches(128, seed=1, first_step=1):        # uint8 (128, 3, 224, 224), int64 (128,)

The 140 GB do not fit into memory, and a GPU is faster than one core can decode images, so worker processes decode them
in advance. Any folder with this layout can be used, for example a subset of ten classes.
The labels of ImageNet's test set are not public. As in the papers, the folder val/ is the test set here, and the
validation images are a part of the training images.
Mirror images, MixUp and normalisation are computed on the device: data/images/augment.py.
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
from data.images.dataset import rows_of

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)      # of the training images in 0 ... 1, by colour
ENDINGS = (".jpeg", ".jpg", ".png")                           # in lower or upper case
LAYOUT = "the expected layout is train/<class>/*.JPEG and val/<class>/*.JPEG"


class ImageNet:
    """Training, validation and test images in `folder`.

    size       height and width of the images in a batch
    val_size   this many of the training images become validation images, the same ones whatever the seed
    device     of the batches
    workers    processes that read images; None: the number of cores minus one, at most 8; 0: the main process reads

    unreadable: {file: why}, the damaged or missing files found so far. They are left out of their batches.
    Raises ValueError, one line, if the folder has another layout.
    """

    def __init__(self, folder, *, size=224, val_size=10_000, device="cpu", workers=None):
        self.name, self.size, self.mean, self.std = "imagenet", size, MEAN, STD
        self.folder, self.device, self.unreadable = Path(folder), torch.device(device), {}
        # the cores available to this process, if the system tells: a cluster job often has only some of the machine's
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.workers = min(8, cores - 1) if workers is None else workers
        self.class_names, (train_files, train_labels), test, digest = listed(self.folder)
        self.n_classes, n = len(self.class_names), len(train_files)
        if val_size >= n:
            raise ValueError(f"val_size={val_size}: {self.folder / 'train'} has only {n:,} images; for a tenth of them "
                             f"give val_size={max(1, n // 10)}")
        order = np.random.default_rng(0).permutation(n)
        rows = {"train": np.sort(order[val_size:]), "val": np.sort(order[:val_size])}
        self.parts = {part: (train_files[chosen], train_labels[chosen]) for part, chosen in rows.items()}
        # also shuffled, so that the first ones, which train_vit.py draws, are not all of the first class
        self.parts["test"] = tuple(array[np.random.default_rng(0).permutation(len(test[0]))] for array in test)
        self.facts = {"data": self.name, "sha256": digest, "classes": self.n_classes,
                      **{part: len(labels) for part, (_, labels) in self.parts.items()}}

    def training_batches(self, batch_size, seed, first_step, grad_accum=1):
        """Yields random crops uint8 (B, 3, size, size), labels int64 (B,) without end, grad_accum batches per step.

        The batches of step s = first_step, first_step + 1, ... are a function of (seed, s) for any number of workers.
        """
        n = len(self.parts["train"][1])
        yield from self._read("train", (
            (rows[first:first + batch_size], (seed, step, first)) for step in itertools.count(first_step)
            for rows in [rows_of(step, n, batch_size * grad_accum, seed)] for first in range(0, len(rows), batch_size)))

    def batches(self, part, batch_size):
        """Yields the centre crops and labels of "val" or "test" once, in order."""
        n = len(self.parts[part][1])
        yield from self._read(part, ((np.arange(first, min(first + batch_size, n)), None)
                                     for first in range(0, n, batch_size)))

    def _read(self, part, requests):
        """Yields the batch of each request (see Reader), on the device. Closing the generator ends the workers.

        Raises ValueError if no image of a batch, of two or more, can be read.
        """
        loader = DataLoader(Reader(self.folder, *self.parts[part], self.size), sampler=requests, batch_size=None,
                            num_workers=self.workers, worker_init_fn=ignore_ctrl_c,
                            pin_memory=self.device.type == "cuda",
                            # the default generator is for dropout and augmentation: reading must not advance it
                            generator=torch.Generator())
        for images, labels, unreadable in self._loaded(loader):
            if not len(labels) and len(unreadable) > 1:
                file, why = next(iter(unreadable.items()))
                raise ValueError(f"none of the {len(unreadable):,} images of a batch could be read, for example {file} "
                                 f"({why}): is the disk of {self.folder} still mounted?")
            for file in unreadable:
                if file not in self.unreadable:
                    say(f"{self.folder / file} is left out: {unreadable[file]}")
            self.unreadable.update(unreadable)
            if len(labels):
                yield tuple(array.to(self.device, non_blocking=True) for array in (images, labels))

    def _loaded(self, loader):
        """Yields from the loader. If a worker was killed or shared memory is full, raises ValueError, one line."""
        try:
            yield from loader
        except RuntimeError as error:
            raise ValueError(f"a process that reads images ended ({' '.join(str(error).split())[:200]}); continue with "
                             f"--resume, and with --workers=0 if shared memory is too small") from None


# ---- the folder ------------------------------------------------------------------------------------------------------

def listed(folder):
    """-> class names, (files (N,), labels int64 (N,)) of train/, the same of val/, a checksum in hex.

    files: an array of paths inside `folder`, as bytes: a list of a million strings would be copied into every worker.
    The checksum is of names and sizes, because hashing 140 GB takes too long. It distinguishes subsets and versions,
    but does not notice an image that was replaced by one of the same length.
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
                images = sorted((f"{part}/{name}/{entry.name}", n_bytes(entry))
                                for entry in images_in(folder / part / name))
                if not images:
                    raise ValueError(f"no images in {folder / part / name}: add some ({', '.join(ENDINGS)}), or remove "
                                     f"the class from train/ and val/")
                digest.update(b"".join(os.fsencode(f"{file} {size}\n") for file, size in images))
                files += [os.fsencode(file) for file, _ in images]
                labels += [label] * len(images)
            arrays.append((np.array(files), np.array(labels)))
    except OSError as error:
        raise ValueError(f"cannot list {error.filename}: {error.strerror}") from None
    return classes, *arrays, digest.hexdigest()


def class_folders(folder):
    """The sorted names of the folders in train/. Raises ValueError if there are fewer than two, or others in val/."""
    train, val = ({entry.name for entry in entries(folder / part) if entry.is_dir()} for part in ("train", "val"))
    if len(train) < 2:
        raise ValueError(f"{folder / 'train'} has {len(train)} class folders, but at least two are needed: {LAYOUT}")
    if not val and (flat := len(images_in(folder / "val"))):
        raise ValueError(f"{folder / 'val'} has {flat:,} images, but no class folders, which are the labels: sort them "
                         f"into val/<class>/, for example with valprep.sh of github.com/soumith/imagenetloader.torch")
    for part, missing in (("val", sorted(train - val)), ("train", sorted(val - train))):
        if missing:
            more = f" and {len(missing) - 3:,} more" if len(missing) > 3 else ""
            raise ValueError(f"{folder / part} has no class folder {', '.join(missing[:3])}{more}: train/ and val/ "
                             f"must have the same classes")
    return sorted(train)


def entries(folder):
    """What a folder contains, without hidden files: macOS puts a ._x.JPEG beside x.JPEG."""
    with os.scandir(folder) as found:
        return [entry for entry in found if not entry.name.startswith(".")]


def images_in(folder):
    return [entry for entry in entries(folder) if entry.name.lower().endswith(ENDINGS)]


def n_bytes(entry):
    """The size of a file; -1 for a broken link, which will count as unreadable."""
    try:
        return entry.stat().st_size
    except OSError:
        return -1


# ---- one image -------------------------------------------------------------------------------------------------------

def decoded(path):
    """The image as RGB, from any format and colour mode. (EXIF's orientation is ignored, as usual with ImageNet.)"""
    with warnings.catch_warnings(), open(path, "rb") as file:
        warnings.simplefilter("ignore")        # about metadata of ImageNet: once per worker and epoch otherwise
        with Image.open(file) as image:
            if image.mode[0] in "IF":
                raise ValueError("more than 8 bits per colour, which PIL converts to white")
            return image.convert("RGB")


def random_box(width, height, rng):
    """left, top, right, bottom of a random crop: 8% to 100% of the image's area, aspect ratio 3/4 to 4/3.

    Szegedy et al. (2015), as in torchvision's RandomResizedCrop. If ten random boxes do not fit into the image, the
    crop is the largest box in the centre with an allowed aspect ratio.
    """
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))          # wide and high ones are equally likely
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def random_resized_crop(image, size, rng):
    """For training: (size, size). PIL's resize(box=...) would mix in pixels from outside the box at its edge."""
    return image.crop(random_box(*image.size, rng)).resize((size, size), Image.Resampling.BILINEAR)


def centre_crop(image, size):
    """For evaluation: the shorter side is resized to size * 256 / 224, then the central (size, size) is cut out."""
    short, goal = min(image.size), round(size * 256 / 224)
    w, h = (goal * side // short for side in image.size)
    left, top = round((w - size) / 2), round((h - size) / 2)
    return image.resize((w, h), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))


# ---- batches, in worker processes ------------------------------------------------------------------------------------

class Reader:
    """The data set of a worker: one part's files and labels. Its items are batches."""

    def __init__(self, folder, files, labels, size):
        self.folder, self.files, self.labels, self.size = folder, files, labels, size

    def __getitem__(self, request):
        """-> images uint8 (b, 3, size, size), labels int64 (b,), and {file: why} of the B - b unreadable images.

        request: rows (B,), and (seed, step, position of the first row in the step) for random crops, None for centre
        crops.
        """
        (rows, crop), pixels, labels, unreadable = request, [], [], {}
        # positions start at 1, because NumPy's seed [seed, x, 0] equals [seed, x], the seed of the order of epoch x
        for position, row in enumerate(rows, crop[2] + 1 if crop else 1):
            file = os.fsdecode(self.files[row])
            try:
                image = decoded(self.folder / file)
            except Exception as error:         # PIL raises OSError, SyntaxError, ValueError, IndexError ...
                why = getattr(error, "strerror", None) or str(error).split(" <")[0] or type(error).__name__
                unreadable[file] = " ".join(why.split())
                continue
            # the seed contains the position, so that an unreadable image does not change the crops of the others
            if crop:
                image = random_resized_crop(image, self.size, np.random.default_rng([*crop[:2], position]))
            else:
                image = centre_crop(image, self.size)
            pixels.append(np.asarray(image))
            labels.append(self.labels[row])
        images = np.array(pixels, np.uint8).reshape(-1, self.size, self.size, 3).transpose(0, 3, 1, 2)
        return torch.from_numpy(np.ascontiguousarray(images)), torch.tensor(labels, dtype=torch.int64), unreadable


def ignore_ctrl_c(worker):
    """The terminal sends SIGINT and SIGHUP to all processes. The main process handles them, and may need more batches
    until then."""
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)                     # not the main process's handler: it ends a worker
