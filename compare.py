"""Curves and tables from the logs alone; nothing is trained here.

    python compare.py --runs=out/lm                                      all runs in a folder
    python compare.py --runs=out/lm/sa4_ra4_seed1,out/lm/sa8_ra0_seed1   these runs
"""
import csv
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np

from toolbox import training
from config import TransformerConfig, model_config
from data.text.sources import TINYSTORIES

matplotlib.use("Agg")
import matplotlib.pyplot as plt                                      # noqa: E402  (after the choice of backend)
from matplotlib.ticker import EngFormatter, MaxNLocator              # noqa: E402

# 97.5% points of Student's t for 1 ... 30 degrees of freedom; beyond 30 the last one errs on the wide side
T975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
        2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]

# what a run may measure: name in the table, unit, and whether more is better; on test data by the finished model alone
METRICS = {"val_loss": ("validation loss", "nats", False), "char_accuracy": ("character accuracy", "", True),
           "exact_match": ("exact match", "", True), "val_accuracy": ("validation accuracy", "", True),
           "test_accuracy": ("test accuracy", "", True)}
LOSS_IS_PER = {"tokens": "token", "problems": "character", "images": "image"}          # by what a run counts


# the paper's language models on TinyStories (Figure 4, Table 1): see results/paper. They differ in its columns alone
PUBLISHED = Path(__file__).parent / "results" / "paper" / "tinystories.csv"
THEIRS = TransformerConfig(activation="swiglu", dropout=0.1, max_len=512, n_symbols=512)
COLUMNS = ("d_model", "n_layers", "n_heads", "n_ra", "symbols", "symmetric")


@dataclass
class Options:
    runs: str = "out/lm"                    # a folder of runs, or several runs separated by commas
    out_dir: str = ""                       # where curves.png and table.md go; default: the (first run's) folder


def half_interval(values):
    """Half the width of the 95% confidence interval of the mean of `values` (n, ...): t_{n-1} s / sqrt(n)."""
    n = len(values)
    return T975[min(n - 1, 30) - 1] * np.std(values, axis=0, ddof=1) / math.sqrt(n)


def load_run(folder):
    """-> config.json as a dict, with `log`: {column: values, NaN where a row has none}. ValueError if it is no run."""
    try:
        record = json.loads((folder / "config.json").read_text())
        with open(folder / "log.csv", newline="") as f:
            rows = list(csv.DictReader(f))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is not the folder of a run: no {Path(error.filename).name} in it") from None
    except ValueError:
        record = {}
    if not all(key in record for key in ("options", "facts", "n_parameters", "finished")):
        raise ValueError(f"{folder / 'config.json'} is damaged")
    if not rows:
        raise ValueError(f"{folder / 'log.csv'} has no rows yet")
    record["written"] = (folder / "log.csv").stat().st_mtime
    record["log"] = {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}
    return record


def group_runs(runs):
    """Runs that differ in their seed alone form a group: {what sets it apart: its runs by seed}.

    Of runs that agree in their seed as well only the one that was written last is in it: a seed counts once.
    """
    def identity(run):
        """What defines a run besides its seed."""
        skipped = ("seed", *training.NOT_COMPARED, *(training.RELATIONAL if run["options"]["n_ra"] == 0 else ()))
        options = {k: "default" if v is None else v for k, v in run["options"].items() if k not in skipped}
        # what was really read and computed in, not what was asked for ("auto")
        dtype = run["facts"].get("dtype", options.get("dtype"))
        return {**options, "data": run["facts"]["data"], "sha256": run["facts"]["sha256"][:8], "dtype": dtype}

    groups = {}
    runs = sorted(runs, key=lambda run: (run["options"]["n_ra"] == 0, run["options"]["seed"], run["written"]))
    for run, label in zip(runs, labels([identity(run) for run in runs])):
        groups.setdefault(label, {})[run["options"]["seed"]] = run   # DAT first; the latest stays
    return {label: list(by_seed.values()) for label, by_seed in groups.items()}


