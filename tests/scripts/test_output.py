"""Output that fails, as users meet it: pipes, closed and full output, terminals that hang up, consoles without UTF-8.

Each test runs a script in a process of its own. No failing output ends a training or loses a step.
"""
import ast
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train_lm
from toolbox import output
from toolbox.checkpoints import load_checkpoint
from toolbox.output import unfailing_output

ROOT = train_lm.__file__.rsplit("/", 1)[0]
LONG, SHORT = ["--max_steps=900", "--eval_every=300", "--log_every=7"], ["--max_steps=20", "--eval_every=10"]


@pytest.fixture
def shell(tiny):
    """A function: starts a line of bash, in which $TRAIN is train_lm.py with these options, as a terminal would."""
    def started(line, *options, **environment):
        quoted = " ".join(f"'{word}'" for word in [sys.executable, train_lm.__file__, *tiny, *options])
        return subprocess.Popen(["bash", "-c", line.replace("$TRAIN", quoted)], cwd=ROOT, start_new_session=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | environment,
                                # background jobs of a shell inherit that SIGINT is ignored
                                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    return started


def finished(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["finished"]


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("line", [
    "$TRAIN 2>&1 | head -n 1", "$TRAIN > /dev/full 2>&1", "$TRAIN 2>&-", "$TRAIN <&- >&- 2>&-"])
def test_a_training_finishes_whatever_happens_to_its_output(line, shell, only_run):
    process = shell(line, *SHORT, "--log_every=1")
    _, error = process.communicate(timeout=100)
    assert finished(only_run()) and b"Traceback" not in error and b"Exception ignored" not in error
    assert (only_run() / "log.csv").read_text().count("\n") == 1 + 20 + 3 and not error.count(b"Errno")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_also_ends_the_reader_of_the_output_loses_no_step(number, shell, only_run, tmp_path):
    """Ctrl-C under `2>&1 | tee log` reaches both: then the message that the step will be finished has no reader."""
    process = shell(f"$TRAIN 2>&1 | tee {tmp_path / 'log'}", *LONG)
    wait_for(lambda: any(log.read_text().count("\n") > 50 for log in (tmp_path / "out").glob("*/log.csv")))
    os.killpg(process.pid, number)
    process.communicate(timeout=60)
    lock = only_run().with_name(f".{only_run().name}.lock")
    wait_for(lambda: subprocess.run(["flock", "-n", lock, "true"]).returncode == 0)          # it outlives its shell
    step = load_checkpoint(only_run() / "last.pt")["step"]
    assert 300 < step < 900 and step % 300, "it was saved where it was stopped"


def test_a_terminal_that_hangs_up_ends_nothing(tiny, only_run, tmp_path):
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, train_lm.__file__, *tiny, "--max_steps=200", "--eval_every=50",
                                "--log_every=7"], cwd=ROOT, stdout=theirs, stderr=theirs)
    os.close(theirs)
    wait_for(lambda: list((tmp_path / "out").glob("*/best.pt")))
    os.read(ours, 1000)
    os.close(ours)
    assert process.wait(60) == 0 and finished(only_run())


