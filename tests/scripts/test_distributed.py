"""Two processes of torchrun (gloo) take the steps of one, stop together, and go on together."""
import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_lm
from data.text import tokens
from model import LanguageModel
from toolbox import distributed
from toolbox.options import parse_options
from toolbox.run import Run

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def start(arguments, **options):
    return subprocess.Popen([*TORCHRUN, str(Path(train_lm.__file__)), *arguments], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


def wait(process, until, seconds=120):
    """Until until() is true or the process has ended."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and not until():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def rows(folder):
    return [[float(row[name] or "nan") for name in ("step", "tokens", "train_loss", "val_loss", "lr")]
            for row in csv.DictReader(open(folder / "log.csv"))]


def test_two_processes_equal_one_also_when_stopped_and_resumed(tiny, tmp_path, only_run):
    """The same global batch in uneven micro-batches, validation windows that do not divide evenly; dropout 0."""
    tiny = [*tiny, "--dropout=0", "--batch_size=6", "--max_steps=40", "--eval_every=10", "--log_every=1",
            "--eval_windows=None"]
    train_lm.main(tiny)
    alone, weights = rows(only_run()), torch.load(only_run() / "last.pt", weights_only=True)
    (tmp_path / "out").rename(tmp_path / "alone")

    two = start([*tiny, "--micro_batch=2"])
    wait(two, lambda: all([*(tmp_path / "out").glob(f"*/{name}")] for name in ("config.json", "log.csv")))
    log = only_run() / "log.csv"
    wait(two, lambda: log.read_text().count("\n") >= 15)                             # past step 10, and its checkpoint
    two.send_signal(signal.SIGTERM)                                                  # torchrun hands it on
    said = two.communicate(timeout=60)[0]
    assert "and saved; go on with the same command and --resume" in said
    stopped_at = rows(only_run())[-1][0]
    assert 10 <= stopped_at < 40
    assert json.loads((only_run() / "config.json").read_text())["processes"] == 2
    said = start([*tiny, "--micro_batch=2", "--resume"]).communicate(timeout=120)[0]
    assert "resuming after step" in said and said.count("parameters\n") == 1         # process 0 alone speaks
    together = rows(only_run())
    assert len(alone) == len(together) == 41
    for one, other in zip(alone, together):
        assert other == pytest.approx(one, rel=1e-6, nan_ok=True)
    state = torch.load(only_run() / "last.pt", weights_only=True)
    for name, tensor in weights["model"].items():
        torch.testing.assert_close(state["model"][name], tensor, rtol=1e-3, atol=1e-5)


def test_a_batch_that_cannot_be_shared_is_refused(tiny):
    process = start([*tiny, "--batch_size=3"])
    assert process.communicate(timeout=60)[0].count("batch_size=3 is not a multiple of the 2 processes") == 1
    assert process.returncode != 0


@pytest.fixture
def two(monkeypatch):
    """A function that makes this process number `rank` of two, the other one adding nothing."""
    def be(rank):
        for name, value in dict(RANK=rank, WORLD=2, start=lambda: None, end=lambda: None, total=lambda values: values,
                                sum_gradients=lambda model: None).items():
            monkeypatch.setattr(distributed, name, value)
    return be


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_processes_drop_other_neurons(dropout, tiny, two, monkeypatch):
    """Of equal sequences their losses are equal without dropout, and with it they are not."""
    losses, forward = [], LanguageModel.forward

    def recorded(model, *args):
        logits, loss = forward(model, *args)
        losses.append(loss.item()) if model.training else None
        return logits, loss
    monkeypatch.setattr(tokens, "random_starts", lambda n_tokens, length, n: torch.zeros(n, dtype=torch.long))
    monkeypatch.setattr(LanguageModel, "forward", recorded)
    for rank in (0, 1):
        two(rank)
        train_lm.main([*tiny, "--max_steps=1", f"--dropout={dropout}"])
    assert (losses[0] == losses[1]) == (dropout == 0)


def test_process_0_decides_what_is_reused(tiny, two, tmp_path, monkeypatch):
    two(1)
    monkeypatch.setattr(distributed, "total", lambda values: [values[0] + 1])        # process 0 has found it
    cfg, = train_lm.training.parse_options(train_lm.Config, argv=tiny)
    assert distributed.Run(cfg, train_lm.CODE, {}, 1).reusable()


def test_a_gpu_for_each_process_or_a_clear_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    distributed.check(torch.device("cuda"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    distributed.check(torch.device("cpu"))
    with pytest.raises(ValueError, match="8 processes need 8 GPUs, here are 2: .*--nproc_per_node=2"):
        distributed.check(torch.device("cuda"))
