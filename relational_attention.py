"""Relational attention: the one new idea (Eq. 3).

A standard head brings back the features of the objects it looks at. A relational head brings back how the receiver
*relates* to each of them, tagged with a symbol s_j that says who the sender is:

    a_i  =  sum_j alpha_ij ( r_ij W_r + s_j W_s )

    alpha_ij  = softmax_j( <q_i, k_j> / sqrt(d_h) )               whom to look at: as in any attention, per head
    r_ij[l]   = <q_rel_i[l], k_rel_j[l]> / sqrt(rel_proj_dim)     R relations, shared by all heads, not masked
    s_j       = symbols                                           see symbols.py

paper: neither square root; here both, as in the authors' code, so that neither grows with its width.

Read literally this builds an n x n x R tensor of relations. But the sum is linear in r, and q_rel_i does not see j:

    sum_j alpha_ij <q_rel_i[l], k_rel_j[l]>   =   < q_rel_i[l],  sum_j alpha_ij k_rel_j[l] >

So a relational head IS ordinary attention, whose values are [k_rel_j[1] ... k_rel_j[R], s_j W_s], read afterwards with
the receiver's own relation queries. Three forms of the same sum, equal to 1e-10 in the tests, gradients included:

    literal     Eq. 3 as it stands: the definition, and the fastest form among few tokens
    fast        the identity: attention with wide values, by a fused kernel or in blocks, memory linear in n; few heads
    blocked     linear in n too, relations computed once for all heads: see blocked.py; for many or wide ones

`RelationalAttention.choose_form` chooses by rule.

Shapes as in attention.py; R relations of width p = rel_proj_dim.
"""
import torch
import torch.nn.functional as F
from torch import nn

from attention import (Attention, attend, attention_weights, head_width, may_attend, merge_heads, shared_by_heads,
                       split_heads)
from extras.blocked import attend_in_blocks
from symbols import PositionRelativeSymbols

REL_ACTIVATIONS = {"identity": None, "relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "gelu": F.gelu,
                   "gelu_tanh": lambda r: F.gelu(r, approximate="tanh"), "silu": F.silu, "softmax": None}

# Which form is the fastest? For a pair of tokens alpha and r have H + R numbers. Forward and backward, the fast form
# (in blocks, with values of R p + d_h) makes 7 H d_h + 3 H R p multiplications for them, the blocked form 7 H d_h +
# 4 R p, of which it does H d_h + R p a second time. So for each number
#     x = (3 H - 4) R p / (H + R)        are saved by the blocked form against the fast one
#     z = (H d_h + R p) / (H + R)        are repeated by the blocked form, not by the literal one
# (without 3 H R for m) and the rest is fitted to measurements on a CPU (results/bench/rule.txt): fast, not blocked, if
# x <= 60, or 70 if causal; but literal if
#     c T S B^(1/3)  <  min( 280 (z^2 (H + R))^(3/4),  2,300,000 / (H + R) )     c = 2 if causal, as blocks skip half
# or, as to start each operation takes time, c T S B (H + R) < 550,000.
# A GPU is not measured: there it is the fast form wherever its values are narrow enough for flash attention, and the
# other two as on a CPU.


