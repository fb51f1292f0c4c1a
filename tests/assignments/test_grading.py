"""What all graders share: whatever goes wrong in a student's code is one clear line and costs that task alone."""
import pytest
import torch

from assignments import grade, grading
from assignments.grading import check, right, task

RIGHT = "import torch\n\ndef double(x):\n    return 2 * x\n\ndef quadruple(x):\n    return double(double(x))\n"


@task("double", points=6)
def test_double(answers, variant):
    check(answers.double(torch.tensor([1.0, 3.0])), [2.0 * variant, 6.0 * variant], "double([1, 3])")


@task("quadruple", points=4)
def test_quadruple(answers, variant):
    with right(answers, double=lambda x: 2 * x):
        check(answers.quadruple(torch.ones(2)), [4, 4], "quadruple([1, 1])")


@task("double", points=6)
def test_double_by_name(answers, variant):
    answers.double(x=torch.ones(2))


for function in (test_double, test_quadruple, test_double_by_name):
    function.__test__ = False                                         # of the grader below, not of this file


class Grader:
    ALLOWED, VARIANTS = {"torch", "math"}, (1, 2)
    double, quadruple = staticmethod(test_double), staticmethod(test_quadruple)


@pytest.fixture
def graded(tmp_path, monkeypatch):
    """A function: a student's text -> {task: (earned points, messages)}."""
    monkeypatch.setattr(grading, "grader", lambda name: Grader)
    monkeypatch.setattr(grading, "tests", lambda module: [test_double, test_quadruple])
    monkeypatch.setattr(grading, "SECONDS", 1)

    def run(text, **options):
        path = tmp_path / "ada.py"
        path.write_text(text, encoding="utf-8")
        return {name: (earned, messages) for name, _, earned, messages in grading.grade("a0", path, **options)}
    return run


def test_a_right_solution_has_all_points_and_another_variant_asks_for_another_one(graded):
    assert graded(RIGHT) == {"double": (6, []), "quadruple": (4, [])}
    assert graded(RIGHT, variant=2)["double"][0] == 0


@pytest.mark.parametrize("instead, said", [
    ("return 3 * x", "double([1, 3]): at [0] expected 2, found 3 (2 of 2 numbers differ)"),
    ("return x[None]", "expected the shape (2,), found (1, 2)"),
    ("x", "found None; is there a `return`?"),
    ("return 'four'", "expected numbers, found str"),
    ("raise NotImplementedError", "not written yet"),
    ("return x @ x[None]", "line 4 of ada.py: RuntimeError"),
    ("return x.double_", "line 4 of ada.py: AttributeError"),
    ("exit()", "line 4 of ada.py: SystemExit"),
    ("assert False", "line 4 of ada.py: an assertion failed"),
    ("while True: pass", "line 4 of ada.py: TimeoutError: still running after 1 seconds"),
    ("return double(x)", "line 4 of ada.py: RecursionError")])
def test_a_mistake_costs_its_task_alone_though_the_next_one_calls_it(instead, said, graded):
    found = graded(RIGHT.replace("return 2 * x", instead))
    assert found["quadruple"] == (4, []) and found["double"][0] == 0
    message, = found["double"][1]
    assert said in message and "\n" not in message


def test_a_missing_function_is_named(graded):
    found = graded(RIGHT.replace("def double", "def dubble"))
    assert found == {"double": (0, ["ada.py has no function double"]), "quadruple": (4, [])}


@pytest.mark.parametrize("line", ["import symbols", "from toolbox.stats import T975", "from .. import model",
                                  "import numpy as np", "x = __import__('symbols')", "x = eval('1')"])
def test_what_may_not_be_imported_is_said(line, graded):
    assert all(earned == 0 and "this assignment allows" in message for earned, (message,) in graded(
        line + "\n" + RIGHT).values())


def test_annotations_of_the_future_are_allowed(graded):
    assert graded("from __future__ import annotations\n" + RIGHT) == {"double": (6, []), "quadruple": (4, [])}


