"""Relational Games: accuracy against the number of training images, drawn from results.csv alone.

results.csv has a row for each run: its options, its accuracies on the three sets of sprites, and what it took.
"""
from pathlib import Path

import numpy as np
from matplotlib.ticker import EngFormatter, MaxNLocator

from toolbox.files import write_csv, write_text
from toolbox.figures import drawing
from toolbox.figures.runs import comparable, labels, measured, read_csv
from toolbox.run import NOT_COMPARED
from toolbox.stats import FEWEST, half_interval, half_interval_of, mean_text, paired_difference
from toolbox.training import without_effect

PUBLISHED = Path(__file__).parents[2] / "results" / "paper" / "relational_games.csv"
SPRITES = ("pentos", "hexos", "stripes")
TASKS = ("same", "occurs", "xoccurs", "between", "match_pattern",     # as in the paper's figures
         "column_ABA", "column_AAB", "column_ABB")                    # and others of the benchmark
RESULTS = ("accuracy_pentos", "accuracy_hexos", "accuracy_stripes", "n_parameters", "steps", "seconds", "train_loss",
           "device")                        # columns that are no options
NUMBERS = ("train_size", "n_ra", "n_heads", "seed", "n_parameters")
NEEDED = {*NUMBERS, "task", "d_ff", "sprites", "seconds", *RESULTS[:3]}


# ---- results.csv -----------------------------------------------------------------------------------------------------

def newest(runs):
    """The finished runs on the sprites, and with the code and torch, of the newest one; lines on what is left out.

    Of several runs with the same options, seed included, only the newest is kept.
    """
    finished, notes = [run for run in runs if run["finished"] and run.get("scores")], []
    if len(finished) < len(runs):
        notes.append(f"left out, not finished: {len(runs) - len(finished)} of {len(runs)} runs")
    if not finished:
        return [], notes

    def origin(run):
        return run["options"]["sprites"], run["code"], run["torch"]
    last = max(finished, key=lambda run: run["written"])
    kept = [run for run in finished if origin(run) == origin(last)]
    if len(kept) < len(finished):
        notes.append(f"left out, of other sprites, code or torch than the newest run: "
                     f"{len(finished) - len(kept)} of {len(finished)} runs")
    by_options = {repr(options_of(run)): run for run in sorted(kept, key=lambda run: run["written"])}
    if len(by_options) < len(kept):
        notes.append(f"left out, for a newer one of the same options and seed: "
                     f"{len(kept) - len(by_options)} of {len(kept)} runs")
    return [run for run in kept if run is by_options[repr(options_of(run))]], notes


def options_of(run):
    """The columns of results.csv that are options; dtype is the one that the run really had, which may be 'auto'."""
    options = {name: value for name, value in run["options"].items() if name not in (*NOT_COMPARED, "dtype")}
    return {**options, "dtype": run["facts"]["dtype"]}


def write_results(runs, path):
    rows = []
    for run in runs:
        log, trained = run["log"], measured(run, "train_loss")[-1]    # the last row with a training loss
        rows.append({**options_of(run), **{f"accuracy_{name}": value for name, value in run["scores"].items()},
                     "n_parameters": run["n_parameters"], "steps": int(log["step"][trained]),
                     "seconds": round(log["seconds"][trained], 2), "train_loss": log["train_loss"][trained],
                     "device": run["device"]})
    options = dict.fromkeys(name for run in runs for name in options_of(run) if name != "dtype")
    write_csv(path, [*options, *RESULTS, "dtype"], rows)


def runs_of(rows):
    """Rows of results.csv as runs: options, facts, n_parameters; `accuracy` by sprites and `seconds` besides."""
    runs = []
    for row in rows:
        numbers = {name: int(row[name]) for name in NUMBERS}
        options = {name: value for name, value in {**row, **numbers}.items() if name not in (*RESULTS, "dtype", "file")}
        runs.append({"options": options, "facts": {"dtype": row.get("dtype")}, "n_parameters": numbers["n_parameters"],
                     "seconds": float(row["seconds"]), "accuracy": {
                         name: float(row[f"accuracy_{name}"]) for name in SPRITES if row[f"accuracy_{name}"]}})
    return runs


