"""Grader of assignment a2, Symbols. README.md has the tasks of variant 1.

Variant 2: positions from the end; no symbol beyond D; scores divided by d_h; other measures; a sharper cure.
"""
import math
from functools import partial

import torch

from assignments.a2.definitions import (Memory, check_gradients, given, gradients, number_of, positional, relative,
                                        spread_of, summed, symbols_of, weights_of)
from assignments.grading import check, right, task
from assignments.measure import check_operations

ALLOWED = {"math", "torch"}
VARIANTS = (1, 2)

T1, T2, T3, T4 = "1 positional", "2 relative", "3 relative sum", "4 symbolic attention"
T5, T6, T7 = "5 measures", "6 why nearly one symbol", "7 a cure"
SHAPES = [(2, 2, 1), (3, 3, 1), (4, 4, 6), (2, 5, 2), (1, 6, 3), (3, 4, 0)]      # T, n, D: from the smallest


def rights(answers, variant):
    """The earlier functions, right ones, for a task that builds on them."""
    return right(answers, effective_number=partial(number_of, variant=variant), symbolic_symbols=symbols_of,
                 spread=partial(spread_of, variant=variant), symbol_weights=partial(weights_of, variant=variant))


def normal(*shape, std=1.0):
    return std * torch.randn(*shape, dtype=torch.float64)


def uniform(low, high):
    return float(torch.empty(1).uniform_(low, high))


# 1. Positional symbols

def masks():
    return [torch.tensor([[True, True]]), torch.tensor([[False, True, True]]),
            torch.tensor([[True, True, False, True, True], [False, False, True, True, False], [False] * 5])]


@task(T1, points=5)
def test_the_position_counts_tokens_and_padding_gets_zeros(answers, variant):
    library = normal(7, 3)
    for mask in masks():
        what = f"positional_symbols, mask {mask.int().tolist()}, a library of 7 rows"
        with given(what):
            check(answers.positional_symbols(library, mask), positional(library, mask, variant), what)
    check_operations(lambda B, n: answers.positional_symbols(normal(n, 3), torch.ones(B, n).bool()),
                     "positional_symbols")


@task(T1, points=3)
def test_a_row_learns_from_the_tokens_that_use_it(answers, variant):
    for mask in masks():
        check_gradients(f"positional_symbols, mask {mask.int().tolist()}, 5 rows", ["library"],
                        lambda s: answers.positional_symbols(s, mask), lambda s: positional(s, mask, variant),
                        normal(5, 3))


@task(T1, points=2)
def test_too_many_tokens_raise_value_error(answers, variant):
    try:
        answers.positional_symbols(normal(2, 3), torch.ones(1, 3).bool())
    except ValueError:
        pass
    except IndexError:
        raise AssertionError("positional_symbols, 3 tokens, 2 rows: expected ValueError, found IndexError") from None
    else:
        raise AssertionError("positional_symbols, 3 tokens, 2 rows: expected ValueError, found a result")
    what = "positional_symbols, mask [[0, 1, 0, 1]], a library of 2 rows: padding needs no rows"
    with given(what):
        longer = torch.tensor([[False, True, False, True]])            # two tokens fit into two rows
        check(answers.positional_symbols(normal(2, 3), longer).shape, (1, 4, 3), f"{what}; the shape")


# 2. Position-relative symbols

@task(T2, points=7)
def test_the_symbol_is_that_of_the_sender_relative_to_the_receiver(answers, variant):
    for T, n, D in SHAPES:
        library = normal(2 * D + 1, 3)
        what = f"relative_symbols, T = {T}, n = {n}, D = {D}: [i, j] belongs to the offset j - (n - T + i)"
        with given(what):
            check(answers.relative_symbols(library, T, n), relative(library, T, n, variant), what)
    check_operations(lambda B, n: answers.relative_symbols(normal(7, 3), n, n), "relative_symbols, T = n")


@task(T2, points=3)
def test_a_row_learns_from_the_pairs_that_use_it(answers, variant):
    for T, n, D in SHAPES:
        check_gradients(f"relative_symbols, T = {T}, n = {n}, D = {D}", ["library"],
                        lambda s: answers.relative_symbols(s, T, n), lambda s: relative(s, T, n, variant),
                        normal(2 * D + 1, 3))


# 3. Their sum in little memory

@task(T3, points=8)
def test_the_relative_sum_is_its_definition(answers, variant):
    for T, n, D in SHAPES:
        alpha, library = normal(2, T, n).softmax(-1), normal(2 * D + 1, 3)
        what = f"relative_sum, T = {T}, n = {n}, D = {D}: sum_j alpha_ij s of the offset j - (n - T + i)"
        with given(what):
            check(answers.relative_sum(alpha, library), summed(alpha, library, variant), what)
    check_operations(lambda B, n: answers.relative_sum(normal(2, n, n), normal(7, 3)), "relative_sum, T = n")


