"""The encoder-decoder: n_ra = 0 is PyTorch's, batches and caches change nothing, one library of symbols serves both."""
import pytest
import torch
from torch import nn

from attention import sinusoids
from model import Seq2SeqTransformer, TransformerConfig
from test_model import KINDS, SMALL, copy_all, copy_attention

pytestmark = pytest.mark.usefixtures("fast_form")
START, END = 1, 2
VARIANTS = [
    dict(), dict(n_ra_decoder=0), dict(n_ra=0), dict(n_ra=4), dict(n_ra=0, n_ra_decoder=2), dict(n_layers_decoder=1),
    dict(symbols="symbolic"), dict(symbols="positional"), dict(position="rope"), dict(position="learned"),
    dict(norm_first=True, final_norm=True), dict(ra_type="rca"), dict(symmetric=True), dict(n_kv_heads=1),
    dict(rel_activation="softmax"), dict(shared_symbols=False, symbols="symbolic"), dict(max_distance=2),
]


def make(n_layers_decoder=None, n_ra_decoder=None, **options):
    """A small float64 model of the paper's kind in evaluation mode, its weights large enough that all matters."""
    torch.manual_seed(0)
    paper = dict(norm_first=False, final_norm=False, bias=True, activation="relu", position="sinusoidal",
                 symbols="relative")
    cfg = TransformerConfig(**{**SMALL, **paper, **options})
    m = Seq2SeqTransformer(cfg, n_layers_decoder=n_layers_decoder, n_ra_decoder=n_ra_decoder).double().eval()
    with torch.no_grad():
        for p in m.parameters():
            p.normal_(std=0.4) if p.dim() > 1 else p.add_(torch.randn_like(p), alpha=0.1)
    return m


def padded(lengths, width=None):
    """Random tokens 3 ... 12, padded by 0 to one width."""
    width = width or max(lengths)
    tokens = torch.randint(3, 13, (len(lengths), width))
    return tokens.masked_fill(torch.arange(width) >= torch.tensor(lengths)[:, None], 0)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_questions_logits_do_not_depend_on_its_batch(options):
    m, questions, answers = make(**options), padded([3, 9, 6], 11), padded([5, 2, 4], 7)
    together, _ = m(questions, answers)
    for i, (S, T) in enumerate(zip([3, 9, 6], [5, 2, 4])):
        alone, _ = m(questions[i:i + 1, :S], answers[i:i + 1, :T])
        torch.testing.assert_close(together[i, :T], alone[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_no_logit_depends_on_a_later_token_of_the_answer_but_all_on_the_question(options):
    m, questions, answers = make(**options), padded([9, 6]), padded([6, 6])
    logits, _ = m(questions, answers)
    changed = answers.clone()
    changed[:, 3] = (answers[:, 3] - 2) % 10 + 3
    later, _ = m(questions, changed)
    torch.testing.assert_close(later[:, :3], logits[:, :3], rtol=0, atol=1e-12)
    assert (later[:, 3:] - logits[:, 3:]).abs().amax((0, 2)).gt(1e-6).all()
    for place in range(6):
        other = questions.clone()
        other[:, place] = (questions[:, place] - 2) % 10 + 3
        assert (m(other, answers)[0] - logits).abs().amax(2).gt(1e-9).all()


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_cached_and_uncached_answers_are_equal(options):
    m, questions = make(**options), padded([4, 10, 7, 1])
    seen = []
    m.head.register_forward_hook(lambda module, args, out: seen.append(out[:, -1]))
    uncached = m.generate(questions, 9, start=START, end=END, use_cache=False)
    logits, seen[:] = torch.stack(seen), []
    cached = m.generate(questions, 9, start=START, end=END)
    assert torch.equal(cached, uncached)
    torch.testing.assert_close(torch.stack(seen), logits, rtol=0, atol=1e-9)


def test_a_cache_reads_the_context_once():
    m, reads = make(), []
    m.decoder.blocks[0].cross.W_k.register_forward_hook(lambda module, args, out: reads.append(args[0].shape))
    answers = m.generate(padded([4, 10]), 6, start=START, end=-1)
    assert answers.shape == (2, 6) and reads == [(2, 10, 16)]


def test_an_answer_is_the_likeliest_token_each_time_up_to_its_end():
    m, questions = make(), padded([5, 8, 3])
    free = m.generate(questions, 8, start=START, end=-1)
    for i, question in enumerate(questions):                         # token by token, through forward
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
    assert answers.size(1) == max(ends)                              # it stops when all have ended


def test_the_loss_is_the_mean_over_the_characters_of_the_answers():
    m, questions, answers = make(), padded([5, 8, 3]), padded([6, 3, 4])
    logits, loss = m(questions, answers[:, :-1], answers[:, 1:])
    one_by_one = [-logits[b, t].log_softmax(-1)[answers[b, t + 1]]
                  for b, n in enumerate([6, 3, 4]) for t in range(n - 1)]
    torch.testing.assert_close(loss, torch.stack(one_by_one).mean(), rtol=0, atol=1e-12)
    torch.testing.assert_close(m(questions, answers[:, :-1])[0], logits, rtol=0, atol=0)


def test_without_relational_heads_it_is_pytorchs_transformer():
    m = make(n_ra=0, n_layers_decoder=3)
    names, options = ["weight", "bias"], dict(dropout=0.0, activation=KINDS["relu"], batch_first=True)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 64, **options), 2, enable_nested_tensor=False)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 64, **options), 3)
    encoder, decoder = encoder.double(), decoder.double()
    copied = sum(p.numel() for p in (*m.embedding.parameters(), m.head.bias))      # used as they are
    with torch.no_grad():
        for ours, theirs in (*zip(m.encoder.blocks, encoder.layers), *zip(m.decoder.blocks, decoder.layers)):
            copied += copy_attention(theirs.self_attn, ours.attention.sensory, names)
            norms = [ours.norm_attention, ours.norm_mlp]
            if hasattr(ours, "cross"):
                copied += copy_attention(theirs.multihead_attn, ours.cross, names)
                norms.insert(1, ours.norm_cross)
            copied += copy_all([(theirs.linear1, ours.mlp.W_1), (theirs.linear2, ours.mlp.W_2)], names)
            copied += copy_all([(getattr(theirs, f"norm{i}"), norm) for i, norm in enumerate(norms, 1)], names)
    assert copied == sum(p.numel() for p in m.parameters())          # nothing is left that they do not have

    questions, answers = padded([5, 8, 3]), padded([6, 3, 4])
    x, y = (m.embedding(t) * 4 + sinusoids(torch.arange(t.size(1)), 16) for t in (questions, answers))
    pad, future = questions == 0, torch.ones(6, 6, dtype=torch.bool).triu(1)
    context = encoder(x, src_key_padding_mask=pad)
    expected = m.head(decoder(y, context, tgt_mask=future, memory_key_padding_mask=pad))
    torch.testing.assert_close(m(questions, answers)[0], expected, rtol=0, atol=1e-10)