def grouped(runs):
    """{model: {(task, train_size): {seed: run}}}: a model is its heads and the options that differ among the runs."""
    runs = sorted(runs, key=lambda run: -run["options"]["n_ra"])      # Transformers last
    identities = []
    for run in runs:
        skipped = ("task", "train_size", "seed", *without_effect(run["options"]))
        identities.append({name: value for name, value in {**run["options"], **run["facts"]}.items()
                           if name not in skipped})
    groups = {}
    for run, label in zip(runs, labels(identities)):
        o = run["options"]
        groups.setdefault(label, {}).setdefault((o["task"], o["train_size"]), {})[o["seed"]] = run
    return groups


def accuracies(by_seed, sprites):
    """{seed: accuracy} of the runs that were tested on `sprites`."""
    return {seed: run["accuracy"][sprites] for seed, run in by_seed.items() if sprites in run["accuracy"]}


def task_order(task):
    """The paper's tasks first, in its order, then new ones by name."""
    return (TASKS.index(task) if task in TASKS else len(TASKS)), task


# ---- the figures -----------------------------------------------------------------------------------------------------

def draw(groups, sprites, paper=False):
    """A panel for each task -> Figure. The mean over seeds, from three on with its 95% band; dots are single seeds."""
    drawn = {task for group in groups.values() for task, _ in group}
    tasks = sorted(drawn, key=task_order)
    theirs = {task: published(task, sprites) if paper else {} for task in tasks}
    of_model = {label.split(",")[0]: label for label in reversed(groups)}             # 'DAT 0+2': our first such label
    others = dict.fromkeys(model for curves in theirs.values() for model in curves if model not in of_model)
    looks = drawing.styles([*groups, *others])
    fig, axes = drawing.panels(1, len(tasks), max(5, min(1 + 2.5 * len(tasks), 10)), 2.6, sharey=True)
    for ax, task in zip(axes[0], tasks):
        ax.axhline(0.5, color="black", lw=0.5)                        # guessing
        for label, group in groups.items():
            points = {size: list(accuracies(by_seed, sprites).values())
                      for (t, size), by_seed in sorted(group.items()) if t == task}
            draw_points(ax, {size: values for size, values in points.items() if values}, label, **looks[label])
        for model, curve in theirs[task].items():
            color = looks[of_model.get(model, model)]["color"]
            ax.plot(*curve[:2], "--", color=color, lw=1, label=f"{model}, published")
        ax.set(title=task.replace("_", " "), xlabel="training images")
        ax.xaxis.set_major_locator(MaxNLocator(3 if len(tasks) > 2 else 6, steps=(1, 2, 5, 10)))
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes[0, 0].set_ylabel(f"test accuracy, {sprites}")
    axes[0, 0].set_ylim(bottom=max(0.4, axes[0, 0].get_ylim()[0]))    # of wide bands the part below guessing is cut off
    drawing.legend_below(fig)
    return fig


def draw_points(ax, points, label, color, ls):
    """points: {training size: accuracies of its seeds}."""
    sizes, mean = list(points), np.array([np.mean(values) for values in points.values()])
    half = np.array([half_interval(v) if len(v) >= FEWEST else np.nan for v in points.values()])
    ax.plot(sizes, mean, marker="o", ms=3, color=color, ls=ls, label=label)
    ax.fill_between(sizes, mean - half, np.minimum(mean + half, 1), color=color, alpha=0.2, lw=0)   # 1: all are right
    if np.isfinite(half).sum() == 1:                                  # a band of one point cannot be seen
        ax.errorbar(sizes, mean, half, fmt="none", ecolor=color, elinewidth=1, capsize=3)
    for size, values in points.items():
        ax.plot([size] * len(values), values, ".", ms=3, color=color, alpha=0.4)


def published(task, sprites):
    """{model: (training sizes, mean accuracies, half their 95% intervals)} of the paper."""
    curves = {}
    for row in read_csv(PUBLISHED):
        if (row["task"], row["sprites"]) == (task, sprites):
            label = f"{'Transformer' if row['n_ra'] == '0' else 'DAT'} {row['n_sa']}+{row['n_ra']}"
            x, y, half = curves.setdefault(label, ([], [], []))
            x.append(int(row["train_size"]))
            y.append(float(row["accuracy"]))
            half.append(half_interval_of(float(row["std"]), int(row["n_trials"])))
    return curves


# ---- the table -------------------------------------------------------------------------------------------------------

