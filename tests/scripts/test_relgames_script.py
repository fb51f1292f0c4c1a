"""train_relgames.py, its pool of processes, and the curves: as a user meets them."""
import csv
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import learning_curves
from toolbox import sweep
import train_relgames
from data import relational_games as games
from train_relgames import Config

ROOT = Path(__file__).parents[2]
TINY = ["--d_model=16", "--d_ff=16", "--epochs=2", "--train_size=20", "--test_size=30", "--device=cpu"]


def results(folder):
    """{cell: what came out, time apart}."""
    cells = {path.stem: json.loads(path.read_text()) for path in (folder / "cells").glob("*.json")}
    return {name: {k: v for k, v in cell.items() if k != "seconds"} for name, cell in cells.items()}


# ---- which cells -----------------------------------------------------------------------------------------------------

def test_the_default_is_one_task_three_models_and_three_seeds():
    cells = train_relgames.cells_of([])
    assert {(c.task, c.train_size, c.n_ra, c.seed) for c in cells} == {
        ("occurs", size, n_ra, seed) for size in (250, 500, 1000) for n_ra in (0, 1, 2) for seed in (1, 2, 3)}


def test_the_sweep_is_the_published_grid():
    cells = train_relgames.cells_of(["--sweep"])
    rows = csv.DictReader(learning_curves.PUBLISHED.read_text().splitlines())
    published = {(row["task"], int(row["train_size"]), int(row["n_ra"])) for row in rows}
    assert {(c.task, c.train_size, c.n_ra) for c in cells} == published
    assert len(cells) == 5 * len(published) and {c.seed for c in cells} == {1, 2, 3, 4, 5}
    assert [c.seed for c in cells] == sorted(c.seed for c in cells)     # whole figures first, then more seeds


def test_what_the_command_line_names_is_taken_and_the_baseline_has_no_relational_options():
    cells = train_relgames.cells_of(["--task=same,xoccurs", "--n_ra=2", "--seed=7", "--train_size=99", "--ra_type=rca"])
    assert [(c.task, c.n_ra, c.ra_type, c.seed, c.train_size) for c in cells] == [
        ("same", 2, "rca", 7, 99), ("same", 0, "ra", 7, 99), ("xoccurs", 2, "rca", 7, 99), ("xoccurs", 0, "ra", 7, 99)]
    assert {c.n_ra for c in train_relgames.cells_of(["--baseline=False"])} == {1, 2}
    wide = train_relgames.cells_of(["--preset=wide"])
    assert {(c.d_model, c.d_ff, c.n_ra) for c in wide} == {(144, 288, 0)} and len(wide) == 9


def test_the_parameters_are_those_of_the_published_models():
    # counted in the authors' package, whose LayerNorms in the blocks have 4 x 128 biases in spite of bias=False
    counts = [train_relgames.count_parameters(Config(n_ra=n_ra)) for n_ra in (0, 1, 2)]
    assert counts == [386_914 - 512, 388_322 - 512, 421_474 - 512]
    wide = train_relgames.count_parameters(Config(d_model=144, d_ff=288, n_ra=0))
    assert wide > max(counts)                                           # v3's baseline is not the smaller one


# ---- images ----------------------------------------------------------------------------------------------------------

def test_no_test_image_equals_a_training_image():
    (images, labels), tests = train_relgames.split(Config(task="same", train_size=3000, test_size=3000))
    test = {image.tobytes() for image in tests["pentos"][0]}
    assert not test & {image.tobytes() for image in images}
    assert len(images) == len(labels) == 3000 and {name: len(t[0]) for name, t in tests.items()} == dict.fromkeys(
        games.SPRITES, 3000)
    raw, raw_labels = (array[:3000] for array in games.generate("same", "pentos", 6000, 3))
    dropped = np.array([image.tobytes() in test for image in raw])      # without care there are some: the test can fail
    assert dropped.sum() > 50 and raw_labels[dropped].mean() > 0.9      # nearly all of them true
    assert labels.sum() == raw_labels.sum()                             # and true ones took their places


def test_models_of_one_seed_see_the_same_images_and_seeds_differ():
    one, two = (train_relgames.split(Config(train_size=50, test_size=50, n_ra=n_ra)) for n_ra in (0, 2))
    other = train_relgames.split(Config(train_size=50, test_size=50, seed=2))
    assert np.array_equal(one[0][0], two[0][0]) and np.array_equal(one[1]["hexos"][0], two[1]["hexos"][0])
    assert not np.array_equal(one[0][0], other[0][0]) and not np.array_equal(one[1]["pentos"][0], other[1]["pentos"][0])


@pytest.fixture
def files(tmp_path):
    """A folder with an original file of 100 images of pentos and one of 40 of hexos."""
    for sprites, n in (("pentos", 100), ("hexos", 40)):
        images, labels = games.generate("between", sprites, n, 1)
        np.savez(tmp_path / f"1task_between_{sprites}.npz", images=images.astype(np.int64), labels=labels[:, None])
    return tmp_path