def test_sigterm_before_the_training_ends_in_one_line_and_leaves_nothing_half_made(shell, tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be " * 10 ** 6)
    process = shell("exec $TRAIN", "--tokenizer=chars")
    wait_for(lambda: list((tmp_path / "cache").glob("tokens/*.part")))
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error.endswith(b"\nstopped\n") and b"Traceback" not in error
    assert not list((tmp_path / "cache").glob("tokens/*.part"))


# ---- consoles that are not UTF-8 -------------------------------------------------------------------------------------

CONSOLES = [dict(PYTHONIOENCODING="cp1252"),
            dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")]


@pytest.mark.parametrize("environment", CONSOLES, ids=str)
def test_a_console_without_utf_8_shows_question_marks_and_files_are_utf_8(environment, shell, tmp_path):
    """Three seeds, for the table with its ±; a text whose sample cannot be shown; a name that is not ASCII."""
    (tmp_path / "text.txt").write_text("日本 naïve — “quoted” 🙂 " * 100, encoding="utf-8")
    process = shell("$TRAIN --tokenizer=chars --seed=1,2,3", "--max_steps=2", "--eval_every=2", **environment)
    said, error = process.communicate(timeout=200)
    assert process.returncode == 0 and b"Error" not in error and b"95% Student-t interval" in said
    assert "±" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    folder = next((tmp_path / "out").glob("sa1*seed1*"))
    assert "日" in json.loads((folder / "config.json").read_text(encoding="utf-8"))["facts"]["alphabet"]
    sampled = subprocess.run([sys.executable, f"{ROOT}/sample.py", f"--from={folder}", "--prompt=日", "--device=cpu",
                              "--max_new_tokens=20"], capture_output=True, env=os.environ | environment)
    assert sampled.returncode == 0 and sampled.stdout.startswith(b"?")


def test_output_that_cannot_fail_shows_what_the_console_can_and_is_restored(monkeypatch):
    """Also for a script that is imported and called, without `start`."""
    shown = []

    class Ascii:
        def write(self, text):
            shown.append(text.encode("ascii").decode())
            return len(text)

        def flush(self):
            raise OSError("gone")
    monkeypatch.setattr(sys, "stdout", Ascii())
    before = sys.stdout, sys.stderr
    with pytest.raises(ZeroDivisionError), unfailing_output():
        print("1 ± 2", flush=True)
        1 / 0
    assert "".join(shown) == "1 ? 2\n" and (sys.stdout, sys.stderr) == before
    with pytest.raises(UnicodeEncodeError):
        print("±")
    assert output.Unfailing(sys.__stdout__).encoding == sys.__stdout__.encoding


# ---- notebooks and matplotlib's settings -----------------------------------------------------------------------------

SCRIPTS = ["train_vit", "data.images.glyphs", "data.relational_games", "extras.bench"]
IN_TURN = """import os, runpy, sys, torch                          # torch is imported once, matplotlib by each script
for script in sys.argv[1:]:
    if os.fork() == 0:
        sys.argv = [script, "-h"]
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    assert os.wait()[1] == 0, script
"""


def test_scripts_start_where_a_notebook_has_set_a_backend_that_is_not_installed():
    environment = os.environ | {"MPLBACKEND": "module://not_installed.backend_inline"}
    done = subprocess.run([sys.executable, "-c", IN_TURN, *SCRIPTS], cwd=ROOT, capture_output=True, text=True,
                          env=environment)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.count("--help") == len(SCRIPTS)


def test_every_text_file_is_opened_as_utf_8_by_name():
    """open, read_text, write_text, TextIOWrapper and NamedTemporaryFile of text, wherever they occur in the project."""
    found, forgotten = 0, []
    for path in [*Path(ROOT).glob("*.py"), *(p for folder in ("data", "toolbox", "extras", "assignments") for p in
                                             Path(ROOT, folder).rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node.func, "attr", getattr(node.func, "id", "")) if isinstance(node, ast.Call) else ""
            if name not in ("open", "read_text", "write_text"):
                continue
            words = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
            binary = any(isinstance(word, str) and "b" in word for word in words if word in ("rb", "wb", "ab"))
            on_path = isinstance(node.func, ast.Attribute) and name == "open"        # os.open, Image.open, tarfile.open
            ours = isinstance(node.func, ast.Name) and name in ("read_text", "write_text")   # toolbox.files: UTF-8
            encoded = "encoding" in {keyword.arg for keyword in node.keywords} or "ascii" in words
            locks = {("toolbox/files.py", "a"), ("toolbox/run.py", "a"), ("toolbox/distributed.py", "w")}
            found += 1
            if not (binary or on_path or ours or encoded or (str(path.relative_to(ROOT)), *words[-1:]) in locks):
                forgotten.append(f"{path}:{node.lineno}")
    assert found > 20 and not forgotten
