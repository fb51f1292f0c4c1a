"""The toolbox: options, optimizer, schedule, randomness, device."""
import re
from dataclasses import dataclass, replace

import pytest
import torch

from toolbox import options
import train_lm
from toolbox import training
from data.text import tokens
from model import LanguageModel, TransformerConfig


@dataclass
class Options(TransformerConfig):
    steps: int = 10                         # how many, 100% of them
    rate: float = 0.1                       # how fast
    fast: bool = False                      # or slow
    path: str = "a"                         # where

    def __post_init__(self):
        super().__post_init__()
        if self.steps > 1000:
            raise ValueError("steps: at most 1000")


def test_default_then_preset_then_command_line():
    presets = {"big": dict(d_model=256, steps=20)}
    cfg, = training.parse_options(Options, presets, ["--preset=big", "--steps", "30", "--fast", "--n_kv_heads=2"])
    assert (cfg.d_model, cfg.steps, cfg.n_layers, cfg.fast, cfg.n_kv_heads) == (256, 30, 4, True, 2)
    cfg, = training.parse_options(Options, presets, ["--fast=False", "--n_kv_heads=None", "--path=x,y"])
    assert (cfg.d_model, cfg.fast, cfg.n_kv_heads, cfg.path) == (128, False, None, "x,y")


def test_comma_lists_make_every_combination():
    runs = training.parse_options(Options, argv=["--n_ra=0,4", "--rate=0.1,0.2", "--symbols=relative,symbolic"])
    assert [(r.n_ra, r.rate, r.symbols) for r in runs] == [
        (n, rate, s) for n in (0, 4) for rate in (0.1, 0.2) for s in ("relative", "symbolic")]


@pytest.mark.parametrize("argument, says", [
    ("--n_rs=4", "did you mean --n_ra?"), ("--zzz=1", "see -h"), ("--steps=many", "give an integer"),
    ("--rate=fast", "give a number"), ("--fast=yes", "True or False"), ("--symbols=magic", "choose from symbolic"),
    ("--n_ra=9", "n_heads=8"), ("--steps=2000", "at most 1000"), ("--d_mode=3", "did you mean --d_model"),
    ("stray", "stray")])
def test_a_wrong_option_is_one_clear_line_and_status_2(argument, says, capsys):
    with pytest.raises(SystemExit) as stop:
        training.parse_options(Options, argv=[argument])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and says in error


def test_help_shows_every_option_with_its_comment_and_default(capsys):
    with pytest.raises(SystemExit):
        training.parse_options(train_lm.Config, argv=["-h"])
    squeezed = lambda text: re.sub(r"[\s-]+", "", text)               # noqa: E731  (lines wrap at spaces and hyphens)
    shown = squeezed(capsys.readouterr().out)
    for name, comment in options.option_comments(train_lm.Config).items():
        assert squeezed(name) in shown and squeezed(comment) in shown
    assert squeezed("after the warm-up [cosine]") in shown


def test_every_option_has_a_comment():
    assert options.option_comments(train_lm.Config).keys() == train_lm.Config.__dataclass_fields__.keys()


def test_baselines_follow_their_dat_and_come_once():
    configs = training.parse_options(train_lm.Config, argv=["--n_ra=0,2,4", "--seed=1,2", "--vocab_size=256"])
    runs = training.with_baselines(configs, train_lm.count_parameters)
    assert sorted((r.n_ra, r.seed) for r in runs) == [(n, s) for n in (0, 2, 4) for s in (1, 2)]
    configs = training.parse_options(train_lm.Config, argv=["--symbols=symbolic,relative,positional", "--n_ra=0,4",
                                                                "--vocab_size=256"])
    runs = training.with_baselines(configs, train_lm.count_parameters)                # a Transformer has no symbols
    assert sorted((r.n_ra, r.symbols) for r in runs) == [
        (0, "symbolic"), (4, "positional"), (4, "relative"), (4, "symbolic")]
    cfg = replace(configs[-1], match_params=True)
    dat, twin = training.with_baselines([cfg], train_lm.count_parameters)
    assert dat is cfg and twin.n_ra == 0
    assert abs(train_lm.count_parameters(twin) / train_lm.count_parameters(dat) - 1) < 0.01


def test_a_run_is_named_by_its_text_and_not_by_its_path():
    long = dict(symbols="relative", max_distance=77, activation="swiglu", norm="rmsnorm", position="learned", bias=True)
    for options in ({}, long):
        one, same, other = (training.run_name(train_lm.Config(data=data, **options))
                            for data in ("/one/a.txt", "/another/a.txt", "/one/a.json"))
        assert one == same != other and len(one) < 120


# ---- optimizer, schedule, randomness ----


def test_each_parameter_is_in_exactly_one_group():
    cfg = train_lm.Config(bias=True, trainable_symbols=False, vocab_size=256)
    model = LanguageModel(cfg)
    decayed, others = training.make_optimizer(model, cfg).param_groups
    ids = [id(p) for group in (decayed, others) for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad) and len(set(ids)) == len(ids)
    assert all(p.dim() >= 2 for p in decayed["params"]) and decayed["weight_decay"] == 0.1
    assert all(p.dim() < 2 for p in others["params"]) and others["weight_decay"] == 0


def test_the_schedule_warms_up_and_ends_where_it_should():
    cfg = train_lm.Config(learning_rate=1.0, min_lr=0.1, warmup_steps=10, max_steps=110)
    rates = [training.learning_rate(step, cfg) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert rates[59] == pytest.approx(0.55) and rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[9:], rates[10:]))
    cfg = replace(cfg, schedule="constant")
    assert {training.learning_rate(step, cfg) for step in (10, 50, 110)} == {1.0}


def test_recompute_changes_no_loss_and_no_gradient():
    """With what draws random numbers in the backward pass anew: dropout; and with symbols that depend on two places."""
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = LanguageModel(TransformerConfig(vocab_size=11, d_model=16, n_layers=2, n_heads=2, n_ra=1, max_len=8,
                                                symbols="relative", dropout=0.3, recompute=recompute))
        idx = torch.randint(11, (3, 9))
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    for without, recomputed in zip(*results):
        torch.testing.assert_close(recomputed, without, rtol=0, atol=0)


def test_batches_are_a_function_of_seed_and_step():
    def draw(seed, step, rank=0):
        training.reseed(seed, step, rank)
        return tokens.random_starts(200, 8, 4).tolist()
    assert draw(1, 5) == draw(1, 5)
    assert len({str(draw(seed, step, rank)) for seed in range(5) for step in range(20) for rank in range(3)}) == 300


def test_the_device_is_chosen_and_the_reason_given():
    device, dtype, why = training.choose_device("cpu")
    assert (device.type, dtype) == ("cpu", torch.float32) and "float32" in why
    assert training.choose_device("cpu", "bfloat16")[1] == torch.bfloat16
    with pytest.raises(ValueError, match="device=abacus"):
        training.choose_device("abacus")
