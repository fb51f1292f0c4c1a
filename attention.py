"""Attention as every Transformer has it: the heads that move *sensory* information, the features of objects.

    alpha_ij = softmax_j( <q_i, k_j> / sqrt(d_h) )          e_i = sum_j alpha_ij v_j          (Eq. 2)

paper: no 1/sqrt(d_h) in its formulas; here, as in the authors' code and everywhere: yes, or wide heads saturate.

A head is a question (who matters to me? alpha) and an answer (what is brought back? v). relational_attention.py
keeps the question and changes the answer, so it shares what stands here: heads, rotary positions, masks, the cache.

Shapes: B batch, T queries, S keys, H heads, G key/value heads (G < H: grouped-query attention), d_h = width of a head.
In self-attention the T queries are always the *last* T of the S positions: T = S when a whole sequence is read, T = 1
when a cached model writes its next token. That one rule fixes the causal mask and the relative offsets j - i.
"""
import functools

import torch
import torch.nn.functional as F
from torch import nn

from extras.blocked import attend_in_blocks


def sinusoids(max_len, d_model):
    """Vaswani et al. (2017), Section 3.5: (max_len, d_model), sines in the even features, cosines in the odd ones."""
    angle = torch.arange(max_len)[:, None] * 10000.0 ** (-torch.arange(0, d_model, 2) / d_model)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :d_model]


def rope_table(max_len, d_h, base=10000.0):
    """Rotary positions (Su et al., 2021): (2, max_len, 1, d_h), the cosines and signed sines that `rotate` takes."""
    theta = base ** (-torch.arange(0, d_h, 2) / d_h)                   # (d_h/2,) one frequency per plane
    angle = torch.arange(max_len)[:, None] * theta                     # (max_len, d_h/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])[:, :, None]


def rotate(x, rope):
    """Turns each head of x (B, T, H, d_h) by its position's angle; features m and m + d_h/2 span plane m."""
    cos, sin = rope                                                    # (T, 1, d_h) each, the same for all heads
    turned = torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)  # (a, b) -> (a cos - b sin, b cos + a sin)
    return turned.type_as(x)                                           # under autocast a bfloat16 x turned in float32


def split_heads(x, n_heads, rope=None):
    """(B, T, H d_h) -> (B, H, T, d_h), rotated by position where `rope` is given."""
    x = x.view(x.size(0), x.size(1), n_heads, -1)                      # (B, T, H, d_h)
    return (x if rope is None else rotate(x, rope)).transpose(1, 2)


def merge_heads(x):
    """(B, H, T, d_h) -> (B, T, H d_h): the heads side by side."""
    return x.transpose(1, 2).flatten(2)


def may_attend(causal, mask, q, k):
    """Who may look at whom: boolean, True = may, broadcastable to (B, H, T, S); None if everyone may look at everyone.

    `mask` is boolean: (B, S), False at padding, or with four dimensions that broadcast to (B, H, T, S).
    """
    T, S = q.size(-2), k.size(-2)
    if mask is not None and (mask.dtype != torch.bool or mask.dim() not in (2, 4)):
        raise ValueError(f"a mask must be boolean, of 2 or 4 dimensions, not {mask.dtype} {tuple(mask.shape)}")
    if mask is not None and mask.dim() == 2:
        if mask.shape != (k.size(0), S):
            raise ValueError(f"a mask of two dimensions marks padding and must be (B, S) = ({k.size(0)}, {S}), not "
                             f"{tuple(mask.shape)}; give a (T, S) mask as mask[None, None]")
        mask = mask[:, None, None, :]                                  # (B, 1, 1, S)
    if not causal or T == 1:                                           # the newest token may look at all before it
        return mask
    # torch.compile looks through caches anyway, but warns of them
    past = (up_to_now.__wrapped__ if torch.compiler.is_compiling() else up_to_now)(T, S, q.device)
    return past if mask is None else past & mask


@functools.lru_cache(maxsize=1)                                        # all layers ask for the same one
def up_to_now(T, S, device):
    """(T, S), True where key j is not later than query i. Kept for the next call: not to be written to."""
    with torch.inference_mode(False):                                  # or training could not use what generation made
        return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def shared_by_heads(x, n_heads):
    """(B, G, S, d_h) -> (B, n_heads, S, d_h): each key/value head for n_heads / G query heads, copied if not 1."""
    return x if x.size(1) == n_heads else x.repeat_interleave(n_heads // x.size(1), dim=1)


def attention_weights(q, k, *, causal=False, mask=None):
    """alpha of Eq. 2, written out: (B, H, T, S). A query that may look at nobody gets a row of zeros."""
    k = shared_by_heads(k, q.size(1))                                  # (B, H, S, d_h)
    scores = q / q.size(-1) ** 0.5 @ k.mT                              # (B, H, T, S); q first, or float16 overflows
    may = may_attend(causal, mask, q, k)
    if may is None:
        return scores.softmax(-1)
    hidden = ~may
    alpha = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1)
    return alpha if mask is None else alpha.masked_fill(hidden, 0.0)   # without a mask everyone sees at least itself


