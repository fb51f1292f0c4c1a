"""Your instruments on models that were trained: a table for each run of train_relgames.py below a folder.

    python -m assignments.a4.trained out/a4
"""
import sys
from pathlib import Path

import torch

from assignments.a4 import answers
from assignments.a4.planted import Plant
from data import relational_games as games
from model import VisionTransformer, model_config
from toolbox.checkpoints import load_checkpoint, load_weights
from toolbox.options import fail, one_line_errors, start

PLACES, SEEDS = 9, range(101, 120)                                     # of untrained models: p is at least 1/20


def load(path, images=500, sprites=None):
    """A run's weights.pt -> Plant: model, make, x, y, same, compared; what its relations do, nobody knows.

    The model is in evaluation mode. Images that it was not trained on, of its own sprites or others. Pairs of places
    count in which the objects are the same in some image: in occurs, the top and each place at the bottom.
    """
    checkpoint = load_checkpoint(path)
    o = checkpoint["options"]

    def make(seed):
        torch.manual_seed(seed)
        return VisionTransformer(model_config(o), image_size=36, patch_size=12, n_classes=2, pool=o["pool"])
    model = make(o["seed"])
    load_weights(model, checkpoint["model"], path)
    model.eval()
    drawn, labels = games.test_images(o["task"], sprites or o["sprites"], images, o["seed"])
    x = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255
    kinds = torch.from_numpy(games.kinds_of_pairs(drawn, sprites or o["sprites"]))               # (N, 9, 9)
    same = kinds == 0
    return Plant(model, make, x, torch.from_numpy(labels), same, (kinds >= 0) & same.any(0), roles=None)


def table(p):
    """One line for each relation: its AUC, the untrained ones, p, what is lost, verdicts; then redundant pairs."""
    board = p.same, p.compared
    control = answers.untrained_aucs(p.make, p.x, *board, SEEDS)
    found = answers.verdicts(p.model, p.make, p.x, p.y, *board, SEEDS)
    lines = ["| relation | AUC | untrained | p | lost: zero | of another image | verdicts |", "|" + "---|" * 7]
    for name, r in sorted(answers.relations_of(p.model, p.x, PLACES).items()):
        auc = float(answers.pair_aucs(r[:, None], *board)[0])
        losses = [answers.lost(p.model, p.x, p.y, [name], how) for how in ("zero", "resample")]
        cells = [name, f"{auc:.3f}", f"{control[name].min():.3f} to {control[name].max():.3f}",
                 f"{answers.p_value(auc, control[name]):.2f}",
                 *(f"{mean:+.3f} ± {error:.3f}" for mean, error in losses),
                 ", ".join(word for word, true in found[name].items() if true)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    pairs = answers.redundant(p.model, p.x, p.y, list(found))
    return "\n".join([*lines, "", f"stand in for each other: {', '.join(map(str, sorted(pairs))) or 'none'}"])


@torch.no_grad()
def accuracy(p):
    return float((p.model(p.x)[0].argmax(-1) == p.y).float().mean())


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    files = sorted(Path(argv[0]).rglob("weights.pt")) if len(argv) == 1 else []
    if not files:
        fail("give one folder with runs of train_relgames.py, as: python -m assignments.a4.trained out/a4")
    for path in files:
        with one_line_errors():
            p = load(path)
        print(f"{path.parent.name}: accuracy {accuracy(p):.3f} on {len(p.y)} images\n\n{table(p)}\n", flush=True)


if __name__ == "__main__":
    start(main)
