"""download(first=N): exactly the first N bytes are downloaded, with the same guarantees as for whole files.

The server and its faults are those of test_download.py.
"""
# ruff: noqa: F401, F811  (imported fixtures are also arguments)
import hashlib
import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_download import BODY, HTML, QUICK, SHA, Handler, error_of, part_of, path, server, wait_until

from data.download import BLOCK, download

N = 150_000                                    # half of the file
HALF = hashlib.sha256(BODY[:N]).hexdigest()


class Chunked(Handler):
    """Chunked transfer encoding: without Content-Length."""

    def head(self, status, headers):
        super().head(status, headers | {"Transfer-Encoding": "chunked"})

    def send(self, piece, request):
        super().send(b"%x\r\n%s\r\n" % (len(piece), piece), request)


def ranges(server):
    return [request["range"] for request in server.requests]


def put_part(path, content):
    path.parent.mkdir()
    part_of(path).write_bytes(content)


# Exactly N bytes

@pytest.mark.parametrize("first", [1, N, len(BODY) - 1, len(BODY)])
def test_the_first_bytes_are_requested_once(server, path, first):
    assert download(server.url, path, first=first, **QUICK) == path
    assert path.read_bytes() == BODY[:first] and not part_of(path).exists()
    assert ranges(server) == [f"bytes=0-{first - 1}"] and server.requests[0]["n_bytes"] == first
    download(server.url, path, first=first, **QUICK)
    assert len(server.requests) == 1


@pytest.mark.parametrize("fault", ["no range", "no range no length", "no end", "no end no total"])
def test_the_connection_is_closed_if_the_server_sends_more(server, path, fault):
    server.body = BODY * 100                   # more than fits into the buffers of the connection
    server.faults = iter([fault])
    download(server.url, path, first=N, **QUICK)
    assert path.read_bytes() == BODY[:N] and len(server.requests) == 1
    wait_until(lambda: "closed" in server.requests[0])


@pytest.mark.parametrize("handler", [Handler, Chunked])
def test_the_download_ends_without_waiting_for_later_bytes(server, path, handler):
    server.RequestHandlerClass = handler
    server.faults = iter(["hold no range no length"])
    download(server.url, path, first=100_000, backoff=0.01, timeout=2)
    assert path.read_bytes() == BODY[:100_000] and len(server.requests) == 1


@pytest.mark.parametrize("size", [None, len(BODY)])
@pytest.mark.parametrize("faults", [[""], ["no range"], ["cut"], ["no end"]])
def test_a_shorter_file_is_downloaded_completely(server, path, faults, size):
    server.faults = iter(faults)
    download(server.url, path, first=len(BODY) + 1000, size=size, **QUICK)
    assert path.read_bytes() == BODY and len(server.requests) == 1 + (faults == ["cut"])


def test_an_empty_file_is_an_error(server, path):
    server.body = b""
    assert "answered 416" in error_of(server.url, path, first=N)


def test_html_inside_a_file_is_not_an_html_page(server, path):
    server.body = BODY[:BLOCK] + HTML + BODY[:100_000 - BLOCK - len(HTML)] + HTML * 1000
    server.faults = iter(["cut"])
    download(server.url, path, first=N, **QUICK)
    assert path.read_bytes() == server.body[:N] and len(server.requests) == 2


@pytest.mark.parametrize("first", [0, -1, 1.5, 5e7, "10"])
def test_first_must_be_a_positive_integer(server, path, first):
    with pytest.raises(ValueError, match="whole number of bytes"):
        download(server.url, path, first=first)
    assert not server.requests and not path.parent.exists()


# Broken downloads

@pytest.mark.parametrize("fault", ["cut", "cut no total", "cut no length"])
def test_a_broken_download_is_resumed_up_to_byte_n(server, path, fault):
    server.faults = iter([fault])
    download(server.url, path, first=N, **QUICK)
    assert path.read_bytes() == BODY[:N]
    assert ranges(server) == [f"bytes=0-{N - 1}", f"bytes=100000-{N - 1}"] and server.requests[1]["n_bytes"] == 50_000


def test_without_range_support_the_bytes_are_received_again_from_the_start(server, path):
    server.faults = iter(["cut", "no range"])
    download(server.url, path, first=N, **QUICK)
    assert path.read_bytes() == BODY[:N] and len(server.requests) == 2


@pytest.mark.parametrize("fault", ["cut no range", "cut no range no length", "503"])
def test_attempts_without_progress_end_in_an_error(server, path, fault):
    server.faults = itertools.repeat(fault)
    assert "3 failed attempts" in error_of(server.url, path, first=N, retries=2)
    assert len(server.requests) == 3


