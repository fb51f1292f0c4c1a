"""Train a language model: a Dual Attention Transformer, then a standard Transformer of the same shape, side by side.

    python train_lm.py --n_ra=4                   4 sensory + 4 relational heads, then 8 + 0; curves in out/lm
    python train_lm.py --n_ra=4 --seed=1,2,3      three seeds of each: means, bands and the paired difference
    python train_lm.py --data=shakespeare         another text: shakespeare, tinystories, or any UTF-8 file
    python train_lm.py --n_ra=0,2,4,8             a sweep; what was finished before is not run again
    python train_lm.py --preset=tinystories       for a GPU: the paper's small language models (1.9 GB of stories)
    torchrun --standalone --nproc_per_node=8 train_lm.py --preset=fineweb_350m      the large ones, on eight GPUs
"""
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

import compare
from toolbox import distributed
from extras import flops
from toolbox import training
from config import TransformerConfig, at_least, model_config
from data.text import tokens
from generation import stream
from model import LanguageModel

CODE = ("train_lm.py", "toolbox/distributed.py",
        *(f"data/text/{name}.py" for name in ("sources", "tokens", "tokenizers", "fineweb")))


@dataclass
class Config(TransformerConfig):
    vocab_size: int | None = None           # number of different tokens; default: the tokenizer's, made round
    n_symbols: int = 128                    # symbolic: size of the library; as many as the context is long (App. C.3)
    dat_n_kv_heads: int | None = None       # key/value heads in each group of a DAT; default: as n_kv_heads
    dat_bias: bool | None = None            # biases in the MLP of a DAT; default: as bias
    # what to read
    data: str = "torch"                     # torch (its source, built in), shakespeare, tinystories, fineweb, or a path
    tokenizer: str = "auto"                 # bytes, chars, or tiktoken's: gpt2 ...; auto: see data/tokens.py
    first_mb: int | None = None             # learn from the first megabytes only; of tinystories only they are fetched
    n_shards: int | None = None             # fineweb: how many of the 99 shards of 100 million tokens to learn from
    data_dir: str = "data/cache"            # where downloads and tokens are kept
    # how to train
    batch_size: int = 16                    # sequences in a step, of max_len tokens each
    micro_batch: int | None = None          # how many of them at a time, in each process; default: all of its share
    max_steps: int = 1000                   # optimizer steps, and the horizon of the schedule
    learning_rate: float = 3e-3             # at its peak
    min_lr: float | None = None             # where the cosine ends; default learning_rate / 10
    schedule: Literal["cosine", "constant"] = "cosine"   # after the warm-up
    warmup_steps: int = 50                  # linear warm-up
    weight_decay: float = 0.1               # on tensors of two or more dimensions
    beta1: float = 0.9                      # AdamW
    beta2: float = 0.95                     # AdamW
    grad_clip: float = 1.0                  # largest gradient norm; 0: no clipping
    # how to look at it
    eval_every: int = 100                   # steps between validations, each with a checkpoint
    eval_windows: int | None = 300          # validation sequences, always the same, spread evenly; None: the whole text
    log_every: int = 20                     # steps between rows of log.csv
    # how to run it
    seed: int = 1                           # of weights, data order and dropout; 1,2,3: one run each
    device: str = "auto"                    # auto: cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"   # of matrix products; auto: bfloat16 on GPUs that have it
    compile: bool = False                   # torch.compile: faster steps after a slow start
    out_dir: str = "out/lm"                 # a folder for each run, and the figure of them all
    resume: bool = False                    # go on with an interrupted run from its last checkpoint
    baseline: bool = True                   # after a DAT, train the Transformer with as many heads
    match_params: bool = False              # give the baseline the d_ff that makes parameter counts agree within 1%

    def __post_init__(self):
        super().__post_init__()
        at_least(self, dat_n_kv_heads=1, first_mb=1, n_shards=1, batch_size=1, micro_batch=1, max_steps=1,
                 learning_rate=0, min_lr=0, warmup_steps=0, weight_decay=0, grad_clip=0, eval_every=1, eval_windows=1,
                 log_every=1, seed=0, beta1=0, beta2=0)
        if max(self.beta1, self.beta2) >= 1 or self.seed >= 2 ** 63:
            raise ValueError(f"beta1={self.beta1} and beta2={self.beta2} must be below 1, seed={self.seed} below 2^63")
        if self.batch_size % distributed.WORLD:
            raise ValueError(f"batch_size={self.batch_size} is not a multiple of the {distributed.WORLD} processes")


