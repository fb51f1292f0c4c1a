"""Downloaded texts and tokens: what is downloaded, errors without a network, FineWeb's shards."""
import hashlib
import os
import random
import time

import numpy as np
import pytest
import torch
from test_download import server  # noqa: F401 (a fixture)
from test_tokens import STORIES, decoded, written

from data.text import fineweb, sources, tokenizers, tokens
from data.text.tokenizers import Bytes, load_tokenizer

REAL = os.environ.get("DAT_TEST_DATA")


# ---- texts -----------------------------------------------------------------------------------------------------------

def test_the_checksum_of_shakespeare_is_that_of_nanogpts_file(tmp_path):
    if not REAL:
        pytest.skip("set DAT_TEST_DATA to a folder with real data")
    corpus = tokens.load(f"{REAL}/data/shakespeare/input.txt", "chars", tmp_path)
    assert (corpus.facts["bytes"], corpus.facts["sha256"]) == (sources.SHAKESPEARE["size"],
                                                                   sources.SHAKESPEARE["sha256"])
    assert decoded(corpus)[0].startswith(b"First Citizen:") and len(corpus.val) == 111_540
    assert corpus.tokenizer.vocab_size == 65


@pytest.fixture
def stories(server, monkeypatch):  # noqa: F811
    """TinyStories on the test's server, where both files are the same text of about 1.1 MB."""
    content = "\n<|endoftext|>\n".join(random.Random(0).choices(STORIES, k=25_000)).encode()
    server.body = content
    facts = dict(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(sources, "STORIES", server.url.rsplit("/", 1)[0])
    monkeypatch.setattr(sources, "TINYSTORIES", {name: facts for name in sources.TINYSTORIES})
    return content


def test_of_tinystories_all_or_the_first_megabytes_are_downloaded(stories, tmp_path, server):  # noqa: F811
    corpus = tokens.load("tinystories", "bytes", tmp_path)
    assert corpus.facts["bytes"] == 2 * len(stories) and not list(tmp_path.glob("*.part"))
    n_requests = len(server.requests)
    part_of_all = tokens.load("tinystories", "bytes", tmp_path, first_mb=1)
    assert len(server.requests) == n_requests                          # the complete file is used
    (tmp_path / "TinyStories-train.txt").unlink()
    corpus = tokens.load("tinystories", "bytes", tmp_path, first_mb=1)
    assert corpus.facts == part_of_all.facts and decoded(corpus) == decoded(part_of_all)
    request, = server.requests[n_requests:]
    assert request["range"] == "bytes=0-999999"
    assert (tmp_path / "TinyStories-train-first1MB.txt").stat().st_size == 10 ** 6
    train = decoded(corpus)[0].decode()                                # up to the last complete story
    assert {story.strip() for story in train.split("\0")} == {story.strip() for story in STORIES}
    assert len(train.encode()) < 10 ** 6


def test_without_a_network_the_error_is_one_line_with_an_alternative(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "STORIES", "http://127.0.0.1:9")
    monkeypatch.setattr(fineweb, "URL", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(tokens, "load_tokenizer", lambda *args, **more: Bytes())
    for data, words in (("tinystories", "--data=FILE"), ("fineweb", "--data=FOLDER")):
        with pytest.raises(OSError, match=words) as error:
            tokens.load(data, "auto", tmp_path)
        assert "127.0.0.1:9" in str(error.value) and "\n" not in str(error.value)


def test_without_a_network_the_error_names_the_tokenizers_address(tmp_path, monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")                 # connections are refused
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tokenizers.tiktoken.registry, "ENCODINGS", {})
    message = "could not download the tokenizer gpt2 from https://.*--tokenizer=bytes"
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer("gpt2")
    assert "\n" not in str(error.value)


# ---- FineWeb's shards ------------------------------------------------------------------------------------------------

def shard(path, ids, *, magic=20240520, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, 1, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.array(ids, "<u2").tobytes())
    return path


def test_shards_are_memory_mapped_and_damaged_ones_are_errors(tmp_path):
    assert fineweb.read(shard(tmp_path / "a.bin", [50256, 7, 8])).tolist() == [50256, 7, 8]
    assert isinstance(fineweb.read(tmp_path / "a.bin"), np.memmap)
    for damage, words in ((dict(magic=1), "is not a shard"), (dict(count=4), "is truncated"),
                          (dict(count=2 ** 30), "is truncated"), (dict(count=-1), "is truncated")):
        with pytest.raises(ValueError, match=words):
            fineweb.read(shard(tmp_path / "b.bin", [1, 2, 3], **damage))
    for content in (b"", b"x" * 7, b"x" * 2000):
        written(tmp_path / "c.bin", content)
        with pytest.raises(ValueError, match="is not a shard"):
            fineweb.read(tmp_path / "c.bin")


def test_only_the_requested_shards_are_downloaded(tmp_path, server, monkeypatch):  # noqa: F811
    server.body = shard(tmp_path / "s", [50256, 5, 6, 7]).read_bytes()
    monkeypatch.setattr(fineweb, "URL", server.url.rsplit("/", 1)[0])
    name, paths = fineweb.find("fineweb", tmp_path, 3)
    assert [path.name for path in paths] == ["finewebedu_val_000000.bin"] + [
        f"finewebedu_train_00000{i}.bin" for i in (1, 2, 3)] and len(server.requests) == 4
    fineweb.find("fineweb", tmp_path, 2)
    assert len(server.requests) == 4
    server.body = b"x" * 2000
    for n_shards, words in ((100, "there are 99"), (5, "is not a shard")):
        with pytest.raises((ValueError, OSError), match=words):
            fineweb.find("fineweb", tmp_path, n_shards)


def test_facts_of_shards_are_plain_python(tmp_path, monkeypatch):
    """A checkpoint contains them and is loaded with weights_only=True, which accepts no NumPy scalar."""
    monkeypatch.setattr(tokens, "load_tokenizer", lambda *args, **more: Bytes())
    shard(tmp_path / "x_val_0.bin", [0, 7, 8, 9])
    shard(tmp_path / "x_train_1.bin", [0, 5, 6])
    corpus = tokens.load(str(tmp_path), "auto", tmp_path)
    torch.save(corpus.facts, tmp_path / "facts.pt")
    assert torch.load(tmp_path / "facts.pt", weights_only=True) == corpus.facts
    assert corpus.facts["bytes_per_token"] == 3 / 4 and {type(v) for v in corpus.facts.values()} == {str, int, float}


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
    assert "bytes each in the first 10 million validation tokens), checksum of the shards" in corpus.describe()
    with pytest.raises(ValueError, match=r"needs one shard \*val\*.bin and 3 \*train\*.bin"):
        tokens.load(str(tmp_path), "auto", tmp_path, n_shards=3)
    with pytest.raises(ValueError, match="is published as tokens of gpt2"):
        tokens.load(str(tmp_path), "bytes", tmp_path)
