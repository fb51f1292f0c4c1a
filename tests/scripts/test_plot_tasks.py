"""plot.py on mathematics and Relational Games: their CSV files, and figures drawn from these. No training here."""
import os
import re

import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from test_plot import ROOT, refused, rows_of, shown, table_in, write_run               # noqa: F401  (fixtures, too)
from toolbox import figures
from toolbox.figures import drawing, mathematics, relational_games

# ---- mathematics -----------------------------------------------------------------------------------------------------

def mathematics_run(folder, n_ra, seed, module="algebra__linear_1d", n_ra_decoder=None, **record):
    """Training and validation have rows of their own."""
    options = {"n_heads": 8, "n_ra": n_ra, "n_ra_decoder": n_ra_decoder, "seed": seed, "max_steps": 20, "level": "easy",
               "module": module, "data": "generated"} | record.pop("options", {})
    rows = ["0,0,,2,0,0,,,0", "10,40,1.9,,,,0.1,80,0.5", "10,40,,1.6,0.4,0.1,,,0.5", "20,80,1.8,,,,0.1,80,1",
            "20,80,,1.5,0.5,0.125,,,1"]
    scores = {f"held out, {level}": {"n": 1000, "val_loss": 1.25, "char_accuracy": 0.5, "exact_match": 0.125,
                                     "sha256": "1" * 64} for level in ("easy", "hard")}
    write_run(folder, options, {"data": "generated", "sha256": "0" * 64, "dtype": "torch.float32"}, "step,problems,"
              "train_loss,val_loss,char_accuracy,exact_match,lr,problems_per_s,seconds", rows,
              **{"scores": scores, **record})


def test_runs_on_mathematics_leave_their_curves_and_scores_as_csv(tmp_path, shown):
    mathematics_run(tmp_path / "a", 4, 1)
    mathematics_run(tmp_path / "b", 0, 1, finished=False, scores={})
    text = shown(f"--runs={tmp_path}")
    assert table_in(text)[2] == "| DAT 4+4 | 4 | 4 | 1,004 | 80 | 20 | 1.5000 | 0.5000 | 0.1250 | 1 |"
    assert "not finished, drawn but not counted: 1 of 2 runs" in text
    rows = rows_of(tmp_path / "curves.csv")
    assert [row["model"] for row in rows] == ["DAT 4+4"] * 3 + ["Transformer 8+0"] * 3
    assert rows[1] == {"model": "DAT 4+4", "module": "algebra__linear_1d", "n_heads": "8", "n_ra": "4", "seed": "1",
                       "n_ra_decoder": "", "step": "10", "seconds": "0.5", "val_loss": "1.6", "char_accuracy": "0.4",
                       "exact_match": "0.1"}
    scores = rows_of(tmp_path / "scores.csv")
    assert [row["problems"] for row in scores] == ["held out, easy", "held out, hard"]
    assert scores[0] == {"model": "DAT 4+4", "module": "algebra__linear_1d", "level": "easy", "n_ra": "4",
                         "n_ra_decoder": "", "seed": "1", "problems": "held out, easy", "n": "1000",
                         "val_loss": "1.25", "char_accuracy": "0.5", "exact_match": "0.125", "sha256": "1" * 64}
    assert {path.name for path in tmp_path.glob("*.*")} == {"curves.csv", "scores.csv", "curves.png", "table.md"}
    again = shown(f"--runs={tmp_path / 'curves.csv'}", f"--out_dir={tmp_path / 'new'}")
    assert again == f"{tmp_path / 'new/curves.png'}\n"


