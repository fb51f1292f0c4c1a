"""ANSWERS to assignment 4, for its grader; students leave this file shut. Right functions, and small models."""
import math
from contextlib import ExitStack, contextmanager

import torch

from assignments.a4.planted import D, PLACES, Planted
from assignments.grading import right
from model import TransformerConfig, VisionTransformer
from toolbox.inside import layers_of, watch, without


def by_pairs(scores, positive, variant):
    """The definition of the AUC, comparison by comparison. Variant 2: larger minus smaller, from -1 to 1."""
    above = [float(a > b) + 0.5 * float(a == b) for a in scores[positive] for b in scores[~positive]]
    share = sum(above) / len(above) if above else math.nan
    return share if variant == 1 else 2 * share - 1


def larger(a, b, variant):
    """a (n, R), b (m, R) -> the AUC of each column, (R,); of no comparison nan."""
    share = 0.5 + 0.5 * (a[:, None].double() - b).sign().mean((0, 1))
    return share if variant == 1 else 2 * share - 1


def right_auc(variant):
    return lambda scores, positive: larger(scores[positive][:, None], scores[~positive][:, None], variant).item()


def right_pair_aucs(variant):
    def pair_aucs(r, same, compared):
        total, weight = torch.zeros(r.size(1), dtype=torch.float64), 0
        for i, j in compared.any(0).nonzero().tolist():
            positive, negative = (r[compared[:, i, j] & (same[:, i, j] == kind), :, i, j] for kind in (True, False))
            if w := len(positive) * len(negative):
                w = w if variant == 1 else 1
                total += w * larger(positive, negative, variant)
                weight += w
        return total / weight if weight else total * math.nan
    return pair_aucs


def right_relations_of(model, x, places):
    with unchanged(model), watch(model) as layers:
        model(x)
    return {(one.number, l): one.r[:, l, -places:, -places:] for one in layers for l in range(one.n_relations)}


def right_untrained_aucs(variant):
    def untrained_aucs(make, x, same, compared, seeds):
        found = []
        for seed in seeds:
            r = right_relations_of(make(seed), x, same.size(-1))
            found.append(dict(zip(r, right_pair_aucs(variant)(torch.stack([*r.values()], 1), same, compared))))
        control = {name: torch.stack([one[name] for one in found]) for name in found[0]}
        if variant == 1:
            return control
        return {layer: torch.cat([values for name, values in control.items() if name[0] == layer])
                for layer in {name[0] for name in control}}            # variant 2: all relations of a layer together
    return untrained_aucs


def right_p_value(variant):
    def p_value(value, untrained):
        centre = 0.5 if variant == 1 else 0
        return (1 + int((abs(untrained - centre) >= abs(value - centre)).sum())) / (1 + len(untrained))
    return p_value


def right_derangement(n, seed):
    """Neighbours of an even number change places, after a shuffle: right in both variants."""
    order = torch.empty(n, dtype=torch.int64)
    pairs = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).view(-1, 2)
    order[pairs] = pairs.flip(1)
    return order


@contextmanager
def right_knocked_out(model, names, how, seed=0):
    layers = {one.number: one for one in layers_of(model) if one.n_relations}
    with ExitStack() as stack:
        for layer, l in names:
            stack.enter_context(without([layers[layer]], "relations", l, how, seed))
        yield


def right_lost(variant):
    def lost(model, x, y, names, how, seed=0):
        def score():
            logits = model(x)[0]
            right_one = logits.log_softmax(-1).gather(1, y[:, None])[:, 0]
            return right_one if variant == 2 else (logits.argmax(-1) == y).double()
        with unchanged(model), right_knocked_out(model, [], how):
            intact = score()
            with right_knocked_out(model, names, how, seed):
                d = intact - score()
        return d.mean().item(), d.std().item() / len(d) ** 0.5
    return lost


@contextmanager
def unchanged(model):
    mode = model.training
    with torch.no_grad():
        yield model.eval()
    model.train(mode)


def all_right(answers, variant, but):
    """The student's module with all functions right, but the one that is tested."""
    functions = dict(auc=right_auc(variant), pair_aucs=right_pair_aucs(variant), relations_of=right_relations_of,
                     untrained_aucs=right_untrained_aucs(variant), p_value=right_p_value(variant),
                     derangement=right_derangement, knocked_out=right_knocked_out, lost=right_lost(variant))
    return right(answers, **{name: function for name, function in functions.items() if name != but})


# ---- small models ----------------------------------------------------------------------------------------------------

def vision(**options):
    cfg = TransformerConfig(d_model=8, n_layers=2, n_heads=2, n_ra=1, n_relations=2, rel_proj_dim=3, dropout=0.3,
                            position="learned", symbols="positional", **options)
    return VisionTransformer(cfg, image_size=4, patch_size=2, n_classes=2, pool="mean_cls").double()


class Parallel(Planted):
    """Two untrained layers side by side, so that the output is theirs and nothing else's."""

    def forward(self, x, targets=None):
        symbols = torch.arange(x.numel()).view(x.shape).double().sin()
        return torch.cat([block.attention(x, symbols) for block in self.stack.blocks], -1), None


def by_definition(model, x, change):
    """Eq. 3, where change(layer, r) (N, R, T, T) is put in place of r."""
    outputs, symbols = [], torch.arange(x.numel()).view(x.shape).double().sin()
    for layer, block in enumerate(model.stack.blocks, 1):
        m = block.attention.relational

        def heads(linear, z, n):
            return linear(z).unflatten(-1, (n, -1)).transpose(1, 2)    # (N, n, T, width)
        q, k, s = heads(m.W_q, x, 2), heads(m.W_k, x, 2), heads(m.W_s, symbols, 2)
        q_rel, k_rel = heads(m.W_q_rel, x, 3), heads(m.W_q_rel if m.symmetric else m.W_k_rel, x, 3)
        alpha = (q @ k.mT / q.size(-1) ** 0.5).softmax(-1)
        r = change(layer, q_rel @ k_rel.mT / q_rel.size(-1) ** 0.5)
        message = torch.einsum("nhij,nlij,hld->nihd", alpha, r, m.W_r) + (alpha @ s).transpose(1, 2)
        outputs.append(m.W_o(message.flatten(2)))
    return torch.cat(outputs, -1)


def parallel():
    model = Parallel().double().eval()
    return model, torch.randn(4, 1 + PLACES, D).double()


class Answers(torch.nn.Module):
    """A model whose logits are given: intact, and knocked out. In training it is wrong."""

    def __init__(self, n):
        super().__init__()
        self.intact, self.without, self.out = torch.randn(n, 2).double(), torch.randn(n, 2).double(), False

    def forward(self, x, targets=None):
        return (0 if self.training else 1) * (self.without if self.out else self.intact), None


@contextmanager
def knocks_out(model, names, how, seed=0):
    assert (names, how, seed) == ([(1, 0), (2, 1)], "resample", 3), (
        f'lost(model, x, y, [(1, 0), (2, 1)], "resample", 3) knocked out {names}, {how!r}, seed {seed}')
    model.out = True
    yield
    model.out = False
