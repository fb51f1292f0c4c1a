"""Statistics over seeds: intervals and paired differences."""
import math

import numpy as np
import pytest
import torch

from toolbox.stats import FEWEST, T975, half_interval, mean_text, paired_difference


def test_student_t_points_cut_off_one_fortieth():
    for dof, point in enumerate(T975, 1):
        x = torch.linspace(0, point, 20_001, dtype=torch.float64)
        scale = math.gamma((dof + 1) / 2) / math.gamma(dof / 2) / math.sqrt(dof * math.pi)
        density = scale * (1 + x ** 2 / dof) ** (-(dof + 1) / 2)
        assert abs(torch.trapezoid(density, x) - 0.475) < 3e-5         # the points are rounded to three digits


def test_half_an_interval_is_t_times_the_standard_error():
    values = np.array([1.0, 2.0, 4.0])                                 # mean 7/3, s = sqrt(7/3), t_2 = 4.303
    half = 4.303 * math.sqrt(7 / 3) / math.sqrt(3)
    assert half_interval(values) == pytest.approx(half)
    assert half_interval(np.stack([values, 2 * values], 1)) == pytest.approx([half, 2 * half])     # column by column
    many = np.arange(100.0)
    assert half_interval(many) == pytest.approx(T975[-1] * many.std(ddof=1) / 10)


def test_an_interval_is_shown_from_three_seeds_on():
    assert FEWEST == 3
    assert [mean_text(values, 3) for values in ([], [0.5], [0.5, 0.7], [1.0, 2.0, 4.0])] == [
        "", "0.500", "0.600", "2.333 ± 3.795"]


def test_differences_are_taken_seed_by_seed():
    # 0.1, 0.2, 0.3 in pairs: mean 0.2, s = 0.1, t = 4.303: half = 0.1 / sqrt(3) * 4.303 = 0.248
    mine = {1: 0.61, 2: 0.74, 3: 0.89, 4: 0.0}
    theirs = {3: 0.59, 2: 0.54, 1: 0.51, 5: 1.0}                       # seeds 4 and 5 have no partner
    difference = paired_difference(mine, theirs)
    assert (difference.n, difference.mean) == (3, pytest.approx(0.2))
    assert (difference.low, difference.high) == (pytest.approx(-0.0484, abs=1e-4), pytest.approx(0.4484, abs=1e-4))
    assert paired_difference({1: 0.5}, {2: 0.5}) is None


@pytest.mark.parametrize("mine, more_is_better, verdict", [
    ([.6, .61, .62], True, "DAT is better"), ([.6, .61, .62], False, "Transformer is better"),
    ([.4, .41, .42], True, "Transformer is better"), ([.4, .41, .42], False, "DAT is better"),
    ([.4, .5, .6], True, "no difference"), ([.6, .61], True, "2 seeds: too few to tell from noise"),
    ([.6], True, "1 seed: too few to tell from noise")])
def test_the_verdict_follows_from_the_interval(mine, more_is_better, verdict):
    difference = paired_difference(dict(enumerate(mine)), {seed: 0.5 for seed in range(3)})
    assert difference.verdict("DAT", "Transformer", more_is_better) == verdict
    assert (difference.low is None) == (len(mine) < FEWEST)