def test_modules_are_drawn_side_by_side_and_the_published_curves_behind(tmp_path):
    modules = ("algebra__linear_1d", "polynomials__expand")
    for module in modules:
        for n_ra, n_ra_decoder in ((4, 4), (4, 0), (0, None)):
            mathematics_run(tmp_path / f"{module}{n_ra}{n_ra_decoder}", n_ra, 1, module, n_ra_decoder)
    figures.report(tmp_path.glob("*/"), tmp_path)
    axes = mathematics.draw(rows_of(tmp_path / "curves.csv"), paper=True).axes
    panels, published = axes[:4], axes[4:]
    assert [ax.get_title() for ax in panels] == [*modules, "", ""] and len(published) == 2
    colors = {line.get_label(): line.get_color() for line in panels[0].lines}
    assert colors == {"DAT 4+4, n_ra_decoder=4": mathematics.COLORS["config 2"], "Transformer 8+0": drawing.GRAYS[0],
                      "DAT 4+4, n_ra_decoder=0": mathematics.COLORS["config 1"]}
    assert all(line.get_xdata().tolist() == [10, 20] for ax in panels for line in ax.lines)           # without step 0
    assert all([len(line.get_xdata()) for line in ax.lines] == [20] * 3 for ax in published)
    assert len(mathematics.draw(rows_of(tmp_path / "curves.csv")).axes) == 4


def test_further_models_of_a_kind_do_not_take_the_colors_of_the_papers_three(tmp_path):
    for i, ra_type in enumerate(("ra", "rca")):
        for n_ra_decoder in (4, 0):
            mathematics_run(tmp_path / f"{i}{n_ra_decoder}", 4, 1, n_ra_decoder=n_ra_decoder,
                            options=dict(position="sinusoidal", ra_type=ra_type))
    for position in ("sinusoidal", "rope"):
        mathematics_run(tmp_path / position, 0, 1, options=dict(ra_type="ra", position=position))
    figures.report(sorted(tmp_path.glob("*/")), tmp_path)
    lines = mathematics.draw(rows_of(tmp_path / "curves.csv")).axes[0].lines
    colors = {line.get_label(): line.get_color() for line in lines}
    assert len(colors) == len(set(colors.values())) == 6
    papers = [colors[f"DAT 4+4, n_ra_decoder={n}, position=sinusoidal, ra_type=ra"] for n in (0, 4)]
    assert papers == [mathematics.COLORS["config 1"], mathematics.COLORS["config 2"]]


def test_a_dat_is_compared_with_each_transformer_and_with_heads_without_relations(tmp_path, shown):
    models = {"DAT 4+4, position=sinusoidal, ra_type=ra": dict(n_ra=4, position="sinusoidal", ra_type="ra"),
              "DAT 4+4, position=sinusoidal, ra_type=rca": dict(n_ra=4, position="sinusoidal", ra_type="rca"),
              "Transformer 8+0, position=sinusoidal": dict(n_ra=0, position="sinusoidal", ra_type="ra"),
              "Transformer 8+0, position=rope": dict(n_ra=0, ra_type="ra", position="rope")}
    for i, options in enumerate(models.values()):
        mathematics_run(tmp_path / str(i), options.pop("n_ra"), 1, options=options)
    dat, rca, sinusoidal, rope = models
    compared = re.findall("(.*) - (.*): .* character accuracy", shown(f"--runs={tmp_path}"))
    assert sorted(compared) == [(dat, rca), (dat, rope), (dat, sinusoidal), (rca, rope), (rca, sinusoidal)]


def test_a_run_that_has_only_begun_leaves_its_panels_empty(tmp_path, shown):
    mathematics_run(tmp_path / "a", 4, 1, finished=False, scores={})
    log = (tmp_path / "a/log.csv").read_text()
    (tmp_path / "a/log.csv").write_text("\n".join(log.splitlines()[:2]) + "\n")           # validated at step 0
    assert "no finished run yet" in shown(f"--runs={tmp_path}")


def test_several_files_of_curves_go_into_one_figure(tmp_path, shown, monkeypatch):
    drawn = []
    monkeypatch.setattr(mathematics, "draw", lambda rows, paper: drawn.append(rows) or Figure())
    for name, module in (("one", "algebra__linear_1d"), ("two", "polynomials__expand")):
        mathematics_run(tmp_path / name / "a", 4, 1, module)
        figures.report([tmp_path / name / "a"], tmp_path / name)
    one, two = tmp_path / "one/curves.csv", tmp_path / "two/curves.csv"
    shown(f"--runs={one},{two},{one}")
    assert [row["model"] for row in drawn[-1]] == ["DAT 4+4"] * 6
    two.write_text(one.read_text())                                    # other runs with equal names
    shown(f"--runs={one},{two}")
    assert {row["model"] for row in drawn[-1]} == {f"DAT 4+4, {one}", f"DAT 4+4, {two}"}


