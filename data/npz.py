"""Arrays of whole numbers 0 ... 255 out of .npz files, as uint8: without pickles, and piece by piece.

The images of a full Relational Games file take 7.8 GB as they are stored, in 64 bits, and 1 GB as bytes.
"""
import zipfile
import zlib
from contextlib import contextmanager

import numpy as np


def read(path, *names):
    """{name: array, None if the file has none of that name}. Raises ValueError in one line for anything unexpected."""
    with opened(path) as archive:
        there = archive.namelist()
        return {name: read_array(archive, name) if f"{name}.npy" in there else None for name in names}


def fingerprint(path):
    """{array: its checksum}, as the archive has them: tells files apart without reading them."""
    with opened(path) as archive:
        return {member.filename: member.CRC for member in archive.infolist()}


@contextmanager
def opened(path):
    """The archive; whatever goes wrong with it becomes a ValueError of one line."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except FileNotFoundError:
        raise ValueError(f"no file {path}") from None
    # whatever zipfile, zlib and NumPy say of a damaged file; RuntimeError: encrypted, or of an unknown compression
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} is cut, damaged or of another kind: {error}") from None


def read_array(archive, name):
    """One array of an open archive: uint8, of the shape it was stored in. ValueError for what is not 0 ... 255."""
    with archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in header:
            raise ValueError(f"{name} has version {version} of NumPy's format")
        shape, fortran, dtype = header[version](file)
        if dtype.kind not in "iub" or fortran or not shape:
            raise ValueError(f"{name} holds {dtype} {shape}, not whole numbers row by row")
        if not shape[0]:
            raise ValueError(f"{name} holds nothing")
        width = int(np.prod(shape[1:]))
        rows = np.empty((shape[0], width), np.uint8)
        for piece in np.array_split(rows, -(-len(rows) // 1000)):      # views of at most 1000 rows
            values = np.frombuffer(file.read(len(piece) * width * dtype.itemsize), dtype).reshape(len(piece), width)
            if values.min() < 0 or values.max() > 255:
                raise ValueError(f"{name} holds {values.min()} ... {values.max()}, not 0 ... 255")
            piece[:] = values
        if file.read(1):                                               # reading to the end compares the checksum
            raise ValueError(f"{name} is longer than it says")
        return rows.reshape(shape)
