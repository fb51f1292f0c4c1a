"""Labelled images in memory, CIFAR-10 and CIFAR-100 in their binary versions among them, and the order they come in.

    train_images, train_labels, test_images, test_labels = load_cifar10("cifar-10-batches-bin")

Validation images are a part of the training images, chosen once and for all seeds; test images are for one look, at
the end. ImageNet, which fits into no memory, has the same methods in data/imagenet.py.
"""
import hashlib
import itertools
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from data.download import download, extract, say

CIFAR = {
    "cifar10": dict(url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", size=170_052_171,
                    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"),
    "cifar100": dict(url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz", size=168_513_733,
                     sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"),
}
FOLDERS = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}          # inside the archives
# training files, test file, names of classes
FILES = {"cifar10": ([f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin", "batches.meta.txt"),
         "cifar100": (["train.bin"], "test.bin", "fine_label_names.txt")}
PIXELS = 3 * 32 * 32                           # an image as the files have it: all red, all green, all blue, row by row
# mean and standard deviation of the training images, in 0 ... 1, by colour (those that the authors normalise with)
STATISTICS = {"cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
              "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))}


# ---- the files -------------------------------------------------------------------------------------------------------

def fetch_cifar(name, data_dir):
    """The folder of `name` (cifar10, cifar100), downloaded and unpacked if it is not there yet."""
    folder = Path(data_dir) / name
    if not folder.exists():
        archive = download(path=Path(data_dir) / f"{name}.tar.gz", **CIFAR[name])
        train, test, names = FILES[name]
        extract(archive, folder, wanted=[f"{FOLDERS[name]}/{file}" for file in (*train, test, names)])
    return folder / FOLDERS[name]


def kind_of(folder):
    """What a folder holds: cifar10, cifar100 or imagenet. Raises ValueError if it is none of them."""
    folder = Path(folder)
    for name, (train, _, _) in FILES.items():
        if any((folder / file).is_file() for file in train):
            return name
    if (folder / "train").is_dir():
        return "imagenet"
    if (folder / "data_batch_1").is_file() or (folder / "meta").is_file():
        raise ValueError(f"{folder} holds the Python version of CIFAR, which is pickled; get the binary version")
    layouts = "data_batch_1.bin, ... (CIFAR-10), train.bin (CIFAR-100) or train/<class>/*.JPEG (ImageNet)"
    if folder.is_dir():
        raise ValueError(f"{folder} is a folder of another kind: known are those with {layouts}")
    raise ValueError(f"no folder {folder}: --data takes glyphs, cifar10, cifar100, or a folder with {layouts}")


def load_cifar10(folder):
    """-> training images uint8 (N, 3, 32, 32), training labels int64 (N,), test images, test labels.

    Whichever of data_batch_1.bin ... data_batch_5.bin are there are the training images. Raises ValueError in one line.
    """
    return load_cifar("cifar10", folder)


def load_cifar100(folder):
    """The same for CIFAR-100, whose labels are the 100 fine ones."""
    return load_cifar("cifar100", folder)


def load_cifar(name, folder):
    train, test, _ = FILES[name]
    there = [file for file in train if (Path(folder) / file).is_file()]
    if not there:
        raise ValueError(f"{folder} is not a folder of {name}: no {train[0]} in it")
    parts, test_part = [read_rows(name, Path(folder) / file) for file in there], read_rows(name, Path(folder) / test)
    if len(there) < len(train):
        say(f"{folder} has {len(there)} of the {len(train)} files of training images")
    return *(np.concatenate(arrays) for arrays in zip(*parts)), *test_part


def read_rows(name, path):
    """One file -> images uint8 (N, 3, 32, 32), labels int64 (N,). A row is a label (CIFAR-100: two) and pixels."""
    if not path.is_file():
        raise ValueError(f"{path.parent} is not a folder of {name}: no {path.name} in it")
    n_labels, n_classes = (1, 10) if name == "cifar10" else (2, 100)
    raw, width = np.fromfile(path, np.uint8), n_labels + PIXELS
    if not len(raw) or len(raw) % width:
        raise ValueError(f"{path} has {len(raw):,} bytes, not a multiple of the {width:,} of an image of {name}: cut, "
                         f"or another file")
    rows = raw.reshape(-1, width)
    labels = rows[:, n_labels - 1].astype(np.int64)
    if labels.max() >= n_classes:
        raise ValueError(f"{path} has a label {labels.max()}, but {name} has only {n_classes} classes: another file")
    return rows[:, n_labels:].reshape(-1, 3, 32, 32), labels


def class_names(name, folder):
    """As the folder's list has them; numbers where it has none."""
    path, n_classes = Path(folder) / FILES[name][2], 10 if name == "cifar10" else 100
    names = path.read_text().split() if path.is_file() else []
    return names if len(names) == n_classes else [str(i) for i in range(n_classes)]


# ---- sets of images --------------------------------------------------------------------------------------------------

class Images:
    """A set of images in memory, on `device`: some to learn from, some to validate on, some to test on.

    train, test: (images uint8 (N, 3, size, size), labels int64 (N,)) as arrays. val_size of the training images become
    validation images, the same ones in every run. Raises ValueError if there are not that many.
    """

    def __init__(self, name, train, test, *, class_names, mean, std, val_size, device="cpu"):
        self.name, self.class_names, self.mean, self.std = name, class_names, mean, std
        self.n_classes, self.size, self.unreadable = len(class_names), train[0].shape[-1], {}
        if val_size >= len(train[0]):
            raise ValueError(f"val_size={val_size}: only {len(train[0]):,} training images of {name} to take them from")
        order = np.random.default_rng(0).permutation(len(train[0]))
        rows = {"train": np.sort(order[val_size:]), "val": np.sort(order[:val_size])}
        self.parts = {part: tuple(torch.from_numpy(array[chosen]).to(device) for array in train)
                      for part, chosen in rows.items()}
        self.parts["test"] = tuple(torch.from_numpy(array).to(device) for array in test)
        digest = hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in (*train, *test)))
        self.facts = {"data": name, "sha256": digest.hexdigest(), "classes": self.n_classes,
                      **{part: len(labels) for part, (_, labels) in self.parts.items()}}

    def training_batches(self, batch_size, seed, first_step, grad_accum=1):
        """From `first_step` on, without end, grad_accum batches a step: images uint8 (B, 3, H, W), labels (B,)."""
        images, labels = self.parts["train"]
        for step in itertools.count(first_step):
            rows = torch.from_numpy(rows_of(step, len(labels), batch_size * grad_accum, seed)).to(labels.device)
            for chosen in rows.split(batch_size):
                yield images[chosen], labels[chosen]

    def batches(self, part, batch_size):
        """Once through "val" or "test", in order."""
        yield from zip(*(array.split(batch_size) for array in self.parts[part]))


def rows_of(step, n, batch_size, seed):
    """Which of n images make up step 1, 2, ...: (batch_size,). A function of (seed, step) alone.

    Epoch after epoch all n come once, in an order of its own; batches are cut out of that endless sequence.
    """
    places = np.arange((step - 1) * batch_size, step * batch_size)
    epochs = range(places[0] // n, places[-1] // n + 1)
    return np.concatenate([permutation(n, seed, epoch)[places[places // n == epoch] % n] for epoch in epochs])


@lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)
