"""Texts and tokens that come from elsewhere: what is fetched, how much of it, what cannot be had; FineWeb's shards."""
import hashlib
import os
import random
import time

import numpy as np
import pytest
from test_download import server  # noqa: F401 (a fixture)
from test_tokens import STORIES, decoded, written

from data.text import fineweb

from data.text import sources as text

from data.text import tokenizers

from data.text import tokens
from data.text.tokenizers import Bytes, load_tokenizer

REAL = os.environ.get("DAT_TEST_DATA")


# ---- what has to be fetched ----


def test_shakespeare_is_the_file_that_nanogpt_readers_expect(tmp_path):
    if not REAL:
        pytest.skip("set DAT_TEST_DATA to a folder with real data")
    corpus = tokens.load(f"{REAL}/data/shakespeare/input.txt", "chars", tmp_path)
    assert (corpus.facts["bytes"], corpus.facts["sha256"]) == (text.SHAKESPEARE["size"], text.SHAKESPEARE["sha256"])
    assert decoded(corpus)[0].startswith(b"First Citizen:") and len(corpus.val) == 111_540
    assert corpus.tokenizer.vocab_size == 65


@pytest.fixture
def stories(server, monkeypatch):  # noqa: F811
    """TinyStories from the test's server: both files are the same 4 MB there."""
    content = "\n<|endoftext|>\n".join(random.Random(0).choices(STORIES, k=70_000)).encode()
    server.body = content
    facts = dict(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(text, "STORIES", server.url.rsplit("/", 1)[0])
    monkeypatch.setattr(text, "TINYSTORIES", {name: facts for name in text.TINYSTORIES})
    return content


def test_tinystories_come_whole_or_the_first_megabytes(stories, tmp_path, server):  # noqa: F811
    corpus = tokens.load("tinystories", "bytes", tmp_path)
    assert corpus.facts["bytes"] == 2 * len(stories) and not list(tmp_path.glob("*.part"))
    asked = len(server.requests)
    part_of_all = tokens.load("tinystories", "bytes", tmp_path, first_mb=1)
    assert len(server.requests) == asked                               # all of it was there
    (tmp_path / "TinyStories-train.txt").unlink()
    corpus = tokens.load("tinystories", "bytes", tmp_path, first_mb=1)
    assert corpus.facts == part_of_all.facts and decoded(corpus) == decoded(part_of_all)
    request, = server.requests[asked:]
    assert request["range"] == "bytes=0-999999" and (tmp_path / "TinyStories-train-first1MB.txt").stat().st_size == 10 ** 6
    learnt = decoded(corpus)[0].decode()                               # up to the last whole story
    assert {story.strip() for story in learnt.split("\0")} == {story.strip() for story in STORIES}
    assert len(learnt.encode()) < 10 ** 6


def test_without_a_network_one_line_says_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "STORIES", "http://127.0.0.1:9")
    monkeypatch.setattr(fineweb, "URL", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    for data, says in (("tinystories", "--data=FILE"), ("fineweb", "--data=FOLDER")):
        monkeypatch.setattr(tokens, "load_tokenizer", lambda *args, **more: Bytes())
        with pytest.raises(OSError, match=says) as error:
            tokens.load(data, "auto", tmp_path)
        assert "127.0.0.1:9" in str(error.value) and "\n" not in str(error.value)


def test_without_a_network_a_tokenizer_names_what_it_lacks(tmp_path, monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")                 # nobody answers there
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tokenizers.tiktoken.registry, "ENCODINGS", {})
    with pytest.raises(ValueError, match="could not fetch the tokenizer gpt2 from https://.*--tokenizer=bytes") as error:
        load_tokenizer("gpt2")
    assert "\n" not in str(error.value)


# ---- FineWeb's shards ----


def shard(path, ids, *, magic=20240520, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, 1, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.array(ids, "<u2").tobytes())
    return path


def test_shards_are_read_and_damaged_ones_refused(tmp_path):
    assert fineweb.read(shard(tmp_path / "a.bin", [50256, 7, 8])).tolist() == [50256, 7, 8]
    assert isinstance(fineweb.read(tmp_path / "a.bin"), np.memmap)
    for damage, says in ((dict(magic=1), "is no shard"), (dict(count=4), "is cut"), (dict(count=2 ** 30), "is cut"),
                         (dict(count=-1), "is cut")):
        with pytest.raises(ValueError, match=says):
            fineweb.read(shard(tmp_path / "b.bin", [1, 2, 3], **damage))
    for content in (b"", b"x" * 7, b"x" * 2000):
        written(tmp_path / "c.bin", content)
        with pytest.raises(ValueError, match="is no shard"):
            fineweb.read(tmp_path / "c.bin")


def test_shards_are_fetched_one_by_one_as_many_as_wanted(tmp_path, server, monkeypatch):  # noqa: F811
    server.body = shard(tmp_path / "s", [50256, 5, 6, 7]).read_bytes()
    monkeypatch.setattr(fineweb, "URL", server.url.rsplit("/", 1)[0])
    name, paths = fineweb.find("fineweb", tmp_path, 3)
    assert [path.name for path in paths] == ["finewebedu_val_000000.bin"] + [
        f"finewebedu_train_00000{i}.bin" for i in (1, 2, 3)] and len(server.requests) == 4
    fineweb.find("fineweb", tmp_path, 2)
    assert len(server.requests) == 4
    for wish, says in ((100, "there are 99"), (5, None)):
        server.body = b"x" * 2000
        with pytest.raises((ValueError, OSError), match=says or "is no shard"):
            fineweb.find("fineweb", tmp_path, wish)


def test_a_folder_of_shards_is_a_corpus(tmp_path):
    if not REAL:
        pytest.skip("set DAT_TEST_DATA to a folder with real data")
    gpt2 = load_tokenizer("gpt2")
    stories = [gpt2.encode(story) for story in STORIES]
    shard(tmp_path / "x_val_0.bin", [50256, *stories[0]])
    for i in (1, 2):
        shard(tmp_path / f"x_train_{i}.bin", [50256, *stories[i]])
    corpus = tokens.load(str(tmp_path), "auto", tmp_path)
    assert corpus.train[0:len(corpus.train)].tolist() == [50256, *stories[1], 50256, *stories[2]]
    assert corpus.facts["bytes_per_token"] == len(STORIES[0].encode()) / (1 + len(stories[0]))
    assert len(tokens.load(str(tmp_path), "auto", tmp_path, n_shards=1).train) == 1 + len(stories[1])
    assert "by the first 10 million of the latter), checksum of the beginnings" in corpus.describe()
    with pytest.raises(ValueError, match="give one of the first and 3 of the second kind"):
        tokens.load(str(tmp_path), "auto", tmp_path, n_shards=3)
    with pytest.raises(ValueError, match="comes as tokens of gpt2"):
        tokens.load(str(tmp_path), "bytes", tmp_path)
