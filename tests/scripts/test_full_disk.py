"""A full disk, on a real one: a tmpfs of a few hundred kilobytes, in a mount namespace of its own (Linux).

One line with the path and the space, nothing half written is left, and the run goes on from its last good checkpoint.
"""
import os
import shutil
import subprocess
import sys

import pytest

import train_lm
from data.download import DownloadError, as_download_error
from toolbox.checkpoints import load_checkpoint
from toolbox.files import write_text

ROOT = train_lm.__file__.rsplit("/", 1)[0]
CAN_MOUNT = shutil.which("unshare") and subprocess.run(
    ["unshare", "-rm", "sh", "-c", "mount -t tmpfs tmpfs /mnt"], capture_output=True).returncode == 0
tmpfs = pytest.mark.skipif(not CAN_MOUNT, reason="cannot mount a tmpfs here")


@pytest.fixture
def on_disk(tmp_path):
    """A function: runs lines of a shell, with $PY for Python and $DISK for a tmpfs of `size` -> status, output, error.

    What is on the disk in the end is copied to tmp_path / "kept".
    """
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()

    def run(size, lines):
        script = (f"mount -t tmpfs -o size={size} tmpfs {disk} || exit 99; cd {ROOT}\n{lines}\nstatus=$?\n"
                  f"cp -a {disk} {kept}; exit $status")
        done = subprocess.run(["unshare", "-rm", "bash", "-c", script], text=True, capture_output=True, timeout=200,
                              env=os.environ | {"PY": sys.executable, "DISK": str(disk)})
        return done.returncode, done.stdout, done.stderr
    return run


def leftovers(folder):
    return [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".part"))]


@tmpfs
def test_a_checkpoint_that_does_not_fit_is_one_line_and_the_run_goes_on_from_the_last_one(on_disk, tiny, tmp_path):
    """The disk holds two checkpoints, but not the third that is written before it replaces one."""
    train = " ".join(["$PY", train_lm.__file__, *tiny, "--out_dir=$DISK/out", "--max_steps=30", "--eval_every=10"])
    full = tmp_path / "full"                                           # what the disk holds when it is full
    status, said, error = on_disk("300k", f"{train}; echo status $?; cp -a $DISK {full}; "
                                          f"mount -o remount,size=4m $DISK; {train} --resume")
    assert "status 2\n" in said and error.startswith("train_lm.py: could not write ") and error.count("\n") == 1
    assert "pt: No space left on device (" in error and " MB free in " in error and " MB needed)" in error
    folder = next((full / "out").glob("*/last.pt")).parent
    assert load_checkpoint(folder / "last.pt")["step"] in (10, 20) and not leftovers(full)
    assert status == 0 and "resuming after step" in said
    assert load_checkpoint(tmp_path / "kept" / "out" / folder.name / "last.pt")["step"] == 30


@tmpfs
@pytest.mark.parametrize("size, what", [("8k", "config.json"), ("80k", "best.pt")])
def test_a_disk_that_is_full_from_the_start_ends_in_one_line(size, what, on_disk, tiny, tmp_path):
    train = " ".join(["$PY", train_lm.__file__, *tiny, "--out_dir=$DISK/out", "--max_steps=4"])
    status, _, error = on_disk(size, f"head -c 7000 /dev/zero > $DISK/other; {train}")
    assert status == 2 and error.count("\n") == 1 and "No space left" in error and "Traceback" not in error
    assert not leftovers(tmp_path / "kept")


