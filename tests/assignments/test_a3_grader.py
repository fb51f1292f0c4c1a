"""The grader of a3 gives a right solution 100 points, and takes points for a mistake in its own task alone."""
from dataclasses import fields
from pathlib import Path

import pytest
from remembered import grade

from assignments.a3.made_up import COLUMNS
from assignments.grading import HERE
from toolbox.figures.relational_games import RESULTS
from toolbox.run import NOT_COMPARED
from train_relgames import Config

SOLUTION = Path(__file__).with_name("solution_a3.py")
TEXT = SOLUTION.read_text(encoding="utf-8")


def lost(path, variant=1, seed=0):
    """{number of the task: points lost}, of tasks that lost some; and the messages."""
    results = grade("a3", path, variant, seed)
    assert sum(points for _, points, _, _ in results) == 100
    return ({int(name.split()[0]): points - earned for name, points, earned, _ in results if earned < points},
            " ".join(message for *_, messages in results for message in messages))


def replaced(tmp_path, *pairs):
    text = TEXT
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "answers.py"
    path.write_text(text, encoding="utf-8")
    return path


def solution(variant, tmp_path):
    return replaced(tmp_path, ("VARIANT = 1", f"VARIANT = {variant}"))


@pytest.mark.parametrize("variant", [1, 2])
@pytest.mark.parametrize("seed", [0, 7])
def test_a_right_solution_has_all_points(variant, seed, tmp_path):
    assert lost(solution(variant, tmp_path), variant, seed) == ({}, "")


@pytest.mark.parametrize("variant", [1, 2])
def test_a_solution_of_the_other_variant_loses_most_points_of_half_the_tasks(variant, tmp_path):
    points = {name: (total, earned) for name, total, earned, _ in grade("a3", solution(variant, tmp_path), 3 - variant)}
    assert sum(earned < total / 2 for total, earned in points.values()) >= 4
    assert sum(earned for _, earned in points.values()) < 60


def test_the_starter_has_no_points():
    points, messages = lost(HERE / "a3" / "answers.py")
    assert sum(points.values()) == 100 and set(messages.split("not written yet")) <= {"", " "}


