"""Attention as every Transformer has it: the heads that move *sensory* information, the features of objects.

    alpha_ij = softmax_j( <q_i, k_j> / sqrt(d_h) )          e_i = sum_j alpha_ij v_j          (Eq. 2)

paper: no 1/sqrt(d_h) in its formulas; here scaled, as in the authors' code and as usual, or wide heads saturate.

A head has two parts: it selects senders (alpha), and it sums a message from each of them (v_j). relational_attention.py
keeps the selection and changes the message, so both files share the heads, rotary positions, masks and the cache below.

Shapes: B batch, T queries, S keys, H heads, G key/value heads (G < H: grouped-query attention), d_h = width of a head.
In self-attention the T queries are always the *last* T of the S positions: T = S when a whole sequence is processed,
T = 1 when a model with a cache generates its next token. The causal mask and relative offsets j - i rely on it.
"""
import torch
import torch.nn.functional as F
from torch import nn


def sinusoids(positions, d_model):
    """Vaswani et al. (2017), Section 3.5: positions (..., T) -> (..., T, d_model), sines, cosines in turn, float32."""
    frequency = 10000.0 ** (-torch.arange(0, d_model, 2, device=positions.device).float() / d_model)
    angle = positions[..., None] * frequency                           # (..., T, d_model/2)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)[..., :d_model]


def rope_table(positions, d_h, base=10000.0):
    """Rotary positions (Su et al., 2021): positions (..., T) -> the factors in `rotate`, (..., T, 1, d_h), float32."""
    frequency = base ** (-torch.arange(0, d_h, 2, device=positions.device).float() / d_h)      # one for each plane
    angle = positions[..., None, None] * frequency                     # (..., T, 1, d_h/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x, rope):
    """Rotates each head of x (B, T, H, d_h) by the angle of its position, in planes of features m and m + d_h/2:

        (a cos - b sin, b cos + a sin)  =  (a, b) * (cos, cos) + (b, a) * (-sin, sin)
    """
    cos, sin = rope                                                    # (cos, cos), (-sin, sin): (T, 1, d_h) each
    a, b = x.chunk(2, dim=-1)                                          # (B, T, H, d_h/2) each
    return (x * cos + torch.cat([b, a], -1) * sin).type_as(x)


def split_heads(x, n_heads, rope=None):
    """(B, T, H d_h) -> (B, H, T, d_h), rotated by position where `rope` is given."""
    if x.dim() != 3:
        raise ValueError(f"attention takes a batch of sequences, (B, T, features), not {tuple(x.shape)}")
    x = x.unflatten(-1, (n_heads, -1))                                 # (B, T, H, d_h)
    return (x if rope is None else rotate(x, rope)).transpose(1, 2)


def merge_heads(x):
    """(B, H, T, d_h) -> (B, T, H d_h): the heads side by side."""
    return x.transpose(1, 2).flatten(2)


def attention_mask(q, k, causal, mask):
    """Which query may attend to which key: boolean, broadcastable to (B, H, T, S); None if all may attend to all.

    `mask` is boolean, True = may attend: (B, S), False at padding, or four dimensions that broadcast to (B, H, T, S).
    Raises ValueError for other masks, also for (T, T) where B = T, which could be either.
    """
    B, H, T, S = k.size(0), q.size(1), q.size(-2), k.size(-2)
    if causal and T > S:
        raise ValueError(f"causal attention of {T} queries needs at least {T} keys, not {S}")
    if mask is not None and (mask.dtype != torch.bool or mask.dim() not in (2, 4)):
        raise ValueError(f"a mask must be boolean, with 2 or 4 dimensions, not {mask.dtype} {tuple(mask.shape)}")
    if mask is not None and mask.dim() == 2:
        if mask.shape != (B, S):
            raise ValueError(f"a mask of two dimensions marks padding and must be (B, S) = ({B}, {S}), not "
                             f"{tuple(mask.shape)}; pass a (T, S) mask as mask[None, None]")
        if B == T == S > 1:
            raise ValueError(f"a ({T}, {T}) mask for {T} sequences of {T} tokens can mean two things: pass padding as "
                             f"mask[:, None, None], and which query attends to which key as mask[None, None]")
        mask = mask[:, None, None, :]                                  # (B, 1, 1, S)
    elif mask is not None and any(n not in (1, N) for n, N in zip(mask.shape, (B, H, T, S))):
        raise ValueError(f"a mask of four dimensions must broadcast to (B, H, T, S) = {(B, H, T, S)}, not be "
                         f"{tuple(mask.shape)}")
    if not causal or T == 1:                                           # the last position may attend to all of them
        return mask
    past = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return past if mask is None else past & mask


