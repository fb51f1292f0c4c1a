"""Grades assignment 4, look inside. Known truth: smallest inputs by loops, and planted models (planted.py)."""
import copy
import math

import torch

from assignments.a4.known import (Answers, all_right, by_definition, by_pairs, knocks_out, parallel, right_auc,
                                  right_derangement, right_untrained_aucs, unchanged, vision)
from assignments.a4.planted import ROLES, plant
from assignments.grading import check, right, task
from toolbox.inside import layers_of

ALLOWED = {"math", "contextlib", "functools", "itertools", "numpy", "torch",
           "toolbox.inside.layers_of", "toolbox.inside.watch"}
VARIANTS = (1, 2)


def number(low, high):
    return int(torch.randint(low, high, ()))


def knock_out(answers, *arguments):
    with right(answers, derangement=right_derangement):
        context = answers.knocked_out(*arguments)
    assert hasattr(context, "__enter__"), (
        f"knocked_out returned a {type(context).__name__}, which is no context manager: write @contextmanager "
        "(of contextlib) above it, and one `yield` in it")
    return context


# ---- 1 AUC -----------------------------------------------------------------------------------------------------------

@task("1 auc", points=6)
def test_auc_counts_comparisons(answers, variant):
    for n in (2, 5, 9):
        scores, positive = torch.randn(n), torch.arange(n) % 3 == 0
        check(answers.auc(scores, positive), by_pairs(scores, positive, variant),
              f"auc of the scores {[round(s, 2) for s in scores.tolist()]}, positive: {positive.long().tolist()}")


@task("1 auc", points=3)
def test_ties_count_half(answers, variant):
    chance = 0.5 if variant == 1 else 0
    check(answers.auc(torch.ones(3), torch.tensor([True, False, False])), chance, "auc of three equal scores")
    scores, positive = torch.randint(4, (30,)).double(), torch.arange(30) % 2 == 0
    check(answers.auc(scores, positive), by_pairs(scores, positive, variant), "auc of 30 scores with equal ones")


@task("1 auc", points=1)
def test_no_comparison_is_nan(answers, variant):
    for positive in (True, False):
        check(answers.auc(torch.randn(2), torch.tensor([positive] * 2)), math.nan,
              f"auc of two scores, both {'positive' if positive else 'negative'}")


# ---- 2 within places -------------------------------------------------------------------------------------------------

@task("2 within places", points=7)
def test_mean_over_pairs_of_places(answers, variant):
    N, P = 24, 3
    rate = torch.rand(P, P)                                            # places differ in how often they are the same
    same, compared = torch.rand(N, P, P) < rate, torch.rand(N, P, P) < 0.8
    r = torch.randn(N, 2, P, P)
    with right(answers, auc=right_auc(variant)):
        found = answers.pair_aucs(r, same, compared)
    total, weight = torch.zeros(2).double(), 0
    for i in range(P):
        for j in range(P):
            on = compared[:, i, j]
            positive = int(same[on, i, j].sum())
            w = positive * (int(on.sum()) - positive)
            if w:
                w = w if variant == 1 else 1
                weight += w
                total += w * torch.tensor([by_pairs(r[on, l, i, j], same[on, i, j], variant) for l in (0, 1)])
    check(found, total / weight, "pair_aucs of 24 images, two random relations, three places")


@task("2 within places", points=4)
def test_what_tells_the_place_alone_tells_nothing(answers, variant):
    N, P = 40, 2
    same = torch.rand(N, P, P) < torch.tensor([[0.9, 0.1], [0.5, 0.7]])
    same[0], same[1] = True, False
    r = torch.tensor([[0.9, 0.1], [0.5, 0.7]]).expand(N, 1, P, P)
    with right(answers, auc=right_auc(variant)):
        check(answers.pair_aucs(r, same, torch.ones_like(same)), [0.5 if variant == 1 else 0],
              "pair_aucs of r[n, 0, i, j] that depends on i and j alone, and is large where `same` is frequent")


