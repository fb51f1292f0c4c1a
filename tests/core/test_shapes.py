"""Empty and odd shapes: what PyTorch's own attention returns, or one clear line, the same for all forms."""
import pytest
import torch
from helpers import FORMS_AND_SYMBOLS, POSITIONS, SMALL, SYMBOLS, language_model, randomise, symbols_of, use
from torch import nn

from attention import Attention, attend, attention_mask, attention_weights, rope_table
from model import DualAttention, LanguageModel, Seq2SeqTransformer, Stack, TransformerConfig, VisionTransformer
from relational_attention import RelationalAttention
from symbols import PositionalSymbols, PositionRelativeSymbols, make_symbols

EMPTY = [(0, 5), (0, 1), (3, 0), (0, 0)]
B, H, T, D = 3, 2, 5, 16


def mha(x, **options):
    return nn.MultiheadAttention(D, H, batch_first=True).eval()(x, x, x, **options)[0]


# ---- nothing ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_attention_to_nothing_is_empty_as_in_pytorch(shape):
    x = torch.randn(*shape, D)
    mask = torch.ones(shape, dtype=torch.bool)
    for options in ({}, dict(causal=True), dict(mask=mask), dict(rope=rope_table(torch.arange(shape[1]), D // H))):
        assert Attention(D, H)(x, **options).shape == mha(x).shape == x.shape
    assert Attention(D, H)(torch.randn(shape[0], 4, D), x).shape == (shape[0], 4, D)       # zeros, if x is empty
    assert not Attention(D, H)(torch.randn(3, 4, D), torch.randn(3, 0, D)).any()


@pytest.mark.parametrize("kind", SYMBOLS)
@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("options", [dict(), dict(n_ra=4), dict(n_ra=0), dict(ra_type="rca")], ids=str)
def test_a_dual_attention_layer_of_nothing_is_empty(options, shape, kind):
    cfg = TransformerConfig(**SMALL | dict(symbols=kind) | options)
    x = torch.randn(*shape, D)
    symbols = make_symbols(cfg)(x) if cfg.n_ra else None
    for causal in (False, True):
        assert DualAttention(cfg)(x, symbols, causal=causal).shape == mha(x).shape


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("kind", SYMBOLS)
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_models_of_nothing_have_empty_logits(shape, kind, position):
    m, idx = language_model(symbols=kind, position=position), torch.zeros(shape, dtype=torch.long)
    assert m(idx)[0].shape == (*shape, 13) and m(idx, caches=m.new_caches())[0].shape == (*shape, 13)
    m(idx, idx)[0].sum().backward()                                    # and gradients of zero
    s = Seq2SeqTransformer(TransformerConfig(**SMALL | dict(symbols=kind, position=position)))
    for n in (0, 4):
        assert s(idx, torch.zeros(shape[0], n, dtype=torch.long))[0].shape == (shape[0], n, 13)
    assert s.eval().generate(idx, 3, start=1, end=-1).shape in ((shape[0], 3), (0, 1))


def test_no_images_have_no_classes():
    m = VisionTransformer(TransformerConfig(**SMALL), image_size=8, patch_size=4, n_classes=3)
    assert m(torch.randn(0, 3, 8, 8))[0].shape == (0, 3)


# ---- masks -----------------------------------------------------------------------------------------------------------

WRONG_MASKS = [
    (torch.ones(T, T), "must be boolean"), (torch.ones(T, dtype=torch.bool), "2 or 4 dimensions"),
    (torch.ones(B, T, T, dtype=torch.bool), "2 or 4 dimensions"), (torch.ones(B, T + 1, dtype=torch.bool), r"\(B, S\)"),
    (torch.ones(T, T, dtype=torch.bool), r"pass a \(T, S\) mask as mask\[None, None\]"),
    (torch.ones(B, 1, 1, T + 1, dtype=torch.bool), "broadcast"),
    (torch.ones(B, 1, 3, T, dtype=torch.bool), "broadcast"),
    (torch.ones(2, 1, T, T, dtype=torch.bool), "broadcast"), (torch.ones(B, 3, T, T, dtype=torch.bool), "broadcast")]


@pytest.mark.parametrize("mask, words", WRONG_MASKS, ids=[str(tuple(m.shape)) for m, _ in WRONG_MASKS])
@pytest.mark.parametrize("form, kind", FORMS_AND_SYMBOLS)
def test_a_mask_that_does_not_fit_is_one_clear_line_in_all_forms(form, kind, mask, words):
    x, layer = torch.randn(B, T, D).double(), RelationalAttention(D, H).double()
    use(form, layer)
    for call in (lambda: layer(x, symbols_of(kind, D, T)(x), mask=mask),
                 lambda: Attention(D, H).double()(x, mask=mask)):
        with pytest.raises(ValueError, match=words) as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("form, kind", FORMS_AND_SYMBOLS)
def test_a_square_mask_for_as_many_sequences_as_tokens_must_say_what_it_means(form, kind):
    """As padding, row b says which tokens of sequence b exist; otherwise, which keys query b may attend to."""
    x, layer, causal = torch.randn(T, T, D).double(), RelationalAttention(D, H).double(), torch.ones(T, T).tril().bool()
    use(form, layer)
    symbols = symbols_of(kind, D, T)(x)
    with pytest.raises(ValueError, match=r"mask\[:, None, None\], and which .* as mask\[None, None\]"):
        layer(x, symbols, mask=causal)
    as_padding, as_causal = (layer(x, symbols, mask=m) for m in (causal[:, None, None], causal[None, None]))
    torch.testing.assert_close(as_causal, layer(x, symbols, causal=True), rtol=0, atol=1e-10)
    assert not torch.allclose(as_padding, as_causal)
    q = torch.randn(T, H, T, 8)
    with pytest.raises(ValueError, match="can mean two things"):
        attention_mask(q, q, False, causal)


def test_an_encoder_decoder_takes_padding_of_as_many_questions_as_tokens():
    torch.manual_seed(0)
    m = randomise(Seq2SeqTransformer(TransformerConfig(**SMALL)))
    questions, answers = torch.randint(1, 13, (5, 5)), torch.randint(1, 13, (5, 5))
    questions = questions * torch.ones(5, 5).tril().long()             # lengths 1 to 5
    together = m(questions, answers)[0]
    for i in range(5):
        torch.testing.assert_close(m(questions[i:i + 1, :i + 1], answers[i:i + 1])[0], together[i:i + 1], rtol=0,
                                   atol=1e-10)


@pytest.mark.parametrize("T, S", [(2, 1), (5, 3), (1, 0)])
def test_causal_attention_of_more_queries_than_keys_is_one_clear_line(T, S):
    """The queries are the last of the keys; there is no row for those before the first key."""
    q, k = torch.randn(2, H, T, 8), torch.randn(2, H, S, 8)
    for call in (lambda: attention_weights(q, k, causal=True), lambda: attend(q, k, k, causal=True),
                 lambda: Attention(16, 2)(torch.randn(2, T, 16), torch.randn(2, S, 16), causal=True)):
        with pytest.raises(ValueError, match=f"{T} queries needs at least {T} keys, not {S}"):
            call()


# ---- symbols and tokens ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [0, 1, 4, 6, 700])
@pytest.mark.parametrize("form", ["literal", "fast", "blocked"])
def test_as_many_symbols_as_tokens_are_needed_in_all_forms(form, n):
    x, layer = torch.randn(B, T, D), RelationalAttention(D, H)
    use(form, layer)
    for shape in ((n, D), (B, n, D), (1, n, D)):
        with pytest.raises(ValueError, match=f"{n} symbols for {T} tokens"):
            layer(x, torch.randn(shape))
    assert layer(x, torch.randn(T, D)).shape == layer(x, torch.randn(1, T, D)).shape == x.shape


def test_relational_heads_without_symbols_say_so():
    for symbols in (None, torch.randn(D), torch.randn(1, B, T, D)):
        for layer in (RelationalAttention(D, H), DualAttention(TransformerConfig(**SMALL))):
            with pytest.raises(ValueError, match="need symbols"):
                layer(torch.randn(B, T, D), symbols)


def test_positions_beyond_the_library_are_one_clear_line():
    symbols = PositionalSymbols(D, 4)
    for start, n in ((0, 5), (3, 2), (4, 1)):
        with pytest.raises(ValueError, match="raise max_len"):
            symbols(torch.randn(1, n, D), start)
    assert PositionRelativeSymbols(D, 3).table(0, 0).shape == (0, D)


def test_what_is_no_batch_of_sequences_is_one_clear_line():
    m, image = language_model(), VisionTransformer(TransformerConfig(**SMALL), image_size=8, patch_size=4, n_classes=3)
    s, stack = Seq2SeqTransformer(TransformerConfig(**SMALL)), Stack(TransformerConfig(**SMALL))
    one = torch.zeros(5, dtype=torch.long)
    for call in (lambda: m(one), lambda: m(one[None, None]), lambda: s(one[None], one),
                 lambda: stack(torch.randn(5, D)), lambda: Attention(D, H)(torch.randn(5, D)),
                 lambda: image(torch.randn(3, 8, 8)),
                 lambda: m.generate(one, 3), lambda: LanguageModel(TransformerConfig(**SMALL))(one, one)):
        with pytest.raises(ValueError, match="batch of sequences|idx must be|images of shape"):
            call()
