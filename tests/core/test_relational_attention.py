"""Relational attention (Eq. 3): the three forms equal plain loops, and it has the properties that the paper claims.

The sequences are short: the fixture `fast_form` makes them take the forms that long ones take.
"""
import math
from itertools import product

import pytest
import torch

from attention import Attention, attend, attention_weights, rope_table, rotate
from relational_attention import REL_ACTIVATIONS, RelationalAttention, RelationalCrossAttention
from symbols import PositionalSymbols, PositionRelativeSymbols, SymbolicAttention

B, T, D = 2, 5, 16

pytestmark = pytest.mark.usefixtures("fast_form")


def make_symbols(kind):
    return {"symbolic": lambda: SymbolicAttention(D, 7, 2), "relative": lambda: PositionRelativeSymbols(D, 2),
            "positional": lambda: PositionalSymbols(D, T)}[kind]().double()


def make_mask(kind):
    if kind == "padding":                                    # the second sequence has three tokens
        return torch.arange(T)[None] < torch.tensor([T, 3])[:, None]
    if kind == "any":                                        # random, different for each head; one row is fully masked
        mask = torch.rand(B, 4, T, T, generator=torch.Generator().manual_seed(1)) < 0.6
        mask[0, 1, 2] = False
        return mask
    return None


def rope_of(n, d_h):
    """The rotary table of positions 0 ... n - 1, computed in float32 as in the model."""
    return tuple(table.double() for table in rope_table(torch.arange(n), d_h))


def rotated(vector, position, rope):
    """Rotary position: the feature pairs (c, c + d_h/2) rotated by position * 10000^(-2c/d_h)."""
    out, half = vector.clone(), len(vector) // 2
    for c in range(half if rope else 0):
        angle = position * 10000.0 ** (-c / half)
        out[c] = vector[c] * math.cos(angle) - vector[c + half] * math.sin(angle)
        out[c + half] = vector[c + half] * math.cos(angle) + vector[c] * math.sin(angle)
    return out


def eq3_with_loops(m, x, symbols, causal, mask, rope):
    """Eq. 3 with its square roots: every sum is a loop, nothing is shared with the implementation."""
    H, R, p, d_h = m.n_heads, m.n_relations, m.rel_proj_dim, m.W_r.shape[-1]
    out = torch.zeros(*x.shape[:2], H * d_h, dtype=x.dtype)
    for b, i, h in product(range(len(x)), range(x.size(1)), range(H)):
        g = h // (H // m.n_kv_heads)                         # the key/value head that query head h uses
        q = rotated(m.W_q(x[b, i])[h * d_h:(h + 1) * d_h], i, rope)
        scores, messages = [], []
        for j in range(x.size(1)):
            if causal and j > i or mask is not None and not (
                    mask[b, j] if mask.dim() == 2 else mask[b, h, i, j]):
                continue
            k = rotated(m.W_k(x[b, j])[g * d_h:(g + 1) * d_h], j, rope)
            scores.append(sum(q * k) / math.sqrt(d_h))
            message = torch.zeros(d_h, dtype=x.dtype)
            W_k_rel = m.W_q_rel if m.symmetric else m.W_k_rel
            for l in range(R):
                rows = slice(l * p, (l + 1) * p)
                r = m.W_q_rel(x[b, i])[rows] @ W_k_rel(x[b, j])[rows] / math.sqrt(p)
                message += r * m.W_r[h, l]
            if isinstance(symbols, PositionRelativeSymbols):
                s = symbols.library[max(-symbols.max_distance, min(symbols.max_distance, j - i)) + symbols.max_distance]
            else:
                s = symbols[j] if symbols.dim() == 2 else symbols[b, j]
            messages.append(message + m.W_s(s)[g * d_h:(g + 1) * d_h])
        if scores:
            weights = [math.exp(score) for score in scores]
            out[b, i, h * d_h:(h + 1) * d_h] = sum(w / sum(weights) * a for w, a in zip(weights, messages))
    return m.W_o(out)


def outputs_and_gradients(m, retriever, x, causal, mask, rope, literal):
    """The output, and its gradient (through a fixed random projection) by x and by every parameter."""
    x = x.clone().requires_grad_()
    out = m(x, retriever(x), causal=causal, mask=mask, rope=rope, need_weights=literal)
    out = out[0] if literal else out
    weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    wanted = [x, *m.parameters(), *retriever.parameters()]
    return [out, *torch.autograd.grad((out * weight).sum(), wanted)]


