"""What relational attention costs: time and memory compared with self-attention, in a training step, in generation.

    python -m extras.bench                                       everything: a quarter of an hour on two cores
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
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from attention import Attention
from model import LanguageModel, TransformerConfig, VisionTransformer, stream
from relational_attention import RelationalAttention
from toolbox import training
from toolbox.options import agreed, at_least, one_line_errors, parse_options, start

import matplotlib.pyplot as plt                                      # noqa: E402  (after toolbox: without a display)


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
    # part=step: the models
    model: str = ""                         # only those with this in their name: tiny, d64 ...
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
    names, seconds = list(candidates), {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name in names[turn % len(names):] + names[:turn % len(names)]:
            start = now(device)
            candidates[name]()
            if turn:
                seconds[name].append(now(device) - start)
    return seconds


def ratio(seconds, name, base):
    """The median over turns of the time of `name` divided by that of `base`."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base]))


def now(device):
    """Seconds on a clock, after all work on the device has finished."""
    if device.type in ("cuda", "mps"):                               # calls return before their work is done
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def peak_memory(case, options, n):
    """Bytes beyond the inputs that attention of n tokens, forward and backward, needs at its peak."""
    device, dtype, _ = training.choose_device(options.device, options.dtype)
    small, large = (attention_case(case, options, length, device, dtype) for length in (16, n))
    small()                                                          # allocates what is needed at any length
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        large()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_bytes(b"5")                   # Linux: resets the peak, VmHWM
    before = memory_of_process("VmRSS")
    large()
    return memory_of_process("VmHWM") - before


def memory_of_process(line):
    """Bytes of this process on Linux, VmRSS: now; VmHWM: at the peak."""
    return int(re.search(rf"{line}:\s+(\d+) kB", Path("/proc/self/status").read_text("ascii"))[1]) * 1024


# ---- attention -------------------------------------------------------------------------------------------------------

CASES = ("self-attention", "literal", "fast", "blocked", "authors")


def cases(o):
    return CASES if o.peer else CASES[:-1]


def attention_case(case, o, n, device, dtype):
    """A function that runs these heads on (batch_size, n, d_model) once, forward and backward."""
    torch.manual_seed(0)
    x, symbols = (torch.randn(o.batch_size, n, o.d_model, device=device).requires_grad_() for _ in range(2))
    options = {"causal": o.causal}
    if case == "authors":
        from dual_attention.relational_attention import RelationalAttention as Theirs
        m, options = Theirs(o.d_model, o.n_ra, total_n_heads=o.n_heads), {"is_causal": o.causal}
    elif case == "self-attention":
        m = Attention(o.d_model, o.n_ra, total_heads=o.n_heads)
    else:
        m = RelationalAttention(o.d_model, o.n_ra, total_heads=o.n_heads)
        m.choose_form = lambda *shapes: getattr(m, case)
    m = m.to(device)

    def run():
        with training.autocast(device, dtype):
            out = m(x, *(() if case == "self-attention" else (symbols,)), **options)
        out = out[0] if isinstance(out, tuple) else out
        m.zero_grad()
        x.grad = symbols.grad = None
        out.float().sum().backward()
    return run


