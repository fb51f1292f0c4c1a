"""Assignment a1, relational attention from the definition. README.md has the tasks; shapes are those of its table.

B sequences, n tokens, d features; H heads of width d_h; R relations of width p; i receives, j sends.
"""
import torch


# ---- 1. relations ----------------------------------------------------------------------------------------------------

def relations(x, W_q_rel, W_k_rel):
    """x (B, n, d), W_q_rel and W_k_rel (R, d, p) -> r (B, n, n, R), r[b, i, j, l]."""
    raise NotImplementedError


# ---- 2. masks --------------------------------------------------------------------------------------------------------

def allowed_pairs(tokens, causal):
    """tokens (B, n) boolean, True = not padding; causal: bool -> (B, n, n) boolean: may i attend to j?"""
    raise NotImplementedError


def masked_softmax(scores, allowed):
    """scores (B, H, n, m), allowed (B, n, m) boolean -> weights (B, H, n, m). A fully masked row is all zeros."""
    raise NotImplementedError


# ---- 3. attention weights --------------------------------------------------------------------------------------------

def attention_weights(x, W_q, W_k, allowed):
    """x (B, n, d), W_q and W_k (H, d, d_h), allowed (B, n, n) boolean -> alpha (B, H, n, n)."""
    raise NotImplementedError


# ---- 4. messages -----------------------------------------------------------------------------------------------------

def messages(alpha, r, s, W_r, W_s):
    """alpha (B, H, n, n), r (B, n, n, R), s (B, n, d), W_r (H, R, d_h), W_s (H, d, d_h) -> a (B, H, n, d_h)."""
    raise NotImplementedError


# ---- 5. the layer ----------------------------------------------------------------------------------------------------

def relational_attention(x, s, w, tokens, causal):
    """x and s (B, n, d), w a dict of the seven weights, tokens (B, n) boolean, causal: bool -> (B, n, d)."""
    raise NotImplementedError


# ---- 6. linear memory ------------------------------------------------------------------------------------------------

def relational_attention_linear(x, s, w, tokens, causal):
    """The same arguments and the same result, but never n x n numbers in memory."""
    raise NotImplementedError
