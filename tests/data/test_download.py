"""download() against a server with faults: an incomplete or wrong file never gets the final name."""
import errno
import hashlib
import io
import itertools
import os
import random
import subprocess
import sys
import threading
import time
from email.utils import parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import data.download as module
from data.download import DownloadError, download

BODY = random.Random(0).randbytes(300_000)
SHA = hashlib.sha256(BODY).hexdigest()
HTML = b"\n<!DOCTYPE html><html><body>Please come back later.</body></html>"
QUICK = dict(backoff=0.01, timeout=5)


class Handler(BaseHTTPRequestHandler):
    """Answers correctly, except for the faults in server.faults, an iterator with one string per request."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        server, body = self.server, self.server.body
        fault = next(server.faults, "")
        request = {"range": self.headers["Range"], "encoding": self.headers["Accept-Encoding"], "n_bytes": 0}
        server.requests.append(request)
        if len(server.requests) > 20:          # an endless loop of retries makes a test fail, not hang
            fault = "404"
        since = self.headers["If-Unmodified-Since"]
        if since and parsedate_to_datetime(since).timestamp() < server.modified:
            return self.head(412, {"Content-Length": "0"})
        if fault.isdigit():
            self.head(int(fault), {"Content-Type": "text/html", "Content-Length": str(len(HTML))})
            self.wfile.write(HTML)
            return
        if fault.startswith("html by"):        # an HTML page, recognisable only by its type or only by its content
            kind, page = ("text/html; charset=utf-8", b"Busy") if "type" in fault else ("application/x-gzip", HTML)
            self.head(200, {"Content-Type": kind, "Content-Length": str(len(page))})
            self.wfile.write(page)
            return
        if fault == "silence":
            server.gate.wait(10)
            return

        start, end, status, headers = 0, len(body), 200, {}
        if request["range"] and "no range" not in fault:
            start, last = request["range"].removeprefix("bytes=").split("-")
            start, end = int(start), min(int(last or end) + 1, end) if "no end" not in fault else end
            if start >= len(body):
                return self.head(416, {"Content-Range": f"bytes */{len(body)}", "Content-Length": "0"})
            total = "*" if "no total" in fault else len(body)
            status, headers = 206, {"Content-Range": f"bytes {start}-{end - 1}/{total}"}
        if "wrong range" in fault:
            start, headers["Content-Range"] = 0, f"bytes 0-{len(body) - 1}/{len(body)}"
        if "no length" not in fault:
            headers["Content-Length"] = str(end - start)
        if "encoded" in fault:
            headers["Content-Encoding"] = "gzip"
        self.head(status, headers)
        stop = min(start + 100_000, end) if "cut" in fault or "hold" in fault else end
        self.send(body[start:stop], request)
        if "hold" in fault:                    # the rest is sent when the test sets the gate
            server.gate.wait(10)
            self.send(body[stop:end], request)

    def head(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def send(self, piece, request):
        request["n_bytes"] += len(piece)       # before the client can finish and the test reads it
        try:
            self.wfile.write(piece)
            self.wfile.flush()
        except OSError:                        # the client was killed or closed the connection
            request["closed"] = True


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.body, server.faults, server.requests = BODY, iter(()), []
    server.gate, server.modified = threading.Event(), 0.0
    server.url = f"http://127.0.0.1:{server.server_port}/file.bin"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.gate.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "files" / "file.bin"     # the folder does not exist yet


def part_of(path):
    return path.with_name(path.name + ".part")


def error_of(url, path, **options):
    """Expects a DownloadError: one line that names address, path and a way out; no final file. Returns the line."""
    with pytest.raises(DownloadError) as error:
        download(url, path, **(QUICK | options))
    line = str(error.value)
    assert "\n" not in line and url in line and str(path) in line and "by hand" in line and "--data_dir" in line
    assert not path.exists()
    return line


def test_a_download_is_complete_and_an_existing_file_is_not_requested_again(server, path, capsys):
    assert download(server.url, path, size=len(BODY), sha256=SHA.upper(), **QUICK) == path
    assert path.read_bytes() == BODY and not part_of(path).exists()
    assert [request["encoding"] for request in server.requests] == ["identity"]
    assert capsys.readouterr().err == f"downloading {path} from {server.url}\n"  # no bar: not a terminal
    path.write_bytes(b"copied here by hand")
    (path.parent / ".lock").unlink()
    assert download(server.url, path, sha256=SHA) == path
    assert path.read_bytes() == b"copied here by hand" and len(server.requests) == 1
    assert list(path.parent.iterdir()) == [path]  # nothing written: the folder can be read-only


def test_a_broken_download_is_resumed_with_a_range_request(server, path):
    server.faults = iter(["cut"])
    download(server.url, path, **QUICK)
    first, second = server.requests
    assert path.read_bytes() == BODY
    assert first["range"] is None and second["range"] == "bytes=100000-" and second["n_bytes"] == 200_000


def test_progress_resets_the_number_of_failures(server, path):
    server.faults = iter(["cut", "503", "cut", "503"])
    download(server.url, path, retries=2, **QUICK)
    assert path.read_bytes() == BODY and len(server.requests) == 5


@pytest.mark.parametrize("faults", [["cut no range"], ["cut", "412"]])
def test_attempts_without_progress_end_in_an_error(server, path, faults):
    server.faults = itertools.cycle(faults)
    assert "3 failed attempts" in error_of(server.url, path, retries=2)
    assert len(server.requests) == 3           # the first attempt and two retries


def test_without_range_support_the_file_is_received_again_from_the_start(server, path):
    server.faults = iter(["cut", "no range"])
    download(server.url, path, **QUICK)
    assert path.read_bytes() == BODY and server.requests[1]["range"] == "bytes=100000-"


def test_a_wrong_range_is_not_appended(server, path):
    server.faults = iter(["cut", "wrong range"])
    download(server.url, path, **QUICK)
    assert path.read_bytes() == BODY and len(server.requests) == 3


def test_a_truncated_answer_without_length_is_resumed_if_size_is_given(server, path):
    server.faults = iter(["cut no length"])
    download(server.url, path, size=len(BODY), **QUICK)
    assert path.read_bytes() == BODY and server.requests[1]["range"] == "bytes=100000-"


def test_an_answer_without_length_is_an_error_unless_a_checksum_is_given(server, path):
    server.faults = itertools.repeat("no length")
    assert "length" in error_of(server.url, path)
    server.faults = iter(["cut no length"])
    assert "SHA-256" in error_of(server.url, path, sha256=SHA)
    server.faults = iter(["no length"])
    download(server.url, path, sha256=SHA, **QUICK)
    assert path.read_bytes() == BODY


def test_a_compressed_answer_is_not_taken_for_the_file(server, path):
    server.faults = itertools.repeat("encoded")
    error_of(server.url, path)
    download(server.url, path, sha256=SHA, **QUICK)  # a .gz file, which the server declares as encoded
    assert path.read_bytes() == BODY


def test_a_wrong_checksum_is_an_error_and_the_part_is_removed(server, path):
    assert SHA in error_of(server.url, path, sha256="0" * 64)
    assert not part_of(path).exists() and len(server.requests) == 1


def test_a_file_that_fails_check_is_an_error_and_is_removed(server, path):
    def check(part):
        assert part == part_of(path) and part.read_bytes() == BODY
        raise ValueError("it lacks\nthe label file")

    assert "it lacks the label file" in error_of(server.url, path, check=check)
    assert not part_of(path).exists()
    download(server.url, path, check=lambda part: None, **QUICK)
    assert path.read_bytes() == BODY


@pytest.mark.parametrize("status", ["503", "500", "429"])
def test_server_errors_are_retried(server, path, status):
    server.faults = iter([status, "cut", status])
    download(server.url, path, sha256=SHA, **QUICK)
    assert path.read_bytes() == BODY and len(server.requests) == 4


def test_permanent_503_is_an_error_after_the_retries(server, path):
    server.faults = itertools.repeat("503")
    assert "503 Service Unavailable" in error_of(server.url, path, retries=3)
    assert len(server.requests) == 4 and not part_of(path).exists()


@pytest.mark.parametrize("status", ["404", "403", "410", "416"])
def test_client_errors_are_not_retried(server, path, status):
    server.faults = itertools.repeat(status)
    assert f"answered {status}" in error_of(server.url, path)
    assert len(server.requests) == 1 and not part_of(path).exists()


@pytest.mark.parametrize("fault", ["html by type", "html by content"])
def test_an_html_page_is_an_error_and_does_not_change_the_part(server, path, fault):
    server.faults = itertools.repeat(fault)
    assert "HTML" in error_of(server.url, path, check=lambda part: None)
    assert not part_of(path).exists()
    part_of(path).write_bytes(BODY[:1000])
    assert "HTML" in error_of(server.url, path)
    assert part_of(path).read_bytes() == BODY[:1000]


@pytest.mark.parametrize("length", [299_999, 300_001])
def test_a_file_of_another_length_is_an_error(server, path, length):
    server.body = random.Random(1).randbytes(length)
    assert f"the server's file has {length:,}" in error_of(server.url, path, size=len(BODY))
    assert not part_of(path).exists()          # detected before anything is written
    server.faults = itertools.repeat("no length")
    assert f"{length:,}" in error_of(server.url, path, size=len(BODY), retries=2)


def test_silence_is_a_timeout_and_is_retried(server, path):
    server.faults = iter(["silence", "hold"])  # no answer at all, then no rest
    download(server.url, path, backoff=0.01, timeout=0.3)
    assert path.read_bytes() == BODY and len(server.requests) == 3
    assert server.requests[2]["range"] is not None


def test_a_refused_connection_is_an_error(path):
    assert "no answer" in error_of("http://127.0.0.1:9/file.bin", path, retries=1)


@pytest.mark.parametrize("extra", [b"", b"too long"])
def test_a_complete_part_is_used_and_a_too_long_one_is_replaced(server, path, extra):
    path.parent.mkdir()
    part_of(path).write_bytes(BODY + extra)
    download(server.url, path, **QUICK)
    assert path.read_bytes() == BODY
    assert server.requests[0]["range"] == f"bytes={len(BODY + extra)}-"
    assert sum(request["n_bytes"] for request in server.requests) == (len(BODY) if extra else 0)


def test_a_complete_part_of_known_size_needs_no_server_but_is_verified(path):
    path.parent.mkdir()
    part_of(path).write_bytes(BODY[:-1] + b"?")
    assert "SHA-256" in error_of("http://127.0.0.1:9/file.bin", path, size=len(BODY), sha256=SHA)
    part_of(path).write_bytes(BODY)
    download("http://127.0.0.1:9/file.bin", path, size=len(BODY), sha256=SHA)
    assert path.read_bytes() == BODY


def test_the_part_of_an_older_version_is_not_continued(server, path):
    path.parent.mkdir()
    part_of(path).write_bytes(b"old" * 1000)
    os.utime(part_of(path), (1e9, 1e9))
    server.modified = 1.5e9
    download(server.url, path, **QUICK)
    assert path.read_bytes() == BODY and len(server.requests) == 2


def test_a_full_disk_is_an_error_and_the_part_is_kept(server, path, monkeypatch):
    class FullDisk(io.FileIO):
        def write(self, block):
            if self.tell() + len(block) > 150_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(block)

    with monkeypatch.context() as patch:
        patch.setattr(module, "open", lambda file, mode: FullDisk(file, mode) if "b" in mode else open(file, mode),
                      raising=False)
        line = error_of(server.url, path)
    assert "full" in line and "MB free" in line and len(server.requests) == 1
    kept = part_of(path).stat().st_size
    assert 0 < kept <= 150_000
    download(server.url, path, **QUICK)
    assert path.read_bytes() == BODY and server.requests[1]["range"] == f"bytes={kept}-"


def test_a_folder_that_cannot_be_created_is_an_error(server, tmp_path):
    (tmp_path / "files").write_text("a file where the folder should be")
    assert str(tmp_path / "files") in error_of(server.url, tmp_path / "files" / "file.bin")
    assert not server.requests


# Two processes, and a killed one

def start_process(url, path):
    command = f"from data.download import download; download({url!r}, {str(path)!r}, backoff=0.01)"
    return subprocess.Popen([sys.executable, "-c", command], cwd=Path(module.__file__).parents[1],
                            stderr=subprocess.PIPE, text=True)


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "timeout"
        time.sleep(0.01)


def test_of_two_processes_only_one_downloads(server, path):
    server.faults = iter(["hold"])
    first = start_process(server.url, path)
    wait_until(lambda: server.requests)        # the first process is downloading, and the server holds back the rest
    second = start_process(server.url, path)
    message = second.stderr.readline()
    server.gate.set()
    assert first.wait(20) == 0 and second.wait(20) == 0, second.stderr.read()
    assert "waiting for another process" in message
    assert path.read_bytes() == BODY and [request["n_bytes"] for request in server.requests] == [len(BODY)]


def test_a_killed_download_is_resumed_by_another_process(server, path):
    server.faults = iter(["hold"])
    process = start_process(server.url, path)
    wait_until(lambda: part_of(path).exists() and part_of(path).stat().st_size > 50_000)
    process.kill()                             # SIGKILL: the process cannot clean up
    process.wait(20)
    assert not path.exists()
    process = start_process(server.url, path)  # another process: a lock left behind makes the test fail, not hang
    process.communicate(timeout=20)
    assert process.returncode == 0 and path.read_bytes() == BODY
    assert int(server.requests[1]["range"][6:-1]) > 50_000
    assert server.requests[1]["n_bytes"] < 250_000
