"""Text to tokens and back: bytes, characters, or the byte pairs of tiktoken (GPT-2 and its successors).

    tokenizer = load_tokenizer("gpt2")
    tokenizer.decode(tokenizer.encode("Once upon a time"))              # b"Once upon a time"

decode returns bytes, because a token can be a part of a character. `end` is the token between documents: for bytes and
characters it is NUL, which no text contains.
"""
import difflib
import os
import re
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import requests
import tiktoken

LONGEST_BLANK = 1 << 19                        # characters of white space; tiktoken panics on twice as many


class Bytes:
    """A token is a byte of UTF-8. There are 256, for any language, and no vocabulary to download."""
    name, vocab_size, end = "bytes", 256, 0

    def encode(self, text):
        return list(text.encode("utf-8", "surrogateescape"))           # input from a terminal can be invalid UTF-8

    def encode_batch(self, texts):
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, tokens):
        return bytes(tokens)


class Characters:
    """A token is a character of `alphabet`, a string of different characters, as in nanoGPT's Shakespeare."""
    name = "chars"

    def __init__(self, alphabet):
        self.alphabet, self.vocab_size = alphabet, len(alphabet)
        self.index = {character: i for i, character in enumerate(alphabet)}
        self.end = self.index.get("\0")

    def encode(self, text):
        unknown = set(text) - set(self.alphabet)
        if unknown:
            raise ValueError(f"the model's alphabet has no {''.join(sorted(unknown))!r}, only {self.alphabet!r}")
        return [self.index[character] for character in text]

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, tokens):
        return "".join(self.alphabet[token] for token in tokens).encode()


class BytePairs:
    """A token is a frequent sequence of bytes (Sennrich et al., 2016), as defined by one of tiktoken's encodings."""

    def __init__(self, encoding):
        self.encoding, self.name = encoding, encoding.name
        self.vocab_size, self.end = encoding.n_vocab, encoding.eot_token

    def encode(self, text):
        with panics_as_errors(self.name):                              # "<|endoftext|>" in a text is ordinary text
            return [token for part in with_short_blanks(text) for token in self.encoding.encode_ordinary(part)]

    def encode_batch(self, texts):
        if max(map(len, texts), default=0) > LONGEST_BLANK:
            return [self.encode(text) for text in texts]
        with panics_as_errors(self.name):
            return self.encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())

    def decode(self, tokens):
        return b"".join(map(self.bytes_of, tokens))

    def bytes_of(self, token):
        try:
            return self.encoding.decode_single_token_bytes(token)
        except KeyError:                       # in cl100k_base and later encodings some numbers are unused
            return "\ufffd".encode()


def with_short_blanks(text):
    """The text in parts, cut only within white space of more than LONGEST_BLANK characters."""
    if len(text) <= LONGEST_BLANK:
        return [text]
    cuts = [at for blank in re.finditer(r"\s+", text)
            for at in range(blank.start() + LONGEST_BLANK, blank.end(), LONGEST_BLANK)]
    return [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)])]


@contextmanager
def panics_as_errors(name):
    """tiktoken is written in Rust, whose panics are no Exception: turns them into a ValueError of one line."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        why = " ".join(str(error).split())[:100]
        raise ValueError(f"the tokenizer {name} failed on this text ({why}): give --tokenizer=bytes") from None


def load_tokenizer(name, data_dir="data/cache", alphabet=""):
    """The tokenizer "bytes", "chars" (with the characters of `alphabet`), or one of tiktoken's encodings.

    The files of an encoding are downloaded to data_dir. Raises ValueError, one line, for an unknown name, or if the
    files cannot be downloaded.
    """
    if name == "bytes":
        return Bytes()
    if name == "chars":
        return Characters(alphabet)
    known = ["bytes", "chars", *tiktoken.list_encoding_names()]
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        raise ValueError(f"tokenizer={name}: choose from {', '.join(known)}"
                         + (f"; did you mean {near[0]}?" if near else ""))
    # tiktoken's default is a temporary folder, which is emptied when the machine restarts
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(Path(data_dir) / "tiktoken"))
    try:
        return BytePairs(tiktoken.get_encoding(name))
    except requests.RequestException as error:
        url = getattr(error.request, "url", "its host")
        raise ValueError(f"could not download the tokenizer {name} from {url}: connect to the network once, or set "
                         f"TIKTOKEN_CACHE_DIR to a folder with its files, or give --tokenizer=bytes") from None
