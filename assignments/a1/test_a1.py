"""The grader of a1: relational attention by its definition, one receiver at a time, and its properties.

    python -m assignments.grade a1
"""
from functools import partial
from itertools import product

import torch

from assignments.a1.definition import (allowed_pairs, attention_weights, in_time, masked_softmax, messages, receiver,
                                       relational_attention, relations)
from assignments.a1.inputs import LONG, SMALL, SMALLEST, make, make_messages, no_padding, some_padding, text
from assignments import grading
from assignments.grading import right, task
from assignments.measure import Watch, check_gradients, check_operations

ALLOWED = {"math", "torch"}
VARIANTS = (1, 2, 3)
TOL = {torch.float64: 1e-8, torch.float32: 1e-4}


# ---- what is graded in several tasks --------------------------------------------------------------------------------

def check(found, expected, what):
    """grading.check, and the dtype, for results in float64 or float32."""
    grading.check(found, expected, what, TOL[expected.dtype])
    assert torch.is_tensor(found), f"{what}: expected a tensor, found {type(found).__name__}"
    assert found.dtype == expected.dtype, f"{what}: expected the inputs' dtype, {expected.dtype}, found {found.dtype}"


def earlier(answers, variant, name=None):
    """The student's module with right functions up to the one of this name, or all of those of tasks 1 to 4."""
    functions = {f.__name__: partial(f, variant)
                 for f in (relations, allowed_pairs, masked_softmax, attention_weights, messages)}
    names = list(functions)[:list(functions).index(name) if name else None]
    return right(answers, **{name: functions[name] for name in names})


def softmax(scores, allowed):
    """In the student's module where only operations or memory are counted."""
    return scores.softmax(-1)


def quick(answers):
    """The student's module with functions of tasks 1 to 4 whose shapes alone are right, to count operations."""
    def pairs(x, W):
        return x.new_zeros(len(x), len(W), x.size(1), x.size(1))
    return right(
        answers, relations=lambda x, W_q_rel, W_k_rel: pairs(x, W_q_rel).permute(0, 2, 3, 1),
        allowed_pairs=lambda tokens, causal: tokens[:, None].expand(-1, tokens.size(1), -1),
        masked_softmax=softmax,
        attention_weights=lambda x, W_q, W_k, allowed: pairs(x, W_q),
        messages=lambda alpha, r, s, W_r, W_s: alpha.new_zeros(*alpha.shape[:3], W_r.size(-1)))


def check_layer_gradients(answers, variant, name):
    x, s, w, _ = make(**{**SMALLEST, "n": 4, "H": 2})
    tokens = torch.tensor([[False, True, True, True]])

    def of(layer):
        return lambda x, s, **w: layer(x, s, w, tokens, True)
    with earlier(answers, variant):
        what = f"{name}, causal, tokens={tokens.tolist()}"
        found, expected = of(getattr(answers, name)), of(partial(relational_attention, variant))
        check(found(x, s, **w), expected(x, s, **w), what)
        check_gradients(found, expected, dict(x=x, s=s, **w), what)


def check_memory(answers, causal, tokens_of):
    """The two rules of task 6, in the forward and the backward pass."""
    peaks = []
    for n in (512, 1024):
        x, s, w, _ = make(**LONG, n=n, dtype=torch.float32)
        for tensor in (x, s, *w.values()):
            tensor.requires_grad_()
        with right(answers, masked_softmax=softmax), Watch(answers.__file__) as watch:
            answers.relational_attention_linear(x, s, w, tokens_of(1, n), causal).square().sum().backward()
        peaks.append(watch.peak)
    numel, what = watch.largest
    assert numel < n * n, (f"n={n}, causal={causal}: {what} has the memory of {numel:,} numbers; expected fewer than "
                           f"n^2 = {n * n:,} in every tensor of the forward and the backward pass")
    assert peaks[1] <= 2.5 * peaks[0], (
        f"causal={causal}: {peaks[0]:,} numbers are in memory at one time for n=512, {peaks[1]:,} for n=1024: "
        f"{peaks[1] / peaks[0]:.1f} times as many; expected at most 2.5. Is something kept for the "
        "backward pass, or does a block grow with n?")


