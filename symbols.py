"""Symbols: who is the sender?

Relational attention tells the receiver *how* it relates to others; without a name attached it could not tell *to whom*.
A symbol names the sender without describing it (Section 2.3). Three ways to give names, one class each:

    PositionalSymbols         the object at place j is called s_j
    PositionRelativeSymbols   seen from i, the object at place j is called s_{j-i}
    SymbolicAttention         objects of the same kind share a name: a learned, soft classification (Eq. 4)

Each is called as retriever(x, start) on x (B, T, d_model), whose first token stands at position `start` of its
sequence, and returns what relational attention takes as `symbols`. Libraries start at random: N(0, 1), where the names
belong to tokens (as in the authors' code, but for their positional symbols in language models, which are N(0, 0.02)).
"""
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from attention import split_heads, merge_heads


class PositionalSymbols(nn.Module):
    """s_j depends on the position j alone: one learned vector per place, for sequences of up to max_len."""

    def __init__(self, d_model, max_len):
        super().__init__()
        self.library = nn.Parameter(torch.randn(max_len, d_model))     # S_lib

    def forward(self, x, start=0):
        """-> symbols (T, d_model), the same for every sequence of the batch."""
        if start + x.size(1) > len(self.library):
            raise ValueError(f"{start + x.size(1)} positions, but symbols for {len(self.library)}: raise max_len")
        return self.library[start:start + x.size(1)]


class PositionRelativeSymbols(nn.Module):
    """s_{j-i} depends on where j stands as seen from i; offsets beyond max_distance share the last symbol.

    Such a symbol belongs to a *pair*, so there is no tensor (T, d_model) to hand out: the module itself is given to
    relational attention, which brings its weights here (`weighted_sum`) or takes the symbols by offset (`table`).
    """

    def __init__(self, d_model, max_distance):
        super().__init__()
        self.max_distance = max_distance
        self.library = nn.Parameter(torch.empty(2 * max_distance + 1, d_model))   # s_{-max} ... s_0 ... s_{+max}
        nn.init.xavier_uniform_(self.library)                          # as in the authors' code

    def forward(self, x, start=0):
        return self

    def table(self, T, S, W_s, n_kv_heads):
        """s_o W_s of each offset o = j - i that occurs, from 1 - S to T - 1, and one to spare: (G, T+S, d_h)."""
        first, last = self.max_distance + 1 - S, self.max_distance + T                         # rows of the library,
        beyond = max(0, -first), max(0, last + 1 - len(self.library))                          # had it enough of them
        table = split_heads(W_s(self.library[max(0, first):last + 1])[None], n_kv_heads)       # (1, G, .., d_h)
        return F.pad(table, (0, 0, *beyond), mode="replicate")[0]

    def weighted_sum(self, alpha, W_s, n_kv_heads):
        """sum_j alpha_ij s_{j-i} W_s for alpha (B, H, T, S) -> (B, H, T, d_h).

        The table is projected once, for the offsets that occur, and never unfolded to T x S x d. What is unfolded is
        alpha, by offset instead of by position:  sum_j alpha_ij s_{j-i} = sum_o alpha_{i,i+o} s_o.  Row i of alpha
        moves i places to the left, which is free of index arithmetic: read the padded rows with a stride one longer.
        """
        H, T, S = alpha.shape[1:]
        table = self.table(T, S, W_s, n_kv_heads).repeat_interleave(H // n_kv_heads, dim=0)            # (H, T+S, d_h)
        # alpha by offset is twice as large as alpha: made again for the backward pass, not kept for it
        return checkpoint(lambda alpha, table: by_offset(alpha) @ table, alpha, table,
                          use_reentrant=False, preserve_rng_state=False)           # (B, H, T, d_h)


def by_offset(alpha):
    """(..., T, S) -> (..., T, T+S), whose column c holds alpha_ij for j - i = c - (S-1), or 0 if there is no such j."""
    T, S = alpha.shape[-2:]
    N = T + S - 1                                                      # offsets that occur: 1-S ... T-1
    skewed = F.pad(alpha, (T - 1, 0, 0, 1)).flatten(-2)                # rows of N, T-1 zeros before each, one row spare
    return skewed[..., :T * (N + 1)].unflatten(-1, (T, N + 1))


class SymbolicAttention(nn.Module):
    """Softmax((x W_q) F_lib^T / sqrt(d_h)) S_lib (Eq. 4): each token picks its symbol by what it looks like.

    n_symbols: how many names there are; n_heads: the match is made in that many slices of d_model independently.
    trainable_symbols=False freezes S_lib at its random start (as in the published FineWeb checkpoints).
    At the start of a language model x W_q is small (both are N(0, 0.02)), so that all tokens share nearly one name;
    telling them apart is learned. The authors' models start so too.
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
        # No token sees another one here, so the batch is read as one long sequence: the library is not copied B times.
        q = split_heads(self.W_q(x).flatten(0, 1)[None], self.n_heads)             # (1, heads, B T, d_h)
        templates = split_heads(self.templates[None], self.n_heads)                # (1, heads, n_symbols, d_h)
        library = split_heads(self.library[None], self.n_heads)
        # paper: silent; here: off in evaluation, where the authors' code keeps dropping
        s = F.scaled_dot_product_attention(q, templates, library, dropout_p=self.dropout if self.training else 0.0)
        return merge_heads(s).view_as(x)


def make_symbols(cfg):
    """The one of these that the configuration asks for."""
    if cfg.symbols == "symbolic":
        return SymbolicAttention(cfg.d_model, cfg.n_symbols, cfg.symbol_heads, cfg.trainable_symbols,
                                 dropout=cfg.dropout)
    if cfg.symbols == "relative":
        return PositionRelativeSymbols(cfg.d_model, cfg.max_distance or cfg.max_len)
    return PositionalSymbols(cfg.d_model, cfg.max_len)
