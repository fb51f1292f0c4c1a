"""What the graders share: tasks with points, and comparisons whose failures say what is wrong.

A grader is a file test_a1.py whose functions take the student's module and the number of the variant:

    ALLOWED = {"math", "torch"}                               # what answers.py may import
    VARIANTS = (1, 2)                                         # of the tasks; docs/teaching.md says what each changes

    @task("relations", points=5)
    def test_relations_are_shared_by_all_heads(answers, variant):
        check(answers.relations(x, W_q, W_k), expected, "r[i, j, a] = ...")

The points of a task are the sum over its functions. `python -m assignments.grade a1` runs them (grade.py), as does
`pytest assignments/a1`.
"""
import ast
import importlib.util
import io
import re
import signal
import traceback
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
SECONDS = 60                                                  # for one function of a grader


def task(name, points):
    """Marks a function of a grader: it belongs to this task and is worth so many points."""
    def mark(function):
        function.task, function.points = name, points
        return function
    return mark


def check(found, expected, what, tol=1e-6):
    """Raises AssertionError unless `found` has the shape and the values of `expected`, to tol (1 + |expected|).

    `what` says in the student's words what should hold, on which input. Tensors, arrays, numbers and lists of these.
    """
    found, expected = as_array(found, what), as_array(expected, what)
    if found.shape != expected.shape:
        raise AssertionError(f"{what}: expected the shape {expected.shape}, found {found.shape}")
    wrong = ~np.isclose(found, expected, rtol=tol, atol=tol, equal_nan=True)
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        where = f"at {list(at)} " if at else ""
        raise AssertionError(f"{what}: {where}expected {shown(expected[at])}, found {shown(found[at])}"
                             + (f" ({wrong.sum()} of {wrong.size} numbers differ)" if wrong.size > 1 else ""))


def as_array(value, what):
    if value is None:
        raise AssertionError(f"{what}: found None; is there a `return`?")
    if torch.is_tensor(value):
        value = value.detach().cpu()
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise AssertionError(f"{what}: expected numbers, found {type(value).__name__}") from None


def shown(number):
    return f"{float(number):.6g}"


@contextmanager
def right(answers, **functions):
    """Gives the student's module these functions for a while: a mistake in an earlier task costs points once."""
    own = {name: getattr(answers, name, None) for name in functions}
    vars(answers).update(functions)
    try:
        yield answers
    finally:
        vars(answers).update(own)


def load(path):
    """A file of Python as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def foreign_imports(path, allowed):
    """What the file imports although the assignment wants it written, or does not know it.

    `allowed`: modules, with all that is in them, or single names of one, as "toolbox.inside.watch".
    """
    def known(name):
        parts = name.split(".")
        return any(".".join(parts[:i]) in {"__future__", *allowed} for i in range(1, len(parts) + 1))
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names += [module if known(module) else f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Name) and node.id in ("__import__", "exec", "eval", "open"):
            names.append(node.id)
    return sorted({name for name in names if not known(name)})


def grader(name):
    """The grader of an assignment, as a module."""
    return load(HERE / name / f"test_{name}.py")


def tests(module):
    return [function for function in vars(module).values() if hasattr(function, "points")]


def grade(name, path, variant=1, seed=0):
    """-> [(task, points, earned, messages)] for the answers in the file `path`.

    Whatever goes wrong in the student's code costs the points of the function that met it, and no others.
    """
    module, path = grader(name), Path(path).resolve()
    results = {function.task: [0, 0, []] for function in tests(module)}
    for function in tests(module):
        message = run(function, path, module.ALLOWED, variant, seed)
        result = results[function.task]
        result[0] += function.points
        result[1] += function.points if message is None else 0
        if message and message not in result[2]:
            result[2].append(message)
    return [(task, *result) for task, result in results.items()]


def run(function, path, allowed, variant, seed):
    """-> None, or the line that says what is wrong. What the student's code prints is not shown."""
    dtype = torch.get_default_dtype()
    try:
        foreign = foreign_imports(path, allowed)
        if foreign:
            return f"{path.name} uses {', '.join(foreign)}; this assignment allows {', '.join(sorted(allowed))}"
        torch.manual_seed(seed)
        np.random.seed(seed)
        with time_limit(SECONDS), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            function(load(path), variant)
    except NotImplementedError:
        return "not written yet"
    except AssertionError as error:
        return str(error) or f"line {line_in(path, error)} of {path.name}: an assertion failed"
    except (Exception, SystemExit) as error:
        return described(error, path)
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(True)


def described(error, path):
    first = (str(error).splitlines() or [""])[0]
    if isinstance(error, SyntaxError):
        return f"line {error.lineno} of {path.name} is not Python: {error.msg}"
    if isinstance(error, AttributeError) and "has no attribute" in first and path.stem in first:
        return f"{path.name} has no function {first.split()[-1].strip(chr(39))}"
    line = line_in(path, error)
    call = re.match(r"([\w.<>]+)\(\) (got an unexpected keyword|got some positional|missing|takes)", first)
    if isinstance(error, TypeError) and call and not line:            # the grader's call, not one of the student's
        return f"{call[1]} must have the arguments that README.md gives it, by the same names: {first}"
    if "does not require grad" in first:
        return "no gradient comes back from what it returned: is something detached, or under no_grad?"
    if "through the graph a second time" in first:
        return "the backward pass failed: does checkpoint(...) have use_reentrant=False?"
    where = f"line {line} of {path.name}: " if line else "what it returned does not fit: "
    return f"{where}{type(error).__name__}: {first}"


def line_in(path, error):
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    return lines[-1] if lines else None


@contextmanager
def time_limit(seconds):
    """Ends an endless loop, where the system has an alarm (not on Windows)."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def late(number, frame):
        raise TimeoutError(f"still running after {seconds} seconds")
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
