"""Accuracy against the number of training images: figures and a table from results.csv alone; nothing is trained here.

    python learning_curves.py --results=out/relgames/results.csv --paper        the published curves dashed behind ours
"""
import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import compare
from toolbox import training
from data.relational_games import COLUMN_TASKS, SPRITES, TASKS

import matplotlib.pyplot as plt                                       # after compare, which chooses the backend

PUBLISHED = training.ROOT / "results/paper/relational_games.csv"
NOT_OPTIONS = ("accuracy_", "n_parameters", "steps", "seconds", "train_loss", "device")     # columns that are results


@dataclass
class Options:
    results: str = "out/relgames/results.csv"   # what train_relgames.py wrote
    paper: bool = False                     # draw the published curves behind ours


def write_csv(cells, path):
    """One row a cell: its options, then what came out."""
    columns = ["n_parameters", "steps", "seconds", "train_loss", "device", "dtype"]
    with open(path, "w", newline="") as f:
        writer = csv.writer(f)
        options = [name for name in cells[0]["options"] if name != "dtype"]
        writer.writerow([*options, *(f"accuracy_{sprites}" for sprites in SPRITES), *columns])
        for cell in cells:
            writer.writerow([*(cell["options"][name] for name in options),
                             *(cell["accuracy"].get(sprites, "") for sprites in SPRITES), *(cell[c] for c in columns)])


def read_csv(path):
    """The rows of results.csv as dicts, numbers where they are needed. Raises ValueError if it is something else."""
    try:
        with open(path, newline="") as f:
            rows = list(csv.DictReader(f))
    except FileNotFoundError:
        raise ValueError(f"no file {path}: run train_relgames.py first") from None
    needed = {"task", "train_size", "n_ra", "n_heads", "d_ff", "seed", "sprites", "seconds", "n_parameters"}
    if not rows or not needed | {f"accuracy_{sprites}" for sprites in SPRITES} <= rows[0].keys():
        raise ValueError(f"{path} has no results of train_relgames.py")
    return [{**row, **{name: int(row[name]) for name in ("train_size", "n_ra", "n_heads", "seed", "n_parameters")}}
            for row in rows]


def grouped(rows):
    """{model: {(task, train_size): {seed: row}}}: a model is told by its heads and by the options that differ."""
    rows = sorted(rows, key=lambda row: -row["n_ra"])                                          # Transformers last
    identities = [{"n_heads": row["n_heads"], "n_ra": row["n_ra"], **options(row)} for row in rows]
    groups = {}
    for row, label in zip(rows, compare.labels(identities)):
        groups.setdefault(label, {}).setdefault((row["task"], row["train_size"]), {})[row["seed"]] = row
    return groups


def options(row):
    """What a model and its training were, besides its heads; relational options only where there are such heads."""
    others = ("task", "train_size", "seed", "n_ra", "n_heads", *(training.RELATIONAL if row["n_ra"] == 0 else ()))
    return {name: value for name, value in row.items() if name not in others and not name.startswith(NOT_OPTIONS)}


def comparable(row, base):
    """Equal but for what makes a DAT; a baseline of another d_ff belongs to the DAT whose parameters it has."""
    apart = ("d_ff", *training.RELATIONAL)
    mine, theirs = ({k: v for k, v in options(one).items() if k not in apart} for one in (row, base))
    as_wide = row["d_ff"] == base["d_ff"] or abs(row["n_parameters"] / base["n_parameters"] - 1) < 0.01
    return mine == theirs and row["n_heads"] == base["n_heads"] and as_wide


def accuracies(by_seed, sprites):
    """{seed: accuracy} of the cells that were tested on `sprites`."""
    return {seed: float(row[f"accuracy_{sprites}"]) for seed, row in by_seed.items() if row[f"accuracy_{sprites}"]}


