"""Download a file: complete and verified, or an error of one line.

    path = download(url, "data/cache/cifar.tar.gz", size=170_052_171, sha256="c4a38c50...")
    path = download(url, "data/cache/stories-50MB.txt", first=50_000_000)      # the start of a file of 1.9 GB

Servers of data sets are slow, drop connections and answer 503 with an HTML page. Users press Ctrl-C. Several processes
of one job want the same file. So the bytes are written to `<path>.part`, later attempts and later runs continue there,
and the file is renamed to `path` only when it is complete and verified.

data/extract.py unpacks archives. data/mathematics/stream.py reads a few files out of an archive that is too large to
keep. Both use the functions of this file that have no leading underscore.
"""
import gzip
import hashlib
import math
import os
import re
import sys
import tarfile
import time
import zlib
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path

import requests
from tqdm import tqdm

from toolbox.files import FULL, free_space, locked

HTTPError = requests.packages.urllib3.exceptions.HTTPError       # raised when the raw response of requests is read
# where checkpoints and texts are published; a mirror, if that is set as for Hugging Face's own programs
HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
BLOCK = 1 << 16                                # bytes read at a time; the most that a broken connection loses


class DownloadError(OSError):
    """One line: which file, from which address, what went wrong, and what the user can do instead."""


class PermanentError(Exception):
    """Another attempt would fail, too."""


class TemporaryError(Exception):
    """Another attempt may succeed."""


def download(url, path, *, size=None, first=None, sha256=None, check=None, retries=5, backoff=1.0,
             timeout=30.0) -> Path:
    """Downloads `url` to `path` and returns `path`. If `path` exists, nothing is requested.

    size      length of the whole file at `url` in bytes, if known; a server that announces another length is an error
    first     download only this many bytes from the start of the file, or all of them if it is shorter. Use another
              path for each value: an existing file is returned whatever its length
    sha256    expected checksum in hex, if published; with `first`, of the downloaded bytes, not of the whole file
    check     for a file without a checksum: a function of the path of the complete .part; raises ValueError if wrong
    retries   how many attempts in a row without any new byte are repeated; the n-th waits backoff * 2^(n-1) seconds
    timeout   seconds without data after which a connection is given up

    Raises DownloadError. The bytes received so far stay in `<path>.part` for the next run, unless they are wrong.
    Raises ValueError if `first` is not a positive integer.
    """
    if first is not None and not (isinstance(first, int) and first > 0):
        raise ValueError(f"first={first!r}: give a whole number of bytes, 1 or more, or None for the whole file")
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with as_download_error(f"could not download {path} from {url}", path.parent, f"download it by hand to {path}",
                           needed=first or size or 0):
        if path.exists():
            return path
        with locked(path.parent):
            if path.exists():                  # another process downloaded it while this one waited for the lock
                return path
            if not sys.stderr.isatty():        # on a terminal there is a progress bar instead
                say(f"downloading {path} from {url}")
            verifiable = sha256 is not None or check is not None or (size is not None and first is None)
            _download(url, part, Retries(path.name, _length(part), retries, backoff),
                      size=size, first=first, verifiable=verifiable, timeout=timeout)
            _verify(part, sha256, check)
            os.replace(part, path)
    return path


def _download(url, part, attempts, **options):
    """Repeats _attempt until `part` is complete."""
    while True:
        try:
            return _attempt(url, part, **options)
        except TemporaryError as error:
            attempts.wait(error, _length(part))


class Retries:
    """Counts failed attempts in a row without progress. `most`: the largest number of bytes received so far."""

    def __init__(self, name, most, retries, backoff):
        self.name, self.most, self.retries, self.backoff, self.failures = name, most, retries, backoff, 0

    def wait(self, error, n_bytes):
        """After an attempt that failed with `error` and `n_bytes` received: waits, or raises PermanentError."""
        # Progress resets the count. Only bytes never received before are progress: a server that always sends the file
        # from the start and always breaks off at the same place would otherwise be tried without end.
        self.failures = 1 if n_bytes > self.most else self.failures + 1
        self.most = max(self.most, n_bytes)
        if self.failures > self.retries:
            raise PermanentError(f"{error} ({self.failures} failed attempts)") from None
        seconds = self.backoff * 2 ** (self.failures - 1)
        say(f"{self.name}: {error}; trying again in {seconds:g} s")
        time.sleep(seconds)


def _attempt(url, part, *, size, first, verifiable, timeout):
    """Requests the bytes that `part` lacks. Returns if `part` is complete then; else raises one of the two errors."""
    length = position = _length(part)
    if first is not None:
        # If no byte is missing, the last one is requested again: the answer shows whether the file is still the same.
        position = min(length, first - 1)
    if position and position == size:
        return
    with request(url, position, part.stat().st_mtime if position else None, timeout, first) as response:
        status, content_range = response.status_code, response.headers.get("Content-Range", "")
        if position and status == 416 and content_range == f"bytes */{length}" and size in (None, length):
            return                             # the file ends where `part` ends
        if position and status in (412, 416):
            part.unlink()
            raise TemporaryError("the .part belonged to another file and was removed")
        start, total = check_headers(response, position, size)
        end = min((number for number in (size, total, first) if number is not None), default=None)
        if not verifiable and (end is None or "Content-Encoding" in response.headers):
            raise PermanentError("the server does not announce the file's length; without sha256 or check (or size, "
                                 "for a whole file) a truncated file could not be detected")
        _receive(response, part, start=start, end=end, stop=first)


