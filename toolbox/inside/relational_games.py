"""Relational Games: what relations and attention tell of two objects, and how often answers are right without them."""
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from data import relational_games as games
from toolbox.figures import inside as figures
from toolbox.figures.runs import labels, load_run
from toolbox.inside import layers_of, message_parts, watch, without
from toolbox.inside.images import draw_memory
from toolbox.inside.knock_outs import ways
from toolbox.inside.statistics import auc_within_places, probe, top_one
from toolbox.inside.tables import each, say_if_fewer, table
from toolbox.run import NOT_COMPARED
from toolbox.stats import mean_text
from toolbox.training import RELATIONAL, n_slots

ROOT = Path(__file__).parents[2]
IMAGES = 1000                               # on which numbers are computed, unless --n says otherwise


def look(runs, o, out):
    """runs: look.Looked, of one task. -> the text of the tables, and the files drawn in `out`."""
    tasks = sorted({run.options["task"] for run in runs})
    if len(tasks) > 1:
        raise ValueError(f"these cells learned different tasks ({', '.join(tasks)}): give those of one task")
    names, rows, probed, files = models(runs), [], [], []
    first = next((run for run in runs if run.options["n_ra"]), runs[0])
    for run, name in zip(runs, names):
        x, y, kinds, images = test_images(run, o)
        trained, untrained = watched(run.model, x), watched(run.untrained(), x)
        seed = {"model": name, "seed": run.options["seed"]}
        rows += [seed | row for row in measured(run, o, x, y, torch.from_numpy(kinds), trained[1], untrained[1])]
        probed += [seed | row for row in probes(trained[1], untrained[1], images, run.options["sprites"])]
        if run is first and (r := relations(trained[1], kinds)):
            title = f"{tasks[0].replace('_', ' ')}, {name}, seed {run.options['seed']}"
            files = [out / "boards.png", out / "kinds.png"]
            drawn = {key: values for key, values in r.items() if o.layer in (None, key[0])}
            figures.draw_boards(files[0], title, images, y.cpu().numpy(), trained[0].numpy(), kinds, drawn)
            figures.draw_kinds(files[1], title, kinds, {"untrained": relations(untrained[1], kinds), "trained": r})
    texts = [table_of(rows), PROBED, table_of_probes(probed)]
    if not files:
        what = "RCA heads" if first.options["n_ra"] else "sensory heads only"
        texts.append(f"{names[0]} has {what}: no relations r, only attention")
    if n_slots(first.options):
        files.append(out / "slots.png")
        x, _, _, images = test_images(first, o)
        lines = draw_memory(first.model, (x,), torch.from_numpy(images).permute(0, 3, 1, 2), files[-1])
        texts.append(f"{names[runs.index(first)]}, its memory:\n" + "\n".join(lines))
    if len({row["seed"] for row in rows}) > 1:
        files.append(out / "meaningful_or_used.png")
        figures.draw_meaningful_or_used(files[-1], rows)
    return "\n\n".join(texts), files


def models(runs):
    """A name for each run: its heads, and the options in which the runs differ besides their seeds."""
    return labels([{name: value for name, value in run.options.items() if name not in ("seed", *NOT_COMPARED)
                    and (run.options["n_ra"] or name not in RELATIONAL)} for run in runs])


def test_images(run, o):
    """-> pixels (N, 3, 36, 36), labels (N,), kinds of pairs (N, 9, 9), images: none of them was trained on.

    Only pairs of places count in which the same object can stand: in occurs, the top and each place at the bottom.
    """
    one = run.options
    data = "generated" if one["data"] == "generated" else o.data or one["data"]
    images, labels = games.test_images(one["task"], one["sprites"], min(o.n or IMAGES, one["test_size"]), one["seed"],
                                       data=data, data_dir=o.data_dir, alternative=one["alternative"])
    say_if_fewer(o, len(images), "test images of this run")
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float().to(run.device) / 255
    kinds = games.kinds_of_pairs(images, one["sprites"])
    compared = (kinds == 0).any(0)                                     # places where two objects are sometimes the same
    return x, torch.from_numpy(labels).to(run.device), np.where(compared, kinds, -1), images


