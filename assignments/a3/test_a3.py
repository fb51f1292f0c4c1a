"""Grader of a3: statistics over seeds, on made-up results.csv files of which the truth is known.

Variant 2: seeds without a pair are refused; tests and intervals are one-sided; Benjamini-Hochberg in the place of Holm.
"""
import math

import numpy as np

from assignments.a3.made_up import cdf, earlier, exact_power, experiment, quantile, results, seeds, with_spread
from assignments.grading import check, right, task

ALLOWED = {"csv", "math", "numpy", "open", "pathlib"}
VARIANTS = (1, 2)


# ---- checks ----------------------------------------------------------------------------------------------------------

def refuses(what, function, *args):
    try:
        found = function(*args)
    except NotImplementedError:
        raise
    except ValueError:
        return
    except Exception as error:
        raise AssertionError(f"{what}: expected ValueError, found {type(error).__name__}: {error}") from None
    raise AssertionError(f"{what}: expected ValueError, found {found}")


def check_dict(found, expected, what):
    assert isinstance(found, dict), f"{what}: expected a dict, found {type(found).__name__}"
    assert sorted(map(repr, found)) == sorted(map(repr, expected)), \
        f"{what}: expected the seeds {sorted(expected)} (int), found {list(found)}"
    assert all(isinstance(value, float) for value in found.values()), f"{what}: the values are float, found {found}"
    check([found[seed] for seed in sorted(expected)], [expected[seed] for seed in sorted(expected)], what)


def parts(found, n, what):
    assert isinstance(found, tuple) and len(found) == n, f"{what}: expected a tuple of {n}, found {found}"
    return found


def check_seeds(found, expected, what):
    assert found is not None and list(found) == expected, f"{what}: expected the seeds {expected}, found {found}"


def text(values):
    return "[" + ", ".join(f"{value:.3f}" for value in values) + "]"


# ---- the tasks -------------------------------------------------------------------------------------------------------

@task("1 read", points=4)
def test_rows_are_selected_by_all_conditions(answers, variant):
    groups = [(dict(n_ra=n_ra, train_size=size, symbols=symbols, symmetric=symmetric),
               {seed: round(np.random.rand(), 4) for seed in seeds(3)})
              for n_ra in (0, 2) for size in (500, 1000) for symbols in ("positional", "relative")
              for symmetric in (True, False)]
    with results(*groups) as path:
        for where, expected in np.random.permutation(np.array(groups, object))[:6]:
            check_dict(answers.read_results(path, where), expected, f"read_results with where = {where}")
        where, expected = groups[0]
        check_dict(answers.read_results(str(path), where), expected, "read_results with the path as a str")


@task("1 read", points=3)
def test_other_metrics_and_empty_cells(answers, variant):
    n = seeds(4)
    values = {seed: round(np.random.rand(), 4) for seed in n}
    with results(({}, values, "accuracy_hexos"), (dict(n_ra=0), {n[0]: 0.9, n[1]: ""}, "accuracy_hexos")) as path:
        check_dict(answers.read_results(path, {"n_ra": 2}, "accuracy_hexos"), values, "metric = accuracy_hexos")
        check_dict(answers.read_results(path, {"n_ra": 0}, "accuracy_hexos"), {n[0]: 0.9},
                   f"accuracy_hexos of seed {n[1]} is an empty cell, which is left out")


@task("1 read", points=3)
def test_what_cannot_be_meant_is_refused(answers, variant):
    with results((dict(train_size=500), {1: 0.6, 2: 0.7}), (dict(train_size=1000), {2: 0.8, 3: 0.9})) as path:
        refuses("seed 2 has a row of 500 and one of 1000 images, where = {'n_ra': 2}",
                answers.read_results, path, {"n_ra": 2})
        refuses("where = {'nra': 2}: no such column", answers.read_results, path, {"nra": 2})
        refuses("metric = 'accuracy': no such column", answers.read_results, path, {"train_size": 500}, "accuracy")
        refuses("where = {'n_ra': 5}: no such row", answers.read_results, path, {"n_ra": 5})


@task("2 pair", points=4)
def test_differences_are_taken_seed_by_seed(answers, variant):
    mine, theirs = experiment(np.random.randn(5).round(3))
    what = f"paired_differences({mine}, {theirs})"
    found, names = parts(answers.paired_differences(mine, theirs), 2, what)
    check(found, [mine[seed] - theirs[seed] for seed in sorted(mine)], what)
    check_seeds(names, [] if variant == 1 else sorted(mine), f"{what}: the second result")


