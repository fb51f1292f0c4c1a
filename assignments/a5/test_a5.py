"""The grader of a5: the workspace by its definitions, and its properties on inputs whose truth is known.

    python -m assignments.grade a5
"""
import math
from functools import partial

import torch

from assignments.a5 import definitions
from assignments.a5.definitions import SMALL, draw, likeness, make, need, need_no_loop, normal, pair, slots, unit
from assignments.a5.world import BETA, DECAY, K, WRITES, stream, world
from assignments.grading import check, right, task

ALLOWED = {"math", "torch", "assignments.a5.world"}
VARIANTS = (1, 2)
SHARE = {1: 1 / 2, 2: 1 / 6}                                  # of M: the effective rank of a cured memory, by variant


# ---- right versions of the earlier functions -------------------------------------------------------------------------

def layer(tokens, memory, W, k, decay, beta, training, variant):
    """In variant 2 the read comes before the write."""
    h = definitions.collect(tokens, memory, W, k, variant)
    after = definitions.update(memory, h, W, decay, variant) if training else memory
    seen = after if variant == 1 else memory
    return tokens + definitions.retrieve(tokens, seen @ W["lt"], beta, variant), after


def earlier(answers, variant, *names):
    of = {**vars(definitions), "layer": layer}
    functions = {name: partial(of[name], variant=variant) for name in names}
    for name in {"effective_rank", "mean_cosine"} & functions.keys():              # tensors, of which floats can be had
        functions[name] = lambda memory, f=functions[name]: torch.tensor(f(memory), dtype=torch.float64)
    return right(answers, **functions)


# ---- 1. the bottleneck -----------------------------------------------------------------------------------------------

@task("1 the bottleneck", points=8)
def test_gates_are_the_softmax_over_the_k_largest_scores(answers, variant):
    tokens, memory, W = make()
    for k in (1, 2, 4):
        check(answers.gates(tokens, memory, W, k), definitions.gates(tokens, memory, W, k, variant),
              f"gates[s, m, b, t] for {SMALL}, k={k}")
    need_no_loop("gates", lambda tokens, memory, W: answers.gates(tokens, memory, W, 4))


@task("1 the bottleneck", points=4)
def test_each_slot_attends_to_min_k_L_tokens_of_the_batch_and_its_gates_sum_to_1(answers, variant):
    tokens, memory, W = make()
    for k in (1, 3, 6, 50):
        G = answers.gates(tokens, memory, W, k)
        check(G.sum((2, 3)), torch.ones(2, 3), f"the sum of gates[s, m] over all tokens of the batch, k={k}")
        check((G > 0).sum((2, 3)), torch.full((2, 3), min(k, 6)), f"gates above 0 in each gates[s, m], k={k}, L=6")
        if variant == 2:
            need(torch.equal(G > 0, (G[:1] > 0).expand_as(G)),
                 f"a slot's gates above 0 are at other tokens in head 1 than in head 0; expected the same, k={k}")


@task("1 the bottleneck", points=4)
def test_tokens_of_all_images_compete(answers, variant):
    eye = torch.eye(4, dtype=torch.float64)
    near, far = eye[0] * (1 + torch.rand(3, 1, dtype=torch.float64)), -eye[0].expand(3, 4)
    G = answers.gates(torch.stack([near, far]), eye[:1], {"q": eye[None], "k": eye[None]}, 3)
    check(G[0, 0].sum(1), [1., 0.],
          "B=2, T=3, k=3, one slot (1, 0, 0, 0), W_q = W_k = 1; the tokens of image 0 are like the slot, those of "
          "image 1 opposite: the sum of the gates of each image")


# ---- 2. the write ----------------------------------------------------------------------------------------------------

@task("2 the write", points=6)
def test_slots_collect_the_values_that_their_gates_weigh(answers, variant):
    tokens, memory, W = make()
    with earlier(answers, variant, "gates"):
        check(answers.collect(tokens, memory, W, 4), definitions.collect(tokens, memory, W, 4, variant),
              f"h[m] for {SMALL}, k=4")
        W["q"] = torch.zeros_like(W["q"])
        mean = torch.cat([tokens.mean((0, 1)) @ W_v for W_v in W["v"]])
        check(answers.collect(tokens, memory, W, 6), mean.expand(3, -1),
              "W_q = 0 and k = L, so no slot prefers a token: h[m] is the mean of all values, head 0's first")
    with right(answers, gates=lambda tokens, queries, W, k: normal(len(W["q"]), len(queries), *tokens.shape[:2])):
        need_no_loop("collect", lambda tokens, memory, W: answers.collect(tokens, memory, W, 4))