@task(T3, points=5)
def test_the_relative_sum_has_both_gradients(answers, variant):
    for T, n, D in SHAPES:
        check_gradients(f"relative_sum, T = {T}, n = {n}, D = {D}", ["alpha", "library"], answers.relative_sum,
                        partial(summed, variant=variant), normal(2, T, n).softmax(-1), normal(2 * D + 1, 3))


@task(T3, points=12)
def test_the_relative_sum_needs_little_memory(answers, variant):
    H, T, n, d, D = 2, 40, 40, 64, 16
    limit = 4 * H * T * (n + d)
    alpha, library = normal(H, T, n).softmax(-1).requires_grad_(), normal(2 * D + 1, d).requires_grad_()
    what = f"relative_sum, H = {H}, T = n = {n}, d = {d}, D = {D}"
    with given(what), Memory() as memory, memory.hooks:
        out = answers.relative_sum(alpha, library)
        if torch.is_tensor(out) and out.requires_grad:
            out.sum().backward()
    check(out, summed(alpha, library, variant), what)
    kept = sum(memory.kept.values())
    assert memory.largest <= limit, (f"{what}: the operation {memory.by}, called inside it or backward, returned a "
                                     f"tensor of {memory.largest:,} numbers; expected at most 4 H T (n + d) = "
                                     f"{limit:,} (T n d = {T * n * d:,})")
    assert kept <= limit, (f"{what}: {kept:,} numbers are kept for the backward pass; expected at most "
                           f"4 H T (n + d) = {limit:,}")


# 4. Symbolic attention

@task(T4, points=6)
def test_each_head_matches_its_own_features(answers, variant):
    for B, n, m, d_h, N in [(1, 1, 1, 2, 2), (1, 2, 2, 1, 2), (2, 3, 2, 3, 5), (2, 4, 3, 2, 4)]:
        d = m * d_h
        x, W_q, templates = normal(B, n, d), normal(d, d), normal(N, d)
        what = f"symbol_weights, B = {B}, n = {n}, d = {d}, {m} heads, N = {N}"
        with given(what):
            p = answers.symbol_weights(x, W_q, templates, m)
        if torch.is_tensor(p) and p.shape == (B, n, m, N):
            check(p.sum(-1), torch.ones(B, n, m), f"{what}: the sum of p over the symbols")
        check(p, weights_of(x, W_q, templates, m, variant), what)
    check_operations(lambda B, n: answers.symbol_weights(normal(B, n, 4), normal(4, 4), normal(5, 4), 2),
                     "symbol_weights")


@task(T4, points=4)
def test_the_weights_have_all_gradients(answers, variant):
    check_gradients("symbol_weights, B = 2, n = 3, d = 4, 2 heads, N = 5", ["x", "W_q", "templates"],
                    lambda *inputs: answers.symbol_weights(*inputs, 2),
                    lambda *inputs: weights_of(*inputs, 2, variant), normal(2, 3, 4), normal(4, 4), normal(5, 4))


@task(T4, points=5)
def test_symbols_are_weighted_rows_head_by_head(answers, variant):
    for B, n, m, d_h, N in [(1, 1, 1, 1, 2), (1, 1, 2, 1, 2), (2, 3, 2, 3, 5)]:
        check_gradients(f"symbolic_symbols, B = {B}, n = {n}, {m} heads, N = {N}, d = {m * d_h}", ["p", "library"],
                        answers.symbolic_symbols, symbols_of, normal(B, n, m, N).softmax(-1), normal(N, m * d_h))
    check_operations(lambda B, n: answers.symbolic_symbols(normal(B, n, 2, 5).softmax(-1), normal(5, 4)),
                     "symbolic_symbols")


# 5. Measures

@task(T5, points=4)
def test_the_effective_number_of_known_weights(answers, variant):
    check(answers.effective_number(torch.full((2, 4), 0.25).double()), [4, 4], "effective_number, four equal weights")
    check(answers.effective_number(torch.eye(3).double()), [1, 1, 1], "effective_number, all weight on one of three")
    p = normal(2, 3, 5, std=2.0).softmax(-1)
    check(answers.effective_number(p), number_of(p, variant), "effective_number, p (2, 3, 5)")
    check_operations(lambda B, n: answers.effective_number(normal(B, n, 5).softmax(-1)), "effective_number")


