"""train_relgames.py: which runs a command makes, one run, and many runs in a pool of processes."""
import csv
import json
import multiprocessing
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_runs import change

import toolbox.run
import train_relgames
from data import relational_games as games
from data.relational_games import splits
from toolbox import sweep
from toolbox.figures import relational_games as figure
from toolbox.files import try_lock
from toolbox.run import Run, load_checkpoint, run_name
from toolbox.training import count_parameters
from train_relgames import SIZES, Config, configs_of, make_model

ROOT = Path(__file__).parents[2]
TINY = ["--d_model=16", "--d_ff=16", "--epochs=2", "--train_size=20", "--test_size=30", "--device=cpu"]
CPU = torch.device("cpu")


def records(folder):
    """{folder of a finished run: its config.json}."""
    paths = [path for path in folder.glob("sa*/config.json") if path.parent.suffix != ".old"]
    found = {path.parent: json.loads(path.read_text()) for path in paths}
    return {path: record for path, record in found.items() if record["finished"]}


def scores(folder):
    return {path.name: record["scores"] for path, record in records(folder).items()}


def rows_of(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


# ---- which runs ------------------------------------------------------------------------------------------------------

def test_the_default_is_one_task_three_models_and_three_seeds():
    assert {(c.task, c.train_size, c.n_ra, c.seed) for c in configs_of([])} == {
        ("occurs", size, n_ra, seed) for size in SIZES["occurs"] for n_ra in (0, 1, 2) for seed in (1, 2, 3)}


def test_the_sweep_is_the_published_figure():
    configs = configs_of(["--sweep"])
    published = {(row["task"], int(row["train_size"]), int(row["n_ra"])) for row in rows_of(figure.PUBLISHED)}
    assert {(c.task, c.train_size, c.n_ra) for c in configs} == published
    assert len(configs) == 5 * len(published) and {c.seed for c in configs} == {1, 2, 3, 4, 5}
    assert [c.seed for c in configs] == sorted(c.seed for c in configs)     # the whole figure first, then more seeds
    assert not any(c.keep_weights for c in configs) and all(c.keep_weights for c in configs_of([]))


def test_options_on_the_command_line_replace_the_sweep_and_the_baseline_has_no_relational_options():
    configs = configs_of(["--task=same,xoccurs", "--n_ra=2", "--seed=7", "--train_size=99", "--ra_type=rca"])
    assert [(c.task, c.n_ra, c.ra_type, c.seed, c.train_size) for c in configs] == [
        ("same", 2, "rca", 7, 99), ("same", 0, "ra", 7, 99), ("xoccurs", 2, "rca", 7, 99), ("xoccurs", 0, "ra", 7, 99)]
    assert {c.n_ra for c in configs_of(["--baseline=False"])} == {1, 2}
    wide = configs_of(["--preset=wide"])
    assert {(c.d_model, c.d_ff, c.n_ra) for c in wide} == {(144, 288, 0)} and len(wide) == 3 * len(SIZES["occurs"])


def test_the_parameters_are_those_of_the_published_models():
    # counted in the authors' package, whose LayerNorms in the blocks have 4 x 128 biases in spite of bias=False
    counts = [count_parameters(make_model, Config(n_ra=n_ra)) for n_ra in (0, 1, 2)]
    assert counts == [386_914 - 512, 388_322 - 512, 421_474 - 512]
    wide = count_parameters(make_model, Config(d_model=144, d_ff=288, n_ra=0))
    assert wide > max(counts)                                           # v3's baseline is not the smaller one


# ---- wrong input -----------------------------------------------------------------------------------------------------

@pytest.fixture
def files(tmp_path):
    """A folder with an original file of 100 images of pentos and one of 40 of hexos."""
    splits.load.cache_clear()
    (tmp_path / "files").mkdir()
    for sprites, n in (("pentos", 100), ("hexos", 40)):
        images, labels = games.generate("between", sprites, n, 1)
        path = tmp_path / f"files/1task_between_{sprites}.npz"
        np.savez(path, images=images.astype(np.int64), labels=labels[:, None])
    return tmp_path / "files"


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        train_relgames.main([*arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    return error


def test_an_error_in_a_worker_is_one_line(files, tmp_path, capsys):
    error = refused(capsys, *TINY, "--task=between", f"--data={files}", "--seed=1", "--n_ra=2", "--baseline=False",
                    "--train_size=90", f"--out_dir={tmp_path / 'out'}")
    assert "train_size=90: only 70 images" in error and not records(tmp_path / "out")


def test_files_that_are_missing_are_noticed_before_anything_is_trained(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "train_all", None)
    options = f"--data={files}", f"--out_dir={tmp_path / 'out'}"
    assert "no same_pentos.npz" in refused(capsys, *options, "--task=between,same")
    assert "no 1task_between_stripes.npz" in refused(capsys, *options, "--task=between", "--sprites=stripes")
    assert "in /nowhere" in refused(capsys, *options, "--task=between", "--test_data=/nowhere")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option, words", [
    ("--task=smae", "choose from same, occurs"), ("--train_size=1", "must be at least 2"), ("--taks=same", "--task?"),
    ("--workers=0", "at least 1"), ("--beta2=1", "below 1"), ("--n_ra=3", "n_heads=2"),
    ("--pool=max", "choose"), (f"--seed={2 ** 63}", "below 2^63"), ("--dtype=float32,bfloat16", "not a list"),
    ("--sprites=pentos,hexos", "one value"), ("--workers=1,2", "one value"), ("--max_len=4", "means nothing"),
    ("--alternative", "only the drawn xoccurs"), ("--match_params=True,False", "one value")])
def test_impossible_options_are_one_line(capsys, option, words):
    assert words in refused(capsys, option)


# ---- one run ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def trained(tmp_path):
    """A function that trains one run -> its folder's config.json and log."""
    def train(**changes):
        small = dict(d_model=16, d_ff=16, train_size=40, test_size=20, batch_size=16, epochs=2, log_every=2)
        cfg = Config(**{**small, **changes, "out_dir": str(tmp_path / f"run{len(list(tmp_path.iterdir()))}")})
        steps = cfg.epochs * train_relgames.steps_per_epoch(cfg)
        with Run(cfg, {"dtype": "float32"}, unit="images", metrics=("train_accuracy",), per_step=cfg.batch_size,
                 max_steps=steps) as run:
            train_relgames.train(run, cfg.data, CPU, torch.float32)
        return json.loads((run.folder / "config.json").read_text()), rows_of(run.folder / "log.csv")
    return train


def test_a_run_is_a_function_of_its_options(trained):
    (one, log), (two, log2), (other, _) = trained(), trained(), trained(seed=2)
    losses = [[row["train_loss"] for row in rows] for rows in (log, log2)]
    assert losses[0] == losses[1] and one["scores"] == two["scores"] != other["scores"]
    assert one["scores"].keys() == set(games.SPRITES)
    assert [(row["step"], row["images"]) for row in log] == [("2", "32"), ("4", "64"), ("6", "96")]   # 3 an epoch


def test_the_finished_weights_are_kept_unless_not_wanted(tmp_path, trained):
    for keep in (True, False):
        one, _ = trained(keep_weights=keep)
        path = Path(one["options"]["out_dir"]) / run_name(Config(**one["options"])) / "weights.pt"
        assert path.exists() == keep
        if keep:
            model = make_model(Config(**one["options"]))
            model.load_state_dict(load_checkpoint(path)["model"])
            _, tests = games.split("occurs", "pentos", 40, 20, 1)
            assert train_relgames.evaluate(model, *tests["hexos"], CPU, torch.float32) == one["scores"]["hexos"]


def test_each_epoch_shows_each_image_once_and_models_of_one_seed_see_the_same(trained, monkeypatch):
    seen, pixels = [], train_relgames.pixels
    monkeypatch.setattr(train_relgames, "evaluate", lambda *args: 0.5)
    monkeypatch.setattr(train_relgames, "pixels", lambda images: (seen.append(images), pixels(images))[1])
    for options in (dict(n_ra=2), dict(n_ra=0), dict(n_ra=2, seed=2)):
        trained(**options)
    one, baseline, other = seen[:6], seen[6:12], seen[12:]
    assert all(torch.equal(a, b) for a, b in zip(one, baseline)) and not torch.equal(one[0], other[0])
    epochs = [sorted(image.numpy().tobytes() for image in torch.cat(batches)) for batches in (one[:3], one[3:])]
    assert epochs[0] == epochs[1] and len(epochs[0]) == 40 and not torch.equal(one[0], one[3])


def test_a_small_training_set_is_learned_by_heart(trained):
    _, log = trained(task="between", d_model=32, d_ff=64, train_size=64, test_size=50, epochs=60, dropout=0.0,
                     batch_size=512, log_every=10)
    assert float(log[-1]["train_loss"]) < 0.1


def test_accuracy_is_counted_without_dropout_over_all_images():
    torch.manual_seed(0)
    model = make_model(Config(d_model=16, d_ff=16, dropout=0.5))
    images, labels = games.generate("between", "pentos", 1100, 1)       # more than are read at a time
    with torch.no_grad():
        logits = model.eval()(train_relgames.pixels(torch.from_numpy(images)))[0]
        shift = (logits[:, 1] - logits[:, 0]).median()                  # so that half of the answers are 1
        model.head.bias[1] -= shift
    answers = (logits[:, 1] - logits[:, 0] > shift).numpy()
    model.train()
    accuracy = train_relgames.evaluate(model, images, labels, CPU, torch.float32)
    assert accuracy == pytest.approx(np.mean(answers == labels), abs=2 / 1100) and model.training


# ---- many runs -------------------------------------------------------------------------------------------------------

@pytest.fixture
def here(tmp_path, monkeypatch):
    """A function that runs the script, its runs in this process; returns how many runs it trained."""
    def train_all(train, runs, arguments, workers):
        for run in runs:
            trained.append(run)
            try:
                yield run, sweep.train_one(train, run, arguments)
            except SystemExit:
                yield run, None
    trained = []
    monkeypatch.setattr(sweep, "train_all", train_all)
    monkeypatch.setattr(sweep.StepCounter, "counter", multiprocessing.Value("q", 0))

    def run_here(*arguments):
        trained.clear()
        train_relgames.main([*TINY, f"--out_dir={tmp_path / 'out'}", "--seed=1", "--n_ra=2", *arguments])
        return len(trained)
    return run_here


@pytest.mark.figures
def test_what_is_finished_is_not_run_again(here, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert here() == 2 and "2 runs, 0 of them finished before" in capsys.readouterr().out
    for name in ("learning_curves.png", "hexos.png", "stripes.png", "table.md", "results.csv"):
        assert (out / name).stat().st_size > 100, name
    before = scores(out)
    assert sorted(before) == ["sa0_ra2_seed1-d_model=16-d_ff=16-train_size=20-test_size=30-epochs=2",
                              "sa2_ra0_seed1-d_model=16-d_ff=16-train_size=20-test_size=30-epochs=2"]
    for folder in records(out):
        assert {path.name for path in folder.iterdir()} == {"config.json", "log.csv", "weights.pt"}
    assert here() == 0 and "2 runs, 2 of them finished before" in capsys.readouterr().out
    folder = out / sorted(before)[0]
    for damage in (lambda: (folder / "config.json").write_text("{ half a fi"), lambda: change(folder, finished=False),
                   lambda: change(folder, code="other"), lambda: change(folder, torch="1.0")):
        damage()
        assert here() == 1 and "2 runs, 1 of them finished before" in capsys.readouterr().out
        assert scores(out) == before


def test_a_run_is_made_again_when_its_files_change_and_not_when_they_move(here, files, tmp_path):
    options = ("--task=between", "--baseline=False")
    data, test_data = f"--data={files}", f"--test_data={tmp_path / 'test'}"
    (tmp_path / "test").mkdir()
    for name in ("1task_between_pentos.npz", "1task_between_hexos.npz"):
        (tmp_path / "test" / name).write_bytes((files / name).read_bytes())
    assert [here(*options, data, test_data) for _ in range(2)] == [1, 0]
    for path in (files / "1task_between_pentos.npz", tmp_path / "test/1task_between_pentos.npz",
                 tmp_path / "test/1task_between_hexos.npz"):
        images, labels = games.load_npz(path)
        splits.load.cache_clear()
        np.savez(path, images=images.astype(np.int64), labels=1 - labels[:, None])     # the same size and images
        assert [here(*options, data, test_data) for _ in range(2)] == [1, 0]
    (tmp_path / "there").mkdir()
    assert here(*options, f"--data={files.rename(tmp_path / 'there/files')}", test_data) == 0


def test_max_steps_ends_a_training_early_and_never_late(here, tmp_path):
    def last_steps(*options):
        here("--train_size=40", "--batch_size=16", "--baseline=False", *options)
        return [rows_of(folder / "log.csv")[-1]["step"] for folder in records(tmp_path / "out")]
    assert last_steps() == ["6"]                                        # two epochs of three steps
    assert sorted(last_steps("--max_steps=4")) == ["4", "6"]
    assert sorted(last_steps("--max_steps=100")) == ["4", "6", "6"]


def test_a_run_that_diverges_is_named_and_the_others_are_kept(here, tmp_path, capsys):
    options = ("--baseline=False", "--epochs=5")
    with pytest.raises(SystemExit) as stop:
        here("--learning_rate=1e30,1e-3", *options)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.splitlines()[-1].startswith("failed: sa0_ra2_seed1") and "1e+30" in error
    assert ": train_loss nan: stopped" in error and error.count("\n") == 2
    assert [row["learning_rate"] for row in rows_of(tmp_path / "out/results.csv")] == ["0.001"]
    assert here("--learning_rate=1e-3", *options) == 0


def test_a_sweep_in_which_every_run_diverges_says_so(here, capsys):
    with pytest.raises(SystemExit) as stop:
        here("--learning_rate=1e30", "--epochs=5")
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.splitlines()[-1].startswith("failed: sa0_ra2_seed1")


def test_a_run_that_another_process_trains_is_left_to_it(here, tmp_path, capsys):
    here()
    finished = scores(tmp_path / "out")
    folder = max(records(tmp_path / "out"))                             # the Transformer
    change(folder, finished=False)
    with open(folder.with_name(f".{folder.name}.lock"), "a") as other:
        assert try_lock(other)
        with pytest.raises(SystemExit) as stop:
            here()
    assert stop.value.code == 1 and "another process is training" in capsys.readouterr().err
    assert here() == 1 and scores(tmp_path / "out") == finished


def test_a_run_that_another_command_has_finished_meanwhile_is_not_made_again(here, tmp_path, monkeypatch):
    here("--baseline=False")
    before, reusable = records(tmp_path / "out"), Run.reusable
    answers = [False]                                                  # it is not finished when this command starts
    monkeypatch.setattr(Run, "reusable", lambda run, quiet: answers.pop() if answers else reusable(run, quiet))
    assert here("--baseline=False") == 1 and records(tmp_path / "out") == before
    assert not list((tmp_path / "out").glob("*.old"))


def test_runs_of_other_code_stay_out_of_the_figure_and_that_is_said(here, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(toolbox.run, "code_hash", lambda cfg: "other")
        here("--baseline=False")
    assert here("--baseline=False", "--d_ff=8") == 1
    assert "code or torch than the newest run: 1 of 2 runs" in capsys.readouterr().out
    assert len(rows_of(tmp_path / "out/results.csv")) == 1


def test_a_sweep_in_pieces_is_drawn_as_one(here, tmp_path):
    here("--baseline=False")
    here("--n_ra=0", "--seed=2", "--task=same,occurs")
    assert {(row["task"], row["n_ra"], row["seed"]) for row in rows_of(tmp_path / "out/results.csv")} == {
        ("occurs", "2", "1"), ("occurs", "0", "2"), ("same", "0", "2")}


# ---- processes -------------------------------------------------------------------------------------------------------

def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_kill_loses_only_the_runs_under_way_and_leaves_no_process_behind(how, here, tmp_path):
    command = ["--n_ra=2,1", "--workers=2", "--train_size=20,200", "--epochs=30"]
    process = subprocess.Popen([sys.executable, train_relgames.__file__, *TINY, f"--out_dir={tmp_path / 'out'}",
                                "--seed=1", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               # background jobs of a shell inherit that SIGINT is ignored
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    deadline = time.time() + 100
    while not records(tmp_path / "out") and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    workers = children(process.pid)
    process.send_signal(how)
    _, error = process.communicate(timeout=30)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130}[how]
    assert "Traceback" not in error
    while any(map(alive, workers)) and time.time() < deadline:
        time.sleep(0.05)
    assert len(workers) >= 2 and not any(map(alive, workers))
    n = len(records(tmp_path / "out"))
    assert 1 <= n < 6
    if how == signal.SIGKILL:
        assert here(*command) == 6 - n and len(records(tmp_path / "out")) == 6