@tmpfs
@pytest.mark.parametrize("tokenizer", ["bytes", "chars"])
def test_tokens_that_do_not_fit_leave_nothing(tokenizer, on_disk, tiny, tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be " * 10 ** 5)
    train = " ".join(["$PY", train_lm.__file__, *tiny, "--data_dir=$DISK/cache", f"--tokenizer={tokenizer}"])
    status, _, error = on_disk("1m", train)
    assert status == 2 and error.count("\n") == 1 and "3.8 MB needed" in error and "could not write" in error
    assert not leftovers(tmp_path / "kept")


@tmpfs
@pytest.mark.parametrize("command, file", [
    (f"plot.py --runs={ROOT}/results/mathematics/curves.csv --out_dir=$DISK/out", "curves.png"),
    ("-m data.relational_games --out=$DISK/out/x.png", "x.png"),
    ("-m data.images.glyphs --out=$DISK/out/x.png", "x.png")])
def test_a_figure_that_does_not_fit_is_one_line(command, file, on_disk, tmp_path):
    status, _, error = on_disk("20k", f"$PY {command}")
    assert status == 2 and error.count("\n") == 1 and f"{file}: No space left on device" in error
    assert not any(path.is_file() for path in (tmp_path / "kept").rglob("*.png"))


@tmpfs
def test_a_table_that_does_not_fit_leaves_the_old_one(on_disk, tmp_path):
    status, _, error = on_disk("12k", """$PY -c "
from pathlib import Path
from toolbox.files import write_text
write_text(Path('$DISK/table.md'), 'old')
write_text(Path('$DISK/table.md'), 'new' * 10000)" """)
    assert "could not write" in error.splitlines()[-1] and "0.0 MB needed" in error
    assert (tmp_path / "kept" / "table.md").read_text() == "old" and not leftovers(tmp_path / "kept")


@tmpfs
def test_a_download_and_an_archive_that_do_not_fit_are_one_line(on_disk, tmp_path):
    """The part of a download stays, to be continued; of an archive nothing stays."""
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "file.bin").write_bytes(bytes(10 ** 6))
    subprocess.run(["tar", "czf", tmp_path / "web" / "file.tar.gz", "-C", tmp_path / "web", "file.bin"], check=True)
    status, said, error = on_disk("300k", f"""$PY -c "
import functools, http.server, threading
from data.download import download
from data.extract import extract
web = functools.partial(http.server.SimpleHTTPRequestHandler, directory='{tmp_path / 'web'}')
server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), web)
threading.Thread(target=server.serve_forever, daemon=True).start()
for do in (lambda: extract('{tmp_path / 'web' / 'file.tar.gz'}', '$DISK/folder'),
           lambda: download('http://127.0.0.1:%d/file.bin' % server.server_port, '$DISK/file.bin', size=10 ** 6)):
    try:
        do()
    except OSError as error:
        print(error)" """)
    unpacked, fetched = said.splitlines()
    assert status == 0 and "could not unpack" in unpacked and "the disk or your quota is full" in unpacked
    assert "could not download" in fetched and "MB free in" in fetched and "1.0 MB needed)" in fetched
    assert not (tmp_path / "kept" / "folder.part").exists() and (tmp_path / "kept" / "file.bin.part").exists()


def test_rows_of_the_log_that_do_not_fit_wait_for_space_and_lose_no_step(tiny, tmp_path, only_run, monkeypatch, capsys):
    """The log goes to /dev/full for a while, which is always full."""
    seen, reseed = [], train_lm.training.reseed

    def step(seed, number, *rank):
        log = only_run() / "log.csv"
        if number == 7:
            log.rename(tmp_path / "log")
            log.symlink_to("/dev/full")
        if number == 13:
            log.unlink()
            (tmp_path / "log").rename(log)
        seen.append(number)
        return reseed(seed, number, *rank)
    monkeypatch.setattr(train_lm.training, "reseed", step)
    train_lm.main([*tiny, "--max_steps=20", "--eval_every=20", "--log_every=2"])
    rows = (only_run() / "log.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == [*map(str, range(0, 21, 2)), "20"] and seen == [*range(1, 21)]
    said = capsys.readouterr().out
    assert said.count("No space left on device") == 3 and "its rows are kept for later" in said


def test_a_file_that_may_not_be_so_long_and_a_quota_are_a_full_disk_too(tmp_path):
    """The limit of a process (ulimit -f) is real here; the quota is not."""
    code = ("import resource, signal, pathlib; from toolbox.files import write_text\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
            f"write_text(pathlib.Path({str(tmp_path / 'x')!r}), 'x' * 2000)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert "x: File too large (" in done.stderr.splitlines()[-1] and not list(tmp_path.iterdir())
    with pytest.raises(DownloadError, match="quota is full: Disk quota exceeded .* MB free in .*, 5.0 MB needed"):
        with as_download_error("could not download x", tmp_path / "new", "download it by hand", needed=5 * 10 ** 6):
            raise OSError(122, "Disk quota exceeded")
    write_text(tmp_path / "x", "±")
    assert (tmp_path / "x").read_bytes() == "±".encode()