@task(T5, points=3)
def test_the_spread_of_known_symbols(answers, variant):
    check(answers.spread(torch.eye(3).double()), 1, "spread, three orthonormal symbols")
    check(answers.spread(normal(1, 4).expand(3, 4)), 0, "spread, three equal symbols", tol=1e-5)
    for n in (2, 3, 6):
        s = normal(n, 4)
        check(answers.spread(s), spread_of(s, variant), f"spread, {n} symbols of 4 features")
        check(answers.spread(5 * s), spread_of(s, variant), f"spread, {n} symbols, all 5 times as long")
    check_operations(lambda B, n: answers.spread(normal(n, 4)), "spread, n symbols")


@task(T5, points=3)
def test_the_spread_of_nearly_equal_symbols_in_float32(answers, variant):
    s = (normal(1, 64) + normal(50, 64, std=1e-4)).float()
    found, expected = (float(f) for f in (answers.spread(s), spread_of(s, variant)))
    assert abs(found / expected - 1) <= 0.01, (
        f"spread, float32, 50 symbols that differ by a ten-thousandth: expected {expected:.4g} to 1%, found "
        f"{found:.4g} (is something small the difference of two large numbers?)")


@task(T5, points=3)
def test_measure_draws_what_it_says(answers, variant):
    inputs, seen = [], {}

    def weights(x, W_q, templates, n_heads):
        seen["last"] = x, W_q, templates
        return torch.full((*x.shape[:2], n_heads, len(templates)), 1 / len(templates), dtype=x.dtype)
    with rights(answers, variant):
        state = torch.get_rng_state()
        for seed in (5, 5, 6):
            answers.measure(weights, 60, 3, 40, 50, 0.3, 0.02, seed)
            inputs.append(seen["last"])
    assert torch.equal(state, torch.get_rng_state()), "measure changed torch's global random state: use a Generator"
    for name, x, same, other, shape, std in zip(("x", "W_q", "templates"), *inputs,
                                                [(1, 50, 60), (60, 60), (40, 60)], (0.3, 0.02, 1.0)):
        check(x.shape, shape, f"measure, 50 tokens, d = 60, 40 symbols: the shape of {name}")
        assert x.dtype == torch.float64, f"measure: {name} is {x.dtype}, expected torch.float64"
        check(x.std() / std, 1, f"measure: the standard deviation of {name}, as a share of {std}", tol=0.1)
        check(x.mean() / std, 0, f"measure: the mean of {name}, as a share of {std}", tol=0.1)
        assert torch.equal(x, same), f"measure: the same seed twice, but another {name}"
        assert not torch.equal(x, other), f"measure: seeds 5 and 6 draw the same {name}"


@task(T5, points=2)
def test_measure_finds_what_is_known(answers, variant):
    def alike(k):                                                      # token t takes its own k symbols
        def weights(x, W_q, templates, n_heads):
            own = torch.arange(len(templates))[None] // k == torch.arange(x.shape[1])[:, None]         # (n, N)
            return (own.double() / k)[None, :, None].expand(1, -1, n_heads, -1)
        return weights
    with rights(answers, variant):
        for k in (1, 3):
            number, spread = answers.measure(alike(k), 512, 2, 30, 10, 1.0, 1.0, 0)
            what = f"measure, each of 10 tokens takes {k} of 30 library rows equally, none in common"
            check(number, k, f"{what}: effective number")
            check(spread, 1, f"{what}: spread, nearly 1", tol=0.05)
        found = answers.measure(partial(weights_of, variant=variant), 64, 2, 30, 10, 0.0, 1.0, 0)
        check(found, (30, 0), "measure, std_x = 0, 30 symbols: (effective number, spread)", tol=1e-5)


# 6. Why nearly the same symbol?

def check_predicted(answers, variant, tau, m):
    d, few, N = 128 * m, 1000, 10 ** 12
    std_x = 10 ** uniform(-1, 0.5)
    std_w = tau / std_x / math.sqrt(d if variant == 1 else m)
    with rights(answers, variant):
        number, spread = (float(y) for y in answers.predicted(d, m, N, std_x, std_w))
    what = f"predicted, d = {d}, {m} heads, 10^12 symbols, std_x = {std_x:.4g}, std_w = {std_w:.4g}"
    assert 0 < number < N, f"{what}: expected an effective number between 0 and 10^12, found {number:.6g}"
    p = weights_of(normal(1, 40, d, std=std_x), normal(d, d, std=std_w), normal(few, d), m, variant)
    s = symbols_of(p, normal(few, 400 * m))[0]                         # a wide library: less noise
    simulated = math.log(few / number_of(p, variant).mean()), float(spread_of(s, variant))
    for name, mine, other, tol in (("log(n_symbols / effective number)", math.log(N / number), simulated[0], 0.2),
                                   ("the spread", spread, simulated[1], 0.1 * variant)):
        assert abs(mine / other - 1) <= tol, (f"{what}: {name}: expected {other:.4g} to {tol:.0%} (drawn with "
                                              f"{few} symbols), found {mine:.4g}")


