"""Train encoder-decoders on school mathematics, character by character: Dual Attention Transformer and Transformers.

    python train_seq2seq.py                                    on one built-in module, curves in out/seq2seq
    python train_seq2seq.py --module=all --seed=1,2,3          the five modules one after the other, three seeds each
    python train_seq2seq.py --n_ra_decoder=4,0                 relational heads everywhere, or in the encoder only
    python train_seq2seq.py --preset=config2                   the paper's data (a 2.3 GB archive is read) and training

A DAT has two baselines: the paper's Transformer, with sinusoidal positions, and one with rotary positions. Over
three seeds the DAT is better than the first and cannot be told apart from the second, so its gain is no evidence for
relations (results/mathematics).

Accuracy is measured in two ways: the share of an answer's characters that are right given the true ones before them
(the paper's), and the share of answers that are right as a whole when the model generates them (the benchmark's).
"""
from dataclasses import fields, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

from data import mathematics
from data.mathematics import END, LONGEST_ANSWER, MODULES, PAD, START
from model import Seq2SeqTransformer, TransformerConfig
from toolbox import figures, flops, training
from toolbox.checkpoints import load_checkpoint, load_initial
from toolbox.options import agreed, at_least, one_line_errors, options, parse_options, start
from toolbox.output import unfailing_output
from toolbox.run import Run

METRICS = ("val_loss", "char_accuracy", "exact_match")                 # see evaluate
HELD_OUT = 1000                             # generated problems of each level on which a finished model is scored

# the paper's model, in a short training (relations are 16 wide; --rel_proj_dim=32: as published, docs/differences.md)
DEFAULTS = dict(vocab_size=mathematics.VOCAB_SIZE, max_len=mathematics.LONGEST_QUESTION, n_layers=2, d_ff=256,
                activation="relu", norm_first=False, final_norm=False, bias=True, position="sinusoidal",
                symbols="relative", max_steps=2000, warmup_steps=100, beta2=0.995, log_every=50,
                out_dir="out/seq2seq")


@options(**DEFAULTS)
class Config(training.TrainingOptions, TransformerConfig):
    n_layers_decoder: int | None = None     # n_layers of the decoder; default: as the encoder
    n_ra_decoder: int | None = None         # relational among the decoder's n_heads; default: as the encoder, n_ra
    # data
    module: Literal[(*MODULES, "all")] = "algebra__sequence_next_term"   # of the benchmark; all: one after the other
    level: Literal["easy", "medium", "hard", "all"] = "easy"             # size of the numbers
    data: str = "generated"                 # generated (built in), archive (the published files), or a folder like it
    train_size: int = 100_000               # generated: training problems
    val_size: int = 200                     # validation problems of each level
    test_data: str = ""                     # generated: also score the models on the published files in this folder
    # training
    batch_size: int = 32                    # problems in one step
    rope_baseline: bool = True              # beside the baseline train one with rotary positions, a better one
    eval_every: int = 250                   # steps between validations, each with a checkpoint

    def __post_init__(self):
        super().__post_init__()
        at_least(self, n_layers_decoder=1, n_ra_decoder=0, train_size=1, val_size=1, batch_size=1, eval_every=1)
        if self.vocab_size != mathematics.VOCAB_SIZE or self.max_len < mathematics.LONGEST_QUESTION:
            raise ValueError(f"vocab_size={self.vocab_size}, max_len={self.max_len}: the data has "
                             f"{mathematics.VOCAB_SIZE} tokens, its longest question {mathematics.LONGEST_QUESTION}")
        if self.n_ra and self.baseline and self.rope_baseline and self.d_model // self.n_heads % 2:
            raise ValueError(f"a baseline with rotary positions needs an even d_model / n_heads, not "
                             f"{self.d_model // self.n_heads}: give --rope_baseline=False")
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


