"""Relational FlashAttention by hand: relational attention over long sequences on a CPU, exact, in linear memory.

The definition. For a head h, a query i, a key j and a relation l let

    x_hij = <q_hi, k_hj> / sqrt(d_h)               scores
    alpha_hij = exp(x_hij) / sum_j exp(x_hij)      attention weights
    r_lij = <q_rel_i[l], k_rel_j[l]> / sqrt(p)     relations, the same for all heads

A relational head returns a_hi = m_hi W_r_h + o_hi, where, with s_hj for the part of s_j W_s that belongs to head h,

    m_hil = sum_j alpha_hij r_lij                  o_hi = sum_j alpha_hij s_hj

Memory. alpha and r are n x n matrices, and the backward pass needs them too. As in FlashAttention (Dao et al., 2022)
they are never stored. They are computed for one block of queries at a time, in a workspace that the next block
overwrites, and the backward pass recomputes them. What is stored is linear in n: the inputs, m, o, and for each query
the log-sum-exp of its scores, L_hi = log sum_j exp(x_hij), because alpha_hij = exp(x_hij - L_hi). FlashAttention also
divides the keys into blocks; here a block has all keys of its queries, so the softmax is an ordinary one.

Time. `RelationalAttention.fast` sums the keys k_rel with the weights of each head: H R p n^2 multiplications. Here the
relations are computed once for all heads, R p n^2, and then summed, H R n^2. If causal, a block skips all later keys.

The backward pass. Let d_y be the derivative of the loss with respect to y. From d_m and d_o follow

    d_alpha_hij = sum_l d_m_hil r_lij + <d_o_hi, s_hj>
    d_r_lij = sum_h d_m_hil alpha_hij              d_s_hj = sum_i alpha_hij d_o_hi
    d_x_hij = alpha_hij (d_alpha_hij - D_hi)       D_hi = sum_j alpha_hij d_alpha_hij

The last line is the derivative of the softmax. D needs no sum over j: insert the first line, and the sums over j are
those that define m and o, so D_hi = <d_m_hi, m_hi> + <d_o_hi, o_hi>. From d_x and d_r follow d_q, d_k, d_q_rel and
d_k_rel, by matrix products.

Dropout multiplies alpha_hij by c_hij, which is 0 or 1 / (1 - dropout), in m and o, and so in d_r and d_s. Then
d_x_hij = alpha_hij (c_hij d_alpha_hij - D_hi), with the same formula for D. The dropout mask c is not stored either:
the backward pass draws it again, from a seed that belongs to the block.
"""
import math
from typing import Optional, Tuple

import torch
from torch import Tensor


def attend_in_blocks(q, k, s, q_rel, k_rel, *, causal=False, mask=None, dropout=0.0, relative=False):
    """-> o (B, H, T, d_h) and m (B, H, T, R) of the definition, in float32, or in float64 if q is.

    q (B, H, T, d_h), k (B, G, S, d_h), q_rel (B, R, T, p), k_rel (B, R, S, p); the T queries are the last of the S
    positions. s: the symbols s_j W_s, (B or 1, G, S, d_h); if relative, (1, G, T + S - 1, d_h), by offset
    j - i, of which the first is 1 - S. mask: boolean, True = may attend, four dimensions that broadcast to
    (B, H, T, S), or None. A fully masked row gives zeros. There are no second derivatives.
    Raises ValueError if causal and T > S: the first queries would have no keys.
    """
    (B, H, T, d_h), S, (R, p) = q.shape, k.size(2), (q_rel.size(1), q_rel.size(3))
    if causal and T > S:
        raise ValueError(f"causal attention of {T} queries needs at least {T} keys, not {S}")
    dtype = torch.promote_types(q.dtype, torch.float32)
    if not T * S:
        return q.new_zeros(B, H, T, d_h, dtype=dtype), q.new_zeros(B, H, T, R, dtype=dtype)
    q = q.to(dtype) * (d_h ** -0.5 * math.log2(math.e))                # scores in base 2: see masked_scores
    q_rel = q_rel.to(dtype) * p ** -0.5
    k, s, k_rel = (copy_for_heads(x.to(dtype), B, heads) for x, heads in ((k, H), (s, H), (k_rel, R)))
    mask = None if mask is None else mask.expand(B, -1, T, S)          # (B, H or 1, T, S)
    seed = torch.randint(2 ** 62, ()) if dropout else None
    o, m, _ = Blocks.apply(q, k, s, q_rel, k_rel, mask, seed, causal, dropout, relative)
    return o, m.transpose(1, 2)


def copy_for_heads(x, B, heads):
    """(B or 1, G, S, width) -> (B, heads, S, width), a copy for each sequence and head, with the features first in
    memory, where the matrix products below are fastest."""
    x = x.mT[:, :, None].expand(B, -1, heads // max(1, x.size(1)), -1, -1)         # (B, G, heads / G, width, S)
    return x.flatten(1, 2).contiguous().mT


class Blocks(torch.autograd.Function):
    """The two passes below, with q, k, s, q_rel, k_rel, mask, seed, causal, dropout and relative."""

    @staticmethod
    def forward(q, k, s, q_rel, k_rel, mask, seed, causal, dropout, relative):
        return forward_in_blocks(q, k, s, q_rel, k_rel, mask, seed, causal, dropout, relative)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.causal, ctx.dropout, ctx.relative = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_o, d_m, _):
        gradients = backward_in_blocks(d_o, d_m, *ctx.saved_tensors, ctx.causal, ctx.dropout, ctx.relative)
        return *gradients, *[None] * 5


