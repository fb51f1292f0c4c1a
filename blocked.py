"""Relational attention a block of queries at a time: exact, in linear memory, the fastest form for wide heads.

The values of `RelationalAttention.fast`, [k_rel, s W_s], are R p + d_h wide, and each of H heads sums all of them:
H R p n^2 multiplications for k_rel, although relations are the same for all heads. Computed once, they cost less:

    r_lij  =  <q_rel_i[l], k_rel_j[l]> / sqrt(p)  R p n^2
    m_hil  =  sum_j alpha_hij r_lij               H R n^2
    o_hi   =  sum_j alpha_hij v_hj                H d_h n^2               v_hj = s_j W_s_h
    a_hi   =  m_hi W_r_h + o_hi

These alpha and r are n x n, so they are made for one block of queries, used and forgotten. Inputs, m and o are kept,
and the backward pass makes each block again. Write x' for the derivative of the loss by x; given m' and o' it is

    alpha'_hij  =  sum_l m'_hil r_lij + <o'_hi, v_hj>                  r'_lij  =  sum_h m'_hil alpha_hij
    score'_hij  =  alpha_hij (alpha'_hij - D_hi)                       D_hi    =  sum_j alpha_hij alpha'_hij

(the last line is the softmax), where D needs no sum over j: m and o are linear in alpha, so D_hi = <m'_hi, m_hi> +
<o'_hi, o_hi>. The rest are products of matrices: q' = score' k, k' = score'^T q, v' = alpha^T o', q_rel' = r' k_rel and
k_rel' = r'^T q_rel, where q and q_rel are those already divided by sqrt(d_h) and sqrt(p). (These have no derivatives
in turn: not to be differentiated twice.)

Dropout puts c_hij alpha_hij in alpha's place in m and o, where c is 0 or 1 / (1 - dropout); hence in r' and v', too. If
alpha' is the derivative by c alpha, score' = alpha (c alpha' - D) with the D of before, <m', m> + <o', o>. No c is
kept either: it is drawn again, from a seed that each block has of its own.

Without relations (R = 0) this is self-attention with linear memory where PyTorch has none: on a CPU with dropout.
"""
import functools
import math

import torch


@torch.compiler.disable     # torch.compile would unroll the loop, and compile for minutes
def attend_in_blocks(q, k, v, q_rel=None, k_rel=None, *, causal=False, may=None, dropout=0.0, relative=False,
                     scale=None):
    """-> o (B, H, T, d_v) and m (B, H, T, R) as above, in float32 or, given float64, in float64.

    As everywhere the T queries are the last of the S positions.
    q (B, H, T, d_h), k (B, G, S, d_h), q_rel (B, R, T, p), k_rel (B, R, S, p), or no relations; causal: T <= S.
    scale: of alpha's scores, 1 / sqrt(d_h) if None.
    v (B or 1, G, S, d_v). relative: v (1, G, >= T + S - 1, d_v) by offset j - i, from -(S - 1), not by sender j.
    may: boolean, of four dimensions that broadcast to (B, H, T, S), True = may attend; who may see nobody gets zeros.
    """
    B, H, T, d_h = q.shape
    if q_rel is None:
        q_rel, k_rel = q.new_zeros(B, 0, T, 1), q.new_zeros(B, 0, k.size(2), 1)
    exact = torch.promote_types(q.dtype, torch.float32)

    def sent(x, heads):
        """(B or 1, G, S, width) -> (heads, B, S, width), a copy for each head and sequence; features first in memory,
        which makes products up to three times as fast."""
        x = x.to(exact).expand(B, -1, -1, -1).permute(1, 0, 3, 2)[:, None]         # (G, 1, B, width, S)
        each = heads // max(1, len(x))                                             # 0 // 1: no relations
        return x.expand(-1, each, -1, -1, -1).flatten(0, 1).contiguous().mT

    q, q_rel = q.to(exact) * (d_h ** -0.5 if scale is None else scale), q_rel.to(exact) * q_rel.size(-1) ** -0.5
    may = None if may is None else may.expand(B, -1, T, k.size(2)).transpose(0, 1)             # (H or 1, B, T, S)
    seed = int(torch.randint(2 ** 62, ())) if dropout else 0
    o, m = Blocks.apply(q.transpose(0, 1), sent(k, H), sent(v, H), q_rel.transpose(0, 1), sent(k_rel, q_rel.size(1)),
                        may, causal, dropout, seed, relative)
    return o.transpose(0, 1), m.transpose(1, 2)


