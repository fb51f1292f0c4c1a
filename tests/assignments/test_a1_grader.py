"""The grader of a1: right solutions have all points, and each typical mistake costs those of its own task."""
from pathlib import Path

import pytest
from remembered import grade

from assignments.grading import HERE

SOLUTION = (Path(__file__).parent / "solution_a1.py").read_text()
TASKS = {"relations": "1. relations", "allowed_pairs": "2. masks", "masked_softmax": "2. masks",
         "attention_weights": "3. attention weights", "messages": "4. messages", "relational_attention": "5. the layer",
         "relational_attention_linear": "6. linear memory"}

MISTAKES = [    # name, old text, new text, the task that loses points
    ("relations are not scaled", "r = q @ k.mT / q.size(-1) ** 0.5", "r = q @ k.mT", "1"),
    ("r_ji for r_ij", "return r.permute(0, 2, 3, 1)", "return r.permute(0, 3, 2, 1)", "1"),
    ("relations are normalised", "return r.permute(0, 2, 3, 1)", "return r.softmax(-1).permute(0, 2, 3, 1)", "1"),
    ("keys for queries", "q, k = project(x, W_q_rel), project(x, W_k_rel)", "q = k = project(x, W_k_rel)", "1"),
    ("detached relations", "return r.permute(0, 2, 3, 1)", "return r.detach().permute(0, 2, 3, 1)", "1"),
    ("a loop over tokens", "return r.permute(0, 2, 3, 1)",
     "return torch.stack([row.transpose(1, 2) for row in r.unbind(2)], 1)", "1"),
    ("relations in float64", "return r.permute(0, 2, 3, 1)", "return r.double().permute(0, 2, 3, 1)", "1"),

    ("padding of the receiver", "tokens[:, None, :].expand(B, n, n)", "tokens[:, :, None].expand(B, n, n)", "2"),
    ("a leak of one step", "order(torch.arange(n), ", "order(torch.arange(n) + 1, ", "2"),
    ("causal without padding", "return pairs & order(torch.arange(n), torch.arange(n)) if causal else pairs",
     "return order(torch.arange(n), torch.arange(n)).expand(B, n, n) if causal else pairs", "2"),
    ("masked after the softmax", "scores.masked_fill(~allowed, -1e9).softmax(-1)", "scores.softmax(-1)", "2"),
    ("a mask that is too weak", "masked_fill(~allowed, -1e9)", "masked_fill(~allowed, -100.0)", "2"),
    ("a fully masked row is NaN", 'masked_fill(~allowed, -1e9).softmax(-1).masked_fill(~allowed, 0.0)',
     'masked_fill(~allowed, float("-inf")).softmax(-1)', "2"),
    ("a fully masked row is uniform", ".softmax(-1).masked_fill(~allowed, 0.0)", ".softmax(-1)", "2"),
    ("exp overflows", "return scores.masked_fill(~allowed, -1e9).softmax(-1).masked_fill(~allowed, 0.0)",
     "e = scores.exp() * allowed; return e / e.sum(-1, keepdim=True).clamp(min=1e-30)", "2"),

    ("scores are not scaled", "return masked_softmax(q @ k.mT * scale(q.size(-1)), allowed)\n\n",
     "return masked_softmax(q @ k.mT, allowed)\n\n", "3"),
    ("scaled by all features", "return masked_softmax(q @ k.mT * scale(q.size(-1)), allowed)\n\n",
     "return masked_softmax(q @ k.mT * scale(x.size(-1)), allowed)\n\n", "3"),
    ("softmax over receivers", "return masked_softmax(q @ k.mT * scale(q.size(-1)), allowed)\n\n",
     "return masked_softmax(k @ q.mT * scale(q.size(-1)), allowed).mT\n\n", "3"),
    ("the mask is ignored", "return masked_softmax(q @ k.mT * scale(q.size(-1)), allowed)\n\n",
     "return masked_softmax(q @ k.mT * scale(q.size(-1)), allowed | True)\n\n", "3"),

    ("one relation per head", '"bhij,bijl,hlc->bhic", alpha, r, W_r)',
     '"bhij,bijh,hc->bhic", alpha, r[..., torch.arange(len(W_r)) % r.size(-1)], W_r.sum(1))', "4"),
    ("all heads share W_r", "alpha, r, W_r)", "alpha, r, W_r[:1].expand_as(W_r))", "4"),
    ("symbols of the receiver", "of_symbols = alpha @ project(s, W_s)",
     "of_symbols = alpha.sum(-1, keepdim=True) * project(s, W_s)", "4"),
    ("alpha_ji for alpha_ij", "of_symbols = alpha @", "of_symbols = alpha.mT @", "4"),
    ("symbols without attention", "of_symbols = alpha @", "of_symbols = torch.ones_like(alpha) @", "4"),
    ("detached symbols", "of_symbols = alpha @ project(s, W_s)", "of_symbols = alpha @ project(s, W_s.detach())", "4"),

    ("never causal", "allowed_pairs(tokens, causal))", "allowed_pairs(tokens, False))", "5"),
    ("padding is ignored", "allowed_pairs(tokens, causal))", "allowed_pairs(torch.ones_like(tokens), causal))", "5"),
    ("features for symbols", 'w["W_k_rel"]), s, w["W_r"]', 'w["W_k_rel"]), x, w["W_r"]', "5"),
    ("a layer that loops over sequences", 'w["W_o"]                     # (B, n, H d_h) -> (B, n, d)\n',
     'w["W_o"] + sum(0 * row.sum() for row in x)\n', "5"),
    ("heads and tokens mixed", 'a = messages(alpha, relations(x, w["W_q_rel"], w["W_k_rel"]), s, w["W_r"], w["W_s"])\n'
     "    return a.transpose(1, 2).flatten(2)", 'a = messages(alpha, relations(x, w["W_q_rel"], w["W_k_rel"]), s, '
     'w["W_r"], w["W_s"])\n    return a.reshape(*x.shape[:2], -1)', "5"),

    ("all queries at once", "BLOCK = 64", "BLOCK = 4096", "6"),
    ("as many blocks for any n", ".split(BLOCK)", ".chunk(8)", "6"),
    ("blocks are kept for backward", "checkpoint(of_block, i, q[:, :, i], k, values, tokens, causal, "
     "use_reentrant=False)", "of_block(i, q[:, :, i], k, values, tokens, causal)", "6"),
    ("the layer of task 5", "(B, n, _), (H, R, _), p = ", "return relational_attention(x, s, w, tokens, causal)\n"
     "    (B, n, _), (H, R, _), p = ", "6"),
    ("no scale after the sum", "r = r / p ** 0.5", "r = r * 1", "6"),
    ("positions count from the block", "& order(i, ", "& order(i - i[0], ", "6"),
    ("detached keys", "-1, (R, p)))        # sum_j", "-1, (R, p)).detach())        # sum_j", "6"),
]

