"""The global workspace of the Associative Transformer: what is written to its memory, what is read, what it costs."""
import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from model import LanguageModel, Seq2SeqTransformer, TransformerConfig, VisionTransformer
from workspace import GlobalWorkspace, cv_squared, energy, read, slot_attention, slot_statistics

M, D, S, E, K = 5, 6, 3, 16, 4                                         # slots, width, heads, d_model, bottleneck
B, T = 2, 9


def layer(**changes):
    """A workspace in float64, in training mode, whose memory has been written to."""
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(E, 2 * E), nn.GELU(), nn.Linear(2 * E, E), nn.LayerNorm(E))
    options = dict(slots=M, width=D, heads=S, bottleneck=K, dropout=0.0)
    m = GlobalWorkspace(E, mlp, **{**options, **changes}).double()
    m(tokens())
    return m


def tokens(seed=1):
    return torch.randn(B, T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make(**changes):
    """A vision Transformer of two blocks with 32 slots, which sees images of 9 patches; in float64, in training."""
    torch.manual_seed(0)
    options = dict(d_model=16, n_layers=2, n_heads=4, n_ra=0, position="learned", symbols="positional", memory_slots=M,
                   memory_width=D, memory_heads=S, bottleneck=K)
    cfg = TransformerConfig(**{**options, **changes})
    return VisionTransformer(cfg, image_size=12, patch_size=4, n_classes=3).double()


def images(n=4, seed=1):
    return torch.rand(n, 3, 12, 12, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


LABELS = torch.tensor([0, 2, 1, 0])


# ---- what is written -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bottleneck", [1, K, B * T, 100])
def test_each_slot_attends_to_its_k_best_tokens_as_in_a_plain_loop(bottleneck):
    m, xi = layer(bottleneck=bottleneck), tokens().flatten(0, 1)
    G = m.gates(xi)
    assert G.shape == (S, M, B * T)
    for s in range(S):
        W_q, W_k = (W.weight[s * D:(s + 1) * D] for W in (m.W_q, m.W_k))
        for slot, gamma in enumerate(m.memory):
            scores = [(W_q @ gamma) @ (W_k @ token) / D ** 0.5 for token in xi]
            best = sorted(range(len(xi)), key=lambda i: -scores[i])[:bottleneck]
            total = sum(scores[i].exp() for i in best)
            expected = torch.stack([scores[i].exp() / total if i in best else torch.zeros_like(total)
                                    for i in range(len(xi))])
            torch.testing.assert_close(G[s, slot], expected, rtol=0, atol=1e-12)
    assert ((G > 0).sum(-1) == min(bottleneck, B * T)).all()
    torch.testing.assert_close(G.sum(-1), torch.ones(S, M, dtype=torch.float64))


def test_a_slot_attends_to_exactly_k_tokens_also_where_scores_are_equal():
    m, different = layer(), tokens().flatten(0, 1)
    for xi in (different.repeat(20, 1), torch.ones(200, E, dtype=torch.float64)):          # each 20 times; all equal
        G = m.gates(xi)
        assert ((G > 0).sum(-1) == K).all()
        torch.testing.assert_close(G.sum(-1), torch.ones(S, M, dtype=torch.float64))
    torch.testing.assert_close(G[G > 0], torch.full((S * M * K,), 1 / K, dtype=torch.float64))


def test_the_new_memory_is_a_moving_average_of_what_the_heads_collect_in_unit_rows():
    m, x = layer(decay=0.7), tokens(2)
    old, xi = m.memory.clone(), m.mlp(x).flatten(0, 1)
    G = m.gates(xi)
    for slot in range(M):
        h = torch.cat([sum(G[s, slot, i] * (m.W_v.weight[s * D:(s + 1) * D] @ xi[i]) for i in range(B * T))
                       for s in range(S)])
        new = F.layer_norm(old[slot] + m.W_o.weight @ h, (D,), eps=1e-6)
        row = 0.7 * old[slot] + 0.3 * new
        torch.testing.assert_close(m.write(xi)[slot], row / row.square().sum().sqrt(), rtol=0, atol=1e-12)
        m.memory.copy_(old)
    m(x)
    torch.testing.assert_close(m.memory.norm(dim=-1), torch.ones(M, dtype=torch.float64))
    assert (m.memory - old).abs().max() > 0.01


def test_the_old_memory_is_all_that_stays_with_decay_one_and_nothing_of_it_with_decay_zero():
    keeps, forgets = layer(decay=1.0), layer(decay=0.0)
    before = keeps.memory.clone()
    keeps(tokens(2))
    torch.testing.assert_close(keeps.memory, before, rtol=0, atol=1e-12)
    xi = forgets.mlp(tokens(2)).flatten(0, 1)
    h = (forgets.gates(xi) @ forgets.split(forgets.W_v(xi))).transpose(0, 1).flatten(1)
    new = forgets.norm(forgets.memory + forgets.W_o(h))
    torch.testing.assert_close(forgets.write(xi), F.normalize(new, dim=-1))


@pytest.mark.parametrize("queries", ["memory", "learned"])
def test_the_cross_entropy_alone_gives_every_parameter_of_the_write_a_gradient(queries):
    model = make(balance=0.0, memory_queries=queries)
    model(images(), LABELS)[1].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert (sum("queries" in name for name, _ in model.named_parameters()) == 2) == (queries == "learned")
    assert not any("memory" in name for name, _ in model.named_parameters())               # a state, no parameter


def test_learned_queries_choose_tokens_whatever_the_memory_holds():
    m = layer(queries="learned")
    xi = tokens().flatten(0, 1)
    before = m.gates(xi)
    m.memory.copy_(F.normalize(torch.randn(M, D, dtype=torch.float64), dim=-1))
    assert torch.equal(m.gates(xi), before)


def test_two_forward_passes_before_one_backward_pass_add_their_gradients():
    """The second write must not spoil what the backward pass of the first one needs."""
    model, gradients = make(), []
    state = copy.deepcopy(model.state_dict())
    for backward_between in (False, True):
        model.load_state_dict(state)
        model.zero_grad()
        losses = []
        for seed in (1, 2):
            torch.manual_seed(seed)                                    # of the dropout in the write
            losses.append(model(images(seed=seed), LABELS)[1])
            if backward_between:
                losses.pop().backward()
        if losses:
            sum(losses).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_training_interrupted_and_continued_from_its_state_is_the_same_to_the_last_bit():
    def steps(model, optimizer, numbers):
        for number in numbers:
            torch.manual_seed(number)
            optimizer.zero_grad()
            model(images(seed=number), LABELS)[1].backward()
            optimizer.step()

    def new():
        model = make()
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)
    whole, optimizer = new()
    steps(whole, optimizer, range(4))
    first, optimizer = new()
    steps(first, optimizer, range(2))
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict()))
    second, optimizer = new()
    second.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    steps(second, optimizer, range(2, 4))
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    assert "stack.blocks.0.mlp.memory" in whole.state_dict()
    copy.deepcopy(whole)                                               # no graph stays behind in the module


