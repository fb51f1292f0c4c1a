"""Functions for the train scripts: common options, device, optimizer, learning rate, baselines. No loop, no callbacks.

Randomness is a function of (seed, step, process) alone (`reseed`): a resumed run needs no stored random state.
"""
import math
import os
import re
import signal
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from textwrap import shorten
from typing import Literal

import numpy as np
import torch

from toolbox import distributed
from toolbox.options import at_least, fail


@dataclass
class TrainingOptions:
    """The options that all train scripts share; each script sets its own defaults."""
    # training
    max_steps: int = 1000                   # optimizer steps, and the horizon of the schedule
    learning_rate: float = 1e-3             # at its peak
    min_lr: float | None = None             # where the cosine ends; default learning_rate / 10
    schedule: Literal["cosine", "constant"] = "cosine"   # after the warm-up
    warmup_steps: int = 0                   # linear warm-up
    weight_decay: float = 0.0               # AdamW, on tensors of two or more dimensions
    beta1: float = 0.9                      # AdamW
    beta2: float = 0.999                    # AdamW
    grad_clip: float = 0.0                  # largest gradient norm; 0: no clipping
    log_every: int = 20                     # steps between rows of log.csv
    init_from: str = ""                     # start with the weights of a checkpoint: its file, or its run's folder
    # running
    seed: int = 1                           # of weights, data order, augmentation and dropout; 1,2,3: one run each
    device: str = "auto"                    # auto: cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"   # of matrix products; auto: bfloat16 on GPUs that have it
    out_dir: str = "out"                    # a folder for each run, and the figure of all of them
    data_dir: str = "data/cache"            # where downloads are kept
    compile: bool = False                   # torch.compile: faster steps after a slow start; for a GPU
    resume: bool = False                    # continue an interrupted run from its last checkpoint
    baseline: bool = True                   # after a DAT, train the Transformer with as many heads
    match_params: bool = False              # give the baseline the d_ff that makes parameter counts agree within 1%
    paper: bool = False                     # draw the published curves behind ours

    def __post_init__(self):
        super().__post_init__()
        at_least(self, max_steps=1, learning_rate=0, min_lr=0, warmup_steps=0, weight_decay=0, grad_clip=0,
                 log_every=1, seed=0, beta1=0, beta2=0)
        if self.init_from and self.baseline and self.n_ra:
            raise ValueError("--init_from: its weights cannot be those of both models: give --baseline=False")
        if max(self.beta1, self.beta2) >= 1 or self.seed >= 2 ** 63:
            raise ValueError(f"beta1={self.beta1} and beta2={self.beta2} must be below 1, seed={self.seed} below 2^63")


# ---- which runs ------------------------------------------------------------------------------------------------------

# options of relational heads and symbols, which have no effect without such heads
RELATIONAL = ("symbols", "n_symbols", "symbol_heads", "trainable_symbols", "max_distance", "shared_symbols",
              "n_relations", "rel_proj_dim", "symmetric", "rel_activation", "ra_type", "share_qk", "n_ra_decoder",
              "dat_n_kv_heads", "dat_attention_bias", "dat_bias")
# options of a memory, which have no effect without slots
MEMORY = ("memory_width", "memory_heads", "bottleneck", "memory_beta", "memory_decay", "balance", "memory_queries")


def without_effect(options):
    """Names of the options that change nothing in a model with these options, a dict."""
    unused = () if options["n_ra"] else RELATIONAL
    if options.get("position") == "shaw":
        unused = [name for name in unused if name != "max_distance"]
    return (*unused, *(("mlp_norm",) if n_slots(options) else MEMORY))


def n_slots(options):
    """Slots of the memory in these options, a dict from this program, an older one's record or a CSV file."""
    return int(options.get("memory_slots") or 0)


