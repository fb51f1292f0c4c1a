"""Reads integer arrays with values 0 ... 255 from .npz files as uint8, without pickle and in pieces.

The images of a full Relational Games file take 7.8 GB in 64 bits, as they are stored, and 1 GB as bytes.
"""
import zipfile
import zlib
from contextlib import contextmanager

import numpy as np


def read(path, *names):
    """-> {name: array, or None if the file has no array of that name}. Raises ValueError, one line, for a bad file."""
    with opened(path) as archive:
        members = archive.namelist()
        return {name: read_array(archive, name) if f"{name}.npy" in members else None for name in names}


def fingerprint(path):
    """-> {array: its CRC-32}, as stored in the archive: identifies a file without reading its arrays."""
    with opened(path) as archive:
        return {member.filename: member.CRC for member in archive.infolist()}


@contextmanager
def opened(path):
    """The open archive. Errors inside become a ValueError of one line."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except FileNotFoundError:
        raise ValueError(f"no file {path}") from None
    # what zipfile, zlib and NumPy raise for a damaged file; RuntimeError: encrypted, or an unknown compression
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} is truncated, damaged or not a file of this kind: {error}") from None


def read_array(archive, name):
    """One array of an open archive, as uint8 in its stored shape. Raises ValueError for values outside 0 ... 255."""
    with archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in header:
            raise ValueError(f"{name} has version {version} of NumPy's format")
        shape, fortran_order, dtype = header[version](file)
        if dtype.kind not in "iub" or fortran_order or not shape:
            raise ValueError(f"{name} holds {dtype} {shape}, not integers in row-major order")
        if not shape[0]:
            raise ValueError(f"{name} is empty")
        width = int(np.prod(shape[1:]))
        rows = np.empty((shape[0], width), np.uint8)
        for piece in np.array_split(rows, -(-len(rows) // 1000)):      # views of at most 1000 rows
            values = np.frombuffer(file.read(len(piece) * width * dtype.itemsize), dtype).reshape(len(piece), width)
            if values.min() < 0 or values.max() > 255:
                raise ValueError(f"{name} holds {values.min()} ... {values.max()}, not 0 ... 255")
            piece[:] = values
        if file.read(1):                                               # reading up to the end compares the CRC
            raise ValueError(f"{name} is longer than its header says")
        return rows.reshape(shape)