MISTAKES = [
    ("a seed's later row replaces the earlier one", "if seed in found:", "if False:", {1}),
    ("an empty cell is 0", 'row[metric] == "" or ', "", {1}),
    ("one condition is enough", "or any(row", "or all(row", {1}),
    ("seeds are text", "found[seed] =", "found[row['seed']] =", {1}),
    ("an unknown column selects nothing", "name not in columns:", "False:", {1}),
    ("the wrong way round", "mine[seed] - theirs[seed] for", "theirs[seed] - mine[seed] for", {2}),
    ("unpaired: sorted values", "[mine[seed] - theirs[seed] for seed in both]",
     "[a - b for a, b in zip(sorted(mine.values()), sorted(theirs.values()))]", {2}),
    ("in the order of the file", "[mine[seed] - theirs[seed] for seed in both]",
     "[a - b for a, b in zip(mine.values(), theirs.values())]", {2}),
    ("dropped in silence", "both if VARIANT == 2 else dropped", "both if VARIANT == 2 else []", {2}),
    ("a missing seed counts as 0", "both = sorted(mine.keys() & theirs.keys())",
     "both = sorted(mine.keys() | theirs.keys()); mine = {**dict.fromkeys(both, 0), **mine};"
     " theirs = {**dict.fromkeys(both, 0), **theirs}", {2}),
    ("df instead of df - 1", "np.cos(phi) ** (df - 1)", "np.cos(phi) ** df", {3}),
    ("the rectangle rule with few cells", "/ 2000 / 3 * (f[0] + 4 * f[1::2].sum() + 2 * f[2:-1:2].sum() + f[-1])",
     "/ 20 * f[:-1:100].sum()", {3}),
    ("t without sign", "angle = math.atan(t /", "angle = math.atan(abs(t) /", {3}),
    ("the two-sided quantile", "df) < p:", "df) < (1 + p) / 2:", {3}),
    ("a bounded search", "low, high = -math.pi / 2, math.pi / 2", "low, high = -1.2, 1.2", {3}),
    ("n instead of n - 1", "np.std(values, ddof=1) / math.sqrt(n)\n    return mean,",
     "np.std(values) / math.sqrt(n)\n    return mean,", {4}),
    ("n degrees of freedom", "t_quantile(1 - tail, n - 1)", "t_quantile(1 - tail, n)", {4}),
    ("normal instead of t", "t_quantile(1 - tail, n - 1)", "t_quantile(1 - tail, 200)", {4}),
    ("standard deviation, not error", "np.std(values, ddof=1) / math.sqrt(n)\n    return mean,",
     "np.std(values, ddof=1)\n    return mean,", {4}),
    ("the whole error on each side", "tail = (1 - confidence) / (1 if VARIANT == 2 else 2)", "tail = 1 - confidence",
     {4}),
    ("outliers are left out", "    mean = np.mean(values)\n    tail",
     "    values = np.array(values); values = values[abs(values - np.median(values)) <= 3 * np.median(abs(values - "
     "np.median(values))) + 0.05]; n = len(values)\n    mean = np.mean(values)\n    tail", {4}),
    ("the median", "mean = np.mean(values)\n", "mean = np.median(values)\n", {4}),
    ("always 95%", "tail = (1 - confidence)", "tail = 0.05", {4}),
    ("a one-sided p-value", "2 * (1 - t_cdf(abs(t)", "(1 - t_cdf(abs(t)", {4}),
    ("a p-value above 1", "2 * (1 - t_cdf(abs(t)", "2 * (1 - t_cdf(t", {4}),
    ("NaN from equal values", "if s == 0:", "if False:", {4}),
    ("one value has an interval", 'if n < 2:\n        raise ValueError(f"{n} values: an interval',
     'if n < 1:\n        raise ValueError(f"{n} values: an interval', {4}),
    ("the sign of the mean", '"better" if low > 0 else', '"better" if low + high > 0 else', {5}),
    ("the largest difference",
     "[seed for k, seed in enumerate(seeds) if verdict(np.delete(differences, k), confidence) "
     "!= whole]", "[seeds[int(np.argmax(abs(differences)))]]", {5}),
    ("positions instead of seeds", "[seed for k, seed", "[k for k, seed", {5}),
    ("seeds of one model", "seeds = sorted(mine.keys() & theirs.keys())", "seeds = sorted(mine.keys() | theirs.keys())",
     {5}),
    ("the confidence is not passed on", "verdict(np.delete(differences, k), confidence)",
     "verdict(np.delete(differences, k), 0.95)", {5}),
    ("a normal critical value", "critical = t_quantile(1 - alpha / (1 if VARIANT == 2 else 2), df)", "critical = 1.96",
     {6}),
    ("a one-sided test", "t_quantile(1 - alpha / (1 if VARIANT == 2 else 2), df)", "t_quantile(1 - alpha, df)", {6}),
    ("one tail of the power", "upper if VARIANT == 2 else upper + lower", "upper", {6}),
    ("no root of n", "effect / sd * math.sqrt(n)", "effect / sd * n", {6}),
    ("the spread is taken as known",
     "upper, lower = normal_cdf(shift - critical * w), normal_cdf(-shift - critical * w)",
     "upper, lower = normal_cdf(shift - critical + 0 * w), normal_cdf(-shift - critical + 0 * w)", {6}),
    ("one seed too many", "    return n\n\n\ndef adjusted", "    return n + 1\n\n\ndef adjusted", {6}),
    ("alpha is not passed on", "power(effect, sd, n, alpha) < target", "power(effect, sd, n) < target", {6}),
    ("Bonferroni", "scaled = p[order] * np.arange(m, 0, -1)", "scaled = p[order] * m", {7}),
    ("not monotone", "np.minimum(1, np.maximum.accumulate(scaled))", "np.minimum(1, scaled)", {7}),
    ("above 1", "np.minimum(1, np.maximum.accumulate(scaled))", "np.maximum.accumulate(scaled)", {7}),
    ("sorted", "result[order] = np.minimum(1, np.maximum", "result[:] = np.minimum(1, np.maximum", {7}),
    ("the order's inverse", "result[order] = np.minimum(1, np.maximum",
     "result[np.argsort(order)] = np.minimum(1, np.maximum", {7}),
    ("verdicts without adjustment", '"no difference" if p > alpha', '"no difference" if row["p"] > alpha', {8}),
    ("always alpha = 0.05", "if p > alpha else", "if p > 0.05 else", {8}),
    ("a 95% interval at any alpha", "mean_interval(differences, 1 - alpha)", "mean_interval(differences)", {8}),
    ("whatever is significant is better", 'if row["mean"] > 0 else "worse"', "", {8}),
    ("n counts the unpaired seeds", '{"n": len(differences),', '{"n": len(runs[0]),', {8}),
    ("the metric is not passed on", "read_results(path, theirs, metric)", "read_results(path, theirs)", {8}),
]


@pytest.mark.filterwarnings("ignore:invalid value")                   # the NaN of one of them
@pytest.mark.parametrize("name, old, new, tasks", MISTAKES, ids=[mistake[0] for mistake in MISTAKES])
def test_a_mistake_costs_points_in_its_own_task(name, old, new, tasks, tmp_path):
    points, message = lost(replaced(tmp_path, (old, new)))
    assert set(points) == tasks, message


@pytest.mark.parametrize("old, new, tasks, message", [
    ("def power(", "def other(", {6}, "answers.py has no function power"),
    ("return differences, both if VARIANT == 2 else dropped", "return differences", {2}, "expected a tuple of 2"),
    ("return 0.5 + integral * ", "return 1 / 0 + integral * ", {3}, "ZeroDivisionError"),
    ("    return result\n    scaled", "    return result\n    return [0.5]\n    scaled", {7},
     "expected the shape (3,)"),
    ("    return table", "    pass", {8}, "expected a dict with a row for each"),
    ('"adjusted"] = p', '"corrected"] = p', {8}, "has no adjusted"),
    ("    if effect == 0 or", "    if", {6}, "n = 1001"),
    ('    if len(seeds) < 3:\n        raise ValueError("needs three pairs or more")\n', "", set(), ""),
    ("import csv", "import csv\nfrom toolbox import stats", {1, 2, 3, 4, 5, 6, 7, 8}, "answers.py uses toolbox"),
    ("import csv", "import csv\nimport scipy.stats", {1, 2, 3, 4, 5, 6, 7, 8}, "answers.py uses scipy.stats"),
])
def test_what_is_missing_or_of_another_shape_costs_its_task_alone(old, new, tasks, message, tmp_path):
    points, messages = lost(replaced(tmp_path, (old, new)))
    assert set(points) == tasks and message in messages


def test_made_up_files_have_the_columns_that_train_relgames_writes():
    options = {field.name for field in fields(Config)} - set(NOT_COMPARED)
    assert set(COLUMNS) == options | set(RESULTS)
