"""Generated problems: answers are correct, splits are disjoint, and questions are like those of the benchmark."""
import hashlib
import itertools
import math
import os
import random
import re
import statistics
from collections import Counter
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import pytest
import sympy
from solver import solve

from data import mathematics
from data.mathematics import LEVELS, MODULES, algebra, canonical, generate, split_of
from data.mathematics.__main__ import sentences
from data.mathematics.algebra import written
from data.mathematics.dice import Dice
from data.mathematics.expressions import Expression
from data.mathematics.questions import QUESTIONS

REAL = Path(os.environ.get("DAT_TEST_DATA", "/nowhere")) / "data/mathematics"
real_data = pytest.mark.skipif(not REAL.exists(), reason="DAT_TEST_DATA is not set")
GRID = list(itertools.product(MODULES, LEVELS))
generated = lru_cache(generate)                                       # shared by several tests


# ---- answers ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("module, level", GRID)
def test_every_answer_is_correct(module, level):
    """300 problems, solved from their text by a program that shares no line with the generator (solver.py)."""
    pairs = generated(module, level, 2000, seed=1)[:300]
    assert [(q, a) for q, a in pairs if solve(module, q) != a] == []
    assert all(len(q) <= 160 and len(a) <= 30 for q, a in pairs)
    assert len(set(pairs)) > 0.75 * len(pairs)


@real_data
@pytest.mark.parametrize("module, level", GRID)
def test_the_solver_of_these_tests_is_correct_on_the_published_problems(module, level):
    for question, answer in mathematics.read_pairs(REAL / f"train-{level}/{module}.txt"):
        assert solve(module, question) == answer


def test_the_solver_is_correct_on_some_published_problems():
    for module, question, answer in [
            ("algebra__linear_1d", "Solve -822*d = -815*d - 28 for d.", "4"),
            ("algebra__sequence_next_term", "What comes next: 15, -3, -41, -105, -201, -335, -513, -741?", "-1025"),
            ("calculus__differentiate", "What is the derivative of -2*j**2*v - 2*j**2 - 2*j*t**2*v + 6*j*t + 3*t**2*v"
             " - t**2 + 21*t - 25 wrt j?", "-4*j*v - 4*j - 2*t**2*v + 6*t"),
            ("polynomials__add", "Let w(t) = -t**2 + 6*t + 9. Let y be w(7). Let q(l) = 3*l**3 + l**2 - 1 - 2*l**y +"
             " 2*l**3 - 4*l**3. Let z(u) = u**2 + 3. Give -2*q(k) - z(k).", "-2*k**3 + k**2 - 1"),
            ("polynomials__expand", "Expand (17*x + 16*x + 23*x - x**2)*(-x - 1 + 1).", "x**3 - 56*x**2")]:
        assert solve(module, question) == answer


def test_polynomials_are_written_as_sympy_writes_them():
    dice = random.Random(0)
    for _ in range(400):
        variables = dice.sample("abcdfghxyz", dice.randint(1, 3))
        coefficients = [-2, -1, 0, 1, 3, Fraction(-5, 2), Fraction(1, 3)]
        grid = {tuple(dice.randint(0, 3) for _ in variables): dice.choice(coefficients)
                for _ in range(dice.randint(0, 4))}
        symbols = sympy.symbols(variables)
        expression = sympy.Add(*(sympy.Rational(c.numerator, c.denominator) * math.prod(
            x ** n for x, n in zip(symbols, powers)) for powers, c in grid.items()))
        assert written(grid, variables) == str(expression)


def test_expressions_are_written_with_the_necessary_brackets():
    E = Expression
    assert str(E("/", E("-", 1, 0), E("/", -3, 9))) == "(1 - 0)/((-3)/9)"
    assert str(E("+", 2, -3)) == "2 + -3" and str(E("-", -3, -2)) == "-3 - -2"
    assert str(E("-", E("-", 1, 2), E("-", 3, E("+", 4, 5)))) == "1 - 2 - (3 - (4 + 5))"
    assert str(E("+", E("+", 1, E("negative", "x")), E("negative", E("+", 2, E("negative", 3))))) == "1 - x - 2 + 3"
    assert str(E("*", E("+", "x", 1), E("*", -2, "y"), Fraction(1, 2))) == "(x + 1)*-2*y*1/2"
    assert str(E("*", E("-", 1, 2), E("**", "x", 3))) == "(1 - 2)*x**3"
    assert str(E("negative", 0)) == "-0"
    e = E("+", E("*", 3, E("**", "x", 2)), "x", 5)
    assert [c.parts[0] for c in e.constants()] == [3, 2, 5]
    e.constants()[1].parts = ("n",)
    assert str(e) == "3*x**n + x + 5"


