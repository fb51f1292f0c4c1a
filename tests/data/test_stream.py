"""stream_members(): after any fault of a connection either all wanted files are correct, or none exists.

The server and its faults are those of test_download.py. Here, connections can also break at any byte.
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
from test_download import HTML, QUICK, Handler, wait_until
from test_download import server as plain_server  # noqa: F401 (a fixture)
from test_extract import make_tar

import data.mathematics.stream as module
from data.download import DownloadError
from data.mathematics.stream import stream_members

UNREACHABLE = "http://127.0.0.1:9/set.tar.gz"  # connections to this port are refused
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and files")
RANDOM = random.Random(0)
MEMBERS = {"set/skip.bin": RANDOM.randbytes(50_000), "set/train/a.txt": b"first\n" * 5000, "set/empty.txt": b"",
           "set/big.bin": RANDOM.randbytes(150_000), "set/test/a.txt": b"other\n" * 5000,
           "set/rest.bin": RANDOM.randbytes(90_000)}
WANTED = ("set/train/a.txt", "set/empty.txt", "set/big.bin")


class Breaking(Handler):
    """server.lengths: for each answer with a body, the number of bytes sent before the connection breaks."""

    def send(self, piece, request):
        super().send(piece[:next(self.server.lengths, None)], request)


@pytest.fixture
def server(plain_server, tmp_path):            # noqa: F811
    plain_server.RequestHandlerClass, plain_server.lengths = Breaking, iter(())
    plain_server.modified = 1e9                # in 2001
    plain_server.url = plain_server.url.replace("file.bin", "set.tar.gz")
    serve(plain_server, make_tar(tmp_path / "set.tar.gz", MEMBERS).read_bytes())
    (tmp_path / "set.tar.gz").unlink()
    return plain_server


def serve(server, body):
    """Makes `body` the archive, and server.facts the arguments size and sha256 for it."""
    server.body = body
    server.facts = dict(size=len(body), sha256=hashlib.sha256(body).hexdigest())


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "files"                  # does not exist yet


def paths_in(folder, names=WANTED):
    return {name: folder / name.replace("/", "_") for name in names}


def stream(server, wanted, **options):
    stream_members(server.url, wanted, **(server.facts | QUICK | options))


def files_in(folder):
    """{name: content} of all files in the folder and its subfolders, except locks."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"}


def expected(names=WANTED):
    return {name.replace("/", "_"): MEMBERS[name] for name in names}


def error_of(server, wanted, **options):
    """Expects a DownloadError: one line that names address, files and a way out; no file. Returns the line."""
    with pytest.raises(DownloadError) as error:
        stream(server, wanted, **options)
    line = str(error.value)
    assert "\n" not in line and server.url in line and all(name in line for name in wanted)
    assert "by hand" in line and "--data=FOLDER" in line and "--data_dir" in line
    assert not any(files_in(path.parent) for path in wanted.values())
    return line


# Files and connections

def test_only_the_wanted_members_are_stored_and_existing_ones_are_not_requested_again(server, folder, capsys):
    stream(server, paths_in(folder), sha256=server.facts["sha256"].upper())
    assert files_in(folder) == expected()
    assert [(request["range"], request["encoding"]) for request in server.requests] == [(None, "identity")]
    message = capsys.readouterr().err          # no bar: not a terminal
    assert message.count("\n") == 1 and f"{len(server.body) / 1e9:.3g} GB" in message
    assert all(name in message for name in WANTED)
    (folder / ".lock").unlink()
    stream_members(UNREACHABLE, paths_in(folder), size=1, sha256="")
    assert files_in(folder) == expected() and not (folder / ".lock").exists()  # nothing is written
    stream_members(UNREACHABLE, {}, size=1, sha256="")