def request(url, position, since, timeout, stop=None):
    """Requests the bytes from `position` to `stop` (None: the end). The earlier bytes were received at time `since`."""
    headers = {"Accept-Encoding": "identity"}  # ranges of a compressed answer would count other bytes
    if position or stop is not None:
        headers["Range"] = f"bytes={position}-" + ("" if stop is None else f"{stop - 1}")
    if position:
        # the server answers 412 if the file has changed since then: two versions must not be joined
        headers["If-Unmodified-Since"] = formatdate(since, usegmt=True)
    try:
        return requests.get(url, headers=headers, stream=True, timeout=timeout)
    except (requests.ConnectionError, requests.Timeout) as error:
        raise TemporaryError(f"no answer ({_reason(error)})") from None
    except requests.RequestException as error:
        raise PermanentError(error) from None


def _reason(error):
    """The innermost message of requests' and urllib3's nested errors: "[Errno 111] Connection refused"."""
    inner = error.args[0] if error.args else error
    inner = getattr(inner, "reason", inner)    # urllib3.MaxRetryError contains the original error
    return str(inner).rsplit(": ", 1)[-1]


def check_headers(response, position, size):
    """-> the position in the file of the answer's first byte, and the file's length (None if not announced).

    position: the first byte that was requested. size: the length that the server must announce, None: any.
    """
    status = response.status_code
    if status == 429 or status >= 500:
        raise TemporaryError(f"the server answered {status} {response.reason}")
    if status not in (200, 206):
        raise PermanentError(f"the server answered {status} {response.reason}")
    if response.headers.get("Content-Type", "").lower().startswith("text/html"):
        raise PermanentError("the server sent an HTML page instead of the file")
    if status == 200:                          # the whole file, even if only the rest was requested
        start, total = 0, response.headers.get("Content-Length", "")
    else:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if not found or int(found[1]) != position:
            raise TemporaryError("the server sent another range than the requested one")
        start, total = position, found[2]
    total = int(total) if total.isdigit() else None
    if None not in (size, total) and size != total:
        raise PermanentError(f"the server's file has {total:,} bytes, not {size:,}")
    return start, total


def _receive(response, part, *, start, end, stop):
    """Writes the body, from byte `start` of the file to byte `stop`, into `part`. It must reach byte `end` if given."""
    blocks = body_blocks(response, start, stop)
    block = next(blocks, b"")                  # before `part` is opened: a log-in page must not overwrite a good .part
    received = start
    bar = tqdm(total=end, initial=start, desc=part.stem, unit="B", unit_scale=True, disable=None)
    with bar, open(part, "ab") as file:
        file.truncate(start)
        while block:
            file.write(block)
            received += len(block)
            bar.update(len(block))
            block = next(blocks, b"")
    if end is not None and received != end:
        raise TemporaryError(f"received {received:,} of {end:,} bytes")


def body_blocks(response, position, stop=None):
    """Yields the body of an answer that begins at byte `position` of the file, up to byte `stop` of the file.

    The bytes are those on the wire. response.iter_content() would decompress them.
    """
    stop = math.inf if stop is None else stop
    try:
        while position < stop and (block := response.raw.read(min(BLOCK, stop - position), decode_content=False)):
            if position == 0 and re.match(rb"\s*<(!doctype\s+html|html|head)\b", block, re.IGNORECASE):
                raise PermanentError("the server sent an HTML page instead of the file")
            position += len(block)
            yield block
    except HTTPError as error:
        raise TemporaryError(error.args[0]) from None  # "Connection broken: IncompleteRead(...)", "Read timed out."


def _verify(part, sha256, check):
    """Removes `part` and raises PermanentError if its checksum or its content is wrong."""
    try:
        if sha256 is not None:
            digest = hashlib.sha256()
            with open(part, "rb") as file:
                while block := file.read(BLOCK):
                    digest.update(block)
            if digest.hexdigest() != sha256.lower():
                raise ValueError(f"its SHA-256 is {digest.hexdigest()}, not {sha256}")
        if check is not None:
            check(part)
    except ValueError as error:
        part.unlink()
        raise PermanentError(f"what was received is not the right file and was removed: {error}") from None


@contextmanager
def as_download_error(what, folder, instead, needed=0):
    """Turns every error inside into one DownloadError of one line.

    what: "could not ...". folder: where files are written; needed: bytes. instead: what the user can do.
    """
    try:
        yield
        return
    except PermanentError as error:
        why = error
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        why = f"the archive is truncated, damaged or unsafe ({error})"
    except OSError as error:
        why = f"cannot read or write in {folder} ({error})"
        if error.errno in FULL:
            needs = f", {needed / 1e6:,.1f} MB needed" if needed else ""
            why = f"the disk or your quota is full: {error.strerror} ({free_space(folder)}{needs})"
    why = " ".join(str(why).split())
    raise DownloadError(f"{what}: {why}; {instead}, or choose another folder with --data_dir") from None


def _length(file):
    return file.stat().st_size if file.exists() else 0


def say(message):
    """Prints to stderr, above a progress bar and not through it."""
    tqdm.write(message, file=sys.stderr)
