"""What the loops of train_lm.py, train_seq2seq.py and train_vit.py all promise: interrupted runs continue bit for bit,
nothing that is not finite is saved, evaluation costs no time on the clock, both models read the same data.
"""
import csv
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from torch.overrides import TorchFunctionMode

import toolbox.run
import train_lm
import train_seq2seq
import train_vit
from data import images
from model import LanguageModel, Seq2SeqTransformer, VisionTransformer
from toolbox import training

pytestmark = pytest.mark.usefixtures("brief_reports")
SMALL = ["--d_model=16", "--d_ff=16", "--n_layers=1", "--n_heads=2", "--n_ra=1", "--dropout=0.1", "--batch_size=4",
         "--warmup_steps=3", "--max_steps=12", "--eval_every=5", "--log_every=4", "--baseline=False", "--device=cpu"]
SCRIPTS = {
    train_lm: ["--max_len=16", "--n_symbols=4", "--symbol_heads=2", "--eval_windows=8", "--micro_batch=3"],
    train_seq2seq: ["--train_size=30", "--val_size=6"],
    train_vit: ["--val_size=40", "--grad_accum=2", "--crop_padding=2", "--cutmix=1", "--mixup=0.5",
                "--label_smoothing=0.1", "--memory_slots=4", "--bottleneck=8"]}


@pytest.fixture(scope="module", autouse=True)
def little_data():
    with pytest.MonkeyPatch.context() as m:
        m.setattr(train_seq2seq, "HELD_OUT", 20)
        for part, n in (("train", 200), ("test", 60)):
            m.setitem(images.N_GLYPHS, part, n)
        yield


@pytest.fixture(scope="module", params=SCRIPTS, ids=lambda script: script.__name__)
def script(request):
    return request.param


@pytest.fixture(scope="module")
def train(script, tmp_path_factory):
    """A function: runs the script with its output in this folder -> the folder of the run, the first of several."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("to be or not to be, that is the question. " * 40)
    data = [f"--data={folder / 'text.txt'}"] if script is train_lm else []

    def run(out_dir, *options):
        script.main([*SMALL, *SCRIPTS[script], *data, f"--data_dir={folder}", f"--out_dir={out_dir}", *options])
        return folder_in(out_dir)
    return run


def folder_in(out_dir):
    return next(path.parent for path in sorted(out_dir.glob("*/config.json")) if path.parent.suffix != ".old")


def rows_of(folder):
    with open(folder / "log.csv", newline="") as f:
        return list(csv.DictReader(f))


def outcome(folder):
    """What does not depend on interruptions: both checkpoints, and the log without its clock."""
    checkpoints = {name: torch.load(folder / name, weights_only=True) for name in ("last.pt", "best.pt")}
    for checkpoint in checkpoints.values():
        for name in ("seconds", "row", "options"):                     # options: whether it was resumed
            del checkpoint[name]
    rows = [{k: v for k, v in row.items() if k != "seconds" and not k.endswith("_per_s")} for row in rows_of(folder)]
    return checkpoints, rows


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """The outcome of a run that nothing interrupts."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Figure, "savefig", lambda *args, **options: None)
        return outcome(train(tmp_path_factory.mktemp("whole")))


def assert_equal(one, two):
    """Equal to the last bit, in nested dicts and lists."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for name in one:
            assert_equal(one[name], two[name])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two)
        for a, b in zip(one, two):
            assert_equal(a, b)
    else:
        assert one == two


@pytest.fixture
def ctrl_c():
    """A function that sends SIGINT to this process, which does not ignore it (a background job of a shell would)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def at_step(monkeypatch):
    """A function: `do(step)` is called at the beginning of each training step."""
    def call(do):
        reseed = training.reseed
        monkeypatch.setattr(training, "reseed", lambda seed, step, *rank: (do(step), reseed(seed, step, *rank)))
    return call


# ---- interrupted and resumed -----------------------------------------------------------------------------------------

