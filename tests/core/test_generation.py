"""Generation, token by token: how a token is chosen, and what is kept in memory."""
import gc

import pytest
import torch
from helpers import VARIANTS, language_model

from generation import choose, evaluating, pad_left, stream
from model import LanguageModel

pytestmark = pytest.mark.usefixtures("fast_form")


# ---- the choice ----


@pytest.fixture
def probabilities(monkeypatch):
    """A function: the probabilities with which `choose` draws each token."""
    def of(logits, *options):
        drawn = []
        with monkeypatch.context() as patch:
            patch.setattr(torch, "multinomial", lambda p, n: drawn.append(p) or p.argmax(-1, keepdim=True))
            choose(logits, *options)
        return drawn[0] / drawn[0].sum(-1, keepdim=True)
    return of


def nucleus(p, top_p):
    """Holtzman et al.'s set, one token after another: the likeliest until their probability reaches top_p."""
    kept, total = [], 0.0
    for i in sorted(range(len(p)), key=lambda i: -p[i]):
        if total >= top_p:
            break
        kept.append(i)
        total += p[i]
    return kept


@pytest.mark.parametrize("top_k", [None, 3, 11])
@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.9, 0.999])
def test_the_nucleus_is_the_smallest_set_that_reaches_p(top_p, top_k, probabilities):
    torch.manual_seed(0)
    logits = 2 * torch.randn(50, 11, dtype=torch.float64)
    p, got = (logits / 0.7).softmax(-1), probabilities(logits, 0.7, top_k, top_p)
    for row, got_row in zip(p, got):
        among = row.topk(top_k or 11).indices                          # first the k likeliest, then the nucleus of them
        expected = torch.zeros_like(row)
        expected[among] = row[among] / row[among].sum()
        kept = nucleus(expected.tolist(), top_p)
        assert sorted(kept) == got_row.nonzero()[:, 0].tolist() and len(kept) >= 1
        torch.testing.assert_close(got_row[kept], row[kept] / row[kept].sum(), rtol=0, atol=1e-12)


def test_the_nucleus_ends_once_it_reaches_p_also_among_equal_probabilities(probabilities):
    assert probabilities(torch.tensor([[0.125, 0.5, 0.25, 0.125]]).log(), 1.0, None, 0.75).tolist()[0] == pytest.approx(
        [0, 2 / 3, 1 / 3, 0])
    assert probabilities(torch.zeros(1, 8), 1.0, None, 0.5).count_nonzero() == 4
    assert probabilities(torch.zeros(1, 8), 1.0, None, 1e-6).count_nonzero() == 1
    assert probabilities(torch.tensor([[20.0, 0, 0]]), 1.0, None, 1.0).gt(0).all()      # 1 keeps all tokens


def test_top_k_keeps_the_k_likeliest_tokens_and_temperature_0_the_likeliest(probabilities):
    torch.manual_seed(0)
    logits = torch.randn(50, 11)
    got = probabilities(logits, 2.0, 4)
    assert (got > 0).sum(-1).eq(4).all() and torch.equal((got > 0).nonzero()[:, 1].view(50, 4),
                                                         logits.topk(4).indices.sort(-1).values)
    assert probabilities(logits, 1.0, 99).gt(0).all()                     # more than the vocabulary: all
    for options in ((0,), (0, 3, 0.5), (1e-6,), (1.0, 1), (1.0, None, 1e-6)):
        assert torch.equal(choose(logits, *options), logits.argmax(-1, keepdim=True))


def test_draws_follow_the_probabilities():
    torch.manual_seed(0)
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    drawn = choose(p.log().expand(20_000, 4), 1.0, None, 0.9)[:, 0].bincount(minlength=4) / 20_000
    torch.testing.assert_close(drawn, torch.tensor([0.5, 0.3, 0.15, 0]) / 0.95, rtol=0, atol=0.015)


# ---- token by token ----


def generate_without_cache(m, idx, n, temperature, top_k):
    """The definition, in a few lines, for max_len = 12: a full context drops its oldest half."""
    start = max(0, idx.size(1) - 12)
    for _ in range(n):
        if idx.size(1) - start > 12:
            start = idx.size(1) - 6
        logits = m(idx[:, start:])[0][:, -1] / temperature
        if top_k:
            logits[logits < logits.topk(top_k).values[:, [-1]]] = -torch.inf
        idx = torch.cat([idx, torch.multinomial(logits.softmax(-1), 1)], 1)
    return idx