def make_model(cfg):
    return Seq2SeqTransformer(cfg, n_layers_decoder=cfg.n_layers_decoder, n_ra_decoder=cfg.n_ra_decoder)


def train(cfg, run, problems, val, device, dtype, stop_requested):
    """One run, from its first step or its last checkpoint to max_steps."""
    with one_line_errors():
        torch.manual_seed(cfg.seed)
        model = make_model(cfg).to(device)
        optimizer = training.make_optimizer(model, cfg)
        S, T = ((table != PAD).sum(1).float().mean().item() for table in problems)      # means, without padding
        run.begin(model, optimizer, device, flops.per_problem(model, S, T - 1))
    print(f"\n{run.folder}: {run.record['n_parameters']:,} parameters")
    forward = training.compiled(model, device, fixed_shapes=False) if cfg.compile else model

    if run.step == 0:
        with run.paused():                                            # evaluation does not count as training time
            run.log(0, **evaluate(model, val, device, dtype))
    for step in range(run.step + 1, cfg.max_steps + 1):
        training.reseed(cfg.seed, step)                               # for data order and dropout
        lr = training.set_learning_rate(optimizer, step, cfg)
        rows = torch.randint(len(problems[0]), (cfg.batch_size,))
        questions, inputs, targets = (training.to_device(t, device)                        # (B, S), (B, T), (B, T)
                                      for t in mathematics.batch(problems, rows))
        with training.autocast(device, dtype):
            logits, loss = forward(questions, inputs, targets)
        counted = targets != PAD
        accuracy = ((logits.argmax(-1) == targets) & counted).sum() / counted.sum()                  # of characters
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.add(loss, norm, accuracy)

        if step % cfg.log_every == 0 or step == cfg.max_steps:
            run.log(step, **run.means(), lr=lr)
        if step % cfg.eval_every == 0 or step == cfg.max_steps:
            with run.paused():
                measured = evaluate(model, val, device, dtype)
                run.log(step, **measured)
                if measured["val_loss"] < run.best:
                    run.best = measured["val_loss"]
                    run.save("best.pt", step, model, optimizer)
                run.save("last.pt", step, model, optimizer)
        if stop_requested():                                          # Ctrl-C or SIGTERM
            run.save("last.pt", step, model, optimizer)
            run.stop(step)
    run.finish()


@torch.no_grad()
def answers_of(model, questions, device, dtype):
    """The answers that the model generates, (B, 31): padded, so that those of all batches have one width."""
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
    return dict(zip(METRICS, (loss_sum / n_characters, right / n_characters, solved / len(problems[0]))))


# ---- the finished model ----------------------------------------------------------------------------------------------

def score(run, sets, device, dtype):
    """Evaluates the finished model on {name: problems}; what config.json has already is not evaluated again."""
    model = make_model(run.cfg).to(device)
    model.load_state_dict(load_checkpoint(run.folder / "last.pt")["model"])
    known = run.record.get("scores", {})
    scores = dict(known)
    print(f"\n{run.folder.name}, final model:")
    for name, problems in sets.items():
        scores[name], digest = known.get(name, {}), mathematics.digest(problems)
        if scores[name].get("sha256") != digest:
            scores[name] = {"n": len(problems[0]), **evaluate(model, problems, device, dtype), "sha256": digest}
        n, loss, characters, exact, _ = scores[name].values()
        print(f"  {name:<24} {n:>6} problems  loss {loss:.4f}  characters {characters:.4f}  exact {exact:.4f}")
    run.finish(scores=scores)
    show_answers(model, next(iter(sets.values())), device, dtype)


def show_answers(model, problems, device, dtype, n=3):
    """Prints n problems that the model solves and n that it misses, among the first 200."""
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


def held_out(cfg, source, val):
    """{name: problems} to score a finished model on: problems that it has not been trained on."""
    if source != "generated":
        return {**{f"held out, {level}": problems for level, problems in val.items()},
                **mathematics.test_files(source, cfg.module)}
    n = max(HELD_OUT, cfg.val_size)                                    # the first of them are val
    return {f"held out, {level}": mathematics.tokens(mathematics.generate(cfg.module, level, n, 0, "val"))
            for level in val}


