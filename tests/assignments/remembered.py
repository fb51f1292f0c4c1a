"""grade() for the tests of the graders: nothing is graded twice.

A solution with a mistake differs from the right one in a line or two. A function of a grader that runs none of these
lines finds what it found before, so it runs again only if something that it ran in answers.py has changed.
"""
import ast
from functools import cache
from types import ModuleType

import pytest

from assignments import grading

RIGHT = {}                 # (function of a grader, variant, seed): [{part of answers.py that it ran: its source}]
run_always = grading.run


@cache
def parts(text):
    """{name: source} of the functions of a file; all else, which runs at import, has the name ""."""
    body = ast.parse(text).body
    functions = {node.name: ast.unparse(node) for node in body if isinstance(node, ast.FunctionDef)}
    return functions | {"": "\n".join(ast.unparse(node) for node in body if not isinstance(node, ast.FunctionDef))}


def loaded(path, ran):
    """The file as a module; each of its functions that is called adds its name to `ran`. Lines keep their numbers."""
    module = ModuleType(f"{path.parent.name}_{path.stem}")
    module.__file__, module.ran = str(path), ran
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            note = ast.parse(f"ran.add({node.name!r})").body[0]
            for inner in ast.walk(note):
                ast.copy_location(inner, node)
            node.body.insert(0, note)
    exec(compile(tree, str(path), "exec"), vars(module))
    return module


def run(function, path, allowed, variant, seed):
    """As grading.run. Right answers alone are remembered: messages name lines, which move."""
    try:
        source = parts(path.read_text(encoding="utf-8"))
        allowed_only = not grading.foreign_imports(path, allowed)
    except SyntaxError:
        allowed_only = False
    if not allowed_only:
        return run_always(function, path, allowed, variant, seed)
    remembered = RIGHT.setdefault((function.__module__, function.__name__, variant, seed), [])
    if any(all(source.get(name) == text for name, text in earlier.items()) for earlier in remembered):
        return None
    ran = {""}
    with pytest.MonkeyPatch.context() as m:
        m.setattr(grading, "load", lambda path: loaded(path, ran))
        message = run_always(function, path, allowed, variant, seed)
    if message is None:
        remembered.append({name: source[name] for name in ran})
    return message


def grade(*arguments):
    with pytest.MonkeyPatch.context() as m:
        m.setattr(grading, "run", run)
        return grading.grade(*arguments)
