"""Training and test images of Relational Games: without overlap, from generated images and from original files."""
import numpy as np
import pytest

from data import relational_games as games
from data.relational_games import splits


def test_no_test_image_equals_a_training_image():
    (images, labels), tests = games.split("same", "pentos", 3000, 3000, seed=1)
    test_set = {image.tobytes() for image in tests["pentos"][0]}
    assert not test_set & {image.tobytes() for image in images}
    assert len(images) == len(labels) == 3000
    assert {name: len(x) for name, (x, _) in tests.items()} == dict.fromkeys(games.SPRITES, 3000)
    raw, raw_labels = (array[:3000] for array in games.generate("same", "pentos", 6000, 3))
    overlap = np.array([image.tobytes() in test_set for image in raw])  # without replacement there would be an overlap
    assert overlap.sum() > 50 and raw_labels[overlap].mean() > 0.9      # mostly of true images
    assert labels.sum() == raw_labels.sum()                             # which are replaced by true images


def test_images_are_a_function_of_the_seed():
    one, again, other = (games.split("occurs", "pentos", 50, 50, seed) for seed in (1, 1, 2))
    assert np.array_equal(one[0][0], again[0][0]) and np.array_equal(one[1]["hexos"][0], again[1]["hexos"][0])
    assert not np.array_equal(one[0][0], other[0][0]) and not np.array_equal(one[1]["pentos"][0], other[1]["pentos"][0])


@pytest.fixture
def files(tmp_path):
    """A folder with an original file of 100 images of pentos and one of 40 images of hexos."""
    splits.load.cache_clear()
    for sprites, n in (("pentos", 100), ("hexos", 40)):
        images, labels = games.generate("between", sprites, n, 1)
        np.savez(tmp_path / f"1task_between_{sprites}.npz", images=images.astype(np.int64), labels=labels[:, None])
    return tmp_path


def test_original_files_are_split_without_overlap_and_sprites_without_a_file_are_left_out(files):
    (images, _), tests = games.split("between", "pentos", 60, 40, seed=1, data=str(files))
    assert tests.keys() == {"pentos", "hexos"} and len(images) == 60 and len(tests["pentos"][0]) == 40
    both = [*images, *tests["pentos"][0]]
    all_images, _ = games.load_npz(files / "1task_between_pentos.npz")
    assert {image.tobytes() for image in both} == {image.tobytes() for image in all_images}


def test_generated_training_images_can_be_tested_on_original_files(files):
    arguments = dict(data="generated", test_data=str(files))
    (images, _), tests = games.split("between", "pentos", 60, 40, seed=1, **arguments)
    assert np.array_equal(images, games.generate("between", "pentos", 120, 3)[0][:60])
    assert tests.keys() == {"pentos", "hexos"} == set(games.tested_sprites("between", "pentos", **arguments))
    hexos, _ = games.load_npz(files / "1task_between_hexos.npz")
    assert {image.tobytes() for image in tests["hexos"][0]} == {image.tobytes() for image in hexos}


def test_fingerprints_are_the_checksums_of_the_files_that_are_read(files):
    assert games.fingerprints("between", "pentos") == {}                # generated images
    found = games.fingerprints("between", "pentos", data=str(files))
    assert found.keys() == {"training", "test, pentos", "test, hexos"} and found["training"] == found["test, pentos"]
    assert found["training"].keys() == {"images.npy", "labels.npy"}
    assert games.fingerprints("between", "pentos", test_data=str(files)).keys() == {"test, pentos", "test, hexos"}
    images, labels = games.load_npz(files / "1task_between_pentos.npz")
    np.savez(files / "1task_between_pentos.npz", images=images.astype(np.int64), labels=1 - labels[:, None])
    changed = games.fingerprints("between", "pentos", data=str(files))
    assert changed["training"] != found["training"] and changed["test, hexos"] == found["test, hexos"]


@pytest.mark.parametrize("options, words", [
    (dict(train_size=61, test_size=40), "train_size=61: only 60 images of between, pentos are left"),
    (dict(train_size=2, test_size=101), "test_size=101: only 100 images"),
    (dict(sprites="stripes"), "no 1task_between_stripes.npz"),
    (dict(task="same"), "no same_pentos.npz"),
    (dict(test_data="/nowhere"), "no 1task_between_pentos.npz or mini_between_pentos.npz in /nowhere"),
])
def test_missing_files_and_too_few_images_are_errors(files, options, words):
    arguments = dict(task="between", sprites="pentos", train_size=10, test_size=5000, seed=1, data=str(files))
    with pytest.raises(ValueError, match=words):
        games.split(**{**arguments, **options})
