"""download(first=N): N bytes and no more are fetched, and every promise of the downloader holds for them, too.

The server and its faults are those of test_download.py.
"""
# ruff: noqa: F401, F811
# (fixtures are imported and then are arguments)
import hashlib
import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_download import BODY, HTML, QUICK, SHA, Handler, part_of, path, refused, server, wait_until

from data.download import CHUNK, download

N = 150_000                                    # half of the file
HALF = hashlib.sha256(BODY[:N]).hexdigest()


class Chunked(Handler):
    """Tells how long the answer is piece by piece, as servers do that compute it."""

    def head(self, status, headers):
        super().head(status, headers | {"Transfer-Encoding": "chunked"})

    def send(self, piece, asked):
        super().send(b"%x\r\n%s\r\n" % (len(piece), piece), asked)


def ranges(server):
    return [asked["range"] for asked in server.requests]


def put_part(path, content):
    path.parent.mkdir()
    part_of(path).write_bytes(content)


# N bytes and no more

@pytest.mark.parametrize("first", [1, N, len(BODY) - 1, len(BODY)])
def test_the_first_bytes_and_no_second_request(server, path, first):
    assert download(server.url, path, first=first, **QUICK) == path
    assert path.read_bytes() == BODY[:first] and not part_of(path).exists()
    assert ranges(server) == [f"bytes=0-{first - 1}"] and server.requests[0]["sent"] == first
    download(server.url, path, first=first, **QUICK)
    assert len(server.requests) == 1


@pytest.mark.parametrize("fault", ["no range", "no range no length", "no end", "no end no total"])
def test_a_server_that_sends_more_is_hung_up_on(server, path, fault):
    server.body = BODY * 100                   # more than the buffers on the way can hold: it notices
    server.faults = iter([fault])
    download(server.url, path, first=N, **QUICK)
    assert path.read_bytes() == BODY[:N] and len(server.requests) == 1
    wait_until(lambda: "hung up" in server.requests[0])


@pytest.mark.parametrize("handler", [Handler, Chunked])
def test_what_comes_after_them_is_not_waited_for(server, path, handler):
    server.RequestHandlerClass = handler
    server.faults = iter(["hold no range no length"])
    download(server.url, path, first=100_000, backoff=0.01, timeout=2)
    assert path.read_bytes() == BODY[:100_000] and len(server.requests) == 1


@pytest.mark.parametrize("size", [None, len(BODY)])
@pytest.mark.parametrize("faults", [[""], ["no range"], ["cut"], ["no end"]])
def test_a_shorter_file_comes_whole(server, path, faults, size):
    server.faults = iter(faults)
    download(server.url, path, first=len(BODY) + 1000, size=size, **QUICK)
    assert path.read_bytes() == BODY and len(server.requests) == 1 + (faults == ["cut"])


def test_an_empty_file_is_an_error_of_one_line(server, path):
    server.body = b""
    assert "answered 416" in refused(server.url, path, first=N)


def test_html_further_down_is_not_a_log_in_page(server, path):
    server.body = BODY[:CHUNK] + HTML + BODY[:100_000 - CHUNK - len(HTML)] + HTML * 1000
    server.faults = iter(["cut"])
    download(server.url, path, first=N, **QUICK)
    assert path.read_bytes() == server.body[:N] and len(server.requests) == 2


@pytest.mark.parametrize("first", [0, -1, 1.5, 5e7, "10"])
def test_a_number_of_bytes_is_a_whole_number(server, path, first):
    with pytest.raises(ValueError, match="whole number of bytes"):
        download(server.url, path, first=first)
    assert not server.requests and not path.parent.exists()


# Fewer than promised

@pytest.mark.parametrize("fault", ["cut", "cut no total", "cut no length"])
def test_cut_is_resumed_up_to_the_last_one(server, path, fault):
    server.faults = iter([fault])
    download(server.url, path, first=N, **QUICK)
    assert path.read_bytes() == BODY[:N]
    assert ranges(server) == [f"bytes=0-{N - 1}", f"bytes=100000-{N - 1}"] and server.requests[1]["sent"] == 50_000


def test_no_range_support_starts_again(server, path):
    server.faults = iter(["cut", "no range"])
    download(server.url, path, first=N, **QUICK)
    assert path.read_bytes() == BODY[:N] and len(server.requests) == 2


@pytest.mark.parametrize("fault", ["cut no range", "cut no range no length", "503"])
def test_a_server_that_never_gets_that_far_ends(server, path, fault):
    server.faults = itertools.repeat(fault)
    assert "in vain: 3" in refused(server.url, path, first=N, retries=2)
    assert len(server.requests) == 3


