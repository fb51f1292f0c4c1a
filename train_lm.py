"""Train a language model: a Dual Attention Transformer, then a standard Transformer of the same shape, side by side.

    python train_lm.py --n_ra=4                   4 sensory + 4 relational heads, then 8 + 0; curves in out/lm
    python train_lm.py --n_ra=4 --seed=1,2,3      three seeds of each: means, bands and the paired difference
    python train_lm.py --data=shakespeare         another text: shakespeare, tinystories, or any UTF-8 file
    python train_lm.py --n_ra=0,2,4,8             a sweep; what was finished before is not run again
    python train_lm.py --preset=tinystories       for a GPU: the paper's small language models (1.9 GB of stories)
    torchrun --standalone --nproc_per_node=8 train_lm.py --preset=fineweb_350m      the large ones, on eight GPUs
"""
import math
from dataclasses import asdict, replace

import torch

from data.text import tokens
from extras.pretrained import is_published, load_pretrained
from model import LanguageModel, TransformerConfig, model_config, stream
from toolbox import checkpoints, distributed, figures, flops, training
from toolbox.checkpoints import load_checkpoint
from toolbox.figures.runs import final, load_run, speed
from toolbox.options import agreed, at_least, one_line_errors, options, parse_options, start
from toolbox.output import unfailing_output
from toolbox.run import Run

DEFAULTS = dict(n_symbols=128, max_steps=1000, learning_rate=3e-3, warmup_steps=50, weight_decay=0.1, beta2=0.95,
                grad_clip=1.0, out_dir="out/lm")


@options(**DEFAULTS)
class Config(training.TrainingOptions, TransformerConfig):
    vocab_size: int | None = None           # number of different tokens; default: the tokenizer's, rounded up
    dat_n_kv_heads: int | None = None       # key/value heads in each group of a DAT; default: as n_kv_heads
    dat_bias: bool | None = None            # biases in the MLP of a DAT; default: as bias
    # data
    data: str = "torch"                     # torch (its source, built in), shakespeare, tinystories, fineweb, or a path
    tokenizer: str = "auto"                 # bytes, chars, or tiktoken's: gpt2 ...; auto: see data/text/tokens.py
    first_mb: int | None = None             # learn from the first megabytes only; of tinystories only they are fetched
    n_shards: int | None = None             # fineweb: how many of the 99 shards of 100 million tokens to learn from
    # training
    batch_size: int = 16                    # sequences in a step, of max_len tokens each
    micro_batch: int | None = None          # sequences per forward pass and process; default: no splitting
    eval_every: int = 100                   # steps between validations, each with a checkpoint
    eval_windows: int | None = 300          # validation sequences, always the same, spread evenly; None: the whole text
    init_from: str = ""                     # start with these weights: a checkpoint, a run's folder, a published model

    def __post_init__(self):
        super().__post_init__()
        at_least(self, dat_n_kv_heads=1, first_mb=1, n_shards=1, batch_size=1, micro_batch=1, eval_every=1,
                 eval_windows=1)
        if self.batch_size % distributed.WORLD:
            raise ValueError(f"batch_size={self.batch_size} is not a multiple of the {distributed.WORLD} processes")

    @property
    def share(self):
        """Sequences of a step that each process reads."""
        return self.batch_size // distributed.WORLD


def make_model(cfg):
    return LanguageModel(model_config(asdict(cfg)))


