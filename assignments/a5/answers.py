"""a5, the workspace: your answers. README.md has the definitions; all tensors are float64.

    python -m assignments.grade a5              points
    python -m assignments.a5.answers            the experiment of task 6, once tasks 1, 2, 5 and 6 are written
"""
import math  # noqa: F401

import torch
import torch.nn.functional as F  # noqa: F401

from assignments.a5.world import BETA, DECAY, K, WRITES, stream, world  # noqa: F401


# 1. The bottleneck

def gates(tokens, queries, W, k):
    """tokens (B, T, E), queries (M, D) -> G (S, M, B, T): what each slot attends to among all tokens of the batch."""
    raise NotImplementedError


# 2. The write

def collect(tokens, queries, W, k):
    """tokens (B, T, E), queries (M, D) -> h (M, S D): what each slot collects, the heads side by side."""
    raise NotImplementedError


def update(memory, h, W, decay):
    """memory (M, D), h (M, S D) -> the new memory (M, D), whose rows have length 1. The old one stays as it is."""
    raise NotImplementedError


# 3. The read

def retrieve(states, Y, beta):
    """states (..., E), stored patterns Y (M, E) -> (..., E): one step of a Hopfield network."""
    raise NotImplementedError


def energy(states, Y, beta):
    """states (..., E), stored patterns Y (M, E) -> (...): the energy, which that step never raises."""
    raise NotImplementedError


# 4. The layer

def layer(tokens, memory, W, k, decay, beta, training):
    """tokens (B, T, E), memory (M, D) -> the output (B, T, E) and the memory after it (M, D)."""
    raise NotImplementedError


# 5. How different are the slots?

def effective_rank(memory):
    """memory (M, D) -> a number from 1 to min(M, D)"""
    raise NotImplementedError


def mean_cosine(memory):
    """memory (M, D) -> a number from -1 to 1: the mean over all pairs of two different slots"""
    raise NotImplementedError


# 6. Why slots become alike

def trajectory(memory, batches, W, k, decay, fixed, centred):
    """memory (M, D), batches (N, B, T, E) -> (N + 1, 2): effective rank and mean cosine after 0, 1, ..., N writes."""
    raise NotImplementedError


def common_share(h):
    """h (M, S D) -> a number from 0 to 1: the part of what is collected that all slots share"""
    raise NotImplementedError


def effects(ranks):
    """ranks (2, 2), by [fixed, centred] -> three numbers: effect of the queries, of the content, their interaction"""
    raise NotImplementedError


# 7. A cure

class Cured:
    """A workspace whose slots stay different. `memory` (M, D) is its memory now."""

    def __init__(self, memory, W, k, decay, beta):
        raise NotImplementedError

    def write(self, tokens):
        """tokens (B, T, E): replaces self.memory"""
        raise NotImplementedError

    def read(self, tokens):
        """tokens (B, T, E) -> the layer's output (B, T, E); changes nothing"""
        raise NotImplementedError


# The experiment, and the rank of the cure; yours to change

def experiment(seed):
    """-> (2, 2, 2), by [fixed, centred]: effective rank and mean cosine after WRITES writes in this seed's world"""
    W, memory = world(seed)
    batches = stream(WRITES, source=100 + seed, seed=200 + seed)
    return torch.stack([torch.stack([trajectory(memory, batches, W, K, DECAY, fixed, centred)[-1]
                                     for centred in (False, True)]) for fixed in (False, True)])


def cured(seed):
    """-> the effective rank after the same writes with your cure"""
    W, memory = world(seed)
    workspace = Cured(memory, W, K, DECAY, BETA)
    for tokens in stream(WRITES, source=100 + seed, seed=200 + seed):
        workspace.write(tokens)
    return float(effective_rank(workspace.memory))


if __name__ == "__main__":
    results = torch.stack([experiment(seed) for seed in range(10)])                      # (worlds, fixed, centred, 2)
    print("effective rank and mean cosine in each world")
    for seed, result in enumerate(results.flatten(1, 2)):
        print(f"world {seed}:", "   ".join(f"{name} {rank:5.2f} {cosine:5.2f}" for name, (rank, cosine) in
                                           zip(("published", "centred", "fixed", "both"), result.tolist())))
    found = torch.tensor([[float(x) for x in effects(result[..., 0])] for result in results])
    for name, values in zip(("queries", "content", "interaction"), found.T):
        print(f"{name}: mean {values.mean():.2f}, standard deviation {values.std():.2f}")
    # once task 7 is written: print("cured", *(f"{cured(seed):.2f}" for seed in range(10)))
