"""Planted models: small models with weights set by hand, so that it is known what each relation does.

A board has T = 5 tokens: a class token, the object on top and three at the bottom, all different there. An object is
one of 12 kinds (one-hot), has a mark of plus or minus .25, a number for its place, and five features of noise. The
object on top is most often the same as the first at the bottom, rarely the same as the last. The answer is yes where
the object on top is also at the bottom AND most marks at the bottom are those of the top: a quarter of the boards; 5%
of the labels are wrong. Two layers of the repository's relational attention, whose attention weights are uniform,
read the board, three relations each; those of the first are symmetric. Behind them a fixed reader adds up what the
layers say of the object on top.

    p = plant(seed, spare=False)
    p.model(p.x)[0]                            # (N, 2), as any model of this repository
    p.make(seed)                               # the same model, untrained
    p.roles                                    # {(layer, relation): one of ROLES}

The grader plants new ones for each seed. Names of relations: (layer from 1 on, relation from 0 on).
"""
from dataclasses import dataclass
from typing import Callable

import torch
from torch import nn

from model import DualAttention, TransformerConfig

KINDS, NOISE, PLACES, R = 12, 5, 4, 3
MARK, CONSTANT, PLACE, D = KINDS, KINDS + 1, KINDS + 2, KINDS + 3 + NOISE
OFTEN = 0.8, 0.15, 0.05                        # if the top occurs at the bottom, how often at each place
NUMBERS = 1, 1, 0.6, 0.2                       # of the places
ROLES = {"same": "it tells whether two objects are of one kind, and the answer needs it",
         "spare": "it tells whether two objects are of one kind, and another relation tells the same to the answer",
         "unused": "it tells whether two objects are of one kind, and nothing reads it",
         "mark": "it tells the marks, which have nothing to do with kinds, and the answer needs them",
         "place": "it tells the place, and so how often objects there are the same, and nothing reads it",
         "untrained": "its weights are random, as before training, and nothing reads it",
         "constant": "it is the same number for all pairs of all boards, and the answer is used to this number"}


@dataclass
class Plant:
    model: nn.Module
    make: Callable                             # a seed -> an untrained model of the same shape
    x: torch.Tensor                            # (N, 5, D) boards
    y: torch.Tensor                            # (N,) right answers, 0 or 1
    same: torch.Tensor                         # (N, 4, 4): are the objects at places i and j of one kind?
    compared: torch.Tensor                     # (N, 4, 4): the pairs that count, top with bottom and bottom with top
    roles: dict


class Planted(nn.Module):
    """Two layers of relational heads that read the board x itself, and a reader without parameters."""

    def __init__(self):
        super().__init__()
        self.stack = nn.Module()
        self.stack.blocks = nn.ModuleList()
        for symmetric in (True, False):
            cfg = TransformerConfig(d_model=D, n_heads=2, n_ra=2, n_relations=R, rel_proj_dim=KINDS, dropout=0.2,
                                    symmetric=symmetric)
            block = nn.Module()
            block.attention = DualAttention(cfg)
            self.stack.blocks.append(block)
        self.occurs, self.agrees, self.shift = [], [], []              # which relations the reader takes for what

    def forward(self, x, targets=None):
        """x (N, 5, D) -> logits (N, 2), None."""
        # rounded: what adds nothing changes nothing, not even the last bit
        said = [block.attention(x, x.new_zeros(x.shape))[:, 1, :R].round(decimals=6) for block in self.stack.blocks]
        score = x.new_ones(len(x))
        for names, largest in ((self.occurs, True), (self.agrees, False), (self.shift, None)):
            if names:
                values = torch.stack([said[layer - 1][:, l] for layer, l in names])          # (names, N)
                if largest is None:                                    # a constant: -2
                    score = score + values[0]
                else:                                                  # a sum over senders -> -1 or 1
                    score = score + (values.amax(0) * 2 - 3 if largest else values[0] - 1).clamp(-1, 1)
        return torch.stack([0 * score, 2 * score.clamp(-1, 1)], -1), None          # -1 or 1: no, yes