def test_a_log_has_a_row_for_each_training_loss_and_one_for_each_validation(whole):
    _, rows = whole
    assert [(row["step"], bool(row["train_loss"]), bool(row["val_loss"])) for row in rows] == [
        ("0", False, True), ("4", True, False), ("5", False, True), ("8", True, False), ("10", False, True),
        ("12", True, False), ("12", False, True)]
    assert all(bool(row["lr"]) == bool(row["train_loss"]) for row in rows)


def test_the_training_accuracy_is_the_share_of_right_answers_in_the_batches_since_the_last_row(script, train, tmp_path,
                                                                                               monkeypatch):
    """Computed again from what the model returned in each pass; language models log none."""
    if script is train_lm:
        pytest.skip("losses alone")
    Model, passes = (VisionTransformer, []) if script is train_vit else (Seq2SeqTransformer, [])
    forward = Model.forward

    def recorded(model, *inputs):
        logits, loss = forward(model, *inputs)
        if model.training:
            targets = inputs[1].argmax(-1) if script is train_vit else inputs[2]
            passes.append((logits.argmax(-1) == targets)[targets != (-1 if script is train_vit else 0)].double().mean())
        return logits, loss
    monkeypatch.setattr(Model, "forward", recorded)
    rows = [row for row in rows_of(train(tmp_path)) if row["train_loss"]]
    each = len(passes) // len(rows)                                   # 4 steps: 8 passes with --grad_accum=2
    for i, row in enumerate(rows):
        assert float(row["train_accuracy"]) == pytest.approx(sum(passes[each * i:each * (i + 1)]).item() / each)


@pytest.mark.parametrize("stopped_at", [7, 12])                        # no row and no validation; the last step
def test_ctrl_c_finishes_the_step_and_saves_and_resume_continues_bit_for_bit(stopped_at, train, whole, at_step,
                                                                             ctrl_c, tmp_path, capsys):
    at_step(lambda step: ctrl_c() if step == stopped_at else None)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path)
    said = capsys.readouterr().out
    assert stop.value.code == 130 and f"stopped after step {stopped_at} and saved" in said and "--resume" in said
    assert torch.load(folder_in(tmp_path) / "last.pt", weights_only=True)["step"] == stopped_at
    assert '"finished": false' in (folder_in(tmp_path) / "config.json").read_text()
    assert_equal(outcome(train(tmp_path, "--resume")), whole)
    said = capsys.readouterr().out
    assert f"resuming after step {stopped_at}" in said and ": reused" not in said


@pytest.mark.parametrize("dies_at", [3, 9])                            # before the first checkpoint, after it
def test_resume_after_a_crash_equals_an_uninterrupted_run(dies_at, train, whole, at_step, tmp_path):
    crashes = [dies_at]

    def die(step):
        if step in crashes:
            crashes.clear()
            raise MemoryError
    at_step(die)
    with pytest.raises(MemoryError):
        train(tmp_path)
    assert_equal(outcome(train(tmp_path, "--resume")), whole)


# ---- what is not finite ----------------------------------------------------------------------------------------------

@pytest.fixture
def not_finite(at_step, monkeypatch):
    """A function: at one step "train_loss", "val_loss" or "gradient norm" is multiplied by a value (NaN, infinity)."""
    def multiply(what, at, value):
        now, cross_entropy, clip = [0], torch.nn.functional.cross_entropy, torch.nn.utils.clip_grad_norm_
        at_step(lambda step: now.__setitem__(0, step))

        def loss(*args, **options):
            hit = now[0] == at and what == ("train_loss" if torch.is_grad_enabled() else "val_loss")
            return cross_entropy(*args, **options) * (value if hit else 1)
        monkeypatch.setattr(torch.nn.functional, "cross_entropy", loss)
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: clip(*args) * (
            value if now[0] == at and what == "gradient norm" else 1))
    return multiply


@pytest.mark.parametrize("what, at, value", [
    ("train_loss", 7, "nan"), ("train_loss", 7, "inf"), ("train_loss", 9, "nan"), ("gradient norm", 7, "inf"),
    ("gradient norm", 10, "nan"), ("val_loss", 10, "nan"), ("val_loss", 10, "inf")])