def test_random_numbers_have_the_documented_properties():
    dice = Dice(0)
    for _ in range(500):
        a, b = (dice.integer(dice.uniform(0, 2), min_abs=1) for _ in "ab")
        c, t = dice.randint(-9, 9) * math.gcd(a, b), dice.randint(-5, 5)
        x, y = algebra.bezout(a, b, c, t)
        assert a * x + b * y == c
        n = dice.integer(2, signed=False, min_abs=2, coprime_to=30)
        assert 2 <= n and math.gcd(n, 30) == 1
        left, right = dice.split_factors(c)
        assert left * right == c
        total, count = dice.randint(0, 7), dice.randint(1, 5)
        parts = dice.parts(total, count)
        assert len(parts) == count and sum(parts) == total and min(parts) >= 0
        summands = dice.summands(c, count, 2.0)
        assert len(summands) == count and sum(summands) == c
        weights = [dice.choice([-1, 0, 1, 3]) for _ in range(count)]
        shares = dice.shares(5.0, weights)
        assert all((s > 0) == (w > 0) for s, w in zip(shares, weights))
        assert not any(shares) or math.isclose(sum(shares), 5)
        values = [1, *(dice.choice([0, 2]) for _ in range(count))]
        counts = dice.term_counts(len(values) + 2, values)
        assert sum(counts) == len(values) + 2
        assert all(n >= 1 if v else n != 1 for n, v in zip(counts, values))
    assert all(math.prod(p ** n for p, n in algebra.factors(k).items()) == k for k in [-12, -1, 1, 7, 360, 10007 ** 2])
    for entropy in (1, 3):                                            # 10^entropy integers around 0
        drawn = {dice.integer(entropy) for _ in range(20_000)}
        assert drawn == set(range(-10 ** entropy // 2, 10 ** entropy // 2 + 1))


# ---- splits ----------------------------------------------------------------------------------------------------------

def test_generated_problems_are_those_of_the_published_results():
    """On Python 3.10 to 3.13. If they change, the numbers in results/mathematics have to be measured again."""
    sets = [generate(module, level, 200, 3) for module, level in GRID]
    assert hashlib.sha256(repr(sets).encode()).hexdigest() == (
        "65257a99f14bd8f6ff29aacc06d8c06ff9486dc34215da6c664c702c467f549c")


def test_problems_are_a_function_of_the_arguments():
    pairs = generate("polynomials__add", "hard", 50, seed=4)
    assert pairs == generate("polynomials__add", "hard", 60, seed=4)[:50]
    for other in [("polynomials__add", "easy", 50, 4), ("polynomials__add", "hard", 50, 5),
                  ("polynomials__add", "hard", 50, 4, "val"), ("polynomials__expand", "hard", 50, 4)]:
        assert not set(pairs) & set(generate(*other))


@pytest.mark.parametrize("module", MODULES)
def test_no_validation_problem_occurs_in_training_with_other_words_letters_or_order(module):
    train = [question for level in LEVELS for question, _ in generated(module, level, 2000, seed=1)]
    val = [question for level in LEVELS for question, _ in generate(module, level, 60, seed=1, split="val")]
    assert not {canonical(q) for q in train} & {canonical(q) for q in val}
    assert not set(train) & set(val)
    dice = random.Random(0)
    for question in val:
        letters = sorted(set(re.findall(r"\b[a-z]\b", question)))
        new = dict(zip(letters, dice.sample("abcdfghijklmnopqrstuvwxyz", len(letters))))
        renamed = re.sub(r"\b[a-z]\b", lambda m: new[m[0]], question)
        assert split_of(renamed) == "val"
        *definitions, last = re.split(r"(?<=[.?]) ", renamed)
        reordered = [with_terms_moved(s, dice) for s in [*dice.sample(definitions, len(definitions)), last]]
        assert split_of(" ".join(reordered)) == "val"


def with_terms_moved(sentence, dice):
    """The sentence with the terms of 3*f(x) - g(x), or of an equation, in another order."""
    if dice.random() < 0.5:
        sentence = re.sub(r"(-?)([\w*]*\w\(\w\)) ([+-]) ([\w*]*\w\(\w\))([.?])$", lambda m:
                          f"{m[3].strip('+')}{m[4]} {m[1] or '+'} {m[2]}{m[5]}", sentence)
    if found := re.fullmatch(r"Solve (.*) = (.*) for (\w)\.", sentence):
        sides = [side.replace("- ", "-").replace("+ ", "").split() for side in found.groups()[:2]]
        term = sides[0].pop(dice.randrange(len(sides[0])))
        sides[1].insert(dice.randint(0, len(sides[1])), term[1:] if term[0] == "-" else "-" + term)
        left, right = (" + ".join(side).replace("+ -", "- ") or "0" for side in dice.sample(sides, 2))
        sentence = f"Solve {left} = {right} for {found[3]}."
    return sentence


def test_no_training_sequence_contains_the_answer_to_a_validation_sequence():
    module, beginnings = "algebra__sequence_next_term", set()
    for question, answer in (pair for level in LEVELS for pair in generated(module, level, 2000, seed=1)):
        terms = [*re.findall(r"-?\d+", question), answer]
        beginnings |= {",".join(terms[:n + 1]) for n in range(len(terms))}
    for question, answer in generate(module, "easy", 500, seed=1, split="val"):
        terms = re.findall(r"-?\d+", question)
        assert ",".join([*terms, answer]) not in beginnings
        assert split_of(f"What comes next: {', '.join([*terms, answer])}?") == "val"


@pytest.mark.parametrize("module, level", GRID)
def test_a_tenth_of_the_problems_is_for_validation(module, level):
    dice, low = Dice(2), 3 + 7 / 3 * LEVELS.index(level)
    problems = {canonical(QUESTIONS[module](dice, dice.uniform(low, low + 7 / 3))[0]) for _ in range(700)}
    n = sum(int(hashlib.sha256(problem.encode()).hexdigest()[:16], 16) % 10 == 0 for problem in problems)
    assert abs(n - len(problems) / 10) < 5 * (0.09 * len(problems)) ** 0.5
    assert len(problems) > 350                                        # different problems have different forms


def test_the_canonical_form_is_that_of_the_same_problem_in_other_words():
    for same in [
            ("What is next in 3, 5, 7?", "What comes next: 3, 5, 7?", "What is the next term in 3, 5, 7, 9, 11?"),
            ("Solve 2*x - 3 = 5*x + 6 for x.", "Solve 6 + 5*y = -3 + 2*y for y.", "Solve 0 = 6 + 3 + 5*c - 2*c for c."),
            ("Let f(x) = x. Let g(x) = 5. What is -3*f(y) - g(y)?",
             "Let b(x) = x. Let a(x) = 5. What is -a(y) - 3*b(y)?"),
            ("Differentiate 3*x**2 + x.", "What is the derivative of 3*y**2 + y?",
             "Find the first derivative of x + 3*x**2.",
             "Differentiate 3*x**2 + x with respect to x.", "What is the first derivative of 3*x**2 + x wrt x?"),
            # the same polynomial in other letters, which SymPy then writes in another order
            ("Differentiate 2*a**2*b + a*b**3 - 5*b wrt b.", "Differentiate a**3*b + 2*a*b**2 - 5*a wrt a.",
             "Differentiate 2*c**2*w + c*w**3 - 5*w with respect to w."),
            ("Let f(x) = 2*x. Let g(y) = 3*y. What is f(z) + 2*g(z)?",
             "Let g(y) = 3*y. Let f(x) = 2*x. Give f(z) + 2*g(z).",
             "Let k(a) = 2*a. Let b(c) = 3*c. Calculate k(d) + 2*b(d).")]:
        assert len({canonical(question) for question in same}) == 1
    different = ["What is next in 3, 5, 7?", "What is next in 3, 5, 8?", "What is next in 5, 7, 9?",
                 "What is next in -3, -5, -7?", "What is next in 3, 5, 7, 10?",
                 "Differentiate a**2*b wrt a.", "Differentiate a**2*b wrt b.",
                 "Find the second derivative of a**2*b wrt a.",
                 "Differentiate a**2*b + 1 wrt a.", "Find the third derivative of a**2*b wrt a.", "Differentiate a.",
                 "Solve 2*x = 4 for x.", "Solve 2*x = -4 for x.", "Solve 2*x + 1 = 5 for x.", "Expand 2*x*(1 + x).",
                 "Let f(x) = 2*x. Let g(y) = 3*y. What is f(z) + 2*g(z)?",
                 "Let f(x) = 2*x. Let g(y) = 3*y. What is g(z) + 2*f(z)?",
                 "Let f(x) = 2*x. Let g(y) = 3*y. What is -f(z) + 2*g(z)?",
                 "Let f(x) = 2*x. Let g(y) = 3*y. What is f(z) - 2*g(z)?",
                 "Let f(x) be the first derivative of 2*x. What is f(z) + f(z)?",
                 "Let f(x) be the second derivative of 2*x. What is f(z) + f(z)?"]
    assert len({canonical(question) for question in different}) == len(different)


def test_an_unknown_module_level_or_split_is_an_error():
    for wrong in [("algebra__linear", "easy", 1, 0), ("algebra__linear_1d", "simple", 1, 0),
                  ("algebra__linear_1d", "easy", 1, 0, "test")]:
        with pytest.raises(ValueError, match="choose from"):
            generate(*wrong)


# ---- like the published questions ------------------------------------------------------------------------------------

@real_data
@pytest.mark.parametrize("module, level", GRID)
def test_questions_are_like_the_benchmarks(module, level):
    """Lengths, digits, brackets, minus signs and zeros within 4 standard errors, and the same sentences."""
    real, ours = mathematics.read_pairs(REAL / f"train-{level}/{module}.txt"), generated(module, level, 2000, seed=1)
    for measure in (lambda q, a: len(q), lambda q, a: len(a), lambda q, a: sum(map(str.isdigit, q)),
                    lambda q, a: q.count("-"), lambda q, a: q.count("("), lambda q, a: len(re.findall(r"\b0\b", q)),
                    lambda q, a: len(q) ** 2, lambda q, a: len(set(re.findall(r"\b[a-z]\b", q)))):
        x, y = ([measure(*pair) for pair in pairs] for pairs in (real, ours))
        error = (statistics.variance(x) / len(x) + statistics.variance(y) / len(y)) ** 0.5
        assert abs(statistics.mean(x) - statistics.mean(y)) <= 4 * error
    x, y = (Counter(s for question, _ in pairs for s in sentences(question)) for pairs in (real, ours))
    assert x.keys() <= y.keys() | {s for s in x if x[s] < 3}
    for sentence in x | y:
        p = (x[sentence] + y[sentence]) / (len(real) + len(ours))     # frequency per question
        error = (p * (1 / len(real) + 1 / len(ours))) ** 0.5
        assert abs(x[sentence] / len(real) - y[sentence] / len(ours)) < 4.5 * error


def test_numbers_grow_with_the_level():
    for module in MODULES:
        digits = [statistics.mean(len(max(re.findall(r"\d+", question), key=len, default=""))
                                  for question, _ in generated(module, level, 2000, seed=1)) for level in LEVELS]
        assert digits[0] < digits[1] < digits[2]


def test_every_kind_of_definition_occurs():
    text = " ".join(q for level in LEVELS for q, _ in generated("polynomials__add", level, 2000, seed=1))
    for pattern in [r"Suppose [^,.]+\.", r"Suppose [^,.]+, [^,.]+\.", r"Let [a-z] = -?\d+ [-+] -?\d+\.",
                    r"Let [a-z] be \(", r"Let [a-z] be [a-z]\(-?\d+\)\.", r"be the third derivative of",
                    r"be the \w+ derivative of [a-z]\(",
                    r"Let [a-z]\([a-z]\) = -?(\d+\*)?[a-z]\([a-z]\) [-+]", r"\*\*[a-z]", r"[a-z]\*[a-z]\([a-z]\) [-+]",
                    r" [-+] 0\b", r"-0\b"]:
        assert re.search(pattern, text), pattern
