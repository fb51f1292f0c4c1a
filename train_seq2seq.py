"""Train encoder-decoders on school mathematics, character by character: Dual Attention Transformer and Transformer.

    python train_seq2seq.py                                    both on one built-in module, curves in out/seq2seq
    python train_seq2seq.py --module=all --seed=1,2,3          the five modules one after the other, three seeds each
    python train_seq2seq.py --n_ra_decoder=4,0                 relational heads everywhere, or in the encoder only
    python train_seq2seq.py --data=archive --preset=config2    the paper's data (2.3 GB are read through) and training

Accuracy is measured in two ways: the share of an answer's characters that are right given the true ones before them
(the paper's), and the share of answers that are right as a whole when the model writes them alone (the benchmark's).
"""
import csv
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

import accuracy_curves
import compare
import training
from config import TransformerConfig, at_least
from data import mathematics
from data.mathematics import END, LONGEST_ANSWER, MODULES, PAD, START
from model import Seq2SeqTransformer

METRICS = ("val_loss", "char_accuracy", "exact_match")
SCORED = 1000                               # problems of each level on which a finished model is scored


@dataclass
class Config(TransformerConfig):
    # the paper's model
    vocab_size: int = mathematics.VOCAB_SIZE    # characters
    n_layers: int = 2                       # of the encoder
    n_layers_decoder: int | None = None     # default: as the encoder
    n_ra_decoder: int | None = None         # relational among the decoder's n_heads; default: as the encoder, n_ra
    d_ff: int | None = 256                  # width of the MLP
    max_len: int = mathematics.LONGEST_QUESTION   # longest sequence
    activation: Literal["relu", "gelu", "gelu_tanh", "silu", "swiglu"] = "relu"    # of the MLP
    norm_first: bool = False                # post-norm, Algorithms 2 and 3
    final_norm: bool = False                # one more norm after the last block
    bias: bool = True                       # biases in projections, MLP and LayerNorm
    position: Literal["rope", "learned", "sinusoidal"] = "sinusoidal"    # how tokens know their place
    symbols: Literal["symbolic", "relative", "positional"] = "relative"  # who is the sender? see symbols.py
    # what to learn
    module: Literal[(*MODULES, "all")] = "algebra__sequence_next_term"   # of the benchmark; all: one after the other
    level: Literal["easy", "medium", "hard", "all"] = "easy"             # size of the numbers
    data: str = "generated"                 # generated (built in), archive (the published files), or a folder like it
    data_dir: str = "data/cache"            # where downloads are kept
    train_size: int = 100_000               # generated: training problems
    val_size: int = 200                     # validation problems of each level
    test_data: str = ""                     # score the trained models on the published files in this folder, too
    # how to train
    batch_size: int = 32                    # problems in one step
    max_steps: int = 2000                   # optimizer steps, and the horizon of the schedule
    learning_rate: float = 1e-3             # at its peak
    min_lr: float | None = None             # where the cosine ends; default learning_rate / 10
    schedule: Literal["cosine", "constant"] = "cosine"   # after the warm-up
    warmup_steps: int = 100                 # linear warm-up
    weight_decay: float = 0.0               # on tensors of two or more dimensions; 0: Adam
    beta1: float = 0.9                      # Adam
    beta2: float = 0.995                    # Adam
    grad_clip: float = 0.0                  # largest gradient norm; 0: no clipping
    # how to look at it
    eval_every: int = 250                   # steps between validations, each with a checkpoint
    log_every: int = 50                     # steps between rows of log.csv
    # how to run it
    seed: int = 1                           # of weights, data order and dropout; 1,2,3: one run each
    device: str = "auto"                    # auto: cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"   # of matrix products; auto: bfloat16 on GPUs that have it
    compile: bool = False                   # torch.compile: faster steps after a slow start
    out_dir: str = "out/seq2seq"            # a folder for each run, and the figure of them all
    resume: bool = False                    # go on with an interrupted run from its last checkpoint
    baseline: bool = True                   # after a DAT, train the Transformer with as many heads
    match_params: bool = False              # give the baseline the d_ff that makes parameter counts agree within 1%
    paper: bool = False                     # draw the published curves behind ours

    def __post_init__(self):
        super().__post_init__()
        at_least(self, n_layers_decoder=1, n_ra_decoder=0, train_size=1, val_size=1, batch_size=1, max_steps=1,
                 learning_rate=0, min_lr=0, warmup_steps=0, weight_decay=0, grad_clip=0, eval_every=1, log_every=1,
                 seed=0, beta1=0, beta2=0)
        if max(self.beta1, self.beta2) >= 1 or self.seed >= 2 ** 63:
            raise ValueError(f"beta1={self.beta1} and beta2={self.beta2} must be below 1, seed={self.seed} below 2^63")
        if self.vocab_size != mathematics.VOCAB_SIZE or self.max_len < mathematics.LONGEST_QUESTION:
            raise ValueError(f"vocab_size={self.vocab_size}, max_len={self.max_len}: the data's characters are "
                             f"{mathematics.VOCAB_SIZE}, its longest question has {mathematics.LONGEST_QUESTION}")
        if self.n_ra_decoder and not self.n_ra:
            raise ValueError(f"n_ra_decoder={self.n_ra_decoder} with n_ra=0, the Transformer: give --n_ra, too")
        if self.n_ra_decoder is not None:
            decoder = {f.name: getattr(self, f.name) for f in fields(TransformerConfig)}
            TransformerConfig(**decoder | {"n_ra": self.n_ra_decoder})         # what it refuses, is refused here