@pytest.mark.parametrize("arguments", ["y", "x, y", "", "y, x, /"])
def test_wrong_arguments_are_not_called_a_wrong_result(arguments, graded, monkeypatch):
    monkeypatch.setattr(grading, "tests", lambda module: [test_double_by_name])
    earned, (message,) = graded(f"def double({arguments}): return 2\n")["double"]
    assert earned == 0
    assert message.startswith("double must have the arguments that README.md gives it, by the same names: double() ")


def test_an_error_inside_the_students_function_is_not_one_of_its_arguments(graded):
    _, (message,) = graded(RIGHT.replace("return 2 * x", "return quadruple(y=x)"))["double"]
    assert message.startswith("line 4 of ada.py: TypeError")


def test_a_file_that_is_not_python_is_one_line(graded):
    assert graded("def double(x)\n")["double"] == (0, ["line 1 of ada.py is not Python: expected ':'"])


def test_no_student_changes_the_next_ones_grade(graded):
    """Global switches are put back: gradients, the default dtype."""
    graded("import torch\ntorch.set_grad_enabled(False)\ntorch.set_default_dtype(torch.float64)\n" + RIGHT)
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32


def test_what_a_student_prints_is_not_shown(graded, capsys):
    graded("print('hello')\n" + RIGHT)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("found, expected, fails", [
    (torch.tensor(1.0), 1.0, False), ([1, 2], (1, 2), False), (float("nan"), float("nan"), False),
    (float("nan"), 0.0, True), (1.0, 1.1, True), (torch.ones(2, requires_grad=True), [1, 1], False)])
def test_numbers_are_compared_as_the_mathematics_means_them(found, expected, fails):
    if fails:
        with pytest.raises(AssertionError, match="expected"):
            check(found, expected, "x")
    else:
        check(found, expected, "x")


# ---- the command -----------------------------------------------------------------------------------------------------

def test_a_table_of_one_student_and_a_line_for_each_of_several(tmp_path, capsys):
    starter = grading.HERE / "a1" / "answers.py"
    grade.main(["a1"])
    table = capsys.readouterr().out.splitlines()
    assert table[0] == str(starter) and table[-1].split() == ["total", "0", "/", "100"]
    for name in ("ada", "bob"):
        (tmp_path / f"{name}.py").write_text(starter.read_text())
    grade.main(["a1", f"--answers={tmp_path}"])
    lines = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert lines == [["ada.py", "0", "="], ["bob.py", "0", "="]]


@pytest.mark.parametrize("text, said", [
    ("import numpy\n", "this assignment allows math, torch"), ("def relations(x)\n", "line 1 of ada.py is not Python"),
    ("import torch.nowhere\n", "line 1 of ada.py: ModuleNotFoundError")])
def test_what_is_wrong_with_the_whole_file_is_printed_once(text, said, tmp_path, capsys):
    (tmp_path / "ada.py").write_text(text)
    grade.main(["a1", f"--answers={tmp_path / 'ada.py'}"])
    table = capsys.readouterr().out
    assert table.count(said) == 1 and table.index(said) < table.index("1. relations")


def test_what_is_wrong_in_one_task_is_printed_below_it(tmp_path):
    results = [("1. one", 5, 0, ["no"]), ("2. two", 5, 0, ["no", "nor"]), ("3. three", 5, 5, [])]
    table = grade.describe(results, tmp_path)
    assert [line.split()[0] for line in table.splitlines()[1:]] == ["1.", "no", "2.", "no", "nor", "3.", "total"]


@pytest.mark.parametrize("arguments, said", [
    (["a9"], "invalid choice: 'a9'"), ([], "required: assignment"), (["a1", "--variant=9"], "a1 has 1, 2"),
    (["a1", "--answers=nowhere.py"], "nowhere.py: no such file"), (["a1", "--seed=x"], "invalid int value")])
def test_a_wrong_command_is_one_line(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        grade.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and said in error
