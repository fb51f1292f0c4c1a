"""Text as tokens on disk: made once, then mapped into memory, so that a corpus may be larger than that.

    corpus = load("tinystories", "gpt2", "data/cache")
    x, y = corpus.train.windows(starts, length)                        # inputs and next tokens, (N, length) each

A corpus gets its folder's name when it is whole: what a kill leaves behind is called .part, and is made anew. Two
processes that want the same corpus wait for each other.
"""
import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.text import fineweb

from data.text import sources as text
from data.download import locked
from data.text.tokenizers import load_tokenizer

BATCH = 1 << 22                                # characters that are encoded at a time
FILES = "train.bin", "val.bin"
VERSION = 1                                    # of the tokens on disk: to be raised when other code would write others


class Tokens:
    """One long row of tokens, in one array or in several, one behind the other."""

    def __init__(self, *arrays):
        self.arrays, lengths = arrays, [len(array) for array in arrays]
        self.ends = np.cumsum(lengths)
        self.begins = self.ends - lengths

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, part):
        """A slice with start and stop, as an array of integers."""
        return np.concatenate([array[max(part.start - begin, 0):part.stop - begin] for array, begin, end
                               in zip(self.arrays, self.begins, self.ends) if part.start < end and begin < part.stop])

    def windows(self, starts, length):
        """Inputs x and next tokens y, (N, length) int64 each; beyond the last token y is -1, which does not count."""
        rows = np.full((len(starts), length + 1), -1, np.int64)
        for row, start in zip(rows, starts.tolist()):
            window = self[start:start + length + 1]
            row[:len(window)] = window
        rows = torch.from_numpy(rows)
        return rows[:, :-1].clamp(min=0), rows[:, 1:]


@dataclass
class Corpus:
    name: str
    train: Tokens
    val: Tokens
    tokenizer: object                          # one of data.tokenizers
    facts: dict                                # what describes it in a run's record

    def __post_init__(self):
        self.facts = {"data": self.name, "tokenizer": self.tokenizer.name, "train_tokens": len(self.train),
                      "val_tokens": len(self.val), **self.facts}

    def check(self, length):
        """Raises ValueError if a part is shorter than one context."""
        for name, part in (("training", self.train), ("validation", self.val)):
            if len(part) <= length:
                raise ValueError(f"{self.name}: the {name} part has {len(part):,} tokens, less than one context and "
                                 f"its next token ({length + 1}): give more text, or a smaller --max_len")

    def describe(self):
        """What is read, and a warning where its losses cannot be compared with the README's."""
        whole = "bytes" in self.facts                                  # of shards only their beginnings were looked at
        line = (f"data: {self.name}, {len(self.train):,} + {len(self.val):,} tokens ({self.tokenizer.name}, "
                f"{self.facts['bytes_per_token']:.2f} bytes each"
                + ("), SHA-256" if whole else ", by the first 10 million of the latter), checksum of the beginnings")
                + f" {self.facts['sha256'][:16]}...")
        if self.name == "torch" and self.facts["sha256"] != text.REFERENCE:
            line += (f"\n      not the corpus of torch 2.13.0 (this is torch {torch.__version__}): "
                     f"its losses do not compare with the README's")
        return line


def load(data, tokenizer, data_dir, *, first_mb=None, n_shards=None):
    """The Corpus that --data names: see data/text.py and data/fineweb.py.

    tokenizer: see data/tokenizers.py; "auto" is gpt2 for tinystories and fineweb, else bytes.
    first_mb: of a text; n_shards: of fineweb. Raises ValueError or OSError in one line.
    """
    if fineweb.is_meant(data):
        if tokenizer not in ("auto", "gpt2"):
            raise ValueError(f"tokenizer={tokenizer}: {data} comes as tokens of gpt2")
        if first_mb:
            raise ValueError(f"first_mb={first_mb}: it is for texts; of {data} give --n_shards")
        tokenizer = load_tokenizer("gpt2", data_dir)
        name, paths = fineweb.find(data, data_dir, n_shards)
        train, val = Tokens(*map(fineweb.read, paths[1:])), Tokens(fineweb.read(paths[0]))
        # bytes per token, measured on the first ten million validation tokens; the ends of documents count as 0
        sizes = np.array([len(tokenizer.decode([i])) if i != tokenizer.end else 0 for i in range(tokenizer.vocab_size)])
        sample = val[0:10 ** 7]
        facts = {"bytes_per_token": sizes[sample].sum() / len(sample), "sha256": fineweb.identity(paths)}
        return Corpus(name, train, val, tokenizer, facts)
    if n_shards:
        raise ValueError(f"n_shards={n_shards}: it is for --data=fineweb")
    if tokenizer == "auto":
        tokenizer = "gpt2" if data == "tinystories" else "bytes"
    # first of all: without a tokenizer nothing need be downloaded. That of characters is made from the text
    tokenizer = None if tokenizer == "chars" else load_tokenizer(tokenizer, data_dir)
    name, *parts = text.find(data, data_dir, first_mb)
    identity = [part.identity() for part in parts]
    text_and_how = json.dumps([VERSION, tokenizer.name if tokenizer else "chars", *identity])
    key = f"{name}-{hashlib.sha256(text_and_how.encode()).hexdigest()[:12]}"
    folder = Path(data_dir) / "tokens" / re.sub(r"[^\w.-]+", "_", key)
    if not folder.exists():
        with locked(folder.parent):
            if not folder.exists():                                    # else made by the process we waited for
                tokenise(name, parts, tokenizer or load_tokenizer("chars", alphabet=alphabet(parts)), folder, identity)
    return mapped(name, folder, tokenizer)


