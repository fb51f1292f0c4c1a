"""Draws examples of the images: generated ones, beside original ones if there are any.

    python -m data.relational_games                              generated images, in out/relgames/examples.png
    python -m data.relational_games --data=mini                  the public files beside them
"""
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from data.relational_games import COLUMN_TASKS, SPRITES, TASKS, find_file, generate, load_npz
from toolbox import options
from toolbox.figures import drawing


@dataclass
class Options:
    data: str = "generated"                 # images to draw beside generated ones: mini, or a folder of originals
    data_dir: str = "data/cache"            # where downloads are kept
    out: str = "out/relgames/examples.png"  # file to write
    seed: int = 1                           # of the generated images, and of the choice of original ones
    alternative: bool = False               # the other sampling of xoccurs and match_pattern


def draw_examples(o):
    """One row for each task and set of sprites: four true images, four false ones, then the same of original images."""
    def eight(images, labels):
        pick = [i for value in (1, 0) for i in np.flatnonzero(labels == value)[:4]]
        return np.concatenate([np.pad(image, ((2,), (2,), (0,)), constant_values=255) for image in images[pick]], 1)

    rows, missing = [], {}
    for task in TASKS + (COLUMN_TASKS if o.data != "generated" else ()):
        for sprites in SPRITES:
            alternative = o.alternative and task in ("xoccurs", "match_pattern")
            rows.append((f"{task}, {sprites}", [eight(*generate(task, sprites, 100, o.seed, alternative))]))
            if o.data != "generated":
                try:
                    images, labels = load_npz(find_file(o.data, task, sprites, o.data_dir), task)
                except ValueError as error:
                    missing.setdefault(task, error)
                    continue
                order = np.random.default_rng(o.seed).permutation(len(images))
                rows[-1][1].append(eight(images[order], labels[order]))
    if missing and not any(len(sheets) > 1 for _, sheets in rows):
        raise ValueError(f"--data={o.data}: {missing[TASKS[0]]}")
    width = 1 if o.data == "generated" else 2
    with drawing.house_style():
        draw(rows, width, Path(o.out))
    for task, error in missing.items():
        print(f"{task}: {error}")
    print(f"examples: {o.out}")


def draw(rows, width, path):
    """rows: (title, sheets of images), of which there are at most `width`."""
    fig = drawing.Figure(figsize=(6 * width, 0.85 * len(rows)), layout="constrained")
    axes = fig.subplots(len(rows), width, squeeze=False)
    for (title, sheets), row in zip(rows, axes):
        for ax, sheet in zip(row, sheets):
            ax.imshow(sheet, interpolation="nearest")
        row[0].set_title(f"{title}: four true, four false" + (", generated | original" if len(sheets) > 1 else ""),
                         fontsize=7, loc="left", pad=2)
        for ax in row:
            ax.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.save(fig, path, dpi=130)


def main(argv=None):
    configs = options.parse_options(Options, argv=argv)
    with options.one_line_errors():
        draw_examples(options.agreed(configs, [f.name for f in fields(Options)]))


if __name__ == "__main__":
    options.start(main)
