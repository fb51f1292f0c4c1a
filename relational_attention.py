"""Relational attention: the one new idea (Eq. 3).

The message of a standard head is the features of the sender. The message of a relational head is how the receiver
*relates* to the sender, tagged with a symbol s_j that says who the sender is:

    a_i  =  sum_j alpha_ij ( r_ij W_r + s_j W_s )

    alpha_ij  = softmax_j( <q_i, k_j> / sqrt(d_h) )               which senders: as in any attention, per head
    r_ij[l]   = <q_rel_i[l], k_rel_j[l]> / sqrt(rel_proj_dim)     R relations, shared by all heads, never masked
    s_j       = symbols                                           see symbols.py

paper: divides by neither square root; here: by both, as in the authors' code, or dot products grow with their width.

`RelationalAttention.literal` is this equation. Two other forms compute the same sum without a tensor of n x n
relations; `choose_form` says which one is used. Shapes as in attention.py; R relations of width p = rel_proj_dim.
"""
import torch
import torch.nn.functional as F
from torch import nn

from attention import (Attention, attend, attend_to_wide, attention_mask, attention_weights, beyond, head_width,
                       merge_heads, split_heads)
from extras.blocked import attend_in_blocks
from symbols import are_relative, project_symbols, sum_symbols

REL_ACTIVATIONS = {"identity": lambda r: r, "relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh,
                   "gelu": F.gelu, "gelu_tanh": lambda r: F.gelu(r, approximate="tanh"), "silu": F.silu,
                   "softmax": None}                                    # softmax: see RelationalAttention.relations


