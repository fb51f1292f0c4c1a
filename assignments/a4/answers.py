"""Assignment 4, look inside: your functions. README.md defines them; python -m assignments.grade a4 checks them.

A relation is named (layer, l): layer from 1 on, l from 0 on. N images, R relations, P places, K seeds.
"""
import torch                                              # noqa: F401

from toolbox.inside import layers_of, watch               # noqa: F401


# ---- 1 AUC -----------------------------------------------------------------------------------------------------------

def auc(scores, positive):
    """scores (n,), positive (n,) boolean -> P(score of a positive > score of a negative), ties 1/2: a float or nan."""
    raise NotImplementedError


# ---- 2 within places -------------------------------------------------------------------------------------------------

def pair_aucs(r, same, compared):
    """r (N, R, P, P), same and compared (N, P, P) boolean -> (R,), float64: mean AUC over pairs of places."""
    raise NotImplementedError


# ---- 3 the control ---------------------------------------------------------------------------------------------------

def relations_of(model, x, places):
    """-> {(layer, l): r (N, P, P)}, P = places: the last P tokens. In evaluation mode; nothing is left on the model."""
    raise NotImplementedError


def untrained_aucs(make, x, same, compared, seeds):
    """make(seed) -> an untrained model. -> {(layer, l): its AUC for each of the K seeds (K,), float64}."""
    raise NotImplementedError


def p_value(value, untrained):
    """The AUC of a trained relation, those of untrained ones (K,) -> a float in 1 / (1 + K) ... 1."""
    raise NotImplementedError


# ---- 4 knock-outs ----------------------------------------------------------------------------------------------------

def derangement(n, seed):
    """-> a random permutation (n,), int64, with order[i] != i for all i. ValueError if n < 2."""
    raise NotImplementedError


def knocked_out(model, names, how, seed=0):
    """Context manager: inside, model(x) runs without the relations `names`, a list of (layer, l).

    how: "zero", they add nothing; "resample", they are those of other images, by derangement(N, seed).
    """
    raise NotImplementedError


# ---- 5 what is lost --------------------------------------------------------------------------------------------------

def lost(model, x, y, names, how, seed=0):
    """-> (mean, standard error), floats: what the knock-out costs of the share of right answers, paired by image."""
    raise NotImplementedError


# ---- 6 verdicts ------------------------------------------------------------------------------------------------------

def verdicts(model, make, x, y, same, compared, seeds):
    """-> {(layer, l): {"learned": bool, "needed": bool, "informs": bool}} for all relations."""
    raise NotImplementedError


def redundant(model, x, y, names):
    """-> a set of pairs of names (a, b), a < b: neither is needed, but one of the two must be left."""
    raise NotImplementedError
