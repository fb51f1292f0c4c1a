"""Teacher's file: students are asked not to open it. The reference solution of assignments/a1.

VARIANT is the one of the assignment that is solved: docs/teaching.md says what each changes.
"""
import torch
from torch.utils.checkpoint import checkpoint

VARIANT = 1
BLOCK = 64                                                             # queries at a time, in task 6


# ---- 1. relations ----------------------------------------------------------------------------------------------------

def project(x, W):
    """x (B, n, d), W (H, d, width) -> (B, H, n, width)."""
    return torch.einsum("bnd,hdp->bhnp", x, W)


def relations(x, W_q_rel, W_k_rel):
    q, k = project(x, W_q_rel), project(x, W_k_rel)                    # (B, R, n, p)
    if VARIANT == 1:                                                   # inner products
        r = q @ k.mT / q.size(-1) ** 0.5
    if VARIANT == 2:                                                   # squared distances
        r = ((q[:, :, :, None] - k[:, :, None]) ** 2).mean(-1)
    if VARIANT == 3:                                                   # cosines
        r = unit(q) @ unit(k).mT
    return r.permute(0, 2, 3, 1)                                       # (B, n, n, R)


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


# ---- 2. masks --------------------------------------------------------------------------------------------------------

def allowed_pairs(tokens, causal):
    B, n = tokens.shape
    pairs = tokens[:, None, :].expand(B, n, n)
    return pairs & order(torch.arange(n), torch.arange(n)) if causal else pairs


def order(i, j):
    """May these receivers attend to these senders, as far as time goes? -> (len(i), len(j))."""
    return {1: j <= i[:, None], 2: j < i[:, None], 3: j >= i[:, None]}[VARIANT]


def masked_softmax(scores, allowed):
    allowed = allowed[:, None]                                         # (B, 1, n, m): the same for all heads
    return scores.masked_fill(~allowed, -1e9).softmax(-1).masked_fill(~allowed, 0.0)


# ---- 3. attention weights --------------------------------------------------------------------------------------------

def scale(d_h):
    return {1: d_h ** -0.5, 2: 1 / d_h, 3: 1.0}[VARIANT]


def attention_weights(x, W_q, W_k, allowed):
    q, k = project(x, W_q), project(x, W_k)                            # (B, H, n, d_h)
    return masked_softmax(q @ k.mT * scale(q.size(-1)), allowed)


# ---- 4. messages -----------------------------------------------------------------------------------------------------

def messages(alpha, r, s, W_r, W_s):
    if VARIANT == 3:
        r = r - r.diagonal(dim1=1, dim2=2).mT[:, :, None]              # r_ij - r_ii
    of_relations = torch.einsum("bhij,bijl,hlc->bhic", alpha, r, W_r)
    of_symbols = alpha @ project(s, W_s)                               # (B, H, n, d_h)
    if VARIANT == 2:
        of_symbols = of_symbols - alpha.sum(-1, keepdim=True) * project(s, W_s)    # (s_j - s_i) W_s
    return of_relations + of_symbols


# ---- 5. the layer ----------------------------------------------------------------------------------------------------

def relational_attention(x, s, w, tokens, causal):
    alpha = attention_weights(x, w["W_q"], w["W_k"], allowed_pairs(tokens, causal))
    a = messages(alpha, relations(x, w["W_q_rel"], w["W_k_rel"]), s, w["W_r"], w["W_s"])
    return a.transpose(1, 2).flatten(2) @ w["W_o"]                     # (B, n, H d_h) -> (B, n, d)


# ---- 6. linear memory ------------------------------------------------------------------------------------------------

def relational_attention_linear(x, s, w, tokens, causal):
    """sum_j alpha_ij <q_i, k_j> = <q_i, sum_j alpha_ij k_j>, one block of queries after the other.

    Squared distances: <q, q> - 2 <q, k> + <k, k>, whose last term is one more value of the sender.
    """
    (B, n, _), (H, R, _), p = x.shape, w["W_r"].shape, w["W_k_rel"].size(-1)
    q, k = project(x, w["W_q"]), project(x, w["W_k"])                  # (B, H, n, d_h)
    q_rel, k_rel = project(x, w["W_q_rel"]), project(x, w["W_k_rel"])  # (B, R, n, p)
    if VARIANT == 3:
        q_rel, k_rel = unit(q_rel), unit(k_rel)
    symbols = project(s, w["W_s"])

    # what is summed over j: the relation keys, their squared lengths, one, and the symbols
    rel = k_rel.transpose(1, 2).flatten(2)                             # (B, n, R p)
    squares = k_rel.pow(2).sum(-1).transpose(1, 2)                     # (B, n, R)
    shared = torch.cat([rel, squares, torch.ones_like(x[..., :1])], -1)[:, None].expand(-1, H, -1, -1)
    values = torch.cat([shared, symbols], -1)

    blocks = [checkpoint(of_block, i, q[:, :, i], k, values, tokens, causal, use_reentrant=False)
              for i in torch.arange(n).split(BLOCK)]
    keys, squares, total, a = torch.cat(blocks, 2).split([R * p, R, 1, symbols.size(-1)], -1)

    r = torch.einsum("brip,bhirp->bhir", q_rel, keys.unflatten(-1, (R, p)))        # sum_j alpha_ij <q_i, k_j>
    if VARIANT == 1:
        r = r / p ** 0.5
    if VARIANT == 2:
        r = (total * q_rel.pow(2).sum(-1).transpose(1, 2)[:, None] - 2 * r + squares) / p
        a = a - total * symbols
    if VARIANT == 3:
        r = r - total * (q_rel * k_rel).sum(-1).transpose(1, 2)[:, None]
    a = a + r @ w["W_r"]                                               # (B, H, n, d_h)
    return a.transpose(1, 2).flatten(2) @ w["W_o"]


def of_block(i, q, k, values, tokens, causal):
    """The sums of the values for the receivers i (a tensor of positions) -> (B, H, len(i), width)."""
    allowed = tokens[:, None, :].expand(-1, len(i), -1)                # (B, len(i), n)
    if causal:
        allowed = allowed & order(i, torch.arange(tokens.size(1)))
    return masked_softmax(q @ k.mT * scale(q.size(-1)), allowed) @ values
