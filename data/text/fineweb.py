"""FineWeb-Edu (Penedo et al., 2024): ten billion tokens of educational web pages, published as tokens of GPT-2.

There are 99 shards for training and one for validation, each with 100 million tokens in 200 MB. A shard is a header of
256 int32 (a magic number, a version, the number of tokens, then zeros) and the tokens as uint16. Each document begins
with token 50256.
"""
import hashlib
from pathlib import Path

import numpy as np

from data.download import HUB, DownloadError, download

URL = f"{HUB}/datasets/kjj0/finewebedu10B-gpt2/resolve/main"
N_SHARDS = 99
MAGIC, VERSION, HEADER = 20240520, 1, 256 * 4                          # HEADER: length in bytes


def is_fineweb(data):
    """Whether --data is "fineweb" or a folder with shards of it."""
    return data == "fineweb" or any(Path(data).expanduser().glob("*train*.bin"))


def find(data, data_dir, n_shards=None):
    """-> a name, and the paths of the validation shard and of n_shards training shards (None: all of them).

    data: "fineweb", whose missing shards are downloaded, or a folder with *val*.bin and *train*.bin.
    Raises ValueError or DownloadError, one line.
    """
    if data != "fineweb":
        folder = Path(data).expanduser()
        val, train = (sorted(folder.glob(pattern)) for pattern in ("*val*.bin", "*train*.bin"))
        if len(val) != 1 or len(train) < (n_shards or 1):
            raise ValueError(f"{folder} has {len(val)} shards *val*.bin and {len(train)} shards *train*.bin, but needs "
                             f"one shard *val*.bin and {n_shards or 'at least one'} *train*.bin")
        return folder.name, val + train[:n_shards]
    n_shards = n_shards or N_SHARDS
    if n_shards > N_SHARDS:
        raise ValueError(f"n_shards={n_shards}: there are {N_SHARDS}")
    names = ["finewebedu_val_000000.bin", *(f"finewebedu_train_{i:06}.bin" for i in range(1, n_shards + 1))]
    try:
        return data, [download(f"{URL}/{name}", Path(data_dir) / "fineweb" / name, check=read) for name in names]
    except DownloadError as error:
        raise DownloadError(f"{error}; or give a folder of shards: --data=FOLDER; or fewer: --n_shards=1") from None


def read(path):
    """The tokens of a shard, uint16 (N,), memory-mapped. Raises ValueError if the file is damaged."""
    size = Path(path).stat().st_size
    header = np.fromfile(path, "<i4", 3)
    if size < HEADER or header[0] != MAGIC or header[1] != VERSION:
        raise ValueError(f"{path} is not a shard of GPT-2 tokens: it does not begin with {MAGIC}, {VERSION}")
    needed = HEADER + 2 * int(header[2])
    if size != needed:
        raise ValueError(f"{path} is truncated: {header[2]:,} tokens need {needed:,} bytes, not {size:,}")
    return np.memmap(path, "<u2", "r", HEADER)


def identity(paths):
    """A checksum of names, lengths and the first megabyte of each shard: hashing all 20 GB would take too long."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + file.read(10 ** 6))
    return digest.hexdigest()
