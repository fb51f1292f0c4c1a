"""Train longer (--resume with more --max_steps), and start from weights that are there (--init_from)."""
import csv
import json
from dataclasses import asdict

import pytest
import torch
from test_pretrained import DAT, random_weights, write

import train_lm
import train_relgames
import train_seq2seq
import train_vit
from conftest import TINY
from data import images
from model import LanguageModel, model_config
from toolbox.checkpoints import initialise, load_checkpoint, load_initial
from toolbox.training import learning_rate

pytestmark = pytest.mark.usefixtures("brief_reports")
SIX, TWELVE = (["--eval_every=3", "--log_every=2", "--warmup_steps=2", f"--max_steps={n}"] for n in (6, 12))


def folder_of(tmp_path, pattern):
    found = (path.parent for path in (tmp_path / "out").glob(f"{pattern}/config.json"))
    folder, = (folder for folder in found if folder.suffix != ".old")
    return folder


def steps(folder, column="train_loss"):
    with open(folder / "log.csv", newline="", encoding="utf-8") as f:
        return {int(row["step"]): row[column] for row in csv.DictReader(f) if row[column]}


def record(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def refused(main, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    return error


# ---- longer ----------------------------------------------------------------------------------------------------------

def test_more_steps_go_on_from_the_last_checkpoint_and_the_change_of_the_schedule_is_said(tiny, tmp_path, capsys):
    train_lm.main([*tiny, *SIX])
    six = folder_of(tmp_path, "*max_steps=6*")
    before = {path.name: path.read_bytes() for path in six.iterdir()}
    capsys.readouterr()
    train_lm.main([*tiny, *TWELVE, "--resume"])
    said, twelve = capsys.readouterr().out, folder_of(tmp_path, "*max_steps=12*")
    cfg6, cfg12 = (train_lm.Config(**load_checkpoint(folder / "last.pt")["options"]) for folder in (six, twelve))
    assert f"going on from {six.name}, which stays as it is" in said and "resuming after step 6" in said
    assert (f"the schedule now ends at step 12, not 6: the learning rate was {learning_rate(6, cfg6):.3g} at step 6 "
            f"and is {learning_rate(7, cfg12):.3g} at step 7") in said
    assert before == {path.name: path.read_bytes() for path in six.iterdir()}
    assert load_checkpoint(twelve / "last.pt")["step"] == 12 and list(steps(twelve)) == [2, 4, 6, 8, 10, 12]
    assert list(steps(twelve, "val_loss")) == [0, 3, 6, 9, 12]
    rates = {step: float(lr) for step, lr in steps(twelve, "lr").items()}
    assert rates[6] == learning_rate(6, cfg6) and rates[8] == learning_rate(8, cfg12)
    assert record(twelve)["continued"] == {"from": six.name, "step": 6, "max_steps": 6} and record(twelve)["finished"]
    assert (twelve / "best.pt").exists()


def test_a_run_that_went_on_is_reused_with_resume_only_and_can_be_interrupted(tiny, tmp_path, capsys, monkeypatch):
    train_lm.main([*tiny, *SIX])
    seen, reseed = [], train_lm.training.reseed

    def crash(seed, step, *rank):
        seen.append(step)
        return 1 / 0 if step == 11 else reseed(seed, step, *rank)
    with monkeypatch.context() as m, pytest.raises(ZeroDivisionError):
        m.setattr(train_lm.training, "reseed", crash)
        train_lm.main([*tiny, *TWELVE, "--resume"])
    assert seen == [7, 8, 9, 10, 11]
    train_lm.main([*tiny, *TWELVE, "--resume"])
    twelve = folder_of(tmp_path, "*max_steps=12*")
    assert "resuming after step 9" in capsys.readouterr().out and record(twelve)["continued"]["step"] == 6
    train_lm.main([*tiny, *TWELVE, "--resume"])
    assert ": reused" in capsys.readouterr().out
    train_lm.main([*tiny, *TWELVE])                                    # a run from the start has another schedule
    said = capsys.readouterr().out
    assert ": reused" not in said and "the earlier run moves to" in said
    assert "continued" not in record(twelve) and list(steps(twelve, "val_loss")) == [0, 3, 6, 9, 12]


def test_with_a_constant_schedule_nothing_changes(tiny, tmp_path, capsys):
    """The longer run equals one from the start, bit for bit."""
    train_lm.main([*tiny, *TWELVE, "--schedule=constant"])
    whole = folder_of(tmp_path, "*max_steps=12*")
    expected = load_checkpoint(whole / "last.pt")["model"]
    (tmp_path / "out").rename(tmp_path / "whole")
    train_lm.main([*tiny, *SIX, "--schedule=constant"])
    train_lm.main([*tiny, *TWELVE, "--schedule=constant", "--resume"])
    longer = folder_of(tmp_path, "*max_steps=12*")
    found = load_checkpoint(longer / "last.pt")["model"]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert steps(longer) == steps(tmp_path / "whole" / whole.name) and "continued" not in record(longer)
    capsys.readouterr()
    train_lm.main([*tiny, *TWELVE, "--schedule=constant"])
    assert ": reused" in capsys.readouterr().out


def test_only_a_run_that_differs_in_max_steps_alone_is_gone_on_from(tiny, tmp_path, capsys):
    for options in (["--seed=2"], ["--learning_rate=1e-4"], ["--max_steps=20"]):
        train_lm.main([*tiny, *SIX, *options])
    (tmp_path / "out" / "foreign").mkdir()
    (tmp_path / "out" / "foreign" / "last.pt").write_bytes(b"foreign")
    train_lm.main([*tiny, *TWELVE, "--resume"])
    assert "nothing to resume, starting at step 0" in capsys.readouterr().out
    assert list(steps(folder_of(tmp_path, "*max_steps=12*"), "val_loss"))[0] == 0


@pytest.mark.parametrize("script, options", [
    (train_seq2seq, ["--train_size=30", "--val_size=6"]), (train_vit, ["--val_size=20"])], ids=["seq2seq", "vit"])
def test_the_other_scripts_train_longer_and_start_from_a_checkpoint_too(script, options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_seq2seq, "HELD_OUT", 10)
    for part, n in (("train", 60), ("test", 20)):
        monkeypatch.setitem(images.N_GLYPHS, part, n)
    options = ["--d_model=16", "--d_ff=16", "--n_layers=1", "--n_heads=2", "--n_ra=1", "--batch_size=2", "--device=cpu",
               f"--out_dir={tmp_path / 'out'}", "--baseline=False", *options]
    script.main([*options, *SIX])
    script.main([*options, *TWELVE, "--resume"])
    twelve = folder_of(tmp_path, "*max_steps=12*")
    assert "now ends at step 12, not 6" in capsys.readouterr().out and load_checkpoint(twelve / "last.pt")["step"] == 12
    script.main([*options, *SIX, f"--init_from={twelve}"])
    started = folder_of(tmp_path, "*init_from*")
    assert "starting with the weights of" in capsys.readouterr().out
    assert record(started)["facts"]["initial_weights"] == load_initial(twelve)["sha256"]


# ---- --init_from -----------------------------------------------------------------------------------------------------

def test_a_run_starts_with_the_weights_of_a_checkpoint(tiny, tmp_path, capsys, monkeypatch):
    """Its first validation loss is the last one of the run from which they come; its optimizer and schedule are new."""
    train_lm.main([*tiny, *SIX])
    six = folder_of(tmp_path, "*max_steps=6*")
    for path in (six, six / "last.pt"):
        train_lm.main([*tiny, *SIX, f"--init_from={path}", "--learning_rate=1e-4"])
        started, = (folder for folder in (tmp_path / "out").glob("sa*")
                    if record(folder)["options"]["init_from"] == path.name)
        assert steps(started, "val_loss")[0] == steps(six, "val_loss")[6]
        assert float(steps(started, "lr")[2]) == 1e-4 and "starting with the weights of" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)                                        # the same weights at another path
    train_lm.main([*tiny, *SIX, f"--init_from={six.relative_to(tmp_path)}", "--learning_rate=1e-4"])
    assert ": reused" in capsys.readouterr().out
    train_lm.main([*tiny, *TWELVE, f"--init_from={six}", "--learning_rate=1e-4", "--resume"])
    assert "going on from" in capsys.readouterr().out                  # its own shorter run, not the initial weights


def test_a_run_starts_with_published_weights(tiny, tmp_path, monkeypatch, capsys):
    config = DAT | dict(vocab_size=300, n_heads_sa=2)
    folder = write(tmp_path / "published", config, random_weights(config))
    source = train_lm.load_pretrained(folder)
    load_tokenizer = train_lm.tokens.load_tokenizer
    monkeypatch.setattr(train_lm.tokens, "load_tokenizer", lambda *args, **more: Gpt2() if args[0] == "gpt2" else
                        load_tokenizer(*args, **more))
    options = [f"--{name}={value}" for name, value in asdict(source.cfg).items()
               if value != getattr(train_lm.Config, name, None) and value is not None]
    data = [word for word in tiny if word.split("=")[0] in ("--data", "--data_dir", "--out_dir", "--device")]
    options = [*options, *data, "--tokenizer=gpt2", "--baseline=False", *SIX, "--eval_windows=4", "--batch_size=2",
               f"--init_from={folder}"]
    train_lm.main([*options, "--learning_rate=0", "--min_lr=0"])
    trained = load_checkpoint(folder_of(tmp_path, "*") / "last.pt")["model"]
    assert all(torch.equal(trained[name], tensor) for name, tensor in source.state_dict().items())
    assert "are of another model: give --activation=" in refused(
        train_lm.main, [*options, "--activation=silu", "--seed=2"], capsys)
    assert "trained on other tokens" in refused(train_lm.main, [*options, "--tokenizer=bytes"], capsys)


class Gpt2(train_lm.tokens.load_tokenizer("bytes").__class__):
    """Bytes that call themselves gpt2."""
    name = "gpt2"


@pytest.mark.parametrize("change, words", [
    ("--activation=silu", "give --activation=gelu"), ("--n_ra=2", "give --n_ra=1"),
    ("--norm_first=False", "norm_first"),
    ("--d_model=32", "is of another shape"), ("--rel_activation=tanh", "--rel_activation=identity"),
    ("--n_layers=2", "is of another shape"), ("--tie_embeddings=False", "--tie_embeddings=True"),
    ("--tokenizer=chars", "trained on other tokens"), ("--baseline=True", "give --baseline=False"),
    ("--init_from=nowhere", "no checkpoint at nowhere")])
def test_weights_of_another_model_are_refused_and_the_option_is_named(change, words, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 40)
    options = [*TINY, *SIX, f"--data={tmp_path / 'text.txt'}", f"--data_dir={tmp_path}",
               f"--out_dir={tmp_path / 'out'}"]
    train_lm.main(options)
    capsys.readouterr()
    assert words in refused(train_lm.main, [*options, f"--init_from={folder_of(tmp_path, '*')}", change], capsys)
    assert len(list((tmp_path / "out").glob("*/config.json"))) == 1


def test_every_option_that_changes_a_model_but_not_its_shapes_is_compared():
    """Two models whose tensors have the same shapes, and one the weights of the other, compute the same."""
    torch.manual_seed(0)
    base = dict(d_model=16, n_layers=2, n_heads=4, n_ra=2, max_len=8, n_symbols=8, symbol_heads=2, vocab_size=9,
                norm_bias=False, bias=False)
    cfg = train_lm.Config(**base)
    changes = dict(n_heads=2, activation="relu", norm="rmsnorm", norm_first=False, final_norm=False, bias=True,
                   position="sinusoidal", n_kv_heads=1, tie_embeddings=False, symbols="relative", symbol_heads=4,
                   shared_symbols=False, symmetric=True, rel_activation="relu", ra_type="rca", share_qk=True,
                   n_relations=4, rel_proj_dim=3, attention_bias="all", d_ff=32, n_ra=1)
    source = LanguageModel(model_config(asdict(cfg)))
    initial = {"path": "x", "model": source.state_dict(), "options": asdict(cfg)}
    idx = torch.arange(8)[None]
    for name, value in changes.items():
        other = train_lm.Config(**base | {name: value})
        model = LanguageModel(model_config(asdict(other)))
        with pytest.raises(ValueError):
            initialise(model, initial, asdict(other))
    free = dict(dropout=0.5, recompute=True, trainable_symbols=False)  # the same function in evaluation
    for name, value in free.items():
        other = train_lm.Config(**base | {name: value})
        model = LanguageModel(model_config(asdict(other))).eval()
        initialise(model, initial, asdict(other))
        assert torch.equal(model(idx)[0], source.eval()(idx)[0])


def test_relational_games_have_no_checkpoints(capsys):
    assert "there are no checkpoints" in refused(train_relgames.main, ["--init_from=x", "--baseline=False"], capsys)