@task("2 the write", points=5)
def test_the_new_memory_is_the_moving_average(answers, variant):
    _, memory, W = make()
    h = normal(3, 8)
    hint = " (new contains the old memory; the variance is the mean of the squares)" if variant == 1 else ""
    for decay in (0.9, 0.3, 0.):
        check(answers.update(memory, h, W, decay), definitions.update(memory, h, W, decay, variant),
              f"update for {SMALL}, decay={decay}" + hint)


@task("2 the write", points=2)
def test_rows_have_length_1_and_the_old_memory_is_not_changed(answers, variant):
    _, memory, W = make()
    before = memory.clone()
    after = answers.update(memory, normal(3, 8), W, 0.6)
    check(after.norm(dim=1), torch.ones(3), "the length of each slot after update, decay=0.6")
    check(memory, before, "the memory that was given to update, afterwards")
    check(answers.update(memory, normal(3, 8), W, 1.), before, "update with decay=1, where nothing is forgotten")


@task("2 the write", points=3)
def test_the_write_has_gradients(answers, variant):
    tokens, memory, W = make()
    inputs = {"tokens": tokens, "memory": memory, **{f"W_{name}": W[name] for name in "qkvo"}}
    for x in inputs.values():
        x.requires_grad_(True)
    with earlier(answers, variant, "gates"):
        after = answers.update(memory, answers.collect(tokens, memory, W, 4), W, 0.6)
    need(after.requires_grad, "the new memory has no gradient: is something detached, or computed under no_grad?")
    gradients = torch.autograd.grad((after * normal(3, 4)).sum(), list(inputs.values()), allow_unused=True)
    for name, gradient in zip(inputs, gradients):
        need(gradient is not None and gradient.any(), f"the new memory has no gradient with respect to {name}")


# ---- 3. the read -----------------------------------------------------------------------------------------------------

@task("3 the read", points=5)
def test_retrieve_mixes_the_patterns(answers, variant):
    x, Y = normal(2, 3, 5), normal(4, 5)
    check(answers.retrieve(x, Y, 2.)[:1, :1], answers.retrieve(x[:1, :1], Y, 2.),
          "retrieve of the first of six states, and of it alone (is the softmax over the patterns?)")
    for beta in (0.5, 1., 3.):
        check(answers.retrieve(x, Y, beta), definitions.retrieve(x, Y, beta, variant),
              f"retrieve, states (2, 3, 5), Y (4, 5), beta={beta}")
    need_no_loop("retrieve", lambda tokens, memory, W: answers.retrieve(tokens, memory @ W["lt"], 1.))


@task("3 the read", points=6)
def test_energy_is_as_defined(answers, variant):
    x, Y = normal(2, 3, 5), normal(4, 5)
    for beta in (0.5, 1., 3.):
        check(answers.energy(x, Y, beta), definitions.energy(x, Y, beta, variant),
              f"energy, states (2, 3, 5), Y (4, 5), beta={beta}")
    check(answers.energy(x, Y[:1], 2.), (x - Y[0]).pow(2).sum(-1) / 2, "energy with a single pattern y: |x - y|^2 / 2")
    need_no_loop("energy", lambda tokens, memory, W: answers.energy(tokens, memory @ W["lt"], 1.))


@task("3 the read", points=2)
def test_a_large_beta_returns_the_nearest_pattern(answers, variant):
    Y = torch.linalg.qr(normal(5, 5))[0][:3]
    x = Y + 0.1 * unit(normal(3, 5))
    what = "beta=10,000, three orthogonal patterns of length 1, states at a distance of 0.1 from each:"
    check(answers.retrieve(x, Y, 1e4), Y, f"{what} retrieve")
    check(answers.energy(x, Y, 1e4), torch.full((3,), 0.005), f"{what} energy", tol=1e-3)


