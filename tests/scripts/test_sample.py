"""sample.py: text from a run's checkpoint or a published one, printed token by token."""
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
from test_pretrained import DAT, random_weights, write

import sample
import train_lm
import train_relgames
import train_seq2seq
import train_vit
from data.text.tokenizers import load_tokenizer
from model import LanguageModel, TransformerConfig, model_config, stream

ROOT = Path(sample.__file__).parent


def save(path, facts=None, **options):
    """A checkpoint as toolbox.run.Run.save writes it, of a small model with random weights."""
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
    assert text("--seed=1,2") == text("--n_samples=2") == first + second          # the second text has the next seed
    assert text("--temperature=0") == text("--top_k=1") == text("--top_p=1e-9") != first


@pytest.fixture
def written(monkeypatch):
    """A function that makes the script's model write these tokens; `written.call` then holds the arguments."""
    def let(tokens):
        def fake(model, idx, max_new_tokens, **how):
            let.call = SimpleNamespace(prompt=idx.tolist()[0], max_new_tokens=max_new_tokens, **how)
            for token in tokens[:max_new_tokens]:
                yield torch.tensor([[token]])
        monkeypatch.setattr(sample, "stream", fake)
    return let


@pytest.mark.parametrize("text", ["naïve → 日本 🙂!", "plain"])
def test_text_appears_token_by_token_and_a_character_when_its_last_token_is_there(text, written, tmp_path,
                                                                                  monkeypatch):
    save(tmp_path / "x.pt")
    written(list(text.encode()))
    pieces = []
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=lambda s: pieces.append(s) if s else None,
                                                       flush=lambda: pieces.append("|") if pieces[-1] != "|" else None))
    sample.main([f"--from={tmp_path / 'x.pt'}", "--prompt=é", "--device=cpu"])
    assert "".join(pieces) == "é|" + "".join(character + "|" for character in text) + "\n|"


def test_control_characters_and_broken_characters_are_replaced(written, tmp_path, capsys):
    save(tmp_path / "x.pt")
    written([*b"a\x1b[2J\r\n\tb", 0xff, *b"c", *"é".encode()[:1]])     # and ends within a character
    assert says(capsys, f"--from={tmp_path / 'x.pt'}", "--prompt=>")[0] == ">a.[2J.\n\tb\ufffdc\ufffd\n"


def test_it_stops_at_an_end_of_text_token_and_prints_its_speed(written, tmp_path, capsys, monkeypatch):
    save(tmp_path / "x.pt")
    written([*b"the end", 0, *b"never printed"])
    monkeypatch.setattr(sample, "time", SimpleNamespace(perf_counter=itertools.count().__next__))     # one a second
    out, err = says(capsys, f"--from={tmp_path / 'x.pt'}", "--prompt=At last, ", "--seed=4")
    assert out == "At last, the end\n"
    assert err == "--- 8 tokens, 1.0 tokens/s (prompt of 9 tokens read in 1.00 s), seed 4, stopped at end-of-text\n"
    _, err = says(capsys, f"--from={tmp_path / 'x.pt'}", f"--prompt={'long' * 5}", "--max_new_tokens=1", "--top_p=0.5",
                  "--use_cache=False")
    assert "1 tokens (prompt of 20 tokens, its last 16 read in" in err and err.endswith(", seed 1\n")
    assert written.call == SimpleNamespace(prompt=list(b"long" * 5), max_new_tokens=1, temperature=0.8, top_k=None,
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
        assert out == "über alles,\nnot \ufffdmore\n" and written.call.prompt == list(raw)
    written([*b"more"])
    out, _ = says(capsys, f"--from={tmp_path / 'x.pt'}", "--prompt=")
    assert out == "more\n" and written.call.prompt == [0]              # after an end-of-text, which is not shown


def test_a_checkpoint_knows_its_tokenizer_and_the_options_of_a_dat(tmp_path, capsys):
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


def test_a_published_checkpoint_is_recognised_by_its_files_or_its_name(tmp_path, capsys, monkeypatch):
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

    loaded = []
    gpt2 = SimpleNamespace(name="gpt2", vocab_size=50_257, end=50_256)
    monkeypatch.setattr(sample, "load_tokenizer", lambda name, *_: loaded.append(name) or gpt2)
    monkeypatch.setattr(sample, "load_pretrained", lambda *name: loaded.append(name) or m)
    assert "gpt2 has 50,257 tokens" in refuses(capsys, f"--from={folder}")
    monkeypatch.chdir(tmp_path)
    refuses(capsys, "--from=owner/name", "--data_dir=there")
    assert loaded == [(str(folder), "data/cache"), "gpt2", ("owner/name", "there"), "gpt2"]
    Path("owner").mkdir()
    assert "no checkpoint at" in refuses(capsys, "--from=owner/name")  # a folder that exists, without a checkpoint
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


@pytest.mark.parametrize("script, options, file", [
    ("train_vit.py", asdict(train_vit.Config()), "last.pt"),
    ("train_seq2seq.py", asdict(train_seq2seq.Config()), "last.pt"),
    ("train_relgames.py", asdict(train_relgames.Config()), "weights.pt")])
def test_a_run_that_makes_no_text_is_named_with_the_script_that_shows_it(script, options, file, tmp_path, capsys):
    torch.save({"options": options, "facts": {}, "model": {"x": torch.zeros(1)}}, tmp_path / file)
    error = refuses(capsys, f"--from={tmp_path}")
    assert f"is of a run of {script}, which makes no text: python look.py --from={tmp_path} shows it" in error


def test_a_closed_pipe_ends_it_quietly(tmp_path):
    """As in `python sample.py | head -c 4`."""
    save(tmp_path / "x.pt")
    command = [sys.executable, "sample.py", f"--from={tmp_path / 'x.pt'}", "--max_new_tokens=100000", "--device=cpu"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(4) == b"def "
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(60) == 1
