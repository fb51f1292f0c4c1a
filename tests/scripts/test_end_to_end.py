"""Every kind of data and tokenizer, from the command line on: train, stop, resume, sample; what checkpoints hold."""
import csv
import struct
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from PIL import Image

import sample
import train_lm
import train_seq2seq
import train_vit
from conftest import TINY
from data import images, mathematics
from data.images import cifar
from data.text import fineweb, sources
from toolbox.checkpoints import load_checkpoint, plain, save_checkpoint

pytestmark = pytest.mark.usefixtures("brief_reports")
TEXT = "To be, or not to be: that is the question.\nWhether 'tis nobler — in the mind 🙂 — to suffer\n"
STORIES = "".join(f"Once upon a time there were {n} cats.\n<|endoftext|>\n" for n in range(60))


@pytest.fixture(autouse=True)
def small_vocabularies(monkeypatch):
    """tiktoken's encodings without their files: the 256 bytes and the end-of-text token, at its own number."""
    ends = {"gpt2": 50256, "cl100k_base": 100257}
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: tiktoken.Encoding(
        name, pat_str=r"\s+|\S+", mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={"<|endoftext|>": ends[name]}))


def shard(path, n):
    path.parent.mkdir(parents=True, exist_ok=True)
    tokens = np.frombuffer((TEXT * n).encode(), np.uint8).astype("<u2")
    tokens[::100] = 50256
    path.write_bytes(struct.pack("<3i", fineweb.MAGIC, fineweb.VERSION, len(tokens)).ljust(fineweb.HEADER, b"\0")
                     + tokens.tobytes())


def text_of(kind, folder):
    """Puts the data of this kind in place, as if it had been downloaded before -> what --data is."""
    cache = folder / "cache"
    cache.mkdir()
    if kind == "file":
        (folder / "naïve text.txt").write_text(TEXT * 30, encoding="utf-8")
        return str(folder / "naïve text.txt")
    if kind == "folder of texts":
        (folder / "texts").mkdir()
        (folder / "texts" / "a-train.txt").write_text(STORIES, encoding="utf-8")
        (folder / "texts" / "a-val.txt").write_text(TEXT * 5, encoding="utf-8")
        return str(folder / "texts")
    if kind == "shakespeare":
        (cache / "shakespeare.txt").write_text(TEXT * 30, encoding="utf-8")
    if kind == "tinystories":
        for name in sources.TINYSTORIES:
            (cache / name).write_text(STORIES, encoding="utf-8")
    if kind == "folder of shards":
        shard(folder / "shards" / "x_val_0.bin", 5), shard(folder / "shards" / "x_train_1.bin", 9)
        return str(folder / "shards")
    if kind == "fineweb":
        shard(cache / "fineweb" / "finewebedu_val_000000.bin", 5)
        shard(cache / "fineweb" / "finewebedu_train_000001.bin", 9)
    return kind


def rows(folder):
    with open(folder / "log.csv", newline="", encoding="utf-8") as f:
        return [{k: v for k, v in row.items() if k != "seconds" and not k.endswith("_per_s")}
                for row in csv.DictReader(f)]


def trained_stopped_and_resumed(script, options, tmp_path, monkeypatch, only_run):
    """Trains once whole and once in two parts, which must agree -> the folder of the run."""
    whole, parts = ([*options, f"--out_dir={tmp_path / name}"] for name in ("whole", "out"))
    script.main(whole)
    steps = iter([False, False, True])
    with monkeypatch.context() as m, pytest.raises(SystemExit) as stop:
        m.setattr(script.training, "stop_on_signal", lambda: nullcontext(lambda: next(steps)))     # as after Ctrl-C
        script.main(parts)
    assert stop.value.code == 130
    script.main([*parts, "--resume"])
    folder = only_run()
    one, two = (load_checkpoint(place / "last.pt") for place in (tmp_path / "whole" / folder.name, folder))
    assert two["step"] == 6 and all(torch.equal(one["model"][name], two["model"][name]) for name in one["model"])
    assert rows(folder) == rows(tmp_path / "whole" / folder.name)
    return folder


STEPS = ["--max_steps=6", "--eval_every=2", "--log_every=2"]


@pytest.mark.parametrize("kind, tokenizer", [
    ("torch", "bytes"), ("torch", "chars"), ("file", "bytes"), ("file", "chars"), ("file", "gpt2"),
    ("file", "cl100k_base"), ("folder of texts", "bytes"), ("folder of texts", "chars"), ("folder of texts", "gpt2"),
    ("shakespeare", "auto"), ("shakespeare", "chars"), ("tinystories", "auto"), ("tinystories", "bytes"),
    ("folder of shards", "auto"), ("fineweb", "gpt2")])
def test_a_language_model_is_trained_resumed_and_sampled(kind, tokenizer, tmp_path, monkeypatch, only_run, capsys):
    options = [*TINY, *STEPS, f"--data={text_of(kind, tmp_path)}", f"--tokenizer={tokenizer}",
               f"--data_dir={tmp_path / 'cache'}", *(["--n_shards=1"] if kind == "fineweb" else [])]
    folder = trained_stopped_and_resumed(train_lm, options, tmp_path, monkeypatch, only_run)
    assert "bits per byte" in capsys.readouterr().out                 # the summary reads the checkpoint, too
    sample.main([f"--from={folder}", "--prompt=to be", "--max_new_tokens=5", f"--data_dir={tmp_path / 'cache'}",
                 "--device=cpu", "--temperature=0"])
    assert capsys.readouterr().out.startswith("to be")