def labels(identities):
    """A name for each dict of options: its heads, as in 'DAT 4+4', and the options that set some of them apart."""
    names = dict.fromkeys(name for one in identities for name in one if name not in ("n_ra", "n_heads"))
    differing = [name for name in names if len({str(one[name]) for one in identities if name in one}) > 1]

    def kinds(by):
        return len({tuple(str(one.get(name)) for name in by) for one in identities})
    without = [name for name in differing if name != "sha256"]
    if kinds(without) == kinds(differing):                           # then no reader wants a checksum
        differing = without
    return [", ".join([f"{'DAT' if one['n_ra'] else 'Transformer'} {one['n_heads'] - one['n_ra']}+{one['n_ra']}",
                       *(f"{name}={one[name]}" for name in differing if name in one)]) for one in identities]


def metrics_of(runs):
    """The METRICS that all of these runs have measured, in their logs or at their end."""
    return [name for name in METRICS if all(name in run["log"] or name in run.get("scores", {}) for run in runs)]


def axis_title(metric, runs):
    name, unit, _ = METRICS[metric]
    return f"{name}, {unit} per {LOSS_IS_PER[unit_of(runs)]}" if unit else name


def unit_of(runs):
    """What the runs counted besides steps: tokens, problems or images. Their logs' second column."""
    units = {list(run["log"])[1] for run in runs}
    if len(units) > 1:
        raise ValueError(f"these runs count {' and '.join(sorted(units))}: they cannot be compared")
    return units.pop()


def published(run):
    """Tokens read and validation loss of the paper's model, arrays; empty if this run trains none of them.

    It does if every option of its model is theirs, and its text is the whole of TinyStories (which is told by its
    length) in GPT-2's tokens. Theirs are Llama's, another unit. Their curve, or its end alone.
    """
    if (run["facts"].get("tokenizer"), run["facts"].get("bytes")) != ("gpt2", sum(
            file["size"] for file in TINYSTORIES.values())):
        return np.empty((2, 0))
    model = asdict(model_config({**asdict(TransformerConfig()), **run["options"]}))
    free = (*COLUMNS, "vocab_size", "recompute", *(() if model["n_ra"] else training.RELATIONAL))
    if model != asdict(replace(THEIRS, **{name: value for name, value in model.items() if name in free})):
        return np.empty((2, 0))
    n_ra = model["n_ra"]
    shape = [model["d_model"], model["n_layers"], model["n_heads"] - n_ra, n_ra,
             *((model["symbols"], model["symmetric"]) if n_ra else ("", ""))]
    with open(PUBLISHED, newline="") as f:
        rows = [row[-2:] for row in csv.reader(f) if row[:-2] == list(map(str, shape))]
    return np.array(rows, float).reshape(-1, 2).T


def measured(run, column):
    """Row numbers of the log in which `column` was measured."""
    return np.flatnonzero(~np.isnan(run["log"][column]))