def watched(model, x):
    """-> the model's answers (N,), and its Layers with what they computed."""
    with torch.no_grad(), watch(model) as layers:
        answers = model(x)[0].argmax(-1).cpu()
    for layer in layers:
        layer.alpha, layer.r = (None if t is None else t.cpu() for t in (layer.alpha, layer.r))
    return answers, layers


def relations(layers, kinds):
    """{(layer, relation): r (N, 9, 9)}, both counted from 1."""
    return {(layer.number, l + 1): places(layer.r, kinds)[:, l].numpy()
            for layer in layers for l in range(layer.n_relations)}


def places(values, kinds):
    """(N, R or H, T, T) -> the nine places alone, without a class token: (N, R or H, 9, 9)."""
    return values[:, :, -kinds.shape[1]:, -kinds.shape[1]:]


# ---- is it meaningful, is it used? -----------------------------------------------------------------------------------

def measured(run, o, x, y, kinds, trained, untrained):
    """Rows, one for each relation, head and layer of symbols: what it tells, and the accuracy without it."""
    rows, two, same = [], kinds >= 0, kinds == 0

    @torch.no_grad()
    def accuracy():
        return (run.model(x)[0].argmax(-1) == y).double().mean().item()
    intact = accuracy()
    for layer, now, before in zip(layers_of(run.model), trained, untrained):
        parts = [("relations", l, f"relation {l + 1}") for l in range(layer.n_relations)]
        if layer.n_relations > 1:
            parts.append(("relations", None, "all relations"))
        if layer.group == "relational":
            parts.append(("symbols", None, "symbols"))
        parts += [("heads", h, f"{layer.group} head {h + 1}") for h in range(layer.module.n_heads)]
        for what, index, name in parts:
            row = {"layer": layer.number, "part": name, "intact": intact}
            if index is not None:
                values, values_before = (places(one.r if what == "relations" else one.alpha, kinds)[:, index]
                                         for one in (now, before))
                row["auc"], row["untrained"] = (auc_within_places(v, same, two) for v in (values, values_before))
                others = values.masked_fill(~two, -float("inf"))
                row["top"] = top_one(others[same.any(-1)], same[same.any(-1)]) if same.any() else float("nan")
                if what == "relations":
                    row["means"] = [values[kinds == kind].mean().item() for kind in range(len(games.KINDS))]
            for how in ways(run, o, what):
                with without([layer], what, index, how, o.seed):
                    row[how] = accuracy()
            rows.append(row)
    return rows


def table_of(rows):
    """One line for each model, layer and part; the values of the seeds side by side, means of r over seeds."""
    groups = {}
    for row in rows:
        groups.setdefault((row["model"], row["layer"], row["part"]), []).append(row)
    lines = []
    for (model, layer, part), group in groups.items():
        means = np.mean([row["means"] for row in group], 0) if "means" in group[0] else []
        lines.append([model, layer, part, *(f"{mean:+.2f}" for mean in means), *[""] * (4 - len(means)),
                      *(each([row[name] for row in group if name in row])
                        for name in ("untrained", "auc", "top", "zero", "resample", "intact"))])
    return table(["model", "layer", "part", *(f"r, {kind}" for kind in games.KINDS), "AUC untrained", "AUC trained",
                  "top-1", "accuracy: zero", "of another image", "intact"], lines)


# ---- does a message tell its sender? ---------------------------------------------------------------------------------

PROBED = """A linear probe reads one part of the message to an object and names colour, shape and place of the object
that it attends to most. Share of right answers, in brackets with shuffled labels; means over heads and seeds:"""


