"""The models: n_ra = 0 is PyTorch's Transformer, nothing leaks from the future, a cache changes nothing."""
import math
from itertools import product

import pytest
import torch
from torch import nn

from attention import rope_table, sinusoids
from model import MLP, DecoderBlock, DualAttention, LanguageModel, Stack, TransformerConfig

SMALL = dict(vocab_size=13, d_model=16, n_layers=2, n_heads=4, n_ra=2, max_len=12, n_symbols=6, symbol_heads=2)
SYMBOLS, POSITIONS = ["symbolic", "relative", "positional"], ["rope", "learned", "sinusoidal"]

pytestmark = pytest.mark.usefixtures("fast_form")


def make(**options):
    """A small float64 model in evaluation mode, its weights large enough that everything matters."""
    torch.manual_seed(0)
    m = LanguageModel(TransformerConfig(**{**SMALL, **options})).double().eval()
    with torch.no_grad():
        for p in m.parameters():
            p.normal_(std=0.4) if p.dim() > 1 else p.add_(torch.randn_like(p), alpha=0.1)
    return m


KINDS = {"relu": nn.ReLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh"), "silu": nn.SiLU()}


def copy_attention(theirs, ours, names):
    """Weights of our Attention into nn.MultiheadAttention; returns how many."""
    numel = 0
    for name in names:
        qkv = torch.cat([getattr(W, name) for W in (ours.W_q, ours.W_k, ours.W_v)])
        getattr(theirs, "in_proj_" + name).copy_(qkv)
        getattr(theirs.out_proj, name).copy_(getattr(ours.W_o, name))
        numel += qkv.numel() + getattr(ours.W_o, name).numel()
    return numel


def copy_all(pairs, names):
    for theirs, ours in pairs:
        for name in names:
            getattr(theirs, name).copy_(getattr(ours, name))
    return sum(getattr(ours, name).numel() for _, ours in pairs for name in names)


@pytest.mark.parametrize("position", ["learned", "sinusoidal"])
@pytest.mark.parametrize("norm_first, bias, activation", list(product([True, False], [True, False], KINDS)))
def test_without_relational_heads_it_is_the_standard_transformer(norm_first, bias, activation, position):
    m = make(n_ra=0, norm_first=norm_first, bias=bias, activation=activation, position=position)
    kind, names = KINDS[activation], ["weight", "bias"] if bias else ["weight"]
    layer = nn.TransformerEncoderLayer(16, 4, 64, dropout=0.0, activation=kind, norm_first=norm_first, bias=bias,
                                       batch_first=True)
    reference = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16, bias=bias), enable_nested_tensor=False).double().eval()
    copied = 0
    with torch.no_grad():
        for ours, theirs in zip(m.stack.blocks, reference.layers):
            copied += copy_attention(theirs.self_attn, ours.attention.sensory, names)
            copied += copy_all([(theirs.linear1, ours.mlp.W_1), (theirs.linear2, ours.mlp.W_2),
                                (theirs.norm1, ours.norm_attention),
                                (theirs.norm2, ours.norm_mlp)], names)
        reference.norm.load_state_dict(m.stack.norm.state_dict())
    assert copied == sum(p.numel() for p in m.stack.blocks.parameters())           # nothing else is in our blocks
    idx = torch.randint(13, (2, 9))
    if position == "learned":
        x = m.embedding(idx) + m.stack.positions.weight[:9]
    else:                                                                           # Vaswani et al., 3.4 and 3.5
        table = torch.tensor([[(math.cos if c % 2 else math.sin)(t / 10000 ** (c // 2 * 2 / 16)) for c in range(16)]
                              for t in range(9)])
        x = m.embedding(idx) * 4 + table
    future = torch.ones(9, 9, dtype=torch.bool).triu(1)
    expected = reference(x, mask=future) @ m.embedding.weight.T
    tolerance = 1e-10 if position == "learned" else 1e-4                            # our table of sinusoids is float32
    torch.testing.assert_close(m(idx)[0], expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("norm_first, bias", list(product([True, False], [True, False])))
@torch.no_grad()
def test_without_relational_heads_the_decoder_block_is_pytorchs(norm_first, bias):
    """Algorithm 3: self-attention, cross-attention, MLP, in this order and each with its residual and norm."""
    torch.manual_seed(0)
    cfg = TransformerConfig(**{**SMALL, "n_ra": 0, "norm_first": norm_first, "bias": bias})
    names = ["weight", "bias"] if bias else ["weight"]
    ours = DecoderBlock(cfg).double()
    for p in ours.parameters():
        p.add_(torch.randn_like(p), alpha=0.3)
    theirs = nn.TransformerDecoderLayer(16, 4, 64, dropout=0.0, activation="gelu", norm_first=norm_first, bias=bias,
                                        batch_first=True).double()
    copied = copy_attention(theirs.self_attn, ours.attention.sensory, names)
    copied += copy_attention(theirs.multihead_attn, ours.cross, names)
    copied += copy_all([(theirs.linear1, ours.mlp.W_1), (theirs.linear2, ours.mlp.W_2),
                        (theirs.norm1, ours.norm_attention), (theirs.norm2, ours.norm_cross),
                        (theirs.norm3, ours.norm_mlp)], names)
    assert copied == sum(p.numel() for p in ours.parameters())
    x, y = torch.randn(2, 6, 16, dtype=torch.float64), torch.randn(2, 8, 16, dtype=torch.float64)
    seen, future = torch.arange(8)[None] < torch.tensor([8, 5])[:, None], torch.ones(6, 6, dtype=torch.bool).triu(1)
    expected = theirs(x, y, tgt_mask=future, memory_key_padding_mask=~seen)
    torch.testing.assert_close(ours(x, context=y, context_mask=seen, causal=True), expected, rtol=0, atol=1e-10)


def test_swiglu_and_rmsnorm_are_their_formulas():
    mlp, x = MLP(TransformerConfig(d_model=48, activation="swiglu")).double(), torch.randn(3, 48, dtype=torch.float64)
    assert mlp.W_1.out_features == 128                                              # 8/3 d_model
    gate, value = x @ mlp.W_1.weight.T, x @ mlp.W_3.weight.T
    torch.testing.assert_close(mlp(x), (gate / (1 + (-gate).exp()) * value) @ mlp.W_2.weight.T, rtol=0, atol=1e-12)
    m = make(norm="rmsnorm")
    x = 1e-2 * torch.randn(3, 16, dtype=torch.float64)                              # small, so that eps counts
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * m.stack.norm.weight
    torch.testing.assert_close(m.stack.norm(x), expected, rtol=0, atol=1e-12)


def test_symbols_are_computed_from_the_residual_stream_before_each_blocks_norm():
    m, entering, retrieved = make(), [], []
    m.stack.symbols[0].register_forward_hook(lambda module, args, out: retrieved.append((args[0], out)))
    for block in m.stack.blocks:
        block.register_forward_pre_hook(lambda module, args: entering.append(args[:2]))
    m(torch.randint(13, (2, 7)))
    assert len(entering) == len(retrieved) == 2
    assert all(x is x2 and s is s2 for (x, s), (x2, s2) in zip(entering, retrieved))
    assert not torch.equal(entering[0][0], entering[1][0])


def test_dropout_acts_on_embeddings_branches_heads_and_symbols_in_training_only():
    cfg = TransformerConfig(**{**SMALL, "dropout": 0.5})
    for options in VARIANTS:
        m, idx = make(**options, dropout=0.5), torch.randint(13, (2, 12))
        assert torch.equal(m(idx)[0], m(idx)[0])                                    # make() left it in evaluation mode
    stack = Stack(cfg)
    x, heads = torch.ones(2, 6, 16), stack.blocks[0].attention
    assert heads.sensory.dropout == heads.relational.dropout == stack.symbols[0].dropout == stack.dropout.p == 0.5
    block = stack.blocks[0]
    block.attention.register_forward_hook(lambda module, args, out: 0 * out)        # replaces the output
    block.mlp.register_forward_hook(lambda module, args, out: torch.ones_like(out))
    assert set(block(0 * x, 0 * x).unique().tolist()) == {0.0, 2.0}
    stack.blocks, stack.norm = nn.ModuleList(), nn.Identity()
    assert set(stack(x).unique().tolist()) == {0.0, 2.0}


def test_options_of_the_symbols_reach_them():
    library = lambda **options: make(**options).stack.symbols[0].library            # noqa: E731
    assert library(symbols="relative").shape == (2 * 12 + 1, 16)                    # up to max_len by default
    assert library(symbols="relative", max_distance=3).shape == (7, 16)
    assert library(symbols="positional").shape == (12, 16) and library().shape == (6, 16)
    assert library().requires_grad and not library(trainable_symbols=False).requires_grad
    assert make(symbol_heads=4).stack.symbols[0].n_heads == 4


def test_without_relational_heads_nothing_relational_is_left_behind():
    names = [name for name, _ in make(n_ra=0).named_parameters()]
    assert not [name for name in names if "relational" in name or "symbol" in name]
    names = [name for name, _ in make(n_ra=4).named_parameters()]
    assert not [name for name in names if "sensory" in name]


def test_dual_attention_is_the_two_groups_side_by_side():
    """Algorithm 1: concat(e, a), each group with its own output projection and a share of d_model."""
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


def test_a_cache_can_be_filled_in_pieces_of_any_length():
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
    assert heads == {"k": (2, 4), "v": (2, 4), "k_attn": (2, 4), "k_rel": (2, 4), "s W_s": (2, 4)}
    assert all(buffer.size(2) == 12 for buffer in caches[0].buffers.values())       # max_len positions


@pytest.mark.parametrize("symbols", SYMBOLS)
def test_tracing_leaves_no_tensor_behind(symbols):
    """After torch.export the ordinary model computes what it did before: no mask outlives the call that made it."""
    m, idx = make(symbols=symbols), torch.randint(13, (2, 9))
    before = m(idx)[0]
    torch.export.export(m, (idx,))
    torch.testing.assert_close(m(idx)[0], before, rtol=0, atol=0)


@pytest.mark.parametrize("position", POSITIONS)
def test_positions_are_computed_in_float32_whatever_the_default_dtype(position):
    """Half precision cannot tell 1000 positions apart: tables are computed in float32 and cast where they are used."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        cos, sin = rope_table(torch.arange(1024), 64)
        table = sinusoids(torch.arange(1024), 64)
    finally:
        torch.set_default_dtype(torch.float32)
    assert cos.dtype == sin.dtype == table.dtype == torch.float32
    assert cos.diff(dim=0).abs().amax(-1).min() > 1e-3 and table.diff(dim=0).abs().amax(-1).min() > 1e-3
    m = make(position=position)
    assert not [name for name, _ in m.named_buffers()]                              # nothing that a cast could round


@pytest.mark.parametrize("options", [dict(position=p) for p in POSITIONS] + [dict(symbols="relative")], ids=str)
def test_a_model_built_on_the_meta_device_and_loaded_is_the_model(options):
    m, idx = make(**options).float(), torch.randint(13, (2, 9))
    with torch.device("meta"):
        empty = LanguageModel(m.cfg)
    empty.to_empty(device="cpu").load_state_dict(m.state_dict())
    torch.testing.assert_close(empty.eval()(idx)[0], m(idx)[0], rtol=0, atol=0)


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
    assert count() - count(share_qk=True) == 2 * 2 * 16 * 8                         # W_q, W_k in two layers
    retriever = 16 * 16 + 16 + 2 * 6 * 16                                           # W_q with bias, templates, library
    assert count(shared_symbols=False) - count() == retriever
    assert count() - count(symmetric=True) == 2 * 16 * 8                            # two layers' W_k_rel
    assert count(tie_embeddings=False) - count() == 13 * 16


def test_initialisation_is_gpt2s_with_smaller_residual_projections():
    torch.manual_seed(0)
    m = LanguageModel(TransformerConfig(d_model=128, n_layers=8, activation="swiglu", bias=True))
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


def test_the_decoder_block_attends_to_its_context_under_the_mask_and_stays_causal():
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
    torch.testing.assert_close(stack(x2, causal=True, context=y, context_mask=seen)[:, :4], out[:, :4],
                               rtol=0, atol=1e-12)


@pytest.mark.parametrize("symbols", SYMBOLS)
def test_padding_in_an_encoder_has_no_effect_on_the_tokens(symbols):
    torch.manual_seed(0)
    stack = Stack(TransformerConfig(**{**SMALL, "symbols": symbols})).double().eval()
    x = torch.randn(2, 8, 16, dtype=torch.float64)
    mask = torch.arange(8)[None] < torch.tensor([8, 5])[:, None]
    torch.testing.assert_close(stack(x, mask=mask)[1, :5], stack(x[1:, :5])[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("wrong, words", [
    (dict(n_ra=9, n_heads=8), "n_ra=9.*n_heads=8"), (dict(d_model=30), "d_model=30.*n_heads=4"),
    (dict(n_layers=0), "n_layers"),
    (dict(n_ra=-1), "n_ra"), (dict(position="rop"), "choose from rope"), (dict(dropout=1.0), "dropout"),
    (dict(n_kv_heads=3), "n_kv_heads=3"), (dict(share_qk=True, n_ra=1), "share_qk"),
    (dict(symbol_heads=3), "symbol_heads"),
    (dict(d_model=12, n_heads=4), "even"), (dict(n_relations=3), "rel_proj_dim")], ids=str)
def test_what_cannot_be_built_is_refused_in_one_line(wrong, words):
    with pytest.raises(ValueError, match=words) as error:
        TransformerConfig(**{**SMALL, **wrong})
    assert "\n" not in str(error.value)