def chosen(o, n, device):
    """The name of the form that RelationalAttention chooses for n tokens."""
    m = RelationalAttention(o.d_model, o.n_ra, total_heads=o.n_heads)
    q = torch.empty(o.batch_size, o.n_ra, n, o.d_model // o.n_heads, device=device)
    return m.choose_form(q, q).__name__


def cell(row, case):
    """A cell of the table: time relative to self-attention, megabytes, and a star at the form that is chosen."""
    if case not in row["seconds"]:
        return ""
    seconds = row["seconds"]
    time = (f"{1e3 * statistics.median(seconds[case]):,.1f} ms" if case == "self-attention"
            else f"{ratio(seconds, case, 'self-attention'):.2f} x")
    memory = f", {row['memory'][case] / 2 ** 20:,.0f} MB" if case in row["memory"] else ""
    return time + memory + (" *" if case == row["chosen"] else "")


def attention(o, lengths, device, dtype):
    """A dictionary for each length: seconds and bytes of each case, and the form that is chosen."""
    rows = []
    for n in lengths:
        # cases that materialise weights and relations are skipped where these would take more than 4 GB
        fits = o.batch_size * o.n_ra * 2 * n * n <= 2 ** 30
        measured = [case for case in cases(o) if fits or case not in ("literal", "authors")]
        seconds = alternate({case: attention_case(case, o, n, device, dtype) for case in measured}, o.repeats, device)
        memory = {}
        for case in measured if o.memory else ():
            if device.type == "cuda":
                memory[case] = peak_memory(case, o, n)
            else:
                with get_context("spawn").Pool(1) as process:
                    memory[case] = process.apply(peak_memory, (case, o, n))
        rows.append(dict(n=n, chosen=chosen(o, n, device), seconds=seconds, memory=memory))
        print(f"| {n} | " + " | ".join(cell(rows[-1], case) for case in cases(o)) + " |", flush=True)
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

STORIES = dict(max_len=512, n_symbols=512, activation="swiglu", vocab_size=32_000)  # as in the paper, without dropout
STEPS = {       # name: (options of both models, further ones of the DAT, further ones of the Transformer, batch size)
    "tiny: train_lm.py's default": (dict(vocab_size=256, n_symbols=128), {}, {}, 16),
    "tinystories d64 L4": (dict(STORIES, d_model=64, n_layers=4), {}, {}, 8),
    "tinystories d64 L4, 256 tokens": (dict(STORIES, d_model=64, n_layers=4, vocab_size=256), {}, {}, 8),
    "tinystories d128 L6": (dict(STORIES, d_model=128, n_layers=6), {}, {}, 8),
    "tinystories d128 L6, 256 tokens": (dict(STORIES, d_model=128, n_layers=6, vocab_size=256), {}, {}, 8),
    "cifar10": (dict(d_model=384, n_layers=8, n_heads=12, n_ra=6, d_ff=384, position="learned", symbols="relative",
                     symmetric=True, bias=True), dict(n_kv_heads=3, attention_bias="none"),
                dict(attention_bias="output"), 32),
    "fineweb_350m": (dict(vocab_size=50_304, d_model=1024, n_layers=24, n_heads=16, n_ra=8, max_len=1024,
                          n_symbols=1024, symbol_heads=8, n_relations=64, activation="gelu_tanh", norm_bias=True,
                          attention_bias="none", trainable_symbols=False), dict(n_kv_heads=4, bias=True), {}, 1),
}


def step_case(name, kind, device, dtype):
    """A function that takes one training step of the model: forward, backward, AdamW."""
    options, dat, transformer, B = STEPS[name]
    torch.manual_seed(0)
    cfg = TransformerConfig(**{**options, **(dict(transformer, n_ra=0) if kind == "Transformer" else dat)})
    if name == "cifar10":
        model = VisionTransformer(cfg, image_size=32, patch_size=4, n_classes=10, pool="mean_cls")
        batch = torch.randn(B, 3, 32, 32), torch.randint(10, (B,))
    else:
        model = their_model(cfg) if kind == "authors' DAT" else LanguageModel(cfg)
        batch = torch.randint(cfg.vocab_size, (2, B, cfg.max_len)).unbind()
    model, batch = model.to(device), [x.to(device) for x in batch]
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def run():
        with training.autocast(device, dtype):
            _, loss = model(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return run


def their_model(cfg):
    """The authors' language model of the same shape."""
    from dual_attention.language_models import DualAttnTransformerLM
    return DualAttnTransformerLM(
        cfg.vocab_size, cfg.d_model, cfg.n_layers, cfg.n_sa, cfg.n_ra, dropout_rate=0.0, activation=cfg.activation,
        symbol_retrieval_kwargs=dict(d_model=cfg.d_model, n_heads=cfg.symbol_heads, n_symbols=cfg.n_symbols),
        dff=8 * cfg.d_model // 3 if cfg.activation == "swiglu" else 4 * cfg.d_model, norm_first=True,
        max_block_size=cfg.max_len, pos_enc_type="RoPE", bias=cfg.bias)


def steps(o, device, dtype):
    """A dictionary for each model: seconds of a training step of the Transformer and of the DAT."""
    rows = []
    for name, (*_, B) in STEPS.items():
        if o.model not in name:
            continue
        if name == "fineweb_350m" and free_memory(device) < 16e9:    # two models with two moments and a gradient each
            print(f"| {name} | skipped: it needs 16 GB of free memory |")
            continue
        theirs = ["authors' DAT"] * (o.peer and name not in ("cifar10", "fineweb_350m"))
        seconds = alternate({kind: step_case(name, kind, device, dtype) for kind in ["Transformer", "DAT", *theirs]},
                            o.repeats, device)
        rows.append(dict(name=name, batch_size=B, seconds=seconds))
        ratios = [f"{ratio(seconds, kind, 'Transformer'):.2f} x" if kind in seconds else ""
                  for kind in ["DAT"] + ["authors' DAT"] * o.peer]
        print(f"| {name} | {B} | {1e3 * statistics.median(seconds['Transformer']):,.0f} ms | " + " | ".join(ratios)
              + " |", flush=True)
    return rows


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
    configs = parse_options(Options, argv=argv, grid={"n": [128, 256, 512, 1024, 2048, 4096, 8192]})
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
        print(f"\nForward and backward of {o.n_ra} of {o.n_heads} heads, d_model {o.d_model}, batch {o.batch_size}"
              f"{', causal' * o.causal}: time, relative to self-attention; * marks the form that is chosen\n")
        print("| n | " + " | ".join(cases(o)) + " |\n|" + "---|" * (len(cases(o)) + 1))
        result["attention"] = attention(o, [cfg.n for cfg in configs], device, dtype)
        if len(configs) > 2:
            Path(o.out_dir).mkdir(parents=True, exist_ok=True)
            draw(result["attention"], Path(o.out_dir) / "scaling.png")
    if o.part in ("all", "step"):
        print("\nA training step: time, relative to the Transformer\n")
        print("| model | batch | Transformer | DAT |" + " authors' DAT |" * o.peer + "\n|" + "---|" * (4 + o.peer))
        result["step"] = steps(o, device, dtype)
    if o.part in ("all", "generation"):
        print("\nGeneration of 504 tokens, d_model 384, 6 layers: tokens per second\n")
        print("| model | with cache | without | ratio | text |\n|---|---|---|---|---|")
        result["generation"] = generation(o, device)
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    start(main)
