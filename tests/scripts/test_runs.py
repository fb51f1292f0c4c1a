"""The folder of a run, with train_lm.py as the example: its files, when it is reused, resumed or refused, and signals.

What happens inside the loop is in test_loops.py.
"""
import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

import toolbox.run
import train_lm
import train_vit
from conftest import TINY
from model import model_config
from toolbox.files import try_lock
from toolbox.flops import per_token
from toolbox.run import CODE, ROOT, code_hash, load_checkpoint, run_name

SHORT = ["--max_steps=4", "--eval_every=4"]


def stopped_by(arguments, capsys, status=2):
    """The line in which train_lm.py ends, on standard error."""
    with pytest.raises(SystemExit) as stop:
        train_lm.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == status and error.count("\n") == 1 and "Traceback" not in error
    return error


def change(folder, **values):
    """Replaces values in config.json."""
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**record, **values}))


# ---- what a run leaves behind ----------------------------------------------------------------------------------------

@pytest.mark.figures
def test_a_run_leaves_its_options_its_log_its_checkpoints_and_a_figure(tiny, tmp_path, only_run):
    train_lm.main([*tiny, "--max_steps=20", "--eval_every=10", "--log_every=5", "--seed=3"])
    folder = only_run()
    assert {path.name for path in folder.iterdir()} == {"config.json", "log.csv", "best.pt", "last.pt"}
    with open(folder / "log.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == ["step", "tokens", "train_loss", "val_loss", "lr", "tokens_per_s", "seconds"]
    assert [(row["step"], row["tokens"], "train_loss" if row["train_loss"] else "val_loss") for row in rows] == [
        ("0", "0", "val_loss"), ("5", "160", "train_loss"), ("10", "320", "train_loss"), ("10", "320", "val_loss"),
        ("15", "480", "train_loss"), ("20", "640", "train_loss"), ("20", "640", "val_loss")]
    record = json.loads((folder / "config.json").read_text())
    assert record["finished"] and record["torch"] == torch.__version__ and record["device"] == "cpu"
    assert len(record["facts"]["sha256"]) == 64 and record["facts"]["bytes"] == 1680
    assert record["options"]["seed"] == 3 and record["options"]["data"] == "text.txt"
    assert record["command"].startswith("python ") and record["n_parameters"] > 1000
    assert record["operations_per_token"] == per_token(model_config(record["options"]))
    best = min(float(row["val_loss"]) for row in rows[1:] if row["val_loss"])
    assert load_checkpoint(folder / "best.pt")["best"] == best
    assert load_checkpoint(folder / "last.pt")["options"] == record["options"]
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000
    assert "\n| DAT 1+1 | 1 | 1 |" in (tmp_path / "out" / "table.md").read_text()


def test_best_is_the_checkpoint_of_the_lowest_loss_and_last_the_last(tiny, only_run, monkeypatch):
    losses = iter([5.0, 3.0, 4.0, 4.5])
    monkeypatch.setattr(train_lm, "evaluate", lambda *args: next(losses))
    train_lm.main([*tiny, "--max_steps=30", "--eval_every=10"])
    steps = {name: load_checkpoint(only_run() / name)["step"] for name in ("best.pt", "last.pt")}
    assert steps == {"best.pt": 10, "last.pt": 30}


def test_a_run_is_named_by_its_text_and_not_by_its_path():
    long = dict(symbols="relative", max_distance=77, activation="swiglu", norm="rmsnorm", position="learned", bias=True)
    for options in ({}, long):
        one, same, other = (run_name(train_lm.Config(data=data, **options))
                            for data in ("/one/a.txt", "/another/a.txt", "/one/a.json"))
        assert one == same != other and len(one) < 120
    assert run_name(train_lm.Config()) == "sa4_ra4_seed1" == run_name(train_lm.Config(out_dir="elsewhere", resume=True))


# ---- reused ----------------------------------------------------------------------------------------------------------

def test_a_finished_run_is_reused_only_if_options_data_code_and_torch_agree(tiny, tmp_path, only_run, capsys,
                                                                          monkeypatch):
    args = [*tiny, *SHORT]

    def trains(arguments):
        """True if it was trained again, and not reused."""
        before = (only_run() / "last.pt").stat().st_mtime_ns
        train_lm.main(arguments)
        trained = (only_run() / "last.pt").stat().st_mtime_ns != before
        assert (": reused" in capsys.readouterr().out) != trained
        return trained
    train_lm.main(args)
    capsys.readouterr()
    assert not trains([*args, "--device=cpu"])
    (tmp_path / "moved").mkdir()
    (tmp_path / "text.txt").rename(tmp_path / "moved" / "text.txt")                  # the same text in another place
    assert not trains([arg.replace("/text.txt", "/moved/text.txt") for arg in args])
    (tmp_path / "moved" / "text.txt").rename(tmp_path / "text.txt")
    assert trains([*args, "--log_every=3"])                            # an option that is not in the folder's name
    first = (only_run() / "last.pt").stat().st_mtime_ns
    assert trains(args) and not trains(args)
    old = only_run().with_name(only_run().name + ".old")
    assert (old / "last.pt").stat().st_mtime_ns == first               # the earlier one was moved, not lost
    with monkeypatch.context() as m:
        m.setattr(toolbox.run, "code_hash", lambda cfg: "other")
        assert trains(args) and not trains(args)
    assert trains(args)
    with monkeypatch.context() as m:
        m.setattr(torch, "__version__", "2.99")
        assert trains(args)
    (tmp_path / "text.txt").write_text("another text, about as long as the first. " * 40)
    assert trains(args)
    change(only_run(), finished=False)
    assert trains(args)


def test_the_code_of_a_run_is_its_script_the_model_and_the_data(tmp_path, monkeypatch):
    """Every file that changes a result changes the hash, and no other file."""
    for pattern in CODE:
        assert list(ROOT.glob(pattern)), f"{pattern} does not exist"
    cfg = train_lm.Config()
    assert code_hash(cfg) != code_hash(train_vit.Config())
    monkeypatch.setattr(toolbox.run, "ROOT", tmp_path)
    hashes = [code_hash(cfg)]
    for name in ("model.py", "attention.py", "extras/blocked.py", "toolbox/run.py", "data/text/tokens.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}")
        hashes.append(code_hash(cfg))
    assert len(set(hashes)) == len(hashes)
    for name in ("plot.py", "README.md", "data/cache.bin"):
        (tmp_path / name).write_text(name)
    assert code_hash(cfg) == hashes[-1]


def test_a_damaged_config_means_that_the_run_starts_again(tiny, only_run):
    train_lm.main([*tiny, *SHORT])
    for damaged in ("{ half a fi", "{}", "[]", ""):
        (only_run() / "config.json").write_text(damaged)
        train_lm.main([*tiny, *SHORT])
        assert json.loads((only_run() / "config.json").read_text())["finished"]


# ---- resumed, or refused ---------------------------------------------------------------------------------------------

def test_resume_takes_no_finished_run_of_other_code_and_no_other_options_or_data(tiny, only_run, capsys, monkeypatch):
    resume = [*tiny, *SHORT, "--resume"]
    with monkeypatch.context() as m:
        m.setattr(toolbox.run, "code_hash", lambda cfg: "other")
        train_lm.main([*tiny, *SHORT])
    train_lm.main(resume)
    assert "finished by other code, starting at step 0" in capsys.readouterr().out
    folder = only_run()
    weights = (folder / "last.pt").read_bytes()
    facts = json.loads((folder / "config.json").read_text())["facts"]
    change(folder, finished=False, facts={**facts, "sha256": "0"})
    assert "other options or data: start again without --resume" in stopped_by(resume, capsys)
    change(folder, facts=facts)
    assert "other options or data" in stopped_by([*resume, "--log_every=7"], capsys)   # of the same name
    assert (folder / "last.pt").read_bytes() == weights                # nothing was overwritten


@pytest.mark.parametrize("what", ["code", "torch"])
def test_resume_with_changed_code_or_torch_says_so_and_is_not_reused(what, tiny, only_run, capsys, monkeypatch):
    train_lm.main([*tiny, *SHORT])
    change(only_run(), finished=False, **{what: "earlier"})
    train_lm.main([*tiny, *SHORT, "--resume"])
    said = capsys.readouterr().out
    assert "the code has changed since this run began" in said and "resuming after step 4" in said
    train_lm.main([*tiny, *SHORT])
    assert ": reused" not in capsys.readouterr().out


@pytest.mark.parametrize("damaged", ["{ half a fi", "{}", "[]", "", None])
def test_resume_says_that_the_record_of_a_run_is_damaged_and_what_to_do(damaged, tiny, only_run, capsys):
    train_lm.main([*tiny, *SHORT])
    path = only_run() / "config.json"
    path.unlink() if damaged is None else path.write_text(damaged)
    error = stopped_by([*tiny, *SHORT, "--resume"], capsys)
    assert f"{path} is damaged or missing" in error and "start again without --resume" in error
    assert (path.parent / "last.pt").exists()                          # nothing was moved


def test_resume_ignores_a_row_that_a_kill_cut_short(tiny, only_run):
    train_lm.main([*tiny, *SHORT, "--log_every=2"])
    log = only_run() / "log.csv"
    rows = log.read_text()
    change(only_run(), finished=False)
    log.write_text(rows + "4,1")
    train_lm.main([*tiny, *SHORT, "--log_every=2", "--resume"])
    assert log.read_text() == rows


def test_resume_names_what_is_wrong_with_a_checkpoint(tiny, only_run, capsys):
    train_lm.main([*tiny, *SHORT])
    folder, resume = only_run(), [*tiny, *SHORT, "--resume"]
    change(folder, finished=False)
    state = torch.load(folder / "last.pt", weights_only=True)
    weights = {**state["model"], "embedding.weight": torch.zeros(256, 32)}
    torch.save({**state, "model": weights}, folder / "last.pt")
    assert "embedding.weight is (256, 32) there, (256, 16) in this model" in stopped_by(resume, capsys)
    (folder / "last.pt").write_bytes((folder / "best.pt").read_bytes()[:2000])
    assert f"{folder / 'last.pt'} is not a checkpoint of this project, or damaged: " in stopped_by(resume, capsys)


class Runs:
    """Unpickling it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_checkpoint_that_cannot_be_read_shows_the_errors_own_reason(tmp_path):
    (tmp_path / "half.pt").write_bytes(b"PK\x03\x04 half")
    torch.save({"options": {}, "facts": {}, "model": {}, "code": Path("x")}, tmp_path / "code.pt")     # may run code
    torch.save({"weights": {}}, tmp_path / "foreign.pt")
    torch.save({"options": Runs(tmp_path / "ran")}, tmp_path / "runs.pt")
    (tmp_path / "text.pt").write_text("x\n")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name, words in (("none", "no checkpoint at"), ("half", "damaged: .*zip archive"), ("foreign", "this project$"),
                        ("code", "damaged: .*Unsupported (global|class)"), ("empty", "damaged: EOFError"),
                        ("runs", "damaged: Trying to load unsupported GLOBAL .*mkdir"),
                        ("text", "damaged: Unsupported")):
        with pytest.raises(ValueError, match=words) as error:
            load_checkpoint(tmp_path / f"{name}.pt")
        assert f"{name}.pt" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        load_checkpoint(tmp_path / "folder.pt")


# ---- processes and signals -------------------------------------------------------------------------------------------

def test_two_processes_never_train_the_same_run(tiny, only_run, tmp_path, capsys, monkeypatch):
    random_starts, held = train_lm.tokens.random_starts, []

    def lock():
        return open(only_run().with_name(f".{only_run().name}.lock"), "a")

    def starts(*args):                                                 # the lock is held during training
        with lock() as other:
            held.append(not try_lock(other))
        return random_starts(*args)
    with monkeypatch.context() as m:
        m.setattr(train_lm.tokens, "random_starts", starts)
        train_lm.main([*tiny, "--max_steps=4"])
    assert held == [True] * 4
    train_lm.main([*tiny, "--max_steps=4", "--eval_every=2"])          # free again: this run replaces the first
    weights = (only_run() / "last.pt").read_bytes()
    with lock() as other:
        assert try_lock(other)                                         # as another process would hold it
        error = stopped_by([*tiny, "--max_steps=4"], capsys)
        assert "another process is training" in error and "another --out_dir" in error
    assert (only_run() / "last.pt").read_bytes() == weights and not list((tmp_path / "out").glob("*.old.old"))


def test_the_lock_is_free_after_an_error(tiny, capsys, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(train_lm, "evaluate", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_lm.main([*tiny, *SHORT])
    train_lm.main([*tiny, *SHORT])


def test_a_script_runs_in_a_thread_that_is_not_the_main_thread(tiny, only_run):
    """As in a notebook's or a server's worker thread, where Python forbids signal handlers."""
    thread = threading.Thread(target=train_lm.main, args=([*tiny, *SHORT],))
    thread.start()
    thread.join()
    assert json.loads((only_run() / "config.json").read_text())["finished"]


LONG = ["--max_steps=150", "--eval_every=20", "--log_every=7"]


def outcome(folder):
    """Weights, optimizer, and the log without its clock."""
    state = load_checkpoint(folder / "last.pt")
    with open(folder / "log.csv", newline="") as f:
        rows = [{k: v for k, v in row.items() if k not in ("tokens_per_s", "seconds")} for row in csv.DictReader(f)]
    return [state["model"], *state["optimizer"]["state"].values()], rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The outcome of a run that nothing interrupts, and the options of that run but for --out_dir."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "text.txt").write_text("to be or not to be, that is the question. " * 40)
    options = [*TINY, *LONG, f"--data={folder / 'text.txt'}", f"--data_dir={folder / 'cache'}"]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Figure, "savefig", lambda *args, **options: None)
        train_lm.main([*options, f"--out_dir={folder / 'out'}"])
    return outcome(next((folder / "out").glob("*/last.pt")).parent), options


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_after_a_signal_to_its_process_a_run_resumes_and_equals_an_uninterrupted_one(number, whole, tmp_path, only_run,
                                                                                      capsys):
    (tensors, rows), options = whole
    options = [*options, f"--out_dir={tmp_path / 'out'}"]
    process = subprocess.Popen([sys.executable, train_lm.__file__, *options], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True,
                               # background jobs of a shell inherit that SIGINT is ignored
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while process.poll() is None and not list((tmp_path / "out").glob("*/best.pt")):
        time.sleep(0.005)
    log = only_run() / "log.csv"
    while process.poll() is None and log.read_text().count("\n") < 9:  # somewhere after the second validation
        time.sleep(0.001)
    process.send_signal(number)
    said, error = process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 130), "it had finished before"
    assert "Traceback" not in error and error.count("finishing this step") == (number != signal.SIGKILL)
    step = load_checkpoint(only_run() / "last.pt")["step"]
    assert 20 <= step < 150
    if number != signal.SIGKILL:
        assert f"stopped after step {step} and saved; continue with the same command and --resume" in said
    train_lm.main([*options, "--resume"])
    assert re.search(rf"resuming after step {step}$", capsys.readouterr().out, re.MULTILINE)
    resumed, resumed_rows = outcome(only_run())
    assert resumed_rows == rows
    assert all(torch.equal(one[name], two[name]) for one, two in zip(tensors, resumed) for name in one)
