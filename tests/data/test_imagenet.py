"""ImageNet from a folder: crops, order of the images, worker processes, damaged files and folders."""
import itertools
import math
import multiprocessing
import os
import signal
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from data.images import rows_of
from data.images.imagenet import ImageNet, centre_crop, decoded, random_box, random_resized_crop

CLASSES = ("n01", "n02", "n03")
TRAIN, TEST, VAL = 8, 3, 5                     # training and test images of each class, validation images in all


def flat(number):
    """An image of one colour, which identifies it after any crop."""
    return Image.new("RGB", (30 + number % 7, 20), (number, 255 - number, 7))


def gradient(width, height):
    """Red is the x coordinate of a pixel, green the y coordinate."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


@pytest.fixture
def folder(tmp_path):
    """Class i has training images of the colours 20 i + 0 ... 7 and test images of the colours 20 i + 10 ... 12."""
    for i, name in enumerate(CLASSES):
        for part, first, n in (("train", 0, TRAIN), ("val", 10, TEST)):
            (tmp_path / part / name).mkdir(parents=True)
            for j in range(first, first + n):
                flat(20 * i + j).save(tmp_path / part / name / f"{name}_{j:02}.png")
    return tmp_path


def opened(folder, **options):
    return ImageNet(folder, **{**dict(size=8, val_size=VAL, workers=0), **options})


def first_batches(batches, n):
    """The first n batches; closes the generator."""
    out = list(itertools.islice(batches, n))
    batches.close()
    return out


def colours(batches):
    """The colours of all images in the batches."""
    return [number for images, _ in batches for number in images[:, 0, 0, 0].tolist()]


def same(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for x, y in zip(one, other) for a, b in zip(x, y))


# ---- crops -----------------------------------------------------------------------------------------------------------

def reference_boxes(width, height, n):
    """Widths and heights of n crops, drawn as in torchvision's RandomResizedCrop.get_params, but all at once."""
    rng = np.random.default_rng(5)
    area = width * height * rng.uniform(0.08, 1, (n, 10))
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), (n, 10)))
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w <= width) & (h <= height)
    first = np.arange(n), fits.argmax(1)
    return w[first][fits.any(1)], h[first][fits.any(1)]


def kolmogorov_smirnov(one, other):
    """The largest difference between the distribution functions of two samples."""
    at = np.concatenate([one, other])
    return max(abs(np.searchsorted(np.sort(one), at, "right") / len(one) -
                   np.searchsorted(np.sort(other), at, "right") / len(other)))


@pytest.mark.parametrize("width, height", [(400, 400), (500, 333), (300, 420)])
def test_random_boxes_are_inside_the_image_and_have_the_documented_distribution(width, height):
    n, rng = 10_000, np.random.default_rng(0)
    left, top, right, bottom = np.array([random_box(width, height, rng) for _ in range(n)]).T
    w, h = right - left, bottom - top
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= width and bottom.max() <= height
    assert 0.078 < (w * h).min() / (width * height) < 0.085
    assert 0.74 < (w / h).min() < 0.76 and 1.32 < (w / h).max() < 1.35
    tolerance = 2.2 * math.sqrt(2 / n)                                 # exceeded by chance with probability 1/8000
    expected_w, expected_h = reference_boxes(width, height, n)
    assert kolmogorov_smirnov(w * h, expected_w * expected_h) < tolerance
    assert kolmogorov_smirnov(w / h, expected_w / expected_h) < tolerance
    uniform = np.linspace(0, 1, n)
    for start, largest in ((left, width - w), (top, height - h)):
        assert kolmogorov_smirnov((start + rng.uniform(0, 1, n)) / (largest + 1), uniform) < tolerance


@pytest.mark.parametrize("width, height, box", [(1000, 10, (493, 0, 506, 10)), (10, 1000, (0, 493, 10, 506)),
                                                (1, 1, (0, 0, 1, 1))])
def test_of_images_with_an_extreme_shape_the_centre_is_used(width, height, box):
    assert {random_box(width, height, np.random.default_rng(seed)) for seed in range(20)} == {box}


def test_after_ten_boxes_that_do_not_fit_the_largest_one_is_used():
    class Largest:
        tries = 0

        def uniform(self, low, high):
            self.tries += 1
            return high
    rng = Largest()
    assert random_box(100, 100, rng) == (0, 0, 100, 100) and rng.tries == 20   # area and aspect ratio, ten times


