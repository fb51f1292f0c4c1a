"""Writing token by token: what may be chosen, what is kept, and the script that shows it."""
import gc
import io
import itertools
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_model import VARIANTS, make
from test_pretrained import DAT, random_weights, write

import generation
import sample
import train_lm
from config import TransformerConfig, model_config
from data.tokenizers import load_tokenizer
from generation import choose, stream
from model import LanguageModel

pytestmark = pytest.mark.usefixtures("fast_form")
ROOT = Path(sample.__file__).parent


# ---- the choice ----


@pytest.fixture
def drawn_from(monkeypatch):
    """A function: the probabilities in proportion to which `choose` draws, in float64 and summing to 1."""
    def probabilities(logits, *how):
        seen = []
        with monkeypatch.context() as patch:
            patch.setattr(torch, "multinomial", lambda p, n: seen.append(p) or p.argmax(-1, keepdim=True))
            choose(logits, *how)
        return seen[0] / seen[0].sum(-1, keepdim=True)
    return probabilities


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
def test_the_nucleus_is_the_smallest_set_that_reaches_p(top_p, top_k, drawn_from):
    torch.manual_seed(0)
    logits = 2 * torch.randn(50, 11, dtype=torch.float64)
    p, got = (logits / 0.7).softmax(-1), drawn_from(logits, 0.7, top_k, top_p)
    for row, got_row in zip(p, got):
        among = row.topk(top_k or 11).indices                          # first the k likeliest, then the nucleus of them
        expected = torch.zeros_like(row)
        expected[among] = row[among] / row[among].sum()
        kept = nucleus(expected.tolist(), top_p)
        assert sorted(kept) == got_row.nonzero()[:, 0].tolist() and len(kept) >= 1
        torch.testing.assert_close(got_row[kept], row[kept] / row[kept].sum(), rtol=0, atol=1e-12)


def test_the_nucleus_stops_where_it_is_reached_and_takes_but_one_of_equals(drawn_from):
    assert drawn_from(torch.tensor([[0.125, 0.5, 0.25, 0.125]]).log(), 1.0, None, 0.75).tolist()[0] == pytest.approx(
        [0, 2 / 3, 1 / 3, 0])
    assert drawn_from(torch.zeros(1, 8), 1.0, None, 0.5).count_nonzero() == 4
    assert drawn_from(torch.zeros(1, 8), 1.0, None, 1e-6).count_nonzero() == 1
    assert drawn_from(torch.tensor([[20.0, 0, 0]]), 1.0, None, 1.0).gt(0).all()      # 1 keeps all, rounding or not


def test_top_k_keeps_k_and_temperature_0_the_likeliest(drawn_from):
    torch.manual_seed(0)
    logits = torch.randn(50, 11)
    got = drawn_from(logits, 2.0, 4)
    assert (got > 0).sum(-1).eq(4).all() and torch.equal((got > 0).nonzero()[:, 1].view(50, 4),
                                                         logits.topk(4).indices.sort(-1).values)
    assert drawn_from(logits, 1.0, 99).gt(0).all()                     # more than there are: all of them
    for how in ((0,), (0, 3, 0.5), (1e-6,), (1.0, 1), (1.0, None, 1e-6)):
        assert torch.equal(choose(logits, *how), logits.argmax(-1, keepdim=True))


def test_draws_follow_the_probabilities():
    torch.manual_seed(0)
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    drawn = choose(p.log().expand(20_000, 4), 1.0, None, 0.9)[:, 0].bincount(minlength=4) / 20_000
    torch.testing.assert_close(drawn, torch.tensor([0.5, 0.3, 0.15, 0]) / 0.95, rtol=0, atol=0.015)


# ---- token by token ----


