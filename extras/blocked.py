"""Relational attention a block of queries at a time: exact, in linear memory, relations computed once for all heads.

The values of `RelationalAttention.fast`, [k_rel, s W_s], are R p + d_h wide, and each of H heads sums all of them:
H R p n^2 multiplications for k_rel, although relations are the same for all heads. Computed once, they cost less:

    r_lij  =  <q_rel_i[l], k_rel_j[l]> / sqrt(p)  R p n^2
    m_hil  =  sum_j alpha_hij r_lij               H R n^2
    o_hi   =  sum_j alpha_hij v_hj                H d_h n^2               v_hj = s_j W_s_h
    a_hi   =  m_hi W_r_h + o_hi

These alpha and r are n x n, so they are made for one block of queries, used and forgotten. Inputs, m and o are kept,
and of each softmax L_hi = log sum_j exp(score_hij): the backward pass makes each block again, with alpha_hij =
exp(score_hij - L_hi). Write x' for the derivative of the loss by x; given m' and o' it is

    alpha'_hij  =  sum_l m'_hil r_lij + <o'_hi, v_hj>                  r'_lij  =  sum_h m'_hil alpha_hij
    score'_hij  =  alpha_hij (alpha'_hij - D_hi)                       D_hi    =  sum_j alpha_hij alpha'_hij

(the last line is the softmax), where D needs no sum over j: m and o are linear in alpha, so D_hi = <m'_hi, m_hi> +
<o'_hi, o_hi>. The rest are products of matrices: q' = score' k, k' = score'^T q, v' = alpha^T o', q_rel' = r' k_rel and
k_rel' = r'^T q_rel, where q and q_rel are those already divided by sqrt(d_h) and sqrt(p). (These have no derivatives
in turn: not to be differentiated twice.)

Dropout puts c_hij alpha_hij in alpha's place in m and o, where c is 0 or 1 / (1 - dropout); hence in r' and v', too. If
alpha' is the derivative by c alpha, score' = alpha (c alpha' - D) with the D of before, <m', m> + <o', o>. No c is
kept either: it is drawn again, from a seed that each block has of its own.

Without relations (R = 0) this is attention for what PyTorch does not do well on a CPU: dropout, and values that are
wider than keys, as those of the fast form are.
"""
import functools
import math

import torch


@torch.compiler.disable     # torch.compile would unroll the loop, and compile for minutes
def attend_in_blocks(q, k, v, q_rel=None, k_rel=None, *, causal=False, may=None, dropout=0.0, relative=False):
    """-> o (B, H, T, d_v) and m (B, H, T, R) as above, in float32 or, given float64, in float64.

    As everywhere the T queries are the last of the S positions.
    q (B, H, T, d_h), k (B, G, S, d_h), q_rel (B, R, T, p), k_rel (B, R, S, p), or no relations; causal: T <= S.
    v (B or 1, G, S, d_v). relative: v (1, G, >= T + S - 1, d_v) by offset j - i, from -(S - 1), not by sender j.
    may: boolean, of four dimensions that broadcast to (B, H, T, S), True = may attend; who may see nobody gets zeros.
    """
    B, H, T, d_h = q.shape
    if q_rel is None:
        q_rel, k_rel = q.new_zeros(B, 0, T, 1), q.new_zeros(B, 0, k.size(2), 1)
    exact = torch.promote_types(q.dtype, torch.float32)

    def asked(x, factor):
        """(B, H, T, width) -> (B H, T, width), with its factor."""
        return (x.to(exact) * factor).flatten(0, 1)

    def sent(x, heads):
        """(B or 1, G, S, width) -> (B heads, S, width), a copy for each head and sequence; features first in memory,
        which makes products up to three times as fast."""
        each = heads // max(1, x.size(1))                                          # 0 // 1: no relations
        x = x.to(exact).mT[:, :, None].expand(B, -1, each, -1, -1)                 # (B, G, each, width, S)
        return x.flatten(0, 2).contiguous().mT

    # scores and L are kept in base 2: on a CPU exp2 is as quick for minus infinity as for others, exp ten times as slow
    q = asked(q, d_h ** -0.5 * math.log2(math.e))
    may = None if may is None else may.expand(B, -1, T, k.size(2))                 # (B, H or 1, T, S)
    seed = int(torch.randint(2 ** 62, ())) if dropout else 0
    o, m = Blocks.apply(q, sent(k, H), sent(v, H), asked(q_rel, q_rel.size(-1) ** -0.5), sent(k_rel, q_rel.size(1)),
                        may, B, causal, dropout, seed, relative)
    return o.unflatten(0, (B, H)), m.transpose(1, 2)


def without_autocast(f):
    """Autocast would round to half precision what is float32 here."""
    def run(ctx, first, *others):
        with torch.autocast(first.device.type, enabled=False):
            return f(ctx, first, *others)
    return run