# Published pairs (v3) differ in more than their heads: the DATs have fewer key/value heads, and biases in the MLP
FINEWEB = dict(data="fineweb", n_layers=24, max_len=1024, activation="gelu_tanh", norm_bias=True, dat_bias=True,
               attention_bias="none", trainable_symbols=False, n_symbols=1024, symbol_heads=8,
               n_relations=64, batch_size=512, micro_batch=8, max_steps=19_073, learning_rate=6e-4, warmup_steps=715,
               eval_every=250, eval_windows=10_240, log_every=10, baseline=False)
PRESETS = {
    # nanoGPT's character-level shape, in bytes: for a GPU
    "shakespeare": dict(data="shakespeare", d_model=384, n_layers=6, n_heads=6, n_ra=3, symbol_heads=6, max_len=256,
                        n_symbols=256, dropout=0.2, batch_size=64, max_steps=5000, learning_rate=1e-3, warmup_steps=100,
                        beta2=0.99, eval_every=250),
    # Figure 4 and Table 1: also --n_layers=5,6, --d_model=128 --n_layers=4,6, --n_ra=0,2,4
    # paper: 32,000 tokens of Llama's tokenizer; here: GPT-2's, which anyone may download
    "tinystories": dict(data="tinystories", tokenizer="gpt2", d_model=64, n_layers=4, activation="swiglu", dropout=0.1,
                        max_len=512, n_symbols=512, batch_size=256, micro_batch=32, max_steps=100_000,
                        learning_rate=1e-3, schedule="constant", warmup_steps=0, eval_every=2000, eval_windows=None,
                        log_every=100, baseline=False),
    # on two cores: the smallest of them in short; bytes, because most of the time would go into 50,257 logits
    "tinystories_small": dict(data="tinystories", first_mb=10, tokenizer="bytes", d_model=64, activation="swiglu",
                              dropout=0.1, max_len=256, n_symbols=256, learning_rate=1e-3, schedule="constant",
                              warmup_steps=0),
    "fineweb_350m": dict(FINEWEB, d_model=1024, n_heads=16, n_ra=8, dat_n_kv_heads=4),
    "fineweb_750m": dict(FINEWEB, d_model=1536, n_heads=24, n_ra=12, dat_n_kv_heads=6),
    "fineweb_1b": dict(FINEWEB, d_model=2048, n_heads=32, n_ra=16, dat_n_kv_heads=8, n_symbols=2048, symbol_heads=16,
                       n_relations=128, micro_batch=4),
}


