"""Grader of assignment a2, Symbols. README.md has the tasks of variant 1.

Variant 2: positions from the end; no symbol beyond D; scores divided by d_h; other measures; a sharper cure.
"""
import math
from functools import partial

import torch

from assignments.a2.definitions import (Memory, number_of, positional, relative, spread_of, summed, symbols_of,
                                        weights_of)
from assignments.grading import check, right, task

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


def gradients(what, names, function, *inputs):
    """Of a fixed sum over the result, with respect to each input."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    assert out.requires_grad, f"{what}: no gradient reaches {', '.join(names)} (detach, no_grad or item somewhere?)"
    (out * torch.arange(out.numel()).cos().view(out.shape)).sum().backward()
    for name, x in zip(names, inputs):
        assert x.grad is not None, f"{what}: no gradient reaches {name} (detach, no_grad or item somewhere?)"
    return [x.grad for x in inputs]


def check_gradients(what, names, found, expected, *inputs):
    check(found(*inputs), expected(*inputs), what)
    pairs = zip(names, *(gradients(what, names, function, *inputs) for function in (found, expected)))
    for name, mine, wanted in pairs:
        check(mine, wanted, f"{what}: gradient with respect to {name}")


# 1. Positional symbols

def masks():
    return [torch.tensor([[True, True]]), torch.tensor([[False, True, True]]),
            torch.tensor([[True, True, False, True, True], [False, False, True, True, False], [False] * 5])]


@task(T1, points=5)
def test_the_position_counts_tokens_and_padding_gets_zeros(answers, variant):
    library = normal(7, 3)
    for mask in masks():
        check(answers.positional_symbols(library, mask), positional(library, mask, variant),
              f"positional_symbols, mask {mask.int().tolist()}, a library of 7 rows")


@task(T1, points=3)
def test_a_row_learns_from_the_tokens_that_use_it(answers, variant):
    for mask in masks():
        check_gradients(f"positional_symbols, mask {mask.int().tolist()}", ["library"],
                        lambda s: answers.positional_symbols(s, mask), lambda s: positional(s, mask, variant),
                        normal(5, 3))


@task(T1, points=2)
def test_too_many_tokens_raise_value_error(answers, variant):
    full = torch.ones(1, 3, dtype=torch.bool)
    try:
        answers.positional_symbols(normal(2, 3), full)
    except ValueError:
        pass
    except IndexError:
        raise AssertionError("positional_symbols, 3 tokens, 2 rows: expected ValueError, found IndexError") from None
    else:
        raise AssertionError("positional_symbols, 3 tokens, 2 rows: expected ValueError, found a result")
    longer = torch.tensor([[False, True, False, True]])                # two tokens fit into two rows
    check(answers.positional_symbols(normal(2, 3), longer).shape, (1, 4, 3),
          "positional_symbols, 2 tokens among 4 places, 2 rows: padding needs no rows; the shape")


# 2. Position-relative symbols

@task(T2, points=7)
def test_the_symbol_is_that_of_the_sender_relative_to_the_receiver(answers, variant):
    for T, n, D in SHAPES:
        library = normal(2 * D + 1, 3)
        check(answers.relative_symbols(library, T, n), relative(library, T, n, variant),
              f"relative_symbols, T = {T}, n = {n}, D = {D}: [i, j] belongs to the offset j - (n - T + i)")


@task(T2, points=3)
def test_a_row_learns_from_the_pairs_that_use_it(answers, variant):
    for T, n, D in SHAPES:
        check_gradients(f"relative_symbols, T = {T}, n = {n}, D = {D}", ["library"],
                        lambda s: answers.relative_symbols(s, T, n), lambda s: relative(s, T, n, variant),
                        normal(2 * D + 1, 3))


# 3. Their sum in little memory

@task(T3, points=8)
def test_the_relative_sum_is_its_definition(answers, variant):
    with right(answers, relative_symbols=partial(relative, variant=variant)):
        for T, n, D in SHAPES:
            alpha, library = normal(2, T, n).softmax(-1), normal(2 * D + 1, 3)
            check(answers.relative_sum(alpha, library), summed(alpha, library, variant),
                  f"relative_sum, T = {T}, n = {n}, D = {D}: sum_j alpha_ij s of the offset j - (n - T + i)")


@task(T3, points=5)
def test_the_relative_sum_has_both_gradients(answers, variant):
    with right(answers, relative_symbols=partial(relative, variant=variant)):
        for T, n, D in SHAPES:
            check_gradients(f"relative_sum, T = {T}, n = {n}, D = {D}", ["alpha", "library"], answers.relative_sum,
                            partial(summed, variant=variant), normal(2, T, n).softmax(-1), normal(2 * D + 1, 3))


@task(T3, points=12)
def test_the_relative_sum_needs_little_memory(answers, variant):
    H, T, n, d, D = 2, 40, 40, 64, 16
    limit = 4 * H * T * (n + d)
    alpha, library = normal(H, T, n).softmax(-1).requires_grad_(), normal(2 * D + 1, d).requires_grad_()
    with right(answers, relative_symbols=partial(relative, variant=variant)):
        with Memory() as memory, memory.hooks:
            out = answers.relative_sum(alpha, library)
            if torch.is_tensor(out) and out.requires_grad:
                out.sum().backward()
    what = f"relative_sum, H = {H}, T = n = {n}, d = {d}, D = {D}"
    check(out, summed(alpha, library, variant), what)
    kept = sum(memory.kept.values())
    assert memory.largest <= limit, (f"{what}: {memory.by} returned a tensor of {memory.largest:,} numbers; expected "
                                     f"at most 4 H T (n + d) = {limit:,} (T n d = {T * n * d:,})")
    assert kept <= limit, (f"{what}: {kept:,} numbers are kept for the backward pass; expected at most "
                           f"4 H T (n + d) = {limit:,}")


# 4. Symbolic attention

@task(T4, points=6)
def test_each_head_matches_its_own_features(answers, variant):
    for B, n, m, d_h, N in [(1, 1, 1, 2, 2), (1, 2, 2, 1, 2), (2, 3, 2, 3, 5), (2, 4, 3, 2, 4)]:
        d = m * d_h
        x, W_q, templates = normal(B, n, d), normal(d, d), normal(N, d)
        p = answers.symbol_weights(x, W_q, templates, m)
        what = f"symbol_weights, B = {B}, n = {n}, d = {d}, {m} heads, N = {N}"
        if torch.is_tensor(p) and p.shape == (B, n, m, N):
            check(p.sum(-1), torch.ones(B, n, m), f"{what}: the sum of p over the symbols")
        check(p, weights_of(x, W_q, templates, m, variant), what)


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


# 5. Measures

@task(T5, points=4)
def test_the_effective_number_of_known_weights(answers, variant):
    check(answers.effective_number(torch.full((2, 4), 0.25).double()), [4, 4], "effective_number, four equal weights")
    check(answers.effective_number(torch.eye(3).double()), [1, 1, 1], "effective_number, all weight on one of three")
    p = normal(2, 3, 5, std=2.0).softmax(-1)
    check(answers.effective_number(p), number_of(p, variant), "effective_number, p (2, 3, 5)")


@task(T5, points=3)
def test_the_spread_of_known_symbols(answers, variant):
    check(answers.spread(torch.eye(3).double()), 1, "spread, three orthonormal symbols")
    check(answers.spread(normal(1, 4).expand(3, 4)), 0, "spread, three equal symbols", tol=1e-5)
    for n in (2, 3, 6):
        s = normal(n, 4)
        check(answers.spread(s), spread_of(s, variant), f"spread, {n} symbols of 4 features")
        check(answers.spread(5 * s), spread_of(s, variant), f"spread, {n} symbols, all 5 times as long")


@task(T5, points=3)
def test_the_spread_of_nearly_equal_symbols_in_float32(answers, variant):
    s = (normal(1, 64) + normal(50, 64, std=1e-4)).float()
    check(answers.spread(s) / spread_of(s, variant), 1, "spread, float32, 50 symbols that differ by a ten-thousandth: "
          "found / right (is something small the difference of two large numbers?)", tol=0.005)


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

def check_predicted(answers, variant, tau):
    for m in (2, 3):
        d, few, N = 128 * m, 1000, 10 ** 12
        std_x = 10 ** uniform(-1, 0.5)
        std_w = tau / std_x / math.sqrt(d if variant == 1 else m)
        with rights(answers, variant):
            number, spread = (float(y) for y in answers.predicted(d, m, N, std_x, std_w))
        what = f"predicted, d = {d}, {m} heads, 10^12 symbols, std_x = {std_x:.4g}, std_w = {std_w:.4g}"
        assert 0 < number < N, f"{what}: expected an effective number between 0 and 10^12, found {number:.6g}"
        p = weights_of(normal(1, 40, d, std=std_x), normal(d, d, std=std_w), normal(few, d), m, variant)
        s = symbols_of(p, normal(few, 600 * m))[0]                     # a wide library: less noise
        simulated = math.log(few / number_of(p, variant).mean()), float(spread_of(s, variant))
        check(math.log(N / number) / simulated[0], 1,
              f"{what}: log(n_symbols / effective number), found / simulated", tol=0.1)
        check(spread / simulated[1], 1, f"{what}: spread, found / simulated", tol=0.05 * variant)


@task(T6, points=5)
def test_the_prediction_for_small_weights(answers, variant):
    check_predicted(answers, variant, uniform(0.02, 0.1))


@task(T6, points=5)
def test_the_prediction_for_larger_weights(answers, variant):
    check_predicted(answers, variant, uniform(0.8, 1.0))


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
        x, W_q, templates = start(100, std_x, std_w)
        what = f"cured_weights, std_x = {std_x:.3g}, std_w = {std_w:.3g}"
        with rights(answers, variant):
            p = answers.cured_weights(x, W_q, templates, HEADS)
        check(p.shape, (2, 100, HEADS, N), f"{what}: the shape")
        check(p.sum(-1), torch.ones(2, 100, HEADS), f"{what}: the sum over the symbols")
        assert (p >= 0).all(), f"{what}: found the negative weight {p.min():.3g}"
        found = float(spread_of(symbols_of(p, normal(N, D_MODEL))[0], variant))
        assert found >= least, f"{what}: expected a spread of at least {least}, found {found:.3g}"
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
        assert not torch.allclose(p[0, 0], p[0, 1], rtol=0.01), "cured_weights: two tokens have the same weights"


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
            check((g * step).sum() / slope, 1,
                  f"cured_weights: gradient with respect to {name}, found / by finite differences", tol=1e-3)
        zero = (torch.zeros_like(inputs[0]), *inputs[1:])
        check(torch.isfinite(loss(*zero)), True, "cured_weights, tokens of zeros: are the weights finite?")
        for name, g in zip(names, gradients("cured_weights", names, lambda *inputs: loss(*inputs)[None], *zero)):
            check(torch.isfinite(g).all(), True, f"cured_weights, tokens of zeros: is the gradient of {name} finite?")
