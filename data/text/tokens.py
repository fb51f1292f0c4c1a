"""The tokens of a text: made once, stored on disk and memory-mapped, so that a corpus can be larger than the memory.

    corpus = load("tinystories", "gpt2", "data/cache")
    x, y = corpus.train.windows(starts, length)                        # inputs and next tokens, (N, length) each

The tokens are written to a folder `<name>.part`, which is renamed when they are complete, and removed after an error.
After a kill they are made again from the start. A lock keeps two processes from making the same tokens at a time.
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

from data.text import fineweb, sources
from data.text.tokenizers import load_tokenizer
from toolbox.files import locked, writing

BATCH = 1 << 22                                # characters encoded at a time
FILES = "train.bin", "val.bin"
VERSION = 1                                    # of the tokens on disk: increase it when new code writes other tokens


class Tokens:
    """A sequence of tokens, stored in one array or in several consecutive ones."""

    def __init__(self, *arrays):
        self.arrays, lengths = arrays, [len(array) for array in arrays]
        self.ends = np.cumsum(lengths)
        self.begins = self.ends - lengths

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, part):
        """tokens[start:stop] -> an array of integers."""
        return np.concatenate([array[max(part.start - begin, 0):part.stop - begin] for array, begin, end
                               in zip(self.arrays, self.begins, self.ends) if part.start < end and begin < part.stop])

    def windows(self, starts, length):
        """-> inputs x and next tokens y, int64 (N, length). After the last token y is -1, which the loss ignores."""
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
    tokenizer: object                          # Bytes, Characters or BytePairs: see data/text/tokenizers.py
    facts: dict                                # what a run's config.json says about its data: plain Python values

    def __post_init__(self):
        self.facts = {"data": self.name, "tokenizer": self.tokenizer.name, "train_tokens": len(self.train),
                      "val_tokens": len(self.val), **self.facts}

    def check(self, length):
        """Raises ValueError if a part is too short for one window of `length` tokens and the token after it."""
        if not self.facts["bytes_per_token"] and len(self.val):
            raise ValueError(f"{self.name}: the validation part has no text, only <|endoftext|>")
        for name, part in (("training", self.train), ("validation", self.val)):
            if len(part) <= length:
                raise ValueError(f"{self.name}: the {name} part has {len(part):,} tokens, less than one context "
                                 f"and its next token ({length + 1}): give more text, or a smaller --max_len")

    def describe(self):
        """A line about the corpus, and a warning if its losses cannot be compared with the published ones."""
        complete = "bytes" in self.facts                               # of shards only the beginnings were read
        line = (f"data: {self.name}, {len(self.train):,} + {len(self.val):,} tokens ({self.tokenizer.name}, "
                f"{self.facts['bytes_per_token']:.2f} bytes each"
                + ("), SHA-256" if complete else " in the first 10 million validation tokens), checksum of the shards")
                + f" {self.facts['sha256'][:16]}...")
        if self.name == "torch" and self.facts["sha256"] != sources.REFERENCE:
            line += (f"\n      not the corpus of torch 2.13.0 (this is torch {torch.__version__}): "
                     f"losses are not comparable with those of results/lm")
        return line


def load(data, tokenizer, data_dir, *, first_mb=None, n_shards=None):
    """-> the Corpus that --data names: see data/text/sources.py and data/text/fineweb.py.

    tokenizer: see data/text/tokenizers.py; "auto" is gpt2 for tinystories and fineweb, else bytes.
    first_mb: only the first megabytes of a training text; n_shards: only so many training shards of fineweb.
    Raises ValueError or OSError, one line.
    """
    if fineweb.is_fineweb(data):
        if tokenizer not in ("auto", "gpt2"):
            raise ValueError(f"tokenizer={tokenizer}: {data} is published as tokens of gpt2")
        if first_mb:
            raise ValueError(f"first_mb={first_mb}: only for texts; for {data} give --n_shards")
        tokenizer = load_tokenizer("gpt2", data_dir)
        name, paths = fineweb.find(data, data_dir, n_shards)
        train, val = Tokens(*map(fineweb.read, paths[1:])), Tokens(fineweb.read(paths[0]))
        # measured on the first ten million validation tokens; a token between documents stands for 0 bytes
        sizes = np.array([len(tokenizer.decode([i])) if i != tokenizer.end else 0 for i in range(tokenizer.vocab_size)])
        sample = val[0:10 ** 7]
        facts = {"bytes_per_token": float(sizes[sample].mean()), "sha256": fineweb.identity(paths)}
        return Corpus(name, train, val, tokenizer, facts)
    if n_shards:
        raise ValueError(f"n_shards={n_shards}: only for --data=fineweb")
    if tokenizer == "auto":
        tokenizer = "gpt2" if data == "tinystories" else "bytes"
    # before the text is downloaded, so that an error here comes first; "chars" needs the text's alphabet
    tokenizer = None if tokenizer == "chars" else load_tokenizer(tokenizer, data_dir)
    name, *parts = sources.find(data, data_dir, first_mb)
    identity = [part.identity() for part in parts]
    text_and_how = json.dumps([VERSION, tokenizer.name if tokenizer else "chars", *identity])
    key = f"{name}-{hashlib.sha256(text_and_how.encode()).hexdigest()[:12]}"
    folder = Path(data_dir) / "tokens" / re.sub(r"[^\w.-]+", "_", key)
    if not folder.exists():
        with locked(folder.parent):
            if not folder.exists():                                    # else another process has made them meanwhile
                tokenise(name, parts, tokenizer or load_tokenizer("chars", alphabet=alphabet(parts)), folder, identity)
    return open_corpus(name, folder, tokenizer)


def alphabet(parts):
    """All characters that occur, sorted; with NUL, the token between documents, if there is more than one.

    Raises ValueError if there is none.
    """
    found = set()
    with progress("reading the alphabet", sum(map(len, parts))) as bar:
        for part in parts:
            for piece in sources.pieces(part, lambda block: bar.update(len(block))):
                found.update(piece or "\0")
    if not found:
        raise ValueError("the text is empty: give another file with --data=FILE")
    return "".join(sorted(found))


def tokenise(name, parts, tokenizer, folder, identity):
    """Writes the tokens of both parts, and meta.json, into the new `folder`; after an error nothing is left of it.

    Raises ValueError if a file changes meanwhile: `identity` is that of the parts at the start.
    """
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)                       # left over from a process that was killed
    n_bytes, dtype = sum(map(len, parts)), np.dtype("uint16" if tokenizer.vocab_size <= 2 ** 16 else "uint32")
    digest, counts = hashlib.sha256(), {}
    try:
        with writing(folder, needed=n_bytes * dtype.itemsize), progress(f"{name} to tokens", n_bytes) as bar:
            temporary.mkdir()

            def on_block(block):
                digest.update(block)
                bar.update(len(block))
            for file, part in zip(FILES, parts):
                counts[file] = write_tokens(sources.pieces(part, on_block), tokenizer, temporary / file, dtype)
            if [part.identity() for part in parts] != identity:
                raise ValueError(f"{name} changed while it was being read: start again when it is complete")
            meta = {"bytes": n_bytes, "sha256": digest.hexdigest(), "dtype": dtype.name, "tokens_and_bytes": counts,
                    "alphabet": getattr(tokenizer, "alphabet", None)}
            (temporary / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def progress(what, n_bytes):
    return tqdm(total=n_bytes, desc=what, unit="B", unit_scale=True, disable=None)


def write_tokens(pieces, tokenizer, path, dtype):
    """-> the number of tokens written, and the number of bytes of their text."""
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
    """Yields lists of pieces with a total of BATCH characters or a little more: enough work for all cores."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece or "")
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    yield batch


