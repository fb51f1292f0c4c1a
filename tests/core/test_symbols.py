"""Symbols: each kind against its definition, in the order of symbols.py."""
import pytest
import torch
from helpers import SMALL

from attention import Cache
from model import TransformerConfig
from relational_attention import RelationalAttention
from symbols import (NoSymbols, PositionalSymbols, PositionRelativeSymbols, SymbolicAttention, make_symbols,
                     project_symbols, sum_by_pair)

D = 8


def test_positional_symbols_are_the_row_of_the_position():
    """s_j = S_lib[j]"""
    symbols, x = PositionalSymbols(D, max_len=10), torch.randn(2, 4, D)
    assert torch.equal(symbols(x), symbols.library[:4])
    assert torch.equal(symbols(x, start=3), symbols.library[3:7])
    with pytest.raises(ValueError, match="11 positions, but symbols for 10: raise max_len"):
        symbols(x, start=7)


@pytest.mark.parametrize("T, S", [(6, 6), (1, 6), (3, 6), (1, 1)])
@pytest.mark.parametrize("max_distance", [2, 20])
def test_relative_symbols_are_the_row_of_the_offset(max_distance, T, S):
    """sum_j alpha_ij s_{j-i}, where the T queries are the last of S positions. Offsets are clipped at max_distance."""
    symbols, alpha = PositionRelativeSymbols(D, max_distance).double(), torch.rand(2, 3, T, S, dtype=torch.float64)
    expected = torch.zeros(2, 3, T, D, dtype=torch.float64)
    for i in range(T):
        for j in range(S):
            offset = j - (S - T + i)                                   # query i has position S - T + i
            s = symbols.library[max(-max_distance, min(offset, max_distance)) + max_distance]
            expected[:, :, i] += alpha[:, :, i, [j]] * s
    by_offset = symbols.table(T, S)
    assert by_offset.shape == (T + S - 1, D) and symbols(torch.randn(1, T, D)) is symbols
    torch.testing.assert_close(sum_by_pair(alpha, by_offset.expand(3, -1, -1)), expected, rtol=0, atol=1e-12)


def test_symbolic_attention_is_eq_4_in_each_head():
    """s = softmax(x W_q F_lib^T / sqrt(d_h)) S_lib, with two heads of 4 features."""
    symbols, x = SymbolicAttention(D, n_symbols=5, n_heads=2).double(), torch.randn(3, 4, D, dtype=torch.float64)
    q, F_lib, S_lib = symbols.W_q(x), symbols.templates, symbols.library
    heads = [(q[..., h] @ F_lib[:, h].T / 4 ** 0.5).softmax(-1) @ S_lib[:, h] for h in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(symbols(x), torch.cat(heads, -1), rtol=0, atol=1e-12)


def test_symbolic_attention_treats_each_token_alone():
    symbols, x = SymbolicAttention(D, 5, 2).double(), torch.randn(3, 4, D, dtype=torch.float64)
    torch.testing.assert_close(symbols(x)[1:2, [2]], symbols(x[1:2, [2]]), rtol=0, atol=1e-12)


def test_a_frozen_library_has_no_gradient():
    symbols = SymbolicAttention(D, 5, 2, trainable_symbols=False)
    symbols(torch.randn(1, 3, D)).sum().backward()
    assert symbols.library.grad is None and symbols.templates.grad is not None


def test_symbolic_dropout_acts_in_training_only():
    symbols, x = SymbolicAttention(D, 5, 2, dropout=0.5), torch.randn(1, 3, D)
    assert not torch.equal(symbols(x), symbols(x))
    symbols.eval()
    assert torch.equal(symbols(x), symbols(x))


def test_libraries_start_as_documented():
    """N(0, 1); relative symbols Xavier-uniform."""
    torch.manual_seed(0)
    for library in (PositionalSymbols(64, 100).library, SymbolicAttention(64, 100, 4).library,
                    SymbolicAttention(64, 100, 4).templates):
        assert 0.95 < library.std() < 1.05 and library.mean().abs() < 0.05
    bound = (6 / (101 + 64)) ** 0.5
    assert 0.99 * bound < PositionRelativeSymbols(64, 50).library.abs().max() <= bound


def test_the_configuration_names_the_kind_and_size_of_the_symbols():
    def make(**options):
        return make_symbols(TransformerConfig(**{**SMALL, **options}))
    assert make(symbols="relative").library.shape == (2 * 12 + 1, 16)  # up to max_len by default
    assert make(symbols="relative", max_distance=3).library.shape == (7, 16)
    assert make(symbols="positional").library.shape == (12, 16)
    assert make().library.shape == (6, 16) and make(symbol_heads=4).n_heads == 4
    assert make().library.requires_grad and not make(trainable_symbols=False).library.requires_grad


def test_symbols_are_projected_once_for_each_key_value_head_and_kept_in_a_cache():
    W_s, s, cache = torch.nn.Linear(D, 6), torch.randn(2, 5, D), Cache(max_len=5)    # 2 heads of width 3
    expected = W_s(s).view(2, 5, 2, 3).transpose(1, 2)
    torch.testing.assert_close(project_symbols(s, W_s, 2, T=5), expected)
    with torch.no_grad():
        project_symbols(s[:, :3], W_s, 2, T=3, cache=cache)
        torch.testing.assert_close(project_symbols(s[:, 3:], W_s, 2, T=2, cache=cache), expected)
    for wrong in (s[:, :1], s[0, :4]):
        with pytest.raises(ValueError, match=f"{wrong.size(-2)} symbols for 5 tokens"):
            project_symbols(wrong, W_s, 2, T=5)


def test_without_symbols_the_message_is_the_relations_alone():
    """a_i = sum_j alpha_ij r_ij W_r: the same as with W_s = 0, whatever the symbols are."""
    m, x = RelationalAttention(D, 2).double(), torch.randn(2, 5, D, dtype=torch.float64)
    without = m(x, NoSymbols()(x))
    torch.nn.init.zeros_(m.W_s.weight)
    torch.testing.assert_close(without, m(x, torch.randn(5, D, dtype=torch.float64)), rtol=0, atol=1e-12)
