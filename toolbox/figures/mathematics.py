"""Mathematics: accuracy against training steps, a column of panels for each module, drawn from curves.csv alone.

curves.csv has a row for each validation of each run; scores.csv one for each set of problems on which a finished model
was tested.
"""
from pathlib import Path

import numpy as np

from toolbox.files import write_csv
from toolbox.figures import curves, drawing
from toolbox.figures.runs import group_runs, measured, read_csv

PUBLISHED = Path(__file__).parents[2] / "results" / "paper" / "mathematics.csv"
METRICS = {"char_accuracy": "characters right,\ngiven those before", "exact_match": "answers right\nas a whole"}
OPTIONS = ("module", "n_heads", "n_ra", "n_ra_decoder", "seed")
MEASURED = ("step", "seconds", "val_loss", *METRICS)
NEEDED = {"model", *OPTIONS, *MEASURED}      # columns of curves.csv
SCORES = ("module", "level", "n_ra", "n_ra_decoder", "seed")          # columns of scores.csv, between model and scores
# the paper's three models: relational heads nowhere, in the encoder only (config 1), in both (config 2)
COLORS = {"Transformer": drawing.GRAYS[0], "config 1": drawing.COLORS[0], "config 2": drawing.COLORS[1]}


def labelled(runs):
    """Each run with `model`, its label among the runs on its module."""
    for module in dict.fromkeys(run["options"]["module"] for run in runs):
        groups = group_runs([run for run in runs if run["options"]["module"] == module])
        yield from ((label, run) for label, group in groups.items() for run in group)


def write_curves(runs, path):
    """One row for each validation."""
    rows = [{"model": label, **{name: run["options"][name] for name in OPTIONS},
             **{name: f"{run['log'][name][i]:.6g}" for name in MEASURED}}
            for label, run in labelled(runs) for i in measured(run, "val_loss")]
    write_csv(path, ["model", *OPTIONS, *MEASURED], rows)


def write_scores(runs, path):
    """One row for each run and set of problems -> the file, or nothing if no run has scores."""
    rows = [{"model": label, **{name: run["options"][name] for name in SCORES}, "problems": problems, **scores}
            for label, run in labelled(runs) for problems, scores in run.get("scores", {}).items()]
    if rows:
        write_csv(path, list(rows[0]), rows)
    return [path] if rows else []


def kind(row):
    """Which of the paper's three models a row of curves.csv belongs to."""
    if row["n_ra"] == "0":
        return "Transformer"
    return "config 1" if row["n_ra_decoder"] == "0" else "config 2"


def draw(rows, paper=False):
    """Both accuracies against steps, and the published curves if wanted -> Figure. Without step 0: all are near 0."""
    modules = sorted({row["module"] for row in rows})
    fig, axes = drawing.panels(2, len(modules), max(5, min(1 + 3 * len(modules), 12)), 2.6, sharex="col")
    kinds = {row["model"]: kind(row) for row in rows}                 # in the order of the file
    first = {its_kind: model for model, its_kind in reversed(kinds.items())}             # has the color of its kind
    own = [first.get(its_kind, its_kind) for its_kind in ("config 1", "config 2", "Transformer")]
    looks = {model: look for model, look in drawing.styles(dict.fromkeys([*own, *kinds])).items() if model in kinds}
    for column, module in zip(axes.T, modules):
        for model, look in looks.items():
            runs = {}
            for row in rows:
                if (row["module"], row["model"]) == (module, model) and row["step"] != "0":
                    runs.setdefault(row["seed"], []).append(row)
            runs = [{"log": {name: np.array([float(row[name]) for row in one]) for name in MEASURED}}
                    for one in runs.values()]
            for ax, metric in zip(column, METRICS if runs else ()):
                drawing.draw_group(ax, runs, "step", metric, model, **look)
        if paper:
            draw_published(column[0], module)
        column[0].set_title(module)
        column[1].set_xlabel("step")
        column[1].set_ylim(bottom=0)
    for row, name in zip(axes, METRICS.values()):
        row[0].set_ylabel(name)
    drawing.legend_below(fig)
    return fig


def draw_published(ax, module):
    """The published curves, dashed, against epochs, an axis above. Their validation data were training data."""
    top = ax.twiny()
    top.set_xlabel("dashed: published, epochs", fontsize=8)
    rows = [row for row in read_csv(PUBLISHED) if row["module"] == module]
    for model, color in COLORS.items():
        curve = [(int(row["epoch"]), float(row["accuracy"])) for row in rows if row["model"] == model]
        top.plot(*zip(*curve), color=color, ls="--", lw=1, alpha=0.8, label=f"{model}, published")
    top.set_xlim(0, 100)
    ax.set_xlim(0)


def told_apart(rows):
    """Where two files have runs of the same module, model and seed, models are named by their file, too.

    They differ in options that these files do not have.
    """
    runs = {tuple(row.get(name) for name in ("module", "model", "seed", "file")) for row in rows}
    if len({run[:-1] for run in runs}) < len(runs):
        rows = [{**row, "model": f"{row['model']}, {row['file']}"} for row in rows]
    return rows


def redraw(rows, out_dir, paper):
    """Draws curves.png from rows of curves.csv -> no text, the file."""
    drawing.save(draw(told_apart(rows), paper), out_dir / "curves.png")
    return "", [out_dir / "curves.png"]


def report(runs, out_dir, paper):
    """Writes curves.csv, scores.csv, curves.png and table.md -> the text of the table, and the files."""
    write_curves(runs, out_dir / "curves.csv")
    scores = write_scores(runs, out_dir / "scores.csv")
    _, figures = redraw(read_csv(out_dir / "curves.csv"), out_dir, paper)
    text = curves.write_table(runs, out_dir / "table.md")
    return text, [*figures, out_dir / "table.md", out_dir / "curves.csv", *scores]