def simplified(cfg, **changes):
    """cfg with these changes, and what has no effect in it at its default: one run for all that are the same model."""
    unused = without_effect({**vars(cfg), **changes})
    return replace(cfg, **{**changes, **{f.name: f.default for f in fields(cfg) if f.name in unused}})


def with_baselines(configs, make_model, *others):
    """Each DAT followed by its baseline: the Transformer with as many heads in all, same seed, same data order.

    others: changes to its options, as dict(position="rope"), each of which makes one more baseline.
    The baseline of a DAT with a memory keeps the memory. With match_params the Transformer's d_ff is chosen so that the
    parameters of make_model(cfg) agree within 1%; and so is that of a model without memory that is in this list beside
    one with memory. Raises ValueError for a model that cannot be built, before anything is trained.
    """
    runs = []
    for cfg in configs:
        cfg = simplified(cfg)
        with_memory = [other for other in configs if other.memory_slots and
                       simplified(other, memory_slots=0, mlp_norm=False) == simplified(cfg, mlp_norm=False)]
        if cfg.match_params and with_memory:
            cfg = match_parameters(cfg, count_parameters(make_model, with_memory[0]), make_model)
        baselines = []
        if cfg.n_ra and cfg.baseline:
            baselines = [simplified(cfg, n_ra=0, **changes) for changes in ({}, *others)]
        if cfg.match_params and baselines:
            target = count_parameters(make_model, cfg)
            baselines = [match_parameters(transformer, target, make_model) for transformer in baselines]
        for run in (cfg, *baselines):
            if run not in runs:
                runs.append(run)
    for cfg in runs:
        count_parameters(make_model, cfg)
    return runs


def count_parameters(make_model, cfg):
    """How many parameters make_model(cfg) has."""
    with torch.device("meta"):                                        # shapes only, nothing is allocated
        return sum(p.numel() for p in make_model(cfg).parameters())


def match_parameters(cfg, target, make_model):
    """cfg with the d_ff that brings its parameters nearest to `target`: they are linear in d_ff."""
    one, two = (count_parameters(make_model, replace(cfg, d_ff=d_ff)) for d_ff in (1, 2))
    matched = replace(cfg, d_ff=max(1, round(1 + (target - one) / (two - one))))
    if abs(count_parameters(make_model, matched) / target - 1) > 0.01:
        raise ValueError(f"no d_ff brings the Transformer within 1% of {target:,} parameters: widen the model")
    return matched


# ---- on what device, in what precision -------------------------------------------------------------------------------

