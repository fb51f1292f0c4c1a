"""Looking inside: what is recorded is what the model computes, knock-outs leave no trace, statistics are right."""
import pytest
import torch
from helpers import SMALL, SYMBOLS, VARIANTS, language_model, randomise, symbol

from model import Seq2SeqTransformer, TransformerConfig, VisionTransformer
from toolbox import inside
from toolbox.inside import derangement, layers_of, message_parts, watch, watch_symbols, without
from toolbox.inside.statistics import (auc, auc_within_places, effective_number, joint_with, probe,
                                       share_told_and_null, top_one)

IDX = torch.randint(13, (3, 9), generator=torch.Generator().manual_seed(1))
RA = [options for options in VARIANTS if options.get("n_ra") != 0 and options.get("ra_type") != "rca"]


def seq2seq(**options):
    torch.manual_seed(0)
    return randomise(Seq2SeqTransformer(TransformerConfig(**{**SMALL, **options})))


def run(model):
    """The output of a language model, an encoder-decoder with padding, or a vision model."""
    with torch.no_grad():
        if isinstance(model, Seq2SeqTransformer):
            questions = IDX.masked_fill(torch.arange(9) >= torch.tensor([[9], [5], [7]]), 0)
            return model(questions, IDX[:, :4])[0]
        if isinstance(model, VisionTransformer):
            return model(torch.linspace(0, 1, 3 * 3 * 8 * 8, dtype=torch.float64).sin().view(3, 3, 8, 8))[0]
        return model(IDX)[0]


def n_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def models():
    vision = VisionTransformer(TransformerConfig(**SMALL, position="learned"), image_size=8, patch_size=4, n_classes=5)
    return [*(language_model(**options) for options in VARIANTS), seq2seq(symbols="relative"), randomise(vision)]


# ---- watching --------------------------------------------------------------------------------------------------------

def test_a_watched_model_computes_the_same_and_afterwards_nothing_is_left():
    for model in models():
        before, attributes = run(model), {name: set(vars(m)) for name, m in model.named_modules()}
        with watch(model) as layers:
            watched = run(model)
        assert torch.allclose(watched, before, atol=1e-10) and torch.equal(run(model), before)
        assert n_hooks(model) == 0 and attributes == {name: set(vars(m)) for name, m in model.named_modules()}
        assert layers and all(layer.alpha is not None for layer in layers)


def test_nothing_is_left_after_an_exception_either():
    model = language_model()
    before = run(model)
    for name in ("relational", "sensory"):
        with pytest.raises(RuntimeError, match="while watching"), watch(model):
            module = getattr(model.stack.blocks[1].attention, name)
            module.forward = lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("while watching"))
            try:
                run(model)
            finally:
                del module.forward
        assert n_hooks(model) == 0 and torch.equal(run(model), before)


def test_attention_weights_and_relations_are_hidden_where_the_mask_hides_them():
    with watch(language_model()) as layers:
        run(language_model())
    model = seq2seq()
    with watch(model) as layers:
        run(model)
    for layer in layers:
        rows = torch.ones_like(layer.alpha[..., 0])
        assert torch.allclose(layer.alpha.sum(-1), rows)
        if layer.stack == "decoder" and layer.group != "cross":
            assert layer.alpha.triu(1).abs().max() == 0                # the future
        else:
            assert layer.alpha[1, :, :, 5:].abs().max() == 0           # padding of the second question


@pytest.mark.parametrize("options", [*RA, dict(encoder_decoder=True, symbols="relative", position="sinusoidal"),
                                     dict(encoder_decoder=True, symmetric=True, n_kv_heads=2)], ids=str)
