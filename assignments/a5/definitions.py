"""Part of a5's grader: the definitions of both variants, as loops, and inputs whose truth is known.

Students are asked to write their answers without it; loops lose points.
"""
import math

import torch
import torch.nn.functional as F

from assignments.measure import Watch


def gates(tokens, queries, W, k, variant):
    x, scale = tokens.flatten(0, 1), math.sqrt(queries.size(1))
    A = torch.stack([(queries @ W_q) @ (x @ W_k).T / scale for W_q, W_k in zip(W["q"], W["k"])])      # (S, M, L)
    choice = A if variant == 1 else A.mean(0, keepdim=True).expand_as(A)
    least = choice.topk(min(k, len(x))).values[..., -1:]                          # the smallest score that is taken
    e = (A - A.amax(-1, keepdim=True)).exp() * (choice >= least)
    return (e / e.sum(-1, keepdim=True)).unflatten(-1, tokens.shape[:2])


def collect(tokens, queries, W, k, variant):
    G = gates(tokens, queries, W, k, variant)
    return torch.cat([torch.einsum("mbt,bte,ed->md", gate, tokens, W_v) for gate, W_v in zip(G, W["v"])], 1)


def update(memory, h, W, decay, variant):
    new = memory + h @ W["o"]
    if variant == 1:
        new = new - new.mean(1, keepdim=True)
        new = new / (new.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
    else:
        new = new / new.norm(dim=1, keepdim=True)
    mixed = decay * memory + (1 - decay) * new
    return mixed / mixed.norm(dim=1, keepdim=True)


def exponents(states, Y, beta, variant):
    """(..., M): beta <x, y>; in variant 2 -beta |x - y|^2 / 2"""
    if variant == 1:
        return torch.stack([beta * (states * y).sum(-1) for y in Y], -1)
    return torch.stack([-beta * (states - y).pow(2).sum(-1) / 2 for y in Y], -1)


def retrieve(states, Y, beta, variant):
    return torch.softmax(exponents(states, Y, beta, variant), -1) @ Y


def energy(states, Y, beta, variant):
    lse = torch.logsumexp(exponents(states, Y, beta, variant), -1)
    lengths = states.pow(2).sum(-1) / 2 + max((y @ y) / 2 for y in Y) if variant == 1 else 0
    return (math.log(len(Y)) - lse) / beta + lengths


def unit(memory):
    return F.normalize(memory, dim=1)


def entropy_rank(memory):
    p = torch.linalg.svdvals(unit(memory))
    return math.exp(-sum(x.item() * x.log().item() for x in p / p.sum() if x > 0))


def effective_rank(memory, variant):
    if variant == 1:
        return entropy_rank(memory)
    eigenvalues = torch.linalg.svdvals(unit(memory)) ** 2
    return (eigenvalues.sum() ** 2 / (eigenvalues ** 2).sum()).item()


def mean_cosine(memory, variant):
    rows, M = unit(memory), len(memory)
    cosines = [(rows[i] @ rows[j]).item() ** (1 if variant == 1 else 2) for i in range(M) for j in range(i)]
    return sum(cosines) / len(cosines)


def next_memory(start, memory, tokens, given, changes, variant):
    """One write; given = W, k, decay. In variant 2 "centred" subtracts the mean over all tokens of their values."""
    W, k, decay = given
    h = collect(tokens, start if "fixed" in changes else memory, W, k, variant)
    if "centred" in changes:
        h = h - (h.mean(0) if variant == 1 else torch.cat([tokens.mean((0, 1)) @ W_v for W_v in W["v"]]))
    return update(memory, h, W, decay, variant)


def effects(published, centred, fixed, both, variant):
    """The four ranks -> effect of the queries, of the content, interaction."""
    one, other = fixed - published, centred - published
    interaction = both - fixed - centred + published
    return torch.stack([one, other, interaction] if variant == 2 else
                       [one + interaction / 2, other + interaction / 2, interaction])


# ---- inputs ---------------------------------------------------------------------------------------------------------

SMALL = "B=2, T=3, E=5, M=3, D=4, S=2"                        # what make() returns


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def make(S=2, M=3, D=4, E=5, B=2, T=3):
    """-> tokens, a memory with unit rows, weights"""
    W = {"q": normal(S, D, D), "k": normal(S, E, D), "v": normal(S, E, D), "o": normal(S * D, D), "lt": normal(D, E)}
    return normal(B, T, E), unit(normal(M, D)), W


def slots(*counts, D=8):
    """Orthogonal directions, each taken by so many slots."""
    return torch.linalg.qr(normal(D, D))[0][:len(counts)].repeat_interleave(torch.tensor(counts), 0)


def pair(cosine):
    return torch.tensor([[1., 0.], [cosine, math.sqrt(1 - cosine ** 2)]], dtype=torch.float64)


def likeness(a, b):
    return (unit(a) * unit(b)).sum(1).mean().item()


def draw():
    return int(torch.randint(10 ** 6, ()))


def need(condition, what):
    if not condition:
        raise AssertionError(what)


def need_no_loop(name, call):
    """call(tokens, memory, W): as many operations for large sizes as for small ones."""
    counts = []
    for sizes in ({}, dict(S=12), dict(M=24, D=24), dict(B=8, T=16)):
        inputs = make(**sizes)
        with Watch() as watch:
            call(*inputs)
        counts.append(watch.operations)
        larger = " and ".join(f"{size}={n}" for size, n in sizes.items())
        need(counts[-1] <= 1.5 * counts[0],
             f"{name} has the right values, but it loops in Python: {counts[0]} PyTorch operations for {SMALL}, "
             f"{counts[-1]} with {larger}; expected about as many")
