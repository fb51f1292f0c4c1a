"""Symbols: who is the sender?

Relational attention tells the receiver *how* it relates to others; without a name attached it could not tell *to whom*.
A symbol identifies the sender without passing on its features (Section 2.3). Three kinds of symbols, one class each,
and a control without:

    PositionalSymbols         s_j depends on the position j of the sender
    PositionRelativeSymbols   s_{j-i} depends on the position of the sender j relative to the receiver i
    SymbolicAttention         s_j depends on what kind of object the sender is: a learned, soft classification (Eq. 4)
    NoSymbols                 s_j = 0: relations without a sender

Each is called as module(x, start) on x (B, T, d_model), whose first token has position `start` in its sequence, and
returns what relational attention takes as `symbols`. S_lib starts as N(0, 1), of relative symbols Xavier-uniform, as
in the authors' code. (The positional symbols of their language models start with a standard deviation of 0.02.)
"""
from typing import NamedTuple

import torch
from torch import nn

from attention import as_in_autocast, attend, beyond, merge_heads, repeat_heads, share_heads, split_heads


class PositionalSymbols(nn.Module):
    """s_j = S_lib[j]: one learned vector for each position, for sequences of up to max_len tokens."""

    def __init__(self, d_model, max_len):
        super().__init__()
        self.library = nn.Parameter(torch.randn(max_len, d_model))     # S_lib

    def forward(self, x, start=0):
        """-> symbols (T, d_model), the same for every sequence of the batch.

        Or (B, T, d_model), if start (B,) differs: where it is negative, padding stands on the left.
        """
        if isinstance(start, torch.Tensor):
            return self.library[(start[:, None] + torch.arange(x.size(1), device=x.device)).clamp(min=0)]
        if start + x.size(1) > len(self.library):
            raise ValueError(f"{start + x.size(1)} positions, but symbols for {len(self.library)}: raise max_len")
        return self.library[start:start + x.size(1)]


class PositionRelativeSymbols(nn.Module):
    """s_{j-i} = S_lib[j - i]: one learned vector for each offset; offsets beyond max_distance share the last one.

    Such a symbol belongs to a *pair* of tokens, so there is no tensor (T, d_model) to return: the module itself is
    passed to relational attention. There `project_symbols` calls `by_offset`, and `sum_symbols` calls `sum_by_pair`.
    A Stack calls `by_offset` itself, once for all layers.
    """

    def __init__(self, d_model, max_distance):
        super().__init__()
        self.max_distance = max_distance
        self.library = nn.Parameter(torch.empty(2 * max_distance + 1, d_model))    # s_{-max} ... s_0 ... s_{+max}
        nn.init.xavier_uniform_(self.library)                          # as in the authors' code

    def forward(self, x, start=0):
        return self

    def table(self, T, S):
        """s_o for each offset o = j - i between the last T of S positions and all S of them: (T + S - 1, d_model)."""
        D = self.max_distance
        end = max(D + T, D + 1 - S)                                    # no rows if T = S = 0
        row = torch.arange(D + 1 - S, end, device=self.library.device).clamp(0, 2 * D)             # D + o
        return self.library.index_select(0, row)

    def by_offset(self, T, S):
        """What all layers share: the table, cast once, and the row of each pair.

        Without rows for more than 512^2 pairs: then the symbols of all pairs are too large a tensor, and relational
        attention sums them in blocks (RelationalAttention.fast).
        """
        row = None if beyond(512, T, S) else rows_of_pairs(T, S, self.library.device)
        return RelativeSymbols(as_in_autocast(self.table(T, S)), row)


class RelativeSymbols(NamedTuple):
    """s_{j-i} for the last T of S positions, or s_{j-i} W_s in heads, ordered as `PositionRelativeSymbols.table`."""
    table: torch.Tensor                                                # (T + S - 1, d_model), (1, G, T + S - 1, d_h)
    row: torch.Tensor | None                                           # (T S,), see rows_of_pairs; None: too many


def rows_of_pairs(T, S, device):
    """The row of s_{j-i} in the table by offset, for each of the T x S pairs: (T S,)."""
    o = torch.arange(T + S, device=device)
    return (o[T - 1:-1] - o[:T, None]).flatten()                       # T - 1 + j - i


def sum_by_pair(alpha, s, row=None):
    """sum_j alpha_ij s_{j-i}: alpha (B, H, T, S), s (H, T + S - 1, d_h) by offset as in `table` -> (B, H, T, d_h).

    s may also be (G, H / G, T + S - 1, d_h). row: rows_of_pairs, where it is at hand.
    """
    _, H, T, S = alpha.shape
    row = rows_of_pairs(T, S, s.device) if row is None else row
    pairs = s.index_select(-2, row).view(H, T, S, s.size(-1))
    return torch.einsum("bhij,hijd->bhid", alpha, pairs)


