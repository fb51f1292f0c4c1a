"""Relational attention: what the mathematics promises, from the definition down.

The definition comes first, as plain loops. All sums here are in float64 and agree to 1e-10.
"""
import math
import random

import pytest
import torch
from helpers import FORMS, FORMS_AND_SYMBOLS, SYMBOLS, exact_rope, rotated, symbol, symbols_of, use

from attention import Attention, Cache
from relational_attention import REL_ACTIVATIONS, RelationalAttention, RelationalCrossAttention

B, T, D = 2, 5, 16


def eq_3(m, x, symbols, causal, mask, rope):
    """Eq. 3 in loops over sequence b, receiver i, head h, sender j, relation l -> (B, T, H d_h). mask: (B, H, T, T).

        a_i = sum_j alpha_ij ( r_ij W_r + s_j W_s )
        alpha_ij = softmax_j( <q_i, k_j> / sqrt(d_h) )          r_ij[l] = <q_rel_i[l], k_rel_j[l]> / sqrt(p)
    """
    (B, T, _), H, R, p, d_h = x.shape, m.n_heads, m.n_relations, m.rel_proj_dim, m.W_r.size(-1)
    W_k_rel = m.W_q_rel if m.symmetric else m.W_k_rel
    a = torch.zeros(B, T, H, d_h, dtype=x.dtype)
    for b in range(B):
        for i in range(T):
            for h in range(H):
                g = h * m.n_kv_heads // H                              # the key/value head of query head h
                senders = [j for j in range(T) if mask[b, h, i, j] and (j <= i or not causal)]
                q_i = m.W_q(x[b, i]).view(H, d_h)[h]
                q_i = rotated(q_i, i) if rope else q_i
                exp = {}
                for j in senders:
                    k_j = m.W_k(x[b, j]).view(m.n_kv_heads, d_h)[g]
                    k_j = rotated(k_j, j) if rope else k_j
                    exp[j] = (q_i @ k_j / math.sqrt(d_h)).exp()
                for j in senders:
                    alpha = exp[j] / sum(exp.values())
                    for l in range(R):
                        q_rel, k_rel = m.W_q_rel(x[b, i]).view(R, p)[l], W_k_rel(x[b, j]).view(R, p)[l]
                        r = q_rel @ k_rel / math.sqrt(p)
                        a[b, i, h] += alpha * r * m.W_r[h, l]
                    a[b, i, h] += alpha * m.W_s(symbol(symbols, b, i, j)).view(m.n_kv_heads, d_h)[g]
    return m.W_o(a.flatten(2))


def random_setting(seed, T, relations):
    """A module, a symbol module, an input and further arguments: any combination that is allowed."""
    torch.manual_seed(seed)
    choose = random.Random(seed).choice
    (H, G), d_h, (R, p) = choose([(4, 4), (4, 2), (2, 1), (3, 3)]), choose([2, 4, 6]), choose(relations)
    d = H * d_h * choose([1, 2])                                       # these heads are the whole layer, or half of it
    m = RelationalAttention(d, H, total_heads=d // d_h, n_relations=R, rel_proj_dim=p, n_kv_heads=G,
                            symmetric=choose([False, True]), bias=choose([False, True])).double()
    random_mask = torch.rand(B, H, T, T) < 0.6
    random_mask[0, 1, 2] = False                                       # a fully masked row
    padding = torch.arange(T)[None] < torch.tensor([[T], [T - 2]])
    mask = choose([None, padding, random_mask, random_mask[:1, :1]])
    x = torch.randn(B, T, d, dtype=torch.float64, requires_grad=True)
    return m, symbols_of(choose(SYMBOLS), d, T), x, choose([False, True]), mask, choose([False, True])


def outputs_and_gradients(f, m, symbols, x):
    """The output of f(symbols(x)), and its gradient with respect to x and every parameter."""
    out = f(symbols(x))
    direction = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    return [out, *torch.autograd.grad(out, [x, *m.parameters(), *symbols.parameters()], direction)]


def assert_equal(results, expected, tolerance=1e-10):
    assert len(results) == len(expected)
    for ours, definition in zip(results, expected):
        torch.testing.assert_close(ours, definition, rtol=tolerance, atol=tolerance)


