"""Relational attention a block of queries at a time: exact, linear memory, on a CPU the fastest for long sequences.

The values of `RelationalAttention.fast`, [k_rel, s W_s], are R p + d_h wide, and each of H heads sums all of them:
H R p n^2 multiplications, although relations are the same for all heads. Computed once, as relations, they cost less:

    r_lij  =  <q_rel_i[l], k_rel_j[l]> / sqrt(p)  R p n^2
    m_hil  =  sum_j alpha_hij r_lij               H R n^2
    o_hi   =  sum_j alpha_hij v_hj                H d_h n^2               v_hj = s_j W_s_h
    a_hi   =  m_hi W_r_h + o_hi

These alpha and r are n x n, so they are made for one block of queries, used and forgotten. Only m and o are kept, and
the backward pass makes each block again. Write x' for the derivative of the loss by x; given m' and o' it is

    alpha'_hij  =  sum_l m'_hil r_lij + <o'_hi, v_hj>                  r'_lij  =  sum_h m'_hil alpha_hij
    score'_hij  =  alpha_hij (alpha'_hij - D_hi)                       D_hi    =  sum_j alpha_hij alpha'_hij

(the last line is the softmax), where D needs no sum over j: m and o are linear in alpha, so D_hi = <m'_hi, m_hi> +
<o'_hi, o_hi>. The rest are products of matrices: q' = score' k, k' = score'^T q, v' = alpha^T o', q_rel' = r' k_rel and
k_rel' = r'^T q_rel, where q and q_rel are those already divided by sqrt(d_h) and sqrt(p). (No second derivatives.)

Dropout multiplies alpha by c_hij, which is 0 or 1 / (1 - dropout), in m and o; hence in r' and v' too, and score' =
alpha (c alpha' - D). No c is kept either: it is drawn again, from a seed that each block has of its own.

Without relations (R = 0) this is self-attention with linear memory where PyTorch has none: on a CPU with dropout.
"""
import math

import torch

ROWS = 128              # queries of a block, at most: enough for fast products, few enough for little memory


@torch.compiler.disable     # torch.compile would unroll the loop, and compile for minutes
def attend_in_blocks(q, k, v, q_rel=None, k_rel=None, *, causal=False, may=None, dropout=0.0, relative=False,
                     scale=None):
    """-> o (B, H, T, d_v) and m (B, H, T, R) as above, in float32 or, given float64, in float64.

    q (B, H, T, d_h), k (B, G, S, d_h), q_rel (B, R, T, p), k_rel (B, R, S, p), or no relations; causal: T <= S.
    scale: of alpha's scores, 1 / sqrt(d_h) if None.
    v (B or 1, G, S, d_v). relative: v (1, G, >= T + S - 1, d_v) by offset j - i, from -(S - 1), not by sender j.
    may: boolean, of four dimensions that broadcast to (B, H, T, S), True = may attend; who may see nobody gets zeros.
    """
    if q_rel is None:
        q_rel, k_rel = q.new_zeros(len(q), 0, q.size(2), 1), q.new_zeros(len(q), 0, k.size(2), 1)
    exact = torch.promote_types(q.dtype, torch.float32)
    q = q.to(exact) * (q.size(-1) ** -0.5 if scale is None else scale)
    q_rel = q_rel.to(exact) * q_rel.size(-1) ** -0.5
    # features first in memory: products with narrow heads are up to three times as fast so
    k, v, k_rel = (x.to(exact).mT.contiguous().mT for x in (k, v, k_rel))
    hidden = None if may is None else (~may).expand(len(q), -1, q.size(2), k.size(2))
    seed = int(torch.randint(2 ** 62, ())) if dropout else 0
    return Blocks.apply(q, k, v, q_rel, k_rel, hidden, causal, dropout, seed, relative)


def without_autocast(f):
    """Autocast would round to half precision what is float32 here."""
    def run(ctx, first, *others):
        with torch.autocast(first.device.type, enabled=False):
            return f(ctx, first, *others)
    return run


