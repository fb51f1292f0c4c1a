"""What look.py draws: relations and attention as a model computes them, what they tell, and what is lost without them.

Rows are receivers i, columns senders j, everywhere; what a causal model may not see is gray.
"""
import textwrap

import numpy as np
from matplotlib.colors import PowerNorm, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from toolbox.figures import drawing

WIDE, DPI = 9, 110                          # inches; a README shows 900 pixels
SIGNED = "RdBu_r"                           # of relations: red is positive, blue negative
KINDS = {"same object": ("#cc3311", "-"), "same colour": ("#e69f00", "--"), "same shape": ("#0072b2", "-."),
         "both differ": ("#000000", ":")}


def save(fig, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.save(fig, path, dpi=DPI)


def wrapped(title, inches=WIDE):
    """The title in lines that fit: the name of a run with many options is long, and has no spaces."""
    return "\n".join(textwrap.wrap(title, int(10.5 * inches)))


# ---- Relational Games ------------------------------------------------------------------------------------------------

def draw_boards(path, title, images, labels, answers, kinds, r):
    """r as lines between objects, a row for each relation; wrong answers have a frame.

    images (N, 36, 36, 3), labels and answers (N,), kinds (N, 9, 9) as in kinds_of_pairs, r {(layer, l): (N, 9, 9)}.
    """
    pick = []                               # of true and of false images: two that are answered rightly, one wrongly
    for label in (1, 0):
        for right, n in ((True, 2), (False, 1)):
            pick += np.flatnonzero((labels == label) & ((answers == label) == right))[:n].tolist()
    fig = Figure(figsize=(WIDE, 0.5 + WIDE / 6.4 * len(r)), layout="constrained")
    axes = fig.subplots(len(r), len(pick), squeeze=False)
    for row, ((layer, l), values) in zip(axes, r.items()):
        largest = np.abs(values[kinds >= 0]).max()
        for ax, n in zip(row, pick):
            ax.imshow(images[n], interpolation="nearest", extent=(0, 36, 36, 0))
            draw_lines(ax, values[n], kinds[n], largest)
            ax.set(xticks=[], yticks=[])
            if answers[n] != labels[n]:
                for side in ax.spines.values():
                    side.set(color="#e69f00", linewidth=4)
        row[0].set_ylabel(f"layer {layer}\nrelation {l}", fontsize=10)
    for ax, n in zip(axes[0], pick):
        ax.set_title(("true" if labels[n] else "false") + ("\nanswered wrongly" if answers[n] != labels[n] else ""),
                     fontsize=10)
    fig.suptitle(wrapped(f"{title}: r of two objects (starred: they are the same)"), fontsize=11)
    save(fig, path)


def draw_lines(ax, r, kinds, largest):
    """A line for each pair of objects; on boards with two rows only for pairs that the tasks compare."""
    cells = np.flatnonzero((kinds >= 0).any(1))
    pairs = [(i, j) for i in cells for j in cells if i < j]
    if len(cells) == 4:                                                # occurs, xoccurs: the top with the bottom
        pairs = [(i, j) for i, j in pairs if i // 3 != j // 3]
    if len(cells) == 6:                                                # match pattern: within each row
        pairs = [(i, j) for i, j in pairs if i // 3 == j // 3]
    for i, j in pairs:
        (x, y), (x2, y2) = ((cell % 3 * 12 + 5.5, cell // 3 * 12 + 5.5) for cell in (i, j))
        in_a_row = i // 3 == j // 3
        if not in_a_row:                                               # from lower edge to upper edge
            y, y2 = y + 5.5, y2 - 5.5
        up = 1 if i > 2 else -1                                        # where the line is bent to
        if len(cells) == 6:                                            # in the empty row
            y = y2 = 12.5 if i < 3 else 22.5
        bend = 0.25 * up if in_a_row and j - i == 2 else 0             # passes by the object between them
        t = 0.5 if in_a_row else 0.85                                  # of the number: where lines are apart
        end = (x2, y2) if in_a_row else (x + 0.75 * (x2 - x), y + 0.75 * (y2 - y))     # at the number
        strength, star = r[i, j] / largest, "*" if kinds[i, j] == 0 else ""
        ax.add_patch(FancyArrowPatch((x, y), end, arrowstyle="-", connectionstyle=f"arc3,rad={-bend}",
                                     lw=1 + 6 * abs(strength), color=drawing.colormap(SIGNED)(0.5 + strength / 2)))
        ax.text(x + t * (x2 - x), y + t * (y2 - y) - bend * (x2 - x) / 2, f"{r[i, j]:+.1f}{star}", color="white",
                fontsize=8.5, weight="bold" if star else "normal", ha="center", va="center",
                bbox=dict(facecolor="black", edgecolor="none", pad=0.5))


def draw_kinds(path, title, kinds, by_state):
    """Histograms of r by what two objects share: a row for each of by_state {"trained": {(layer, l): r (N, 9, 9)}}."""
    n = len(next(iter(by_state.values())))
    fig, axes = drawing.panels(len(by_state), n, WIDE, 2.0)
    for row, (state, r) in zip(axes, by_state.items()):
        for ax, ((layer, l), values) in zip(row, r.items()):
            low, high = np.quantile(values[kinds >= 0], (0.002, 0.998))
            for kind, (name, (color, ls)) in enumerate(KINDS.items()):
                chosen = values[kinds == kind]
                if len(chosen):
                    ax.hist(chosen.clip(low, high), np.linspace(low, high, 41), density=True, histtype="step",
                            color=color, ls=ls, lw=1.6)
                    ax.plot([], [], color=color, ls=ls, lw=1.6, label=name)
            ax.set(title=f"{state}: layer {layer}, relation {l}", xlabel="r", yticks=[])
    fig.suptitle(wrapped(f"{title}: r by what two objects share"), fontsize=11)
    drawing.legend_below(fig)
    save(fig, path)


def draw_meaningful_or_used(path, rows):
    """Left: does a value tell 'same object'? Right: accuracy without it. A line for each part, a dot for each seed."""
    parts = {}
    for row in rows:
        is_transformer = row["model"].startswith("Transformer")
        if row["part"].startswith(("relation ", "all relations")) or is_transformer and "head" in row["part"]:
            parts.setdefault((row["model"], row["layer"], row["part"]), []).append(row)
    fig, axes = drawing.panels(1, 2, WIDE, 0.8 + 0.27 * len(parts), sharey=True)
    for y, group in enumerate(parts.values()):
        for row in group:
            for ax, name, dy, marker, face, color, label in (
                    (axes[0, 0], "untrained", -0.14, "o", "white", "#7f7f7f", "untrained"),
                    (axes[0, 0], "auc", 0.14, "o", "#0072b2", "#0072b2", "trained"),
                    (axes[0, 1], "intact", 0, "|", "black", "black", "intact"),
                    (axes[0, 1], "zero", -0.14, "s", "#cc3311", "#cc3311", "without it (its weights are zero)"),
                    (axes[0, 1], "resample", 0.14, "^", "#e69f00", "#e69f00", "with that of another image")):
                if name in row:
                    ax.plot(row[name], y + dy, marker, mfc=face, mec=color, ms=11 if marker == "|" else 5.5, ls="",
                            mew=1.4, label=label)
    names = [f"{model}: layer {layer}, {part.replace('sensory', 'attention')}" for model, layer, part in parts]
    axes[0, 0].set(yticks=range(len(parts)), yticklabels=names, xlim=(-0.03, 1.03), ylim=(len(parts) - 0.4, -0.6),
                   title="Does it look meaningful?", xlabel="AUC: same object or not, from this value alone")
    axes[0, 1].set(title="Is it used?", xlabel="accuracy (of guessing: 0.5)")
    for ax in axes[0]:
        ax.axvline(0.5, color="black", lw=0.8, ls=":")
    drawing.legend_below(fig)
    save(fig, path)


# ---- text ------------------------------------------------------------------------------------------------------------

SIGNS = {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5"}             # in figures: as wide as a letter
PLAIN = {" ": "' '", "\n": "\\n", "\t": "\\t"}                      # in tables: any console can print these


def visible(piece, signs=SIGNS):
    """Bytes of a token -> a text in which spaces can be seen."""
    text = "".join(signs.get(c, c) for c in piece.decode(errors="replace"))
    return "".join(c if c.isprintable() and ord(c) < 0x2500 else "?" for c in text) or "?"


def plain(words):
    """No formulas: a pair of dollars would begin one."""
    return [word.replace("$", r"\$") for word in words]


def draw_symbols(path, panels):
    """panels: (title, characters, their classes, p (characters, symbols), label below). Two in a row."""
    rows = -(-len(panels) // 2)
    fig = Figure(figsize=(WIDE, 0.3 + 4.6 * rows), layout="constrained")
    axes = fig.subplots(rows, min(2, len(panels)), squeeze=False)
    for ax, (title, names, classes, p, below) in zip(axes.flat, panels):
        shown = ax.imshow(p, aspect="auto", cmap="viridis", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
        ax.set(title=wrapped(title, 4), xlabel=below, xticks=[])
        ax.set_yticks(range(len(names)), plain(names), fontsize=8, family="DejaVu Sans Mono")
        for y in np.flatnonzero(np.diff(classes)):                     # between classes of characters
            ax.axhline(y + 0.5, color="white", lw=0.8)
    fig.colorbar(shown, ax=axes, shrink=0.5, label="how much of each symbol a character takes (mean over contexts)")
    fig.suptitle("rows: characters, white lines between their classes (small letters, capitals, ...); columns: symbols",
                 fontsize=10)
    save(fig, path)


def draw_pairs(out, title, layers, receivers, senders, causal=False, most=4):
    """Heat maps of r, or where there is none of attention, for the first sequence -> the file, in a list."""
    layer = next((one for one in layers if one.n_relations), None)
    name, values = ("relation", layer.r) if layer else ("attention head", layers[0].alpha)
    values = values[0, :most].float().cpu().numpy()                    # (maps, T, S)
    hidden = np.triu(np.ones(values.shape[1:], bool), 1) if causal else np.zeros(values.shape[1:], bool)
    side = 3.4 if len(senders) <= 24 else 4.4
    columns = min(2, len(values))
    fig = Figure(figsize=(WIDE, 0.5 + side * -(-len(values) // columns)), layout="constrained")
    axes = fig.subplots(-(-len(values) // columns), columns, squeeze=False)
    for ax in axes.flat[len(values):]:
        ax.axis("off")
    for l, (ax, one) in enumerate(zip(axes.flat, values)):
        ax.set_facecolor("#bbbbbb")
        one = np.ma.masked_where(hidden, one)
        looks = (dict(cmap=SIGNED, norm=TwoSlopeNorm(0, -abs(one).max(), abs(one).max())) if layer else
                 dict(cmap="viridis", vmin=0))
        fig.colorbar(ax.imshow(one, aspect="auto", interpolation="nearest", **looks), ax=ax, shrink=0.8)
        ax.set_title(f"{name} {l + 1}")
        for axis, words in ((ax.yaxis, receivers), (ax.xaxis, senders)):
            step = -(-len(words) // 48)
            axis.set_ticks(range(0, len(words), step), plain(words[::step]), fontsize=7, family="DejaVu Sans Mono")
        ax.tick_params(axis="x", rotation=90 if max(map(len, senders)) > 2 else 0)
    fig.suptitle(wrapped(f"{title}: rows are receivers, columns senders" + "; gray is the future" * causal),
                 fontsize=10)
    path = out / ("relations.png" if layer else "attention.png")
    save(fig, path)
    return [path]


def draw_relations_or_symbols(path, title, rows, unit):
    """By how much the loss rises without relations and without symbols, layer by layer; a mark for each run."""
    names = list(dict.fromkeys(row["layer"] for row in rows))
    fig, axes = drawing.panels(1, 1, 7, 0.9 + 0.4 * len(names))
    ax = axes[0, 0]
    for row in rows:
        if row["how"] == "zero" and row["what"] in ("relations", "symbols"):
            relations = row["what"] == "relations"
            ax.plot(row["rise"].mean(), names.index(row["layer"]) + (-0.15 if relations else 0.15),
                    "o" if relations else "s", color="#cc3311" if relations else "#0072b2", ms=6, alpha=0.8, ls="",
                    label="without relations, W_r = 0" if relations else "without symbols, W_s = 0")
    ax.axvline(0, color="black", lw=0.8)
    ax.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5), title=title,
           xlabel=f"loss rises by ({unit})")
    drawing.legend_below(fig)
    save(fig, path)


def draw_sizes(path, by_run):
    """by_run {run: {"encoder 1": (offsets, sizes)}}: the size of s_o W_s by offset o = sender - receiver."""
    names = list(dict.fromkeys(name for sizes in by_run.values() for name in sizes))
    fig, axes = drawing.panels(-(-len(names) // 2), min(2, len(names)), WIDE, 1.7, sharex=True, sharey=True)
    for ax, name in zip(axes.flat, names):
        for color, (run, sizes) in zip(drawing.COLORS, by_run.items()):
            ax.plot(*sizes[name], color=color, lw=1.3, label=run)
        ax.set(title=name, ylim=(0, None))
    for ax in axes[-1]:
        ax.set_xlabel("offset of the sender from the receiver")
    for ax in axes[:, 0]:
        ax.set_ylabel(r"rms of $s_o W_s$")
    drawing.legend_below(fig)
    save(fig, path)


# ---- images ----------------------------------------------------------------------------------------------------------

def draw_patch(path, title, images, maps, name, patch, size, signed):
    """Each image (3, H, W), then its maps (N, maps, side, side) over it in gray; the patch, if given, has a frame."""
    fig = Figure(figsize=(WIDE, 0.6 + WIDE / (1.4 + maps.shape[1]) * len(images)), layout="constrained")
    axes = fig.subplots(len(images), 1 + maps.shape[1], squeeze=False)
    largest = np.abs(maps).max()
    looks = dict(cmap=SIGNED, vmin=-largest, vmax=largest) if signed else dict(cmap="viridis", vmin=0, vmax=largest)
    for n, (row, image, values) in enumerate(zip(axes, images, maps)):
        height, width = image.shape[1:]
        where = (0, width, height, 0)
        row[0].imshow(image.transpose(1, 2, 0), extent=where)
        for l, (ax, one) in enumerate(zip(row[1:], values)):
            ax.imshow(image.mean(0) / 255, cmap="gray", vmin=-1.5, vmax=1, extent=where)       # pale
            shown = ax.imshow(one, extent=where, alpha=0.7, interpolation="nearest", **looks)
            ax.set_title(f"{name} {l + 1}" if n == 0 else "")
        for ax in row:
            ax.set(xticks=[], yticks=[])
            if patch is not None:
                y, x = divmod(patch, values.shape[-1])
                ax.add_patch(Rectangle((x * size, y * size), size, size, fill=False, ec="black", lw=4))
                ax.add_patch(Rectangle((x * size, y * size), size, size, fill=False, ec="#ffd700", lw=2))
    fig.colorbar(shown, ax=axes, shrink=0.6)
    fig.suptitle(wrapped(title), fontsize=10)
    save(fig, path)
