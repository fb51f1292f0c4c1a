"""What all figures have in common: colors, the curves of a group of seeds, the legend below."""
import math
from contextlib import suppress

import numpy as np
from matplotlib import colormaps, style
from matplotlib.figure import Figure                                 # without pyplot, which would choose a display

from toolbox.files import writing
from toolbox.figures.runs import measured
from toolbox.stats import FEWEST, half_interval

# Transformers are gray, DATs colored. Color-blind readers can tell all of these apart.
GRAYS = ("#7f7f7f", "#000000")
COLORS = ("#0072b2", "#cc3311", "#e69f00", "#56b4e9", "#882255")     # blue, red, orange, light blue, purple
LINES = ("-", "-.", ":")                    # when the colors are used up; dashed lines are published curves
FONTS = {"axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8}
DPI = 180                                   # figures are 5 to 12 inches wide: readable at 900 pixels


def house_style():
    """Context in which figures are drawn and saved: a user's matplotlibrc has no effect."""
    return style.context(["default", FONTS])


def colormap(name):
    """A function from 0 ... 1 to colors."""
    return colormaps[name]


def styles(labels):
    """{label: color and line style} for labels as 'DAT 4+4' and 'Transformer 8+0, d_ff=329'."""
    chosen = {}
    for palette, is_transformer in ((COLORS, False), (GRAYS, True)):
        own = [label for label in labels if label.startswith("Transformer") == is_transformer]
        for i, label in enumerate(own):
            chosen[label] = dict(color=palette[i % len(palette)], ls=LINES[i // len(palette) % len(LINES)])
    return chosen


def panels(rows, columns, width, height, **options):
    """-> Figure of `width` inches with rows of `height` inches each, and its axes (rows, columns), with a grid."""
    fig = Figure(figsize=(width, rows * height), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    return fig, axes


def save(fig, path, dpi=DPI):
    """Writes the figure; half of one, on a full disk, is removed."""
    try:
        with writing(path):
            fig.savefig(path, dpi=dpi)
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise


def legend_below(fig):
    """One legend for all panels, below them, each label once, published curves after ours; the figure grows for it."""
    lines = {}
    for ax in fig.axes:
        for line, label in zip(*ax.get_legend_handles_labels()):
            lines.setdefault(label, line)
    if not lines:                                                     # no run has got beyond step 0
        return
    models = list(dict.fromkeys(label.removesuffix(", published") for label in lines))
    names = sorted(lines, key=lambda label: models.index(label.removesuffix(", published")))
    inches = 0.6 + 0.065 * max(map(len, names))                       # width of one entry, estimated
    width, height = fig.get_size_inches()
    width = max(width, inches + 0.2)
    rows = math.ceil(len(names) / int(width / inches))
    fig.set_size_inches(width, height + 0.1 + 0.18 * rows)
    fig.legend([lines[name] for name in names], names, loc="outside lower center", ncols=math.ceil(len(names) / rows))


def draw_group(ax, runs, x, y, label, color, ls="-"):
    """A single run as one curve; two or more as thin curves and their mean, from three on with a 95% Student-t band."""
    logs, rows = [run["log"] for run in runs], [measured(run, y) for run in runs]
    for log, i in zip(logs, rows):
        thin = dict(lw=0.7, alpha=0.5) if len(logs) > 1 else dict(lw=1.6, label=label)
        ax.plot(log[x][i], log[y][i], color=color, ls=ls, **thin)
    if len(logs) == 1:
        return
    n = min(len(i) for i in rows)                                     # a run may have been interrupted
    X = np.mean([log[x][i[:n]] for log, i in zip(logs, rows)], axis=0)
    Y = np.array([log[y][i[:n]] for log, i in zip(logs, rows)])
    ax.plot(X, Y.mean(0), color=color, ls=ls, lw=1.8, label=f"{label}, mean of {len(logs)} seeds")
    if len(logs) >= FEWEST:
        half = half_interval(Y)
        ax.fill_between(X, Y.mean(0) - half, Y.mean(0) + half, color=color, alpha=0.2, lw=0)


def draw_interval(ax, y, values, color, label=None):
    """In the row y: a dot for each value, their mean and, from three values on, its 95% Student-t interval."""
    half = half_interval(values) if len(values) >= FEWEST else np.nan
    ax.errorbar([np.mean(values)], [y], xerr=[half], fmt="o", ms=4, color=color, capsize=3, label=label)
    ax.plot(values, [y] * len(values), "o", ms=3, mfc="white", mec=color, mew=0.8)
