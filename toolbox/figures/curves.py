"""Language models and images: losses and accuracies during training (curves.png), final values and verdicts (table.md).

The table serves the runs on mathematics, too.
"""
import csv
import math
from pathlib import Path

import numpy as np
from matplotlib.ticker import EngFormatter, MaxNLocator

from toolbox.files import write_text
from toolbox.figures import drawing
from toolbox.figures.runs import comparable, final, group_runs, measured, read_csv, speed, unit_of
from toolbox.stats import FEWEST, mean_text, paired_difference
from toolbox.training import RELATIONAL

# what a run may measure: name in the table, unit, and whether more is better; on test data by the finished model alone
METRICS = {"val_loss": ("validation loss", "nats", False), "char_accuracy": ("character accuracy", "", True),
           "exact_match": ("exact match", "", True), "val_accuracy": ("validation accuracy", "", True),
           "test_accuracy": ("test accuracy", "", True),
           **{kind: (kind, "", True) for kind in ("nearest", "furthest", "count")}}         # questions of Sort-of-CLEVR
LEVELS = {"guessing": "Without vision, always the most frequent answer", "counting": "Without places, counting shapes"}
LOSS_IS_PER = {"tokens": "token", "problems": "character", "images": "image"}          # by what a run counts

# The paper's language models on TinyStories (Figure 4, Table 1; see results/paper), in our shapes: docs/differences.md
# says where these differ. They vary in COLUMNS, the columns of the file, and agree in THEIRS; an option that a run does
# not have is at its default.
PAPER = Path(__file__).parents[2] / "results" / "paper"
COLUMNS = ("d_model", "n_layers", "n_heads", "n_ra", "symbols", "symmetric")
THEIRS = dict(d_ff=None, max_len=512, activation="swiglu", norm="layernorm", norm_first=True, final_norm=True,
              bias=False, norm_bias=None, attention_bias="as_bias", dropout=0.1, position="rope", n_kv_heads=None,
              tie_embeddings=True, n_symbols=512, symbol_heads=4, trainable_symbols=True, max_distance=None,
              shared_symbols=True, n_relations=None, rel_proj_dim=None, rel_activation="identity", ra_type="ra",
              share_qk=False, dat_n_kv_heads=None, dat_bias=None)
CIFAR, IMAGENET = 100 * 50_000, 1_281_167   # images in the paper's whole training; in one epoch
TINYSTORIES_BYTES = 1_943_728_838           # of the whole text: TinyStories-train.txt and TinyStories-valid.txt


def published(run):
    """Tokens read and validation loss of the paper's model, (2, n); n = 0 if this run corresponds to none of them.

    It does if its options are those of our preset and its text is the whole of TinyStories in GPT-2's tokens.
    (Their tokens are Llama's, and some widths differ, so losses compare roughly only.) Of most models the last loss
    alone is known: n = 1.
    """
    o, facts = run["options"], run["facts"]
    fixed = {name: value for name, value in THEIRS.items() if o["n_ra"] or name not in RELATIONAL}
    if ((facts.get("tokenizer"), facts.get("bytes")) != ("gpt2", TINYSTORIES_BYTES)
            or any(o.get(name, value) != value for name, value in fixed.items())):
        return np.empty((2, 0))
    shape = [o["d_model"], o["n_layers"], o["n_heads"] - o["n_ra"], o["n_ra"],
             *((o["symbols"], o["symmetric"]) if o["n_ra"] else ("", ""))]
    with open(PAPER / "tinystories.csv", newline="", encoding="utf-8") as f:
        rows = [row[-2:] for row in csv.reader(f) if row[:-2] == list(map(str, shape))]
    return np.array(rows, float).reshape(-1, 2).T


def published_accuracies(run):
    """{column of the log: (images read, accuracy)}: the paper's curves on ImageNet (Figure 5), its accuracies on CIFAR.

    Empty if this run corresponds to none of its models. On ImageNet it does if the blocks have our preset's shape, on
    CIFAR if augmentation and number of parameters are the published ones: there the end of the training alone is known.
    """
    o, facts = run["options"], run["facts"]
    data = facts.get("data")
    heads = {"n_sa": str(o["n_heads"] - o["n_ra"]), "n_ra": str(o["n_ra"])}
    shape = (facts.get("classes"), o.get("d_model"), o.get("n_layers"), o.get("patch_size"))
    if data == "imagenet" and shape == (1000, 1024, 24, 16):
        rows = [row for row in read_csv(PAPER / "imagenet.csv") if heads.items() <= row.items()]
        curves = {split: [((int(row["epoch"]) + 1) * IMAGENET, float(row["accuracy"])) for row in rows
                          if row["split"] == split] for split in ("train", "val")}
        return {f"{split}_accuracy": tuple(zip(*curve)) for split, curve in curves.items() if curve}
    model = {**heads, "data": data, "parameters": str(run["n_parameters"]), "augmentation": "CutMix"}
    rows = [row for row in read_csv(PAPER / "cifar.csv") if model.items() <= row.items() and o.get("cutmix") == 1]
    return {"val_accuracy": ((CIFAR,), (float(row["accuracy"]),)) for row in rows}


