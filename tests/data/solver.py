"""An independent solver for five modules of DeepMind's Mathematics benchmark (Saxton et al. 2019, arXiv:1904.01557).

    >>> solve("polynomials__add", "Let f(x) = 2*x + 1. Let c be f(3). What is c*f(k) - 7?")
    '14*k'

The generator starts from the answer, so its own answers prove nothing. This file uses only the text of a question:
regular expressions for whole sentences, Python's `ast` for the expressions in them, and SymPy's sparse polynomials over
the rationals for the algebra. A sentence that is not exactly one of the benchmark's, including the spaces in its
expressions, is a ValueError.
"""
import ast
import operator
import re
from functools import lru_cache

from sympy import QQ
from sympy.polys.rings import PolyElement, ring

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}

# An expression E is words separated by " + " or " - "; a minus inside a word is always a sign: "(-3)/9*-2".
# Python's parser checks the rest of the grammar.
INT = r"(?<!\d)(?:0|[1-9]\d*)(?!\d)"
WORD = rf"(?:{INT}|[a-z*/()]|(?<=[ (*])-)+(?<![*/(])"
KINDS = {"E": rf"({WORD}(?: [-+] {WORD})*)", "V": "([a-z])", "NTH": "(first|second|third)",
         "TERMS": rf"(-?{INT}(?:, -?{INT})+)"}
TIMES = {None: 0, "": 1, "first": 1, "second": 2, "third": 3}       # NTH, or an empty group -> order of the derivative


def _compile(*sentences):
    return [re.compile(re.sub(r"\b[A-Z]+\b", lambda m: KINDS[m[0]], s)) for s in sentences]


SOLVE = _compile(r"Solve E = E for V\.")
NEXT = _compile(r"What is next in TERMS\?", r"What is the next term in TERMS\?", r"What comes next: TERMS\?")
DERIVATIVE = _compile(r"Find the NTH derivative of E(?: wrt V)?\.", r"What is the NTH derivative of E(?: wrt V)?\?",
                      r"What is the() derivative of E(?: wrt V)?\?",
                      r"Differentiate() E(?: (?:wrt|with respect to) V)?\.")
EXPAND = _compile(r"Expand E\.")
COMBINE = _compile(r"Calculate E\.", r"Give E\.", r"Determine E\.", r"What is E\?")
# The statements before COMBINE; the text is split at their full stops.
LET_FUNCTION = _compile(r"Let V\(V\) (?:=|be the NTH derivative of) E")
LET_NUMBER = _compile(r"Let V (?:=|be) E")
SUPPOSE = _compile(r"Suppose E = E", r"Suppose E = E, E = E")


def solve(module, question):
    """The correct answer to a question, written exactly as in the benchmark.

    module: one of SOLVERS; question: its text. Raises ValueError for text that cannot be parsed, and for a question
    without a unique answer.
    """
    if module not in SOLVERS:
        raise ValueError(f"no module {module!r}; there are {', '.join(SOLVERS)}")
    try:
        return SOLVERS[module](question)
    except (ValueError, SyntaxError, ZeroDivisionError) as error:
        raise ValueError(f"{module}: {question!r}: {error}") from error


# ---- one function per module

def _linear_1d(question):
    left, right, letter = _match(SOLVE, question)
    solution, = _solve_equations([left, right], [letter], {}, {})
    return str(solution)


def _sequence_next_term(question):
    """The next value of the polynomial of lowest degree through the terms.

    Its last row of differences is constant, so the value is the sum of the last entries of all rows.
    """
    terms, = _match(NEXT, question)
    row, following = [int(term) for term in terms.split(", ")], 0
    while row:
        following += row[-1]
        row = [b - a for a, b in zip(row, row[1:])]
    return str(following)


def _differentiate(question):
    nth, text, letter = _match(DERIVATIVE, question)
    letter = letter or _only(_letters(text))
    gens = _gens(_letters(text) | {letter})
    return _spell(_differentiated(_polynomial(text, gens), gens[letter], nth))


def _expand(question):
    text, = _match(EXPAND, question)
    return _spell(_polynomial(text, _gens(_letters(text) or "x")))


def _add(question):
    """Statements define numbers and functions in any order: each is read when all letters that it uses are known."""
    *waiting, question = question.split(". ")
    numbers, functions = {}, {}                 # letter -> number; letter -> polynomial in its own ring
    while waiting:
        still_waiting = []
        for statement in waiting:
            found = _read_statement(statement, numbers, functions)
            if found is None:
                still_waiting.append(statement)
            for letter, meaning in (found or {}).items():
                if letter in numbers or letter in functions:
                    raise ValueError(f"{letter} is defined twice")
                (functions if isinstance(meaning, PolyElement) else numbers)[letter] = meaning
        if still_waiting == waiting:
            raise ValueError(f"what do these define: {waiting}?")
        waiting = still_waiting
    text, = _match(COMBINE, question)
    letter = _only(_letters(text) - set(numbers) - set(functions))
    return _spell(_polynomial(text, _gens(letter), numbers, functions))


SOLVERS = {"algebra__linear_1d": _linear_1d, "algebra__sequence_next_term": _sequence_next_term,
           "calculus__differentiate": _differentiate, "polynomials__add": _add, "polynomials__expand": _expand}


