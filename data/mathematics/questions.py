"""The five question types of the paper's experiment, with the wording and the rules of the Mathematics benchmark.

    linear_1d            Solve -822*d = -815*d - 28 for d.                                      4
    sequence_next_term   What comes next: 15, -3, -41, -105?                                    -201
    differentiate        What is the second derivative of -8732*z**3 + 444*z - 1?               -52392*z
    polynomials_add      Let u(x) = 3*x. Suppose n = 9 - 4. What is n*u(k) + 2*u(k)?            21*k
    expand               Expand (4*b - 3*b - 3*b)*(-b**2 + b**2 - b**2).                        2*b**3

`QUESTIONS[module](dice, entropy)` returns a question and its answer. In polynomials_add, numbers and functions can be
defined in earlier sentences by smaller problems of the other kinds. Such a question consists of 1 to 4 "modules", the
question itself and the smaller problems, which share its entropy, that is, the size of its numbers.
"""
import math
from dataclasses import dataclass
from fractions import Fraction

from data.mathematics import algebra
from data.mathematics.algebra import is_integer, written
from data.mathematics.dice import entropy_of
from data.mathematics.expressions import (Expression, arithmetic, equation_text, linear_system, log_trees, sum_of,
                                          with_brackets)

NTH = {1: "first", 2: "second", 3: "third"}
WORDINGS = ("What is {}?", "Calculate {}.", "Give {}.", "Determine {}.")


@dataclass
class Entity:
    """A number or a function in a question: its name and the sentences that define it."""
    name: str | int | Fraction               # how the question refers to it: -3, n, or f for a function
    premises: tuple = ()                     # sentences that the definition depends on
    definition: str = ""                     # the sentence that defines the name; empty for a number like -3
    expression: str | None = None            # of a function: its expression, if that can be used instead of the name,
    variable: str | None = None              # and the variable of that expression

    def sentences(self):
        return [*self.premises, *([self.definition] if self.definition else [])]