class Blocks(torch.autograd.Function):
    """The equations above, for pairs of sequence and head: q (B H, T, d_h), k and v (B H, S, ..), q_rel (B R, T, p),
    k_rel (B R, S, p), o (B H, T, d_v); but m (B, T, H, R).

    A block has g of the B sequences, with all their pairs and relations, n of the T queries and e of the S keys; which
    ones say the slices b, pairs, rels, i and j.
    """

    @staticmethod
    @without_autocast
    def forward(ctx, q, k, v, q_rel, k_rel, may, B, causal, dropout, seed, relative):
        H, R, T = len(q) // B, len(q_rel) // B, q.size(1)
        o, m, L = q.new_empty(B * H, T, v.size(-1)), q.new_empty(B, T, H, R), q.new_empty(B * H, T, 1)
        for b, pairs, rels, i, j, alpha, hidden, room in each_block(q, k, R, may, B, causal):
            g, n, e = len(alpha) // H, *alpha.shape[1:]
            if hidden is not None:
                alpha.unflatten(0, (-1, H)).masked_fill_(hidden, torch.finfo(q.dtype).min)
            top = alpha.amax(-1, keepdim=True)
            alpha.sub_(top).exp2_()                                                # the largest is 1
            if hidden is not None:
                alpha.unflatten(0, (-1, H)).masked_fill_(hidden, 0.0)
            total = alpha.sum(-1, keepdim=True).clamp_(min=1)                      # 1 for who sees nobody
            L[pairs, i] = top + total.log2()
            dropped = drop(alpha, dropout, seed + b.start * T + i.start, room)
            w, of = (skew(dropped, room), offsets(i, j, T)) if relative else (dropped, j)
            o[pairs, i] = torch.bmm(w, v[pairs, of]) / total                       # sum_j alpha_hij v_hj
            if R:                                                                  # sum_j alpha_hij r_lij
                r = torch.bmm(q_rel[rels, i], k_rel[rels, j].mT, out=room("r", g * R, n, e))
                m[b, i] = queries_first(dropped, H) @ queries_first(r, R).mT / queries_first(total, H)
        ctx.save_for_backward(q, k, v, q_rel, k_rel, may, o, m, L)
        ctx.how = B, causal, dropout, seed, relative
        return o, m

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx, d_o, d_m):
        q, k, v, q_rel, k_rel, may, o, m, L = ctx.saved_tensors
        B, causal, dropout, seed, relative = ctx.how
        H, R, T = len(q) // B, len(q_rel) // B, q.size(1)
        d_m = d_m.clone(memory_format=torch.contiguous_format)     # products of many small matrices are slow if strided
        D = (d_o * o).sum(-1, keepdim=True) + (d_m * m).sum(-1).mT.reshape(B * H, T, 1)
        d_q, d_q_rel = torch.empty_like(q), torch.empty_like(q_rel)
        # features first, as k, v and k_rel are
        d_k, d_v, d_k_rel = (torch.zeros_like(x.mT, memory_format=torch.contiguous_format) for x in (k, v, k_rel))
        for b, pairs, rels, i, j, alpha, hidden, room in each_block(q, k, R, may, B, causal):
            g, n, e = len(alpha) // H, *alpha.shape[1:]
            alpha.sub_(L[pairs, i]).exp2_()
            if hidden is not None:
                alpha.unflatten(0, (-1, H)).masked_fill_(hidden, 0.0)
            dropped = drop(alpha, dropout, seed + b.start * T + i.start, room)
            w, of = (skew(dropped, room), offsets(i, j, T)) if relative else (dropped, j)
            d_alpha = torch.bmm(d_o[pairs, i], v[pairs, of].mT, out=room("d_alpha", *w.shape))
            d_alpha = unskew(d_alpha, e) if relative else d_alpha                  # (g H, n, e)
            d_v[pairs, :, of].add_(torch.bmm(d_o[pairs, i].mT, w))
            if R:
                r = torch.bmm(q_rel[rels, i], k_rel[rels, j].mT, out=room("r", g * R, n, e))
                from_m = torch.matmul(d_m[b, i], queries_first(r, R), out=room("from_m", g, n, H, e))
                d_alpha.unflatten(0, (-1, H)).add_(from_m.transpose(1, 2))
                # r has served: d_r takes its memory
                d_r = torch.matmul(d_m[b, i].mT, queries_first(dropped, H), out=room("r", g, n, R, e))
                d_r = d_r.transpose(1, 2).flatten(0, 1)                            # (g R, n, e), a view if g is 1
                d_q_rel[rels, i] = torch.bmm(d_r, k_rel[rels, j])
                d_k_rel[rels, :, j].add_(torch.bmm(q_rel[rels, i].mT, d_r))
            d_score = d_alpha.mul_(dropped).addcmul_(alpha, D[pairs, i], value=-1) # alpha (c alpha' - D)
            d_q[pairs, i] = torch.bmm(d_score, k[pairs, j])
            d_k[pairs, :, j].add_(torch.bmm(q[pairs, i].mT, d_score))
        d_q, d_k = d_q * math.log(2), d_k * math.log(2)                            # the derivative of 2^x is 2^x ln 2
        return d_q, d_k.mT, d_v.mT, d_q_rel, d_k_rel.mT, None, None, None, None, None, None