@task("2 pair", points=6)
def test_seeds_without_a_pair(answers, variant):
    mine, theirs = experiment(np.random.randn(6).round(3))
    (a, *_), (b, *_) = mine, theirs
    del mine[a], theirs[b]
    what = f"seed {a} is only in theirs, {b} only in mine"
    if variant == 2:
        refuses(what, answers.paired_differences, mine, theirs)
    else:
        found, names = parts(answers.paired_differences(mine, theirs), 2, what)
        check(found, [mine[seed] - theirs[seed] for seed in sorted(mine) if seed != b], f"{what}: the differences")
        check_seeds(names, sorted([a, b]), f"{what}: dropped")
    refuses("no common seed: paired_differences({1: 0.5}, {2: 0.5})", answers.paired_differences, {1: 0.5}, {2: 0.5})


@task("3 Student's t", points=4)
def test_cdf_has_the_closed_forms_of_one_and_two_degrees_of_freedom(answers, variant):
    for t in (0.0, *np.random.uniform(-6, 6, 5).round(2).tolist()):
        check(answers.t_cdf(t, 1), 0.5 + math.atan(t) / math.pi, f"t_cdf({t}, 1) = 1/2 + atan(t) / pi", 1e-5)
        check(answers.t_cdf(t, 2), 0.5 + t / math.sqrt(8 + 4 * t * t),
              f"t_cdf({t}, 2) = 1/2 + t / sqrt(8 + 4 t^2)", 1e-5)


@task("3 Student's t", points=5)
def test_cdf(answers, variant):
    for df in (3, 4, 200, *np.random.randint(5, 200, 4).tolist()):
        for t in np.random.uniform(-4, 4, 4).round(2).tolist() + [-40.0]:
            check(answers.t_cdf(t, df), cdf(t, df), f"t_cdf({t}, {df})", 1e-5)


@task("3 Student's t", points=6)
def test_quantile_inverts_the_cdf(answers, variant):
    with right(answers, t_cdf=cdf):
        for df in (1, 2, 200, *np.random.randint(3, 200, 3).tolist()):
            for p in (0.0001, 0.5, 0.975, 0.9999, round(np.random.uniform(0.01, 0.99), 3)):
                check(answers.t_quantile(p, df), quantile(p, df), f"t_quantile({p}, {df})", 1e-4)


@task("4 interval and p-value", points=6)
def test_interval(answers, variant):
    with right(answers, **earlier(variant, "t_cdf", "t_quantile")):
        for n, confidence in ((3, 0.95), (2, 0.9), (np.random.randint(4, 12), 0.95), (5, 0.99)):
            x = np.random.randn(n).round(2)
            what = f"mean_interval({text(x)}, {confidence}) = (mean, low, high)"
            check(parts(answers.mean_interval(x, confidence), 3, what),
                  earlier(variant)["mean_interval"](x, confidence), what, 1e-4)
        refuses("one value has no interval", answers.mean_interval, np.array([0.1]))


@task("4 interval and p-value", points=4)
def test_coverage_and_outliers(answers, variant):
    with right(answers, **earlier(variant, "t_cdf", "t_quantile")):
        n, truth, inside = 4, 0.1, 0
        for _ in range(2000):
            _, low, high = answers.mean_interval(truth + 0.03 * np.random.randn(n))
            inside += low <= truth <= high
        assert abs(inside / 2000 - 0.95) < 0.02, (
            f"2000 experiments of {n} normal differences: {inside / 20:.1f}% of the 95% intervals contain the truth; "
            f"expected 95 +- 2%")
        x = np.array([*with_spread(0.05, 0.01, 5), -0.4])
        check(answers.mean_interval(x)[:2], earlier(variant)["mean_interval"](x)[:2],
              f"(mean, low) of {text(x)}, of which no value is left out", 1e-4)


@task("4 interval and p-value", points=7)
def test_p_value(answers, variant):
    with right(answers, **earlier(variant, "t_cdf", "t_quantile")):
        for n, m in ((2, 0.5), (4, 0.7), (4, -0.7), (np.random.randint(5, 12), 0.0)):
            x = with_spread(m, 1, n)
            check(answers.p_value(x), earlier(variant)["p_value"](x), f"p_value({text(x)}), mean {m}, s = 1", 1e-4)
        refuses("one value has no p-value", answers.p_value, np.array([0.1]))


@task("4 interval and p-value", points=3)
def test_equal_values(answers, variant):
    with right(answers, **earlier(variant, "t_cdf", "t_quantile")):
        check(answers.p_value(np.zeros(4)), 1, "p_value([0, 0, 0, 0])")
        check(answers.p_value(np.full(4, 0.25)), 0, "p_value([0.25, 0.25, 0.25, 0.25])")
        check(answers.p_value(np.full(4, -0.25)), 0 if variant == 1 else 1, "p_value([-0.25, -0.25, -0.25, -0.25])")


