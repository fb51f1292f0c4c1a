"""Teacher's file: students are asked not to open it. Assignment 4, solved; VARIANT says which."""
import math
from contextlib import ExitStack, contextmanager
from itertools import combinations

import torch

from toolbox.inside import layers_of, watch

VARIANT = 1


# ---- 1 AUC -----------------------------------------------------------------------------------------------------------

def auc(scores, positive):
    high, low = scores[positive], scores[~positive]
    if not len(high) or not len(low):
        return math.nan
    above, equal = high[:, None] > low, high[:, None] == low
    if VARIANT == 2:
        return (above.double().mean() - (high[:, None] < low).double().mean()).item()
    return (above.double() + 0.5 * equal.double()).mean().item()


# ---- 2 within places -------------------------------------------------------------------------------------------------

def pair_aucs(r, same, compared):
    N, R, P, _ = r.shape
    total, weight = torch.zeros(R, dtype=torch.float64), 0
    for i in range(P):
        for j in range(P):
            counts = compared[:, i, j]
            positive = same[counts, i, j]
            w = int(positive.sum()) * int((~positive).sum())
            if w == 0:
                continue
            if VARIANT == 2:
                w = 1
            total += w * torch.tensor([auc(r[counts, l, i, j], positive) for l in range(R)], dtype=torch.float64)
            weight += w
    return total / weight if weight else torch.full((R,), math.nan, dtype=torch.float64)


# ---- 3 the control ---------------------------------------------------------------------------------------------------

@contextmanager
def evaluating(model):
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(mode)


def relations_of(model, x, places):
    with evaluating(model), watch(model) as layers:
        model(x)
    return {(layer.number, l): layer.r[:, l, -places:, -places:]
            for layer in layers if layer.r is not None for l in range(layer.r.size(1))}


def all_aucs(model, x, same, compared):
    r = relations_of(model, x, same.size(-1))
    return {name: pair_aucs(values[:, None], same, compared)[0] for name, values in r.items()}


def untrained_aucs(make, x, same, compared, seeds):
    found = [all_aucs(make(seed), x, same, compared) for seed in seeds]
    if VARIANT == 2:
        return {layer: torch.stack([one[name] for one in found for name in one if name[0] == layer])
                for layer in {name[0] for name in found[0]}}
    return {name: torch.stack([one[name] for one in found]).double() for name in found[0]}


def p_value(value, untrained):
    centre = 0.5 if VARIANT == 1 else 0.0
    as_far = ((untrained - centre).abs() >= abs(value - centre)).sum().item()
    return (1 + as_far) / (1 + len(untrained))


# ---- 4 knock-outs ----------------------------------------------------------------------------------------------------

def derangement(n, seed):
    if n < 2:
        raise ValueError(f"n={n}: must be at least 2")
    g = torch.Generator().manual_seed(seed)
    if VARIANT == 2:
        if n % 2:
            raise ValueError(f"n={n}: must be even")
        pairs = torch.randperm(n, generator=g).view(-1, 2)
        order = torch.empty(n, dtype=torch.int64)
        order[pairs[:, 0]], order[pairs[:, 1]] = pairs[:, 1], pairs[:, 0]
        return order
    while True:
        order = torch.randperm(n, generator=g)
        if (order != torch.arange(n)).all():
            return order


@contextmanager
def knocked_out(model, names, how, seed=0):
    modules = {layer.number: layer.module for layer in layers_of(model) if layer.n_relations}
    kept = {number: m.W_r.detach().clone() for number, m in modules.items()}
    with ExitStack() as stack:
        for number, l in names:
            m = modules[number]
            if how == "zero":
                stack.callback(m.W_r.data.copy_, kept[number])
                m.W_r.data[:, l] = 0
                continue
            columns = slice(l * m.rel_proj_dim, (l + 1) * m.rel_proj_dim)

            def swap(linear, args, output, columns=columns):
                order, output = derangement(len(output), seed), output.clone()
                output[..., columns] = output[order][..., columns]
                return output
            for linear in [m.W_q_rel] if m.symmetric else [m.W_q_rel, m.W_k_rel]:
                stack.callback(linear.register_forward_hook(swap).remove)
        yield


# ---- 5 what is lost --------------------------------------------------------------------------------------------------

def lost(model, x, y, names, how, seed=0):
    def score():
        logits = model(x)[0]
        if VARIANT == 2:
            return logits.double().log_softmax(-1).gather(1, y[:, None])[:, 0]
        return (logits.argmax(-1) == y).double()
    with evaluating(model):
        intact = score()
        with knocked_out(model, names, how, seed):
            difference = intact - score()
    return difference.mean().item(), (difference.std() / len(x) ** 0.5).item()


# ---- 6 verdicts ------------------------------------------------------------------------------------------------------

def worse(model, x, y, names, how):
    mean, error = lost(model, x, y, names, how)
    return mean > 2 * error


def verdicts(model, make, x, y, same, compared, seeds):
    control = untrained_aucs(make, x, same, compared, seeds)
    return {name: {"learned": p_value(float(value), control[name if VARIANT == 1 else name[0]]) <= 0.05,
                   "needed": worse(model, x, y, [name], "zero"),
                   "informs": worse(model, x, y, [name], "resample")}
            for name, value in all_aucs(model, x, same, compared).items()}


def redundant(model, x, y, names):
    spared = [name for name in sorted(names) if not worse(model, x, y, [name], "zero")]
    return {pair for pair in combinations(spared, 2) if worse(model, x, y, list(pair), "zero")}