@pytest.mark.parametrize("prompt_length", [1, 5, 12, 13, 30])
@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (0.7, 3)])
def test_a_seed_gives_the_text_of_the_definition(temperature, top_k, prompt_length):
    m, idx = language_model(), torch.randint(13, (2, prompt_length))
    torch.manual_seed(7)
    expected = generate_without_cache(m, idx, 40, temperature, top_k)
    for use_cache in (True, False):
        torch.manual_seed(7)
        assert torch.equal(m.generate(idx, 40, temperature, top_k, use_cache), expected)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_cached_and_uncached_generation_give_equal_logits(options):
    """At every step, far beyond max_len = 12, and from a prompt that is longer than that."""
    m, steps = language_model(**options), []
    m.head.register_forward_hook(lambda module, args, out: steps.append(out))
    for prompt_length in (3, 12, 20):
        idx, runs = torch.randint(13, (2, prompt_length)), []
        for use_cache in (True, False):
            steps.clear()
            torch.manual_seed(5)
            runs.append((m.generate(idx, 30, use_cache=use_cache), torch.stack(steps)))
        (cached, cached_logits), (uncached, logits) = runs
        assert logits.shape == (30, 2, 13) and cached.shape == (2, prompt_length + 30)           # of the last position
        torch.testing.assert_close(cached_logits, logits, rtol=0, atol=1e-9)
        assert torch.equal(cached, uncached) and torch.equal(cached[:, :prompt_length], idx)


def test_a_full_context_drops_its_oldest_half():
    """The context grows to max_len = 12, falls to 6 and grows again. With a cache, a step processes its new tokens."""
    m, lengths = language_model(), []
    m.embedding.register_forward_pre_hook(lambda module, args: lengths.append(args[0].size(1)))
    m.generate(torch.zeros(1, 10, dtype=torch.long), 12, use_cache=False)
    assert lengths == [10, 11, 12, 6, 7, 8, 9, 10, 11, 12, 6, 7]
    lengths.clear()
    m.generate(torch.zeros(1, 10, dtype=torch.long), 12)
    assert lengths == [10, 1, 1, 6, 1, 1, 1, 1, 1, 1, 6, 1]


@pytest.mark.parametrize("use_cache", [True, False])
def test_memory_is_bounded_by_max_len_however_long_the_text(use_cache, monkeypatch):
    m, caches = language_model(), []
    monkeypatch.setattr(m, "new_caches", lambda: caches.append(LanguageModel.new_caches(m)) or caches[-1])
    for i, _ in enumerate(stream(m, torch.zeros(3, 5, dtype=torch.long), 60, use_cache=use_cache)):      # B = 3
        del caches[:-1]
        if i % 7 == 6:                                                 # all tensors of tokens, and what is behind views
            kept = [t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) is torch.Tensor
                    and t.dtype == torch.long and t.dim() == 2 and t.size(0) == 3]
            assert kept and max(kept) <= 3 * 13 * 8
            assert all(buffer.size(2) == 12 for cache in sum(caches, []) for buffer in cache.buffers.values())
    assert len(caches) == use_cache


def test_tokens_beyond_vocab_size_are_never_chosen():
    m = language_model(tie_embeddings=False)
    with torch.no_grad():
        m.head.weight[5:] = 9 * m.head.weight[5:]                      # by far the largest logits
    idx = torch.randint(5, (4, 3))
    for options in (dict(temperature=0), dict(temperature=50.0), dict(top_k=2), dict(top_k=13), dict(top_p=0.9)):
        assert max(token.max() for token in stream(m, idx, 40, **options)) >= 5
        assert max(token.max() for token in stream(m, idx, 40, vocab_size=5, **options)) < 5
    greedy = next(stream(m, idx, 1, temperature=0, vocab_size=5))
    assert torch.equal(greedy, m(idx)[0][:, -1, :5].argmax(-1, keepdim=True))


def test_generation_is_in_evaluation_mode_and_restores_the_previous_mode():
    m, idx = language_model(dropout=0.5), torch.randint(13, (2, 4))
    expected = m.generate(idx, 20, temperature=0)
    assert torch.equal(m.generate(idx, 20, top_p=1e-9), expected)
    m.train()
    assert torch.equal(m.generate(idx, 20, temperature=0), expected) and m.training
    tokens, graphs = stream(m, idx, 20), []
    m.head.register_forward_hook(lambda module, args, out: graphs.append(out.requires_grad))
    assert m.training                                                  # nothing has run yet
    next(tokens)
    assert not m.training and graphs == [False] and torch.is_grad_enabled()          # only within the step
    tokens.close()
    assert m.training
    with pytest.raises(ValueError):
        for token in stream(m, idx, 20):
            raise ValueError
    del token
    gc.collect()
    assert m.training
    m.eval().generate(idx, 2)
    assert not m.training
    assert torch.equal(m.generate(idx, 0), idx)


# ---- prompts of unequal length ----


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_padded_prompts_are_continued_as_if_each_were_alone(options):
    """Token by token, with and without a cache, up to max_len = 12: equal logits, whatever the padding token is."""
    m, logits = language_model(**options), []
    m.head.register_forward_hook(lambda module, args, out: logits.append(out))
    prompts = [[1, 2, 3, 4, 5], [6], [7, 8, 9], [2, 2, 2, 2, 2]]
    alone = []
    for prompt in prompts:
        logits.clear()
        text = m.generate(torch.tensor([prompt]), 7, temperature=0)
        alone.append((text[0, len(prompt):], torch.cat(logits)))
    for use_cache, padding in ((True, 0), (True, 12), (False, 3)):
        logits.clear()
        idx, mask = pad_left(prompts, padding)
        text = m.generate(idx, 7, temperature=0, use_cache=use_cache, mask=mask)
        assert text.shape == (4, 12) and torch.equal(text[:, :5], idx)
        for i, (tokens, expected) in enumerate(alone):
            assert torch.equal(text[i, 5:], tokens)
            torch.testing.assert_close(torch.stack([step[i] for step in logits]), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [dict(), dict(symbols="relative"), dict(symbols="positional", position="learned")],
                         ids=str)