def draw(groups, path):
    """Training loss and what was validated against steps, tokens and seconds; bits per byte on the right-hand axis."""
    all_runs = [run for runs in groups.values() for run in runs]
    unit = unit_of(all_runs)
    xs = {"step": "step", unit: unit, "seconds": "seconds, without evaluation"}
    ys = {name: axis_title(name, all_runs) for name in metrics_of(all_runs) if name in all_runs[0]["log"]}
    ys = {"train_loss": axis_title("val_loss", all_runs).replace("validation", "training"), **ys}
    fig, axes = plt.subplots(len(ys), len(xs), figsize=(13, 3.75 * len(ys)), sharey="row", layout="constrained")
    for row, y in zip(axes, ys):
        for ax, x in zip(row, xs):
            for color, (label, runs) in zip(plt.cm.tab10.colors * len(groups), groups.items()):
                draw_group(ax, runs, x, y, color, label)
                if (x, y) == ("tokens", "val_loss") and published(runs[0]).size:
                    ends_only = published(runs[0]).shape[1] == 1
                    ax.plot(*published(runs[0]), "." if ends_only else "--", color=color, label=f"{label}, published")
                    ax.set_xscale("log")                             # theirs is a thousand times longer
                    ax.legend(fontsize=7)
            ax.set_xlabel(xs[x])
            if ax.get_xscale() == "linear":
                ax.xaxis.set_major_formatter(EngFormatter())          # 1.5 M tokens
                ax.xaxis.set_major_locator(MaxNLocator(5))
            ax.grid(alpha=0.3)
        row[0].set_ylabel(ys[y])
        bytes_per_token = {run["facts"].get("bytes_per_token") for run in all_runs}
        if len(bytes_per_token) == 1 and None not in bytes_per_token:      # else one axis cannot serve all curves
            nats = math.log(2) * bytes_per_token.pop()               # nats per token in one bit per byte
            right = row[-1].secondary_yaxis("right", functions=(lambda v: v / nats, lambda v: v * nats))
            right.set_ylabel("bits per byte")
    axes[0, 0].legend()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def draw_group(ax, runs, x, y, color, label):
    """One curve, or from two runs on thin curves and their mean, from three on with a 95% Student-t band."""
    logs, rows = [run["log"] for run in runs], [measured(run, y) for run in runs]
    for log, i in zip(logs, rows):
        thin = dict(lw=0.7, alpha=0.5) if len(logs) > 1 else dict(lw=1.6, label=label)
        ax.plot(log[x][i], log[y][i], color=color, **thin)
    n = min(len(i) for i in rows)                                    # a run may have been interrupted
    if len(logs) > 1:
        X = np.mean([log[x][i[:n]] for log, i in zip(logs, rows)], axis=0)
        Y = np.array([log[y][i[:n]] for log, i in zip(logs, rows)])
        ax.plot(X, Y.mean(0), color=color, lw=1.8, label=f"{label}, mean of {len(logs)} seeds")
    if len(logs) >= 3:
        half = half_interval(Y)
        ax.fill_between(X, Y.mean(0) - half, Y.mean(0) + half, color=color, alpha=0.2, lw=0)


def speed(run):
    """Tokens (or what the run counts) per second, without evaluation: the median of its rows."""
    return float(np.nanmedian(run["log"][f"{unit_of([run])}_per_s"][1:]))


def final(run, metric):
    """What the finished model scored, or the last row's value: that of the final step, not the best one."""
    if metric in run.get("scores", {}):
        return run["scores"][metric]
    return run["log"][metric][measured(run, metric)[-1]]


