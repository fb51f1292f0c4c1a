"""Small faults, as users meet them: each is one clear line that says what to do."""
import os
import subprocess
import sys

import pytest
import torch

import plot
import sample
import train_lm
import train_relgames
import train_vit
from conftest import TINY
from toolbox.options import with_home

ROOT = train_lm.__file__.rsplit("/", 1)[0]


def line_of(main, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and len(error) < 400
    return error


@pytest.mark.parametrize("tokenizer", ["bytes", "chars"])
@pytest.mark.parametrize("text, words", [
    ("", {"bytes": "less than one context", "chars": "the text is empty"}), ("<|endoftext|>", "less than one context"),
    ("<|endoftext|>" * 500, "no text, only <|endoftext|>"), ("<|endoftext|>\n" * 500, "no text, only <|endoftext|>"),
    (" \n" * 10, "less than one context"), ("x", {"bytes": "less than one context", "chars": "less than one context"})])
def test_a_text_without_text_is_refused(text, words, tokenizer, tmp_path, capsys):
    (tmp_path / "t.txt").write_text(text)
    error = line_of(train_lm.main, [*TINY, f"--data={tmp_path / 't.txt'}", f"--tokenizer={tokenizer}",
                                    f"--data_dir={tmp_path}", f"--out_dir={tmp_path}"], capsys)
    assert (words if isinstance(words, str) else words[tokenizer]) in error


def test_a_pipe_is_not_a_file(tmp_path):
    """--data=<(zcat text.gz), with a real pipe of bash."""
    done = subprocess.run(["bash", "-c", f"{sys.executable} train_lm.py --data=<(echo text) --data_dir={tmp_path}"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "is a pipe or a device" in done.stderr


@pytest.mark.parametrize("device", ["mps", "cuda", "xpu", "abacus", "cuda:99"])
def test_a_device_that_is_not_there_is_a_short_line(device, tmp_path, capsys):
    if torch.cuda.is_available() and device == "cuda" or torch.backends.mps.is_available() and device == "mps":
        pytest.skip("it is there")
    assert f"device={device} cannot be used here" in line_of(
        train_lm.main, [f"--device={device}", f"--out_dir={tmp_path}"], capsys)


@pytest.mark.parametrize("train", [train_lm.main, train_relgames.main])
def test_a_folder_that_cannot_be_created_names_the_option_and_what_to_type(train, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    small = TINY if train is train_lm.main else ["--train_size=20", "--test_size=20", "--epochs=1", "--seed=1"]
    for folder, why in (("/proc/x", "No such file or directory"), (tmp_path / "file", "File exists")):
        error = line_of(train, [*small, f"--out_dir={folder}"], capsys)
        assert f"--out_dir={folder}: nothing can be written there ({why})" in error and "--out_dir=out/again" in error


def test_the_home_folder_is_meant_by_a_tilde_in_every_option_that_is_a_path(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for given, path in (("~", str(tmp_path)), ("~/x", f"{tmp_path}/x"), ("~x", "~x"), ("x~", "x~"), ("", "")):
        assert with_home(given) == path
    (tmp_path / "t.txt").write_text("to be or not to be " * 100)
    train_lm.main([*TINY, "--data=~/t.txt", "--data_dir=~/cache", "--out_dir=~/out", "--max_steps=2"])
    run = next((tmp_path / "out").glob("sa1*"))
    sample.main([f"--from=~/out/{run.name}", "--max_new_tokens=3", "--device=cpu", "--prompt=~/"])
    plot.main([f"--runs=~/out/{run.name},~/out", "--out_dir=~/figures"])
    assert (tmp_path / "figures" / "curves.png").exists() and (tmp_path / "cache").is_dir()
    assert not list(tmp_path.rglob("~*"))


@pytest.mark.parametrize("files", [["data_batch_1"], ["meta", "train", "test"], ["cifar-10-batches-py/data_batch_1"],
                                   ["cifar-100-python/meta"]])
def test_the_python_version_of_cifar_is_refused_with_the_way_out(files, tmp_path, capsys):
    """Its files are pickles. torchvision leaves them in a folder of its root."""
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"\x80\x02")
    error = line_of(train_vit.main, [f"--data={tmp_path}", "--device=cpu", f"--out_dir={tmp_path}"], capsys)
    assert "could run any code" in error and "--data=cifar10" in error


def test_a_mirror_of_hugging_face_is_used_for_checkpoints_and_texts():
    code = ("from data.text import fineweb, sources; from extras import pretrained\n"
            "print(fineweb.URL, sources.STORIES, pretrained.HUB)")
    for endpoint, start in (("https://mirror.example/", "https://mirror.example"), (None, "https://huggingface.co")):
        environment = {k: v for k, v in os.environ.items() if k != "HF_ENDPOINT"}
        said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
                              env=environment | ({"HF_ENDPOINT": endpoint} if endpoint else {})).stdout.split()
        assert said[2] == start and all(url.startswith(f"{start}/datasets/") for url in said[:2])


@pytest.mark.parametrize("options", [["--temperature=1e-42"], ["--top_p=1e-300"], ["--temperature=1e-42", "--top_k=3"]])
def test_the_coldest_samples_are_those_of_the_likeliest_token(options, tiny, only_run, capsys):
    train_lm.main([*tiny, "--max_steps=3"])
    capsys.readouterr()
    texts = []
    for how in (options, ["--temperature=0"]):
        sample.main([f"--from={only_run()}", "--max_new_tokens=20", "--device=cpu", *how])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