@task("3 the read", points=3)
def test_the_read_goes_down_the_gradient_of_the_energy(answers, variant):
    Y = normal(4, 5)
    for beta in (0.2, 1., 5.):
        x = normal(20, 5).requires_grad_(True)
        E = answers.energy(x, Y, beta)
        gradient, = torch.autograd.grad(E.sum(), x)
        step = answers.retrieve(x, Y, beta)
        check(step, x - gradient, f"retrieve(x) = x - gradient of energy(x), beta={beta}")
        rise = (answers.energy(step, Y, beta) - E).max().item()
        need(rise < 1e-9, f"energy(retrieve(x)) <= energy(x): it rises by {rise:.2g}, beta={beta}")


# ---- 4. the layer ----------------------------------------------------------------------------------------------------

PARTS = ("gates", "collect", "update", "retrieve")


@task("4 the layer", points=5)
def test_training_writes_and_reads(answers, variant):
    tokens, memory, W = make()
    W["v"].requires_grad_(True)
    given = tokens, memory, W, 4, 0.6, 2., True
    with earlier(answers, variant, *PARTS):
        output, after = answers.layer(*given)
    expected, new = layer(*given, variant)
    check(after, new, f"training: the memory after the layer, {SMALL}, k=4")
    check(output, expected, f"training: the layer's output, {SMALL}, k=4")
    need(variant == 2 or output.requires_grad, "training: the output has no gradient with respect to W_v")
    need(after.requires_grad, "training: the memory after the layer has no gradient with respect to W_v")


@task("4 the layer", points=3)
def test_evaluation_reads_only_and_does_not_depend_on_the_batch(answers, variant):
    tokens, memory, W = make()
    with earlier(answers, variant, *PARTS):
        output, after = answers.layer(tokens, memory, W, 4, 0.6, 2., False)
        alone = torch.cat([answers.layer(image[None], memory, W, 4, 0.6, 2., False)[0] for image in tokens])
    check(after, memory, "evaluation: the memory after the layer is the one before it")
    check(output, alone, "evaluation: the output of each image in a batch of two is its output alone")


# ---- 5. how different are the slots? ---------------------------------------------------------------------------------

@task("5 how different are the slots?", points=5)
def test_rank_of_orthogonal_groups_of_slots(answers, variant):
    check(answers.effective_rank(slots(1, 1, 1, 1, 1)), 5., "effective_rank of five orthogonal slots")
    check(answers.effective_rank(slots(4)), 1., "effective_rank of four equal slots (is 0 log 0 = NaN?)")
    p = [x / (math.sqrt(6) + math.sqrt(2) + 1) for x in (math.sqrt(6), math.sqrt(2), 1)]
    expected = math.exp(-sum(x * math.log(x) for x in p)) if variant == 1 else 81 / 41
    check(answers.effective_rank(slots(6, 2, 1)), expected,
          "effective_rank of nine slots in three orthogonal directions, which 6, 2 and 1 of them share")
    need_no_loop("effective_rank", lambda tokens, memory, W: answers.effective_rank(memory))


@task("5 how different are the slots?", points=4)
def test_rank_of_two_slots_with_a_given_cosine(answers, variant):
    c = float(torch.rand(())) * 0.8 + 0.1
    s = math.sqrt(1 + c), math.sqrt(1 - c)
    entropy = -sum(x / sum(s) * math.log(x / sum(s)) for x in s)
    check(answers.effective_rank(pair(c)), math.exp(entropy) if variant == 1 else 2 / (1 + c * c),
          f"effective_rank of two slots whose cosine is {c:.3f} (singular values {s[0]:.3f} and {s[1]:.3f})")


@task("5 how different are the slots?", points=2)
def test_rotation_and_lengths_do_not_matter(answers, variant):
    memory, rotation = normal(5, 4), torch.linalg.qr(normal(4, 4))[0]
    changed = (memory @ rotation) * (0.1 + 3 * torch.rand(5, 1, dtype=torch.float64))
    for name in ("effective_rank", "mean_cosine"):
        statistic = getattr(answers, name)
        check(statistic(changed), statistic(memory), f"{name} after a rotation, and with rows of other lengths")


