"""The paper's language models, by their published numbers of parameters and tokens; nothing is allocated."""
from dataclasses import asdict

import pytest
import torch

import train_lm
from model import model_config
from toolbox import training
from toolbox.figures import curves
from toolbox.options import parse_options


def config(*arguments):
    cfg, = parse_options(train_lm.Config, train_lm.PRESETS, ["--vocab_size=50304", *arguments])
    return cfg


def trainable(cfg):
    with torch.device("meta"):
        return sum(p.numel() for p in train_lm.make_model(cfg).parameters() if p.requires_grad)


@pytest.mark.parametrize("preset, transformer, dat, heads", [
    ("fineweb_350m", 353.6, 344.0, (16, 8)), ("fineweb_750m", 756.9, 733.9, (24, 12)),
    ("fineweb_1b", 1311.2, 1272.6, (32, 16))])
def test_the_fineweb_models_have_the_published_numbers_of_parameters(preset, transformer, dat, heads):
    """In millions, as published (the last Transformer without its decimal)."""
    cfg = config(f"--preset={preset}")
    assert round(trainable(cfg) / 1e6, 1) == dat and (cfg.n_heads, cfg.n_ra) == heads
    assert round(trainable(config(f"--preset={preset}", "--n_ra=0")) / 1e6, 1) == transformer
    # the released checkpoint of 343 M: LayerNorm and MLP with biases, attention without, library frozen
    if preset == "fineweb_350m":
        assert trainable(cfg) == 344_026_112
    assert cfg.batch_size * cfg.max_len == 524_288 and round(cfg.max_steps * cfg.batch_size * cfg.max_len / 1e9) == 10
    rates = [training.learning_rate(step, cfg) for step in (1, 715, 19_073)]
    assert rates == pytest.approx([6e-4 / 715, 6e-4, 6e-5])


def test_the_baseline_of_a_preset_is_the_published_transformer():
    """Only the DATs share key/value heads and have biases in the MLP; with --baseline the pair is trained."""
    dat, baseline = training.with_baselines([config("--preset=fineweb_350m", "--baseline")], train_lm.make_model)
    assert trainable(baseline) == trainable(config("--preset=fineweb_350m", "--n_ra=0"))
    models = [model_config(asdict(cfg)) for cfg in (dat, baseline)]
    assert [m.n_kv_heads for m in models] == [4, None] and [m.bias for m in models] == [True, False]
    assert all(m.norm_bias and m.attention_bias == "none" and m.activation == "gelu_tanh" for m in models)


@pytest.mark.parametrize("d_model, n_layers", [(64, 4), (64, 5), (64, 6), (128, 4), (128, 6)])
def test_the_tinystories_models_are_those_of_table_1(d_model, n_layers):
    for n_ra, symbols in ((0, "symbolic"), (2, "symbolic"), (4, "symbolic"), (4, "relative")):
        cfg = config("--preset=tinystories", f"--d_model={d_model}", f"--n_layers={n_layers}", f"--n_ra={n_ra}",
                     f"--symbols={symbols}", "--vocab_size=32000")
        assert cfg.batch_size * cfg.max_len == 131_072 and cfg.max_steps == 100_000
        assert {training.learning_rate(step, cfg) for step in (1, 50_000, 100_000)} == {1e-3}
        assert (cfg.n_symbols, cfg.symbol_heads, cfg.max_len, cfg.dropout, cfg.bias) == (512, 4, 512, 0.1, False)
        d, L, n_sa = cfg.d_model, cfg.n_layers, 8 - n_ra
        d_h, ff = d // 8, 8 * d // 3
        heads = 3 * d * n_sa * d_h + (n_sa * d_h) ** 2                 # W_q, W_k, W_v; W_o
        relational = 5 * d * n_ra * d_h + (n_ra * d_h) ** 2 + n_ra * n_ra * d_h    # also W_q_rel, W_k_rel; W_r
        library = {"symbolic": 2 * 512 * d + d * d + d, "relative": (2 * 512 + 1) * d}[symbols] if n_ra else 0
        assert trainable(cfg) == 32_000 * d + L * (heads + relational + 3 * d * ff + 2 * d) + d + library


def test_published_losses_stand_beside_the_models_of_the_paper_only():
    def run(tokenizer="gpt2", n_bytes=1_943_728_838, **options):
        return {"options": asdict(config("--preset=tinystories")) | options,
                "facts": {"data": "tinystories", "tokenizer": tokenizer, "bytes": n_bytes}}

    tokens, losses = curves.published(run())
    assert len(tokens) == 50 and tokens[-1] == 13_107_200_000 and losses[-1] == pytest.approx(1.729, abs=1e-3)
    for options, loss in ((dict(n_ra=0), 1.775), (dict(n_ra=2), 1.740), (dict(symbols="relative"), 1.764),
                          (dict(symmetric=True), 1.744), (dict(d_model=128, n_layers=6), 1.337),
                          (dict(n_ra=0, symbols="relative"), 1.775)):  # a Transformer has no symbols
        assert curves.published(run(**options))[1][-1] == pytest.approx(loss, abs=1e-3)
    assert curves.published(run(n_ra=0, n_symbols=7, max_steps=5, seed=3, recompute=True)).size
    for options in (dict(tokenizer="bytes"), dict(n_bytes=10 ** 7), dict(n_layers=3), dict(ra_type="rca"),
                    dict(d_ff=99), dict(n_symbols=7), dict(symbol_heads=2), dict(share_qk=True), dict(n_relations=8),
                    dict(max_len=256), dict(activation="gelu"), dict(trainable_symbols=False), dict(dat_n_kv_heads=2),
                    dict(dropout=0.2)):
        assert not curves.published(run(**options)).size