# ---- the figure ------------------------------------------------------------------------------------------------------

def metrics_of(runs):
    """The METRICS that all of these runs have measured, in their logs or at their end."""
    return [name for name in METRICS if all(name in run["log"] or name in run.get("scores", {}) for run in runs)]


def axis_title(metric, runs):
    name, unit, _ = METRICS[metric]
    return f"{name}, {unit} per {LOSS_IS_PER[unit_of(runs)]}" if unit else name


def draw(groups):
    """A row for the training loss and each metric, against steps, tokens, seconds and operations -> Figure.

    On the right there is a scale in bits per byte, if one scale fits all runs.
    """
    runs = [run for group in groups.values() for run in group]
    unit = unit_of(runs)
    xs = {"step": "step", unit: unit, "seconds": "seconds, without evaluation"}
    if all(map(counts_operations, runs)):
        xs["FLOP"] = "floating-point operations"
        for run in runs:
            run["log"]["FLOP"] = operations(run)
    ys = {"train_loss": axis_title("val_loss", runs).replace("validation", "training"),
          **({"train_accuracy": "training accuracy"} if all("train_accuracy" in run["log"] for run in runs) else {}),
          **{name: axis_title(name, runs) for name in metrics_of(runs) if name in runs[0]["log"]}}
    fig, axes = drawing.panels(len(ys), len(xs), 3.3 * len(xs), 2.8, sharey="row")
    for row, y in zip(axes, ys):
        for ax, x in zip(row, xs):
            for label, look in drawing.styles(groups).items():
                drawing.draw_group(ax, groups[label], x, y, label, **look)
            if (x, y) == ("tokens", "val_loss"):
                draw_published(ax, groups)
            if x == "images":
                draw_published_accuracies(ax, groups, y)
            ax.set_xlabel(xs[x])
            if ax.get_xscale() == "linear":
                ax.xaxis.set_major_formatter(EngFormatter())          # 1.5 M tokens
                ax.xaxis.set_major_locator(MaxNLocator(5))
        row[0].set_ylabel(ys[y])
        if "loss" in y:
            add_bits_per_byte(row[-1], runs)
    drawing.legend_below(fig)
    return fig


def counts_operations(run):
    """Whether its record says how many one token takes: older runs have no such number."""
    return f"operations_per_{unit_of([run])[:-1]}" in run


def operations(run):
    """Floating-point operations up to each row of the log, counted by toolbox/flops.py."""
    unit = unit_of([run])
    return run[f"operations_per_{unit[:-1]}"] * run["log"][unit]


def draw_published(ax, groups):
    """The losses of the paper's models among these; they read a thousand times as many tokens: a logarithmic axis."""
    for label, look in drawing.styles(groups).items():
        tokens, losses = published(groups[label][0])
        if len(tokens):
            mark = dict(marker="o", ms=4, ls="") if len(tokens) == 1 else dict(ls="--")
            ax.plot(tokens, losses, **{**look, **mark}, label=f"{label}, published")
            ax.set_xscale("log")


def draw_published_accuracies(ax, groups, y):
    """What the paper's models among these reached on images: a dashed curve, or a dot at the end of its training."""
    for label, look in drawing.styles(groups).items():
        if curve := published_accuracies(groups[label][0]).get(y):
            mark = dict(marker="o", ms=4, ls="") if len(curve[0]) == 1 else dict(ls="--")
            ax.plot(*curve, **{**look, **mark}, label=f"{label}, published")


def add_bits_per_byte(ax, runs):
    bytes_per_token = {run["facts"].get("bytes_per_token") for run in runs}
    if len(bytes_per_token) == 1 and None not in bytes_per_token:
        nats = math.log(2) * bytes_per_token.pop()                   # nats per token in one bit per byte
        right = ax.secondary_yaxis("right", functions=(lambda v: v / nats, lambda v: v * nats))
        right.set_ylabel("bits per byte")