# ---- three forms of one definition -----------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(40))
def test_the_literal_form_is_eq_3(seed):
    """Output and gradients, in 40 random settings: masks, causal, rope, symbols, n_kv_heads, R, p, symmetric, bias."""
    m, symbols, x, causal, mask, rope = random_setting(seed, T=4, relations=[(None, None), (1, 3), (3, 2)])
    use("literal", m)
    table = exact_rope(4, m.W_r.size(-1)) if rope else None
    everyone = torch.ones(B, m.n_heads, 4, 4, dtype=torch.bool)
    four_dimensions = everyone if mask is None else everyone & (mask if mask.dim() == 4 else mask[:, None, None])
    literal = outputs_and_gradients(lambda s: m(x, s, causal=causal, mask=mask, rope=table), m, symbols, x)
    loops = outputs_and_gradients(lambda s: eq_3(m, x, s, causal, four_dimensions, rope), m, symbols, x)
    assert_equal(literal, loops)


@pytest.mark.parametrize("seed", range(60))
def test_the_fast_and_blocked_forms_equal_the_literal_form(seed):
    """The same, with R p from 8 to 1,024: the fast form cuts its values into pieces as wide as a head."""
    m, symbols, x, causal, mask, rope = random_setting(
        seed, T=19, relations=[(2, 4), (5, 7), (4, 64), (7, 40), (3, 100), (64, 16), (1, 300), (1, 1024)])
    table, results = exact_rope(19, m.W_r.size(-1)) if rope else None, {}
    for form in FORMS:
        use(form, m)
        results[form] = outputs_and_gradients(lambda s: m(x, s, causal=causal, mask=mask, rope=table), m, symbols, x)
    for form in results:
        assert_equal(results[form], results["literal"])


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form, kind", FORMS_AND_SYMBOLS)
def test_a_sequence_continued_from_a_cache_has_the_same_outputs(form, kind, masked):
    """The T queries are the last of S positions: causal mask, padding and relative offsets count from there."""
    torch.manual_seed(0)
    m, x = RelationalAttention(D, 4, n_kv_heads=2).double(), torch.randn(B, 9, D, dtype=torch.float64)
    symbols, rope, cache = symbols_of(kind, D, 9), exact_rope(9, 4), Cache(max_len=9)
    mask = torch.arange(9) != torch.tensor([[3], [0]]) if masked else None           # the second begins with padding
    use("literal", m)
    expected = m(x, symbols(x), causal=True, mask=mask, rope=rope)
    use(form, m)
    pieces = []
    for new in torch.arange(9).split([4, 3, 1, 1]):
        pieces.append(m(x[:, new], symbols(x[:, new], start=len(cache)), causal=True, rope=[t[new] for t in rope],
                        mask=None if mask is None else mask[:, :new[-1] + 1], cache=cache))
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("Heads", [RelationalAttention, RelationalCrossAttention])
def test_relative_symbols_give_the_same_sum_by_pairs_and_in_query_blocks(Heads, symmetric, monkeypatch):
    """Beyond 512 tokens the fast form and cross-attention sum relative symbols in query blocks."""
    torch.manual_seed(0)
    m = Heads(D, 4, n_kv_heads=2, **dict(symmetric=symmetric) if Heads is RelationalAttention else {}).double()
    symbols, x = symbols_of("relative", D, 9), torch.randn(B, 9, D, dtype=torch.float64, requires_grad=True)
    mask, results = torch.arange(9) != torch.tensor([[3], [0]]), []
    m.choose_form = lambda q, k: m.fast
    for limit in (512, 5):
        monkeypatch.setattr("symbols.beyond", lambda n, T, S, limit=limit: T > limit)
        results.append(outputs_and_gradients(lambda s: m(x, s, causal=True, mask=mask), m, symbols, x))
    assert_equal(*results)


@pytest.mark.parametrize("n, device, activation, form", [
    (128, "cpu", "identity", "literal"), (129, "cpu", "identity", "blocked"), (128, "meta", "identity", "fast"),
    (129, "meta", "identity", "fast"), (1000, "meta", "tanh", "literal")])
