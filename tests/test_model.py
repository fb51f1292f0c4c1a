"""The models: n_ra = 0 is PyTorch's Transformer, nothing leaks from the future, cached equals uncached."""
from itertools import product

import pytest
import torch
from torch import nn

import model as model_module
from model import DecoderBlock, DualAttention, LanguageModel, Stack, TransformerConfig

SMALL = dict(vocab_size=13, d_model=16, n_layers=2, n_heads=4, n_ra=2, max_len=12, n_symbols=6, symbol_heads=2)
SYMBOLS, POSITIONS = ["symbolic", "relative", "positional"], ["rope", "learned", "sinusoidal"]


def make(**options):
    """A small float64 model in evaluation mode, its weights large enough that everything matters."""
    torch.manual_seed(0)
    m = LanguageModel(TransformerConfig(**{**SMALL, **options})).double().eval()
    with torch.no_grad():
        for p in m.parameters():
            p.normal_(std=0.4) if p.dim() > 1 else p.add_(torch.randn_like(p), alpha=0.1)
    return m


@pytest.mark.parametrize("norm_first, bias, activation", list(product([True, False], [True, False], ["relu", "gelu", "gelu_tanh"])))
def test_without_relational_heads_it_is_the_standard_transformer(norm_first, bias, activation):
    m = make(n_ra=0, norm_first=norm_first, bias=bias, activation=activation, position="learned")
    kind = {"relu": nn.ReLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh")}[activation]
    layer = nn.TransformerEncoderLayer(16, 4, 64, dropout=0.0, activation=kind, norm_first=norm_first, bias=bias,
                                       batch_first=True)
    reference = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16, bias=bias), enable_nested_tensor=False).double().eval()
    copied = 0
    with torch.no_grad():
        for ours, theirs in zip(m.stack.blocks, reference.layers):
            heads = ours.attention.sensory
            pairs = [(theirs.self_attn.out_proj, heads.W_o), (theirs.linear1, ours.mlp.W_1), (theirs.linear2, ours.mlp.W_2),
                     (theirs.norm1, ours.residual_attention.norm), (theirs.norm2, ours.residual_mlp.norm)]
            for name in ["weight", "bias"] if bias else ["weight"]:
                qkv = torch.cat([getattr(W, name) for W in (heads.W_q, heads.W_k, heads.W_v)])
                getattr(theirs.self_attn, "in_proj_" + name).copy_(qkv)
                copied += qkv.numel()
                for to, frm in pairs:
                    getattr(to, name).copy_(getattr(frm, name))
                    copied += getattr(frm, name).numel()
        reference.norm.load_state_dict(m.stack.norm.state_dict())
    assert copied == sum(p.numel() for p in m.stack.blocks.parameters())           # nothing else is in our blocks
    idx = torch.randint(13, (2, 9))
    x = m.embedding(idx) + m.stack.positions.weight[:9]
    future = torch.ones(9, 9, dtype=torch.bool).triu(1)
    expected = reference(x, mask=future) @ m.embedding.weight.T
    torch.testing.assert_close(m(idx)[0], expected, rtol=0, atol=1e-10)


def test_without_relational_heads_nothing_relational_is_left_behind():
    names = [name for name, _ in make(n_ra=0).named_parameters()]
    assert not [name for name in names if "relational" in name or "symbol" in name]
    names = [name for name, _ in make(n_ra=4).named_parameters()]
    assert not [name for name in names if "sensory" in name]


def test_dual_attention_is_the_two_groups_side_by_side():
    """Algorithm 1: concat(e, a), each group with its own output projection and a share of d_model equal to its heads."""
    torch.manual_seed(0)
    attention = DualAttention(TransformerConfig(**{**SMALL, "n_ra": 1}))
    x, s = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    out = attention(x, s, causal=True)
    assert attention.sensory.W_o.weight.shape == (12, 12) and attention.relational.W_o.weight.shape == (4, 4)
    assert torch.equal(out[..., :12], attention.sensory(x, causal=True))
    assert torch.equal(out[..., 12:], attention.relational(x, s, causal=True))


