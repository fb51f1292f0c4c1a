"""The toolbox: options, optimizer, schedule; and runs that can be interrupted anywhere and go on bit for bit."""
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import options
import train_lm
import training
from data import text
from model import LanguageModel, TransformerConfig

TINY = ["--d_model=16", "--n_layers=1", "--n_heads=2", "--n_ra=1", "--max_len=16", "--batch_size=2", "--n_symbols=4",
        "--symbol_heads=2", "--eval_windows=8", "--sample_bytes=5", "--dropout=0.1", "--baseline=False", "--warmup_steps=5",
        "--device=cpu"]


@pytest.fixture
def tiny(tmp_path):
    """The options of a run that takes a second, on a text of its own."""
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 40)
    return [*TINY, f"--data={tmp_path / 'text.txt'}", f"--out_dir={tmp_path / 'out'}"]


def only_run(tmp_path):
    folder, = (p.parent for p in (tmp_path / "out").glob("*/config.json") if p.parent.suffix != ".old")
    return folder


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


# ---- options ----


@dataclass
class Options(TransformerConfig):
    steps: int = 10                         # how many, 100% of them
    rate: float = 0.1                       # how fast
    fast: bool = False                      # or slow
    path: str = "a"                         # where

    def __post_init__(self):
        super().__post_init__()
        if self.steps > 1000:
            raise ValueError("steps: at most 1000")


def test_default_then_preset_then_command_line():
    presets = {"big": dict(d_model=256, steps=20)}
    cfg, = training.parse_options(Options, presets, ["--preset=big", "--steps", "30", "--fast", "--n_kv_heads=2"])
    assert (cfg.d_model, cfg.steps, cfg.n_layers, cfg.fast, cfg.n_kv_heads) == (256, 30, 4, True, 2)
    cfg, = training.parse_options(Options, presets, ["--fast=False", "--n_kv_heads=None", "--path=x,y"])
    assert (cfg.d_model, cfg.fast, cfg.n_kv_heads, cfg.path) == (128, False, None, "x,y")


def test_comma_lists_make_every_combination():
    runs = training.parse_options(Options, argv=["--n_ra=0,4", "--rate=0.1,0.2", "--symbols=relative,symbolic"])
    assert [(r.n_ra, r.rate, r.symbols) for r in runs] == [
        (n, rate, s) for n in (0, 4) for rate in (0.1, 0.2) for s in ("relative", "symbolic")]


@pytest.mark.parametrize("argument, says", [
    ("--n_rs=4", "did you mean --n_ra?"), ("--zzz=1", "see -h"), ("--steps=many", "give an integer"),
    ("--rate=fast", "give a number"), ("--fast=yes", "True or False"), ("--symbols=magic", "choose from symbolic"),
    ("--n_ra=9", "n_heads=8"), ("--steps=2000", "at most 1000"), ("--d_mode=3", "did you mean --d_model"), ("stray", "stray")])
def test_a_wrong_option_is_one_clear_line_and_status_2(argument, says, capsys):
    with pytest.raises(SystemExit) as stop:
        training.parse_options(Options, argv=[argument])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and says in error


def test_help_shows_every_option_with_its_comment_and_default(capsys):
    with pytest.raises(SystemExit):
        training.parse_options(train_lm.Config, argv=["-h"])
    squeezed = lambda text: re.sub(r"[\s-]+", "", text)               # noqa: E731  (lines wrap at spaces and hyphens)
    shown = squeezed(capsys.readouterr().out)
    for name, comment in options.option_comments(train_lm.Config).items():
        assert squeezed(name) in shown and squeezed(comment) in shown
    assert squeezed("after the warm-up [cosine]") in shown


def test_every_option_has_a_comment():
    assert options.option_comments(train_lm.Config).keys() == train_lm.Config.__dataclass_fields__.keys()


def test_baselines_follow_their_dat_and_come_once():
    configs = training.parse_options(train_lm.Config, argv=["--n_ra=0,2,4", "--seed=1,2"])
    runs = training.with_baselines(configs, train_lm.count_parameters)
    assert sorted((r.n_ra, r.seed) for r in runs) == [(n, s) for n in (0, 2, 4) for s in (1, 2)]
    configs = training.parse_options(train_lm.Config, argv=["--symbols=symbolic,relative,positional", "--n_ra=0,4"])
    runs = training.with_baselines(configs, train_lm.count_parameters)                # a Transformer has no symbols
    assert sorted((r.n_ra, r.symbols) for r in runs) == [(0, "symbolic"), (4, "positional"), (4, "relative"), (4, "symbolic")]
    cfg = replace(configs[-1], match_params=True)
    dat, twin = training.with_baselines([cfg], train_lm.count_parameters)
    assert dat is cfg and twin.n_ra == 0
    assert abs(train_lm.count_parameters(twin) / train_lm.count_parameters(dat) - 1) < 0.01


# ---- optimizer, schedule, randomness ----


def test_each_parameter_is_in_exactly_one_group():
    cfg = train_lm.Config(bias=True, trainable_symbols=False)
    model = LanguageModel(cfg)
    decayed, others = training.make_optimizer(model, cfg).param_groups
    ids = [id(p) for group in (decayed, others) for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad) and len(set(ids)) == len(ids)
    assert all(p.dim() >= 2 for p in decayed["params"]) and decayed["weight_decay"] == 0.1
    assert all(p.dim() < 2 for p in others["params"]) and others["weight_decay"] == 0


def test_the_schedule_warms_up_and_ends_where_it_should():
    cfg = train_lm.Config(learning_rate=1.0, min_lr=0.1, warmup_steps=10, max_steps=110)
    rates = [training.learning_rate(step, cfg) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert rates[59] == pytest.approx(0.55) and rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[9:], rates[10:]))
    cfg = replace(cfg, schedule="constant")
    assert {training.learning_rate(step, cfg) for step in (10, 50, 110)} == {1.0}


