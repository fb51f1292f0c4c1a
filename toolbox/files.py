"""Files that are never half written, and locks between processes."""
import os
import sys
import time
from contextlib import contextmanager

from tqdm import tqdm

try:
    import fcntl
except ImportError:                                                  # Windows
    fcntl = None
    import msvcrt


def write_atomically(path, write):
    """`write(temporary path)`, then rename: a kill leaves the old file or the new one, never half of one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")         # two processes do not share it
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)                                # on a full disk nothing stays behind


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
