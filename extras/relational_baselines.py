"""Is it attention that helps on Relational Games, or any relational bottleneck? Four other architectures, each from its
paper, beside DAT 0+2 and the Transformer: same images, same order, same optimizer, as many parameters as the DAT.

    python -m extras.relational_baselines                      occurs and xoccurs, 1,000 and 2,500 images, five seeds;
                                                               half an hour on two cores
    python -m extras.relational_baselines --task=same --train_size=500 --seed=1,2,3

    RelationNetwork   f( sum_ij g(o_i, o_j) ), f and g MLPs                       (Santoro et al., 2017)
    CoRelNet          an MLP reads softmax_j <z_i, z_j> and nothing else          (Kerg et al., 2022)
    PrediNet          differences between pairs of objects that heads pick out    (Shanahan et al., 2020)
    Abstractor        relational cross-attention: symbols, mixed by relations     (Altabaa et al., 2024)

All take the nine objects as tokens, as the DAT does. Nothing was tuned for any of them: a difference between the four
may be one of settings. What is finished is in out_dir/baselines.csv, and a repeated command goes on from there.
"""
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data import relational_games as games
from model import TransformerConfig, VisionTransformer, patchify
from relational_attention import RelationalCrossAttention
from toolbox import training
from toolbox.figures import drawing
from toolbox.figures.runs import read_csv
from toolbox.files import write_csv, write_text
from toolbox.options import agreed, at_least, make_out_dir, one_line_errors, parse_options, start
from toolbox.stats import mean_text, paired_difference

D, N = 128, 9                               # width of a token, as in the DAT; objects on a board
DAT = TransformerConfig(d_model=D, n_layers=2, n_heads=2, n_ra=2, d_ff=256, activation="swiglu", dropout=0.1,
                        position="learned", final_norm=False, symbols="positional", n_symbols=N, symmetric=True)


