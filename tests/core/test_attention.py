"""What every Transformer has: heads (Eq. 2), rotary positions, masks and the cache, each against its definition."""
import math

import pytest
import torch
from helpers import exact_rope, exact_sinusoids, rotated

from attention import Attention, Cache, attend, attention_weights, rope_table, rotate, sinusoids

B, T, D = 2, 5, 16


def eq_2(m, x, y, causal, mask, rope):
    """Eq. 2 in loops: e_i = sum_j alpha_ij v_j for receivers x (B, T, D) and senders y (B, S, D). mask: (B, S)."""
    H, G = m.n_heads, m.n_kv_heads
    e = torch.zeros(*x.shape[:2], H, D // H, dtype=x.dtype)
    for b in range(B):
        for i in range(x.size(1)):
            for h in range(H):
                g = h * G // H                                         # the key/value head of query head h
                senders = [j for j in range(y.size(1)) if mask[b, j] and (j <= i or not causal)]
                q, exp = m.W_q(x[b, i]).view(H, -1)[h], {}
                for j in senders:
                    k = m.W_k(y[b, j]).view(G, -1)[g]
                    score = rotated(q, i) @ rotated(k, j) if rope else q @ k
                    exp[j] = (score / math.sqrt(D // H)).exp()
                for j in senders:
                    alpha = exp[j] / sum(exp.values())
                    e[b, i, h] += alpha * m.W_v(y[b, j]).view(G, -1)[g]
    return m.W_o(e.flatten(2))


@torch.no_grad()
@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("causal, masked, rope", [
    (False, False, False), (True, False, False), (False, True, False), (True, True, True), (True, False, True)])
def test_self_attention_is_eq_2(causal, masked, rope, n_kv_heads):
    torch.manual_seed(0)
    m, x = Attention(D, 4, n_kv_heads=n_kv_heads, bias=True).double(), torch.randn(B, T, D, dtype=torch.float64)
    mask = torch.arange(T) < torch.tensor([[T], [3]]) if masked else torch.ones(B, T, dtype=torch.bool)
    out = m(x, causal=causal, mask=mask if masked else None, rope=exact_rope(T, 4) if rope else None)
    torch.testing.assert_close(out, eq_2(m, x, x, causal, mask, rope), rtol=0, atol=1e-10)


@torch.no_grad()
def test_cross_attention_is_eq_2_with_the_context_as_senders():
    m, x, y = Attention(D, 4).double(), torch.randn(B, T, D).double(), torch.randn(B, 7, D).double()
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    torch.testing.assert_close(m(x, y, mask=mask), eq_2(m, x, y, False, mask, False), rtol=0, atol=1e-10)


@pytest.mark.parametrize("queries", [T, 3, 1])
@pytest.mark.parametrize("mask_shape", [None, (B, T), (1, 1, -1, T), (B, 4, -1, T)])
@pytest.mark.parametrize("causal", [False, True])
def test_attend_sums_the_values_with_the_attention_weights(causal, mask_shape, queries):
    """The kernels of PyTorch compute what the definition does, also where the queries are the last of the positions."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, heads, n, 6, dtype=torch.float64) for heads, n in ((4, queries), (2, T), (2, T)))
    mask = None
    if mask_shape:
        mask = torch.rand([queries if n == -1 else n for n in mask_shape]) < 0.5     # some rows are fully masked
    expected = attention_weights(q, k, causal=causal, mask=mask) @ v.repeat_interleave(2, dim=1)
    torch.testing.assert_close(attend(q, k, v, causal=causal, mask=mask), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("queries", [T, 3, 1])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_weights_are_a_distribution_over_the_allowed_keys_and_zero_in_a_fully_masked_row(causal, queries):
    torch.manual_seed(0)
    q, k, mask = torch.randn(B, 4, queries, 3), torch.randn(B, 4, T, 3), torch.rand(B, 4, queries, T) < 0.4
    mask[0, 0, 0] = False
    i, j = torch.arange(T - queries, T)[:, None], torch.arange(T)      # the queries are the last of the positions
    allowed = mask & (j <= i) if causal else mask
    alpha = attention_weights(q, k, causal=causal, mask=mask)
    assert not alpha[~allowed].any() and not allowed.any(-1).all()
    torch.testing.assert_close(alpha.sum(-1), allowed.any(-1).float())


@pytest.mark.parametrize("mask, word", [
    (torch.ones(T, T, dtype=torch.bool), r"pass a \(T, S\) mask as mask\[None, None\]"), (torch.ones(B, T), "boolean"),
    (torch.ones(B, T, T, dtype=torch.bool), "2 or 4 dimensions")])
def test_a_mask_that_could_be_misread_raises_an_error(mask, word):
    x = torch.randn(B, T, D)
    with pytest.raises(ValueError, match=word):
        Attention(D, 4)(x, mask=mask)


def test_rotary_and_sinusoidal_tables_are_their_formulas_in_float32():
    """At position 5,000 the angle itself is rounded to float32, by up to 2^-12."""
    tables = [*rope_table(torch.arange(5000), 64), sinusoids(torch.arange(5000), 64)]
    for table, exact in zip(tables, [*exact_rope(5000, 64), exact_sinusoids(5000, 64)]):
        assert table.dtype == torch.float32
        torch.testing.assert_close(table.double(), exact, rtol=0, atol=1e-3)


def test_rope_rotates_each_head_by_its_position_so_that_scores_depend_on_the_distance():
    x, rope = torch.randn(1, 20, 3, 8, dtype=torch.float64), exact_rope(20, 8)       # (B, T, H, d_h)
    for position in range(20):
        for h in range(3):
            torch.testing.assert_close(rotate(x, rope)[0, position, h], rotated(x[0, position, h], position))
    same = torch.randn(2, 1, 1, 8, dtype=torch.float64).expand(2, 20, 1, 8)          # a q and a k at each position
    q, k = rotate(same, rope)[:, :, 0]
    scores = q @ k.T
    torch.testing.assert_close(scores[:-1, :-1], scores[1:, 1:], rtol=0, atol=1e-12)
    assert scores[0].diff().abs().min() > 1e-3


def test_rotation_keeps_the_dtype():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert rotate(torch.ones(1, T, 1, 4, dtype=dtype), rope_table(torch.arange(T), 4)).dtype == dtype


def test_a_cache_returns_all_that_was_appended_and_allocates_its_buffer_once():
    cache, new = Cache(max_len=6), torch.randn(B, 2, 6, 3)
    for start, stop in ((0, 2), (2, 3), (3, 6)):
        assert torch.equal(cache.append("k", new[:, :, start:stop]), new[:, :, :stop]) and len(cache) == stop
        assert cache.buffers["k"].shape == (B, 2, 6, 3)
    assert len(Cache(max_len=6)) == 0


def test_with_a_cache_the_keys_and_values_of_a_context_are_computed_once():
    m, cache, calls = Attention(D, 4), Cache(max_len=2), []
    m.W_k.register_forward_hook(lambda module, args, out: calls.append(args[0].shape))
    x, y = torch.randn(B, 2, D), torch.randn(B, 7, D)
    steps = [m(x[:, [i]], y, cache=cache) for i in range(2)]
    assert calls == [(B, 7, D)]
    torch.testing.assert_close(torch.cat(steps, 1), m(x, y))
