"""The texts that a language model can learn from, piece by piece and document by document; data/tokens.py reads them.

    torch         the Python source of the installed torch (nn, optim, distributions): real text with real structure, no
                  download, the same bytes on every system once line ends are made equal
    shakespeare   1.1 MB of plays (Karpathy, 2015)
    tinystories   2.1 million short stories, 1.9 GB (Eldan and Li, 2023)
    a path        of a UTF-8 file, whose last tenth is for validation, or of a folder with train and validation files

A line `<|endoftext|>` ends a document. (FineWeb-Edu, which comes as tokens, is read by data/fineweb.py.)
"""
import codecs
import hashlib
import io
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from data.download import DownloadError, download

# the corpus of torch 2.13.0: 206 files, 2,762,907 bytes. Losses compare only between equal corpora.
REFERENCE = "95eca13a947106fbca1b86853191f2dfc8bcf5809cfd1d96cf63bfb04ce36826"
SHAKESPEARE = dict(url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                   size=1_115_394, sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")
STORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main"
TINYSTORIES = {
    "TinyStories-train.txt": dict(
        size=1_924_281_556, sha256="c5cf5e22ff13614e830afbe61a99fbcbe8bcb7dd72252b989fa1117a368d401f"),
    "TinyStories-valid.txt": dict(
        size=19_447_282, sha256="94e431816c4cce81ff71e4408ff8d3bda9a42e8d2663986697c3954288cb38b4")}
END = re.compile(r"\s*<\|endoftext\|>\s*")
# Where a long text may be cut: at the start of a document, after a single line break between a visible character and a
# letter or digit, or before a single space between letters or digits. None of tiktoken's encodings has a token that
# reaches across, so the tokens are those of the whole.
CUT = re.compile(r"<\|endoftext\|>\s*(?=\S)|(?<=\S\n)(?=\w)|(?<=\w)(?= \w)")
CHUNK = 1 << 18                                # bytes in a piece


@dataclass
class Part:
    """The bytes from `begin` to `end` of a file, or of bytes in memory."""
    source: Path | bytes
    begin: int
    end: int

    def __len__(self):
        return self.end - self.begin

    def blocks(self):
        """Its bytes, in order, a block at a time."""
        left = len(self)
        with io.BytesIO(self.source) if isinstance(self.source, bytes) else open(self.source, "rb") as file:
            file.seek(self.begin)
            while left:
                block = file.read(min(CHUNK, left))
                if not block:
                    raise ValueError(f"{self.source} became shorter while it was read")
                left -= len(block)
                yield block

    def identity(self):
        """What tells it from another part, or from itself after a change, without reading it."""
        if isinstance(self.source, bytes):
            return hashlib.sha256(self.source).hexdigest()
        stat = self.source.stat()
        return [str(self.source.resolve()), stat.st_size, stat.st_mtime_ns, self.begin, self.end]


def find(data, data_dir, first_mb=None):
    """-> a name, the part to learn from, the part to validate on, of the text that --data names; fetches it if need be.

    first_mb: of the part to learn from only the first megabytes (10^6 bytes), up to the end of a document.
    Raises ValueError for what is no text or no place of one, OSError for what cannot be read or fetched.
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
        else:
            raise ValueError(f"no file {data}: --data takes torch, shakespeare, tinystories, fineweb, the path of a "
                             f"text file, or a folder with *train*.txt and *val*.txt")
    except DownloadError as error:
        raise DownloadError(f"{error}; or give a text that you have: --data=FILE") from None
    return name, (first(train, first_mb * 10 ** 6) if first_mb else train), val


def torch_source():
    """The source files in order of their relative paths -> training bytes, validation bytes (every tenth file)."""
    root = Path(torch.__file__).parent
    names = sorted(path.relative_to(root).as_posix() for part in ("nn", "optim", "distributions")
                   for path in (root / part).rglob("*.py"))
    texts = [(root / name).read_bytes().replace(b"\r\n", b"\n") for name in names]
    train = b"".join(text for i, text in enumerate(texts) if i % 10 != 9)
    return train, b"".join(texts[9::10])


def tinystories(folder, first_mb):
    """Both files; of the training file only so much is fetched as is read, unless all of it is there."""
    train, val = TINYSTORIES
    val = download(f"{STORIES}/{val}", folder / val, **TINYSTORIES[val])
    if not first_mb or first_mb * 10 ** 6 >= TINYSTORIES[train]["size"] or (folder / train).exists():
        return whole(download(f"{STORIES}/{train}", folder / train, **TINYSTORIES[train])), whole(val)
    path = folder / f"TinyStories-train-first{first_mb}MB.txt"
    download(f"{STORIES}/{train}", path, first=first_mb * 10 ** 6, size=TINYSTORIES[train]["size"], check=has_an_end)
    return whole(path), whole(val)


def has_an_end(path):
    with open(path, "rb") as file:                                     # no story is so long
        if b"<|endoftext|>" not in file.read(10 ** 5):
            raise ValueError("no <|endoftext|> in its first 100,000 bytes")


def first(part, n_bytes):
    """The first n_bytes of a text: up to the last end of a document in them, or else to the start of a character."""
    if n_bytes > len(part):
        return part
    cut = part.begin + n_bytes
    tail = Part(part.source, max(part.begin, cut - 10 ** 6), cut)
    end = b"".join(tail.blocks()).rfind(b"<|endoftext|>")
    return Part(part.source, part.begin, tail.begin + end if end > 0 else character_start(part, cut))


def character_start(part, at):
    """The first byte from `at` on that begins a character: 10xxxxxx goes on with one."""
    following = next(Part(part.source, at, part.end).blocks(), b"")[:4]
    return at + next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), 0)


def only(folder, pattern):
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise ValueError(f"{folder} has {len(found)} files {pattern}, and must have one")
    return found[0]


def whole(path):
    return Part(path, 0, path.stat().st_size)


def split(path):
    """The first nine tenths of a file and the last one, cut at the start of a character."""
    size = path.stat().st_size
    cut = character_start(whole(path), size * 9 // 10)
    return Part(path, 0, cut), Part(path, cut, size)


def pieces(part, seen=lambda block: None):
    """Yields the text piece by piece, and None where a document ends; `seen` is called with all bytes, block by block.

    Raises ValueError if the text is not UTF-8. The white space around <|endoftext|> is no part of the documents.
    """
    decoder, text, read = codecs.getincrementaldecoder("utf-8")(), "", part.begin
    for block in part.blocks():
        begun = read - len(decoder.getstate()[0])                     # where the bytes begin that are decoded now
        read += len(block)
        try:
            text += decoder.decode(block, final=read == part.end)
        except UnicodeDecodeError as error:
            raise ValueError(f"{part.source} is not UTF-8 text: byte {begun + error.start} is "
                             f"0x{error.object[error.start]:02x}; convert it first") from None
        # only near the end: what had no cut before has none now, and need not be searched again
        cuts = [match.end() for match in CUT.finditer(text, len(text) - 4096)]
        cut = len(text) if read == part.end else max(cuts, default=0)
        for i, document in enumerate(END.split(text[:cut])):
            if i:
                yield None
            if document:
                yield document
        text = text[cut:]
        seen(block)