# The paper's three models and their training, for a GPU: 50 epochs of 2 million problems (authors' job files: 100
# epochs, batch 512). The Transformer, relational heads in the encoder only, relational heads everywhere.
PAPER = dict(data="archive", level="all", batch_size=128, max_steps=781_250, learning_rate=6e-4, schedule="constant",
             warmup_steps=0, dropout=0.1, val_size=3000, eval_every=15_625, log_every=500, baseline=False)
PRESETS = {"transformer": dict(n_ra=0, **PAPER), "config1": dict(n_ra=4, n_ra_decoder=0, **PAPER),
           "config2": dict(n_ra=4, **PAPER)}


def make_model(cfg):
    return Seq2SeqTransformer(cfg, n_layers_decoder=cfg.n_layers_decoder, n_ra_decoder=cfg.n_ra_decoder)


@torch.no_grad()
def evaluate(model, problems, device, dtype, batch_size=256):
    """Loss per character, accuracy per character given the true ones before it, and share of answers that are right."""
    model.eval()
    loss_sum = n = right = solved = 0
    for rows in (problems[0] != PAD).sum(1).argsort().split(batch_size):           # similar lengths together
        questions, inputs, targets = (t.to(device) for t in mathematics.batch(problems, rows))
        with training.autocast(device, dtype):
            logits, loss = model(questions, inputs, targets)
            answers = model.generate(questions, LONGEST_ANSWER + 1, start=START, end=END)
        counted = targets != PAD
        n, loss_sum = n + counted.sum().item(), loss_sum + loss.item() * counted.sum().item()
        right += ((logits.argmax(-1) == targets) & counted).sum().item()
        answers, targets = (F.pad(t, (0, LONGEST_ANSWER + 1 - t.size(1))) for t in (answers, targets))
        solved += (answers == targets).all(1).sum().item()
    model.train()
    return dict(zip(METRICS, (loss_sum / n, right / n, solved / len(problems[0]))))


def train(cfg, run, problems, val, device, dtype):
    """One run, from its first step or its last checkpoint to max_steps; leaves config.json, log.csv and checkpoints."""
    with training.one_line_errors():
        torch.manual_seed(cfg.seed)
        model = make_model(cfg).to(device)
        optimizer = training.make_optimizer(model, cfg)
        run.begin(model, optimizer, device)
    print(f"\n{run.folder}: {run.record['n_parameters']:,} parameters")
    forward = torch.compile(model) if cfg.compile else model

    if run.step == 0:
        run.validated(**evaluate(model, val, device, dtype))
    for step in run.steps():
        training.reseed(cfg.seed, step)                               # for data order and dropout
        lr = training.learning_rate(step, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr
        rows = torch.randint(len(problems[0]), (cfg.batch_size,))
        questions, inputs, targets = (t.to(device) for t in mathematics.batch(problems, rows))         # (B, S), (B, T)
        with training.autocast(device, dtype):
            _, loss = forward(questions, inputs, targets)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or float("inf"))
        run.check(train_loss=loss.item(), gradient_norm=norm.item())  # stop before the weights are spoilt
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.step_done(loss.item(), lr)
        if run.validation_due():
            run.validated(**evaluate(model, val, device, dtype))


