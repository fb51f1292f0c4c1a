"""What relational attention costs: time and memory compared with self-attention, in a training step, in generation.

    python -m extras.bench                                       everything: 20 minutes on two cores, 2 on a GPU
    python -m extras.bench --part=attention --n=512,1024         one part
    python -m extras.bench --peer                                with the authors' package, dual-attention (pip install)

Candidates run in turns (a b c, b c a, c a b ...), so that a slow minute of the machine is slow for all of them. A ratio
is the median of the ratios within a turn. On a CPU, memory is the growth of a whole process, a new one for each number.
"""
import json
import os
import platform
import re
import statistics
import time
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from extras.bench_models import IMAGES, MODELS, attention_case, batch_size, chosen, config, step_case
from model import LanguageModel, TransformerConfig, stream
from toolbox import flops, training
from toolbox.options import agreed, at_least, make_out_dir, one_line_errors, parse_options, start

import matplotlib.pyplot as plt                                      # noqa: E402  (after toolbox: without a display)

LENGTHS = [128, 256, 512, 1024, 2048, 4096, 8192]
GPU_SECONDS = 5                                                      # per row of a table: then no further turn begins


@dataclass
class Options:
    part: Literal["all", "attention", "step", "generation"] = "all"   # what is measured
    # part=attention: the heads
    n: int = 512                            # tokens, or a list such as 512,1024; default: 128 to 8192
    d_model: int = 512                      # width of the layer
    n_heads: int = 8                        # in the whole layer
    n_ra: int = 4                           # relational heads, compared with as many sensory heads
    batch_size: int = 1                     # sequences
    causal: bool = True                     # with a causal mask
    # the models' shapes (part=attention without --n) and steps (part=step)
    model: str = ""                         # only those with this in their name: tiny, d64 ...
    compile: bool = False                   # steps with compiled blocks on a CPU, too
    # measuring
    repeats: int = 5                        # turns, after one that is not counted
    memory: bool = True                     # also measure memory
    peer: bool = False                      # also measure the authors' package
    device: str = "auto"                    # auto: cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"   # of matrix products
    out_dir: str = "out/bench"              # where the figure goes

    def __post_init__(self):
        at_least(self, n=1, d_model=1, n_heads=1, n_ra=1, batch_size=1, repeats=1)
        if self.d_model % self.n_heads or self.n_ra > self.n_heads:
            raise ValueError(f"n_ra={self.n_ra} of n_heads={self.n_heads} heads in a layer of d_model={self.d_model}: "
                             f"d_model must be a multiple of n_heads, and n_ra at most n_heads")


def alternate(candidates, repeats, device):
    """{name: function} -> {name: seconds in each turn}. The order rotates; the first turn is not counted."""
    names, seconds, begun = list(candidates), {name: [] for name in candidates}, None
    for turn in range(repeats + 1):
        if device.type == "cuda" and turn > 1 and now(device) - begun > GPU_SECONDS:
            break
        for name in names[turn % len(names):] + names[:turn % len(names)]:
            start = now(device)
            candidates[name]()
            if turn:
                seconds[name].append(now(device) - start)
        begun = begun or now(device)
    return seconds


def ratio(seconds, name, base):
    """The median over turns of the time of `name` divided by that of `base`."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base]))


def now(device):
    """Seconds on a clock, after all work on the device has finished."""
    if device.type in ("cuda", "mps"):                               # calls return before their work is done
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def growth(function, device):
    """Bytes by which the memory in use grows while the function runs, at its peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_bytes(b"5")                   # Linux: resets the peak, VmHWM
    before = memory_of_process("VmRSS")
    function()
    return memory_of_process("VmHWM") - before


def memory_of_process(line):
    """Bytes of this process on Linux, VmRSS: now; VmHWM: at the peak."""
    return int(re.search(rf"{line}:\s+(\d+) kB", Path("/proc/self/status").read_text("ascii"))[1]) * 1024


def apart(function, device, *args):
    """function(*args), on a CPU in a new process, whose memory is that of this function."""
    if device.type == "cuda":
        return function(*args)
    with get_context("spawn").Pool(1) as process:
        return process.apply(function, args)


# ---- attention -------------------------------------------------------------------------------------------------------

CASES = ("self-attention", "literal", "fast", "blocked", "authors")


def cases(o):
    return CASES if o.peer else CASES[:-1]


def lengths(o, of):
    """{n: (TransformerConfig, n, batch, causal)} for the lengths `of`: heads as the options have them."""
    cfg = TransformerConfig(d_model=o.d_model, n_heads=o.n_heads, n_ra=o.n_ra, position="learned", symbols="positional")
    return {n: (cfg, n, o.batch_size, o.causal) for n in of}


def models(o, device):
    """{name of a model: the shape of its attention, as above}; models with the same attention come once."""
    shapes = {}
    for name in MODELS:
        cfg, B = replace(config(name), vocab_size=1, n_layers=1), batch_size(name, device)
        shape = cfg, cfg.max_len, B, name not in IMAGES
        if o.model in name and B and shape not in shapes.values():
            shapes[name] = shape
    return shapes


