"""Relational Games: how many images does it take to learn a relation? Figure 2 of the paper, a Transformer against DAT.

    python train_relgames.py                                    occurs, 500 and 1000 images: 3 minutes, two cores
    python train_relgames.py --task=match_pattern --seed=1,2    another task, at its default sizes
    python train_relgames.py --sweep --paper                    the whole figure, the published curves behind ours
    python train_relgames.py --symmetric=True,False             Figure 6
    python train_relgames.py --symmetric=False --ra_type=ra,rca             Figure 12
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
from toolbox import figures, sweep, training
from toolbox.figures.runs import run_folders
from toolbox.options import agreed, at_least, one_line_errors, options, parse_options, start
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
    run.begin(model, optimizer, device)
    forward = training.compiled(model, device, fixed_shapes=True) if cfg.compile else model

    for step in range(run.step + 1, cfg.max_steps + 1):
        training.reseed(cfg.seed, step)                               # for dropout
        lr = training.set_learning_rate(optimizer, step, cfg)
        epoch, i = divmod(step - 1, steps_per_epoch(cfg))
        order = np.random.default_rng([cfg.seed, epoch]).permutation(len(images))
        batch = training.to_device(torch.from_numpy(order[i * cfg.batch_size:][:cfg.batch_size]), device)
        with training.autocast(device, dtype):
            _, loss = forward(pixels(images[batch]), labels[batch])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.add(loss, norm)
        if step % cfg.log_every == 0 or step == cfg.max_steps:
            run.log(step, train_loss=run.mean_loss(), lr=lr)

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
PRESETS = {"wide": dict(d_model=144, d_ff=288, n_ra=0)}               # v3 of the paper: a larger Transformer


def configs_of(argv):
    """The command line -> one Config for each run. Raises ValueError for a list of an option that takes one value."""
    grid = {"n_ra": (2, 1), "seed": (1, 2, 3)}                        # what is not named on the command line
    if parse_options(Config, PRESETS, argv)[0].sweep:
        grid = {"n_ra": (2, 1), "seed": (1, 2, 3, 4, 5), "task": games.TASKS,
                "keep_weights": (False,)}
    configs = []
    for cfg in parse_options(Config, PRESETS, argv, grid):
        sizes = (HARD if cfg.task == "match_pattern" else EASY) if cfg.sweep else SIZES.get(cfg.task, EASY[-1:])
        configs += [replace(cfg, train_size=size) for size in ([cfg.train_size] if cfg.train_size else sizes)]
    agreed(configs, (*(name for name in NOT_COMPARED if hasattr(configs[0], name)), "sprites", "dtype"))
    return sorted(training.with_baselines(configs, make_model), key=lambda cfg: cfg.seed)


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
                            unit="images", per_step=min(cfg.batch_size, cfg.train_size),
                            max_steps=min(max_steps, cfg.max_steps or max_steps)))
        new = [run for run in runs if not run.reusable(quiet=True)]
        print(f"device: {why}\n{len(runs)} runs, {len(runs) - len(new)} of them finished before")
        workers, failed = first.workers or (sweep.cores() if device.type == "cpu" else 4), []
        for i, (run, accuracy) in enumerate(sweep.train_all(train, new, (first.data, device, dtype), workers), 1):
            failed += [run.folder.name] if accuracy is None else []
            text = "failed" if accuracy is None else "  ".join(f"{name} {a:.3f}" for name, a in accuracy.items())
            tqdm.write(f"{i}/{len(new)}  {run.folder.name}:  {text}")
        # a sweep may come in pieces: draw everything in the folder
        if folders := run_folders(Path(first.out_dir)):
            figures.report(folders, first.out_dir, first.paper)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    start(main)
