"""Train a language model: a Dual Attention Transformer, then a standard Transformer of the same shape, side by side.

    python train_lm.py --n_ra=4                 4 sensory + 4 relational heads, then 8 + 0; curves in out/lm/curves.png
    python train_lm.py --n_ra=4 --seed=1,2,3    three seeds of each: means, bands and the paired difference
    python train_lm.py --data=shakespeare       another text: shakespeare, or the path of any UTF-8 file
    python train_lm.py --n_ra=0,2,4,8           a sweep; what was finished before is not run again
    python train_lm.py --preset=shakespeare     for a GPU: a larger model on Shakespeare, in nanoGPT's shape
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import compare
import training
from config import TransformerConfig, at_least
from data import text
from model import LanguageModel


@dataclass
class Config(TransformerConfig):
    n_symbols: int = 128                    # symbolic: size of the library; as many as the context is long (App. C.3)
    # what to read
    data: str = "torch"                     # torch (its source, built in), shakespeare (1.1 MB), or a UTF-8 file
    data_dir: str = "data/cache"            # where downloads are kept
    # how to train
    batch_size: int = 16                    # sequences in one forward pass
    grad_accum: int = 1                     # forward passes per step: the step sees batch_size * grad_accum sequences
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
    eval_windows: int = 300                 # validation sequences, always the same, spread evenly over the text
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
        at_least(self, batch_size=1, grad_accum=1, max_steps=1, learning_rate=0, min_lr=0, warmup_steps=0,
                 weight_decay=0, grad_clip=0, eval_every=1, eval_windows=1, log_every=1, seed=0, beta1=0, beta2=0)
        if max(self.beta1, self.beta2) >= 1 or self.seed >= 2 ** 63:
            raise ValueError(f"beta1={self.beta1} and beta2={self.beta2} must be below 1, seed={self.seed} below 2^63")
        if self.vocab_size != 256:
            raise ValueError(f"vocab_size={self.vocab_size}: text is read as bytes, so it is 256")


PRESETS = {
    "shakespeare": dict(data="shakespeare", d_model=384, n_layers=6, n_heads=6, n_ra=3, symbol_heads=6, max_len=256,
                        n_symbols=256, dropout=0.2, batch_size=64, max_steps=5000, learning_rate=1e-3, warmup_steps=100,
                        beta2=0.99, eval_every=250),
}


@torch.no_grad()
def evaluate(model, windows, device, dtype, batch_size):
    """Mean loss in nats per token over fixed windows, whatever the batch size."""
    model.eval()
    total = 0.0
    for x, y in zip(*(w.split(batch_size) for w in windows)):
        with training.autocast(device, dtype):
            _, loss = model(x.to(device), y.to(device))
        total += loss.item() * len(x)
    model.train()
    return total / len(windows[0])


def train(cfg, run, train_tokens, windows, device, dtype):
    """One run, from its first step or its last checkpoint to max_steps; leaves config.json, log.csv and checkpoints."""
    with training.one_line_errors():
        torch.manual_seed(cfg.seed)
        model = LanguageModel(cfg).to(device)
        optimizer = training.make_optimizer(model, cfg)
        run.begin(model, optimizer, device)
    print(f"\n{run.folder}: {cfg.n_sa} sensory + {cfg.n_ra} relational heads, "
          f"{run.record['n_parameters']:,} parameters")
    forward = torch.compile(model) if cfg.compile else model

    if run.step == 0:
        run.validated(val_loss=evaluate(model, windows, device, dtype, cfg.batch_size))
    for step in run.steps():
        training.reseed(cfg.seed, step)                               # for data order and dropout
        lr = training.learning_rate(step, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr
        x, y = text.batch(train_tokens, cfg.batch_size * cfg.grad_accum, cfg.max_len)          # (B grad_accum, T) each
        mean_loss = 0.0
        for x, y in zip(x.to(device).split(cfg.batch_size), y.to(device).split(cfg.batch_size)):         # (B, T)
            with training.autocast(device, dtype):
                _, loss = forward(x, y)
            (loss / cfg.grad_accum).backward()
            mean_loss += loss.item() / cfg.grad_accum
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or float("inf"))
        run.check(train_loss=mean_loss, gradient_norm=norm.item())    # stop before the weights are spoilt
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.step_done(mean_loss, lr)
        if run.validation_due():
            run.validated(val_loss=evaluate(model, windows, device, dtype, cfg.batch_size))


def print_sample(run, prompt="def "):
    """200 bytes from the run's last checkpoint: the same prompt and seed for every run."""
    checkpoint = training.load_checkpoint(run.folder / "last.pt")
    model = LanguageModel(run.cfg)
    model.load_state_dict(checkpoint["model"])
    torch.manual_seed(0)
    tokens = model.generate(text.encode(prompt), 200, temperature=0.8)
    print(f"\n--- a sample from {run.folder.name} ---\n{text.decode(tokens[0])}\n---")


def count_parameters(cfg):
    """How many the model will have."""
    with torch.device("meta"):                                        # shapes only, nothing allocated
        return sum(p.numel() for p in LanguageModel(cfg).parameters())


def main(argv=None):
    configs = training.parse_options(Config, PRESETS, argv)
    folders = []
    with training.one_line_errors():
        configs = training.with_baselines(configs, count_parameters)
    for cfg in configs:
        with training.one_line_errors():
            train_tokens, val_tokens, facts = text.load(cfg.data, cfg.data_dir, cfg.max_len)
            device, dtype, why = training.choose_device(cfg.device, cfg.dtype)
            if not folders:
                print(f"{text.describe(facts)}\ndevice: {why}")
            facts["dtype"] = str(dtype)                               # a result in bfloat16 is another one
            tokens_per_step = cfg.batch_size * cfg.grad_accum * cfg.max_len
            run = training.Run(cfg, ("train_lm.py", "data/text.py"), facts, tokens_per_step)
            reusable = run.reusable()
        if not reusable:
            windows = text.fixed_windows(val_tokens, cfg.max_len, cfg.eval_windows)
            train(cfg, run, train_tokens, windows, device, dtype)
            print_sample(run)
        folders.append(run.folder)
    compare.report(folders, Path(configs[0].out_dir))
    print("Short runs on text hardly tell the two apart; the paper's clear case is Relational Games: train_relgames.py")


if __name__ == "__main__":
    training.start(main)