VARIANTS = [dict(symbols=s, position=p) for s, p in product(SYMBOLS, POSITIONS)] + [
    dict(n_ra=0), dict(n_ra=4), dict(symmetric=True), dict(n_kv_heads=1), dict(n_relations=4, rel_proj_dim=3),
    dict(ra_type="rca"), dict(ra_type="rca", symbols="relative"), dict(rel_activation="softmax"), dict(share_qk=True),
    dict(rel_activation="tanh", symbols="relative"), dict(shared_symbols=False), dict(norm_first=False, norm="rmsnorm"),
    dict(activation="swiglu", bias=True), dict(symbols="relative", max_distance=3, n_kv_heads=1)]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_no_output_depends_on_a_later_token(options):
    m, idx = make(**options), torch.randint(13, (2, 12))
    before = m(idx)[0]
    for t in (1, 6, 11):
        changed = idx.clone()
        changed[:, t] = (idx[:, t] + 1) % 13
        after = m(changed)[0]
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-12)
        assert (after[:, t:] - before[:, t:]).abs().amax(-1).min() > 1e-6           # every later one does depend on it


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_cached_and_uncached_generation_give_equal_logits(options, monkeypatch):
    """At every step, far beyond the context length (12); from a prompt that is longer than it, too."""
    m, seen, original = make(**options), [], model_module.sample

    def recording(logits, temperature, top_k):
        seen.append(logits)
        return original(logits, temperature, top_k)
    monkeypatch.setattr(model_module, "sample", recording)
    for prompt_length in (3, 12, 20):
        idx, runs = torch.randint(13, (2, prompt_length)), []
        for use_cache in (True, False):
            seen.clear()
            torch.manual_seed(5)
            runs.append((m.generate(idx, 30, use_cache=use_cache), list(seen)))
        (cached, cached_logits), (uncached, logits) = runs
        assert len(logits) == 30 and cached.shape == (2, prompt_length + 30)
        torch.testing.assert_close(torch.stack(cached_logits), torch.stack(logits), rtol=0, atol=1e-9)
        assert torch.equal(cached, uncached) and torch.equal(cached[:, :prompt_length], idx)


def test_a_cache_may_be_filled_in_pieces_of_any_length():
    m, idx = make(symbols="relative"), torch.randint(13, (2, 12))
    caches, pieces = m.new_caches(), []
    for part in idx.split([5, 1, 4, 2], dim=1):
        pieces.append(m(part, caches=caches)[0])
    torch.testing.assert_close(torch.cat(pieces, 1), m(idx)[0], rtol=0, atol=1e-10)


def test_the_cache_keeps_relation_keys_once_and_not_per_head():
    m = make(n_ra=2, symbols="symbolic")
    caches = m.new_caches()
    m(torch.randint(13, (2, 5)), caches=caches)
    heads = {name: (buffer.size(1), buffer.size(3)) for name, buffer in caches[0].buffers.items()}
    assert heads == {"k": (2, 4), "v": (2, 4), "k_attn": (2, 4), "k_rel": (1, 8), "s W_s": (2, 4)}
    assert all(buffer.size(2) == 12 for buffer in caches[0].buffers.values())       # room for max_len: bounded


def test_generation_obeys_temperature_and_top_k():
    m, idx = make(), torch.randint(13, (1, 4))
    assert torch.equal(m.generate(idx, 8, temperature=0), m.generate(idx, 8, temperature=1.0, top_k=1))
    torch.manual_seed(0)
    likely = set(m(idx)[0][0, -1].topk(3).indices.tolist())
    drawn = {m.generate(idx, 1, temperature=3.0, top_k=3)[0, -1].item() for _ in range(60)}
    assert drawn == likely
    m.train()
    m.generate(idx, 1)
    assert m.training                                                               # as it was before


def test_the_loss_is_the_mean_cross_entropy_over_counted_targets():
    m, idx = make(), torch.randint(13, (2, 6))
    targets = torch.randint(13, (2, 6))
    targets[0, :3] = -1
    logits, loss = m(idx, targets)
    log_p = logits.log_softmax(-1)
    counted = [-log_p[b, t, targets[b, t]] for b in range(2) for t in range(6) if targets[b, t] >= 0]
    torch.testing.assert_close(loss, torch.stack(counted).mean())