SAID = {"padding of the receiver": "allowed[0, 0, 1] must be False, is True",
        "a loop over tokens": "no Python loop over sequences or tokens",
        "blocks are kept for backward": "Is something kept for the backward pass, or does a block grow with n?",
        "all queries at once": "of answers.py) has the memory of"}


def lost(tmp_path, code, variant=1, seed=0):
    """-> the tasks that lose points, their messages, and the points in all."""
    path = tmp_path / "answers.py"
    path.write_text(code)
    results = grade("a1", path, variant, seed)
    assert sum(points for _, points, *_ in results) == 100
    return ([task for task, points, earned, _ in results if earned < points],
            [message for *_, messages in results for message in messages], sum(earned for _, _, earned, _ in results))


def of_variant(variant):
    assert "VARIANT = 1\n" in SOLUTION
    return SOLUTION.replace("VARIANT = 1\n", f"VARIANT = {variant}\n")


@pytest.mark.parametrize("variant, seed", [(1, 0), (2, 2), (3, 1)])
def test_the_reference_has_all_points(tmp_path, variant, seed):
    assert lost(tmp_path, of_variant(variant), variant, seed) == ([], [], 100)


@pytest.mark.parametrize("variant", [2, 3])
def test_last_years_solution_loses_most_points_of_four_tasks(tmp_path, variant):
    path = tmp_path / "answers.py"
    path.write_text(SOLUTION)
    most = [task[0] for task, points, earned, _ in grade("a1", path, variant) if earned < points / 2]
    assert most == ["1", "3", "4", "6"]