@task("2 within places", points=4)
def test_what_is_not_compared_does_not_count(answers, variant):
    same, compared = torch.zeros(2, 4, 2, 2, dtype=torch.bool)
    compared[:3, 0, 1], same[0, 0, 1] = True, True
    compared[:2, 1, 0], same[0, 1, 0] = True, True
    compared[:, 0, 0], same[:, 0, 0] = True, True                      # all the same there: no comparison
    r = torch.randn(4, 1, 2, 2)
    r[:, 0, 0, 1], r[:, 0, 1, 0] = torch.tensor([[1.0, 0.0, 2.0, 99.0], [1.0, 0.0, 99.0, 99.0]])
    with right(answers, auc=right_auc(variant)):
        check(answers.pair_aucs(r, same, compared), [2 / 3 if variant == 1 else 1 / 2],
              "pair_aucs where r[:3, 0, 0, 1] = 1, 0, 2 and r[:2, 0, 1, 0] = 1, 0 are compared, image 0 positive")
        check(answers.pair_aucs(r, same, torch.zeros_like(same)), [math.nan], "pair_aucs with nothing compared")


# ---- 3 the control ---------------------------------------------------------------------------------------------------

@task("3 the control", points=6)
def test_relations_by_the_definition(answers, variant):
    for symmetric in (True, False):
        model, x, seen = vision(symmetric=symmetric), torch.rand(3, 3, 4, 4).double(), []
        modules = [one.module for one in layers_of(model) if one.n_relations]
        hooks = [m.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach())) for m in modules]
        with unchanged(model):
            model(x)                                                   # what its layers read in evaluation mode
        for hook in hooks:
            hook.remove()
        found = answers.relations_of(model, x, 4)
        assert set(found) == {(1, 0), (1, 1), (2, 0), (2, 1)}, (
            f"relations_of a model of two layers with two relations each: expected the names (1, 0), (1, 1), (2, 0) "
            f"and (2, 1), found {sorted(found)}")
        for (layer, l), r in found.items():
            m, z, rows = modules[layer - 1], seen[layer - 1][:, 1:], slice(3 * l, 3 * l + 3)     # without class token
            q, k = (z @ linear.weight[rows].T for linear in (m.W_q_rel, m.W_q_rel if symmetric else m.W_k_rel))
            expected = torch.stack([torch.stack([torch.stack([(q[n, i] * k[n, j]).sum() / 3 ** 0.5 for j in range(4)])
                                                 for i in range(4)]) for n in range(3)])
            check(r, expected, f"relations_of, four places behind a class token, {(layer, l)}: r[n, i, j] = "
                               f"<q_rel_i, k_rel_j> / sqrt(p) in evaluation mode")


@task("3 the control", points=2)
def test_looking_changes_nothing(answers, variant):
    for training in (True, False):
        model = vision().train(training)
        r = answers.relations_of(model, torch.rand(2, 3, 4, 4).double(), 4)
        assert model.training == training, f"model.training was {training}; after relations_of it is {model.training}"
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), "relations_of left a hook"
        assert not any(one.requires_grad for one in r.values()), "relations_of: r has a gradient"


@task("3 the control", points=2)
def test_layers_without_relations_have_none(answers, variant):
    check(len(answers.relations_of(vision(ra_type="rca"), torch.rand(1, 3, 4, 4).double(), 4)), 0,
          "relations_of a model with sensory heads and relational cross-attention: number of relations")


@task("3 the control", points=5)
def test_one_auc_for_each_untrained_model(answers, variant):
    p = plant(number(0, 10 ** 6))
    x, same, compared = p.x[:60], p.same[:60], p.compared[:60]
    asked = []

    def make(seed):
        asked.append(seed)
        return p.make(seed)
    seeds = [number(0, 1000) for _ in range(3)]
    with all_right(answers, variant, but="untrained_aucs"):
        found = answers.untrained_aucs(make, x, same, compared, seeds)
    expected = right_untrained_aucs(variant)(p.make, x, same, compared, seeds)
    assert set(found) == set(expected), f"untrained_aucs: expected the names {list(expected)}, found {list(found)}"
    for name in expected:
        one, other = torch.as_tensor(found[name]), expected[name]
        if variant == 2:                                               # of a layer, in any order
            one, other = one.sort().values, other.sort().values
        check(one, other, f"untrained_aucs, seeds {seeds}, {name}")


@task("3 the control", points=6)
def test_p_value_counts_the_untrained(answers, variant):
    shift = 0 if variant == 1 else -0.5
    untrained = shift + torch.tensor([0.5, 0.375, 0.625, 0.75])[torch.randperm(4)].double()
    for value, expected in ((0.5, 5), (0.5625, 4), (0.625, 4), (0.75, 2), (0.875, 1)):
        check(answers.p_value(value + shift, untrained), expected / 5,
              f"p_value of {value + shift} among {untrained.tolist()}")