def test_padded_prompts_beyond_max_len_drop_the_same_positions_with_and_without_a_cache(options):
    """Once nothing but tokens is in the context, each text goes on as the definition says."""
    m = language_model(**options)
    idx, mask = pad_left([[*range(12)] * 2, [5, 6], [3]])
    cached, uncached = (m.generate(idx, 40, temperature=0, mask=mask, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, uncached) and cached.shape == (3, 64)
    assert torch.equal(cached[:1], m.generate(idx[:1], 40, temperature=0))         # the longest is not padded at all


def test_no_prompts_are_one_clear_line():
    idx, mask = pad_left([[5, 6, 7], [3]], 9)
    assert idx.tolist() == [[5, 6, 7], [9, 9, 3]] and mask.tolist() == [[True] * 3, [False, False, True]]
    with pytest.raises(ValueError, match=r"^no prompts to pad: give at least one .*$"):
        pad_left([])


def test_a_mask_of_ones_is_no_mask():
    m, idx = language_model(), torch.randint(13, (3, 5))
    one, two = (m.generate(idx, 30, temperature=0, mask=mask) for mask in (None, torch.ones_like(idx).bool()))
    assert torch.equal(one, two)


# ---- what cannot be done, and what is left behind ----


@pytest.mark.parametrize("arguments, words", [
    (dict(idx=torch.zeros(2, 0, dtype=torch.long)), "the prompt is empty"),
    (dict(idx=torch.zeros(3, dtype=torch.long)), r"idx must be of shape \(B, T\), not \(3,\)"),
    (dict(max_new_tokens=-1), "max_new_tokens=-1"), (dict(temperature=-0.1), "temperature"),
    (dict(temperature=float("nan")), "temperature"), (dict(top_k=0), "top_k=0"), (dict(top_p=0.0), "top_p=0.0"),
    (dict(top_p=1.5), "top_p"), (dict(mask=torch.ones(2, 3)), "boolean"),
    (dict(mask=torch.ones(2, 4, dtype=torch.bool)), "shape of idx"),
    (dict(mask=torch.tensor([[True, True, False], [True] * 3])), "left"),
    (dict(mask=torch.tensor([[True, False, True], [True] * 3])), "left"),
    (dict(mask=torch.zeros(2, 3, dtype=torch.bool)), "at least one token")], ids=str)
def test_what_cannot_be_done_is_refused_before_the_work(arguments, words):
    m, computed = language_model(), []
    m.register_forward_hook(lambda *args: computed.append(1))
    m.stack.register_forward_hook(lambda *args: computed.append(1))
    idx = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=words):
        m.generate(**{"idx": idx, "max_new_tokens": 3} | arguments)
    assert not computed


def modes(model):
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("fails", [False, True])
def test_each_module_returns_to_its_own_mode_also_after_an_error(fails, monkeypatch):
    """A frozen part of a model that is being trained stays in evaluation mode."""
    m = language_model(dropout=0.5).train()
    m.stack.blocks[0].eval()
    m.stack.blocks[1].mlp.eval()
    before, during = modes(m), []
    m.head.register_forward_hook(
        lambda *args: during.append(modes(m)) or (1 / 0 if fails and len(during) > 2 else None))
    for use in (lambda: m.generate(torch.zeros(1, 3, dtype=torch.long), 5),
                lambda: [token for token in stream(m, torch.zeros(1, 3, dtype=torch.long), 5)]):
        during.clear()
        with pytest.raises(ZeroDivisionError) if fails else evaluating(m):
            use()
        assert modes(m) == before != [False] * len(before) and not any(map(any, during))
    tokens = stream(m, torch.zeros(1, 3, dtype=torch.long), 5) if not fails else iter([0])
    next(tokens)
    del tokens                                                         # never read to its end
    gc.collect()
    assert modes(m) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1e-50, 1e-42, 1e-30, 1e-5, 5e-3])
@pytest.mark.parametrize("options", [(), (3,), (None, 1e-300), (None, 0.9)], ids=str)
def test_the_coldest_choice_is_the_likeliest_token(options, temperature, dtype):
    """Divided by such a temperature, logits overflow."""
    torch.manual_seed(0)
    logits = torch.randn(20, 11).mul(30).round().to(dtype)             # differences of 1 or more
    logits[:, 4] = logits.amax(-1) + 2
    assert choose(logits, temperature, *options).eq(4).all()
