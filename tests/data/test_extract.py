"""extract(): truncated, damaged and malicious archives are errors of one line and leave nothing behind."""
import gzip
import io
import random
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from data.download import DownloadError
from data.extract import extract

BODY = random.Random(0).randbytes(300_000)
ROOT = Path(__file__).parents[2]


def make_tar(path, members, mode="w:gz"):
    """members: {name: bytes} for files, {name: dict(type, linkname)} for anything else."""
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, dict):
                info.type, info.linkname = content["type"], content.get("linkname", "")
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


GOOD = {"set/a.txt": b"first" * 1000, "set/deep/b.bin": BODY, "set/empty": b""}


def error_of(archive, folder, **options):
    """Expects a DownloadError: one line that names archive and folder; no new file. Returns the line."""
    before = set(folder.parent.rglob("*")) | {folder.parent / ".lock"}
    with pytest.raises(DownloadError) as error:
        extract(archive, folder, **options)
    line = str(error.value)
    assert "\n" not in line and str(archive) in line and str(folder) in line and "--data_dir" in line
    assert set(folder.parent.rglob("*")) <= before
    return line


@pytest.mark.parametrize("mode", ["w:gz", "w"])
def test_all_members_are_unpacked_and_an_existing_folder_is_not_changed(tmp_path, mode):
    archive = make_tar(tmp_path / "set.tar", GOOD, mode)
    leftover = tmp_path / "out.part" / "half"  # left over from a killed process
    leftover.mkdir(parents=True)
    assert extract(archive, tmp_path / "out") == tmp_path / "out"
    unpacked = {file.relative_to(tmp_path / "out").as_posix(): file.read_bytes()
                for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert unpacked == GOOD and not (tmp_path / "out.part").exists() and not (tmp_path / "out" / "half").exists()
    archive.unlink()
    (tmp_path / ".lock").unlink()
    assert extract(archive, tmp_path / "out") == tmp_path / "out"  # no archive needed, nothing written
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_only_the_wanted_members_are_unpacked(tmp_path):
    archive = make_tar(tmp_path / "set.tar.gz", GOOD)
    extract(archive, tmp_path / "out", wanted=["set/a.txt"])
    assert [file.name for file in (tmp_path / "out").rglob("*") if file.is_file()] == ["a.txt"]
    assert "set/c.txt" in error_of(archive, tmp_path / "other", wanted=["set/a.txt", "set/c.txt"])


MALICIOUS = {
    "traversal": {"../outside.txt": b"gotcha"},
    "deep traversal": {"set/../../outside.txt": b"gotcha"},
    "absolute": {"ABSOLUTE": b"gotcha"},
    "symlink outside": {"set/link": {"type": tarfile.SYMTYPE, "linkname": "../../outside"},
                        "set/link/outside.txt": b"gotcha"},
    "absolute symlink": {"set/link": {"type": tarfile.SYMTYPE, "linkname": "/etc"}},
    "hard link outside": {"set/link": {"type": tarfile.LNKTYPE, "linkname": "../secret.txt"}},
    "any link": {"set/link": {"type": tarfile.SYMTYPE, "linkname": "a.txt"}},
    "device": {"set/pipe": {"type": tarfile.FIFOTYPE}},
}


@pytest.mark.parametrize("name", MALICIOUS)
def test_a_malicious_member_is_an_error(tmp_path, name):
    absolute = str(tmp_path / "outside.txt")
    members = {"set/a.txt": b"fine"} | {key.replace("ABSOLUTE", absolute): v for key, v in MALICIOUS[name].items()}
    (tmp_path / "outside").mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    archive = make_tar(tmp_path / "malicious.tar.gz", members)
    error_of(archive, tmp_path / "out")
    assert list((tmp_path / "outside").iterdir()) == []


@pytest.mark.parametrize("mode, keep", [("w:gz", 0.0), ("w:gz", 0.01), ("w:gz", 0.5), ("w:gz", "checksum"),
                                        ("w", 0.0), ("w", 0.01), ("w", 0.5), ("w", "header")])
def test_a_truncated_archive_is_an_error(tmp_path, mode, keep):
    archive = make_tar(tmp_path / "set.tar", GOOD, mode)
    whole = archive.read_bytes()
    cuts = {"checksum": len(whole) - 4,        # only the last bytes of gzip's trailer are missing
            "header": 11 * tarfile.BLOCKSIZE}  # exactly before a header: after a.txt's header and its ten blocks
    archive.write_bytes(whole[:cuts[keep] if keep in cuts else int(keep * len(whole))])
    error_of(archive, tmp_path / "out")


@pytest.mark.parametrize("packed", [bytes, gzip.compress])
@pytest.mark.parametrize("name", ["set/deep/b.bin", "set/empty"])     # the last one is followed by zeros only
def test_a_damaged_header_is_an_error(tmp_path, name, packed):
    """tarfile stops there silently, as at the end of an archive."""
    archive = make_tar(tmp_path / "set.tar", GOOD, "w")
    damaged = bytearray(archive.read_bytes())
    damaged[damaged.index(name.encode())] ^= 1
    archive.write_bytes(packed(damaged))
    assert "damaged" in error_of(archive, tmp_path / "out")


def test_a_python_without_tarfiles_data_filter_is_an_error(tmp_path, monkeypatch):
    monkeypatch.delattr(tarfile, "data_filter")
    archive = make_tar(tmp_path / "set.tar.gz", GOOD)
    assert "Python" in error_of(archive, tmp_path / "out")


# Damaged headers with a correct checksum: tarfile continues, and raises many kinds of errors

FIELDS = {"name": (0, 100), "mode": (100, 8), "uid": (108, 8), "gid": (116, 8), "size": (124, 12), "mtime": (136, 12),
          "checksum": (148, 8), "type": (156, 1), "linkname": (157, 100), "magic": (257, 6), "version": (263, 2),
          "uname": (265, 32), "gname": (297, 32), "devmajor": (329, 8), "devminor": (337, 8), "prefix": (345, 155)}
NOT_FILES = b"xgLKSDV5"                        # types of members: extended headers, long names, sparse files


def set_checksum(header):
    """Writes the checksum of the 512 bytes, in which the checksum itself counts as blanks."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)


def damaged_headers(header):
    """Yields the header with each field overwritten, for NOT_FILES with a damaged size, and with each type."""
    for field, (start, length) in FIELDS.items():
        for filling in (b"\0", b"\xff", b"\x80", b"7", b"/"):      # with a meaning for tarfile; b"\x80": base 256
            for kind in NOT_FILES if field == "size" else [header[156]]:
                damaged = bytearray(header)
                damaged[156] = kind
                damaged[start:start + length] = filling * length
                if field != "checksum":
                    set_checksum(damaged)
                yield damaged
    for kind in b"\0001234567AgxLKSV\xff":
        damaged = bytearray(header)
        damaged[156] = kind
        set_checksum(damaged)
        yield damaged


@pytest.mark.parametrize("place, packed", [(0, bytes), (1, gzip.compress)])       # which member is damaged; compression
def test_a_damaged_header_gives_files_or_an_error_of_one_line(tmp_path, place, packed):
    archive, folder = tmp_path / "set.tar", tmp_path / "out"
    good = make_tar(archive, {"set/a.txt": b"12345", "set/b.txt": b"30 path=abc\n"}, "w").read_bytes()
    start = place * 2 * tarfile.BLOCKSIZE      # each member: a header and one block
    ends = []
    for header in damaged_headers(good[start:start + tarfile.BLOCKSIZE]):
        archive.write_bytes(packed(good[:start] + header + good[start + tarfile.BLOCKSIZE:]))
        try:
            extract(archive, folder)
            shutil.rmtree(folder)
            ends.append("files")
        except DownloadError as error:
            assert "\n" not in str(error) and str(archive) in str(error) and not folder.exists()
            ends.append("line")
        assert not folder.with_name("out.part").exists()
    assert min(ends.count("files"), ends.count("line")) > 20


def member(kind, body):
    """The bytes of a member in an archive: header and blocks."""
    info = tarfile.TarInfo("set/a.txt")
    info.type, info.size = kind, len(body)
    return info.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % tarfile.BLOCKSIZE)


@pytest.mark.parametrize("before", [
    member(b"x", b"13 mtime=nan\n"), member(b"x", b"15 mtime=1e400\n"), member(b"x", b"12 path=a\0b\n"),
    member(b"x", b"21 GNU.sparse.size=x\n"), member(b"x", b"20 GNU.sparse.map=x\n"), member(b"L", b"name\0") * 1000],
    ids=["mtime not a number", "mtime infinite", "zero in name", "sparse size", "sparse map", "a thousand long names"])
def test_an_invalid_extended_header_is_an_error(tmp_path, before):
    (tmp_path / "set.tar").write_bytes(before + member(b"0", b"12345") + bytes(20 * tarfile.BLOCKSIZE))
    assert "damaged" in error_of(tmp_path / "set.tar", tmp_path / "out")


def test_a_member_of_negative_size_is_an_error_and_not_an_endless_loop(tmp_path):
    header = bytearray(member(b"0", b""))
    header[124:136] = (-tarfile.BLOCKSIZE).to_bytes(12, "big", signed=True)         # base 256, as GNU tar writes it
    set_checksum(header)
    (tmp_path / "set.tar").write_bytes(member(b"5", b"") + header + bytes(20 * tarfile.BLOCKSIZE))
    command = ("from data.extract import extract; "
               f"extract({str(tmp_path / 'set.tar')!r}, {str(tmp_path / 'out')!r}, wanted=['b'])")
    process = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    error = process.stderr.splitlines()[-1]      # some versions of tarfile raise an error of their own, others go on
    assert "DownloadError: could not unpack" in error and "damaged" in error and not (tmp_path / "out").exists()
