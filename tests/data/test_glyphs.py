"""Glyphs: masters that are whole and tell characters apart, images that are what the comments say, pixel by pixel."""
import hashlib
import itertools
import math
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from data.images import glyphs
from data.images.glyphs import CAPITAL, CHARACTERS, FONTS, SIZE, colours, draw, generate, master, masters

N = 3400                                       # 100 images of each character


@pytest.fixture(scope="module")
def drawn():
    """part -> (images, labels)"""
    return {part: generate(part, N, seed=0) for part in FONTS}


@pytest.fixture(scope="module")
def all_masters():
    """font -> (characters, 96, 96)"""
    return {font: of_font for part in FONTS for font, of_font in zip(FONTS[part], masters(part))}


# Masters

def extent(ink):
    """Of one image: its first and last row with ink, its first and last column."""
    rows, columns = ink.any(1).nonzero().flatten(), ink.any(0).nonzero().flatten()
    return rows[0].item(), rows[-1].item(), columns[0].item(), columns[-1].item()


def test_no_font_is_in_both_parts_and_no_two_are_the_same_file():
    fonts = [*FONTS["train"], *FONTS["test"]]
    assert len(set(fonts)) == len(fonts) == 20 and all(font.startswith("STIX") for font in FONTS["test"])
    files = [Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf" for font in fonts]
    assert len({hashlib.sha256(file.read_bytes()).hexdigest() for file in files}) == len(fonts)


def test_every_master_has_ink_in_the_middle_and_nothing_is_cut_off(all_masters):
    for font, of_font in all_masters.items():
        assert of_font.shape == (34, 96, 96) and of_font.min() == 0 and of_font.max() == 1
        for character, ink in zip(CHARACTERS, of_font):
            assert ink.sum() > 150, (font, character)
            top, bottom, left, right = extent(ink)
            assert top > 3 and bottom < 92 and left > 3 and right < 92, (font, character)   # black all around
            assert abs(top + bottom - 95) <= 1 and abs(left + right - 95) <= 1, (font, character)


def test_an_h_is_equally_high_in_all_fonts(all_masters):
    for font, of_font in all_masters.items():
        top, bottom, _, _ = extent(of_font[CHARACTERS.index("H")])
        assert abs(bottom + 1 - top - 96 * CAPITAL) < 1.5, font


def test_no_two_characters_of_a_font_have_nearly_the_same_master(all_masters):
    """Nor have two fonts the same characters."""
    for font, of_font in all_masters.items():
        flat = of_font.flatten(1)
        for a, b in itertools.combinations(range(len(CHARACTERS)), 2):
            difference = (flat[a] - flat[b]).square().sum() / (flat[a].square().sum() + flat[b].square().sum())
            assert difference > 0.04, (font, CHARACTERS[a], CHARACTERS[b])         # 1: nothing in common
    for font, other in itertools.combinations(all_masters, 2):
        assert (all_masters[font] - all_masters[other]).abs().mean() > 0.01, (font, other)


def test_a_missing_font_is_a_line_that_says_what_to_do():
    with pytest.raises(ValueError, match="without the font Comic.*--data=cifar10") as error:
        master("Comic", "A")
    assert "\n" not in str(error.value)


# Sets of images

def test_images_are_bytes_in_full_range_and_all_characters_come_about_equally_often(drawn):
    for x, y in drawn.values():
        assert x.shape == (N, 3, SIZE, SIZE) and x.dtype == np.uint8 and y.shape == (N,) and y.dtype == np.int64
        assert x.min() == 0 and x.max() == 255
        counts = np.bincount(y)
        assert len(counts) == len(CHARACTERS) == 34 and abs(counts - 100).max() < 50       # five standard deviations
        assert (x.std((2, 3)).max(1) > 17).all()                       # noise alone would give 13


def test_images_are_a_function_of_part_and_seed(drawn):
    for (x, y), part in zip(drawn.values(), drawn):
        again, labels = generate(part, N, seed=0)
        assert (again == x).all() and (labels == y).all()
    some = [generate(part, 50, seed) for part in FONTS for seed in (0, 1, 2)]
    for (x, y), (other, labels) in itertools.combinations(some, 2):
        assert (x != other).mean() > 0.9 and (y != labels).any()


@pytest.mark.parametrize("part", FONTS)
def test_images_come_from_the_masters_of_their_part_and_from_all_its_fonts(part):
    """The same draws once more, by hand: which character, which font, then everything else."""
    x, y = generate(part, 200, seed=3)
    results = {}
    for source in FONTS:
        g = torch.Generator().manual_seed(6 + (part == "test"))
        labels = torch.randint(34, (200,), generator=g)
        fonts = torch.randint(len(FONTS[part]), (200,), generator=g)
        results[source] = draw(masters(source)[fonts % len(FONTS[source]), labels], g).numpy()
    assert (labels.numpy() == y).all() and len(set(fonts.tolist())) == len(FONTS[part])
    assert (results[part] == x).all() and (results["test" if part == "train" else "train"] != x).any((1, 2, 3)).all()


# One image

@pytest.fixture
def plain(monkeypatch):
    """A function that draws white on black without noise, with an angle, slant, size and place that it is given."""
    def drawing(ink, angle=0.0, slant=0.0, size=1.0, place=(0.0, 0.0)):
        chosen = {(-0.35, 0.35): [angle], (-0.2, 0.2): [slant], (0.75, 1.35): [size],
                  (-0.25, 0.25): [[[place[0]], [place[1]]]]}           # by the range that they are drawn from
        monkeypatch.setattr(glyphs, "uniform", lambda n, low, high, g: torch.tensor(chosen[low, high]))
        monkeypatch.setattr(glyphs, "colours", lambda n, g: (torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)))
        monkeypatch.setattr(torch, "randn", lambda *shape, generator: torch.zeros(shape))
        x = draw(ink[None], torch.Generator())[0]
        monkeypatch.undo()
        assert x.shape == (3, SIZE, SIZE) and x.dtype == torch.uint8 and (x == x[0]).all()
        return x[0]
    return drawing


