"""A toolbox for the train scripts: device, optimizer, schedule, and the folder in which a run leaves its trace.

It is not a trainer: the loop stands in each script and calls these tools; nothing here calls back.
Randomness is a function of (seed, step) alone (`reseed`), so a resumed run needs no random state to go on bit for bit.
"""
import csv
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.download import try_lock
from toolbox.options import agreed, fail, one_line_errors, parse_options, start      # noqa: F401  (the scripts find them here)

# ---- which runs, on what, and how ------------------------------------------------------------------------------------

# options of relational heads and symbols: without such heads they mean nothing
RELATIONAL = ("symbols", "n_symbols", "symbol_heads", "trainable_symbols", "max_distance", "shared_symbols",
              "n_relations", "rel_proj_dim", "symmetric", "rel_activation", "ra_type", "share_qk", "n_ra_decoder",
              "dat_n_kv_heads", "dat_attention_bias", "dat_bias")


def with_baselines(configs, count_parameters):
    """Each DAT followed by the Transformer with as many heads in all, the same seed and the same data order.

    With match_params the Transformer's d_ff is chosen so that count_parameters(cfg) agrees within 1%.
    """
    runs = []
    for cfg in configs:
        without = {f.name: f.default for f in fields(cfg) if f.name in RELATIONAL}   # one baseline for all kinds of DAT
        twin = replace(cfg, n_ra=0, **without)
        if cfg.n_ra and cfg.match_params:
            twin = match_parameters(twin, count_parameters(cfg), count_parameters)
        pair = [twin] if cfg.n_ra == 0 else [cfg, twin] if cfg.baseline else [cfg]
        runs += [run for run in pair if run not in runs]
    return runs


def match_parameters(cfg, target, count_parameters):
    """cfg with the d_ff that brings its parameters nearest to `target`: they are linear in d_ff."""
    one, two = (count_parameters(replace(cfg, d_ff=d_ff)) for d_ff in (1, 2))
    matched = replace(cfg, d_ff=max(1, round(1 + (target - one) / (two - one))))
    if abs(count_parameters(matched) / target - 1) > 0.01:
        raise ValueError(f"no d_ff brings the Transformer within 1% of {target:,} parameters: widen the model")
    return matched


def choose_device(name="auto", dtype="auto"):
    """-> torch.device, dtype to compute in, and one line that says why. 'auto' takes the best there is.

    On a GPU it also decides whether products of float32 may use TF32: yes, unless float32 was asked for.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name} cannot be used here: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":                                         # TF32: where bfloat16 is too coarse, blocked.py
        torch.set_float32_matmul_precision("highest" if dtype == "float32" else "high")
    if dtype != "auto":
        return device, getattr(torch, dtype), f"{device}, {dtype} as asked for"
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return device, torch.bfloat16, f"{device} ({torch.cuda.get_device_name(device)}), bfloat16 since it has it"
    why = "bfloat16 would be emulated" if device.type == "cuda" else "bfloat16 is rarely faster there"
    return device, torch.float32, f"{device}, float32: {why}"


def autocast(device, dtype):
    """Matrix products in `dtype`, weights and sums in float32; does nothing for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


@contextmanager
def memory_errors(n_sequences=None):
    """Around steps on so many sequences at a time, or None: around the making of the model.

    Want of memory ends the script in one line, which says what helps.
    """
    try:
        yield
    except RuntimeError as error:                                     # a GPU's has a type of its own, a CPU's has not
        if not re.search("out of memory|can't allocate memory|not enough memory", str(error)):
            raise
        if n_sequences is None:
            fail("out of memory before the first step: make the model smaller (--d_model, --n_layers)")
        fail(f"out of memory with {n_sequences} sequences at a time: halve them with --micro_batch={n_sequences // 2}"
             if n_sequences > 1 else "out of memory with one sequence at a time: give --recompute, or a smaller model")


