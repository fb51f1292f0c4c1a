"""The scripts that stand around training: wrong input, figures and tables."""
import json
import math
import os

import numpy as np
import pytest
import torch

import compare
import train_lm


# ---- wrong input ----


def stopped_by(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        train_lm.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "Traceback" not in error
    return error


def test_wrong_input_is_one_clear_line(tmp_path, capsys):
    latin, short = tmp_path / "latin.txt", tmp_path / "short.txt"
    (tmp_path / "text.txt").write_text("to be or not to be. " * 500)
    latin.write_bytes("déjà vu ".encode("latin-1") * 500)
    short.write_text("too short")
    assert "n_ra=9" in stopped_by(["--n_ra=9"], capsys)
    assert "d_model=100" in stopped_by(["--d_model=100"], capsys)
    assert "no file nowhere.txt" in stopped_by(["--data=nowhere.txt"], capsys)
    assert "not UTF-8" in stopped_by([f"--data={latin}"], capsys)
    assert "less than one context" in stopped_by([f"--data={short}"], capsys)
    assert "did you mean --n_ra?" in stopped_by(["--n_rs=4"], capsys)
    for wrong in ("--batch_size=0", "--eval_every=0", "--log_every=0", "--max_steps=0", "--micro_batch=0", "--n_shards=0", "--first_mb=0", "--seed=-1",
                  "--eval_windows=0", "--warmup_steps=-3", "--grad_clip=-1", "--learning_rate=nan"):
        assert "must be at least" in stopped_by([wrong], capsys)
    assert "below 1" in stopped_by(["--beta2=2"], capsys) and "2^63" in stopped_by([f"--seed={2 ** 63}"], capsys)
    assert "short.txt" in stopped_by([f"--data={latin}".replace("latin", "text"), f"--out_dir={short}/out"], capsys)
    assert "vocab_size=100: bytes has 256 tokens" in stopped_by(["--vocab_size=100"], capsys)
    assert "did you mean gpt2" in stopped_by(["--tokenizer=gtp2"], capsys)
    assert "invalid choice" in stopped_by(["--preset=big"], capsys)
    assert "device=abacus" in stopped_by(["--device=abacus", f"--out_dir={tmp_path / 'out'}"], capsys)


# ---- compare ----


def fake_run(folder, n_ra, seed, losses, **options):
    folder.mkdir(parents=True)
    record = {"options": {"n_heads": 8, "n_ra": n_ra, "seed": seed, "device": "cpu", "max_steps": 10,
                          "d_ff": None, **options}, "n_parameters": 1000 + n_ra,
              "finished": True,
              "facts": {"data": "torch", "bytes_per_token": 1.0, "sha256": "0" * 64}}
    (folder / "config.json").write_text(json.dumps(record))
    rows = ["step,tokens,train_loss,val_loss,lr,tokens_per_s,seconds"]
    for i, loss in enumerate(losses):
        rows.append(f"{i * 10},{i * 100},{'' if i == 0 else loss + 0.1},{loss},0.1,{50 + i},{i * 1.5}")
    (folder / "log.csv").write_text("\n".join(rows) + "\n")


def test_student_t_points_cut_off_one_fortieth():
    for dof, point in enumerate(compare.T975, 1):
        x = torch.linspace(0, point, 20_001, dtype=torch.float64)
        scale = math.gamma((dof + 1) / 2) / math.gamma(dof / 2) / math.sqrt(dof * math.pi)
        density = scale * (1 + x ** 2 / dof) ** (-(dof + 1) / 2)
        assert abs(torch.trapezoid(density, x) - 0.475) < 3e-5         # the points are rounded to three digits
    values = np.array([1.0, 2.0, 4.0])                                 # mean 7/3, s = sqrt(7/3), t_2 = 4.303
    assert compare.half_interval(values) == pytest.approx(4.303 * math.sqrt(7 / 3) / math.sqrt(3))


@pytest.mark.figures
def test_the_table_says_what_may_be_concluded(tmp_path, capsys):
    base = [1.50, 1.60, 1.55]
    for seed, loss in enumerate(base, 1):
        fake_run(tmp_path / f"t{seed}", 0, seed, [5.5, loss - 0.3, loss])            # final, not best
        fake_run(tmp_path / f"d{seed}", 4, seed, [5.5, loss - 0.1 - seed / 1000])    # clearly lower, pair by pair
        fake_run(tmp_path / f"e{seed}", 2, seed, [5.5, loss + [0.02, -0.02, 0.001][seed - 1]])
    compare.main([f"--runs={tmp_path}"])
    shown = capsys.readouterr().out
    assert "DAT 4+4 - Transformer 8+0: -0.1020 nats per token, 95% interval -0.1045 to -0.0995" in shown
    assert "paired seeds: DAT 4+4 is better" in shown
    assert [line for line in shown.splitlines() if line.startswith("DAT 6+2 -")][0].endswith("no difference")
    assert "| Transformer 8+0 | 8 | 0 | 1,000 | 52 | 10 | 1.5500 ± 0.1242 | 4.711 | 2.2362 | 3 |" in shown
    assert (tmp_path / "table.md").read_text() in shown and (tmp_path / "curves.png").stat().st_size > 10_000


def test_more_accuracy_is_better_and_less_loss():
    def groups(metric, dat):
        def run(n_ra, seed, value):
            return {"options": {"n_heads": 8, "n_ra": n_ra, "seed": seed, "d_ff": None}, "n_parameters": 1000,
                    "facts": {}, "log": {"step": None, "tokens": None, metric: np.array([0.0, value])}}
        return {"DAT 4+4": [run(4, seed, value) for seed, value in enumerate(dat)],
                "Transformer 8+0": [run(0, seed, 0.5) for seed in range(3)]}

    for metric, dat, verdict in [("char_accuracy", [.6, .61, .62], "DAT 4+4 is better"),
                                 ("exact_match", [.4, .41, .42], "Transformer 8+0 is better"),
                                 ("val_loss", [.6, .61, .62], "Transformer 8+0 is better"),
                                 ("val_loss", [.4, .41, .42], "DAT 4+4 is better"),
                                 ("char_accuracy", [.4, .5, .6], "no difference")]:
        line, = compare.differences(groups(metric, dat), metric)
        assert line.endswith(verdict), line


def test_a_label_names_the_checksum_only_where_nothing_else_tells_runs_apart():
    one = {"n_heads": 8, "n_ra": 4, "level": "easy", "sha256": "aa"}
    assert compare.labels([one, {**one, "level": "hard", "sha256": "bb"}]) == [
        "DAT 4+4, level=easy", "DAT 4+4, level=hard"]
    assert compare.labels([one, {**one, "sha256": "bb"}]) == ["DAT 4+4, sha256=aa", "DAT 4+4, sha256=bb"]
    assert compare.labels([one, {**one, "n_ra": 0, "sha256": "bb"}]) == [
        "DAT 4+4, sha256=aa", "Transformer 8+0, sha256=bb"]           # on different data


def test_one_seed_is_called_too_few(tmp_path, capsys):
    fake_run(tmp_path / "t", 0, 1, [5.5, 1.5])
    fake_run(tmp_path / "d", 4, 1, [5.5, 1.4])
    compare.main([f"--runs={tmp_path / 't'},{tmp_path / 'd'}"])
    assert "-0.1000 nats per token (1 seed: too few" in capsys.readouterr().out


def test_groups_are_named_by_what_sets_them_apart_and_pairs_share_everything_else(tmp_path, capsys):
    fake_run(tmp_path / "a", 4, 1, [5.5, 1.4], symmetric=True, d_model=128)
    fake_run(tmp_path / "b", 4, 1, [5.5, 1.5], symmetric=False, d_model=128)
    fake_run(tmp_path / "c", 0, 1, [5.5, 1.3], symmetric=False, d_model=128)
    fake_run(tmp_path / "w", 0, 1, [5.5, 1.2], symmetric=False, d_model=256)         # another width: not their baseline
    compare.main([f"--runs={tmp_path}"])
    shown = capsys.readouterr().out
    assert "DAT 4+4, symmetric=True, d_model=128 - Transformer 8+0, d_model=128: +0.1000" in shown
    assert "- Transformer 8+0, d_model=256" not in shown


def test_unfinished_runs_are_drawn_but_not_counted(tmp_path, capsys):
    for seed in (1, 2, 3):
        fake_run(tmp_path / f"t{seed}", 0, seed, [5.5, 1.5 + seed / 100])
    record = json.loads((tmp_path / "t3" / "config.json").read_text())
    (tmp_path / "t3" / "config.json").write_text(json.dumps({**record, "finished": False}))
    compare.main([f"--runs={tmp_path}", f"--out_dir={tmp_path / 'new'}"])
    shown = capsys.readouterr().out
    assert "| 1.5150 | 4.549 | 2.1857 | 2 |" in shown and "not counted: 1 of 3 runs" in shown
    assert (tmp_path / "new" / "curves.png").exists()


def test_a_matched_baseline_belongs_to_the_dat_whose_parameters_it_has(tmp_path, capsys):
    for name, n_ra, n_parameters, d_ff in [("a", 4, 1000, None), ("b", 2, 1500, None),
                                           ("A", 0, 1002, 7), ("B", 0, 1498, 9)]:
        fake_run(tmp_path / name, n_ra, 1, [5.5, 1.5], d_ff=d_ff)
        record = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps({**record, "n_parameters": n_parameters}))
    compare.main([f"--runs={tmp_path}"])
    pairs = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if " - Transformer" in line]
    assert pairs == ["DAT 4+4, d_ff=default - Transformer 8+0, d_ff=7",
                     "DAT 6+2, d_ff=default - Transformer 8+0, d_ff=9"]