def bilinear(ink, row, column):
    """Between the centres of the four pixels around; black outside."""
    value, top, left = 0.0, math.floor(row), math.floor(column)
    for y, x in itertools.product((top, top + 1), (left, left + 1)):
        if 0 <= y < 96 and 0 <= x < 96:
            value += (1 - abs(row - y)) * (1 - abs(column - x)) * ink[y][x]
    return value


def slow_drawing(ink, angle, slant, size, place):
    """A pixel is the mean of four points. Each is moved back, sheared, turned, shrunk: there it lies in the master."""
    ink, out = ink.tolist(), np.zeros((SIZE, SIZE))
    for row, column, dy, dx in itertools.product(range(SIZE), range(SIZE), (0.25, 0.75), (0.25, 0.75)):
        x, y = 2 * (column + dx) / SIZE - 1 - place[0], 2 * (row + dy) / SIZE - 1 - place[1]
        x = x + slant * y
        x, y = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
        x, y = x / size, y / size
        out[row, column] += 255 / 4 * bilinear(ink, (y + 1) * 96 / 2 - 0.5, (x + 1) * 96 / 2 - 0.5)
    return out


@pytest.mark.parametrize("how", [dict(), dict(angle=0.35), dict(slant=-0.2), dict(size=0.75), dict(place=(0.25, -0.1)),
                                 dict(angle=-0.3, slant=0.15, size=1.35, place=(-0.2, 0.25))], ids=str)
def test_the_affine_map_is_the_one_of_the_comments(plain, how):
    ink = master("DejaVuSerif", "R")
    expected = slow_drawing(ink, **{**dict(angle=0, slant=0, size=1, place=(0, 0)), **how})
    assert abs(plain(ink, **how).numpy() - expected).max() < 0.52      # rounded


def centre(x):
    """Centre of mass, from left and from above, in pixels from the image's middle."""
    x, at = x.double(), torch.arange(SIZE) - (SIZE - 1) / 2
    return (x.sum(0) @ at.double() / x.sum()).item(), (x.sum(1) @ at.double() / x.sum()).item()


