"""bench.py measures what it says."""
import json
from dataclasses import asdict, fields, replace
from functools import partial

import pytest
import torch

import train_lm
import train_relgames
import train_vit
from extras import bench, bench_models
from model import TransformerConfig, model_config
from relational_attention import RelationalAttention

CPU = torch.device("cpu")


@pytest.mark.parametrize("name, script, preset", [
    ("tiny: train_lm.py's default", train_lm, {}), ("tinystories d64 L4", train_lm, train_lm.PRESETS["tinystories"]),
    ("shakespeare", train_lm, train_lm.PRESETS["shakespeare"]), ("relgames", train_relgames, {}),
    ("fineweb_350m", train_lm, train_lm.PRESETS["fineweb_350m"]), ("cifar10", train_vit, train_vit.PRESETS["cifar10"])])
@pytest.mark.parametrize("kind", ["Transformer", "DAT"])
def test_the_models_are_those_of_the_presets(name, script, preset, kind):
    """All options that affect the time are equal, but the vocabulary depends on a tokenizer, and dropout is off."""
    ours = bench_models.config(name, kind)
    theirs = model_config(asdict(replace(script.Config(**preset), **({"n_ra": 0} if kind == "Transformer" else {}))))
    for f in fields(TransformerConfig):
        if f.name not in ("vocab_size", "dropout", *(("max_len", "n_symbols") if script is not train_lm else ())):
            assert getattr(ours, f.name) == getattr(theirs, f.name), f.name


@pytest.mark.parametrize("name", bench_models.IMAGES)
def test_the_attention_of_images_has_as_many_tokens_as_their_model(name):
    cfg = bench_models.config(name)
    assert bench_models.VisionTransformer(cfg, **bench_models.IMAGES[name]).cfg.max_len == cfg.max_len


def test_each_form_is_measured_and_the_chosen_one_is_named():
    """Literal up to 128 tokens; beyond, blocked on a CPU."""
    (cfg, *_), = bench.lengths(bench.Options(d_model=64, n_ra=2), [9]).values()
    assert bench.chosen(cfg, 128, 2, CPU) == "literal" and bench.chosen(cfg, 129, 2, CPU) == "blocked"
    called = []
    for form in ("literal", "fast", "blocked"):
        run = bench.attention_case(form, cfg, 9, 2, True, CPU, torch.float32)
        original = getattr(RelationalAttention, form)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RelationalAttention, form, lambda *a, **k: called.append(form) or original(*a, **k))
            run()
    assert called == ["literal", "fast", "blocked"]


def test_candidates_run_in_turns():
    order = []
    seconds = bench.alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, CPU)
    assert order == list("abbaabba") and {name: len(turns) for name, turns in seconds.items()} == {"a": 3, "b": 3}
    assert bench.ratio({"a": [1.0, 9.0, 4.0], "b": [1.0, 3.0, 2.0]}, "a", "b") == 2.0


def test_memory_includes_the_weights_and_relations_of_the_literal_form():
    """4 heads and 4 relations: at n = 1024 these alone are 32 MB."""
    o = bench.Options(d_model=64)
    shape, = bench.lengths(o, [1024]).values()
    grown = bench.apart(bench.attention_memory, CPU, o, "literal", *shape)
    assert 32 * 2 ** 20 < grown < 2 ** 30


def test_a_small_run_prints_json_and_draws_a_figure(capsys, tmp_path):
    bench.main(["--part=attention", "--n=16,24,32", "--d_model=32", "--repeats=1", "--memory=False", "--device=cpu",
                f"--out_dir={tmp_path}"])
    *_, last = capsys.readouterr().out.splitlines()
    rows = json.loads(last)["attention"]
    assert [row["n"] for row in rows] == [16, 24, 32] and (tmp_path / "scaling.png").exists()
    assert all(set(row["seconds"]) == {"self-attention", "literal", "fast", "blocked"} for row in rows)


def test_a_step_is_measured_with_and_without_compiled_blocks(capsys, monkeypatch):
    monkeypatch.setitem(bench_models.MODELS, "relgames", (*bench_models.MODELS["relgames"][:3], 4, 4))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    bench.main(["--part=step", "--model=relgames", "--repeats=2", "--memory=False", "--compile", "--device=cpu"])
    row, = json.loads(capsys.readouterr().out.splitlines()[-1])["step"]
    assert list(row["seconds"]) == ["Transformer", "DAT", "Transformer, compiled", "DAT, compiled"]
    for kind, seconds in row["seconds"].items():
        assert row["per_second"][kind] == pytest.approx(4 / (sum(seconds) / 2))        # images
    assert row["share"] == dict.fromkeys(row["seconds"])


def test_the_share_of_the_peak_is_that_of_the_arithmetic(monkeypatch, capsys):
    """A model that does the 989 TFLOP of a second of an H200 in two seconds has half of its peak."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    cfg = bench.config("fineweb_350m")
    seconds = 2 * bench.flops.per_token(cfg) * 8 * 1024 / 989e12
    row = dict(name="fineweb_350m", batch_size=8, memory={}, per_second={}, share={},
               seconds={"Transformer": [1.0], "DAT": [seconds]})
    bench.print_step(row, "DAT", torch.device("cuda"), torch.bfloat16)
    assert row["share"]["DAT"] == pytest.approx(0.5) and "50.0%" in capsys.readouterr().out
