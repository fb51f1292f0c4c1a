"""The blocked form computes its definition, and all forms of relational attention are equal."""
import gc

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from attention import Attention, rope_table
from extras import blocked
from extras.blocked import attend_in_blocks
from relational_attention import RelationalAttention
from symbols import PositionalSymbols, PositionRelativeSymbols, SymbolicAttention


def in_blocks_of(rows, monkeypatch):
    """Makes blocks of this many queries."""
    monkeypatch.setattr(blocked, "queries_per_block", lambda H, R, T, S, device: min(rows, T))


def use(form, monkeypatch):
    """Makes all relational attention use this form."""
    monkeypatch.setattr(RelationalAttention, "choose_form", lambda self, *shapes: getattr(self, form))


# ---- the definition --------------------------------------------------------------------------------------------------

def definition(q, k, s, q_rel, k_rel, causal=False, mask=None, relative=False):
    """o_hi = sum_j alpha_hij s_hj and m_hil = sum_j alpha_hij r_lij, written out."""
    (H, T), S = q.shape[1:3], k.size(2)
    k, s = (x.repeat_interleave(H // x.size(1), dim=1) for x in (k, s))
    i, j = torch.arange(S - T, S)[:, None], torch.arange(S)
    allowed = torch.ones(1, 1, T, S, dtype=torch.bool) if mask is None else mask
    allowed = allowed & (j <= i) if causal else allowed
    exp = (torch.einsum("bhid,bhjd->bhij", q, k) / q.size(-1) ** 0.5).exp() * allowed
    alpha = exp / exp.sum(-1, keepdim=True).clamp(min=1e-300)          # fully masked rows: 0
    r = torch.einsum("blip,bljp->blij", q_rel, k_rel) / q_rel.size(-1) ** 0.5
    o = torch.einsum("bhij,hijd->bhid", alpha, s[0][:, j - i + S - 1]) if relative else alpha @ s
    return o, torch.einsum("bhij,blij->bhil", alpha, r)


def inputs(B=2, H=4, G=2, T=3, S=5, R=3, relative=False):
    """Random arguments of attend_in_blocks, small and in float64."""
    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    s = random(1, G, T + S - 1, 4) if relative else random(B, G, S, 4)
    return random(B, H, T, 4), random(B, G, S, 4), s, random(B, R, T, 2), random(B, R, S, 2)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("masked", [None, (3, 1, 1, 9), (1, 1, 7, 9), (3, 4, 7, 9)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_outputs_and_gradients_are_those_of_the_definition(causal, masked, relative, rows, monkeypatch):
    in_blocks_of(rows, monkeypatch)
    torch.manual_seed(0)
    tensors = inputs(B=3, T=7, S=9, relative=relative)
    mask = None if masked is None else torch.rand(masked) < 0.3        # some rows are fully masked
    options = dict(causal=causal, mask=mask, relative=relative)
    weights = torch.randn(3, 4, 7, 4, dtype=torch.float64), torch.randn(3, 4, 7, 3, dtype=torch.float64)
    results = []
    for f in (attend_in_blocks, definition):
        o, m = f(*tensors, **options)
        results.append([o, m, *torch.autograd.grad((o, m), tensors, weights)])
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("causal, masked, dropout, relative", [
    (False, False, 0.0, False), (True, True, 0.0, True), (True, False, 0.4, False), (True, False, 0.4, True),
    (False, True, 0.4, False)])
def test_gradients_are_those_of_finite_differences(causal, masked, dropout, relative, monkeypatch):
    in_blocks_of(2, monkeypatch)
    mask = torch.rand(2, 1, 3, 5) < 0.6 if masked else None

    def f(*tensors):
        torch.manual_seed(0)                                           # the same dropout each time
        return attend_in_blocks(*tensors, causal=causal, mask=mask, dropout=dropout, relative=relative)
    assert torch.autograd.gradcheck(f, inputs(H=2, G=1, R=2, relative=relative))


def test_a_fully_masked_row_gives_zeros_and_finite_gradients():
    tensors = inputs()
    o, m = attend_in_blocks(*tensors, mask=(torch.arange(2) == 0)[:, None, None, None])    # the second sequence
    assert not o[1].any() and not m[1].any() and o[0].all()
    for gradient in torch.autograd.grad(o.sum() + m.sum(), tensors):
        assert gradient.isfinite().all() and not gradient[1].any()


def test_causal_attention_needs_a_key_for_each_query():
    with pytest.raises(ValueError, match="5 queries needs at least 5 keys, not 3"):
        attend_in_blocks(*inputs(T=5, S=3), causal=True)


# ---- all forms are equal ---------------------------------------------------------------------------------------------

def draw(seed):
    """A random module in float64, symbols, an input and further arguments: anything that is allowed."""
    torch.manual_seed(seed)

    def choice(*options):
        return options[torch.randint(len(options), ())]
    B, T, n_kv_heads, group, d_h = choice(1, 3), choice(1, 2, 7, 12), choice(1, 2, 3), choice(1, 2), choice(2, 4, 6)
    H, R, p = n_kv_heads * group, choice(None, 1, 5), choice(None, 1, 3)
    d = H * d_h * choice(1, 2)                                         # these heads are the whole layer, or half of it
    m = RelationalAttention(d, H, total_heads=d // d_h, n_relations=R, rel_proj_dim=p or (3 if R else None),
                            n_kv_heads=n_kv_heads, symmetric=choice(False, True), bias=choice(False, True))
    symbols = choice(SymbolicAttention(d, 5, 2), PositionalSymbols(d, T), PositionRelativeSymbols(d, 3))
    mask = choice(None, torch.rand(B, T) < 0.7, torch.rand(B, H, T, T) < 0.5, torch.rand(1, 1, T, T) < 0.5)
    rope = choice(None, rope_table(torch.arange(T), d_h))
    x = torch.randn(B, T, d, dtype=torch.float64)
    return m.double(), symbols.double(), x, dict(causal=choice(False, True), mask=mask, rope=rope)


@pytest.mark.parametrize("seed", range(60))
def test_all_forms_are_equal(seed, monkeypatch):
    """60 random settings: outputs and gradients with respect to the input and every parameter agree to 1e-10."""
    in_blocks_of((1, 3, 128)[seed % 3], monkeypatch)
    m, symbols, x, options = draw(seed)
    x.requires_grad_()
    results = {}
    for form in ("literal", "blocked", "fast"):
        use(form, monkeypatch)
        out = m(x, symbols(x), **options)
        weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
        gradients = torch.autograd.grad((out * weight).sum(), [x, *m.parameters(), *symbols.parameters()])
        results[form] = [out, *gradients]
    for form in results:
        for ours, expected in zip(results[form], results["literal"]):
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", ["fast", "blocked"])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_as_exact_as_in_self_attention(form, autocast, monkeypatch):
    """The output's error in bfloat16, relative to its size; float64 with the same weights and inputs is exact."""
    def error(m, x, *symbols):
        exact = m.double()(x.double(), *(s.double() for s in symbols), causal=True)
        m = m.float() if autocast else m.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = m(x.to(m.W_o.weight.dtype), *(s.to(m.W_o.weight.dtype) for s in symbols), causal=True)
        return ((out - exact).norm() / exact.norm()).item()
    errors = {"self": 0, "literal": 0, form: 0}
    for seed in range(5):
        torch.manual_seed(seed)
        x, s = torch.randn(2, 2, 128, 64).bfloat16().float()
        modules = [Heads(64, 4, total_heads=8).bfloat16().float() for Heads in (Attention, RelationalAttention)]
        errors["self"] += error(modules[0], x)
        for name in ("literal", form):
            use(name, monkeypatch)
            errors[name] += error(modules[1], x, s)
    assert errors[form] < 1.5 * errors["self"] and errors[form] < errors["literal"], errors


@pytest.mark.parametrize("form", ["literal", "fast", "blocked"])
def test_torch_compile_computes_the_same(form, monkeypatch):
    use(form, monkeypatch)
    m, x = RelationalAttention(16, 2), torch.randn(2, 20, 16, requires_grad=True)
    results = [torch.autograd.grad(run(x, x, causal=True).square().sum(), [x, *m.parameters()])
               for run in (m, torch.compile(m, backend="aot_eager"))]
    for plain, compiled in zip(*results):
        torch.testing.assert_close(plain, compiled)


# ---- dropout ---------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_dropout_drops_each_weight_with_its_probability_and_keeps_the_mean(monkeypatch):
    """With the identity matrix as s, o is alpha after dropout."""
    n, p = 300, 0.3
    in_blocks_of(n // 2, monkeypatch)
    q, k, q_rel, k_rel = torch.randn(2, 3, n, n), torch.randn(2, 3, n, n), *torch.randn(2, 2, 1, n, 1)
    s = torch.eye(n).expand(2, 3, n, n)
    alpha, _ = attend_in_blocks(q, k, s, q_rel, k_rel)
    dropped, _ = attend_in_blocks(q, k, s, q_rel, k_rel, dropout=p)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], alpha[kept] / (1 - p))
    assert abs(kept.float().mean() - (1 - p)) < 5 * (p * (1 - p) / kept.numel()) ** 0.5    # five standard errors
    # sequences, heads and blocks have independent masks, and so has the next call
    independent = 1 - 2 * p * (1 - p)                                  # how often two of them agree
    again, _ = attend_in_blocks(q, k, s, q_rel, k_rel, dropout=p)
    for a, b in ((kept[0], kept[1]), (kept[:, 0], kept[:, 1]), kept.chunk(2, dim=2), (kept, again != 0)):
        assert abs((a == b).float().mean() - independent) < 0.01


def test_m_and_o_have_the_same_dropout_mask():
    """With s_j = k_rel_j and one relation of width 1, both sum the same numbers."""
    q, k, _, q_rel, k_rel = (torch.randn(1, 1, 6, 4, dtype=torch.float64) for _ in range(5))
    q_rel[...], k_rel[..., 1:] = 1, 0
    o, m = attend_in_blocks(q, k, k_rel, q_rel, k_rel, dropout=0.5)
    torch.testing.assert_close(o[..., 0] / 4 ** 0.5, m[..., 0])


def test_the_backward_pass_uses_the_same_seeds_one_for_each_block(monkeypatch):
    in_blocks_of(2, monkeypatch)
    seeds, drop = [], blocked.drop
    monkeypatch.setattr(blocked, "drop", lambda *args: seeds.append((int(args[2]), args[3])) or drop(*args))
    o, _ = attend_in_blocks(*inputs(B=4, T=5), dropout=0.4)
    assert len(set(seeds)) == len(seeds) == 4 * 3
    o.sum().backward()
    assert seeds[:12] == seeds[12:]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_gives_the_same_gradients(dropout, monkeypatch):
    use("blocked", monkeypatch)
    m, x = RelationalAttention(16, 4, dropout=dropout), torch.randn(2, 40, 16, requires_grad=True)
    results = []
    for run in (m, lambda x, s: checkpoint(m, x, s, use_reentrant=False)):
        torch.manual_seed(0)
        results.append(torch.autograd.grad(run(x, x).square().sum(), [x, *m.parameters()]))
    for plain, recomputed in zip(*results):
        assert torch.equal(plain, recomputed)


# ---- memory and time -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("case", ["plain", "relative", "dropout", "padding"])
def test_memory_is_linear_in_the_number_of_tokens(case, largest_tensor, monkeypatch):
    """No tensor has n x n numbers, forward or backward."""
    in_blocks_of(64, monkeypatch)
    n = 1024
    m, x = RelationalAttention(32, 2, dropout=0.1 * (case == "dropout")), torch.randn(1, n, 32, requires_grad=True)
    symbols = PositionRelativeSymbols(32, n) if case == "relative" else x
    mask = torch.arange(n)[None] < n - 3 if case == "padding" else None
    with largest_tensor() as largest:
        m(x, symbols, causal=True, mask=mask).sum().backward()
    assert largest.numel < n * n / 4


def test_no_tensor_outlives_the_call():
    def tensors():
        return {id(x) for x in gc.get_objects() if type(x) is torch.Tensor}
    arguments = inputs()
    before = tensors()
    o, m = attend_in_blocks(*arguments, causal=True, dropout=0.1)
    torch.autograd.grad(o.sum() + m.sum(), arguments)
    del o, m
    assert tensors() <= before


def test_causal_blocks_skip_later_keys(plain_blocks, monkeypatch):
    """With 8 blocks, 9/16 of the products are left, by PyTorch's own count."""
    in_blocks_of(16, monkeypatch)
    tensors, counted = inputs(T=128, S=128), []
    for causal in (False, True):
        with FlopCounterMode(display=False) as counter:
            o, m = attend_in_blocks(*tensors, causal=causal)
            (o.sum() + m.sum()).backward()
        counted.append(counter.get_total_flops())
    assert counted[1] / counted[0] == pytest.approx(9 / 16)
