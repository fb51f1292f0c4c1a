"""a3. Does it help? Write these functions; README.md beside this file defines each of them."""
import csv
import math

import numpy as np


# ---- 1. read ---------------------------------------------------------------------------------------------------------

def read_results(path, where, metric="accuracy_pentos"):
    """{seed: value of the column `metric`} of the rows of a results.csv in which str(where[c]) is the text of column c.

    Rows with an empty cell under `metric` are left out. ValueError: an unknown column, no row, two rows of one seed.
    """
    raise NotImplementedError


# ---- 2. pair ---------------------------------------------------------------------------------------------------------

def paired_differences(mine, theirs):
    """Two dicts {seed: value} -> (mine - theirs by ascending seed: n numbers; sorted list of the seeds without a pair).

    ValueError if no seed is in both.
    """
    raise NotImplementedError


# ---- 3. Student's t --------------------------------------------------------------------------------------------------

def t_cdf(t, df):
    """P(T <= t) with df = 1, 2, ... degrees of freedom."""
    raise NotImplementedError


def t_quantile(p, df):
    """The t with t_cdf(t, df) = p."""
    raise NotImplementedError


# ---- 4. interval and p-value -----------------------------------------------------------------------------------------

def mean_interval(values, confidence=0.95):
    """(mean, low, high) of n >= 2 values."""
    raise NotImplementedError


def p_value(values):
    """Two-sided p-value of "the true mean is 0" for n >= 2 values."""
    raise NotImplementedError


# ---- 5. one seed -----------------------------------------------------------------------------------------------------

def influential_seeds(mine, theirs, confidence=0.95):
    """Sorted list of the seeds without which the verdict on mine - theirs changes; three pairs or more."""
    raise NotImplementedError


# ---- 6. how many seeds? ----------------------------------------------------------------------------------------------

def power(effect, sd, n, alpha=0.05):
    """Probability that n normal differences of mean `effect` and standard deviation `sd` give a p-value below alpha."""
    raise NotImplementedError


def seeds_needed(effect, sd, target=0.8, alpha=0.05):
    """The smallest n >= 2 whose power is `target` or more."""
    raise NotImplementedError


# ---- 7. many questions -----------------------------------------------------------------------------------------------

def adjusted(p_values):
    """p-values adjusted for their number, in the order given."""
    raise NotImplementedError


# ---- 8. the analysis -------------------------------------------------------------------------------------------------

def analyse(path, questions, metric="accuracy_pentos", alpha=0.05):
    """{name: (where_mine, where_theirs)} -> {name: dict with n, dropped, mean, low, high, p, adjusted, verdict}."""
    raise NotImplementedError


if __name__ == "__main__":
    OCCURS = {"task": "occurs", "train_size": 1000}
    QUESTIONS = {"relational heads": ({**OCCURS, "n_ra": 2, "symbols": "positional", "symmetric": True,
                                       "ra_type": "ra"},
                                      {**OCCURS, "n_ra": 0})}
    for question, row in analyse("assignments/a3/results.csv", QUESTIONS).items():
        print(question, row)
