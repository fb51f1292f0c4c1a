"""A few files out of an archive that is not kept: whatever the connections do, all are right, or none is there.

The server and its faults are those of test_download.py. Here, its answers can also break off at any byte.
"""
import errno
import hashlib
import io
import itertools
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
from test_download import HTML, QUICK, Handler, server as plain_server, wait_until  # noqa: F401 (a fixture)
from test_extract import make_tar

import data.mathematics.stream as module
from data.download import DownloadError
from data.mathematics.stream import stream_members

NOBODY = "http://127.0.0.1:9/set.tar.gz"       # an address where nobody listens
posix = pytest.mark.skipif(os.name != "posix", reason="signals and opened files as POSIX has them")
RANDOM = random.Random(0)
MEMBERS = {"set/skip.bin": RANDOM.randbytes(50_000), "set/train/a.txt": b"first\n" * 5000, "set/empty.txt": b"",
           "set/big.bin": RANDOM.randbytes(150_000), "set/test/a.txt": b"other\n" * 5000,
           "set/rest.bin": RANDOM.randbytes(90_000)}
WANTED = ("set/train/a.txt", "set/empty.txt", "set/big.bin")


class Breaking(Handler):
    """server.lengths has one number per answer with a body: so many bytes of it come, then the connection breaks."""

    def send(self, piece, asked):
        super().send(piece[:next(self.server.lengths, None)], asked)


@pytest.fixture
def server(plain_server, tmp_path):            # noqa: F811
    plain_server.RequestHandlerClass, plain_server.lengths = Breaking, iter(())
    plain_server.modified = 1e9                # long ago
    plain_server.url = plain_server.url.replace("file.bin", "set.tar.gz")
    serve(plain_server, make_tar(tmp_path / "set.tar.gz", MEMBERS).read_bytes())
    (tmp_path / "set.tar.gz").unlink()
    return plain_server


def serve(server, body):
    """From now on the archive is this one, and what the client is told of it."""
    server.body = body
    server.facts = dict(size=len(body), sha256=hashlib.sha256(body).hexdigest())


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "files"                  # not there yet


def places(folder, names=WANTED):
    return {name: folder / name.replace("/", "_") for name in names}


def stream(server, wanted, **options):
    stream_members(server.url, wanted, **(server.facts | QUICK | options))