@pytest.mark.parametrize("data", ["generated", "files"])
def test_an_encoder_decoder_is_trained_resumed_and_scored(data, tmp_path, monkeypatch, only_run):
    monkeypatch.setattr(train_seq2seq, "HELD_OUT", 10)
    module = "algebra__sequence_next_term"
    if data == "files":
        (tmp_path / "train-easy").mkdir()
        pairs = [pair for split in ("train", "val") for pair in mathematics.generate(module, "easy", 60, 0, split)]
        (tmp_path / "train-easy" / f"{module}.txt").write_text("".join(f"{q}\n{a}\n" for q, a in pairs))
        data = str(tmp_path)
    trained_stopped_and_resumed(train_seq2seq, [
        *STEPS, "--d_model=16", "--d_ff=16", "--n_layers=1", "--n_heads=2", "--n_ra=1", "--batch_size=4",
        "--train_size=30", "--val_size=6", "--baseline=False", "--device=cpu", f"--data={data}"],
        tmp_path, monkeypatch, only_run)


@pytest.mark.parametrize("data", ["glyphs", "cifar10", "cifar100", "folder of images"])
def test_a_vision_transformer_is_trained_resumed_and_scored(data, tmp_path, monkeypatch, only_run):
    options, rng = [], np.random.default_rng(0)
    if data == "glyphs":
        for part, n in (("train", 60), ("test", 20)):
            monkeypatch.setitem(images.N_GLYPHS, part, n)
    elif data == "folder of images":
        for part, kind, i in ((p, k, i) for p in ("train", "val") for k in "ab" for i in range(8)):
            (tmp_path / "images" / part / kind).mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(rng.integers(256, size=(20, 20, 3), dtype=np.uint8))
            image.save(tmp_path / "images" / part / kind / f"{i}.png")
        data, options = str(tmp_path / "images"), ["--image_size=16", "--workers=0"]
    else:
        folder = tmp_path / "cache" / data / cifar.FOLDERS[data]
        folder.mkdir(parents=True)
        n_labels, n_classes = (1, 10) if data == "cifar10" else (2, 100)
        for name in (*cifar.FILES[data][0], cifar.FILES[data][1]):
            rows_ = rng.integers(n_classes, size=(20, n_labels)), rng.integers(256, size=(20, cifar.PIXELS))
            np.concatenate(rows_, 1).astype(np.uint8).tofile(folder / name)
    trained_stopped_and_resumed(train_vit, [
        *STEPS, "--d_model=16", "--d_ff=16", "--n_layers=1", "--n_heads=2", "--n_ra=1", "--batch_size=2",
        "--val_size=8", "--baseline=False", "--device=cpu", f"--data={data}", f"--data_dir={tmp_path / 'cache'}",
        *options], tmp_path, monkeypatch, only_run)


# ---- what a checkpoint holds -----------------------------------------------------------------------------------------

def test_numbers_of_numpy_become_plain_ones_in_a_new_checkpoint_and_in_an_old_one(tmp_path):
    """The size of a token was once a NumPy number, which weights_only=True does not read."""
    facts = {"x": np.float64(3.5), "y": [np.int64(2), (np.float32(0.5), np.bool_(True))], np.str_("z"): np.str_("a")}
    expected = {"x": 3.5, "y": [2, (0.5, True)], "z": "a"}
    state = {"options": {}, "facts": facts, "model": {"w": torch.ones(2)}, "best": np.float64("inf")}
    save_checkpoint(tmp_path / "new.pt", state)
    del state["facts"][np.str_("z")]                                  # strings of NumPy could never be read
    torch.save(state, tmp_path / "old.pt")
    assert torch.load(tmp_path / "new.pt", weights_only=True)["facts"] == expected
    del expected["z"]
    for name in ("new.pt", "old.pt"):
        found = load_checkpoint(tmp_path / name)
        assert {k: found["facts"][k] for k in expected} == expected and found["best"] == float("inf")
        assert type(found["facts"]["x"]) is float and type(found["facts"]["y"][0]) is int


@pytest.mark.parametrize("value", [Path("x"), np.zeros(2), {1, 2}, len, torch.float32, b"", object()])
def test_what_could_not_be_read_again_is_refused_by_its_name_and_nothing_is_written(value, tmp_path):
    with pytest.raises(TypeError, match=r"checkpoint\['facts'\]\['x'\]\[1\] is of"):
        save_checkpoint(tmp_path / "x.pt", {"facts": {"x": [1, value]}})
    assert not list(tmp_path.iterdir())


def test_a_run_refuses_such_facts_before_it_trains(tiny, tmp_path):
    with pytest.raises(TypeError, match=r"facts\['where'\]"):
        train_lm.Run(train_lm.Config(out_dir=str(tmp_path)), {"where": tmp_path}, unit="tokens", per_step=1)


def test_what_a_checkpoint_holds_is_kept_as_it_is():
    state = {"a": {0: [1, 2.5, None, "x", (True,)]}, "w": torch.nn.Linear(2, 2).state_dict()}
    assert plain(state) == state and plain(state)["w"] is state["w"]