@task("5 how different are the slots?", points=3)
def test_mean_cosine_of_known_slots(answers, variant):
    c = float(torch.rand(())) * 0.8 + 0.1
    simplex = torch.eye(4, dtype=torch.float64) - 1 / 4
    for memory, expected, what in ((pair(c), c, f"two slots whose cosine is {c:.3f}"),
                                   (slots(3), 1, "three equal slots"), (slots(1, 1, 1), 0, "three orthogonal slots"),
                                   (simplex, -1 / 3, "the four corners of a tetrahedron")):
        check(answers.mean_cosine(memory), expected ** variant, f"mean_cosine of {what}")
    need_no_loop("mean_cosine", lambda tokens, memory, W: answers.mean_cosine(memory))


# ---- 6. why slots become alike ---------------------------------------------------------------------------------------

@task("6 why slots become alike", points=7)
def test_trajectories_of_the_four_conditions(answers, variant):
    _, memory, W = make()
    batches = normal(4, 2, 3, 5) + normal(5)
    with earlier(answers, variant, "gates", "collect", "update", "effective_rank", "mean_cosine"):
        for fixed in (False, True):
            for centred in (False, True):
                memories, changes = [memory], ["fixed"] * fixed + ["centred"] * centred
                for x in batches:
                    memories.append(definitions.next_memory(memory, memories[-1], x, (W, 4, 0.6), changes, variant))
                expected = [[answers.effective_rank(x), answers.mean_cosine(x)] for x in memories]
                check(answers.trajectory(memory, batches, W, 4, 0.6, fixed, centred), expected,
                      f"trajectory[n] = (rank, cosine), {SMALL}, four writes, fixed={fixed}, centred={centred}")


@task("6 why slots become alike", points=3)
def test_common_share_of_known_contents(answers, variant):
    orthogonal = slots(1, 1, 1, 1)
    check(answers.common_share(slots(3)), 1., "common_share where all slots collect the same")
    check(answers.common_share(orthogonal), 1 / 4, "common_share of four orthogonal contents of length 1")
    lengths = torch.tensor([[1.], [2.], [3.], [0.]], dtype=torch.float64)
    check(answers.common_share(torch.cat([orthogonal, -orthogonal])), 0., "common_share of contents whose mean is 0")
    check(answers.common_share(pair(0.)[:1] * lengths), 36 / 16 / (14 / 4),
          "common_share of parallel contents of lengths 1, 2, 3, 0: lengths count")


@task("6 why slots become alike", points=4)
def test_effects_of_the_two_changes(answers, variant):
    for ranks in (torch.tensor([[2., 3.], [5., 9.]], dtype=torch.float64), 5 * torch.rand(2, 2, dtype=torch.float64)):
        check(torch.tensor([float(x) for x in answers.effects(ranks)]), definitions.effects(*ranks.flatten(), variant),
              f"effects (queries, content, interaction) of the ranks {ranks.tolist()}")


# ---- 7. a cure -------------------------------------------------------------------------------------------------------

def written(answers, variant, seed, batches):
    """-> the memory at the start, and after these writes, in the world of this seed."""
    W, start = world(seed)
    given = start.clone()
    workspace = answers.Cured(given, W, K, DECAY, BETA)
    check(workspace.memory, start, "Cured(memory, ...).memory before the first write")
    for n, tokens in enumerate(batches):
        workspace.write(tokens)
        need(torch.equal(given, start), f"the memory that was given to Cured has changed after write {n + 1}; `write` "
                                        "replaces self.memory, and changes no tensor in place")
        lengths = torch.as_tensor(workspace.memory).norm(dim=1)
        check(lengths, torch.ones(len(start)), f"the length of each slot after {n + 1} writes")
    if variant == 2:
        restored = answers.Cured(workspace.memory.clone(), W, K, DECAY, BETA)
        workspace.write(batches[0])
        restored.write(batches[0])
        check(restored.memory, workspace.memory, "one more write, by it and by a new Cured(its memory, ...)")
        return start, restored.memory.detach()
    return start, workspace.memory.detach()


ALL = (*PARTS, "layer", "effective_rank", "mean_cosine")


def need_the_same_again(answers, variant, seed):
    """A memory of random numbers is different, too."""
    one, two = (written(answers, variant, seed, stream(3, 1, 2))[1] for _ in range(2))
    check(one, two, f"the memory after the same three writes once more, world({seed})")


