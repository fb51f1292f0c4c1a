"""plot.py: what it accepts, groups of runs, tables, the curves of language models and images. No training here."""
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb

import plot
import train_vit
from model import TransformerConfig
from toolbox.figures import curves, drawing, mathematics, slots
from toolbox.figures.runs import group_runs, labels, load_run
from toolbox.options import parse_options

ROOT = Path(plot.__file__).parent


def write_run(folder, options, facts, columns, rows, **record):
    folder.mkdir(parents=True)
    record = {"options": {"d_ff": None, "device": "cpu", **options}, "facts": facts, "code": "c", "torch": "t",
              "device": "cpu", "n_parameters": 1000 + options["n_ra"], "finished": True, **record}
    (folder / "config.json").write_text(json.dumps(record))
    (folder / "log.csv").write_text("\n".join([columns, *rows]) + "\n")


def language_run(folder, n_ra, seed, losses, facts=None, **options):
    """One row for training and validation together: logs of the results recorded so far."""
    facts = {"data": "torch", "bytes_per_token": 1.0, "sha256": "0" * 64, **(facts or {})}
    rows = [f"{i * 10},{i * 100},{'' if i == 0 else loss + 0.1},{loss},0.1,{50 + i if i else 0},{i * 1.5}"
            for i, loss in enumerate(losses)]
    options = {**vars(TransformerConfig()), "n_heads": 8, "n_ra": n_ra, "seed": seed, "max_steps": 10, **options}
    write_run(folder, options, facts,
              "step,tokens,train_loss,val_loss,lr,tokens_per_s,seconds", rows, operations_per_token=100 + n_ra)


def change(folder, **values):
    """Replaces values in config.json."""
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**record, **values}))


@pytest.fixture
def shown(capsys):
    """A function: what plot.py prints."""
    def run(*arguments):
        plot.main(list(arguments))
        return capsys.readouterr().out
    return run


@pytest.fixture
def refused(capsys):
    """A function: the one line in which plot.py ends."""
    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            plot.main(list(arguments))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1
        return error
    return run


def table_in(text):
    return [line for line in text.splitlines() if line.startswith("|")]