def check_linear(answers, variant, causal, tokens_of):
    """Task 6: the memory, and the outputs, on small inputs and for some receivers of a long one."""
    check_memory(answers, causal, tokens_of)
    with torch.no_grad(), earlier(answers, variant):
        for sizes in (SMALLEST, SMALL):
            x, s, w, _ = make(**sizes)
            tokens = tokens_of(*x.shape[:2])
            check(answers.relational_attention_linear(x, s, w, tokens, causal),
                  relational_attention(variant, x, s, w, tokens, causal), f"out[b, i, :] for {text(sizes)}, "
                  f"causal={causal}, tokens={tokens.tolist()}")
        x, s, w, _ = make(**LONG, n=300)                      # several blocks of queries
        tokens = tokens_of(1, 300)
        found = answers.relational_attention_linear(x, s, w, tokens, causal)
        for i in (0, int(torch.randint(1, 299, ())), 299):
            check(found[0, i], receiver(variant, x, s, w, tokens, causal, 0, i),
                  f"out[0, {i}, :] for {text(LONG)}, n=300, causal={causal}")


# ---- 1. relations ----------------------------------------------------------------------------------------------------

def check_relations(answers, variant):
    def inputs(sizes):
        x, _, w, _ = make(**sizes)
        return dict(x=x, W_q_rel=w["W_q_rel"], W_k_rel=w["W_k_rel"])
    for sizes in (SMALLEST, SMALL):
        given = inputs(sizes)
        check(answers.relations(**given), relations(variant, **given), f"r[b, i, j, l] for {text(sizes)}")
    check_operations(lambda B, n: answers.relations(**inputs({**SMALL, "B": B, "n": n})), "relations")
    return inputs(SMALLEST)


@task("1. relations", points=10)
def test_a_relation_compares_two_tokens(answers, variant):
    check_relations(answers, variant)


@task("1. relations", points=5)
def test_gradients_of_relations(answers, variant):
    inputs = check_relations(answers, variant)
    check_gradients(answers.relations, partial(relations, variant), inputs, "relations")


# ---- 2. masks --------------------------------------------------------------------------------------------------------

def check_pairs(found, expected, what):
    assert torch.is_tensor(found) and found.dtype == torch.bool, f"{what}: expected a boolean tensor"
    assert found.shape == expected.shape, f"{what}: expected the shape {expected.shape}, found {found.shape}"
    for at in (found != expected).nonzero().tolist():
        raise AssertionError(f"{what}: allowed{at} must be {bool(expected[tuple(at)])}, is {bool(found[tuple(at)])}")


def check_allowed(answers, variant, tokens, causal):
    check_operations(lambda B, n: answers.allowed_pairs(no_padding(B, n), causal), "allowed_pairs")
    check_pairs(answers.allowed_pairs(tokens, causal), allowed_pairs(variant, tokens, causal),
                f"allowed_pairs of tokens={tokens.tolist()}, causal={causal}")


@task("2. masks", points=4)
def test_no_receiver_attends_to_padding(answers, variant):
    check_allowed(answers, variant, torch.tensor([[True, False]]), causal=False)
    check_allowed(answers, variant, some_padding(3, 5), causal=False)


@task("2. masks", points=4)
def test_causal_pairs(answers, variant):
    check_allowed(answers, variant, no_padding(1, 2), causal=True)
    check_allowed(answers, variant, no_padding(2, 5), causal=True)
    tokens = some_padding(3, 5)
    check_pairs(answers.allowed_pairs(tokens, True),
                answers.allowed_pairs(tokens, False) & answers.allowed_pairs(no_padding(3, 5), True),
                f"allowed_pairs of tokens={tokens.tolist()}, causal=True (what padding and time both allow)")


@task("2. masks", points=4)
def test_weights_of_the_allowed_senders_are_their_softmax(answers, variant):
    check_operations(lambda B, n: answers.masked_softmax(torch.randn(B, 2, n, n), torch.rand(B, n, n) < 0.5),
                     "masked_softmax")
    for scores, allowed in ((torch.randn(1, 1, 1, 3), torch.tensor([[[True, False, True]]])),
                            (torch.randn(2, 3, 4, 5), torch.rand(2, 4, 5) < 0.5)):
        scores, allowed[..., 0] = scores.double(), True
        check(answers.masked_softmax(scores, allowed), masked_softmax(variant, scores, allowed),
              f"masked_softmax [b, h, i, j] for scores of the shape {tuple(scores.shape)}; the first has scores "
              f"{[round(y, 4) for y in scores[0, 0, 0].tolist()]} and allowed {allowed[0, 0].tolist()}")