class SymbolicAttention(nn.Module):
    """s = softmax(x W_q F_lib^T / sqrt(d_h)) S_lib (Eq. 4): each token picks its symbol by its features.

    n_symbols: size of the library; n_heads: each head matches its own slice of the d_model features.
    trainable_symbols=False freezes S_lib at its random start (as in the published FineWeb checkpoints).
    A language model starts with small x W_q (embeddings and weights have standard deviation .02), so all tokens have
    nearly the same symbol and learn to differ. The authors' models start in the same way.
    As in the authors' code, and not in Eq. 4: the heads, the scale 1/sqrt(d_h) and a bias in W_q.
    """

    def __init__(self, d_model, n_symbols, n_heads, trainable_symbols=True, *, dropout=0.0):
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"d_model={d_model} must be a multiple of the number of symbol heads, here {n_heads}")
        self.n_heads, self.dropout = n_heads, dropout
        self.W_q = nn.Linear(d_model, d_model)
        self.templates = nn.Parameter(torch.randn(n_symbols, d_model))                                   # F_lib
        self.library = nn.Parameter(torch.randn(n_symbols, d_model), requires_grad=trainable_symbols)    # S_lib

    def forward(self, x, start=0):
        """-> symbols (B, T, d_model)."""
        # Each token is treated alone, so the batch counts as one long sequence: no copy of the library per sequence.
        q = split_heads(self.W_q(x).flatten(0, 1)[None], self.n_heads)             # (1, heads, B T, d_h)
        F_lib = split_heads(self.templates[None], self.n_heads)                    # (1, heads, n_symbols, d_h)
        S_lib = split_heads(self.library[None], self.n_heads)
        # here: in training only (authors' code: in evaluation, too, but all of their scripts leave it at 0)
        s = attend(q, F_lib, S_lib, dropout=self.dropout if self.training else 0.0)
        return merge_heads(s).view_as(x)


class NoSymbols(nn.Module):
    """s_j = 0, so that a_i = sum_j alpha_ij r_ij W_r: what do symbols add? (W_s is there, and its gradient is 0.)"""

    def forward(self, x, start=0):
        """-> symbols (T, d_model)."""
        return x.new_zeros(x.shape[1:])


def make_symbols(cfg):
    """The module that the configuration (model.TransformerConfig) names."""
    if cfg.symbols == "symbolic":
        return SymbolicAttention(cfg.d_model, cfg.n_symbols, cfg.symbol_heads, cfg.trainable_symbols,
                                 dropout=cfg.dropout)
    if cfg.symbols == "relative":
        return PositionRelativeSymbols(cfg.d_model, cfg.max_distance or cfg.max_len)
    if cfg.symbols == "positional":
        return PositionalSymbols(cfg.d_model, cfg.max_len)
    if cfg.symbols == "none":
        return NoSymbols()
    raise ValueError(f"symbols={cfg.symbols!r}: make_symbols in symbols.py does not know it")


def project_symbols(symbols, W_s, n_heads, T, cache=None):
    """s_j W_s in heads: (B or 1, n_heads, S, d_h) by sender, or RelativeSymbols, (1, n_heads, T + S - 1, d_h).

    symbols: (B, T, d_model), (T, d_model), or relative ones. A cache already has these T tokens' keys.
    """
    if isinstance(symbols, PositionRelativeSymbols):
        symbols = symbols.by_offset(T, T if cache is None else len(cache))
    if isinstance(symbols, RelativeSymbols):                           # nothing to cache
        return symbols._replace(table=split_heads(W_s(symbols.table)[None], n_heads))
    if symbols is None or symbols.dim() not in (2, 3):
        raise ValueError("relational heads need symbols, (B, T, d_model), (T, d_model) or PositionRelativeSymbols, not "
                         f"{None if symbols is None else tuple(symbols.shape)}")
    if symbols.size(-2) != T:
        raise ValueError(f"{symbols.size(-2)} symbols for {T} tokens")
    s = split_heads(W_s(symbols if symbols.dim() == 3 else symbols[None]), n_heads)
    return s if cache is None else cache.append("s W_s", s)


def sum_symbols(alpha, s):
    """sum_j alpha_ij s_j W_s: alpha (B, H, T, S), s as `project_symbols` returns it -> (B, H, T, d_h)."""
    if are_relative(s):
        return sum_by_pair(alpha, share_heads(s.table, alpha.size(1)).squeeze(2).squeeze(0), s.row)
    return alpha @ repeat_heads(s, alpha.size(1))


def are_relative(symbols):
    """Does a symbol belong to a pair of tokens?"""
    return isinstance(symbols, (PositionRelativeSymbols, RelativeSymbols))
