"""A data set of labelled images in memory, and the order of the training images.

ImageNet, which does not fit into memory, has the same methods in data/images/imagenet.py.
"""
import hashlib
import itertools
from functools import lru_cache

import numpy as np
import torch


class Images:
    """Training, validation and test images on `device`.

    train, test: arrays (images uint8 (N, 3, size, size), labels int64 (N,)). val_size of the training images become
    validation images, the same ones whatever the seed. mean, std: by colour, of pixels in 0 ... 1.
    Raises ValueError if there are not enough training images.
    """

    def __init__(self, name, train, test, *, class_names, mean, std, val_size, device="cpu"):
        self.name, self.class_names, self.mean, self.std = name, class_names, mean, std
        self.n_classes, self.size, self.unreadable = len(class_names), train[0].shape[-1], {}
        if val_size >= len(train[0]):
            raise ValueError(f"val_size={val_size}: there are only {len(train[0]):,} training images of {name}")
        order = np.random.default_rng(0).permutation(len(train[0]))
        rows = {"train": np.sort(order[val_size:]), "val": np.sort(order[:val_size])}
        self.parts = {part: tuple(torch.from_numpy(array[chosen]).to(device) for array in train)
                      for part, chosen in rows.items()}
        self.parts["test"] = tuple(torch.from_numpy(array).to(device) for array in test)
        digest = hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in (*train, *test)))
        self.facts = {"data": name, "sha256": digest.hexdigest(), "classes": self.n_classes,
                      **{part: len(labels) for part, (_, labels) in self.parts.items()}}

    def training_batches(self, batch_size, seed, first_step, grad_accum=1):
        """Yields images uint8 (B, 3, H, W), labels (B,) without end, from step `first_step` on, grad_accum per step."""
        images, labels = self.parts["train"]
        for step in itertools.count(first_step):
            rows = torch.from_numpy(rows_of(step, len(labels), batch_size * grad_accum, seed))
            rows = rows.to(labels.device, non_blocking=labels.is_cuda)
            for chosen in rows.split(batch_size):
                yield images[chosen], labels[chosen]

    def batches(self, part, batch_size):
        """Yields all images and labels of "val" or "test" once, in order."""
        yield from zip(*(array.split(batch_size) for array in self.parts[part]))


def rows_of(step, n, batch_size, seed):
    """The indices (batch_size,), out of 0 ... n - 1, of the images of step 1, 2, ...: a function of (seed, step).

    Each epoch contains all n images once, in a new random order. The sequence of all epochs is cut into batches.
    """
    positions = np.arange((step - 1) * batch_size, step * batch_size)
    epochs = range(positions[0] // n, positions[-1] // n + 1)
    return np.concatenate([permutation(n, seed, epoch)[positions[positions // n == epoch] % n] for epoch in epochs])


@lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)