def test_scores_are_means_of_the_levels_of_problems_that_were_held_out(tmp_path, shown):
    """One model is .05 + .005 seed better, paired by seed; its loss is as much higher, so there it is worse."""
    for n_ra, gain in ((4, 0.1), (0, 0)):
        for seed in (1, 2, 3):
            scores = {name: {"n": 9, "val_loss": v, "char_accuracy": v, "exact_match": v, "sha256": "1"}
                      for name, v in {"held out, easy": seed / 10 + (gain and gain + seed / 100), "held out, hard": 0.4,
                                      "files/train-easy": 99}.items()}
            mathematics_run(tmp_path / f"{n_ra}{seed}", n_ra, seed, scores=scores)
    shown(f"--runs={tmp_path}")
    text = shown(f"--runs={tmp_path / 'scores.csv'}")
    lines = table_in(text)
    assert lines[2].startswith("| algebra__linear_1d, easy | DAT 4+4 | 3 | 0.3600 ± ")
    theirs = "0.3000 ± 0.1242"                                         # 4.303 * .05 / sqrt(3)
    assert lines[3] == f"| algebra__linear_1d, easy | Transformer 8+0 | 3 | {theirs} | {theirs} | {theirs} |"
    better, worse = "+0.0600 [+0.0476, +0.0724]: it is better", "+0.0600 [+0.0476, +0.0724]: the other is better"
    assert f"| algebra__linear_1d, easy | DAT 4+4 | Transformer 8+0 | {better} | {better} | {worse} |" in text
    assert (tmp_path / "scores.md").read_text().strip() in text


def test_the_published_curves_of_mathematics_end_where_the_paper_says():
    rows = rows_of(mathematics.PUBLISHED)
    last = {(row["module"], row["model"]): round(float(row["accuracy"]), 3) for row in rows if row["epoch"] == "99"}
    assert len(rows) == 300
    assert [last["algebra__linear_1d", model] for model in mathematics.COLORS] == [.625, .665, .663]


# ---- Relational Games ------------------------------------------------------------------------------------------------

def games_run(folder, n_ra, seed, accuracy, sprites=("pentos", "hexos"), task="occurs", train_size=250, **record):
    options = {"n_heads": 2, "n_ra": n_ra, "seed": seed, "task": task, "train_size": train_size, "sprites": "pentos",
               "symmetric": True, "out_dir": "out", "dtype": "auto"} | record.pop("options", {})
    write_run(folder, options, {"data": "generated", "dtype": "torch.float32"},
              "step,images,train_loss,lr,images_per_s,seconds", ["50,500,0.25,0.001,100,2.126"],
              **{"scores": dict.fromkeys(sprites, accuracy), **record})


def games(accuracy, **options):
    """Runs as they come out of results.csv, for accuracy(n_ra, seed); DAT 0+2 and Transformer, three seeds."""
    rows = [dict(task="occurs", train_size="250", n_ra=n_ra, n_heads="2", seed=seed, sprites="pentos", d_ff="256",
                 n_parameters="1000", seconds="2.0", train_loss="0.1", dtype="torch.float32", symmetric="True",
                 accuracy_pentos=accuracy(n_ra, seed), accuracy_hexos="0.5", accuracy_stripes="") | options
            for n_ra in (2, 0) for seed in (1, 2, 3)]
    return relational_games.runs_of(rows)


def difference(runs, label="DAT 0+2"):
    return relational_games.difference(relational_games.grouped(runs), label, ("occurs", 250), "pentos")