def rows_of(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


# ---- which runs ------------------------------------------------------------------------------------------------------

def test_what_cannot_be_drawn_is_one_clear_line(tmp_path, refused):
    language_run(tmp_path / "lm/a", 4, 1, [5.5, 1.5])
    write_run(tmp_path / "games/a", {"n_ra": 2, "task": "occurs", "train_size": 9}, {}, "step,images", ["1,2"])
    language_run(tmp_path / "bad/a", 4, 1, [5.5, 1.5])
    (tmp_path / "bad/a/config.json").write_text("{")
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    (tmp_path / "empty.csv").write_text("")
    whole = (ROOT / "results/relational_games/results.csv").read_text()
    (tmp_path / "half.csv").write_text(whole[:len(whole) // 2])
    (tmp_path / "word.csv").write_text(whole.replace("0.8", "abc"))
    (tmp_path / "image.csv").write_bytes(b"\x89PNG\xff")
    (tmp_path / "head.csv").write_text(whole.splitlines()[0])
    for runs, words in [(tmp_path, "no runs in"), (f"{tmp_path}/a,{tmp_path}/b", "no runs in"), ("", "give --runs="),
                        (f"{tmp_path}/lm,{tmp_path}/games", "of different kinds"),
                        (tmp_path / "bad", "config.json is damaged"), ("nowhere.csv", "no file nowhere.csv"),
                        (tmp_path / "table.csv", "neither results of Relational Games nor curves"),
                        (tmp_path / "empty.csv", "has no rows"), (tmp_path / "head.csv", "has no rows"),
                        (tmp_path / "word.csv", "word.csv: could not convert string to float"),
                        (tmp_path / "image.csv", "image.csv is damaged"),
                        (f"{tmp_path}/lm,{tmp_path}/table.csv", "not both"), (mathematics.PUBLISHED, "neither results"),
                        (tmp_path / "half.csv", "half.csv is damaged"),
                        (f"{ROOT}/results/relational_games/results.csv,{ROOT}/results/mathematics/curves.csv",
                         "of different kinds")]:
        assert words in refused(f"--runs={runs}", f"--out_dir={tmp_path / 'out'}")


def test_a_folder_of_runs_several_folders_and_single_runs_are_all_found(tmp_path, shown):
    language_run(tmp_path / "one/a", 4, 1, [5.5, 1.5])
    language_run(tmp_path / "two/b", 0, 1, [5.5, 1.5])
    language_run(tmp_path / "two/c.old", 0, 2, [5.5, 1.5])             # replaced by a newer run
    language_run(tmp_path / "two/d", 0, 3, [])                         # has just started
    text = shown(f"--runs={tmp_path / 'one'},{tmp_path / 'two'}")
    assert len(table_in(text)) == 4 and (tmp_path / "one/table.md").read_text() in text
    again = shown(f"--runs={tmp_path / 'one/a'},{tmp_path / 'two/b'}", f"--out_dir={tmp_path / 'out'}")
    assert table_in(again) == table_in(text)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"curves.png", "table.md"}


@pytest.mark.figures
def test_figures_do_not_depend_on_jupyters_backend_or_on_a_users_matplotlibrc(tmp_path):
    language_run(tmp_path / "runs/a", 4, 1, [5.5, 1.5])
    (tmp_path / "matplotlibrc").write_text("backend: TkAgg\naxes.facecolor: black\n")
    for name, extra in [("plain", {}), ("changed", {"MPLBACKEND": "module://no_such_package.backend",
                                                    "MATPLOTLIBRC": str(tmp_path / "matplotlibrc")})]:
        subprocess.run([sys.executable, "plot.py", f"--runs={tmp_path / 'runs'}", f"--out_dir={tmp_path / name}"],
                       cwd=ROOT, env={**os.environ, **extra}, check=True, capture_output=True)
    plain, changed = ((tmp_path / name / "curves.png").read_bytes() for name in ("plain", "changed"))
    assert plain == changed and len(plain) > 10_000


# ---- groups, labels and tables ---------------------------------------------------------------------------------------

def test_the_table_says_what_may_be_concluded(tmp_path, shown):
    base = [1.50, 1.60, 1.55]
    for seed, loss in enumerate(base, 1):
        language_run(tmp_path / f"t{seed}", 0, seed, [5.5, loss - 0.3, loss])            # final, not best
        language_run(tmp_path / f"d{seed}", 4, seed, [5.5, loss - 0.1 - seed / 1000])    # clearly lower, pair by pair
        language_run(tmp_path / f"e{seed}", 2, seed, [5.5, loss + [0.02, -0.02, 0.001][seed - 1]])
    text = shown(f"--runs={tmp_path}")
    assert "DAT 4+4 - Transformer 8+0: -0.1020 nats per token, 95% interval -0.1045 to -0.0995" in text
    assert "paired seeds: DAT 4+4 is better" in text
    assert [line for line in text.splitlines() if line.startswith("DAT 6+2 -")][0].endswith("no difference")
    assert "| Transformer 8+0 | 8 | 0 | 1,000 | 52 | 10 | 1.5500 ± 0.1242 | 4.711 | 2.2362 | 3 |" in text


def test_training_and_validation_may_have_rows_of_their_own(tmp_path, shown):
    language_run(tmp_path / "together/a", 4, 1, [5.5, 1.6, 1.5])
    language_run(tmp_path / "apart/a", 4, 1, [5.5, 1.6, 1.5])
    rows = []
    for row in rows_of(tmp_path / "together/a/log.csv"):
        validation = ("val_loss",)
        training = ("train_loss", "lr", "tokens_per_s")
        rows += [",".join("" if name in empty else value for name, value in row.items())
                 for empty in ([validation, training] if row["train_loss"] else [training])]
    (tmp_path / "apart/a/log.csv").write_text("\n".join([",".join(row), *rows]) + "\n")
    tables = [table_in(shown(f"--runs={tmp_path / name}")) for name in ("together", "apart")]
    assert tables[0] == tables[1] and len(tables[0]) == 3
    lines = [[line.get_xydata().tolist() for ax in curves.draw(group_runs([load_run(tmp_path / name / "a")])).axes
              for line in ax.lines] for name in ("together", "apart")]
    assert lines[0] == lines[1] and len(rows) == 5 and [len(line) for line in lines[0]] == [2] * 4 + [3] * 4


def test_more_accuracy_is_better_and_less_loss():
    def groups(metric, dat):
        def run(n_ra, seed, value):
            return {"options": {"n_heads": 8, "n_ra": n_ra, "seed": seed, "d_ff": None}, "n_parameters": 1000,
                    "facts": {}, "log": {"step": None, "tokens": None, metric: np.array([0.0, value])}}
        return {"DAT 4+4": [run(4, seed, value) for seed, value in enumerate(dat)],
                "Transformer 8+0": [run(0, seed, 0.5) for seed in range(3)]}

    for metric, (name, unit, more_is_better) in curves.METRICS.items():
        assert more_is_better == ("loss" not in name)
        line, = curves.differences(groups(metric, [.6, .61, .62]), metric)
        assert line.endswith("DAT 4+4 is better" if more_is_better else "Transformer 8+0 is better"), line
        assert ("nats per token" if unit else name) in line


def test_the_finished_models_test_score_counts_and_not_the_logs(tmp_path, shown):
    for name, n_ra, accuracy in (("a", 4, 0.75), ("b", 0, 0.5)):
        write_run(tmp_path / name, {"n_heads": 8, "n_ra": n_ra, "seed": 1, "max_steps": 5},
                  {"data": "glyphs", "sha256": "0" * 64},
                  "step,images,train_loss,val_loss,val_accuracy,lr,images_per_s,seconds",
                  ["0,0,,2.0,0.1,,,0", "5,10,1.5,,,0.1,9,1", "5,10,,1.0,0.6,,,1"],
                  scores={"test_loss": 1.0, "test_accuracy": accuracy, "images": 100})
    text = shown(f"--runs={tmp_path}", "--paper")
    assert "| validation loss | validation accuracy | test accuracy | seeds |" in text
    assert "| DAT 4+4 | 4 | 4 | 1,004 | 9 | 5 | 1.0000 | 0.6000 | 0.7500 | 1 |" in text
    assert "DAT 4+4 - Transformer 8+0: +0.2500 test accuracy (1 seed: too few" in text
    assert "no published curve belongs to these models" in text


def test_a_label_names_the_checksum_only_where_nothing_else_tells_runs_apart():
    one = {"n_heads": 8, "n_ra": 4, "level": "easy", "sha256": "aa"}
    assert labels([one, {**one, "level": "hard", "sha256": "bb"}]) == ["DAT 4+4, level=easy", "DAT 4+4, level=hard"]
    assert labels([one, {**one, "sha256": "bb"}]) == ["DAT 4+4, sha256=aa", "DAT 4+4, sha256=bb"]
    assert labels([one, {**one, "n_ra": 0, "sha256": "bb"}]) == [
        "DAT 4+4, sha256=aa", "Transformer 8+0, sha256=bb"]           # on different data


def test_groups_are_named_by_what_sets_them_apart_and_pairs_share_everything_else(tmp_path, shown):
    language_run(tmp_path / "a", 4, 1, [5.5, 1.4], symmetric=True, d_model=128)
    language_run(tmp_path / "b", 4, 1, [5.5, 1.5], symmetric=False, d_model=128)
    language_run(tmp_path / "c", 0, 1, [5.5, 1.3], symmetric=False, d_model=128)
    language_run(tmp_path / "w", 0, 1, [5.5, 1.2], symmetric=False, d_model=256)     # another width: no baseline
    text = shown(f"--runs={tmp_path}")
    assert ("DAT 4+4, d_model=128, symmetric=True - Transformer 8+0, d_model=128: +0.1000 nats per token "
            "(1 seed: too few to tell from noise; try --seed=1,2,3)") in text
    assert "- Transformer 8+0, d_model=256" not in text


def test_unfinished_runs_are_drawn_but_not_counted(tmp_path, shown):
    for seed in (1, 2, 3):
        language_run(tmp_path / f"t{seed}", 0, seed, [5.5, 1.5 + seed / 100])
    change(tmp_path / "t3", finished=False)
    text = shown(f"--runs={tmp_path}")
    assert "| 1.5150 | 4.549 | 2.1857 | 2 |" in text and "not finished, drawn but not counted: 1 of 3 runs" in text
    fig = curves.draw(group_runs([load_run(tmp_path / f"t{seed}") for seed in (1, 2, 3)]))
    assert "Transformer 8+0, mean of 3 seeds" in {line.get_label() for line in fig.axes[0].lines}
    for seed in (1, 2):
        change(tmp_path / f"t{seed}", finished=False)
    assert "no finished run yet" in shown(f"--runs={tmp_path}")


def test_a_matched_baseline_belongs_to_the_dat_whose_parameters_it_has(tmp_path, shown):
    for name, n_ra, n_parameters, d_ff in [("a", 4, 1000, None), ("b", 2, 1500, None),
                                           ("A", 0, 1002, 7), ("B", 0, 1498, 9)]:
        language_run(tmp_path / name, n_ra, 1, [5.5, 1.5], d_ff=d_ff)
        change(tmp_path / name, n_parameters=n_parameters)
    assert [line.split(":")[0] for line in shown(f"--runs={tmp_path}").splitlines() if " - Transformer" in line] == [
        "DAT 4+4, d_ff=default - Transformer 8+0, d_ff=7", "DAT 6+2, d_ff=default - Transformer 8+0, d_ff=9"]


def test_a_memory_is_compared_with_the_models_that_lack_it_and_named(tmp_path, shown):
    plain = dict(memory_slots=0, mlp_norm=False, memory_queries="memory", bottleneck=64)
    for i, (n_ra, options) in enumerate([(0, {}), (0, dict(mlp_norm=True)), (0, dict(memory_slots=32)), (4, {}),
                                         (4, dict(memory_slots=32)),
                                         (0, dict(memory_slots=32, memory_queries="learned"))]):
        language_run(tmp_path / str(i), n_ra, 1, [3.0, 2.0 - i / 10], **{**plain, **options})
    text = shown(f"--runs={tmp_path}")
    pairs = {tuple(line.split(": ")[0].split(" - ")) for line in text.splitlines() if " - " in line}
    vit, control = "Transformer 8+0, mlp_norm=False", "Transformer 8+0, mlp_norm=True"
    ait, learned = "AiT 8+0, memory_queries=memory", "AiT 8+0, memory_queries=learned"
    dat, both = "DAT 4+4, mlp_norm=False", "DAT with workspace 4+4, memory_queries=memory"
    assert pairs == {(control, vit), (ait, vit), (ait, control), (learned, vit), (learned, control),
                     (dat, vit), (both, ait), (both, dat)}


def test_a_row_of_slots_shows_where_it_attends_and_its_strongest_patches():
    images = np.random.default_rng(0).integers(0, 255, (3, 12, 12, 3)).astype(np.uint8)
    share = np.zeros((3, 4))
    share[1, 2], share[2, 1] = 0.7, 0.3                                # first the patch at the lower left of image 1
    row = slots.slot_row(images, np.arange(3), share, share.sum(0) / 0.7, 2, 2)
    cells = [row[:slots.CELL, i * (slots.CELL + slots.GAP):][:, :slots.CELL] for i in range(3)]
    cells = [cell[1:-1, 1:-1] for cell in cells]                       # without their frames
    assert np.array_equal(cells[1], np.repeat(np.repeat(images[1, 6:, :6], 4, 0), 4, 1))
    assert np.array_equal(cells[2], np.repeat(np.repeat(images[2, :6, 6:], 4, 0), 4, 1))
    same = slots.slot_row(images, np.array([0, 1, 1]), share, share.sum(0) / 0.7, 2, 2)    # images 1 and 2 are equal
    last = slice(2 * (slots.CELL + slots.GAP), None)
    assert not np.array_equal(same[:, last], row[:, last])
    dark = cells[0].sum(-1).astype(float)
    assert dark[-1, 0] < dark[0, -1] < dark[0, 0] == dark[-1, -1]      # 0.7, 0.3 and twice nothing


def test_seeds_on_different_data_are_not_one_group(tmp_path, shown):
    for seed in (1, 2):
        language_run(tmp_path / f"t{seed}", 0, seed, [5.5, 1.5])
    language_run(tmp_path / "t3", 0, 3, [5.5, 1.5], facts={"sha256": "f" * 64})          # the file had been edited
    text = shown(f"--runs={tmp_path}")
    assert "| Transformer 8+0, sha256=00000000 |" in text and "| Transformer 8+0, sha256=ffffffff |" in text
    language_run(tmp_path / "t4", 0, 4, [5.5, 1.5], facts={"dtype": "torch.bfloat16"})
    assert "| Transformer 8+0, sha256=00000000, dtype=torch.bfloat16 |" in shown(f"--runs={tmp_path}")


def test_a_seed_counts_once(tmp_path, shown):
    for name, loss in (("older", 1.3), ("newer", 1.5)):
        language_run(tmp_path / name, 0, 1, [5.5, loss])
    os.utime(tmp_path / "older" / "log.csv", (1, 1))
    text = shown(f"--runs={tmp_path}")
    assert "| 1.5000 | 4.482 | 2.1640 | 1 |" in text and "left out, for a newer one" in text
    assert shown(f"--runs={tmp_path / 'newer'},{tmp_path / 'newer'}").count("1.5000 | 4.482 | 2.1640 | 1 |") == 1


# ---- curves of language models ---------------------------------------------------------------------------------------

def test_losses_have_an_axis_in_bits_per_byte_if_it_serves_all_runs(tmp_path):
    for name, n_ra, bytes_per_token in (("a", 4, 4.0), ("b", 0, 4.0), ("c", 0, 1.0)):
        language_run(tmp_path / name, n_ra, 1, [5.5, 1.5], facts={"bytes_per_token": bytes_per_token})

    def right_axes(names):
        fig = curves.draw(group_runs([load_run(tmp_path / name) for name in names]))
        return [axis for ax in fig.axes for axis in ax.child_axes]
    to_bits = [axis._functions[0] for axis in right_axes("ab")]
    assert len(to_bits) == 2 and to_bits[0](4 * np.log(2)) == pytest.approx(1)        # one bit for each of four bytes
    assert not right_axes("abc")


def test_the_papers_losses_on_tinystories_stand_beside_its_models(tmp_path, shown):
    whole = {"tokenizer": "gpt2", "bytes": curves.TINYSTORIES_BYTES}
    model = dict(d_model=64, n_layers=5, symbols="symbolic", symmetric=False, activation="swiglu", max_len=512,
                 dropout=0.1)
    language_run(tmp_path / "a", 4, 1, [5.5, 1.5], facts=whole, **model)
    language_run(tmp_path / "b", 0, 1, [5.5, 1.5], facts=whole, **{**model, "n_layers": 99})
    language_run(tmp_path / "c", 4, 1, [5.5, 1.5], facts={**whole, "bytes": 10 ** 7, "sha256": "f" * 64}, **model)
    runs = [load_run(tmp_path / name) for name in "abc"]
    assert [curves.published(run).shape for run in runs] == [(2, 50), (2, 0), (2, 0)]
    axes = curves.draw(group_runs(runs)).axes
    assert [sum("published" in line.get_label() for line in ax.lines) for ax in axes] == [0] * 5 + [1, 0, 0]
    assert axes[5].get_xscale() == "log"
    assert f"| {curves.published(runs[0])[1][-1]:.3f} | 1 |" in shown(f"--runs={tmp_path}")


@pytest.mark.parametrize("preset, n_parameters, classes, last", [
    ("cifar10", {6: 6_025_834, 0: 7_149_034}, 10, {6: .897, 0: .864}),
    ("imagenet", {6: 1, 0: 1}, 1000, {6: .617, 0: .597})])
def test_the_papers_accuracies_stand_beside_its_models_of_images(preset, n_parameters, classes, last, tmp_path, shown):
    for n_ra in (6, 0):
        cfg, = parse_options(train_vit.Config, train_vit.PRESETS, [f"--preset={preset}", f"--n_ra={n_ra}", "--data=x"])
        for data, cutmix in ((preset, cfg.cutmix), ("other", 0.5)):
            write_run(tmp_path / f"{data}{n_ra}", {**vars(cfg), "cutmix": cutmix},
                      {"data": data, "classes": classes if data == preset else 20, "sha256": "0" * 64},
                      "step,images,train_loss,train_accuracy,val_loss,val_accuracy,lr,images_per_s,seconds",
                      ["5,10,1.5,.5,,,0.1,9,1", "5,10,,,1.0,0.6,,,1"], n_parameters=n_parameters[n_ra])
        assert not curves.published_accuracies(load_run(tmp_path / f"other{n_ra}"))
        images, accuracy = curves.published_accuracies(load_run(tmp_path / f"{preset}{n_ra}"))["val_accuracy"]
        assert accuracy[-1] == pytest.approx(last[n_ra], abs=5e-4)
        assert images[-1] == pytest.approx(cfg.max_steps * cfg.batch_size * cfg.grad_accum, rel=0.05)
    fig = curves.draw(group_runs([load_run(tmp_path / f"{preset}{n_ra}") for n_ra in (6, 0)]))
    drawn = [ax.get_xlabel() for ax in fig.axes for line in ax.lines if "published" in line.get_label()]
    assert drawn == ["images"] * (2 if preset == "cifar10" else 4)    # ImageNet: training accuracy, too
    assert "no published curve" not in shown(f"--runs={tmp_path}", "--paper")


# ---- how it looks ----------------------------------------------------------------------------------------------------

def test_transformers_are_gray_and_no_two_models_look_alike():
    names = [f"DAT 4+4, d_ff={i}" for i in range(12)] + [f"Transformer 8+0, d_ff={i}" for i in range(6)]
    looks = drawing.styles(names)
    assert len({tuple(look.values()) for look in looks.values()}) == len(names)
    for name, look in looks.items():
        assert (np.ptp(to_rgb(look["color"])) == 0) == name.startswith("Transformer") and look["ls"] != "--"


@pytest.mark.figures
def test_the_legend_is_whole_and_clear_of_the_panels():
    with drawing.house_style():
        fig, axes = drawing.panels(1, 2, 5, 2.6)
        for n in range(1, 12):
            axes[0, 0].plot([1, 2], [3, 4], label="DAT 4+4" + ", a_long_option=True" * n)
        drawing.legend_below(fig)
        fig.draw_without_rendering()
    legend = fig.legends[0].get_window_extent()
    assert min(legend.p0) >= 0 and legend.x1 <= fig.bbox.x1
    for ax in axes[0]:
        assert ax.get_tightbbox().y0 >= legend.y1 and ax.get_window_extent().height > 100


def test_at_equal_seconds_and_operations_the_slower_model_is_read_where_the_faster_one_ended(tmp_path):
    """Losses fall by 1 each 10 steps. The DAT takes 2 s for each 1 s of the Transformer, which ends after 3 s."""
    for n_ra, pace in ((4, 2), (0, 1)):
        for seed in (1, 2, 3):
            folder = tmp_path / f"{n_ra}{seed}"
            language_run(folder, n_ra, seed, [5.0, 4.0, 3.0, 2.0], schedule="cosine")
            log = rows_of(folder / "log.csv")
            lines = [",".join([*row.values()][:-1] + [str(pace * i)]) for i, row in enumerate(log)]
            (folder / "log.csv").write_text("\n".join([",".join(log[0]), *lines]) + "\n")
    dat, transformer = group_runs([load_run(path) for path in tmp_path.iterdir()]).values()
    seconds, operations = curves.equal_budgets("DAT", dat, "Transformer", transformer, "val_loss")
    assert "at equal seconds (3.0): +1.5000 [+1.5000, +1.5000] (the slower model's" in seconds       # 3.5 - 2.0
    at = 5 - 3 * 100 / 104            # the DAT's loss at the Transformer's operations, 100 for each of 300 tokens
    assert f"at equal operations (30.0 k): {at - 2:+.4f} [" in operations
    assert "floating-point operations" in {ax.get_xlabel() for ax in curves.draw({"DAT": dat}).axes}
    for run in (*dat, *transformer):
        run["options"]["schedule"] = "constant"
    assert "slower" not in "".join(curves.equal_budgets("DAT", dat, "Transformer", transformer, "val_loss"))