def padded_vocab_size(n):
    """GPT-2's 50,257 tokens become 50,304: matrices whose sides are multiples of 64 are much faster on a GPU."""
    return n if n < 1000 else -(-n // 64) * 64


def make_model(cfg):
    return LanguageModel(model_config(asdict(cfg)))


def count_parameters(cfg):
    """How many the model will have."""
    with torch.device("meta"):                                        # shapes only, nothing allocated
        return sum(p.numel() for p in make_model(cfg).parameters())


@torch.no_grad()
def evaluate(model, val, starts, cfg, device, dtype):
    """Mean loss in nats per token over the windows of `val` that begin at `starts`, whatever the batch size."""
    model.eval()
    nats = n_tokens = 0
    mine = starts[distributed.RANK::distributed.WORLD]
    for part in mine.split(cfg.micro_batch or cfg.batch_size // distributed.WORLD) if len(mine) else ():
        x, y = val.windows(part, cfg.max_len)                         # (B, T) each
        with training.autocast(device, dtype):
            _, loss = model(x.to(device), y.to(device))
        n = (y >= 0).sum().item()                                     # the last window of a text may be shorter
        nats, n_tokens = nats + loss.item() * n, n_tokens + n
    model.train()
    nats, n_tokens = distributed.total([nats, n_tokens])
    return nats / n_tokens


def train(cfg, run, corpus, device, dtype):
    """One run, from its first step or its last checkpoint to max_steps; leaves config.json, log.csv and checkpoints."""
    share = cfg.batch_size // distributed.WORLD                       # sequences of a step that this process reads
    micro = min(cfg.micro_batch or share, share)
    with training.one_line_errors(), training.memory_errors():
        torch.manual_seed(cfg.seed)
        model = make_model(cfg).to(device)
        optimizer = training.make_optimizer(model, cfg)
        run.begin(model, optimizer, device)
    n, trained = count_parameters(cfg), sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"\n{run.folder}: {cfg.n_sa} sensory + {cfg.n_ra} relational heads, {n:,} parameters"
          + f", {trained:,} of them trained" * (trained < n))
    forward = torch.compile(model) if cfg.compile else model
    starts = tokens.fixed_starts(len(corpus.val), cfg.max_len, cfg.eval_windows)

    if run.step == 0:
        run.validated(val_loss=evaluate(model, corpus.val, starts, cfg, device, dtype))
    for step in run.steps():
        training.reseed(cfg.seed, step)                               # for the data order, in all processes alike
        lr = training.learning_rate(step, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = tokens.random_starts(len(corpus.train), cfg.max_len, cfg.batch_size)
        if distributed.RANK:
            training.reseed(cfg.seed, step, distributed.RANK)         # for dropout: other sequences, other neurons
        mean_loss = 0.0
        for part in batch[distributed.RANK * share:][:share].split(micro):
            x, y = corpus.train.windows(part, cfg.max_len)            # (B, T) each
            with training.autocast(device, dtype):
                _, loss = forward(x.to(device), y.to(device))
            weight = len(part) / cfg.batch_size                       # of these sequences in the mean over the step's
            (loss * weight).backward()
            mean_loss += loss.item() * weight
        distributed.sum_gradients(model)
        mean_loss, = distributed.total([mean_loss])
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or float("inf"))
        run.check(train_loss=mean_loss, gradient_norm=norm.item())    # stop before the weights are spoilt
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.step_done(mean_loss, lr)
        if run.validation_due():
            run.validated(val_loss=evaluate(model, corpus.val, starts, cfg, device, dtype))


def summarise(run, corpus, device, dtype):
    """The loss in other units, the speed, and 200 tokens from the last checkpoint: the same prompt for every run."""
    record = compare.load_run(run.folder)
    loss, speed = compare.final(record, "val_loss"), compare.speed(record)
    print(f"{run.folder.name}: validation loss {loss:.4f} nats per token, perplexity {math.exp(loss):.3f}, "
          f"{loss / math.log(2) / corpus.facts['bytes_per_token']:.4f} bits per byte")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"{speed:,.0f} tokens/s; " + f"in each of {distributed.WORLD} processes " * (distributed.WORLD > 1)
          + flops.describe(model_config(asdict(run.cfg)), speed / distributed.WORLD, name, dtype))
    model = make_model(run.cfg).to(device)
    model.load_state_dict(training.load_checkpoint(run.folder / "last.pt")["model"])
    torch.manual_seed(0)
    prompt = corpus.val[0:16].tolist()                                # how the validation text begins
    new = stream(model, torch.tensor([prompt], device=device), 200, temperature=0.8,
                 vocab_size=corpus.tokenizer.vocab_size)
    text = corpus.tokenizer.decode([*prompt, *(token.item() for token in new)]).decode(errors="replace")
    print(f"--- a sample ---\n{text}\n---")


def main(argv=None):
    distributed.start()
    with training.one_line_errors():
        configs = training.parse_options(Config, PRESETS, argv)
        first = training.agreed(configs, ("data", "tokenizer", "first_mb", "n_shards", "data_dir", "out_dir", "device",
                                          "dtype", "vocab_size"))
        corpus = tokens.load(first.data, first.tokenizer, first.data_dir, first_mb=first.first_mb,
                             n_shards=first.n_shards)
        needed = corpus.tokenizer.vocab_size
        vocab_size = first.vocab_size or padded_vocab_size(needed)
        if vocab_size < needed:
            raise ValueError(f"vocab_size={vocab_size}: {corpus.tokenizer.name} has {needed} tokens")
        # the same text in another place is the same: its name and checksum tell runs apart, and not its path
        configs = [replace(cfg, data=corpus.name, vocab_size=vocab_size) for cfg in configs]
        configs = training.with_baselines(configs, count_parameters)
        for cfg in configs:
            corpus.check(cfg.max_len)
            count_parameters(cfg)                                     # what cannot be built is found before training
        device, dtype, why = training.choose_device(first.device, first.dtype)
        distributed.check(device)
        print(f"{corpus.describe()}\ndevice: {why}")
    folders = []
    for cfg in configs:
        with training.one_line_errors():
            facts = {**corpus.facts, "dtype": str(dtype)}             # a result in bfloat16 is another one
            run = distributed.Run(cfg, CODE, facts, cfg.batch_size * cfg.max_len)
            reusable = run.reusable()
        if not reusable:
            share = cfg.batch_size // distributed.WORLD
            with training.memory_errors(min(cfg.micro_batch or share, share)):
                train(cfg, run, corpus, device, dtype)
            if distributed.RANK == 0:
                summarise(run, corpus, device, dtype)
        folders.append(run.folder)
    if distributed.RANK == 0:
        compare.report(folders, Path(first.out_dir))
    if all(cfg.n_ra for cfg in configs):
        print("For the Transformer beside it, repeat the command with --baseline; what is finished is reused.")
    print("Short runs on text hardly tell the two apart; the paper's clear case is Relational Games: train_relgames.py")
    distributed.end()


if __name__ == "__main__":
    training.start(main)
