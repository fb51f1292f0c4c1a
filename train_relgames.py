"""Relational Games: how many images does it take to learn a relation? Figure 2 of the paper, a Transformer against DAT.

    python train_relgames.py                                    occurs, 500 and 1000 images: 3 minutes, two cores
    python train_relgames.py --task=match_pattern --seed=1,2    another task, at its default sizes
    python train_relgames.py --sweep --paper                    the whole figure, the published curves behind ours
    python train_relgames.py --ablate                           one part of the model at a time, on two tasks
    python train_relgames.py --symmetric=True,False             Figure 6 by itself
    python train_relgames.py --task=between --data=mini --test_size=1000    original images instead of drawn ones

The model looks at a board of 3 x 3 objects and says whether a relation holds between them. One run is one task, one
number of training images, one model and one seed: some twenty seconds on a CPU. Several are trained at a time.
"""
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from data import relational_games as games
from model import TransformerConfig, VisionTransformer, model_config
from toolbox import figures, flops, sweep, training
from toolbox.figures.runs import run_folders
from toolbox.options import agreed, at_least, make_out_dir, one_line_errors, options, parse_options, start
from toolbox.output import unfailing_output
from toolbox.run import NOT_COMPARED, Run

# The published model: pre-norm, no norm after the last block; a token for each of the nine objects, and a class token.
# (1+1 heads: the relation is 64 wide; --rel_proj_dim=128 is the published width, see docs/differences.md)
DEFAULTS = dict(d_model=128, n_layers=2, n_heads=2, n_ra=2, d_ff=256, activation="swiglu", dropout=0.1,
                position="learned", final_norm=False, symbols="positional", n_symbols=9, symmetric=True,
                learning_rate=1e-3, schedule="constant", beta2=0.99, log_every=10, out_dir="out/relgames")


@options(**DEFAULTS)
class Config(training.TrainingOptions, TransformerConfig):
    pool: Literal["mean_cls", "mean", "cls"] = "mean_cls"   # what the head reads: see model.VisionTransformer
    # data
    task: Literal[games.TASKS + games.COLUMN_TASKS] = "occurs"      # which relation; see data/relational_games/rules.py
    sprites: Literal["pentos", "hexos", "stripes"] = "pentos"   # learned from; tested on these and on the other two
    train_size: int | None = None           # number of training images; default: several, see SIZES
    test_size: int = 5000                   # number of test images of each set of sprites
    data: str = "generated"                 # generated, mini (public samples, downloaded), or a folder of original ones
    test_data: str = ""                     # where the test images come from; default: as --data
    alternative: bool = False               # xoccurs: also break both conditions; match_pattern: unrelated objects
    # training
    batch_size: int = 512                   # images in one step
    epochs: int = 50                        # passes through the training images
    max_steps: int | None = None            # stop each training after so many steps
    # running
    resume: bool = False                    # without effect: a run has no checkpoint; what is finished is always reused
    sweep: bool = False                     # all five tasks, all training sizes of the paper, five seeds
    ablate: bool = False                    # the models of FACTORS in train_relgames.py, on two tasks, five seeds
    workers: int | None = None              # trainings at a time; default: one for each CPU core, 4 on a GPU
    keep_weights: bool = True               # keep each finished model, 2 MB, for look.py; default with --sweep: False

    def __post_init__(self):
        super().__post_init__()
        at_least(self, train_size=2, test_size=1, batch_size=1, epochs=1, workers=1)
        if self.init_from:
            raise ValueError("--init_from: there are no checkpoints of Relational Games")
        if self.alternative and (self.task not in ("xoccurs", "match_pattern") or self.data != "generated"):
            raise ValueError(f"task={self.task}, data={self.data}: only the drawn xoccurs and match_pattern have an "
                             f"alternative sampling")
        if self.ablate and (self.sweep or self.paper):
            raise ValueError("--ablate: without --sweep and --paper")
        for name in ("vocab_size", "max_len", "tie_embeddings"):
            if getattr(self, name) != getattr(TransformerConfig, name):
                raise ValueError(f"--{name}: it means nothing for images")


def make_model(cfg):
    return VisionTransformer(model_config(asdict(cfg)), image_size=36, patch_size=12, n_classes=2, pool=cfg.pool)


def pixels(images):
    """uint8 (B, H, W, C) -> (B, C, H, W) in 0 ... 1."""
    return images.permute(0, 3, 1, 2).float() / 255


