"""Files that are never half written, and locks between processes."""
import csv
import errno
import os
import shutil
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

try:
    import fcntl
except ImportError:                                                  # Windows
    fcntl = None
    import msvcrt

# the disk is full, the user's quota is, or a file would be longer than allowed
FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}

@contextmanager
def writing(path, needed=0):
    """Its body writes `path`: the error of a full disk then names the file, the free space and the needed bytes."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise                                                        # its message names a file
        needs = f", {needed / 1e6:,.1f} MB needed" if needed else ""
        raise OSError(f"could not write {path}: {error.strerror} ({free_space(path)}{needs})") from None


def free_space(path):
    """The free space on the disk of a path that need not exist yet, in words."""
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    return f"{shutil.disk_usage(existing).free / 1e6:,.1f} MB free in {existing}"


def read_text(path):
    """The text of a file in UTF-8. Raises ValueError, in one line, if it is not, or if there is none in it."""
    try:
        text = Path(path).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 (byte {error.start} is wrong): save it as UTF-8") from None
    if not text.strip():
        raise ValueError(f"{path} is empty: give a file with some text")
    return text


def write_text(path, text):
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), needed=len(text.encode()))


def write_atomically(path, write, needed=0):
    """`write(temporary path)`, then rename: a kill leaves the old file or the new one, never half of one.

    Raises OSError, in one line, if it cannot be written; needed: its size in bytes, for that line.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")         # two processes do not share it
    try:
        with writing(path, needed):
            write(temporary)
            os.replace(temporary, path)
    finally:
        with suppress(OSError):                                          # on a full disk nothing stays behind
            temporary.unlink()


def write_csv(path, columns, rows):
    """rows: dicts; a column that a row lacks stays empty."""
    def write(temporary):
        with open(temporary, "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
    write_atomically(path, write)


@contextmanager
def locked(folder):
    """One process at a time in `folder`. The operating system holds the lock, and drops it when the process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:        # never deleted, or a waiting process would hold a deleted file
        if not try_lock(file):
            tqdm.write(f"waiting for another process that is at work in {folder}", file=sys.stderr)
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
    except (BlockingIOError, PermissionError):       # held by another, as POSIX and as Windows report it
        return False