def draw(groups, sprites, path, paper):
    """One panel a task: the mean over seeds against training size, from three on with its 95% band; dots are seeds."""
    drawn = {task for group in groups.values() for task, _ in group}
    tasks = [task for task in TASKS + COLUMN_TASKS if task in drawn]
    width, longest = 1 + 3 * len(tasks), max(map(len, groups)) + len(", published")
    columns = max(1, int(11 * width / longest))                       # of the legend, which stands below the panels
    rows = -(-2 * len(groups) // columns)
    fig, axes = plt.subplots(1, len(tasks), figsize=(max(width, longest / 10), 3.2 + 0.2 * rows), squeeze=False,
                             sharey=True, layout="constrained")
    colors = plt.cm.tab10.colors if len(groups) <= 10 else plt.cm.tab20.colors
    for ax, task in zip(axes[0], tasks):
        ax.axhline(0.5, color="grey", lw=0.5)                         # guessing
        for color, (label, group) in zip(colors * len(groups), groups.items()):
            sizes = sorted(size for t, size in group if t == task)
            points = {size: list(accuracies(group[task, size], sprites).values()) for size in sizes}
            points = {size: values for size, values in points.items() if values}
            mean = np.array([np.mean(values) for values in points.values()])
            half = np.array([compare.half_interval(v) if len(v) >= 3 else np.nan for v in points.values()])
            ax.plot(list(points), mean, "o-", ms=3, color=color, label=label)
            ax.fill_between(list(points), mean - half, mean + half, color=color, alpha=0.2, lw=0)
            if np.isfinite(half).sum() == 1:                          # of which no band can be seen
                ax.errorbar(list(points), mean, half, fmt="none", ecolor=color, capsize=3)
            for size, values in points.items():
                ax.plot([size] * len(values), values, ".", ms=3, color=color, alpha=0.4)
        for color, (label, curve) in zip(colors, published(task, sprites).items() if paper else ()):
            ours = [line.get_color() for line in ax.lines if line.get_label().split(",")[0] == label]
            ax.plot(*curve, "--", color=ours[0] if ours else color, lw=1, label=f"{label}, published")
        ax.set(title=task.replace("_", " "), xlabel="training images")
        ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel(f"test accuracy, {sprites}")
    handles = {label: line for ax in axes[0] for line, label in zip(*ax.get_legend_handles_labels())}
    fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=8)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def published(task, sprites):
    """{model: (training sizes, mean accuracies)} of the paper."""
    curves = {}
    for row in csv.DictReader(PUBLISHED.read_text().splitlines()):
        if (row["task"], row["sprites"]) == (task, sprites):
            label = f"{'Transformer' if row['n_ra'] == '0' else 'DAT'} {row['n_sa']}+{row['n_ra']}"
            x, y = curves.setdefault(label, ([], []))
            x.append(int(row["train_size"]))
            y.append(float(row["accuracy"]))
    return curves


def table(groups, sprites):
    """Markdown: accuracy of each model at each size, its spread, and the paired difference to the Transformer."""
    others = [other for other in SPRITES if other != sprites]
    lines = [f"| task | images | model | parameters | {sprites} | {others[0]} | {others[1]} | seeds | s each "
             "| minus Transformer |", "|---" * 10 + "|"]
    keys = {key for group in groups.values() for key in group}
    for key in sorted(keys, key=lambda key: ((TASKS + COLUMN_TASKS).index(key[0]), key[1])):
        for label, group in groups.items():
            if key in group:
                rows = list(group[key].values())
                means = " | ".join(show(list(accuracies(group[key], s).values())) for s in (sprites, *others))
                seconds = np.mean([float(row["seconds"]) for row in rows])
                lines.append(f"| {key[0]} | {key[1]} | {label} | {rows[0]['n_parameters']:,} | {means} | "
                             f"{len(rows)} | {seconds:.0f} | {difference(groups, label, key, sprites)} |")
    return lines


def show(values):
    """Mean, and from three values on half the 95% interval of the mean."""
    if not values:
        return ""
    return f"{np.mean(values):.3f}" + (f" ± {compare.half_interval(values):.3f}" if len(values) >= 3 else "")


def difference(groups, label, key, sprites):
    """DAT - Transformer at equal task and size, paired by seed: the images and their order are the same in a pair."""
    mine, texts = groups[label][key], []
    for other, group in groups.items():
        theirs = group.get(key, {})
        seeds = sorted(accuracies(mine, sprites).keys() & accuracies(theirs, sprites).keys())
        if not seeds or not mine[seeds[0]]["n_ra"] or theirs[seeds[0]]["n_ra"]:
            continue
        if comparable(mine[seeds[0]], theirs[seeds[0]]):
            delta = np.array([accuracies(mine, sprites)[seed] - accuracies(theirs, sprites)[seed] for seed in seeds])
            texts.append((f"to {other}: ", interval(delta)))
    return texts[0][1] if len(texts) == 1 else "; ".join(base + text for base, text in texts)


def interval(delta):
    """Mean of paired differences, and from three on its 95% interval and what may be concluded."""
    if len(delta) < 3:
        return f"{delta.mean():+.3f} ({len(delta)} seed{'s' * (len(delta) > 1)})"
    low, high = delta.mean() - compare.half_interval(delta), delta.mean() + compare.half_interval(delta)
    return f"{delta.mean():+.3f} [{low:+.3f}, {high:+.3f}]" + (": no difference" if low <= 0 <= high else "")


def report(path, paper):
    """Writes learning_curves.png, the same for the other two sets of sprites, and table.md; prints the table."""
    rows, folder = read_csv(path), Path(path).parent
    sprites, groups = rows[0]["sprites"], grouped(rows)
    if paper and sprites != "pentos":
        raise ValueError(f"--paper: the published models learned from pentos, these from {sprites}")
    figures = {s: folder / ("learning_curves.png" if s == sprites else f"{s}.png") for s in SPRITES
               if any(row[f"accuracy_{s}"] for row in rows)}
    for s, figure in figures.items():
        draw(groups, s, figure, paper)
    lines = table(groups, sprites)
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    print("", *lines, "", "±, [ ]: 95% Student-t intervals over seeds; two or fewer seeds tell little", sep="\n")
    print(", ".join(map(str, (*figures.values(), folder / "table.md", path))))


def main(argv=None):
    configs = training.parse_options(Options, argv=argv)
    with training.one_line_errors():
        o = training.agreed(configs, ("paper",))
        report(Path(o.results), o.paper)


if __name__ == "__main__":
    training.start(main)