def without_autocast(f):
    """Autocast would round to half precision what is float32 here."""
    def run(ctx, first, *others):
        with torch.autocast(first.device.type, enabled=False):
            return f(ctx, first, *others)
    return run


class Blocks(torch.autograd.Function):
    """The equations above, heads before sequences: q (H, B, T, d_h), k and v (H, B, S, ..), q_rel and k_rel (R, B, ..),
    o (H, B, T, d_v); but m (B, T, H, R).

    A block has g of the B sequences, n of the T queries and e of the S keys.
    """

    @staticmethod
    @without_autocast
    def forward(ctx, q, k, v, q_rel, k_rel, may, causal, dropout, seed, relative):
        H, B, T, _ = q.shape
        o, m = q.new_empty(B, H, T, v.size(-1)).transpose(0, 1), q.new_empty(B, T, H, len(q_rel))
        for b, i, j, _, dropped, r, room in each_block(q, k, q_rel, k_rel, may, causal, dropout, seed):
            w, of = (skew(dropped, room), offsets(i, j, T)) if relative else (dropped, j)
            o[:, b, i] = w @ v[:, b, of]                                           # sum_j alpha_hij v_hj
            m[b, i] = dropped.permute(1, 2, 0, 3) @ r.permute(1, 2, 3, 0)          # sum_j alpha_hij r_lij
        ctx.save_for_backward(q, k, v, q_rel, k_rel, may, o, m)
        ctx.how = causal, dropout, seed, relative
        return o, m

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx, d_o, d_m):
        q, k, v, q_rel, k_rel, may, o, m = ctx.saved_tensors
        causal, dropout, seed, relative = ctx.how
        T = q.size(2)
        d_m = d_m.clone(memory_format=torch.contiguous_format)     # products of many small matrices are slow if strided
        D = (d_o * o).sum(-1, keepdim=True) + (d_m * m).sum(-1).permute(2, 0, 1)[..., None]        # (H, B, T, 1)
        d_q, d_q_rel = torch.empty_like(q), torch.empty_like(q_rel)
        # features first, as k, v and k_rel are
        d_k, d_v, d_k_rel = (torch.zeros_like(x.mT, memory_format=torch.contiguous_format) for x in (k, v, k_rel))
        for b, i, j, alpha, dropped, r, room in each_block(q, k, q_rel, k_rel, may, causal, dropout, seed):
            H, g, n, e = alpha.shape
            w, of = (skew(dropped, room), offsets(i, j, T)) if relative else (dropped, j)
            d_alpha = torch.matmul(d_o[:, b, i], v[:, b, of].mT, out=room("d_alpha", *w.shape))
            d_alpha = unskew(d_alpha, e) if relative else d_alpha                  # (H, g, n, e)
            d_v[:, b, :, of] += d_o[:, b, i].mT @ w
            if len(r):
                from_m = torch.matmul(d_m[b, i], r.permute(1, 2, 0, 3), out=room("scores", g, n, H, e))
                d_alpha += from_m.permute(2, 0, 1, 3)
                # r has served: d_r takes its memory
                d_r = torch.matmul(d_m[b, i].mT, dropped.permute(1, 2, 0, 3), out=room("r", g, n, len(r), e))
                d_r = d_r.permute(2, 0, 1, 3).flatten(0, 1).unflatten(0, (-1, g))  # (R, g, n, e), a view if g is 1
                d_q_rel[:, b, i] = d_r @ k_rel[:, b, j]
                d_k_rel[:, b, :, j] += q_rel[:, b, i].mT @ d_r
            d_score = d_alpha.mul_(dropped).addcmul_(alpha, D[:, b, i], value=-1)  # alpha (c alpha' - D)
            d_q[:, b, i] = d_score @ k[:, b, j]
            d_k[:, b, :, j] += q[:, b, i].mT @ d_score
        return d_q, d_k.mT, d_v.mT, d_q_rel, d_k_rel.mT, None, None, None, None, None


