"""Runs that leave their trace, are reused, and can be interrupted anywhere and go on bit for bit."""
import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train_lm
from toolbox import training
from data.text import tokens
from data.download import try_lock
from model import LanguageModel


def outcome(folder):
    """What must not depend on interruptions: weights, optimizer, and the log but for its clock."""
    state = torch.load(folder / "last.pt", weights_only=True)
    rows = list(csv.DictReader(open(folder / "log.csv")))
    return state["model"], state["optimizer"]["state"], [
        {k: v for k, v in row.items() if k not in ("tokens_per_s", "seconds")} for row in rows]


def assert_same_outcome(one, two):
    (weights, moments, rows), (weights2, moments2, rows2) = one, two
    assert rows == rows2
    assert weights.keys() == weights2.keys() and all(torch.equal(weights[k], weights2[k]) for k in weights)
    assert all(torch.equal(moments[i][k], moments2[i][k]) for i in moments for k in moments[i])


@pytest.mark.figures
def test_a_run_leaves_its_trace(tiny, tmp_path, only_run, capsys):
    train_lm.main([*tiny, "--max_steps=20", "--eval_every=10", "--log_every=5", "--seed=3"])
    folder = only_run()
    assert {p.name for p in folder.iterdir()} == {"config.json", "log.csv", "best.pt", "last.pt"}
    rows = list(csv.DictReader(open(folder / "log.csv")))
    assert list(rows[0]) == ["step", "tokens", "train_loss", "val_loss", "lr", "tokens_per_s", "seconds"]
    assert [(r["step"], bool(r["val_loss"])) for r in rows] == [
        ("0", True), ("5", False), ("10", True), ("15", False), ("20", True)]
    assert [int(r["tokens"]) for r in rows] == [0, 160, 320, 480, 640]
    record = json.loads((folder / "config.json").read_text())
    assert record["finished"] and len(record["facts"]["sha256"]) == 64 and record["facts"]["bytes"] == 1680
    best = min(float(r["val_loss"]) for r in rows if r["val_loss"])
    assert torch.load(folder / "best.pt", weights_only=True)["best"] == best
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000


def test_a_finished_run_is_reused_only_if_options_data_and_code_agree(tiny, tmp_path, only_run, capsys, monkeypatch):
    args = [*tiny, "--max_steps=4", "--eval_every=4"]
    train_lm.main(args)
    stamp = (only_run() / "last.pt").stat().st_mtime_ns
    train_lm.main([*args, "--device=cpu"])
    assert ": reused" in capsys.readouterr().out and (only_run() / "last.pt").stat().st_mtime_ns == stamp
    (tmp_path / "moved").mkdir()
    (tmp_path / "text.txt").rename(tmp_path / "moved" / "text.txt")                  # the same text in another place
    train_lm.main([arg.replace("/text.txt", "/moved/text.txt") for arg in args])
    assert ": reused" in capsys.readouterr().out
    (tmp_path / "moved" / "text.txt").rename(tmp_path / "text.txt")
    monkeypatch.setattr(training, "code_hash", lambda script: "other")               # as if model.py had been edited
    train_lm.main(args)
    assert ": reused" not in capsys.readouterr().out and (only_run() / "last.pt").stat().st_mtime_ns != stamp
    old = only_run().with_name(only_run().name + ".old")
    assert (old / "last.pt").stat().st_mtime_ns == stamp                  # the earlier one was moved, not lost
    stamp = (only_run() / "last.pt").stat().st_mtime_ns
    with monkeypatch.context() as m:
        m.setattr(torch, "__version__", "2.99")
        train_lm.main(args)
    assert ": reused" not in capsys.readouterr().out and (only_run() / "last.pt").stat().st_mtime_ns != stamp
    (tmp_path / "text.txt").write_text("another text, as long as it need be. " * 40)
    train_lm.main(args)
    assert ": reused" not in capsys.readouterr().out


LONG = ["--max_steps=30", "--eval_every=10", "--log_every=4"]