def plant(seed, spare=False):
    """spare: two relations tell the same; otherwise one. -> Plant, in float64."""
    g = torch.Generator().manual_seed(seed)
    x, y, same, compared = boards(g, 300)
    roles = ["spare", "spare"] if spare else ["same", "unused"]
    roles += ["mark", "constant"]
    places = [(layer, l) for layer in (1, 2) for l in range(R)]
    trap = places.pop(torch.randint(R, (), generator=g))               # in the layer whose relations are symmetric
    place = places.pop(-1 - int(torch.randint(R, (), generator=g)))    # in the other one
    roles = {places[i]: role for i, role in zip(torch.randperm(4, generator=g).tolist(), roles)}
    roles |= {trap: "untrained", place: "place"}
    model = make(seed)
    with torch.no_grad():
        for block in model.stack.blocks:
            m = block.attention.relational
            for p in (m.W_q.weight, m.W_k.weight, m.W_s.weight, m.W_o.weight):
                p.zero_()
            d_h = m.W_r.size(-1)
            for l in range(R):
                m.W_o.weight[l, [l, d_h + l]] = 1                      # feature l of both heads, added
        for (layer, l), role in sorted(roles.items()):
            if role == "untrained":
                write_untrained(model.stack.blocks[0].attention.relational, l, x, same, compared, g)
            else:
                write(model, layer, l, role, g)
    return Plant(model, make, x, y, same, compared, dict(sorted(roles.items())))


def boards(g, n):
    """-> x (n, 5, D), y (n,), same and compared (n, 4, 4)."""
    kinds = torch.rand(n, KINDS, generator=g).argsort(-1)[:, :PLACES]              # all different
    occurs = torch.rand(n, generator=g) < 0.5
    at = 1 + torch.multinomial(torch.tensor(OFTEN), n, replacement=True, generator=g)
    kinds[:, 0] = torch.where(occurs, kinds.gather(1, at[:, None])[:, 0], kinds[:, 0])
    marks = 2.0 * torch.randint(2, (n, PLACES), generator=g) - 1
    objects = torch.cat([nn.functional.one_hot(kinds, KINDS), 0.25 * marks[..., None], torch.ones(n, PLACES, 1),
                         torch.tensor(NUMBERS).expand(n, PLACES)[..., None],
                         0.1 * torch.randn(n, PLACES, NOISE, generator=g)], -1)
    x = torch.zeros(n, 1 + PLACES, D)
    x[:, 1:], x[:, 0, CONSTANT] = objects, 1
    agrees = marks[:, 0] * marks[:, 1:].sum(-1) > 0
    wrong = torch.rand(n, generator=g) < 0.05
    same = kinds[:, :, None] == kinds[:, None]
    compared = torch.zeros(n, PLACES, PLACES, dtype=torch.bool)
    compared[:, 0, 1:] = compared[:, 1:, 0] = True
    return x.double(), ((occurs & agrees) ^ wrong).long(), same, compared


def make(seed):
    """The untrained model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Planted().double()


def write_untrained(m, l, x, same, compared, g):
    """The third of nine random relations, by how clearly they tell the same from others; nothing reads it."""
    def contrast(W):
        r = ((x @ W.T) @ (x @ W.T).mT)[:, 1:, 1:]
        yes, no = r[same & compared], r[~same & compared]
        return (yes.mean() - no.mean()) / (yes.var() + no.var()) ** 0.5
    drawn = (2 * torch.rand(9, KINDS, D, generator=g, dtype=torch.float64) - 1) * D ** -0.5      # as nn.Linear starts
    m.W_q_rel.weight[l * KINDS:(l + 1) * KINDS] = sorted(drawn, key=contrast)[2]
    m.W_r[:, l] = 0


def write(model, layer, l, role, g):
    """Sets the weights of one relation, of any scale; its row of W_r undoes scale and sign, as far as it is read."""
    m = model.stack.blocks[layer - 1].attention.relational
    rows = slice(l * KINDS, (l + 1) * KINDS)
    scale, first = (0.5 + torch.rand(2, generator=g)).tolist()
    W = torch.zeros(KINDS, D, dtype=torch.float64)
    if role == "mark":
        W[0, MARK] = 4                                                 # marks are 1/4
    elif role == "place":
        W[0, PLACE] = 1
    elif role == "constant":
        W[0, CONSTANT] = 1
    else:
        W[:, :KINDS] = torch.eye(KINDS)
    W *= (scale * KINDS ** 0.5) ** 0.5                                 # r = scale where it would be 1
    m.W_q_rel.weight[rows] = W
    sign = 1
    if not m.symmetric:
        sign = 1 if torch.rand((), generator=g) < 0.5 else -1
        m.W_k_rel.weight[rows] = sign * W
    # uniform attention: sum_j alpha_ij r_ij is the sum over the five tokens, divided by 5
    gain = (-2 if role == "constant" else 5) / (sign * scale)
    heads = (first, 1 - first)
    if role in ("unused", "place"):                                    # nothing, or what the other head takes back
        heads = (0, 0) if torch.rand((), generator=g) < 0.5 else (first, -first)
    m.W_r[:, l] = 0
    m.W_r[:, l, l] = gain * torch.tensor(heads, dtype=torch.float64)
    taken = {"same": model.occurs, "spare": model.occurs, "mark": model.agrees, "constant": model.shift}.get(role)
    if taken is not None:
        taken.append((layer, l))