# ---- which runs ------------------------------------------------------------------------------------------------------

def prepare(argv):
    """-> the runs to make, where their data comes from, device and dtype. Whatever can be wrong is found here."""
    configs = parse_options(Config, PRESETS, argv)
    first = agreed(configs, ("data", "data_dir", "test_data", "out_dir", "device", "dtype", "paper", "init_from",
                              "rope_baseline"))
    configs = [replace(cfg, module=module) for module in MODULES for cfg in configs if cfg.module in (module, "all")]
    configs = training.with_baselines(configs, make_model, *[dict(position="rope")] * first.rope_baseline)
    configs.sort(key=lambda cfg: (cfg.module, cfg.level, cfg.train_size, cfg.val_size))    # those on one set together
    device, dtype, why = training.choose_device(first.device, first.dtype)
    modules = sorted({cfg.module for cfg in configs})
    source = str(mathematics.fetch(first.data_dir, modules)) if first.data == "archive" else first.data
    # data is identified by its name and checksum, not by its path
    configs = [replace(cfg, data=Path(source).name) for cfg in configs]
    for cfg in configs:
        if source != "generated":
            mathematics.training_files(source, cfg.module, cfg.level)
            mathematics.test_files(source, cfg.module)
        if first.test_data:
            mathematics.need_any(first.test_data, cfg.module)
    print(f"mathematics, {source}; device: {why}")
    return configs, source, device, dtype


@unfailing_output()
def main(argv=None):
    with one_line_errors():
        configs, source, device, dtype = prepare(argv)
    folders = []
    for cfg in configs:
        with one_line_errors():
            problems, val, facts = mathematics.load(source, cfg.module, cfg.level, cfg.train_size, cfg.val_size)
            initial = load_initial(cfg.init_from) if cfg.init_from else None
            run = Run(cfg, {**facts, "dtype": str(dtype)}, unit="problems", per_step=cfg.batch_size,
                      metrics=("train_accuracy", *METRICS), initial=initial)
        if not run.reusable():
            all_levels = tuple(torch.cat(tables) for tables in zip(*val.values()))
            with run, training.stop_on_signal() as stop_requested:
                train(cfg, run, problems, all_levels, device, dtype, stop_requested)
        with one_line_errors():
            sets = held_out(cfg, source, val)
            if cfg.test_data:
                found = mathematics.unseen(cfg.test_data, cfg.module, problems)
                sets |= {f"{Path(cfg.test_data).name}/{file}": problems for file, problems in found.items()}
            score(run, sets, device, dtype)
        folders.append(run.folder)
    with one_line_errors():
        figures.report(folders, configs[0].out_dir, configs[0].paper)
    if all(cfg.n_ra for cfg in configs):
        print("For the Transformer beside it, repeat the command with --baseline; what is finished is reused.")


# The paper's three models and their training, for a GPU: as many steps as 50 epochs of 2 million problems (authors'
# job files: 100 epochs, batch 512). The Transformer, relational heads in the encoder only, relational heads everywhere.
# All three in one figure: --preset=config2 --n_ra_decoder=4,0 --baseline; finished ones are reused.
PAPER = dict(data="archive", level="all", batch_size=128, max_steps=781_250, learning_rate=6e-4, schedule="constant",
             warmup_steps=0, dropout=0.1, val_size=3000, eval_every=15_625, log_every=500, baseline=False,
             rope_baseline=False)
PRESETS = {"transformer": dict(n_ra=0, **PAPER), "config1": dict(n_ra=4, n_ra_decoder=0, **PAPER),
           "config2": dict(n_ra=4, **PAPER)}

if __name__ == "__main__":
    start(main)