def test_a_random_crop_shows_the_pixels_of_its_box():
    image = gradient(200, 150)
    for seed in range(20):
        left, top, right, bottom = random_box(200, 150, np.random.default_rng(seed))
        crop = np.asarray(random_resized_crop(image, 32, np.random.default_rng(seed))).astype(float)
        expected = image.crop((left, top, right, bottom)).resize((32, 32), Image.Resampling.BILINEAR)
        assert np.array_equal(crop, np.asarray(expected))
        centres = (np.arange(32) + 0.5) / 32
        x, y = left + centres * (right - left) - 0.5, top + centres * (bottom - top) - 0.5
        inner = slice(2, -2)                                           # interpolation at the edge uses fewer pixels
        assert abs(crop[inner, inner, 0] - x[inner]).max() < 1 and abs(crop[inner, inner, 1].T - y[inner]).max() < 1


def test_evaluation_uses_the_centre_of_the_image():
    for width, height in ((256, 128), (128, 256), (100, 75), (64, 64), (65, 37)):
        crop = np.asarray(centre_crop(gradient(width, height), 56)).astype(float)
        scale = min(width, height) / 64                                # the shorter side becomes 56 * 256 / 224 = 64
        expected = (np.arange(56) - 27.5) * scale
        inner = slice(2, -2)
        assert crop.shape == (56, 56, 3)
        assert abs(crop[inner, inner, 0] - expected[inner] - (width - 1) / 2).max() < 1 + scale / 2
        assert abs(crop[inner, inner, 1].T - expected[inner] - (height - 1) / 2).max() < 1 + scale / 2
    expected = gradient(200, 100).resize((512, 256), Image.Resampling.BILINEAR).crop((144, 16, 368, 240))
    assert np.array_equal(np.asarray(centre_crop(gradient(200, 100), 224)), np.asarray(expected))


def test_all_colour_modes_are_converted_to_rgb(tmp_path):
    for mode, ending, colour in [("RGB", "jpg", (250, 10, 20)), ("CMYK", "jpg", (250, 10, 20)), ("L", "jpg", (83,) * 3),
                               ("P", "png", (250, 10, 20)), ("RGBA", "png", (250, 10, 20)), ("LA", "png", (83,) * 3),
                               ("1", "png", (255, 255, 255))]:
        path, image = tmp_path / f"x.{ending}", Image.new("RGB", (16, 16), (250, 10, 20) if mode != "1" else "white")
        (image.quantize(2) if mode == "P" else image.convert(mode)).save(path)
        assert Image.open(path).mode == mode and decoded(path).mode == "RGB" and decoded(path).size == (16, 16)
        assert abs(np.asarray(decoded(path)).astype(int) - colour).max() < 5, mode


# ---- batches ---------------------------------------------------------------------------------------------------------

