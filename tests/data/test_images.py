"""Images in memory: CIFAR's files are read correctly, pixel by pixel; every epoch has every training image once.

If DAT_TEST_DATA is set, also with files of the real CIFAR-10 in $DAT_TEST_DATA/data/cifar-10-batches-bin.
"""
import hashlib
import itertools
import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from test_download import server               # noqa: F401 (a fixture)
from test_extract import make_tar

from data import images
from data.download import DownloadError
from data.images import Images, class_names, kind_of, load_cifar10, load_cifar100, rows_of

REAL = Path(os.environ.get("DAT_TEST_DATA", "/nowhere")) / "data/cifar-10-batches-bin"
real_data = pytest.mark.skipif(not REAL.exists(), reason="DAT_TEST_DATA is not set")
LABELS = {"cifar10": 1, "cifar100": 2}          # bytes before the pixels


def pixel(seed, colour, y, x):
    """A different value for each colour, row and column."""
    return (seed * 101 + colour * 83 + y * 7 + x * 3 + y * x) % 256


def row(labels, seed):
    """A row as documented by CIFAR: label bytes, then 1024 bytes of red, of green and of blue, row by row."""
    out = bytearray(labels)
    for colour in range(3):
        for y in range(32):
            for x in range(32):
                out.append(pixel(seed, colour, y, x))
    return bytes(out)


def write(folder, **files):
    """files: {name, with _bin for .bin: a tuple of labels per image}; the images of all files are numbered."""
    folder.mkdir(exist_ok=True)
    seeds = itertools.count()
    for name, rows in files.items():
        (folder / name.replace("_bin", ".bin")).write_bytes(b"".join(row(labels, next(seeds)) for labels in rows))
    return folder


def is_image(array, seed):
    """Compares every pixel."""
    assert array.shape == (3, 32, 32) and array.dtype == np.uint8
    return all(array[c, y, x] == pixel(seed, c, y, x) for c in range(3) for y in range(32) for x in range(32))


def check_error(load, folder, *words):
    """Expects a ValueError of one line that contains all the words."""
    with pytest.raises(ValueError) as error:
        load(folder)
    line = str(error.value)
    assert "\n" not in line and all(str(word) in line for word in words), line


# ---- the files -------------------------------------------------------------------------------------------------------

def test_cifar10_is_read_pixel_by_pixel_and_file_by_file(tmp_path):
    """The files are written in another order, and data_batch_4 does not exist."""
    write(tmp_path, data_batch_5_bin=[(7,)], data_batch_2_bin=[(0,), (9,)], test_batch_bin=[(3,), (4,)],
          data_batch_1_bin=[(5,)], data_batch_3_bin=[(1,)])
    x, y, x_test, y_test = load_cifar10(tmp_path)
    assert y.tolist() == [5, 0, 9, 1, 7] and y_test.tolist() == [3, 4] and y.dtype == y_test.dtype == np.int64
    assert x.shape == (5, 3, 32, 32)
    assert all(is_image(image, seed) for image, seed in zip([*x, *x_test], [5, 1, 2, 6, 0, 3, 4]))


def test_of_the_two_labels_of_cifar100_the_fine_one_is_used(tmp_path):
    write(tmp_path, train_bin=[(19, 99), (3, 0)], test_bin=[(1, 42)])
    x, y, x_test, y_test = load_cifar100(tmp_path)
    assert y.tolist() == [99, 0] and y_test.tolist() == [42]
    assert all(is_image(image, seed) for image, seed in zip([*x, *x_test], range(3)))


def test_truncated_files_and_wrong_labels_are_errors_that_name_the_file(tmp_path):
    write(tmp_path, data_batch_1_bin=[(5,)], data_batch_2_bin=[(9,)], test_batch_bin=[(3,)])
    load_cifar10(tmp_path)
    for name in ("data_batch_2.bin", "test_batch.bin"):
        path = tmp_path / name
        good = path.read_bytes()
        for bad in (b"", good[:-1], good[:100], good + b"\0"):                  # empty, truncated, too long
            path.write_bytes(bad)
            check_error(load_cifar10, tmp_path, path, f"{len(bad):,} bytes", "3,073", "truncated")
        path.write_bytes(row((10,), 0))
        check_error(load_cifar10, tmp_path, path, "label 10")
        path.write_bytes(good)
    (tmp_path / "test_batch.bin").unlink()
    check_error(load_cifar10, tmp_path, tmp_path, "no test_batch.bin")


def test_files_of_the_other_cifar_are_errors_even_if_the_length_fits(tmp_path):
    fine = row((19, 99), 1)
    write(tmp_path, data_batch_1_bin=[(5,)], test_batch_bin=[(3,)])
    for copies in (1, 10, 3073):               # 3073 rows of 3074 bytes are 3074 rows of 3073 bytes
        (tmp_path / "data_batch_1.bin").write_bytes(fine * copies)
        check_error(load_cifar10, tmp_path, tmp_path / "data_batch_1.bin", "another file")
    write(tmp_path, test_bin=[(1, 42)])
    for labels, copies, words in (((5,), 1, "bytes"), ((5,), 3074, "label"), ((19, 100), 1, "label 100")):
        (tmp_path / "train.bin").write_bytes(row(labels, 1) * copies)
        check_error(load_cifar100, tmp_path, tmp_path / "train.bin", words)


