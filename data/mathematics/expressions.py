"""Unsimplified expressions, written with as few brackets as the benchmark uses; and random ones.

    sum_of           3*x - 4 - x + 5             a polynomial, its terms shuffled
    linear_system    2*a + b = 7, a - b = 2      equations with one solution
    arithmetic       (1 - 0)/((-3)/9)            a number
    with_brackets    (x + 2*x)*(4 - 3) - x       sums and products of polynomials
"""
import math
from fractions import Fraction

from data.mathematics import algebra
from data.mathematics.algebra import is_integer

ATOM, POWER, PRODUCT, SUM = range(4)                                 # precedence, from the strongest to the weakest


class Expression:
    """A tree. op: "constant", "+", "-", "negative", "*", "/" or "**"; parts: the operands. str() gives the text.

    The part of a constant is a number or a letter. Writer.replace_constants puts letters in the place of numbers.
    """

    def __init__(self, op, *parts):
        self.op = op
        self.parts = parts if op == "constant" else [p if isinstance(p, Expression) else Expression("constant", p)
                                                     for p in parts]

    def constants(self):
        """All numbers in the expression, from left to right, as Expressions."""
        if self.op != "constant":
            return [c for part in self.parts for c in part.constants()]
        return [] if isinstance(self.parts[0], str) else [self]

    def precedence(self):
        if self.op == "constant":
            value = self.parts[0]
            return ATOM if isinstance(value, str) or value >= 0 and is_integer(value) else PRODUCT
        return {"**": POWER, "*": PRODUCT, "/": PRODUCT}.get(self.op, SUM)

    def signed_terms(self):
        """[(sign, term)] of a sum; nested sums are flattened, nested differences are not."""
        if self.op == "+":
            return [pair for part in self.parts for pair in part.signed_terms()]
        if self.op == "negative":
            return [(-sign, term) for sign, term in self.parts[0].signed_terms()]
        return [(1, self)]

    def __str__(self):
        def shown(part, strict):
            """In brackets if its precedence is weaker than this operation's; strict: also if it is equal."""
            return f"({part})" if part.precedence() > self.precedence() - strict else str(part)

        if self.op == "constant":
            return str(self.parts[0])
        if self.op in ("+", "negative"):
            (sign, first), *rest = self.signed_terms()
            return "-" * (sign < 0) + shown(first, True) + "".join(
                (" - " if sign < 0 else " + ") + shown(term, True) for sign, term in rest)
        if self.op == "*":
            return "*".join(shown(part, False) for part in self.parts)
        left, right = self.parts
        if self.op == "-":
            return f"{shown(left, False)} - {shown(right, True)}"
        return shown(left, True) + self.op + shown(right, True)


def monomial(c, variables, powers):
    """c x**m y**n without factors 1 and powers 0 and 1."""
    factors = [x if n == 1 else Expression("**", x, n) for x, n in zip(variables, powers) if n]
    if not factors or abs(c) != 1:
        factors.insert(0, abs(c))
    term = factors[0] if len(factors) == 1 else Expression("*", *factors)
    term = term if isinstance(term, Expression) else Expression("constant", term)
    return Expression("negative", term) if c < 0 else term


def sum_of(dice, terms, variables):
    """The sum of {powers: coefficients} as an Expression with one term per coefficient, shuffled."""
    monomials = [monomial(c, variables, powers) for powers, several in terms.items() for c in several]
    dice.shuffle(monomials)
    return Expression("+", *monomials)


def linear_system(dice, names, values, entropy, needs_constants):
    """One or two equations in as many unknowns `names`, with `values` as the only solution.

    Each equation is an Expression left - right. needs_constants: at least one equation contains a number.
    """
    n, share = len(names), dice.uniform(1 / 3, 2 / 3)
    entropies = [max(1, e) for e in dice.shares(entropy * share, [1] * n * n)]
    while True:
        m = [dice.integer(e) for e in entropies]                     # the matrix, row by row
        if n == 1 and m[0] or n == 2 and m[1] and m[3] and m[0] * m[3] != m[1] * m[2]:
            break                                                    # without b, a row would already determine a
    flat = [*m, *(sum(c * v for c, v in zip(m[i * n:], values)) for i in range(n))]
    while True:
        low = sum(c != 0 for c in flat) + 1
        counts = dice.term_counts(dice.randint(low, max(low, 1 + int(n * (1 + entropy / 2)))), flat)
        entropies = dice.shares((1 - share) * entropy, [count - 1 for count in counts])
        terms = [dice.summands(c, count, e) for c, count, e in zip(flat, counts, entropies)]
        equations = []
        for i in range(n):
            row = [monomial(c, [names[j]], [1]) for j in range(n) for c in terms[i * n + j]]
            row += [monomial(-c, [], []) for c in terms[n * n + i]]
            left, right = [], []
            for term in row:
                if dice.random() < 0.5:
                    left.append(term)
                else:
                    right.append(Expression("negative", term))
            equations.append(Expression("-", *(Expression("+", *(side or [0])) for side in (left, right))))
        if not needs_constants or any(equation.constants() for equation in equations):
            return equations