def alphabet(parts):
    """All characters that occur, in order; NUL among them if a document ends somewhere."""
    found = set()
    for part in parts:
        for piece in text.pieces(part):
            found.update(piece or "\0")
    return "".join(sorted(found))


def tokenise(name, parts, tokenizer, folder, identity):
    """Writes the tokens of both parts, and meta.json, into `folder`, which is there when they are whole.

    Raises ValueError if in the end the parts are not those of which `identity` was taken: a file was changed meanwhile.
    """
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)                       # left by a process that was killed
    temporary.mkdir()
    dtype = "uint16" if tokenizer.vocab_size <= 2 ** 16 else "uint32"
    digest, counts = hashlib.sha256(), {}
    with tqdm(total=sum(map(len, parts)), desc=f"{name} to tokens", unit="B", unit_scale=True, disable=None) as bar:
        def seen(block):
            digest.update(block)
            bar.update(len(block))
        for file, part in zip(FILES, parts):
            counts[file] = write_tokens(text.pieces(part, seen), tokenizer, temporary / file, dtype)
    if [part.identity() for part in parts] != identity:
        raise ValueError(f"{name} changed while it became tokens: start again when it is written")
    meta = {"bytes": sum(map(len, parts)), "sha256": digest.hexdigest(), "dtype": dtype, "tokens_and_bytes": counts,
            "alphabet": getattr(tokenizer, "alphabet", None)}
    (temporary / "meta.json").write_text(json.dumps(meta))
    os.replace(temporary, folder)


def write_tokens(pieces, tokenizer, path, dtype):
    """-> the number of tokens, and of the bytes of text that they stand for."""
    n_tokens = n_bytes = 0
    with open(path, "wb") as file:
        for batch in batches(pieces):
            encoded = iter(tokenizer.encode_batch([piece for piece in batch if piece is not None]))
            for piece in batch:
                tokens = np.asarray([tokenizer.end] if piece is None else next(encoded)).astype(dtype)
                file.write(tokens.tobytes())
                n_tokens += len(tokens)
                n_bytes += len((piece or "").encode())
    return n_tokens, n_bytes


def batches(pieces):
    """Lists of pieces, of BATCH characters or a little more together: enough to occupy all cores."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece or "")
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    yield batch


def mapped(name, folder, tokenizer):
    """The Corpus in a folder of `tokenise`; its arrays stay on the disk until they are read."""
    meta = json.loads((folder / "meta.json").read_text())
    tokenizer = tokenizer or load_tokenizer("chars", alphabet=meta["alphabet"])
    parts = []
    for file, (n_tokens, _) in meta["tokens_and_bytes"].items():
        if (folder / file).stat().st_size != n_tokens * np.dtype(meta["dtype"]).itemsize:
            raise ValueError(f"{folder / file} is damaged: delete {folder} to have it made again")
        # an empty file cannot be mapped
        parts.append(Tokens(np.memmap(folder / file, meta["dtype"], "r") if n_tokens else np.empty(0, meta["dtype"])))
    n_tokens, n_bytes = meta["tokens_and_bytes"]["val.bin"]            # the loss is of these
    facts = {"bytes": meta["bytes"], "sha256": meta["sha256"], "bytes_per_token": n_bytes / max(1, n_tokens)}
    if meta["alphabet"]:
        facts["alphabet"] = meta["alphabet"]
    return Corpus(name, *parts, tokenizer, facts)


def random_starts(n_tokens, length, n):
    """Where n random windows of `length` tokens, and a next one, begin."""
    return torch.randint(n_tokens - length, (n,))


def fixed_starts(n_tokens, length, at_most=None):
    """Where windows of `length` tokens begin that cover a text without overlap, the same in every evaluation.

    at_most: only so many whole ones, evenly over the text; None: all of it, up to a last one that may be shorter.
    """
    starts = torch.arange(0, n_tokens - 1, length)
    if at_most is None:
        return starts
    starts = starts[:(n_tokens - 1) // length]                         # those that are whole
    if len(starts) > at_most:
        starts = starts[torch.linspace(0, len(starts) - 1, at_most).round().long()]
    return starts
