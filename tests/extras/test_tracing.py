"""Models can be compiled, exported, traced and differentiated by torch.func, also with other batches and lengths."""
import pytest
import torch

from model import LanguageModel, Seq2SeqTransformer, TransformerConfig, VisionTransformer

SYMBOLS = ("symbolic", "relative", "positional")
CONFIG = dict(vocab_size=13, d_model=16, n_layers=1, n_heads=4, n_ra=2, n_symbols=5, symbol_heads=2, max_len=160)


def as_language_model(cfg):
    return LanguageModel(cfg)


def as_seq2seq(cfg):
    return Seq2SeqTransformer(cfg)


def as_vision(cfg):
    return VisionTransformer(cfg, image_size=8, patch_size=4, n_classes=3, pool="cls")


def inputs(build, B, T):
    """A batch for a model of `build`; images have one size only."""
    if build is as_vision:
        return (torch.rand(B, 3, 8, 8, dtype=torch.float64),)
    return tuple(torch.randint(1, 13, (B, n)) for n in ((T, T - 2) if build is as_seq2seq else (T,)))


def model_of(build, kind):
    torch.manual_seed(0)
    return build(TransformerConfig(**{**CONFIG, "symbols": kind})).double().eval()


@pytest.mark.parametrize("build, kind", [*((as_language_model, kind) for kind in SYMBOLS), (as_seq2seq, "relative"),
                                         (as_vision, "symbolic")])
def test_a_model_exported_with_one_batch_and_length_serves_others(build, kind):
    """Also lengths for which the model itself takes another form."""
    m, batch, dynamic = model_of(build, kind), inputs(build, 2, 9), torch.export.Dim.DYNAMIC
    shapes = {0: dynamic} if build is as_vision else {0: dynamic, 1: dynamic}
    optional = 1 if build is not as_language_model else 2              # targets, caches: None
    exported = torch.export.export(m, batch, dynamic_shapes=(*[shapes] * len(batch), *[None] * optional)[:len(batch)])
    for B, T in ((2, 9), (3, 14), (5, 150)):
        batch = inputs(build, B, T)
        torch.testing.assert_close(exported.module()(*batch)[0], m(*batch)[0])


@pytest.mark.filterwarnings("ignore")                                 # tracing warns of each branch
@pytest.mark.parametrize("T", [9, 140])
@pytest.mark.parametrize("kind", SYMBOLS)
@pytest.mark.parametrize("build", [as_language_model, as_seq2seq, as_vision])
def test_a_traced_model_serves_other_batches_and_lengths(build, kind, T):
    class Logits(torch.nn.Module):                                     # tracing refuses the None beside the logits
        def __init__(self):
            super().__init__()
            self.model = m

        def forward(self, *inputs):
            return self.model(*inputs)[0]
    m = model_of(build, kind)
    traced = torch.jit.trace(Logits(), inputs(build, 2, T), check_trace=False)
    for B, n in ((2, T), (3, T + 5)):
        batch = inputs(build, B, n)
        torch.testing.assert_close(traced(*batch), m(*batch)[0])


@pytest.mark.parametrize("T", [9, 140])
@pytest.mark.parametrize("kind", SYMBOLS)
def test_torch_func_differentiates_a_model(kind, T):
    m, (idx,) = model_of(as_language_model, kind), inputs(as_language_model, 2, T)
    weights = dict(m.named_parameters())
    gradients = torch.func.grad(lambda w: torch.func.functional_call(m, w, (idx, idx))[1])(weights)
    m(idx, idx)[1].backward()
    for name, p in weights.items():
        torch.testing.assert_close(gradients[name], p.grad)


@pytest.mark.parametrize("build, kind, T", [(as_language_model, "relative", 140), (as_seq2seq, "symbolic", 9),
                                            (as_vision, "positional", 9)])
def test_a_model_compiles_as_one_graph(build, kind, T):
    """fullgraph: a graph break would be an error. The backend aot_eager traces both passes without a C++ compiler."""
    m, batch = model_of(build, kind), inputs(build, 2, T)
    compiled = torch.compile(m, backend="aot_eager", fullgraph=True)
    results = [torch.autograd.grad(f(*batch)[0].square().sum(), list(m.parameters())) for f in (m, compiled)]
    with torch.no_grad():                                              # as in evaluation
        torch.testing.assert_close(compiled(*batch)[0], m(*batch)[0])
    for plain, ours in zip(*results):
        torch.testing.assert_close(plain, ours)
