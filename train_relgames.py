"""Relational Games: how many images does it take to learn a relation? Figure 2 of the paper, a Transformer against DAT.

    python train_relgames.py                                    occurs, 250 to 1000 images: 3 minutes, two cores
    python train_relgames.py --task=match_pattern --seed=1,2    another task, at its default sizes
    python train_relgames.py --sweep --paper                    the whole figure, the published curves behind ours
    python train_relgames.py --symmetric=True,False             Figure 6; --ra_type=rca: Figure 12; --preset=wide: v3
    python train_relgames.py --task=between --data=mini --test_size=1000     original images instead of drawn ones

A cell is one training: (task, training size, model, seed). Its result is a small file in out/relgames/cells; cells that
are there are not run again, so a sweep that was interrupted goes on when its command is repeated.
"""
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

import learning_curves
from toolbox import sweep
from toolbox import training
from config import TransformerConfig, at_least
from data import npz
from data import relational_games as games
from model import VisionTransformer


@dataclass
class Config(TransformerConfig):
    # the published model: d_model 128, 2 layers, 2 heads, pre-norm
    n_layers: int = 2                       # number of blocks
    n_heads: int = 2                        # all heads of a layer, sensory and relational
    n_ra: int = 2                           # how many of them are relational; 0: Transformer; left out: 2,1
    d_ff: int | None = 256                  # width of the MLP
    activation: Literal["relu", "gelu", "gelu_tanh", "silu", "swiglu"] = "swiglu"   # of the MLP; see model.MLP
    dropout: float = 0.1                    # on attention, symbol retrieval, branches and embeddings; in training only
    position: Literal["learned", "sinusoidal", "rope"] = "learned"       # how patches know their place
    final_norm: bool = False                # one more norm after the last block; the published models had none
    symbols: Literal["symbolic", "relative", "positional"] = "positional"   # who is the sender? see symbols.py
    n_symbols: int = 9                      # symbolic: size of the library; as many as there are patches
    symmetric: bool = True                  # W_q_rel = W_k_rel; False: Figure 6
    pool: Literal["mean_cls", "mean", "cls"] = "mean_cls"   # what the head reads: see model.VisionTransformer
    # what to learn, from how many images
    task: Literal[games.TASKS + games.COLUMN_TASKS] = "occurs"      # which relation; see data/relational_games.py
    sprites: Literal["pentos", "hexos", "stripes"] = "pentos"   # learned from; tested on these and on the other two
    train_size: int | None = None           # number of training images; default: several, see SIZES
    test_size: int = 5000                   # number of test images of each set of sprites
    data: str = "generated"                 # generated, mini (public samples, downloaded), or a folder of original ones
    test_data: str = ""                     # where the test images come from; default: as --data
    data_dir: str = "data/cache"            # where downloads are kept
    alternative: bool = False               # xoccurs: also break both conditions; match_pattern: unrelated objects
    # how to train
    batch_size: int = 512                   # images in one step
    epochs: int = 50                        # passes through the training images
    max_steps: int | None = None            # stop each training after so many steps
    learning_rate: float = 1e-3             # Adam's, constant
    beta1: float = 0.9                      # Adam
    beta2: float = 0.99                     # Adam
    # how to run it
    seed: int = 1                           # of images, weights, order, dropout; left out: 1,2,3, with --sweep 1 to 5
    sweep: bool = False                     # all five tasks, all training sizes of the paper, five seeds
    workers: int | None = None              # trainings at a time; default: one for each CPU core, 4 on a GPU
    device: str = "auto"                    # auto: cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"   # of matrix products; auto: bfloat16 on GPUs that have it
    out_dir: str = "out/relgames"           # results; table and figures show all that lies there
    resume: bool = True                     # keep finished cells; False: run them again
    baseline: bool = True                   # the Transformer with as many heads, beside each DAT
    match_params: bool = False              # give the baseline the d_ff that makes parameter counts agree within 1%
    paper: bool = False                     # draw the published curves behind ours

    def __post_init__(self):
        super().__post_init__()
        at_least(self, train_size=2, test_size=1, batch_size=1, epochs=1, max_steps=1, learning_rate=0, beta1=0,
                 beta2=0, seed=0, workers=1)
        if max(self.beta1, self.beta2) >= 1 or self.seed >= 2 ** 32:
            raise ValueError(f"beta1={self.beta1} and beta2={self.beta2} must be below 1, seed={self.seed} below 2^32")
        if self.alternative and (self.task not in ("xoccurs", "match_pattern") or self.data != "generated"):
            raise ValueError(f"task={self.task}, data={self.data}: only the drawn xoccurs and match_pattern have an "
                             f"alternative sampling")


CODE = ("train_relgames.py", "data/relational_games.py", "data/npz.py")      # besides the model and the toolbox
PRESETS = {"wide": dict(d_model=144, d_ff=288, n_ra=0)}               # v3: a larger Transformer
EASY, HARD = tuple(range(250, 2501, 250)), tuple(range(5000, 25001, 2500))             # the published training sizes
SIZES = {"occurs": (250, 500, 1000), "same": (250, 500, 1000), "between": (250, 500, 1000), "xoccurs": (1000, 2500),
         "match_pattern": (25000,)}                                   # without --sweep