def train(cfg, run, corpus, device, dtype, stop_requested):
    """One run, from its first step or its last checkpoint to max_steps."""
    with one_line_errors(), training.memory_errors():
        torch.manual_seed(cfg.seed)
        model = make_model(cfg).to(device)
        optimizer = training.make_optimizer(model, cfg)
        run.begin(model, optimizer, device, flops.per_token(model.cfg))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"\n{run.folder}: {cfg.n_sa} sensory + {cfg.n_ra} relational heads, "
          f"{run.record['n_parameters']:,} parameters, {trained:,} of them trained")
    forward = training.compiled(model, device, not cfg.micro_batch) if cfg.compile else model
    starts = tokens.fixed_starts(len(corpus.val), cfg.max_len, cfg.eval_windows)

    if run.step == 0:
        with run.paused():                                            # evaluation does not count as training time
            run.log(0, val_loss=evaluate(model, corpus.val, starts, cfg, device, dtype))
    for step in range(run.step + 1, cfg.max_steps + 1):
        lr = training.set_learning_rate(optimizer, step, cfg)
        training.reseed(cfg.seed, step)                               # for the data order, in all processes alike
        batch = tokens.random_starts(len(corpus.train), cfg.max_len, cfg.batch_size)
        if distributed.RANK:
            training.reseed(cfg.seed, step, distributed.RANK)         # for dropout: other sequences, other neurons
        mean_loss = 0.0
        mine = batch[distributed.RANK * cfg.share:][:cfg.share]
        for part in mine.split(cfg.micro_batch or cfg.share):
            x, y = corpus.train.windows(part, cfg.max_len)            # (B, T) each
            with training.autocast(device, dtype):
                _, loss = forward(training.to_device(x, device), training.to_device(y, device))
            loss = loss * len(part) / cfg.batch_size                  # its share of the mean over the whole batch
            loss.backward()
            mean_loss = mean_loss + loss.detach()
        distributed.sum_gradients(model)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.add(mean_loss, norm)

        if step % cfg.log_every == 0 or step == cfg.max_steps:
            run.log(step, **run.means(), lr=lr)
        if step % cfg.eval_every == 0 or step == cfg.max_steps:
            with run.paused():
                val_loss = evaluate(model, corpus.val, starts, cfg, device, dtype)
                run.log(step, val_loss=val_loss)
                if val_loss < run.best:
                    run.best = val_loss
                    run.save("best.pt", step, model, optimizer)
                run.save("last.pt", step, model, optimizer)
        if stop_requested():                                          # Ctrl-C or SIGTERM
            run.save("last.pt", step, model, optimizer)
            run.stop(step)
    run.finish()


@torch.no_grad()
def evaluate(model, val, starts, cfg, device, dtype):
    """Mean loss in nats per token over the windows of `val` that begin at `starts`."""
    model.eval()
    nats = n_tokens = 0
    mine = starts[distributed.RANK::distributed.WORLD]
    for part in mine.split(cfg.micro_batch or cfg.share) if len(mine) else ():
        x, y = val.windows(part, cfg.max_len)                         # (B, T) each
        with training.autocast(device, dtype):
            _, loss = model(x.to(device), y.to(device))
        n = (y >= 0).sum().item()                                     # the last window of a text may be shorter
        nats, n_tokens = nats + loss.item() * n, n_tokens + n
    model.train()
    nats, n_tokens = distributed.total([nats, n_tokens])
    return nats / n_tokens


def summarise(run, corpus, device, dtype):
    """The loss in other units, the speed, and 200 tokens from the last checkpoint: the same prompt for every run."""
    record = load_run(run.folder)
    loss, tokens_per_s = final(record, "val_loss"), speed(record)
    print(f"{run.folder.name}: validation loss {loss:.4f} nats per token, perplexity {math.exp(loss):.3f}, "
          f"{loss / math.log(2) / corpus.facts['bytes_per_token']:.4f} bits per byte")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"{tokens_per_s:,.0f} tokens/s; " + f"in each of {distributed.WORLD} processes " * (distributed.WORLD > 1)
          + flops.describe(model_config(asdict(run.cfg)), tokens_per_s / distributed.WORLD, name, dtype))
    model = make_model(run.cfg).to(device)
    model.load_state_dict(load_checkpoint(run.folder / "last.pt")["model"])
    torch.manual_seed(0)
    prompt = corpus.val[0:16].tolist()                                # the beginning of the validation text
    new = stream(model, torch.tensor([prompt], device=device), 200, temperature=0.8,
                 vocab_size=corpus.tokenizer.vocab_size)
    text = corpus.tokenizer.decode([*prompt, *(token.item() for token in new)]).decode(errors="replace")
    print(f"--- a sample ---\n{text}\n---")


def initial_weights(name, corpus, data_dir):
    """The weights that --init_from names, of one of our checkpoints or of a published one."""
    if is_published(name):
        source = load_pretrained(name, data_dir)
        initial = checkpoints.initial_weights(name, source.state_dict(), asdict(source.cfg), {"tokenizer": "gpt2"})
    else:
        initial = checkpoints.load_initial(name)
    for fact in ("tokenizer", "alphabet"):
        if initial["facts"].get(fact) != corpus.facts.get(fact):
            raise ValueError(f"init_from={name}: it was trained on other tokens, of another {fact}: "
                             f"{initial['facts'].get(fact)!r}, not {corpus.facts.get(fact)!r}")
    return initial