def test_seeds_on_different_data_are_not_one_group(tmp_path, capsys):
    for seed in (1, 2, 3):
        fake_run(tmp_path / f"t{seed}", 0, seed, [5.5, 1.5 + seed / 100])
    record = json.loads((tmp_path / "t3" / "config.json").read_text())
    record["facts"]["sha256"] = "f" * 64                                             # the file had been edited
    (tmp_path / "t3" / "config.json").write_text(json.dumps(record))
    compare.main([f"--runs={tmp_path}"])
    shown = capsys.readouterr().out
    assert "| Transformer 8+0, sha256=00000000 |" in shown and "| Transformer 8+0, sha256=ffffffff |" in shown
    record["facts"].update(sha256="0" * 64, dtype="torch.bfloat16")                  # or it ran on another device
    (tmp_path / "t3" / "config.json").write_text(json.dumps(record))
    compare.main([f"--runs={tmp_path}"])
    assert "| Transformer 8+0, dtype=torch.bfloat16 |" in capsys.readouterr().out


def test_a_seed_counts_once(tmp_path, capsys):
    for name, loss in (("older", 1.3), ("newer", 1.5)):
        fake_run(tmp_path / name, 0, 1, [5.5, loss])
    os.utime(tmp_path / "older" / "log.csv", (1, 1))
    compare.main([f"--runs={tmp_path}"])
    shown = capsys.readouterr().out
    assert "| 1.5000 | 4.482 | 2.1640 | 1 |" in shown and "left out, for a newer one" in shown


def test_compare_refuses_what_is_no_run(tmp_path, capsys):
    for argument, says in [(f"--runs={tmp_path}", "no runs in"),
                           (f"--runs={tmp_path}/a,{tmp_path}/b", "is not the folder")]:
        with pytest.raises(SystemExit) as stop:
            compare.main([argument])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and says in error