def table(groups):
    """Markdown: one row a group; and lines on what may be concluded."""
    all_runs = [run for runs in groups.values() for run in runs]
    metrics, unit = metrics_of(all_runs), unit_of(all_runs)
    in_bits = all("bytes_per_token" in run["facts"] for run in all_runs)
    in_paper = any(published(run).size for run in all_runs)
    head = ["model", "n_sa", "n_ra", "parameters", f"{unit}/s", "final step", *(METRICS[name][0] for name in metrics),
            *(["perplexity", "bits per byte"] if in_bits else []), *(["published loss"] if in_paper else []), "seeds"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for label, runs in groups.items():
        o, values = runs[0]["options"], {name: np.array([final(r, name) for r in runs]) for name in metrics}
        cells = [label, o["n_heads"] - o["n_ra"], o["n_ra"], f"{runs[0]['n_parameters']:,}",
                 f"{np.mean([speed(run) for run in runs]):,.0f}", o["max_steps"]]
        cells += [f"{v.mean():.4f}" + (f" ± {half_interval(v):.4f}" if len(v) >= 3 else "") for v in values.values()]
        if in_bits:
            loss = values["val_loss"].mean()
            cells += [f"{math.exp(loss):.3f}", f"{loss / math.log(2) / runs[0]['facts']['bytes_per_token']:.4f}"]
        if in_paper:
            cells.append(f"{published(runs[0])[1][-1]:.3f}" if published(runs[0]).size else "")
        lines.append(f"| {' | '.join(map(str, [*cells, len(runs)]))} |")
    if any(len(runs) >= 3 for runs in groups.values()):
        lines += ["", "±: half the 95% Student-t interval of the mean over seeds."]
    if in_paper:
        lines += ["", "Published: after 13.1 billion tokens of Llama's, another unit than GPT-2's: for orientation."]
    # accuracies, where there are any, say what a loss says only to those who know it
    chosen = [name for name in metrics if METRICS[name][2]] or metrics
    return "\n".join(lines + [""] + [line for name in chosen for line in differences(groups, name)])


def differences(groups, metric):
    """DAT - Transformer, paired by seed: weights differ but data order and everything else agree within a pair."""
    lines = []
    name, unit, more_is_better = METRICS[metric]
    unit = unit and f"{unit} per {LOSS_IS_PER[unit_of([run for runs in groups.values() for run in runs])]}"
    transformers = {label: runs for label, runs in groups.items() if runs[0]["options"]["n_ra"] == 0}
    for label, runs in groups.items():
        for base_label, base in transformers.items():
            mine, theirs = ({r["options"]["seed"]: final(r, metric) for r in rs} for rs in (runs, base))
            seeds = sorted(mine.keys() & theirs.keys())
            if label in transformers or not seeds or not comparable(runs[0], base[0]):
                continue
            delta = np.array([mine[s] - theirs[s] for s in seeds])
            text = f"{label} - {base_label}: {delta.mean():+.4f} {unit or name}"
            if len(seeds) < 3:
                text += f" ({len(seeds)} seed{'s' * (len(seeds) > 1)}: too few to tell from noise; try --seed=1,2,3)"
            else:
                low, high = delta.mean() - half_interval(delta), delta.mean() + half_interval(delta)
                better = label if (low > 0) == more_is_better else base_label
                verdict = "no difference" if low <= 0 <= high else f"{better} is better"
                text += f", 95% interval {low:+.4f} to {high:+.4f} over {len(seeds)} paired seeds: {verdict}"
            lines.append(text)
    return lines


def comparable(run, baseline):
    """Same data, and options that differ at most in what makes a DAT: its heads, symbols and relations.

    A baseline of another d_ff belongs to the DAT whose parameters it has (--match_params).
    """
    ours = ("n_ra", "seed", "d_ff", *training.RELATIONAL, *training.NOT_COMPARED)
    if run["options"]["d_ff"] != baseline["options"]["d_ff"]:
        if abs(run["n_parameters"] / baseline["n_parameters"] - 1) > 0.01:
            return False
    return run["facts"] == baseline["facts"] and all(
        value == baseline["options"][name] for name, value in run["options"].items() if name not in ours)


def report(folders, out_dir, draw=draw):
    """draw(groups, out_dir/curves.png); writes out_dir/table.md and prints it; all from the logs in `folders`.

    Unfinished runs are drawn, but stay out of the table: their last step is not the others'.
    """
    runs = [load_run(folder) for folder in dict.fromkeys(map(Path, folders))]          # none of them twice
    out_dir.mkdir(parents=True, exist_ok=True)
    draw(group_runs(runs), out_dir / "curves.png")
    finished = [run for run in runs if run["finished"]]
    groups = group_runs(finished)
    text = table(groups) if finished else "no finished run yet"
    if repeated := len(finished) - sum(map(len, groups.values())):
        text += f"\n\nleft out, for a newer one of the same options, data and seed: {repeated} of {len(finished)} runs"
    if len(finished) < len(runs):
        text += f"\n\nnot finished, drawn but not counted: {len(runs) - len(finished)} of {len(runs)} runs"
    (out_dir / "table.md").write_text(text + "\n")
    print(f"\n{text}\n\ncurves: {out_dir / 'curves.png'}   table: {out_dir / 'table.md'}")


def main(argv=None):
    options, = training.parse_options(Options, argv=argv)
    paths = [Path(part) for part in options.runs.split(",")]
    if len(paths) == 1 and not (paths[0] / "config.json").exists():
        folders = sorted(p.parent for p in paths[0].glob("*/log.csv") if p.parent.suffix != ".old"
                         and len(p.read_text().splitlines()) > 1)                        # not those about to start
        if not folders:
            training.fail(f"no runs in {paths[0]}: train one first, or give --runs=FOLDER")
        out_dir = paths[0]
    else:
        folders, out_dir = paths, paths[0].parent
    with training.one_line_errors():
        report(folders, Path(options.out_dir) if options.out_dir else out_dir)


if __name__ == "__main__":
    training.start(main)