@pytest.mark.parametrize("symbols", ["symbolic", "relative", "positional"])
@pytest.mark.parametrize("mask_kind", [None, "padding", "any"])
@pytest.mark.parametrize("causal", [False, True])
def test_plain_loops_literal_form_and_the_form_for_long_sequences_agree(causal, mask_kind, symbols):
    mask = make_mask(mask_kind)
    for n_kv_heads, symmetric, (R, p, bias) in product([None, 2], [False, True], [(None, None, False), (3, 5, True)]):
        rope = symmetric != (n_kv_heads is None)             # with each of the others, not with all of them at once
        torch.manual_seed(0)
        m = RelationalAttention(D, 4, total_heads=4, n_relations=R, rel_proj_dim=p, n_kv_heads=n_kv_heads,
                                symmetric=symmetric, bias=bias).double()
        retriever, x = make_symbols(symbols), torch.randn(B, T, D, dtype=torch.float64)
        table = rope_of(T, D // 4) if rope else None
        fast, literal = (outputs_and_gradients(m, retriever, x, causal, mask, table, which) for which in (False, True))
        for ours, definition in zip(fast, literal):
            torch.testing.assert_close(ours, definition, rtol=0, atol=1e-10)
        with torch.no_grad():
            loops = eq3_with_loops(m, x, retriever(x), causal, mask, rope)
        torch.testing.assert_close(fast[0], loops, rtol=0, atol=1e-6 if rope else 1e-10)         # the table is float32


def test_a_group_within_a_larger_layer_has_the_layers_head_width():
    m = RelationalAttention(32, 2, total_heads=8)            # 2 of 8 heads of width 4
    x = torch.randn(3, 6, 32)
    assert m(x, x).shape == (3, 6, 8)
    out, alpha, r = m(x, x, need_weights=True)
    assert out.shape == (3, 6, 8) and alpha.shape == (3, 2, 6, 6) and r.shape == (3, 2, 6, 6)
    assert m.n_relations == 2 and m.rel_proj_dim == 4        # the defaults of Appendix B.1: d_r = n_ra, d_proj = d_head


def test_symmetric_relations_are_a_symmetric_positive_semidefinite_kernel():
    m = RelationalAttention(32, 4, n_relations=3, rel_proj_dim=6, symmetric=True).double()
    x = torch.randn(2, 10, 32, dtype=torch.float64)
    _, _, r = m(x, x, causal=True, need_weights=True)
    torch.testing.assert_close(r, r.mT, rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(r).min() > -1e-10
    m = RelationalAttention(32, 4, n_relations=3, rel_proj_dim=6).double()  # without the option: neither
    _, _, r = m(x, x, need_weights=True)
    assert (r - r.mT).abs().max() > 0.1


def test_attention_weights_sum_to_one_over_the_keys_that_the_mask_allows():
    m, x = RelationalAttention(32, 4), torch.randn(2, 6, 32)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    _, alpha, _ = m(x, x, causal=True, mask=mask, need_weights=True)
    torch.testing.assert_close(alpha.sum(-1), torch.ones(2, 4, 6))
    assert alpha.triu(1).abs().max() == 0 and alpha[1, :, :, 4:].abs().max() == 0


@pytest.mark.parametrize("symbols", ["symbolic", "relative", "positional"])
@pytest.mark.parametrize("literal", [False, True])
def test_a_fully_masked_row_is_zero_and_has_no_gradient(symbols, literal):
    m, retriever = RelationalAttention(D, 4).double(), make_symbols(symbols)
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1] = False                                          # the second sequence is all padding
    out = m(x, retriever(x), mask=mask, need_weights=literal)
    out = out[0] if literal else out
    out.sum().backward()
    assert out[1].abs().max() == 0 and x.grad[1].abs().max() == 0
    assert out[0].abs().min() > 0 and x.grad.isfinite().all()


@pytest.mark.parametrize("activation", REL_ACTIVATIONS)
def test_relation_activations_and_their_causality(activation):
    """An activation acts on r elementwise (softmax: over the senders); no output depends on a future token."""
    m = RelationalAttention(D, 2, rel_activation=activation).double()
    x = torch.randn(1, T, D, dtype=torch.float64)
    plain = RelationalAttention(D, 2).double()
    plain.load_state_dict(m.state_dict())
    out, _, r = m(x, x, causal=True, need_weights=True)
    _, _, r_plain = plain(x, x, causal=True, need_weights=True)
    if activation == "softmax":
        torch.testing.assert_close(r.tril().sum(-1), torch.ones(1, 2, T, dtype=torch.float64))
    else:
        formulas = {"identity": r_plain, "relu": r_plain.clamp(min=0), "sigmoid": 1 / (1 + (-r_plain).exp()),
                    "tanh": r_plain.tanh(), "silu": r_plain / (1 + (-r_plain).exp()),
                    "gelu": r_plain * (1 + torch.erf(r_plain / 2 ** 0.5)) / 2, "gelu_tanh": r_plain * (
                        1 + ((2 / torch.pi) ** 0.5 * (r_plain + 0.044715 * r_plain ** 3)).tanh()) / 2}
        if activation in formulas:                           # one that you have added has none yet
            torch.testing.assert_close(r, formulas[activation])
    torch.testing.assert_close(m(x, x, causal=True), out)    # identity: by the fast form
    alpha = m(x, x, causal=True, need_weights=True)[1]
    messages = torch.einsum("brij,hrd->bhijd", r, m.W_r) + m.W_s(x).unflatten(-1, (2, -1)).transpose(1, 2)[:, :, None]
    a = torch.einsum("bhij,bhijd->bihd", alpha, messages).flatten(2)     # a_i = sum_j alpha_ij (r W_r + s W_s)
    torch.testing.assert_close(out, m.W_o(a))
    changed = x.clone()
    changed[:, 3] += 1
    torch.testing.assert_close(m(changed, changed, causal=True)[:, :3], out[:, :3], rtol=0, atol=1e-14)


def test_rope_makes_scores_depend_on_distance_and_does_not_act_on_relations():
    q, k = torch.randn(1, 1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 1, 8, dtype=torch.float64)
    rope = rope_of(20, 8)

    def score(i, j):                                         # <R_i q, R_j k>, which must depend on i - j alone
        return (rotate(q, [t[[i]] for t in rope]) * rotate(k, [t[[j]] for t in rope])).sum()
    torch.testing.assert_close(score(3, 1), score(12, 10), rtol=0, atol=1e-5)      # the table is float32
    assert abs(score(3, 1) - score(3, 2)) > 1e-3
    m, x = RelationalAttention(D, 4), torch.randn(1, T, D)
    rope = rope_table(torch.arange(T), 4)
    assert torch.equal(m(x, x, need_weights=True)[2], m(x, x, rope=rope, need_weights=True)[2])


def heads_with_loops(m, x, values, causal, rope):
    """Eq. 2, every sum a loop, by a module's W_q, W_k, W_v, W_o; values(b, i, j): W_v's input for receiver i and j."""
    H, G = m.n_heads, m.n_kv_heads
    d_h = m.W_q.weight.size(0) // H
    out = torch.zeros(*x.shape[:2], H * d_h, dtype=x.dtype)
    for b, i, h in product(range(len(x)), range(x.size(1)), range(H)):
        rows, shared = slice(h * d_h, (h + 1) * d_h), slice(h // (H // G) * d_h, (h // (H // G) + 1) * d_h)
        q = rotated(m.W_q(x[b, i])[rows], i, rope)
        seen = [j for j in range(x.size(1)) if not causal or j <= i]
        weights = [math.exp(sum(q * rotated(m.W_k(x[b, j])[shared], j, rope)) / math.sqrt(d_h)) for j in seen]
        out[b, i, rows] = sum(w / sum(weights) * m.W_v(values(b, i, j))[shared] for w, j in zip(weights, seen))
    return m.W_o(out)


@torch.no_grad()
@pytest.mark.parametrize("n_kv_heads, rope, bias", [(4, False, True), (2, True, False), (1, True, True)])
def test_sensory_and_rca_heads_are_eq_2_with_loops(n_kv_heads, rope, bias):
    torch.manual_seed(0)
    x, table = torch.randn(B, T, D, dtype=torch.float64), rope_of(T, D // 4) if rope else None
    sensory = Attention(D, 4, n_kv_heads=n_kv_heads, bias=bias).double()
    expected = heads_with_loops(sensory, x, lambda b, i, j: x[b, j], True, rope)
    torch.testing.assert_close(sensory(x, causal=True, rope=table), expected, rtol=0, atol=1e-6 if rope else 1e-12)
    rca = RelationalCrossAttention(D, 4, n_kv_heads=n_kv_heads, bias=bias).double()
    for kind in ("symbolic", "relative", "positional"):
        s = make_symbols(kind)(x)

        def symbol(b, i, j):
            return s.library[max(-2, min(2, j - i)) + 2] if kind == "relative" else s[j] if s.dim() == 2 else s[b, j]
        expected = heads_with_loops(rca, x, symbol, True, rope)
        torch.testing.assert_close(rca(x, s, causal=True, rope=table), expected, rtol=0, atol=1e-6 if rope else 1e-12)


@pytest.mark.parametrize("Heads, form", [(Attention, ""), (RelationalCrossAttention, ""), (RelationalAttention, "fast"),
                                         (RelationalAttention, "literal"), (RelationalAttention, "blocked")])
@pytest.mark.parametrize("symbols", ["symbolic", "relative", "positional"])
def test_attention_dropout_acts_in_training_only(Heads, form, symbols, monkeypatch):
    if form == "fast" and symbols == "relative":
        form = "blocked"                                     # relative symbols have no fast form
    monkeypatch.setattr(RelationalAttention, "choose_form", lambda self, *args: getattr(self, form))
    m, retriever, x = Heads(D, 4, dropout=0.5), make_symbols(symbols).float(), torch.randn(B, T, D)
    s = () if Heads is Attention else (retriever(x),)
    assert not torch.equal(m(x, *s), m(x, *s))
    m.eval()
    assert torch.equal(m(x, *s), m(x, *s))


def test_dropout_acts_on_symbols_too_and_the_returned_weights_are_those_before_dropout():
    m, x = RelationalAttention(D, 4, dropout=0.5), torch.randn(B, T, D)
    with torch.no_grad():
        m.W_r.zero_()                                        # only symbols are left in the message
    (out, alpha, _), (out2, alpha2, _) = m(x, x, need_weights=True), m(x, x, need_weights=True)
    assert not torch.equal(out, out2) and torch.equal(alpha, alpha2)
    torch.testing.assert_close(alpha.sum(-1), torch.ones(B, 4, T))


def test_a_mask_applies_to_a_single_query_too():
    """As in cached decoding: T = 1 query, S keys of which some are padding."""
    q, k, v = torch.randn(B, 4, 1, 3), torch.randn(B, 4, T, 3), torch.randn(B, 4, T, 3)
    mask = make_mask("padding")
    alpha = attention_weights(q, k, causal=True, mask=mask)
    assert alpha[1, ..., 3:].abs().max() == 0
    torch.testing.assert_close(attend(q, k, v, causal=True, mask=mask), alpha @ v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_keeps_its_dtype_and_does_not_overflow(dtype):
    x = torch.randn(1, 1, 5, 4).to(dtype).transpose(1, 2)
    assert rotate(x, rope_table(torch.arange(5), 4)).dtype == dtype
    q = 50 * torch.ones(1, 1, 2, 64, dtype=dtype)            # <q, k> = 160,000: above the largest float16
    assert attention_weights(q, q).isfinite().all()


def test_the_blocked_form_stores_no_n_by_n_tensor(largest_tensor):
    """Neither forward nor backward, at n = 2048."""
    n = 2048
    m, x = RelationalAttention(128, 4, total_heads=8), torch.randn(1, n, 128, requires_grad=True)
    m.choose_form = lambda *shapes: m.blocked
    with largest_tensor() as largest:
        m(x, x, causal=True).sum().backward()
    assert largest.numel < n * n / 2
    n = 256                                                  # the same check does notice the literal form's n x n
    m, x = RelationalAttention(16, 4), torch.randn(1, n, 16, requires_grad=True)
    with largest_tensor() as largest:
        m(x, x, causal=True, need_weights=True)[0].sum().backward()
    assert largest.numel >= n * n


def test_impossible_shapes_are_refused_in_words():
    for wrong, word in [(dict(n_heads=3), "multiple"), (dict(n_heads=4, n_kv_heads=3), "n_kv_heads"),
                        (dict(n_heads=4, n_relations=3), "rel_proj_dim"),
                        (dict(n_heads=4, rel_activation="sin"), "choose")]:
        with pytest.raises(ValueError, match=word):
            RelationalAttention(16, **wrong)
    x = torch.randn(2, 5, 16)
    for mask, word in [(torch.ones(5, 5, dtype=torch.bool), r"mask\[None, None\]"), (torch.ones(2, 5), "boolean"),
                       (torch.ones(2, 5, 5, dtype=torch.bool), "2 or 4 dimensions")]:
        with pytest.raises(ValueError, match=word):
            RelationalAttention(16, 4)(x, x, mask=mask)


RULE = RelationalAttention.choose_form               # before the fixture replaces it


@pytest.mark.parametrize("n, device, options, form", [
    (128, "cpu", {}, "literal"), (129, "cpu", {}, "blocked"), (128, "meta", {}, "literal"), (129, "meta", {}, "fast"),
    (129, "meta", dict(relative=True), "blocked"), (1000, "cpu", dict(rel_activation="tanh"), "literal")])
def test_literal_up_to_128_tokens_then_blocked_on_a_cpu_and_fast_elsewhere(n, device, options, form):
    """The device "meta" stands for any other than a CPU. A relation activation needs the literal form."""
    symbols = PositionRelativeSymbols(64, 3) if options.pop("relative", False) else None
    m, q = RelationalAttention(64, 4, total_heads=8, **options), torch.empty(2, 4, n, 8, device=device)
    assert RULE(m, q, q, symbols).__name__ == form


@pytest.mark.parametrize("R, p", [(2, 4), (7, 40), (3, 300), (64, 16)])
def test_the_forms_agree_for_any_number_and_width_of_relations(R, p):
    """R p from 8 to 1,024 features: the fast form cuts them into slices of at most 256, within a relation or not."""
    torch.manual_seed(0)
    m = RelationalAttention(D, 4, n_relations=R, rel_proj_dim=p, n_kv_heads=2).double()
    x, mask, results = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True), make_mask("any"), []
    for form in (m.literal, m.fast, m.blocked):
        m.choose_form = lambda *shapes, form=form: form
        out = m(x, x, causal=True, mask=mask)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *m.parameters()])])
    for other in results[1:]:
        for ours, definition in zip(other, results[0]):
            torch.testing.assert_close(ours, definition, rtol=1e-10, atol=1e-10)


