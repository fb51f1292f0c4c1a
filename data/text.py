"""Text as a stream of bytes: a built-in corpus that every reader already has, tiny Shakespeare, or any UTF-8 file.

The built-in corpus is the Python source of the installed torch (nn, optim and distributions): real text with real
structure, no download, the same bytes on every system once line ends are made equal.
"""
import hashlib
from pathlib import Path

import torch

from data.download import download

# the corpus of torch 2.13.0: 206 files, 2,762,907 bytes. Losses compare only between equal corpora.
REFERENCE = "95eca13a947106fbca1b86853191f2dfc8bcf5809cfd1d96cf63bfb04ce36826"
SHAKESPEARE = dict(url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                   size=1_115_394, sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")


def torch_source():
    """The source files in order of their relative paths -> training bytes, validation bytes (every tenth file)."""
    root = Path(torch.__file__).parent
    names = sorted(path.relative_to(root).as_posix() for part in ("nn", "optim", "distributions")
                   for path in (root / part).rglob("*.py"))
    texts = [(root / name).read_bytes().replace(b"\r\n", b"\n") for name in names]
    train = b"".join(text for i, text in enumerate(texts) if i % 10 != 9)
    return train, b"".join(texts[9::10])


def load(data, data_dir, max_len):
    """-> training tokens, validation tokens (uint8 tensors), and facts for the run's record.

    data: "torch", "shakespeare" or the path of a UTF-8 file, whose last tenth is for validation.
    Raises ValueError for text that is not UTF-8 or shorter than one context, OSError for what cannot be read.
    """
    if data == "torch":
        train, val = torch_source()
    else:
        path = Path(data)
        if data == "shakespeare":
            path = download(path=Path(data_dir) / "shakespeare.txt", **SHAKESPEARE)
        if not path.is_file():
            raise ValueError(f"no file {data}: --data takes torch, shakespeare or the path of a text file")
        text = path.read_bytes()
        try:
            text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{data} is not UTF-8 text: byte {error.start} is 0x{text[error.start]:02x}; "
                             f"convert it first") from None
        train, val = text[:len(text) * 9 // 10], text[len(text) * 9 // 10:]
    for name, part in (("training", train), ("validation", val)):
        if len(part) <= max_len:
            raise ValueError(f"{data}: the {name} part has {len(part):,} bytes, less than one context and its next "
                             f"byte ({max_len + 1}): give more text, or a smaller --max_len")
    sha256 = hashlib.sha256(train + val).hexdigest()
    facts = {"data": data if data in ("torch", "shakespeare") else path.name, "bytes": len(train) + len(val),
             "train_bytes": len(train), "sha256": sha256, "bytes_per_token": 1.0}
    return *(torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (train, val)), facts


def describe(facts):
    """One line on what is read, and a warning where its losses cannot be compared with the README's."""
    line = f"data: {facts['data']}, {facts['bytes']:,} bytes, SHA-256 {facts['sha256'][:16]}..."
    if facts["data"] == "torch" and facts["sha256"] != REFERENCE:
        line += (f"\n      not the corpus of torch 2.13.0 (this is torch {torch.__version__}): "
                 f"its losses do not compare with the README's")
    return line


def encode(prompt):
    """str -> tokens (1, T), a token is a byte."""
    return torch.tensor([list(prompt.encode(errors="surrogateescape"))])


def decode(tokens):
    """Tokens (T,) -> str fit for a terminal: what cannot be printed is shown as a dot."""
    text = bytes(tokens.tolist()).decode(errors="replace")
    return "".join(c if c.isprintable() or c in "\n\t" else "." for c in text)


def batch(tokens, batch_size, length):
    """Random windows of `tokens` -> inputs x and next tokens y, both int64 (batch_size, length)."""
    start = torch.randint(len(tokens) - length, (batch_size, 1))
    window = tokens[start + torch.arange(length + 1)].long()
    return window[:, :-1], window[:, 1:]


def fixed_windows(tokens, length, at_most):
    """Non-overlapping windows, the same in every evaluation, evenly over the text: x, y (N <= at_most, length)."""
    starts = torch.arange(0, len(tokens) - length, length)
    if len(starts) > at_most:
        starts = starts[torch.linspace(0, len(starts) - 1, at_most).round().long()]
    window = tokens[starts[:, None] + torch.arange(length + 1)].long()
    return window[:, :-1], window[:, 1:]