def test_more_tokens_than_max_len_are_refused():
    with pytest.raises(ValueError, match="max_len=12"):
        make()(torch.zeros(1, 13, dtype=torch.long))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_parameter_learns_and_the_config_options_take_effect(options):
    m = make(**options)
    m(torch.randint(13, (2, 12)), torch.randint(13, (2, 12)))[1].backward()
    silent = [name for name, p in m.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not silent
    if options != dict(symbols="symbolic", position="rope"):                        # that is the default itself
        ours, default = ({name: p.shape for name, p in mm.named_parameters()} for mm in (m, make()))
        idx = torch.randint(13, (2, 12))
        assert ours != default or not torch.equal(m(idx)[0], make()(idx)[0])


def test_shared_projections_and_shared_symbols_are_shared():
    count = lambda **options: sum(p.numel() for p in make(**options).parameters())  # noqa: E731
    assert count() - count(share_qk=True) == 2 * 2 * 16 * 8                         # two layers' W_q and W_k of one group
    retriever = 16 * 16 + 16 + 2 * 6 * 16                                           # W_q with bias, templates, library
    assert count(shared_symbols=False) - count() == retriever
    assert count() - count(symmetric=True) == 2 * 16 * 8                            # two layers' W_k_rel
    assert count(tie_embeddings=False) - count() == 13 * 16


def test_initialisation_is_gpt2s_with_smaller_residual_projections():
    torch.manual_seed(0)
    m = LanguageModel(TransformerConfig(d_model=256, n_layers=8, activation="swiglu", bias=True))
    for name, p in m.named_parameters():
        if name.endswith(("W_o.weight", "W_2.weight")):
            expected = 0.02 / 16 ** 0.5
        elif name.endswith(("library", "templates")):
            expected = 1.0
        elif p.dim() == 1:
            expected = 0.0
            assert set(p.unique().tolist()) <= {0.0, 1.0}                           # biases, norms
        else:
            expected = 0.02
        assert abs(p.std().item() - expected) < 0.1 * expected + 1e-8, name


def test_a_tiny_batch_can_be_memorised():
    torch.manual_seed(0)
    m = LanguageModel(TransformerConfig(**{**SMALL, "d_model": 32}))
    idx = torch.randint(13, (4, 13))
    optimizer = torch.optim.Adam(m.parameters(), lr=1e-2)
    for _ in range(200):
        loss = m(idx[:, :-1], idx[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5                                                               # from log 13 = 2.56


def test_the_decoder_block_reads_its_context_through_its_mask_and_keeps_causality():
    """Algorithm 3: dual attention, cross-attention to y, MLP."""
    torch.manual_seed(0)
    cfg = TransformerConfig(**{**SMALL, "position": "sinusoidal"})
    stack = Stack(cfg, block=DecoderBlock).double().eval()
    x, y = torch.randn(2, 6, 16, dtype=torch.float64), torch.randn(2, 8, 16, dtype=torch.float64)
    seen = torch.arange(8)[None] < torch.tensor([8, 5])[:, None]
    out = stack(x, causal=True, context=y, context_mask=seen)
    y2 = y.clone()
    y2[1, 5:] += 1                                                                  # padding of the context: no effect
    assert torch.equal(stack(x, causal=True, context=y2, context_mask=seen), out)
    y2[1, 4] += 1                                                                   # a token of the context: an effect
    assert (stack(x, causal=True, context=y2, context_mask=seen)[1] - out[1]).abs().amax(-1).min() > 1e-6
    x2 = x.clone()
    x2[:, 4] += 1
    torch.testing.assert_close(stack(x2, causal=True, context=y, context_mask=seen)[:, :4], out[:, :4], rtol=0, atol=1e-12)


@pytest.mark.parametrize("symbols", SYMBOLS)
def test_padding_in_an_encoder_changes_nothing_for_the_others(symbols):
    torch.manual_seed(0)
    stack = Stack(TransformerConfig(**{**SMALL, "symbols": symbols})).double().eval()
    x = torch.randn(2, 8, 16, dtype=torch.float64)
    mask = torch.arange(8)[None] < torch.tensor([8, 5])[:, None]
    torch.testing.assert_close(stack(x, mask=mask)[1, :5], stack(x[1:, :5])[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("wrong, words", [
    (dict(n_ra=9, n_heads=8), "n_ra=9.*n_heads=8"), (dict(d_model=30), "d_model=30.*n_heads=4"), (dict(n_layers=0), "n_layers"),
    (dict(n_ra=-1), "n_ra"), (dict(position="rop"), "choose from rope"), (dict(dropout=1.0), "dropout"),
    (dict(n_kv_heads=3), "n_kv_heads=3"), (dict(share_qk=True, n_ra=1), "share_qk"), (dict(symbol_heads=3), "symbol_heads"),
    (dict(d_model=12, n_heads=4), "even"), (dict(n_relations=3), "rel_proj_dim")], ids=str)
def test_what_cannot_be_built_is_refused_in_one_line(wrong, words):
    with pytest.raises(ValueError, match=words) as error:
        TransformerConfig(**{**SMALL, **wrong})
    assert "\n" not in str(error.value)