def test_what_is_recorded_rebuilds_the_output_of_relational_attention(options):
    """W_o( sum_j alpha_ij ( r_ij W_r + s_j W_s ) ), in loops, for every kind of symbol, mask, RoPE and GQA."""
    options = dict(options)
    model = seq2seq(**options) if options.pop("encoder_decoder", None) else language_model(**options)
    seen = {}
    for layer in layers_of(model):
        layer.module.register_forward_hook(lambda m, args, kwargs, out: seen.update({m: (args, out)}), with_kwargs=True)
    with watch(model) as layers:
        run(model)
    for layer in (layer for layer in layers if layer.group == "relational"):
        m, ((x, symbols), out) = layer.module, seen[layer.module]
        (B, T, _), H, d_h = x.shape, m.n_heads, m.W_r.size(-1)
        a, relations = (torch.zeros(B, T, H, d_h, dtype=x.dtype) for _ in range(2))
        for b in range(B):
            for i in range(T):
                for j in range(T):
                    s = m.W_s(symbol(symbols, b, i, j)).view(m.n_kv_heads, d_h)
                    for h in range(H):
                        message = sum(layer.r[b, l, i, j] * m.W_r[h, l] for l in range(m.n_relations))
                        a[b, i, h] += layer.alpha[b, h, i, j] * (message + s[h * m.n_kv_heads // H])
                        relations[b, i, h] += layer.alpha[b, h, i, j] * message
        assert torch.allclose(m.W_o(a.flatten(2)), out, atol=1e-10)
        assert torch.allclose(layer.heads, a.flatten(2), atol=1e-10)
        for part, expected in zip(message_parts(layer), (relations, a - relations)):
            assert torch.allclose(part, expected.transpose(1, 2), atol=1e-10)


@pytest.mark.parametrize("options", [dict(n_ra=0), dict(ra_type="rca"), dict(n_ra=0, n_kv_heads=2)], ids=str)
def test_attention_weights_of_sensory_heads_rebuild_their_output(options):
    for model in (language_model(**options), seq2seq(**options)):
        with watch(model) as layers:
            run(model)
        for layer in (layer for layer in layers if layer.group != "relational"):
            values, m = [], layer.module
            hook = m.W_v.register_forward_hook(lambda _, args, out: values.append(out))
            run(model)
            hook.remove()
            v = values[0].unflatten(-1, (m.n_kv_heads, -1)).repeat_interleave(m.n_heads // m.n_kv_heads, -2)
            assert torch.allclose(torch.einsum("bhij,bjhd->bihd", layer.alpha, v).flatten(2), layer.heads, atol=1e-10)


def test_how_much_of_each_symbol_a_token_takes_rebuilds_its_symbol():
    model, seen = language_model(), []
    model.stack.symbols[0].register_forward_hook(lambda m, args, out: seen.append(out))
    with watch_symbols(model) as taken:
        run(model)
    library = model.stack.symbols[0].library.unflatten(1, (2, -1)).transpose(0, 1)           # (heads, symbols, d_h)
    assert len(taken) == len(seen) == 2                                # in each layer
    for p, symbols in zip(taken, seen):
        assert torch.allclose((p @ library).transpose(0, 1).reshape(3, 9, -1), symbols, atol=1e-10)


def test_rows_are_receivers_and_columns_are_senders():
    model, token = language_model(), 4
    with watch(model, number=1) as layers:
        run(model)
        before = layers[-1].r
        for name, changed in (("W_q_rel", (slice(None), slice(None), token)), ("W_k_rel", (..., token))):
            def disturb(m, args, out):
                out = out.clone()
                out[:, token] += 1
                return out
            hook = getattr(layers[-1].module, name).register_forward_hook(disturb)
            run(model)
            hook.remove()
            difference = (layers[-1].r - before).abs()
            assert difference[changed].min() > 1e-6
            difference[changed] = 0
            assert difference.max() == 0


def test_more_than_the_memory_allows_is_refused_with_what_would_fit(monkeypatch):
    model = language_model()
    monkeypatch.setattr(inside, "LARGEST", 1000)
    with pytest.raises(ValueError, match=r"0.0 GB.* at most 3 tokens, or one layer") as error, watch(model):
        model(IDX[:1])
    assert "\n" not in str(error.value) and n_hooks(model) == 0
    with watch(model):                          # 3 x 3 pairs, in two layers 2 + 2 heads and 2 relations, 8 bytes: 864
        model(IDX[:1, :3])


def test_a_layer_that_does_not_exist_is_named():
    for number in (0, 3):
        with pytest.raises(ValueError, match=f"layer={number}: this model has layers 1 to 2"):
            layers_of(language_model(), number)


# ---- without a part --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("what", ["relations", "symbols", "heads"])
@pytest.mark.parametrize("symbols", SYMBOLS)
def test_a_knock_out_changes_the_output_and_restores_it_bit_for_bit(what, symbols):
    model = language_model(symbols=symbols)
    before, weights = run(model), {name: p.clone() for name, p in model.named_parameters()}
    for layer in layers_of(model):
        if layer.group == "sensory" and what != "heads":
            continue
        for index in (None, 1) if what != "symbols" else (None,):
            with pytest.raises(KeyboardInterrupt), without([layer], what, index):
                assert not torch.allclose(run(model), before, atol=1e-6)
                raise KeyboardInterrupt
            assert torch.equal(run(model), before)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_several_layers_lack_a_part_at_the_same_time_and_all_of_them_have_it_again():
    model = language_model()
    layers = [layer for layer in layers_of(model) if layer.group == "relational"]
    before = run(model)
    for what, how in (("relations", "zero"), ("relations", "resample"), ("symbols", "zero"), ("heads", "zero")):
        with without(layers, what, how=how, seed=3):
            together = run(model)
        with without(layers[:1], what, how=how, seed=3), without(layers[1:], what, how=how, seed=3):
            assert torch.equal(run(model), together)
        with without(layers[:1], what, how=how, seed=3):
            assert not torch.allclose(run(model), together, atol=1e-6)
        assert torch.equal(run(model), before) and n_hooks(model) == 0


def test_without_its_relations_or_symbols_only_the_other_part_of_the_message_arrives():
    model = language_model(bias=True)
    with watch(model, 1) as layers:
        run(model)
        relations, symbols = message_parts(layers[-1])
        for what in ("relations", "symbols"):
            with without(layers[-1:], what):
                run(model)
                without_it = message_parts(layers[-1])
            if what == "relations":
                assert without_it[0].abs().max() == 0 and torch.allclose(without_it[1], symbols, atol=1e-10)
            else:                                                      # the bias stays, the same from all senders
                bias = layers[-1].module.W_s.bias.view(1, 2, 1, -1)
                assert torch.allclose(without_it[1], bias.expand_as(symbols), atol=1e-10)
                assert torch.allclose(without_it[0], relations, atol=1e-10)


def test_a_relation_whose_row_of_W_r_is_zero_already_changes_nothing():
    model = language_model()
    layer = next(layer for layer in layers_of(model) if layer.group == "relational")
    with torch.no_grad():
        layer.module.W_r[:, 1] = 0
    before = run(model)
    for how in ("zero", "resample"):
        with without([layer], "relations", 1, how):
            assert torch.allclose(run(model), before, atol=1e-10)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_resampled_relation_is_that_of_another_sequence_and_the_others_stay(symmetric):
    model = language_model(symmetric=symmetric)
    with watch(model, 1) as layers:
        run(model)
        before = layers[-1].r
        with without(layers[-1:], "relations", 1, "resample", seed=5):
            run(model)
        order = derangement(len(IDX), 5)
        assert torch.equal(layers[-1].r[:, 1], before[order, 1]) and torch.equal(layers[-1].r[:, 0], before[:, 0])
        with without(layers[-1:], "relations", how="resample", seed=5):
            run(model)
        assert torch.equal(layers[-1].r, before[order])


def test_nothing_is_resampled_from_itself():
    for n in range(2, 30):
        for seed in range(20):
            order = derangement(n, seed)
            assert sorted(order.tolist()) == list(range(n)) and not (order == torch.arange(n)).any()
    with pytest.raises(ValueError, match="n=1"):
        derangement(1, 0)


# ---- statistics ------------------------------------------------------------------------------------------------------

def test_auc_counts_all_pairs_and_ties_by_half():
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        positive, negative = (torch.randint(6, (n,), generator=g).double() for n in (17, 23))
        pairs = [(a > b) + 0.5 * (a == b) for a in positive.tolist() for b in negative.tolist()]
        assert auc(positive, negative) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert auc(torch.tensor([2.0]), torch.tensor([1.0])) == 1


def test_a_value_that_tells_only_the_place_has_no_auc_within_places():
    g = torch.Generator().manual_seed(0)
    values = torch.arange(9.0).view(1, 3, 3).expand(4000, 3, 3)
    likely = torch.rand(4000, 3, 3, generator=g) < values / 9          # large where positives are frequent
    everything = torch.ones_like(likely)
    assert auc(values[likely], values[~likely]) > 0.7
    assert auc_within_places(values, likely, everything) == 0.5
    assert auc_within_places(values + likely, likely, everything) == 1
    assert auc_within_places(values + likely, likely, ~likely) != auc_within_places(values + likely, likely, everything)


def test_ties_in_the_first_place_share_the_point():
    scores, right = torch.tensor([[3.0, 3, 1, 3], [0, 1, 2, 3]]), torch.tensor([[True, False, True, False]] * 2)
    assert top_one(scores, right) == pytest.approx((1 / 3 + 0) / 2)


def test_the_effective_number_of_symbols():
    assert effective_number(torch.eye(7)[:3]) == pytest.approx(1)
    assert effective_number(torch.full((4, 128), 1 / 128)) == pytest.approx(128)


def test_a_symbol_that_is_the_class_tells_all_of_it_and_a_constant_one_nothing():
    tokens, classes = torch.arange(200) % 20, torch.arange(20) % 3
    told = share_told_and_null(joint_with(torch.eye(3)[classes[tokens]], tokens, 20), classes, 0)
    assert told[0] == pytest.approx(1) and told[2] < 0.5
    nothing = joint_with(torch.full((200, 5), 0.2, dtype=torch.float64), tokens, 20)
    assert nothing.sum() == pytest.approx(1)
    assert share_told_and_null(nothing, classes, 0)[0] == pytest.approx(0, abs=1e-9)


def test_a_symbol_that_is_a_random_function_of_the_token_lies_in_its_own_band():
    g = torch.Generator().manual_seed(0)
    tokens = torch.multinomial(1 / torch.arange(1.0, 61), 5000, replacement=True, generator=g)      # as in texts
    classes, inside_band = torch.randint(5, (60,), generator=g), 0
    for seed in range(40):
        p = (3 * torch.randn(60, 16, generator=g)).softmax(-1)[tokens]
        told, low, high = share_told_and_null(joint_with(p, tokens, 60), classes, seed, shuffles=300)
        inside_band += low <= told <= high
    assert 34 <= inside_band                                           # 38 of 40 are expected
    p = (3 * torch.randn(5, 16, generator=g)).softmax(-1)[classes[tokens]]         # one that knows the class
    told, low, high = share_told_and_null(joint_with(p, tokens, 60), classes, 0, shuffles=300)
    assert told > high


def test_a_probe_finds_what_is_there_and_nothing_else():
    g = torch.Generator().manual_seed(0)
    labels, groups = torch.randint(4, (2000,), generator=g), torch.arange(2000) // 4
    features = torch.randn(2000, 12, generator=g)
    assert abs(probe(features, labels, groups) - 0.25) < 0.04
    features[:, :4] += 3 * torch.nn.functional.one_hot(labels, 4)
    assert probe(features, labels, groups) > 0.85
    image = torch.randn(500, 64, generator=g)[groups] + 0.01 * features[:, 4:5]    # says which image it is
    label_of_image = torch.randint(4, (500,), generator=g)[groups]
    assert abs(probe(image, label_of_image, groups) - 0.25) < 0.08     # images of the test part were never seen