def test_to_the_eye_size_is_size_place_is_place_and_an_angle_turns_to_the_right(plain):
    ink = torch.zeros(96, 96)
    ink[22:74, 40:56] = 1                                              # upright, 52 x 16 of 96
    for size in (0.75, 1.0, 1.35):
        x = plain(ink, size=size)
        assert x.sum().item() / 255 == pytest.approx(52 * 16 / 9 * size ** 2, rel=0.05)
        top, bottom, left, right = extent(x > 127)
        assert abs(bottom + 1 - top - 52 / 3 * size) < 1.1 and abs(right + 1 - left - 16 / 3 * size) < 1.1
    for place in ((0.25, 0), (0, 0.25), (-0.2, 0.1)):                  # in halves of the image: 16 pixels
        assert centre(plain(ink, angle=0.2, slant=0.1, place=place)) == pytest.approx((16 * place[0], 16 * place[1]),
                                                                                    abs=0.05)
    upper, lower = (lambda x: centre(x * (torch.arange(SIZE) < 16)[:, None])[0],
                    lambda x: centre(x * (torch.arange(SIZE) >= 16)[:, None])[0])
    turned, slanted = plain(ink, angle=0.35), plain(ink, slant=0.2)
    for x in (turned, slanted):
        assert upper(x) > 0.5 and lower(x) < -0.5                      # the top to the right, as in italics
    assert upper(slanted) - lower(slanted) == pytest.approx(0.2 * 52 / 6, abs=0.2)


def test_noise_has_a_standard_deviation_of_a_twentieth(monkeypatch):
    grey = torch.full((20, 3, 1, 1), 0.5)
    monkeypatch.setattr(glyphs, "colours", lambda n, g: (grey, grey))
    x = draw(torch.zeros(20, 96, 96), torch.Generator().manual_seed(0)).double() / 255
    assert x.std().item() == pytest.approx(0.05, rel=0.03) and x.mean().item() == pytest.approx(0.5, abs=0.002)


# Colours

def test_ground_and_ink_differ_by_three_tenths_of_brightness_in_either_direction():
    ground, ink = colours(5000, torch.Generator().manual_seed(0))
    assert ground.shape == ink.shape == (5000, 3, 1, 1)
    assert min(ground.min(), ink.min()) >= 0 and max(ground.max(), ink.max()) <= 1
    difference = (ink - ground).mean((1, 2, 3))
    assert difference.abs().min() >= 0.3 - 1e-6
    assert (difference > 0).sum() > 1000 and (difference < 0).sum() > 1000
    for x in (ground, ink):                                            # anything: each colour from dark to bright
        assert (x.amin(0) < 0.01).all() and (x.amax(0) > 0.99).all()


@pytest.mark.parametrize("good", [0, 3, 6, None])
def test_the_first_good_try_is_taken_and_if_all_fail_dark_and_bright(monkeypatch, good):
    tries = [torch.full((8, 4, 3), 0.5), torch.full((8, 4, 3), 0.75)]   # ground and ink: 0.25 apart
    tries[0] += torch.arange(4)[:, None] / 100                         # by image
    if good is not None:
        tries[0][good:, 2] = 0.2                                       # but for one image: from here on good
        tries[0][good, 2] = 0.1
    drawn = iter([x.clone() for x in tries])
    monkeypatch.setattr(glyphs, "uniform", lambda n, low, high, g: next(drawn))
    ground, ink = colours(4, torch.Generator())
    for image in range(4):
        chosen = ground[image].flatten().tolist(), ink[image].flatten().tolist()
        if image == 2 and good is not None:
            assert chosen == (pytest.approx([0.1] * 3), pytest.approx([0.75] * 3))
        else:
            dark = 0.3 * (0.5 + image / 100)
            assert chosen == (pytest.approx([dark] * 3), pytest.approx([1 - 0.3 * 0.75] * 3))


def test_the_sheet_of_examples_is_drawn_at_twice_the_size(tmp_path, capsys):
    out = tmp_path / "new" / "glyphs.png"
    glyphs.main([f"--out={out}"])
    assert str(out) in capsys.readouterr().out
    sheet = np.array(Image.open(out))
    assert sheet.shape == (10 * 64, 20 * 64, 3)
    x, _ = generate("train", 120, seed=1)
    assert (sheet[64:128:2, 128:192:2] == x[22].transpose(1, 2, 0)).all()          # second row, third column
