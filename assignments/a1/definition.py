"""The layer of a1 by its definition, one receiver at a time, for the grader: slow, for a few tokens.

Arguments as in README.md, after the number of the variant (docs/teaching.md says what each changes).
"""
from itertools import product

import torch

WEIGHTS = "W_q", "W_k", "W_q_rel", "W_k_rel", "W_r", "W_s", "W_o"


def table(shape, entry):
    """The tensor whose element at each index, or what follows it, is entry(*index)."""
    return torch.stack([entry(*index) for index in product(*map(range, shape))]).unflatten(0, shape)


def relation(variant, q, k):
    """r of one receiver, q (p,), with each sender, k (n, p) -> (n,)."""
    if variant == 2:
        return ((q - k) ** 2).sum(-1) / len(q)
    return k @ q / (len(q) ** 0.5 if variant == 1 else q.norm() * k.norm(dim=-1))


def score(variant, q, k):
    """What the softmax takes, of one receiver, q (d_h,), and each sender, k (n, d_h) -> (n,)."""
    return k @ q * {1: len(q) ** -0.5, 2: 1 / len(q), 3: 1.0}[variant]


def in_time(variant, i, j):
    """Is sender j allowed to receiver i, if causal?"""
    return {1: j <= i, 2: j < i, 3: j >= i}[variant]


def relations(variant, x, W_q_rel, W_k_rel):
    (B, n, _), R = x.shape, len(W_q_rel)
    return table((B, n, R), lambda b, i, l: relation(variant, x[b, i] @ W_q_rel[l], x[b] @ W_k_rel[l])).mT


def allowed_pairs(variant, tokens, causal):
    (B, n), tokens = tokens.shape, tokens.tolist()
    return torch.tensor([[[tokens[b][j] and (not causal or in_time(variant, i, j)) for j in range(n)]
                          for i in range(n)] for b in range(B)])


def masked_softmax(variant, scores, allowed):
    def row(b, h, i):
        e = scores[b, h, i].exp() * allowed[b, i]
        return e / e.sum() if allowed[b, i].any() else e
    return table(scores.shape[:3], row)


def attention_weights(variant, x, W_q, W_k, allowed):
    (B, n, _), H = x.shape, len(W_q)
    scores = table((B, H, n), lambda b, h, i: score(variant, x[b, i] @ W_q[h], x[b] @ W_k[h]))
    return masked_softmax(variant, scores, allowed)


def message(variant, r, r_ii, s, s_i, W_r, W_s):
    """From each sender, r (n, R) and s (n, d), to one head of one receiver -> (n, d_h)."""
    return {1: r @ W_r + s @ W_s, 2: r @ W_r + (s - s_i) @ W_s, 3: (r - r_ii) @ W_r + s @ W_s}[variant]


def messages(variant, alpha, r, s, W_r, W_s):
    return table(alpha.shape[:3], lambda b, h, i: alpha[b, h, i] @ message(
        variant, r[b, i], r[b, i, i], s[b], s[b, i], W_r[h], W_s[h]))


def receiver(variant, x, s, w, tokens, causal, b, i):
    """The layer's output for one receiver -> (d,)."""
    W_q, W_k, W_q_rel, W_k_rel, W_r, W_s, W_o = (w[name] for name in WEIGHTS)
    senders = [j for j in range(x.size(1)) if tokens[b, j] and (not causal or in_time(variant, i, j))]
    if not senders:
        return torch.zeros_like(x[b, i])
    r = torch.stack([relation(variant, x[b, i] @ q, x[b] @ k) for q, k in zip(W_q_rel, W_k_rel)], -1)       # (n, R)
    heads = []
    for h in range(len(W_q)):
        alpha = score(variant, x[b, i] @ W_q[h], x[b, senders] @ W_k[h]).softmax(0)
        heads.append(alpha @ message(variant, r[senders], r[i], s[b, senders], s[b, i], W_r[h], W_s[h]))
    return torch.cat(heads) @ W_o


def relational_attention(variant, x, s, w, tokens, causal):
    return table(x.shape[:2], lambda b, i: receiver(variant, x, s, w, tokens, causal, b, i))
