"""The forms of relational attention: equal to the last digits, however shapes, masks, symbols and heads are drawn."""
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import attention
from extras import blocked
import relational_attention
from attention import Attention, attend, rope_table
from relational_attention import RelationalAttention
from symbols import PositionalSymbols, PositionRelativeSymbols, SymbolicAttention


def choose(generator, *options):
    return options[torch.randint(len(options), (), generator=generator)]


def draw(seed):
    """A module, symbols, an input and how to call it, in float64: anything that is allowed."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    n_kv_heads, groups, d_h, R, p = (choose(g, *options) for options in (
        (1, 2, 3), (1, 2), (2, 4, 6), (None, 1, 5), (None, 1, 3)))
    H, T, B = n_kv_heads * groups, choose(g, 1, 2, 7, 12), choose(g, 1, 3)
    d = H * d_h * choose(g, 1, 2)                                              # a whole layer, or half of one
    m = RelationalAttention(d, H, total_heads=d // d_h, n_relations=R, rel_proj_dim=p or (3 if R else None),
                            n_kv_heads=n_kv_heads, symmetric=choose(g, False, True), bias=choose(g, False, True))
    symbols = choose(g, SymbolicAttention(d, 5, 2), PositionalSymbols(d, T), PositionRelativeSymbols(d, 3)).double()
    mask = choose(g, None, torch.rand(B, T, generator=g) < 0.7, torch.rand(B, H, T, T, generator=g) < 0.5,
                  torch.rand(1, 1, T, T, generator=g) < 0.5)
    x = torch.randn(B, T, d, dtype=torch.float64)
    rope = choose(g, None, rope_table(T, d_h).double())
    return m.double(), symbols, x, dict(causal=choose(g, False, True), mask=mask, rope=rope)


def outputs_and_gradients(form, m, symbols, x, how, monkeypatch):
    """The output of one form, and its gradient (through a fixed random projection) by x and every parameter."""
    monkeypatch.setattr(RelationalAttention, "choose_form", lambda self, *args: getattr(self, form))
    x = x.clone().requires_grad_()
    out = m(x, symbols(x), **how)
    weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    return [out, *torch.autograd.grad((out * weight).sum(), [x, *m.parameters(), *symbols.parameters()])]


def in_blocks_of(rows, monkeypatch, sequences=1):
    """Makes blocks as large as this."""
    monkeypatch.setattr(blocked, "block_size", lambda B, H, R, T, S, device: (min(B, sequences), min(rows, T)))


@pytest.mark.parametrize("rows, sequences", [(1, 1), (3, 2), (128, 1)])
@pytest.mark.parametrize("seed", range(40))
def test_all_forms_are_one(seed, rows, sequences, monkeypatch):
    """120 random settings: outputs and gradients of the forms agree to 1e-10 (sizes are odd, so blocks are uneven)."""
    in_blocks_of(rows, monkeypatch, sequences)
    m, symbols, x, how = draw(seed * 3 + rows)
    literal = outputs_and_gradients("literal", m, symbols, x, how, monkeypatch)
    for form in ("blocked",) if isinstance(symbols, PositionRelativeSymbols) else ("blocked", "fast", "fast on a GPU"):
        if form == "fast on a GPU":
            monkeypatch.setattr(relational_attention, "attend", attention.attend_fused)
        results = outputs_and_gradients(form.split()[0], m, symbols, x, how, monkeypatch)
        for ours, definition in zip(results, literal):
            torch.testing.assert_close(ours, definition, rtol=0, atol=1e-10)


def operands(B=2, H=2, G=1, T=3, S=5, R=2, relative=False):
    """What attend_in_blocks takes, small and in float64."""
    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    v = random(1, G, T + S - 1, 3) if relative else random(B, G, S, 3)
    return random(B, H, T, 4), random(B, G, S, 4), v, random(B, R, T, 2), random(B, R, S, 2)


@pytest.mark.parametrize("causal, masked, dropout, relative, B, sequences", [
    (False, False, 0.0, False, 2, 1), (True, True, 0.0, True, 2, 1), (True, False, 0.4, False, 2, 1),
    (True, False, 0.4, True, 2, 2), (False, True, 0.0, False, 2, 2), (True, True, 0.4, False, 3, 2)])
def test_derivatives_are_those_of_finite_differences(causal, masked, dropout, relative, B, sequences, monkeypatch):
    in_blocks_of(2, monkeypatch, sequences)
    may = torch.rand(B, 1, 3, 5) < 0.6 if masked else None

    def f(*tensors):
        torch.manual_seed(0)                                                   # the same senders drop out each time
        return blocked.attend_in_blocks(*tensors, causal=causal, may=may, dropout=dropout, relative=relative)
    assert torch.autograd.gradcheck(f, operands(B=B, relative=relative))


def test_without_relations_it_is_self_attention():
    q, k, v, _, _ = operands()
    o, m = blocked.attend_in_blocks(q, k, v, causal=True)
    assert m.shape == (2, 2, 3, 0)
    assert torch.autograd.gradcheck(lambda *x: blocked.attend_in_blocks(*x, causal=True)[0], (q, k, v))
    torch.testing.assert_close(o, attend(q, k, v, causal=True), rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("sequences", [1, 2])
def test_dropout_drops_each_weight_with_its_probability_and_keeps_the_mean(sequences, monkeypatch):
    """With v the identity, o is alpha after dropout itself."""
    in_blocks_of(150, monkeypatch, sequences)
    n, p = 300, 0.3
    q, k, v = torch.randn(2, 3, n, 4), torch.randn(2, 3, n, 4), torch.eye(n).expand(2, 3, n, n)
    alpha, _ = blocked.attend_in_blocks(q, k, v)
    dropped, _ = blocked.attend_in_blocks(q, k, v, dropout=p)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], alpha[kept] / (1 - p))
    N = kept.numel()
    assert abs(kept.float().mean() - (1 - p)) < 5 * (p * (1 - p) / N) ** 0.5   # five standard errors
    for dim in (0, 1):                                                         # batch elements and heads drop apart
        a, b = kept.unbind(dim)[:2]
        assert abs((a == b).float().mean() - (1 - 2 * p * (1 - p))) < 0.01
    assert abs((kept[:, :, :150] == kept[:, :, 150:]).float().mean() - (1 - 2 * p * (1 - p))) < 0.01       # and blocks
    assert not torch.equal(dropped, blocked.attend_in_blocks(q, k, v, dropout=p)[0])


def test_each_block_has_a_seed_of_its_own_and_the_backward_pass_the_same_ones(monkeypatch):
    in_blocks_of(2, monkeypatch)
    seeds, drop = [], blocked.drop
    monkeypatch.setattr(blocked, "drop", lambda *args: seeds.append(args[2]) or drop(*args))
    o, _ = blocked.attend_in_blocks(*operands(B=4, T=5), dropout=0.4)
    assert len(set(seeds)) == len(seeds) == 4 * 3
    o.sum().backward()
    assert seeds[:12] == seeds[12:]


@pytest.mark.parametrize("Heads", [Attention, RelationalAttention])
@pytest.mark.parametrize("how", ["plain", "relative", "dropout", "padding"])
def test_memory_is_linear_in_the_length(Heads, how, largest_tensor):
    """No tensor of n x n numbers, forward or backward: not with dropout, relative symbols or a mask either."""
    n = 2048
    m, x = Heads(256, 2, total_heads=4, dropout=0.1 * (how == "dropout")), torch.randn(1, n, 256, requires_grad=True)
    symbols = PositionRelativeSymbols(256, n) if how == "relative" else x
    mask = torch.arange(n)[None] < n - 3 if how == "padding" and Heads is RelationalAttention else None
    with largest_tensor() as largest:
        m(x, *[symbols] * (Heads is RelationalAttention), causal=True, mask=mask).sum().backward()
    assert largest.numel < n * n / 3


@pytest.mark.parametrize("device, B, H, R, T, S, sequences, queries", [
    ("cpu", 1, 4, 4, 257, 257, 1, 257), ("cpu", 8, 4, 4, 1024, 1024, 1, 128), ("cpu", 1, 1, 1, 1000, 1000, 1, 500),
    ("cpu", 100, 4, 4, 128, 128, 8, 128), ("cpu", 100, 4, 4, 129, 129, 1, 129), ("cpu", 100, 4, 0, 512, 512, 2, 128),
    ("cpu", 3, 2, 0, 1, 5000, 3, 1), ("cpu", 4, 8, 64, 2 ** 15, 2 ** 15, 1, 128),
    ("cuda", 8, 4, 4, 1024, 1024, 8, 512), ("cuda", 5000, 8, 8, 300, 300, 54, 100),
    ("cuda", 1, 8, 64, 2 ** 15, 2 ** 15, 1, 16)])
def test_a_block_is_bounded_and_all_have_nearly_one_length(device, B, H, R, T, S, sequences, queries):
    assert blocked.block_size(B, H, R, T, S, torch.device(device)) == (sequences, queries)
    assert -(-T // queries) * queries - T < -(-T // queries)


def test_causal_blocks_skip_the_future(monkeypatch):
    """At 8 blocks it computes 9/16 of the products of n x n, and the counter of PyTorch sees each of them."""
    from torch.utils.flop_counter import FlopCounterMode
    in_blocks_of(128, monkeypatch)
    tensors, counted = operands(B=1, T=1024, S=1024), []
    for causal in (False, True):
        with FlopCounterMode(display=False) as counter:
            o, m = blocked.attend_in_blocks(*tensors, causal=causal)
            (o.sum() + m.sum()).backward()
        counted.append(counter.get_total_flops())
    assert counted[1] / counted[0] == pytest.approx(9 / 16)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_makes_the_same_gradients(dropout, monkeypatch):
    m, x = RelationalAttention(64, 4, dropout=dropout), torch.randn(2, 40, 64, requires_grad=True)
    monkeypatch.setattr(RelationalAttention, "choose_form", lambda self, *args: self.blocked)
    results = []
    for run in (m, lambda x, s: checkpoint(m, x, s, use_reentrant=False)):
        torch.manual_seed(0)
        results.append(torch.autograd.grad(run(x, x).square().sum(), [x, *m.parameters()]))
    for plain, again in zip(*results):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("form", ["fast", "blocked"])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_as_good_as_that_of_self_attention(form, autocast, monkeypatch):
    """Output error in bfloat16, against float64 with the same weights and inputs, relative to the output's size."""
    def error(m, x, *symbols):
        exact = m.double()(x.double(), *(s.double() for s in symbols), causal=True)
        m = m.float() if autocast else m.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = m(x.to(m.W_o.weight.dtype), *(s.to(m.W_o.weight.dtype) for s in symbols), causal=True)
        return ((out - exact).norm() / exact.norm()).item()
    errors = {"self": [], "literal": [], form: []}
    for seed in range(5):
        torch.manual_seed(seed)
        x, s = torch.randn(2, 2, 128, 64).bfloat16().float()
        modules = [Heads(64, 4, total_heads=8).bfloat16().float() for Heads in (Attention, RelationalAttention)]
        errors["self"].append(error(modules[0], x))
        for name in ("literal", form):
            monkeypatch.setattr(RelationalAttention, "choose_form",
                                lambda self, *args: getattr(self, name))
            errors[name].append(error(modules[1], x, s))
    mean = {name: sum(values) / len(values) for name, values in errors.items()}
    assert mean[form] < 1.5 * mean["self"] and mean[form] < mean["literal"], mean


@pytest.mark.parametrize("form", ["literal", "fast", "blocked"])
def test_torch_compile_computes_the_same(form, monkeypatch):
    monkeypatch.setattr(RelationalAttention, "choose_form", lambda self, *args: getattr(self, form))
    m, x = RelationalAttention(64, 4), torch.randn(2, 20, 64, requires_grad=True)
    results = [torch.autograd.grad(run(x, x, causal=True).square().sum(), [x, *m.parameters()])
               for run in (m, torch.compile(m, backend="aot_eager"))]
    for plain, compiled in zip(*results):
        torch.testing.assert_close(plain, compiled)
