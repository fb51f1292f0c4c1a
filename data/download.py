"""The one downloader of this repository: it returns a file that is whole and verified, or says in a line why not.

    path = download(url, "data/cache/cifar.tar.gz", size=170_052_171, sha256="c4a38c50...")
    folder = extract(path, "data/cache/cifar")
    path = download(url, "data/cache/stories-50MB.txt", first=50_000_000)      # of a file of 1.9 GB

Hosts of datasets are slow, cut connections and answer 503 with an HTML page; readers press Ctrl-C; eight processes of
one job want the same file. So bytes gather in `<path>.part`, where every further attempt, or run, goes on, and a file
gets its real name only when it is whole: whatever has its real name can be trusted.
A few files out of an archive that is too large to keep: data/stream.py, which uses what has no underscore here.
"""
import errno
import gzip
import hashlib
import math
import os
import re
import shutil
import sys
import tarfile
import time
import zlib
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path

import requests
from tqdm import tqdm

try:
    import fcntl
except ImportError:                            # Windows
    fcntl = None
    import msvcrt

HTTPError = requests.packages.urllib3.exceptions.HTTPError       # raised by a response of requests that is read raw
CHUNK = 1 << 16                                # bytes read at a time: the most that a broken connection can lose


class DownloadError(OSError):
    """One line for the reader: which file, from where, what went wrong, and the way round."""


class Refused(Exception):
    """Asking again would not help."""


class TryAgain(Exception):
    """Asking again may help."""


def download(url, path, *, size=None, first=None, sha256=None, check=None, retries=5, backoff=1.0,
             timeout=30.0) -> Path:
    """Fetches `url` to `path` and returns `path`. A file that is there already is not asked for again.

    size      length of the whole file at `url` in bytes, if known: a server that announces another is refused
    first     fetch only so many bytes from its start, or all if it has fewer; give another number another path, for a
              file that is there already is not asked how many it was to have
    sha256    its checksum in hex, if published; with `first`, that of the bytes fetched and not of the whole file
    check     for a file without one: called with the path of the finished .part, raises ValueError if that is wrong
    retries   how often to ask again when an attempt brought nothing new; the n-th time after backoff * 2^(n-1) seconds
    timeout   seconds of silence after which a connection counts as dead

    Raises DownloadError. What has arrived stays in `<path>.part` for the next run, unless it proved wrong.
    Raises ValueError for a `first` that is no number of bytes.
    """
    if first is not None and not (isinstance(first, int) and first > 0):
        raise ValueError(f"first={first!r}: give a whole number of bytes, 1 or more, or None for the whole file")
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with explained(f"could not download {path} from {url}", path.parent, f"fetch it by hand and put it at {path}"):
        if path.exists():
            return path
        with locked(path.parent):
            if path.exists():                  # fetched by the process we waited for
                return path
            if not sys.stderr.isatty():        # on a terminal the bar says it
                say(f"downloading {path} from {url}")
            provable = not (sha256 is None and check is None and (size is None or first is not None))
            _fetch(url, part, retries, backoff, size=size, first=first, provable=provable, timeout=timeout)
            _verify(part, sha256, check)
            os.replace(part, path)
    return path


def _fetch(url, part, retries, backoff, **wanted):
    """Attempt after attempt until `part` is whole."""
    patience = Patience(part.stem, _length(part), retries, backoff)
    while True:
        try:
            return _attempt(url, part, **wanted)
        except TryAgain as fault:
            patience.pause(fault, _length(part))


class Patience:
    """Counts the attempts in vain for the file `name`, of which the first `farthest` bytes are there already."""

    def __init__(self, name, farthest, retries, backoff):
        self.name, self.farthest, self.retries, self.backoff, self.failures = name, farthest, retries, backoff, 0

    def pause(self, fault, have):
        """After an attempt that ended in `fault` with `have` bytes there; raises Refused if it was one too many."""
        # New ground starts the count afresh. It must be new: a server that sends everything from the start each
        # time, and cuts it at the same place each time, would keep us here for ever.
        self.failures = 1 if have > self.farthest else self.failures + 1
        self.farthest = max(self.farthest, have)
        if self.failures > self.retries:
            raise Refused(f"{fault} (attempts in vain: {self.failures})") from None
        pause = self.backoff * 2 ** (self.failures - 1)
        say(f"{self.name}: {fault}; trying again in {pause:g} s")
        time.sleep(pause)