def test_literal_up_to_128_tokens_and_blocked_beyond_on_a_cpu_else_fast(n, device, activation, form):
    """The device "meta" stands for any other than a CPU. A relation activation needs the literal form."""
    m, q = RelationalAttention(D, 4, rel_activation=activation), torch.empty(B, 4, n, 4, device=device)
    assert m.choose_form(q, q).__name__ == form


@pytest.mark.parametrize("R, p", [(2, 4), (2, 20), (2, 150)])
@pytest.mark.parametrize("form", ["fast", "blocked"])
def test_the_fast_and_blocked_forms_store_no_tensor_of_n_x_n_numbers(form, R, p, largest_tensor):
    """Forward and backward, for relations narrower and wider than a head (d_h = 16)."""
    n = 1024
    m, x = RelationalAttention(32, 2, n_relations=R, rel_proj_dim=p), torch.randn(1, n, 32, requires_grad=True)
    use(form, m)
    with largest_tensor() as largest:
        m(x, x, causal=True).sum().backward()
    assert largest.numel < n * n


def test_the_literal_form_does_store_n_x_n_relations(largest_tensor):
    """So the check above can fail."""
    m, x = RelationalAttention(32, 2), torch.randn(1, 256, 32)
    use("literal", m)
    with largest_tensor() as largest:
        m(x, x, causal=True)
    assert largest.numel >= 2 * 256 * 256


# ---- weights and relations -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("causal, masked", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("activation", REL_ACTIVATIONS)
def test_the_returned_weights_and_relations_rebuild_the_output(activation, causal, masked):
    """W_o( sum_j alpha_ij (r_ij W_r + s_j W_s) )"""
    torch.manual_seed(0)
    m = RelationalAttention(D, 4, n_relations=3, rel_proj_dim=5, n_kv_heads=2, rel_activation=activation).double()
    x, s = torch.randn(2, B, T, D, dtype=torch.float64)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2]) if masked else None
    out, alpha, r = m(x, s, causal=causal, mask=mask, need_weights=True)
    assert alpha.shape == (B, 4, T, T) and r.shape == (B, 3, T, T)
    s_W_s = m.W_s(s).view(B, T, 2, 4).repeat_interleave(2, dim=2)                    # (B, T, H, d_h)
    messages = torch.einsum("blij,hld->bhijd", r, m.W_r) + s_W_s.transpose(1, 2)[:, :, None]
    a = torch.einsum("bhij,bhijd->bihd", alpha, messages)
    torch.testing.assert_close(out, m.W_o(a.flatten(2)), rtol=0, atol=1e-10)
    torch.testing.assert_close(m(x, s, causal=causal, mask=mask), out, rtol=0, atol=1e-10)


def test_attention_weights_sum_to_one_over_the_keys_that_the_mask_allows():
    m, x = RelationalAttention(D, 4), torch.randn(B, T, D)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    _, alpha, _ = m(x, x, causal=True, mask=mask, need_weights=True)
    torch.testing.assert_close(alpha.sum(-1), torch.ones(B, 4, T))
    assert not alpha.triu(1).any() and not alpha[1, :, :, 3:].any()


def test_relations_are_scaled_inner_products_neither_masked_nor_rotated():
    m, x = RelationalAttention(D, 4, n_relations=3, rel_proj_dim=6).double(), torch.randn(B, T, D, dtype=torch.float64)
    q_rel, k_rel = (W(x).view(B, T, 3, 6) for W in (m.W_q_rel, m.W_k_rel))
    expected = torch.einsum("bilp,bjlp->blij", q_rel, k_rel) / 6 ** 0.5
    for options in (dict(), dict(causal=True), dict(mask=torch.rand(B, T) < 0.5), dict(rope=exact_rope(T, 4))):
        torch.testing.assert_close(m(x, x, **options, need_weights=True)[2], expected, rtol=0, atol=1e-12)


