"""Unpack an archive: all of it, or an error of one line and nothing left behind.

    folder = extract("data/cache/cifar10.tar.gz", "data/cache/cifar10")
"""
import os
import shutil
import sys
import tarfile
from contextlib import contextmanager
from pathlib import Path

from data.download import BLOCK, PermanentError, as_download_error, say
from toolbox.files import locked


def extract(archive, folder, *, wanted=None) -> Path:
    """Unpacks a tar archive into the new `folder` and returns it. If `folder` exists, it is returned unchanged.

    wanted    names of the members to unpack, all of which must exist; None unpacks everything

    Raises DownloadError and leaves nothing behind if the archive is truncated or damaged, or if a member has an
    absolute path, a path outside the folder, or is anything but a file or a folder.
    """
    archive, folder = Path(archive), Path(folder)
    part = folder.with_name(folder.name + ".part")
    with as_download_error(f"could not unpack {archive} into {folder}", folder.parent,
                           f"delete {archive} to download it again"):
        if folder.exists():
            return folder
        with locked(folder.parent):
            if folder.exists():                # another process unpacked it while this one waited for the lock
                return folder
            say(f"unpacking {archive} into {folder}")
            shutil.rmtree(part, ignore_errors=True)  # left over from a process that was killed
            try:
                _unpack(archive, part, wanted)
                os.replace(part, folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return folder


def _unpack(archive, folder, wanted):
    if not hasattr(tarfile, "data_filter"):
        raise PermanentError(f"Python {sys.version.split()[0]} cannot unpack safely: use 3.10.12, 3.11.4 or 3.12")
    folder.mkdir()
    missing = set(wanted or ())
    with as_tar_error(), tarfile.open(archive) as tar:
        for member in tar:
            check_size(member)
            if wanted is not None and member.name not in missing:
                continue
            missing.discard(member.name)
            # The filter rejects paths outside the folder. Two more things are rejected here: absolute paths, which the
            # filter would turn into relative ones, and links, which no data set needs and which attacks use.
            if member.name.startswith(("/", "\\")) or not (member.isfile() or member.isdir()):
                raise PermanentError(f"its member {member.name!r} is absolute, or neither a file nor a folder")
            tar.extract(member, folder, filter="data")
        # An archive ends with two blocks of zeros. tarfile stops at the first one, but also, silently, at a damaged or
        # truncated header: so check both. Reading up to the end makes gzip compare its checksum.
        tar.fileobj.seek(tar.fileobj.tell() - tarfile.BLOCKSIZE)
        if tar.fileobj.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
            raise PermanentError("the archive is truncated or damaged")
        while tar.fileobj.read(BLOCK):
            pass
    if missing:
        raise PermanentError(f"it has no member {', '.join(sorted(missing))}")


def check_size(member):
    """Raises PermanentError for a negative size, after which some versions of tarfile read the same header for ever."""
    if member.size < 0:
        raise PermanentError("the archive is truncated or damaged")


@contextmanager
def as_tar_error():
    """Damaged headers make tarfile raise ValueError, TypeError and others. Turns them into tarfile.ReadError."""
    try:
        yield
    except (ValueError, TypeError, LookupError, ArithmeticError, MemoryError, RecursionError) as error:
        raise tarfile.ReadError(f"{type(error).__name__}: {error}") from None
