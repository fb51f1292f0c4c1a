"""Train encoder-decoders on school mathematics, character by character: Dual Attention Transformer and Transformer.

    python train_seq2seq.py                                    both on one built-in module, curves in out/seq2seq
    python train_seq2seq.py --module=all --seed=1,2,3          the five modules one after the other, three seeds each
    python train_seq2seq.py --n_ra_decoder=4,0                 relational heads everywhere, or in the encoder only
    python train_seq2seq.py --preset=config2                   the paper's data (2.3 GB are read through) and training

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
from toolbox import training
from config import TransformerConfig, at_least
from data import mathematics
from data.mathematics import END, LONGEST_ANSWER, MODULES, PAD, START
from model import Seq2SeqTransformer

MEASURED = ("val_loss", "char_accuracy", "exact_match")                # see evaluate
HELD_OUT = 1000                             # generated problems of each level on which a finished model is scored
CODE = ("train_seq2seq.py", *(f"data/mathematics/{name}.py" for name in ("__init__", "questions", "expressions", "algebra")))


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
    test_data: str = ""                     # generated: score the models on the published files in this folder, too
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
            try:
                TransformerConfig(**decoder | {"n_ra": self.n_ra_decoder})
            except ValueError as error:
                raise ValueError(f"the decoder cannot have --n_ra_decoder={self.n_ra_decoder}: {error}") from None
        if self.test_data and self.data != "generated":
            raise ValueError("--test_data is for models that learn from generated problems; others are tested on "
                             "the files of their own --data")


# The paper's three models and their training, for a GPU: as many steps as 50 epochs of 2 million problems (authors'
# job files: 100 epochs, batch 512). The Transformer, relational heads in the encoder only, relational heads everywhere.
# All three in one figure: --preset=config2 --n_ra_decoder=4,0 --baseline; finished ones are reused.
PAPER = dict(data="archive", level="all", batch_size=128, max_steps=781_250, learning_rate=6e-4, schedule="constant",
             warmup_steps=0, dropout=0.1, val_size=3000, eval_every=15_625, log_every=500, baseline=False)
PRESETS = {"transformer": dict(n_ra=0, **PAPER), "config1": dict(n_ra=4, n_ra_decoder=0, **PAPER),
           "config2": dict(n_ra=4, **PAPER)}


def make_model(cfg):
    return Seq2SeqTransformer(cfg, n_layers_decoder=cfg.n_layers_decoder, n_ra_decoder=cfg.n_ra_decoder)


@torch.no_grad()
def answers_of(model, questions, device, dtype):
    """What the model writes by itself, (B, 31): padded, so that answers of all batches have one width."""
    with training.autocast(device, dtype):
        answers = model.generate(questions, LONGEST_ANSWER + 1, start=START, end=END)
    return F.pad(answers, (0, LONGEST_ANSWER + 1 - answers.size(1)))


@torch.no_grad()
def evaluate(model, problems, device, dtype, batch_size=256):
    """Loss per character, accuracy per character given the true ones before it, and share of answers that are right."""
    model.eval()
    n_characters = loss_sum = right = solved = 0
    for rows in (problems[0] != PAD).sum(1).argsort().split(batch_size):           # similar lengths together
        questions, inputs, targets = (t.to(device) for t in mathematics.batch(problems, rows))
        with training.autocast(device, dtype):
            logits, loss = model(questions, inputs, targets)
        counted = targets != PAD
        n_characters += counted.sum().item()
        loss_sum += loss.item() * counted.sum().item()
        right += ((logits.argmax(-1) == targets) & counted).sum().item()
        targets = F.pad(targets, (0, LONGEST_ANSWER + 1 - targets.size(1)))
        solved += (answers_of(model, questions, device, dtype) == targets).all(1).sum().item()
    model.train()
    return dict(zip(MEASURED, (loss_sum / n_characters, right / n_characters, solved / len(problems[0]))))


def train(cfg, run, problems, val, device, dtype):
    """One run, from its first step or its last checkpoint to max_steps; leaves config.json, log.csv and checkpoints."""
    with training.one_line_errors():
        torch.manual_seed(cfg.seed)
        model = make_model(cfg).to(device)
        optimizer = training.make_optimizer(model, cfg)
        run.begin(model, optimizer, device)
    print(f"\n{run.folder}: {run.record['n_parameters']:,} parameters")

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
            _, loss = model(questions, inputs, targets)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or float("inf"))
        run.check(train_loss=loss.item(), gradient_norm=norm.item())  # stop before the weights are spoilt
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.step_done(loss.item(), lr)
        if run.validation_due():
            run.validated(**evaluate(model, val, device, dtype))


def score(run, sets, device, dtype):
    """The finished model on each set of problems: prints what scores.csv has, and evaluates what it has not."""
    model = make_model(run.cfg).to(device)
    model.load_state_dict(training.load_checkpoint(run.folder / "last.pt")["model"])
    path, rows = run.folder / "scores.csv", []
    known = {(row["problems"], row["sha256"]): row for row in read_rows(path)}
    print(f"\n{run.folder.name}, final model:")
    for name, problems in sets.items():
        digest = mathematics.digest(problems)
        if not (row := known.get((name, digest))):
            scores = evaluate(model, problems, device, dtype)
            row = {"problems": name, "n": len(problems[0]), **scores, "sha256": digest}
        rows.append(row)
        print(f"  {name:<24} {row['n']:>6} problems  loss {float(row['val_loss']):.4f}  characters "
              f"{float(row['char_accuracy']):.4f}  exact {float(row['exact_match']):.4f}")
    training.write_atomically(path, lambda path: write_rows(rows, path))
    show_answers(model, next(iter(sets.values())), device, dtype)


def show_answers(model, problems, device, dtype, n=3):
    """A few problems that the model solves, and a few that it misses, among the first 200."""
    rows = torch.arange(min(200, len(problems[0])))
    questions, _, targets = (t.to(device) for t in mathematics.batch(problems, rows))
    answers = answers_of(model, questions, device, dtype)
    is_right = (answers == F.pad(targets, (0, LONGEST_ANSWER + 1 - targets.size(1)))).all(1)
    for which in (is_right, ~is_right):
        for i in which.nonzero()[:n, 0]:
            question, answer, target = (mathematics.text(table[i]) for table in (questions, answers, targets))
            print(f"  {question}\n      {answer}" + ("   right" if is_right[i] else f"   wrong: {target}"))
    if not is_right.any():
        print(f"  (none of the first {len(rows)} solved)")


def read_rows(path):
    if not path.exists():
        return []
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def write_rows(rows, path):
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def count_parameters(cfg):
    """How many the model will have."""
    with torch.device("meta"):                                        # shapes only, nothing allocated
        return sum(p.numel() for p in make_model(cfg).parameters())


def prepare(argv):
    """-> the runs to make, where their data comes from, device and dtype. Whatever can be wrong is found here."""
    configs = training.parse_options(Config, PRESETS, argv)
    first = training.agreed(configs, ("data", "data_dir", "test_data", "out_dir", "device", "dtype", "paper"))
    configs = [replace(cfg, module=module) for module in MODULES for cfg in configs if cfg.module in (module, "all")]
    configs = training.with_baselines(configs, count_parameters)
    configs.sort(key=lambda cfg: (cfg.module, cfg.level, cfg.train_size, cfg.val_size))    # those on one set together
    device, dtype, why = training.choose_device(first.device, first.dtype)
    modules = sorted({cfg.module for cfg in configs})
    source = str(mathematics.fetch(first.data_dir, modules)) if first.data == "archive" else first.data
    # the same problems in another place are the same: their name and checksum tell runs apart, and not their path
    configs = [replace(cfg, data=Path(source).name) for cfg in configs]
    for cfg in configs:
        if source != "generated":
            mathematics.training_files(source, cfg.module, cfg.level)
            mathematics.test_files(source, cfg.module)
        if first.test_data:
            mathematics.need_any(first.test_data, cfg.module)
    print(f"mathematics, {source}; device: {why}")
    return configs, source, device, dtype


def held_out(cfg, source, val):
    """{name: problems} for the finished model that learned from `source`, other than its training problems."""
    if source != "generated":
        return {**{f"held out, {level}": problems for level, problems in val.items()},
                **mathematics.test_files(source, cfg.module)}
    n = max(HELD_OUT, cfg.val_size)                                    # the first of them are val
    return {f"held out, {level}": mathematics.tokens(mathematics.generate(cfg.module, level, n, 0, "val"))
            for level in val}


def main(argv=None):
    with training.one_line_errors():
        configs, source, device, dtype = prepare(argv)
    folders = []
    for cfg in configs:
        with training.one_line_errors():
            problems, val, facts = mathematics.load(source, cfg.module, cfg.level, cfg.train_size, cfg.val_size)
            facts = {**facts, "dtype": str(dtype)}                    # a result in bfloat16 is another one
            run = training.Run(cfg, CODE, facts, cfg.batch_size, MEASURED, unit="problems")
            reusable = run.reusable()
        if not reusable:
            train(cfg, run, problems, tuple(torch.cat(tables) for tables in zip(*val.values())), device, dtype)
        with training.one_line_errors():
            sets = held_out(cfg, source, val)
            if cfg.test_data:
                name = Path(cfg.test_data).name
                found = mathematics.unseen(cfg.test_data, cfg.module, problems)
                sets |= {f"{name}/{file}": problems for file, problems in found.items()}
            score(run, sets, device, dtype)
        folders.append(run.folder)
    with training.one_line_errors():
        report(list(dict.fromkeys(folders)), Path(configs[0].out_dir), configs[0].paper)
    if all(cfg.n_ra for cfg in configs):
        print("For the Transformer beside it, repeat the command with --baseline; what is finished is reused.")


def report(folders, out_dir, paper):
    """curves.csv and scores.csv of all these runs, curves.png and table.md."""
    accuracy_curves.write_csv(folders, out_dir / "curves.csv")
    options = [(folder, compare.load_run(folder)["options"]) for folder in folders]
    write_rows([{**{name: o[name] for name in ("module", "level", "n_ra", "n_ra_decoder", "seed")}, **row}
                for folder, o in options for row in read_rows(folder / "scores.csv")], out_dir / "scores.csv")
    compare.report(folders, out_dir, lambda groups, path: accuracy_curves.draw(
        accuracy_curves.read_csv(out_dir / "curves.csv"), path, paper))


if __name__ == "__main__":
    training.start(main)
