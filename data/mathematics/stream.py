"""Read a few files out of a large archive while it is downloaded, without storing the archive.

    stream_members(url, {"mathematics_dataset-v1.0/train-easy/algebra__linear_1d.txt": "data/cache/linear_1d.txt"},
                   size=2_333_082_954, sha256="def63834...")

A .tar.gz has no table of contents and can only be read from the start, so all of it must be downloaded. If a connection
breaks after 2 GB, the next one continues at that byte; the decompressor waits in read() meanwhile. The checksum can be
compared only at the last byte: until then the extracted files are called `<name>.part`.
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

from data.download import (BLOCK, PermanentError, Retries, TemporaryError, as_download_error, body_blocks,
                           check_headers, request, say)
from data.extract import as_tar_error, check_size
from toolbox.files import locked


def stream_members(url, wanted, *, size, sha256, retries=5, backoff=1.0, timeout=30.0) -> None:
    """Reads the .tar.gz at `url` once from start to end and stores those of the `wanted` members that do not exist yet.

    wanted    {name of a member, exactly as in the archive: path of the file to write}
    size      length of the archive in bytes
    sha256    its checksum in hex
    retries, backoff, timeout: as in data.download.download

    Raises DownloadError if the archive, a wanted member (which must be a regular file), the connection or the disk
    fails. After an error or Ctrl-C none of the new files exists, complete or partial.
    """
    wanted = {name: Path(path) for name, path in wanted.items()}
    # One lock per folder, always taken in the same order: otherwise two processes could deadlock.
    folders = sorted({path.parent.resolve() for path in wanted.values()})
    with as_download_error(f"could not read {_listed(wanted)} from {url}", Path(os.path.commonpath(folders or ["."])),
                           "download and unpack it by hand and pass its folder with --data=FOLDER"):
        if all(path.exists() for path in wanted.values()):
            return
        with ExitStack() as locks:
            for folder in folders:
                locks.enter_context(locked(folder))
            missing = {name: path for name, path in wanted.items() if not path.exists()}
            if missing:                        # else another process stored them while this one waited for the locks
                archive = url.rsplit("/", 1)[-1]
                blocks = _download_blocks(url, size, Retries(archive, 0, retries, backoff), timeout)
                _store(missing, blocks, archive, size, sha256)


def _listed(names, at_most=4):
    """The first names and the number of the others: "a, b, c, d and 3 more"."""
    names = list(names)
    return ", ".join(names[:at_most]) + (f" and {len(names) - at_most} more" if len(names) > at_most else "")


def _store(wanted, blocks, archive, size, sha256):
    """Stores all `wanted` members of the archive, given as `blocks` of bytes; none of them if anything fails."""
    if not sys.stderr.isatty():                # on a terminal there is a progress bar instead
        say(f"reading {archive} ({size / 1e9:.3g} GB), storing only {_listed(wanted)}")
    parts = {name: path.with_name(path.name + ".part") for name, path in wanted.items()}
    renamed = []
    try:
        with closing(blocks), tqdm(total=size, desc=archive, unit="B", unit_scale=True, disable=None) as bar:
            _copy(_Reader(blocks, bar), parts, sha256)
        for name, path in wanted.items():
            os.replace(parts[name], path)
            renamed.append(path)
    except BaseException:                      # KeyboardInterrupt, too
        for path in (*parts.values(), *renamed):
            path.unlink(missing_ok=True)
        raise


class _Reader:
    """The blocks as a file object for tarfile: counts, displays and hashes what is read."""

    def __init__(self, blocks, bar):
        self.blocks, self.bar, self.digest = blocks, bar, hashlib.sha256()

    def read(self, at_most=BLOCK):             # tarfile passes BLOCK (bufsize below); no block is longer
        block = next(self.blocks, b"")
        self.digest.update(block)
        self.bar.update(len(block))
        return block


def _copy(reader, parts, sha256):
    """Copies the members {name: path} in `parts`. Raises PermanentError if one is missing or the SHA-256 differs."""
    missing = set(parts)
    reader.bar.set_postfix_str(f"0 of {len(parts)} files found")
    with as_tar_error(), tarfile.open(fileobj=reader, mode="r|gz", bufsize=BLOCK) as tar:
        for member in tar:
            check_size(member)
            if member.name not in missing:
                continue
            if not member.isfile():
                raise PermanentError(f"its member {member.name} is not a regular file")
            with open(parts[member.name], "wb") as file:
                shutil.copyfileobj(tar.extractfile(member), file)
            missing.remove(member.name)
            reader.bar.set_postfix_str(f"{len(parts) - len(missing)} of {len(parts)} files found")
    while reader.read():                       # tarfile stops at the end of the archive; bytes after it count, too
        pass
    if reader.digest.hexdigest() != sha256.lower():
        raise PermanentError(f"this is not the right archive: its SHA-256 is {reader.digest.hexdigest()}, not {sha256}")
    if missing:
        raise PermanentError(f"it has no member {_listed(sorted(missing))}")


def _download_blocks(url, size, attempts, timeout):
    """Yields the bytes of the file in blocks, each byte once and in order, over as many connections as necessary."""
    received, since = 0, time.time()
    while received < size:
        try:
            with request(url, received, since, timeout) as response:
                if received and response.status_code in (412, 416):
                    # Bytes already decompressed cannot be taken back, and a changed file has another checksum anyway.
                    raise PermanentError(f"the server's file ended or was replaced after {received:,} bytes were read")
                position, _ = check_headers(response, received, size)
                for block in body_blocks(response, position):
                    new = block[max(received - position, 0):]  # a server without ranges sends everything again
                    position += len(block)
                    received += len(new)
                    if received > size:
                        raise PermanentError(f"the server's file has more than {size:,} bytes")
                    if new:
                        yield new
            if received < size:
                raise TemporaryError(f"received {received:,} of {size:,} bytes")
        except TemporaryError as error:
            attempts.wait(error, received)