def cells_of(argv):
    """The command line -> one Config for each cell. Raises ValueError if a list is given where one value belongs."""
    grid = {"n_ra": (2, 1), "seed": (1, 2, 3)}                        # what is not named on the command line
    if training.parse_options(Config, PRESETS, argv)[0].sweep:
        grid = {"n_ra": (2, 1), "seed": (1, 2, 3, 4, 5), "task": games.TASKS}
    cells = []
    for cfg in training.parse_options(Config, PRESETS, argv, grid):
        sizes = (HARD if cfg.task == "match_pattern" else EASY) if cfg.sweep else SIZES.get(cfg.task, EASY[-1:])
        cells += [replace(cfg, train_size=size) for size in ([cfg.train_size] if cfg.train_size else sizes)]
    alike = [name for name in training.NOT_COMPARED if hasattr(cells[0], name)]      # other scripts have others
    training.agreed(cells, (*alike, "sprites", "dtype"))
    for name in ("vocab_size", "max_len", "tie_embeddings"):
        if any(getattr(cfg, name) != getattr(TransformerConfig, name) for cfg in cells):
            raise ValueError(f"--{name}: it means nothing for images")
    return sorted(training.with_baselines(cells, count_parameters), key=lambda cfg: cfg.seed)


def count_parameters(cfg):
    """How many the model will have."""
    with torch.device("meta"):                                        # shapes only, nothing allocated
        return sum(p.numel() for p in make_model(cfg).parameters())


def make_model(cfg):
    return VisionTransformer(cfg, image_size=36, patch_size=12, n_classes=2, pool=cfg.pool)


# ---- images ----------------------------------------------------------------------------------------------------------

def test_images(cfg, sprites):
    """Images (N, 36, 36, 3) and labels (N,) to test on."""
    data = cfg.test_data or cfg.data
    if data == "generated":
        return games.generate(cfg.task, sprites, cfg.test_size, 2 * cfg.seed, cfg.alternative)
    images, labels = load(games.find_file(data, cfg.task, sprites, cfg.data_dir), cfg.task)
    order = np.random.default_rng(cfg.seed).permutation(len(images))[:cfg.test_size]
    return images[order], labels[order]


def training_images(cfg, n):
    """Up to n images and labels to learn from."""
    if cfg.data == "generated":
        return games.generate(cfg.task, cfg.sprites, n, 2 * cfg.seed + 1, cfg.alternative)
    images, labels = load(games.find_file(cfg.data, cfg.task, cfg.sprites, cfg.data_dir), cfg.task)
    order = np.random.default_rng(cfg.seed).permutation(len(images))[cfg.test_size:cfg.test_size + n]
    return images[order], labels[order]


load = lru_cache(maxsize=len(games.SPRITES))(games.load_npz)          # a full file takes a while


def split(cfg):
    """-> training images and labels, {sprites: test images and labels}.

    No test image of the training sprites equals a training image. There are few enough true images of `same` for that
    to happen; the next image with the same label takes the place. (authors' code: splits with replacement)
    """
    tests = {sprites: test_images(cfg, sprites) for sprites in tested_sprites(cfg)}
    seen = {image.tobytes() for image in tests[cfg.sprites][0]}
    images, labels = training_images(cfg, 2 * cfg.train_size)
    new = np.array([image.tobytes() not in seen for image in images], bool)
    chosen = []
    for label in (0, 1):
        wanted = (labels[:cfg.train_size] == label).sum()
        chosen += np.flatnonzero(new & (labels == label))[:wanted].tolist()
    for name, have in (("test_size", len(tests[cfg.sprites][0])), ("train_size", len(chosen))):
        if have < getattr(cfg, name):
            raise ValueError(f"{name}={getattr(cfg, name)}: only {have:,} images of {cfg.task}, {cfg.sprites} are "
                             f"left for that (test images are set aside first)")
    return (images[np.sort(chosen)], labels[np.sort(chosen)]), tests


def tested_sprites(cfg):
    """The sets of sprites to test on: those learned from, and of the others those whose file is there."""
    data, found = cfg.test_data or cfg.data, []
    for sprites in games.SPRITES:
        try:
            if data != "generated":
                games.find_file(data, cfg.task, sprites, cfg.data_dir)
            found.append(sprites)
        except ValueError:
            if sprites == cfg.sprites or data == "mini":
                raise
    return found


# ---- one cell --------------------------------------------------------------------------------------------------------