@task("3 the control", points=4)
def test_p_value_is_two_sided(answers, variant):
    centre = 0.5 if variant == 1 else 0
    for sign, side in ((1, "above"), (-1, "below")):
        near, far = sign * 0.3 * torch.rand(2, 19).double() + torch.tensor([[0], [sign * 0.1]]).double()
        check(answers.p_value(centre - sign * 0.4, centre + near), 1 / 20, f"p_value of {centre - sign * 0.4:.1f}, "
              f"farther from {centre} than 19 untrained ones, which are {side} {centre}")
        check(answers.p_value(centre - sign * 0.05, centre + far), 1, f"p_value of {centre - sign * 0.05:.2f}, "
              f"nearer to {centre} than 19 untrained ones, which are {side} {centre}")


# ---- 4 knock-outs ----------------------------------------------------------------------------------------------------

@task("4 knock-outs", points=4)
def test_derangement(answers, variant):
    for n in (2, 4, 10):
        order = torch.as_tensor(answers.derangement(n, number(0, 1000)))
        check(order.sort().values, torch.arange(n), f"derangement({n}, seed), sorted")
        check((order == torch.arange(n)).sum(), 0, f"derangement({n}, seed) = {order.tolist()}: numbers in their place")
        if variant == 2:
            check(order[order], torch.arange(n), f"derangement({n}, seed) = {order.tolist()}, applied twice")
    drawn = torch.stack([torch.as_tensor(answers.derangement(4, seed)) for seed in range(1200)])
    check(torch.as_tensor(answers.derangement(4, 7)), drawn[7], "derangement(4, 7), called again")
    share = torch.nn.functional.one_hot(drawn, 4).double().mean(0)     # (4, 4): how often order[i] = j
    check(share, (1 - torch.eye(4)) / 3, "derangement(4, seed) over 1200 seeds, how often order[i] = j", tol=0.05)
    try:
        answers.derangement(1, 0)
    except ValueError:
        return
    raise AssertionError("derangement(1, 0): expected a ValueError; a single image has no other")


@task("4 knock-outs", points=5)
@torch.no_grad()
def test_zero_takes_out_these_relations_alone(answers, variant):
    model, x = parallel()
    for names in ([(1, number(0, 3))], [(2, number(0, 3))], [(1, 0), (2, 2), (1, 2)]):
        def change(layer, r):
            return torch.stack([0 * r[:, l] if (layer, l) in names else r[:, l] for l in range(3)], 1)
        with right(answers, derangement=right_derangement), knock_out(answers, model, names, "zero"):
            found = model(x)[0]
        check(found, by_definition(model, x, change),
              f'knocked_out {names}, "zero": the sum over senders, relations and heads, with their r_ij = 0')


@task("4 knock-outs", points=6)
@torch.no_grad()
def test_resample_takes_all_of_r_from_another_image(answers, variant):
    model, x = parallel()
    for names in ([(1, number(0, 3))], [(2, number(0, 3))], [(1, 0), (2, 2), (1, 2)]):
        seed = number(0, 1000)
        order = right_derangement(4, seed)

        def change(layer, r):
            return torch.stack([r[order, l] if (layer, l) in names else r[:, l] for l in range(3)], 1)
        with right(answers, derangement=right_derangement), knock_out(answers, model, names, "resample", seed):
            found = model(x)[0]
        check(found, by_definition(model, x, change), f'knocked_out {names}, "resample" (relations of layer 1 are '
              f'symmetric, of layer 2 not): the output with r[l] of image order[n] = {order.tolist()}')


@task("4 knock-outs", points=5)
def test_the_model_is_what_it_was(answers, variant):
    for how in ("zero", "resample"):
        for fails in (False, True):
            model, x = parallel()
            before, parameters = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
            intact = model(x)[0]
            case = f'after knocked_out(..., "{how}")' + (" and an exception inside" if fails else "")
            try:
                with right(answers, derangement=right_derangement), knock_out(answers, model, [(1, 1), (2, 0)], how):
                    assert not torch.equal(model(x)[0], intact), f'inside knocked_out(..., "{how}") nothing is changed'
                    if fails:
                        raise KeyboardInterrupt
            except KeyboardInterrupt:
                pass
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), (
                f"{case} a weight differs from before")
            assert torch.equal(model(x)[0], intact), f"{case} the output differs from before"
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), f"{case} a hook is left"
            assert all(p is parameters[name] and p.requires_grad for name, p in model.named_parameters()), (
                f"{case} a parameter is another one, or has no gradient any more")


