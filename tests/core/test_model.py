"""The Dual Attention Transformer and its language model, in the order of model.py.

Without relational heads it is PyTorch's Transformer. No output depends on a later token, and a cache changes nothing.
"""
from itertools import product

import pytest
import torch
from helpers import (ACTIVATIONS, POSITIONS, SMALL, SYMBOLS, VARIANTS, copy_block, language_model, randomise)
from torch import nn

from attention import sinusoids
from model import MLP, DecoderBlock, DualAttention, EncoderBlock, LanguageModel, Stack, TransformerConfig, make_norm

pytestmark = pytest.mark.usefixtures("fast_form")


def small_config(**options):
    return TransformerConfig(**{**SMALL, **options})


# ---- the parts -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong, words", [
    (dict(n_ra=9, n_heads=8), "n_ra=9.*n_heads=8"), (dict(n_ra=-1), "n_ra=-1"), (dict(n_layers=0), "n_layers=0"),
    (dict(d_model=30), "d_model=30.*n_heads=4"), (dict(d_model=12), "must be even"),
    (dict(position="rop"), "choose from rope.*did you mean rope"), (dict(dropout=1.0), "dropout=1.0"),
    (dict(n_kv_heads=3), "n_kv_heads=3"), (dict(share_qk=True, n_ra=1), "share_qk"),
    (dict(symbol_heads=3), "symbol_heads=3"), (dict(n_relations=3), "rel_proj_dim")], ids=str)
def test_a_configuration_that_cannot_be_built_raises_an_error_of_one_line(wrong, words):
    with pytest.raises(ValueError, match=words) as error:
        small_config(**wrong)
    assert "\n" not in str(error.value)


def test_dual_attention_is_algorithm_1():
    """concat(e, a): each group of heads has its own output projection and its share of d_model."""
    torch.manual_seed(0)
    attention = DualAttention(small_config(n_ra=1))
    x, s = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    out = attention(x, s, causal=True)
    assert attention.sensory.W_o.weight.shape == (12, 12) and attention.relational.W_o.weight.shape == (4, 4)
    assert torch.equal(out[..., :12], attention.sensory(x, causal=True))
    assert torch.equal(out[..., 12:], attention.relational(x, s, causal=True))


def test_swiglu_and_rmsnorm_are_their_formulas():
    mlp, x = MLP(TransformerConfig(d_model=48, activation="swiglu")).double(), torch.randn(3, 48, dtype=torch.float64)
    assert mlp.W_1.out_features == 128                                 # 8/3 d_model
    gate, value = x @ mlp.W_1.weight.T, x @ mlp.W_3.weight.T
    torch.testing.assert_close(mlp(x), (gate / (1 + (-gate).exp()) * value) @ mlp.W_2.weight.T, rtol=0, atol=1e-12)
    norm = randomise(make_norm(small_config(norm="rmsnorm")))
    x = 1e-2 * torch.randn(3, 16, dtype=torch.float64)                 # small, so that eps counts
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("Block", [EncoderBlock, DecoderBlock])
def test_pre_norm_and_post_norm_are_their_formulas(Block):
    """Pre-norm: x + f(norm(x)). Post-norm, as in Algorithms 2 and 3: norm(x + f(x))."""
    torch.manual_seed(0)
    block = randomise(Block(small_config(bias=True)))
    x, s = torch.randn(2, 2, 6, 16, dtype=torch.float64)
    y = torch.randn(2, 8, 16, dtype=torch.float64)
    mask, context_mask = torch.arange(6) < torch.tensor([[6], [4]]), torch.arange(8) < torch.tensor([[8], [5]])
    branches = [(block.norm_attention, lambda x: block.attention(x, s, causal=True, mask=mask))]
    if Block is DecoderBlock:
        branches.append((block.norm_cross, lambda x: block.cross(x, y, mask=context_mask)))
    branches.append((block.norm_mlp, block.mlp))
    context = dict(context=y, context_mask=context_mask) if Block is DecoderBlock else {}
    pre = post = x
    for norm, f in branches:
        pre, post = pre + f(norm(pre)), norm(post + f(post))
    for block.norm_first, expected in ((True, pre), (False, post)):
        out = block(x, s, causal=True, mask=mask, **context)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_symbols_are_computed_from_the_residual_stream_before_the_norm_of_each_block():
    m, blocks, symbols = language_model(), [], []
    m.stack.symbols[0].register_forward_hook(lambda module, args, out: symbols.append((args[0], out)))
    for block in m.stack.blocks:
        block.register_forward_pre_hook(lambda module, args: blocks.append(args[:2]))
    m(torch.randint(13, (2, 7)))
    assert len(blocks) == len(symbols) == 2
    assert all(x is x2 and s is s2 for (x, s), (x2, s2) in zip(blocks, symbols))
    assert not torch.equal(blocks[0][0], blocks[1][0])


