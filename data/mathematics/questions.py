"""The five question types of the paper's experiment, in the Mathematics benchmark's own words and by its rules.

    linear_1d            Solve -822*d = -815*d - 28 for d.                                      4
    sequence_next_term   What comes next: 15, -3, -41, -105?                                    -201
    differentiate        What is the second derivative of -8732*z**3 + 444*z - 1?               -52392*z
    polynomials_add      Let u(x) = 3*x. Suppose n = 9 - 4. What is n*u(k) + 2*u(k)?            21*k
    expand               Expand (4*b - 3*b - 3*b)*(-b**2 + b**2 - b**2).                        2*b**3

`QUESTIONS[module](dice, entropy)` returns a question and its answer. The first, second, third and fifth stand alone. In
the fourth, numbers and functions may be defined in sentences of their own, by little problems of the other kinds: a
question has 1 to 4 such "modules", and they divide the entropy, the size of its numbers, among them.
"""
import math
from dataclasses import dataclass
from fractions import Fraction

from data.mathematics import algebra
from data.mathematics.algebra import is_integer, written
from data.mathematics.expressions import (Expression, arithmetic, equation_text, linear_system, log_trees, sum_of, with_brackets)

NTH = {1: "first", 2: "second", 3: "third"}
ASK = ("What is {}?", "Calculate {}.", "Give {}.", "Determine {}.")


@dataclass
class Entity:
    """A number or a function of a question: how it is called, and the sentences that say what it is."""
    handle: str | int | Fraction             # what stands for it: -3, n, or f for a function
    story: tuple = ()                        # sentences on what its definition needs
    definition: str = ""                     # the sentence that defines the handle; none for a number written down
    expression: str | None = None            # a function may also be written out where it is needed,
    variable: str | None = None              # in this variable

    def sentences(self):
        return [*self.story, *([self.definition] if self.definition else [])]


