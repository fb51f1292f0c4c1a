"""train_seq2seq.py: what is measured, runs and their scores, presets, wrong input. (The loop itself: test_loops.py.)"""
import csv
import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train_seq2seq
from data import mathematics
from data.mathematics import END, MODULES, PAD, START, files
from toolbox.options import parse_options
from toolbox.run import load_checkpoint
from toolbox.training import count_parameters, with_baselines
from train_seq2seq import PRESETS, Config, evaluate, make_model

TINY = ["--d_model=16", "--d_ff=16", "--n_layers=1", "--n_heads=2", "--n_ra=1", "--batch_size=4", "--train_size=30",
        "--val_size=6", "--warmup_steps=2", "--max_steps=8", "--eval_every=4", "--log_every=2", "--device=cpu"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_scored(monkeypatch):
    monkeypatch.setattr(train_seq2seq, "HELD_OUT", 20)


def rows_of(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def scores_of(out_dir):
    """{problems: scores} of the one run in out_dir, the checksum of the problems left out."""
    path, = out_dir.glob("*/config.json")
    scores = json.loads(path.read_text())["scores"]
    return {name: {k: v for k, v in one.items() if k != "sha256"} for name, one in scores.items()}


def trained(cfg):
    """The model of the one run in cfg.out_dir, and its problems."""
    folder, = (p.parent for p in Path(cfg.out_dir).glob("*/last.pt"))
    model = make_model(cfg)
    model.load_state_dict(load_checkpoint(folder / "last.pt")["model"])
    return model, mathematics.load(cfg.data, cfg.module, cfg.level, cfg.train_size, cfg.val_size)


# ---- what is measured ------------------------------------------------------------------------------------------------

def test_problems_learned_by_heart_are_solved(tmp_path, capsys):
    args = [*TINY, "--d_model=32", "--d_ff=64", "--max_steps=150", "--eval_every=150", "--learning_rate=5e-3",
            "--train_size=6", "--batch_size=6", "--baseline=False", f"--out_dir={tmp_path}"]
    train_seq2seq.main(args)
    model, (problems, _, _) = trained(*parse_options(Config, PRESETS, args))
    scores = evaluate(model, problems, CPU, torch.float32)
    assert scores["char_accuracy"] == scores["exact_match"] == 1 and scores["val_loss"] < 0.3
    capsys.readouterr()
    train_seq2seq.show_answers(model, problems, CPU, torch.float32)
    assert capsys.readouterr().out.count("   right") == 3


def test_evaluation_equals_a_loop_over_single_problems():
    torch.manual_seed(0)
    model = make_model(Config(d_model=16, d_ff=16, n_heads=2, n_ra=1))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
        model.head.bias[END] = 30.0                                    # so that some answers end, and some do not
    pairs = mathematics.generate("polynomials__expand", "easy", 12, seed=1)
    problems = mathematics.tokens(pairs)
    losses, right = [], []
    model.eval()
    answered = []
    for question, answer in pairs:
        q = torch.tensor([[ord(c) - 29 for c in question]])
        a = torch.tensor([[START, *(ord(c) - 29 for c in answer), END]])
        logits = model(q, a[:, :-1])[0][0]
        losses += F.cross_entropy(logits, a[0, 1:], reduction="none").tolist()
        right += (logits.argmax(-1) == a[0, 1:]).tolist()
        answered.append(mathematics.text(model.generate(q, 31, start=START, end=END)[0]))
    for batch_size in (1, 5, 256):
        scores = evaluate(model, problems, CPU, torch.float32, batch_size)
        assert scores["val_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert scores["char_accuracy"] == sum(right) / len(right)
        assert scores["exact_match"] == 0
    assert model.training                                             # as for training
    # with the model's own answers as the targets all are right, but for those that have no END
    own = mathematics.tokens([(question, text[:30]) for (question, _), text in zip(pairs, answered)])
    wrote_end = [len(text) <= 30 for text in answered]
    assert 0 < sum(wrote_end) < len(pairs)
    assert evaluate(model, own, CPU, torch.float32)["exact_match"] == sum(wrote_end) / len(pairs)


# ---- runs ------------------------------------------------------------------------------------------------------------

@pytest.mark.figures
def test_a_plain_run_trains_a_dat_and_two_transformers_scores_them_and_is_reused(tmp_path, capsys, monkeypatch):
    args = [*TINY, f"--out_dir={tmp_path}"]
    train_seq2seq.main(args)
    shown = capsys.readouterr().out
    folders = sorted((p.parent for p in tmp_path.glob("*/config.json")), key=lambda folder: len(folder.name))
    assert [f.name[:13] for f in folders] == ["sa1_ra1_seed1", "sa2_ra0_seed1", "sa2_ra0_seed1"]
    models = ["DAT 1+1, position=sinusoidal", "Transformer 2+0, position=sinusoidal", "Transformer 2+0, position=rope"]
    for folder, model in zip(folders, models):
        assert {p.name for p in folder.iterdir()} == {"config.json", "log.csv", "best.pt", "last.pt"}
        rows = rows_of(folder / "log.csv")
        assert list(rows[0]) == ["step", "problems", "train_loss", "train_accuracy", "val_loss", "char_accuracy",
                                 "exact_match", "lr", "problems_per_s", "seconds"]
        assert [(r["step"], r["problems"], bool(r["exact_match"])) for r in rows] == [
            ("0", "0", True), ("2", "8", False), ("4", "16", False), ("4", "16", True), ("6", "24", False),
            ("8", "32", False), ("8", "32", True)]
        record = json.loads((folder / "config.json").read_text())
        assert record["operations_per_problem"] > record["n_parameters"]
        (name, score), = record["scores"].items()
        assert name == "held out, easy" and score["n"] == 20 and 0 < score["val_loss"] < 6
        curve = [r for r in rows_of(tmp_path / "curves.csv") if r["model"] == model]
        assert [(r["step"], r["char_accuracy"]) for r in curve] == [
            (r["step"], f"{float(r['char_accuracy']):.6g}") for r in rows if r["char_accuracy"]]
        what = {"model": model, "module": "algebra__sequence_next_term", "level": "easy", "n_ra": folder.name[6],
                "n_ra_decoder": "", "seed": "1", "problems": name}
        assert [{**what, **{k: str(v) for k, v in score.items()}}] == [
            row for row in rows_of(tmp_path / "scores.csv") if row["model"] == model]
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert "| character accuracy | exact match | seeds |" in shown and "problems/s" in shown
    assert shown.count("wrong: ") + shown.count("   right") >= 9 and "the Transformer beside it" not in shown
    stamps = [(f / "last.pt").stat().st_mtime_ns for f in folders]
    with monkeypatch.context() as m:
        m.setattr(train_seq2seq, "evaluate", None)                   # neither trained nor evaluated again
        train_seq2seq.main([*args, "--baseline=True,False"])
    shown = capsys.readouterr().out
    assert shown.count(": reused") == 4 and shown.count("held out, easy") == 4
    assert [(f / "last.pt").stat().st_mtime_ns for f in folders] == stamps
    rows = (tmp_path / "table.md").read_text().splitlines()[2:5]
    assert all(row.endswith("| 1 |") for row in rows)                 # one seed, although the DAT was given twice
    train_seq2seq.main([*args, "--dtype=bfloat16", "--n_ra=2"])
    assert ": reused" not in capsys.readouterr().out                   # another dtype is another result


def test_all_modules_are_trained_and_both_dats_have_the_same_two_transformers(tmp_path):
    train_seq2seq.main([*TINY, f"--out_dir={tmp_path}", "--max_steps=2", "--eval_every=2", "--train_size=6",
                        "--val_size=2", "--paper", "--module=all", "--n_ra_decoder=1,0"])
    assert len(list(tmp_path.glob("*/last.pt"))) == 5 * 4
    assert {row["module"] for row in rows_of(tmp_path / "curves.csv")} == set(MODULES)


def test_files_are_learned_from_and_tested_on(tmp_path, capsys):
    data = tmp_path / "mine"
    for level in mathematics.LEVELS:
        write(data / f"train-{level}/polynomials__add.txt", mathematics.generate("polynomials__add", level, 30, seed=5)
              + mathematics.generate("polynomials__add", level, 5, seed=5, split="val"))
    write(data / "interpolate/polynomials__add.txt", mathematics.generate("polynomials__add", "hard", 7, seed=6))
    args = [*TINY, "--module=polynomials__add", "--level=all", "--max_steps=2", "--baseline=False",
            f"--out_dir={tmp_path / 'out'}"]
    train_seq2seq.main([*args, f"--data={data}"])
    assert [(name, scores["n"]) for name, scores in scores_of(tmp_path / "out").items()] == [
        ("held out, easy", 5), ("held out, medium", 5), ("held out, hard", 5), ("interpolate", 7)]
    assert "repeat the command with --baseline" in capsys.readouterr().out
    write(data / "interpolate/polynomials__add.txt", mathematics.generate("polynomials__add", "hard", 8, seed=6))
    train_seq2seq.main([*args, f"--data={data}"])                      # another test file: scored again
    assert ": reused" in capsys.readouterr().out
    assert [scores["n"] for scores in scores_of(tmp_path / "out").values()] == [5, 5, 5, 8]


def test_a_model_of_generated_problems_is_scored_on_the_new_problems_of_files(tmp_path, capsys):
    cfg, = parse_options(Config, PRESETS, args := [
        *TINY, "--max_steps=2", "--baseline=False", f"--out_dir={tmp_path / 'out'}", "--module=polynomials__expand"])
    seen = mathematics.generate(cfg.module, "easy", 30, seed=0)
    new = mathematics.generate(cfg.module, "easy", 11, seed=5, split="val")
    renamed = [(re.sub(r"\b[a-z]\b", "w", question), re.sub(r"\b[a-z]\b", "w", answer)) for question, answer in seen]
    write(tmp_path / "mine/train-easy/polynomials__expand.txt", [*renamed[:6], *new])
    train_seq2seq.main(args)
    weights = (next((tmp_path / "out").glob("*/last.pt"))).stat().st_mtime_ns
    train_seq2seq.main([*args, f"--test_data={tmp_path / 'mine'}"])
    assert "train-easy/polynomials__expand.txt: 6 of 17 problems occur in training" in capsys.readouterr().out
    scores = scores_of(tmp_path / "out")
    assert [(name, one["n"]) for name, one in scores.items()] == [("held out, easy", 20), ("mine/train-easy", 11)]
    model, _ = trained(cfg)
    expected = evaluate(model, mathematics.tokens(new), CPU, torch.float32)
    assert scores["mine/train-easy"] == pytest.approx({"n": 11, **expected})
    assert next((tmp_path / "out").glob("*/last.pt")).stat().st_mtime_ns == weights
    train_seq2seq.main(args)
    assert scores_of(tmp_path / "out") == scores                      # kept, also without --test_data


def test_the_final_model_is_scored_on_held_out_problems(tmp_path):
    cfg, = parse_options(Config, PRESETS, [*TINY, "--level=all", "--module=polynomials__add"])
    train, val, _ = mathematics.load("generated", cfg.module, "all", 30, 6)
    sets = train_seq2seq.held_out(cfg, "generated", val)
    assert [len(problems[0]) for problems in sets.values()] == [20] * 3
    learned = {mathematics.canonical(mathematics.text(row)) for row in train[0]}
    for problems, first in zip(sets.values(), val.values()):
        questions = [mathematics.text(row) for row in problems[0]]
        assert questions[:6] == [mathematics.text(row) for row in first[0]]
        assert all(mathematics.split_of(q) == "val" and mathematics.canonical(q) not in learned for q in questions)


def test_validation_is_over_all_levels_without_dropout_and_scores_are_of_the_last_step(tmp_path):
    args = [*TINY, "--level=all", "--dropout=0.5", "--baseline=False", "--val_size=20", "--learning_rate=0.5",
            "--schedule=constant", f"--out_dir={tmp_path}"]
    train_seq2seq.main(args)
    cfg, = parse_options(Config, PRESETS, args)
    model, (_, val, _) = trained(cfg)
    together = tuple(torch.cat(tables) for tables in zip(*val.values()))
    expected = evaluate(model.train(), together, CPU, torch.float32)
    folder, = (p.parent for p in tmp_path.glob("*/last.pt"))
    last = rows_of(folder / "log.csv")[-1]
    assert {name: float(last[name]) for name in expected} == pytest.approx(expected)
    expected = evaluate(model, val["easy"], CPU, torch.float32)       # 20 of each: those of the validation
    assert scores_of(tmp_path)["held out, easy"] == pytest.approx({"n": 20, **expected})
    best = torch.load(folder / "best.pt", weights_only=True)
    assert best["step"] < 8                                           # so that last.pt and best.pt differ
    optimizer = torch.load(folder / "last.pt", weights_only=True)["optimizer"]
    assert {group["lr"] for group in optimizer["param_groups"]} == {0.5}


def write(path, pairs):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{question}\n{answer}\n" for question, answer in pairs))


def test_a_file_that_is_missing_for_the_last_module_is_noticed_before_the_first_is_trained(tmp_path, capsys):
    for module in ("algebra__linear_1d", "polynomials__expand"):
        for level in mathematics.LEVELS[:1 if module == "polynomials__expand" else 3]:
            write(tmp_path / f"mine/train-{level}/{module}.txt", mathematics.generate(module, level, 40, seed=5))
    with pytest.raises(SystemExit):
        train_seq2seq.main([*TINY, "--module=algebra__linear_1d,polynomials__expand", "--level=all",
                            f"--data={tmp_path / 'mine'}", f"--out_dir={tmp_path / 'out'}"])
    message = capsys.readouterr().err
    assert "train-medium/polynomials__expand.txt" in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_figure_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "curves.csv").mkdir()
    with pytest.raises(SystemExit) as error:
        train_seq2seq.main([*TINY, "--max_steps=1", "--baseline=False", f"--out_dir={tmp_path}"])
    assert error.value.code == 2 and "curves.csv" in capsys.readouterr().err


# ---- options ---------------------------------------------------------------------------------------------------------

def test_presets_are_the_papers_three_models():
    models = {}
    for name in PRESETS:
        cfg, = parse_options(Config, PRESETS, [f"--preset={name}"])
        assert (cfg.data, cfg.learning_rate, cfg.beta2, cfg.weight_decay, cfg.schedule, cfg.warmup_steps) == (
            "archive", 6e-4, 0.995, 0, "constant", 0)
        assert (cfg.d_model, cfg.d_ff, cfg.norm_first, cfg.activation, cfg.dropout) == (128, 256, False, "relu", 0.1)
        assert cfg.max_steps * cfg.batch_size == 50 * 2_000_000 and not cfg.baseline
        models[name] = make_model(cfg)
    heads = {name: [(block.attention.sensory.n_heads, getattr(block.attention.relational, "n_heads", 0))
                    for stack in (m.encoder, m.decoder) for block in stack.blocks] for name, m in models.items()}
    assert heads == {"transformer": [(8, 0)] * 4, "config1": [(4, 4)] * 2 + [(8, 0)] * 2, "config2": [(4, 4)] * 4}
    assert all(block.cross.n_heads == 8 for m in models.values() for block in m.decoder.blocks)


def runs_of(*argv):
    """(n_ra, n_ra_decoder, position) of the runs of a command."""
    configs, *_ = train_seq2seq.prepare(list(argv))
    return [(cfg.n_ra, cfg.n_ra_decoder, cfg.position) for cfg in configs]


def test_the_baselines_are_the_papers_transformer_and_one_with_rotary_positions():
    paper, rope = (0, None, "sinusoidal"), (0, None, "rope")
    assert runs_of() == [(4, None, "sinusoidal"), paper, rope]
    assert runs_of("--n_ra_decoder=4,0") == [(4, 4, "sinusoidal"), paper, rope, (4, 0, "sinusoidal")]
    assert runs_of("--position=rope") == [(4, None, "rope"), rope]
    assert runs_of("--rope_baseline=False") == [(4, None, "sinusoidal"), paper]
    assert runs_of("--n_ra=0", "--d_model=24") == [paper]             # no rotary positions are wanted, which 3 forbids
    assert runs_of("--n_ra=0") == [paper] and runs_of("--baseline=False") == [(4, None, "sinusoidal")]


def test_the_presets_of_the_paper_have_its_baseline_alone():
    cfg, = parse_options(Config, PRESETS, ["--preset=config2", "--baseline"])
    assert not cfg.rope_baseline and cfg.position == "sinusoidal"


def test_matched_baselines_have_as_many_parameters_also_without_learned_positions():
    configs = parse_options(Config, PRESETS, ["--match_params", "--position=learned"])
    runs = with_baselines(configs, make_model, dict(position="rope"))
    dat, *baselines = (count_parameters(make_model, cfg) for cfg in runs)
    assert len(baselines) == 2 and all(abs(n / dat - 1) < 0.01 for n in baselines)


@pytest.mark.parametrize("wrong, words", [
    ("--module=algebra__linear1d", "did you mean algebra__linear_1d"),
    ("--n_ra_decoder=9", "the decoder cannot have --n_ra_decoder=9: n_ra=9"),
    ("--n_ra=0 --n_ra_decoder=2", "n_ra_decoder=2 with n_ra=0"),
    ("--n_ra_decoder=2 --n_kv_heads=4", "the decoder cannot have --n_ra_decoder=2: n_kv_heads=4"),
    ("--data=nowhere --test_data=x", "--test_data is for models that learn from generated problems"),
    ("--device=cpu,abacus", "device=cpu,abacus cannot"),
    ("--dtype=float32,bfloat16", "--dtype: give one value, not a list"),
    ("--max_len=100", "its longest question 160"),
    ("--vocab_size=5", "the data has 98 tokens"),
    ("--beta2=1", "must be below 1"),
    ("--position=shaw", "position=shaw is for sensory heads, and n_ra=4: give --n_ra=0"),
    ("--d_model=24", "even d_model / n_heads, not 3: give --rope_baseline=False"),
    ("--rope_baseline=True,False", "--rope_baseline: give one value, not a list"),
    ("--train_size=0", "train_size=0: must be at least 1"),
    ("--data=nowhere", "no file nowhere/train-easy/algebra__sequence_next_term.txt"),
    ("--test_data=nowhere", "no algebra__sequence_next_term.txt in train-easy"),
    ("--modul=x", "did you mean --module"),
    ("--device=abacus", "device=abacus cannot be used here")])
def test_wrong_input_is_one_clear_line(wrong, words, capsys, tmp_path):
    with pytest.raises(SystemExit) as error:
        train_seq2seq.main([*wrong.split(), f"--out_dir={tmp_path / 'out'}"])
    assert error.value.code == 2 and not (tmp_path / "out").exists()
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1


def test_an_archive_that_cannot_be_downloaded_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    """Nothing listens at this address."""
    monkeypatch.setitem(mathematics.ARCHIVE, "url", "http://127.0.0.1:9/a.tar.gz")
    monkeypatch.setattr(files, "stream_members", partial(files.stream_members, retries=0))
    with pytest.raises(SystemExit) as error:
        train_seq2seq.main(["--data=archive", f"--data_dir={tmp_path}"])
    assert error.value.code == 2
    assert re.search(r"could not read .*train-easy/algebra__sequence_next_term.txt", capsys.readouterr().err)
    assert not list(tmp_path.rglob("*.txt*"))


def test_padding_does_not_count_as_a_character_of_an_answer():
    problems = mathematics.tokens([("Expand x.", "x"), ("Expand x*x*x + 1.", "x**3 + 1")])
    _, inputs, targets = mathematics.batch(problems, torch.arange(2))
    assert (targets != PAD).sum(1).tolist() == [2, 9] and inputs.shape == targets.shape == (2, 9)