class RelationalAttention(nn.Module):
    """n_heads heads of relational attention (Eq. 3, Algorithm 1).

    total_heads     heads of the whole layer if these are a part of it (d_h = d_model / total_heads); default n_heads
    n_relations     R, the number of relations d_r; default n_heads
    rel_proj_dim    p, the width in which one relation compares two objects; default n_heads * d_h / R
    n_kv_heads      key and symbol heads, each shared by n_heads / n_kv_heads query heads; relations are shared anyway
    symmetric       W_q_rel = W_k_rel: r_ij = r_ji, a positive semi-definite kernel
    output_bias     a bias in W_o; default: as the other projections
    rel_activation  applied to r; any but "identity" breaks the equation above and costs n x n x R memory
    Raises ValueError for widths that do not divide.
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

        self.W_q = nn.Linear(d_model, n_heads * d_h, bias=bias)                    # W_q^attn, W_k^attn: whom to look at
        self.W_k = nn.Linear(d_model, self.n_kv_heads * d_h, bias=bias)
        self.W_q_rel = nn.Linear(d_model, R * p, bias=bias)                        # W_q^rel, W_k^rel: what to compare
        if not symmetric:
            self.W_k_rel = nn.Linear(d_model, R * p, bias=bias)
        self.W_r = nn.Parameter(torch.empty(n_heads, R, d_h).uniform_(-R ** -0.5, R ** -0.5))  # as nn.Linear(R, d_h)
        self.W_s = nn.Linear(d_model, self.n_kv_heads * d_h, bias=bias)
        self.W_o = nn.Linear(n_heads * d_h, n_heads * d_h, bias=bias if output_bias is None else output_bias)

    def forward(self, x, symbols, *, causal=False, mask=None, rope=None, cache=None, need_weights=False):
        """x (B, T, d_model) -> (B, T, n_heads * d_h).

        symbols: (B, T, d_model), (T, d_model), or a PositionRelativeSymbols module.
        mask, causal: who may attend to whom (attention.may_attend); rope turns q and k, never the relations.
        need_weights: also returns alpha (B, H, T, S) and r (B, R, T, S), both as in the equation, before dropout.
        """
        q = split_heads(self.W_q(x), self.n_heads, rope)                           # (B, H, T, d_h)
        k = split_heads(self.W_k(x), self.n_kv_heads, rope)                        # (B, G, S, d_h)
        q_rel = split_heads(self.W_q_rel(x), self.n_relations)                     # (B, R, T, p), for all heads
        k_rel = q_rel if self.symmetric else split_heads(self.W_k_rel(x), self.n_relations)    # (B, R, S, p)
        if not isinstance(symbols, PositionRelativeSymbols):
            symbols = symbols if symbols.dim() == 3 else symbols[None]             # (B or 1, T, d_model)
            symbols = split_heads(self.W_s(symbols), self.n_kv_heads)              # (B or 1, G, S, d_h): s_j W_s
        if cache is not None:
            k, k_rel = cache.append("k_attn", k), cache.append("k_rel", k_rel)
            if not isinstance(symbols, PositionRelativeSymbols):                   # relative symbols have no past
                symbols = cache.append("s W_s", symbols)

        literal = need_weights or self.rel_activation != "identity"
        form = self.literal if literal else self.choose_form(q, k, symbols, causal, mask)
        a, *weights = form(q, k, q_rel, k_rel, symbols, causal, mask)
        out = self.W_o(merge_heads(a))                                             # (B, T, H d_h)
        return (out, *weights) if need_weights else out

    def choose_form(self, q, k, symbols, causal, mask):
        """The cheapest way to compute the same thing: by shapes, device, kind of symbols and whether there is a mask,
        never by the time it took, so that the same call always takes the same form and runs can be repeated.
        """
        (B, H, T, d_h), S, R, p = q.shape, k.size(-2), self.n_relations, self.rel_proj_dim
        x, z, c = (3 * H - 4) * R * p / (H + R), (H * d_h + R * p) / (H + R), 2 if causal else 1   # as above
        few = (c * T * S * B ** (1 / 3) < min(280 * (z * z * (H + R)) ** 0.75, 2_300_000 / (H + R))
               or c * T * S * B * (H + R) < 550_000)
        on_cpu = q.device.type == "cpu"
        if on_cpu:
            narrow = x <= (70 if causal else 60)
        else:              # flash attention's widest is 256; causal with a mask, or for the last T alone, it is n x n
            narrow = R * p + d_h <= 256 and not (causal and (mask is not None or T < S))
        narrow = narrow and not isinstance(symbols, PositionRelativeSymbols)       # these are no values of j alone
        if T == 1 or few and (on_cpu or not narrow):
            return self.literal
        return self.fast if narrow else self.blocked

    def literal(self, q, k, q_rel, k_rel, symbols, causal, mask):
        """Eq. 3 as the paper writes it: the definition."""
        alpha = attention_weights(q, k, causal=causal, mask=mask)                  # (B, H, T, S)
        r = self.relations(q_rel, k_rel, causal, mask)                             # (B, R, T, S)
        dropped = F.dropout(alpha, self.dropout, self.training)
        # sum_j alpha_ij r_ij W_r
        a = torch.einsum("bhij,brij->bhir", dropped, r) @ self.W_r                 # (B, H, T, d_h)
        return a + self.bring_symbols(dropped, symbols), alpha, r

    def relations(self, q_rel, k_rel, causal, mask):
        """r_ij[l] = <q_rel_i[l], k_rel_j[l]> / sqrt(p), through the relation activation: (B, R, T, S)."""
        r = q_rel @ k_rel.mT / self.rel_proj_dim ** 0.5
        if self.rel_activation == "softmax":
            # authors' code: over all j, the future included; here: over those whom i may see, or causality is lost
            may = may_attend(causal, mask, q_rel, k_rel)
            if may is not None and may.dim() == 4 and may.size(1) > 1:
                raise ValueError("relations are shared by all heads: softmax relations need one mask for all heads")
            low = torch.finfo(r.dtype).min
            return r.softmax(-1) if may is None else r.masked_fill(~may, low).softmax(-1)
        activation = REL_ACTIVATIONS[self.rel_activation]
        return r if activation is None else activation(r)

    def fast(self, q, k, q_rel, k_rel, symbols, causal, mask):
        """The same a (B, H, T, d_h) by the identity above: attend to relation keys, then read with relation queries."""
        B, G, S, d_h = k.shape
        q_rel, k_rel = merge_heads(q_rel)[:, None], merge_heads(k_rel)[:, None]    # (B, 1, T or S, R p)
        width = q_rel.size(-1)                                                     # R p
        v = torch.cat([k_rel.expand(B, G, S, width), symbols.expand(B, G, S, d_h)], -1)
        out = attend(q, k, v, causal=causal, mask=mask, dropout=self.dropout if self.training else 0.0)
        brought, s = out.split([width, d_h], -1)                                   # sum_j alpha_ij k_rel_j, .. s_j W_s
        # < q_rel_i[l], brought_i[l] > W_r: product and sum over p are one matrix product with W_r's rows repeated
        W_r = self.W_r.repeat_interleave(self.rel_proj_dim, dim=1)                 # (H, R p, d_h)
        return read_out(brought * (q_rel * self.rel_proj_dim ** -0.5), W_r, s, q.dtype),

    def blocked(self, q, k, q_rel, k_rel, symbols, causal, mask):
        """The same a (B, H, T, d_h), a block of receivers at a time."""
        relative = isinstance(symbols, PositionRelativeSymbols)
        if relative:
            symbols = symbols.table(q.size(2), k.size(2), self.W_s, self.n_kv_heads)[None]     # s_{j-i} W_s by offset
        s, m = attend_in_blocks(q, k, symbols, q_rel, k_rel, causal=causal, may=may_attend(False, mask, q, k),
                                dropout=self.dropout if self.training else 0.0, relative=relative)
        return read_out(m, self.W_r, s, q.dtype),

    def bring_symbols(self, alpha, symbols):
        """sum_j alpha_ij s_j W_s for alpha (B, H, T, S) -> (B, H, T, d_h)."""
        if isinstance(symbols, PositionRelativeSymbols):
            return symbols.weighted_sum(alpha, self.W_s, self.n_kv_heads)
        return alpha @ shared_by_heads(symbols, self.n_heads)


def read_out(m, W_r, s, dtype):
    """m W_r + s, summed in float32 even where the rest is in half precision."""
    with torch.autocast(m.device.type, enabled=False):
        exact = torch.promote_types(m.dtype, torch.float32)
        return (m.to(exact) @ W_r.to(exact) + s).to(dtype)


class RelationalCrossAttention(Attention):
    """The ablation (Appendix D; Altabaa et al., 2024): the message is the symbol alone, a_i = sum_j alpha_ij s_j W_s.

    Self-attention whose values come from symbols; W_v plays W_s (paper: s_j itself; here a projection per head, as in
    the authors' code). What it compares is what it looks at: alpha is the only relation it has.
    """

    def forward(self, x, symbols, *, causal=False, mask=None, rope=None, cache=None):
        """As RelationalAttention.forward: (B, T, d_model) -> (B, T, n_heads * d_h)."""
        q = split_heads(self.W_q(x), self.n_heads, rope)                           # (B, H, T, d_h)
        k = split_heads(self.W_k(x), self.n_kv_heads, rope)                        # (B, G, S, d_h)
        if cache is not None:
            k = cache.append("k_attn", k)
        dropout = self.dropout if self.training else 0.0
        if isinstance(symbols, PositionRelativeSymbols):
            table = symbols.table(q.size(2), k.size(2), self.W_v, self.n_kv_heads)             # (G, T+S, d_h)
            a, _ = attend_in_blocks(q, k, table[None], relative=True, causal=causal,
                                    may=may_attend(False, mask, q, k), dropout=dropout)
            return self.W_o(merge_heads(a.type_as(q)))
        symbols = symbols if symbols.dim() == 3 else symbols[None]
        s = split_heads(self.W_v(symbols), self.n_kv_heads)                        # (B or 1, G, S, d_h): s_j W_s
        if cache is not None:
            s = cache.append("s W_s", s)
        a = attend(q, k, s.expand(k.shape), causal=causal, mask=mask, dropout=dropout)
        return self.W_o(merge_heads(a))