def start_process(server, wanted, first=""):
    program = (f"import os, sys; from data.mathematics.stream import stream_members; {first}\n"
               f"stream_members({server.url!r}, { {name: str(path) for name, path in wanted.items()} }, "
               f"**{server.facts})")
    return subprocess.Popen([sys.executable, "-c", program], cwd=Path(module.__file__).parents[2], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            # a pytest in the background ignores SIGINT, and its children inherit that
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


@posix
def test_no_other_file_is_opened_for_writing(server, folder):
    hook = ("sys.addaudithook(lambda event, args: print(args[0]) "
            "if event == 'open' and args[2] & (os.O_WRONLY | os.O_RDWR) else None)")
    opened, _ = start_process(server, paths_in(folder), hook).communicate(timeout=20)
    assert files_in(folder) == expected()
    assert set(opened.split()) == {str(folder / ".lock"), *(f"{path}.part" for path in paths_in(folder).values())}


def test_only_missing_files_are_stored(server, folder, capsys):
    folder.mkdir()
    (folder / "set_big.bin").write_bytes(b"copied here by hand")
    stream(server, paths_in(folder))
    assert files_in(folder) == expected() | {"set_big.bin": b"copied here by hand"}
    assert "big.bin" not in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["", "no length", "encoded"])
@pytest.mark.parametrize("lengths", [[3, 7, 5], [100_000], [200_000, 1, 1], [65_536, 65_536], [70_000] * 3, [-4], [-1]],
                         ids=str)
def test_a_broken_download_is_resumed_at_the_byte_where_it_broke(server, folder, lengths, fault):
    """In gzip's header (here 10 bytes and the file's name), in wanted and other members, in gzip's checksum."""
    server.faults = itertools.repeat(fault)
    lengths = [length % len(server.body) for length in lengths]
    server.lengths = iter(lengths)
    stream(server, paths_in(folder))
    assert files_in(folder) == expected()
    positions = itertools.accumulate(lengths)
    assert [request["range"] for request in server.requests] == [None, *(f"bytes={n}-" for n in positions)]
    assert sum(request["n_bytes"] for request in server.requests) == len(server.body)  # no byte twice


def test_without_range_support_the_archive_is_received_again_from_the_start(server, folder):
    server.faults, server.lengths = itertools.repeat("no range"), iter([14, 100_000, 200_000])
    stream(server, paths_in(folder))
    assert files_in(folder) == expected()
    assert [request["range"] for request in server.requests[1:]] == ["bytes=14-", "bytes=100000-", "bytes=200000-"]


@pytest.mark.parametrize("fault, words", [("no range", "broken"), ("no range no length", "100,000 of"),
                                          ("503", "503 Service Unavailable")])
def test_attempts_without_progress_end_in_an_error(server, folder, fault, words):
    server.faults, server.lengths = itertools.repeat(fault), itertools.repeat(100_000)
    line = error_of(server, paths_in(folder), retries=2)
    assert words in line and "3 failed attempts" in line and len(server.requests) == 3


def test_progress_resets_the_number_of_failures(server, folder):
    server.faults = iter(["", "503", "no range", "wrong range"])  # the last one is not used
    server.lengths = iter([50_000, 60_000])
    stream(server, paths_in(folder), retries=2)
    assert files_in(folder) == expected() and len(server.requests) == 5


def test_silence_is_retried_and_a_refused_connection_is_an_error(server, folder):
    server.faults = iter(["silence", "hold"])  # no answer at all, then no rest
    stream(server, paths_in(folder), timeout=0.3)
    assert files_in(folder) == expected() and len(server.requests) == 3
    server.url = UNREACHABLE
    assert "no answer" in error_of(server, paths_in(folder / "more"), retries=1)


def test_an_archive_that_is_replaced_during_the_download_is_an_error(server, folder):
    server.lengths, server.modified = iter([100_000]), 4e9  # after the first bytes were received
    assert "replaced" in error_of(server, paths_in(folder)) and len(server.requests) == 2


# Errors leave no file behind

