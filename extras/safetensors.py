"""Reads .safetensors files, which hold named tensors: 8 bytes with the header's length, the header (JSON), the tensors.

    entries = read_header("model.safetensors")               # {name: Entry}, after every offset has been checked
    tensor = entries["layers.norm.weight"].read("model.safetensors")

Nothing in such a file is trusted: anything invalid raises a ValueError of one line before much memory is allocated.
"""
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LONGEST = 10 ** 6                                                    # bytes of JSON; 24 published layers have 60,000


@dataclass
class Entry:
    """One tensor of a file."""
    dtype: torch.dtype
    shape: list
    begin: int                                                       # bytes from the start of the file
    end: int

    def read(self, path):
        """The tensor. Raises ValueError if the file has been truncated since its header was read."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        with open(path, "rb") as file:
            file.seek(self.begin)
            n = file.readinto(tensor.view(-1).view(torch.uint8).numpy())
        if n < self.end - self.begin:
            raise ValueError(f"truncated while it was read: it ends before byte {self.end:,}")
        return tensor


def read_json(file, length):
    """The next `length` bytes of an open file, a JSON object. Raises ValueError for anything else or repeated names."""
    def once(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError(f"a name is given twice: {some(name for name, _ in pairs)}")
        return dict(pairs)

    if length > LONGEST:
        raise ValueError(f"{length:,} bytes of JSON, more than {LONGEST:,}")
    try:
        value = json.loads(file.read(length).decode(), object_pairs_hook=once)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if type(value) is not dict:
        raise ValueError("not a JSON object")
    return value


def read_header(path):
    """{name: Entry} of a safetensors file. Raises ValueError unless its tensors fill it without a gap or overlap."""
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= size - 8:
            raise ValueError(f"truncated or not a safetensors file: a header of {length:,} bytes in a file of {size:,}")
        try:
            header = read_json(file, length)
        except ValueError as error:
            raise ValueError(f"the header is damaged: {error}") from None
    notes, start = header.pop("__metadata__", {}), 8 + length
    if type(notes) is not dict or not all(type(note) is str for note in notes.values()):
        raise ValueError("the header is damaged: its __metadata__ must be strings")
    entries = {name: read_entry(name, entry, start, size) for name, entry in header.items()}
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != start:
            raise ValueError(f"{brief(name)} {'overlaps with' if entry.begin < start else 'leaves a gap after'} the "
                             f"tensor before it: it begins at byte {entry.begin:,}, not {start:,}")
        start = entry.end
    if start != size:
        raise ValueError(f"it has {size:,} bytes, but its tensors end at {start:,}")
    return entries


def read_entry(name, entry, start, size):
    """The Entry of one tensor. Raises ValueError unless its bytes lie within the file and fit its shape."""
    if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{brief(name)} must have dtype, shape and data_offsets, not {brief(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPES:
        raise ValueError(f"{brief(name)} has dtype {brief(dtype)}; known: {', '.join(DTYPES)}")
    # bounded, because the product of arbitrarily large numbers could take hours
    if type(shape) is not list or len(shape) > 8 or not all(type(n) is int and 0 <= n <= size for n in shape):
        raise ValueError(f"{brief(name)} has shape {brief(shape)}, which is impossible")
    if type(offsets) is not list or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        raise ValueError(f"{brief(name)} has data_offsets {brief(offsets)}: they must be two integers")
    begin, end = (start + offset for offset in offsets)
    if not start <= begin <= end <= size:
        raise ValueError(f"{brief(name)} has data_offsets {brief(offsets)}, outside the {size - start:,} bytes there")
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != needed:
        raise ValueError(f"{brief(name)} has {end - begin:,} bytes, but {dtype} {brief(shape)} needs {needed:,}")
    return Entry(DTYPES[dtype], shape, begin, end)


def brief(x):
    """repr(x), on one line and at most 100 characters long."""
    text = repr(x)
    return text if len(text) <= 100 else text[:97] + "..."


def some(names):
    """The first four names, and how many there are besides."""
    names = list(names)
    return ", ".join(map(brief, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