def steps_per_epoch(cfg):
    return -(-cfg.train_size // cfg.batch_size)                       # rounded up: the last batch may be smaller


def train(run, data, device, dtype):
    """One run, in a process of its own -> its accuracy on each set of sprites."""
    cfg = replace(run.cfg, max_steps=run.max_steps)                   # `data` is the path; cfg.data only its name
    (images, labels), tests = games.split(cfg.task, cfg.sprites, cfg.train_size, cfg.test_size, cfg.seed, data=data,
                                          test_data=cfg.test_data, data_dir=cfg.data_dir, alternative=cfg.alternative)
    images, labels = torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device)   # uint8 (N, 36, 36, 3)
    torch.manual_seed(cfg.seed)
    model = make_model(cfg).to(device)
    optimizer = training.make_optimizer(model, cfg)
    run.begin(model, optimizer, device, flops.per_image(model))
    forward = training.compiled(model, device, fixed_shapes=True) if cfg.compile else model

    for step in range(run.step + 1, cfg.max_steps + 1):
        training.reseed(cfg.seed, step)                               # for dropout
        lr = training.set_learning_rate(optimizer, step, cfg)
        epoch, i = divmod(step - 1, steps_per_epoch(cfg))
        order = np.random.default_rng([cfg.seed, epoch]).permutation(len(images))
        batch = training.to_device(torch.from_numpy(order[i * cfg.batch_size:][:cfg.batch_size]), device)
        with training.autocast(device, dtype):
            logits, loss = forward(pixels(images[batch]), labels[batch])
        accuracy = (logits.argmax(-1) == labels[batch]).float().mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.add(loss, norm, accuracy)
        if step % cfg.log_every == 0 or step == cfg.max_steps:
            run.log(step, **run.means(), lr=lr)

    accuracy = {sprites: evaluate(model, *test, device, dtype) for sprites, test in tests.items()}
    if cfg.keep_weights:
        run.keep(model)
    run.finish(scores=accuracy)
    return accuracy


@torch.no_grad()
def evaluate(model, images, labels, device, dtype):
    """Share of the images that are classified correctly."""
    model.eval()
    right = 0
    for x, y in zip(torch.from_numpy(images).split(1000), torch.from_numpy(labels).split(1000)):
        with training.autocast(device, dtype):
            logits, _ = model(pixels(x.to(device)))                   # (B, 2)
        right += (logits.argmax(-1) == y.to(device)).sum().item()
    model.train()
    return right / len(images)


# ---- which runs ------------------------------------------------------------------------------------------------------

EASY, HARD = tuple(range(250, 2501, 250)), tuple(range(5000, 25001, 2500))             # the published training sizes
SIZES = {"occurs": (500, 1000), "same": (250, 500, 1000), "between": (500, 1000), "xoccurs": (1000, 2500),
         "match_pattern": (25000,)}                                   # without --sweep
ABLATION_SIZES = {"xoccurs": 2500, "match_pattern": 20000}             # sizes at which every seed of the DAT learns

# One part of the model at a time, from the DAT 0+2 of Figure 2: {factor: {variant: what it changes}}. Each factor's
# first variant is what the others are compared with.
FACTORS = {
    # RCA is relational attention with W_r = 0, the wider one has the parameters of asymmetric r; no symbols: W_s = 0
    "relations r (Figure 6)": {"symmetric": {}, "asymmetric": dict(symmetric=False), "none: RCA": dict(ra_type="rca"),
                               "none: wider RCA": dict(ra_type="rca", d_ff=342)},
    "relations or none (Figure 12)": {"asymmetric r": dict(symmetric=False), "no r: RCA": dict(ra_type="rca")},
    "symbols s": {"positional": {}, "relative": dict(symbols="relative"), "symbolic": dict(symbols="symbolic"),
                  "none": dict(symbols="none")},
    "W_q, W_k of a layer with 1+1 heads": {"one for each head": dict(n_ra=1),
                                           "one for both": dict(n_ra=1, share_qk=True)},
    "layers": {"two": {}, "one": dict(n_layers=1)},
    "Transformer": {"DAT 0+2": {}, "Transformer 2+0": dict(n_ra=0), "as many parameters": dict(n_ra=0, d_ff=301),
                    "100 epochs": dict(n_ra=0, epochs=100)},
}
PRESETS = {"wide": dict(d_model=144, d_ff=288, n_ra=0)}               # v3 of the paper: a larger Transformer


