"""The folder of one training: config.json (what it is), log.csv (how it went), last.pt and best.pt (checkpoints).

    run = Run(cfg, facts, unit="tokens", per_step=2048, metrics=("val_loss",))
    if not run.reusable():                            # finished before, with the same options, data, code and torch?
        with run:                                     # holds the folder's lock
            run.begin(model, optimizer, device)       # a new folder; with --resume the state of its last checkpoint
            for step in range(run.step + 1, cfg.max_steps + 1):
                ...
                run.add(loss, gradient_norm)          # kept on the device, no waiting
                run.log(step, **run.means(), lr=lr)
                run.save("last.pt", step, model, optimizer)
            run.finish()

The script decides when to log and when to save. Nothing that is not finite (NaN, infinity) is logged or saved: the
script ends instead.
Among several processes (toolbox/distributed.py) all call these methods, and process 0 alone writes.
"""
import csv
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from toolbox import distributed
from toolbox.checkpoints import initialise, load_checkpoint, load_weights, plain, save_checkpoint
from toolbox.files import try_lock, write_csv, write_text, writing
from toolbox.longer import copy_shorter_run, read_record
from toolbox.options import fail, make_out_dir, one_line_errors

ROOT = Path(__file__).parents[1]
# the files on which a result depends, besides the script itself
CODE = ["attention.py", "relational_attention.py", "symbols.py", "workspace.py", "model.py", "extras/blocked.py",
        "extras/shaw.py", "toolbox/training.py", "toolbox/run.py", "toolbox/checkpoints.py", "toolbox/longer.py",
        "toolbox/distributed.py", "data/**/*.py"]
# Options that do not change what a run computes, except for rounding and dropout masks.
NOT_COMPARED = ("device", "out_dir", "data_dir", "workers", "resume", "baseline", "rope_baseline", "match_params",
                "sweep", "ablate", "paper", "micro_batch", "recompute", "test_data", "keep_weights")
# Options without a place of their own in the folder's name. Heads and seed always stand first in it.
NOT_NAMED = ("n_heads", "n_ra", "seed", "vocab_size", "eval_every", "log_every", *NOT_COMPARED)