# ---- what is read ----------------------------------------------------------------------------------------------------

def test_evaluation_leaves_the_memory_alone_and_answers_each_image_by_itself():
    model, x = make(), images(7)
    model(images(), LABELS)
    model.eval()
    before = copy.deepcopy(model.state_dict())
    together = model(x)[0]
    for rows in ([0], [3], [1, 5], [6, 0, 2]):
        torch.testing.assert_close(model(x[rows])[0], together[rows], rtol=0, atol=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.train()
    (alone, _), (among, _) = copy.deepcopy(model)(x[:1]), model(x)
    assert (alone[0] - among[0]).abs().max() > 1e-6                    # in training the others do matter


def test_evaluation_adds_what_the_memory_holds_to_each_token():
    m, x = layer(beta=2.0).eval(), tokens(2)
    Y = m.memory @ m.W_LT.weight.T + m.W_LT.bias
    xi, out = m.mlp(x), m(x)
    for b in range(B):
        for t in range(T):
            weights = torch.stack([(2 * xi[b, t] @ row).exp() for row in Y])
            torch.testing.assert_close(out[b, t], xi[b, t] + (weights / weights.sum()) @ Y)


@pytest.mark.parametrize("beta", [0.1, 1.0, 8.0])
def test_the_read_never_raises_the_energy(beta):
    torch.manual_seed(0)
    Y = torch.randn(M, E, dtype=torch.float64)
    for scale in (0.1, 1.0, 10.0):
        xi, falls = scale * torch.randn(500, E, dtype=torch.float64), 0.0
        for _ in range(5):
            before, xi = energy(xi, Y, beta), read(xi, Y, beta)
            assert (energy(xi, Y, beta) <= before + 1e-12).all()
            falls = max(falls, (before - energy(xi, Y, beta)).max().item())
        assert falls > 1e-3
        assert (energy(xi, Y, beta) >= 0).all()                        # bounded from below, as in their Lemma A1


def test_one_pattern_is_read_as_it_is_and_energy_is_half_the_squared_distance_to_it():
    Y, xi = torch.randn(1, E, dtype=torch.float64), torch.randn(7, E, dtype=torch.float64)
    torch.testing.assert_close(read(xi, Y, 3.0), Y.expand(7, E))
    torch.testing.assert_close(energy(xi, Y, 3.0), (xi - Y).square().sum(-1) / 2)


# ---- the balance loss, and how different the slots are ---------------------------------------------------------------

def test_cv_squared_of_equal_shares_is_0_and_where_all_choose_the_same_share_p_it_is_1_minus_p_over_p():
    assert cv_squared(torch.full((3, 8), 0.7)).tolist() == [0.0] * 3
    for chosen in (1, 2, 5):
        p, shares = chosen / 10, torch.zeros(10, dtype=torch.float64)
        shares[:chosen] = 4.2
        torch.testing.assert_close(cv_squared(shares).item(), (1 - p) / p)


def test_the_balance_loss_is_added_in_training_only():
    model, with_none = make(balance=0.5), make(balance=0.0)
    torch.manual_seed(1)
    loss = model(images(), LABELS)[1]
    torch.manual_seed(1)
    pure = with_none(images(), LABELS)[1]
    by_hand, x = 0.0, {}
    fresh = make(balance=0.5)
    for i, block in enumerate(fresh.stack.blocks):
        block.mlp.mlp.register_forward_hook(lambda module, args, out, i=i: x.update({i: out.flatten(0, 1)}))
    gates = {i: block.mlp.gates for i, block in enumerate(fresh.stack.blocks)}
    memories = [block.mlp.memory.clone() for block in fresh.stack.blocks]
    torch.manual_seed(1)
    fresh(images(), LABELS)
    for i, block in enumerate(fresh.stack.blocks):
        block.mlp.memory.copy_(memories[i])
        by_hand += sum(0.5 * G.sum(0).var(correction=0) / G.sum(0).mean() ** 2 for G in gates[i](x[i]))
    torch.testing.assert_close(loss - pure, by_hand)
    logits, loss = model.eval()(images(), LABELS)
    torch.testing.assert_close(loss, F.cross_entropy(logits, LABELS), rtol=0, atol=0)


def test_the_effective_rank_of_equal_slots_is_1_and_of_orthogonal_slots_their_number():
    model = make(memory_slots=4)
    one, other = (block.mlp.memory for block in model.stack.blocks)
    one.copy_(F.normalize(torch.randn(1, D, dtype=torch.float64), dim=-1).expand(4, D))
    other.copy_(torch.eye(D, dtype=torch.float64)[:4])
    statistics = slot_statistics(model)
    assert list(statistics) == ["rank_1", "cosine_1", "rank_2", "cosine_2"]
    assert list(statistics.values()) == pytest.approx([1, 1, 4, 0], abs=1e-6)
    assert slot_statistics(make(memory_slots=0)) == {}
    one.fill_(float("nan"))
    assert all(math.isnan(slot_statistics(model)[name]) for name in ("rank_1", "cosine_1"))


# ---- the model around it ---------------------------------------------------------------------------------------------

def test_without_slots_the_model_is_the_one_without_a_workspace():
    model, with_slots = make(memory_slots=0, n_ra=2), make(n_ra=2)
    assert not any(isinstance(m, GlobalWorkspace) for m in model.modules())
    assert {name for name in model.state_dict() if ".mlp." in name} == {
        f"stack.blocks.{i}.mlp.{W}.weight" for i in (0, 1) for W in ("W_1", "W_2")}
    control = make(memory_slots=0, n_ra=2, mlp_norm=True)
    further = {name.replace("mlp.mlp.", "mlp.") for name in with_slots.state_dict() if ".mlp.mlp." in name}
    assert further == {name for name in control.state_dict() if ".mlp." in name}    # the control is all but memory


def test_the_control_is_the_workspace_whose_memory_says_nothing():
    model, control = make().eval(), make(memory_slots=0, mlp_norm=True).eval()
    for block in model.stack.blocks:
        nn.init.zeros_(block.mlp.W_LT.weight), nn.init.zeros_(block.mlp.W_LT.bias)
    state = {name.replace("mlp.mlp.", "mlp."): value for name, value in model.state_dict().items()}
    control.load_state_dict({name: state[name] for name in control.state_dict()})
    torch.testing.assert_close(model(images())[0], control(images())[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_ra", [0, 2])
@pytest.mark.parametrize("norm_first", [True, False])
def test_the_workspace_stands_beside_any_attention(n_ra, norm_first):
    model = make(n_ra=n_ra, norm_first=norm_first, dropout=0.1)
    model(images(), LABELS)[1].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_memory_stays_float32_where_products_are_bfloat16():
    model = make().float()
    with torch.autocast("cpu", torch.bfloat16):
        model(images().float(), LABELS)[1].backward()
    for block in model.stack.blocks:
        assert block.mlp.memory.dtype == torch.float32
        torch.testing.assert_close(block.mlp.memory.norm(dim=-1), torch.ones(M))           # exact to float32's digits


def test_a_compiled_step_writes_and_learns_as_the_plain_one_does():
    results = []
    for compiled in (False, True):
        model = make().float()
        for block in model.stack.blocks:
            block.mlp.dropout.p = 0.0                                  # a compiled mask is another one
        forward = torch.compile(model, backend="aot_eager") if compiled else model
        for seed in (1, 2):
            forward(images(seed=seed).float(), LABELS)[1].backward()
        results.append([*(p.grad for p in model.parameters()), *(block.mlp.memory for block in model.stack.blocks)])
    for plain, compiled in zip(*results):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-6)


# ---- published sizes and costs ---------------------------------------------------------------------------------------

def test_a_published_workspace_adds_437_568_numbers_to_its_mlp_of_which_1024_are_the_memory():
    cfg = TransformerConfig(d_model=768, n_heads=12, n_ra=0, bias=True, n_layers=1, position="learned", memory_slots=32,
                            memory_width=32, memory_heads=8, bottleneck=512)
    with torch.device("meta"):
        models = [VisionTransformer(c, image_size=32, patch_size=4, n_classes=10)
                  for c in (cfg, replace(cfg, memory_slots=0))]
    counts = [sum(p.numel() for p in model.state_dict().values()) for model in models]
    assert counts[0] - counts[1] == 437_568


def operations(model, training):
    model.train(training)
    x, y = torch.rand(16, 3, 20, 20), torch.zeros(16, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        _, loss = model(x, y)
        if training:
            loss.backward()
    return counter.get_total_flops()


def test_a_small_memory_adds_at_most_a_tenth_of_the_arithmetic():
    """d_model 128, 4 layers, 26 tokens, 32 slots of the default size; in training, and without writes in evaluation."""
    def model(slots):
        cfg = TransformerConfig(n_ra=0, position="learned", memory_slots=slots)
        return VisionTransformer(cfg, image_size=20, patch_size=4, n_classes=10, pool="cls")
    vit, ait = model(0), model(32)
    assert ait.cfg.max_len == 26
    assert operations(vit, True) < operations(ait, True) < 1.15 * operations(vit, True)
    assert operations(vit, False) < operations(ait, False) < 1.1 * operations(vit, False)


# ---- wrong input -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, words", [
    (dict(memory_slots=-1), "memory_slots=-1: must be at least 0"),
    (dict(memory_width=0), "memory_width=0: must be at least 1"), (dict(memory_heads=0), "memory_heads=0: must be"),
    (dict(bottleneck=0), "bottleneck=0: must be at least 1"),
    (dict(memory_beta=0.0), "memory_beta=0.0 must be above 0"),
    (dict(memory_beta=float("nan")), "memory_beta=nan must be above 0"),
    (dict(memory_decay=1.1), "memory_decay=1.1 must be between 0 and 1"),
    (dict(memory_decay=-0.1), "memory_decay=-0.1"),
    (dict(balance=-0.1), "balance=-0.1 must be at least 0"), (dict(memory_queries="memry"), "did you mean memory?"),
    (dict(memory_slots=4, recompute=True), "would write twice: give --memory_slots=0, or leave --recompute out")])
def test_impossible_values_raise_an_error_that_says_what_is_allowed(changes, words):
    with pytest.raises(ValueError, match=words) as error:
        TransformerConfig(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [LanguageModel, Seq2SeqTransformer])
def test_models_of_text_refuse_a_memory_in_one_line(kind):
    with pytest.raises(ValueError, match="tokens would see the future: give --memory_slots=0"):
        kind(TransformerConfig(memory_slots=4))


def test_a_forward_pass_without_targets_leaves_no_graph_behind():
    m = make().train()
    m(images())
    copy.deepcopy(m)                                                   # a tensor with a graph cannot be copied


def test_reading_what_slots_attend_to_leaves_modes_and_hooks_as_they_were():
    m = make().train()
    slot_attention(m, images())
    with pytest.raises(ValueError):
        slot_attention(m, images()[:, :1])
    assert all(module.training and not module._forward_hooks for module in m.modules())
