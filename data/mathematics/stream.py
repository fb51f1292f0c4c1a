"""A few files out of an archive that is too large to keep: it is read through as it arrives, and only they are stored.

    stream_members(url, {"mathematics_dataset-v1.0/train-easy/algebra__linear_1d.txt": "data/cache/linear_1d.txt"},
                   size=2_333_082_954, sha256="def63834...")

A .tar.gz has no table of contents and cannot be entered in the middle, so all of it must come, but not stay. Should a
connection break after two of its gigabytes, the next one brings the rest, and the decompressor, which waits in read()
meanwhile, does not notice. Its checksum is known at its last byte only: until then the files are called `<name>.part`.
"""
import hashlib
import os
import shutil
import sys
import tarfile
import time
from contextlib import ExitStack, closing
from pathlib import Path

from tqdm import tqdm

from data.download import (CHUNK, Patience, Refused, TryAgain, blocks_of, damage_named, explained, locked, promise,
                           request, say)


def stream_members(url, wanted, *, size, sha256, retries=5, backoff=1.0, timeout=30.0) -> None:
    """Reads the .tar.gz at `url` once from end to end and stores the `wanted` members that are not there already.

    wanted    {name of a member, exactly as the archive has it: path of the file that its content goes to}
    size      length of the archive in bytes
    sha256    its checksum in hex
    retries, backoff, timeout: as in download()

    Raises DownloadError if anything is wrong with the archive, a wanted member (which must be a plain file), the
    connection or the disk. Then, and after Ctrl-C, none of the files that were to come is there, whole or in part.
    """
    wanted = {name: Path(path) for name, path in wanted.items()}
    # Every folder has its lock; all who want several take them in the same order, or each would wait for the other.
    folders = sorted({path.parent.resolve() for path in wanted.values()})
    with explained(f"could not read {_listed(wanted)} out of {url}", Path(os.path.commonpath(folders or ["."])),
                   "fetch it by hand, unpack it, and give its folder with --data=FOLDER"):
        if all(path.exists() for path in wanted.values()):
            return
        with ExitStack() as locks:
            for folder in folders:
                locks.enter_context(locked(folder))
            lacking = {name: path for name, path in wanted.items() if not path.exists()}
            if lacking:                        # else all were fetched by a process we waited for
                archive = url.rsplit("/", 1)[-1]
                patience = Patience(archive, 0, retries, backoff)
                _store(lacking, _arriving(url, size, patience, timeout), archive, size, sha256)


def _listed(names, at_most=4):
    """The first names and how many more: "a, b, c, d and 3 more"."""
    names = list(names)
    return ", ".join(names[:at_most]) + (f" and {len(names) - at_most} more" if len(names) > at_most else "")


def _store(wanted, blocks, archive, size, sha256):
    """All of `wanted` out of the archive that comes in `blocks`; nothing if anything goes wrong."""
    if not sys.stderr.isatty():                # on a terminal the bar says it
        say(f"reading through {archive} ({size / 1e9:.3g} GB) and keeping only {_listed(wanted)}")
    parts = {name: path.with_name(path.name + ".part") for name, path in wanted.items()}
    renamed = []
    try:
        with closing(blocks), tqdm(total=size, desc=archive, unit="B", unit_scale=True, disable=None) as bar:
            _copy(_Source(blocks, bar), parts, sha256)
        for name, path in wanted.items():
            os.replace(parts[name], path)
            renamed.append(path)
    except BaseException:                      # KeyboardInterrupt, too
        for path in (*parts.values(), *renamed):
            path.unlink(missing_ok=True)
        raise


class _Source:
    """The archive as a file that can only be read onwards: what tarfile reads is counted, shown and hashed."""

    def __init__(self, blocks, bar):
        self.blocks, self.bar, self.digest = blocks, bar, hashlib.sha256()

    def read(self, at_most=CHUNK):             # always CHUNK, and no block is longer
        block = next(self.blocks, b"")
        self.digest.update(block)
        self.bar.update(len(block))
        return block


def _copy(source, parts, sha256):
    """The members named in `parts` into its files; raises Refused unless all were there, and the checksum is right."""
    missing = set(parts)
    source.bar.set_postfix_str(f"0 of {len(parts)} files found")
    with damage_named(), tarfile.open(fileobj=source, mode="r|gz", bufsize=CHUNK) as tar:
        for member in tar:
            if member.size < 0:                # tarfile would go back and read the same for ever
                raise Refused("the archive is cut or damaged")
            if member.name not in missing:
                continue
            if not member.isfile():
                raise Refused(f"its member {member.name} is not a plain file")
            with open(parts[member.name], "wb") as file:
                shutil.copyfileobj(tar.extractfile(member), file)
            missing.remove(member.name)
            source.bar.set_postfix_str(f"{len(parts) - len(missing)} of {len(parts)} files found")
    while source.read():                       # tarfile stops where the archive says it ends; the file may go on
        pass
    if source.digest.hexdigest() != sha256.lower():
        raise Refused(f"what came is not the right archive: its SHA-256 is {source.digest.hexdigest()}, not {sha256}")
    if missing:
        raise Refused(f"it has no member {_listed(sorted(missing))}")


def _arriving(url, size, patience, timeout):
    """The file's bytes in blocks, each byte once and in order, over as many connections as it takes."""
    have, since = 0, time.time()
    while have < size:
        try:
            with request(url, have, since, timeout) as response:
                if have and response.status_code in (412, 416):
                    # What was read cannot be given back, and a file that changed would have another checksum anyway.
                    raise Refused(f"the server's file ended, or was replaced, while it was read: after {have:,} bytes")
                position, _ = promise(response, have, size)
                for block in blocks_of(response, position):
                    fresh = block[max(have - position, 0):]  # a server without ranges sends all from the start again
                    position += len(block)
                    have += len(fresh)
                    if have > size:
                        raise Refused(f"the server's file has more than {size:,} bytes")
                    if fresh:
                        yield fresh
            if have < size:
                raise TryAgain(f"{have:,} of {size:,} bytes came")
        except TryAgain as fault:
            patience.pause(fault, have)