@task("2. masks", points=4)
def test_a_fully_masked_row_gives_zeros_and_no_nan(answers, variant):
    scores = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    allowed = torch.tensor([[[True, True, False], [False, False, False]]])
    found = answers.masked_softmax(scores, allowed)
    zeros = torch.zeros(1, 2, 3).double()
    check(found[:, :, 1], zeros, "masked_softmax [b, h, j] of a row whose senders are all masked")
    (found * torch.randn_like(found)).sum().backward()
    assert scores.grad is not None, "masked_softmax: no gradient reaches scores"
    check(scores.grad[:, :, 1], zeros, "gradient of the scores in a row whose senders are all masked")
    assert scores.grad.isfinite().all(), f"gradient of the scores: expected finite numbers, found {scores.grad}"
    assert scores.grad[:, :, 0, :2].all(), "gradient of the allowed scores: expected other numbers than 0, found 0"


@task("2. masks", points=4)
def test_large_scores(answers, variant):
    allowed = torch.tensor([[[True, True, False, False]]])
    for size in (1000.0, -1000.0):
        scores = torch.where(allowed, size, -size)[:, None]
        check(answers.masked_softmax(scores, allowed), torch.tensor([[[[0.5, 0.5, 0.0, 0.0]]]]),
              f"masked_softmax of the scores {scores.flatten().tolist()}, of which the first two are allowed")


# ---- 3. attention weights --------------------------------------------------------------------------------------------

def check_weights(answers, variant):
    def inputs(sizes):
        x, _, w, tokens = make(**sizes)
        return dict(x=x, W_q=w["W_q"], W_k=w["W_k"], allowed=allowed_pairs(variant, tokens, False))
    with earlier(answers, variant, "attention_weights"):
        for sizes in (SMALLEST, SMALL):
            given = inputs(sizes)
            alpha, expected = answers.attention_weights(**given), attention_weights(variant, **given)
            check(alpha.sum(-1), expected.sum(-1), f"the sum of alpha[b, h, i, :] over the senders, {text(sizes)}")
            check(alpha, expected, f"alpha[b, h, i, j] for {text(sizes)}, all pairs allowed")
    own = answers.attention_weights
    with quick(answers):
        check_operations(lambda B, n: own(**inputs({**SMALL, "B": B, "n": n})), "attention_weights")
    return inputs(SMALLEST)


@task("3. attention weights", points=5)
def test_attention_weights_are_a_softmax_over_senders_of_scaled_products(answers, variant):
    check_weights(answers, variant)


@task("3. attention weights", points=2)
def test_attention_weights_of_masked_pairs_are_zero(answers, variant):
    x, _, w, _ = make(**SMALL)
    allowed = torch.rand(2, 5, 5) < 0.5
    with earlier(answers, variant, "attention_weights"):
        alpha = answers.attention_weights(x, w["W_q"], w["W_k"], allowed)
    pairs = allowed[:, None].expand(-1, SMALL["H"], -1, -1)
    check(alpha * ~pairs, torch.zeros_like(alpha), f"alpha[b, h, i, j] of pairs not allowed, {text(SMALL)}")
    check(alpha.sum(-1), pairs.any(-1).to(x.dtype),
          "the sum of alpha[b, h, i, :], which is 1, or 0 where no sender is allowed")


@task("3. attention weights", points=3)
def test_gradients_of_attention_weights(answers, variant):
    inputs = check_weights(answers, variant)
    allowed = inputs.pop("allowed")
    with earlier(answers, variant, "attention_weights"):
        check_gradients(partial(answers.attention_weights, allowed=allowed),
                        partial(attention_weights, variant, allowed=allowed), inputs, "attention_weights")


# ---- 4. messages -----------------------------------------------------------------------------------------------------

def check_messages(answers):
    check_operations(lambda B, n: answers.messages(**make_messages(**{**SMALL, "B": B, "n": n})), "messages")


@task("4. messages", points=8)
def test_the_message_of_a_single_sender(answers, variant):
    for sizes in (SMALLEST, SMALL):
        inputs = make_messages(**sizes)
        n = sizes["n"]
        one = torch.eye(n)[torch.randperm(n)].roll(1, -1).expand(inputs["alpha"].shape)
        inputs["alpha"] = one.to(inputs["s"].dtype)
        check(answers.messages(**inputs), messages(variant, **inputs), f"a[b, h, i] for {text(sizes)}, if receivers "
              f"{list(range(n))} attend only to senders {one[0, 0].argmax(-1).tolist()}, with weight 1")
    check_messages(answers)


