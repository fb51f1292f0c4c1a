"""data.images.load: the data set that --data names."""
import numpy as np
import pytest
import torch
from PIL import Image

from data import images
from data.images import glyphs


@pytest.fixture
def cifar_folder(tmp_path):
    """Thirty training images and ten test images in the layout of CIFAR-10."""
    rng = np.random.default_rng(0)
    for name, n in (("data_batch_1.bin", 30), ("test_batch.bin", 10)):
        rows = rng.integers(256, size=(n, 3073), dtype=np.uint8)
        rows[:, 0] = np.arange(n) % 10
        (tmp_path / name).write_bytes(rows.tobytes())
    return tmp_path


def test_glyphs_are_generated(monkeypatch):
    monkeypatch.setitem(images.N_GLYPHS, "train", 50)
    monkeypatch.setitem(images.N_GLYPHS, "test", 20)
    data = images.load("glyphs", data_dir="unused", val_size=10)
    assert (data.name, data.n_classes, data.size) == ("glyphs", 34, 32)
    assert [data.facts[part] for part in ("train", "val", "test")] == [40, 10, 20]
    x, y = glyphs.generate("test", 20, 0)
    assert np.array_equal(data.parts["test"][0], x) and np.array_equal(data.parts["test"][1], y)


def test_a_folder_of_cifar_is_read_and_its_facts_are_plain_python(cifar_folder, tmp_path):
    data = images.load(str(cifar_folder), data_dir="unused", val_size=10)
    assert isinstance(data, images.Images) and (data.name, data.n_classes, data.size) == ("cifar10", 10, 32)
    assert data.mean == images.STATISTICS["cifar10"][0]
    torch.save(data.facts, tmp_path / "facts.pt")
    assert torch.load(tmp_path / "facts.pt", weights_only=True) == data.facts
    assert {type(value) for value in data.facts.values()} == {str, int}


def test_a_folder_of_imagenet_is_opened_with_the_given_options(tmp_path):
    for part, name in (("train", "a"), ("train", "b"), ("val", "a"), ("val", "b")):
        (tmp_path / part / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (9, 9)).save(tmp_path / part / name / f"{i}.png")
    data = images.load(str(tmp_path), data_dir="unused", image_size=8, val_size=2, workers=0)
    assert isinstance(data, images.ImageNet) and (data.size, data.workers, data.facts["val"]) == (8, 0, 2)
    assert images.load(str(tmp_path), data_dir="unused", val_size=2).size == 224
    assert {type(value) for value in data.facts.values()} == {str, int}


@pytest.mark.parametrize("name, options, words", [
    ("nowhere", {}, "no folder nowhere: --data takes glyphs, sort_of_clevr, cifar10, cifar100, or a folder"),
    ("{empty}", {}, "is not a folder with data_batch_1.bin"),
    ("{python}", {}, "holds the Python version of CIFAR"),
    ("glyphs", {"image_size": 64}, "image_size=64: only for ImageNet; images of glyphs are 32 pixels wide"),
    ("{cifar}", {"val_size": 30}, "val_size=30: there are only 30 training images of cifar10"),
])
def test_wrong_names_and_options_are_errors_of_one_line(cifar_folder, tmp_path_factory, name, options, words):
    empty, python = tmp_path_factory.mktemp("empty"), tmp_path_factory.mktemp("python")
    (python / "data_batch_1").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=words) as error:
        images.load(name.format(empty=empty, python=python, cifar=cifar_folder),
                    **{**dict(data_dir="unused", val_size=2), **options})
    assert "\n" not in str(error.value)
