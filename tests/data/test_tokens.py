"""Texts, tokenizers, tokens on disk, and windows of them."""
import hashlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import regex                                   # comes with tiktoken
import torch

from data.text import sources, tokenizers, tokens
from data.text.tokenizers import Bytes, Characters, load_tokenizer

REAL = os.environ.get("DAT_TEST_DATA")
STORIES = ["Once upon a time, Lily ran.\n\n\"Où?\" said Tom.\n", "One day a cat sat.",
           "Max was\nsad.  He 🙂 cried.\n\n"]
# The patterns by which tiktoken's encodings split a text into words (tiktoken_ext/openai_public.py)
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k_base": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|"
                   r"\s*[\r\n]|\s+(?!\S)|\s",
    "o200k_base": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
                  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
                  r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
                  r"\s*[\r\n]+|\s+(?!\S)|\s+"}


def written(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def decoded(corpus):
    return [corpus.tokenizer.decode(part[0:len(part)].tolist()) for part in (corpus.train, corpus.val)]


# ---- texts -----------------------------------------------------------------------------------------------------------

def test_the_built_in_corpus_is_complete_ordered_and_split_by_file(tmp_path):
    corpus = tokens.load("torch", "auto", tmp_path)
    train, val = decoded(corpus)
    assert len(train) + len(val) == corpus.facts["bytes"] and b"\r\n" not in train
    root = Path(torch.__file__).parent
    names = sorted(p.relative_to(root).as_posix() for part in ("nn", "optim", "distributions")
                   for p in (root / part).rglob("*.py"))
    tenth = (root / names[9]).read_bytes().replace(b"\r\n", b"\n")
    assert val.startswith(tenth) and tenth not in train
    if torch.__version__.startswith("2.13.0"):
        assert (corpus.facts["sha256"], corpus.facts["bytes"], len(names)) == (sources.REFERENCE, 2_762_907, 206)
        assert "not comparable" not in corpus.describe()
    corpus.facts["sha256"] = "0" * 64
    assert "not comparable" in corpus.describe()


def test_a_file_is_split_at_nine_tenths_and_between_characters(tmp_path):
    corpus = tokens.load(written(tmp_path / "a.txt", "0123456789" * 100), "bytes", tmp_path)
    assert (len(corpus.train), len(corpus.val), corpus.facts["bytes"]) == (900, 100, 1000)
    for padding in range(4):
        whole = "x" * padding + "🙂" * 100
        corpus = tokens.load(written(tmp_path / "b.txt", whole), "bytes", tmp_path)
        train, val = (part.decode() for part in decoded(corpus))       # each part is valid UTF-8
        assert train + val == whole and len(train) == pytest.approx(90 + padding, abs=1)


def test_a_folder_has_one_training_text_and_one_validation_text(tmp_path):
    written(tmp_path / "my_train.txt", "training text")
    with pytest.raises(ValueError, match=r"0 files \*val\*.txt, but must have exactly one"):
        tokens.load(str(tmp_path), "bytes", tmp_path)
    written(tmp_path / "valid.txt", "validation text")
    assert decoded(tokens.load(str(tmp_path), "bytes", tmp_path)) == [b"training text", b"validation text"]


@pytest.mark.parametrize("chunk", [1, 2, 7, 10_000])
def test_documents_do_not_depend_on_the_size_of_the_blocks(chunk, tmp_path, monkeypatch):
    """White space around the separator is removed, everything else is kept."""
    monkeypatch.setattr(sources, "CHUNK", chunk)
    stories = [story.strip() for story in STORIES]
    path = tmp_path / "t.txt"
    written(path, "\n<|endoftext|>\n\n\n".join(stories) + "\n<|endoftext|>")
    documents = [""]
    for piece in sources.pieces(sources.whole(path)):
        if piece is None:
            documents.append("")
        else:
            documents[-1] += piece
    assert documents == [*stories, ""]
    written(path, "".join(STORIES))                                    # one document: everything is kept
    assert "".join(sources.pieces(sources.whole(path))) == "".join(STORIES)


@pytest.mark.parametrize("chunk", [1, 3, 10_000])
def test_windows_line_ends_are_kept(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK", chunk)
    content = b"One.\r\n\r\nTwo\r\n<|endoftext|>\r\nThree,\r\nfour.\r\n"
    written(tmp_path / "train.txt", content), written(tmp_path / "val.txt", content)
    for name in ("bytes", "chars"):
        assert decoded(tokens.load(str(tmp_path), name, tmp_path)) == [b"One.\r\n\r\nTwo\0Three,\r\nfour.\r\n"] * 2


@pytest.mark.parametrize("name", PATTERNS)
def test_no_token_extends_across_a_cut(name):
    """Random texts, cut at all possible positions, consist of the same words as the whole text."""
    pattern, rng = regex.compile(PATTERNS[name]), random.Random(0)
    cuts = 0
    alphabet = ["a", "B", "é", "1", ".", "'s", "/", "_", " ", "\n", "\r", "\t", "—", "\u00a0"]
    for _ in range(4000):
        whole = "".join(rng.choices(alphabet, k=12))
        at = [0, *(match.end() for match in sources.CUT.finditer(whole)), len(whole)]
        parts = [whole[i:j] for i, j in zip(at, at[1:])]
        assert sum((pattern.findall(part) for part in parts), []) == pattern.findall(whole), repr(whole)
        cuts += len(at) - 2
    assert cuts > 200


def test_invalid_utf8_is_an_error_that_names_the_byte(tmp_path, monkeypatch):
    for chunk in (1, 3, 1 << 18):
        monkeypatch.setattr(sources, "CHUNK", chunk)
        for where, content in ((4, b"abcd\xff" + b"x" * 20), (3, b"abc\xc3(" + b"x" * 20)):
            with pytest.raises(ValueError, match=f"not UTF-8 text: byte {where} is 0x{content[where]:02x}"):
                tokens.load(written(tmp_path / "latin.txt", content), "bytes", tmp_path)


# ---- tokens ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["bytes", "chars", "gpt2"])
def test_tokens_on_disk_decode_to_the_text(name, tmp_path, monkeypatch):
    """Also when the text is read and encoded in many pieces."""
    if name == "gpt2" and not REAL:
        pytest.skip("set DAT_TEST_DATA to a folder with real data")
    monkeypatch.setattr(sources, "CHUNK", 5000)
    monkeypatch.setattr(tokens, "BATCH", 20_000)
    content = "".join(random.Random(0).choices(STORIES, k=2000)).encode()
    if REAL:
        content = Path(REAL, "data/tinystories/tinystories_sample.txt").read_bytes()
    path = written(tmp_path / "stories.txt", content)
    corpus = tokens.load(path, name, tmp_path)
    assert b"".join(decoded(corpus)) == content
    assert corpus.train.arrays[0].dtype == np.uint16 and isinstance(corpus.train.arrays[0], np.memmap)
    assert corpus.facts["sha256"] == hashlib.sha256(content).hexdigest() and corpus.facts["bytes"] == len(content)
    assert corpus.facts["bytes_per_token"] == len(decoded(corpus)[1]) / len(corpus.val)
    if name == "gpt2":                                                 # the same tokens as of the whole text
        whole = corpus.tokenizer.encode(content[:len(decoded(corpus)[0])].decode())
        assert corpus.train[0:len(corpus.train)].tolist() == whole
        assert 3.5 < corpus.facts["bytes_per_token"] < 4.5


def test_documents_are_separated_by_the_end_of_text_token(tmp_path):
    for name, end in (("bytes", 0), ("chars", 0)):
        part = "<|endoftext|>\n".join(STORIES)
        written(tmp_path / "train.txt", part), written(tmp_path / "val.txt", part)
        corpus = tokens.load(str(tmp_path), name, tmp_path)
        assert corpus.tokenizer.end == end
        between = decoded(corpus)[0].split(b"\0")
        assert [story.decode().strip() for story in between] == [story.strip() for story in STORIES]
        n_bytes = sum(map(len, between))                               # without the tokens between documents
        assert corpus.facts["bytes_per_token"] == pytest.approx(n_bytes / len(corpus.val))


def test_decode_is_the_inverse_of_encode_and_unknown_characters_are_errors(tmp_path):
    for tokenizer in (Bytes(), Characters("".join(sorted(set("Où? 🙂"))))):
        ids = tokenizer.encode("Où? 🙂")
        assert tokenizer.decode(ids).decode() == "Où? 🙂" and max(ids) < tokenizer.vocab_size
        assert b"".join(tokenizer.decode([i]) for i in ids).decode() == "Où? 🙂"
    with pytest.raises(ValueError, match="no 'xy'"):
        Characters("abc").encode("axby")
    with pytest.raises(ValueError, match="did you mean gpt2"):
        load_tokenizer("gtp2")
    with pytest.raises(ValueError, match="alphabet has no 'a'"):
        load_tokenizer("chars").encode("a")
    corpus = tokens.load(written(tmp_path / "t.txt", "to be or not to be"), "chars", tmp_path)
    assert corpus.facts["alphabet"] == corpus.tokenizer.alphabet == " benort"       # a checkpoint contains it
    assert tokens.load(str(tmp_path / "t.txt"), "chars", tmp_path).tokenizer.alphabet == " benort"     # read from disk


def test_unused_token_numbers_are_decoded_to_the_replacement_character():
    bytes_and_end = tokenizers.tiktoken.Encoding("x", pat_str=r"\S+|\s+", special_tokens={"<|endoftext|>": 300},
                                                 mergeable_ranks={bytes([i]): i for i in range(256)})
    tokenizer = tokenizers.BytePairs(bytes_and_end)
    assert (tokenizer.vocab_size, tokenizer.end) == (301, 300)
    assert tokenizer.decode([*"Où".encode(), 270, *b"?"]).decode() == "Où\ufffd?"


def test_tokens_of_large_vocabularies_are_stored_in_four_bytes(tmp_path):
    class Large(Bytes):
        name, vocab_size = "large", 2 ** 16 + 1

        def encode_batch(self, texts):
            return [[ord(c) + 2 ** 16 - 100 for c in text] for text in texts]
    path = Path(written(tmp_path / "t.txt", "abcdé" * 3))
    parts = sources.split(path)
    tokens.tokenise("t", parts, Large(), tmp_path / "t", [part.identity() for part in parts])
    corpus = tokens.open_corpus("t", tmp_path / "t", Large())
    assert corpus.train[0:3].tolist() == [ord(c) + 2 ** 16 - 100 for c in "abc"] and max(corpus.train[0:5]) > 2 ** 16


def test_a_text_is_tokenised_again_only_if_it_has_changed(tmp_path, monkeypatch):
    path = written(tmp_path / "t.txt", "to be or not to be " * 50)
    tokens.load(path, "bytes", tmp_path)
    with monkeypatch.context() as m:
        m.setattr(tokens, "tokenise", lambda *args: 1 / 0)
        tokens.load(path, "bytes", tmp_path)
        with pytest.raises(ZeroDivisionError):
            tokens.load(path, "chars", tmp_path)
    written(tmp_path / "t.txt", "to be or to be not " * 50)            # of the same length
    os.utime(path, ns=(1, 1))
    assert decoded(tokens.load(path, "bytes", tmp_path))[0].startswith(b"to be or to be")
    assert len(decoded(tokens.load(path, "bytes", tmp_path, first_mb=1))[0]) == 855
    with monkeypatch.context() as m:
        m.setattr(tokens, "VERSION", 2)
        m.setattr(tokens, "tokenise", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tokens.load(path, "bytes", tmp_path)


def test_a_text_that_changes_while_it_is_read_is_an_error(tmp_path, monkeypatch):
    path = written(tmp_path / "t.txt", "to be or not to be " * 50)
    with monkeypatch.context() as m:
        write = tokens.write_tokens
        m.setattr(tokens, "write_tokens", lambda *args: os.utime(path, ns=(1, 1)) or write(*args))
        with pytest.raises(ValueError, match="t.txt changed while it was being read: start again"):
            tokens.load(path, "bytes", tmp_path)
    assert not list((tmp_path / "tokens").glob("t.txt-*"))
    assert b"".join(decoded(tokens.load(path, "bytes", tmp_path))) == Path(path).read_bytes()


def test_after_a_failure_no_incomplete_tokens_are_left(tmp_path, monkeypatch):
    path = written(tmp_path / "t.txt", "to be or not to be " * 1000)
    with monkeypatch.context() as m:
        m.setattr(tokens.json, "dumps", lambda *args: 1 / 0 if isinstance(args[0], dict) else "x")   # in the last step
        with pytest.raises(ZeroDivisionError):
            tokens.load(path, "bytes", tmp_path)
    assert not [p for p in (tmp_path / "tokens").iterdir() if p.is_dir()]
    corpus = tokens.load(path, "bytes", tmp_path)
    assert b"".join(decoded(corpus)) == Path(path).read_bytes()
    folder = next(p for p in (tmp_path / "tokens").iterdir() if p.is_dir() and p.suffix != ".part")
    os.truncate(folder / "val.bin", 10)                                # as after a disk error
    with pytest.raises(ValueError, match="is damaged: delete"):
        tokens.load(path, "bytes", tmp_path)


SLOWLY = """
import sys, time
from data.text import sources, tokens
sources.CHUNK = 1000
pieces = sources.pieces
def slowly(*args):
    for piece in pieces(*args):
        time.sleep(0.005)
        yield piece
sources.pieces = slowly
print(len(tokens.load(sys.argv[1], "bytes", sys.argv[2]).train))
"""


def test_a_killed_process_and_two_at_the_same_time_leave_complete_tokens_or_none(tmp_path):
    path = written(tmp_path / "t.txt", "to be\nor not to be\n" * 4000)
    command = [sys.executable, "-c", SLOWLY, path, str(tmp_path / "cache")]
    quiet = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=Path(tokens.__file__).parents[2], text=True)
    process = subprocess.Popen(command, **quiet)
    while process.poll() is None and not list((tmp_path / "cache").glob("tokens/*.part/train.bin")):
        time.sleep(0.01)
    process.kill()
    assert process.wait() != 0
    assert {p.suffix for p in (tmp_path / "cache" / "tokens").glob("t.txt-*")} == {".part"}
    two = [subprocess.Popen(command, **quiet) for _ in range(2)]
    size = len(Path(path).read_bytes()) * 9 // 10
    assert [process.communicate()[0].strip() for process in two] == [str(size)] * 2
    assert b"".join(decoded(tokens.load(path, "bytes", tmp_path / "cache"))) == Path(path).read_bytes()


def test_windows_contain_consecutive_tokens_also_across_shards():
    row = np.arange(1000, dtype=np.uint16)
    one, many = tokens.Tokens(row), tokens.Tokens(row[:10], row[10:11], row[11:500], row[500:])
    assert len(one) == len(many) == 1000
    starts = torch.tensor([0, 5, 9, 10, 495, 980])
    for data in (one, many):
        x, y = data.windows(starts, 19)
        assert x.dtype == y.dtype == torch.int64 and torch.equal(y, x + 1)
        assert torch.equal(x, starts[:, None] + torch.arange(19))
    x, y = many.windows(torch.tensor([995]), 19)                       # after the last token the target is -1
    assert y[0].tolist() == [996, 997, 998, 999] + [-1] * 15 and x.min() == 0


def test_random_windows_start_everywhere_and_fixed_ones_cover_each_token_once():
    torch.manual_seed(0)
    starts = {i for _ in range(100) for i in tokens.random_starts(100, 10, 50).tolist()}
    assert starts == set(range(90))                                    # all windows followed by a token
    assert tokens.fixed_starts(100, 10, 1000).tolist() == list(range(0, 90, 10))
    assert tokens.fixed_starts(100, 10, 3).tolist() == [0, 40, 80]
    for n in (11, 99, 100, 101, 111):
        x, y = tokens.Tokens(np.arange(n)).windows(tokens.fixed_starts(n, 10), 10)
        assert y[y >= 0].tolist() == list(range(1, n))


def test_a_text_shorter_than_a_window_is_an_error(tmp_path):
    corpus = tokens.load(written(tmp_path / "t.txt", "x" * 200), "bytes", tmp_path)
    corpus.check(19)
    with pytest.raises(ValueError, match="the validation part has 20 tokens, less than one context"):
        corpus.check(20)