def plainly(m, idx, n, temperature, top_k):
    """The same in a few lines: everything kept, the logits of every position, no cache."""
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
def test_a_seed_gives_the_text_that_its_definition_gives(temperature, top_k, prompt_length):
    m, idx = make(), torch.randint(13, (2, prompt_length))
    torch.manual_seed(7)
    expected = plainly(m, idx, 40, temperature, top_k)
    for use_cache in (True, False):
        torch.manual_seed(7)
        assert torch.equal(m.generate(idx, 40, temperature, top_k, use_cache), expected)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_cached_and_uncached_generation_give_equal_logits(options):
    """At every step, far beyond the context length (12); from a prompt that is longer than it, too."""
    m, seen = make(**options), []
    m.head.register_forward_hook(lambda module, args, out: seen.append(out))
    for prompt_length in (3, 12, 20):
        idx, runs = torch.randint(13, (2, prompt_length)), []
        for use_cache in (True, False):
            seen.clear()
            torch.manual_seed(5)
            runs.append((m.generate(idx, 30, use_cache=use_cache), torch.stack(seen)))
        (cached, cached_logits), (uncached, logits) = runs
        assert logits.shape == (30, 2, 13) and cached.shape == (2, prompt_length + 30)           # of one position each
        torch.testing.assert_close(cached_logits, logits, rtol=0, atol=1e-9)
        assert torch.equal(cached, uncached) and torch.equal(cached[:, :prompt_length], idx)


def test_a_full_context_drops_its_oldest_half():
    """Uncached, each step reads the context: it grows to max_len = 12, falls to 6 and grows again."""
    m, lengths = make(), []
    m.embedding.register_forward_pre_hook(lambda module, args: lengths.append(args[0].size(1)))
    m.generate(torch.zeros(1, 10, dtype=torch.long), 12, use_cache=False)
    assert lengths == [10, 11, 12, 6, 7, 8, 9, 10, 11, 12, 6, 7]
    lengths.clear()
    m.generate(torch.zeros(1, 10, dtype=torch.long), 12)
    assert lengths == [10, 1, 1, 6, 1, 1, 1, 1, 1, 1, 6, 1]


@pytest.mark.parametrize("use_cache", [True, False])
def test_no_more_than_a_context_is_kept(use_cache, monkeypatch):
    m, caches = make(), []
    monkeypatch.setattr(m, "new_caches", lambda: caches.append(LanguageModel.new_caches(m)) or caches[-1])
    for i, _ in enumerate(stream(m, torch.zeros(3, 5, dtype=torch.long), 60, use_cache=use_cache)):      # B = 3
        del caches[:-1]
        if i % 7 == 6:                                                 # tokens alive, with the memory behind views
            kept = [t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) is torch.Tensor
                    and t.dtype == torch.long and t.dim() == 2 and t.size(0) == 3]
            assert kept and max(kept) <= 3 * 13 * 8
            assert all(buffer.size(2) == 12 for cache in sum(caches, []) for buffer in cache.buffers.values())
    assert len(caches) == use_cache


def test_padding_of_the_vocabulary_is_never_chosen():
    m = make(tie_embeddings=False)
    with torch.no_grad():
        m.head.weight[5:] = 9 * m.head.weight[5:]                      # by far the largest logits
    idx = torch.randint(5, (4, 3))
    for how in (dict(temperature=0), dict(temperature=50.0), dict(top_k=2), dict(top_k=13), dict(top_p=0.9)):
        assert max(token.max() for token in stream(m, idx, 40, **how)) >= 5
        assert max(token.max() for token in stream(m, idx, 40, vocab_size=5, **how)) < 5
    greedy = next(stream(m, idx, 1, temperature=0, vocab_size=5))
    assert torch.equal(greedy, m(idx)[0][:, -1, :5].argmax(-1, keepdim=True))


def test_the_model_evaluates_while_it_writes_and_goes_back_to_its_mode():
    m, idx = make(dropout=0.5), torch.randint(13, (2, 4))
    expected = m.generate(idx, 20, temperature=0)
    assert torch.equal(m.generate(idx, 20, top_p=1e-9), expected)
    m.train()
    assert torch.equal(m.generate(idx, 20, temperature=0), expected) and m.training
    tokens, graphs = stream(m, idx, 20), []
    m.head.register_forward_hook(lambda module, args, out: graphs.append(out.requires_grad))
    assert m.training                                                  # not begun
    next(tokens)
    assert not m.training and graphs == [False] and torch.is_grad_enabled()          # the reader's mode is its own
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


