"""What the grader of a2 compares with: the definitions of README.md, token by token, and a count of memory.

`variant`: see test_a2.py.
"""
import math

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode


def positional(library, mask, variant):
    rows = []
    for tokens in mask:
        for j in range(len(tokens)):
            others = tokens[:j] if variant == 1 else tokens[j + 1:]
            rows.append(library[int(others.sum())] if tokens[j] else 0 * library[0])
    return torch.stack(rows).view(*mask.shape, -1)


def relative(library, T, n, variant):
    def symbol(offset):
        D = len(library) // 2
        return library[min(max(offset, -D), D) + D] * (1 if variant == 1 or abs(offset) <= D else 0)
    return torch.stack([torch.stack([symbol(j - (n - T + i)) for j in range(n)]) for i in range(T)])


def summed(alpha, library, variant):
    return torch.stack([torch.stack([head[i] @ s for i, s in enumerate(relative(library, *head.shape, variant))])
                        for head in alpha])


def weights_of(x, W_q, templates, n_heads, variant):
    d_h = x.shape[-1] // n_heads
    heads = [(x @ W_q)[..., a:a + d_h] @ templates[:, a:a + d_h].T for a in range(0, x.shape[-1], d_h)]
    return (torch.stack(heads, -2) / (math.sqrt(d_h) if variant == 1 else d_h)).softmax(-1)


def symbols_of(p, library):
    return torch.cat([p[..., a, :] @ part for a, part in enumerate(library.chunk(p.shape[-2], -1))], -1)


def number_of(p, variant):
    return torch.special.entr(p).sum(-1).exp() if variant == 1 else 1 / p.square().sum(-1)


def spread_of(s, variant):
    """In float64, pair by pair."""
    s = s.double()
    if variant == 2:
        s = s / s.norm(dim=-1, keepdim=True)
    pairs = torch.stack([(s[i] - s[j]).square().sum() for i in range(len(s)) for j in range(i)])
    share = pairs.mean() / (2 * s.square().sum(-1).mean())
    return share.sqrt() if variant == 1 else share


class Memory(TorchDispatchMode):
    """The largest tensor that an operation returns, and what autograd keeps: numbers in memory, views as their base."""

    def __init__(self):
        super().__init__()
        self.largest, self.by, self.kept = 0, None, {}
        self.hooks = saved_tensors_hooks(self.keep, lambda x: x)

    def keep(self, x):
        self.kept[x.untyped_storage().data_ptr()] = size(x)
        return x.detach()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and size(x) > self.largest:
                self.largest, self.by = size(x), func.__name__.split(".")[0]
        return out


def size(x):
    return x.untyped_storage().nbytes() // x.element_size()