class Writer:
    """Writes one question: assigns letters, each one once, and defines numbers and functions in sentences.

    Each `by_...` method defines a value by a small problem. modules: how many further problems this one contains;
    entropy: that of the problem itself; rest: that of the further problems.
    """

    def __init__(self, dice):
        self.dice = dice
        self.letters = list("abcdfghijklmnopqrstuvwxyz")             # without e, which is a number
        dice.shuffle(self.letters)

    def define(self, values, modules, entropy):
        """-> an Entity for each value, and all their sentences. Distributes the modules and the entropy over them."""
        counts = self.dice.parts(modules, len(values))
        entities = [self.define_one(value, count, share)
                    for value, count, share in zip(values, counts, self.dice.shares(entropy, counts))]
        in_random_order = self.dice.sample(entities, len(entities))
        return entities, tuple(sentence for entity in in_random_order for sentence in entity.sentences())

    def define_one(self, value, modules, entropy):
        is_function = isinstance(value, dict)
        if modules == 0:
            return self.written_out(value) if is_function else Entity(value)
        if is_function:
            all_integers = all(is_integer(c) for c in value.values())
            ways = [self.by_derivative, self.by_collecting] + [self.by_adding] * all_integers
        else:
            ways = [self.by_sum, self.by_arithmetic]
            if is_integer(value):
                ways += [self.by_equations, self.by_two_equations, self.by_evaluating]
        # this problem's share of the entropy; the rest is for the problems that it depends on
        return self.dice.choice(ways)(value, modules - 1, entropy / modules, entropy - entropy / modules)

    # ---- numbers ----

    def by_equations(self, value, modules, entropy, rest, unknowns=1):
        """Suppose 2*a + 3 = 7."""
        others = self.dice.shares(entropy / 4, [1] * (unknowns - 1))
        others = [max(1, share) for share in others]
        values = [value, *(self.dice.integer(share) for share in others)]
        names = [self.letters.pop() for _ in values]
        equations = linear_system(self.dice, names, values, max(1, entropy - sum(others)), needs_constants=modules > 0)
        premises = self.replace_constants(equations, modules, rest)
        return Entity(names[0], premises, f"Suppose {', '.join(equation_text(e) for e in equations)}.")

    def by_two_equations(self, value, modules, entropy, rest):
        """Suppose 2*a + b = 7, a - b = 2."""
        return self.by_equations(value, modules, entropy, rest, unknowns=2)

    def by_sum(self, value, modules, entropy, rest):
        """Let a = 3 - -4."""
        dice = self.dice
        entropy = max(entropy, entropy_of(value))
        p = dice.integer(entropy) if is_integer(value) else dice.number(entropy)
        if plus := dice.random() < 0.5:
            p, q = (p, value - p) if dice.random() < 0.5 else (value - p, p)
        else:
            p, q = (p, p - value) if dice.random() < 0.5 else (value - p, -p)
        (p, q), premises = self.define([p, q], modules, rest)
        name = self.letters.pop()
        return Entity(name, premises, f"Let {name} = {p.name} {'+' if plus else '-'} {q.name}.")

    def by_arithmetic(self, value, modules, entropy, rest):
        """Let a be (1 - 0)/((-3)/9)."""
        expression = arithmetic(self.dice, value, entropy)
        premises = self.replace_constants([expression], modules, rest)
        name = self.letters.pop()
        return Entity(name, premises, f"Let {name} be {expression}.")

    def by_evaluating(self, value, modules, entropy, rest):
        """Let f(x) = x + 2. Let a be f(3)."""
        dice = self.dice
        entropy_x = dice.uniform(1, 1 + entropy / 3)
        x, degree = dice.integer(entropy_x), dice.randint(1, 3)
        poly, missing = {}, value
        for n, share in zip(range(degree, 0, -1), dice.shares(max(0, entropy - entropy_x), range(1, degree + 1))):
            c = dice.integer(share) + (round(Fraction(missing, x ** n)) if x else 0)
            if c == 0 and n == degree:
                c = dice.choice([-1, 1])
            poly[(n,)], missing = c, missing - c * x ** n
        poly[(0,)] = missing
        (f, x), premises = self.define([dict(sorted(poly.items())), x], modules, rest)
        name = self.letters.pop()
        return Entity(name, premises, f"Let {name} be {f.name}({x.name}).")

    # ---- functions of one variable ----

    def written_out(self, poly):
        """Let f(x) = 2*x + 1."""
        x, f = self.letters.pop(), self.letters.pop()
        return Entity(f, (), f"Let {f}({x}) = {written(poly, x)}.", expression=written(poly, x), variable=x)

    def by_derivative(self, poly, modules, entropy, rest):
        """Let f(x) be the second derivative of x**3 - 8*x + 9."""
        order = self.dice.randint(1, 3)
        vanishing = self.dice.polynomial([order - 1], max(0, entropy - math.log10(3)))
        (inner,), premises = self.define([algebra.integrate(poly, order) | vanishing], modules, rest)
        if inner.expression is not None:
            premises, x, integral = inner.premises, inner.variable, inner.expression
        else:
            x = self.letters.pop()
            integral = f"{inner.name}({x})"
        f = self.letters.pop()
        return Entity(f, premises, f"Let {f}({x}) be the {NTH[order]} derivative of {integral}.")

    def by_collecting(self, poly, modules, entropy, rest):
        """Let f(x) = 3*x - 4 - x + 5."""
        terms, all_integers = {powers: [c] for powers, c in poly.items()}, all(is_integer(c) for c in poly.values())
        if all_integers:
            terms = self.dice.spread(poly, entropy)
        x = self.letters.pop()
        expression = sum_of(self.dice, terms, [x])
        if not expression.constants():
            expression = Expression("+", expression, 0)
        premises = self.replace_constants([expression], modules, rest if all_integers else rest + entropy)
        f = self.letters.pop()
        return Entity(f, premises, f"Let {f}({x}) = {expression}.", expression=str(expression), variable=x)

    def by_adding(self, poly, modules, entropy, rest):
        """Let f(x) = 3*g(x) + n*h(x)."""
        combination, x, premises = self.combination(poly, modules, entropy, rest)
        f = self.letters.pop()
        return Entity(f, premises, f"Let {f}({x}) = {combination}.")

    # ---- used by several of them ----

    def combination(self, poly, modules, entropy, rest):
        """-> '3*g(x) + n*h(x)', which equals the polynomial; x; the sentences that define g, h and n."""
        a, b, g, h = self.dice.linear_split(poly, entropy)
        (a, b, g, h), premises = self.define([a, b, algebra.trim(g), algebra.trim(h)], modules, rest)
        x = self.letters.pop()
        # in SymPy's order: letters before numbers, then by the functions' names
        (a, g), (b, h) = sorted([(a.name, g.name), (b.name, h.name)],
                                key=lambda pair: (pair[0] if isinstance(pair[0], str) else "~", pair[1]))

        def times(c, f):
            return f"{f}({x})" if c in (1, -1) else f"{c if isinstance(c, str) else abs(c)}*{f}({x})"
        signs = ["-" if not isinstance(c, str) and c < 0 else "+" for c in (a, b)]
        return f"{signs[0].strip('+')}{times(a, g)} {signs[1]} {times(b, h)}", x, premises

    def replace_constants(self, expressions, modules, entropy):
        """Replaces some numbers in the expressions by letters; returns the sentences that define these letters."""
        if modules == 0:
            return ()
        constants = [c for expression in expressions for c in expression.constants()]
        constants = self.dice.sample(constants, self.dice.randint(1, min(modules, len(constants))))
        entities, premises = self.define([c.parts[0] for c in constants], modules, entropy)
        for constant, entity in zip(constants, entities):
            constant.parts = (entity.name,)
        return premises