# ---- the script ----


def save(path, facts=None, **options):
    """A checkpoint as training.Run.save writes it, of a small model at random."""
    small = dict(d_model=16, n_layers=1, n_heads=2, n_ra=1, max_len=16, n_symbols=4, symbol_heads=2)
    options = asdict(TransformerConfig()) | small | dict(seed=3) | options
    torch.manual_seed(0)
    m = LanguageModel(model_config(options))
    with torch.no_grad():
        for p in m.parameters():
            p.normal_(std=0.5) if p.dim() > 1 else None
    torch.save({"options": options, "facts": {"tokenizer": "bytes"} | (facts or {}), "model": m.state_dict()}, path)
    return m.eval()


def says(capsys, *arguments):
    sample.main([*arguments, "--device=cpu"])
    shown = capsys.readouterr()
    return shown.out, shown.err


def refuses(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        sample.main([*arguments, "--device=cpu"])
    shown = capsys.readouterr()
    assert stop.value.code == 2 and shown.err.count("\n") == 1 and not shown.out
    return shown.err


def test_samples_come_from_the_checkpoint_and_are_repeatable(tiny, only_run, capsys):
    train_lm.main([*tiny, "--max_steps=10"])
    folder = only_run()
    capsys.readouterr()

    def text(*options):
        return says(capsys, f"--from={folder}", "--prompt=to be", "--max_new_tokens=40", *options)[0]
    first, second = text(), text("--seed=2")
    assert text() == text("--use_cache=False") == text(f"--from={folder / 'last.pt'}") == first != second
    assert first.startswith("to be") and first.endswith("\n") and len(first) > 20
    assert text("--seed=1,2") == text("--n_samples=2") == first + second          # the second text counts its seed up
    assert text("--temperature=0") == text("--top_k=1") == text("--top_p=1e-9") != first


@pytest.fixture
def written(monkeypatch):
    """A function that makes the script's model write these tokens; it then holds how it was asked to."""
    def let(tokens):
        def fake(model, idx, max_new_tokens, **how):
            let.asked = SimpleNamespace(prompt=idx.tolist()[0], max_new_tokens=max_new_tokens, **how)
            for token in tokens[:max_new_tokens]:
                yield torch.tensor([[token]])
        monkeypatch.setattr(sample, "stream", fake)
    return let


@pytest.mark.parametrize("text", ["naïve → 日本 🙂!", "plain"])
def test_text_appears_as_it_is_made_also_where_a_character_is_several_tokens(text, written, tmp_path, monkeypatch):
    save(tmp_path / "x.pt")
    written(list(text.encode()))
    pieces = []
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=lambda s: pieces.append(s) if s else None,
                                                       flush=lambda: pieces.append("|") if pieces[-1] != "|" else None))
    sample.main([f"--from={tmp_path / 'x.pt'}", "--prompt=é", "--device=cpu"])
    assert "".join(pieces) == "é|" + "".join(character + "|" for character in text) + "\n|"


def test_what_is_no_text_is_shown_so_that_no_terminal_minds(written, tmp_path, capsys):
    save(tmp_path / "x.pt")
    written([*b"a\x1b[2J\r\n\tb", 0xff, *b"c", *"é".encode()[:1]])     # and ends within a character
    assert says(capsys, f"--from={tmp_path / 'x.pt'}", "--prompt=>")[0] == ">a.[2J.\n\tb\ufffdc\ufffd\n"