def test_symmetric_relations_are_a_symmetric_positive_semidefinite_kernel():
    x = torch.randn(2, 10, D, dtype=torch.float64)
    m = RelationalAttention(D, 4, n_relations=3, rel_proj_dim=6, symmetric=True).double()
    _, _, r = m(x, x, causal=True, need_weights=True)
    torch.testing.assert_close(r, r.mT, rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(r).min() > -1e-10
    m = RelationalAttention(D, 4, n_relations=3, rel_proj_dim=6).double()  # by default they are not symmetric
    _, _, r = m(x, x, need_weights=True)
    assert (r - r.mT).abs().max() > 0.1


@pytest.mark.parametrize("causal", [False, True])
def test_relation_activations_are_their_formulas(causal):
    x = torch.randn(1, T, D, dtype=torch.float64)
    m = RelationalAttention(D, 2).double()
    _, _, r = m(x, x, causal=causal, need_weights=True)
    everyone = torch.ones(T, T, dtype=torch.bool)
    allowed = everyone.tril() if causal else everyone
    formulas = {
        "identity": r, "relu": r.clamp(min=0), "sigmoid": 1 / (1 + (-r).exp()), "tanh": r.tanh(),
        "silu": r / (1 + (-r).exp()), "gelu": r * (1 + torch.erf(r / 2 ** 0.5)) / 2,
        "gelu_tanh": r * (1 + ((2 / torch.pi) ** 0.5 * (r + 0.044715 * r ** 3)).tanh()) / 2,
        "softmax": r.exp() * allowed / (r.exp() * allowed).sum(-1, keepdim=True)}    # over the senders j
    for activation, expected in formulas.items():                      # one that you add belongs here, too
        other = RelationalAttention(D, 2, rel_activation=activation).double()
        other.load_state_dict(m.state_dict())
        torch.testing.assert_close(other(x, x, causal=causal, need_weights=True)[2], expected)


# ---- masks -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("form, kind, activation",
                         [(*both, "identity") for both in FORMS_AND_SYMBOLS]
                         + [("literal", kind, activation) for kind in SYMBOLS for activation in ("tanh", "softmax")])
def test_no_output_depends_on_a_later_token(form, kind, activation):
    """Nor through its symbol, nor through the denominator of softmax relations."""
    torch.manual_seed(0)
    m, symbols = RelationalAttention(D, 4, rel_activation=activation).double(), symbols_of(kind, D, T)
    use(form, m)
    x = torch.randn(1, T, D, dtype=torch.float64)
    changed = x.clone()
    changed[:, 3] += 1
    before, after = (m(y, symbols(y), causal=True) for y in (x, changed))
    torch.testing.assert_close(after[:, :3], before[:, :3], rtol=0, atol=1e-14)
    assert (after - before)[:, 3:].abs().amax(-1).min() > 1e-3         # but on an earlier one


@pytest.mark.parametrize("form, kind", FORMS_AND_SYMBOLS)
def test_a_fully_masked_row_gives_zeros_and_has_no_gradient(form, kind):
    m, symbols = RelationalAttention(D, 4).double(), symbols_of(kind, D, T)
    use(form, m)
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, False])[:, None].expand(B, T)           # the second sequence is all padding
    out = m(x, symbols(x), mask=mask)
    out.sum().backward()
    assert not out[1].any() and not x.grad[1].any()
    assert out[0].all() and x.grad.isfinite().all()


def test_softmax_relations_need_one_mask_for_all_heads():
    m, x = RelationalAttention(D, 4, rel_activation="softmax"), torch.randn(B, T, D)
    with pytest.raises(ValueError, match="one mask for all heads"):
        m(x, x, mask=torch.ones(B, 4, T, T, dtype=torch.bool))


# ---- heads -----------------------------------------------------------------------------------------------------------

def test_a_group_within_a_larger_layer_has_the_head_width_of_the_layer():
    m, x = RelationalAttention(32, 2, total_heads=8), torch.randn(3, 6, 32)          # 2 of 8 heads of width 4
    assert m(x, x).shape == (3, 6, 8)
    assert m.n_relations == 2 and m.rel_proj_dim == 4        # the defaults of Appendix B.1: d_r = n_ra, d_proj = d_h


