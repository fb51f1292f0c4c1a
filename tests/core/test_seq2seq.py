"""The encoder-decoder: without relational heads it is PyTorch's; neither padding nor a cache changes an answer."""
import pytest
import torch
from helpers import SMALL, copy_block, randomise
from torch import nn

from attention import sinusoids
from model import Seq2SeqTransformer, TransformerConfig

pytestmark = pytest.mark.usefixtures("fast_form")
START, END = 1, 2
VARIANTS = [
    dict(), dict(n_ra_decoder=0), dict(n_ra=0), dict(n_ra=4), dict(n_ra=0, n_ra_decoder=2), dict(n_layers_decoder=1),
    dict(symbols="symbolic"), dict(symbols="positional"), dict(position="rope"), dict(position="learned"),
    dict(n_ra=0, position="shaw"),
    dict(norm_first=True, final_norm=True), dict(ra_type="rca"), dict(symmetric=True), dict(n_kv_heads=1),
    dict(rel_activation="softmax"), dict(shared_symbols=False, symbols="symbolic"), dict(max_distance=2),
]


def make(n_layers_decoder=None, n_ra_decoder=None, **options):
    """A small model of the paper's kind: post-norm, sinusoidal positions, relative symbols."""
    torch.manual_seed(0)
    paper = dict(norm_first=False, final_norm=False, bias=True, activation="relu", position="sinusoidal",
                 symbols="relative")
    cfg = TransformerConfig(**{**SMALL, **paper, **options})
    return randomise(Seq2SeqTransformer(cfg, n_layers_decoder=n_layers_decoder, n_ra_decoder=n_ra_decoder))


