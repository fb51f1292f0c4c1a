"""Reads run folders. Says which runs form a group of seeds, how it is called, and which Transformer is its baseline.

A run is a dict: what config.json holds (options, facts, n_parameters, finished, ...), and its log by columns.
"""
import csv
import json

import numpy as np

from toolbox.run import NOT_COMPARED
from toolbox.training import MEMORY, RELATIONAL, n_slots, without_effect


def run_folders(folder):
    """The folders of runs in `folder`, sorted by name: neither replaced runs (*.old) nor runs without a row yet."""
    return sorted(path.parent for path in folder.glob("*/log.csv") if path.parent.suffix != ".old"
                  and len(path.read_text(encoding="utf-8").splitlines()) > 1)


def load_run(folder):
    """-> config.json as a dict, with `log` {column: array, NaN for an empty cell} and `written`, the time of the log.

    A step may have two rows: training loss and speed in one, the validation metrics in the other.
    Raises ValueError if this is not a run's folder, or if a file in it is damaged.
    """
    try:
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} is not the folder of a run: no config.json in it") from None
    except ValueError:
        record = None
    if not isinstance(record, dict) or not {"options", "facts", "n_parameters", "finished"} <= record.keys():
        raise ValueError(f"{folder / 'config.json'} is damaged")
    path = folder / "log.csv"
    rows = read_csv(path)
    if not rows:
        raise ValueError(f"{path} has no rows yet")
    try:
        record["log"] = {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}
    except (ValueError, TypeError):
        raise ValueError(f"{path} is damaged") from None
    record["written"] = path.stat().st_mtime
    return record


def read_csv(path):
    """The rows of a CSV file as dicts of strings. Raises ValueError if there is no such file, or no text."""
    try:
        with open(path, newline="", encoding="utf-8") as f:
            return list(csv.DictReader(f))
    except FileNotFoundError:
        raise ValueError(f"no file {path}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is damaged: no text in UTF-8") from None


# ---- values of a run -------------------------------------------------------------------------------------------------

def unit_of(runs):
    """What the runs count besides steps: tokens, problems or images. It is the second column of a log."""
    units = {list(run["log"])[1] for run in runs}
    if len(units) > 1:
        raise ValueError(f"these runs count {' and '.join(sorted(units))}: they cannot be compared")
    return units.pop()


def measured(run, column):
    """Row numbers of the log in which `column` has a value."""
    return np.flatnonzero(~np.isnan(run["log"][column]))


def final(run, metric):
    """The finished model's score, or else the metric's last value in the log: the final step's, not the best one."""
    if metric in run.get("scores", {}):
        return run["scores"][metric]
    return run["log"][metric][measured(run, metric)[-1]]


def speed(run):
    """Tokens (or what the run counts) per second, without evaluation: the median over the log's rows."""
    speeds = run["log"][f"{unit_of([run])}_per_s"]
    return float(np.median(speeds[speeds > 0]))                       # NaN and 0: rows without a training step


# ---- groups ----------------------------------------------------------------------------------------------------------

def group_runs(runs):
    """{label: runs that differ in nothing but their seed, sorted by seed}: DATs first, and then by label.

    Of several runs with the same seed only the newest is kept: a seed counts once.
    """
    runs = sorted(runs, key=lambda run: (run["options"]["n_ra"] == 0, run["options"]["seed"], run["written"]))
    groups = {}
    for run, label in zip(runs, labels([identity(run) for run in runs])):
        groups.setdefault(label, {})[run["options"]["seed"]] = run    # a newer run replaces an older one
    groups = {label: list(groups[label].values()) for label in sorted(groups)}
    return dict(sorted(groups.items(), key=lambda group: group[1][0]["options"]["n_ra"] == 0))


def identity(run):
    """All that defines a run besides its seed: its options, and the data and dtype that it really had."""
    skipped = ("seed", *NOT_COMPARED, *without_effect(run["options"]))
    options = {k: "default" if v is None else v for k, v in run["options"].items() if k not in skipped}
    dtype = run["facts"].get("dtype", options.get("dtype"))           # the option may be "auto"
    return {**options, "data": run["facts"]["data"], "sha256": run["facts"]["sha256"][:8], "dtype": dtype}


def labels(identities):
    """A name for each dict of options: its heads, as in 'DAT 4+4', and the options in which the dicts differ."""
    def kind(one):
        if n_slots(one):
            return "DAT with workspace" if one["n_ra"] else "AiT"
        return "DAT" if one["n_ra"] else "Transformer"
    names = dict.fromkeys(name for one in identities for name in one if name not in ("n_ra", "n_heads"))
    if len({n_slots(one) for one in identities} - {0}) == 1:
        names.pop("memory_slots")                                     # "AiT" says it
    differing = [name for name in names if len({str(one[name]) for one in identities if name in one}) > 1]

    def n_kinds(names):
        return len({tuple(str(one.get(name)) for name in names) for one in identities})
    without = [name for name in differing if name != "sha256"]
    if n_kinds(without) == n_kinds(differing):                        # a checksum only where nothing else differs
        differing = without
    return [", ".join([f"{kind(one)} {one['n_heads'] - one['n_ra']}+{one['n_ra']}",
                       *(f"{name}={one[name]}" for name in differing if name in one)]) for one in identities]


def comparable(run, baseline):
    """True if the baseline lacks one part of the model, and data and options are the same but for those of this part.

    The part: its relational heads (positions may differ, too); or its relations, which RCA heads lack; or its memory;
    or the norm behind its MLP, which a model with a memory has, too.
    A baseline of another d_ff belongs to the model that has as many parameters, within 1% (--match_params).
    """
    mine, theirs = run["options"], baseline["options"]
    more, less = (2 if n_slots(o) else 1 if o.get("mlp_norm") else 0 for o in (mine, theirs))
    if mine["n_ra"] and not theirs["n_ra"]:
        part = ("n_ra", "position", *RELATIONAL)
    elif mine["n_ra"] and (mine.get("ra_type"), theirs.get("ra_type")) == ("ra", "rca"):
        part = ("ra_type",)
    elif mine["n_ra"] == theirs["n_ra"] and more > less:
        part = ("memory_slots", "mlp_norm", *MEMORY)
    else:
        return False
    apart = (*part, "seed", "d_ff", *NOT_COMPARED)
    mine, theirs = ({k: v for k, v in o.items() if k not in apart} for o in (mine, theirs))
    same_width = (run["options"]["d_ff"] == baseline["options"]["d_ff"]
                  or abs(run["n_parameters"] / baseline["n_parameters"] - 1) <= 0.01)
    return mine == theirs and run["facts"] == baseline["facts"] and same_width
