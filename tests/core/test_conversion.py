"""In another precision, on another device, recomputed, exported or compiled, a model stays the same model.

Positions and masks are computed in each forward pass. Nothing is stored that a cast could round, an empty
initialisation could leave undefined, or a traced call could replace by a tensor of its own.
"""
import gc
from dataclasses import replace

import pytest
import torch
from helpers import POSITIONS, SMALL, SYMBOLS, VARIANTS, exact_rope, exact_sinusoids, language_model, use

from model import LanguageModel, Seq2SeqTransformer, TransformerConfig, VisionTransformer

HALF = [torch.float16, torch.bfloat16]


# ---- precision -------------------------------------------------------------------------------------------------------

def rope_of(m, n):
    """The rotary table that a language model gives to its first block, for n tokens."""
    tables = []
    m.stack.blocks[0].register_forward_pre_hook(lambda module, args, kwargs: tables.append(kwargs["rope"]),
                                                with_kwargs=True)
    m(torch.zeros(1, n, dtype=torch.long))
    return tables[0]


def sinusoids_of(m, n):
    """What the first block gets for n zero embeddings: the table alone, in the dtype of the model."""
    inputs = []
    m.stack.blocks[0].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        m.embedding.weight.zero_()
    m(torch.zeros(1, n, dtype=torch.long))
    return inputs[0][0]


def model_in(dtype, by_default, **options):
    """A model of that dtype: converted, or built while it is the default."""
    cfg = TransformerConfig(**{**SMALL, "max_len": 1000, **options})
    if not by_default:
        return LanguageModel(cfg).to(dtype)
    torch.set_default_dtype(dtype)
    return LanguageModel(cfg)