def make_optimizer(model, cfg):
    """AdamW; weight decay on tensors of two or more dimensions, not on biases and norms. Frozen tensors stay out."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": cfg.weight_decay},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    fused = all(p.device.type in ("cuda", "cpu") for p in parameters)
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=fused)


def learning_rate(step, cfg):
    """At step 1 ... max_steps: linear warm-up, then constant, or a cosine that reaches min_lr at max_steps."""
    min_lr = cfg.learning_rate / 10 if cfg.min_lr is None else cfg.min_lr
    if step <= cfg.warmup_steps:
        return cfg.learning_rate * step / cfg.warmup_steps
    if cfg.schedule == "constant":
        return cfg.learning_rate
    done = (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps)
    return min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (cfg.learning_rate - min_lr)


def reseed(seed, step, rank=0):
    """Makes everything random in this step, data order and dropout, a function of (seed, step) and the process."""
    # hashed, because PyTorch's CPU generator keeps only the low 32 bits of its seed
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


# ---- a run and its folder --------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]
CODE = ("attention.py", "relational_attention.py", "extras/blocked.py", "symbols.py", "config.py", "model.py",
        "toolbox/training.py")
# Options that do not define a run: where it computes, reads and writes; which other runs are made or drawn beside it;
# how a step is cut into pieces, which changes it by rounding (and by which neurons drop out) only; what the finished
# model is tested on besides.
NOT_COMPARED = ("device", "out_dir", "data_dir", "workers", "resume", "baseline", "match_params", "sweep", "paper",
                "micro_batch", "recompute", "test_data")
# In its folder's name heads and seed stand first, without their options' names; the vocabulary is the tokenizer's, and
# how often one looks at the run changes its log alone. (In config.json these are compared.)
NOT_NAMED = ("n_heads", "n_ra", "seed", "vocab_size", "eval_every", "log_every", *NOT_COMPARED)


def code_hash(names):
    """One SHA-256 over the project's files on which a result depends."""
    return hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in (*CODE, *names))).hexdigest()


def run_name(cfg):
    """sa4_ra4_seed1, followed by every option that is not at its default (of a path, the file's name)."""
    changed = {f.name: getattr(cfg, f.name) for f in fields(cfg)
               if f.name not in NOT_NAMED and getattr(cfg, f.name) != f.default}
    parts = [f"{name}={Path(value).name if isinstance(value, str) else value}" for name, value in changed.items()]
    name = re.sub(r"[^\w.=+-]+", "_", "-".join([f"sa{cfg.n_sa}_ra{cfg.n_ra}_seed{cfg.seed}", *parts]))
    return name if len(name) < 120 else f"{name[:100]}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:8]}"


def write_atomically(path, write):
    """`write(temporary path)`, then rename: a kill leaves the old file or the new one, never half of one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")         # two processes do not share it
    write(temporary)
    os.replace(temporary, path)


def load_checkpoint(path):
    """What Run.save wrote: {"options", "facts", "model", ...}. ValueError, of one line, if it is missing or damaged."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"no checkpoint at {path}") from None
    except (OSError, MemoryError):
        raise
    except Exception:                        # pickle, zip and torch each raise errors of their own here
        checkpoint = None
    if not isinstance(checkpoint, dict) or not {"options", "facts", "model"} <= checkpoint.keys():
        raise ValueError(f"{path} is not a checkpoint of this project, or damaged")
    return checkpoint


def load_weights(model, weights, path):
    """Raises ValueError, naming the first tensor that does not fit, if the checkpoint is of another shape."""
    own = model.state_dict()
    for name in [*own, *weights]:
        has, needs = (tuple(d[name].shape) if name in d else "absent" for d in (weights, own))
        if has != needs:
            raise ValueError(f"{path} is of another shape: {name} is {has} there, {needs} in this model")
    model.load_state_dict(weights)


