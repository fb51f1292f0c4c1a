"""CIFAR-10 and CIFAR-100 in their binary versions.

    train_images, train_labels, test_images, test_labels = load_cifar10("cifar-10-batches-bin")
"""
from pathlib import Path

import numpy as np

from data.download import download, say
from data.extract import extract

CIFAR = {
    "cifar10": dict(url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", size=170_052_171,
                    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"),
    "cifar100": dict(url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz", size=168_513_733,
                     sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"),
}
FOLDERS = {"cifar10": "cifar-10-batches-bin", "cifar100": "cifar-100-binary"}          # inside the archives
# training files, test file, list of class names
FILES = {"cifar10": ([f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin", "batches.meta.txt"),
         "cifar100": (["train.bin"], "test.bin", "fine_label_names.txt")}
PIXELS = 3 * 32 * 32                           # bytes of an image: red, green, blue, each row by row
# mean and standard deviation of the training images in 0 ... 1, by colour, as in the authors' code
STATISTICS = {"cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
              "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))}


def fetch_cifar(name, data_dir):
    """-> the folder with the files of `name` (cifar10, cifar100), downloaded and unpacked if necessary."""
    folder = Path(data_dir) / name
    if not folder.exists():
        archive = download(path=Path(data_dir) / f"{name}.tar.gz", **CIFAR[name])
        train, test, names = FILES[name]
        extract(archive, folder, wanted=[f"{FOLDERS[name]}/{file}" for file in (*train, test, names)])
    return folder / FOLDERS[name]


def load_cifar10(folder):
    """-> training images uint8 (N, 3, 32, 32), training labels int64 (N,), test images, test labels.

    The training images are those of the files data_batch_1.bin ... data_batch_5.bin that exist. Raises ValueError, one
    line, if there is none or if a file is damaged.
    """
    return load_cifar("cifar10", folder)


def load_cifar100(folder):
    """The same for CIFAR-100, with its 100 fine labels."""
    return load_cifar("cifar100", folder)


def load_cifar(name, folder):
    train, test, _ = FILES[name]
    existing = [file for file in train if (Path(folder) / file).is_file()]
    if not existing:
        raise ValueError(f"{folder} is not a folder of {name}: it has no {train[0]}")
    parts = [read_rows(name, Path(folder) / file) for file in existing]
    test_part = read_rows(name, Path(folder) / test)
    if len(existing) < len(train):
        say(f"{folder} has {len(existing)} of the {len(train)} files of training images")
    return *(np.concatenate(arrays) for arrays in zip(*parts)), *test_part


def read_rows(name, path):
    """One file -> images uint8 (N, 3, 32, 32), labels int64 (N,). A row is a label (CIFAR-100: two) and the pixels."""
    if not path.is_file():
        raise ValueError(f"{path.parent} is not a folder of {name}: it has no {path.name}")
    n_labels, n_classes = (1, 10) if name == "cifar10" else (2, 100)
    raw, width = np.fromfile(path, np.uint8), n_labels + PIXELS
    if not len(raw) or len(raw) % width:
        raise ValueError(f"{path} has {len(raw):,} bytes, not a multiple of the {width:,} bytes of an image of {name}: "
                         f"it is truncated, or another file")
    rows = raw.reshape(-1, width)
    labels = rows[:, n_labels - 1].astype(np.int64)
    if labels.max() >= n_classes:
        raise ValueError(f"{path} has a label {labels.max()}, but {name} has only {n_classes} classes: it is another "
                         f"file")
    return rows[:, n_labels:].reshape(-1, 3, 32, 32), labels


def class_names(name, folder):
    """The class names listed in the folder; numbers if it has no such list."""
    path, n_classes = Path(folder) / FILES[name][2], 10 if name == "cifar10" else 100
    names = path.read_text(encoding="utf-8").split() if path.is_file() else []
    return names if len(names) == n_classes else [str(i) for i in range(n_classes)]