def test_relational_games_are_kept_in_results_csv_from_which_all_is_drawn(tmp_path, shown):
    for seed in (1, 2, 3):
        games_run(tmp_path / f"d{seed}", 2, seed, 0.75 + 0.01 * seed)
        games_run(tmp_path / f"t{seed}", 0, seed, 0.5)
    text = shown(f"--runs={tmp_path}", "--paper")
    assert table_in(text)[2] == (
        "| occurs | 250 | DAT 0+2 | 1,002 | 0.770 ± 0.025 | 0.770 ± 0.025 |  | 3 | 2 | +0.270 [+0.245, +0.295] |")
    row = rows_of(tmp_path / "results.csv")[0]
    assert row == {"d_ff": "", "n_heads": "2", "n_ra": "2", "seed": "1", "task": "occurs", "train_size": "250",
                   "sprites": "pentos", "symmetric": "True", "accuracy_pentos": "0.76", "accuracy_hexos": "0.76",
                   "accuracy_stripes": "", "n_parameters": "1002", "steps": "50", "seconds": "2.13",
                   "train_loss": "0.25", "device": "cpu", "dtype": "torch.float32"}
    made = {"learning_curves.png", "hexos.png", "table.md"}            # stripes were not tested: no figure
    assert {path.name for path in tmp_path.glob("*.*")} == made | {"results.csv"}
    again = shown(f"--runs={tmp_path / 'results.csv'}", f"--out_dir={tmp_path / 'new'}", "--paper")
    assert table_in(again) == table_in(text) and {path.name for path in (tmp_path / "new").iterdir()} == made


def test_what_does_not_belong_to_the_newest_run_is_left_out_and_that_is_said(tmp_path, shown):
    games_run(tmp_path / "new", 2, 1, 0.75)
    games_run(tmp_path / "same", 2, 1, 0.25)
    games_run(tmp_path / "code", 2, 2, 0.5, code="other")
    games_run(tmp_path / "torch", 2, 3, 0.5, torch="other")
    games_run(tmp_path / "hexos", 2, 4, 0.5, options={"sprites": "hexos"})
    games_run(tmp_path / "now", 2, 5, 0.5, finished=False, scores={})
    for age, name in enumerate(("new", "same", "code", "torch", "hexos", "now")):
        os.utime(tmp_path / name / "log.csv", (1000 - age, 1000 - age))
    text = shown(f"--runs={tmp_path}")
    assert "left out, of other sprites, code or torch than the newest run: 3 of 5 runs" in text
    assert "left out, not finished: 1 of 6 runs" in text
    assert "left out, for a newer one of the same options and seed: 1 of 2 runs" in text
    assert [row["accuracy_pentos"] for row in rows_of(tmp_path / "results.csv")] == ["0.75"]
    assert "no finished run yet" in shown(f"--runs={tmp_path / 'now'}", f"--out_dir={tmp_path / 'out'}")


def test_the_difference_is_paired_by_seed_with_its_interval():
    # 0.1, 0.2, 0.3 in pairs: mean 0.2, half an interval 0.248
    assert difference(games(lambda n_ra, seed: 0.5 + 0.01 * seed ** 2 + (0.1 * seed if n_ra else 0))) == (
        "+0.200 [-0.048, +0.448]: no difference")
    runs = games(lambda n_ra, seed: 0.5 + (0.1 + 0.001 * seed if n_ra else 0))
    assert difference(runs) == "+0.102 [+0.100, +0.104]"
    assert difference([run for run in runs if run["options"]["seed"] < 3]) == "+0.101 (2 seeds)"
    assert difference(runs, "Transformer 2+0") == ""


def test_the_difference_is_to_the_transformer_that_shares_all_but_heads():
    runs = games(lambda *a: 0.9, learning_rate="1e-3") + games(lambda *a: 0.6, learning_rate="1e-4")
    for label in ("DAT 0+2, learning_rate=1e-3", "DAT 0+2, learning_rate=1e-4"):
        assert difference(runs, label).startswith("+0.000")
    runs = games(lambda *a: 0.9)
    for d_ff, n_parameters, accuracy in (("300", "1005", 0.7), ("400", "1100", 0.8)):     # within 1%, and not
        runs += games(lambda *a: accuracy, d_ff=d_ff, n_parameters=n_parameters)[3:]
    assert difference(runs, "DAT 0+2, d_ff=256") == (
        "to Transformer 2+0, d_ff=256: +0.000 [+0.000, +0.000]: no difference; "
        "to Transformer 2+0, d_ff=300: +0.200 [+0.200, +0.200]")


