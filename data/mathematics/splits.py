"""Training or validation? A hash of the problem decides, so that the two sets are disjoint by construction.

The hash is of the problem's canonical form, one string for all ways to write the same problem: other wordings, names of
variables, orders of sentences and of terms.
"""
import hashlib
import re
from itertools import chain, groupby, permutations, product

SEQUENCE = re.compile(r"[^\d-]*(-?\d+(?:, -?\d+)*)\?")
EQUATION = re.compile(r"Solve (.+) = (.+) for \w\.")
DERIVATIVE = re.compile(r"(?:(?:Find|What is) the (?:(\w+) )?derivative of|Differentiate) "
                        r"(.+?)(?: (?:wrt|with respect to) (\w))?[.?]")
TERM = r"(?:(?:[a-z]|\d+)\*)?[a-z]\([a-z]\)"
COMBINATION = re.compile(rf"(.* )(-?)({TERM}) ([+-]) ({TERM}[.?])")     # "... 3*f(x) - g(x)?"
WORDING = re.compile(r"What is|Calculate|Give|Determine|[?.]")


def split_of(question):
    """"val" for a tenth of all problems, "train" for the others."""
    return "train" if int.from_bytes(hashlib.sha256(canonical(question).encode()).digest()[:8], "big") % 10 else "val"


def canonical(question):
    """The canonical form of a problem.

    Equations are equal if their terms are, wherever they stand. Sequences are equal if they continue each other: the
    longer one contains the answer to the shorter one.
    """
    if sequence := SEQUENCE.fullmatch(question):
        return str(differences([int(n) for n in sequence[1].split(", ")]))
    if equation := EQUATION.fullmatch(question):
        return canonical_equation(*equation.groups())
    if derivative := DERIVATIVE.fullmatch(question):
        return canonical_derivative(*derivative.groups())
    sentences = re.split(r"(?<=[.?]) ", question)
    return min(canonical_sentences(version) for version in product(*map(both_orders, sentences)))


def differences(terms):
    """The numbers that determine a polynomial sequence: first term, first difference, ... until they are constant."""
    heads = [terms[0]]
    while any(term != terms[0] for term in terms):
        terms = [right - left for left, right in zip(terms, terms[1:])]
        heads.append(terms[0])
    return heads


def canonical_equation(left, right):
    """All terms on one side, sorted. There are two such forms, with opposite signs: the smaller string of them."""
    terms = [re.sub("[a-z]", "x", side).replace("- ", "-").replace("+ ", "").split() for side in (left, right)]

    def negated(side):
        return [term[1:] if term[0] == "-" else "-" + term for term in side]
    forms = [[*terms[0], *negated(terms[1])], [*negated(terms[0]), *terms[1]]]
    return " ".join(min(sorted(term for term in form if term not in ("0", "-0")) for form in forms))


def canonical_derivative(order, function, x):
    """Terms and factors sorted; of all assignments of the names a, b, c, d to the letters the smallest string."""
    letters = sorted(set(re.findall("[a-z]", function)))
    terms = [re.split(r"(?<!\*)\*(?!\*)", term) for term in function.replace("- ", "-").replace("+ ", "").split()]

    def renamed(names):
        new = dict(zip(letters, names))
        return (new.get(x or letters[0], "") if letters else "", *sorted(
            "*".join(sorted(re.sub("[a-z]", lambda m: new[m[0]], factor) for factor in term)) for term in terms))
    return f"{order or 'first'} {min(renamed(names) for names in permutations('abcd'[:len(letters)]))}"


def both_orders(sentence):
    """[f + g, g + f] for a COMBINATION, in which the order of the terms depends on the letters; else [sentence]."""
    if not (found := COMBINATION.fullmatch(sentence)):
        return [sentence]
    start, minus, first, sign, second = found.groups()
    return [sentence, f"{start}{sign.strip('+')}{second[:-1]} {minus or '+'} {first}{second[-1]}"]


def canonical_sentences(sentences):
    """Definitions sorted, letters renamed in the order in which they occur, the wording of the question removed.

    Definitions that differ only in letters are tried in every order; the smallest string counts.
    """
    *definitions, question = sentences

    def without_names(sentence):
        return re.sub(r"\b[a-z]\b", "x", sentence)

    def renamed(order):
        new = {}
        text = " ".join([*chain(*order), WORDING.sub("", question)])
        return " ".join(re.sub(r"\b[a-z]\b", lambda m: new.setdefault(m[0], f"{len(new)}'"), text).split())
    groups = groupby(sorted(definitions, key=without_names), key=without_names)
    return min(renamed(order) for order in product(*(list(permutations(group)) for _, group in groups)))
