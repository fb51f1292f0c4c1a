"""Accuracy against training steps, a column for each module: figures from curves.csv alone; nothing is trained here.

    python accuracy_curves.py --curves=out/seq2seq/curves.csv --paper      the published curves dashed behind ours
    python accuracy_curves.py --curves=one.csv,another.csv --out=both.png  several of them in one figure
"""
import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import compare
from toolbox import training

import matplotlib.pyplot as plt                                       # after compare, which chooses the backend

PUBLISHED = training.ROOT / "results/paper/mathematics.csv"
METRICS = {"char_accuracy": "characters right, given those before", "exact_match": "answers right as a whole"}
OPTIONS = ("module", "n_heads", "n_ra", "n_ra_decoder", "seed")
MEASURED = ("step", "seconds", "val_loss", *METRICS)
# the paper's three models: relational heads nowhere, in the encoder only (config 1), in both (config 2)
COLORS = {"Transformer": "tab:gray", "config 1": "tab:blue", "config 2": "tab:red"}


@dataclass
class Options:
    curves: str = "out/seq2seq/curves.csv"  # what train_seq2seq.py wrote; several files separated by commas
    out: str = ""                           # the figure; default: curves.png beside the (first) file
    paper: bool = False                     # draw the published curves behind ours


def write_csv(folders, path):
    """One row for each validation of the runs in these folders. `model` is their name among the runs of the module."""
    runs = [compare.load_run(folder) for folder in folders]
    with open(path, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["model", *OPTIONS, *MEASURED])
        for module in dict.fromkeys(run["options"]["module"] for run in runs):
            groups = compare.group_runs([run for run in runs if run["options"]["module"] == module])
            for label, run in ((label, run) for label, group in groups.items() for run in group):
                for i in compare.measured(run, "val_loss"):
                    writer.writerow([label, *(run["options"][name] for name in OPTIONS),
                                     *(f"{run['log'][name][i]:.6g}" for name in MEASURED)])


def read_csv(path):
    """The rows of curves.csv as dicts of strings. Raises ValueError if it is something else."""
    try:
        with open(path, newline="") as f:
            rows = list(csv.DictReader(f))
    except FileNotFoundError:
        raise ValueError(f"no file {path}: run train_seq2seq.py first") from None
    if not rows or not {"model", *OPTIONS, *MEASURED} <= rows[0].keys():
        raise ValueError(f"{path} has no curves of train_seq2seq.py")
    return rows


def kind(row):
    """Which of the paper's three models a row belongs to."""
    if row["n_ra"] == "0":
        return "Transformer"
    return "config 1" if row["n_ra_decoder"] == "0" else "config 2"


def draw(rows, path, paper=False):
    """Both accuracies against steps, with the published character accuracies, if wanted, dashed behind the first.

    Without step 0, where all of them are near 0.
    """
    modules = sorted({row["module"] for row in rows})
    fig, axes = plt.subplots(2, len(modules), figsize=(1.5 + 3.6 * len(modules), 6.4), squeeze=False, sharex="col",
                             layout="constrained")
    for column, module in zip(axes.T, modules):
        of_module = [row for row in rows if row["module"] == module]
        models = {row["model"]: kind(row) for row in of_module}       # in the order of the file
        for i, (model, its_kind) in enumerate(models.items()):
            color = COLORS[its_kind] if len(set(models.values())) == len(models) else plt.cm.tab10(i)
            runs = {}
            for row in of_module:
                if row["model"] == model and row["step"] != "0":
                    runs.setdefault(row["seed"], []).append(row)
            runs = [{"log": {name: np.array([float(row[name]) for row in one]) for name in MEASURED}}
                    for one in runs.values()]
            for ax, metric in zip(column, METRICS):
                compare.draw_group(ax, runs, "step", metric, color, model)
        if paper:
            draw_published(column[0], module)
        column[0].set_title(module, fontsize=10)
        column[1].set_xlabel("step")
        column[1].set_ylim(bottom=0)
    for row, name in zip(axes, METRICS.values()):
        row[0].set_ylabel(name)
        for ax in row:
            ax.grid(alpha=0.3)
    lines = {line.get_label(): line for ax in fig.axes for line in ax.lines if line.get_label()[0] != "_"}
    fig.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(modules) + 1, fontsize=8)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def draw_published(ax, module):
    """The published curves against their own axis of epochs, above. Their validation data were training data."""
    with open(PUBLISHED, newline="") as f:
        rows = [row for row in csv.DictReader(f) if row["module"] == module]
    top = ax.twiny()
    top.set_xlabel("dashed: published, epochs", fontsize=8)
    top.tick_params(labelsize=8)
    for model, color in COLORS.items():
        curve = [(int(row["epoch"]), float(row["accuracy"])) for row in rows if row["model"] == model]
        top.plot(*zip(*curve), color=color, ls="--", lw=1, alpha=0.8, label=f"published {model}")
    top.set_xlim(0, 100)
    ax.set_xlim(0)


def main(argv=None):
    options, = training.parse_options(Options, argv=argv)
    paths = [Path(part) for part in options.curves.split(",")]
    out = Path(options.out) if options.out else paths[0].with_name("curves.png")
    with training.one_line_errors():
        draw([row for path in paths for row in read_csv(path)], out, options.paper)
    print(out)


if __name__ == "__main__":
    training.start(main)