def _attempt(url, part, *, size, first, provable, timeout):
    """One request, for what `part` still lacks. Returns if `part` is whole then; else raises TryAgain or Refused."""
    length = have = _length(part)
    if first is not None:
        # If nothing is lacking, the last byte comes again: an answer tells whether this is still the file we had.
        have = min(length, first - 1)
    if have and have == size:
        return
    with request(url, have, part.stat().st_mtime if have else None, timeout, first) as response:
        status, content_range = response.status_code, response.headers.get("Content-Range", "")
        if have and status == 416 and content_range == f"bytes */{length}" and size in (None, length):
            return                             # nothing lies beyond our bytes
        if have and status in (412, 416):
            part.unlink()
            raise TryAgain("the .part was not of this file, and was removed")
        start, total = promise(response, have, size)
        end = min((number for number in (size, total, first) if number is not None), default=None)
        if not provable and (end is None or "Content-Encoding" in response.headers):
            raise Refused("the server does not tell the file's length, and without sha256 or check (or size, for a "
                          "whole file) nobody would notice a cut")
        _receive(response, part, start=start, end=end, stop=first)


def request(url, have, since, timeout, stop=None):
    """Asks for bytes `have` to `stop` (None: the end) of the file, those before having come in the second `since`."""
    headers = {"Accept-Encoding": "identity"}  # lengths and ranges of a compressed answer count other bytes
    if have or stop is not None:
        headers["Range"] = f"bytes={have}-" + ("" if stop is None else f"{stop - 1}")
    if have:
        # a file that changed since our bytes came must not become their second half: 412 then
        headers["If-Unmodified-Since"] = formatdate(since, usegmt=True)
    try:
        return requests.get(url, headers=headers, stream=True, timeout=timeout)
    except (requests.ConnectionError, requests.Timeout) as fault:
        raise TryAgain(f"no answer ({_shortly(fault)})") from None
    except requests.RequestException as fault:
        raise Refused(fault) from None


def _shortly(fault):
    """The last words of requests' and urllib3's nested errors: '[Errno 111] Connection refused', say."""
    inner = fault.args[0] if fault.args else fault
    inner = getattr(inner, "reason", inner)    # urllib3.MaxRetryError wraps what happened
    return str(inner).rsplit(": ", 1)[-1]


def promise(response, have, size):
    """What an answer announces: its first byte's place in the file, and the file's length (None: it does not say).

    have: the bytes there already, for which it was not asked; size: the length it must announce, None if any will do
    """
    status = response.status_code
    if status == 429 or status >= 500:
        raise TryAgain(f"the server answered {status} {response.reason}")
    if status not in (200, 206):
        raise Refused(f"the server answered {status} {response.reason}")
    if response.headers.get("Content-Type", "").lower().startswith("text/html"):
        raise Refused("the server sent an HTML page instead")
    if status == 200:                          # everything from the start, even if we asked for the tail only
        start, total = 0, response.headers.get("Content-Length", "")
    else:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if not found or int(found[1]) != have:
            raise TryAgain("the server sent another range than it was asked for")
        start, total = have, found[2]
    total = int(total) if total.isdigit() else None
    if None not in (size, total) and size != total:
        raise Refused(f"the server's file has {total:,} bytes, not {size:,}")
    return start, total


def _receive(response, part, *, start, end, stop):
    """The body, no further than `stop`, goes into `part` from byte `start` on; it must reach `end`, None if unknown."""
    blocks = blocks_of(response, start, stop)
    block = next(blocks, b"")                  # before `part` is opened: a log-in page must not wipe out a good .part
    got = start
    bar = tqdm(total=end, initial=start, desc=part.stem, unit="B", unit_scale=True, disable=None)
    with bar, open(part, "ab") as file:
        file.truncate(start)
        while block:
            file.write(block)
            got += len(block)
            bar.update(len(block))
            block = next(blocks, b"")
    if end is not None and got != end:
        raise TryAgain(f"{got:,} of {end:,} bytes came")


def blocks_of(response, position, stop=None):
    """The body, which begins at the file's byte `position`, as it is on the wire: response.iter_content() would
    decompress it behind our back. What comes after the first `stop` bytes of the file is not read."""
    stop = math.inf if stop is None else stop
    try:
        while position < stop and (block := response.raw.read(min(CHUNK, stop - position), decode_content=False)):
            if position == 0 and re.match(rb"\s*<(!doctype\s+html|html|head)\b", block, re.IGNORECASE):
                raise Refused("the server sent an HTML page instead")
            position += len(block)
            yield block
    except HTTPError as fault:
        raise TryAgain(fault.args[0]) from None  # "Connection broken: IncompleteRead(...)", "Read timed out."