def test_where_no_length_is_told_only_all_of_them_are_enough(server, path):
    server.faults = itertools.repeat("no range no length")
    assert "300,000 of 300,001 bytes" in refused(server.url, path, first=len(BODY) + 1, retries=1)
    download(server.url, path, first=len(BODY), **QUICK)
    assert path.read_bytes() == BODY


# A .part that is there already

@pytest.mark.parametrize("first, kept", [(N, N), (N, N + 1), (N, len(BODY)), (1, 1), (len(BODY), len(BODY))])
def test_part_with_all_of_them_or_more_costs_one_byte(server, path, first, kept):
    put_part(path, BODY[:kept])
    download(server.url, path, first=first, **QUICK)
    assert path.read_bytes() == BODY[:first]
    assert ranges(server) == [f"bytes={first - 1}-{first - 1}"] and server.requests[0]["sent"] == 1


def test_part_with_more_and_no_range_support(server, path):
    put_part(path, BODY)
    server.faults = iter(["no range"])
    download(server.url, path, first=N, **QUICK)
    assert path.read_bytes() == BODY[:N] and len(server.requests) == 1


@pytest.mark.parametrize("kept", [1000, N, N + 1000])
def test_part_of_an_older_version_is_not_taken(server, path, kept):
    put_part(path, b"?" * kept)
    os.utime(part_of(path), (1e9, 1e9))
    server.modified = 1.5e9
    download(server.url, path, first=N, **QUICK)
    assert path.read_bytes() == BODY[:N] and len(server.requests) == 2


def test_part_that_is_the_whole_of_a_shorter_file(server, path):
    put_part(path, BODY)
    download(server.url, path, first=len(BODY) + 1000, **QUICK)
    assert path.read_bytes() == BODY
    assert ranges(server) == ["bytes=300000-300999"] and server.requests[0]["sent"] == 0


def test_part_that_is_longer_than_a_shorter_file(server, path):
    put_part(path, b"?" * (len(BODY) + 1))
    download(server.url, path, first=len(BODY) + 1, **QUICK)  # asks for the byte after the last one
    assert path.read_bytes() == BODY and len(server.requests) == 2


# Another file at that address

@pytest.mark.parametrize("fault", ["", "no range", "no end"])
@pytest.mark.parametrize("kept", [0, 1000, N, N + 1000])
def test_size_is_that_of_the_whole_file(server, path, kept, fault):
    if kept:
        put_part(path, BODY[:kept])
    server.faults = itertools.repeat(fault)
    assert "file has 300,000 bytes, not 300,001" in refused(server.url, path, first=N, size=len(BODY) + 1)
    assert len(server.requests) == 1 and part_of(path).exists() == (kept > 0)
    download(server.url, path, first=N, size=len(BODY), **QUICK)
    assert path.read_bytes() == BODY[:N]


@pytest.mark.parametrize("first", [None, len(BODY) + 1000])
def test_size_is_noticed_when_the_part_is_all_there_is(server, path, first):
    put_part(path, BODY)
    assert "file has 300,000 bytes, not 300,500" in refused(server.url, path, first=first, size=len(BODY) + 500)


def test_checksum_and_check_are_of_these_bytes(server, path):
    assert HALF in refused(server.url, path, first=N, sha256=SHA)
    assert not part_of(path).exists()
    lengths = []
    download(server.url, path, first=N, sha256=HALF, check=lambda part: lengths.append(part.stat().st_size), **QUICK)
    assert path.read_bytes() == BODY[:N] and lengths == [N]


def test_compressed_answer_is_not_mistaken_for_the_file(server, path):
    server.faults = itertools.repeat("encoded no range no length")
    refused(server.url, path, first=N)
    refused(server.url, path, first=N, size=len(BODY))  # a size that nobody compares proves nothing
    download(server.url, path, first=N, sha256=HALF, **QUICK)
    assert path.read_bytes() == BODY[:N]


def test_two_at_once_fetch_once(server, path, capsys):
    server.faults = iter(["hold"])
    with ThreadPoolExecutor() as pool:
        both = [pool.submit(download, server.url, path, first=N, **QUICK)]
        wait_until(lambda: server.requests)    # the first one is at it, and the server holds the second half back
        both.append(pool.submit(download, server.url, path, first=N, **QUICK))
        said = []
        wait_until(lambda: said.append(capsys.readouterr().err) or "waiting for another process" in "".join(said))
        server.gate.set()
        assert [call.result() for call in both] == [path, path]
    assert path.read_bytes() == BODY[:N] and [asked["sent"] for asked in server.requests] == [N]