def forward_pass(q: Tensor, k: Tensor, s: Tensor, q_rel: Tensor, k_rel: Tensor, mask: Optional[Tensor],
                 seed: Optional[Tensor], causal: bool, dropout: float, relative: bool
                 ) -> Tuple[Tensor, Tensor, Tensor]:
    """The definition: q (B, H, T, d_h), k and s (B, H, S, d_h), q_rel (B, R, T, p), k_rel (B, R, S, p) ->
    o (B, H, T, d_h), m (B, T, H, R) and L (B, H, T, 1), the logarithm to base 2 of the sum of 2^x.

    A block is one sequence b, a slice i of n queries, and the slice j of the e keys that they may attend to.
    """
    (B, H, T, _), R = q.shape, q_rel.size(1)
    o, m, L = empty_outputs(q, k, s, q_rel)
    with torch.autocast(q.device.type, enabled=False):                 # it would compute products in half precision
        workspace = Workspace(q, k, R)
        for b, i, j in each_block(q, k, R, causal):
            x = masked_scores(q, k, b, i, j, causal, mask, workspace)              # (H, n, e)
            top = x.amax(-1, keepdim=True).clamp_(min=torch.finfo(x.dtype).min)    # finite even if all are masked
            alpha = x.sub_(top).exp2_()                                            # the largest is 1
            total = alpha.sum(-1, keepdim=True).clamp_(min=1)                      # 0 before if all are masked
            L[b, :, i] = top + total.log2()
            weights = drop(alpha, dropout, seed, b * T + i.start, workspace)      # c alpha
            w, of = (by_offset(weights, workspace), offsets(i, j, T)) if relative else (weights, j)
            o[b, :, i] = torch.bmm(w, s[b, :, of]) / total
            r = torch.bmm(q_rel[b, :, i], k_rel[b, :, j].mT, out=workspace("r", R, *x.shape[1:]))
            m[b, i] = torch.bmm(weights.transpose(0, 1), r.permute(1, 2, 0)) / total.transpose(0, 1)
    return o, m, L


def empty_outputs(q, k, s, q_rel, *others):
    """Tensors of the shapes of o, m and L."""
    (B, H, T, _), R = q.shape, q_rel.size(1)
    return torch.empty_like(q), q.new_empty(B, T, H, R), q.new_empty(B, H, T, 1)


