"""Relational Games: labels agree with the pixels, the images are distributed like the original ones, original files."""
import hashlib
import os
import threading
from collections import Counter
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from data import npz
from data import relational_games as games
from data.relational_games import __main__ as command
from data.relational_games import files

TEST_DATA = os.environ.get("DAT_TEST_DATA")
LINES = [{(r, c) for c in range(3)} for r in range(3)] + [{(r, c) for r in range(3)} for c in range(3)]
LINES += [{(i, i) for i in range(3)}, {(i, 2 - i) for i in range(3)}]


# ---- labels, checked by code that uses only the pixels ---------------------------------------------------------------

def parse(image):
    """Image -> {(row, column): (mask, colours)} of the cells that are not empty. Fails if anything is misplaced."""
    cells = image.reshape(3, 12, 3, 12, 3).swapaxes(1, 2)               # (row, column, 12, 12, 3)
    inside = cells[:, :, 1:10, 1:10]
    assert cells.sum(dtype=int) == inside.sum(dtype=int), "pixels outside the 9 x 9 of an object"
    blocks = inside[:, :, ::3, ::3]                                     # (row, column, 3, 3, 3)
    assert np.array_equal(inside, blocks.repeat(3, 2).repeat(3, 3)), "not blocks of 3 x 3 pixels"
    objects = {}
    for r, c in np.argwhere(blocks.any((2, 3, 4))).tolist():
        colours = tuple(map(tuple, blocks[r, c].reshape(9, 3).tolist()))
        objects[r, c] = (tuple(any(colour) for colour in colours), colours)
    return objects


def pattern(three):
    """The pattern of three objects: "ABA" etc."""
    names = {}
    return "".join(names.setdefault(one, "ABC"[len(names)]) for one in three)


def holds(task, o):
    """The definition of the task for parsed objects. Also asserts that they are in the task's cells."""
    if task == "same":
        first, second = o.values()
        return first == second
    if task in ("occurs", "xoccurs"):
        assert set(o) == {(0, 1), (2, 0), (2, 1), (2, 2)}
        top, bottom = o[0, 1], [o[2, c] for c in range(3)]
        if task == "occurs":
            return top in bottom
        assert bottom.count(top) <= 1                                   # otherwise "the other two" is ambiguous
        others = [one for one in bottom if one != top]
        return len(others) == 2 and others[0] != others[1]
    if task == "between":
        assert len(o) == 3
        first, _, last = (o[cell] for cell in sorted(o))
        return set(o) in LINES and first == last
    if task == "match_pattern":
        assert set(o) == {(r, c) for r in (0, 2) for c in range(3)}
        return pattern([o[0, c] for c in range(3)]) == pattern([o[2, c] for c in range(3)])
    column, = {c for _, c in o}
    return pattern([o[r, column] for r in range(3)]) == task.removeprefix("column_")


@pytest.mark.parametrize("sprites", games.SPRITES)
@pytest.mark.parametrize("task", [*games.TASKS, *games.COLUMN_TASKS, "xoccurs, alternative",
                                  "match_pattern, alternative"])
def test_every_label_agrees_with_the_pixels(task, sprites):
    task, _, alternative = task.partition(", ")
    images, labels = games.generate(task, sprites, 2000, 3, bool(alternative))
    assert images.dtype == np.uint8 and images.shape == (2000, 36, 36, 3) and labels.shape == (2000,)
    assert abs(labels.mean() - 0.5) < 0.02
    wrong = [i for i, image in enumerate(images) if holds(task, parse(image)) != labels[i]]
    assert wrong == []


# ---- distributed like the original images ----------------------------------------------------------------------------

# measured in the public files mini_between_hexos and mini_3task_col_patts_hexos, 5,000 images each
BETWEEN = {"kind": {"line, colour": 662, "line, shape": 625, "line, both": 646, "scattered": 542},
           "line when true": [285, 546, 271, 280, 281, 299, 275, 288]}
COLUMNS = {"two different objects": {"colour": 1250, "shape": 1291, "both": 1233},
           "three different objects": {"shape shape shape": 79, "colour both both": 77, "colour colour colour": 72,
                                       "shape both both": 68, "both both both": 53, "shape both colour": 44,
                                       "colour both shape": 43, "shape colour both": 42, "both both colour": 35,
                                       "both shape both": 31, "colour shape both": 29, "both colour both": 21,
                                       "both both shape": 20, "both shape colour": 6, "both colour shape": 2}}


