"""Texts with millions of blanks, or without any: read in linear time; a tokenizer's panic is one line."""
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
from test_tokens import PATTERNS, written

from data.text import sources, tokenizers, tokens
from data.text.tokenizers import LONGEST_BLANK, BytePairs

ROOT = Path(tokens.__file__).parents[2]


def bytes_by(pattern, name="toy"):
    """One of tiktoken's encodings with its pattern, but with single bytes as its only tokens."""
    return BytePairs(tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks={bytes([i]): i for i in range(256)},
                                       special_tokens={"<|endoftext|>": 256}))


@pytest.mark.parametrize("tokenizer", ["bytes", "chars"])
def test_texts_of_three_million_of_one_kind_are_read_to_their_end(tokenizer, tmp_path):
    """In quadratic time the blanks took hours; the limit here is a hundred times what the linear time needs."""
    units = [" ", "\n", " \n", "\u00a0", "x", "<|endoftext|>", " <|endoftext|>\n"]
    for i, unit in enumerate(units):
        written(tmp_path / f"{i}.txt", "start " + unit * (3 * 10 ** 6 // len(unit)) + " end")
    code = (f"from data.text import tokens\nfor i in range({len(units)}):\n"
            f"    corpus = tokens.load(f'{tmp_path}/{{i}}.txt', {tokenizer!r}, {str(tmp_path)!r})\n"
            "    print(len(corpus.train) + len(corpus.val))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=500)
    assert done.returncode == 0 and all(int(n) > 10 ** 5 for n in done.stdout.split()), done.stderr
    assert len(done.stdout.split()) == len(units)


def test_documents_are_those_between_the_ends_of_texts_without_the_white_space_around_them(monkeypatch):
    """Read in pieces of any length, and compared with the definition as a regular expression."""
    rng = random.Random(0)
    for length in (5, 16, 1 << 18):
        monkeypatch.setattr(sources, "CHUNK", length)
        for _ in range(200):
            text = "".join(rng.choice([" ", "\n", "a", "b c", "<|endoftext|>", "\u00a0", "é", "x\n", "<|endof"])
                           for _ in range(rng.randrange(50)))
            documents = [""]
            for piece in sources.pieces(sources.Part(text.encode(), 0, len(text.encode()))):
                documents += [""] if piece is None else []
                documents[-1] += piece or ""
            assert documents == re.split(r"\s*<\|endoftext\|>\s*", text)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("unit", [" ", "\n", "\t", "\u00a0", "\r\n", " \n"])
def test_a_million_blanks_before_a_letter_are_encoded(pattern, unit):
    """tiktoken itself panics on these if they are of one kind."""
    text, tokenizer = "a" + unit * (10 ** 6 // len(unit)) + "b", bytes_by(pattern)
    for found in (tokenizer.encode(text), *tokenizer.encode_batch([text])):
        assert tokenizer.decode(found) == text.encode()


def test_shorter_blanks_are_encoded_as_by_tiktoken_itself():
    tokenizer = bytes_by(PATTERNS["gpt2"])
    text = ("word" + " " * (LONGEST_BLANK // 2) + "word\n") * 3        # longer in all, but not in one piece
    assert tokenizer.encode(text) == tokenizer.encoding.encode_ordinary(text)
    parts = tokenizers.with_short_blanks("a" + " " * (2 * LONGEST_BLANK) + "b")
    assert [len(part) for part in parts] == [LONGEST_BLANK + 1, LONGEST_BLANK + 1]     # the b keeps its blank


def test_a_panic_of_the_tokenizer_is_one_line_and_other_errors_stay(monkeypatch):
    class PanicException(BaseException):
        pass

    class Panics:
        name, n_vocab, eot_token = "toy", 256, 0

        def encode_ordinary(self, text, num_threads=None):
            raise self.error
        encode_ordinary_batch = encode_ordinary
    tokenizer = BytePairs(Panics())
    for encode in (lambda: tokenizer.encode("x"), lambda: tokenizer.encode_batch(["x"])):
        Panics.error = PanicException("called `Result::unwrap()` on an `Err` value\n" * 3)
        with pytest.raises(ValueError, match="tokenizer toy failed on this text .* give --tokenizer=bytes") as error:
            encode()
        assert "\n" not in str(error.value)
        Panics.error = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            encode()


def test_a_progress_bar_shows_how_far_the_reading_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    tokens.load(written(tmp_path / "t.txt", "to be or not to be " * 10 ** 5), "chars", tmp_path)
    shown = capsys.readouterr().err
    assert "reading the alphabet: 100%" in shown and "t.txt to tokens: 100%" in shown and "1.90M/1.90M" in shown