def test_the_starter_has_no_points():
    results = grade("a1", HERE / "a1" / "answers.py")
    assert [(earned, messages) for _, _, earned, messages in results] == [(0, ["not written yet"])] * 6


@pytest.mark.parametrize("mistake, old, new, number", MISTAKES, ids=[mistake[0] for mistake in MISTAKES])
def test_a_mistake_costs_points_of_its_task_alone(tmp_path, mistake, old, new, number):
    assert SOLUTION.count(old) == 1
    tasks, messages, _ = lost(tmp_path, SOLUTION.replace(old, new))
    assert [task[0] for task in tasks] == [number]
    assert not any("Error" in message for message in messages)         # a sentence, not an exception
    assert any(SAID.get(mistake, "") in message for message in messages), messages
    if "detached" not in mistake:                                      # wrong values are said as such
        assert not any("derivative" in message for message in messages)


ZEROS = """import torch
def relations(x, W_q_rel, W_k_rel): return x.new_zeros(len(x), x.size(1), x.size(1), len(W_q_rel))
def allowed_pairs(tokens, causal): return torch.zeros_like(tokens)[:, None].expand(-1, tokens.size(1), -1)
def masked_softmax(scores, allowed): return 0 * scores
def attention_weights(x, W_q, W_k, allowed): return x.new_zeros(len(x), len(W_q), x.size(1), x.size(1))
def messages(alpha, r, s, W_r, W_s): return 0 * alpha @ (s @ W_s[0])[:, None]
def relational_attention(x, s, w, tokens, causal): return 0 * x
relational_attention_linear = relational_attention
"""


def test_zeros_have_no_points(tmp_path):
    assert lost(tmp_path, ZEROS)[2] == 0


WAYS = ([(name, f"del {name}", f"answers.py has no function {name}")
         for name in ("allowed_pairs", "attention_weights")] + [
    ("relations", "def relations(*inputs, **named): 1 / 0", "ZeroDivisionError"),
    ("masked_softmax", "def masked_softmax(*inputs): pass", "found None"),
    ("messages", "def messages(*a, f=messages, **b): return f(*a, **b)[:, :, 1:]", "expected the shape (1, 1, 2, 4)"),
    ("relational_attention", "def relational_attention(x, *rest): raise SystemExit(3)", "SystemExit"),
    ("relational_attention_linear", "def relational_attention_linear(x, *rest): return x @ x", "RuntimeError")])


@pytest.mark.parametrize("name, line, words", WAYS, ids=[way[1][:40] for way in WAYS])
def test_a_missing_function_an_exception_or_a_wrong_shape_costs_its_task_alone(tmp_path, name, line, words):
    tasks, messages, _ = lost(tmp_path, f"{SOLUTION}\n\n{line}\n")
    assert tasks == [TASKS[name]]
    assert any(words in message for message in messages), messages


@pytest.mark.parametrize("line", ["from relational_attention import RelationalAttention", "import assignments",
                                  "from . import definition", "exec('import attention')"])
def test_imports_of_the_repository_have_no_points(tmp_path, line):
    _, messages, points = lost(tmp_path, SOLUTION.replace("import torch\n", f"import torch\n{line}\n", 1))
    assert points == 0 and "this assignment allows math, torch" in messages[0]