class Run:
    """One run's folder {config.json, log.csv, last.pt, best.pt}, with its clock, progress and ways to stop and go on.

    code: the files besides model and toolbox on which its result depends (the script, its data's file).
    facts: what else defines the run (the data's size and SHA-256), kept in config.json and compared for reuse.
    per_step: tokens (or what `unit` says) in a step, for the log.
    metrics: the columns that `validated` fills; the first, a loss, decides which checkpoint is best.pt.
    """

    def __init__(self, cfg, code, facts, per_step, metrics=("val_loss",), unit="tokens"):
        self.cfg, self.folder = cfg, Path(cfg.out_dir) / run_name(cfg)
        self.per_step, self.metrics, self.unit = per_step, metrics, unit
        self.columns = ["step", unit, "train_loss", *metrics, "lr", f"{unit}_per_s", "seconds"]
        self.record = {"options": asdict(cfg), "facts": facts, "code": code_hash(code),
                       "command": shlex.join(["python", *sys.argv]), "torch": torch.__version__, "finished": False}
        self.step, self.seconds, self.best, self.losses, self.row_seconds = 0, 0.0, math.inf, [], 0.0
        self.interrupted = False

    def found(self):
        """The folder's config.json where it describes this very run (same options and facts), else None."""
        try:
            record = json.loads((self.folder / "config.json").read_text())
        except (FileNotFoundError, ValueError):                        # none, or damaged: as good as none
            return None
        if not isinstance(record, dict) or not self.record.keys() <= record.keys():
            return None
        then, now = ({k: v for k, v in r["options"].items() if k not in NOT_COMPARED} for r in (record, self.record))
        return record if then == now and record["facts"] == self.record["facts"] else None

    def reusable(self):
        """True, and says so, if this run was finished before with the same options, data, code and torch."""
        record = self.found()
        if not (record and record["finished"] and all(record[k] == self.record[k] for k in ("code", "torch"))):
            return False
        print(f"{self.folder}: finished before with the same options, data, code and torch: reused")
        self.record = record
        return True

    def begin(self, model, optimizer, device):
        """Starts the folder, or with --resume goes on where last.pt stands. An old folder is moved to <folder>.old.

        Raises ValueError if another process is at work on this run, or if its checkpoint does not fit.
        """
        self.model, self.optimizer, last = model, optimizer, self.folder / "last.pt"
        self.record.update(device=str(device), n_parameters=sum(p.numel() for p in model.parameters()))
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder.with_name(f".{self.folder.name}.lock"), "a")      # freed by the system at the end
        if not try_lock(self.lock):
            raise ValueError(f"another process is training {self.folder}: wait for it, or give another --out_dir")
        found = self.found()
        if self.cfg.resume and last.exists() and not (found and found["finished"]):    # finished, by other code: anew
            self.restore(last, found)
        else:
            if self.cfg.resume:
                print(f"{self.folder}: nothing to resume, starting at step 0")
            if self.folder.exists():
                old = self.folder.with_name(self.folder.name + ".old")
                instead = ", in place of that" if old.exists() else ""
                print(f"{self.folder}: the earlier run moves to {old.name}{instead}")
                shutil.rmtree(old, ignore_errors=True)
                self.folder.rename(old)
            self.folder.mkdir(parents=True)
            self.write_log([])
        self.write_record()
        self.bar = tqdm(total=self.cfg.max_steps, initial=self.step, leave=False, disable=not sys.stderr.isatty(),
                        bar_format="{n_fmt}/{total_fmt} |{bar:20}| {remaining} left{postfix}")

    def restore(self, path, record):
        """Takes up the checkpoint at `path`; `record` is its folder's config.json as `found`."""
        if record is None:
            raise ValueError(f"{self.folder} holds a run with other options or data: start anew without --resume")
        state = load_checkpoint(path)
        if record["code"] != self.record["code"]:
            print(f"{self.folder}: the code has changed since this run began; it will not count as reusable")
            self.record["code"] = "changed in mid-run"
        load_weights(self.model, state["model"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.best, self.losses, self.row_seconds = (
            state[k] for k in ("step", "seconds", "best", "losses", "row_seconds"))
        with open(self.folder / "log.csv", newline="") as f:           # rows past the checkpoint will come again
            rows = [row for row in csv.DictReader(f) if int(row["step"]) <= self.step]
        self.write_log(rows if self.step else [])                      # at step 0 the script validates once more
        print(f"{self.folder}: resuming after step {self.step}")

    def write_record(self):
        text = json.dumps(self.record, indent=2)
        write_atomically(self.folder / "config.json", lambda path: path.write_text(text))

    def write_log(self, rows):
        def write(path):
            with open(path, "w", newline="") as f:
                writer = csv.DictWriter(f, self.columns)
                writer.writeheader()
                writer.writerows(rows)
        write_atomically(self.folder / "log.csv", write)

    def save(self, name):
        state = {"options": self.record["options"], "facts": self.record["facts"], "step": self.step,
                 "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "seconds": self.seconds,
                 "best": self.best, "losses": self.losses, "row_seconds": self.row_seconds}
        write_atomically(self.folder / name, lambda path: torch.save(state, path))

    def steps(self):
        """Yields the steps still to do, up to max_steps. Ctrl-C (or a polite kill) ends after the step under way."""
        def stop(signum, frame):
            self.interrupted = True
            signal.signal(signum, previous[signum])                    # a second Ctrl-C stops at once
        previous = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self.step < self.cfg.max_steps:
                self.started = time.perf_counter()
                yield self.step + 1
                if self.stopping():
                    self.save("last.pt")
                    self.bar.close()
                    print(f"\nstopped after step {self.step} and saved; go on with the same command and --resume")
                    raise SystemExit(130)
            self.record["finished"] = True
            self.write_record()
        finally:
            self.bar.close()
            self.lock.close()
            for s, handler in previous.items():
                signal.signal(s, handler)

    def stopping(self):
        """Shall the run end after this step?"""
        return self.interrupted

    def check(self, **values):
        """Ends the script, before weights are spoilt or a checkpoint is overwritten, if a value is not finite."""
        if all(math.isfinite(value) for value in values.values()):
            return
        last = self.folder / "last.pt"
        kept = f"{last} is the last good checkpoint" if last.exists() else "no checkpoint had been written yet"
        what = ", ".join(f"{name} {value}" for name, value in values.items())
        self.bar.close()
        print(f"after step {self.step}: {what}: stopped; {kept}. A lower --learning_rate or more --warmup_steps "
              f"may help", file=sys.stderr)
        raise SystemExit(1)

    def step_done(self, loss, lr):
        """After each step: stops the clock, so that evaluation does not count; every log_every steps writes a row."""
        self.step += 1
        self.seconds += time.perf_counter() - self.started
        self.losses.append(loss)
        self.lr = lr
        self.bar.update()
        if self.step % self.cfg.log_every == 0 and not self.validation_due():
            self.log()

    def validation_due(self):
        return self.step % self.cfg.eval_every == 0 or self.step == self.cfg.max_steps

    def validated(self, **metrics):
        """Writes a row with the metrics, last.pt, and best.pt if the first metric is the lowest so far."""
        self.check(**metrics)
        self.log(**metrics)
        score = metrics[self.metrics[0]]
        if score < self.best:
            self.best = score
            self.save("best.pt")
        self.save("last.pt")

    def log(self, **metrics):
        """One row: the mean training loss since the last one, speed without evaluation, and the metrics if measured."""
        seconds = self.seconds - self.row_seconds
        speed = len(self.losses) * self.per_step / seconds if seconds else 0.0
        train_loss = sum(self.losses) / len(self.losses) if self.losses else ""
        row = {"step": self.step, self.unit: self.step * self.per_step, "train_loss": train_loss, **metrics,
               "lr": self.lr if self.step else "", f"{self.unit}_per_s": round(speed),
               "seconds": round(self.seconds, 3)}
        with open(self.folder / "log.csv", "a", newline="") as f:
            csv.DictWriter(f, self.columns).writerow(row)
        self.losses, self.row_seconds = [], self.seconds
        self.report(train_loss, metrics, speed)

    def report(self, train_loss, metrics, speed):
        """The bar on a terminal shows the latest row; elsewhere each row is a line."""
        shown = {"train_loss": train_loss, **metrics} if train_loss != "" else metrics
        text = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
        if train_loss != "":
            self.bar.set_postfix_str(f"train_loss {train_loss:.4f}  {speed:,.0f} {self.unit}/s")
        if self.bar.disable or metrics:
            left = (self.cfg.max_steps - self.step) * self.seconds / self.step if self.step else 0
            self.bar.write(f"step {self.step:>{len(str(self.cfg.max_steps))}}/{self.cfg.max_steps}  {text}"
                           + (f"  {speed:,.0f} {self.unit}/s  {left:.0f} s left" if self.step else ""))