def train(cfg, record, device, dtype, step_done=lambda: None):
    """One cell, in a process of its own -> its record and what came out: accuracies, loss, steps, seconds."""
    training_set, tests = split(cfg)
    images, labels = (torch.from_numpy(array).to(device) for array in training_set)    # uint8 (N, 36, 36, 3), (N,)
    torch.manual_seed(cfg.seed)
    model = make_model(cfg).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2))
    started, step, losses = time.perf_counter(), 0, []
    for epoch in range(cfg.epochs):
        order = torch.from_numpy(np.random.default_rng([cfg.seed, epoch]).permutation(len(images))).to(device)
        for batch in order.split(cfg.batch_size)[:steps_of(cfg) - step]:
            step += 1
            training.reseed(cfg.seed, step)                           # for dropout
            with training.autocast(device, dtype):
                _, loss = model(pixels(images[batch]), labels[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            step_done()
    train_loss = torch.stack(losses[-steps_per_epoch(cfg):]).mean().item()             # of the last epoch
    seconds = time.perf_counter() - started
    if not np.isfinite(train_loss):
        return {**record, "failed": f"the loss became {train_loss}: try a lower --learning_rate"}
    accuracy = {sprites: evaluate(model, *test, device, dtype) for sprites, test in tests.items()}
    return {**record, "accuracy": accuracy, "train_loss": train_loss, "steps": step, "seconds": round(seconds, 2),
            "n_parameters": sum(p.numel() for p in model.parameters()), "device": str(device)}


def steps_per_epoch(cfg):
    return -(-cfg.train_size // cfg.batch_size)                       # rounded up: the last batch may be smaller


def steps_of(cfg):
    """Optimizer steps of a cell."""
    steps = cfg.epochs * steps_per_epoch(cfg)
    return min(steps, cfg.max_steps or steps)


def pixels(images):
    """uint8 (B, H, W, C) -> (B, C, H, W) in 0 ... 1."""
    return images.permute(0, 3, 1, 2).float() / 255


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


def record_of(cfg, dtype):
    """What a cell's result depends on: a cell on disk that agrees in all of it is not run again."""
    files = {}
    if cfg.data != "generated":
        files["training"] = npz.fingerprint(games.find_file(cfg.data, cfg.task, cfg.sprites, cfg.data_dir))
    if (cfg.test_data or cfg.data) != "generated":
        for sprites in tested_sprites(cfg):
            path = games.find_file(cfg.test_data or cfg.data, cfg.task, sprites, cfg.data_dir)
            files[f"test, {sprites}"] = npz.fingerprint(path)
    options = {name: value for name, value in asdict(cfg).items() if name not in training.NOT_COMPARED}
    return {"options": {**options, "data": Path(cfg.data).name},      # the files tell cells apart, and not their path
            "code": training.code_hash(CODE), "torch": torch.__version__, "files": files, "dtype": str(dtype)}


def main(argv=None):
    with training.one_line_errors():
        cells = cells_of(argv)
        cfg, folder = cells[0], Path(cells[0].out_dir)
        (folder / "cells").mkdir(parents=True, exist_ok=True)
        device, dtype, why = training.choose_device(cfg.device, cfg.dtype)
        print(f"images: {cfg.data}, learning from {cfg.sprites}, testing on {', '.join(tested_sprites(cfg))}"
              + (f" of {cfg.test_data}" if cfg.test_data else ""))
        if cfg.data == "generated":
            print("drawn by the rules of the original images; for those see the README (--data=mini, --data=FOLDER)")
        jobs = {}
        for cell in cells:
            record, path = record_of(cell, dtype), folder / "cells" / f"{training.run_name(cell)}.json"
            done = sweep.load(path)
            if not (cfg.resume and record.items() <= done.items() and "accuracy" in done):
                jobs[path] = (cell, record, device, dtype)
        print(f"device: {why}\n{len(cells)} cells, {len(cells) - len(jobs)} of them finished before")
        failed = run(jobs, cfg.workers or (sweep.cores() if device.type == "cpu" else 4)) if jobs else []
        # everything that this code has finished in the folder: a sweep may come in pieces
        known = [cell for cell in map(sweep.load, sorted((folder / "cells").glob("*.json"))) if "accuracy" in cell]
        mine = [cell for cell in known if cell["options"]["sprites"] == cfg.sprites
                and all(cell[name] == record[name] for name in ("code", "torch"))]
        if len(mine) < len(known):
            print(f"left out: {len(known) - len(mine)} cells in {folder} of other sprites, code or torch")
        if mine:
            learning_curves.write_csv(mine, folder / "results.csv")
            learning_curves.report(folder / "results.csv", cfg.paper)
    for name, why in failed:
        print(f"failed: {name}: {why}", file=sys.stderr)
    if failed:
        raise SystemExit(1)


def run(jobs, workers):
    """Trains the cells {path: arguments of train} and prints each as it ends. -> [(cell, why)] of those that failed."""
    failed, n_steps = [], sum(steps_of(job[0]) for job in jobs.values())
    for i, (path, cell) in enumerate(sweep.run(train, jobs, n_steps, workers)):
        if "failed" in cell:
            failed.append((path.stem, cell["failed"]))
            continue
        accuracy = "  ".join(f"{sprites} {value:.3f}" for sprites, value in cell["accuracy"].items())
        tqdm.write(f"{i + 1}/{len(jobs)}  {path.stem}:  {accuracy}  {cell['seconds']:.0f} s")
    return failed


if __name__ == "__main__":
    training.start(main)