@torch.no_grad()
@pytest.mark.parametrize("Heads", [Attention, RelationalAttention, RelationalCrossAttention])
def test_key_value_heads_are_shared_by_consecutive_query_heads(Heads):
    """2 key/value heads for 4 query heads equal 4 of which each is there twice."""
    few, many = Heads(D, 4, n_kv_heads=2).double(), Heads(D, 4).double()
    x = torch.randn(B, T, D, dtype=torch.float64)
    weights = few.state_dict()
    for name in ("W_k.weight", "W_v.weight", "W_s.weight"):
        if name in weights:                                            # (2 d_h, D) -> (4 d_h, D)
            weights[name] = weights[name].view(2, 4, D).repeat_interleave(2, dim=0).flatten(0, 1)
    many.load_state_dict(weights)
    arguments = (x,) if Heads is Attention else (x, x)
    torch.testing.assert_close(few(*arguments, causal=True), many(*arguments, causal=True), rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("kind", SYMBOLS)
@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_relational_cross_attention_is_relational_attention_without_relations(n_kv_heads, kind):
    """a_i = sum_j alpha_ij s_j W_s: Eq. 3 with W_r = 0."""
    m, symbols = RelationalAttention(D, 4, n_kv_heads=n_kv_heads).double(), symbols_of(kind, D, T)
    m.W_r.zero_()
    rca = RelationalCrossAttention(D, 4, n_kv_heads=n_kv_heads).double()
    rca.load_state_dict({"W_q.weight": m.W_q.weight, "W_k.weight": m.W_k.weight, "W_v.weight": m.W_s.weight,
                         "W_o.weight": m.W_o.weight})
    x = torch.randn(B, T, D, dtype=torch.float64)
    for options in (dict(), dict(causal=True, rope=exact_rope(T, 4)), dict(mask=torch.rand(B, T) < 0.5)):
        torch.testing.assert_close(rca(x, symbols(x), **options), m(x, symbols(x), **options), rtol=0, atol=1e-12)


# ---- shapes ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("Heads", [Attention, RelationalAttention, RelationalCrossAttention])
@pytest.mark.parametrize("form", FORMS)
def test_an_empty_batch_gives_an_empty_batch(form, Heads):
    m, x = Heads(32, 4), torch.zeros(0, 5, 32)
    use(form, m)
    assert m(*((x,) if Heads is Attention else (x, x)), causal=True).shape == (0, 5, 32)


@pytest.mark.parametrize("wrong, word", [
    (dict(n_heads=3), "d_model=16 is not a multiple of 3 heads"), (dict(n_heads=4, n_kv_heads=3), "n_kv_heads=3"),
    (dict(n_heads=4, n_relations=3), "rel_proj_dim"), (dict(n_heads=4, rel_activation="sin"), "choose from identity")])
def test_impossible_shapes_raise_an_error_that_names_them(wrong, word):
    with pytest.raises(ValueError, match=word):
        RelationalAttention(16, **wrong)


@pytest.mark.parametrize("Heads", [RelationalAttention, RelationalCrossAttention])
@pytest.mark.parametrize("n", [1, T - 1, T + 1])
def test_there_must_be_as_many_symbols_as_tokens(n, Heads):
    """One symbol would otherwise be broadcast to all tokens."""
    m, x = Heads(D, 4), torch.randn(B, T, D)
    for symbols in (torch.randn(n, D), torch.randn(B, n, D)):
        with pytest.raises(ValueError, match=f"{n} symbols for {T} tokens"):
            m(x, symbols)


# ---- nothing to attend to --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(0, 5, D), (2, 0, D)])
@pytest.mark.parametrize("form, kind", FORMS_AND_SYMBOLS)
def test_an_empty_batch_and_empty_sequences_give_empty_outputs(form, kind, shape):
    m, x = RelationalAttention(D, 4).double(), torch.randn(shape, dtype=torch.float64)
    use(form, m)
    assert m(x, symbols_of(kind, D, 5)(x)).shape == shape


@pytest.mark.parametrize("form, kind", FORMS_AND_SYMBOLS)
def test_dropout_of_one_leaves_no_message(form, kind):
    m, x = RelationalAttention(D, 4, dropout=1.0).double(), torch.randn(B, T, D, dtype=torch.float64)
    use(form, m)
    assert not m(x, symbols_of(kind, D, T)(x)).any()
