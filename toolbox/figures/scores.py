"""Finished models of mathematics on problems that they were not trained on: a table, from scores.csv alone.

scores.csv has a row for each run and set of problems (see toolbox/figures/mathematics.py).
"""
from itertools import combinations

import numpy as np

from toolbox.figures.mathematics import told_apart
from toolbox.files import write_text
from toolbox.stats import mean_text, paired_difference

METRICS = {"char_accuracy": ("characters right", True), "exact_match": ("answers right", True),
           "val_loss": ("loss per character", False)}
HELD_OUT = "held out"                       # generated problems; other sets are files
NEEDED = {"model", "module", "level", "seed", "problems", *METRICS}            # columns of scores.csv


def by_seed(rows):
    """{module and level: {model: {metric: {seed: mean over the levels of the held-out problems}}}}, as in the file."""
    found = {}
    for row in rows:
        if row["problems"].startswith(HELD_OUT):
            set_of_problems = f"{row['module']}, {row['level']}"
            model = found.setdefault(set_of_problems, {}).setdefault(row["model"], {name: {} for name in METRICS})
            for name in METRICS:
                model[name].setdefault(int(row["seed"]), []).append(float(row[name]))
    return {problems: {model: {name: {seed: float(np.mean(values)) for seed, values in seeds.items()}
                               for name, seeds in metrics.items()} for model, metrics in models.items()}
            for problems, models in found.items()}


def table(rows):
    """Markdown: a row for each model and what it was tested on; below, the differences of any two of these models."""
    heads = [name for name, _ in METRICS.values()]
    lines = [f"| problems | model | seeds | {' | '.join(heads)} |", "|---" * (3 + len(heads)) + "|"]
    differences = [f"| problems | model | minus | {' | '.join(heads)} |", lines[1]]
    for problems, models in by_seed(rows).items():
        for model, values in models.items():
            cells = [mean_text([*values[name].values()], 4) for name in METRICS]
            lines.append(f"| {problems} | {model} | {len(values['val_loss'])} | {' | '.join(cells)} |")
        for one, other in combinations(models, 2):
            cells = [describe(models[one][name], models[other][name], more) for name, (_, more) in METRICS.items()]
            differences.append(f"| {problems} | {one} | {other} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *differences, "",
                      "±, [ ]: 95% Student-t intervals over seeds, differences paired by seed. Means of the levels."])


def describe(mine, theirs, more_is_better):
    one = paired_difference(mine, theirs)
    if one is None:
        return ""
    interval = "" if one.low is None else f" [{one.low:+.4f}, {one.high:+.4f}]"
    return f"{one.mean:+.4f}{interval}: {one.verdict('it', 'the other', more_is_better)}"


def redraw(rows, out_dir, paper):
    """Writes scores.md from rows of scores.csv -> its text, and the file."""
    text = table(told_apart(rows))
    write_text(out_dir / "scores.md", text + "\n")
    return text, [out_dir / "scores.md"]
