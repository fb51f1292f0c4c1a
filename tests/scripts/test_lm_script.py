"""train_lm.py: validation, micro-batches, clipping, memory. (The run folder: test_runs.py; the loop: test_loops.py.)"""
import csv
from dataclasses import replace

import pytest
import torch

import train_lm
from data.text import tokens
from model import LanguageModel
from toolbox import distributed
from toolbox.options import parse_options
from toolbox.run import load_checkpoint

CPU = torch.device("cpu")


def test_a_plain_run_trains_both_models_and_prints_what_the_first_lines_of_the_script_promise(tiny, tmp_path, capsys):
    train_lm.main([*tiny, "--baseline=True", "--max_steps=4", "--eval_every=2", "--seed=1,2,3"])
    said = capsys.readouterr().out
    assert "data: text.txt, 1,512 + 168 tokens (bytes, 1.00 bytes each)" in said and "device: cpu, float32" in said
    assert said.count("--- a sample ---\nto be or not to ") == 6 and said.count(" bits per byte\n") == 6
    assert "1 sensory + 1 relational heads" in said and "2 sensory + 0 relational heads" in said
    assert "DAT 1+1 - Transformer 2+0: " in said and "95% interval" in said
    assert "the Transformer beside it" not in said
    assert [len(list((tmp_path / "out").glob(name))) for name in ("sa1_ra1_*", "sa2_ra0_*")] == [3, 3]


def test_validation_does_not_depend_on_the_batch_size_and_drops_nothing(tiny):
    """Micro-batches of 1, 3, 4, 16 and all at once, over a text whose last window is shorter than the others."""
    cfg, = parse_options(train_lm.Config, argv=[*tiny, "--vocab_size=256"])
    model, text = train_lm.make_model(cfg), torch.randint(256, (20 * cfg.max_len + 6,)).numpy().astype("uint16")
    starts = tokens.fixed_starts(len(text), cfg.max_len)
    losses = [train_lm.evaluate(model, tokens.Tokens(text), starts, replace(cfg, micro_batch=size), CPU, torch.float32)
              for size in (1, 3, 4, 16, 21)]
    assert losses == pytest.approx([losses[0]] * 5, rel=1e-6) and model.training
    idx = torch.from_numpy(text.astype("int64"))                       # each token but the first, once, in a plain loop
    model.eval()
    nats = sum(model(idx[None, i:i + 1 + 16][:, :-1], idx[None, i + 1:i + 17])[1].item() * len(idx[i + 1:i + 17])
               for i in range(0, len(idx) - 1, 16))
    assert losses[0] == pytest.approx(nats / (len(idx) - 1), rel=1e-6)


def test_a_process_without_validation_windows_adds_nothing(tiny, monkeypatch):
    cfg, = parse_options(train_lm.Config, argv=[*tiny, "--vocab_size=256"])
    monkeypatch.setattr(distributed, "RANK", 1)
    monkeypatch.setattr(distributed, "WORLD", 2)
    monkeypatch.setattr(distributed, "total", lambda values: [values[0] + 3.0, values[1] + 1])
    text = tokens.Tokens(torch.arange(40).numpy())
    assert train_lm.evaluate(train_lm.make_model(cfg), text, torch.tensor([0]), cfg, CPU, torch.float32) == 3.0


def test_micro_batches_take_the_step_of_the_whole_batch(tiny, tmp_path, only_run):
    """Also where the last one is smaller: 2 + 2 + 1 sequences."""
    losses = []
    for options in ([], ["--micro_batch=2"], ["--micro_batch=1", "--recompute"]):
        train_lm.main([*tiny, "--dropout=0", "--batch_size=5", "--max_steps=6", "--log_every=1", *options])
        with open(only_run() / "log.csv", newline="") as f:
            losses.append([float(row["train_loss"]) for row in csv.DictReader(f) if row["train_loss"]])
        (tmp_path / "out").rename(tmp_path / f"out{len(losses)}")
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] == pytest.approx(losses[0], rel=1e-5)
    assert losses[1] != losses[0]                                      # they did run in pieces


def test_learning_rate_and_clipping_reach_the_optimizer(tiny, tmp_path, only_run):
    """With gradients clipped to nearly nothing the weights stay as they were; the last step is taken at min_lr."""
    moved = []
    for clip in ("1e-30", "1"):
        train_lm.main([*tiny, "--max_steps=30", "--eval_every=30", "--weight_decay=0", f"--grad_clip={clip}"])
        state = load_checkpoint(only_run() / "last.pt")
        torch.manual_seed(1)
        start = LanguageModel(train_lm.Config(**state["options"])).state_dict()
        moved.append(max((state["model"][k] - start[k]).abs().max().item() for k in start))
        assert [group["lr"] for group in state["optimizer"]["param_groups"]] == pytest.approx([3e-4, 3e-4])
        (tmp_path / "out").rename(tmp_path / f"out{clip}")
    assert moved[0] < 1e-6 and moved[1] > 1e-3


def test_out_of_memory_says_how_to_halve_the_sequences(tiny, capsys, monkeypatch):
    def refused(self, *args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    with monkeypatch.context() as m:                                   # while the model is built
        m.setattr(LanguageModel, "to", refused)
        with pytest.raises(SystemExit):
            train_lm.main(tiny)
        assert "make the model smaller" in (said := capsys.readouterr().err) and said.count("\n") == 1
    monkeypatch.setattr(LanguageModel, "forward", refused)             # during training
    for options, words in ([["--batch_size=8"], "--micro_batch=4"], [["--batch_size=1"], "--recompute"],
                           [["--batch_size=8", "--micro_batch=2", "--seed=2"], "--micro_batch=1"]):
        with pytest.raises(SystemExit) as stop:
            train_lm.main([*tiny, *options])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1 and words in said