@task("5 one seed", points=5)
def test_an_outlier_decides(answers, variant):
    with right(answers, **earlier(variant)):
        mine, theirs = experiment([*with_spread(0.05, 0.01, 5), -0.4])
        outlier = min(mine, key=lambda seed: mine[seed] - theirs[seed])
        if variant == 1:
            theirs[99] = 0.5                                          # without a pair
        check_seeds(answers.influential_seeds(mine, theirs), [outlier],
                    f"five differences near +0.05, that of seed {outlier} is -0.4: mine = {mine}, theirs = {theirs}")
        if variant == 1:                                              # the same with all signs turned
            check_seeds(answers.influential_seeds(theirs, mine), [outlier], "five near -0.05, one +0.4: theirs - mine")


@task("5 one seed", points=5)
def test_seeds_that_decide_or_do_not(answers, variant):
    interval, scale = earlier(variant)["mean_interval"], np.random.uniform(0.5, 2)

    def verdict(d, confidence):
        return [bound > 0 for bound in interval(d, confidence)[1:]]
    with right(answers, **earlier(variant)):
        for d, confidence in ((with_spread(0.1, 0.01, 6), 0.95), (with_spread(0, 0.01, 6), 0.95),
                              (scale * np.array([0.1, 0.11, 0.09, 0.17]), 0.99),
                              (scale * np.array([0.1, 0.1, 0.11, 0.5]), 0.95)):
            names = seeds(len(d))
            decide = [name for i, name in enumerate(names)
                      if verdict(np.delete(d, i), confidence) != verdict(d, confidence)]
            check_seeds(answers.influential_seeds(*experiment(d, names), confidence), sorted(decide),
                        f"differences {text(d)} of the seeds {names}, confidence {confidence}")
        refuses("two pairs", answers.influential_seeds, {1: 0.5, 2: 0.6}, {1: 0.4, 2: 0.3})


@task("6 how many seeds?", points=5)
def test_power(answers, variant):
    with right(answers, **earlier(variant, "t_cdf", "t_quantile")):
        for effect, sd, n, alpha in ((1, 1, 10, 0.05), (0.02, 0.03, np.random.randint(4, 30), 0.05),
                                     (0.1, 0.02, 2, 0.05), (round(np.random.uniform(0.5, 1), 2), 1, 12, 0.01),
                                     (0.2, 1, 200, 0.05)):
            check(answers.power(effect, sd, n, alpha), exact_power(effect, sd, n, alpha, 3 - variant),
                  f"power(effect={effect}, sd={sd}, n={n}, alpha={alpha})", 0.005)


@task("6 how many seeds?", points=4)
def test_power_without_an_effect_and_of_a_negative_one(answers, variant):
    with right(answers, **earlier(variant, "t_cdf", "t_quantile")):
        for n in (3, 20):
            check(answers.power(0, 1, n, 0.05), 0.05, f"power(0, 1, {n}, 0.05): without an effect it is alpha", 0.005)
            check(answers.power(-0.5, 1, n), exact_power(-0.5, 1, n, 0.05, 3 - variant), f"power(-0.5, 1, {n})", 0.005)


@task("6 how many seeds?", points=6)
def test_smallest_number_of_seeds(answers, variant):
    power = earlier(variant)["power"]
    with right(answers, **earlier(variant, "t_cdf", "t_quantile", "power")):
        for target, alpha in ((0.8, 0.05), (0.9, 0.05), (0.8, 0.01)):
            for ratio in (round(np.random.uniform(0.5, 0.8), 2), round(np.random.uniform(0.8, 3), 2), 40.0):
                n = next(n for n in range(2, 200) if power(ratio, 1.0, n, alpha) >= target)
                if min(abs(power(ratio, 1.0, k, alpha) - target) for k in (n, max(n - 1, 2))) < 1e-3:
                    continue                                          # too near to call
                check(answers.seeds_needed(ratio * 0.03, 0.03, target, alpha), n,
                      f"seeds_needed(effect={ratio} sd, target={target}, alpha={alpha})", 1e-9)
        if variant == 1:
            check(answers.seeds_needed(-1, 1), 10, "seeds_needed(effect=-1, sd=1)", 1e-9)
        else:
            refuses("a negative effect is never found", answers.seeds_needed, -1, 1)
        refuses("an effect of 0 is never found", answers.seeds_needed, 0, 0.03)


@task("7 many questions", points=5)
def test_adjusted_by_hand(answers, variant):
    for p, holm, hochberg in (([0.01, 0.02, 0.04], [0.03, 0.04, 0.04], [0.03, 0.03, 0.04]),
                              ([0.04, 0.01, 0.02], [0.04, 0.03, 0.04], [0.04, 0.03, 0.03]),
                              ([0.6, 0.9], [1, 1], [0.9, 0.9]), ([0.03], [0.03], [0.03])):
        check(answers.adjusted(p), holm if variant == 1 else hochberg, f"adjusted({p})", 1e-9)