def table(groups, sprites):
    """Markdown, largest sizes first: accuracy of each model, its spread, the paired difference to the Transformer."""
    columns = (sprites, *(other for other in SPRITES if other != sprites))
    lines = [f"| task | images | model | parameters | {' | '.join(columns)} | seeds | s each | minus Transformer |",
             "|---" * 10 + "|"]
    keys = {key for group in groups.values() for key in group}
    for key in sorted(keys, key=lambda key: (task_order(key[0]), -key[1])):
        for label, group in groups.items():
            if key in group:
                runs = list(group[key].values())
                means = " | ".join(mean_text(list(accuracies(group[key], name).values()), 3) for name in columns)
                seconds = np.mean([run["seconds"] for run in runs])
                lines.append(f"| {key[0]} | {key[1]} | {label} | {runs[0]['n_parameters']:,} | {means} | "
                             f"{len(runs)} | {seconds:.0f} | {difference(groups, label, key, sprites)} |")
    return "\n".join(lines)


def difference(groups, label, key, sprites):
    """DAT - Transformer at equal task and size, paired by seed: both learn from the same images in the same order."""
    mine, texts = groups[label][key], {}
    for other, group in groups.items():
        theirs = group.get(key, {})
        one = paired_difference(accuracies(mine, sprites), accuracies(theirs, sprites))
        if one is None or not comparable(next(iter(mine.values())), next(iter(theirs.values()))):
            continue
        if one.low is None:
            texts[other] = f"{one.mean:+.3f} ({one.n} seed{'s' * (one.n > 1)})"
        else:
            texts[other] = f"{one.mean:+.3f} [{one.low:+.3f}, {one.high:+.3f}]" + ": no difference" * one.within_noise
    if len(texts) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"to {other}: {text}" for other, text in texts.items())


def against_published(groups, sprites):
    """Markdown: where our mean and the published one differ by more than both 95% intervals together.

    Of the models that have the published ones' name alone, such as DAT 0+2; '' if there are none.
    """
    compared, apart = 0, []
    for task in sorted({task for group in groups.values() for task, _ in group}, key=task_order):
        for label, curve in published(task, sprites).items():
            for size, theirs, half in zip(*curve):
                ours = list(accuracies(groups.get(label, {}).get((task, size), {}), sprites).values())
                if len(ours) < FEWEST:
                    continue
                compared, distance = compared + 1, np.mean(ours) - theirs
                if abs(distance) > half_interval(ours) + half:
                    apart.append(f"| {task} | {size} | {label} | {mean_text(ours, 3)} | {theirs:.3f} ± {half:.3f} | "
                                 f"{distance:+.3f} |")
    if not compared:
        return ""
    text = (f"Of {compared} points with three seeds or more, {len(apart)} differ from the published mean by more than "
            f"both intervals together")
    if not apart:
        return f"{text}."
    return "\n".join([f"{text}:", "", "| task | images | model | ours | published | ours minus published |",
                      "|---" * 6 + "|", *apart])


def redraw(rows, out_dir, paper):
    """Draws and writes table.md from rows of results.csv -> the text of the table, and the files."""
    runs = runs_of(rows)
    trained_on = {run["options"]["sprites"] for run in runs}
    if len(trained_on) > 1:
        raise ValueError(f"these models learned from {' and '.join(sorted(trained_on))}: give those of one kind")
    sprites, groups = trained_on.pop(), grouped(runs)
    if paper and sprites != "pentos":
        raise ValueError(f"--paper: the published models learned from pentos, these from {sprites}")
    files = []
    for name in SPRITES:
        if any(name in run["accuracy"] for run in runs):
            files.append(out_dir / ("learning_curves.png" if name == sprites else f"{name}.png"))
            drawing.save(draw(groups, name, paper), files[-1])
    text = table(groups, sprites)
    if paper and (apart := against_published(groups, sprites)):
        text += f"\n\n{apart}"
    write_text(out_dir / "table.md", text + "\n")
    return f"{text}\n\n±, [ ]: 95% Student-t intervals over seeds; two or fewer seeds tell little", [
        *files, out_dir / "table.md"]


def report(runs, out_dir, paper):
    """Writes results.csv, the figures and table.md -> the text of the table, and the files."""
    kept, notes = newest(runs)
    if not kept:
        return "no finished run yet", []
    write_results(kept, out_dir / "results.csv")
    text, files = redraw(read_csv(out_dir / "results.csv"), out_dir, paper)
    return "\n\n".join([text, *notes]), [*files, out_dir / "results.csv"]
