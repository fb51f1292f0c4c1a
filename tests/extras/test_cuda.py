"""A GPU computes the same as a CPU, with fused kernels. Skipped without CUDA."""
import csv
import shutil

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import train_lm
from attention import Attention
from extras import blocked
from model import LanguageModel, TransformerConfig
from relational_attention import RelationalAttention
from symbols import PositionRelativeSymbols

GPU = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def use(form, m):
    """Makes one module use this form."""
    m.choose_form = lambda *shapes: getattr(m, form)


def outputs_and_gradients(m, symbols, x, mask, causal, device, form):
    m, x = m.to(device), x.detach().to(device).requires_grad_()
    use(form, m)
    out = m(x, x if symbols is None else symbols.to(device), causal=causal, mask=mask.to(device))
    parameters = [*m.parameters(), *(() if symbols is None else symbols.parameters())]
    return [t.cpu() for t in (out, *torch.autograd.grad(out.square().sum(), [x, *parameters]))]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n_kv_heads", [1, 4])
@pytest.mark.parametrize("form, relative", [("literal", False), ("fast", False), ("blocked", False), ("blocked", True)])
def test_every_form_computes_what_the_literal_form_computes_on_a_cpu(form, relative, n_kv_heads, causal, monkeypatch):
    monkeypatch.setattr(blocked, "queries_per_block", lambda *shapes: 64)          # 150 = 64 + 64 + 22
    torch.manual_seed(0)
    m = RelationalAttention(32, 4, total_heads=8, n_relations=3, rel_proj_dim=5, n_kv_heads=n_kv_heads).double()
    symbols = PositionRelativeSymbols(32, 20).double() if relative else None
    x, mask = torch.randn(3, 150, 32, dtype=torch.float64), torch.rand(3, 150) < 0.7
    expected = outputs_and_gradients(m, symbols, x, mask, causal, "cpu", "literal")
    for ours, definition in zip(outputs_and_gradients(m, symbols, x, mask, causal, GPU, form), expected):
        torch.testing.assert_close(ours, definition, rtol=1e-9, atol=1e-9)


def test_the_backward_pass_draws_the_same_dropout_mask(monkeypatch):
    monkeypatch.setattr(blocked, "queries_per_block", lambda *shapes: 2)
    tensors = [torch.randn(3, heads, 5, 2, device=GPU, dtype=torch.float64, requires_grad=True)
               for heads in (4, 2, 2, 3, 3)]

    def f(*tensors):
        torch.manual_seed(0)
        return blocked.attend_in_blocks(*tensors, causal=True, dropout=0.4)
    assert torch.autograd.gradcheck(f, tensors)


@pytest.mark.parametrize("Heads", [Attention, RelationalAttention])
def test_long_sequences_use_flash_attention(Heads):
    """All other kernels are forbidden, which raises an error if flash attention does not support these shapes."""
    m, x = Heads(512, 4, total_heads=16).to(GPU), torch.randn(2, 1024, 512, device=GPU, requires_grad=True)
    if Heads is RelationalAttention:
        q = torch.empty(2, 4, 1024, 32, device=GPU)
        assert m.choose_form(q, q) == m.fast
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.autocast(GPU, torch.bfloat16):
        m(x, *[x] * (Heads is RelationalAttention), causal=True).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("form", ["fast", "blocked"])
def test_half_precision_is_as_exact_as_in_self_attention(form):
    """The output's error under bfloat16 autocast, relative to its size: at most 1.5 times that of self-attention."""
    def error(m, x, *symbols):
        with torch.autocast(GPU, torch.bfloat16):
            out = m(x, *symbols, causal=True).double()
        exact = m.double()(x.double(), *(s.double() for s in symbols), causal=True)
        return ((out - exact).norm() / exact.norm()).item()
    ours, its = 0, 0
    for seed in range(5):
        torch.manual_seed(seed)
        x, s = torch.randn(2, 4, 256, 64, device=GPU)
        m = RelationalAttention(64, 4, total_heads=8).to(GPU)
        use(form, m)
        ours, its = ours + error(m, x, s), its + error(Attention(64, 4, total_heads=8).to(GPU), x)
    assert ours < 1.5 * its


@pytest.mark.parametrize("form", ["fast", "blocked"])
def test_a_fully_masked_sequence_gives_zeros_and_finite_gradients(form):
    m, x = RelationalAttention(64, 4).to(GPU), torch.randn(2, 150, 64, device=GPU, requires_grad=True)
    use(form, m)
    with torch.autocast(GPU, torch.bfloat16):
        out = m(x, x, mask=torch.tensor([[True], [False]], device=GPU).expand(2, 150))
    out.float().square().sum().backward()
    assert not out[1].any() and out[0].any() and x.grad.isfinite().all()


def test_memory_is_linear_in_the_number_of_tokens():
    """Twice the tokens take about twice the memory, not four times."""
    m, grown = RelationalAttention(1024, 8, total_heads=16, dropout=0.1).to(GPU), []
    for n in (4096, 8192):
        x = torch.randn(1, n, 1024, device=GPU)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast(GPU, torch.bfloat16):
            m(x, x, causal=True).sum().backward()
        m.zero_grad()
        grown.append(torch.cuda.max_memory_allocated() - before)
    assert grown[1] < 2.5 * grown[0]


def test_generation_with_a_cache_gives_the_same_text():
    torch.manual_seed(0)
    m = LanguageModel(TransformerConfig(vocab_size=13, d_model=32, n_layers=2, n_heads=4, n_ra=2, max_len=16)).to(GPU)
    idx = torch.randint(13, (2, 5), device=GPU)
    assert torch.equal(m.double().generate(idx, 30, temperature=0), m.generate(idx, 30, temperature=0, use_cache=False))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.skipif(
    not shutil.which("cc"), reason="torch.compile needs a C compiler"))])
@pytest.mark.parametrize("form", ["literal", "fast", "blocked"])
def test_a_run_learns_in_bfloat16(tiny, only_run, form, compiled, monkeypatch):
    monkeypatch.setattr(RelationalAttention, "choose_form", lambda self, *shapes: getattr(self, form))
    train_lm.main([*tiny, f"--device={GPU}", f"--compile={compiled}", "--max_steps=40", "--eval_every=20",
                   "--learning_rate=0.01"])
    losses = [float(row["val_loss"]) for row in csv.DictReader(open(only_run() / "log.csv")) if row["val_loss"]]
    assert len(losses) == 3 and losses[-1] < losses[0] - 0.5