def test_original_files_are_split_without_overlap_and_sprites_without_a_file_are_left_out(files):
    cfg = Config(task="between", data=str(files), train_size=60, test_size=40)
    (images, labels), tests = train_relgames.split(cfg)
    assert tests.keys() == {"pentos", "hexos"} and len(images) == 60 and len(tests["pentos"][0]) == 40
    together = [*images, *tests["pentos"][0]]
    whole, _ = games.load_npz(files / "1task_between_pentos.npz")
    assert {image.tobytes() for image in together} == {image.tobytes() for image in whole}


@pytest.mark.parametrize("options, words", [
    (dict(train_size=61, test_size=40), "train_size=61: only 60 images of between, pentos are left"),
    (dict(train_size=2, test_size=101), "test_size=101: only 100 images"),
    (dict(sprites="stripes"), "no 1task_between_stripes.npz"),
    (dict(task="same"), "no same_pentos.npz"),
    (dict(test_data="/nowhere"), "no 1task_between_pentos.npz or mini_between_pentos.npz in /nowhere"),
])
def test_wrong_wishes_about_files_are_clear_errors(files, options, words):
    with pytest.raises(ValueError, match=words):
        train_relgames.split(Config(**{**dict(task="between", data=str(files), train_size=10), **options}))


def test_an_error_in_a_worker_is_one_line(files, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train_relgames.main([*TINY, "--task=between", f"--data={files}", "--seed=1", "--n_ra=2", "--baseline=False",
                             "--train_size=90", f"--out_dir={tmp_path / 'out'}"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "train_size=90: only 70 images" in error and error.count("\n") == 1
    assert results(tmp_path / "out") == {}


@pytest.mark.parametrize("option, words", [
    ("--task=smae", "choose from same, occurs"), ("--train_size=1", "must be at least 2"), ("--taks=same", "--task?"),
    ("--workers=0", "at least 1"), ("--beta2=1", "below 1"), ("--n_ra=3", "only n_heads=2 heads"),
    ("--pool=max", "choose"), ("--seed=4294967296", "below 2^32"), ("--dtype=float32,bfloat16", "not a list"),
    ("--sprites=pentos,hexos", "one value"), ("--workers=1,2", "one value"), ("--max_len=4", "means nothing"),
    ("--alternative", "only the drawn xoccurs"), ("--match_params=True,False", "one value")])
def test_impossible_options_are_one_line(capsys, option, words):
    with pytest.raises(SystemExit) as stop:
        train_relgames.main([option])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1


# ---- one cell --------------------------------------------------------------------------------------------------------

def cell(**changes):
    cfg = Config(**{**dict(d_model=16, d_ff=16, train_size=40, test_size=20, batch_size=16, epochs=2), **changes})
    return train_relgames.train(cfg, {}, torch.device("cpu"), torch.float32)


def test_a_cell_is_a_function_of_its_options():
    one, two, other = cell(), cell(), cell(seed=2)
    assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in two.items() if k != "seconds"}
    assert one["train_loss"] != other["train_loss"]


def test_steps_count_whole_epochs_or_stop_at_max_steps():
    steps = []
    assert cell()["steps"] == 2 * 3 == train_relgames.steps_of(Config(train_size=40, batch_size=16, epochs=2))
    cfg = Config(d_model=16, d_ff=16, train_size=40, test_size=20, batch_size=16, epochs=2, max_steps=4)
    assert train_relgames.train(cfg, {}, torch.device("cpu"), torch.float32, lambda: steps.append(1))["steps"] == 4
    assert len(steps) == 4


def test_it_learns_what_it_sees():
    cfg = Config(task="between", d_model=32, d_ff=64, train_size=64, test_size=50, epochs=60, dropout=0.0)
    assert train_relgames.train(cfg, {}, torch.device("cpu"), torch.float32)["train_loss"] < 0.1


def test_accuracy_is_counted_without_dropout_over_all_images():
    torch.manual_seed(0)
    model = train_relgames.make_model(Config(d_model=16, d_ff=16, dropout=0.5))
    images, labels = games.generate("between", "pentos", 1100, 1)       # more than are read at a time
    with torch.no_grad():
        logits = model.eval()(train_relgames.pixels(torch.from_numpy(images)))[0]
        shift = (logits[:, 1] - logits[:, 0]).median()                  # so that half of the answers are 1
        model.head.bias[1] -= shift
    answers = (logits[:, 1] - logits[:, 0] > shift).numpy()
    model.train()
    accuracy = train_relgames.evaluate(model, images, labels, torch.device("cpu"), torch.float32)
    assert accuracy == pytest.approx(np.mean(answers == labels), abs=2 / 1100) and model.training


def test_a_loss_that_is_not_finite_is_an_error():
    assert re.match("the loss became .*: try a lower --learning_rate", cell(learning_rate=1e30, epochs=5)["failed"])


# ---- many cells ------------------------------------------------------------------------------------------------------

@pytest.mark.figures
def test_what_is_finished_is_not_run_again(here, tmp_path, capsys):
    assert here() == 2 and "2 cells, 0 of them finished before" in capsys.readouterr().out
    before = results(tmp_path / "out")
    assert here() == 0 and "2 cells, 2 of them finished before" in capsys.readouterr().out
    path = tmp_path / "out/cells/sa0_ra2_seed1-d_model=16-d_ff=16-train_size=20-test_size=30-epochs=2.json"
    path.write_text(path.read_text()[:100])                             # damaged: as good as none
    assert here() == 1 and "2 cells, 1 of them finished before" in capsys.readouterr().out
    assert results(tmp_path / "out") == before
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "code": "other"}))            # computed by other code
    assert here("--paper") == 1
    assert results(tmp_path / "out") == before
    for name in ("learning_curves.png", "hexos.png", "stripes.png", "table.md", "results.csv"):
        assert (tmp_path / "out" / name).stat().st_size > 100, name


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A function that runs the script in this process; returns how many cells it trained."""
    def run_here(*arguments):
        trained = []
        monkeypatch.setattr(sweep, "run", lambda train, jobs, *a: trained.extend(jobs) or (
            (path, sweep.run_one(train, path, job)) for path, job in jobs.items()))
        monkeypatch.setattr(sweep, "count_step", lambda: None)
        train_relgames.main([*TINY, f"--out_dir={tmp_path / 'out'}", "--seed=1", "--n_ra=2", *arguments])
        return len(trained)
    return run_here


def test_resume_false_runs_everything_again(here):
    assert [here(f"--resume={value}") for value in (True, True, False, True)] == [2, 0, 2, 0]


def test_a_cell_is_run_again_when_its_files_change(here, files):
    options = ("--task=between", f"--data={files}", "--baseline=False")
    test_data = files / "test"
    test_data.mkdir()
    for name in ("1task_between_pentos.npz", "1task_between_hexos.npz"):
        (test_data / name).write_bytes((files / name).read_bytes())
    options += (f"--test_data={test_data}",)
    assert [here(*options), here(*options)] == [1, 0]
    for path in (files / "1task_between_pentos.npz", test_data / "1task_between_pentos.npz",
                 test_data / "1task_between_hexos.npz"):
        images, labels = games.load_npz(path)
        train_relgames.load.cache_clear()
        np.savez(path, images=images.astype(np.int64), labels=1 - labels[:, None])     # the same size and images
        assert [here(*options), here(*options)] == [1, 0]


def test_a_cell_that_diverges_is_named_and_the_others_are_kept(here, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        here("--learning_rate=1e30,1e-3", "--baseline=False", "--epochs=5")
    assert stop.value.code == 1 and "failed: sa0_ra2_seed1" in capsys.readouterr().err
    rows = learning_curves.read_csv(tmp_path / "out/results.csv")
    assert [row["learning_rate"] for row in rows] == ["0.001"]
    assert here("--learning_rate=1e-3", "--baseline=False", "--epochs=5") == 0


def test_cells_of_other_code_stay_out_of_the_figure_and_that_is_said(here, tmp_path, capsys):
    here("--baseline=False")
    path, = (tmp_path / "out/cells").glob("*.json")
    record = json.loads(path.read_text())
    (path.parent / "older.json").write_text(json.dumps({**record, "code": "other"}))
    assert here("--baseline=False") == 0
    assert "left out: 1 cells" in capsys.readouterr().out
    assert len(learning_curves.read_csv(tmp_path / "out/results.csv")) == 1


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_kill_loses_only_the_cells_in_flight_and_leaves_no_process_behind(here, tmp_path, how):
    command = ["--seed=1", "--n_ra=2,1", "--workers=2", "--train_size=20,400"]
    process = subprocess.Popen([sys.executable, "train_relgames.py", *TINY, f"--out_dir={tmp_path / 'out'}", *command,
                                "--epochs=10"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               # where the tests themselves run in the background, SIGINT is ignored and inherited so
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    deadline = time.time() + 100
    while not list((tmp_path / "out/cells").glob("*.json")) and time.time() < deadline:
        time.sleep(0.05)
    workers = children(process.pid)
    process.send_signal(how)
    _, error = process.communicate(timeout=30)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130}[how]
    assert "Traceback" not in error
    while any(map(alive, workers)) and time.time() < deadline:
        time.sleep(0.1)
    assert workers and not any(map(alive, workers))
    n = len(results(tmp_path / "out"))
    assert 1 <= n < 6
    if how == signal.SIGKILL:
        assert here(*command, "--epochs=10") == 6 - n and len(results(tmp_path / "out")) == 6


def slow(number, step_done):
    step_done()
    time.sleep(60 if number else 0)
    return {"number": number}


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX")
def test_a_worker_that_is_killed_is_a_clear_error(tmp_path):
    jobs = {tmp_path / f"{i}.json": (i,) for i in range(2)}
    done = sweep.run(slow, jobs, 2, workers=1)
    path, result = next(done)
    assert result == {"number": 0} and sweep.load(path) == result
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(ValueError, match="a worker was killed"):
        next(done)
    assert sweep.load(tmp_path / "1.json") == {}
