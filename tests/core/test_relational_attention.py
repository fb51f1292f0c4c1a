"""Relational attention: three transcriptions of Eq. 3 agree, and it has the properties that the paper claims."""
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
    if kind == "any":                                        # any pattern, different for each head; one row sees nobody
        mask = torch.rand(B, 4, T, T, generator=torch.Generator().manual_seed(1)) < 0.6
        mask[0, 1, 2] = False
        return mask
    return None


def turned(vector, place, rope):
    """Rotary position: the feature pairs (c, c + d_h/2) turned by place * 10000^(-2c/d_h)."""
    out, half = vector.clone(), len(vector) // 2
    for c in range(half if rope else 0):
        angle = place * 10000.0 ** (-c / half)
        out[c] = vector[c] * math.cos(angle) - vector[c + half] * math.sin(angle)
        out[c + half] = vector[c + half] * math.cos(angle) + vector[c] * math.sin(angle)
    return out


def eq3_with_loops(m, x, symbols, causal, mask, rope):
    """Eq. 3 read aloud, with the square roots: every sum a loop, nothing shared with the implementation."""
    H, R, p, d_h = m.n_heads, m.n_relations, m.rel_proj_dim, m.W_r.shape[-1]
    out = torch.zeros(*x.shape[:2], H * d_h, dtype=x.dtype)
    for b, i, h in product(range(len(x)), range(x.size(1)), range(H)):
        g = h // (H // m.n_kv_heads)                         # the key/value head that query head h uses
        q = turned(m.W_q(x[b, i])[h * d_h:(h + 1) * d_h], i, rope)
        scores, messages = [], []
        for j in range(x.size(1)):
            if causal and j > i or mask is not None and not (
                    mask[b, j] if mask.dim() == 2 else mask[b, h, i, j]):
                continue
            k = turned(m.W_k(x[b, j])[g * d_h:(g + 1) * d_h], j, rope)
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
def test_loops_literal_and_fast_form_agree(causal, mask_kind, symbols):
    mask = make_mask(mask_kind)
    for n_kv_heads, symmetric, (R, p, bias) in product([None, 2], [False, True], [(None, None, False), (3, 5, True)]):
        rope = symmetric != (n_kv_heads is None)             # with each of the others, not with all of them at once
        torch.manual_seed(0)
        m = RelationalAttention(D, 4, total_heads=4, n_relations=R, rel_proj_dim=p, n_kv_heads=n_kv_heads,
                                symmetric=symmetric, bias=bias).double()
        retriever, x = make_symbols(symbols), torch.randn(B, T, D, dtype=torch.float64)
        table = rope_table(T, D // 4).double() if rope else None
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


def test_weights_sum_to_one_over_those_who_may_be_seen():
    m, x = RelationalAttention(32, 4), torch.randn(2, 6, 32)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    _, alpha, _ = m(x, x, causal=True, mask=mask, need_weights=True)
    torch.testing.assert_close(alpha.sum(-1), torch.ones(2, 4, 6))
    assert alpha.triu(1).abs().max() == 0 and alpha[1, :, :, 4:].abs().max() == 0


@pytest.mark.parametrize("symbols", ["symbolic", "relative", "positional"])
@pytest.mark.parametrize("literal", [False, True])
def test_who_may_see_nobody_receives_nothing_and_sends_no_gradient(symbols, literal):
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
    """An activation acts on r elementwise (softmax: over the senders), and no future token shines through it."""
    m = RelationalAttention(D, 2, rel_activation=activation).double()
    x = torch.randn(1, T, D, dtype=torch.float64)
    plain = RelationalAttention(D, 2).double()
    plain.load_state_dict(m.state_dict())
    out, _, r = m(x, x, causal=True, need_weights=True)
    _, _, r_plain = plain(x, x, causal=True, need_weights=True)
    if activation == "softmax":
        torch.testing.assert_close(r.tril().sum(-1), torch.ones(1, 2, T, dtype=torch.float64))
    else:
        expected = {"identity": r_plain, "relu": r_plain.clamp(min=0), "sigmoid": 1 / (1 + (-r_plain).exp()),
                    "tanh": r_plain.tanh(), "silu": r_plain / (1 + (-r_plain).exp()),
                    "gelu": r_plain * (1 + torch.erf(r_plain / 2 ** 0.5)) / 2, "gelu_tanh": r_plain * (
                        1 + ((2 / torch.pi) ** 0.5 * (r_plain + 0.044715 * r_plain ** 3)).tanh()) / 2}[activation]
        torch.testing.assert_close(r, expected)
    torch.testing.assert_close(m(x, x, causal=True), out)    # the fast path gives way to the literal one
    alpha = m(x, x, causal=True, need_weights=True)[1]
    messages = torch.einsum("brij,hrd->bhijd", r, m.W_r) + m.W_s(x).unflatten(-1, (2, -1)).transpose(1, 2)[:, :, None]
    a = torch.einsum("bhij,bhijd->bihd", alpha, messages).flatten(2)     # a_i = sum_j alpha_ij (r W_r + s W_s)
    torch.testing.assert_close(out, m.W_o(a))
    changed = x.clone()
    changed[:, 3] += 1
    torch.testing.assert_close(m(changed, changed, causal=True)[:, :3], out[:, :3], rtol=0, atol=1e-14)


def test_rope_turns_attention_by_distance_and_leaves_relations_alone():
    q, k = torch.randn(1, 1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 1, 8, dtype=torch.float64)
    rope = rope_table(20, 8).double()

    def score(i, j):                                         # <R_i q, R_j k>, which must depend on i - j alone
        return (rotate(q, rope[:, [i]]) * rotate(k, rope[:, [j]])).sum()
    torch.testing.assert_close(score(3, 1), score(12, 10), rtol=0, atol=1e-5)      # the table is float32
    assert abs(score(3, 1) - score(3, 2)) > 1e-3
    m, x = RelationalAttention(D, 4), torch.randn(1, T, D)
    assert torch.equal(m(x, x, need_weights=True)[2], m(x, x, rope=rope_table(T, 4), need_weights=True)[2])


def heads_with_loops(m, x, values, causal, rope):
    """Eq. 2, every sum a loop: heads of a module with W_q, W_k, W_v, W_o; values[b][i][j] is what j offers to i."""
    H, G = m.n_heads, m.n_kv_heads
    d_h = m.W_q.weight.size(0) // H
    out = torch.zeros(*x.shape[:2], H * d_h, dtype=x.dtype)
    for b, i, h in product(range(len(x)), range(x.size(1)), range(H)):
        rows, shared = slice(h * d_h, (h + 1) * d_h), slice(h // (H // G) * d_h, (h // (H // G) + 1) * d_h)
        q = turned(m.W_q(x[b, i])[rows], i, rope)
        seen = [j for j in range(x.size(1)) if not causal or j <= i]
        weights = [math.exp(sum(q * turned(m.W_k(x[b, j])[shared], j, rope)) / math.sqrt(d_h)) for j in seen]
        out[b, i, rows] = sum(w / sum(weights) * m.W_v(values(b, i, j))[shared] for w, j in zip(weights, seen))
    return m.W_o(out)


@torch.no_grad()
@pytest.mark.parametrize("n_kv_heads, rope, bias", [(4, False, True), (2, True, False), (1, True, True)])
def test_sensory_and_rca_heads_are_eq_2_with_loops(n_kv_heads, rope, bias):
    torch.manual_seed(0)
    x, table = torch.randn(B, T, D, dtype=torch.float64), rope_table(T, D // 4).double() if rope else None
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
def test_attention_dropout_is_for_training_only(Heads, form, symbols, monkeypatch):
    """Of each kind of head on each path: the dropout of one key's weight shows in the output."""
    if form == "fast" and symbols == "relative":
        form = "blocked"                                     # these symbols are no values
    monkeypatch.setattr(RelationalAttention, "choose_form", lambda self, *args: getattr(self, form))
    m, retriever, x = Heads(D, 4, dropout=0.5), make_symbols(symbols).float(), torch.randn(B, T, D)
    s = () if Heads is Attention else (retriever(x),)
    assert not torch.equal(m(x, *s), m(x, *s))
    m.eval()
    assert torch.equal(m(x, *s), m(x, *s))


def test_the_literal_form_drops_symbols_too_and_returns_the_weights_before_dropout():
    m, x = RelationalAttention(D, 4, dropout=0.5), torch.randn(B, T, D)
    with torch.no_grad():
        m.W_r.zero_()                                        # only symbols are left in the message
    (out, alpha, _), (out2, alpha2, _) = m(x, x, need_weights=True), m(x, x, need_weights=True)
    assert not torch.equal(out, out2) and torch.equal(alpha, alpha2)
    torch.testing.assert_close(alpha.sum(-1), torch.ones(B, 4, T))


def test_a_mask_holds_for_a_single_query_too():
    """As in cached decoding: T = 1 query, S keys of which some are padding."""
    q, k, v = torch.randn(B, 4, 1, 3), torch.randn(B, 4, T, 3), torch.randn(B, 4, T, 3)
    mask = make_mask("padding")
    alpha = attention_weights(q, k, causal=True, mask=mask)
    assert alpha[1, ..., 3:].abs().max() == 0
    torch.testing.assert_close(attend(q, k, v, causal=True, mask=mask), alpha @ v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_stays_in_its_type_and_near_the_truth(dtype):
    x = torch.randn(1, 1, 5, 4).to(dtype).transpose(1, 2)
    assert rotate(x, rope_table(5, 4)).dtype == dtype
    q = 50 * torch.ones(1, 1, 2, 64, dtype=dtype)            # <q, k> = 160,000: above the largest float16
    assert attention_weights(q, q).isfinite().all()


def test_memory_grows_linearly_with_the_sequence(largest_tensor):
    """At n = 4096 the fast form makes no tensor of n x n numbers, forward or backward."""
    n = 4096
    m, x = RelationalAttention(512, 4, total_heads=8), torch.randn(1, n, 512, requires_grad=True)
    with largest_tensor() as largest:
        m(x, x, causal=True).sum().backward()
    assert largest.numel < n * n / 2
    n = 256                                                  # the same watch does notice the literal form's n x n
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


RULE = RelationalAttention.choose_form               # before the tests force another


def chosen(n, *, d=64, batch=2, device="cpu", causal=False, masked=False, relative=False, **options):
    """The name of the form that the rule takes for 4 of 8 heads; it looks at shapes, so empty tensors will do."""
    m, q = RelationalAttention(d, 4, total_heads=8, **options), torch.empty(batch, 4, n, d // 8, device=device)
    mask = torch.empty(batch, n, dtype=torch.bool, device=device) if masked else None
    return RULE(m, q, q, PositionRelativeSymbols(d, 3) if relative else None, causal, mask).__name__


@pytest.mark.parametrize("why, n, form", [
    (dict(batch=8), 122, "literal"), (dict(batch=8), 123, "fast"),               # 122^2 8^(1/3) < 280 (8^2 8)^(3/4)
    (dict(batch=8, causal=True), 86, "literal"), (dict(batch=8, causal=True), 87, "fast"),
    ({}, 185, "literal"), ({}, 186, "fast"),                                     # 185^2 * 2 * 8 < 550,000
    ({}, 10 ** 5, "fast"), (dict(causal=True), 10 ** 5, "fast"),
    (dict(d=128), 260, "literal"), (dict(d=128), 261, "blocked"),                # x = 8 * 64 / 8 > 60
    (dict(d=128, causal=True), 183, "literal"), (dict(d=128, causal=True), 184, "fast"),           # half as many
    (dict(d=512), 477, "literal"), (dict(d=512), 478, "blocked"),                # 8 * 477^2 2^(1/3) < 2,300,000
    (dict(d=512, batch=100), 248, "literal"), (dict(d=512, batch=100), 249, "blocked"),
    (dict(d=256, n_relations=12, rel_proj_dim=32), 337, "literal"),              # more relations: fewer tokens are few
    (dict(d=256, n_relations=12, rel_proj_dim=32), 338, "blocked"),
    (dict(relative=True), 190, "blocked"), (dict(dropout=0.1), 190, "fast"),
    (dict(masked=True, causal=True), 190, "fast"), (dict(masked=True), 190, "fast")])
def test_which_form_the_rule_takes(why, n, form):
    assert chosen(n, **why) == form


@pytest.mark.parametrize("why, form", [
    ({}, "fast"), (dict(d=512, batch=64), "blocked"), (dict(d=384, n_relations=2, rel_proj_dim=96), "fast"),
    (dict(dropout=0.1, causal=True), "fast"), (dict(relative=True), "blocked"), (dict(masked=True), "fast"),
    (dict(masked=True, causal=True), "blocked")])
def test_on_a_gpu_it_is_the_fused_kernel_wherever_its_values_are_narrow_enough(why, form):
    assert chosen(1024, device="meta", **why) == chosen(8192, device="meta", **why) == form
    assert chosen(9, device="meta", **why) == ("literal" if form == "blocked" else "fast")


def test_the_form_that_the_rule_takes_is_used_unless_weights_are_wanted(monkeypatch):
    used = []
    for name in ("literal", "fast"):
        original = getattr(RelationalAttention, name)
        monkeypatch.setattr(RelationalAttention, name, lambda *a, name=name, f=original: used.append(name) or f(*a))
    monkeypatch.setattr(RelationalAttention, "choose_form", lambda self, *args: self.fast)
    m, x = RelationalAttention(16, 4), torch.randn(2, 3, 16)
    m(x, x)
    m(x, x, need_weights=True)
    RelationalAttention(16, 4, rel_activation="tanh")(x, x)
    assert used == ["fast", "literal", "literal"]