def equation_text(equation):
    left, right = equation.parts
    return f"{left} = {right}"


def arithmetic(dice, value, entropy):
    """An Expression of at least three operations + - * / with this value (int or Fraction)."""
    length = dice.randint(3, 3 + int(entropy / 2))
    entropy -= math.log10(1 + int(entropy / 2))
    return operation(dice, value, length, entropy + log_trees(length))


def log_trees(n):
    """log10 of the number of binary trees with n inner nodes: the entropy of an expression's form."""
    return sum(math.log10((n + k) / k) for k in range(2, n + 1))


def operation(dice, value, count, entropy):
    """An Expression of `count` operations with this value; for a fraction `count` is at least 1."""
    if count == 0:
        return Expression("constant", value)
    own, entropy = entropy / count, entropy - entropy / count
    numerator, denominator = Fraction(value).as_integer_ratio()
    freedom = sum(math.log10(exponent + 1) for exponent in algebra.factors(numerator).values())
    whole = denominator == 1
    ops = ["/"] + ["+", "-"] * (count >= 2 or whole) + ["*"] * (count >= 2 or whole and own <= freedom)
    op = dice.choice(ops)
    if op in "+-":
        x = dice.number(own) if count >= 3 else dice.integer(own)
        first = dice.random() < 0.5
        if op == "+":
            operands = (x, value - x) if first else (value - x, x)
        else:
            operands = (x, x - value) if first else (value + x, x)
    elif op == "*" and count <= 2:
        p, q = dice.split_factors(numerator)
        factor = 1 if count == 1 else dice.integer(own - freedom, min_abs=1, coprime_to=p)
        operands = Fraction(p, factor * denominator), q * factor
    elif count >= 3:
        # value = (p1 p2)/(q1 q2) = (r p1 / s q1) / (r q2 / s p2)
        p2, p1 = dice.split_factors(numerator)
        q1, q2 = dice.split_factors(denominator)
        own -= freedom + sum(math.log10(exponent + 1) for exponent in algebra.factors(denominator).values())
        entropy_r = dice.uniform(0, own)
        r = dice.integer(entropy_r, min_abs=1, coprime_to=q1 * p2)
        s = dice.integer(own - entropy_r, signed=False, min_abs=1, coprime_to=p1 * q2)
        operands = Fraction(r * p1, s * q1), (Fraction(r * q2, s * p2) if op == "/" else Fraction(s * p2, r * q2))
    elif count == 2:
        upper = numerator == 0 or dice.random() < 0.5
        x = dice.integer(own, min_abs=1, coprime_to=denominator if upper else numerator)
        operands = (Fraction(x * numerator, denominator), x) if upper else (x, Fraction(x * denominator, numerator))
    else:
        x = dice.integer(own, min_abs=1)
        operands = numerator * x, denominator * x
    if op == "*" and dice.random() < 0.5:
        operands = operands[::-1]
    fractions = [not is_integer(part) for part in operands]
    counts = [n + f for n, f in zip(dice.parts(count - 1 - sum(fractions), 2), fractions)]
    return Expression(op, *(operation(dice, part if f else int(part), n, e)
                            for part, f, n, e in zip(operands, fractions, counts, dice.shares(entropy, counts))))


def with_brackets(dice, x, degree, entropy, length, brackets=True):
    """-> an Expression, a sum or product of polynomials with about `length` terms in all, and its polynomial.

    brackets: False allows a single polynomial, without brackets.
    """
    if brackets:
        length = max(2, length)
    elif length < 2 or dice.random() < 0.5:
        poly = dice.polynomial([degree], entropy / 2, max_terms=length)
        return sum_of(dice, dice.spread(poly, entropy / 2, length), [x]), poly
    n = dice.randint(1, length - 1)
    left_share, right_share = dice.shares(entropy, [n, length - n])
    if dice.random() < 0.5:
        while True:
            left, f = with_brackets(dice, x, degree, left_share, n)
            right, g = with_brackets(dice, x, degree, right_share, length - n, False)
            if dice.random() < 0.5:
                left, right = right, left
            total = algebra.add(f, g)
            if algebra.degree(total) == degree:                      # else the highest powers cancel: draw again
                return Expression("+", left, right), total
    # the degree of the first factor: more often strictly between 0 and `degree` than one of the two
    d = dice.randint(0, degree) if degree <= 1 or dice.random() < 0.5 else dice.randint(1, degree - 1)
    factors = []
    for its_degree, share, its_length in ((d, left_share, n), (degree - d, right_share, length - n)):
        while True:
            factor, poly = with_brackets(dice, x, its_degree, share, its_length, False)
            if its_degree or any(poly.values()):                     # not 0
                break
        factors.append((factor, poly))
    (left, f), (right, g) = factors
    return Expression("*", left, right), algebra.multiply(f, g)