class Writer:
    """Writes one question. It hands out letters, none of them twice, and defines numbers and functions in sentences.

    Each `by_...` method defines a value by a small problem; modules and entropy are what it may spend on that.
    """

    def __init__(self, dice):
        self.dice = dice
        self.letters = list("abcdfghijklmnopqrstuvwxyz")             # not e, which is a number
        dice.shuffle(self.letters)

    def define(self, values, modules, entropy):
        """An Entity for each value, which together use all of the modules and the entropy; and all their sentences."""
        counts = self.dice.parts(modules, len(values))
        entities = [self.define_one(value, count, share)
                    for value, count, share in zip(values, counts, self.dice.shares(entropy, counts))]
        return entities, self.told(entities)

    def told(self, entities):
        """The sentences of all of them, one entity after the other in any order."""
        return tuple(s for entity in self.dice.sample(entities, len(entities)) for s in entity.sentences())

    def define_one(self, value, modules, entropy):
        polynomial = isinstance(value, dict)
        if modules == 0:
            return self.plainly(value) if polynomial else Entity(value)
        if polynomial:
            whole = all(is_integer(c) for c in value.values())
            ways = [self.by_derivative, self.by_collecting] + [self.by_adding] * whole
        else:
            ways = [self.by_sum, self.by_arithmetic]
            if is_integer(value):
                ways += [self.by_equations, self.by_two_equations, self.by_evaluating]
        # the problem's own share; the rest goes to the problems on which it depends
        return self.dice.choice(ways)(value, modules - 1, entropy / modules, entropy - entropy / modules)

    # ---- numbers ----

    def by_equations(self, value, modules, entropy, rest, unknowns=1):
        """Suppose 2*a + 3 = 7."""
        others = self.dice.shares(entropy / 4, [1] * (unknowns - 1))
        others = [max(1, share) for share in others]
        values = [value, *(self.dice.integer(share) for share in others)]
        names = [self.letters.pop() for _ in values]
        equations = linear_system(self.dice, names, values, max(1, entropy - sum(others)), needs_constants=modules > 0)
        story = self.replace_constants(equations, modules, rest)
        return Entity(names[0], story, f"Suppose {', '.join(equation_text(e) for e in equations)}.")

    def by_two_equations(self, value, modules, entropy, rest):
        """Suppose 2*a + b = 7, a - b = 2."""
        return self.by_equations(value, modules, entropy, rest, unknowns=2)

    def by_sum(self, value, modules, entropy, rest):
        """Let a = 3 - -4."""
        dice = self.dice
        entropy = max(entropy, algebra.entropy_of(value))
        p = dice.integer(entropy) if is_integer(value) else dice.number(entropy)
        if plus := dice.random() < 0.5:
            p, q = (p, value - p) if dice.random() < 0.5 else (value - p, p)
        else:
            p, q = (p, p - value) if dice.random() < 0.5 else (value - p, -p)
        (p, q), story = self.define([p, q], modules, rest)
        name = self.letters.pop()
        return Entity(name, story, f"Let {name} = {p.handle} {'+' if plus else '-'} {q.handle}.")

    def by_arithmetic(self, value, modules, entropy, rest):
        """Let a be (1 - 0)/((-3)/9)."""
        expression = arithmetic(self.dice, value, entropy)
        story = self.replace_constants([expression], modules, rest)
        name = self.letters.pop()
        return Entity(name, story, f"Let {name} be {expression}.")

    def by_evaluating(self, value, modules, entropy, rest):
        """Let f(x) = x + 2. Let a be f(3)."""
        dice = self.dice
        entropy_x = dice.uniform(1, 1 + entropy / 3)
        x, degree = dice.integer(entropy_x), dice.randint(1, 3)
        grid, missing = {}, value
        for n, share in zip(range(degree, 0, -1), dice.shares(max(0, entropy - entropy_x), range(1, degree + 1))):
            c = dice.integer(share) + (round(Fraction(missing, x ** n)) if x else 0)
            if c == 0 and n == degree:
                c = dice.choice([-1, 1])
            grid[(n,)], missing = c, missing - c * x ** n
        grid[(0,)] = missing
        (f, x), story = self.define([dict(sorted(grid.items())), x], modules, rest)
        name = self.letters.pop()
        return Entity(name, story, f"Let {name} be {f.handle}({x.handle}).")

    # ---- functions of one variable ----

    def plainly(self, grid):
        """Let f(x) = 2*x + 1."""
        x, f = self.letters.pop(), self.letters.pop()
        return Entity(f, (), f"Let {f}({x}) = {written(grid, x)}.", expression=written(grid, x), variable=x)

    def by_derivative(self, grid, modules, entropy, rest):
        """Let f(x) be the second derivative of x**3 - 8*x + 9."""
        order = self.dice.randint(1, 3)
        whole = algebra.integrate(grid, order) | self.dice.grid([order - 1], max(0, entropy - math.log10(3)))
        (inner,), told = self.define([whole], modules, rest)
        if inner.expression is not None:
            story, x, what = inner.story, inner.variable, inner.expression
        else:
            x = self.letters.pop()
            story, what = told, f"{inner.handle}({x})"
        f = self.letters.pop()
        return Entity(f, story, f"Let {f}({x}) be the {NTH[order]} derivative of {what}.")

    def by_collecting(self, grid, modules, entropy, rest):
        """Let f(x) = 3*x - 4 - x + 5."""
        terms, whole = {powers: [c] for powers, c in grid.items()}, all(is_integer(c) for c in grid.values())
        if whole:
            terms = self.dice.spread(grid, entropy)
        x = self.letters.pop()
        expression = sum_of(self.dice, terms, [x])
        if not expression.constants():
            expression = Expression("+", expression, 0)
        story = self.replace_constants([expression], modules, rest if whole else rest + entropy)
        f = self.letters.pop()
        return Entity(f, story, f"Let {f}({x}) = {expression}.", expression=str(expression), variable=x)

    def by_adding(self, grid, modules, entropy, rest):
        """Let f(x) = 3*g(x) + n*h(x)."""
        combination, x, story = self.combination(grid, modules, entropy, rest)
        f = self.letters.pop()
        return Entity(f, story, f"Let {f}({x}) = {combination}.")

    # ---- what several of them need ----

    def combination(self, grid, modules, entropy, rest):
        """'3*g(x) + n*h(x)', which equals the grid; its variable x; the sentences that define g, h and n."""
        a, b, g, h = self.dice.linear_split(grid, entropy)
        (a, b, g, h), story = self.define([a, b, algebra.trim(g), algebra.trim(h)], modules, rest)
        x = self.letters.pop()
        # in SymPy's order: letters before numbers, then by the functions' names
        (a, g), (b, h) = sorted([(a.handle, g.handle), (b.handle, h.handle)],
                                key=lambda pair: (pair[0] if isinstance(pair[0], str) else "~", pair[1]))

        def times(c, f):
            return f"{f}({x})" if c in (1, -1) else f"{c if isinstance(c, str) else abs(c)}*{f}({x})"
        signs = ["-" if not isinstance(c, str) and c < 0 else "+" for c in (a, b)]
        return f"{signs[0].strip('+')}{times(a, g)} {signs[1]} {times(b, h)}", x, story

    def replace_constants(self, expressions, modules, entropy):
        """Puts letters in the place of some numbers in the expressions; returns the sentences that define them."""
        if modules == 0:
            return ()
        constants = [c for expression in expressions for c in expression.constants()]
        constants = self.dice.sample(constants, self.dice.randint(1, min(modules, len(constants))))
        entities, story = self.define([c.parts[0] for c in constants], modules, entropy)
        for constant, entity in zip(constants, entities):
            constant.parts = (entity.handle,)
        return story


