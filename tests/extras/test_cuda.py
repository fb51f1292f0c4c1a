"""A GPU computes the same as a CPU, with fused kernels. Skipped without CUDA."""
import csv
import json
import math
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import train_lm
import train_relgames
import train_seq2seq
import train_vit
from attention import Attention
from data import images
from extras import blocked
from model import DualAttention, LanguageModel, TransformerConfig, model_config
from relational_attention import RelationalAttention
from symbols import PositionRelativeSymbols, make_symbols

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
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("form, n", [("literal", 150), ("fast", 150), ("fast", 530), ("blocked", 150)])
def test_every_form_computes_the_literal_form_of_a_cpu(form, n, relative, n_kv_heads, causal, monkeypatch):
    """Beyond 512 tokens the fast form sums relative symbols in query blocks."""
    monkeypatch.setattr(blocked, "queries_per_block", lambda *shapes: 64)          # 150 = 64 + 64 + 22
    torch.manual_seed(0)
    m = RelationalAttention(32, 4, total_heads=8, n_relations=3, rel_proj_dim=5, n_kv_heads=n_kv_heads).double()
    symbols = PositionRelativeSymbols(32, 20).double() if relative else None
    x, mask = torch.randn(2, n, 32, dtype=torch.float64), torch.rand(2, n) < 0.7
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


CONFIGS = {**{name: train_lm.Config(**preset, vocab_size=256) for name, preset in train_lm.PRESETS.items()},
           **{name: train_vit.Config(**{k: v[-1] if type(v) is tuple else v for k, v in preset.items()}
                                     | {"data": "FOLDER"}) for name, preset in train_vit.PRESETS.items()},
           "relgames": train_relgames.Config(), "seq2seq": train_seq2seq.Config(),
           "lm": train_lm.Config(vocab_size=256),
           "vit": train_vit.Config()}
TOKENS = {"cifar10": 65, "cifar100": 65, "cifar10_small": 65, "imagenet": 197, "relgames": 10, "seq2seq": 57, "vit": 16,
          "workspace": 16, "sort_of_clevr": 26, "ait_small": 64, "ait_medium": 64, "ait_base": 64}


@pytest.mark.parametrize("name", CONFIGS)
def test_all_heads_of_the_presets_take_fused_kernels(name):
    """PyTorch's own formula, which stores n x n weights, is forbidden: an error if no fused kernel takes the shapes."""
    cfg = replace(model_config(asdict(CONFIGS[name])), n_layers=1)
    attention, n = DualAttention(cfg).to(GPU), TOKENS.get(name, cfg.max_len)
    symbols = make_symbols(replace(cfg, max_len=n)).to(GPU)
    x = torch.randn(2, n, cfg.d_model, device=GPU, requires_grad=True)
    options = dict(causal=name in train_lm.PRESETS or name == "lm")
    if name == "seq2seq":                                              # questions are padded
        options["mask"] = torch.arange(n, device=GPU) < torch.tensor([[n], [n - 9]], device=GPU)
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    with sdpa_kernel(fused), torch.autocast(GPU, torch.bfloat16):
        attention(x, symbols(x), **options).float().sum().backward()
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
    """Twice the tokens take about twice the memory, not four times; 8,192 tokens of width 1024 less than 1 GB."""
    m, grown = RelationalAttention(1024, 8, total_heads=16, dropout=0.1).to(GPU), []
    for n in (4096, 8192):
        x = torch.randn(1, n, 1024, device=GPU)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast(GPU, torch.bfloat16):
            m(x, x, causal=True).sum().backward()
        m.zero_grad()
        grown.append(torch.cuda.max_memory_allocated() - before)
    assert grown[1] < 2.5 * grown[0] and grown[1] < 2 ** 30


def test_generation_with_a_cache_gives_the_same_text():
    torch.manual_seed(0)
    m = LanguageModel(TransformerConfig(vocab_size=13, d_model=32, n_layers=2, n_heads=4, n_ra=2, max_len=16)).to(GPU)
    idx = torch.randint(13, (2, 5), device=GPU)
    assert torch.equal(m.double().generate(idx, 30, temperature=0), m.generate(idx, 30, temperature=0, use_cache=False))


NEEDS_COMPILER = pytest.mark.skipif(not shutil.which("cc"), reason="torch.compile needs a C compiler")
COMPILED = [False, pytest.param(True, marks=NEEDS_COMPILER)]


@pytest.mark.parametrize("form, compiled", [("literal", False), ("fast", False), ("blocked", False),
                                            pytest.param("fast", True, marks=NEEDS_COMPILER)])
def test_a_run_learns_in_bfloat16(tiny, only_run, form, compiled, monkeypatch):
    monkeypatch.setattr(RelationalAttention, "choose_form", lambda self, *shapes: getattr(self, form))
    train_lm.main([*tiny, f"--device={GPU}", f"--compile={compiled}", "--max_steps=40", "--eval_every=20",
                   "--learning_rate=0.01"])
    losses = [float(row["val_loss"]) for row in csv.DictReader(open(only_run() / "log.csv")) if row["val_loss"]]
    assert len(losses) == 3 and losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("micro_batch", [[], ["--micro_batch=1"]])                 # compiled as a whole, and by blocks
def test_train_lm_runs(tiny, only_run, micro_batch, compiled):
    train_lm.main([*tiny, *micro_batch, f"--device={GPU}", f"--compile={compiled}", "--max_steps=4", "--eval_every=2"])
    assert_finished(only_run())


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("script, options", [
    (train_seq2seq, ["--train_size=30", "--val_size=6", "--batch_size=4", "--max_steps=4", "--eval_every=2"]),
    (train_vit, ["--val_size=40", "--batch_size=8", "--max_steps=4", "--eval_every=2", "--cutmix=1"]),
    (train_vit, ["--val_size=40", "--batch_size=8", "--max_steps=4", "--eval_every=2", "--grad_accum=2"]),
    (train_relgames, ["--epochs=2", "--train_size=20", "--test_size=30", "--seed=1", "--batch_size=9", "--workers=1"])])
def test_the_other_scripts_run(script, options, compiled, tmp_path, only_run, monkeypatch):
    """The last batch of train_relgames.py is smaller."""
    for part, n in (("train", 200), ("test", 60)):
        monkeypatch.setitem(images.N_GLYPHS, part, n)
    monkeypatch.setattr(train_seq2seq, "HELD_OUT", 20)
    script.main(["--d_model=16", "--d_ff=16", "--n_layers=1", "--n_heads=2", "--n_ra=1", "--baseline=False",
                 *options, f"--device={GPU}", f"--compile={compiled}", f"--out_dir={tmp_path / 'out'}"])
    assert_finished(only_run())


def assert_finished(folder):
    record = json.loads((folder / "config.json").read_text())
    with open(folder / "log.csv", newline="") as f:
        losses = [float(row["train_loss"]) for row in csv.DictReader(f) if row["train_loss"]]
    assert record["finished"] and losses and all(map(math.isfinite, losses))