@pytest.mark.parametrize("kind", SYMBOLS)
def test_padding_has_no_effect_on_the_tokens(kind):
    torch.manual_seed(0)
    stack = Stack(small_config(symbols=kind)).double().eval()
    x, mask = torch.randn(2, 8, 16, dtype=torch.float64), torch.arange(8) < torch.tensor([[8], [5]])
    torch.testing.assert_close(stack(x, mask=mask)[1, :5], stack(x[1:, :5])[0], rtol=0, atol=1e-12)


def test_the_decoder_attends_to_the_context_that_its_mask_allows():
    torch.manual_seed(0)
    stack = Stack(small_config(position="sinusoidal"), block=DecoderBlock).double().eval()
    x, y = torch.randn(2, 6, 16, dtype=torch.float64), torch.randn(2, 8, 16, dtype=torch.float64)
    mask = torch.arange(8) < torch.tensor([[8], [5]])

    def change(b, j):
        changed = y.clone()
        changed[b, j] += 1
        return (stack(x, causal=True, context=changed, context_mask=mask)
                - stack(x, causal=True, context=y, context_mask=mask))
    assert not change(1, 5).any() and not change(1, 4)[0].any()        # padding; another sequence
    assert change(1, 4)[1].abs().amax(-1).min() > 1e-6                 # a token of the context


# ---- n_ra = 0 --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("norm_first, bias", list(product([True, False], [True, False])))
@pytest.mark.parametrize("activation, position", [*product(ACTIVATIONS, ["learned"]), ("gelu", "sinusoidal")])
def test_without_relational_heads_it_is_the_transformer_of_pytorch(activation, position, norm_first, bias):
    m = language_model(n_ra=0, norm_first=norm_first, bias=bias, activation=activation, position=position)
    names = ["weight", "bias"] if bias else ["weight"]
    layer = nn.TransformerEncoderLayer(16, 4, 64, dropout=0.0, activation=ACTIVATIONS[activation], bias=bias,
                                       norm_first=norm_first, batch_first=True)
    theirs = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16, bias=bias), enable_nested_tensor=False).double().eval()
    with torch.no_grad():
        copied = sum(copy_block(layer, ours, names) for ours, layer in zip(m.stack.blocks, theirs.layers))
        theirs.norm.load_state_dict(m.stack.norm.state_dict())
    assert copied == sum(p.numel() for p in m.stack.blocks.parameters())             # nothing else is in our blocks
    idx = torch.randint(13, (2, 9))
    if position == "learned":
        x = m.embedding(idx) + m.stack.positions.weight[:9]
    else:                                                              # Vaswani et al., 3.4 and 3.5
        x = m.embedding(idx) * 4 + sinusoids(torch.arange(9), 16)
    future = torch.ones(9, 9, dtype=torch.bool).triu(1)
    expected = theirs(x, mask=future) @ m.embedding.weight.T
    torch.testing.assert_close(m(idx)[0], expected, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("norm_first, bias", list(product([True, False], [True, False])))
def test_without_relational_heads_the_decoder_block_is_the_decoder_layer_of_pytorch(norm_first, bias):
    torch.manual_seed(0)
    ours = randomise(DecoderBlock(small_config(n_ra=0, norm_first=norm_first, bias=bias)))
    theirs = nn.TransformerDecoderLayer(16, 4, 64, dropout=0.0, activation="gelu", norm_first=norm_first, bias=bias,
                                        batch_first=True).double()
    copied = copy_block(theirs, ours, ["weight", "bias"] if bias else ["weight"])
    assert copied == sum(p.numel() for p in ours.parameters())
    x, y = torch.randn(2, 6, 16, dtype=torch.float64), torch.randn(2, 8, 16, dtype=torch.float64)
    mask, future = torch.arange(8) < torch.tensor([[8], [5]]), torch.ones(6, 6, dtype=torch.bool).triu(1)
    expected = theirs(x, y, tgt_mask=future, memory_key_padding_mask=~mask)
    torch.testing.assert_close(ours(x, context=y, context_mask=mask, causal=True), expected, rtol=0, atol=1e-10)


def test_a_group_without_heads_has_no_module_and_no_parameters():
    """n_ra = 0: neither relational heads nor symbols. n_ra = n_heads: no sensory heads."""
    m, names = language_model(n_ra=0), [name for name, _ in language_model(n_ra=0).named_parameters()]
    assert len(m.stack.symbols) == 0 and all(block.attention.relational is None for block in m.stack.blocks)
    assert not [name for name in names if "relational" in name or "symbol" in name]
    assert not [name for name, _ in language_model(n_ra=4).named_parameters() if "sensory" in name]


# ---- the language model ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_no_logit_depends_on_a_later_token(options):
    m, idx = language_model(**options), torch.randint(13, (2, 12))
    before = m(idx)[0]
    for t in (1, 6, 11):
        changed = idx.clone()
        changed[:, t] = (idx[:, t] + 1) % 13
        after = m(changed)[0]
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-12)
        assert (after[:, t:] - before[:, t:]).abs().amax(-1).min() > 1e-6            # every later one does depend on it


