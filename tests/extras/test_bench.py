"""bench.py measures what it says."""
import json
from dataclasses import asdict, fields, replace

import pytest
import torch

import train_lm
import train_vit
from extras import bench
from model import TransformerConfig, model_config

CPU = torch.device("cpu")


@pytest.mark.parametrize("name, script, preset", [
    ("tiny: train_lm.py's default", train_lm, {}), ("tinystories d64 L4", train_lm, train_lm.PRESETS["tinystories"]),
    ("fineweb_350m", train_lm, train_lm.PRESETS["fineweb_350m"]), ("cifar10", train_vit, train_vit.PRESETS["cifar10"])])
@pytest.mark.parametrize("baseline", [False, True])
def test_the_models_are_those_of_the_presets(name, script, preset, baseline):
    """All options that affect the time are equal, but the vocabulary depends on a tokenizer, and dropout is off."""
    options, dat, transformer, _ = bench.STEPS[name]
    ours = TransformerConfig(**{**options, **(dict(transformer, n_ra=0) if baseline else dat)})
    theirs = model_config(asdict(replace(script.Config(**preset), **({"n_ra": 0} if baseline else {}))))
    for f in fields(TransformerConfig):
        if f.name not in ("vocab_size", "dropout", *(("max_len", "n_symbols") if script is train_vit else ())):
            assert getattr(ours, f.name) == getattr(theirs, f.name), f.name


def test_each_form_is_measured_and_the_chosen_one_is_named():
    """Literal up to 128 tokens; beyond, blocked on a CPU."""
    o = bench.Options(d_model=64, n_ra=2, batch_size=2)
    assert bench.chosen(o, 128, CPU) == "literal" and bench.chosen(o, 129, CPU) == "blocked"
    called = []
    for form in ("literal", "fast", "blocked"):
        run = bench.attention_case(form, o, 9, CPU, torch.float32)
        original = getattr(bench.RelationalAttention, form)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bench.RelationalAttention, form, lambda *a, **k: called.append(form) or original(*a, **k))
            run()
    assert called == ["literal", "fast", "blocked"]


def test_candidates_run_in_turns():
    order = []
    seconds = bench.alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, CPU)
    assert order == list("abbaabba") and {name: len(turns) for name, turns in seconds.items()} == {"a": 3, "b": 3}
    assert bench.ratio({"a": [1.0, 9.0, 4.0], "b": [1.0, 3.0, 2.0]}, "a", "b") == 2.0


def test_memory_includes_the_weights_and_relations_of_the_literal_form():
    """4 heads and 4 relations: at n = 1024 these alone are 32 MB."""
    with bench.get_context("spawn").Pool(1) as process:
        grown = process.apply(bench.peak_memory, ("literal", bench.Options(d_model=64), 1024))
    assert 32 * 2 ** 20 < grown < 2 ** 30


def test_a_small_run_prints_json_and_draws_a_figure(capsys, tmp_path):
    bench.main(["--part=attention", "--n=16,24,32", "--d_model=32", "--repeats=1", "--memory=False", "--device=cpu",
                f"--out_dir={tmp_path}"])
    *_, last = capsys.readouterr().out.splitlines()
    rows = json.loads(last)["attention"]
    assert [row["n"] for row in rows] == [16, 24, 32] and (tmp_path / "scaling.png").exists()
    assert all(set(row["seconds"]) == {"self-attention", "literal", "fast", "blocked"} for row in rows)
