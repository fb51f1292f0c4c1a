"""Glyphs: small colour images of letters and digits, in the fonts that come with matplotlib. Nothing to download.

    python -m data.images.glyphs                                   examples, in out/vit/glyphs.png

A class is a character; its images differ in font, place, size, slant, angle and colours. The fonts of the test images
occur nowhere else: whoever has learned fonts by heart, and not letters, is found out.
"""
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont              # comes with matplotlib

from toolbox import options

CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ23456789"       # 0 and 1 are left out: in some fonts they are O and I
SIZE = 32                                               # height and width of an image
FONTS = {"train": [*(f"DejaVuSans{face}" for face in ("", "-Bold", "-Oblique", "-BoldOblique")),
                   *(f"DejaVuSansMono{face}" for face in ("", "-Bold", "-Oblique", "-BoldOblique")),
                   *(f"DejaVuSerif{face}" for face in ("", "-Bold", "-Italic", "-BoldItalic")),
                   "cmr10", "cmb10", "cmss10", "cmtt10"],                # Computer Modern, the fonts of TeX
         "test": ["STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"]}
CAPITAL = 0.55                                          # height of an H in the middle of the range, as part of an image
MEAN, STD = (0.5,) * 3, (0.25,) * 3                     # to normalise with: round figures


@dataclass
class Options:
    out: str = "out/vit/glyphs.png"         # where the examples go
    seed: int = 1                           # another one, other examples


def masters(part):
    """Each character of each font of `part` in white on black, its ink in the middle: (fonts, characters, 96, 96)."""
    return torch.stack([torch.stack([master(font, character) for character in CHARACTERS]) for font in FONTS[part]])


def master(name, character, canvas=96):
    """One of them, in 0 ... 1; an H is CAPITAL of the canvas high in every font."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    try:
        font = ImageFont.truetype(str(path), 100)
        _, top, _, bottom = font.getbbox("H")
        font = ImageFont.truetype(str(path), 100 * CAPITAL * canvas / (bottom - top))
    except OSError as error:
        raise ValueError(f"matplotlib {matplotlib.__version__} comes without the font {name} ({error}): install "
                         f"another version, or use --data=cifar10") from None
    drawn, image = (Image.new("L", (side, side)) for side in (2 * canvas, canvas))
    ImageDraw.Draw(drawn).text((canvas // 2, canvas // 2), character, 255, font)
    ink = drawn.crop(drawn.getbbox())
    image.paste(ink, ((canvas - ink.width) // 2, (canvas - ink.height) // 2))
    return torch.from_numpy(np.array(image)).float() / 255


def generate(part, n, seed):
    """n images from the fonts of `part` ("train", "test") -> uint8 (n, 3, 32, 32), labels int64 (n,), as arrays."""
    g = torch.Generator().manual_seed(2 * seed + (part == "test"))
    drawn = masters(part)
    labels = torch.randint(len(CHARACTERS), (n,), generator=g)
    fonts = torch.randint(len(drawn), (n,), generator=g)
    images = [draw(drawn[font, label], g) for font, label in zip(fonts.split(1000), labels.split(1000))]
    return torch.cat(images).numpy(), labels.numpy()


def uniform(n, low, high, g):
    return torch.empty(n).uniform_(low, high, generator=g)


def draw(masters, g):
    """Masters (n, 96, 96), each placed and coloured at random: uint8 (n, 3, 32, 32)."""
    n = len(masters)
    # Where in the master does the image's point (x, y) lie, both in -1 ... 1? At A (x, y) + b.
    # A is rotation / size after a slant along x; b brings a shift of the letter, hence the minus.
    angle, slant, size = uniform(n, -0.35, 0.35, g), uniform(n, -0.2, 0.2, g), uniform(n, 0.75, 1.35, g)
    cos, sin = angle.cos() / size, angle.sin() / size
    A = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], 1)                    # (n, 2, 2)
    A = A @ torch.stack([torch.stack([torch.ones(n), slant], -1), torch.tensor([0.0, 1.0]).expand(n, 2)], 1)
    b = -A @ uniform((n, 2, 1), -0.25, 0.25, g)                                                        # (n, 2, 1)
    grid = F.affine_grid(torch.cat([A, b], -1), (n, 1, 2 * SIZE, 2 * SIZE), align_corners=False)
    ink = F.grid_sample(masters[:, None], grid, align_corners=False)                                   # (n, 1, 64, 64)
    ink = F.avg_pool2d(ink, 2)                                          # four samples to a pixel: smooth edges
    ground, paint = colours(n, g)
    noise = 0.05 * torch.randn(n, 3, SIZE, SIZE, generator=g)
    return ((ground + ink * (paint - ground) + noise) * 255).round().clamp(0, 255).to(torch.uint8)


def colours(n, g):
    """Of ground and ink, (n, 3, 1, 1) each: anything, as long as one is brighter than the other by 0.3 of 1 or more."""
    ground, paint = uniform((40, n, 3), 0, 1, g), uniform((40, n, 3), 0, 1, g)    # the first good one of forty tries
    good = (ground.mean(-1) - paint.mean(-1)).abs() >= 0.3                         # (40, n): a fifth of them
    good[-1] = True
    ground[-1], paint[-1] = ground[-1] * 0.3, 1 - paint[-1] * 0.3                  # dark and bright, should all fail
    first = good.float().argmax(0)
    return ground[first, torch.arange(n)][..., None, None], paint[first, torch.arange(n)][..., None, None]


def main(argv=None):
    configs = options.parse_options(Options, argv=argv)
    with options.one_line_errors():
        o = options.agreed(configs, ("seed",))
        if not 0 <= o.seed < 2 ** 62:
            raise ValueError(f"seed={o.seed}: give one from 0 to 2^62 - 1")
        x = np.concatenate([generate(part, n, o.seed)[0] for part, n in (("train", 120), ("test", 80))])
        sheet = x.reshape(10, 20, 3, SIZE, SIZE).transpose(0, 3, 1, 4, 2).reshape(10 * SIZE, 20 * SIZE, 3)
        Path(o.out).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sheet).resize((40 * SIZE, 20 * SIZE), Image.Resampling.NEAREST).save(o.out)
    print(f"examples: {o.out}; above six rows to learn from, below four to test on, in fonts of their own")


if __name__ == "__main__":
    options.start(main)
