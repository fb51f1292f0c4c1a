"""Random numbers and exact polynomials, of which the questions of the Mathematics benchmark are made.

    Dice    random choices; "entropy" says in powers of ten how many possibilities a choice has
    grid    a polynomial: {powers: coefficient}, zeros included; of x and y, {(2, 1): 3} is 3*x**2*y

All arithmetic is exact: int and Fraction. The distributions follow the benchmark's own generator (Saxton et al., 2019;
github.com/google-deepmind/mathematics_dataset), written anew; results/mathematics compares the two.
"""
import math
import random
from fractions import Fraction
from functools import lru_cache
from itertools import product


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


def entropy_of(value):
    """About the entropy with which Dice would come upon it; a fraction's is that of both its parts."""
    parts = [value] if is_integer(value) else Fraction(value).as_integer_ratio()
    return sum(math.log10(5 * abs(n) + 1) for n in parts)


class Dice(random.Random):
    """Python's generator with the benchmark's ways to choose numbers."""

    def integer(self, entropy, *, signed=True, min_abs=0, coprime_to=1):
        """One of about 10^entropy integers around 0 (above 0 if not signed), none smaller than min_abs."""
        many = 10 ** entropy + min_abs
        if abs(coprime_to) >= 2:                                     # those that share a factor will be thrown away
            many = many / math.prod(1 - 1 / p for p in factors(abs(coprime_to))) + 1
        low, high = (-math.ceil(many / 2), math.ceil(many / 2)) if signed else (min_abs, math.ceil(many))
        while True:
            n = self.randint(low, high)
            if abs(n) >= min_abs and math.gcd(n, coprime_to) == 1:
                return n

    def number(self, entropy):
        """An integer or, as likely, a fraction that is none."""
        if self.random() < 0.5:
            return self.integer(entropy)
        above = self.uniform(0, entropy)
        numerator = self.integer(above, min_abs=1)
        return Fraction(numerator, self.integer(entropy - above, signed=False, min_abs=2, coprime_to=numerator))

    def shares(self, total, weights):
        """`total` cut at random in proportion to Gamma(weight) variables: nothing for a weight of 0 or less."""
        gammas = [self.gammavariate(w, 1) if w > 0 else 0.0 for w in weights]
        return [total * g / (sum(gammas) or 1.0) for g in gammas]

    def parts(self, total, n):
        """n integers of at least 0 that sum to `total`, every such list as likely as any other."""
        bars = sorted(self.sample(range(1, total + n), n - 1))
        return [right - left - 1 for left, right in zip([0, *bars], [*bars, total + n])]

    def split_factors(self, n):
        """Two integers whose product is n."""
        if n == 0:
            return 1, 0
        left = math.prod(p ** self.randint(0, exponent) for p, exponent in factors(n).items())
        return left, n // left

    def summands(self, value, count, entropy):
        """`count` integers that sum to `value`."""
        if count < 2:
            return [value] * count
        entropy *= count / (count - 1)                               # all moved by one number come out the same
        lowest = max(1.0, entropy_of(math.ceil(Fraction(value, count))))
        terms = [self.integer(max(lowest, share)) for share in self.shares(entropy, [1] * count)]
        missing = value - sum(terms)
        terms = [term + (missing + i) // count for i, term in enumerate(terms)]
        self.shuffle(terms)
        return terms

    def term_counts(self, length, values):
        """How many of `length` terms each value is spread over: a zero gets none, or several that cancel."""
        zero = [value == 0 for value in values]
        extra = self.parts(length - zero.count(False), len(values))
        counts = [(not z) + e for z, e in zip(zero, extra)]
        while lone := [i for i, n in enumerate(counts) if zero[i] and n == 1]:
            loser = self.choice(lone)
            counts[self.choice([i for i, n in enumerate(counts) if n and i != loser])] += 1
            counts[loser] = 0
        return counts

    def grid(self, degrees, entropy, *, min_terms=0, max_terms=None):
        """A polynomial with these degrees in its variables, of min_terms to max_terms terms."""
        places = set()
        for axis, degree in enumerate(degrees):                      # each variable occurs in its highest power
            if degree:
                place = [self.randint(0, d) for d in degrees]
                place[axis] = degree
                places.add(tuple(place))
        size = math.prod(d + 1 for d in degrees)
        low = max(min_terms, 1, len(places))
        high = low + int(entropy / 2) if max_terms is None else max_terms
        low = min(low, size)
        n = self.randint(low, max(low, min(high, size)))
        while len(places) < n:
            places.add(tuple(self.randint(0, d) for d in degrees))
        shares = self.shares(entropy, [1] * n)
        coefficients = {place: self.integer(share, min_abs=1) for place, share in zip(sorted(places), shares)}
        return {place: coefficients.get(place, 0) for place in product(*(range(d + 1) for d in degrees))}

    def spread(self, grid, entropy, length=None):
        """{powers: the terms that its coefficient is written as}: 3*x as -2*x + 5*x, 0 as 4 - 4."""
        n = sum(c != 0 for c in grid.values())
        length = max(n + 2, self.randint(n + 2, n + 2 + math.ceil(entropy) // 2) if length is None else length)
        counts = self.term_counts(length, grid.values())
        shares = self.shares(entropy, [count - 1 for count in counts])
        return {powers: self.summands(c, count, share)
                for (powers, c), count, share in zip(grid.items(), counts, shares)}

    def linear_split(self, grid, entropy):
        """a, b and two grids f, g with a f + b g = grid; by Bezout, gcd(a, b) must divide every coefficient."""
        entropy_a, entropy_b = (max(1, self.uniform(0, entropy / 3)) for _ in "ab")
        shares = self.shares(entropy - entropy_a - entropy_b, [1] * len(grid))
        a = self.integer(entropy_a, min_abs=1)
        common = max(1, math.gcd(*grid.values()))
        b = self.integer(entropy_b, min_abs=1, coprime_to=a) * self.split_factors(common)[0]
        if self.random() < 0.5:
            a, b = b, a
        f, g = {}, {}
        for (powers, c), share in zip(grid.items(), shares):
            f[powers], g[powers] = bezout(a, b, c, self.integer(share))
        while not (any(f.values()) and any(g.values())):             # neither function may be 0
            powers, sign = self.choice(list(grid)), self.choice([-1, 1])
            f[powers], g[powers] = f[powers] + sign * b, g[powers] - sign * a
        return a, b, f, g


def bezout(a, b, c, t):
    """The t-th x, y with a x + b y = c, where gcd(a, b) divides c.

    x = c x0 + t b and y = c y0 - t a, where a x0 + b y0 = 1 comes from Euclid's algorithm.
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
    """f + g, of univariate grids."""
    return {powers: f.get(powers, 0) + g.get(powers, 0) for powers in sorted({*f, *g})}


def multiply(f, g):
    """f g, of univariate grids."""
    result = {}
    for (m,), a in f.items():
        for (n,), b in g.items():
            result[(m + n,)] = result.get((m + n,), 0) + a * b
    return result


def differentiate(grid, axis=0):
    """Along the variable number `axis`: x**n becomes n*x**(n-1)."""
    return trim({(*p[:axis], p[axis] - 1, *p[axis + 1:]): c * p[axis] for p, c in grid.items() if p[axis]})


def integrate(grid, order):
    """A univariate grid whose derivative of that order is `grid`; the terms that vanish are left at 0."""
    result = {(n,): 0 for n in range(order)}
    for (n,), c in grid.items():
        result[(n + order,)] = c / Fraction(math.prod(range(n + 1, n + order + 1)))
    return {powers: c.numerator if is_integer(c) else c for powers, c in result.items()}


def trim(grid):
    """Without the highest powers where they do not occur; 0 becomes {}."""
    used = [powers for powers, c in grid.items() if c]
    highest = [max(axis) for axis in zip(*used)]
    return {powers: c for powers, c in grid.items() if used and all(p <= h for p, h in zip(powers, highest))}


def degree(grid):
    """Of a univariate grid; that of 0 counts as 0."""
    return max((n for (n,), c in grid.items() if c), default=0)


def written(grid, variables):
    """As SymPy prints it, which is how the benchmark writes what is simplified: '-x**2*y/3 + 4*x - 1', '2 - 5*x'."""
    places = sorted(range(len(variables)), key=lambda i: variables[i])      # alphabetical, highest power first
    terms = sorted(((tuple(powers[i] for i in places), c) for powers, c in grid.items() if c), reverse=True)
    if len(terms) == 2 and terms[1][1] > 0 > terms[0][1] and sum(terms[1][0]) == 0 \
            and sum(n > 0 for n in terms[0][0]) == 1:
        terms.reverse()                                              # SymPy's exception: not -5*x + 2
    names, text = sorted(variables), ""
    for powers, c in terms:
        powers = [name if n == 1 else f"{name}**{n}" for name, n in zip(names, powers) if n]
        above, below = abs(Fraction(c).numerator), Fraction(c).denominator
        body = "*".join([str(above)] * (above != 1 or not powers) + powers) + f"/{below}" * (below != 1)
        text += (" - " if c < 0 else " + ") + body if text else "-" * (c < 0) + body
    return text or "0"