def test_batches_are_uint8_with_the_labels_of_their_folders(folder):
    data = opened(folder)
    assert (data.name, data.n_classes, data.class_names, data.size) == ("imagenet", 3, list(CLASSES), 8)
    (x, y), = first_batches(data.training_batches(7, 1, 1), 1)
    assert x.shape == (7, 3, 8, 8) and x.dtype == torch.uint8 and y.shape == (7,) and y.dtype == torch.int64
    assert x.is_contiguous()
    for images, labels in (x, y), *data.batches("val", 4), *data.batches("test", 4):
        number = images[:, 0, 0, 0]
        assert torch.equal(number.long() // 20, labels)
        colour = torch.stack([number, 255 - number, 0 * number + 7], 1)
        assert torch.equal(images, colour[:, :, None, None].expand_as(images))
    assert [len(y) for _, y in data.batches("test", 4)] == [4, 4, 1]


def test_every_epoch_has_every_training_image_once_and_no_validation_image(folder):
    data = opened(folder)
    val, test = (colours(data.batches(part, 4)) for part in ("val", "test"))
    assert sorted(test) == [20 * i + j for i in range(3) for j in range(10, 13)] and test != sorted(test)
    assert len(set(val)) == VAL and val == sorted(val)
    everything = {20 * i + j for i in range(3) for j in range(TRAIN)}
    train = sorted(everything - set(val))
    n = len(train)
    assert [data.facts[part] for part in ("train", "val", "test")] == [n, VAL, 9] and n == 24 - VAL
    epochs = [colours(first_batches(data.training_batches(n, seed, 1), 2)) for seed in (1, 2)]
    for epoch in (epochs[0][:n], epochs[0][n:], epochs[1][:n]):
        assert sorted(epoch) == train
    assert epochs[0] == [train[row] for step in (1, 2) for row in rows_of(step, n, n, 1)]
    assert epochs[0] != epochs[1] and colours(opened(folder).batches("val", 4)) == val


def test_a_batch_is_a_function_of_seed_and_step(tmp_path):
    for part, name in itertools.product(("train", "val"), ("a", "b")):
        (tmp_path / part / name).mkdir(parents=True)
        for j in range(3):
            gradient(200, 150).save(tmp_path / part / name / f"{j}.JPEG")      # the same image: only crops differ
    data = opened(tmp_path, val_size=2)
    steps = first_batches(data.training_batches(4, 1, 1), 6)
    crops = torch.cat([images for images, _ in steps]).flatten(1)
    assert len(crops.unique(dim=0)) == 24                              # all crops of all steps differ
    image = decoded(tmp_path / "val" / "a" / "0.JPEG")
    third = random_resized_crop(image, 8, np.random.default_rng([1, 2, 3]))    # seed 1, step 2, third image
    assert torch.equal(steps[1][0][2].permute(1, 2, 0), torch.from_numpy(np.array(third)))
    centre = torch.from_numpy(np.array(centre_crop(image, 8)))
    assert torch.equal(next(data.batches("test", 1))[0][0].permute(1, 2, 0), centre)
    assert same(steps[2:], first_batches(data.training_batches(4, 1, 3), 4))
    with_workers = opened(tmp_path, val_size=2, workers=2)
    assert same(steps, first_batches(with_workers.training_batches(4, 1, 1), 6))
    assert same(steps[2:], first_batches(with_workers.training_batches(4, 1, 3), 4))
    assert same(list(data.batches("test", 1)), list(with_workers.batches("test", 1)))
    halves = first_batches(with_workers.training_batches(2, 1, 3, grad_accum=2), 8)  # the same steps, in two batches
    assert same([tuple(torch.cat(pair) for pair in zip(*halves[i:i + 2])) for i in range(0, 8, 2)], steps[2:])
    other = torch.cat([images for images, _ in first_batches(data.training_batches(4, 2, 1), 6)]).flatten(1)
    assert len(torch.cat([crops, other]).unique(dim=0)) == 48


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_does_not_change_pytorchs_random_state(folder, workers):
    """Otherwise a resumed run, which starts to read at another step, would have other dropout."""
    data = opened(folder, workers=workers)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first_batches(data.training_batches(4, 1, 1), 2)
    list(data.batches("val", 4))
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_ignore_ctrl_c_and_end_with_the_generator(folder, capfd):
    batches = opened(folder, workers=2).training_batches(4, 1, 1)
    for _ in range(4):                                                 # both workers are running
        next(batches)
    for worker in (workers := multiprocessing.active_children()):
        os.kill(worker.pid, signal.SIGINT)
    for _ in range(12):                                                # more than were prefetched
        next(batches)
    assert len(workers) == 2 and multiprocessing.active_children() == workers
    batches.close()
    assert multiprocessing.active_children() == [] and capfd.readouterr().err == ""


# ---- damaged files ---------------------------------------------------------------------------------------------------

def add_bad_files(folder):
    """Puts seven files that are not valid images into the class n01 and returns their names."""
    there = folder / "train" / "n01"
    flat(9).resize((300, 300)).save(there / "truncated.JPEG")
    (there / "truncated.JPEG").write_bytes((there / "truncated.JPEG").read_bytes()[:-300])
    flat(9).save(there / "broken.png")
    (there / "broken.png").write_bytes((there / "broken.png").read_bytes()[:40] + b"x" * 100)
    (there / "text.jpg").write_text("<html>Not found</html>")
    (there / "empty.jpeg").touch()
    (there / "lost.JPG").symlink_to(folder / "nowhere.JPG")
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(there / "deep.png")
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0), b"IDAT"]
    (there / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks))
    return [f"train/n01/{name}" for name in ("bomb.png", "broken.png", "deep.png", "empty.jpeg", "lost.JPG", "text.jpg",
                                             "truncated.JPEG")]


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_files_are_left_out_and_reported_once(folder, capsys, workers):
    bad = add_bad_files(folder)
    data = opened(folder, workers=workers)
    n = data.facts["train"]
    assert n == 24 + len(bad) - VAL
    val = list(data.batches("val", VAL))
    held_out = sorted(data.unreadable)                                 # some of the bad files are validation images
    assert sum(len(y) for _, y in val) == VAL - len(held_out) and 0 < len(held_out) < len(bad)
    train = first_batches(data.training_batches(n, 1, 1), 3)                   # three epochs, a batch each
    assert [len(y) for _, y in train] == [len(x) for x, _ in train] == [n - len(bad) + len(held_out)] * 3
    assert all(sorted(colours([batch]) + colours(val)) == [20 * i + j for i in range(3) for j in range(8)]
               for batch in train)
    assert all(torch.equal(x[:, 0, 0, 0].long() // 20, y) for x, y in train)
    list(data.batches("val", VAL))
    assert sorted(data.unreadable) == bad
    messages = capsys.readouterr().err.splitlines()
    assert sorted(line.split(" is left out: ")[0] for line in messages) == [str(folder / name) for name in bad]
    for name, why in [("lost.JPG", "No such file"), ("text.jpg", "cannot identify"), ("truncated.JPEG", "truncated"),
                      ("deep.png", "8 bits"), ("bomb.png", "decompression bomb")]:
        line, = (line for line in messages if name in line)
        assert why in line.split(" is left out: ")[1] and line.count(str(folder)) == 1


def test_a_missing_file_does_not_change_the_other_images_of_its_batch(folder):
    data = opened(folder)
    (before, labels), = first_batches(data.training_batches(6, 1, 1), 1)
    third = os.fsdecode(data.parts["train"][0][rows_of(1, data.facts["train"], 6, 1)[2]])
    (folder / third).unlink()
    (after, rest), = first_batches(data.training_batches(6, 1, 1), 1)
    assert list(data.unreadable) == [third]
    keep = [0, 1, 3, 4, 5]
    assert torch.equal(after, before[keep]) and torch.equal(rest, labels[keep])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_without_readable_images_is_an_error(folder, workers, capsys):
    data = opened(folder, workers=workers)
    for path in folder.glob("*/*/*.png"):
        path.write_bytes(b"")
    for batches in (data.training_batches(4, 1, 1), data.batches("test", 4)):
        with pytest.raises(ValueError, match="none of the 4 images of a batch could be read") as error:
            next(batches)
        assert "\n" not in str(error.value) and f"is the disk of {folder} still mounted" in str(error.value)
    assert capsys.readouterr().err == ""


# ---- the folder ------------------------------------------------------------------------------------------------------

def test_the_checksum_depends_on_names_and_sizes_of_all_images(folder):
    first = opened(folder).facts
    assert list(first) == ["data", "sha256", "classes", "train", "val", "test"] and first == opened(folder).facts
    (folder / "val" / "n02" / "._n02_10.JPEG").write_bytes(b"a hidden file of macOS")
    (folder / "val" / "n02" / "notes.txt").write_text("not an image")
    (folder / "train" / ".cache").mkdir()
    assert opened(folder).facts == first
    (folder / "val" / "n02" / "n02_10.png").write_bytes(b"longer" * 100)
    second = opened(folder).facts
    (folder / "val" / "n02" / "n02_10.png").rename(folder / "val" / "n02" / "n02_09.png")
    third = opened(folder).facts
    (folder / "val" / "n02" / "n02_09.png").rename(folder / "val" / "n03" / "n02_09.png")
    fourth = opened(folder).facts
    flat(1).save(folder / "train" / "n02" / "new.JPG")
    fifth = opened(folder).facts
    assert len({facts["sha256"] for facts in (first, second, third, fourth, fifth)}) == 5
    assert (first["train"], fourth["train"], fifth["train"]) == (19, 19, 20)


def emptied(path):
    for file in path.iterdir():
        file.unlink()
    return path


@pytest.mark.parametrize("change, options, words", [
    (lambda f: (f / "val").rename(f / "v"), {}, "has no folder val/: the expected layout is train/<class>"),
    (lambda f: (f / "train").rename(f / "t"), {}, "has no folder train/: the expected layout is train/<class>"),
    (lambda f: emptied(f / "val" / "n02"), {}, "no images in .*val/n02"),
    (lambda f: emptied(f / "train" / "n03"), {}, "no images in .*train/n03"),
    (lambda f: emptied(f / "val" / "n02").rmdir(), {}, "val has no class folder n02: "),
    (lambda f: emptied(f / "train" / "n02").rmdir(), {}, "train has no class folder n02: "),
    (lambda f: [emptied(f / part / name).rmdir() for part in ("train", "val") for name in ("n01", "n02")], {},
     "train has 1 class folders, but at least two are needed"),
    (lambda f: [(path.rename(f / "val" / path.name), path.parent.rmdir() if not any(path.parent.iterdir()) else None)
                for path in list(f.glob("val/*/*"))], {}, "val has 9 images, but no class folders, .*sort them into"),
    (lambda f: None, {"val_size": 24}, "val_size=24: .*train has only 24 images; .* val_size=2"),
])
def test_a_folder_of_another_layout_is_an_error_of_one_line(folder, change, options, words):
    change(folder)
    with pytest.raises(ValueError, match=words) as error:
        opened(folder, **options)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_a_missing_folder_is_an_error(folder):
    with pytest.raises(ValueError, match="no folder .*nowhere"):
        opened(folder / "nowhere")