def test_models_that_differ_in_an_option_are_drawn_apart_and_baselines_are_not_told_by_relational_ones():
    runs = games(lambda *a: 0.5) + games(lambda *a: 0.6, symmetric="False")
    assert list(relational_games.grouped(runs)) == [
        "DAT 0+2, symmetric=True", "DAT 0+2, symmetric=False", "Transformer 2+0"]


def test_learning_curves_show_means_bands_and_the_published_curves():
    groups = relational_games.grouped(games(lambda n_ra, seed: 0.5 + 0.1 * n_ra + 0.01 * seed))
    ax, = relational_games.draw(groups, "pentos", paper=True).axes
    lines = {line.get_label(): line for line in ax.lines}
    assert lines["DAT 0+2"].get_xydata().tolist() == [[250, pytest.approx(0.72)]]
    x, y = lines["DAT 0+2, published"].get_data()
    assert (x[0], x[-1], len(x)) == (250, 2500, 10)
    assert y[0] == pytest.approx(0.632, abs=1e-3) and y[-1] == pytest.approx(0.931, abs=1e-3)
    bands = [one for one in ax.collections if isinstance(one, PolyCollection)]
    half = 0.01 * 4.303 / 3 ** 0.5                                     # t s / sqrt(n) of accuracies 0.01 apart
    assert np.ptp(bands[0].get_paths()[0].vertices[:, 1]) == pytest.approx(2 * half, rel=1e-3) and len(bands) == 2
    colors = [lines[label].get_color() for label in ("DAT 0+2", "DAT 1+1, published", "Transformer 2+0")]
    assert len(set(colors)) == 3 and lines["Transformer 2+0, published"].get_color() == colors[2]
    ax, = relational_games.draw(groups, "pentos").axes
    assert not [line for line in ax.lines if "published" in line.get_label()]


def test_points_further_from_the_published_mean_than_both_intervals_are_listed():
    # published: .6323 with a standard deviation of .0147 over 10 trials
    def listed(mean):
        runs = games(lambda n_ra, seed: mean + 0.01 * (seed - 2))
        return relational_games.against_published(relational_games.grouped(runs), "pentos")
    theirs, half = (relational_games.published("occurs", "pentos")["DAT 0+2"][i][0] for i in (1, 2))
    assert (theirs, half) == (0.6323, pytest.approx(2.262 * 0.0147 / 10 ** 0.5))
    both = half + 0.01 * 4.303 / 3 ** 0.5
    assert "| occurs | 250 | DAT 0+2 |" not in listed(theirs + both - 0.001)
    assert f"| {theirs:.3f} ± {half:.3f} | {both + 0.001:+.3f} |" in listed(theirs + both + 0.001)
    assert relational_games.against_published(relational_games.grouped(games(lambda *a: 0.5)[:1]), "pentos") == ""


def test_published_curves_are_of_models_that_learned_from_pentos(tmp_path, refused):
    assert "learned from pentos, these from hexos" in refused(
        f"--runs={ROOT}/results/relational_games/fidelity.csv", "--paper", f"--out_dir={tmp_path}")


def test_the_published_numbers_of_relational_games_are_those_of_the_paper():
    # accuracy at the largest size: Transformer, 1+1, 0+2
    last = {"same": (.949, .940, .926), "occurs": (.928, .929, .931), "xoccurs": (.684, .873, .886),
            "between": (.924, .938, .931), "match_pattern": (.639, .855, .928)}
    for task, numbers in last.items():
        theirs = relational_games.published(task, "pentos")
        for name, number in zip(("Transformer 2+0", "DAT 1+1", "DAT 0+2"), numbers):
            assert theirs[name][1][-1] == pytest.approx(number, abs=1e-3)
            assert theirs[name][0][-1] == (25000 if task == "match_pattern" else 2500)