def share_heads(x, n_heads):
    """(B, G, S, d_h) -> (B, G, n_heads / G, S, d_h), a view: each key/value head serves n_heads / G query heads."""
    # by way of (B, S, G, ...): the gradient is then summed into the order of the projection, which saves a copy
    return x.transpose(1, 2).unsqueeze(3).expand(-1, -1, -1, n_heads // x.size(1), -1).permute(0, 2, 3, 1, 4)


def repeat_heads(x, n_heads):
    """(B, G, S, d_h) -> (B, n_heads, S, d_h)."""
    return x if x.size(1) == n_heads else share_heads(x, n_heads).flatten(1, 2)


def attention_weights(q, k, *, causal=False, mask=None):
    """alpha of Eq. 2, written out: (B, H, T, S). A fully masked row is all zeros."""
    k = repeat_heads(k, q.size(1))                                     # (B, H, S, d_h)
    scores = (q / q.size(-1) ** 0.5) @ k.mT                            # (B, H, T, S); scaled first for float16's sake
    allowed = attention_mask(q, k, causal, mask)
    if allowed is None:
        return scores.softmax(-1)
    alpha = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1)
    return alpha if mask is None else alpha.masked_fill(~allowed, 0.0) # causal alone leaves no row fully masked


def attend(q, k, v, *, causal=False, mask=None, dropout=0.0):
    """sum_j alpha_ij v_j: (B, H, T, d_h), by PyTorch's kernels, of which the fused ones never store alpha."""
    if causal and mask is None and q.size(-2) == k.size(-2):           # the kernel applies the causal mask itself
        masks = dict(is_causal=True)
    else:
        masks = dict(attn_mask=attention_mask(q, k, causal, mask))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, enable_gqa=bool(q.size(1) != k.size(1)), **masks)


def attend_to_wide(q, k, v, *, causal, mask, dropout):
    """sum_j alpha_ij v_j for values of any width: v (B, S, G, width) -> (H, B, T, width).

    Fused kernels want values as narrow as q and k. So v is cut into n pieces of d_h features. Each head becomes n heads
    with the same q and k, one for each piece; all of them, in the order (G, n, H / G), are one call.
    """
    (B, G, S, d_h), width = k.shape, v.size(-1)
    n = -(-width // d_h)                                               # width / d_h, rounded up
    if width < n * d_h:
        v = F.pad(v, (0, n * d_h - width))                             # zeros, cut off again in the last line
    v = split_heads(v.flatten(2), G * n)                               # (B, G n, S, d_h)

    def n_times(x):                                                    # (B, G H/G, ...) -> (B, G n H/G, ...)
        return x.unflatten(1, (G, -1)).repeat_interleave(n, 1).flatten(1, 2)

    mask = attention_mask(q, k, False, mask)                           # four dimensions, or None
    if mask is not None and mask.size(1) > 1:                          # a mask for each head
        mask = n_times(mask)
    sums = attend(n_times(q), n_times(k), v, causal=causal, mask=mask, dropout=dropout)    # (B, G n H/G, T, d_h)
    sums = sums.unflatten(1, (G, n, -1)).permute(1, 3, 0, 4, 2, 5)     # (G, H/G, B, T, n, d_h)
    return sums.flatten(4).flatten(0, 1)[..., :width]


def as_in_autocast(x):
    """x in the precision of matrix products under autocast: one cast here saves one in each projection of x.

    The gradients of the projections with respect to x are then summed in this precision, too.
    """
    if x.dtype != torch.float32 or x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


class Cache:
    """What one layer has computed for earlier tokens (keys, values, symbols), so that each is processed once.

    Named tensors (B, heads, S, width), each in a buffer of max_len positions. For inference only: written in place.
    """

    def __init__(self, max_len):
        self.max_len, self.length, self.buffers, self.context = max_len, {}, {}, None

    def append(self, name, new):
        """Appends `new` (B, heads, T, width) to the tensor `name`; returns all of it, (B, heads, S, width)."""
        B, heads, T, width = new.shape
        if name not in self.buffers:
            self.buffers[name], self.length[name] = new.new_empty(B, heads, self.max_len, width), 0
        start, self.length[name] = self.length[name], self.length[name] + T
        self.buffers[name].narrow(2, start, T).copy_(new)
        return self.buffers[name].narrow(2, 0, start + T)

    def __len__(self):
        return max(self.length.values(), default=0)


is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # PyTorch 2.7 or later


def beyond(n, T, S):
    """Are there more than n^2 scores, as n tokens have? False during export, so that one form serves all lengths."""
    return not is_exporting() and T * S > n ** 2


def head_width(d_model, n_heads, total_heads, n_kv_heads):
    """d_h = d_model / total_heads; raises ValueError if the widths do not divide."""
    if n_heads < 1 or d_model % total_heads:
        raise ValueError(f"d_model={d_model} is not a multiple of {total_heads} heads")
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
        q = split_heads(self.W_q(x), self.n_heads, rope)               # (B, H, T, d_h)
        if context is None:
            k, v = self.keys_and_values(x, rope)                       # (B, G, S, d_h) each
            if cache is not None:
                k, v = cache.append("k", k), cache.append("v", v)
        elif cache is None:
            k, v = self.keys_and_values(context)
        else:                                                          # the context never changes: compute them once
            cache.context = cache.context or self.keys_and_values(context)
            k, v = cache.context
        e = attend(q, k, v, causal=causal, mask=mask, dropout=self.dropout if self.training else 0.0)
        return self.W_o(merge_heads(e))

    def keys_and_values(self, y, rope=None):
        """y (B, S, d_model) -> k, v (B, G, S, d_h)."""
        return split_heads(self.W_k(y), self.n_kv_heads, rope), split_heads(self.W_v(y), self.n_kv_heads)
