"""look.py on Relational Games, weights that were not kept, wrong input. Other kinds of runs: test_look_kinds.py."""
import json
import re
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import look
import train_relgames
import train_seq2seq
import train_vit
from data import images
from data import relational_games as games
from model import LanguageModel, TransformerConfig, model_config
from toolbox import inside
from toolbox.inside import relational_games as view
from toolbox.run import Run

ROOT = Path(look.__file__).parent
CPU = torch.device("cpu")
SMALL = dict(d_model=16, n_layers=2, n_heads=2, n_ra=1)


def checkpoint(path, model, options, facts):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"options": options, "facts": facts, "model": model.state_dict()}, path)
    return path


def language(path, tokenizer="bytes", alphabet="", **options):
    """A checkpoint of a language model with random weights, and 1,200 characters of text for it."""
    path.parent.mkdir(exist_ok=True)
    (path.parent / "text.txt").write_text("to be, or not to be: (that) is the question.\n" * 270)
    options = asdict(TransformerConfig()) | SMALL | dict(max_len=16, n_symbols=4, symbol_heads=2, seed=3) | options
    torch.manual_seed(0)
    facts = {"tokenizer": tokenizer} | ({"alphabet": alphabet} if alphabet else {})
    return checkpoint(path, LanguageModel(model_config(options)), options | {"data": "torch"}, facts)


def seq2seq(path, **options):
    cfg = train_seq2seq.Config(**{**SMALL, "d_ff": 16, **options})
    torch.manual_seed(0)
    return checkpoint(path, train_seq2seq.make_model(cfg), asdict(cfg), {})


def vision(path, **options):
    cfg = train_vit.Config(**{**SMALL, "d_ff": 16, "val_size": 40, **options})
    data = images.load("glyphs", data_dir="", image_size=None, val_size=40, workers=None, device=CPU)
    torch.manual_seed(0)
    return checkpoint(path, train_vit.make_model(cfg, data), asdict(cfg), data.facts)


@pytest.fixture
def few_glyphs(monkeypatch):
    for part, n in (("train", 60), ("test", 60)):
        monkeypatch.setitem(images.N_GLYPHS, part, n)


@pytest.fixture
def cell(tmp_path):
    """A function that trains a small cell of Relational Games for a second -> its folder."""
    def train(**changes):
        cfg = train_relgames.Config(**{**SMALL, "d_ff": 16, "train_size": 40, "test_size": 40, "batch_size": 20,
                                       "epochs": 2, "out_dir": str(tmp_path / "out"), "device": "cpu", **changes})
        with Run(cfg, {"files": {}, "dtype": "torch.float32"}, unit="images", metrics=("train_accuracy",), per_step=20,
                 max_steps=cfg.epochs * train_relgames.steps_per_epoch(cfg)) as run:
            train_relgames.train(run, cfg.data, CPU, torch.float32)
        return run.folder
    return train


def says(capsys, *arguments):
    capsys.readouterr()
    look.main([*arguments, "--device=cpu"])
    return capsys.readouterr().out