def test_one_library_of_symbols_serves_encoder_and_decoder():
    names = [name for name, _ in make().named_parameters() if "library" in name]
    assert names == ["encoder.symbols.0.library"]
    only_encoder = make(n_ra_decoder=0)
    assert len(only_encoder.decoder.symbols) == 0 and only_encoder.decoder.blocks[0].attention.relational is None
    assert len(make(n_ra=0, n_ra_decoder=2).decoder.symbols) == 1
    assert not [name for name, _ in make(n_ra=0).named_parameters() if "symbol" in name or "relational" in name]
    m = make()
    m(padded([5, 4]), padded([3, 3]))[0].sum().backward()
    assert m.encoder.symbols[0].library.grad.abs().sum() > 0


def test_the_decoder_may_have_its_own_depth_and_heads():
    m = make(n_layers_decoder=3, n_ra_decoder=1)
    heads = [[(b.attention.sensory.n_heads, b.attention.relational.n_heads) for b in stack.blocks]
             for stack in (m.encoder, m.decoder)]
    assert heads == [[(2, 2)] * 2, [(3, 1)] * 3]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_parameter_learns(options):
    m = make(**options).train()
    m(padded([5, 8]), padded([6, 4])[:, :-1], padded([6, 4])[:, 1:])[1].backward()
    dead = [name for name, p in m.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert [name for name in dead if not name.endswith("W_k.bias")] == []          # it moves all scores alike


@pytest.mark.parametrize("n_ra, n_ra_decoder", [(0, 0), (4, 0), (4, 4)])
def test_a_tiny_batch_can_be_memorised_and_is_then_answered(n_ra, n_ra_decoder):
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


def test_sequences_beyond_max_len_are_refused():
    m = make()
    with pytest.raises(ValueError, match="13 tokens, but max_len=12"):
        m(padded([13]), padded([3]))
    with pytest.raises(ValueError, match="13 tokens, but max_len=12"):
        m.generate(padded([3]), 20, start=START, end=-1)


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