@torch.no_grad()
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_with_a_cache_filled_in_pieces_the_logits_are_the_same(options):
    m, idx = language_model(**options), torch.randint(13, (2, 12))
    caches = m.new_caches()
    pieces = [m(part, caches=caches)[0] for part in idx.split([5, 1, 4, 2], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), m(idx)[0], rtol=0, atol=1e-10)


@torch.no_grad()
def test_the_cache_keeps_relation_keys_once_for_all_heads():
    m = language_model(n_relations=1, rel_proj_dim=3)
    caches = m.new_caches()
    m(torch.randint(13, (2, 5)), caches=caches)
    shapes = {name: tuple(buffer.shape) for name, buffer in caches[0].buffers.items()}
    each_head = (2, 2, 12, 4)                                          # (B, heads, max_len, d_h)
    assert shapes == dict.fromkeys(["k", "v", "k_attn", "s W_s"], each_head) | {"k_rel": (2, 1, 12, 3)}


def test_the_loss_is_the_mean_cross_entropy_over_counted_targets():
    m, idx = language_model(), torch.randint(13, (2, 6))
    targets = torch.randint(13, (2, 6))
    targets[0, :3] = -1
    logits, loss = m(idx, targets)
    log_p = logits.log_softmax(-1)
    counted = [-log_p[b, t, targets[b, t]] for b in range(2) for t in range(6) if targets[b, t] >= 0]
    torch.testing.assert_close(loss, torch.stack(counted).mean())


@pytest.mark.parametrize("position", POSITIONS)
def test_more_tokens_than_max_len_raise_an_error(position):
    with pytest.raises(ValueError, match="13 tokens, but max_len=12"):
        language_model(position=position)(torch.zeros(1, 13, dtype=torch.long))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_parameter_gets_a_gradient_and_every_option_has_an_effect(options):
    m, default, idx = language_model(**options), language_model(), torch.randint(13, (2, 12))
    m(idx, torch.randint(13, (2, 12)))[1].backward()
    assert [name for name, p in m.named_parameters() if p.grad is None or not p.grad.any()] == []
    if m.cfg != default.cfg:
        ours, theirs = ({name: p.shape for name, p in model.named_parameters()} for model in (m, default))
        assert ours != theirs or not torch.equal(m(idx)[0], default(idx)[0])


def test_a_tiny_batch_can_be_memorised():
    torch.manual_seed(0)
    m, idx = LanguageModel(small_config(d_model=32)), torch.randint(13, (4, 13))
    optimizer = torch.optim.Adam(m.parameters(), lr=1e-2)
    for _ in range(150):
        loss = m(idx[:, :-1], idx[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5                                                  # from log 13 = 2.56


def test_shared_modules_are_counted_once():
    def extra(**options):
        """Parameters that these options add."""
        counts = [sum(p.numel() for p in language_model(**o).parameters()) for o in (options, {})]
        return counts[0] - counts[1]
    assert extra(share_qk=True) == -2 * 2 * 16 * 8                     # W_q and W_k in two layers
    assert extra(symmetric=True) == -2 * 16 * 8                        # W_k_rel in two layers
    assert extra(shared_symbols=False) == 16 * 16 + 16 + 2 * 6 * 16    # W_q with bias, F_lib, S_lib
    assert extra(tie_embeddings=False) == 13 * 16


def test_initial_values_are_those_of_gpt2_and_smaller_where_the_output_joins_the_residual_stream():
    torch.manual_seed(0)
    m = LanguageModel(TransformerConfig(d_model=128, n_layers=8, activation="swiglu", bias=True))
    for name, p in m.named_parameters():
        if name.endswith(("W_o.weight", "W_2.weight")):
            expected = 0.02 / 16 ** 0.5                                # sqrt(2 L), L = 8
        elif name.endswith(("library", "templates")):
            expected = 1.0
        elif p.dim() == 1:
            assert not p.any() or "norm" in name and p.eq(1).all(), name             # biases, norms
            continue
        else:
            expected = 0.02
        assert p.std().item() == pytest.approx(expected, rel=0.1), name


def test_dropout_acts_on_embeddings_branches_heads_and_symbols_in_training_only():
    for options in VARIANTS:
        m, idx = language_model(**options, dropout=0.5), torch.randint(13, (2, 12))
        assert torch.equal(m(idx)[0], m(idx)[0])
    stack, x = Stack(small_config(dropout=0.5)), torch.ones(2, 6, 16)
    block = stack.blocks[0]
    assert block.attention.sensory.dropout == block.attention.relational.dropout == stack.symbols[0].dropout == 0.5
    block.attention.register_forward_hook(lambda module, args, out: torch.zeros_like(out))       # replaces the output
    block.mlp.register_forward_hook(lambda module, args, out: torch.ones_like(out))
    assert set(block(0 * x, 0 * x).unique().tolist()) == {0.0, 2.0}
    stack.blocks, stack.norm = nn.ModuleList(), nn.Identity()
    assert set(stack(x).unique().tolist()) == {0.0, 2.0}               # embeddings