def choose_device(name="auto", dtype="auto"):
    """-> torch.device, dtype to compute in, and one line that says why. 'auto': cuda, else mps, else cpu.

    On a GPU it also decides whether products of float32 may use TF32: yes, unless float32 was given.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name} cannot be used here: {shorten(str(error), 150, placeholder=' ...')}") from None
    if device.type == "cuda":                                         # TF32 for what stays in float32
        torch.set_float32_matmul_precision("highest" if dtype == "float32" else "high")
    if dtype != "auto":
        return device, getattr(torch, dtype), f"{device}, {dtype} as given"
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return device, torch.bfloat16, f"{device} ({torch.cuda.get_device_name(device)}), bfloat16: native"
    why = "bfloat16 would be emulated" if device.type == "cuda" else "bfloat16 is rarely faster there"
    return device, torch.float32, f"{device}, float32: {why}"


def autocast(device, dtype):
    """Matrix products in `dtype`, weights and sums in float32; does nothing for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def to_device(x, device):
    """x on the device. On a GPU from pinned memory and without waiting: the copy runs beside the computation."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def no_compiler(device):
    """Why torch.compile does not work on this device, in one line; None if it does."""
    try:
        torch.compile(torch.neg)(torch.zeros(2, device=device))
    except Exception as error:                                         # each missing part raises an error of its own
        first, *others = str(error).strip().splitlines() or [type(error).__name__]
        return " ".join([first, *others[:1]] if first.rstrip().endswith(":") else [first])[:200]


def compiled(model, device, fixed_shapes):
    """The model that training calls under --compile; in evaluation nothing is compiled.

    fixed_shapes: batches have one or two shapes, and each step has one forward pass. Then a small model on a GPU, where
    launching kernels takes most of the time, is compiled as a whole, with CUDA graphs: one launch for all. Not beyond
    512 tokens, where query blocks seed their dropout, which a CUDA graph cannot do. Any other is compiled block by
    block: one compilation serves all blocks. Without a working compiler says so and returns `model`.
    """
    if missing := no_compiler(device):
        print(f"--compile: no working compiler here, so this run is not compiled ({missing})")
        return model
    torch._dynamo.reset()                                              # of each function it keeps 8 compilations
    small = sum(p.numel() for p in model.parameters()) < 30e6 and model.cfg.max_len <= 512
    if device.type == "cuda" and fixed_shapes and small:
        print("compiled as a whole, with CUDA graphs: the first steps are slow")
        return torch.compile(model, mode="reduce-overhead", dynamic=False)
    blocks = [block for name, m in model.named_modules() if name.split(".")[-1] == "blocks" for block in m]
    for block in blocks:                                               # in training only: generation has many shapes
        plain, quick = block.forward, torch.compile(block.forward)
        block.forward = lambda *inputs, block=block, plain=plain, quick=quick, **options: (
            quick if block.training else plain)(*inputs, **options)
    print(f"{len(blocks)} blocks compiled, each by itself: the first steps are slow")
    return model


@contextmanager
def memory_errors(n_sequences=None):
    """n_sequences: how many are in memory at a time in training; None while the model is built.

    Out of memory ends the script with one line that says what helps.
    """
    try:
        yield
    except RuntimeError as error:                                     # a GPU's error has its own type, a CPU's has not
        if not re.search("out of memory|can't allocate memory|not enough memory", str(error)):
            raise
        if n_sequences is None:
            fail("out of memory before the first step: make the model smaller (--d_model, --n_layers)")
        fail(f"out of memory with {n_sequences} sequences at a time: halve them with --micro_batch={n_sequences // 2}"
             if n_sequences > 1 else "out of memory with one sequence at a time: give --recompute, or a smaller model")


@contextmanager
def stop_on_signal():
    """Ctrl-C, SIGTERM and SIGHUP do not stop the program at once: they make the function that this yields return True.

        with stop_on_signal() as stop_requested:
            for step in ...:
                ...                           # the step is finished
                if stop_requested():          # in all processes of torchrun alike
                    save and leave the loop

    A second Ctrl-C stops at once. Outside the main thread, where Python forbids handlers, signals act as usual.
    """
    received = []

    def note(signum, frame):
        received.append(signum)
        signal.signal(signum, previous[signum])
        if distributed.RANK == 0:
            with suppress(OSError):                                    # the same Ctrl-C has ended a `2>&1 | tee log`
                os.write(2, b"\nfinishing this step, then saving; once more stops at once\n")
    previous = {}
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    for s in numbers if threading.current_thread() is threading.main_thread() else ():
        if signal.getsignal(s) not in (signal.SIG_IGN, None):          # a background job ignores Ctrl-C: leave it so
            previous[s] = signal.signal(s, note)
    try:
        # one process that stopped a step before the others would leave them waiting for ever
        yield lambda: distributed.total([bool(received)])[0] > 0
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


# ---- steps -----------------------------------------------------------------------------------------------------------

def make_optimizer(model, cfg):
    """AdamW; weight decay on tensors of two or more dimensions, not on biases and norms. Frozen ones are left out."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": cfg.weight_decay},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    fused = all(p.device.type in ("cuda", "cpu") for p in parameters)
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=fused)


def set_learning_rate(optimizer, step, cfg):
    """Sets and returns the learning rate of this step."""
    lr = learning_rate(step, cfg)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


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