# ---- the table -------------------------------------------------------------------------------------------------------

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
        o, theirs = runs[0]["options"], published(runs[0])[1]
        cells = [label, o["n_heads"] - o["n_ra"], o["n_ra"], f"{runs[0]['n_parameters']:,}",
                 f"{np.mean([speed(run) for run in runs]):,.0f}", o["max_steps"],
                 *(mean_text([final(run, name) for run in runs], 4) for name in metrics)]
        if in_bits:
            loss = np.mean([final(run, "val_loss") for run in runs])
            cells += [f"{math.exp(loss):.3f}", f"{loss / math.log(2) / runs[0]['facts']['bytes_per_token']:.4f}"]
        if in_paper:
            cells.append(f"{theirs[-1]:.3f}" if len(theirs) else "")
        lines.append(f"| {' | '.join(map(str, [*cells, len(runs)]))} |")
    if any(len(runs) >= FEWEST for runs in groups.values()):
        lines += ["", "±: half the 95% Student-t interval of the mean over seeds."]
    for level, accuracy in all_runs[0]["facts"].get("levels", {}).items():
        shares = ", ".join(f"{kind} {share:.3f}" for kind, share in accuracy.items())
        lines += ["", f"{LEVELS[level]}: {shares}."]
    if in_paper:
        lines += ["", "Published: after 13.1 billion of Llama's tokens; ours are GPT-2's: losses compare roughly."]
    accuracies = [name for name in metrics if METRICS[name][2]]       # easier to judge than a loss, where there are any
    return "\n".join(lines + [""] + [line for name in accuracies or metrics for line in differences(groups, name)])


def differences(groups, metric):
    """A line for each DAT and its Transformer: the difference paired by seed, and what may be concluded from it."""
    name, unit, more_is_better = METRICS[metric]
    if unit:
        unit += f" per {LOSS_IS_PER[unit_of([run for runs in groups.values() for run in runs])]}"
    values = {label: {run["options"]["seed"]: final(run, metric) for run in runs} for label, runs in groups.items()}
    lines = []
    for label, runs in groups.items():
        for base_label, base in groups.items():
            difference = paired_difference(values[label], values[base_label])
            if difference is None or not comparable(runs[0], base[0]):
                continue
            text = f"{label} - {base_label}: {difference.mean:+.4f} {unit or name}"
            verdict = difference.verdict(label, base_label, more_is_better)
            if difference.low is None:
                lines.append(f"{text} ({verdict}; try --seed=1,2,3)")
            else:
                lines.append(f"{text}, 95% interval {difference.low:+.4f} to {difference.high:+.4f} over "
                             f"{difference.n} paired seeds: {verdict}")
            lines += equal_budgets(label, runs, base_label, base, metric)
    return lines


def equal_budgets(label, runs, base_label, base, metric):
    """The difference where the faster of two models has used all its seconds, and its operations: one line for each.

    Between two evaluations the metric is interpolated. The slower model has steps left there; if its learning rate is
    to fall during these this counts against it, and the line says so.
    """
    if metric not in runs[0]["log"] or len(measured(runs[0], metric)) < 3:
        return []
    all_count = all(map(counts_operations, [*runs, *base]))
    cosine, lines = runs[0]["options"].get("schedule") == "cosine", []
    note = " (the slower model's learning rate has not fallen as far there)" if cosine else ""
    for what, amount in (("seconds", seconds), *([("operations", operations)] if all_count else [])):
        used = [{run["options"]["seed"]: amount(run) for run in some} for some in (runs, base)]
        budget = {seed: min(used[0][seed][-1], used[1][seed][-1]) for seed in used[0].keys() & used[1].keys()}
        difference = paired_difference(*({
            run["options"]["seed"]: np.interp(budget[run["options"]["seed"]], amount(run)[i], run["log"][metric][i])
            for run in some if run["options"]["seed"] in budget for i in [measured(run, metric)]}
            for some in (runs, base)))
        interval = "" if difference.low is None else f" [{difference.low:+.4f}, {difference.high:+.4f}]"
        lines.append(f"    at equal {what} ({EngFormatter(places=1)(np.mean(list(budget.values())))}): "
                     f"{difference.mean:+.4f}{interval}{note}")
    return lines


def seconds(run):
    return run["log"]["seconds"]


def write_table(runs, path):
    """table.md -> its text. It counts finished runs only, as the last step of the others is not the same one."""
    finished = [run for run in runs if run["finished"]]
    groups = group_runs(finished)
    text = table(groups) if finished else "no finished run yet"
    if repeated := len(finished) - sum(map(len, groups.values())):
        text += f"\n\nleft out, for a newer one of the same options, data and seed: {repeated} of {len(finished)} runs"
    if len(finished) < len(runs):
        text += f"\n\nnot finished, drawn but not counted: {len(runs) - len(finished)} of {len(runs)} runs"
    write_text(path, text + "\n")
    return text


def report(runs, out_dir, paper):
    """Writes curves.png and table.md -> the text of the table, and the files."""
    groups = group_runs(runs)
    drawing.save(draw(groups), out_dir / "curves.png", dpi=120)
    text = write_table(runs, out_dir / "table.md")
    if paper and not any(published(run).size or published_accuracies(run) for run in runs):
        text += "\n\n--paper: no published curve belongs to these models"
    return text, [out_dir / "curves.png", out_dir / "table.md"]
