"""What tasks 6 and 7 measure with: random weights, a random memory, and streams of tokens with a common part.

    W, memory = world(seed=0)
    batches = stream(WRITES, source=1, seed=2)                # (100, 8, 32, 24), written one after another

answers.py imports this file. Task 6 asks what the common part does: see `stream`.
"""
import torch
import torch.nn.functional as F

HEADS, SLOTS, D, E, IMAGES, TOKENS = 4, 12, 16, 24, 8, 32     # S, M, D, E, B, T
K, DECAY, BETA, WRITES = 64, 0.9, 1.0, 100


def world(seed):
    """-> the weights W, a dict, and a memory (M, D) whose rows have length 1; float64."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, width):
        return torch.randn(*shape, generator=g, dtype=torch.float64) / width ** 0.5
    W = {"q": normal(HEADS, D, D, width=D), "k": normal(HEADS, E, D, width=E), "v": normal(HEADS, E, D, width=E),
         "o": normal(HEADS * D, D, width=HEADS * D), "lt": normal(D, E, width=D)}
    return W, F.normalize(normal(SLOTS, D, width=1), dim=-1)


def stream(n, source, seed):
    """-> n batches of tokens (n, B, T, E): the source's common part, one of its eight prototypes, and noise.

    `source` draws the common part and the prototypes, `seed` which prototypes come when, and the noise.
    """
    g = torch.Generator().manual_seed(source)
    common = 2 * torch.randn(E, generator=g, dtype=torch.float64)
    prototypes = torch.randn(8, E, generator=g, dtype=torch.float64)
    g = torch.Generator().manual_seed(seed)
    kind = torch.randint(len(prototypes), (n, IMAGES, TOKENS), generator=g)
    return common + prototypes[kind] + torch.randn(n, IMAGES, TOKENS, E, generator=g, dtype=torch.float64)
