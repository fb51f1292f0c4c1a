"""Two processes of torchrun (gloo) take the steps of one, stop together, and go on together."""
import csv
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_lm

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def start(arguments, **options):
    return subprocess.Popen([*TORCHRUN, str(Path(train_lm.__file__)), *arguments], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


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
    while two.poll() is None and not list((tmp_path / "out").glob("*/log.csv")):
        time.sleep(0.02)
    log = only_run() / "log.csv"
    while two.poll() is None and log.read_text().count("\n") < 15:                   # past step 10, and its checkpoint
        time.sleep(0.002)
    two.send_signal(signal.SIGTERM)                                                  # torchrun hands it on
    said = two.communicate(timeout=60)[0]
    assert "and saved; go on with the same command and --resume" in said
    stopped_at = rows(only_run())[-1][0]
    assert 10 <= stopped_at < 40
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
    assert "batch_size=3 is not a multiple of the 2 processes" in process.communicate(timeout=60)[0]
    assert process.returncode != 0