def attention_memory(o, case, cfg, n, *others):
    """Bytes beyond the inputs that attention of n tokens, forward and backward, needs at its peak."""
    device, dtype, _ = training.choose_device(o.device, o.dtype)
    small, large = (attention_case(case, cfg, length, *others, device, dtype) for length in (16, n))
    small()                                                          # allocates what is needed at any length
    return growth(large, device)


def cell(row, case):
    """A cell of the table: time relative to self-attention, megabytes, and a star at the form that is chosen."""
    if case not in row["seconds"]:
        return ""
    seconds = row["seconds"]
    time = (f"{1e3 * statistics.median(seconds[case]):,.1f} ms" if case == "self-attention"
            else f"{ratio(seconds, case, 'self-attention'):.2f} x")
    memory = f", {row['memory'][case] / 2 ** 20:,.0f} MB" if case in row["memory"] else ""
    return time + memory + (" *" if case == row["chosen"] else "")


def attention(o, shapes, device, dtype):
    """A dictionary for each shape: seconds and bytes of each case, and the form that is chosen. Prints a table."""
    rows = []
    for name, (cfg, n, B, causal) in shapes.items():
        # cases that materialise weights and relations are skipped where these would take more than 4 GB
        fits = B * (cfg.n_ra + max(cfg.n_ra, cfg.n_relations or 0)) * n * n <= 2 ** 30
        left_out = (("literal", "authors") if not fits else
                    ("authors",) if cfg.symbols == "relative" else ())               # theirs are called differently
        measured = [case for case in cases(o) if case not in left_out]
        seconds = alternate({case: attention_case(case, cfg, n, B, causal, device, dtype) for case in measured},
                            o.repeats, device)
        memory = {case: apart(attention_memory, device, o, case, cfg, n, B, causal) for case in measured if o.memory}
        rows.append(dict(name=name, n=n, batch_size=B, chosen=chosen(cfg, n, B, device), seconds=seconds,
                         memory=memory))
        print(f"| {name} | {B} x {n} | " + " | ".join(cell(rows[-1], case) for case in cases(o)) + " |", flush=True)
    return rows


def draw(rows, path):
    """Time and memory against n, on logarithmic axes: a slope of 1 is linear, a slope of 2 quadratic."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2))
    for axis, what, unit, scale in zip(axes, ("seconds", "memory"), ("seconds", "MB beyond the inputs"), (1, 2 ** 20)):
        for case in CASES:
            points = [(row["n"], np.median(row[what][case]) / scale) for row in rows if row[what].get(case)]
            if points:
                axis.loglog(*zip(*points), marker="o", ms=4, color=f"C{CASES.index(case)}", label=case)
        n = [row["n"] for row in rows]
        for slope in (1, 2):                                         # dotted lines from self-attention's first point
            first = np.median(rows[0][what].get("self-attention", 0)) / scale
            if first:
                axis.loglog(n, [first * (m / n[0]) ** slope for m in n], ":", color="gray", lw=1)
                axis.annotate(f"n{'²' * (slope == 2)}", (n[-1], first * (n[-1] / n[0]) ** slope), color="gray")
        axis.set(xlabel="tokens n", title=f"forward and backward, {unit}")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


# ---- a training step -------------------------------------------------------------------------------------------------

def kinds(o, name, compile, device):
    """What is measured of a model; the authors' DAT where it has the same shape and fits (its n x n x R relations)."""
    theirs = o.peer and name not in IMAGES and (name != "fineweb_350m" or free_memory(device) > 90e9)
    return ["Transformer", "DAT", *["Transformer, compiled", "DAT, compiled"] * compile, *["authors' DAT"] * theirs]


def step_memory(o, name, kind):
    """Bytes of a model in training at its peak: weights, gradients, moments and activations."""
    device, dtype, _ = training.choose_device(o.device, o.dtype)

    def two_steps():                                                 # the first one allocates gradients and moments
        step = step_case(name, kind, device, dtype)
        step(), step()
    return growth(two_steps, device)


def steps(o, compile, device, dtype):
    """A dictionary for each model: seconds of a training step, bytes and speed of each kind. Prints a table."""
    rows = []
    for name in MODELS:
        B = batch_size(name, device)
        if o.model not in name or B is None:
            continue
        if name == "fineweb_350m" and free_memory(device) < (16e9 if device.type == "cpu" else 50e9):
            print(f"| {name} | skipped: all its models together do not fit into the free memory |")
            continue
        torch._dynamo.reset()                                        # of each function it keeps 8 compilations
        names = kinds(o, name, compile, device)
        memory = {kind: apart(step_memory, device, o, name, kind) for kind in names if o.memory}
        seconds = alternate({kind: step_case(name, kind, device, dtype) for kind in names}, o.repeats, device)
        rows.append(dict(name=name, batch_size=B, seconds=seconds, memory=memory, per_second={}, share={}))
        for kind in names:
            print_step(rows[-1], kind, device, dtype)
    return rows