def padded(lengths, width=None):
    """Random tokens 3 ... 12, padded by 0 at the end."""
    width = width or max(lengths)
    tokens = torch.randint(3, 13, (len(lengths), width))
    return tokens.masked_fill(torch.arange(width) >= torch.tensor(lengths)[:, None], 0)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_logits_do_not_depend_on_the_rest_of_the_batch_nor_on_padding(options):
    m, questions, answers = make(**options), padded([3, 9, 6], 11), padded([5, 2, 4], 7)
    together, _ = m(questions, answers)
    for i, (S, T) in enumerate(zip([3, 9, 6], [5, 2, 4])):
        alone, _ = m(questions[i:i + 1, :S], answers[i:i + 1, :T])
        torch.testing.assert_close(together[i, :T], alone[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_no_logit_depends_on_a_later_token_of_the_answer_and_all_depend_on_the_question(options):
    m, questions, answers = make(**options), padded([9, 6]), padded([6, 6])
    logits, _ = m(questions, answers)
    changed = answers.clone()
    changed[:, 3] = (answers[:, 3] - 2) % 10 + 3
    later, _ = m(questions, changed)
    torch.testing.assert_close(later[:, :3], logits[:, :3], rtol=0, atol=1e-12)
    assert (later[:, 3:] - logits[:, 3:]).abs().amax((0, 2)).gt(1e-6).all()
    for j in range(6):
        other = questions.clone()
        other[:, j] = (questions[:, j] - 2) % 10 + 3
        assert (m(other, answers)[0] - logits).abs().amax(2).gt(1e-9).all()


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_cached_and_uncached_answers_are_equal(options):
    m, questions = make(**options), padded([4, 10, 7, 1])
    steps = []
    m.head.register_forward_hook(lambda module, args, out: steps.append(out[:, -1]))
    uncached = m.generate(questions, 9, start=START, end=END, use_cache=False)
    logits, steps[:] = torch.stack(steps), []
    cached = m.generate(questions, 9, start=START, end=END)
    assert torch.equal(cached, uncached)
    torch.testing.assert_close(torch.stack(steps), logits, rtol=0, atol=1e-9)


def test_with_a_cache_the_keys_and_values_of_the_context_are_computed_once():
    m, calls = make(), []
    m.decoder.blocks[0].cross.W_k.register_forward_hook(lambda module, args, out: calls.append(args[0].shape))
    answers = m.generate(padded([4, 10]), 6, start=START, end=-1)
    assert answers.shape == (2, 6) and calls == [(2, 10, 16)]


def test_an_answer_takes_the_likeliest_token_each_time_until_the_end_token():
    m, questions = make(), padded([5, 8, 3])
    free = m.generate(questions, 8, start=START, end=-1)
    for i, question in enumerate(questions):                             # one token after another, by forward
        written = [START]
        for _ in range(8):
            logits, _ = m(question[None], torch.tensor([written]))
            written.append(logits[0, -1].argmax().item())
        assert free[i].tolist() == written[1:]
    end = free[0, 2].item()
    answers = m.generate(questions, 8, start=START, end=end)
    for row, tokens in zip(answers.tolist(), free.tolist()):
        stop = tokens.index(end) + 1 if end in tokens else 8
        assert row == (tokens[:stop] + [0] * 8)[:len(row)]
    ends = [row.index(end) + 1 if end in row else 8 for row in free.tolist()]
    assert answers.size(1) == max(ends)                              # no step after all have ended


def test_the_loss_is_the_mean_cross_entropy_over_the_tokens_of_the_answers_without_padding():
    m, questions, answers = make(), padded([5, 8, 3]), padded([6, 3, 4])
    logits, loss = m(questions, answers[:, :-1], answers[:, 1:])
    one_by_one = [-logits[b, t].log_softmax(-1)[answers[b, t + 1]]
                  for b, n in enumerate([6, 3, 4]) for t in range(n - 1)]
    torch.testing.assert_close(loss, torch.stack(one_by_one).mean(), rtol=0, atol=1e-12)


def test_without_relational_heads_it_is_the_transformer_of_pytorch():
    m = make(n_ra=0, n_layers_decoder=3)
    options = dict(dropout=0.0, activation="relu", batch_first=True)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 64, **options), 2, enable_nested_tensor=False)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 64, **options), 3)
    encoder, decoder = encoder.double(), decoder.double()
    copied = sum(p.numel() for p in (*m.embedding.parameters(), m.head.bias))      # theirs, too
    with torch.no_grad():
        for ours, theirs in (*zip(m.encoder.blocks, encoder.layers), *zip(m.decoder.blocks, decoder.layers)):
            copied += copy_block(theirs, ours, ["weight", "bias"])
    assert copied == sum(p.numel() for p in m.parameters())          # we have no others

    questions, answers = padded([5, 8, 3]), padded([6, 3, 4])
    x, y = (m.embedding(t) * 4 + sinusoids(torch.arange(t.size(1)), 16) for t in (questions, answers))
    pad, future = questions == 0, torch.ones(6, 6, dtype=torch.bool).triu(1)
    context = encoder(x, src_key_padding_mask=pad)
    expected = m.head(decoder(y, context, tgt_mask=future, memory_key_padding_mask=pad))
    torch.testing.assert_close(m(questions, answers)[0], expected, rtol=0, atol=1e-10)


def test_encoder_and_decoder_share_one_symbol_module():
    names = [name for name, _ in make().named_parameters() if "library" in name]
    assert names == ["encoder.symbols.0.library"]
    only_encoder = make(n_ra_decoder=0)
    assert len(only_encoder.decoder.symbols) == 0 and only_encoder.decoder.blocks[0].attention.relational is None
    assert len(make(n_ra=0, n_ra_decoder=2).decoder.symbols) == 1
    assert not [name for name, _ in make(n_ra=0).named_parameters() if "symbol" in name or "relational" in name]
    separate = make(symbols="positional", shared_symbols=False, n_layers_decoder=3)
    assert len(separate.encoder.symbols) == 2 and len(separate.decoder.symbols) == 3


def test_the_decoder_has_its_own_number_of_blocks_and_of_relational_heads():
    m = make(n_layers_decoder=3, n_ra_decoder=1)
    heads = [[(b.attention.sensory.n_heads, b.attention.relational.n_heads) for b in stack.blocks]
             for stack in (m.encoder, m.decoder)]
    assert heads == [[(2, 2)] * 2, [(3, 1)] * 3]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_parameter_gets_a_gradient(options):
    m = make(**options).train()
    m(padded([5, 8]), padded([6, 4])[:, :-1], padded([6, 4])[:, 1:])[1].backward()
    without = [name for name, p in m.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in without if not name.endswith("W_k.bias")] == []         # it shifts all scores equally


