"""The texts that --data can name, read in pieces, document by document.

    torch         the Python source of the installed torch (nn, optim, distributions): real text, no download. With line
                  ends normalised, the bytes are the same on every system
    shakespeare   1.1 MB of plays (Karpathy, 2015)
    tinystories   2.1 million short stories, 1.9 GB (Eldan and Li, 2023)
    a path        of a UTF-8 file, whose last tenth is for validation, or of a folder with train and validation files

A line `<|endoftext|>` ends a document. FineWeb-Edu is published as tokens: see data/text/fineweb.py.
"""
import codecs
import hashlib
import io
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from data.download import HUB, DownloadError, download

# SHA-256 of the corpus of torch 2.13.0: 206 files, 2,762,907 bytes. Losses on different corpora are not comparable.
REFERENCE = "95eca13a947106fbca1b86853191f2dfc8bcf5809cfd1d96cf63bfb04ce36826"
SHAKESPEARE = dict(url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                   size=1_115_394, sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")
STORIES = f"{HUB}/datasets/roneneldan/TinyStories/resolve/main"
TINYSTORIES = {
    "TinyStories-train.txt": dict(
        size=1_924_281_556, sha256="c5cf5e22ff13614e830afbe61a99fbcbe8bcb7dd72252b989fa1117a368d401f"),
    "TinyStories-valid.txt": dict(
        size=19_447_282, sha256="94e431816c4cce81ff71e4408ff8d3bda9a42e8d2663986697c3954288cb38b4")}
END = "<|endoftext|>"
# Positions where a long text can be cut before it is tokenised: at the start of a document, after a single line break
# between a visible character and a letter or digit, or before a single space between letters or digits. No token of
# tiktoken's encodings extends across these positions, so the pieces have the same tokens as the whole text.
CUT = re.compile(r"<\|endoftext\|>\s*(?=\S)|(?<=\S\n)(?=\w)|(?<=\w)(?= \w)")
CHUNK = 1 << 18                                # bytes read at a time


@dataclass
class Part:
    """The bytes from `begin` to `end` of a file, or of bytes in memory."""
    source: Path | bytes
    begin: int
    end: int

    def __len__(self):
        return self.end - self.begin

    def blocks(self):
        """Yields its bytes in order, in blocks."""
        left = len(self)
        with io.BytesIO(self.source) if isinstance(self.source, bytes) else open(self.source, "rb") as file:
            file.seek(self.begin)
            while left:
                block = file.read(min(CHUNK, left))
                if not block:
                    raise ValueError(f"{self.source} became shorter while it was being read")
                left -= len(block)
                yield block

    def identity(self):
        """A value that differs for other parts and after a change. Of a file without reading it."""
        if isinstance(self.source, bytes):
            return hashlib.sha256(self.source).hexdigest()
        stat = self.source.stat()
        return [str(self.source.resolve()), stat.st_size, stat.st_mtime_ns, self.begin, self.end]


def find(data, data_dir, first_mb=None):
    """-> a name, the training part and the validation part of the text that --data names, downloaded if necessary.

    first_mb: only the first megabytes (10^6 bytes) of the training part, up to the end of a document.
    Raises ValueError if there is no such text, OSError (DownloadError) if it cannot be read or downloaded.
    """
    path = Path(data).expanduser()
    try:
        if data == "torch":
            name, train, val = data, *(Part(text, 0, len(text)) for text in torch_source())
        elif data == "shakespeare":
            name, train, val = data, *split(download(path=Path(data_dir) / "shakespeare.txt", **SHAKESPEARE))
        elif data == "tinystories":
            name, train, val = data, *tinystories(Path(data_dir), first_mb)
        elif path.is_dir():
            name, train, val = path.name, *(whole(only(path, pattern)) for pattern in ("*train*.txt", "*val*.txt"))
        elif path.is_file():
            name, train, val = path.name, *split(path)
        elif path.exists():
            raise ValueError(f"{data} is a pipe or a device, which can be read once only: store its text in a file")
        else:
            raise ValueError(f"no file {data}: --data takes torch, shakespeare, tinystories, fineweb, the path of a "
                             f"text file, or a folder with *train*.txt and *val*.txt")
    except DownloadError as error:
        raise DownloadError(f"{error}; or give a text file of your own: --data=FILE") from None
    return name, (first(train, first_mb * 10 ** 6) if first_mb else train), val


def torch_source():
    """-> training bytes and validation bytes (every tenth file), of the files in the order of their relative paths."""
    root = Path(torch.__file__).parent
    names = sorted(path.relative_to(root).as_posix() for part in ("nn", "optim", "distributions")
                   for path in (root / part).rglob("*.py"))
    texts = [(root / name).read_bytes().replace(b"\r\n", b"\n") for name in names]
    train = b"".join(text for i, text in enumerate(texts) if i % 10 != 9)
    return train, b"".join(texts[9::10])


def tinystories(folder, first_mb):
    """-> the parts of both files. With first_mb only the start of the training file is downloaded."""
    train, val = TINYSTORIES
    val = download(f"{STORIES}/{val}", folder / val, **TINYSTORIES[val])
    if not first_mb or first_mb * 10 ** 6 >= TINYSTORIES[train]["size"] or (folder / train).exists():
        return whole(download(f"{STORIES}/{train}", folder / train, **TINYSTORIES[train])), whole(val)
    path = folder / f"TinyStories-train-first{first_mb}MB.txt"
    download(f"{STORIES}/{train}", path, first=first_mb * 10 ** 6, size=TINYSTORIES[train]["size"], check=has_an_end)
    return whole(path), whole(val)


def has_an_end(path):
    with open(path, "rb") as file:
        if b"<|endoftext|>" not in file.read(10 ** 5):                 # every story is shorter
            raise ValueError("no <|endoftext|> in its first 100,000 bytes")


def first(part, n_bytes):
    """The first n_bytes of a text, cut at the last end of a document; if there is none, between two characters."""
    if n_bytes > len(part):
        return part
    cut = part.begin + n_bytes
    tail = Part(part.source, max(part.begin, cut - 10 ** 6), cut)
    end = b"".join(tail.blocks()).rfind(b"<|endoftext|>")
    return Part(part.source, part.begin, tail.begin + end if end > 0 else character_start(part, cut))


def character_start(part, at):
    """The first position from `at` on where a UTF-8 character begins: not at a continuation byte 10xxxxxx."""
    following = next(Part(part.source, at, part.end).blocks(), b"")[:4]
    return at + next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), 0)