# ---- 5 what is lost --------------------------------------------------------------------------------------------------

def lost_and_differences(answers, variant, training=False):
    n = 12
    model, x, y = Answers(n).train(training), torch.zeros(n, 1), torch.randint(2, (n,))
    with right(answers, knocked_out=knocks_out):
        found = answers.lost(model, x, y, [(1, 0), (2, 1)], "resample", 3)
    assert len(found) == 2, "lost: expected two numbers, the mean and its standard error"
    score = [logits.log_softmax(-1).gather(1, y[:, None])[:, 0] if variant == 2 else
             (logits.argmax(-1) == y).double() for logits in (model.intact, model.without)]
    return found, (score[0] - score[1]).tolist(), model


@task("5 what is lost", points=3)
def test_mean_of_what_is_lost(answers, variant):
    found, d, _ = lost_and_differences(answers, variant)
    check(found[0], sum(d) / 12, f"the mean that is lost, of the 12 differences {[round(one, 2) for one in d]}")


@task("5 what is lost", points=4)
def test_standard_error_is_paired(answers, variant):
    found, d, _ = lost_and_differences(answers, variant)
    variance = sum((one - sum(d) / 12) ** 2 for one in d) / 11
    check(found[1], (variance / 12) ** 0.5, f"the standard error of the 12 differences {[round(one, 2) for one in d]}")


@task("5 what is lost", points=3)
def test_lost_in_evaluation_mode(answers, variant):
    found, d, model = lost_and_differences(answers, variant, training=True)
    check(found[0], sum(d) / 12, "the mean that is lost, of a model that was given in training mode")
    assert model.training, "the model was in training mode; after lost it is not"


# ---- 6 verdicts ------------------------------------------------------------------------------------------------------

TRUE_OF = {"learned": ("same", "spare", "unused"), "needed": ("same", "mark", "constant"),
           "informs": ("same", "spare", "mark")}


def verdict(answers, variant, which):
    for spare in {"learned": (False,), "needed": (False, True), "informs": (True,)}[which]:
        p = plant(number(0, 10 ** 6), spare)
        seeds = [number(0, 10 ** 6) for _ in range(19 if which == "learned" else 2)]
        with all_right(answers, variant, but="verdicts"):
            found = answers.verdicts(p.model, p.make, p.x, p.y, p.same, p.compared, seeds)
        assert set(found) == set(p.roles), f"verdicts: expected the names {sorted(p.roles)}, found {sorted(found)}"
        for name, role in p.roles.items():
            expected = role in TRUE_OF[which]
            assert bool(found[name][which]) == expected, (
                f"verdicts of a planted model, relation {name}: {ROLES[role]}. So '{which}' must be "
                f"{expected}; your verdict says {not expected}."
                + (" Its p is 1/20, which counts: p <= 0.05." if (which, expected) == ("learned", True) else ""))


@task("6 verdicts", points=5)
def test_learned(answers, variant):
    verdict(answers, variant, "learned")


@task("6 verdicts", points=5)
def test_needed(answers, variant):
    verdict(answers, variant, "needed")


@task("6 verdicts", points=5)
def test_informs(answers, variant):
    verdict(answers, variant, "informs")


@task("6 verdicts", points=5)
def test_redundant(answers, variant):
    for spare in (False, True):
        p = plant(number(0, 10 ** 6), spare)
        expected = {tuple(sorted(name for name in p.roles if p.roles[name] == "spare"))} - {()}
        with all_right(answers, variant, but="redundant"):
            found = answers.redundant(p.model, p.x, p.y, list(p.roles))
        assert set(found) == expected, (
            f"redundant, of a planted model: expected {sorted(expected) or 'no pair'}, found "
            f"{sorted(found) or 'no pair'}. Its relations: "
            + "; ".join(f"{name}, {ROLES[role]}" for name, role in p.roles.items()))
