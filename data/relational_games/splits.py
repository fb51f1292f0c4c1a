"""Training and test images of one experiment: generated, or taken from original files, without overlap."""
from functools import lru_cache

import numpy as np

from data import npz
from data.relational_games.files import find_file, load_npz
from data.relational_games.rules import SPRITES, generate


def split(task, sprites, train_size, test_size, seed, *, data="generated", test_data="", data_dir="data/cache",
          alternative=False):
    """-> (training images, labels), {sprites: (test images, labels)}: uint8 (n, 36, 36, 3), int64 (n,).

    sprites: of the training images; the keys of the dictionary are those of tested_sprites.
    data: "generated", "mini", or a folder of original files; test_data: the same for the test images, default: data.
    No test image of the training sprites equals a training image. `same` has so few different true images that this
    would happen often: such training images are replaced by the next ones with the same label. (authors' code: splits
    with replacement)
    Raises ValueError if a file is missing or has too few images, DownloadError if it cannot be downloaded.
    """
    files = dict(data=data, test_data=test_data, data_dir=data_dir)
    tests = {}
    for name in tested_sprites(task, sprites, **files):
        tests[name] = test_images(task, name, test_size, seed, data=test_data or data, data_dir=data_dir,
                                  alternative=alternative)
    test_set = {image.tobytes() for image in tests[sprites][0]}
    images, labels = training_images(task, sprites, 2 * train_size, seed, skip=test_size, data=data, data_dir=data_dir,
                                     alternative=alternative)
    new = np.array([image.tobytes() not in test_set for image in images], bool)
    chosen = []
    for label in (0, 1):
        wanted = (labels[:train_size] == label).sum()
        chosen += np.flatnonzero(new & (labels == label))[:wanted].tolist()
    for name, size, n in (("test_size", test_size, len(tests[sprites][0])), ("train_size", train_size, len(chosen))):
        if n < size:
            raise ValueError(f"{name}={size}: only {n:,} images of {task}, {sprites} are left for that (test images "
                             f"are taken first)")
    return (images[np.sort(chosen)], labels[np.sort(chosen)]), tests


def tested_sprites(task, sprites, *, data="generated", test_data="", data_dir="data/cache"):
    """The sets of sprites to test on: the training sprites, and the others as far as their files exist."""
    data, found = test_data or data, []
    for name in SPRITES:
        try:
            if data != "generated":
                find_file(data, task, name, data_dir)
            found.append(name)
        except ValueError:
            if name == sprites or data == "mini":
                raise
    return found


def test_images(task, sprites, n, seed, *, data="generated", data_dir="data/cache", alternative=False):
    """-> n images and labels for testing; of a file that has fewer, all of them."""
    if data == "generated":
        return generate(task, sprites, n, 2 * seed, alternative)
    return shuffled(task, sprites, seed, data, data_dir, 0, n)


def training_images(task, sprites, n, seed, *, skip, data="generated", data_dir="data/cache", alternative=False):
    """-> up to n images and labels for training. skip: this many images of a file are test images."""
    if data == "generated":
        return generate(task, sprites, n, 2 * seed + 1, alternative)
    return shuffled(task, sprites, seed, data, data_dir, skip, skip + n)


def shuffled(task, sprites, seed, data, data_dir, start, stop):
    """Images and labels number start ... stop - 1 of an original file in random order."""
    images, labels = load(find_file(data, task, sprites, data_dir), task)
    order = np.random.default_rng(seed).permutation(len(images))[start:stop]
    return images[order], labels[order]


load = lru_cache(maxsize=len(SPRITES))(load_npz)                       # reading a full file takes a while


def fingerprints(task, sprites, *, data="generated", test_data="", data_dir="data/cache"):
    """-> {"training" or "test, <sprites>": checksums} of the original files that an experiment reads."""
    files = {}
    if data != "generated":
        files["training"] = npz.fingerprint(find_file(data, task, sprites, data_dir))
    if (test_data or data) != "generated":
        for name in tested_sprites(task, sprites, data=data, test_data=test_data, data_dir=data_dir):
            files[f"test, {name}"] = npz.fingerprint(find_file(test_data or data, task, name, data_dir))
    return files