def attend(q, k, v, *, causal=False, mask=None, dropout=0.0):
    """sum_j alpha_ij v_j, (B, H, T, width of v); v may be wider than q and k.

    By PyTorch's kernels, but on a CPU these are slow where v is wider, and store alpha where there is dropout.
    """
    many = q.size(-2) * k.size(-2) >= 2 ** 16                          # below, to store alpha costs little
    if q.device.type == "cpu" and (dropout and many or v.size(-1) > q.size(-1)):
        o, _ = attend_in_blocks(q, k, v, causal=causal, may=may_attend(False, mask, q, k), dropout=dropout)
        return o.type_as(q)
    return attend_fused(q, k, v, causal=causal, mask=mask, dropout=dropout)


def attend_fused(q, k, v, *, causal, mask, dropout):
    """The same by PyTorch's kernels, of which the fused ones never store alpha; causal and a mask make a T x S mask."""
    scale, wider = q.size(-1) ** -0.5, v.size(-1) - q.size(-1)
    if wider > 0:                      # kernels want one width: zeros behind q and k leave every score as it is
        q, k = F.pad(q, (0, wider)), F.pad(k, (0, wider))
    whole = causal and mask is None and q.size(-2) == k.size(-2)       # then the kernel skips the future by itself
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=None if whole else may_attend(causal, mask, q, k), is_causal=whole,
        dropout_p=dropout, scale=scale, enable_gqa=q.size(1) != k.size(1))


class Cache:
    """What one layer remembers of the tokens it has read, so that each new token is read once.

    Named tensors (B, heads, S, width), each in a buffer with room for max_len tokens. Inference only: written in place.
    """

    def __init__(self, max_len):
        self.max_len, self.length, self.buffers, self.context = max_len, {}, {}, None

    def append(self, name, new):
        """`new` (B, heads, T, width) joins what is kept under `name`; returns all of it, (B, heads, S, width)."""
        B, heads, T, width = new.shape
        if name not in self.buffers:
            self.buffers[name], self.length[name] = new.new_empty(B, heads, self.max_len, width), 0
        start, self.length[name] = self.length[name], self.length[name] + T
        self.buffers[name].narrow(2, start, T).copy_(new)
        return self.buffers[name].narrow(2, 0, start + T)

    def once(self, keys_and_values):
        """Those of the context, computed at the first call only: a cache serves one context, which does not change."""
        if self.context is None:
            self.context = keys_and_values()
        return self.context

    def __len__(self):
        return max(self.length.values(), default=0)


def head_width(d_model, n_heads, total_heads, n_kv_heads):
    """d_h = d_model / total_heads; raises ValueError if the heads cannot be laid out so."""
    if n_heads < 1 or d_model % total_heads:
        raise ValueError(f"d_model={d_model} cannot be cut into {total_heads} heads: it must be a multiple")
    if n_heads % n_kv_heads:
        raise ValueError(f"n_kv_heads={n_kv_heads} must divide the number of heads in each group, here {n_heads}")
    return d_model // total_heads


class Attention(nn.Module):
    """Multi-head attention: self-attention, or cross-attention if a context is given.

    total_heads: heads of the whole layer, where this group is a part of it; the group writes n_heads * d_h features.
    n_kv_heads: key/value heads, each shared by n_heads / n_kv_heads query heads (Ainslie et al., 2023).
    output_bias: a bias in W_o; default: as the other projections.
    """

    def __init__(self, d_model, n_heads, *, total_heads=None, n_kv_heads=None, dropout=0.0, bias=False,
                 output_bias=None):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.dropout = n_heads, n_kv_heads or n_heads, dropout
        d_h = head_width(d_model, n_heads, total_heads or n_heads, self.n_kv_heads)
        self.W_q = nn.Linear(d_model, n_heads * d_h, bias=bias)
        self.W_k = nn.Linear(d_model, self.n_kv_heads * d_h, bias=bias)
        self.W_v = nn.Linear(d_model, self.n_kv_heads * d_h, bias=bias)
        self.W_o = nn.Linear(n_heads * d_h, n_heads * d_h, bias=bias if output_bias is None else output_bias)

    def forward(self, x, context=None, *, causal=False, mask=None, rope=None, cache=None):
        """x (B, T, d_model), context (B, S, d_model) or None for x itself -> (B, T, n_heads * d_h)."""
        def keys_and_values(y):
            return split_heads(self.W_k(y), self.n_kv_heads, rope), split_heads(self.W_v(y), self.n_kv_heads)

        q = split_heads(self.W_q(x), self.n_heads, rope)               # (B, H, T, d_h)
        if context is None:
            k, v = keys_and_values(x)                                  # (B, G, S, d_h) each
            if cache is not None:
                k, v = cache.append("k", k), cache.append("v", v)
        else:
            k, v = cache.once(lambda: keys_and_values(context)) if cache is not None else keys_and_values(context)
        e = attend(q, k, v, causal=causal, mask=mask, dropout=self.dropout if self.training else 0.0)
        return self.W_o(merge_heads(e))