def block_size(B, H, R, T, S, device):
    """How many sequences and how many queries a block has, by what its alpha or r may hold.

    On a CPU one sequence: enough numbers that starting operations costs little, few enough to be near the processor.
    On a GPU many of both: what costs there is to launch kernels. (Reckoned, not yet measured.)
    """
    most, numbers, least = (1, 2 ** 19, 128) if device.type == "cpu" else (B, 2 ** 24, 16)
    g = max(1, min(most, numbers // (least * max(H, R) * S)))
    rows = max(least, numbers // (g * max(H, R) * S))
    return g, math.ceil(T / math.ceil(T / rows))                           # 257 = 86 + 86 + 85, not 128 + 128 + 1


def each_block(q, k, q_rel, k_rel, may, causal, dropout, seed):
    """Yields sequences b, queries i, keys j, alpha (H, g, n, e), alpha after dropout, r (R, g, n, e), room for more.

    room(name, ...) is a tensor of that shape in memory that all blocks use in turn (all of these are overwritten for
    the next block): on a CPU, memory that is asked for anew costs more than the work in it.
    """
    (H, B, T, _), S, R = q.shape, k.size(2), len(q_rel)
    most, rows = block_size(B, H, R, T, S, q.device)
    memory = {}

    def room(name, *shape):
        if name not in memory:
            width = S + rows if name in ("skewed", "d_alpha") else S               # these two may go by offset
            memory[name] = q.new_empty((R if name == "r" else H) * most * rows * width)
        return memory[name][:math.prod(shape)].view(shape)

    for b in (slice(start, min(start + most, B)) for start in range(0, B, most)):
        for start in range(0, T, rows):
            i = slice(start, min(start + rows, T))
            j = slice(0, S - T + i.stop if causal else S)                          # whom the last of them may see
            g, n, e = b.stop - b.start, i.stop - i.start, j.stop
            hidden = None if may is None else ~may[:, b, i, j]
            scores = torch.matmul(q[:, b, i], k[:, b, j].mT, out=room("scores", H, g, n, e))
            if causal:
                scores[..., e - n:] += future(n, q.dtype, q.device)
            if hidden is not None:
                scores.masked_fill_(hidden, torch.finfo(q.dtype).min)
            alpha = torch.softmax(scores, -1, out=room("alpha", H, g, n, e))
            if hidden is not None:
                alpha.masked_fill_(hidden, 0.0)
            dropped = alpha
            if dropout:
                seed += 1
                kept = room("dropped", H, g, n, e).uniform_(generator=torch.Generator(q.device).manual_seed(seed))
                dropped = kept.ge_(dropout).mul_(alpha).mul_(1 / (1 - dropout))
            r = torch.matmul(q_rel[:, b, i], k_rel[:, b, j].mT, out=room("r", R, g, n, e))
            yield b, i, j, alpha, dropped, r, room


@functools.lru_cache(maxsize=2)                                                    # blocks have one length or two
def future(n, dtype, device):
    """(n, n), minus infinity where key j is later than query i. Kept for the next call; only added to scores, which
    nobody differentiates here, so inference mode may have made it."""
    return torch.full((n, n), -math.inf, dtype=dtype, device=device).triu(1)


def skew(alpha, room):
    """(H, g, n, e) by sender -> (H, g, n, n + e - 1) by offset j - i: row i stands i places further left in zeros."""
    H, g, n, e = alpha.shape
    wide = room("skewed", H, g, n, n + e - 1).zero_()
    unskew(wide, e).copy_(alpha)
    return wide


def unskew(wide, e):
    """The way back, (H, g, n, n + e - 1) -> (H, g, n, e), as a view: along the diagonals, with a stride one shorter.

    `wide` must begin where its memory begins, as all of `room` does: as_strided counts from there.
    """
    H, g, n, L = wide.shape
    return wide.as_strided((H, g, n, e), (g * n * L, n * L, L - 1, 1), n - 1)


def offsets(i, j, T):
    """Where a block's offsets stand among all T + S - 1."""
    start = T - i.stop
    return slice(start, start + i.stop - i.start + j.stop - 1)
