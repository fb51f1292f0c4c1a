"""The grader of assignment 4: right solutions get all points, each typical mistake loses those of its task alone."""
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from remembered import grade

import train_relgames
from assignments.a4 import trained
from assignments import grading
from assignments.grading import HERE, load

SOLUTION = (Path(__file__).parent / "solution_a4.py").read_text(encoding="utf-8")
POINTS = {"1 auc": 10, "2 within places": 15, "3 the control": 25, "4 knock-outs": 20, "5 what is lost": 10,
          "6 verdicts": 20}

# name: (old text, new text, tasks that lose points)
MISTAKES = {
    "ties count nothing": ("0.5 * equal", "0 * equal", {"1 auc"}),
    "all places thrown together": ("    total, weight =", '''    return torch.tensor(
        [auc(r[:, l][compared], same[compared]) for l in range(R)])
    total, weight =''', {"2 within places"}),
    "places not weighted": ("total += w *", "w = 1; total += w *", {"2 within places"}),
    "sender and receiver exchanged": ("auc(r[counts, l, i, j]", "auc(r[counts, l, j, i]", {"2 within places"}),
    "dropout left on": ("    model.eval()\n", "", {"3 the control", "5 what is lost"}),
    "left in evaluation mode": ("        model.train(mode)\n", "        pass\n", {"3 the control", "5 what is lost"}),
    "the class token as a place": ("-places:, -places:", ":places, :places", {"3 the control"}),
    "r transposed": ("layer.r[:, l, -places:, -places:]", "layer.r[:, l, -places:, -places:].mT", {"3 the control"}),
    "relations counted from 1": ("{(layer.number, l): layer", "{(layer.number, l + 1): layer", {"3 the control"}),
    "one-sided": ("((untrained - centre).abs() >= abs(value - centre))", "(untrained >= value)", {"3 the control"}),
    "p without the trained one": ("(1 + as_far) / (1 + len(untrained))", "as_far / len(untrained)", {"3 the control"}),
    "ties against the trained one": (".abs() >= abs(", ".abs() > abs(", {"3 the control"}),
    "a permutation, with fixed points": ("if (order != torch.arange(n)).all():", "if True:", {"4 knock-outs"}),
    "a shift": ("order = torch.randperm(n, generator=g)", "order = torch.arange(n).roll(1)", {"4 knock-outs"}),
    "one head alone": ("m.W_r.data[:, l] = 0", "m.W_r.data[0, l] = 0", {"4 knock-outs"}),
    "weights not restored": ("stack.callback(m.W_r.data.copy_, kept[number])", "pass", {"4 knock-outs"}),
    "hooks not removed": ("stack.callback(linear.register_forward_hook(swap).remove)",
                          "linear.register_forward_hook(swap)", {"4 knock-outs"}),
    "the receiver alone from another image": ("[m.W_q_rel, m.W_k_rel]", "[m.W_q_rel]", {"4 knock-outs"}),
    "all relations resampled": ("columns = slice(l * m.rel_proj_dim, (l + 1) * m.rel_proj_dim)",
                                "columns = slice(None)", {"4 knock-outs"}),
    "not restored after an exception": ('''        yield


# ---- 5''', '''        try:
            yield
        except BaseException:
            stack.pop_all()
            raise


# ---- 5''', {"4 knock-outs"}),
    "n, not n - 1": ("difference.std()", "difference.std(unbiased=False)", {"5 what is lost"}),
    "unpaired": ("            difference = intact - score()\n    return difference.mean().item(), (difference.std()",
                 "            other = score()\n        difference = intact - other\n"
                 "    return difference.mean().item(), ((intact.var() + other.var()) ** 0.5", {"5 what is lost"}),
    "no control": ("p_value(float(value), control[name if VARIANT == 1 else name[0]]) <= 0.05", "float(value) > 0.8",
                   {"6 verdicts"}),
    "below the chance of 20": ("<= 0.05", "< 0.05", {"6 verdicts"}),
    "verdicts by all places together": ("in all_aucs(model, x, same, compared).items()", '''in [
                (name, auc(r[compared], same[compared]))
                for name, r in relations_of(model, x, same.size(-1)).items()]''', {"6 verdicts"}),
    "knock-outs exchanged": ('[name], "zero"),\n                   "informs": worse(model, x, y, [name], "resample")',
                             '[name], "resample"),\n                   "informs": worse(model, x, y, [name], "zero")',
                             {"6 verdicts"}),
    "needed pairs": ('if not worse(model, x, y, [name], "zero")]', "]", {"6 verdicts"}),
}


def earned(tmp_path, text, variant=1, seed=0):
    path = tmp_path / "student.py"
    path.write_text(text, encoding="utf-8")
    results = grade("a4", path, variant, seed)
    assert {name: points for name, points, _, _ in results} == POINTS
    return {name: points for name, _, points, _ in results}, {name: messages for name, _, _, messages in results}


