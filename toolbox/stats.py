"""Statistics over seeds: means with 95% intervals, and differences paired by seed. Every table and figure uses these.

Two runs of one seed see the same data in the same order, so we take their difference seed by seed: it varies less than
the runs themselves. An interval needs three seeds or more; with one or two, none is given.
"""
import math
from dataclasses import dataclass

import numpy as np

FEWEST = 3                                  # seeds from which on an interval is given

# 97.5% points of Student's t for 1 ... 30 degrees of freedom. Beyond 30 we use the last one: slightly too wide.
T975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
        2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]


def half_interval(values):
    """Half the width of the 95% confidence interval of the mean of `values` (n, ...), n >= 2: t_{n-1} s / sqrt(n)."""
    return half_interval_of(np.std(values, axis=0, ddof=1), len(values))


def half_interval_of(std, n):
    """The same from a standard deviation over n values (with n - 1 in its denominator)."""
    return T975[min(n - 1, 30) - 1] * std / math.sqrt(n)


def mean_text(values, digits):
    """'0.870 ± 0.028': the mean and half its interval; from fewer than three values the mean alone; '' from none."""
    if len(values) == 0:
        return ""
    text = f"{np.mean(values):.{digits}f}"
    return f"{text} ± {half_interval(values):.{digits}f}" if len(values) >= FEWEST else text


@dataclass
class Difference:
    """A mean difference over n pairs, with the ends of its 95% Student-t interval (None if n < 3)."""
    mean: float
    n: int
    low: float | None = None
    high: float | None = None

    @property
    def within_noise(self):
        """Whether the interval contains 0; None without an interval."""
        return None if self.low is None else bool(self.low <= 0 <= self.high)

    def verdict(self, mine, theirs, more_is_better=True):
        """What may be concluded on mine - theirs: 'no difference' if the interval contains 0. Both are names."""
        if self.n < FEWEST:
            return f"{self.n} seed{'s' * (self.n > 1)}: too few to tell from noise"
        if self.within_noise:
            return "no difference"
        return f"{mine if (self.low > 0) == more_is_better else theirs} is better"


def paired_difference(mine, theirs):
    """Of two dicts {seed: value}, mine - theirs over the seeds that both have -> Difference; None if there are none."""
    seeds = sorted(mine.keys() & theirs.keys())
    if not seeds:
        return None
    values = np.array([mine[seed] - theirs[seed] for seed in seeds])
    mean, n = values.mean(), len(values)
    if n < FEWEST:
        return Difference(mean, n)
    half = half_interval(values)
    return Difference(mean, n, mean - half, mean + half)