def only(folder, pattern):
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise ValueError(f"{folder} has {len(found)} files {pattern}, but must have exactly one")
    return found[0]


def whole(path):
    return Part(path, 0, path.stat().st_size)


def split(path):
    """The first nine tenths and the last tenth of a file, cut between two characters."""
    size = path.stat().st_size
    cut = character_start(whole(path), size * 9 // 10)
    return Part(path, 0, cut), Part(path, cut, size)


def pieces(part, on_block=lambda block: None):
    """Yields the text in pieces, and None where a document ends. Calls on_block with each block of bytes read.

    Raises ValueError if the text is not UTF-8. The white space around <|endoftext|> does not belong to the documents.
    """
    decoder, held, read = codecs.getincrementaldecoder("utf-8")(), [], part.begin      # held: what has no cut so far
    for block in part.blocks():
        first = read - len(decoder.getstate()[0])                     # position of the first byte not yet decoded
        read += len(block)
        try:
            text = decoder.decode(block, final=read == part.end)
        except UnicodeDecodeError as error:
            raise ValueError(f"{part.source} is not UTF-8 text: byte {first + error.start} is "
                             f"0x{error.object[error.start]:02x}; convert it first") from None
        # a cut near the end is enough, and each block is searched once
        cuts = [match.end() for match in CUT.finditer(text, max(0, len(text) - 4096))]
        cut = len(text) if read == part.end else max(cuts, default=0)
        held.append(text[:cut])
        if cut or read == part.end:
            *others, last = "".join(held).split(END)
            for i, document in enumerate([*others, last]):
                document = document.lstrip() if i else document
                document = document.rstrip() if i < len(others) else document
                if i:
                    yield None
                if document:
                    yield document
            held = []
        held.append(text[cut:])
        on_block(block)