@task("7 a cure", points=5)
def test_slots_stay_different(answers, variant):
    seeds, ranks, kept = [draw() for _ in range(3)], [], []
    with earlier(answers, variant, *ALL):
        for seed in seeds:
            start, memory = written(answers, variant, seed, stream(WRITES, source=seed + 1, seed=seed + 2))
            ranks.append(definitions.effective_rank(memory, variant))
            need_the_same_again(answers, variant, seed)
            kept.append((memory @ start.T).amax(1).mean().item())
    least = SHARE[variant] * len(start)
    where = f"after {WRITES} writes in world(seed), stream({WRITES}, seed + 1, seed + 2), seeds {seeds}: expected"
    need(min(ranks) >= least, f"effective rank {where} at least {least:.2f}, found " +
         ", ".join(f"{x:.2f}" for x in ranks))
    need(max(kept) <= 0.7, f"each slot's largest cosine with a slot at the start, mean, {where} at most 0.70, found "
         + ", ".join(f"{x:.2f}" for x in kept) + "; is anything written?")


@task("7 a cure", points=5)
def test_slots_hold_different_contents(answers, variant):
    seed = draw()
    batches = stream(WRITES, source=draw(), seed=draw())
    mirrored = 2 * batches.mean((1, 2), keepdim=True) - batches
    with earlier(answers, variant, *ALL):
        memory, other = (written(answers, variant, seed, x)[1] for x in (batches, mirrored))
        need_the_same_again(answers, variant, seed)
    where = f"world({seed}), a stream and its mirror image:"
    need(likeness(memory, other) <= 0.99, f"{where} likeness of the two memories: expected at most 0.99, found "
         f"{likeness(memory, other):.4f}; do slots hold more than the mean of all tokens?")
    rank, least = definitions.effective_rank(memory - other, variant), SHARE[variant] * len(memory)
    need(rank >= least, f"{where} effective rank of the difference of the two memories: expected at least {least:.2f}, "
                        f"found {rank:.2f}; do all slots hold the same?")


@task("7 a cure", points=4)
def test_the_memory_depends_on_the_tokens(answers, variant):
    seed, source, other = draw(), draw(), draw()
    with earlier(answers, variant, *ALL):
        after = partial(written, answers, variant, seed)
        a, b, c = stream(WRITES, source, 1), stream(WRITES, source, 2), stream(WRITES, other, 3)
        memory, same, different = (after(x)[1] for x in (a, b, c))
        gap = likeness(memory, same) - likeness(memory, different)
        where = f"world({seed}), sources {source} and {other}: expected"
        need(gap >= 0.1, f"likeness of memories of one source minus of two, {where} at least 0.10, found {gap:.2f}")
        one, two = (after(torch.cat([x[:20], a[-1:]]))[1] for x in (a, c))
        need(likeness(one, two) <= 0.95, f"likeness of memories after 20 writes from two sources, then the same batch, "
                                         f"{where} at most 0.95, found {likeness(one, two):.3f}; is all forgotten?")
        few = a[:3]
        check(after(few)[1], after(few)[1], f"the memory after the same three writes once more, world({seed})")
        check(after(few.flip(1).roll(5, 2))[1], after(few)[1],
              f"the memory after three writes, images and tokens in another order, world({seed})")


@task("7 a cure", points=2)
def test_reading_does_not_write(answers, variant):
    W, memory = world(draw())
    tokens = stream(3, source=draw(), seed=draw())
    with earlier(answers, variant, *ALL):
        workspace = answers.Cured(memory.clone(), W, K, DECAY, BETA)
        workspace.write(tokens[0])
        before = workspace.memory.clone()
        output = workspace.read(tokens[1])
        check(workspace.memory, before, "the memory after read(tokens) is the one before it")
        check(output, tokens[1] + definitions.retrieve(tokens[1], before @ W["lt"], BETA, variant),
              "read(tokens) = tokens + retrieve(tokens, memory W_lt, beta)")
        alone = torch.cat([workspace.read(image[None]) for image in tokens[1]])
        check(output, alone, "read: the output of each image in a batch is its output alone")