def print_step(row, kind, device, dtype):
    """A row of the table, for one kind of a model; completes its dictionary by tokens (images) per second and share."""
    name, cfg, seconds = row["name"], config(row["name"], kind), statistics.median(row["seconds"][kind])
    row["per_second"][kind] = speed = row["batch_size"] * (1 if name in IMAGES else cfg.max_len) / seconds
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else ""
    row["share"][kind] = share = None if name in IMAGES else flops.utilisation(cfg, speed, gpu, dtype)[1]
    times = ratio(row["seconds"], kind, "Transformer, compiled" if kind == "DAT, compiled" else "Transformer")
    memory = f"{row['memory'][kind] / 2 ** 30:.2f} GB" if kind in row["memory"] else "-"
    cells = (name, row["batch_size"], kind, f"{1e3 * seconds:,.1f} ms", f"{times:.2f} x", f"{speed:,.0f}", memory,
             f"{100 * share:.1f}%" if share else "-")
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def free_memory(device):
    """Bytes; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    if "SC_AVPHYS_PAGES" not in getattr(os, "sysconf_names", {}):    # not Linux
        return 0
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# ---- generation ------------------------------------------------------------------------------------------------------

def generation(o, device):
    """Tokens per second with and without a KV cache, in turns of 63 tokens until the context of 512 is full."""
    rows = []
    for kind, n_ra in (("Transformer 6+0", 0), ("DAT 3+3", 3)):
        torch.manual_seed(0)
        cfg = TransformerConfig(vocab_size=256, d_model=384, n_layers=6, n_heads=6, n_ra=n_ra, max_len=512,
                                n_symbols=512, symbol_heads=6)
        model, prompt = LanguageModel(cfg).to(device), torch.randint(256, (1, 8), device=device)
        texts, seconds = {True: [], False: []}, {True: 0.0, False: 0.0}
        streams = {cached: stream(model, prompt, 504, temperature=0, use_cache=cached) for cached in texts}
        for first in (True, False) * 4:                              # 8 turns
            for cached in (first, not first):
                tokens = streams[cached]
                start = now(device)
                texts[cached] += [token.item() for _, token in zip(range(63), tokens)]
                seconds[cached] += now(device) - start
        rows.append(dict(name=kind, tokens_per_second={str(cached): 504 / t for cached, t in seconds.items()},
                         same_text=texts[True] == texts[False]))
        with_cache, without = (504 / seconds[cached] for cached in (True, False))
        print(f"| {kind} | {with_cache:.1f} | {without:.1f} | {with_cache / without:.1f} x | "
              f"{'same' if rows[-1]['same_text'] else 'DIFFERENT'} |", flush=True)
    return rows


def main(argv=None):
    configs = parse_options(Options, argv=argv, grid={"n": LENGTHS})
    with one_line_errors():
        o = agreed(configs, [name for name in asdict(configs[0]) if name != "n"])
        device, dtype, why = training.choose_device(o.device, o.dtype)
        if o.memory and device.type != "cuda" and platform.system() != "Linux":
            raise ValueError("memory can be measured on Linux and on CUDA only: give --memory=False")
        if o.peer:
            try:
                import dual_attention                                # noqa: F401
            except ImportError:
                raise ValueError("--peer: pip install dual-attention einops") from None
    machine = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    machine = f"{machine}, {torch.get_num_threads()} threads"
    print(f"device: {why}; {machine}; torch {torch.__version__}")
    options = {name: value for name, value in asdict(o).items() if name not in ("n", "out_dir")}
    result = dict(machine=machine, torch=torch.__version__, options=options)
    if o.part in ("all", "attention"):
        tokens = [cfg.n for cfg in configs]
        tables = {"attention": (f"{o.n_ra} of {o.n_heads} heads, d_model {o.d_model}{', causal' * o.causal}",
                                lengths(o, tokens))}
        if tokens == LENGTHS:
            tables["shapes"] = "the relational heads of each model", models(o, device)
        for key, (heads, shapes) in tables.items():
            print(f"\nForward and backward of {heads}: time, relative to as many sensory heads; * marks the form that "
                  f"is chosen\n\n| | batch x n | " + " | ".join(cases(o)) + " |\n|" + "---|" * (len(cases(o)) + 2))
            result[key] = attention(o, shapes, device, dtype)
        if len(tokens) > 2:
            make_out_dir(o.out_dir)
            draw(result["attention"], Path(o.out_dir) / "scaling.png")
    if o.part in ("all", "step"):
        compile = o.compile or device.type == "cuda"
        if compile and (missing := training.no_compiler(device)):
            print(f"\n--compile: no working compiler here, so nothing is compiled ({missing})")
            compile = False
        print("\nA training step: time, relative to the Transformer (a compiled DAT: to the compiled Transformer)\n")
        print("| model | batch | | time | ratio | tokens or images/s | memory | of the peak |\n|" + "---|" * 8)
        result["step"] = steps(o, compile, device, dtype)
    if o.part in ("all", "generation"):
        print("\nGeneration of 504 tokens, d_model 384, 6 layers: tokens per second\n")
        print("| model | with cache | without | ratio | text |\n|---|---|---|---|---|")
        result["generation"] = generation(o, device)
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    start(main)
