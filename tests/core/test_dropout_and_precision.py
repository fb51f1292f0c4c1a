"""Dropout and half precision: what they do to the heads, in each of the three forms."""
import pytest
import torch
from helpers import FORMS, FORMS_AND_SYMBOLS, symbols_of, use

from attention import Attention, attention_weights
from relational_attention import RelationalAttention, RelationalCrossAttention

B, T, D = 2, 5, 16


@torch.no_grad()
@pytest.mark.parametrize("form", [*FORMS, "rca"])
def test_dropout_drops_each_attention_weight_with_its_probability(form):
    """With W_r = 0 and every other matrix the identity, the output of one head is alpha after dropout."""
    n, p = 8, 0.3
    m = (RelationalCrossAttention if form == "rca" else RelationalAttention)(n, 1, dropout=p).double()
    for name, parameter in m.named_parameters():
        parameter.zero_() if name == "W_r" else parameter.copy_(torch.eye(n))
    use(form, m)
    x, s = torch.randn(1, n, n, dtype=torch.float64).expand(500, n, n), torch.eye(n, dtype=torch.float64)
    torch.manual_seed(0)
    dropped, alpha = m(x, s), m.eval()(x, s)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], alpha[kept] / (1 - p))
    assert abs(kept.double().mean() - (1 - p)) < 5 * (p * (1 - p) / kept.numel()) ** 0.5   # five standard errors


@torch.no_grad()
@pytest.mark.parametrize("form, kind", FORMS_AND_SYMBOLS)
def test_the_mean_over_many_dropout_masks_is_the_output_in_evaluation(form, kind):
    torch.manual_seed(0)
    m, symbols, n = RelationalAttention(D, 2, dropout=0.3).double(), symbols_of(kind, D, T), 400
    use(form, m)
    x = torch.randn(1, T, D, dtype=torch.float64).expand(n, T, D)      # each sequence has its own dropout mask
    out, expected = m(x, symbols(x), causal=True), m.eval()(x, symbols(x), causal=True)
    assert ((out.mean(0) - expected[0]).abs() < 5 * out.std(0) / n ** 0.5).all()           # five standard errors
    without = RelationalAttention(D, 2).double()
    without.load_state_dict(m.state_dict())
    torch.testing.assert_close(expected, without(x, symbols(x), causal=True), rtol=0, atol=1e-12)


def test_the_returned_weights_are_those_before_dropout():
    m, x = RelationalAttention(D, 4, dropout=0.5), torch.randn(B, T, D)
    (out, alpha, r), (other, alpha2, r2) = m(x, x, need_weights=True), m(x, x, need_weights=True)
    assert not torch.equal(out, other) and torch.equal(alpha, alpha2) and torch.equal(r, r2)


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("form", ["fast", "blocked"])
def test_bfloat16_is_about_as_exact_as_in_self_attention(form, autocast):
    """Relative error against float64, the same weights and inputs: below 1.5 times that of sensory heads."""
    errors = {"self": 0.0, form: 0.0}
    for seed in range(5):
        torch.manual_seed(seed)
        x, s = torch.randn(2, 2, 128, 64).bfloat16().double()
        for name, m, inputs in (("self", Attention(64, 4, total_heads=8), (x,)),
                                (form, RelationalAttention(64, 4, total_heads=8), (x, s))):
            use(form, m)
            exact = m.bfloat16().double()(*inputs, causal=True)
            dtype = torch.float32 if autocast else torch.bfloat16
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                rounded = m.to(dtype)(*(i.to(dtype) for i in inputs), causal=True)
            errors[name] += ((rounded.double() - exact).norm() / exact.norm()).item()
    assert errors[form] < 1.5 * errors["self"], errors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_scores_do_not_overflow(dtype):
    """<q, k> = 160,000 is above the largest float16; the score <q, k> / sqrt(64) = 20,000 is not."""
    q = 50 * torch.ones(1, 1, 2, 64, dtype=dtype)
    alpha = attention_weights(q, q)
    assert alpha.dtype == dtype and alpha.isfinite().all()
