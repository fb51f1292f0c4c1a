"""toolbox/training.py: which runs, optimizer, learning rate, randomness, device, memory errors, signals."""
import csv
import os
import signal
import threading
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import train_lm
import train_vit
from data.text import tokens
from model import LanguageModel, TransformerConfig
from toolbox import training
from toolbox.options import parse_options
from train_lm import make_model


# ---- which runs ------------------------------------------------------------------------------------------------------

def test_baselines_follow_their_dat_and_come_once():
    configs = parse_options(train_lm.Config, argv=["--n_ra=0,2,4", "--seed=1,2", "--vocab_size=256"])
    runs = training.with_baselines(configs, make_model)
    assert sorted((r.n_ra, r.seed) for r in runs) == [(n, s) for n in (0, 2, 4) for s in (1, 2)]
    configs = parse_options(train_lm.Config, argv=["--symbols=symbolic,relative,positional", "--n_ra=0,4",
                                                   "--vocab_size=256"])
    runs = training.with_baselines(configs, make_model)                               # a Transformer has no symbols
    assert sorted((r.n_ra, r.symbols) for r in runs) == [
        (0, "symbolic"), (4, "positional"), (4, "relative"), (4, "symbolic")]
    alone = training.with_baselines([replace(configs[-1], baseline=False)], make_model)
    assert [r.n_ra for r in alone] == [4]


def test_a_matched_baseline_has_as_many_parameters_within_one_percent():
    cfg, = parse_options(train_lm.Config, argv=["--match_params", "--vocab_size=256"])
    dat, twin = training.with_baselines([cfg], make_model)
    assert dat == cfg and twin.n_ra == 0
    assert abs(training.count_parameters(make_model, twin) / training.count_parameters(make_model, dat) - 1) < 0.01
    with pytest.raises(ValueError, match="no d_ff brings"):
        training.with_baselines([replace(cfg, d_ff=1, dat_n_kv_heads=1, symbols="positional")], make_model)


def vit_runs(*argv):
    make = partial(train_vit.make_model, data=SimpleNamespace(size=32, n_classes=10))
    configs = parse_options(train_vit.Config, train_vit.PRESETS, argv)
    return training.with_baselines(configs, make), partial(training.count_parameters, make)


def test_heads_and_slots_give_four_models():
    runs, _ = vit_runs("--n_ra=0,4", "--memory_slots=0,32")
    assert sorted((r.n_ra, r.memory_slots) for r in runs) == [(0, 0), (0, 32), (4, 0), (4, 32)]
    runs, _ = vit_runs("--n_ra=4", "--memory_slots=32", "--memory_queries=learned")   # the baseline keeps the memory
    assert [(r.n_ra, r.memory_slots, r.memory_queries) for r in runs] == [(4, 32, "learned"), (0, 32, "learned")]


def test_options_of_a_memory_make_no_further_models_without_one():
    runs, _ = vit_runs("--n_ra=0", "--memory_slots=0,8", "--memory_queries=memory,learned", "--bottleneck=16,32",
                       "--mlp_norm=False,True")
    with_memory = [(r.memory_queries, r.bottleneck, r.mlp_norm) for r in runs if r.memory_slots]
    assert sorted(with_memory) == [(q, k, False) for q in ("learned", "memory") for k in (16, 32)]
    assert sorted(r.mlp_norm for r in runs if not r.memory_slots) == [False, True] and len(runs) == 6


def test_the_workspace_preset_trains_four_models_with_as_many_parameters():
    runs, count = vit_runs("--preset=workspace", "--seed=1,2")
    kinds = [(r.memory_slots, r.mlp_norm, r.memory_queries) for r in runs if r.seed == 2]
    assert kinds == [(0, False, "memory"), (0, True, "memory"), (32, False, "memory"), (32, False, "learned")]
    published = count(runs[4])
    assert all(abs(count(r) / published - 1) < 0.01 for r in runs) and len(runs) == 8
    assert {r.n_ra for r in runs} == {0} and runs[0].d_ff > runs[4].d_ff


# ---- optimizer, learning rate, randomness ----------------------------------------------------------------------------

def test_each_parameter_is_in_exactly_one_group():
    cfg = train_lm.Config(bias=True, trainable_symbols=False, vocab_size=256)
    model = LanguageModel(cfg)
    decayed, others = training.make_optimizer(model, cfg).param_groups
    ids = [id(p) for group in (decayed, others) for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad) and len(set(ids)) == len(ids)
    assert all(p.dim() >= 2 for p in decayed["params"]) and decayed["weight_decay"] == 0.1
    assert all(p.dim() < 2 for p in others["params"]) and others["weight_decay"] == 0


def test_the_learning_rate_warms_up_and_ends_where_it_should():
    cfg = train_lm.Config(learning_rate=1.0, min_lr=0.1, warmup_steps=10, max_steps=110)
    rates = [training.learning_rate(step, cfg) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert rates[59] == pytest.approx(0.55) and rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[9:], rates[10:]))
    cfg = replace(cfg, schedule="constant")
    assert {training.learning_rate(step, cfg) for step in (10, 50, 110)} == {1.0}
    assert training.learning_rate(110, replace(cfg, schedule="cosine", min_lr=None)) == pytest.approx(0.1)


def test_recompute_changes_no_loss_and_no_gradient():
    """The backward pass draws the same dropout masks again; relative symbols, too, stay the same."""
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