def test_folders_without_the_files_are_errors(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        check_error(load_cifar10, folder, folder, "no data_batch_1.bin")
        check_error(load_cifar100, folder, folder, "no train.bin")
        check_error(kind_of, folder, folder, "CIFAR-10", "CIFAR-100", "ImageNet")
    write(tmp_path / "100", train_bin=[(1, 2)])
    check_error(load_cifar100, tmp_path / "100", "no test.bin")


def test_the_kind_of_a_folder_is_known_by_its_files(tmp_path):
    assert kind_of(write(tmp_path / "a", data_batch_3_bin=[])) == "cifar10"
    assert kind_of(write(tmp_path / "b", train_bin=[])) == "cifar100"
    (tmp_path / "c" / "train").mkdir(parents=True)
    assert kind_of(tmp_path / "c") == "imagenet"


def test_class_names_are_those_in_the_folder_or_numbers(tmp_path):
    assert class_names("cifar10", tmp_path) == [str(i) for i in range(10)]
    (tmp_path / "batches.meta.txt").write_text("\n".join("abcdefghij") + "\n\n")     # the real file ends like this
    (tmp_path / "fine_label_names.txt").write_text("\n".join(f"fine_{i}" for i in range(100)) + "\n")
    assert class_names("cifar10", tmp_path) == list("abcdefghij")
    assert class_names("cifar100", tmp_path) == [f"fine_{i}" for i in range(100)]
    (tmp_path / "batches.meta.txt").write_text("only\ntwo\n")
    assert class_names("cifar10", tmp_path) == [str(i) for i in range(10)]


def official(tmp_path, name):
    """A small archive with the layout of the real one, and a file that is not needed."""
    folder, labels = images.FOLDERS[name], (7,) * LABELS[name]
    train, test, names = images.FILES[name]
    members = {f"{folder}/{file}": row(labels, seed) for seed, file in enumerate((*train, test))}
    members |= {f"{folder}/{names}": b"\n".join(b"class%d" % i for i in range(10 if name == "cifar10" else 100)),
                f"{folder}/readme.html": b"<html>"}
    return make_tar(tmp_path / "official.tar.gz", members).read_bytes()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_downloaded_once_verified_unpacked_and_read(server, tmp_path, monkeypatch, name):      # noqa: F811
    server.body = official(tmp_path, name)
    facts = dict(url=server.url, size=len(server.body), sha256=hashlib.sha256(server.body).hexdigest())
    monkeypatch.setitem(images.CIFAR, name, facts)
    for _ in range(2):
        folder = images.fetch_cifar(name, tmp_path / "cache")
        assert len(server.requests) == 1 and kind_of(folder) == name and not (folder / "readme.html").exists()
    x, y, x_test, y_test = images.load_cifar(name, folder)
    n = len(images.FILES[name][0])
    assert len(x) == n and y.tolist() == [7] * n and is_image(x[-1], n - 1) and is_image(x_test[0], n)
    assert class_names(name, folder)[9] == "class9"

    monkeypatch.setitem(images.CIFAR, name, {**facts, "sha256": "0" * 64})
    with pytest.raises(DownloadError, match="SHA-256"):
        images.fetch_cifar(name, tmp_path / "other")
    assert not list((tmp_path / "other").glob("cifar*"))


# ---- data sets -------------------------------------------------------------------------------------------------------

def numbered(n, first=0, size=4):
    """n images, each filled with its own number, and the labels number % 3."""
    numbers = np.arange(first, first + n)
    x = np.broadcast_to(numbers[:, None, None, None], (n, 3, size, size)).astype(np.uint8)
    return x, numbers % 3


def make(n=30, val_size=7, **changes):
    options = dict(class_names=list("abc"), mean=(0.5,) * 3, std=(0.2,) * 3, val_size=val_size)
    return Images("numbers", numbered(n), numbered(11, first=200), **{**options, **changes})


def numbers(x, y):
    """The numbers of the images in a batch. Checks their labels."""
    found = x[:, 0, 0, 0]
    assert (x == found[:, None, None, None]).all() and torch.equal(y, found.long() % 3)
    return found.tolist()


def of_part(data, part, batch_size=4):
    return [number for batch in data.batches(part, batch_size) for number in numbers(*batch)]


def test_validation_images_are_a_fixed_random_part_of_the_training_images():
    data = make()
    train, val = numbers(*data.parts["train"]), of_part(data, "val")
    assert len(val) == 7 and not set(val) & set(train) and sorted(val + train) == list(range(30))
    assert val == sorted(val) != list(range(7)) and val != list(range(23, 30))          # random
    assert of_part(data, "test") == list(range(200, 211))
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert of_part(make(), "val") == val                                                # whatever the seed
    assert data.facts == {**data.facts, "data": "numbers", "classes": 3, "train": 23, "val": 7, "test": 11}
    assert (data.n_classes, data.size, data.class_names) == (3, 4, ["a", "b", "c"])


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_evaluation_batches_contain_all_images_once_in_order(batch_size):
    assert of_part(make(), "test", batch_size) == list(range(200, 211))
    lengths = [len(x) for x, _ in make().batches("test", batch_size)]
    assert all(length == batch_size for length in lengths[:-1]) and sum(lengths) == 11


@pytest.mark.parametrize("val_size", [30, 31])
def test_too_large_a_val_size_is_an_error(val_size):
    check_error(lambda size: make(val_size=size), val_size, f"val_size={val_size}", "30", "numbers")
    assert len(make(val_size=29).parts["train"][1]) == 1


def first_batches(data, batch_size, seed, first_step, steps):
    batches = data.training_batches(batch_size, seed, first_step)
    out = [numbers(*batch) for batch in itertools.islice(batches, steps)]
    assert all(len(batch) == batch_size for batch in out)
    return out


@pytest.mark.parametrize("batch_size", [1, 5, 6, 23, 40, 50])                   # 23 training images
def test_every_epoch_has_every_image_once_even_if_batches_cross_its_end(batch_size):
    data = make()
    everything = sorted(numbers(*data.parts["train"]))
    sequence = sum(first_batches(data, batch_size, 1, 1, -(-4 * 23 // batch_size)), [])
    epochs = [sequence[start:start + 23] for start in range(0, 4 * 23, 23)]
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4 and everything not in epochs    # in different orders


def test_training_batches_are_a_function_of_seed_and_step_alone():
    data, first = make(), first_batches(make(), 6, 3, 1, 12)
    assert first_batches(data, 6, 3, 5, 8) == first[4:]                                 # as after a resume at step 5
    assert [first_batches(data, 6, 3, step, 1)[0] for step in (9, 2, 12, 1)] == [first[i] for i in (8, 1, 11, 0)]
    torch.manual_seed(7), np.random.seed(7)
    assert first_batches(data, 6, 3, 1, 12) == first
    assert first_batches(data, 6, 4, 1, 12) != first


def test_all_images_are_equally_likely_to_come_first():
    """Each of 5 images about 400 times in 2000; five standard deviations are 90."""
    counts = Counter(int(rows_of(1, 5, 1, seed)[0]) for seed in range(2000))
    assert set(counts) == set(range(5)) and all(abs(count - 400) < 90 for count in counts.values())


def test_the_checksum_depends_on_all_pixels_and_labels():
    digests = {make().facts["sha256"], make().facts["sha256"]}
    assert len(digests) == 1 and len(*digests) == 64
    for part, which in itertools.product(range(2), range(2)):
        parts = [list(map(np.copy, numbered(30))), list(map(np.copy, numbered(11, first=200)))]
        parts[part][which].reshape(-1)[-1] ^= 1
        data = Images("numbers", *map(tuple, parts), class_names=list("abc"), mean=(0,) * 3, std=(1,) * 3, val_size=7)
        digests.add(data.facts["sha256"])
    assert len(digests) == 5


# ---- the real files --------------------------------------------------------------------------------------------------

def correlation(a, b):
    return np.corrcoef(a.astype(float).ravel(), b.astype(float).ravel())[0, 1]


@real_data
def test_the_real_cifar10_has_the_statistics_of_natural_images():
    x, y, x_test, y_test = load_cifar10(REAL)
    assert x.shape == (10_000, 3, 32, 32) and x_test.shape == (1_000, 3, 32, 32)
    assert kind_of(REAL) == "cifar10" and class_names("cifar10", REAL)[:4] == ["airplane", "automobile", "bird", "cat"]
    for labels in (y, y_test):
        counts = np.bincount(labels, minlength=10)
        assert len(counts) == 10 and (abs(counts - len(labels) / 10) < 0.2 * len(labels) / 10).all()
    for pixels in (x, x_test):
        mean, std = images.STATISTICS["cifar10"]
        assert pixels.mean((0, 2, 3)) / 255 == pytest.approx(mean, abs=0.01)    # different for red, green and blue
        assert pixels.std((0, 2, 3)) / 255 == pytest.approx(std, abs=0.01)
        some = pixels[:500]
        assert correlation(some[:, :, 1:], some[:, :, :-1]) > 0.9               # vertical neighbours
        assert correlation(some[..., 1:], some[..., :-1]) > 0.9                 # horizontal neighbours
        assert 0.8 < correlation(some[:, 0], some[:, 1]) < 0.99                 # the three colours of an image
        assert correlation(some[:, :, 0], some[:, :, -1]) < 0.5                 # opposite edges
