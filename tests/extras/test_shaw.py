"""Relative positions after Shaw et al. (2018): the two sums, pair by pair, and what is refused."""
import pytest
import torch
from helpers import randomise

from attention import Cache, merge_heads, split_heads
from extras.shaw import ShawAttention
from model import LanguageModel, TransformerConfig
from toolbox.inside import watch
from toolbox.training import simplified
from train_seq2seq import Config


def by_pairs(m, x, allowed):
    """The two equations, one query, key and head at a time: x (T, d_model), allowed (T, T) -> (T, n_heads * d_h)."""
    T, H, D = len(x), m.n_heads, m.max_distance
    q, k, v = (W(x).unflatten(-1, (-1, m.a_K.size(1))) for W in (m.W_q, m.W_k, m.W_v))       # (T, H or G, d_h)
    z = torch.zeros_like(q)
    for i in range(T):
        for h in range(H):
            g = h // (H // m.n_kv_heads)
            senders = [j for j in range(T) if allowed[i, j]]
            row = {j: max(-D, min(D, j - i)) + D for j in senders}
            e = [(q[i, h] * (k[j, g] + m.a_K[row[j]])).sum() / q.size(-1) ** 0.5 for j in senders]
            alpha = torch.stack(e).softmax(0) if senders else []
            for a, j in zip(alpha, senders):
                z[i, h] += a * (v[j, g] + m.a_V[row[j]])
    return m.W_o(z.flatten(1))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("max_distance", [1, 3, 16])                  # below and above the 7 tokens
@torch.no_grad()
def test_output_is_the_sum_over_pairs(causal, max_distance):
    torch.manual_seed(0)
    m = randomise(ShawAttention(16, 4, n_kv_heads=2, max_distance=max_distance, bias=True))
    x, padding = torch.randn(2, 7, 16).double(), torch.tensor([[True] * 7, [False] * 2 + [True] * 4 + [False]])
    past = torch.ones(7, 7).tril().bool() if causal else torch.ones(7, 7).bool()
    out = m(x, causal=causal, mask=padding)
    for b in range(2):
        torch.testing.assert_close(out[b], by_pairs(m, x[b], past & padding[b]), rtol=0, atol=1e-12)
    torch.testing.assert_close(m(x[:1], causal=causal)[0], by_pairs(m, x[0], past), rtol=0, atol=1e-12)


@torch.no_grad()
def test_tokens_in_a_cache_keep_their_distances():
    torch.manual_seed(0)
    m, cache = randomise(ShawAttention(16, 4, max_distance=3)), Cache(9)
    x = torch.randn(2, 9, 16).double()
    parts = [m(part, causal=True, cache=cache) for part in x.split([4, 1, 3, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), m(x, causal=True), rtol=0, atol=1e-12)


def test_relational_heads_beside_it_are_refused():
    with pytest.raises(ValueError, match="position=shaw is for sensory heads, and n_ra=4: give --n_ra=0"):
        TransformerConfig(position="shaw")


@torch.no_grad()
def test_the_recorded_attention_weights_rebuild_the_output():
    torch.manual_seed(0)
    model = randomise(LanguageModel(TransformerConfig(vocab_size=9, d_model=16, n_layers=1, n_heads=2, n_ra=0,
                                                      position="shaw", max_distance=3)))
    inputs, m = [], model.stack.blocks[0].attention.sensory
    m.a_V.zero_()                                                      # then z_i = sum_j alpha_ij v_j
    m.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    with watch(model) as (layer,):
        model(torch.randint(9, (1, 6)))
    v = split_heads(m.W_v(inputs[0]), 2)
    assert m.max_distance == 3
    torch.testing.assert_close(merge_heads(layer.alpha @ v), layer.heads, rtol=0, atol=1e-12)


def test_max_distance_belongs_to_the_model_and_without_shaw_to_relative_symbols():
    assert simplified(Config(n_ra=0, position="shaw", max_distance=5)).max_distance == 5
    assert simplified(Config(n_ra=0, position="rope", max_distance=5)).max_distance is None
