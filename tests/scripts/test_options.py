"""toolbox/options.py: the command line as a dataclass, its help, its errors, and how a script starts and ends."""
import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

import train_lm
import train_relgames
import train_seq2seq
import train_vit
from model import TransformerConfig
from toolbox import options
from toolbox.options import agreed, at_least, comments_and_groups, parse_options

ROOT = Path(__file__).parents[2]
SCRIPTS = pytest.mark.parametrize("script", [train_lm, train_relgames, train_seq2seq, train_vit],
                                  ids=lambda script: script.__name__)


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


# ---- values ----------------------------------------------------------------------------------------------------------

def test_default_then_preset_then_command_line():
    presets = {"big": dict(d_model=256, steps=20)}
    cfg, = parse_options(Options, presets, ["--preset=big", "--steps", "30", "--fast", "--n_kv_heads=2"])
    assert (cfg.d_model, cfg.steps, cfg.n_layers, cfg.fast, cfg.n_kv_heads) == (256, 30, 4, True, 2)
    cfg, = parse_options(Options, presets, ["--fast=False", "--n_kv_heads=None", "--path=x,y"])
    assert (cfg.d_model, cfg.fast, cfg.n_kv_heads, cfg.path) == (128, False, None, "x,y")


def test_a_tuple_in_a_preset_is_a_list_and_gives_way_to_the_command_line():
    presets = {"both": dict(n_ra=(0, 4), steps=20)}
    assert [(r.n_ra, r.steps) for r in parse_options(Options, presets, ["--preset=both"])] == [(0, 20), (4, 20)]
    assert [r.n_ra for r in parse_options(Options, presets, ["--preset=both", "--n_ra=2"])] == [2]


def test_comma_lists_make_every_combination():
    runs = parse_options(Options, argv=["--n_ra=0,4", "--rate=0.1,0.2", "--symbols=relative,symbolic"])
    assert [(r.n_ra, r.rate, r.symbols) for r in runs] == [
        (n, rate, s) for n in (0, 4) for rate in (0.1, 0.2) for s in ("relative", "symbolic")]


def test_a_sweeps_values_give_way_to_presets_and_to_the_command_line():
    presets, grid = {"one": dict(n_ra=2)}, {"n_ra": (0, 4), "steps": (1, 2)}
    runs = parse_options(Options, presets, ["--rate=0.5"], grid)
    assert [(r.n_ra, r.steps, r.rate) for r in runs] == [(0, 1, 0.5), (0, 2, 0.5), (4, 1, 0.5), (4, 2, 0.5)]
    assert [(r.n_ra, r.steps) for r in parse_options(Options, presets, ["--preset=one", "--steps=3"], grid)] == [(2, 3)]


def test_a_path_may_begin_with_the_home_folder(monkeypatch):
    """The shell expands `--path ~/x`, but leaves `--path=~/x` as it is."""
    monkeypatch.setenv("HOME", "/home/me")
    for given, path in (("~/x/~y", "/home/me/x/~y"), ("~x", "~x"), ("a/~/b", "a/~/b")):
        assert parse_options(Options, argv=[f"--path={given}"])[0].path == path


def test_what_takes_one_value_only_is_named():
    runs = parse_options(Options, argv=["--steps=1,2", "--rate=3"])
    assert agreed(runs, ("rate", "fast")) is runs[0]
    with pytest.raises(ValueError, match="--steps: give one value, not a list"):
        agreed(runs, ("rate", "steps"))


def test_a_lowest_value_excludes_nan_and_ignores_none():
    at_least(Options(rate=2.0, d_ff=None), rate=2, d_ff=1)
    for rate in (1.9, float("nan")):
        with pytest.raises(ValueError, match="must be at least 2"):
            at_least(Options(rate=rate), rate=2)


@pytest.mark.parametrize("argument, says", [
    ("--n_rs=4", "did you mean --n_ra?"), ("--zzz=1", "see -h"), ("--steps=many", "give an integer"),
    ("--rate=fast", "give a number"), ("--fast=yes", "True or False"), ("--symbols=magic", "choose from symbolic"),
    ("--n_ra=9", "n_heads=8"), ("--steps=2000", "at most 1000"), ("--d_mode=3", "did you mean --d_model"),
    ("stray", "stray")])
