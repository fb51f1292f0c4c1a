"""The grader of a2: right solutions have all points; a typical mistake costs those of its task, no others."""
from pathlib import Path

import pytest
from remembered import grade


REFERENCE = Path(__file__).parent / "solution_a2.py"
STARTER = Path(__file__).parents[2] / "assignments" / "a2" / "answers.py"
DEFINITIONS = STARTER.with_name("definitions.py").read_text(encoding="utf-8")
SOURCE = REFERENCE.read_text(encoding="utf-8")
VARIANT_2 = ("VARIANT = 1", "VARIANT = 2")


def points(path, *changes, variant=1, seed=0):
    """-> {number of the task: (points, earned, messages)} of the reference with these changes of its text."""
    text = SOURCE
    for old, new in changes:
        assert text.count(old) == 1, f"{text.count(old)} times in the reference: {old}"
        text = text.replace(old, new)
    path = path / "answers.py"
    path.write_text(text, encoding="utf-8")
    return {int(name.split()[0]): result for name, *result in grade("a2", path, variant, seed)}


def lost(results):
    return {task for task, (worth, earned, _) in results.items() if earned < worth}


@pytest.mark.parametrize("variant, seed", [(1, 0), (1, 4), (2, 0)])
def test_the_reference_has_all_points(tmp_path, variant, seed):
    results = points(tmp_path, *[VARIANT_2] * (variant - 1), variant=variant, seed=seed)
    assert lost(results) == set(), results
    assert sum(worth for worth, _, _ in results.values()) == 100


@pytest.mark.parametrize("of, graded_as", [(1, 2), (2, 1)])
def test_another_variants_solution_loses_most_points_of_most_tasks(tmp_path, of, graded_as):
    results = points(tmp_path, *[VARIANT_2] * (of - 1), variant=graded_as)
    assert sum(earned < worth / 2 for worth, earned, _ in results.values()) >= 5
    assert sum(earned for _, earned, _ in results.values()) <= 25


def test_the_starter_has_no_points():
    results = grade("a2", STARTER)
    assert sum(earned for _, _, earned, _ in results) == 0
    assert all(messages == ["not written yet"] for *_, messages in results)


def test_the_graders_own_definitions_pasted_have_few_points(tmp_path):
    loops = DEFINITIONS[DEFINITIONS.index("def positional("):DEFINITIONS.index("class Memory")]
    names = {"positional_symbols": "positional", "relative_symbols": "relative", "relative_sum": "summed",
             "symbol_weights": "weights_of", "effective_number": "number_of", "spread": "spread_of"}
    lines = ["import math", "import torch", loops, "symbolic_symbols = symbols_of",
             *(f"{name} = lambda *inputs: {loop}(*inputs, 1)" for name, loop in names.items())]
    (tmp_path / "answers.py").write_text("\n".join(lines), encoding="utf-8")
    results = grade("a2", tmp_path / "answers.py")
    assert sum(earned for _, _, earned, _ in results) <= 20
    assert all("no Python loop" in " ".join(messages) for _, _, _, messages in results[:5])