def test_batches_are_a_function_of_seed_and_step():
    tokens = torch.arange(200, dtype=torch.uint8)

    def draw(seed, step):
        training.reseed(seed, step)
        return text.batch(tokens, 4, 8)[0].tolist()
    assert draw(1, 5) == draw(1, 5)
    assert len({str(draw(seed, step)) for seed in range(5) for step in range(20)}) == 100


# ---- runs ----


def test_a_run_leaves_its_trace(tiny, tmp_path, capsys):
    train_lm.main([*tiny, "--max_steps=20", "--eval_every=10", "--log_every=5", "--seed=3"])
    folder = only_run(tmp_path)
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


def test_a_finished_run_is_reused_only_if_options_data_and_code_agree(tiny, tmp_path, capsys, monkeypatch):
    args = [*tiny, "--max_steps=4", "--eval_every=4"]
    train_lm.main(args)
    stamp = (only_run(tmp_path) / "last.pt").stat().st_mtime_ns
    train_lm.main([*args, "--device=cpu"])
    assert ": reused" in capsys.readouterr().out and (only_run(tmp_path) / "last.pt").stat().st_mtime_ns == stamp
    monkeypatch.setattr(training, "code_hash", lambda script: "other")               # as if model.py had been edited
    train_lm.main(args)
    assert ": reused" not in capsys.readouterr().out and (only_run(tmp_path) / "last.pt").stat().st_mtime_ns != stamp
    old = only_run(tmp_path).with_name(only_run(tmp_path).name + ".old")
    assert (old / "last.pt").stat().st_mtime_ns == stamp                             # the earlier one was moved, not lost
    (tmp_path / "text.txt").write_text("another text, as long as it need be. " * 40)
    train_lm.main(args)
    assert ": reused" not in capsys.readouterr().out


LONG = ["--max_steps=30", "--eval_every=10", "--log_every=4"]


def test_ctrl_c_saves_and_resume_goes_on_bit_for_bit(tiny, tmp_path, capsys, monkeypatch):
    train_lm.main([*tiny, *LONG])
    whole = outcome(only_run(tmp_path))
    (tmp_path / "out").rename(tmp_path / "whole")
    draw, drawn = text.batch, []

    def batch(*args):                                                                # Ctrl-C in the middle of step 17
        drawn.append(1)
        if len(drawn) == 17:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(*args)
    monkeypatch.setattr(text, "batch", batch)
    with pytest.raises(SystemExit) as stop:
        train_lm.main([*tiny, *LONG])
    assert stop.value.code == 130 and "--resume" in capsys.readouterr().out
    assert torch.load(only_run(tmp_path) / "last.pt", weights_only=True)["step"] == 17
    assert not json.loads((only_run(tmp_path) / "config.json").read_text())["finished"]
    train_lm.main([*tiny, *LONG, "--resume"])
    assert "resuming behind step 17" in capsys.readouterr().out
    assert_same_outcome(outcome(only_run(tmp_path)), whole)


def test_resume_after_kill_9_equals_an_uninterrupted_run(tiny, tmp_path):
    """In a process of its own, killed without warning at whatever point it happens to be."""
    args = [*tiny, "--max_steps=200", "--eval_every=20", "--log_every=4"]
    command = [sys.executable, str(Path(train_lm.__file__)), *args]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(command, **quiet)
    while process.poll() is None and not list((tmp_path / "out").glob("*/best.pt")):
        time.sleep(0.01)
    log = only_run(tmp_path) / "log.csv"
    while process.poll() is None and log.read_text().count("\n") < 20:               # somewhere behind step 60
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it had finished before it could be killed: raise max_steps"
    subprocess.run([*command, "--resume"], check=True, **quiet)
    resumed = outcome(only_run(tmp_path))
    (tmp_path / "out").rename(tmp_path / "resumed")
    train_lm.main(args)
    assert_same_outcome(resumed, outcome(only_run(tmp_path)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(value, tiny, tmp_path, capsys,
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
    assert stop.value.code == 1 and "step 15" in error and "last good checkpoint" in error
    state = torch.load(only_run(tmp_path) / "last.pt", weights_only=True)
    assert state["step"] == 10 and all(w.isfinite().all() for w in state["model"].values())


def test_resume_refuses_a_checkpoint_of_another_shape(tiny, tmp_path, capsys):
    train_lm.main([*tiny, "--max_steps=4", "--eval_every=4"])
    folder = only_run(tmp_path)
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


def test_gradient_accumulation_sees_the_whole_batch(tiny, tmp_path):
    """Two micro-batches of 2 take the same steps as one batch of 4: the windows are drawn in the same order."""
    tiny.remove("--dropout=0.1")
    losses = []
    for options in (["--batch_size=4"], ["--batch_size=2", "--grad_accum=2"]):
        train_lm.main([*tiny, "--max_steps=6", "--log_every=1", *options])
        rows = list(csv.DictReader(open(only_run(tmp_path) / "log.csv")))
        losses.append([float(row["train_loss"]) for row in rows[1:]])
        (tmp_path / "out").rename(tmp_path / f"out{len(losses)}")
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_device_is_chosen_and_the_reason_given():
    device, dtype, why = training.choose_device(train_lm.Config(device="cpu"))
    assert (device.type, dtype) == ("cpu", torch.float32) and "float32" in why
    assert training.choose_device(train_lm.Config(device="cpu", dtype="bfloat16"))[1] == torch.bfloat16
    with pytest.raises(ValueError, match="device=abacus"):
        training.choose_device(train_lm.Config(device="abacus"))
