"""train_relgames.py --ablate: the models that it compares, and the table and figure of them."""
import csv

import pytest

import plot
import train_relgames
from toolbox.figures import ablation
from toolbox.training import count_parameters
from train_relgames import ABLATION_SIZES, FACTORS, Config, configs_of, make_model

BASE = vars(Config())


def test_each_model_is_trained_once_whatever_the_number_of_its_factors():
    configs = configs_of(["--ablate"])
    assert len({repr(cfg) for cfg in configs}) == len(configs) == 13 * 2 * 5
    assert {(cfg.task, cfg.train_size) for cfg in configs} == set(ABLATION_SIZES.items())
    assert {cfg.seed for cfg in configs} == {1, 2, 3, 4, 5}


def test_a_variant_differs_from_the_published_model_in_its_factor_alone():
    changes = [change for variants in FACTORS.values() for change in variants.values()]
    configs = configs_of(["--ablate", "--task=xoccurs", "--seed=1"])
    relational = {name for name in BASE if name in train_relgames.training.RELATIONAL}

    def differing(cfg):                                               # a Transformer has no relational options
        own = {name for name in BASE if getattr(cfg, name) != BASE[name]} - {"train_size", "ablate", "seed", "task",
                                                                               "keep_weights"}
        return frozenset(own - relational if cfg.n_ra == 0 else own)
    assert {differing(cfg) for cfg in configs} == {frozenset(change) for change in changes}


def test_the_matched_transformer_has_as_many_parameters_as_the_dat():
    dat, = (count_parameters(make_model, Config()),)
    matched = count_parameters(make_model, Config(**FACTORS["Transformer"]["as many parameters"]))
    assert abs(matched / dat - 1) < 0.001


@pytest.mark.parametrize("option, said", [("--n_layers=3", "--ablate sets it itself"), ("--n_ra=1", "sets it itself"),
                                          ("--baseline=False", "sets it itself"), ("--sweep", "without --sweep"),
                                          ("--learning_rate=1e-3,1e-4", "lists for --task")])
def test_what_the_ablation_sets_itself_is_refused(option, said, capsys):
    with pytest.raises(SystemExit) as stop:
        train_relgames.main(["--ablate", option])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and said in error


def rows(differences):
    """Three seeds of a reference and of a variant that differs from it by these."""
    return [dict.fromkeys(ablation.COLUMNS, 1) | dict(factor="symbols", variant=variant, task="same", train_size=250,
                                                      seed=seed, accuracy=0.7 + 0.1 * seed * (seed < 3) + more)
            for variant, all_more in (("positional", (0, 0, 0)), ("none", differences))
            for seed, more in enumerate(all_more)]


def test_differences_are_paired_by_seed_and_those_within_the_noise_are_called_so(tmp_path, capsys):
    """The reference varies by .2 between seeds, the difference by .01: unpaired it would be lost in the noise."""
    for differences, said in (((-0.10, -0.11, -0.09), "-0.100 [-0.125, -0.075] |"),
                              ((-0.10, 0.11, 0.02), "+0.010 [-0.252, +0.272]: no difference |")):
        text, files = ablation.report(rows(differences), tmp_path)
        line, = [line for line in text.splitlines() if "none" in line]
        assert line.endswith(said)
    assert all(path.exists() for path in files)
    plot.main([f"--runs={tmp_path / 'ablation.csv'}", f"--out_dir={tmp_path / 'again'}"])
    assert (tmp_path / "again/ablation.md").read_text() == (tmp_path / "ablation.md").read_text()
    assert (tmp_path / "again/ablation.png").exists()
    assert "no difference" in capsys.readouterr().out


def test_a_factor_has_a_panel_and_a_variant_a_row_in_it(tmp_path):
    found = ablation.cells(rows((0, 0, 0)) + [row | dict(factor="layers") for row in rows((0, 0, 0))[:3]])
    axes = ablation.draw(found).axes
    assert [ax.get_title() for ax in axes] == ["symbols", "layers"]
    assert [[label.get_text() for label in ax.get_yticklabels()] for ax in axes] == [["positional", "none"],
                                                                                    ["positional"]]


def test_the_command_trains_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_relgames, "FACTORS", {"layers": {"two": {}, "one": dict(n_layers=1)}})
    tiny = ["--ablate", "--task=same", "--seed=1", "--train_size=20", "--test_size=30", "--max_steps=1", "--d_model=16",
            "--d_ff=16", "--device=cpu", f"--out_dir={tmp_path}", "--workers=1"]
    train_relgames.main(tiny)
    with open(tmp_path / "ablation.csv", newline="") as f:
        found = [(row["factor"], row["variant"], row["seed"]) for row in csv.DictReader(f)]
    assert found == [("layers", "two", "1"), ("layers", "one", "1")]
    assert not list(tmp_path.rglob("*.pt"))                           # no weights are kept
    capsys.readouterr()
    train_relgames.main(tiny)                                         # everything is there, and drawn again
    assert "2 of them finished before" in capsys.readouterr().out