def p_value(counts, others):
    """Of the chi-square test that two lists of counts have the same distribution; rare categories are pooled."""
    table = np.array([counts, others], float)                           # (2, categories)
    rare = table.sum(0) < 10
    table = np.column_stack([table[:, ~rare], table[:, rare].sum(1)])[:, : None if rare.any() else -1]
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    chi2, degrees = ((table - expected) ** 2 / expected).sum(), table.shape[1] - 1
    return torch.special.gammaincc(torch.tensor(degrees / 2), torch.tensor(chi2 / 2)).item()


def difference(a, b):
    """What two parsed objects differ in."""
    return {(True, True): "", (True, False): "colour", (False, True): "shape", (False, False): "both"}[
        a[0] == b[0], max(a[1]) == max(b[1])]


@lru_cache(maxsize=None)
def free_shape(mask):
    """A canonical form: the same for all rotations and reflections of a mask."""
    grid = np.array(mask).reshape(3, 3)
    turned = [np.rot90(g, k) for g in (grid, grid.T) for k in range(4)]
    return min(tuple(map(tuple, np.argwhere(g) - np.argwhere(g).min(0))) for g in turned)


def count_between(images, labels):
    """Counts colours, shapes, masks, the lines of true images, and the kinds of false images."""
    counts = {name: Counter() for name in ("colour", "shape", "mask", "line when true", "kind")}
    for image, label in zip(images, labels):
        o = parse(image)
        for mask, colours in o.values():
            counts["colour"][max(colours)] += 1
            counts["shape"][free_shape(mask)] += 1
            counts["mask"][mask] += 1
        first, _, last = (o[cell] for cell in sorted(o))
        if label:
            counts["line when true"][LINES.index(set(o))] += 1
        else:
            counts["kind"]["line, " + difference(first, last) if set(o) in LINES else "scattered"] += 1
    return counts


@pytest.fixture(scope="module")
def generated():
    """The counts of as many generated images as the public file has."""
    return count_between(*games.generate("between", "hexos", 5000, 1))


def test_between_is_distributed_like_the_public_file(generated):
    assert p_value([generated["line when true"][i] for i in range(8)], BETWEEN["line when true"]) > 0.001
    assert p_value([generated["kind"][kind] for kind in BETWEEN["kind"]], list(BETWEEN["kind"].values())) > 0.001
    assert len(generated["shape"]) == 8 and p_value(list(generated["shape"].values()), [1875] * 8) > 0.001  # uniform
    assert len(generated["colour"]) == 25 and p_value(list(generated["colour"].values()), [600] * 25) > 0.001


@pytest.mark.skipif(not TEST_DATA, reason="needs the public file")
def test_between_has_all_distributions_of_the_public_file(generated):
    real = count_between(*games.load_npz(Path(TEST_DATA) / "data/relational_games/mini_between_hexos.npz"))
    assert real["kind"] == BETWEEN["kind"]
    assert [real["line when true"][i] for i in range(8)] == BETWEEN["line when true"]
    for name, counts in real.items():
        assert counts.keys() == generated[name].keys(), name
        assert p_value([counts[key] for key in counts], [generated[name][key] for key in counts]) > 0.001, name


def test_near_misses_are_distributed_like_those_of_the_public_column_patterns():
    two, three = Counter(), Counter()
    for task in games.COLUMN_TASKS:
        for image in games.generate(task, "hexos", 3000, 1)[0]:
            o = parse(image)
            a, b, c = (o[cell] for cell in sorted(o))
            if len({a, b, c}) == 2:
                two[difference(*{a, b, c})] += 1
            elif len({a, b, c}) == 3:
                three[f"{difference(a, b)} {difference(b, c)} {difference(a, c)}"] += 1
    for measured, generated in ((COLUMNS["two different objects"], two), (COLUMNS["three different objects"], three)):
        assert p_value(list(measured.values()), [generated[key] for key in measured]) > 0.001
        assert generated.keys() <= measured.keys()


def test_false_images_of_xoccurs_violate_the_conditions_as_documented():
    def count(alternative):
        images, labels = games.generate("xoccurs", "pentos", 3000, 1, alternative)
        kinds = Counter()
        for image in images[labels == 0]:
            o = parse(image)
            bottom = [o[2, c] for c in range(3)]
            kinds[o[0, 1] in bottom, len(set(bottom)) < 3] += 1         # top object at the bottom, an equal pair
        return kinds
    kinds = count(False)
    assert kinds.keys() == {(True, True), (False, False)} and p_value(list(kinds.values()), [750, 750]) > 0.001
    kinds = count(True)
    assert kinds.keys() == {(True, True), (False, False), (False, True)}
    assert p_value(list(kinds.values()), [500] * 3) > 0.001


