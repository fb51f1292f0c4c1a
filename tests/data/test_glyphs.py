"""Glyphs: the templates of the characters are complete and distinct; images are as documented, pixel by pixel."""
import hashlib
import itertools
import math
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from data.images import glyphs
from data.images.glyphs import CAPITAL, CHARACTERS, FONTS, SIZE, colours, draw, generate, template, templates

N = 3400                                       # 100 images of each character


@pytest.fixture(scope="module")
def drawn():
    """{part: (images, labels)}"""
    return {part: generate(part, N, seed=0) for part in FONTS}


@pytest.fixture(scope="module")
def all_templates():
    """{font: templates (characters, 96, 96)}"""
    return {font: of_font for part in FONTS for font, of_font in zip(FONTS[part], templates(part))}


# Templates

def extent(ink):
    """The first and last row, and the first and last column, of an image that have ink."""
    rows, columns = ink.any(1).nonzero().flatten(), ink.any(0).nonzero().flatten()
    return rows[0].item(), rows[-1].item(), columns[0].item(), columns[-1].item()


def test_training_and_test_fonts_are_different_files():
    fonts = [*FONTS["train"], *FONTS["test"]]
    assert len(set(fonts)) == len(fonts) == 20 and all(font.startswith("STIX") for font in FONTS["test"])
    files = [Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf" for font in fonts]
    assert len({hashlib.sha256(file.read_bytes()).hexdigest() for file in files}) == len(fonts)


def test_every_template_is_centred_and_complete(all_templates):
    for font, of_font in all_templates.items():
        assert of_font.shape == (34, 96, 96) and of_font.min() == 0 and of_font.max() == 1
        for character, ink in zip(CHARACTERS, of_font):
            assert ink.sum() > 150, (font, character)
            top, bottom, left, right = extent(ink)
            assert top > 3 and bottom < 92 and left > 3 and right < 92, (font, character)   # a black border
            assert abs(top + bottom - 95) <= 1 and abs(left + right - 95) <= 1, (font, character)


def test_an_h_has_the_same_height_in_all_fonts(all_templates):
    for font, of_font in all_templates.items():
        top, bottom, _, _ = extent(of_font[CHARACTERS.index("H")])
        assert abs(bottom + 1 - top - 96 * CAPITAL) < 1.5, font


def test_the_characters_of_a_font_are_distinct_and_so_are_the_fonts(all_templates):
    for font, of_font in all_templates.items():
        flat = of_font.flatten(1)
        for a, b in itertools.combinations(range(len(CHARACTERS)), 2):
            difference = (flat[a] - flat[b]).square().sum() / (flat[a].square().sum() + flat[b].square().sum())
            assert difference > 0.04, (font, CHARACTERS[a], CHARACTERS[b])         # 1: no overlap
    for font, other in itertools.combinations(all_templates, 2):
        assert (all_templates[font] - all_templates[other]).abs().mean() > 0.01, (font, other)


def test_a_missing_font_is_an_error_of_one_line():
    with pytest.raises(ValueError, match="has no font Comic.*--data=cifar10") as error:
        template("Comic", "A")
    assert "\n" not in str(error.value)


# Data sets

def test_images_are_uint8_in_full_range_and_all_characters_are_about_equally_frequent(drawn):
    for x, y in drawn.values():
        assert x.shape == (N, 3, SIZE, SIZE) and x.dtype == np.uint8 and y.shape == (N,) and y.dtype == np.int64
        assert x.min() == 0 and x.max() == 255
        counts = np.bincount(y)
        assert len(counts) == len(CHARACTERS) == 34 and abs(counts - 100).max() < 50       # five standard deviations
        assert (x.std((2, 3)).max(1) > 17).all()                       # noise alone would give 13


def test_images_are_a_function_of_part_and_seed():
    some, again = ([generate(part, 50, seed) for part in FONTS for seed in (0, 1, 2)] for _ in range(2))
    for (x, y), (other, labels) in zip(some, again):
        assert (x == other).all() and (y == labels).all()
    for (x, y), (other, labels) in itertools.combinations(some, 2):
        assert (x != other).mean() > 0.9 and (y != labels).any()


@pytest.mark.parametrize("part", FONTS)
def test_images_use_the_templates_of_their_part_and_all_its_fonts(part):
    """Repeats the random draws: characters, fonts, then everything else."""
    x, y = generate(part, 200, seed=3)
    results = {}
    for source in FONTS:
        g = torch.Generator().manual_seed(6 + (part == "test"))
        labels = torch.randint(34, (200,), generator=g)
        fonts = torch.randint(len(FONTS[part]), (200,), generator=g)
        results[source] = draw(templates(source)[fonts % len(FONTS[source]), labels], g).numpy()
    assert (labels.numpy() == y).all() and len(set(fonts.tolist())) == len(FONTS[part])
    assert (results[part] == x).all() and (results["test" if part == "train" else "train"] != x).any((1, 2, 3)).all()


# One image

@pytest.fixture
def plain(monkeypatch):
    """A function that draws white on black, without noise, with a given angle, slant, size and position."""
    def drawing(ink, angle=0.0, slant=0.0, size=1.0, place=(0.0, 0.0)):
        chosen = {(-0.35, 0.35): [angle], (-0.2, 0.2): [slant], (0.75, 1.35): [size],
                  (-0.25, 0.25): [[[place[0]], [place[1]]]]}           # {range of the random number: its value}
        monkeypatch.setattr(glyphs, "uniform", lambda n, low, high, g: torch.tensor(chosen[low, high]))
        monkeypatch.setattr(glyphs, "colours", lambda n, g: (torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)))
        monkeypatch.setattr(torch, "randn", lambda *shape, generator: torch.zeros(shape))
        x = draw(ink[None], torch.Generator())[0]
        monkeypatch.undo()
        assert x.shape == (3, SIZE, SIZE) and x.dtype == torch.uint8 and (x == x[0]).all()
        return x[0]
    return drawing