@pytest.mark.parametrize("n_ra, n_ra_decoder", [(0, 0), (4, 0), (4, 4)])
def test_a_tiny_batch_can_be_memorised_and_the_answers_are_then_generated(n_ra, n_ra_decoder):
    torch.manual_seed(0)
    cfg = TransformerConfig(vocab_size=13, d_model=32, n_layers=2, n_heads=8, n_ra=n_ra, max_len=12, norm_first=False,
                            final_norm=False, bias=True, position="sinusoidal", symbols="relative")
    m, questions = Seq2SeqTransformer(cfg, n_ra_decoder=n_ra_decoder), padded([5, 8, 3, 7])
    answers = torch.cat([torch.full((4, 1), START), padded([4, 2, 5, 3], 6)], 1)
    answers[torch.arange(4), torch.tensor([5, 3, 6, 4])] = END
    optimizer = torch.optim.Adam(m.parameters(), lr=3e-3)
    for _ in range(150):
        loss = m(questions, answers[:, :-1], answers[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    assert m.training
    assert torch.equal(m.generate(questions, 10, start=START, end=END), answers[:, 1:])
    assert m.training


def test_more_tokens_than_max_len_raise_an_error_and_generate_restores_the_mode():
    m = make().train()
    with pytest.raises(ValueError, match="13 tokens, but max_len=12"):
        m(padded([13]), padded([3]))
    with pytest.raises(ValueError, match="must be at most max_len=12"):
        m.generate(padded([3]), 20, start=START, end=-1)
    assert m.training


def test_initial_values_are_those_of_vaswani_et_al():
    torch.manual_seed(0)
    m = Seq2SeqTransformer(TransformerConfig(vocab_size=98, d_model=128, n_layers=2, d_ff=256, bias=True))
    assert m.head.weight is m.embedding.weight
    assert m.embedding.weight.std().item() == pytest.approx(128 ** -0.5, rel=0.02)
    for name, module in m.named_modules():
        if isinstance(module, nn.Linear) and name != "head":
            bound = (6 / (module.in_features + module.out_features)) ** 0.5
            assert 0.99 * bound < module.weight.abs().max() <= bound, name
            assert module.weight.std().item() == pytest.approx(bound / 3 ** 0.5, rel=0.05), name
        if isinstance(module, nn.Linear):
            assert not module.bias.any(), name
    untied = Seq2SeqTransformer(TransformerConfig(tie_embeddings=False))
    assert untied.head.weight is not untied.embedding.weight


@pytest.mark.parametrize("arguments, words", [
    (dict(max_new_tokens=13), "max_new_tokens=13: must be at most max_len=12"),
    (dict(max_new_tokens=-1), "max_new_tokens=-1"), (dict(start=13), "start=13")], ids=str)
def test_what_cannot_be_generated_is_refused_before_the_work(arguments, words):
    m, computed = Seq2SeqTransformer(TransformerConfig(**SMALL)), []
    m.encoder.register_forward_hook(lambda *args: computed.append(1))
    with pytest.raises(ValueError, match=words):
        m.generate(torch.ones(2, 3, dtype=torch.long), **dict(max_new_tokens=3, start=1, end=2) | arguments)
    assert not computed and m.training


def test_after_generation_each_module_is_in_the_mode_in_which_it_was():
    m = Seq2SeqTransformer(TransformerConfig(**SMALL)).train()
    m.encoder.eval()
    before = [module.training for module in m.modules()]
    m.generate(torch.ones(2, 3, dtype=torch.long), 12, start=1, end=-1)
    assert [module.training for module in m.modules()] == before
    m.head.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        m.generate(torch.ones(2, 3, dtype=torch.long), 3, start=1, end=2)
    assert [module.training for module in m.modules()] == before