def _verify(part, sha256, check):
    """Removes `part` and raises Refused unless it is what was promised."""
    try:
        if sha256 is not None:
            digest = hashlib.sha256()
            with open(part, "rb") as file:
                while block := file.read(CHUNK):
                    digest.update(block)
            if digest.hexdigest() != sha256.lower():
                raise ValueError(f"its SHA-256 is {digest.hexdigest()}, not {sha256}")
        if check is not None:
            check(part)
    except ValueError as fault:
        part.unlink()
        raise Refused(f"what came is not the right file, and was removed: {fault}") from None


def extract(archive, folder, *, wanted=None) -> Path:
    """Unpacks a tar archive into the new `folder` and returns it. A folder that is there already is taken as it is.

    wanted    names of the members to unpack, all of which must be there; None unpacks everything

    Raises DownloadError and leaves nothing behind if the archive is cut or damaged, or a member is absolute, leads
    out of the folder, or is anything but a file or a folder.
    """
    archive, folder = Path(archive), Path(folder)
    part = folder.with_name(folder.name + ".part")
    with explained(f"could not unpack {archive} into {folder}", folder.parent,
                    f"delete {archive} to have it fetched again"):
        if folder.exists():
            return folder
        with locked(folder.parent):
            if folder.exists():                # unpacked by the process we waited for
                return folder
            say(f"unpacking {archive} into {folder}")
            shutil.rmtree(part, ignore_errors=True)  # left by a process that was killed
            try:
                _unpack(archive, part, wanted)
                os.replace(part, folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return folder


def _unpack(archive, folder, wanted):
    if not hasattr(tarfile, "data_filter"):
        raise Refused(f"Python {sys.version.split()[0]} cannot unpack safely; 3.10.12, 3.11.4 and 3.12 can")
    folder.mkdir()
    missing = set(wanted or ())
    with damage_named(), tarfile.open(archive) as tar:
        for member in tar:
            if member.size < 0:                # tarfile would go back and read the same for ever
                raise Refused("the archive is cut or damaged")
            if wanted is not None and member.name not in missing:
                continue
            missing.discard(member.name)
            # The filter refuses paths that lead outside. Two things we refuse ourselves: /etc/x, which it would turn
            # into etc/x, and links, which no dataset here needs and which all the holes found in it went through.
            if member.name.startswith(("/", "\\")) or not (member.isfile() or member.isdir()):
                raise Refused(f"its member {member.name!r} is absolute, or neither a file nor a folder")
            tar.extract(member, folder, filter="data")
        # An archive ends in two blocks of zeros. tarfile stops at the first, but at a cut or damaged header too, in
        # silence: so the second must be there. Reading on to the end makes gzip compare its checksum.
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise Refused("the archive is cut or damaged")
        while tar.fileobj.read(CHUNK):
            pass
    if missing:
        raise Refused(f"it has no member {', '.join(sorted(missing))}")


@contextmanager
def damage_named():
    """tarfile meets some damaged headers with errors that any bug could raise: outside, they are among its own."""
    try:
        yield
    except (ValueError, TypeError, LookupError, ArithmeticError, MemoryError, RecursionError) as fault:
        raise tarfile.ReadError(f"{type(fault).__name__}: {fault}") from None


@contextmanager
def explained(what, folder, way_round):
    """Turns whatever goes wrong inside into one DownloadError of one line."""
    try:
        yield
        return
    except Refused as fault:
        why = fault
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as fault:
        why = f"the archive is cut, damaged or unsafe ({fault})"
    except OSError as fault:
        why = f"cannot read or write in {folder} ({fault})"
        if fault.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            there = next(place for place in (folder, *folder.parents) if place.exists())
            free = shutil.disk_usage(there).free
            why = f"the disk, or your share of it, is full ({free / 1e6:,.0f} MB free in {there})"
    why = " ".join(str(why).split())
    raise DownloadError(f"{what}: {why}; {way_round}, or choose another folder with --data_dir") from None


@contextmanager
def locked(folder):
    """One process at a time in `folder`. The operating system keeps the lock, and drops it when the process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:  # never deleted: those who wait for it would wait for nothing
        if not try_lock(file):
            say(f"waiting for another process that is at work in {folder}")
            while not try_lock(file):
                time.sleep(0.2)
        yield


def try_lock(file):
    """Takes the lock on an open file for this process, until it closes the file or ends; False if another holds it."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        return True
    except (BlockingIOError, PermissionError):  # taken, in the words of POSIX and of Windows
        return False


def _length(file):
    return file.stat().st_size if file.exists() else 0


def say(words):
    tqdm.write(words, file=sys.stderr)         # like print, but above a bar and not through it