def test_a_wrong_option_is_one_clear_line_and_status_2(argument, says, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_options(Options, argv=[argument])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and says in error


# ---- a script's own defaults -----------------------------------------------------------------------------------------

def test_a_script_gives_inherited_options_its_own_defaults():
    @options.options(d_model=64, symbols="relative", rate=0.3)
    class Script(Options):
        further: int = 1
    cfg = Script()
    assert (cfg.d_model, cfg.symbols, cfg.rate, cfg.further, cfg.n_layers) == (64, "relative", 0.3, 1, 4)
    assert Script(d_model=32).d_model == 32 and Options().d_model == 128               # the base class is unchanged
    assert [f.name for f in fields(Script)] == [f.name for f in fields(Options)] + ["further"]
    defaults = {f.name: f.default for f in fields(Script)}             # a run is named by what differs from these
    assert (defaults["d_model"], defaults["steps"]) == (64, 10)
    with pytest.raises(ValueError, match="at most 1000"):              # checks are inherited
        Script(steps=2000)
    with pytest.raises(KeyError):
        options.options(no_such_option=1)(type("Script", (Options,), {}))


@SCRIPTS
def test_the_defaults_of_a_script_are_those_that_it_lists(script):
    assert {name: getattr(script.Config(), name) for name in script.DEFAULTS} == script.DEFAULTS


@SCRIPTS
def test_all_presets_can_be_parsed(script):
    for name in script.PRESETS:
        further = ["--data=somewhere"] if name == "imagenet" else []
        assert parse_options(script.Config, script.PRESETS, [f"--preset={name}", *further])


# ---- the help --------------------------------------------------------------------------------------------------------

@SCRIPTS
def test_help_shows_every_option_in_its_group_with_its_comment_and_default(script, capsys):
    with pytest.raises(SystemExit):
        parse_options(script.Config, argv=["-h"])
    text = capsys.readouterr().out
    headings = re.findall(r"^(\w[\w ]*):$", text, re.MULTILINE)
    own = ["augmentation"] if script is train_vit else []
    assert headings == ["options", "model", "relational heads", "global workspace", "data", *own, "training", "running"]
    squeezed = lambda text: re.sub(r"[\s-]+", "", text)               # noqa: E731  (lines wrap at spaces and hyphens)
    parts = dict(zip(headings, re.split(r"^\w[\w ]*:$", text, flags=re.MULTILINE)[1:]))
    comments, groups = comments_and_groups(script.Config)
    for f in fields(script.Config):
        part = squeezed(parts[groups[f.name]])
        assert comments[f.name] and squeezed(f"{f.name}") in part
        assert squeezed(f"{comments[f.name]} [{f.default}]") in part


def test_options_stand_in_the_group_where_a_reader_looks_for_them():
    groups = [comments_and_groups(s.Config)[1] for s in (train_lm, train_relgames, train_seq2seq, train_vit)]
    for names, group in (("d_model n_heads n_ra dropout position", "model"), ("data", "data"),
                         ("symbols n_relations symmetric rel_activation ra_type", "relational heads"),
                         ("max_steps learning_rate grad_clip log_every batch_size", "training"),
                         ("seed device dtype out_dir resume baseline paper", "running")):
        assert {one[name] for one in groups for name in names.split()} == {group}
    lm, relgames, seq2seq, vit = groups
    assert vit["patch_size"] == relgames["pool"] == seq2seq["n_ra_decoder"] == lm["dat_bias"] == "model"
    assert relgames["train_size"] == seq2seq["module"] == lm["tokenizer"] == vit["val_size"] == "data"
    assert relgames["sweep"] == lm["compile"] == "running" and lm["eval_every"] == lm["micro_batch"] == "training"
    assert vit["cutmix"] == "augmentation"


# ---- how a script starts and ends ------------------------------------------------------------------------------------

def run(code, read=True, **environment):
    """`start` around these lines, in a process of its own -> exit status, standard output, standard error."""
    code = f"import sys\nfrom toolbox.options import *\ndef main():\n    {code}\nstart(main)"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | environment
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        if not read:
            process.stdout.close()                                     # before it has written anything
        return process.wait(60), process.stdout.read() if read else "", process.stderr.read()


def test_ctrl_c_is_one_line_and_status_130():
    assert run("raise KeyboardInterrupt") == (130, "", "\nstopped\n")


def test_errors_that_the_input_causes_are_one_line_and_other_errors_keep_their_traceback():
    status, _, error = run("with one_line_errors(): open('/nowhere/x')")
    assert status == 2 and error.count("\n") == 1 and "No such file" in error and "/nowhere/x" in error
    status, _, error = run("with one_line_errors(): 1 / 0")
    assert status == 1 and "Traceback" in error and "ZeroDivisionError" in error


@pytest.mark.parametrize("code", [
    "print('x' * 10 ** 6)", "print('x')", "print('x', flush=True)", "print('x'); fail('why')",
    "with one_line_errors(): print('x' * 10 ** 6)"])
def test_a_reader_that_closes_the_pipe_ends_a_script_quietly(code):
    """As `| head -n 1` does; also where the output is still in a buffer when the script ends."""
    status, _, error = run(code, read=False)
    assert status != 0 and error == ("-c: why\n" if "why" in code else "")


def test_a_terminal_that_cannot_show_a_character_shows_a_question_mark():
    code = r"print('0.9 \u00b1 0.1'); print('\u00e9', file=sys.stderr)"
    assert run(code, PYTHONIOENCODING="ascii") == (0, "0.9 ? 0.1\n", "?\n")


def test_a_script_runs_where_standard_output_is_no_file(monkeypatch):
    """In a notebook (%run train_relgames.py) sys.stdout is an object without `reconfigure`."""
    class Output:
        def write(self, text):
            lines.append(text)

        def flush(self):
            pass
    lines = []
    monkeypatch.setattr(sys, "stdout", Output())
    options.start(lambda: print("hello"))
    assert lines[0] == "hello"
