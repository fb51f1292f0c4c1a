"""a5, the workspace: your answers. README.md has the definitions; all tensors are float64.

    python -m assignments.grade a5              points
    python -m assignments.a5.answers            the experiment of task 6, once tasks 1, 2, 5 and 6 are written
"""
import math  # noqa: F401

import torch
import torch.nn.functional as F  # noqa: F401

from assignments.a5.world import DECAY, K, WRITES, stream, world


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


def experiment(seed):
    """-> ranks (2, 2), by [fixed, centred], after WRITES writes in the world of this seed. Yours to change."""
    W, memory = world(seed)
    batches = stream(WRITES, source=100 + seed, seed=200 + seed)
    return torch.tensor([[trajectory(memory, batches, W, K, DECAY, fixed, centred)[-1][0] for centred in (False, True)]
                         for fixed in (False, True)])


if __name__ == "__main__":
    for seed in range(5):
        ranks = experiment(seed)
        print(f"world {seed}: as published {ranks[0, 0]:.2f}, centred {ranks[0, 1]:.2f}, fixed {ranks[1, 0]:.2f}, "
              f"both {ranks[1, 1]:.2f}; effects", *(f"{float(effect):+.2f}" for effect in effects(ranks)))
