"""Figures and tables of runs, from their folders or from recorded CSV files. Nothing is trained here.

What is drawn depends on what the runs are: mathematics and Relational Games have figures of their own, as in the paper.
"""
from pathlib import Path

from toolbox.figures import ablation, curves, drawing, mathematics, relational_games, scores
from toolbox.figures.runs import load_run, read_csv
from toolbox.options import make_out_dir


def report(folders, out_dir, paper=False):
    """Draws the runs in these folders, writes table.md, prints the table and the names of the files, all in out_dir.

    paper: draw the published curves behind ours. Raises ValueError for what is no run, or runs of different kinds.
    """
    runs = [load_run(folder) for folder in dict.fromkeys(map(Path, folders))]          # none of them twice
    kinds = {kind_of(run["options"]) for run in runs}
    if len(kinds) > 1:
        raise ValueError("these runs are of different kinds: give the folders of one kind")
    show(kinds.pop().report, runs, out_dir, paper)


def redraw(paths, out_dir, paper=False):
    """The same from results.csv of Relational Games, or curves.csv or scores.csv of mathematics; several files as one.
    """
    rows, kinds = [], set()
    for path in dict.fromkeys(map(Path, paths)):
        if path.is_dir():
            raise ValueError(f"{path} is a folder: give folders or CSV files, not both")
        new = read_csv(path)
        if not new:
            raise ValueError(f"{path} has no rows")
        rows += [{**row, "file": str(path)} for row in new]
        columns = new[0].keys()
        kind = kind_of(columns)
        if kind is curves or not kind.NEEDED <= columns:
            raise ValueError(f"{path} has neither results of Relational Games nor curves or scores of mathematics")
        if any(None in row or None in row.values() for row in new):
            raise ValueError(f"{path} is damaged: not all of its rows have {len(columns)} cells")
        kinds.add(kind)
    if len(kinds) > 1:
        raise ValueError("these files are of different kinds: give those of one kind")
    try:
        show(kinds.pop().redraw, rows, out_dir, paper)
    except ValueError as error:                                       # a cell that is no number
        raise ValueError(f"{', '.join(map(str, paths))}: {error}") from None


def kind_of(names):
    """The module that draws runs which have options of these names."""
    if "factor" in names:
        return ablation
    if "problems" in names:
        return scores
    if "module" in names:
        return mathematics
    return relational_games if {"task", "train_size"} <= set(names) else curves


def report_ablation(factors, out_dir):
    """Of the finished runs among [(factor, variant, folder)] the table and the figure of an ablation."""
    runs = [(factor, variant, load_run(folder)) for factor, variant, folder in factors if (folder / "log.csv").exists()]
    rows = [ablation.row(*one) for one in runs if one[-1]["finished"]]
    show(lambda rows, out_dir, _: ablation.report(rows, out_dir), rows, out_dir, None)


def show(write, what, out_dir, paper):
    out_dir = Path(out_dir)
    make_out_dir(out_dir)
    with drawing.house_style():
        text, files = write(what, out_dir, paper)
    print(*([f"\n{text}\n"] if text else []), *files, sep="\n")