def probes(trained, untrained, images, sprites):
    """Rows, one for each layer and part of a message: how well it tells its sender's attributes."""
    present, colour, shape = map(torch.from_numpy, games.objects(images, sprites))            # (N, 9) each
    place = torch.arange(9).expand_as(colour)
    rows = []
    for state, layers in (("untrained", untrained), ("trained", trained)):
        for layer in layers:
            if layer.n_relations:
                parts = dict(zip(("relations", "symbols"), message_parts(layer)))
            else:
                name = "sensory" if layer.group == "sensory" else "symbols"
                parts = {name: layer.heads.unflatten(-1, (layer.module.n_heads, -1)).transpose(1, 2)}
            alpha = places(layer.alpha, colour)                        # (N, H, 9, 9)
            others = present[:, None] & present[:, :, None] & ~torch.eye(9, dtype=torch.bool)
            sender = alpha.masked_fill(~others[:, None], -1).argmax(-1)            # (N, H, 9): to each object
            for name, messages in parts.items():
                row = {"layer": layer.number, "part": name, "state": state}
                for attribute, values in (("colour", colour), ("shape", shape), ("place", place)):
                    scores = [probed(messages[:, h, -9:].cpu(), values.gather(1, sender[:, h]), present)
                              for h in range(alpha.size(1))]
                    row[attribute], row[f"{attribute}, shuffled"] = np.mean(scores, 0)
                rows.append(row)
    return rows


def probed(messages, labels, present):
    """messages (N, 9, F), labels of their senders (N, 9) -> how well they are told, and how well shuffled ones.

    Labels are shuffled among the messages to one place, so that the receiver's place tells as much as before.
    """
    image, receiver = present.nonzero(as_tuple=True)
    features, labels = messages[present], labels[present]
    shuffled, g = labels.clone(), torch.Generator().manual_seed(0)
    for one in receiver.unique():
        rows = (receiver == one).nonzero()[:, 0]
        shuffled[rows] = labels[rows[torch.randperm(len(rows), generator=g)]]
    return probe(features, labels, image), probe(features, shuffled, image)


def table_of_probes(rows):
    groups = {}
    for row in rows:
        groups.setdefault((row["model"], row["layer"], row["part"], row["state"]), []).append(row)

    def cell(group, name):
        shuffled = np.mean([row[f"{name}, shuffled"] for row in group])
        return f"{mean_text([row[name] for row in group], 2)} ({shuffled:.2f})"
    names = ("colour", "shape", "place")
    return table(["model", "layer", "part", "", *names],
                 [[*key, *(cell(group, name) for name in names)] for key, group in groups.items()])


# ---- weights that were not kept --------------------------------------------------------------------------------------

def train_again(folder, o):
    """A cell of Relational Games that was recorded without its weights: trains it again -> the path of its weights."""
    record = load_run(folder)
    options = record["options"]
    if "train_size" not in options or "task" not in options:
        raise ValueError(f"{folder} has no weights: there is no last.pt, the checkpoint of a run")
    if not record["finished"]:
        raise ValueError(f"{folder} has no weights and was not finished: repeat its command, {record['command']}")
    print(f"{folder.name}: its weights were not kept; training it again, about {options['train_size'] // 40} seconds",
          flush=True)
    left_out = ("out_dir", "resume", "match_params", "sweep", "paper")
    given = {name: value for name, value in options.items() if name not in left_out and value not in (None, "")}
    with tempfile.TemporaryDirectory() as temporary:
        given |= {"out_dir": temporary, "data_dir": o.data_dir, "data": o.data or options["data"], "baseline": False,
                  "workers": 1, "keep_weights": True}
        command = [sys.executable, str(ROOT / "train_relgames.py"), *(f"--{k}={v}" for k, v in given.items())]
        done = subprocess.run(command, capture_output=True, text=True)
        made = next(Path(temporary).glob("*/config.json"), None)
        if done.returncode or made is None:
            raise ValueError(f"{folder.name} could not be trained again: {done.stderr.strip().splitlines()[-1:]}")
        scores = json.loads(made.read_text(encoding="utf-8"))["scores"]
        if scores != record["scores"]:
            raise ValueError(f"{folder.name}, trained again, is another model: accuracy {scores}, recorded "
                             f"{record['scores']}; repeat its training, with --keep_weights")
        shutil.move(made.parent / "weights.pt", folder / "weights.pt")
    print(f"{folder.name}: the same accuracy as recorded, {scores}; its weights are kept now")
    return folder / "weights.pt"