class RelationalAttention(nn.Module):
    """n_heads heads of relational attention (Eq. 3, Algorithm 1).

    total_heads     heads of the whole layer if these are a part of it (d_h = d_model / total_heads); default n_heads
    n_relations     R, the number of relations (the paper's d_r); default n_heads
    rel_proj_dim    p, the width in which one relation compares two objects; default n_heads * d_h / R
    n_kv_heads      key and symbol heads, each shared by n_heads / n_kv_heads query heads; all heads share the relations
    symmetric       W_q_rel = W_k_rel: r_ij = r_ji, a positive semi-definite kernel (before any activation)
    output_bias     a bias in W_o; default: as the other projections
    rel_activation  applied to r; any but "identity" needs the literal form and its n x n x R memory
    Raises ValueError for widths that do not divide, or an unknown activation.
    """

    def __init__(self, d_model, n_heads, *, total_heads=None, n_relations=None, rel_proj_dim=None, n_kv_heads=None,
                 symmetric=False, rel_activation="identity", dropout=0.0, bias=False, output_bias=None):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.dropout = n_heads, n_kv_heads or n_heads, dropout
        self.symmetric, self.rel_activation = symmetric, rel_activation
        if rel_activation not in REL_ACTIVATIONS:
            raise ValueError(f"rel_activation={rel_activation!r}: choose from {', '.join(REL_ACTIVATIONS)}")
        d_h = head_width(d_model, n_heads, total_heads or n_heads, self.n_kv_heads)
        self.n_relations = R = n_relations or n_heads
        if rel_proj_dim is None and n_heads * d_h % R:
            raise ValueError(f"n_relations={R} does not divide n_heads * d_h = {n_heads * d_h}: give rel_proj_dim too")
        self.rel_proj_dim = p = rel_proj_dim or n_heads * d_h // R

        self.W_q = nn.Linear(d_model, n_heads * d_h, bias=bias)                    # W_q^attn, W_k^attn: which senders
        self.W_k = nn.Linear(d_model, self.n_kv_heads * d_h, bias=bias)
        self.W_q_rel = nn.Linear(d_model, R * p, bias=bias)                        # W_q^rel, W_k^rel: what to compare
        if not symmetric:
            self.W_k_rel = nn.Linear(d_model, R * p, bias=bias)
        self.W_r = nn.Parameter(torch.empty(n_heads, R, d_h).uniform_(-R ** -0.5, R ** -0.5))  # as nn.Linear(R, d_h)
        self.W_s = nn.Linear(d_model, self.n_kv_heads * d_h, bias=bias)
        self.W_o = nn.Linear(n_heads * d_h, n_heads * d_h, bias=bias if output_bias is None else output_bias)

    def forward(self, x, symbols, *, causal=False, mask=None, rope=None, cache=None, need_weights=False):
        """x (B, T, d_model) -> (B, T, n_heads * d_h).

        symbols: (B, T, d_model), (T, d_model), RelativeSymbols, or a PositionRelativeSymbols module.
        mask, causal: see attention.attention_mask. Padding is (B, S), and where B = S mask[:, None, None].
        rope rotates q and k, never the relations.
        need_weights: also returns alpha (B, H, T, S) and r (B, R, T, S), both as in the equation, before dropout.
        """
        q = split_heads(self.W_q(x), self.n_heads, rope)                           # (B, H, T, d_h)
        k = split_heads(self.W_k(x), self.n_kv_heads, rope)                        # (B, G, S, d_h)
        q_rel = split_heads(self.W_q_rel(x), self.n_relations)                     # (B, R, T, p), for all heads
        k_rel = q_rel if self.symmetric else split_heads(self.W_k_rel(x), self.n_relations)    # (B, R, S, p)
        if cache is not None:
            k, k_rel = cache.append("k_attn", k), cache.append("k_rel", k_rel)
        s = project_symbols(symbols, self.W_s, self.n_kv_heads, x.size(1), cache)  # s_j W_s in heads: see symbols.py

        form = self.literal if need_weights else self.choose_form(q, k)
        a = form(q, k, q_rel, k_rel, s, causal=causal, mask=mask)
        out = self.W_o(merge_heads(a))                                             # (B, T, H d_h)
        if not need_weights:
            return out
        return out, attention_weights(q, k, causal=causal, mask=mask), self.relations(q_rel, k_rel, causal, mask)

    def literal(self, q, k, q_rel, k_rel, s, *, causal, mask):
        """Eq. 3, the definition -> a (B, H, T, d_h)."""
        alpha = attention_weights(q, k, causal=causal, mask=mask)                  # (B, H, T, S)
        r = self.relations(q_rel, k_rel, causal, mask)                             # (B, R, T, S)
        alpha = F.dropout(alpha, self.dropout, self.training)
        return torch.einsum("bhij,brij->bhir", alpha, r) @ self.W_r + sum_symbols(alpha, s)

    def relations(self, q_rel, k_rel, causal, mask):
        """r_ij[l] = <q_rel_i[l], k_rel_j[l]> / sqrt(p), through the relation activation: (B, R, T, S)."""
        r = q_rel @ k_rel.mT / self.rel_proj_dim ** 0.5
        if self.rel_activation != "softmax":
            return REL_ACTIVATIONS[self.rel_activation](r)
        if mask is not None and mask.dim() == 4 and mask.size(1) > 1:
            raise ValueError("relations are shared by all heads: softmax relations need one mask for all heads")
        # authors' code: over all j, the future included; here: over the j that i may attend to, or the future leaks
        allowed = attention_mask(q_rel, k_rel, causal, mask)
        return r.softmax(-1) if allowed is None else r.masked_fill(~allowed, torch.finfo(r.dtype).min).softmax(-1)

    def fast(self, q, k, q_rel, k_rel, s, *, causal, mask):
        """The same a, by an identity. The sum over j is linear in r_ij, and q_rel_i does not depend on j:

            sum_j alpha_ij <q_rel_i[l], k_rel_j[l]>   =   < q_rel_i[l],  sum_j alpha_ij k_rel_j[l] >

        So relational attention is ordinary attention whose values are the symbols s_j W_s and relation keys k_rel_j,
        followed by a product with the receiver's relation queries. With fused kernels memory is linear in n (but a mask
        together with causal is a T x S tensor).

        Relative symbols depend on i, too, so they cannot be values. Up to 512^2 scores alpha is written out for them,
        beyond that they are summed in query blocks.

        Dropout: unless alpha is written out, each piece of the values (see attend_to_wide) draws its own dropout mask:
        the same mean as in the other forms, not the same distribution.
        """
        (B, G, S, d_h), R, p = k.shape, self.n_relations, self.rel_proj_dim
        dropout = self.dropout if self.training else 0.0
        q_rel, k_rel = merge_heads(q_rel * p ** -0.5)[None], merge_heads(k_rel)    # (1, B, T, R p), (B, S, R p)

        if are_relative(s) and s.row is not None:
            alpha = F.dropout(attention_weights(q, k, causal=causal, mask=mask), dropout).type_as(q)   # (B, H, T, S)
            o = sum_symbols(alpha, s).permute(1, 2, 0, 3)                          # (H, T, B, d_h), as it is in memory
            k_sums = (alpha.flatten(1, 2) @ k_rel).unflatten(1, alpha.shape[1:3])  # (B, H, T, R p)
            return self.add_relations(o, q_rel.transpose(1, 2), k_sums.permute(1, 2, 0, 3)).permute(2, 0, 1, 3)

        options = dict(causal=causal, mask=mask, dropout=dropout)
        v = k_rel[:, :, None].expand(-1, -1, G, -1)                                # (B, S, G, R p), all heads the same
        if are_relative(s):
            o = sum_symbols_in_blocks(q, k, s, **options).transpose(0, 1)          # (H, B, T, d_h)
            k_sums = attend_to_wide(q, k, v, **options)                            # (H, B, T, R p)
        else:
            v = torch.cat([s.expand(B, G, S, d_h).transpose(1, 2), v], -1)         # (B, S, G, d_h + R p)
            o, k_sums = attend_to_wide(q, k, v, **options).split((d_h, R * p), -1)
        return self.add_relations(o, q_rel, k_sums).transpose(0, 1)

    def add_relations(self, o, q_rel, k_sums):
        """o_i + m_i W_r, where m_i[l] = sum_j alpha_ij r_ij[l] = < q_rel_i[l], sum_j alpha_ij k_rel_j[l] >.

        o (H, B, T, d_h), q_rel (1, B, T, R p), k_sums (H, B, T, R p), or with T before B -> as o. The heads come first
        because each has its own W_r: one batched product.
        """
        R_p = self.n_relations, self.rel_proj_dim
        # dtype: or autocast would sum to float32, and the product with W_r would cast it back
        m = (q_rel.unflatten(-1, R_p) * k_sums.unflatten(-1, R_p)).sum(-1, dtype=o.dtype)  # (H, B, T, R)
        return torch.baddbmm(o.flatten(1, 2), m.flatten(1, 2), self.W_r).view_as(o)

    def blocked(self, q, k, q_rel, k_rel, s, *, causal, mask):
        """The same a, one block of queries at a time, so that no n x n tensor is stored: see extras/blocked.py."""
        o, m = attend_in_blocks(q, k, s.table if are_relative(s) else s, q_rel, k_rel, causal=causal,
                                mask=attention_mask(q, k, False, mask), relative=are_relative(s),
                                dropout=self.dropout if self.training else 0.0)
        return m.type_as(q) @ self.W_r + o.type_as(q)                              # m: sum_j alpha_ij r_ij

    def choose_form(self, q, k):
        """On a CPU literal up to 128 tokens and blocked beyond; elsewhere fast.

        A relation activation needs the literal form at any length.
        """
        if self.rel_activation != "identity":
            return self.literal
        if q.device.type != "cpu":
            return self.fast
        return self.blocked if beyond(128, q.size(-2), k.size(-2)) else self.literal