class Blocks(torch.autograd.Function):
    """The equations above. Shapes: T queries and S keys, of which a block has n and e."""

    @staticmethod
    @without_autocast
    def forward(ctx, q, k, v, q_rel, k_rel, hidden, causal, dropout, seed, relative):
        B, H, T, _ = q.shape
        o, m = q.new_empty(B, H, T, v.size(-1)), q.new_empty(B, T, H, q_rel.size(1))
        for b, i, j, _, dropped, r, room in each_block(q, k, q_rel, k_rel, hidden, causal, dropout, seed):
            w, of = (skew(dropped, room), offsets(i, j, T)) if relative else (dropped, j)
            o[b, :, i] = product(w, v[b % len(v), :, of])                          # sum_j alpha_hij v_hj
            torch.bmm(dropped.transpose(0, 1), r.permute(1, 2, 0), out=m[b, i])    # sum_j alpha_hij r_lij
        ctx.save_for_backward(q, k, v, q_rel, k_rel, hidden, o, m)
        ctx.how = causal, dropout, seed, relative
        return o, m.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx, d_o, d_m):
        q, k, v, q_rel, k_rel, hidden, o, m = ctx.saved_tensors
        causal, dropout, seed, relative = ctx.how
        B, H, T, _ = q.shape
        d_m = d_m.transpose(1, 2)                                                  # (B, T, H, R), as m
        D = (d_o * o).sum(-1, keepdim=True) + (d_m * m).sum(-1).mT[..., None]      # (B, H, T, 1)
        d_q, d_q_rel = torch.empty_like(q), torch.empty_like(q_rel)
        # features first, as k, v and k_rel are
        d_k, d_v, d_k_rel = (torch.zeros_like(x.mT, memory_format=torch.contiguous_format) for x in (k, v, k_rel))
        for b, i, j, alpha, dropped, r, room in each_block(q, k, q_rel, k_rel, hidden, causal, dropout, seed):
            R, n, e = r.shape
            w, of = (skew(dropped, room), offsets(i, j, T)) if relative else (dropped, j)
            d_alpha = product(d_o[b, :, i], v[b % len(v), :, of].mT, out=room("d_alpha", *w.shape))
            d_alpha = unskew(d_alpha, e) if relative else d_alpha                  # (H, n, e)
            add_product(d_v[b % len(v), :, :, of], d_o[b, :, i], w)
            if R:
                from_m = torch.bmm(d_m[b, i], r.transpose(0, 1), out=room("scores", n, H, e))
                d_alpha += from_m.transpose(0, 1)
                d_r = torch.bmm(d_m[b, i].mT, dropped.transpose(0, 1), out=room("r", n, R, e)).transpose(0, 1)
                d_q_rel[b, :, i] = torch.bmm(d_r, k_rel[b, :, j])
                d_k_rel[b, :, :, j] += torch.bmm(q_rel[b, :, i].mT, d_r)
            d_score = d_alpha.mul_(dropped).addcmul_(alpha, D[b, :, i], value=-1)  # alpha (c alpha' - D)
            d_q[b, :, i] = product(d_score, k[b, :, j])
            add_product(d_k[b, :, :, j], q[b, :, i], d_score)
        return d_q, d_k.mT, d_v.mT, d_q_rel, d_k_rel.mT, None, None, None, None, None


def each_block(q, k, q_rel, k_rel, hidden, causal, dropout, seed):
    """Yields b, the queries i, the keys j, alpha (H, n, e), alpha after dropout, r (R, n, e), and room for more.

    room(name, ...) is a tensor of that shape in memory that all blocks use in turn (all of these are overwritten for
    the next block): on a CPU, memory that is asked for anew costs more than the work in it.
    """
    (B, H, T, _), S, R = q.shape, k.size(2), q_rel.size(1)
    rows = math.ceil(T / math.ceil(T / ROWS))                                     # 257: 86 + 86 + 85, not 128 + 128 + 1
    memory = {}

    def room(name, *shape):
        if name not in memory:
            memory[name] = q.new_empty((R if name == "r" else H) * rows * (S + rows))
        return memory[name][:math.prod(shape)].view(shape)

    future = torch.full((rows, rows), -math.inf, dtype=q.dtype, device=q.device).triu(1) if causal else None
    for b in range(B):
        for start in range(0, T, rows):
            i = slice(start, min(start + rows, T))
            j = slice(0, S - T + i.stop if causal else S)                          # whom the last of them may see
            n, e = i.stop - i.start, j.stop
            scores = product(q[b, :, i], k[b, :, j].mT, out=room("scores", H, n, e))
            if causal:
                scores[..., e - n:] += future[:n, :n]
            if hidden is not None:
                scores.masked_fill_(hidden[b, :, i, j], torch.finfo(q.dtype).min)
            alpha = torch.softmax(scores, -1, out=room("alpha", H, n, e))
            if hidden is not None:
                alpha.masked_fill_(hidden[b, :, i, j], 0.0)
            dropped = alpha
            if dropout:
                seed += 1
                kept = room("dropped", H, n, e).uniform_(generator=torch.Generator(q.device).manual_seed(seed))
                dropped = kept.ge_(dropout).mul_(alpha).mul_(1 / (1 - dropout))
            r = torch.bmm(q_rel[b, :, i], k_rel[b, :, j].mT, out=room("r", R, n, e))
            yield b, i, j, alpha, dropped, r, room


def product(x, y, out=None):
    """x (H, n, c) times y (G, c, w), each of which serves H / G heads: (H, n, w)."""
    H, n, _ = x.shape
    G, _, w = y.shape
    out = out if out is None else out.view(G, -1, w)
    return torch.bmm(x.reshape(G, H // G * n, -1), y, out=out).view(H, n, w)


def add_product(total, x, y):
    """total (G, c, e) += x^T y, summed over the H / G heads that share it; x (H, n, c), y (H, n, e)."""
    G = len(total)
    x, y = (a.reshape(G, -1, a.size(-1)) for a in (x, y))
    total.add_(torch.bmm(x.mT, y))


def skew(alpha, room):
    """(H, n, e) by sender -> (H, n, n + e - 1) by offset j - i: row i stands i places further left, zeros around it."""
    H, n, e = alpha.shape
    wide = room("skewed", H, n, n + e - 1).zero_()
    unskew(wide, e).copy_(alpha)
    return wide


def unskew(wide, e):
    """The way back, (H, n, n + e - 1) -> (H, n, e), as a view: read along the diagonals, with a stride one shorter.

    `wide` must begin where its memory begins, as all of `room` does: as_strided counts from there.
    """
    H, n, L = wide.shape
    return wide.as_strided((H, n, e), (n * L, L - 1, 1), n - 1)


def offsets(i, j, T):
    """Where a block's offsets stand among all T + S - 1."""
    start = T - i.stop
    return slice(start, start + i.stop - i.start + j.stop - 1)