def test_without_a_length_fewer_than_n_bytes_are_an_error(server, path):
    server.faults = itertools.repeat("no range no length")
    assert "300,000 of 300,001 bytes" in error_of(server.url, path, first=len(BODY) + 1, retries=1)
    download(server.url, path, first=len(BODY), **QUICK)
    assert path.read_bytes() == BODY


# An existing .part

@pytest.mark.parametrize("first, kept", [(N, N), (N, N + 1), (N, len(BODY)), (1, 1), (len(BODY), len(BODY))])
def test_for_a_part_with_n_bytes_or_more_one_byte_is_requested(server, path, first, kept):
    put_part(path, BODY[:kept])
    download(server.url, path, first=first, **QUICK)
    assert path.read_bytes() == BODY[:first]
    assert ranges(server) == [f"bytes={first - 1}-{first - 1}"] and server.requests[0]["n_bytes"] == 1


def test_a_part_with_more_bytes_is_replaced_if_the_server_has_no_ranges(server, path):
    put_part(path, BODY)
    server.faults = iter(["no range"])
    download(server.url, path, first=N, **QUICK)
    assert path.read_bytes() == BODY[:N] and len(server.requests) == 1


@pytest.mark.parametrize("kept", [1000, N, N + 1000])
def test_the_part_of_an_older_version_is_not_used(server, path, kept):
    put_part(path, b"?" * kept)
    os.utime(part_of(path), (1e9, 1e9))
    server.modified = 1.5e9
    download(server.url, path, first=N, **QUICK)
    assert path.read_bytes() == BODY[:N] and len(server.requests) == 2


def test_a_part_that_is_a_complete_shorter_file_is_used(server, path):
    put_part(path, BODY)
    download(server.url, path, first=len(BODY) + 1000, **QUICK)
    assert path.read_bytes() == BODY
    assert ranges(server) == ["bytes=300000-300999"] and server.requests[0]["n_bytes"] == 0


def test_a_part_that_is_longer_than_the_file_is_replaced(server, path):
    put_part(path, b"?" * (len(BODY) + 1))
    download(server.url, path, first=len(BODY) + 1, **QUICK)  # requests the byte after the last one
    assert path.read_bytes() == BODY and len(server.requests) == 2


# Another file at the address

@pytest.mark.parametrize("fault", ["", "no range", "no end"])
@pytest.mark.parametrize("kept", [0, 1000, N, N + 1000])
def test_size_is_compared_with_the_whole_file(server, path, kept, fault):
    if kept:
        put_part(path, BODY[:kept])
    server.faults = itertools.repeat(fault)
    assert "file has 300,000 bytes, not 300,001" in error_of(server.url, path, first=N, size=len(BODY) + 1)
    assert len(server.requests) == 1 and part_of(path).exists() == (kept > 0)
    download(server.url, path, first=N, size=len(BODY), **QUICK)
    assert path.read_bytes() == BODY[:N]


@pytest.mark.parametrize("first", [None, len(BODY) + 1000])
def test_size_is_compared_if_the_part_has_all_bytes_of_the_file(server, path, first):
    put_part(path, BODY)
    assert "file has 300,000 bytes, not 300,500" in error_of(server.url, path, first=first, size=len(BODY) + 500)


def test_checksum_and_check_are_of_the_downloaded_bytes(server, path):
    assert HALF in error_of(server.url, path, first=N, sha256=SHA)
    assert not part_of(path).exists()
    lengths = []
    download(server.url, path, first=N, sha256=HALF, check=lambda part: lengths.append(part.stat().st_size), **QUICK)
    assert path.read_bytes() == BODY[:N] and lengths == [N]


def test_a_compressed_answer_is_not_taken_for_the_file(server, path):
    server.faults = itertools.repeat("encoded no range no length")
    error_of(server.url, path, first=N)
    error_of(server.url, path, first=N, size=len(BODY))  # the length of the whole file verifies nothing here
    download(server.url, path, first=N, sha256=HALF, **QUICK)
    assert path.read_bytes() == BODY[:N]


def test_of_two_concurrent_calls_only_one_downloads(server, path, capsys):
    server.faults = iter(["hold"])
    with ThreadPoolExecutor() as pool:
        both = [pool.submit(download, server.url, path, first=N, **QUICK)]
        wait_until(lambda: server.requests)    # the first call is downloading, and the server holds back the rest
        both.append(pool.submit(download, server.url, path, first=N, **QUICK))
        messages = []
        wait_until(lambda: messages.append(capsys.readouterr().err)
                   or "waiting for another process" in "".join(messages))
        server.gate.set()
        assert [call.result() for call in both] == [path, path]
    assert path.read_bytes() == BODY[:N] and [request["n_bytes"] for request in server.requests] == [N]