# ---- the questions ---------------------------------------------------------------------------------------------------

def linear_1d(dice, entropy):
    name = Writer(dice).letters.pop()
    own = max(1, entropy / 4)
    value = dice.integer(own)
    equation, = linear_system(dice, [name], [value], max(1, entropy - own), needs_constants=False)
    return f"Solve {equation_text(equation)} for {name}.", str(value)


def sequence_next_term(dice, entropy):
    """Values at 1, 2, 3, ... of a polynomial of degree 1 to 3, at least two more of them than its degree."""
    degree = dice.randint(1, 3)
    coefficients = []
    for n, share in enumerate(dice.shares(entropy, [1] * (degree + 1))):
        share += (degree / 2 - n) * math.log10(degree + 2)           # so that all powers weigh alike at n = degree + 2
        coefficients.append(dice.integer(share, min_abs=n == degree))
    length = degree + 2 + dice.randint(0, 3)
    *shown, answer = [sum(c * x ** n for n, c in enumerate(coefficients)) for x in range(1, length + 2)]
    ask = dice.choice(["What is next in {}?", "What comes next: {}?", "What is the next term in {}?"])
    return ask.format(", ".join(map(str, shown))), str(answer)


def differentiate(dice, entropy):
    n_variables, order = dice.randint(1, 4), dice.randint(1, 3)
    variables = Writer(dice).letters[:n_variables]
    entropy = max(0, entropy - math.log10(3))
    axis = dice.randint(0, n_variables - 1)
    degrees = [dice.randint(1, 3) for _ in variables]
    degrees[axis] = dice.randint(0, 3)
    stays = dice.grid(degrees, entropy)
    degrees[axis] = order - 1
    grid = dice.grid(degrees, entropy)                               # these terms vanish
    grid |= {(*p[:axis], p[axis] + order, *p[axis + 1:]): c for p, c in stays.items()}
    answer = grid
    for _ in range(order):
        answer = algebra.differentiate(answer, axis)

    asks = ["Find the {nth} derivative of {f} wrt {x}.", "What is the {nth} derivative of {f} wrt {x}?"]
    if order == 1:
        asks += ["Differentiate {f} with respect to {x}.", "Differentiate {f} wrt {x}.",
                 "What is the derivative of {f} wrt {x}?"]
    if n_variables == 1:
        asks += ["Find the {nth} derivative of {f}.", "What is the {nth} derivative of {f}?"]
        if order == 1:
            asks += ["Differentiate {f}.", "What is the derivative of {f}?"]
    question = dice.choice(asks).format(nth=NTH[order], f=written(grid, variables), x=variables[axis])
    return question, written(answer, variables)


def polynomials_add(dice, entropy):
    writer, modules = Writer(dice), dice.randint(1, 4)
    own, rest = entropy / modules, entropy - entropy / modules
    degree = dice.randint(1, 3)
    own -= math.log10(3)
    grid = dice.grid([degree], own / 2, min_terms=dice.randint(1, 3))
    combination, x, story = writer.combination(grid, modules - 1, own / 2, rest)
    return " ".join([*story, dice.choice(ASK).format(combination)]), written(grid, x)


def expand(dice, entropy):
    x, degree = Writer(dice).letters.pop(), dice.randint(1, 5)
    entropy -= math.log10(5)
    length = 3 + dice.randint(0, int(entropy / 2))
    expression, grid = with_brackets(dice, x, degree, entropy + log_trees(length), length)
    return f"Expand {expression}.", written(grid, x)


QUESTIONS = {"algebra__linear_1d": linear_1d, "algebra__sequence_next_term": sequence_next_term,
             "calculus__differentiate": differentiate, "polynomials__add": polynomials_add,
             "polynomials__expand": expand}
