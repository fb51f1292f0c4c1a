"""Symbols: each retriever against its definition."""
import pytest
import torch

from attention import split_heads
from symbols import PositionalSymbols, PositionRelativeSymbols, SymbolicAttention, sum_symbols


def test_positional_symbols_depend_on_the_position_alone():
    retriever = PositionalSymbols(8, max_len=10)
    x = torch.randn(2, 4, 8)
    assert torch.equal(retriever(x), retriever.library[:4])
    assert torch.equal(retriever(x, start=3), retriever.library[3:7])
    with pytest.raises(ValueError, match="max_len"):
        retriever(x, start=7)


@pytest.mark.parametrize("T, S", [(6, 6), (1, 6), (3, 6), (1, 1)])
@pytest.mark.parametrize("max_distance", [2, 20])
def test_relative_symbols_depend_on_the_offset_alone(T, S, max_distance):
    """sum_j alpha_ij s_{j-i} W_s, where the T queries are the last of the S positions; offsets are clipped."""
    retriever = PositionRelativeSymbols(8, max_distance).double()
    W_s = torch.nn.Linear(8, 6, bias=False).double()                                     # 2 key/value heads of width 3
    alpha = torch.rand(2, 4, T, S, dtype=torch.float64, requires_grad=True)
    i, j = torch.arange(S - T, S)[:, None], torch.arange(S)
    pairs = retriever.library[(j - i).clamp(-max_distance, max_distance) + max_distance]       # (T, S, 8)
    sW = W_s(pairs).unflatten(-1, (2, 3)).repeat_interleave(2, dim=2)                    # (T, S, H, 3)
    expected = torch.einsum("bhij,ijhd->bhid", alpha, sW)
    got = sum_symbols(alpha, split_heads(W_s(retriever.table(T, S))[None], 2), relative=True)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(got)
    for ours, definition in zip(*(torch.autograd.grad((out * weight).sum(), [alpha, retriever.library, W_s.weight])
                                  for out in (got, expected))):
        torch.testing.assert_close(ours, definition, rtol=0, atol=1e-12)


def test_symbolic_attention_is_eq_4_in_each_head():
    retriever = SymbolicAttention(8, n_symbols=5, n_heads=2).double()
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    expected = []
    for rows in (slice(0, 4), slice(4, 8)):
        q = retriever.W_q(x)[..., rows]
        expected.append((q @ retriever.templates[:, rows].T / 4 ** 0.5).softmax(-1) @ retriever.library[:, rows])
    torch.testing.assert_close(retriever(x), torch.cat(expected, -1), rtol=0, atol=1e-12)


def test_symbolic_attention_treats_each_token_alone():
    retriever, x = SymbolicAttention(8, 5, 2), torch.randn(3, 4, 8)
    torch.testing.assert_close(retriever(x)[:, [2]], retriever(x[:, [2]]))


def test_a_frozen_library_stays_as_it_is():
    retriever = SymbolicAttention(8, 5, 2, trainable_symbols=False)
    retriever(torch.randn(1, 3, 8)).sum().backward()
    assert retriever.library.grad is None and retriever.templates.grad is not None


def test_symbolic_dropout_is_off_in_evaluation():
    retriever, x = SymbolicAttention(8, 5, 2, dropout=0.5), torch.randn(1, 3, 8)
    assert not torch.equal(retriever(x), retriever(x))
    retriever.eval()
    assert torch.equal(retriever(x), retriever(x))


def test_libraries_start_as_stated():
    torch.manual_seed(0)
    for library in (PositionalSymbols(64, 100).library, SymbolicAttention(64, 100, 4).library,
                    SymbolicAttention(64, 100, 4).templates):
        assert 0.95 < library.std() < 1.05
    assert PositionRelativeSymbols(64, 50).library.abs().max() <= (6 / (101 + 64)) ** 0.5          # xavier uniform