MISTAKES = {                                                           # name: old text, new text, tasks that lose
    "positions count padding": ("p = count.cumsum(1) - count  ",
                                "p = torch.arange(mask.shape[1]).expand(mask.shape)  ", {1}),
    "positions count from 1": ("count.cumsum(1) - count  ", "count.cumsum(1)  ", {1}),
    "padding has a symbol": (" * mask[..., None]", "", {1}),
    "positional symbols detached": ("return library[p.clamp", "return library.detach()[p.clamp", {1}),
    "too long a sequence shares the last symbol": ("raise ValueError", "ValueError", {1}),
    "the receiver relative to the sender": ("s = library[offset.clamp(-D, D) + D]",
                                            "s = library[D - offset.clamp(-D, D)]", {2}),
    "receivers are the first T tokens": ("torch.arange(n - T, n)[:, None]         # (T, n)\n    s =",
                                         "torch.arange(T)[:, None]\n    s =", {2}),
    "offsets wrap round": ("s = library[offset.clamp(-D, D) + D]", "s = library[(offset + D) % (2 * D + 1)]", {2}),
    "the sum of the transposed pairs": ("row = (offset.clamp(-D, D) + D)", "row = (D - offset.clamp(-D, D))", {3}),
    "detached alpha": ("scatter_add(2, row, alpha)", "scatter_add(2, row, alpha.detach())", {3}),
    "the last of the senders that share an offset": ("scatter_add(2, row, alpha)", "scatter(2, row, alpha)", {3}),
    "the tensor of pairs": ("return weight @ library",
                            "return torch.einsum('hij,ijd->hid', alpha, library[row[0]])", {3}),
    "a loop that keeps its blocks": ("return weight @ library", "return torch.stack([alpha[:, i] @ library[row[0, i]] "
                                     "for i in range(T)], 1)", {3}),
    "no scale": ("(d_h if VARIANT == 2 else math.sqrt(d_h))", "1", {4}),
    "scale of the whole width": ("d_h = q.shape[-1]", "d_h = x.shape[-1]", {4}),
    "softmax over the tokens": ("math.sqrt(d_h))).softmax(-1)", "math.sqrt(d_h))).softmax(1)", {4}),
    "W_q transposed": ("(x @ W_q, templates))\n    d_h", "(x @ W_q.T, templates))\n    d_h", {4}),
    "heads take every m-th feature": ("library.unflatten(-1, (p.shape[2], -1)))",
                                      "library.unflatten(-1, (-1, p.shape[2])).mT)", {4}),
    "library detached": ("library.unflatten(", "library.detach().unflatten(", {4}),
    "entropy in bits": ("torch.special.entr(p).sum(-1).exp()", "(torch.special.entr(p).sum(-1) / math.log(2)).exp()",
                        {5}),
    "0 log 0": ("torch.special.entr(p).sum(-1).exp()", "(-(p * p.log()).sum(-1)).exp()", {5}),
    "n instead of n - 1": ("/ (n - 1)", "/ n", {5}),
    "a difference of large numbers": ("centred.square().sum() / (n - 1)", "(n * symbols.square().sum() - "
                                      "symbols.sum(0).square().sum()).clamp(min=0) / n / (n - 1)", {5}),
    "the global random state": ("generator = torch.Generator().manual_seed(seed)",
                                "generator = torch.random.default_generator.manual_seed(seed)", {5}),
    "std_w forgotten": ("std_w * W_q", "W_q", {5}),
    "variance for standard deviation": ("std_x * x", "std_x ** 2 * x", {5}),
    "tau with the width of a head": ("tau2 = d *", "tau2 = d / n_heads *", {6}),
    "tau squared twice": ("tau2 = d * (std_x * std_w) ** 2", "tau2 = (d * (std_x * std_w) ** 2) ** 2", {6}),
    "first order": ("math.sqrt(-math.expm1(-tau2))", "math.sqrt(tau2)", {6}),
    "entropy without its second term": ("math.exp(-tau2 / 2)", "math.exp(tau2 / 2)", {6}),
    "no cure": ("q = q / (q.square().mean(-1, keepdim=True) + 1e-16).sqrt()", "q = q", {7}),
    "an epsilon larger than what it protects": ("+ 1e-16", "+ 1e-5", {7}),
    "a constant gain": ("q = q / (q.square().mean(-1, keepdim=True) + 1e-16).sqrt()", "q = q / 0.0032", {7}),
    "a length of 0": (" + 1e-16)", ")", {7}),
    "the length over all tokens": ("q = q / (q.square().mean(-1, keepdim=True)",
                                   "q = q / (q.square().mean((0, 1), keepdim=True)", {7}),
    "too sharp": ("else 1.0", "else 8.0", {7}),
    "rounded to one symbol, the gradient passed through": (
        "return (gain * torch.einsum(\"btac,kac->btak\", q, f) / math.sqrt(q.shape[-1])).softmax(-1)",
        "p = (gain * torch.einsum(\"btac,kac->btak\", q, f) / math.sqrt(q.shape[-1])).softmax(-1)\n"
        "    return torch.nn.functional.one_hot(p.argmax(-1), len(f)) + p - p.detach()", {7}),
    "a softmax over the heads": ("math.sqrt(q.shape[-1])).softmax(-1)", "math.sqrt(q.shape[-1])).softmax(-2)", {7}),
    "templates detached": ("torch.einsum(\"btac,kac->btak\", q, f) /",
                           "torch.einsum(\"btac,kac->btak\", q, f.detach()) /", {7}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_costs_points_of_its_task_alone(tmp_path, mistake):
    old, new, tasks = MISTAKES[mistake]
    results = points(tmp_path, (old, new))
    assert lost(results) == tasks, results


@pytest.mark.parametrize("new, said", [
    ("def another_name(", "has no function spread"),
    ("def spread(symbols):\n    return symbols\n\n\ndef another_name(", "expected the shape ()"),
    ("def spread(symbols):\n    return\n\n\ndef another_name(", "is there a `return`?"),
    ("def spread(symbols):\n    return symbols[99]\n\n\ndef another_name(", "IndexError"),
])
def test_a_missing_function_a_wrong_shape_and_an_exception_cost_their_task_alone(tmp_path, new, said):
    results = points(tmp_path, ("def spread(", new))
    assert lost(results) == {5}
    assert said in " ".join(results[5][2])


def test_the_core_cannot_be_imported(tmp_path):
    results = points(tmp_path, ("import math\n", "import math\nimport symbols\n"))
    assert lost(results) == {1, 2, 3, 4, 5, 6, 7}
    assert "answers.py uses symbols" in results[1][2][0]