def score(run, sets, device, dtype):
    """Evaluates the finished model on each set of problems, once; writes them to the run's scores.csv."""
    model = make_model(run.cfg).to(device)
    model.load_state_dict(training.load_checkpoint(run.folder / "last.pt")["model"])
    rows = [{"problems": name, "n": len(problems[0]), **evaluate(model, problems, device, dtype)}
            for name, problems in sets.items()]
    with open(run.folder / "scores.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, ["problems", "n", *METRICS])
        writer.writeheader()
        writer.writerows(rows)
    print(f"\n{run.folder.name}, final model:")
    for row in rows:
        print(f"  {row['problems']:<20} {row['n']:>6} problems  loss {row['val_loss']:.4f}  characters "
              f"{row['char_accuracy']:.4f}  exact {row['exact_match']:.4f}")
    show_answers(model, next(iter(sets.values())), device)


def final_problems(cfg, source, val):
    """{name: problems} of each level: those held out of the files, or SCORED generated ones, which begin with val's."""
    if source != "generated":
        return {f"validation, {level}": problems for level, problems in val.items()}
    return {f"validation, {level}": mathematics.tokens(mathematics.generate(cfg.module, level, SCORED, 0, "val"))
            for level in val}


def write_scores(folders, path):
    """The scores of all these runs in one file."""
    options = ("module", "n_ra", "n_ra_decoder", "seed")
    with open(path, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow([*options, "problems", "n", *METRICS])
        for folder in folders:
            run = compare.load_run(folder)
            with open(folder / "scores.csv", newline="") as scores:
                for row in csv.DictReader(scores):
                    writer.writerow([*(run["options"][name] for name in options), *row.values()])


def show_answers(model, problems, device, n=3):
    """A few problems that the model solves, and a few that it misses."""
    rows = torch.arange(min(200, len(problems[0])))
    questions, _, targets = (t.to(device) for t in mathematics.batch(problems, rows))
    answers = model.generate(questions, LONGEST_ANSWER + 1, start=START, end=END)
    texts = [[mathematics.text(row) for row in table] for table in (questions, targets, answers)]
    solved, missed = [], []
    for question, target, answer in zip(*texts):
        (solved if answer == target else missed).append((question, target, answer))
    for question, target, answer in [*solved[:n], *missed[:n]]:
        print(f"  {question}\n      {answer}" + ("   right" if answer == target else f"   wrong: {target}"))
    if not solved:
        print("  (none of the first 200 solved)")


def count_parameters(cfg):
    """How many the model will have."""
    with torch.device("meta"):                                        # shapes only, nothing allocated
        return sum(p.numel() for p in make_model(cfg).parameters())


def main(argv=None):
    configs = training.parse_options(Config, PRESETS, argv)
    with training.one_line_errors():
        first = training.agreed(configs, ("data", "data_dir", "test_data", "out_dir", "paper"))
        configs = [replace(cfg, module=module) for module in MODULES
                   for cfg in configs if cfg.module in (module, "all")]
        configs = training.with_baselines(configs, count_parameters)
        modules = list(dict.fromkeys(cfg.module for cfg in configs))
        source = mathematics.fetch(first.data_dir, modules) if first.data == "archive" else first.data
        tests = {module: mathematics.tests(source, module) if source != "generated" else {} for module in modules}
        if first.test_data:
            for module in modules:
                found = mathematics.tests(first.test_data, module, training_too=True)
                tests[module] |= {f"{Path(first.test_data).name}/{name}": problems for name, problems in found.items()}
    folders, loaded = [], None
    for cfg in configs:
        with training.one_line_errors():
            if loaded != (cfg.module, cfg.level):
                print(f"\n{cfg.module}, {source}: reading")
            problems, val, facts = mathematics.load(str(source), cfg.module, cfg.level, cfg.train_size, cfg.val_size)
            if loaded != (cfg.module, cfg.level):
                held_out = sum(len(v[0]) for v in val.values())
                print(f"{len(problems[0]):,} training problems, {held_out:,} for validation")
            loaded = cfg.module, cfg.level
            device, dtype, why = training.choose_device(cfg.device, cfg.dtype)
            if not folders:
                print(f"device: {why}")
            facts = {**facts, "dtype": str(dtype)}                    # a result in bfloat16 is another one
            code = ("train_seq2seq.py", "data/mathematics.py", "data/questions.py", "data/expressions.py",
                    "data/algebra.py")
            run = training.Run(cfg, code, facts, cfg.batch_size, METRICS, unit="problems")
            reusable = run.reusable()
        if not reusable:
            together = tuple(torch.cat(tables) for tables in zip(*val.values()))
            train(cfg, run, problems, together, device, dtype)
        if not (reusable and (run.folder / "scores.csv").exists() and not cfg.test_data):
            score(run, {**final_problems(cfg, source, val), **tests[cfg.module]}, device, dtype)
        folders.append(run.folder)
    curves = Path(first.out_dir) / "curves.csv"
    accuracy_curves.write_csv(folders, curves)
    write_scores(folders, curves.with_name("scores.csv"))
    compare.report(folders, curves.parent,
                   lambda groups, path: accuracy_curves.draw(accuracy_curves.read_csv(curves), path, first.paper))


if __name__ == "__main__":
    training.start(main)