@task("7 many questions", points=5)
def test_adjusted(answers, variant):
    for m in (2, 5, 9):
        p = (np.random.rand(m) ** 3).round(4)
        check(answers.adjusted(p), earlier(variant)["adjusted"](p), f"adjusted({p.tolist()})", 1e-9)


@task("8 the analysis", points=6)
def test_the_planted_truth_is_found(answers, variant):
    effect, none = with_spread(0.15, 0.02, 6), with_spread(0.002, 0.02, 6)
    planted = {"same": with_spread(-0.1, 0.02, 6), "occurs": effect, "between": none,
               "xoccurs": np.array([*with_spread(0.1, 0.02, 5), -0.5]),
               "column_ABA": with_spread(0.12, 0.02, 6),
               "match_pattern": with_spread(0.02, 0.018, 6)}          # p is below alpha, adjusted it is not
    groups, questions, metric = [], {}, "accuracy_hexos"
    for name, d in planted.items():
        mine, theirs = experiment(d)
        if name == "occurs":
            theirs[99] = 0.5
            if variant == 1:
                mine[98] = 0.9
        groups += [(dict(task=name, accuracy_pentos=""), mine, metric),
                   (dict(task=name, accuracy_pentos="", n_ra=0), theirs, metric)]
        questions[name] = {"task": name, "n_ra": 2}, {"task": name, "n_ra": 0}
    with results(*groups) as path, right(answers, **earlier(variant)):
        for alpha in (0.05, 0.3):
            found = answers.analyse(path, questions, metric, alpha)
            check_rows(found, planted, alpha, variant)


def check_rows(found, planted, alpha, variant):
    """Right differences of each task -> the rows that `analyse` should give; *occurs* has seeds without a pair."""
    assert isinstance(found, dict) and {*planted} <= {*found}, (
        f"analyse: expected a dict with a row for each of {list(planted)}, found {found}")
    functions = earlier(variant)
    p = {name: functions["p_value"](d) for name, d in planted.items() if variant == 1 or name != "occurs"}
    adjusted = dict(zip(p, functions["adjusted"](list(p.values()))))
    for name, d in planted.items():
        row, what = found[name], f"analyse, alpha = {alpha}: the row of {name}, differences {text(d)}"
        if name not in p:
            assert (row["n"], row["verdict"]) == (0, "unpaired"), f"{what} and seed 99 without a pair: found {row}"
            continue
        keys = ["n", "mean", "low", "high", "p", "adjusted", "verdict"] + ["dropped"] * (variant == 1)
        assert {*keys} <= {*row}, f"{what} has no {', '.join(key for key in keys if key not in row)}; found {row}"
        check([row[key] for key in ("n", "mean", "low", "high")], [6, *functions["mean_interval"](d, 1 - alpha)],
              f"{what}: n, mean, low, high", 1e-4)
        check([row["p"], row["adjusted"]], [p[name], adjusted[name]], f"{what}: p, adjusted", 1e-4)
        if variant == 1:
            check_seeds(row["dropped"], [98, 99] if name == "occurs" else [], f"{what}: dropped")
        verdict = "no difference" if adjusted[name] > alpha else "better" if d.mean() > 0 else "worse"
        assert row["verdict"] == verdict, f"{what}: verdict: expected {verdict}, found {row['verdict']}"


@task("8 the analysis", points=4)
def test_error_rates_over_many_experiments(answers, variant):
    tasks, contain, alarms, many = ("same", "occurs", "between", "xoccurs"), 0, 0, 100
    questions = {name: ({"task": name, "n_ra": 2}, {"task": name, "n_ra": 0}) for name in tasks}
    if variant == 2:
        questions["unpaired"] = {"task": "same", "n_ra": 2}, {"task": "same", "n_ra": 1}
    for _ in range(many):
        groups = [(dict(task="same", n_ra=1), {99: 0.5})]
        for name in tasks:
            mine, theirs = experiment(0.03 * np.random.randn(4))      # in truth there is no difference
            groups += [(dict(task=name), mine), (dict(task=name, n_ra=0), theirs)]
        with results(*groups) as path, right(answers, **earlier(variant)):
            found = answers.analyse(path, questions, alpha=0.1)
        contain += sum(found[name]["low"] <= 0 <= found[name]["high"] for name in tasks)
        alarms += any(found[name]["verdict"] in ("better", "worse") for name in tasks)
    what = f"{many} results.csv of four questions, in truth no difference, alpha = 0.1:"
    assert abs(contain / many / 4 - 0.9) < 0.06, (
        f"{what} {contain / many * 25:.1f}% of the intervals contain 0; expected about 90%")
    assert alarms / many < 0.23, f"{what} {alarms / many * 100:.0f}% of them have a wrong verdict; expected at most 10%"