@pytest.fixture
def default_dtype():
    yield
    torch.set_default_dtype(torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("by_default", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_positions_are_exact_in_half_precision(dtype, by_default, default_dtype):
    """bfloat16 has 8 bits: it cannot even count to 1,000. The tables are float32, and rounded once, at their use."""
    cos, sin = rope_of(model_in(dtype, by_default, n_ra=0), 1000)
    for table, exact in zip((cos, sin), exact_rope(1000, 4)):
        assert table.dtype == torch.float32
        torch.testing.assert_close(table.double(), exact, rtol=0, atol=1e-4)
    table = sinusoids_of(model_in(dtype, by_default, n_ra=0, position="sinusoidal"), 1000)
    assert table.dtype == dtype
    torch.testing.assert_close(table.double(), exact_sinusoids(1000, 16), rtol=0, atol=torch.finfo(dtype).eps)


@torch.no_grad()
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("kind", SYMBOLS)
@pytest.mark.parametrize("dtype", HALF)
def test_a_model_in_half_precision_computes_in_it(dtype, kind, position):
    m, idx = language_model(symbols=kind, position=position), torch.randint(13, (2, 12))
    exact = m.to(dtype).double()(idx)[0]                               # with the same, rounded, weights
    logits = m.to(dtype)(idx)[0]
    assert logits.dtype == dtype
    assert (logits - exact).norm() < 20 * torch.finfo(dtype).eps * exact.norm()


# ---- device ----------------------------------------------------------------------------------------------------------

def as_seq2seq(cfg):
    return Seq2SeqTransformer(cfg), (torch.randint(1, 13, (2, 5)), torch.randint(1, 13, (2, 4)))


def as_vision(cfg):
    model = VisionTransformer(cfg, image_size=8, patch_size=4, n_classes=3, pool="cls")
    return model, (torch.rand(2, 3, 8, 8),)


def as_language_model(cfg):
    return LanguageModel(cfg), (torch.randint(13, (2, 9)),)


@torch.no_grad()
@pytest.mark.parametrize("build", [as_language_model, as_seq2seq, as_vision])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_model_built_on_the_meta_device_and_loaded_gives_the_same_logits(options, build):
    cfg = TransformerConfig(**{**SMALL, **options})
    m, inputs = build(cfg)
    with torch.device("meta"):
        empty, _ = build(cfg)
    empty.to_empty(device="cpu")
    for tensor in (*empty.parameters(), *empty.buffers()):             # to_empty leaves them undefined
        tensor.fill_(float("nan"))
    empty.load_state_dict(m.state_dict())
    assert torch.equal(empty.eval()(*inputs)[0], m.eval()(*inputs)[0])


# ---- recompute -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("form", ["literal", "blocked"])
@pytest.mark.parametrize("kind", SYMBOLS)
def test_recompute_changes_no_loss_and_no_gradient(kind, form):
    """Activation checkpointing runs each block again in the backward pass, with the same dropout masks."""
    m, idx, calls = language_model(symbols=kind, dropout=0.2).train(), torch.randint(13, (2, 12)), []
    use(form, m)
    m.stack.blocks[0].mlp.register_forward_hook(lambda *args: calls.append(1))
    results = []
    for recompute in (False, True):
        m.stack.cfg = replace(m.cfg, recompute=recompute)
        torch.manual_seed(3)
        loss = m(idx, idx)[1]
        results.append([loss, *torch.autograd.grad(loss, list(m.parameters()))])
    assert len(calls) == 1 + 2
    for plain, recomputed in zip(*results):
        assert torch.equal(plain, recomputed)


# ---- tracing ---------------------------------------------------------------------------------------------------------

def assert_causal_and_trainable(m, idx, expected):
    """An ordinary call gives the expected logits, none of which depends on a later token, and has gradients."""
    torch.testing.assert_close(m(idx)[0], expected, rtol=0, atol=1e-12)
    changed = idx.clone()
    changed[:, 5] = (idx[:, 5] + 1) % 13
    torch.testing.assert_close(m(changed)[0][:, :5], expected[:, :5], rtol=0, atol=1e-12)
    assert not torch.equal(m(changed)[0][:, 5:], expected[:, 5:])
    m(idx, idx)[1].backward()
    assert all(p.grad.isfinite().all() for p in m.parameters())


@pytest.mark.parametrize("kind", SYMBOLS)
def test_export_leaves_no_tensor_behind(kind):
    m, idx = language_model(symbols=kind), torch.randint(13, (2, 9))
    expected = m(idx)[0].detach()
    exported = torch.export.export(m, (idx,))
    assert_causal_and_trainable(m, idx, expected)
    torch.testing.assert_close(exported.module()(idx)[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", SYMBOLS)
def test_compile_leaves_no_tensor_behind(kind):
    m, idx = language_model(symbols=kind), torch.randint(13, (2, 9))
    expected = m(idx)[0].detach()
    torch.testing.assert_close(torch.compile(m, backend="aot_eager")(idx)[0], expected, rtol=0, atol=1e-12)
    assert_causal_and_trainable(m, idx, expected)


@pytest.mark.parametrize("kind", SYMBOLS)
def test_a_model_that_was_called_in_inference_mode_can_be_trained(kind):
    m, idx = language_model(symbols=kind), torch.randint(13, (2, 9))
    with torch.inference_mode():
        expected = m(idx)[0]
    assert_causal_and_trainable(m, idx, expected.clone())


@torch.no_grad()
@pytest.mark.parametrize("kind", SYMBOLS)
def test_a_forward_pass_leaves_no_tensor_behind(kind):
    def tensors():
        gc.collect()
        return {id(x) for x in gc.get_objects() if type(x) is torch.Tensor}
    m, idx = language_model(symbols=kind), torch.randint(13, (2, 12))
    before = tensors()
    for n in (12, 7):
        m(idx[:, :n])
    assert tensors() <= before


# ---- another device --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("build", [as_language_model, as_seq2seq, as_vision])
def test_a_model_on_the_meta_device_gives_the_shapes_of_its_logits(build):
    with torch.device("meta"):
        m, inputs = build(TransformerConfig(**SMALL))
        assert m(*inputs)[0].is_meta