def test_patterns_and_pairs_of_different_patterns_are_equally_frequent():
    images, labels = games.generate("match_pattern", "stripes", 4000, 1)
    pairs = Counter()
    for image in images:
        o = parse(image)
        pairs[tuple(pattern([o[r, c] for c in range(3)]) for r in (0, 2))] += 1
    assert p_value([pairs[p, p] for p in games.PATTERNS], [400] * 5) > 0.001
    assert p_value([pairs[p, q] for p in games.PATTERNS for q in games.PATTERNS if p != q], [100] * 20) > 0.001


def test_all_shapes_that_fit_into_a_cell_occur_and_stripes_are_vertical():
    for sprites, squares, n_masks in (("pentos", 5, 37), ("hexos", 6, 48)):
        masks = {mask for image in games.generate("same", sprites, 3000, 1)[0] for mask, _ in parse(image).values()}
        assert {sum(mask) for mask in masks} == {squares} and len({free_shape(mask) for mask in masks}) == 8
        assert len(masks) == n_masks
    for image in games.generate("same", "stripes", 100, 1)[0]:
        for _, colours in parse(image).values():
            a, b, c = np.array(colours).reshape(3, 3, 3)                # three equal rows
            assert np.array_equal(a, b) and np.array_equal(b, c) and np.array_equal(a[0], a[2])


def test_images_are_a_function_of_the_arguments():
    one = games.generate("between", "pentos", 50, 7)
    for a, b in zip(one, games.generate("between", "pentos", 50, 7)):
        assert np.array_equal(a, b)
    for other in (("between", "pentos", 50, 8), ("between", "hexos", 50, 7), ("same", "pentos", 50, 7)):
        assert not np.array_equal(one[0], games.generate(*other)[0])


@pytest.mark.parametrize("arguments, words", [
    (("smae", "pentos"), "did you mean same?"), (("same", "cats"), "choose from pentos"),
    (("same", "pentos", 9, 1, True), "no alternative")])
def test_unknown_arguments_are_errors(arguments, words):
    with pytest.raises(ValueError, match=words):
        games.generate(*(arguments + (9, 1))[:5])


# ---- original files --------------------------------------------------------------------------------------------------

@pytest.fixture
def original(tmp_path):
    """A function that writes a file like the original ones: int64, labels (n, 1)."""
    images, labels = games.generate("between", "pentos", 1500, 1)
    arrays = dict(images=images.astype(np.int64), labels=labels[:, None], tasks=np.zeros((1500, 1), np.int64))

    def write(name="1task_between_pentos.npz", **changes):
        kept = {key: value for key, value in {**arrays, **changes}.items() if value is not None}
        np.savez_compressed(tmp_path / name, **kept)
        return tmp_path / name
    return write


def test_an_original_file_is_read_completely(original):
    images, labels = games.load_npz(original())
    written = games.generate("between", "pentos", 1500, 1)
    assert images.dtype == np.uint8 and np.array_equal(images, written[0])
    assert labels.dtype == np.int64 and np.array_equal(labels, written[1])


def test_of_a_file_with_three_tasks_the_chosen_one_is_returned(original):
    path = original("3task_col_patts_pentos.npz", tasks=np.arange(1500)[:, None] % 3)
    all_images, all_labels = games.load_npz(original())
    images, labels = games.load_npz(path, "column_AAB")                 # task 1
    assert np.array_equal(images, all_images[1::3]) and np.array_equal(labels, all_labels[1::3])
    with pytest.raises(ValueError, match="several tasks: choose one of column_ABA"):
        games.load_npz(path)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("created",)                                   # code that unpickling would run