def test_the_checksum_is_of_the_whole_archive(server, folder):
    """Also of the bytes after the last wanted member, of gzip's checksum, and after a broken connection."""
    wanted = paths_in(folder, ["set/train/a.txt"])
    good, facts = server.body, server.facts
    for position in (-20_000, -1):
        server.body = good[:position] + bytes([good[position] ^ 1]) + good[position:][1:]
        line = error_of(server, wanted, **facts)
        assert "SHA-256" in line and hashlib.sha256(server.body).hexdigest() in line and facts["sha256"] in line
    server.body, server.lengths, server.requests = good, iter([250_000]), []
    stream(server, wanted)
    assert sum(request["n_bytes"] for request in server.requests) == len(good)
    assert files_in(folder) == expected(wanted)


@pytest.mark.parametrize("fault, difference, words, requests", [
    ("", -1, "bytes, not", 1), ("", 1, "bytes, not", 1),
    ("no length", -1, "has more than", 1), ("no length", 1, "ended or was replaced", 2)])
def test_an_archive_of_another_size_is_an_error(server, folder, fault, difference, words, requests):
    server.faults = itertools.repeat(fault)
    assert words in error_of(server, paths_in(folder), size=len(server.body) + difference)
    assert len(server.requests) == requests


@pytest.mark.parametrize("keep", [1, 2, 3, 8, 15, 100, 100_000])
def test_a_truncated_archive_is_an_error_even_if_its_checksum_is_right(server, folder, keep):
    """tarfile detects it, with many kinds of errors."""
    serve(server, server.body[:keep])
    assert "truncated, damaged" in error_of(server, paths_in(folder))


def test_damaged_archives_and_other_files_are_errors(server, folder):
    facts, damaged = server.facts, bytearray(server.body)
    damaged[18] = 7                            # after gzip's header: an invalid type of block
    server.body = bytes(damaged)
    assert "damaged" in error_of(server, paths_in(folder), **facts)
    serve(server, RANDOM.randbytes(1000))
    assert "damaged" in error_of(server, paths_in(folder))
    serve(server, HTML)
    assert "HTML" in error_of(server, paths_in(folder)) and len(server.requests) == 3


def test_a_missing_member_is_an_error(server, folder):
    line = error_of(server, paths_in(folder, [*WANTED, "set/none.txt"]))
    assert "it has no member set/none.txt;" in line and server.requests[0]["n_bytes"] == len(server.body)
    with pytest.raises(DownloadError, match="read a, b, c, d and 3 more from .* no member a, b, c, d and 3 more;"):
        stream(server, paths_in(folder, "abcdefg"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_a_member_that_is_not_a_regular_file_is_an_error(server, folder, tmp_path, kind):
    members = {"set/good.txt": b"good", "set/odd": {"type": kind, "linkname": "set/good.txt"}}
    serve(server, make_tar(tmp_path / "set.tar.gz", members).read_bytes())
    assert "set/odd is not a regular file" in error_of(server, paths_in(folder, ["set/good.txt", "set/odd"]))


def test_names_are_matched_exactly_and_never_used_as_paths(server, folder, tmp_path):
    outside = str(tmp_path / "outside.txt")
    names = ["./set/a", "../set/a", "/set/a", "set/a.part", "set//a", "SET/a", "a", "set/a/b", outside, "../out.txt"]
    archive = make_tar(tmp_path / "set.tar.gz", {name: b"no" for name in names} | {"set/a": b"yes", "../x": b"found"})
    serve(server, archive.read_bytes())
    stream(server, {"set/a": folder / "a", "../x": folder / "x"})
    assert files_in(folder) == {"a": b"yes", "x": b"found"}
    assert set(tmp_path.iterdir()) == {folder, archive}


@pytest.mark.parametrize("before", [[], [100_000]])
@pytest.mark.parametrize("fault, words", [("404", "answered 404"), ("403", "answered 403"), ("html by type", "HTML")])
def test_client_errors_and_html_pages_are_not_retried(server, folder, fault, words, before):
    server.faults, server.lengths = iter([*("" for _ in before), fault]), iter(before)
    assert words in error_of(server, paths_in(folder)) and len(server.requests) == 1 + len(before)


def test_a_full_disk_is_an_error(server, folder, monkeypatch):
    def full(source, file):
        file.write(source.read(1000))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.shutil, "copyfileobj", full)
    line = error_of(server, paths_in(folder))
    assert "full" in line and "MB free" in line


@pytest.mark.parametrize("error", [KeyboardInterrupt, PermissionError])
def test_if_renaming_fails_the_files_already_renamed_are_removed(server, folder, monkeypatch, error):
    replace = os.replace

    def fails(source, target):
        if Path(target).name == "set_big.bin":
            raise error("not now")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else DownloadError, match="not now"):
        stream(server, paths_in(folder))
    assert files_in(folder) == {}


