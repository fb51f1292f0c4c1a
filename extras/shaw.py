"""Self-attention with relative positions (Shaw et al., 2018), a control for the DAT: what is sent, and from where.

    e_ij = <q_i, k_j + a^K_{j-i}> / sqrt(d_h)      alpha_i = softmax(e_i)      z_i = sum_j alpha_ij (v_j + a^V_{j-i})

Each offset j - i has one learned vector beside the keys and one beside the values, shared by all heads of a layer (as
their Section 3.1 allows); offsets beyond max_distance share the last one (Section 3.2). So the message says how far
away its sender is, as a relative symbol does (`symbols.PositionRelativeSymbols`), and no relation is computed.
Attention to another sequence has no such offsets and stays as it is. `--position=shaw --n_ra=0`.
"""
import torch
import torch.nn.functional as F
from torch import nn

from attention import Attention, attention_mask, merge_heads, repeat_heads, split_heads


class ShawAttention(Attention):
    """As attention.Attention, without a context. alpha is written out: memory T x S. max_distance: theirs was 16."""

    def __init__(self, d_model, n_heads, *, max_distance=16, **options):
        super().__init__(d_model, n_heads, **options)
        d_h, self.max_distance = self.W_q.out_features // n_heads, max_distance
        self.a_K = nn.Parameter(nn.init.xavier_uniform_(torch.empty(2 * max_distance + 1, d_h)))   # a_-max ... a_max
        self.a_V = nn.Parameter(nn.init.xavier_uniform_(torch.empty(2 * max_distance + 1, d_h)))

    def forward(self, x, *, causal=False, mask=None, rope=None, cache=None):
        """x (B, T, d_model) -> (B, T, n_heads * d_h)."""
        q, (k, v) = split_heads(self.W_q(x), self.n_heads), self.keys_and_values(x)    # (B, H, T, d_h), (B, G, T, d_h)
        if cache is not None:
            k, v = cache.append("k", k), cache.append("v", v)
        k, v = repeat_heads(k, self.n_heads), repeat_heads(v, self.n_heads)        # (B, H, S, d_h)
        alpha = F.dropout(self.weights(q, k, causal=causal, mask=mask), self.dropout, self.training)
        z = alpha @ v + torch.einsum("bhij,ijd->bhid", alpha, self.by_pair(self.a_V, q, k))        # (B, H, T, d_h)
        return self.W_o(merge_heads(z))

    def by_pair(self, a, q, k):
        """a_{j-i} for the last T of S positions and all S of them: (T, S, d_h)."""
        T, S, D = q.size(-2), k.size(-2), self.max_distance
        j = torch.arange(S, device=q.device)
        return F.embedding((j - j[S - T:, None]).clamp(-D, D) + D, a)

    def weights(self, q, k, *, causal=False, mask=None):
        """alpha (B, H, T, S), of q (B, H, T, d_h) and k (B, G, S, d_h). A fully masked row is all zeros."""
        q, k = q / q.size(-1) ** 0.5, repeat_heads(k, self.n_heads)
        e = q @ k.mT + torch.einsum("bhid,ijd->bhij", q, self.by_pair(self.a_K, q, k))             # (B, H, T, S)
        allowed = attention_mask(q, k, causal, mask)
        if allowed is not None:
            e = e.masked_fill(~allowed, torch.finfo(e.dtype).min)
        return e.softmax(-1) if mask is None else e.softmax(-1).masked_fill(~allowed, 0.0)