def test_batches_are_a_function_of_seed_step_and_process():
    def draw(seed, step, rank=0):
        training.reseed(seed, step, rank)
        return tokens.random_starts(200, 8, 4).tolist()
    assert draw(1, 5) == draw(1, 5)
    assert len({str(draw(seed, step, rank)) for seed in range(5) for step in range(20) for rank in range(3)}) == 300


# ---- device and memory -----------------------------------------------------------------------------------------------

def test_the_device_is_chosen_and_the_reason_given():
    device, dtype, why = training.choose_device("cpu")
    assert (device.type, dtype) == ("cpu", torch.float32) and "float32" in why
    assert training.choose_device("cpu", "bfloat16")[1] == torch.bfloat16
    with pytest.raises(ValueError, match="device=abacus"):
        training.choose_device("abacus")


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you tried to ...")])
def test_out_of_memory_is_one_line_that_says_what_helps(error, capsys):
    for n_sequences, words in ((None, "make the model smaller"), (8, "--micro_batch=4"), (1, "--recompute")):
        with pytest.raises(SystemExit) as stop, training.memory_errors(n_sequences):
            raise error
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1 and words in said


def test_other_errors_are_not_taken_for_out_of_memory():
    with pytest.raises(RuntimeError, match="shapes"), training.memory_errors(8):
        raise RuntimeError("shapes do not fit")


# ---- --compile -------------------------------------------------------------------------------------------------------

@pytest.fixture
def compiler(monkeypatch):
    """The backend aot_eager needs no C++ compiler: it traces both passes, and runs what it has traced operation by
    operation."""
    torch._dynamo.reset()                                              # forget what other tests compiled
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def small_model():
    return LanguageModel(TransformerConfig(vocab_size=11, d_model=16, n_layers=3, n_heads=2, n_ra=1, max_len=8))


@pytest.mark.parametrize("message, said_of_it", [
    ("Failed to find C compiler.\nPlease specify ...", "Failed to find C compiler."),
    ("\nbackend='inductor' raised:\nno g++\n\nmore", "backend='inductor' raised: no g++"), ("", "RuntimeError")])
def test_without_a_compiler_one_line_says_so_and_the_model_stays_as_it_is(message, said_of_it, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError(message)
    monkeypatch.setattr(torch, "compile", fail)
    model = small_model()
    assert training.compiled(model, torch.device("cpu"), True) is model
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"not compiled ({said_of_it})" in said
    assert model(torch.zeros(1, 8, dtype=torch.int64))[0].isfinite().all()             # no block waits for a compiler


def test_each_block_is_compiled_and_checkpoints_keep_their_names(compiler, capsys):
    model = small_model()
    names, idx = list(model.state_dict()), torch.randint(11, (2, 8))
    expected = model(idx)[0]
    torch._dynamo.utils.counters.clear()
    forward = training.compiled(model, torch.device("cpu"), True)
    torch.testing.assert_close(forward(idx)[0], expected)
    assert "3 blocks compiled" in capsys.readouterr().out and list(forward.state_dict()) == names
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 + 1             # one for all blocks; the attempt


@pytest.mark.parametrize("max_len, fixed_shapes, how", [(512, True, "as a whole"), (513, True, "2 blocks"),
                                                        (512, False, "2 blocks")])
def test_on_a_gpu_small_models_of_short_sequences_are_compiled_as_a_whole(max_len, fixed_shapes, how, monkeypatch,
                                                                          capsys):
    """Only decides: nothing is compiled. Above 512 tokens query blocks would seed their dropout within a CUDA graph."""
    monkeypatch.setattr(training, "no_compiler", lambda device: None)
    model = LanguageModel(TransformerConfig(vocab_size=5, d_model=8, n_layers=2, n_heads=2, n_ra=1, max_len=max_len))
    training.compiled(model, torch.device("cuda"), fixed_shapes)
    assert how in capsys.readouterr().out


def test_a_compiled_run_has_the_losses_of_an_uncompiled_one(tiny, tmp_path, compiler):
    losses = []
    for compile in (False, True):
        train_lm.main([*tiny, f"--compile={compile}", f"--out_dir={tmp_path / str(compile)}", "--max_steps=4",
                       "--eval_every=4", "--log_every=1"])
        log, = (tmp_path / str(compile)).glob("*/log.csv")
        losses.append([float(row[name]) for row in csv.DictReader(open(log)) for name in ("train_loss", "val_loss")
                       if row[name]])
    assert len(losses[0]) > 4 and losses[1] == pytest.approx(losses[0], abs=1e-5)


# ---- signals ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_a_second_one_acts_as_always(number):
    received = []
    before = signal.signal(number, lambda *_: received.append("ours"))
    try:
        with training.stop_on_signal() as stop_requested:
            assert not stop_requested()
            os.kill(os.getpid(), number)
            assert stop_requested() and received == []
            os.kill(os.getpid(), number)
            assert received == ["ours"]
        os.kill(os.getpid(), number)                                   # afterwards signals do what they did before
        assert received == ["ours", "ours"]
    finally:
        signal.signal(number, before)


def test_a_signal_that_is_ignored_stays_ignored():
    """As a shell's background job ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with training.stop_on_signal() as stop_requested:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop_requested()
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_signals_are_left_alone():
    before, answers = signal.getsignal(signal.SIGINT), []

    def work():
        with training.stop_on_signal() as stop_requested:
            answers.append((stop_requested(), signal.getsignal(signal.SIGINT) is before))
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers == [(False, True)]