def test_weights_and_relations_rebuild_the_output():
    """W_o(sum_j alpha_ij (r_ij W_r + s_j W_s)) from what need_weights returns."""
    m, x = RelationalAttention(D, 4).double(), torch.randn(B, T, D, dtype=torch.float64)
    s = torch.randn(B, T, D, dtype=torch.float64)
    out, alpha, r = m(x, s, causal=True, need_weights=True)
    messages = torch.einsum("brij,hrd->bhijd", r, m.W_r) + m.W_s(s).unflatten(-1, (4, -1)).transpose(1, 2)[:, :, None]
    a = torch.einsum("bhij,bhijd->bihd", alpha, messages).flatten(2)
    torch.testing.assert_close(out, m.W_o(a), rtol=0, atol=1e-12)
    torch.testing.assert_close(m(x, s, causal=True), out, rtol=0, atol=1e-12)


def test_symbols_must_be_as_many_as_tokens():
    m, x = RelationalAttention(D, 4), torch.randn(B, T, D)
    for n in (1, T + 1):
        with pytest.raises(ValueError, match=f"{n} symbols for {T} tokens"):
            m(x, torch.randn(n, D))


@pytest.mark.parametrize("form", ["fast", "blocked"])
def test_bfloat16_is_about_as_exact_as_in_self_attention(form):
    """Error against float64, over 512 tokens, at most 1.5 times that of sensory heads of the same width."""
    torch.manual_seed(0)
    x, errors = torch.randn(8, 64, 64), {}
    for name, m in (("sensory", Attention(64, 4)), (form, RelationalAttention(64, 4))):
        m.choose_form = lambda *shapes, m=m: getattr(m, form)
        inputs = (x,) if name == "sensory" else (x, x)
        exact = m.double()(*(i.double() for i in inputs))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = m.float()(*inputs)
        errors[name] = ((rough.double() - exact).square().mean() / exact.square().mean()).sqrt().item()
    assert errors[form] < 1.5 * errors["sensory"]