def shortened(monkeypatch):
    """Of task 6 one function alone, with its points: it, too, needs all earlier tasks, and the others take long."""
    def fewer(module):
        functions = [one for one in tests_of(module) if one.task != "6 verdicts" or one.__name__ == "test_informs"]
        module.test_informs.points = POINTS["6 verdicts"]
        return functions
    tests_of = grading.tests
    monkeypatch.setattr(grading, "tests", fewer)


@pytest.mark.parametrize("variant, seed", [(1, 0), (1, 5), (2, 0), (2, 5)])
def test_a_right_solution_gets_all_points(tmp_path, variant, seed):
    points, messages = earned(tmp_path, SOLUTION.replace("VARIANT = 1", f"VARIANT = {variant}"), variant, seed)
    assert points == POINTS, messages


def test_knocked_out_without_its_decorator_is_told_so(tmp_path, monkeypatch):
    shortened(monkeypatch)
    points, messages = earned(tmp_path, SOLUTION.replace("@contextmanager\ndef knocked_out", "def knocked_out"))
    assert points["4 knock-outs"] == 4 and "write @contextmanager" in messages["4 knock-outs"][0]


def test_last_years_solution_loses_most_points_of_most_tasks(tmp_path):
    points, _ = earned(tmp_path, SOLUTION, variant=2)
    assert sum(points[name] < POINTS[name] / 2 for name in POINTS) >= 4


def test_the_starter_gets_nothing():
    assert sum(points for _, _, points, _ in grade("a4", HERE / "a4" / "answers.py")) == 0


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_costs_its_task_alone(tmp_path, monkeypatch, name):
    old, new, tasks = MISTAKES[name]
    assert old in SOLUTION
    if "6 verdicts" not in tasks:
        shortened(monkeypatch)
    points, messages = earned(tmp_path, SOLUTION.replace(old, new), seed=len(name))
    assert {task for task in POINTS if points[task] < POINTS[task]} == tasks, messages


@pytest.mark.parametrize("old, new, says", [
    ("def p_value(", "def p_worth(", "has no function p_value"),
    ("    return (1 + as_far) /", "    return torch.ones(3) + (1 + as_far) /", "expected the shape (), found (3,)"),
    ("    return (1 + as_far) /", "    return [][1] + (1 + as_far) /", "IndexError: list index out of range"),
    ("    return (1 + as_far) /", "    (1 + as_far) /", "is there a `return`?")])
def test_what_does_not_run_costs_its_task_alone(tmp_path, monkeypatch, old, new, says):
    assert old in SOLUTION
    shortened(monkeypatch)
    points, messages = earned(tmp_path, SOLUTION.replace(old, new))
    assert {task for task in POINTS if points[task] < POINTS[task]} == {"3 the control"}
    assert says in " ".join(messages["3 the control"])


@pytest.mark.parametrize("line", ["from toolbox.inside import without", "from toolbox.inside.statistics import auc",
                                  "import toolbox.inside", "from toolbox import inside",
                                  "from assignments.a4.known import right_auc"])
def test_the_repository_s_own_functions_may_not_be_imported(tmp_path, line):
    points, messages = earned(tmp_path, f"{line}\n" + SOLUTION)
    assert not sum(points.values()) and "student.py uses" in messages["1 auc"][0]


def test_the_instruments_look_at_a_trained_model(tmp_path, monkeypatch, capsys):
    cfg = train_relgames.Config(d_model=16, n_layers=2, n_heads=2, n_ra=1, d_ff=16, train_size=40)
    torch.manual_seed(0)
    (tmp_path / "run").mkdir()
    torch.save({"options": asdict(cfg), "facts": {}, "model": train_relgames.make_model(cfg).state_dict()},
               tmp_path / "run" / "weights.pt")
    p = trained.load(tmp_path / "run" / "weights.pt", images=200)
    assert p.compared.any(0).nonzero().tolist() == [[1, 6], [1, 7], [1, 8], [6, 1], [7, 1], [8, 1]]
    assert (p.same.any((1, 2)) == (p.y == 1)).all()                    # occurs: the top one is among the others
    monkeypatch.setattr(trained, "answers", load(Path(__file__).parent / "solution_a4.py"))
    monkeypatch.setattr(trained, "SEEDS", range(3))
    trained.main([str(tmp_path)])
    out = capsys.readouterr().out
    assert re.findall(r"^\| (\(.*?\)) \| 0\.\d{3} \| 0\.\d{3} to", out, re.M) == ["(1, 0)", "(2, 0)"]
    assert "stand in for each other" in out
    with pytest.raises(SystemExit) as end:
        trained.main([str(tmp_path / "nothing")])
    assert end.value.code == 2 and "give one folder" in capsys.readouterr().err