def queries_first(x, heads):
    """(g heads, n, e) -> (g, n, heads, e), a view."""
    return x.unflatten(0, (-1, heads)).transpose(1, 2)


def block_size(B, H, R, T, S, device):
    """How many sequences and how many queries a block has, by what its alpha or r may hold.

    On a CPU enough numbers that starting operations costs little, few enough to be near the processor; of one sequence
    where that has relations and more than 128 tokens, for those of several would be copied. On a GPU more: what costs
    there is to launch kernels. (Reckoned, not yet measured.)
    """
    numbers, least = (2 ** 19, 128) if device.type == "cpu" else (2 ** 24, 16)
    one_query = max(H, R) * S
    g = max(1, min(B, numbers // (min(128, T) * one_query)))
    if R and T > 128 and device.type == "cpu":
        g = 1
    rows = max(least, numbers // (g * one_query))
    return g, math.ceil(T / math.ceil(T / rows))                           # 257 = 86 + 86 + 85, not 128 + 128 + 1


def each_block(q, k, R, may, B, causal):
    """Yields slices of sequences b, their pairs and relations, queries i and keys j; scores (g H, n, e), who is hidden
    there (g, H or 1, n, e) or None, and room.

    room(name, ...) is a tensor of that shape in memory that all blocks use in turn (all of these are overwritten for
    the next block): on a CPU, memory that is asked for anew costs more than the work in it.
    """
    H, T, S = len(q) // B, q.size(1), k.size(1)
    most, rows = block_size(B, H, R, T, S, q.device)
    memory = {}

    def room(name, *shape):
        if name not in memory:
            width = S + rows if name in ("skewed", "d_alpha") else S               # these two may go by offset
            memory[name] = q.new_empty((R if name == "r" else H) * most * rows * width)
        return memory[name][:math.prod(shape)].view(shape)

    for b in (slice(start, min(start + most, B)) for start in range(0, B, most)):
        pairs, rels = (slice(b.start * heads, b.stop * heads) for heads in (H, R))
        for start in range(0, T, rows):
            i = slice(start, min(start + rows, T))
            j = slice(0, S - T + i.stop if causal else S)                          # whom the last of them may see
            n, e = i.stop - i.start, j.stop
            scores = torch.bmm(q[pairs, i], k[pairs, j].mT, out=room("alpha", pairs.stop - pairs.start, n, e))
            if causal:
                scores[..., e - n:].add_(future(n, q.dtype, q.device))
            yield b, pairs, rels, i, j, scores, None if may is None else ~may[b, :, i, j], room


def drop(alpha, dropout, seed, room):
    """Each weight to 0 or 1 / (1 - dropout) times itself, by the seed of its block."""
    if not dropout:
        return alpha
    kept = room("dropped", *alpha.shape).uniform_(generator=torch.Generator(alpha.device).manual_seed(seed))
    return kept.ge_(dropout).mul_(alpha).mul_(1 / (1 - dropout))


@functools.lru_cache(maxsize=2)                                                    # blocks have one length or two
def future(n, dtype, device):
    """(n, n), minus infinity where key j is later than query i. Kept for the next call; only added to scores, which
    nobody differentiates here, so inference mode may have made it."""
    return torch.full((n, n), -math.inf, dtype=dtype, device=device).triu(1)


def skew(alpha, room):
    """(g H, n, e) by sender -> (g H, n, n + e - 1) by offset j - i: row i stands i places further left in zeros."""
    pairs, n, e = alpha.shape
    wide = room("skewed", pairs, n, n + e - 1).zero_()
    unskew(wide, e).copy_(alpha)
    return wide


def unskew(wide, e):
    """The way back, (g H, n, n + e - 1) -> (g H, n, e), as a view: along the diagonals, with a stride one shorter.

    `wide` must begin where its memory begins, as all of `room` does: as_strided counts from there.
    """
    pairs, n, width = wide.shape
    return wide.as_strided((pairs, n, e), (n * width, width - 1, 1), n - 1)


def offsets(i, j, T):
    """Where a block's offsets stand among all T + S - 1."""
    start = T - i.stop
    return slice(start, start + i.stop - i.start + j.stop - 1)