def padded_vocab_size(n):
    """GPT-2's 50,257 tokens become 50,304: matrices whose sides are multiples of 64 are much faster on a GPU."""
    return n if n < 1000 else -(-n // 64) * 64


def prepare(argv):
    """-> the runs to make, their corpus, device and dtype. Whatever can be wrong is found here."""
    configs = parse_options(Config, PRESETS, argv)
    first = agreed(configs, ("data", "tokenizer", "first_mb", "n_shards", "data_dir", "out_dir", "device", "dtype",
                             "vocab_size", "init_from"))
    corpus = tokens.load(first.data, first.tokenizer, first.data_dir, first_mb=first.first_mb, n_shards=first.n_shards)
    needed = corpus.tokenizer.vocab_size
    vocab_size = first.vocab_size or padded_vocab_size(needed)
    if vocab_size < needed:
        raise ValueError(f"vocab_size={vocab_size}: {corpus.tokenizer.name} has {needed} tokens")
    # a text is identified by its name and checksum, not by its path
    configs = [replace(cfg, data=corpus.name, vocab_size=vocab_size) for cfg in configs]
    configs = training.with_baselines(configs, make_model)
    for cfg in configs:
        corpus.check(cfg.max_len)
    device, dtype, why = training.choose_device(first.device, first.dtype)
    distributed.check(device)
    print(f"{corpus.describe()}\ndevice: {why}")
    return configs, corpus, device, dtype


@unfailing_output()
def main(argv=None):
    distributed.start()
    with one_line_errors():
        configs, corpus, device, dtype = prepare(argv)
        path, data_dir = configs[0].init_from, configs[0].data_dir
        initial = initial_weights(path, corpus, data_dir) if path else None
        runs = [Run(cfg, {**corpus.facts, "dtype": str(dtype)}, unit="tokens", per_step=cfg.batch_size * cfg.max_len,
                    metrics=("val_loss",), initial=initial) for cfg in configs]
    for cfg, run in zip(configs, runs):
        if run.reusable():
            continue
        at_a_time = min(cfg.micro_batch or cfg.share, cfg.share)
        with run, training.stop_on_signal() as stop_requested, training.memory_errors(at_a_time):
            train(cfg, run, corpus, device, dtype, stop_requested)
        if distributed.RANK == 0:
            summarise(run, corpus, device, dtype)
    if distributed.RANK == 0:
        with one_line_errors():
            figures.report([run.folder for run in runs], configs[0].out_dir, configs[0].paper)
    if all(cfg.n_ra for cfg in configs):
        print("For the Transformer beside it, repeat the command with --baseline; what is finished is reused.")
    distributed.end()


# ---- published models ------------------------------------------------------------------------------------------------

# The published pairs (v3) differ in more than their heads: the DATs have fewer key/value heads, and biases in the MLP.
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
    # paper: 32,000 tokens of Llama's tokenizer; here: GPT-2's, because Llama's needs a licence and sentencepiece.
    # The relations' width is ours; --rel_proj_dim gives the published one: docs/differences.md
    "tinystories": dict(data="tinystories", tokenizer="gpt2", d_model=64, n_layers=4, activation="swiglu", dropout=0.1,
                        max_len=512, n_symbols=512, batch_size=256, micro_batch=32, max_steps=100_000,
                        learning_rate=1e-3, schedule="constant", warmup_steps=0, eval_every=2000, eval_windows=None,
                        log_every=100, baseline=False),
    # for two cores: the smallest of them, a short run; bytes, because 50,257 logits would take most of the time
    "tinystories_small": dict(data="tinystories", first_mb=10, tokenizer="bytes", d_model=64, activation="swiglu",
                              dropout=0.1, max_len=256, n_symbols=256, learning_rate=1e-3, schedule="constant",
                              warmup_steps=0),
    "fineweb_350m": dict(FINEWEB, d_model=1024, n_heads=16, n_ra=8, dat_n_kv_heads=4),
    "fineweb_750m": dict(FINEWEB, d_model=1536, n_heads=24, n_ra=12, dat_n_kv_heads=6),
    "fineweb_1b": dict(FINEWEB, d_model=2048, n_heads=32, n_ra=16, dat_n_kv_heads=8, n_symbols=2048, symbol_heads=16,
                       n_relations=128, micro_batch=4),
}

if __name__ == "__main__":
    start(main)