def ablation(cfg):
    """-> [(factor, variant, Config)] of FACTORS, all else as in cfg. Raises ValueError if cfg sets a factor itself."""
    changes = [(factor, variant, change) for factor, variants in FACTORS.items()
               for variant, change in variants.items()]
    for name in dict.fromkeys(["baseline", "match_params", *(name for *_, change in changes for name in change)]):
        if getattr(cfg, name) != getattr(Config, name):
            raise ValueError(f"--{name}={getattr(cfg, name)}: --ablate sets it itself")
    size = cfg.train_size or ABLATION_SIZES.get(cfg.task, SIZES.get(cfg.task, EASY)[-1])
    return [(factor, variant, training.simplified(cfg, **{"train_size": size, **change}))
            for factor, variant, change in changes]


def given_configs(argv):
    """The command line -> Configs, for each combination of what it names and of what is not named but varies."""
    grid, first = {"n_ra": (2, 1), "seed": (1, 2, 3)}, parse_options(Config, PRESETS, argv)[0]
    if first.sweep:
        grid = {"n_ra": (2, 1), "seed": (1, 2, 3, 4, 5), "task": games.TASKS, "keep_weights": (False,)}
    if first.ablate:
        grid = {"seed": (1, 2, 3, 4, 5), "task": tuple(ABLATION_SIZES), "keep_weights": (False,)}
    return parse_options(Config, PRESETS, argv, grid)


def configs_of(argv):
    """The command line -> one Config for each run. Raises ValueError for a list of an option that takes one value."""
    configs, given = [], given_configs(argv)
    if given[0].ablate and len({(cfg.task, cfg.train_size, cfg.seed) for cfg in given}) < len(given):
        raise ValueError("--ablate: give lists for --task, --train_size and --seed only")
    for cfg in given:
        if cfg.ablate:
            for *_, run in ablation(cfg):
                configs += [run] if run not in configs else []
            continue
        sizes = (HARD if cfg.task == "match_pattern" else EASY) if cfg.sweep else SIZES.get(cfg.task, EASY[-1:])
        configs += [replace(cfg, train_size=size) for size in ([cfg.train_size] if cfg.train_size else sizes)]
    agreed(configs, (*(name for name in NOT_COMPARED if hasattr(configs[0], name)), "sprites", "dtype"))
    if not configs[0].ablate:
        configs = training.with_baselines(configs, make_model)
    return sorted(configs, key=lambda cfg: cfg.seed)


@unfailing_output()
def main(argv=None):
    with one_line_errors():
        configs = configs_of(argv)
        first = configs[0]
        device, dtype, why = training.choose_device(first.device, first.dtype)
        tested = games.tested_sprites(first.task, first.sprites, data=first.data, test_data=first.test_data,
                                      data_dir=first.data_dir)
        print(f"images: {first.data}, learning from {first.sprites}, testing on {', '.join(tested)}"
              + (f" of {first.test_data}" if first.test_data else ""))
        if first.data == "generated":
            print("drawn by the rules of the original images; for those see docs/commands.md")
        runs = []
        for cfg in configs:
            files = games.fingerprints(cfg.task, cfg.sprites, data=cfg.data, test_data=cfg.test_data,
                                       data_dir=cfg.data_dir)
            max_steps = cfg.epochs * steps_per_epoch(cfg)
            # data is identified by the checksums of its files, not by its path
            runs.append(Run(replace(cfg, data=Path(cfg.data).name), {"files": files, "dtype": str(dtype)},
                            unit="images", metrics=("train_accuracy",), per_step=min(cfg.batch_size, cfg.train_size),
                            max_steps=min(max_steps, cfg.max_steps or max_steps)))
        make_out_dir(first.out_dir)
        new = [run for run in runs if not run.reusable(quiet=True)]
        print(f"device: {why}\n{len(runs)} runs, {len(runs) - len(new)} of them finished before")
        workers, failed = first.workers or (sweep.cores() if device.type == "cpu" else 4), []
        for i, (run, accuracy) in enumerate(sweep.train_all(train, new, (first.data, device, dtype), workers), 1):
            failed += [run.folder.name] if accuracy is None else []
            text = "failed" if accuracy is None else "  ".join(f"{name} {a:.3f}" for name, a in accuracy.items())
            tqdm.write(f"{i}/{len(new)}  {run.folder.name}:  {text}")
        if first.ablate:
            folders = {repr(cfg): run.folder for cfg, run in zip(configs, runs)}
            figures.report_ablation([(factor, variant, folders[repr(run)]) for cfg in given_configs(argv)
                                     for factor, variant, run in ablation(cfg)], first.out_dir)
        # a sweep may come in pieces: draw everything in the folder
        elif folders := run_folders(Path(first.out_dir)):
            figures.report(folders, first.out_dir, first.paper)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    start(main)
