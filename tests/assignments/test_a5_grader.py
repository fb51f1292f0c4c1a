"""The grader of a5: right solutions have all points; a typical mistake costs those of its task, no others."""
from pathlib import Path

import pytest
from remembered import grade

from assignments.a5 import world

REFERENCE = Path(__file__).parent / "solution_a5.py"
STARTER = Path(__file__).parents[2] / "assignments" / "a5" / "answers.py"
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
    return {int(name.split()[0]): result for name, *result in grade("a5", path, variant, seed)}


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
    assert sum(earned < worth / 2 for worth, earned, _ in results.values()) >= 4
    assert sum(earned for _, earned, _ in results.values()) <= 52


def test_the_starter_has_no_points():
    results = grade("a5", STARTER)
    assert sum(earned for _, _, earned, _ in results) == 0
    assert all(messages == ["not written yet"] for *_, messages in results)


GATES = "    weights = A.gather(-1, chosen).softmax(-1)\n    return torch.zeros_like(A).scatter(-1, chosen, weights)"
WRITE = "    def write(self, tokens):\n"
CURE = "return update(self.memory, h - h.mean(0), self.W, self.decay)"
OWN_QUERIES = ("collect(tokens, self.queries, self.W, self.k)", "collect(tokens, self.memory, self.W, self.k)")
UNCENTRED = ("h - h.mean(0), self.W", "h, self.W")
MISTAKES = {                                                           # name: old text, new text, tasks that lose
    "no scale": ("keys.mT / math.sqrt(D)", "keys.mT", {1}),
    "scale of the tokens' width": ("math.sqrt(D) ", "math.sqrt(tokens.size(2)) ", {1}),
    "softmax over the slots": (".softmax(-1)\n    return torch.zeros", ".softmax(1)\n    return torch.zeros", {1}),
    "softmax over all tokens, then the largest": (GATES, "    weights = A.softmax(-1).gather(-1, chosen)\n"
                                                  "    return torch.zeros_like(A).scatter(-1, chosen, weights)", {1}),
    "softmax with zeros for the others": (GATES, "    return torch.zeros_like(A).scatter(-1, chosen, "
                                          "A.gather(-1, chosen)).softmax(-1)", {1}),
    "the k smallest": ("chosen = A.topk(k).indices", "chosen = A.topk(k, largest=False).indices", {1}),
    "top-k within each image": ("chosen = A.topk(k).indices", "k = min(k, T)\n        "
                                "chosen = (A.unflatten(-1, (B, T)).topk(k).indices + "
                                "T * torch.arange(B)[:, None]).flatten(2)", {1}),
    "k larger than L": ("k = min(k, B * T)", "k = k", {1}),
    "images and tokens confused": (".unflatten(-1, (B, T))", ".unflatten(-1, (T, B)).mT", {1}),
    "W_q transposed": ('queries @ W["q"]', 'queries @ W["q"].mT', {1}),
    "one choice for all heads": ("chosen = A.topk(k).indices",
                                 "chosen = A.mean(0).topk(k).indices.expand(len(A), -1, -1)", {1}),
    "heads side by side in the wrong order": (".transpose(0, 1).flatten(1)  ", ".permute(1, 2, 0).flatten(1)  ", {2}),
    "slots and heads confused": (".transpose(0, 1).flatten(1)  ", ".reshape(G.size(1), -1)  ", {2}),
    "keys for values": ('@ W["v"]                         #', '@ W["k"]                         #', {2}),
    "the moving average the wrong way round": ("F.normalize(decay * memory + (1 - decay) * new",
                                               "F.normalize((1 - decay) * memory + decay * new", {2}),
    "rows without length 1": ("return F.normalize(decay * memory + (1 - decay) * new, dim=-1)",
                              "return decay * memory + (1 - decay) * new", {2}),
    "columns of length 1": ("(1 - decay) * new, dim=-1)", "(1 - decay) * new, dim=0)", {2}),
    "unit rows for the LN": ("F.layer_norm(new, new.shape[-1:], eps=1e-6) if", "F.normalize(new, dim=-1) if", {2}),
    "LN with n - 1": ("F.layer_norm(new, new.shape[-1:], eps=1e-6)",
                      "(new - new.mean(1, keepdim=True)) / (new.var(1, keepdim=True) + 1e-6).sqrt()", {2}),
    "LN without the memory": ("new = memory + h @", "new = h @", {2}),
    "the memory is overwritten": ("return F.normalize(decay * memory + (1 - decay) * new, dim=-1)",
                                  "return memory.copy_(F.normalize(decay * memory + (1 - decay) * new, dim=-1))", {2}),
    "a detached write": ("decay * memory + (1 - decay) * new, dim=-1)",
                         "decay * memory + (1 - decay) * new.detach(), dim=-1)", {2}),
    "beta forgotten": ("return scores(states, Y, beta).softmax(-1) @ Y", "return scores(states, Y, 1).softmax(-1) @ Y",
                       {3}),
    "softmax over the states": ("scores(states, Y, beta).softmax(-1) @", "scores(states, Y, beta).softmax(-2) @", {3}),
    "exp overflows": ("scores(states, Y, beta).softmax(-1) @ Y",
                      "(lambda e: e / e.sum(-1, keepdim=True))(scores(states, Y, beta).exp()) @ Y", {3}),
    "log of a sum that overflows": ("scores(states, Y, beta).logsumexp(-1)",
                                    "scores(states, Y, beta).exp().sum(-1).log()", {3}),
    "energy without 1 / beta": ("logsumexp(-1) / beta", "logsumexp(-1)", {3}),
    "energy with the mean length": ("Y.square().sum(-1).max()", "Y.square().sum(-1).mean()", {3}),
    "the old memory is read": ("seen = after if", "seen = memory if", {4}),
    "evaluation writes": ("    if training:\n", "    if True:\n", {4}),
    "no residual": ("return tokens + retrieve(tokens, seen @", "return retrieve(tokens, seen @", {4}),
    "squared singular values": ("p = values / values.sum()", "p = values.square() / values.square().sum()", {5}),
    "0 log 0": ("torch.special.entr(p).sum()", "(-(p.clamp(min=0) * (p * (p > 1e-12)).log()).sum())", {5}),
    "rank of rows of any length": ("linalg.svdvals(F.normalize(memory, dim=-1))", "linalg.svdvals(memory)", {5}),
    "each slot with itself": ("(cosines.sum() - M) / (M * (M - 1))", "cosines.mean()", {5}),
    "M instead of M - 1": ("(M * (M - 1))", "(M * M)", {5}),
    "absolute cosines": ("cosines = rows @ rows.mT", "cosines = (rows @ rows.mT).abs()", {5}),
    "the start is not recorded": ("return torch.tensor(rows)", "return torch.tensor(rows[1:])", {6}),
    "fixed: queries of the write before": ("first if fixed else memory, W, k)\n",
                                           "first if fixed else memory, W, k)\n        first = memory\n", {6}),
    "centred over the features": ("h.mean(0) if VARIANT", "h.mean(1, keepdim=True) if VARIANT", {6}),
    "share of rows of length 1": ("return h.mean(0)", "h = F.normalize(h, dim=-1)\n    return h.mean(0)", {6}),
    "effects transposed": ("return ranks[1].mean() - ranks[0].mean(), ranks[:, 1].mean() - ranks[:, 0].mean(), ",
                           "return ranks[:, 1].mean() - ranks[:, 0].mean(), ranks[1].mean() - ranks[0].mean(), ", {6}),
    "half the interaction": ("    if VARIANT == 2:\n        return ranks[1, 0]", "    interaction = interaction / 2\n"
                             "    if VARIANT == 2:\n        return ranks[1, 0]", {6}),
    "fixed queries alone": (*UNCENTRED, {7}),
    "centring alone": (*OWN_QUERIES, {7}),
    "as published": (CURE, "h = collect(tokens, self.memory, self.W, self.k)\n        "
                     "return update(self.memory, h, self.W, self.decay)", {7}),
    "nothing is written": (WRITE, WRITE + "        return\n", {7}),
    "all is forgotten": (CURE, "return update(self.queries, h - h.mean(0), self.W, 0.0)", {7}),
    "noise keeps slots different": (CURE, "return F.normalize(torch.randn_like(self.memory), dim=-1)", {7}),
    "reading writes": ("def read(self, tokens):\n", "def read(self, tokens):\n        self.write(tokens)\n", {7}),
    "rows of another length": (CURE, CURE.replace("return ", "return 1.01 * "), {7}),
    "random numbers": (CURE, "return F.normalize(torch.randn_like(self.memory), dim=-1)", {7}),
    "one mean for all slots, plus or minus": (CURE, "self.mean = 0.9 * getattr(self, 'mean', 0) + "
                                              "0.1 * tokens.mean((0, 1))[:16]\n        "
                                              "return F.normalize(self.queries.roll(1, 0) + 0.2 * self.mean * "
                                              "torch.tensor([[1.], [-1.]]).repeat(6, 1), dim=-1)", {7}),
    "one slot's contents for all": (CURE, "h = h[:1].expand(len(h), -1)\n        self.mean = 0.9 * getattr(self, "
                                    "'mean', 0) + 0.1 * h @ self.W['o']\n        "
                                    "return F.normalize(self.queries.roll(1, 0) + 0.4 * self.mean * "
                                    "torch.tensor([[1.], [-1.]]).repeat(6, 1), dim=-1)", {7}),
    "the cure overwrites the memory": ("self.memory = self.written_by_fixed_queries(tokens)",
                                       "self.memory.copy_(self.written_by_fixed_queries(tokens))", {7}),
    "gates head by head": ("    A = q @ keys.mT / math.sqrt(D) ", "    A = torch.stack([a @ b.T / math.sqrt(D) "
                           "for a, b in zip(q, keys)]) ", {1}),
    "the sum over heads as a loop": ("return (G @ v).transpose(0, 1).flatten(1)  ",
                                     "return torch.cat([g @ x for g, x in zip(G, v)], 1)  ", {2}),
    "cosines pair by pair": ("cosines = rows @ rows.mT", "cosines = torch.stack([torch.stack([a @ b for a in rows]) "
                             "for b in rows])", {5}),
    "the first image's tokens alone": ("written_by_fixed_queries(tokens)\n        else",
                                       "written_by_fixed_queries(tokens[:1])\n        else", {7}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_costs_points_of_its_task_alone(tmp_path, mistake, monkeypatch):
    monkeypatch.setattr(world, "WRITES", 20)                           # quick, and enough for slots to become alike
    old, new, tasks = MISTAKES[mistake]
    results = points(tmp_path, (old, new))
    assert lost(results) == tasks, results


@pytest.mark.parametrize("new, said", [
    ("def another_name(", "has no function effective_rank"),
    ("def effective_rank(memory):\n    return memory\n\n\ndef another_name(", "expected the shape ()"),
    ("def effective_rank(memory):\n    return\n\n\ndef another_name(", "is there a `return`?"),
    ("def effective_rank(memory):\n    return memory[99]\n\n\ndef another_name(", "IndexError"),
])
def test_a_missing_function_a_wrong_shape_and_an_exception_cost_their_task_alone(tmp_path, monkeypatch, new, said):
    monkeypatch.setattr(world, "WRITES", 20)
    results = points(tmp_path, ("def effective_rank(", new))
    assert lost(results) == {5}
    assert said in " ".join(results[5][2])


def test_the_core_cannot_be_imported(tmp_path):
    results = points(tmp_path, ("import math\n", "import math\nimport workspace\n"))
    assert lost(results) == {1, 2, 3, 4, 5, 6, 7}
    assert "answers.py uses workspace" in results[1][2][0]
