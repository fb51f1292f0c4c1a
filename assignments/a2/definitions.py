"""What the grader of a2 compares with: the definitions of README.md, in loops over tokens and pairs; memory; gradients.

`variant`: see test_a2.py.
"""
import math
from contextlib import contextmanager

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from assignments.grading import check


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
    scale = math.sqrt(d_h) if variant == 1 else d_h

    def weights(q):
        return torch.stack([(f @ part / scale).softmax(0)
                            for f, part in zip(templates.split(d_h, -1), q.split(d_h))])
    return torch.stack([weights(token @ W_q) for token in x.flatten(0, 1)]).view(*x.shape[:2], n_heads, -1)


def symbols_of(p, library):
    parts = library.chunk(p.shape[2], -1)
    symbols = [torch.cat([row @ part for row, part in zip(token, parts)]) for token in p.flatten(0, 1)]
    return torch.stack(symbols).view(*p.shape[:2], -1)


def number_of(p, variant):
    rows = p.reshape(-1, p.shape[-1])
    numbers = [torch.special.entr(row).sum().exp() if variant == 1 else 1 / row.dot(row) for row in rows]
    return torch.stack(numbers).view(p.shape[:-1])


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


@contextmanager
def given(what):
    """An exception of the student's code says on which input."""
    try:
        yield
    except (AssertionError, AttributeError, NotImplementedError):
        raise
    except Exception as error:
        error.args = (f"{error} [{what}]",)
        raise


def gradients(what, names, function, *inputs):
    """Of a fixed sum over the result, with respect to each input."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    assert out.requires_grad, f"{what}: no gradient reaches {', '.join(names)} (detach, no_grad or item somewhere?)"
    (out * torch.arange(out.numel()).cos().view(out.shape)).sum().backward()
    for name, x in zip(names, inputs):
        assert x.grad is not None, f"{what}: no gradient reaches {name} (detach, no_grad or item somewhere?)"
    return [x.grad for x in inputs]


def check_gradients(what, names, found, expected, *inputs):
    with given(what):
        check(found(*inputs), expected(*inputs), what)
    pairs = zip(names, *(gradients(what, names, function, *inputs) for function in (found, expected)))
    for name, mine, wanted in pairs:
        check(mine, wanted, f"{what}: gradient with respect to {name}")
