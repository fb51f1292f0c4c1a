"""Two processes of torchrun (gloo) take the steps of one, stop together, and continue together."""
import csv
import json
import signal
import subprocess
import sys
import time

import pytest
import torch

import train_lm
from data.text import tokens
from model import LanguageModel
from toolbox import distributed, options
from toolbox.options import parse_options
from toolbox.run import Run, load_checkpoint

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def start(arguments):
    return subprocess.Popen([*TORCHRUN, train_lm.__file__, *arguments], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def wait(process, until, seconds=120):
    """Until until() is true or the process has ended."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and not until():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def rows(folder):
    with open(folder / "log.csv", newline="") as f:
        return [[float(row[name] or "nan") for name in ("step", "tokens", "train_loss", "val_loss", "lr")]
                for row in csv.DictReader(f)]


def test_two_processes_equal_one_also_when_stopped_and_resumed(tiny, tmp_path, only_run):
    """The same global batch in uneven micro-batches, validation windows that do not divide evenly; dropout 0."""
    tiny = [*tiny, "--dropout=0", "--batch_size=6", "--max_steps=40", "--eval_every=10", "--log_every=3",
            "--eval_windows=None"]
    train_lm.main(tiny)
    alone, weights = rows(only_run()), load_checkpoint(only_run() / "last.pt")["model"]
    (tmp_path / "out").rename(tmp_path / "alone")

    two = start([*tiny, "--micro_batch=2"])
    wait(two, lambda: all([*(tmp_path / "out").glob(f"*/{name}")] for name in ("config.json", "log.csv")))
    log = only_run() / "log.csv"
    wait(two, lambda: log.read_text().count("\n") >= 6)                              # past step 10, and its checkpoint
    two.send_signal(signal.SIGTERM)                                                  # torchrun hands it on
    said = two.communicate(timeout=60)[0]
    assert "and saved; continue with the same command and --resume" in said
    stopped_at = load_checkpoint(only_run() / "last.pt")["step"]
    assert 10 <= stopped_at < 40
    assert json.loads((only_run() / "config.json").read_text())["processes"] == 2
    said = start([*tiny, "--micro_batch=2", "--resume"]).communicate(timeout=120)[0]
    assert f"resuming after step {stopped_at}" in said and said.count("relational heads, ") == 1     # one prints
    together = rows(only_run())
    assert len(alone) == len(together) == 1 + 13 + 1 + 4
    for one, other in zip(alone, together):
        assert other == pytest.approx(one, rel=1e-6, nan_ok=True)
    state = load_checkpoint(only_run() / "last.pt")
    for name, tensor in weights.items():
        torch.testing.assert_close(state["model"][name], tensor, rtol=1e-3, atol=1e-5)


@pytest.fixture
def as_process(monkeypatch):
    """A function that makes this process number `rank` of two; the other one adds nothing."""
    def be(rank):
        for name, value in dict(RANK=rank, WORLD=2, start=lambda: None, end=lambda: None, total=lambda values: values,
                                sum_gradients=lambda model: None).items():
            monkeypatch.setattr(distributed, name, value)
    return be


def test_a_batch_that_cannot_be_shared_is_refused_and_process_0_says_so_first(tiny, as_process, monkeypatch, capsys):
    """torchrun ends the other processes when process 0 has ended, so that there is one line."""
    as_process(0)
    waited = []
    monkeypatch.setattr(options.time, "sleep", waited.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stop:
            train_lm.main([*tiny, "--batch_size=3"])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and "batch_size=3 is not a multiple of the 2 processes" in error
        assert len(waited) == int(rank) and error.count("\n") == 1


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_processes_drop_different_neurons(dropout, tiny, as_process, monkeypatch):
    """Without dropout their losses of equal sequences are equal, and with dropout they are not."""
    losses, forward = [], LanguageModel.forward

    def recorded(model, *args):
        logits, loss = forward(model, *args)
        losses.append(loss.item()) if model.training else None
        return logits, loss
    monkeypatch.setattr(tokens, "random_starts", lambda n_tokens, length, n: torch.zeros(n, dtype=torch.long))
    monkeypatch.setattr(LanguageModel, "forward", recorded)
    for rank in (0, 1):
        as_process(rank)
        train_lm.main([*tiny, "--max_steps=1", f"--dropout={dropout}"])
    assert len(losses) == 2 and (losses[0] == losses[1]) == (dropout == 0)


def test_process_0_alone_writes(tiny, as_process, tmp_path):
    as_process(1)
    train_lm.main([*tiny, "--max_steps=2", "--eval_every=1"])
    assert not list((tmp_path / "out").rglob("*"))


def test_process_0_decides_what_is_reused(tiny, as_process, monkeypatch):
    as_process(1)
    monkeypatch.setattr(distributed, "total", lambda values: [values[0] + 1])        # process 0 has found it
    cfg, = parse_options(train_lm.Config, argv=tiny)
    assert Run(cfg, {}, unit="tokens", per_step=32).reusable()
    monkeypatch.setattr(distributed, "total", lambda values: values)
    assert not Run(cfg, {}, unit="tokens", per_step=32).reusable()


def test_a_loss_that_is_not_finite_in_another_process_stops_this_one(tiny, as_process, tmp_path, capsys, monkeypatch):
    """Each process has the loss of its share; their sum counts."""
    as_process(0)
    totals = distributed.total
    monkeypatch.setattr(distributed, "total", lambda values: [float("nan") if isinstance(v, float) and 0 < v < 99 else v
                                                              for v in totals(values)])
    monkeypatch.setattr(train_lm, "evaluate", lambda *args: 1.0)
    with pytest.raises(SystemExit) as stop:
        train_lm.main([*tiny, "--max_steps=2"])
    assert stop.value.code == 1 and "train_loss nan" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*/*.pt"))


def test_a_gpu_for_each_process_or_a_clear_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    distributed.check(torch.device("cuda"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    distributed.check(torch.device("cpu"))
    with pytest.raises(ValueError, match="8 processes need 8 GPUs, here are 2: .*--nproc_per_node=2"):
        distributed.check(torch.device("cuda"))
