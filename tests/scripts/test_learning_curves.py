"""Accuracy against training size: intervals, pairs, and what the figure shows."""
import csv
import re

import numpy as np
import pytest
from matplotlib.collections import PolyCollection

import learning_curves


def rows(accuracy):
    """Rows of results.csv for accuracy(n_ra, seed)."""
    return [dict(task="occurs", train_size=250, n_ra=n_ra, n_heads=2, seed=seed, sprites="pentos", n_parameters=1000,
                 seconds="2.0", train_loss="0.1", dtype="torch.float32", symmetric="True", d_ff="256",
                 accuracy_pentos=str(accuracy(n_ra, seed)), accuracy_hexos="0.5", accuracy_stripes="")
            for n_ra in (2, 0) for seed in (1, 2, 3)]


def test_the_difference_is_paired_by_seed_with_its_interval():
    # 0.1, 0.2, 0.3 in pairs: mean 0.2, s = 0.1, t = 4.303: half = 0.1 / sqrt(3) * 4.303 = 0.248
    groups = learning_curves.grouped(rows(lambda n_ra, seed: 0.5 + 0.01 * seed ** 2 + (0.1 * seed if n_ra else 0)))
    assert list(groups) == ["DAT 0+2", "Transformer 2+0"]
    text = learning_curves.difference(groups, "DAT 0+2", ("occurs", 250), "pentos")
    assert text == "+0.200 [-0.048, +0.448]: no difference"
    groups = learning_curves.grouped(rows(lambda n_ra, seed: 0.5 + (0.1 + 0.001 * seed if n_ra else 0)))
    assert "no difference" not in learning_curves.difference(groups, "DAT 0+2", ("occurs", 250), "pentos")
    table = learning_curves.table(groups, "pentos")
    assert table[2].startswith("| occurs | 250 | DAT 0+2 | 1,000 | 0.602 ± 0.002 | 0.500 ± 0.000 |  | 3 | 2 | +0.102")


def test_the_difference_is_to_the_transformer_that_shares_all_but_heads():
    slow = [{**row, "learning_rate": "1e-4"} for row in rows(lambda n_ra, seed: 0.6)]
    fast = [{**row, "learning_rate": "1e-3"} for row in rows(lambda n_ra, seed: 0.9)]
    groups = learning_curves.grouped(fast + slow)
    for label in ("DAT 0+2, learning_rate=1e-3", "DAT 0+2, learning_rate=1e-4"):
        assert learning_curves.difference(groups, label, ("occurs", 250), "pentos").startswith("+0.000")
    wide = [{**row, "d_ff": "300", "n_parameters": 1005} for row in rows(lambda *a: 0.7) if not row["n_ra"]]
    wider = [{**row, "d_ff": "400", "n_parameters": 1100} for row in rows(lambda *a: 0.8) if not row["n_ra"]]
    groups = learning_curves.grouped(rows(lambda *a: 0.9) + wide + wider)
    text = learning_curves.difference(groups, "DAT 0+2, d_ff=256", ("occurs", 250), "pentos")
    assert text == ("to Transformer 2+0, d_ff=256: +0.000 [+0.000, +0.000]: no difference; "
                    "to Transformer 2+0, d_ff=300: +0.200 [+0.200, +0.200]")


def test_sprites_that_were_not_tested_get_no_figure(tmp_path):
    with open(tmp_path / "results.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, rows(lambda *a: 0.5)[0])
        writer.writeheader()
        writer.writerows(rows(lambda *a: 0.5))
    learning_curves.report(tmp_path / "results.csv", paper=False)
    assert {path.name for path in tmp_path.glob("*.png")} == {"learning_curves.png", "hexos.png"}


def test_models_that_differ_in_an_option_are_drawn_apart_and_baselines_are_not_told_by_relational_ones():
    both = rows(lambda *a: 0.5) + [{**row, "symmetric": "False"} for row in rows(lambda *a: 0.6) if row["n_ra"]]
    assert list(learning_curves.grouped(both)) == ["DAT 0+2, symmetric=True", "DAT 0+2, symmetric=False",
                                                   "Transformer 2+0"]


def test_the_figure_shows_means_bands_and_the_published_curves(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(learning_curves.plt, "close", figures.append)
    groups = learning_curves.grouped(rows(lambda n_ra, seed: 0.5 + 0.1 * n_ra + 0.01 * seed))
    learning_curves.draw(groups, "pentos", tmp_path / "a.png", paper=True)
    ax, = figures[0].axes
    lines = {line.get_label(): line for line in ax.lines}
    assert lines["DAT 0+2"].get_xydata().tolist() == [[250, pytest.approx(0.72)]]
    x, y = lines["DAT 0+2, published"].get_data()
    assert (x[0], x[-1], len(x)) == (250, 2500, 10)
    assert y[0] == pytest.approx(0.632, abs=1e-3) and y[-1] == pytest.approx(0.931, abs=1e-3)
    bands = [one for one in ax.collections if isinstance(one, PolyCollection)]
    half = 0.01 * 4.303 / 3 ** 0.5                                      # t s / sqrt(n) of accuracies 0.01 apart
    assert np.ptp(bands[0].get_paths()[0].vertices[:, 1]) == pytest.approx(2 * half, rel=1e-3) and len(bands) == 2
    assert "Transformer 2+0, published" in lines
    learning_curves.draw(groups, "pentos", tmp_path / "b.png", paper=False)
    assert not [line for line in figures[1].axes[0].lines if "published" in line.get_label()]


def test_the_published_numbers_are_those_of_the_paper():
    # accuracy at the largest size: Transformer, 1+1, 0+2
    last = {"same": (.949, .940, .926), "occurs": (.928, .929, .931), "xoccurs": (.684, .873, .886),
            "between": (.924, .938, .931), "match_pattern": (.639, .855, .928)}
    for task, numbers in last.items():
        curves = learning_curves.published(task, "pentos")
        for name, number in zip(("Transformer 2+0", "DAT 1+1", "DAT 0+2"), numbers):
            assert curves[name][1][-1] == pytest.approx(number, abs=1e-3)
            assert curves[name][0][-1] == (25000 if task == "match_pattern" else 2500)


@pytest.mark.parametrize("content", [None, "", "a,b\n1,2\n"])
def test_curves_of_nothing_are_a_clear_error(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "results.csv").write_text(content)
    with pytest.raises(SystemExit) as stop:
        learning_curves.main([f"--results={tmp_path / 'results.csv'}"])
    assert stop.value.code == 2 and re.search("no file|no results", capsys.readouterr().err)