def bilinear(ink, row, column):
    """Bilinear interpolation between the centres of four pixels; black outside."""
    value, top, left = 0.0, math.floor(row), math.floor(column)
    for y, x in itertools.product((top, top + 1), (left, left + 1)):
        if 0 <= y < 96 and 0 <= x < 96:
            value += (1 - abs(row - y)) * (1 - abs(column - x)) * ink[y][x]
    return value


def slow_drawing(ink, angle, slant, size, place):
    """A pixel is the mean of four points. Shift, shear, rotation and scale map each to a point of the template."""
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
def test_the_affine_map_equals_a_slow_transcription_of_it(plain, how):
    ink = template("DejaVuSerif", "R")
    expected = slow_drawing(ink, **{**dict(angle=0, slant=0, size=1, place=(0, 0)), **how})
    assert abs(plain(ink, **how).numpy() - expected).max() < 0.52      # rounding


def centre(x):
    """Centre of mass (x, y) in pixels from the centre of the image."""
    x, at = x.double(), torch.arange(SIZE) - (SIZE - 1) / 2
    return (x.sum(0) @ at.double() / x.sum()).item(), (x.sum(1) @ at.double() / x.sum()).item()


def test_size_position_angle_and_slant_have_their_visible_meaning(plain):
    ink = torch.zeros(96, 96)
    ink[22:74, 40:56] = 1                                              # an upright bar, 52 x 16 of 96 pixels
    for size in (0.75, 1.0, 1.35):
        x = plain(ink, size=size)
        assert x.sum().item() / 255 == pytest.approx(52 * 16 / 9 * size ** 2, rel=0.05)
        top, bottom, left, right = extent(x > 127)
        assert abs(bottom + 1 - top - 52 / 3 * size) < 1.1 and abs(right + 1 - left - 16 / 3 * size) < 1.1
    for place in ((0.25, 0), (0, 0.25), (-0.2, 0.1)):                  # in units of 16 pixels
        assert centre(plain(ink, angle=0.2, slant=0.1, place=place)) == pytest.approx((16 * place[0], 16 * place[1]),
                                                                                    abs=0.05)
    upper, lower = (lambda x: centre(x * (torch.arange(SIZE) < 16)[:, None])[0],
                    lambda x: centre(x * (torch.arange(SIZE) >= 16)[:, None])[0])
    turned, slanted = plain(ink, angle=0.35), plain(ink, slant=0.2)
    for x in (turned, slanted):
        assert upper(x) > 0.5 and lower(x) < -0.5                      # the top is to the right, as in italics
    assert upper(slanted) - lower(slanted) == pytest.approx(0.2 * 52 / 6, abs=0.2)