# ---- their parts

def _match(patterns, text):
    """The groups of the first pattern that matches the whole text."""
    for pattern in patterns:
        if match := pattern.fullmatch(text):
            return match.groups()
    raise ValueError(f"{text!r} is not of the form {' or '.join(p.pattern.replace(KINDS['E'], 'E') for p in patterns)}")


def _read_statement(statement, numbers, functions):
    """{letter: number or function} that a statement defines. None if it uses letters that are not known yet."""
    known = set(numbers) | set(functions)
    if statement.startswith("Suppose "):
        sides = _match(SUPPOSE, statement)
        unknown = sorted(set().union(*map(_letters, sides)) - known)
        if len(unknown) > len(sides) // 2 or any(f"{letter}(" in statement for letter in unknown):
            return None
        return dict(zip(unknown, _solve_equations(sides, unknown, numbers, functions)))
    if re.match(r"Let .\(", statement):
        name, argument, nth, text = _match(LET_FUNCTION, statement)
        if not _letters(text) <= known | {argument}:
            return None
        gens = _gens(argument)
        return {name: _differentiated(_polynomial(text, gens, numbers, functions), gens[argument], nth)}
    name, text = _match(LET_NUMBER, statement)
    return {name: _number(_evaluate(text, numbers, functions))} if _letters(text) <= known else None


def _solve_equations(sides, unknown, numbers, functions):
    """Solves one or two linear equations (sides: left, right, left, right) in as many unknowns, by Cramer's rule."""
    if len(sides) != 2 * len(unknown):
        raise ValueError(f"{len(sides) // 2} equation(s) for the unknown letters {unknown}")
    gens, rows = _gens(unknown), []
    for left, right in zip(sides[::2], sides[1::2]):
        p = _polynomial(left, gens, numbers, functions) - _polynomial(right, gens, numbers, functions)
        if any(sum(powers) > 1 for powers in p):
            raise ValueError(f"{left} = {right} is not linear in {unknown}")
        rows.append([*(p.coeff(gens[letter]) for letter in unknown), -p.coeff(1)])
    if len(rows) == 1:
        (a, b), = rows                          # a x = b
        return [b / a]
    (a, b, e), (c, d, f) = rows                 # a x + b y = e,  c x + d y = f
    determinant = a * d - b * c                 # where it is 0, solve turns the ZeroDivisionError into a ValueError
    return [(e * d - b * f) / determinant, (a * f - e * c) / determinant]


def _differentiated(polynomial, gen, nth):
    for _ in range(TIMES[nth]):
        polynomial = polynomial.diff(gen)
    return polynomial


def _polynomial(text, gens, numbers={}, functions={}):
    """An expression as an element of the ring of `gens`, which take precedence over numbers of the same name."""
    return next(iter(gens.values())).ring(_evaluate(text, numbers | gens, functions))


def _evaluate(text, names, functions):
    """The value of an expression: an int, or an element of QQ or of a ring. names: {letter: such a value}."""
    def value(node):
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.Name(id=letter) if letter in names:
                return names[letter]
            case ast.UnaryOp(op=ast.USub()):
                return -value(node.operand)
            case ast.BinOp(op=ast.Div()):
                return value(node.left) * (QQ(1) / _number(value(node.right)))
            case ast.BinOp(op=ast.Pow()):
                power = _number(value(node.right))
                if power < 0 or power.denominator != 1:
                    raise ValueError(f"the power {power} in {text}")
                return value(node.left) ** int(power)
            case ast.BinOp() if type(node.op) in OPERATORS:
                return OPERATORS[type(node.op)](value(node.left), value(node.right))
            case ast.Call(func=ast.Name(id=letter), args=[argument], keywords=[]) if letter in functions:
                x = value(argument)
                return sum(coefficient * x ** power for (power,), coefficient in functions[letter].terms())
        raise ValueError(f"cannot evaluate {ast.unparse(node)!r} in {text!r}")
    return value(ast.parse(text, mode="eval").body)


def _number(value):
    if isinstance(value, PolyElement):
        raise ValueError(f"{value} should be a number")
    return value


def _letters(text):
    return set(re.findall("[a-z]", text))


def _only(letters):
    if len(letters) != 1:
        raise ValueError(f"one variable is needed, not {sorted(letters)}")
    return min(letters)


def _gens(letters):
    """{letter: generator} of the ring of these letters over the rationals, with terms in lexical order."""
    return _ring("".join(sorted(letters)))


@lru_cache(maxsize=None)
def _ring(letters):
    return dict(zip(letters, ring(list(letters), QQ)[1:]))


def _spell(polynomial):
    """str(polynomial.as_expr()), the benchmark's notation, by str(polynomial), which is ten times faster.

    They differ for fractions, where the slow one is used, and for two terms c - a*x**n, which as_expr writes like this.
    """
    if any(coefficient.denominator != 1 for coefficient in polynomial.values()):
        return str(polynomial.as_expr())
    constant = polynomial.coeff(1)
    if len(polynomial) == 2 and constant > 0:
        term = polynomial - constant
        (powers, coefficient), = term.terms()
        if coefficient < 0 and sum(power > 0 for power in powers) == 1:
            return f"{constant} - {-term}"
    return str(polynomial)