def backward_pass(d_o: Tensor, d_m: Tensor, q: Tensor, k: Tensor, s: Tensor, q_rel: Tensor, k_rel: Tensor,
                  mask: Optional[Tensor], seed: Optional[Tensor], o: Tensor, m: Tensor, L: Tensor, causal: bool,
                  dropout: float, relative: bool) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> the derivatives with respect to q, k, s, q_rel and k_rel."""
    (B, H, T, _), R = q.shape, q_rel.size(1)
    with torch.autocast(q.device.type, enabled=False):
        d_m = d_m.contiguous()                                                     # or small products get slow
        D = (d_o * o).sum(-1, keepdim=True) + (d_m * m).sum(-1).mT[..., None]      # (B, H, T, 1)
        d_q, d_q_rel = torch.empty_like(q), torch.empty_like(q_rel)
        d_k, d_s, d_k_rel = (torch.zeros_like(y.mT, memory_format=torch.contiguous_format) for y in (k, s, k_rel))
        workspace = Workspace(q, k, R)
        for b, i, j in each_block(q, k, R, causal):
            x = masked_scores(q, k, b, i, j, causal, mask, workspace)
            n, e = x.shape[1:]
            alpha = x.sub_(L[b, :, i]).exp2_()                                     # (H, n, e)
            weights = drop(alpha, dropout, seed, b * T + i.start, workspace)      # c alpha, the same c again
            w, of = (by_offset(weights, workspace), offsets(i, j, T)) if relative else (weights, j)
            d_s[b, :, :, of].add_(torch.bmm(d_o[b, :, i].mT, w))
            d_alpha = torch.bmm(d_o[b, :, i], s[b, :, of].mT, out=workspace("d_alpha", *w.shape))
            d_alpha = by_position(d_alpha, e) if relative else d_alpha             # (H, n, e)
            r = torch.bmm(q_rel[b, :, i], k_rel[b, :, j].mT, out=workspace("r", R, n, e))
            d_alpha.add_(torch.bmm(d_m[b, i], r.transpose(0, 1), out=workspace("from m", n, H, e)).transpose(0, 1))
            # r is no longer needed: d_r takes its memory
            d_r = torch.bmm(d_m[b, i].mT, weights.transpose(0, 1), out=workspace("r", n, R, e)).transpose(0, 1)
            d_q_rel[b, :, i] = torch.bmm(d_r, k_rel[b, :, j])
            d_k_rel[b, :, :, j].add_(torch.bmm(q_rel[b, :, i].mT, d_r))
            d_x = d_alpha.mul_(weights).addcmul_(alpha, D[b, :, i], value=-1)      # alpha (c d_alpha - D)
            d_q[b, :, i] = torch.bmm(d_x, k[b, :, j])
            d_k[b, :, :, j].add_(torch.bmm(q[b, :, i].mT, d_x))
        d_q, d_k = d_q * math.log(2), d_k * math.log(2)                            # 2^x has the derivative 2^x log 2
    return d_q, d_k.mT, d_s.mT, d_q_rel, d_k_rel.mT


def empty_gradients(d_o, d_m, *inputs):
    """Tensors of the shapes of the derivatives."""
    return tuple(torch.empty_like(x) for x in inputs[:5])


# As operators of PyTorch both passes are taken as a whole by torch.compile, torch.export and tracing, which would
# unroll a plain loop over blocks for the one length that they see. The functions registered tell them the shapes.
forward_in_blocks = torch.library.custom_op("dual_attention::forward_in_blocks", forward_pass, mutates_args=())
backward_in_blocks = torch.library.custom_op("dual_attention::backward_in_blocks", backward_pass, mutates_args=())
forward_in_blocks.register_fake(empty_outputs)
backward_in_blocks.register_fake(empty_gradients)


def queries_per_block(H, R, T, S, device):
    """About as many as fit in the processor's cache: alpha and r of a block have 2^19 numbers, 2 MB, or fewer.

    But at least 128, as matrix products with fewer rows are slow. On a GPU, where launching kernels takes the time,
    blocks are larger (estimated, not measured).
    """
    numbers = 2 ** 19 if device.type == "cpu" else 2 ** 24
    rows = max(128, numbers // (max(H, R) * S))
    return math.ceil(T / math.ceil(T / rows))                          # nearly equal blocks: 257 = 129 + 128


def each_block(q, k, R, causal):
    """Yields the sequence b, queries i and keys j of each block; if causal, j ends with the last key allowed to i."""
    (B, H, T, _), S = q.shape, k.size(2)
    rows = queries_per_block(H, R, T, S, q.device)
    for b in range(B):
        for start in range(0, T, rows):
            i = slice(start, min(start + rows, T))
            yield b, i, slice(0, S - T + i.stop if causal else S)


class Workspace:
    """Named buffers that every block overwrites: allocating them for each block would take longer than computing it.

    workspace(name, *shape) is a tensor of this shape with undefined content.
    """

    def __init__(self, q, k, R):
        (_, H, T, _), S = q.shape, k.size(2)
        rows = queries_per_block(H, R, T, S, q.device)
        self.numel = max(H, R) * rows * (S + rows)                     # enough for each: by offset, rows are longer
        self.like, self.buffers = q, {}

    def __call__(self, name, *shape):
        if name not in self.buffers:
            self.buffers[name] = self.like.new_empty(self.numel)
        return self.buffers[name][:math.prod(shape)].view(shape)


def masked_scores(q, k, b, i, j, causal, mask, workspace):
    """x_hij log2(e) of a block, minus infinity where i may not attend to j: (H, n, e).

    In base 2, because on a CPU exp of minus infinity takes far longer than exp2 of it.
    """
    n, e = i.stop - i.start, j.stop
    x = torch.bmm(q[b, :, i], k[b, :, j].mT, out=workspace("x", q.size(1), n, e))
    if causal:                                                         # of its keys, only the last n can be too late
        x[..., e - n:].add_(x.new_full((n, n), -math.inf).triu_(1))
    return x if mask is None else x.masked_fill_(~mask[b, :, i, j], -math.inf)


def drop(alpha, dropout, seed, row, workspace):
    """c alpha: each weight times 0 or 1 / (1 - dropout), as the seed and `row` decide, b T + its first query."""
    if not dropout:
        return alpha
    generator = torch.Generator(alpha.device).manual_seed(int(seed) + row)
    c = workspace("dropout", *alpha.shape).uniform_(generator=generator)
    return c.ge_(dropout).mul_(alpha).mul_(1 / (1 - dropout) if dropout < 1 else 0.0)


def by_offset(alpha, workspace):
    """(H, n, e) by position j -> (H, n, n + e - 1) by offset j - i, zero elsewhere: each row moves one to the left."""
    H, n, e = alpha.shape
    shifted = workspace("by offset", H, n, n + e - 1).zero_()
    by_position(shifted, e).copy_(alpha)
    return shifted


def by_position(shifted, e):
    """The inverse, (H, n, n + e - 1) -> (H, n, e), as a view: along the diagonals, so the stride of rows is one less.

    as_strided counts from where the memory begins, so `shifted` must begin there, as every tensor of a workspace does.
    """
    H, n, width = shifted.shape
    return shifted.as_strided((H, n, e), (n * width, width - 1, 1), n - 1)


def offsets(i, j, T):
    """The slice of a block's offsets j - i among those of the whole sequence."""
    return slice(T - i.stop, T - i.start + j.stop - 1)
