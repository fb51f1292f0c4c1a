"""kill -9 in the middle of a write: a checkpoint, an archive. (In a step: test_runs.py; in downloads: tests/data.)"""
import subprocess
import sys
import tarfile

import train_lm
from data.extract import extract
from toolbox.checkpoints import load_checkpoint

ROOT = train_lm.__file__.rsplit("/", 1)[0]
HALF = """
import os, shutil, signal, sys, torch
def half(source, target, *length):
    target.write(source.read(1000)); target.flush(); os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(code):
    done = subprocess.run([sys.executable, "-c", HALF + code], cwd=ROOT, capture_output=True)
    assert done.returncode == -9


def test_a_kill_while_a_checkpoint_is_written_leaves_the_old_one_and_the_run_goes_on(tiny, tmp_path, only_run, capsys):
    options = [*tiny, "--max_steps=6", "--eval_every=2"]
    killed(f"""
save, calls = torch.save, []
def dies(state, file):
    calls.append(1)
    if len(calls) == 4:                                                # last.pt after step 4
        file.write(bytes(1000)); file.flush(); os.kill(os.getpid(), signal.SIGKILL)
    save(state, file)
torch.save = dies
import train_lm
train_lm.main({options!r})""")
    assert load_checkpoint(only_run() / "last.pt")["step"] == 2 and len(list(only_run().glob("*.tmp"))) == 1
    train_lm.main([*options, "--resume"])
    assert "resuming after step 2" in capsys.readouterr().out and load_checkpoint(only_run() / "last.pt")["step"] == 6
    assert not list(only_run().glob("*.tmp"))


def test_a_kill_while_an_archive_is_unpacked_leaves_a_part_that_is_never_used(tmp_path):
    (tmp_path / "file").write_bytes(bytes(range(256)) * 1000)
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "file", "file")
    killed(f"""
import tarfile
tarfile.copyfileobj = half
from data.extract import extract
extract({str(tmp_path / 'x.tar.gz')!r}, {str(tmp_path / 'folder')!r})""")
    assert (tmp_path / "folder.part").exists() and not (tmp_path / "folder").exists()
    folder = extract(tmp_path / "x.tar.gz", tmp_path / "folder")
    assert (folder / "file").read_bytes() == (tmp_path / "file").read_bytes()
    assert not (tmp_path / "folder.part").exists()