def test_noise_has_the_standard_deviation_0_05(monkeypatch):
    grey = torch.full((20, 3, 1, 1), 0.5)
    monkeypatch.setattr(glyphs, "colours", lambda n, g: (grey, grey))
    x = draw(torch.zeros(20, 96, 96), torch.Generator().manual_seed(0)).double() / 255
    assert x.std().item() == pytest.approx(0.05, rel=0.03) and x.mean().item() == pytest.approx(0.5, abs=0.002)


# Colours

def test_background_and_ink_differ_by_0_3_of_brightness_in_either_direction():
    background, ink = colours(5000, torch.Generator().manual_seed(0))
    assert background.shape == ink.shape == (5000, 3, 1, 1)
    assert min(background.min(), ink.min()) >= 0 and max(background.max(), ink.max()) <= 1
    difference = (ink - background).mean((1, 2, 3))
    assert difference.abs().min() >= 0.3 - 1e-6
    assert (difference > 0).sum() > 1000 and (difference < 0).sum() > 1000
    for x in (background, ink):                                        # each colour from dark to bright
        assert (x.amin(0) < 0.01).all() and (x.amax(0) > 0.99).all()


@pytest.mark.parametrize("good", [0, 3, 6, None])
def test_the_first_good_try_is_used_and_dark_and_bright_if_there_is_none(monkeypatch, good):
    tries = [torch.full((8, 4, 3), 0.5), torch.full((8, 4, 3), 0.75)]   # background and ink: too similar
    tries[0] += torch.arange(4)[:, None] / 100                         # different for each image
    if good is not None:
        tries[0][good:, 2] = 0.2                                       # for image 2, tries from this one on are good
        tries[0][good, 2] = 0.1
    drawn = iter([x.clone() for x in tries])
    monkeypatch.setattr(glyphs, "uniform", lambda n, low, high, g: next(drawn))
    background, ink = colours(4, torch.Generator())
    for image in range(4):
        chosen = background[image].flatten().tolist(), ink[image].flatten().tolist()
        if image == 2 and good is not None:
            assert chosen == (pytest.approx([0.1] * 3), pytest.approx([0.75] * 3))
        else:
            dark = 0.3 * (0.5 + image / 100)
            assert chosen == (pytest.approx([dark] * 3), pytest.approx([1 - 0.3 * 0.75] * 3))


def test_the_examples_are_drawn_at_twice_the_size(tmp_path, capsys):
    out = tmp_path / "new" / "glyphs.png"
    glyphs.main([f"--out={out}"])
    assert str(out) in capsys.readouterr().out
    sheet = np.array(Image.open(out))
    assert sheet.shape == (10 * 64, 20 * 64, 3)
    x, _ = generate("train", 120, seed=1)
    assert (sheet[64:128:2, 128:192:2] == x[22].transpose(1, 2, 0)).all()          # second row, third column


def test_the_command_runs_without_a_warning(tmp_path):
    """python -m warns if importing the package data.images imports the module itself."""
    out = tmp_path / "glyphs.png"
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "data.images.glyphs", f"--out={out}"]
    subprocess.run(command, cwd=Path(glyphs.__file__).parents[2], check=True, capture_output=True)
    assert out.exists()