def check_sums(answers, variant):
    for sizes in (SMALLEST, SMALL):
        inputs = make_messages(**sizes)
        inputs["alpha"][:, :, 1] = 0                          # a fully masked row
        check(answers.messages(**inputs), messages(variant, **inputs),
              f"a[b, h, i] for {text(sizes)}, random alpha (receiver 1: weights 0)")
    check_messages(answers)


@task("4. messages", points=7)
def test_messages_are_summed_with_the_weights(answers, variant):
    check_sums(answers, variant)


@task("4. messages", points=5)
def test_gradients_of_messages(answers, variant):
    check_sums(answers, variant)
    check_gradients(answers.messages, partial(messages, variant), make_messages(**SMALLEST), "messages")


# ---- 5. the layer ----------------------------------------------------------------------------------------------------

def check_layer(answers, variant):
    for sizes in (SMALLEST, SMALL):
        inputs = make(**sizes)
        with earlier(answers, variant):
            check(answers.relational_attention(*inputs, False), relational_attention(variant, *inputs, False),
                  f"relational_attention [b, i, :] for {text(sizes)}, not causal, no padding")
    with quick(answers):
        check_operations(lambda B, n: answers.relational_attention(*make(**{**SMALL, "B": B, "n": n}), False),
                         "relational_attention")


@task("5. the layer", points=4)
def test_the_layer(answers, variant):
    check_layer(answers, variant)


@task("5. the layer", points=3)
def test_permuted_tokens_give_permuted_outputs(answers, variant):
    check_layer(answers, variant)
    x, s, w, _ = make(**SMALL)
    tokens, order = some_padding(2, 5), torch.randperm(5)
    with earlier(answers, variant):
        check(answers.relational_attention(x[:, order], s[:, order], w, tokens[:, order], False),
              answers.relational_attention(x, s, w, tokens, False)[:, order],
              f"the outputs after x, s and tokens are permuted by {order.tolist()} (found) and the permuted outputs "
              "(expected)")


@task("5. the layer", points=4)
def test_no_output_depends_on_padding_or_on_senders_that_time_forbids(answers, variant):
    x, s, w, tokens = make(**{**SMALLEST, "n": 3, "H": 2})
    with earlier(answers, variant):
        for causal, padded, j in product((True, False), (None, 0, 2), range(3)):
            tokens[:] = True
            if padded is not None:
                tokens[:, padded] = False
            change = (torch.arange(3) == j).double()[:, None]
            before, after = (answers.relational_attention(x + c * change, s - c * change, w, tokens, causal)
                             for c in (0, 1))
            what = f"relational_attention, n=3, causal={causal}, tokens={tokens.tolist()}"
            for i in {0, 1, 2} - {j}:
                if j == padded or causal and not in_time(variant, i, j):
                    check(after[:, i], before[:, i], f"{what}: out[0, {i}, :] after x and s of token {j} changed, to "
                          "which it may not attend")
                else:
                    assert (after - before)[:, i].abs().max() > 1e-9, (
                        f"{what}: expected out[0, {i}, :] to change with x and s of token {j}; it did not")
        check(answers.relational_attention(x, s, w, torch.zeros_like(tokens), False), torch.zeros_like(x),
              "relational_attention of a sequence that is all padding")


@task("5. the layer", points=4)
def test_gradients_reach_every_weight(answers, variant):
    check_layer(answers, variant)
    check_layer_gradients(answers, variant, "relational_attention")


# ---- 6. linear memory ------------------------------------------------------------------------------------------------

@task("6. linear memory", points=8)
def test_linear_memory(answers, variant):
    check_linear(answers, variant, causal=False, tokens_of=no_padding)


@task("6. linear memory", points=8)
def test_linear_memory_with_masks(answers, variant):
    check_linear(answers, variant, causal=True, tokens_of=some_padding)


@task("6. linear memory", points=4)
def test_gradients_with_linear_memory(answers, variant):
    check_linear(answers, variant, causal=False, tokens_of=no_padding)
    check_layer_gradients(answers, variant, "relational_attention_linear")