def test_it_stops_at_the_end_of_the_text_and_says_how_fast_it_was(written, tmp_path, capsys, monkeypatch):
    save(tmp_path / "x.pt")
    written([*b"the end", 0, *b"of which this is no part"])
    monkeypatch.setattr(sample, "time", SimpleNamespace(perf_counter=itertools.count().__next__))     # one a second
    out, err = says(capsys, f"--from={tmp_path / 'x.pt'}", "--prompt=At last, ", "--seed=4")
    assert out == "At last, the end\n"
    assert err == "--- 8 tokens, 1.0 tokens/s (prompt of 9 tokens read in 1.00 s), seed 4, stopped at end-of-text\n"
    _, err = says(capsys, f"--from={tmp_path / 'x.pt'}", f"--prompt={'long' * 5}", "--max_new_tokens=1", "--top_p=0.5",
                  "--use_cache=False")
    assert "1 tokens (prompt of 20 tokens, its last 16 read in" in err and err.endswith(", seed 1\n")
    assert written.asked == SimpleNamespace(prompt=list(b"long" * 5), max_new_tokens=1, temperature=0.8, top_k=None,
                                            top_p=0.5, use_cache=False, vocab_size=256)


def test_the_prompt_comes_from_a_file_or_from_standard_input(written, tmp_path, capsys, monkeypatch):
    save(tmp_path / "x.pt")
    written([])
    raw = "über alles,\nnot ".encode() + b"\xff"                       # bytes pass as they are
    (tmp_path / "prompt.txt").write_bytes(raw)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
    for file in (tmp_path / "prompt.txt", "-"):
        written([*b"more"])
        out, _ = says(capsys, f"--from={tmp_path / 'x.pt'}", f"--prompt_file={file}")
        assert out == "über alles,\nnot \ufffdmore\n" and written.asked.prompt == list(raw)
    written([*b"more"])
    out, _ = says(capsys, f"--from={tmp_path / 'x.pt'}", "--prompt=")
    assert out == "more\n" and written.asked.prompt == [0]             # after an end-of-text, which is not shown


def test_a_checkpoint_knows_its_tokenizer_and_what_a_dat_has_of_its_own(tmp_path, capsys):
    facts = {"tokenizer": "chars", "alphabet": "abc d"}
    m = save(tmp_path / "x.pt", facts, vocab_size=8, n_heads=4, n_ra=2, dat_n_kv_heads=1, dat_bias=None)
    assert m.stack.blocks[0].attention.relational.n_kv_heads == 1      # and 8 rows for 5 characters
    torch.manual_seed(1)
    expected = torch.cat([*stream(m, torch.tensor([[1, 4]]), 30, temperature=0.8, vocab_size=5)], 1)[0].tolist()
    out, _ = says(capsys, f"--from={tmp_path / 'x.pt'}", "--prompt=bd", "--max_new_tokens=30")
    assert out == "bd" + "".join("abc d"[token] for token in expected) + "\n"
    assert "has no 'x', only" in refuses(capsys, f"--from={tmp_path / 'x.pt'}", "--prompt=x")
    assert "prompt is empty" in refuses(capsys, f"--from={tmp_path / 'x.pt'}", "--prompt=")
    assert "bytes has 256 tokens" in refuses(capsys, f"--from={tmp_path / 'x.pt'}", "--tokenizer=bytes")
    assert "has no" in refuses(capsys, f"--from={save(tmp_path / 'y.pt') and tmp_path / 'y.pt'}", "--tokenizer=chars")


