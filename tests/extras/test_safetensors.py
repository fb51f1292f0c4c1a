"""Reading safetensors files: other dtypes and orders, and truncated, damaged or malicious files."""
import json
import math
import random
import resource
import tracemalloc

import pytest
import torch
from test_download import server  # noqa: F401 (a fixture, as are folder and hub)
from test_pretrained import (DAT, NAME, Weights, assert_rejected, close, folder, hub, layout, packed,  # noqa: F401
                             random_weights, reference)

from data.download import DownloadError
from extras.pretrained import load_pretrained
from extras.safetensors import read_header


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_tensors_load_in_any_dtype_and_order_without_alignment(folder, dtype):  # noqa: F811
    weights = {name: w.to(dtype if i % 3 else torch.float32) for i, (name, w) in enumerate(random_weights(DAT).items())}
    header, body = layout(weights)
    text = json.dumps(dict(reversed(header.items()))).encode()
    for spaces in range(3):
        (folder / "model.safetensors").write_bytes(packed(text + b" " * spaces, body))
        idx = torch.arange(9)
        with torch.no_grad():
            close(load_pretrained(folder)(idx[None])[0][0], reference(DAT, Weights(weights), idx).float(), 3e-6)


def test_scalars_empty_tensors_and_empty_files_are_valid(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"none": torch.ones(0, 3), "scalar": torch.tensor(5.0), "last": torch.arange(4).view(2, 2).bfloat16()}
    path.write_bytes(packed(*layout(tensors)))
    entries = read_header(path)
    assert list(entries) == list(tensors)
    for name, tensor in tensors.items():
        got = entries[name].read(path)
        assert got.dtype == tensor.dtype and got.shape == tensor.shape and torch.equal(got, tensor)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="truncated while it was read"):
        entries["last"].read(path)
    path.write_bytes(packed({}, b""))
    assert read_header(path) == {}


A, B = (dict(dtype="F32", shape=[2], data_offsets=[start, start + 8]) for start in (0, 8))
INVALID = {                                    # {part of the message: headers of a file with 16 bytes of tensors}
    "overlaps": [{"a": A, "b": A}, {"a": A, "b": A | dict(data_offsets=[4, 12])}], "gap": [{"b": B}],
    "end at": [{"a": A}, {}], "outside": [
        {"a": A, "b": B | dict(data_offsets=[8, 24], shape=[4])}, {"a": A | dict(data_offsets=[0, 2 ** 63])},
        {"a": A | dict(data_offsets=[-8, 0])}, {"a": A | dict(data_offsets=[8, 0])}],
    "which is impossible": [{"a": A | dict(shape=shape)} for shape in (
        [-1, -2], [2.0], [2, True], 2, "2", None, [2 ** 61], [2 ** 32, 2 ** 32], [2 ** 31 + 1] * 2, [1] * 10 ** 5,
        [0, 2 ** 70], [[2]], [10 ** 4000] * 8, [math.nan], [math.inf])],
    "needs 12": [{"a": A | dict(shape=[3])}], "needs 4": [{"a": A | dict(shape=[1])}],
    "two integers": [{"a": A | dict(data_offsets=offsets)} for offsets in (
        [math.nan, 8], [0, math.inf], [0, 8, 8], [0], None, 8, ["0", "8"], [0.0, 8.0], [False, 8], {"0": 8})],
    "dtype": [{"a": A | dict(dtype=dtype)} for dtype in ("I64", "f32", "", None, ["F32"], {}, 4)],
    "must have": [{"a": dict(dtype="F32")}, {"a": A | dict(x=1)}, {"a": 7}, {"a": None}, {"a": []}],
    "object": [b"[1, 2]", b"7", b"null", b"NaN"], "__metadata__": [{"__metadata__": []}, {"__metadata__": {"a": 1}}],
    "twice": [json.dumps({"a": A, "b": B}).replace('"b"', '"a"').encode(), b'{"a": {"dtype": "F32", "dtype": "F32"}}'],
    "utf-8": [b'{"\xff": 1}', '{"a": 1}'.encode("utf-16")], "too deeply": [b'{"a": ' + b"[" * 50_000],
    "1,000,001 bytes": [b" " * (10 ** 6 + 1)],
    "damaged": [b"{", b" ", b'{"a": ' + b"9" * 50_000 + b"}", b'{"a": 1}{', b"\xef\xbb\xbf{}"],
    "a\\na\\n": [{"a\n" * 10 ** 4: 7}], "header of 0": [b""]}


@pytest.mark.parametrize("words", INVALID)
def test_an_invalid_header_is_rejected_without_allocating_much_memory(folder, words):  # noqa: F811
    for header in INVALID[words]:
        (folder / "model.safetensors").write_bytes(packed(header, bytes(16)))
        tracemalloc.start()
        assert_rejected(folder, "model.safetensors: ", words)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1e7


def test_a_file_truncated_anywhere_or_too_long_is_rejected(folder):  # noqa: F811
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for keep in [*range(10), 100, header - 1, header, header + 1, len(whole) // 2, len(whole) - 4, len(whole) - 1]:
        path.write_bytes(whole[:keep])
        assert_rejected(folder, "model.safetensors: ", "header" if keep < header else "outside")
    path.write_bytes(whole + b"\0")
    assert_rejected(folder, "end at")
    for length in (2 ** 63, 2 ** 64 - 1, 10 ** 8, len(whole)):
        path.write_bytes(length.to_bytes(8, "little") + whole[8:])
        assert_rejected(folder, f"{length:,} bytes")


def test_a_flipped_bit_in_the_header_is_harmless_or_a_value_error(folder):  # noqa: F811
    """Harmless only in the metadata or a space; and no large tensor is allocated on the way."""
    path, rng = folder / "model.safetensors", random.Random(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss                    # kB
    whole, expected, harmless = path.read_bytes(), random_weights(DAT)["layers.final_out.weight"], 0
    header = 8 + int.from_bytes(whole[:8], "little")
    for i in range(400):
        damaged, place = bytearray(whole), rng.randrange(header) if i >= 64 else i // 8
        damaged[place] ^= 1 << (i % 8 if i < 64 else rng.randrange(8))
        path.write_bytes(damaged)
        try:
            assert torch.equal(load_pretrained(folder).embedding.weight, expected)
            harmless += 1
        except ValueError as error:
            assert "\n" not in str(error) and str(path) in str(error)
    assert harmless < 40 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


@pytest.mark.parametrize("cut", [0, 5, 3000, -1])
def test_a_truncated_download_is_never_kept(hub, folder, cut):  # noqa: F811
    """The server reports the truncated size as the full one, so only the file's own header shows the error."""
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:cut])
    for _ in range(2):
        with pytest.raises(DownloadError, match="not the right file"):
            load_pretrained(NAME, data_dir=hub.data)
    (folder / "model.safetensors").write_bytes(whole)
    load_pretrained(NAME, data_dir=hub.data)


def test_a_damaged_config_is_rejected(folder):  # noqa: F811
    for text, word in ((b"", "char 0"), (b"[]", "object"), (b'{"bias": true, "bias": false}', "twice"),
                       (b"\xff", "utf-8"), (b"[" * 10 ** 5, "deep"), (b" " * (10 ** 6 + 1), "1,000,001 bytes"),
                       (b"{}", "vocab_size is missing"), (b"Not Found", "char 0")):
        (folder / "config.json").write_bytes(text)
        assert_rejected(folder, "config.json: ", word)