def open_corpus(name, folder, tokenizer):
    """The Corpus in a folder written by tokenise, with memory-mapped arrays."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    tokenizer = tokenizer or load_tokenizer("chars", alphabet=meta["alphabet"])
    parts = []
    for file, (n_tokens, _) in meta["tokens_and_bytes"].items():
        if (folder / file).stat().st_size != n_tokens * np.dtype(meta["dtype"]).itemsize:
            raise ValueError(f"{folder / file} is damaged: delete {folder} and start again")
        # an empty file cannot be memory-mapped
        parts.append(Tokens(np.memmap(folder / file, meta["dtype"], "r") if n_tokens else np.empty(0, meta["dtype"])))
    n_tokens, n_bytes = meta["tokens_and_bytes"]["val.bin"]            # of the part that the validation loss is of
    facts = {"bytes": meta["bytes"], "sha256": meta["sha256"], "bytes_per_token": n_bytes / max(1, n_tokens)}
    if meta["alphabet"]:
        facts["alphabet"] = meta["alphabet"]
    return Corpus(name, *parts, tokenizer, facts)


def random_starts(n_tokens, length, n):
    """The first positions of n random windows of `length` tokens, each followed by at least one more token."""
    return torch.randint(n_tokens - length, (n,))


def fixed_starts(n_tokens, length, at_most=None):
    """The first positions of consecutive windows of `length` tokens without overlap: the same in every evaluation.

    at_most: only this many full windows, evenly distributed; None: the whole text, with a last window that can be
    shorter.
    """
    starts = torch.arange(0, n_tokens - 1, length)
    if at_most is None:
        return starts
    starts = starts[:(n_tokens - 1) // length]                         # full windows
    if len(starts) > at_most:
        starts = starts[torch.linspace(0, len(starts) - 1, at_most).round().long()]
    return starts
