"""Teacher's file: students are asked not to open it. Assignment a2, variants 1 and 2 (VARIANT below)."""
import math

import torch

VARIANT = 1


def positional_symbols(library, mask):
    count = mask.long()
    p = count.cumsum(1) - count                                        # (B, n): tokens before
    if VARIANT == 2:
        p = count.sum(1, keepdim=True) - 1 - p                         # tokens after
    if int(count.sum(1).max()) > len(library):
        raise ValueError(f"{int(count.sum(1).max())} tokens, but symbols for {len(library)}")
    return library[p.clamp(0, len(library) - 1)] * mask[..., None]


def relative_symbols(library, T, n):
    D = len(library) // 2
    offset = torch.arange(n) - torch.arange(n - T, n)[:, None]         # (T, n)
    s = library[offset.clamp(-D, D) + D]
    return s * (offset.abs() <= D)[..., None] if VARIANT == 2 else s


def relative_sum(alpha, library):
    (H, T, n), D = alpha.shape, len(library) // 2
    offset = torch.arange(n) - torch.arange(n - T, n)[:, None]         # (T, n)
    row = (offset.clamp(-D, D) + D).expand(H, T, n)
    if VARIANT == 2:
        alpha = alpha * (offset.abs() <= D)
    weight = alpha.new_zeros(H, T, 2 * D + 1).scatter_add(2, row, alpha)       # of each offset
    return weight @ library


def symbol_weights(x, W_q, templates, n_heads):
    q, f = (y.unflatten(-1, (n_heads, -1)) for y in (x @ W_q, templates))
    d_h = q.shape[-1]
    scores = torch.einsum("btac,kac->btak", q, f)
    return (scores / (d_h if VARIANT == 2 else math.sqrt(d_h))).softmax(-1)


def symbolic_symbols(p, library):
    return torch.einsum("btak,kac->btac", p, library.unflatten(-1, (p.shape[2], -1))).flatten(2)


def effective_number(p):
    if VARIANT == 2:
        return 1 / p.square().sum(-1)
    return torch.special.entr(p).sum(-1).exp()


def spread(symbols):
    n = len(symbols)
    if VARIANT == 2:
        symbols = symbols / symbols.norm(dim=-1, keepdim=True)
    centred = symbols - symbols.mean(0)                                # first, or float32 cancels
    share = centred.square().sum() / (n - 1) / symbols.square().sum(-1).mean()
    return share if VARIANT == 2 else share.sqrt()


def measure(weights, d, n_heads, n_symbols, n_tokens, std_x, std_w, seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)
    x, W_q, templates, library = normal(1, n_tokens, d), normal(d, d), normal(n_symbols, d), normal(n_symbols, d)
    p = weights(std_x * x, std_w * W_q, templates, n_heads)
    return float(effective_number(p).mean()), float(spread(symbolic_symbols(p, library)[0]))


def predicted(d, n_heads, n_symbols, std_x, std_w):
    if VARIANT == 2:
        tau2 = n_heads * (std_x * std_w) ** 2
        return n_symbols * math.exp(-tau2), -math.expm1(-tau2)
    tau2 = d * (std_x * std_w) ** 2
    return n_symbols * math.exp(-tau2 / 2), math.sqrt(-math.expm1(-tau2))


def cured_weights(x, W_q, templates, n_heads):
    q, f = (y.unflatten(-1, (n_heads, -1)) for y in (x @ W_q, templates))
    q = q / (q.square().mean(-1, keepdim=True) + 1e-16).sqrt()         # scores of standard deviation 1
    gain = 2.0 if VARIANT == 2 else 1.0
    return (gain * torch.einsum("btac,kac->btak", q, f) / math.sqrt(q.shape[-1])).softmax(-1)