def mlp(*widths):
    """Linear layers of these widths, with ReLUs between them."""
    layers = [module for a, b in zip(widths, widths[1:]) for module in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Classifier(nn.Module):
    """Images to two classes: objects are embedded as in VisionTransformer; `read` is what a subclass makes of them."""

    def __init__(self, positions=True):
        super().__init__()
        self.embedding = nn.Sequential(nn.LayerNorm(432), nn.Linear(432, D), nn.LayerNorm(D), nn.Dropout(0.1))
        self.positions = nn.Parameter(torch.randn(N, D)) if positions else None

    def forward(self, images, targets=None):
        """images (B, 3, 36, 36) -> logits (B, 2) and, given targets (B,), their mean cross-entropy in nats."""
        x = self.embedding(patchify(images, 12))                       # (B, N, D)
        logits = self.read(x if self.positions is None else x + self.positions)
        return logits, None if targets is None else F.cross_entropy(logits, targets)


class RelationNetwork(Classifier):
    """f( sum_ij g(o_i, o_j) ), Eq. 1 of Santoro et al. (2017): g has four layers, f three."""

    def __init__(self, width):
        super().__init__()
        self.g, self.f = mlp(2 * D, *[width] * 4), mlp(*[width] * 3, 2)

    def read(self, o):
        pairs = torch.cat([o[:, :, None].expand(-1, -1, N, -1), o[:, None].expand(-1, N, -1, -1)], -1)
        return self.f(self.g(pairs).relu().sum((1, 2)))                # pairs: (B, N, N, 2 D)


class CoRelNet(Classifier):
    """R = softmax(Z Z^T) row by row, and an MLP reads R alone (Kerg et al., 2022): no feature gets past it.

    The place of an object is its row in R: tokens need no positions. paper: Z are the tokens; here: W_z times them,
    and a scale 1/sqrt(D), because a norm makes tokens so long that each softmax would be 1 for the object itself.
    """

    def __init__(self, width):
        super().__init__(positions=False)
        self.W_z, self.f = nn.Linear(D, D, bias=False), mlp(N * N, *[width] * 3, 2)

    def read(self, x):
        z = self.W_z(x)
        R = (z @ z.mT / D ** 0.5).softmax(-1)                          # (B, N, N)
        return self.f(R.flatten(1))


class PrediNet(Classifier):
    """Each head picks out two objects and compares them along 16 learned directions (Shanahan et al., 2020).

    Q_a = flatten(L) W_Qa,  E_a = softmax(Q_a (L W_K)^T) L for a = 1, 2;  the head says (E_1 W_S - E_2 W_S, places).
    paper: 32 heads; here: 8, because 32 would give W_Q alone three times the DAT's parameters.
    """

    def __init__(self, width, heads=8, key=16, relations=16):
        super().__init__(positions=False)
        self.heads = heads
        place = torch.cartesian_prod(torch.linspace(-1, 1, 3), torch.linspace(-1, 1, 3))
        self.register_buffer("place", place)                           # (N, 2), row and column
        self.W_Q = nn.Linear(N * (D + 2), 2 * heads * key, bias=False)
        self.W_K = nn.Linear(D + 2, key, bias=False)
        self.W_S = nn.Linear(D, relations, bias=False)
        self.f = mlp(heads * (relations + 4), width, 2)

    def read(self, x):
        L = torch.cat([x, self.place.expand(len(x), -1, -1)], -1)      # (B, N, D + 2)
        Q = self.W_Q(L.flatten(1)).unflatten(1, (2, self.heads, -1))   # (B, 2, heads, key)
        E = torch.einsum("bahk,bnk->bahn", Q, self.W_K(L)).softmax(-1) @ L[:, None]          # (B, 2, heads, D + 2)
        compared = self.W_S(E[..., :D])                                # (B, 2, heads, relations)
        said = torch.cat([compared[:, 0] - compared[:, 1], E[:, 0, :, D:], E[:, 1, :, D:]], -1)
        return self.f(said.flatten(1))


class Abstractor(Classifier):
    """A starts as symbols; in each layer objects relate and A is mixed accordingly (Altabaa et al., 2024, Alg. 1):

        A <- norm( A + RCA(objects, A) ),  A <- norm( A + MLP(A) )

    RCA's weights come from the objects, its values from A: A never sees a feature of an object. (paper: a layer may
    also have self-attention of A; here: not.)
    """

    def __init__(self, width):
        super().__init__()
        self.symbols = nn.Parameter(torch.randn(N, D))
        self.relate = nn.ModuleList(RelationalCrossAttention(D, 2, dropout=0.1) for _ in range(2))
        self.mlps = nn.ModuleList(mlp(D, width, D) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(4))
        self.head = nn.Linear(D, 2)

    def read(self, x):
        A = self.symbols.expand(len(x), N, D)
        for i, (rca, feed) in enumerate(zip(self.relate, self.mlps)):
            A = self.norms[2 * i](A + rca(x, A))                       # (B, N, D)
            A = self.norms[2 * i + 1](A + feed(A))
        return self.head(A.mean(1))


def vision_transformer(**options):
    return VisionTransformer(replace(DAT, **options), image_size=36, patch_size=12, n_classes=2, pool="mean_cls")


# Each with the width that gives it the DAT's parameters.
MODELS = {"DAT 0+2": vision_transformer,
          "Transformer 2+0 (d_ff 301)": lambda: vision_transformer(n_ra=0, d_ff=301),
          "Relation Network": lambda: RelationNetwork(244), "CoRelNet": lambda: CoRelNet(396),
          "PrediNet": lambda: PrediNet(373), "Abstractor": lambda: Abstractor(447)}


# ---- training: the loop of train_relgames.py -------------------------------------------------------------------------

@dataclass
class Options:
    model: Literal[tuple(MODELS)] = "DAT 0+2"   # default: all of them
    task: Literal[games.TASKS] = "occurs"   # default: occurs and xoccurs
    train_size: int = 1000                  # default: 1000 and 2500
    seed: int = 1                           # default: 1 to 5
    test_size: int = 5000                   # number of test images
    epochs: int = 50                        # passes through the training images
    batch_size: int = 512                   # images in one step
    learning_rate: float = 1e-3             # AdamW, constant
    weight_decay: float = 0.0               # AdamW
    beta1: float = 0.9                      # AdamW
    beta2: float = 0.99                     # AdamW
    device: str = "auto"                    # auto: cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"   # of matrix products
    out_dir: str = "out/relational_baselines"   # for baselines.csv, baselines.md and baselines.png

    def __post_init__(self):
        at_least(self, train_size=2, seed=0, test_size=1, epochs=1, batch_size=1, learning_rate=0)
        for name, choices in (("model", MODELS), ("task", games.TASKS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose from {', '.join(choices)}")


def train(cfg, device, dtype):
    """-> accuracy on unseen images of the sprites that it learned from, and the number of parameters."""
    (images, labels), tests = games.split(cfg.task, "pentos", cfg.train_size, cfg.test_size, cfg.seed)
    images, labels = (torch.from_numpy(x).to(device) for x in (images, labels))    # uint8 (n, 36, 36, 3), (n,)
    torch.manual_seed(cfg.seed)
    model = MODELS[cfg.model]().to(device)
    optimizer, step = training.make_optimizer(model, cfg), 0
    for epoch in range(cfg.epochs):
        order = torch.from_numpy(np.random.default_rng([cfg.seed, epoch]).permutation(len(images))).to(device)
        for batch in order.split(cfg.batch_size):
            training.reseed(cfg.seed, step := step + 1)               # for dropout
            with training.autocast(device, dtype):
                _, loss = model(pixels(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    model.eval()
    right = 0
    with torch.no_grad(), training.autocast(device, dtype):
        for x, y in zip(*(torch.from_numpy(part).to(device).split(1000) for part in tests["pentos"])):
            right += (model(pixels(x))[0].argmax(-1) == y).sum().item()
    return right / cfg.test_size, sum(p.numel() for p in model.parameters())


def pixels(images):
    """uint8 (B, H, W, C) -> (B, C, H, W) in 0 ... 1."""
    return images.permute(0, 3, 1, 2).float() / 255


# ---- what came out ---------------------------------------------------------------------------------------------------

SETTINGS = ("test_size", "epochs", "batch_size", "learning_rate", "weight_decay", "beta1", "beta2", "dtype")
KEYS = ("model", "task", "train_size", "seed", *SETTINGS)


def report(rows, out_dir):
    """The table (also baselines.md) and the figure baselines.png: accuracies, differences to DAT 0+2 paired by seed."""
    cells = {}
    for row in rows:
        one = cells.setdefault((row["task"], int(row["train_size"])), {}).setdefault(row["model"], {})
        one[int(row["seed"])] = float(row["accuracy"])
    parameters = {row["model"]: int(row["n_parameters"]) for row in rows}
    lines = ["| task | images | model | parameters | accuracy | seeds | DAT 0+2 minus it |", "|---" * 7 + "|"]
    for (task, size), by_model in sorted(cells.items()):
        for name in filter(by_model.get, MODELS):
            one = None if name == "DAT 0+2" else paired_difference(by_model.get("DAT 0+2", {}), by_model[name])
            interval = "" if one is None or one.low is None else f" [{one.low:+.3f}, {one.high:+.3f}]"
            said = "" if one is None else f"{one.mean:+.3f}{interval}: {one.verdict('DAT 0+2', name)}"
            lines.append(f"| {task} | {size} | {name} | {parameters[name]:,} | "
                         f"{mean_text(list(by_model[name].values()), 3)} | {len(by_model[name])} | {said} |")
    write_text(out_dir / "baselines.md", "\n".join(lines) + "\n")
    with drawing.house_style():
        drawing.save(draw(cells), out_dir / "baselines.png")
    return "\n".join(lines)


def draw(cells):
    """A panel for each task and size, a row for each model: mean, 95% interval, dots for the seeds -> Figure."""
    fig, axes = drawing.panels(1, len(cells), 2.4 * len(cells) + 1.2, 2.2, sharey=True, sharex=True)
    for ax, ((task, size), by_model) in zip(axes[0], sorted(cells.items())):
        ax.axvline(0.5, color="black", lw=0.5)                        # guessing
        for y, name in enumerate(MODELS):
            values = list(by_model.get(name, {}).values())
            if values:
                drawing.draw_interval(ax, y, values, drawing.COLORS[0] if name == "DAT 0+2" else drawing.GRAYS[0])
        ax.set(title=f"{task}, {size:,} images", xlabel="test accuracy", ylim=(len(MODELS) - 0.5, -0.5))
        ax.set_yticks(range(len(MODELS)), list(MODELS))
        ax.grid(axis="y", alpha=0)
    return fig


def main(argv=None):
    with one_line_errors():
        configs = parse_options(Options, argv=argv, grid=dict(
            model=tuple(MODELS), task=("occurs", "xoccurs"), train_size=(1000, 2500), seed=(1, 2, 3, 4, 5)))
        agreed(configs, (*SETTINGS, "device", "out_dir"))
        configs.sort(key=lambda cfg: cfg.seed)
        device, dtype, why = training.choose_device(configs[0].device, configs[0].dtype)
        out_dir = Path(configs[0].out_dir)
        make_out_dir(out_dir)
        path = out_dir / "baselines.csv"
        rows = read_csv(path) if path.exists() else []
    done = {tuple(row[key] for key in KEYS) for row in rows}
    waiting = [(cfg, key) for cfg in configs if (key := key_of(cfg, dtype)) not in done]
    print(f"device: {why}\n{len(configs)} runs, {len(configs) - len(waiting)} of them finished before")
    for i, (cfg, key) in enumerate(waiting, 1):
        accuracy, n_parameters = train(cfg, device, dtype)
        rows.append(dict(zip(KEYS, key), accuracy=accuracy, n_parameters=n_parameters))
        write_csv(path, (*KEYS, "accuracy", "n_parameters"), rows)
        print(f"{i}/{len(waiting)}  {cfg.model}, {cfg.task}, {cfg.train_size} images, seed {cfg.seed}: {accuracy:.3f}")
    settings = key_of(configs[0], dtype)[-len(SETTINGS):]             # rows of other settings are kept, and not shown
    rows = [row for row in rows if tuple(row[name] for name in SETTINGS) == settings]
    print(f"\n{report(rows, out_dir)}\n", path, out_dir / "baselines.md", out_dir / "baselines.png", sep="\n")


def key_of(cfg, dtype):
    return tuple(str(dtype) if name == "dtype" else str(getattr(cfg, name)) for name in KEYS)


if __name__ == "__main__":
    start(main)