@pytest.mark.parametrize("change, words", [
    (dict(images=None), "it has no array images"),
    (dict(labels=None), "it has no array labels"),
    (dict(images=np.zeros((1500, 36, 36), int)), r"shapes \[\(1500, 36, 36\)"),
    (dict(images=np.zeros((1400, 36, 36, 3), int)), r"shapes \[\(1400"),
    (dict(images=np.zeros((1500, 36, 36, 3))), "holds float64"),
    (dict(images=np.full((1500, 36, 36, 3), 300)), "300, not 0 ... 255"),
    (dict(images=np.full((1500, 36, 36, 3), -1)), "-1 ... -1"),
    (dict(images=np.asfortranarray(np.zeros((1500, 36, 36, 3), int))), "row-major order"),
    (dict(labels=np.full((1500, 1), 2)), "labels up to 2"),
    (dict(images=np.zeros((0, 36, 36, 3), int), labels=np.zeros((0, 1), int), tasks=None), "is empty"),
    (dict(labels=np.array([Malicious()] * 1500, dtype=object)), "holds object"),
])
def test_a_file_of_another_kind_is_an_error_of_one_line(original, change, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words) as error:
        games.load_npz(original(**change))
    assert "\n" not in str(error.value) and not (tmp_path / "created").exists()


def test_missing_truncated_damaged_and_encrypted_files_are_errors(original, tmp_path):
    with pytest.raises(ValueError, match="no file"):
        games.load_npz(tmp_path / "none.npz")
    path = original()
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="truncated, damaged"):
        games.load_npz(path)
    path.write_bytes(content[:5000] + bytes(100) + content[5100:])
    with pytest.raises(ValueError, match="truncated, damaged"):
        games.load_npz(path)
    path.write_bytes(b"<html>")
    with pytest.raises(ValueError, match="truncated, damaged"):
        npz.fingerprint(path)
    encrypted = bytearray(content)
    for header in (b"PK\x03\x04", b"PK\x01\x02"):                     # the encryption flag in both headers
        at = -1
        while (at := encrypted.find(header, at + 1)) >= 0:
            encrypted[at + (6 if header == b"PK\x03\x04" else 8)] |= 1
    path.write_bytes(encrypted)
    with pytest.raises(ValueError, match="truncated, damaged or not a file of this kind: .*encrypted"):
        games.load_npz(path)


def test_original_files_are_found_by_name(original, tmp_path):
    path = original()
    assert games.find_file(tmp_path, "between", "pentos") == path
    with pytest.raises(ValueError, match="no 1task_between_hexos.npz or mini_between_hexos.npz in"):
        games.find_file(tmp_path, "between", "hexos")
    with pytest.raises(ValueError, match="public samples of between"):
        games.find_file("mini", "same", "pentos")


def test_public_samples_are_downloaded_and_verified(original, tmp_path, monkeypatch):
    content = original().read_bytes()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (BaseHTTPRequestHandler,), {
        "do_GET": lambda self: (self.send_response(200), self.send_header("Content-Length", str(len(content))),
                                self.end_headers(), self.wfile.write(content)),
        "log_message": lambda *a: None}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(files, "MINI_URL", f"http://127.0.0.1:{server.server_port}/")
    try:
        with pytest.raises(OSError, match="not 8fa56f98"):
            games.find_file("mini", "between", "pentos", tmp_path / "cache")
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        monkeypatch.setitem(games.GIT_BLOB, "mini_between_pentos.npz", blob)
        path = games.find_file("mini", "between", "pentos", tmp_path / "cache")
    finally:
        server.shutdown()
    assert path.name == "mini_between_pentos.npz" and path.read_bytes() == content


@pytest.mark.skipif(not TEST_DATA, reason="needs the public file")
def test_the_public_file_has_the_known_hash_and_correct_labels():
    path = Path(TEST_DATA) / "data/relational_games/mini_between_hexos.npz"
    games.check_git_blob(path, games.GIT_BLOB["mini_between_hexos.npz"])
    images, labels = games.load_npz(path)
    with np.load(path) as file:
        assert np.array_equal(images, file["images"]) and np.array_equal(labels, file["labels"].ravel())
    assert [holds("between", parse(image)) for image in images] == (labels == 1).tolist()


@pytest.mark.figures
def test_the_command_draws_examples(original, tmp_path, capsys):
    original()
    command.main([f"--data={tmp_path}", f"--out={tmp_path / 'sheet.png'}"])
    assert (tmp_path / "sheet.png").stat().st_size > 20_000
    assert "no same_pentos.npz" in capsys.readouterr().out


@pytest.mark.parametrize("options, words", [(["--data=/nowhere"], "no same_pentos.npz"), (["--seed=1,2"], "one value")])
def test_errors_of_the_command_are_one_line(options, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main([*options, f"--out={tmp_path / 'sheet.png'}"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1