def code_hash(cfg):
    """One SHA-256 over the project's files on which a result of this script's options depends."""
    script = Path(sys.modules[type(cfg).__module__].__file__)
    paths = [script, *sorted(path for pattern in CODE for path in ROOT.glob(pattern))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def run_name(cfg):
    """sa4_ra4_seed1, followed by every option that is not at its default (of a path, the file's name)."""
    changed = {f.name: getattr(cfg, f.name) for f in fields(cfg)
               if f.name not in NOT_NAMED and getattr(cfg, f.name) != f.default}
    parts = [f"{name}={Path(value).name if isinstance(value, str) else value}" for name, value in changed.items()]
    name = re.sub(r"[^\w.=+-]+", "_", "-".join([f"sa{cfg.n_sa}_ra{cfg.n_ra}_seed{cfg.seed}", *parts]))
    return name if len(name) < 120 else f"{name[:100]}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:8]}"


class Run:
    """See the top of this file.

    facts: what else defines the run (the data's size and SHA-256, the precision), plain Python values; kept in
    config.json and compared before a run is reused. unit: what the log counts, per_step of them in a step.
    metrics: the further columns of the log. max_steps: default cfg.max_steps. initial: see checkpoints.load_initial.
    """

    def __init__(self, cfg, facts, *, unit, per_step, metrics=(), max_steps=None, initial=None):
        options = asdict(cfg)
        if initial:                                                    # identified by name and checksum, not by path
            options["init_from"], facts = Path(cfg.init_from).name, {**facts, "initial_weights": initial["sha256"]}
        self.cfg, self.folder, self.bar = cfg, Path(cfg.out_dir) / run_name(cfg), None
        self.initial = initial
        self.unit, self.per_step, self.max_steps = unit, per_step, max_steps or cfg.max_steps
        self.columns = ["step", unit, "train_loss", *metrics, "lr", f"{unit}_per_s", "seconds"]
        self.record = {"options": options, "facts": plain(facts, "facts"), "code": code_hash(cfg),
                       "command": shlex.join(["python", *sys.argv]), "torch": torch.__version__, "finished": False}
        self.step, self.best = 0, math.inf                             # of the last checkpoint; the lowest loss so far
        self.losses, self.norms, self.shares = [], [], []              # of the last steps, on the device
        self.read, self.read_shares = [], []                           # of those before, since the last row of the log
        self.seconds, self.since = 0.0, None                           # on the clock; since when it runs
        self.row = {"step": 0, "seconds": 0.0}                         # of the last training row
        self.rows = []                                                 # those that are not in log.csv yet

    # ---- is it new, finished, or to be resumed? ----

    def found(self):
        """The folder's config.json if it describes this very run (same options and facts), else None."""
        record = read_record(self.folder)
        return record if record and self.same(record) else None

    def same(self, record, but_for=()):
        """Whether a config.json has the options and facts of this run."""
        if not self.record.keys() <= record.keys():
            return False
        then, now = ({k: v for k, v in r["options"].items() if k not in (*NOT_COMPARED, *but_for)}
                     for r in (record, self.record))
        return then == now and record["facts"] == self.record["facts"]

    def reusable(self, quiet=False):
        """True if this run was finished before with the same options, data, code and torch; says so."""
        record = self.found() if distributed.RANK == 0 else None       # process 0 decides
        reuse = bool(record and record["finished"] and all(record[k] == self.record[k] for k in ("code", "torch"))
                     and (self.cfg.resume or "continued" not in record))            # see toolbox/longer.py
        if reuse and not quiet:
            print(f"{self.folder}: finished before with the same options, data, code and torch: reused")
        self.record = record if reuse else self.record
        return distributed.total([reuse])[0] > 0

    def __enter__(self):
        """Ends the script with one line if another process trains this run."""
        if distributed.RANK == 0:
            make_out_dir(self.folder.parent)
            with one_line_errors():
                self.lock = open(self.folder.with_name(f".{self.folder.name}.lock"), "a")
            if not try_lock(self.lock):                                # freed when the process ends
                self.lock.close()
                fail(f"another process is training {self.folder}: wait for it, or give another --out_dir")
        return self

    def __exit__(self, *error):
        if self.bar is not None:
            self.bar.close()
        if distributed.RANK == 0:
            self.lock.close()

    def begin(self, model, optimizer, device, operations=None):
        """Starts the folder, or with --resume loads its last checkpoint, or that of a run with fewer max_steps.

        An old folder is moved to <folder>.old. operations: of one token (or what the run counts), see toolbox/flops.py.
        """
        last = self.folder / "last.pt"
        self.device = device
        self.record.update(device=str(device), n_parameters=sum(p.numel() for p in model.parameters()))
        if operations is not None:
            self.record[f"operations_per_{self.unit[:-1]}"] = round(operations)
        if distributed.WORLD > 1:
            self.record["processes"] = distributed.WORLD
        if self.initial:
            initialise(model, self.initial, asdict(self.cfg))
        if distributed.RANK == 0:
            found = self.found()
            finished = found and found["finished"]                     # by other code or torch: else reused
            shorter = None
            if self.cfg.resume and not last.exists():
                shorter = copy_shorter_run(self, partial(self.same, but_for=("max_steps",)))
            if self.cfg.resume and last.exists() and not finished:
                self.restore(last, shorter or found, model, optimizer)
            else:
                self.start_folder(finished)
            self.write_record()
        self.step = round(distributed.total([self.step])[0])           # that of process 0: the others' is 0
        if distributed.RANK and self.step:
            self.load_state(load_checkpoint(last), model, optimizer)
        self.bar = self.bar or tqdm(total=self.max_steps, initial=self.step, leave=False,
                                    disable=distributed.RANK > 0 or not sys.stderr.isatty(),
                                    bar_format="{n_fmt}/{total_fmt} |{bar:20}| {remaining} left{postfix}")
        self.since = time.perf_counter()

    def start_folder(self, finished):
        if self.cfg.resume:
            why = "finished by other code" if finished else "nothing to resume"
            print(f"{self.folder}: {why}, starting at step 0")
        if self.folder.exists():
            old = self.folder.with_name(self.folder.name + ".old")
            print(f"{self.folder}: the earlier run moves to {old.name}"
                  + (", in place of the one there" if old.exists() else ""))
            shutil.rmtree(old, ignore_errors=True)
            self.folder.rename(old)
        self.folder.mkdir(parents=True)
        self.write_log([])

    def restore(self, path, record, model, optimizer):
        """Loads the checkpoint at `path`; `record` is its folder's config.json as `found`."""
        if record is None and not read_record(self.folder):
            raise ValueError(f"{self.folder / 'config.json'} is damaged or missing, so its options are unknown: "
                             "start again without --resume")
        if record is None:
            raise ValueError(f"{self.folder} holds a run with other options or data: start again without --resume")
        state = load_checkpoint(path)
        if any(record[name] != self.record[name] for name in ("code", "torch")):
            print(f"{self.folder}: the code has changed since this run began; it will not count as reusable")
            self.record["code"] = "changed during the run"
        self.record |= {"continued": record["continued"]} if "continued" in record else {}
        for left in self.folder.glob("*.tmp"):                         # by a process that was killed while it wrote
            left.unlink()
        self.load_state(state, model, optimizer)
        with open(self.folder / "log.csv", newline="", encoding="utf-8") as f:
            rows = [row for row in csv.DictReader(f) if row["seconds"]]            # a kill may have cut the last one
        self.write_log([row for row in rows if int(row["step"]) <= self.step])     # later ones will be written again
        print(f"{self.folder}: resuming after step {self.step}")

    def load_state(self, state, model, optimizer):
        load_weights(model, state["model"], self.folder / "last.pt")
        optimizer.load_state_dict(state["optimizer"])
        self.step, self.best, self.seconds, self.read, self.row = (
            state[name] for name in ("step", "best", "seconds", "losses", "row"))
        self.read_shares = state.get("accuracies", [])                 # older checkpoints have none

    # ---- while it trains ----

    def add(self, loss, gradient_norm=None, accuracy=None):
        """One step's loss (this process's share of the mean), gradient norm, and share of right answers in the batch.

        They are tensors, which are not read yet.
        """
        self.losses.append(loss.detach().clone())                      # CUDA graphs overwrite their outputs
        self.norms += [gradient_norm.detach()] if gradient_norm is not None else []
        self.shares += [accuracy] if accuracy is not None else []
        self.bar.update()

    def check(self):
        """Reads the losses and norms of the last steps from the device; ends the script if one is not finite."""
        if not self.losses:
            return
        losses = distributed.total(torch.stack(self.losses).tolist())
        norms = torch.stack(self.norms).tolist() if self.norms else []
        self.read_shares += torch.stack(self.shares).tolist() if self.shares else []
        self.read, self.losses, self.norms, self.shares = self.read + losses, [], [], []
        for name, values in (("train_loss", losses), ("gradient norm", norms)):
            self.stop_unless_finite(name, values)

    def stop_unless_finite(self, name, values):
        wrong = [value for value in values if not math.isfinite(value)]
        if not wrong:
            return
        last = self.folder / "last.pt"
        kept = f"{last} is the last good checkpoint" if last.exists() else "no checkpoint had been written yet"
        self.bar.close()
        if distributed.RANK == 0:
            print(f"{self.folder.name}: {name} {wrong[0]}: stopped; {kept}. A lower --learning_rate or more "
                  f"--warmup_steps may help", file=sys.stderr)
        raise SystemExit(1)

    def means(self):
        """{"train_loss": mean of the losses since the last call}, and "train_accuracy" if there are accuracies."""
        self.check()
        read = {"train_loss": self.read, "train_accuracy": self.read_shares}
        self.read, self.read_shares = [], []
        return {name: sum(values) / len(values) for name, values in read.items() if values}

    @contextmanager
    def paused(self):
        """Around evaluation: its time does not count. (On a GPU, waits for the work that is under way.)"""
        self.clock()
        self.since = None
        yield
        self.since = time.perf_counter()

    def clock(self):
        """Seconds of training so far."""
        if self.since is not None:
            if self.device.type in ("cuda", "mps"):
                getattr(torch, self.device.type).synchronize()
            now = time.perf_counter()
            self.seconds, self.since = self.seconds + now - self.since, now
        return self.seconds

    def log(self, step, train_loss=None, lr=None, **metrics):
        """Appends a row to log.csv, with the speed since the last row that had a training loss; shows it, too."""
        values = {**({} if train_loss is None else {"train_loss": train_loss}), **metrics}
        for name, value in values.items():
            self.stop_unless_finite(name, [value])
        row = {"step": step, self.unit: step * self.per_step, **values, "seconds": round(self.clock(), 3)}
        text = f"step {step:>{len(str(self.max_steps))}}/{self.max_steps}  " + "  ".join(
            f"{name} {value:.4f}" for name, value in values.items())
        if train_loss is not None:
            speed = (step - self.row["step"]) * self.per_step / max(1e-9, self.seconds - self.row["seconds"])
            row |= {"lr": lr, f"{self.unit}_per_s": round(speed)}
            self.row = {"step": step, "seconds": self.seconds}
            left = (self.max_steps - step) * self.seconds / step
            text += f"  {speed:,.0f} {self.unit}/s  {left:.0f} s left"
            self.bar.set_postfix_str(f"train_loss {train_loss:.4f}  {speed:,.0f} {self.unit}/s")
        if distributed.RANK == 0:
            self.rows.append(row)
            try:
                self.append_rows()
            except OSError as error:                                   # no reason to lose the steps since the last save
                self.bar.write(f"{error}; its rows are kept for later")
            if self.bar.disable or train_loss is None:                 # on a terminal the bar shows training rows
                self.bar.write(text)

    def append_rows(self):
        """Appends to log.csv what is not in it yet: all of it, or nothing and OSError."""
        path, size = self.folder / "log.csv", None
        if not self.rows:
            return
        with writing(path):
            try:
                size = path.stat().st_size
                with open(path, "a", newline="", encoding="utf-8") as f:
                    csv.DictWriter(f, self.columns).writerows(self.rows)
            except OSError:
                if size is not None:                                   # no half of a row
                    with suppress(OSError):
                        os.truncate(path, size)
                raise
        self.rows = []

    def save(self, name, step, model, optimizer):
        """Writes a checkpoint, or ends the script in one line: a loss since the last was not finite, or a full disk."""
        self.check()
        state = {"options": self.record["options"], "facts": self.record["facts"], "step": step,
                 "model": model.state_dict(), "optimizer": optimizer.state_dict(), "seconds": self.clock(),
                 "best": self.best, "losses": self.read, "accuracies": self.read_shares, "row": self.row}
        if distributed.RANK == 0:
            with one_line_errors():
                self.append_rows()
                save_checkpoint(self.folder / name, state)

    def keep(self, model):
        """Writes weights.pt: the finished model alone, for look.py. Nothing can be resumed from it."""
        state = {"options": self.record["options"], "facts": self.record["facts"], "model": model.state_dict()}
        with one_line_errors():
            save_checkpoint(self.folder / "weights.pt", state)

    def stop(self, step):
        """Ends the script after Ctrl-C or SIGTERM, for which it has saved."""
        self.bar.close()
        print(f"\nstopped after step {step} and saved; continue with the same command and --resume")
        raise SystemExit(130)

    def finish(self, **results):
        """Marks the run as finished; results, such as scores={...}, are kept in config.json."""
        with one_line_errors():
            self.append_rows()
        self.record.update(finished=True, **results)
        self.write_record()

    def write_record(self):
        text = json.dumps(self.record, indent=2)
        if distributed.RANK == 0:
            with one_line_errors():
                write_text(self.folder / "config.json", text)

    def write_log(self, rows):
        write_csv(self.folder / "log.csv", self.columns, rows)