def there(folder):
    """name -> content of all files in the folder and below, without the lock."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"}


def expected(names=WANTED):
    return {name.replace("/", "_"): MEMBERS[name] for name in names}


def refused(server, wanted, **options):
    """Expects a DownloadError of one line that says all it must, and not one file; returns the line."""
    with pytest.raises(DownloadError) as error:
        stream(server, wanted, **options)
    line = str(error.value)
    assert "\n" not in line and server.url in line and all(name in line for name in wanted)
    assert "by hand" in line and "--data=FOLDER" in line and "--data_dir" in line
    assert not any(there(path.parent) for path in wanted.values())
    return line


# What arrives, and over how many connections

def test_only_the_wanted_members_and_no_second_request(server, folder, capsys):
    stream(server, places(folder), sha256=server.facts["sha256"].upper())
    assert there(folder) == expected()
    assert [(asked["range"], asked["encoding"]) for asked in server.requests] == [(None, "identity")]
    said = capsys.readouterr().err             # no bar where nobody watches
    assert said.count("\n") == 1 and f"{len(server.body) / 1e9:.3g} GB" in said and all(name in said for name in WANTED)
    (folder / ".lock").unlink()
    stream_members(NOBODY, places(folder), size=1, sha256="")
    assert there(folder) == expected() and not (folder / ".lock").exists()  # nothing written: it may be read-only
    stream_members(NOBODY, {}, size=1, sha256="")


def start_process(server, wanted, first=""):
    program = (f"import os, sys; from data.mathematics.stream import stream_members; {first}\n"
               f"stream_members({server.url!r}, { {name: str(path) for name, path in wanted.items()} }, "
               f"**{server.facts})")
    return subprocess.Popen([sys.executable, "-c", program], cwd=Path(module.__file__).parents[2], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            # where the tests themselves run in the background, SIGINT is ignored and inherited so
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


@posix
def test_nothing_else_is_ever_opened_for_writing(server, folder):
    hook = ("sys.addaudithook(lambda event, args: print(args[0]) "
            "if event == 'open' and args[2] & (os.O_WRONLY | os.O_RDWR) else None)")
    opened, _ = start_process(server, places(folder), hook).communicate(timeout=20)
    assert there(folder) == expected()
    assert set(opened.split()) == {str(folder / ".lock"), *(f"{path}.part" for path in places(folder).values())}


def test_only_what_is_lacking_is_stored(server, folder, capsys):
    folder.mkdir()
    (folder / "set_big.bin").write_bytes(b"put here by hand")
    stream(server, places(folder))
    assert there(folder) == expected() | {"set_big.bin": b"put here by hand"}
    assert "big.bin" not in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["", "no length", "encoded"])
@pytest.mark.parametrize("lengths", [[3, 7, 5], [100_000], [200_000, 1, 1], [65_536, 65_536], [70_000] * 3, [-4], [-1]],
                         ids=str)
def test_a_broken_connection_is_taken_up_where_it_broke(server, folder, lengths, fault):
    """Within the header of gzip (here 10 bytes and the file's name), wanted members, others, the checksum of gzip."""
    server.faults = itertools.repeat(fault)
    lengths = [length % len(server.body) for length in lengths]
    server.lengths = iter(lengths)
    stream(server, places(folder))
    assert there(folder) == expected()
    places_of_breaks = itertools.accumulate(lengths)
    assert [asked["range"] for asked in server.requests] == [None, *(f"bytes={n}-" for n in places_of_breaks)]
    assert sum(asked["sent"] for asked in server.requests) == len(server.body)  # no byte twice


def test_a_server_without_ranges_is_listened_to_from_the_start_again(server, folder):
    server.faults, server.lengths = itertools.repeat("no range"), iter([14, 100_000, 200_000])
    stream(server, places(folder))
    assert there(folder) == expected()
    assert [asked["range"] for asked in server.requests[1:]] == ["bytes=14-", "bytes=100000-", "bytes=200000-"]


@pytest.mark.parametrize("fault, words", [("no range", "broken"), ("no range no length", "100,000 of"),
                                          ("503", "503 Service Unavailable")])
def test_a_server_that_never_gets_further_ends(server, folder, fault, words):
    server.faults, server.lengths = itertools.repeat(fault), itertools.repeat(100_000)
    line = refused(server, places(folder), retries=2)
    assert words in line and "in vain: 3" in line and len(server.requests) == 3


def test_new_ground_starts_the_count_afresh(server, folder):
    server.faults = iter(["", "503", "no range", "wrong range"])  # never taken for the right one
    server.lengths = iter([50_000, 60_000])
    stream(server, places(folder), retries=2)
    assert there(folder) == expected() and len(server.requests) == 5


def test_silence_and_refused_connections(server, folder):
    server.faults = iter(["silence", "hold"])  # no answer at all, then no second half
    stream(server, places(folder), timeout=0.3)
    assert there(folder) == expected() and len(server.requests) == 3
    server.url = NOBODY
    assert "no answer" in refused(server, places(folder / "more"), retries=1)


def test_an_archive_that_is_replaced_meanwhile(server, folder):
    server.lengths, server.modified = iter([100_000]), 4e9  # younger than the bytes that came first
    assert "replaced" in refused(server, places(folder)) and len(server.requests) == 2


# What is wrong leaves nothing behind

def test_the_checksum_is_of_the_whole_archive(server, folder):
    """Behind all that is wanted, too: in the rest of the archive, in gzip's own checksum, and behind a break there."""
    wanted = places(folder, ["set/train/a.txt"])
    good, facts = server.body, server.facts
    for position in (-20_000, -1):
        server.body = good[:position] + bytes([good[position] ^ 1]) + good[position:][1:]
        line = refused(server, wanted, **facts)
        assert "SHA-256" in line and hashlib.sha256(server.body).hexdigest() in line and facts["sha256"] in line
    server.body, server.lengths, server.requests = good, iter([250_000]), []
    stream(server, wanted)
    assert sum(asked["sent"] for asked in server.requests) == len(good)
    assert there(folder) == expected(wanted)


@pytest.mark.parametrize("fault, difference, words, requests", [
    ("", -1, "bytes, not", 1), ("", 1, "bytes, not", 1),
    ("no length", -1, "has more than", 1), ("no length", 1, "ended, or was replaced", 2)])
def test_archive_of_another_size(server, folder, fault, difference, words, requests):
    server.faults = itertools.repeat(fault)
    assert words in refused(server, places(folder), size=len(server.body) + difference)
    assert len(server.requests) == requests


@pytest.mark.parametrize("keep", [1, 2, 3, 8, 15, 100, 100_000])
def test_published_archive_that_is_cut(server, folder, keep):
    """Its size and its checksum are right: tarfile must notice, and its errors are of many kinds."""
    serve(server, server.body[:keep])
    assert "cut, damaged" in refused(server, places(folder))


def test_damaged_archives_and_what_is_none(server, folder):
    facts, damaged = server.facts, bytearray(server.body)
    damaged[18] = 7                            # behind the header of gzip: a kind of block that does not exist
    server.body = bytes(damaged)
    assert "damaged" in refused(server, places(folder), **facts)
    serve(server, RANDOM.randbytes(1000))
    assert "damaged" in refused(server, places(folder))
    serve(server, HTML)
    assert "HTML" in refused(server, places(folder)) and len(server.requests) == 3


def test_missing_member(server, folder):
    line = refused(server, places(folder, [*WANTED, "set/none.txt"]))
    assert "it has no member set/none.txt;" in line and server.requests[0]["sent"] == len(server.body)
    with pytest.raises(DownloadError, match="read a, b, c, d and 3 more out of .* no member a, b, c, d and 3 more;"):
        stream(server, places(folder, "abcdefg"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_member_that_is_not_a_plain_file(server, folder, tmp_path, kind):
    members = {"set/good.txt": b"good", "set/odd": {"type": kind, "linkname": "set/good.txt"}}
    serve(server, make_tar(tmp_path / "set.tar.gz", members).read_bytes())
    assert "set/odd is not a plain file" in refused(server, places(folder, ["set/good.txt", "set/odd"]))


def test_names_are_matched_exactly_and_lead_nowhere(server, folder, tmp_path):
    outside = str(tmp_path / "outside.txt")
    names = ["./set/a", "../set/a", "/set/a", "set/a.part", "set//a", "SET/a", "a", "set/a/b", outside, "../out.txt"]
    archive = make_tar(tmp_path / "set.tar.gz", {name: b"no" for name in names} | {"set/a": b"yes", "../x": b"found"})
    serve(server, archive.read_bytes())
    stream(server, {"set/a": folder / "a", "../x": folder / "x"})
    assert there(folder) == {"a": b"yes", "x": b"found"}
    assert set(tmp_path.iterdir()) == {folder, archive}


@pytest.mark.parametrize("before", [[], [100_000]])
@pytest.mark.parametrize("fault, words", [("404", "answered 404"), ("403", "answered 403"), ("html by type", "HTML")])
def test_answers_that_are_final(server, folder, fault, words, before):
    server.faults, server.lengths = iter([*("" for _ in before), fault]), iter(before)
    assert words in refused(server, places(folder)) and len(server.requests) == 1 + len(before)


def test_disk_full(server, folder, monkeypatch):
    def full(source, file):
        file.write(source.read(1000))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.shutil, "copyfileobj", full)
    line = refused(server, places(folder))
    assert "full" in line and "MB free" in line


@pytest.mark.parametrize("error", [KeyboardInterrupt, PermissionError])
def test_renaming_that_fails_halfway(server, folder, monkeypatch, error):
    replace = os.replace

    def fails(source, target):
        if Path(target).name == "set_big.bin":
            raise error("not now")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else DownloadError, match="not now"):
        stream(server, places(folder))
    assert there(folder) == {}


# Interrupted, killed, and two at once

@posix
@pytest.mark.parametrize("how", ["SIGINT", "SIGKILL"])
def test_interrupted_and_killed(server, folder, how):
    """In a process of its own, while the server holds back what follows: what has come is in the .part already."""
    server.faults = iter(["hold"])
    process = start_process(server, places(folder))
    wait_until(lambda: (folder / "set_train_a.txt.part").exists() and (folder / "set_big.bin.part").exists())
    assert not any(path.exists() for path in places(folder).values())
    (folder / "set_empty.txt").write_bytes(b"")  # put here by hand meanwhile: it stays
    process.send_signal(getattr(signal, how))
    error = process.communicate(timeout=20)[1]
    assert ("KeyboardInterrupt" in error) == (how == "SIGINT")
    parts = {f"{name}.part" for name in expected()} if how == "SIGKILL" else set()
    assert set(there(folder)) == {"set_empty.txt"} | parts
    server.faults, server.requests = iter(()), []
    stream(server, places(folder))             # the dead process holds no lock, and its .part are not whole
    assert there(folder).items() >= expected().items() and server.requests[0]["range"] is None


def test_stale_parts_are_written_anew_and_never_mistaken_for_whole(server, folder):
    folder.mkdir()
    for name in (*expected(), "set_none.txt"):
        (folder / f"{name}.part").write_bytes(b"stale" * 50_000)  # longer than any member
    stream(server, places(folder))
    with pytest.raises(DownloadError, match="no member set/none.txt"):
        stream(server, places(folder, [*WANTED, "set/none.txt"]))
    assert there(folder) == expected()         # those that were there before stay


def test_two_at_once_read_it_once(server, folder, capsys):
    """Even if each spells its folder in two ways: it must not wait for itself."""
    spellings = itertools.cycle([folder, folder / ".." / folder.name])
    wanted = {name: next(spellings) / path.name for name, path in places(folder).items()}
    server.faults = iter(["hold"])
    threads = [threading.Thread(target=stream, args=(server, wanted), kwargs={"timeout": 20}, daemon=True)
               for _ in range(2)]
    threads[0].start()
    wait_until(lambda: server.requests)        # the first one is at it, and the server holds the second half back
    threads[1].start()
    said = []
    wait_until(lambda: said.append(capsys.readouterr().err) or "waiting for another" in "".join(said))
    server.gate.set()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert len(server.requests) == 1 and there(folder) == expected()


def test_folders_are_locked_in_one_order(server, tmp_path, monkeypatch):
    """Or two processes that want the same folders could each wait for the other for ever."""
    taken = []
    monkeypatch.setattr(module, "locked", lambda folder: taken.append(folder) or nullcontext(folder.mkdir()))
    stream(server, {name: tmp_path / str(9 - i) / "x" for i, name in enumerate(MEMBERS)})
    assert len(taken) == len(MEMBERS) and taken == sorted(taken)


def test_on_a_terminal_a_bar_says_what_was_found(server, folder, monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    server.lengths = iter([100_000])
    stream(server, places(folder))
    said = screen.getvalue()
    assert all(f"{n} of 3 files found" in said for n in range(4)) and "set.tar.gz: 100%" in said
    assert "trying again" in said and "keeping only" not in said
