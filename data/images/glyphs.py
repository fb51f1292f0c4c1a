"""Glyphs: small colour images of letters and digits in the fonts that come with matplotlib. Nothing to download.

    python -m data.images.glyphs                                   examples, in out/vit/glyphs.png

A class is a character; its images differ in font, position, size, slant, angle and colours. The test images use other
fonts than the training images: they measure whether the model has learned letters, not fonts.
"""
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont              # comes with matplotlib

from toolbox import options
from toolbox.files import writing

import matplotlib                                       # noqa: E402  (after toolbox, which chooses its backend)

CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ23456789"       # without 0 and 1, which equal O and I in some fonts
SIZE = 32                                               # height and width of an image
FONTS = {"train": [*(f"DejaVuSans{face}" for face in ("", "-Bold", "-Oblique", "-BoldOblique")),
                   *(f"DejaVuSansMono{face}" for face in ("", "-Bold", "-Oblique", "-BoldOblique")),
                   *(f"DejaVuSerif{face}" for face in ("", "-Bold", "-Italic", "-BoldItalic")),
                   "cmr10", "cmb10", "cmss10", "cmtt10"],                # Computer Modern, the fonts of TeX
         "test": ["STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"]}
CAPITAL = 0.55                                          # height of an H before scaling, as a fraction of the image
MEAN, STD = (0.5,) * 3, (0.25,) * 3                     # for normalisation: rounded


@dataclass
class Options:
    out: str = "out/vit/glyphs.png"         # file to write
    seed: int = 1                           # of the examples


@cache
def templates(part):
    """Each character in each font of `part`, white on black and centred: (fonts, characters, 96, 96) in 0 ... 1."""
    return torch.stack([torch.stack([template(font, character) for character in CHARACTERS]) for font in FONTS[part]])


def template(name, character, canvas=96):
    """One character in one font. The font size makes an H of every font CAPITAL * canvas high."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    try:
        font = ImageFont.truetype(str(path), 100)
        _, top, _, bottom = font.getbbox("H")
        font = ImageFont.truetype(str(path), 100 * CAPITAL * canvas / (bottom - top))
    except OSError as error:
        raise ValueError(f"matplotlib {matplotlib.__version__} has no font {name} ({error}): install another "
                         f"version, or use --data=cifar10") from None
    drawn, image = (Image.new("L", (side, side)) for side in (2 * canvas, canvas))
    ImageDraw.Draw(drawn).text((canvas // 2, canvas // 2), character, 255, font)
    ink = drawn.crop(drawn.getbbox())
    image.paste(ink, ((canvas - ink.width) // 2, (canvas - ink.height) // 2))
    return torch.from_numpy(np.array(image)).float() / 255


def generate(part, n, seed):
    """-> arrays of n images uint8 (n, 3, 32, 32) in fonts of `part` ("train" or "test"), and labels int64 (n,)."""
    g = torch.Generator().manual_seed(2 * seed + (part == "test"))
    characters = templates(part)
    labels = torch.randint(len(CHARACTERS), (n,), generator=g)
    fonts = torch.randint(len(characters), (n,), generator=g)
    images = [draw(characters[font, label], g) for font, label in zip(fonts.split(1000), labels.split(1000))]
    return torch.cat(images).numpy(), labels.numpy()


def uniform(n, low, high, g):
    return torch.empty(n).uniform_(low, high, generator=g)


def draw(templates, g):
    """Templates (n, 96, 96) with random position, size, slant, angle, colours and noise: uint8 (n, 3, 32, 32)."""
    n = len(templates)
    # The point (x, y) of the image shows the point A (x, y) + b of the template, all coordinates in -1 ... 1.
    # A = rotation / size times slant along x. The letter is shifted by a random t: b = -A t.
    angle, slant, size = uniform(n, -0.35, 0.35, g), uniform(n, -0.2, 0.2, g), uniform(n, 0.75, 1.35, g)
    cos, sin = angle.cos() / size, angle.sin() / size
    A = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], 1)                    # (n, 2, 2)
    A = A @ torch.stack([torch.stack([torch.ones(n), slant], -1), torch.tensor([0.0, 1.0]).expand(n, 2)], 1)
    b = -A @ uniform((n, 2, 1), -0.25, 0.25, g)                                                        # (n, 2, 1)
    grid = F.affine_grid(torch.cat([A, b], -1), (n, 1, 2 * SIZE, 2 * SIZE), align_corners=False)
    ink = F.grid_sample(templates[:, None], grid, align_corners=False)                                 # (n, 1, 64, 64)
    ink = F.avg_pool2d(ink, 2)                                          # four samples per pixel: smooth edges
    background, ink_colour = colours(n, g)
    noise = 0.05 * torch.randn(n, 3, SIZE, SIZE, generator=g)
    x = background + ink * (ink_colour - background) + noise                                           # (n, 3, 32, 32)
    return (x * 255).round().clamp(0, 255).to(torch.uint8)


def colours(n, g):
    """-> random colours of background and ink, (n, 3, 1, 1) each, whose mean brightness differs by at least 0.3."""
    background, ink = uniform((40, n, 3), 0, 1, g), uniform((40, n, 3), 0, 1, g)   # 40 tries: take the first good one
    good = (background.mean(-1) - ink.mean(-1)).abs() >= 0.3                       # (40, n), about a fifth are good
    good[-1] = True                                                                # if none is: dark and bright
    background[-1], ink[-1] = background[-1] * 0.3, 1 - ink[-1] * 0.3
    first, i = good.float().argmax(0), torch.arange(n)
    return background[first, i][..., None, None], ink[first, i][..., None, None]


def main(argv=None):
    configs = options.parse_options(Options, argv=argv)
    with options.one_line_errors():
        o = options.agreed(configs, ("seed",))
        if not 0 <= o.seed < 2 ** 62:
            raise ValueError(f"seed={o.seed}: give one from 0 to 2^62 - 1")
        x = np.concatenate([generate(part, n, o.seed)[0] for part, n in (("train", 120), ("test", 80))])
        sheet = x.reshape(10, 20, 3, SIZE, SIZE).transpose(0, 3, 1, 4, 2).reshape(10 * SIZE, 20 * SIZE, 3)
        Path(o.out).parent.mkdir(parents=True, exist_ok=True)
        with writing(Path(o.out)):
            Image.fromarray(sheet).resize((40 * SIZE, 20 * SIZE), Image.Resampling.NEAREST).save(o.out)
    print(f"examples: {o.out}: six rows of training images, then four rows of test images, in other fonts")


if __name__ == "__main__":
    options.start(main)
