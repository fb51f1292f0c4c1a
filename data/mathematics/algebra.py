"""Exact arithmetic for the questions of the Mathematics benchmark: integers, fractions and polynomials.

A polynomial is a dict {powers: coefficient}, zeros included: in x and y, {(2, 1): 3} is 3*x**2*y. Coefficients are int
or Fraction.
"""
import math
from fractions import Fraction
from functools import lru_cache


# ---- numbers ---------------------------------------------------------------------------------------------------------

@lru_cache(maxsize=100_000)
def factors(n):
    """{prime: exponent} of an integer, with {-1: 1} for its sign. 0 and 1 have none."""
    found = {-1: 1} if n < 0 else {}
    n, p = abs(n), 2
    while p * p <= n:
        while n % p == 0:
            n, found[p] = n // p, found.get(p, 0) + 1
        p += 1 if p == 2 else 2
    if n > 1:
        found[n] = found.get(n, 0) + 1
    return found


def is_integer(value):
    return Fraction(value).denominator == 1


def bezout(a, b, c, t):
    """The t-th solution x, y of a x + b y = c, where gcd(a, b) divides c.

    x = c x0 + t b and y = c y0 - t a, with a x0 + b y0 = 1 from Euclid's algorithm.
    """
    common = math.gcd(a, b, c)
    a, b, c = a // common, b // common, c // common
    if c == 0:
        return b * t, -a * t
    (r, x, y), (r2, x2, y2) = (abs(a), 1, 0), (abs(b), 0, 1)
    while r2:
        q = r // r2
        (r, x, y), (r2, x2, y2) = (r2, x2, y2), (r - q * r2, x - q * x2, y - q * y2)
    return c * x * (1 if a > 0 else -1) + b * t, c * y * (1 if b > 0 else -1) - a * t


# ---- polynomials -----------------------------------------------------------------------------------------------------

def add(f, g):
    """f + g, of polynomials in one variable."""
    return {powers: f.get(powers, 0) + g.get(powers, 0) for powers in sorted({*f, *g})}


def multiply(f, g):
    """f g, of polynomials in one variable."""
    result = {}
    for (m,), a in f.items():
        for (n,), b in g.items():
            result[(m + n,)] = result.get((m + n,), 0) + a * b
    return result


def differentiate(poly, axis=0):
    """The derivative with respect to variable number `axis`: x**n becomes n*x**(n-1)."""
    return trim({(*p[:axis], p[axis] - 1, *p[axis + 1:]): c * p[axis] for p, c in poly.items() if p[axis]})


def integrate(poly, order):
    """A polynomial in one variable whose derivative of this order is `poly`; terms of lower degree are 0."""
    result = {(n,): 0 for n in range(order)}
    for (n,), c in poly.items():
        result[(n + order,)] = c / Fraction(math.prod(range(n + 1, n + order + 1)))
    return {powers: c.numerator if is_integer(c) else c for powers, c in result.items()}


def trim(poly):
    """Without the powers above the highest one that occurs; 0 becomes {}."""
    used = [powers for powers, c in poly.items() if c]
    highest = [max(axis) for axis in zip(*used)]
    return {powers: c for powers, c in poly.items() if used and all(p <= h for p, h in zip(powers, highest))}


def degree(poly):
    """The degree of a polynomial in one variable; 0 for the polynomial 0."""
    return max((n for (n,), c in poly.items() if c), default=0)


def written(poly, variables):
    """The polynomial as SymPy, and so the benchmark, prints it: '-x**2*y/3 + 4*x - 1', '2 - 5*x'."""
    places = sorted(range(len(variables)), key=lambda i: variables[i])      # alphabetical, highest power first
    terms = sorted(((tuple(powers[i] for i in places), c) for powers, c in poly.items() if c), reverse=True)
    if len(terms) == 2 and terms[1][1] > 0 > terms[0][1] and sum(terms[1][0]) == 0 \
            and sum(n > 0 for n in terms[0][0]) == 1:
        terms.reverse()                                              # an exception in SymPy: 2 - 5*x, not -5*x + 2
    names, text = sorted(variables), ""
    for powers, c in terms:
        powers = [name if n == 1 else f"{name}**{n}" for name, n in zip(names, powers) if n]
        above, below = abs(Fraction(c).numerator), Fraction(c).denominator
        body = "*".join([str(above)] * (above != 1 or not powers) + powers) + f"/{below}" * (below != 1)
        text += (" - " if c < 0 else " + ") + body if text else "-" * (c < 0) + body
    return text or "0"