class RelationalCrossAttention(Attention):
    """The ablation (Appendix D; Altabaa et al., 2024): the message is the symbol alone, a_i = sum_j alpha_ij s_j W_s.

    Self-attention whose values come from symbols; W_v takes the role of W_s (paper: s_j itself; here a projection per
    head, as in the authors' code). The only relation it computes is alpha.
    """

    def forward(self, x, symbols, *, causal=False, mask=None, rope=None, cache=None):
        """As RelationalAttention.forward: (B, T, d_model) -> (B, T, n_heads * d_h)."""
        q = split_heads(self.W_q(x), self.n_heads, rope)                           # (B, H, T, d_h)
        k = split_heads(self.W_k(x), self.n_kv_heads, rope)                        # (B, G, S, d_h)
        if cache is not None:
            k = cache.append("k_attn", k)
        s = project_symbols(symbols, self.W_v, self.n_kv_heads, x.size(1), cache)  # s_j W_s in heads: see symbols.py
        dropout = self.dropout if self.training else 0.0
        if not are_relative(s):
            a = attend(q, k, s.expand(k.shape), causal=causal, mask=mask, dropout=dropout)
        elif s.row is None:                                                        # these depend on i, too
            a = sum_symbols_in_blocks(q, k, s, causal=causal, mask=mask, dropout=dropout)
        else:
            alpha = attention_weights(q, k, causal=causal, mask=mask)              # (B, H, T, S)
            a = sum_symbols(F.dropout(alpha, dropout), s)
        return self.W_o(merge_heads(a))                                            # (B, T, H d_h)


def sum_symbols_in_blocks(q, k, s, *, causal, mask, dropout):
    """sum_j alpha_ij s_{j-i} W_s for long sequences, s by offset -> (B, H, T, d_h); see extras/blocked.py."""
    none = (x[:, :0].detach() for x in (q, k))                         # no relations
    o, _ = attend_in_blocks(q, k, s.table, *none, causal=causal, mask=attention_mask(q, k, False, mask),
                            dropout=dropout, relative=True)
    return o.type_as(q)