def test_ctrl_c_saves_and_resume_goes_on_bit_for_bit(tiny, tmp_path, only_run, capsys, monkeypatch):
    train_lm.main([*tiny, *LONG])
    whole = outcome(only_run())
    (tmp_path / "out").rename(tmp_path / "whole")
    draw, drawn = tokens.random_starts, []

    def starts(*args):                                                                # Ctrl-C in the middle of step 17
        drawn.append(1)
        if len(drawn) == 17:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(*args)
    monkeypatch.setattr(tokens, "random_starts", starts)
    with pytest.raises(SystemExit) as stop:
        train_lm.main([*tiny, *LONG])
    assert stop.value.code == 130 and "--resume" in capsys.readouterr().out
    assert torch.load(only_run() / "last.pt", weights_only=True)["step"] == 17
    assert not json.loads((only_run() / "config.json").read_text())["finished"]
    train_lm.main([*tiny, *LONG, "--resume"])
    assert "resuming after step 17" in capsys.readouterr().out
    assert_same_outcome(outcome(only_run()), whole)


def test_resume_after_kill_9_equals_an_uninterrupted_run(tiny, tmp_path, only_run):
    """In a process of its own, killed without warning at whatever point it happens to be."""
    args = [*tiny, "--max_steps=200", "--eval_every=20", "--log_every=4"]
    command = [sys.executable, str(Path(train_lm.__file__)), *args]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((tmp_path / "out").glob("*/best.pt")):
        time.sleep(0.01)
    log = only_run() / "log.csv"
    while process.poll() is None and log.read_text().count("\n") < 20:               # somewhere past step 60
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it had finished before it could be killed: raise max_steps"
    train_lm.main([*args, "--resume"])
    resumed = outcome(only_run())
    (tmp_path / "out").rename(tmp_path / "resumed")
    train_lm.main(args)
    assert_same_outcome(resumed, outcome(only_run()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(value, tiny, only_run, capsys,
                                                                                    monkeypatch):
    forward, calls = LanguageModel.forward, []

    def broken(self, idx, targets=None, caches=None):
        logits, loss = forward(self, idx, targets, caches)
        calls.append(self.training)
        return logits, loss * value if sum(calls) == 15 else loss
    monkeypatch.setattr(LanguageModel, "forward", broken)
    with pytest.raises(SystemExit) as stop:
        train_lm.main([*tiny, *LONG])
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "after step 14: train_loss" in error and "last good checkpoint" in error
    state = torch.load(only_run() / "last.pt", weights_only=True)
    assert state["step"] == 10 and all(w.isfinite().all() for w in state["model"].values())


def test_resume_refuses_a_checkpoint_of_another_shape(tiny, tmp_path, only_run, capsys):
    train_lm.main([*tiny, "--max_steps=4", "--eval_every=4"])
    folder = only_run()
    state = torch.load(folder / "last.pt", weights_only=True)
    state["model"]["embedding.weight"] = torch.zeros(256, 32)
    torch.save(state, folder / "last.pt")
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**record, "finished": False}))
    with pytest.raises(SystemExit) as stop:
        train_lm.main([*tiny, "--max_steps=4", "--eval_every=4", "--resume"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "embedding.weight is (256, 32) there, (256, 16) in this model" in error


@pytest.mark.parametrize("dies_at", [3, 17])              # before the first validation, after it
def test_resume_after_a_crash_equals_an_uninterrupted_run(dies_at, tiny, tmp_path, only_run, monkeypatch):
    train_lm.main([*tiny, *LONG])
    whole = outcome(only_run())
    (tmp_path / "out").rename(tmp_path / "whole")
    draw, drawn = tokens.random_starts, []

    def starts(*args):
        drawn.append(1)
        if len(drawn) == dies_at:
            raise MemoryError
        return draw(*args)
    monkeypatch.setattr(tokens, "random_starts", starts)
    try:
        train_lm.main([*tiny, *LONG])
    except MemoryError:
        pass
    else:
        pytest.fail("it did not crash")
    train_lm.main([*tiny, *LONG, "--resume"])
    assert_same_outcome(outcome(only_run()), whole)


def test_a_validation_loss_that_is_not_finite_overwrites_no_checkpoint(tiny, only_run, capsys, monkeypatch):
    losses = iter([5.0, 4.0, math.nan])
    monkeypatch.setattr(train_lm, "evaluate", lambda *args: next(losses))
    with pytest.raises(SystemExit) as stop:
        train_lm.main([*tiny, *LONG])
    assert stop.value.code == 1 and "after step 20: val_loss nan" in capsys.readouterr().err
    assert torch.load(only_run() / "last.pt", weights_only=True)["step"] == 10


def test_best_is_the_lowest_and_last_is_the_last(tiny, only_run, monkeypatch):
    losses = iter([5.0, 3.0, 4.0, 4.5])
    monkeypatch.setattr(train_lm, "evaluate", lambda *args: next(losses))
    train_lm.main([*tiny, *LONG])
    steps = {name: torch.load(only_run() / name, weights_only=True)["step"] for name in ("best.pt", "last.pt")}
    assert steps == {"best.pt": 10, "last.pt": 30}


def test_the_clock_stands_still_during_evaluation(tiny, only_run, monkeypatch):
    now, evaluate = [0.0], train_lm.evaluate

    def tick():                                                                      # each look at the clock costs 1 s
        now[0] += 1
        return now[0]

    def slow(*args):
        now[0] += 1000
        return evaluate(*args)
    monkeypatch.setattr(training.time, "perf_counter", tick)
    monkeypatch.setattr(train_lm, "evaluate", slow)
    train_lm.main([*tiny, *LONG])
    rows = list(csv.DictReader(open(only_run() / "log.csv")))
    assert [float(row["seconds"]) for row in rows] == [float(row["step"]) for row in rows]
    assert {row["tokens_per_s"] for row in rows[1:]} == {"32"}                       # 2 sequences of 16 in a second


def test_rate_and_clipping_reach_the_optimizer(tiny, tmp_path, only_run):
    """With gradients clipped to nearly nothing the weights stand still; the last step is taken at min_lr."""
    moved = []
    for clip in ("1e-30", "1"):
        train_lm.main([*tiny, "--max_steps=30", "--eval_every=30", "--weight_decay=0", f"--grad_clip={clip}"])
        state = torch.load(only_run() / "last.pt", weights_only=True)
        torch.manual_seed(1)
        start = LanguageModel(train_lm.Config(**state["options"])).state_dict()
        moved.append(max((state["model"][k] - start[k]).abs().max().item() for k in start))
        assert [group["lr"] for group in state["optimizer"]["param_groups"]] == pytest.approx([3e-4, 3e-4])
        (tmp_path / "out").rename(tmp_path / f"out{clip}")
    assert moved[0] < 1e-6 and moved[1] > 1e-3


def test_two_processes_never_train_the_same_run(tiny, only_run, tmp_path, capsys, monkeypatch):
    draw, held = tokens.random_starts, []

    def starts(*args):                                                                # in mid-run the lock is held
        with open(only_run().with_name(f".{only_run().name}.lock"), "a") as other:
            held.append(not try_lock(other))
        return draw(*args)
    with monkeypatch.context() as m:
        m.setattr(tokens, "random_starts", starts)
        train_lm.main([*tiny, "--max_steps=4"])
    assert held == [True] * 4
    name = only_run().name
    train_lm.main([*tiny, "--max_steps=4", "--eval_every=2"])                        # free again: this one starts anew
    with open(tmp_path / "out" / f".{name}.lock", "a") as other:
        assert try_lock(other)                                                       # as another process would hold it
        with pytest.raises(SystemExit) as stop:
            train_lm.main([*tiny, "--max_steps=4"])
        assert stop.value.code == 2 and "another process is training" in capsys.readouterr().err


def test_resume_takes_no_finished_run_of_other_code_and_no_other_data(tiny, only_run, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(training, "code_hash", lambda names: "other")
        train_lm.main([*tiny, "--max_steps=4"])
    train_lm.main([*tiny, "--max_steps=4", "--resume"])
    assert "nothing to resume, starting at step 0" in capsys.readouterr().out
    record = json.loads((only_run() / "config.json").read_text())
    (only_run() / "config.json").write_text(json.dumps({**record, "finished": False, "facts": {"sha256": "0"}}))
    with pytest.raises(SystemExit) as stop:
        train_lm.main([*tiny, "--max_steps=4", "--resume"])
    assert stop.value.code == 2 and "other options or data" in capsys.readouterr().err
    del stop                                                              # it keeps that run, and its lock, alive
    for damaged in ("{ half a fi", "{}", "[]"):                                      # the run starts anew
        (only_run() / "config.json").write_text(damaged)
        train_lm.main([*tiny, "--max_steps=4"])
        assert json.loads((only_run() / "config.json").read_text())["finished"]


def test_both_models_read_the_same_data_in_the_same_order(tiny, monkeypatch):
    """With dropout and accumulated gradients too, whatever randomness the models use up."""
    draw, seen = tokens.random_starts, []
    monkeypatch.setattr(tokens, "random_starts", lambda *args: seen.append(draw(*args)) or seen[-1])
    train_lm.main([*tiny, "--n_ra=1,0", "--max_steps=6", "--batch_size=4", "--micro_batch=2"])
    assert len(seen) == 12 and all(torch.equal(seen[i], seen[i + 6]) for i in range(6))
    assert not torch.equal(seen[0], seen[1])


def test_evaluation_does_not_depend_on_the_batch_size_and_drops_nothing(tiny):
    """Micro-batches of 1, 3, 4, 16 and all at once, over a text whose last window is shorter than the others."""
    cfg, = training.parse_options(train_lm.Config, argv=[*tiny, "--vocab_size=256"])
    model, text = train_lm.make_model(cfg), torch.randint(256, (20 * cfg.max_len + 6,)).numpy().astype("uint16")
    starts = tokens.fixed_starts(len(text), cfg.max_len)
    losses = [train_lm.evaluate(model, tokens.Tokens(text), starts, replace(cfg, micro_batch=size),
                                torch.device("cpu"), torch.float32) for size in (1, 3, 4, 16, 21)]
    assert losses == pytest.approx([losses[0]] * 5, rel=1e-6) and model.training
    idx = torch.from_numpy(text.astype("int64"))                      # each token but the first, once, by hand
    model.eval()
    nats = sum(model(idx[None, i:i + 1 + 16][:, :-1], idx[None, i + 1:i + 17])[1].item() * len(idx[i + 1:i + 17])
               for i in range(0, len(idx) - 1, 16))
    assert losses[0] == pytest.approx(nats / (len(idx) - 1), rel=1e-6)


def test_a_process_without_validation_windows_adds_nothing(tiny, monkeypatch):
    cfg, = training.parse_options(train_lm.Config, argv=[*tiny, "--vocab_size=256"])
    monkeypatch.setattr(train_lm.distributed, "RANK", 1)
    monkeypatch.setattr(train_lm.distributed, "WORLD", 2)
    monkeypatch.setattr(train_lm.distributed, "total", lambda values: [values[0] + 3.0, values[1] + 1])
    text = tokens.Tokens(torch.arange(40).numpy())
    assert train_lm.evaluate(train_lm.make_model(cfg), text, torch.tensor([0]), cfg, torch.device("cpu"),
                             torch.float32) == 3.0


def test_micro_batches_take_the_step_of_the_whole_batch(tiny, tmp_path, only_run):
    """Also where the last one is smaller: 2 + 2 + 1 sequences."""
    tiny.remove("--dropout=0.1")
    losses = []
    for options in ([], ["--micro_batch=2"], ["--micro_batch=1", "--recompute"]):
        train_lm.main([*tiny, "--batch_size=5", "--max_steps=6", "--log_every=1", *options])
        rows = list(csv.DictReader(open(only_run() / "log.csv")))
        losses.append([float(row["train_loss"]) for row in rows[1:]])
        (tmp_path / "out").rename(tmp_path / f"out{len(losses)}")
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] == pytest.approx(losses[0], rel=1e-5)
    assert losses[1] != losses[0]                                      # they did run in pieces


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), RuntimeError(
    "[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")])
def test_out_of_memory_says_to_halve_the_micro_batch(error, tiny, capsys, monkeypatch):
    def refused(self, *args):
        raise error
    with monkeypatch.context() as m:                                   # there it would not help
        m.setattr(LanguageModel, "to", refused)
        with pytest.raises(SystemExit):
            train_lm.main(tiny)
        assert "make the model smaller" in (said := capsys.readouterr().err) and said.count("\n") == 1
    monkeypatch.setattr(LanguageModel, "forward", refused)
    for options, says in ([["--batch_size=8"], "--micro_batch=4"], [["--batch_size=1"], "--recompute"],
                          [["--batch_size=8", "--micro_batch=2", "--seed=2"], "--micro_batch=1"]):
        with pytest.raises(SystemExit) as stop:
            train_lm.main([*tiny, *options])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1 and says in said
    monkeypatch.setattr(LanguageModel, "forward", lambda *args: 1 / 0)  # other errors stay what they are
    with pytest.raises(ZeroDivisionError):
        train_lm.main([*tiny, "--seed=3"])
