"""Random numbers and polynomials for the questions of the Mathematics benchmark.

The entropy of a choice is log10 of the number of possibilities. The distributions are those of the benchmark's
generator (Saxton et al., 2019; github.com/google-deepmind/mathematics_dataset), reimplemented; results/mathematics
compares the two.
"""
import math
import random
from fractions import Fraction
from itertools import product

from data.mathematics.algebra import bezout, factors, is_integer


def entropy_of(value):
    """The entropy at which Dice.integer draws numbers of this size; for a fraction, numerator plus denominator."""
    parts = [value] if is_integer(value) else Fraction(value).as_integer_ratio()
    return sum(math.log10(5 * abs(n) + 1) for n in parts)


class Dice(random.Random):
    """Python's random number generator with the benchmark's distributions."""

    def integer(self, entropy, *, signed=True, min_abs=0, coprime_to=1):
        """One of about 10^entropy integers around 0 (positive if not signed), with absolute value >= min_abs."""
        many = 10 ** entropy + min_abs
        if abs(coprime_to) >= 2:                                     # integers with a common factor are rejected below
            many = many / math.prod(1 - 1 / p for p in factors(abs(coprime_to))) + 1
        low, high = (-math.ceil(many / 2), math.ceil(many / 2)) if signed else (min_abs, math.ceil(many))
        while True:
            n = self.randint(low, high)
            if abs(n) >= min_abs and math.gcd(n, coprime_to) == 1:
                return n

    def number(self, entropy):
        """An integer or a proper fraction, with equal probability."""
        if self.random() < 0.5:
            return self.integer(entropy)
        above = self.uniform(0, entropy)
        numerator = self.integer(above, min_abs=1)
        return Fraction(numerator, self.integer(entropy - above, signed=False, min_abs=2, coprime_to=numerator))

    def shares(self, total, weights):
        """Splits `total` in proportion to random Gamma(weight) variables; a weight of 0 or less gets 0."""
        gammas = [self.gammavariate(w, 1) if w > 0 else 0.0 for w in weights]
        return [total * g / (sum(gammas) or 1.0) for g in gammas]

    def parts(self, total, n):
        """n integers >= 0 with the sum `total`, uniformly among all such lists."""
        bars = sorted(self.sample(range(1, total + n), n - 1))
        return [right - left - 1 for left, right in zip([0, *bars], [*bars, total + n])]

    def split_factors(self, n):
        """Two integers with the product n."""
        if n == 0:
            return 1, 0
        left = math.prod(p ** self.randint(0, exponent) for p, exponent in factors(n).items())
        return left, n // left

    def summands(self, value, count, entropy):
        """`count` integers with the sum `value`."""
        if count < 2:
            return [value] * count
        entropy *= count / (count - 1)                               # the sum is fixed: one number is not free
        lowest = max(1.0, entropy_of(math.ceil(Fraction(value, count))))
        terms = [self.integer(max(lowest, share)) for share in self.shares(entropy, [1] * count)]
        missing = value - sum(terms)
        terms = [term + (missing + i) // count for i, term in enumerate(terms)]
        self.shuffle(terms)
        return terms

    def term_counts(self, length, values):
        """Distributes `length` terms over the values. A zero gets no term or at least two, which cancel."""
        zero = [value == 0 for value in values]
        extra = self.parts(length - zero.count(False), len(values))
        counts = [(not z) + e for z, e in zip(zero, extra)]
        while single := [i for i, n in enumerate(counts) if zero[i] and n == 1]:
            source = self.choice(single)
            counts[self.choice([i for i, n in enumerate(counts) if n and i != source])] += 1
            counts[source] = 0
        return counts

    def polynomial(self, degrees, entropy, *, min_terms=0, max_terms=None):
        """A polynomial with these degrees in its variables and min_terms to max_terms terms."""
        places = set()
        for axis, degree in enumerate(degrees):                      # each variable occurs with its highest power
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

    def spread(self, poly, entropy, length=None):
        """{powers: a list of terms with the coefficient as their sum}: 3*x as -2*x + 5*x, 0 as 4 - 4."""
        n = sum(c != 0 for c in poly.values())
        length = max(n + 2, self.randint(n + 2, n + 2 + math.ceil(entropy) // 2) if length is None else length)
        counts = self.term_counts(length, poly.values())
        shares = self.shares(entropy, [count - 1 for count in counts])
        return {powers: self.summands(c, count, share)
                for (powers, c), count, share in zip(poly.items(), counts, shares)}

    def linear_split(self, poly, entropy):
        """Integers a, b and polynomials f, g with a f + b g = poly.

        By Bezout's identity they exist if gcd(a, b) divides every coefficient.
        """
        entropy_a, entropy_b = (max(1, self.uniform(0, entropy / 3)) for _ in "ab")
        shares = self.shares(entropy - entropy_a - entropy_b, [1] * len(poly))
        a = self.integer(entropy_a, min_abs=1)
        common = max(1, math.gcd(*poly.values()))
        b = self.integer(entropy_b, min_abs=1, coprime_to=a) * self.split_factors(common)[0]
        if self.random() < 0.5:
            a, b = b, a
        f, g = {}, {}
        for (powers, c), share in zip(poly.items(), shares):
            f[powers], g[powers] = bezout(a, b, c, self.integer(share))
        while not (any(f.values()) and any(g.values())):             # neither function may be 0
            powers, sign = self.choice(list(poly)), self.choice([-1, 1])
            f[powers], g[powers] = f[powers] + sign * b, g[powers] - sign * a
        return a, b, f, g