# ---- the questions ---------------------------------------------------------------------------------------------------

def linear_1d(dice, entropy):
    name = Writer(dice).letters.pop()
    own = max(1, entropy / 4)
    value = dice.integer(own)
    equation, = linear_system(dice, [name], [value], max(1, entropy - own), needs_constants=False)
    return f"Solve {equation_text(equation)} for {name}.", str(value)


def sequence_next_term(dice, entropy):
    """Values at 1, 2, 3, ... of a polynomial of degree 1 to 3; the question shows at least degree + 2 of them."""
    degree = dice.randint(1, 3)
    coefficients = []
    for n, share in enumerate(dice.shares(entropy, [1] * (degree + 1))):
        share += (degree / 2 - n) * math.log10(degree + 2)           # all powers of equal size at x = degree + 2
        coefficients.append(dice.integer(share, min_abs=n == degree))
    length = degree + 2 + dice.randint(0, 3)
    *shown, answer = [sum(c * x ** n for n, c in enumerate(coefficients)) for x in range(1, length + 2)]
    wording = dice.choice(["What is next in {}?", "What comes next: {}?", "What is the next term in {}?"])
    return wording.format(", ".join(map(str, shown))), str(answer)


def differentiate(dice, entropy):
    n_variables, order = dice.randint(1, 4), dice.randint(1, 3)
    variables = Writer(dice).letters[:n_variables]
    entropy = max(0, entropy - math.log10(3))
    axis = dice.randint(0, n_variables - 1)
    degrees = [dice.randint(1, 3) for _ in variables]
    degrees[axis] = dice.randint(0, 3)
    remaining = dice.polynomial(degrees, entropy)
    degrees[axis] = order - 1
    poly = dice.polynomial(degrees, entropy)                         # the terms that vanish, and the others:
    poly |= {(*p[:axis], p[axis] + order, *p[axis + 1:]): c for p, c in remaining.items()}
    answer = poly
    for _ in range(order):
        answer = algebra.differentiate(answer, axis)

    wordings = ["Find the {nth} derivative of {f} wrt {x}.", "What is the {nth} derivative of {f} wrt {x}?"]
    if order == 1:
        wordings += ["Differentiate {f} with respect to {x}.", "Differentiate {f} wrt {x}.",
                     "What is the derivative of {f} wrt {x}?"]
    if n_variables == 1:
        wordings += ["Find the {nth} derivative of {f}.", "What is the {nth} derivative of {f}?"]
        if order == 1:
            wordings += ["Differentiate {f}.", "What is the derivative of {f}?"]
    question = dice.choice(wordings).format(nth=NTH[order], f=written(poly, variables), x=variables[axis])
    return question, written(answer, variables)


def polynomials_add(dice, entropy):
    writer, modules = Writer(dice), dice.randint(1, 4)
    own, rest = entropy / modules, entropy - entropy / modules
    degree = dice.randint(1, 3)
    own -= math.log10(3)
    poly = dice.polynomial([degree], own / 2, min_terms=dice.randint(1, 3))
    combination, x, premises = writer.combination(poly, modules - 1, own / 2, rest)
    return " ".join([*premises, dice.choice(WORDINGS).format(combination)]), written(poly, x)


def expand(dice, entropy):
    x, degree = Writer(dice).letters.pop(), dice.randint(1, 5)
    entropy -= math.log10(5)
    length = 3 + dice.randint(0, int(entropy / 2))
    expression, poly = with_brackets(dice, x, degree, entropy + log_trees(length), length)
    return f"Expand {expression}.", written(poly, x)


QUESTIONS = {"algebra__linear_1d": linear_1d, "algebra__sequence_next_term": sequence_next_term,
             "calculus__differentiate": differentiate, "polynomials__add": polynomials_add,
             "polynomials__expand": expand}