@task(T6, points=5)
def test_the_prediction_for_small_weights(answers, variant):
    check_predicted(answers, variant, uniform(0.02, 0.1), m=2)


@task(T6, points=5)
def test_the_prediction_for_larger_weights(answers, variant):
    check_predicted(answers, variant, uniform(0.8, 1.0), m=3)


# 7. A cure

N, D_MODEL, HEADS = 64, 64, 4


def scales():
    return [(0.02, 0.02), (1e-3, 0.01), (10.0, 1.0), (10 ** uniform(-3, 1), 10 ** uniform(-2, 0))]


def start(n, std_x, std_w):
    return normal(2, n, D_MODEL, std=std_x), normal(D_MODEL, D_MODEL, std=std_w), normal(N, D_MODEL)


@task(T7, points=6)
def test_the_cure_gives_different_tokens_different_symbols(answers, variant):
    least, few, many = (0.6, N / 4, N) if variant == 1 else (0.7, 2, N / 4)
    for std_x, std_w in scales():
        x, W_q, templates = start(50, std_x, std_w)
        what = f"cured_weights, std_x = {std_x:.3g}, std_w = {std_w:.3g}"
        with rights(answers, variant):
            p = answers.cured_weights(x, W_q, templates, HEADS)
        check(p.shape, (2, 50, HEADS, N), f"{what}: the shape")
        check(p.sum(-1), torch.ones(2, 50, HEADS), f"{what}: the sum over the symbols")
        assert (p >= 0).all(), f"{what}: found the negative weight {p.min():.3g}"
        found = float(spread_of(symbols_of(p, normal(N, D_MODEL))[0], variant))
        assert found >= least, (f"{what}: expected a spread of at least {least}, found {found:.3g} (does the scale of "
                                "x or W_q remain in the weights, or an eps that is not small beside it?)")
        number = float(number_of(p, variant).mean())
        assert few <= number <= many + 1e-9, (f"{what}: expected an effective number of {few:g} to {many:g}, "
                                              f"found {number:.4g}")


@task(T7, points=4)
def test_the_cured_symbol_of_a_token_depends_on_it_alone(answers, variant):
    x, W_q, templates = start(5, 0.02, 0.02)
    x[1, 4] = x[0, 1]
    with rights(answers, variant):
        p = answers.cured_weights(x, W_q, templates, HEADS)
        check(p[1, 4], p[0, 1], "cured_weights: an equal token at another place, in another sequence")
        check(answers.cured_weights(x[:1, 1:2], W_q, templates, HEADS)[0, 0], p[0, 1], "cured_weights: a token alone")
        others = torch.cat([x[:, :2], normal(2, 7, D_MODEL)], 1)
        check(answers.cured_weights(others, W_q, templates, HEADS)[:, :2], p[:, :2],
              "cured_weights: the first two tokens, others exchanged for longer ones")
        assert not torch.allclose(p[0, 0], p[0, 1], rtol=0.01), (
            "cured_weights: two tokens of different directions have the same weights")


@task(T7, points=5)
def test_the_cure_can_be_trained(answers, variant):
    inputs = start(3, 0.02, 0.02)
    c = normal(2, 3, HEADS, N)
    names = ("x", "W_q", "templates")
    with rights(answers, variant):
        def loss(*inputs):
            return (answers.cured_weights(*inputs, HEADS) * c).sum()
        found = gradients("cured_weights", names, lambda *inputs: loss(*inputs)[None], *inputs)
        for k, (name, g) in enumerate(zip(names, found)):
            assert g.abs().amax(-1).min() > 0, f"cured_weights: the gradient with respect to a row of {name} is 0"
            step = inputs[k].std() * torch.nn.functional.normalize(g, dim=(0, 1, 2)[:g.dim()])
            plus, minus = ([x + sign * 1e-4 * step if j == k else x for j, x in enumerate(inputs)] for sign in (1, -1))
            with torch.no_grad():
                slope = (loss(*plus) - loss(*minus)) / 2e-4
            mine = (g * step).sum()
            assert abs(mine / slope - 1) <= 2e-3, (
                f"cured_weights: derivative with respect to {name}, along autograd's gradient: expected {slope:.6g} "
                f"(by finite differences), found {mine:.6g} (is a part detached or rounded?)")
        zero = (torch.zeros_like(inputs[0]), *inputs[1:])
        assert torch.isfinite(loss(*zero)), "cured_weights, tokens of zeros: the weights are not finite (0 / 0?)"
        for name, g in zip(names, gradients("cured_weights", names, lambda *inputs: loss(*inputs)[None], *zero)):
            assert torch.isfinite(g).all(), (f"cured_weights, tokens of zeros: the weights are finite, but the "
                                             f"gradient with respect to {name} is not (sqrt or norm at 0?)")