def test_what_is_not_finite_ends_the_script_with_one_line_and_the_last_good_checkpoint_stays(
        what, at, value, train, not_finite, tmp_path, capsys):
    """Losses are read at the next row, here of step 8, or the next checkpoint, of step 10."""
    not_finite(what, at, float(value))
    with pytest.raises(SystemExit) as stop:
        train(tmp_path)
    folder, error = folder_in(tmp_path), capsys.readouterr().err
    what = "val_loss" if at == 9 else what                             # with weights of NaN it is seen first
    assert stop.value.code == 1 and error.count("\n") == 1 and "Traceback" not in error
    assert f"{what} {'nan' if at == 9 else value}: stopped; {folder / 'last.pt'} is the last good checkpoint" in error
    for name in ("last.pt", "best.pt"):
        state = torch.load(folder / name, weights_only=True)
        assert state["step"] == 5 and all(w.isfinite().all() for w in state["model"].values())
    assert "nan" not in (folder / "log.csv").read_text() and "inf" not in (folder / "log.csv").read_text()
    assert '"finished": false' in (folder / "config.json").read_text()


def test_ctrl_c_after_a_loss_that_is_not_finite_saves_nothing(train, not_finite, at_step, ctrl_c, tmp_path, capsys):
    not_finite("train_loss", 6, float("nan"))
    at_step(lambda step: ctrl_c() if step == 7 else None)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path)
    assert stop.value.code == 1 and "train_loss nan" in capsys.readouterr().err
    assert torch.load(folder_in(tmp_path) / "last.pt", weights_only=True)["step"] == 5


# ---- the device, the clock, the data ---------------------------------------------------------------------------------

def test_losses_are_read_from_the_device_only_for_a_row_or_a_checkpoint(script, train, at_step, tmp_path):
    """Reading a number makes the program wait for a GPU."""
    now, read_at = [0], set()
    at_step(lambda step: now.__setitem__(0, step))

    class Reads(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function.__name__ in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__format__"):
                if args[0].is_floating_point() or args[0].dtype == torch.bool:
                    read_at.add(now[0])
            return function(*args, **(kwargs or {}))
    with Reads():
        train(tmp_path, *(["--mixup=0", "--cutmix=0"] if script is train_vit else []))      # these draw on the CPU
    assert read_at == {0, 4, 5, 8, 10, 12}


def test_the_clock_stands_still_during_evaluation(script, train, at_step, tmp_path, monkeypatch):
    """Here each step takes a second, and each evaluation a thousand."""
    now, evaluate = [0.0], script.evaluate
    at_step(lambda step: now.__setitem__(0, now[0] + 1))
    monkeypatch.setattr(toolbox.run, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(script, "evaluate", lambda *args: (now.__setitem__(0, now[0] + 1000), evaluate(*args))[1])
    rows = rows_of(train(tmp_path))
    unit = list(rows[0])[1]
    assert [float(row["seconds"]) for row in rows] == [float(row["step"]) for row in rows]
    per_step = {train_lm: 4 * 16, train_seq2seq: 4, train_vit: 4 * 2}[script]
    assert {row[f"{unit}_per_s"] for row in rows if row["train_loss"]} == {str(per_step)}
    assert all(int(row[unit]) == int(row["step"]) * per_step for row in rows)


def test_both_models_read_the_same_data_in_the_same_order(script, train, tmp_path):
    """Also with dropout, of which they use different amounts: the data of a step depend on seed and step alone."""
    read = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: read.append(inputs[0]) if module.training and isinstance(
            module, (LanguageModel, Seq2SeqTransformer, VisionTransformer)) else None)
    try:
        train(tmp_path, "--n_ra=1,0", *(["--grad_accum=1"] if script is train_vit else []))
    finally:
        hook.remove()
    n = len(read) // 2
    assert n == 12 * (2 if script is train_lm else 1) and all(torch.equal(read[i], read[i + n]) for i in range(n))
    assert not any(torch.equal(read[i], read[i + 1]) for i in range(n - 1) if read[i].shape == read[i + 1].shape)