def refuses(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        look.main([*map(str, arguments), "--device=cpu"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "Traceback" not in error
    return error


def pictures(folder):
    return sorted(path.name for path in folder.glob("*.png"))


# ---- Relational Games ------------------------------------------------------------------------------------------------

@pytest.mark.figures
def test_a_cell_of_relational_games_is_described_drawn_and_left_as_it_was(cell, capsys):
    folder = cell()
    before = (folder / "weights.pt").read_bytes()
    text = says(capsys, f"--from={folder}", "--n=40")
    assert re.search(r"\| DAT 1\+1 \| 2 \| relation 1 \| [+-].*\| \.\d\d \| \.\d\d \| \.\d\d \|$", text, re.M)
    assert "sensory head 1" in text and "| relations | untrained |" in text
    assert pictures(folder / "look") == ["boards.png", "kinds.png"]
    assert all(path.stat().st_size > 5000 for path in (folder / "look").glob("*.png"))
    assert says(capsys, f"--from={folder}", "--n=40") == text == says(capsys, f"--from={folder}/weights.pt", "--n=40",
                                                                      f"--out={folder}/look")
    assert (folder / "look/table.md").read_text().strip() in text
    assert (folder / "weights.pt").read_bytes() == before


@pytest.mark.figures
def test_seeds_of_several_models_are_drawn_side_by_side(cell, tmp_path, capsys):
    for options in (dict(), dict(n_ra=0), dict(symmetric=False), dict(seed=2), dict(seed=2, n_ra=0)):
        cell(**options)
    cell(train_size=20)                                                # of a folder only the largest training size
    text = says(capsys, f"--from={tmp_path / 'out'}", "--n=40", "--layer=1")
    assert text.startswith("5 models") and "DAT 1+1, symmetric=False" in text and "Transformer 2+0" in text
    assert pictures(tmp_path / "out/look") == ["boards.png", "kinds.png", "meaningful_or_used.png"]
    rows = [line for line in text.splitlines() if line.startswith("| DAT 1+1, symmetric=True | 1 | relation 1 ")]
    assert len(rows) == 1 and len(re.findall(r"\d+", rows[0].split("|")[8])) == 2      # a value for each seed


@pytest.mark.parametrize("options, words", [(dict(n_ra=0), "sensory heads only"), (dict(ra_type="rca"), "RCA heads")])
def test_models_without_relations_are_shown_by_their_attention_and_say_so(cell, capsys, options, words):
    text = says(capsys, f"--from={cell(**options)}", "--n=40")
    assert f"{words}: no relations r" in text and "relation 1" not in text and "head 1" in text


@pytest.mark.parametrize("task, sprites", list(zip(games.TASKS + games.COLUMN_TASKS, 3 * games.SPRITES)))
@pytest.mark.figures
def test_boards_of_all_tasks_and_sprites_are_drawn(cell, capsys, task, sprites):
    folder = cell(task=task, sprites=sprites, n_layers=1)
    assert "of another image" in says(capsys, f"--from={folder}", "--n=40")
    assert (folder / "look/boards.png").stat().st_size > 5000


def test_knock_outs_are_the_chosen_ones(cell, capsys):
    folder = cell(symbols="symbolic", n_symbols=4, symbol_heads=2)
    columns = {}
    for how in ("both", "zero", "resample", "none"):
        text = says(capsys, f"--from={folder}", "--n=40", f"--knock_out={how}")
        row = next(line for line in text.splitlines() if "| 1 | symbols |" in line).split("|")
        columns[how] = [bool(cell.strip()) for cell in row[11:13]]
    assert columns == {"both": [True, True], "zero": [True, False], "resample": [False, True], "none": [False, False]}


def test_untrained_symmetric_relations_tell_the_same_object_already_and_others_do_not():
    for symmetric in (True, False):
        for seed in (1, 2):
            cfg = train_relgames.Config(seed=seed, symmetric=symmetric)
            torch.manual_seed(seed)
            run = look.Looked("", view, asdict(cfg), {}, train_relgames.make_model(cfg).eval(), None, CPU)
            x, y, kinds, _ = view.test_images(run, look.Options(n=600))
            _, layers = view.watched(run.model, x)
            same, two = torch.from_numpy(kinds == 0), torch.from_numpy(kinds >= 0)
            for layer in layers:
                for l in range(2):
                    found = inside.statistics.auc_within_places(view.places(layer.r, kinds)[:, l], same, two)
                    assert found > 0.85 if symmetric else 0.35 < found < 0.65


def test_the_recorded_models_cannot_do_without_a_relation_of_layer_1():
    table = (ROOT / "results/inside/relational_games/table.md").read_text()
    lines = [line for line in table.splitlines() if "| 1 | relation " in line]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    rows = [row for row in rows if row[0].startswith("DAT 0+2") and "symmetric=False" not in row[0]]
    assert len(rows) == 2
    for row in rows:
        without, intact = ([float(value) for value in row[i].split()] for i in (10, 12))
        assert len(without) == 3 and max(without) < 0.72 < min(intact)


# ---- weights that were not kept --------------------------------------------------------------------------------------

def test_a_cell_without_weights_is_trained_again_to_the_recorded_accuracy(cell, tmp_path, capsys, monkeypatch):
    folder, made, real = cell(train_size=20, d_ff=8), tmp_path / "made", subprocess.run
    weights = torch.load(folder / "weights.pt", weights_only=True)["model"]
    (folder / "weights.pt").unlink()

    def run(command, **options):               # the second time what the first one made
        out, = (word.removeprefix("--out_dir=") for word in command if word.startswith("--out_dir="))
        if not made.exists():
            done.append(real(command, **options))
            shutil.copytree(out, made)
        shutil.copytree(made, out, dirs_exist_ok=True)
        return done[0]
    done = []
    monkeypatch.setattr(subprocess, "run", run)
    text = says(capsys, f"--from={folder}", "--n=40")
    assert "training it again" in text and "the same accuracy as recorded" in text
    again = torch.load(folder / "weights.pt", weights_only=True)["model"]
    assert all(torch.allclose(again[name], weights[name], atol=1e-4) for name in weights)
    assert "again" not in says(capsys, f"--from={folder}", "--n=40")   # they are kept now
    record = json.loads((folder / "config.json").read_text())
    record["scores"]["pentos"] += 0.1
    (folder / "config.json").write_text(json.dumps(record))
    (folder / "weights.pt").unlink()
    assert "is another model" in refuses(capsys, f"--from={folder}", "--n=40")


# ---- wrong input -----------------------------------------------------------------------------------------------------

def test_wrong_input_is_one_clear_line(tmp_path, capsys, cell, monkeypatch):
    lm, maths = language(tmp_path / "lm/last.pt"), seq2seq(tmp_path / "maths/last.pt")
    one, other = cell(), cell(task="same")
    data = f"--data={tmp_path / 'lm/text.txt'}", f"--data_dir={tmp_path / 'cache'}"
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.pt").write_bytes(lm.read_bytes()[:1000])
    (tmp_path / "nothing.txt").write_text("")
    assert "no run or checkpoint at" in refuses(capsys, f"--from={tmp_path / 'nowhere'}")
    assert "has no finished runs and no weights" in refuses(capsys, f"--from={tmp_path / 'empty'}")
    assert "damaged" in refuses(capsys, f"--from={tmp_path / 'bad.pt'}")
    assert "different tasks (occurs, same)" in refuses(capsys, f"--from={one},{other}")
    assert "of different kinds" in refuses(capsys, f"--from={lm},{maths}")
    assert "the prompt is empty" in refuses(capsys, f"--from={lm}", "--prompt=")
    assert "is empty" in refuses(capsys, f"--from={lm}", f"--prompt_file={tmp_path / 'nothing.txt'}")
    assert "No such file" in refuses(capsys, f"--from={lm}", f"--prompt_file={tmp_path / 'nowhere.txt'}")
    assert "does not know, 'é'" in refuses(capsys, f"--from={maths}", "--prompt=é", "--n=4")
    chars = language(tmp_path / "chars/last.pt", "chars", "\n (),.:abehinoqrstu")
    assert "alphabet has no '!'" in refuses(capsys, f"--from={chars}", *data, "--prompt=to!", "--n=4")
    for path in (lm, maths, one):
        error = refuses(capsys, f"--from={path}", *(data if path == lm else ()), "--layer=9", "--n=4")
        assert "layer=9: this model has layers 1 to 2" in error
    (tmp_path / "latin1.txt").write_bytes("fa\xe7ade".encode("latin1"))
    for path in (lm, maths):
        error = refuses(capsys, f"--from={path}", *data * (path == lm), f"--prompt_file={tmp_path / 'latin1.txt'}")
        assert "latin1.txt is not text in UTF-8 (byte 2 is wrong)" in error
    for options in (["--prompt=a"], [f"--prompt_file={tmp_path / 'nothing.txt'}"]):
        assert "a prompt is for language and mathematics" in refuses(capsys, f"--from={one}", *options)
    for path in (lm, maths, one):
        assert "patch=3: patches are chosen in runs of train_vit.py" in refuses(capsys, f"--from={path}", "--patch=3")
    for path in (maths, one):
        assert "data are generated" in refuses(capsys, f"--from={path}", f"--data={tmp_path / 'lm/text.txt'}")
    assert "n=1: must be at least 2" in refuses(capsys, "--n=1")
    assert "did you mean --prompt" in refuses(capsys, "--promt=a")
    assert "choose from both" in refuses(capsys, "--knock_out=all")
    monkeypatch.chdir(tmp_path / "empty")
    for name in ("out/relgame", "no such/folder", "a/b/c", "model"):
        assert "no run or checkpoint at" in refuses(capsys, f"--from={name}")
    monkeypatch.setattr(look, "load_pretrained", lambda name, data_dir: (_ for _ in ()).throw(ValueError(name)))
    with pytest.raises(SystemExit):                                    # a mistyped folder that looks like a name
        look.main(["--from=ouput/relgames", "--device=cpu"])
    said = capsys.readouterr()
    assert "no folder ouput/relgames: taken as the name of a model on Hugging Face" in said.out
    assert said.err.count("\n") == 1 and "ouput/relgames" in said.err
    assert "no run or checkpoint at out/relgames: train one" in refuses(capsys)
    monkeypatch.setattr(inside, "LARGEST", 1000)                       # bytes
    error = refuses(capsys, f"--from={lm}", *data, "--prompt=to be, or not to be", "--n=4")
    assert "GB" in error and "give a prompt of at most" in error
    path = cell(n_ra=0)
    (path / "weights.pt").unlink()
    record = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(record | {"finished": False}))
    assert "was not finished" in refuses(capsys, f"--from={path}")