# Interrupted and killed processes, and two at the same time

@posix
@pytest.mark.parametrize("how", ["SIGINT", "SIGKILL"])
def test_an_interrupted_or_killed_process_leaves_no_incomplete_file(server, folder, how):
    """While the server holds back the rest: what was received is already in the .part files."""
    server.faults = iter(["hold"])
    process = start_process(server, paths_in(folder))
    wait_until(lambda: (folder / "set_train_a.txt.part").exists() and (folder / "set_big.bin.part").exists())
    assert not any(path.exists() for path in paths_in(folder).values())
    (folder / "set_empty.txt").write_bytes(b"")  # copied here by hand: it stays
    process.send_signal(getattr(signal, how))
    error = process.communicate(timeout=20)[1]
    assert ("KeyboardInterrupt" in error) == (how == "SIGINT")
    parts = {f"{name}.part" for name in expected()} if how == "SIGKILL" else set()
    assert set(files_in(folder)) == {"set_empty.txt"} | parts
    server.faults, server.requests = iter(()), []
    stream(server, paths_in(folder))             # no lock is left behind, and the .part files are not used
    assert files_in(folder).items() >= expected().items() and server.requests[0]["range"] is None


def test_old_parts_are_overwritten_and_never_renamed(server, folder):
    folder.mkdir()
    for name in (*expected(), "set_none.txt"):
        (folder / f"{name}.part").write_bytes(b"stale" * 50_000)  # longer than any member
    stream(server, paths_in(folder))
    with pytest.raises(DownloadError, match="no member set/none.txt"):
        stream(server, paths_in(folder, [*WANTED, "set/none.txt"]))
    assert files_in(folder) == expected()         # existing files stay


def test_of_two_concurrent_calls_only_one_downloads(server, folder, capsys):
    """Also if each call names its folder in two ways: it must not wait for its own lock."""
    spellings = itertools.cycle([folder, folder / ".." / folder.name])
    wanted = {name: next(spellings) / path.name for name, path in paths_in(folder).items()}
    server.faults = iter(["hold"])
    threads = [threading.Thread(target=stream, args=(server, wanted), kwargs={"timeout": 20}, daemon=True)
               for _ in range(2)]
    threads[0].start()
    wait_until(lambda: server.requests)        # the first call is downloading, and the server holds back the rest
    threads[1].start()
    messages = []
    wait_until(lambda: messages.append(capsys.readouterr().err) or "waiting for another" in "".join(messages))
    server.gate.set()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert len(server.requests) == 1 and files_in(folder) == expected()


def test_folders_are_always_locked_in_the_same_order(server, tmp_path, monkeypatch):
    """Otherwise two processes that lock the same folders could deadlock."""
    taken = []
    monkeypatch.setattr(module, "locked", lambda folder: taken.append(folder) or nullcontext(folder.mkdir()))
    stream(server, {name: tmp_path / str(9 - i) / "x" for i, name in enumerate(MEMBERS)})
    assert len(taken) == len(MEMBERS) and taken == sorted(taken)


def test_on_a_terminal_the_bar_shows_the_number_of_files_found(server, folder, monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    server.lengths = iter([100_000])
    stream(server, paths_in(folder))
    shown = screen.getvalue()
    assert all(f"{n} of 3 files found" in shown for n in range(4)) and "set.tar.gz: 100%" in shown
    assert "trying again" in shown and "storing only" not in shown