def test_a_published_checkpoint_is_told_by_its_files_or_its_name(tmp_path, capsys, monkeypatch):
    config = DAT | dict(vocab_size=300, n_heads_sa=2)
    folder = write(tmp_path / "published", config, random_weights(config))
    m = sample.load_pretrained(folder)
    torch.manual_seed(1)
    idx = torch.tensor([list(b"to be")])
    expected = torch.cat([*stream(m, idx, 30, temperature=0.8, top_k=9, vocab_size=256)], 1)[0].tolist()
    expected = expected[:expected.index(0)] if 0 in expected else expected
    options = ["--prompt=to be", "--max_new_tokens=30", "--top_k=9"]
    out, _ = says(capsys, f"--from={folder}", "--tokenizer=bytes", *options)
    shown = bytes(expected).decode(errors="replace")
    assert out == "to be" + "".join(c if c.isprintable() or c in "\n\t" else "." for c in shown) + "\n"

    asked = []
    gpt2 = SimpleNamespace(name="gpt2", vocab_size=50_257, end=50_256)
    monkeypatch.setattr(sample, "load_tokenizer", lambda name, *_: asked.append(name) or gpt2)
    monkeypatch.setattr(sample, "load_pretrained", lambda *name: asked.append(name) or m)
    assert "gpt2 has 50,257 tokens" in refuses(capsys, f"--from={folder}")
    monkeypatch.chdir(tmp_path)
    refuses(capsys, "--from=owner/name", "--data_dir=there")
    assert asked == [(str(folder), "data/cache"), "gpt2", ("owner/name", "there"), "gpt2"]
    Path("owner").mkdir()
    assert "no checkpoint at" in refuses(capsys, "--from=owner/name")  # a place here, where there is nothing
    assert "no checkpoint at" in refuses(capsys, "--from=owner")


PARITY = Path(os.environ.get("DAT_TEST_DATA", "/nowhere")) / "parity" / "dat_fineweb_style"


@pytest.mark.skipif(not PARITY.exists(), reason="DAT_TEST_DATA/parity")
def test_a_checkpoint_of_the_authors_code(capsys, monkeypatch):
    characters = load_tokenizer("chars", alphabet="".join(map(chr, range(32, 127))))
    monkeypatch.setattr(sample, "load_tokenizer", lambda *_: characters)             # 95 of its 97 tokens
    out, _ = says(capsys, f"--from={PARITY}", "--prompt=To be", "--max_new_tokens=60", "--temperature=3")
    assert out.startswith("To be") and len(out) == 5 + 60 + 1
    assert says(capsys, f"--from={PARITY}", "--prompt=To be", "--max_new_tokens=60", "--temperature=3",
                "--use_cache=False")[0] == out


def test_wrong_input_is_one_clear_line(tmp_path, capsys):
    (tmp_path / "broken.pt").write_bytes(b"not a checkpoint")
    torch.save({"options": {"n_ra": 1}, "facts": {}, "model": {"x": torch.zeros(1)}}, tmp_path / "older.pt")
    torch.save({"x": torch.zeros(1)}, tmp_path / "foreign.pt")
    save(tmp_path / "other.pt")
    other = torch.load(tmp_path / "other.pt")
    torch.save(other | {"options": other["options"] | {"d_model": 32}}, tmp_path / "other.pt")
    for path, words in [("nowhere", "no checkpoint at"), ("broken.pt", "not a checkpoint"), (".", "last.pt"),
                        ("foreign.pt", "not a checkpoint"), ("older.pt", "its options lack 'vocab_size'"),
                        ("other.pt", "of another shape")]:
        assert words in refuses(capsys, f"--from={tmp_path / path}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "config.json" in refuses(capsys, f"--from={tmp_path}")
    save(tmp_path / "x.pt")
    for wrong, words in [("--top_p=0", "above 0 and at most 1"), ("--top_p=1.1", "at most 1"), ("--top_p=nan", "top_p"),
                         ("--top_k=0", "top_k=0"), ("--temperature=-1", "temperature"), ("--n_samples=0", "n_samples"),
                         ("--max_new_tokens=0", "max_new_tokens"), (f"--seed={2 ** 63}", "2^63"),
                         ("--tokenizer=gtp2", "did you mean gpt2?"), ("--prompt_file=nowhere", "nowhere"),
                         ("--top=3", "did you mean --top_")]:
        assert words in refuses(capsys, f"--from={tmp_path / 'x.pt'}", wrong)


def test_a_reader_that_has_seen_enough_ends_it_quietly(tmp_path):
    save(tmp_path / "x.pt")
    command = [sys.executable, "sample.py", f"--from={tmp_path / 'x.pt'}", "--max_new_tokens=100000", "--device=cpu"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(4) == b"def "
        process.stdout.close()
        assert process.wait(60) == 0 and process.stderr.read() == b""
