"""toolbox/sweep.py: runs in a pool of processes. (A whole sweep, also a killed one: test_relgames_script.py.)"""
import multiprocessing
import os
import signal
import sys
import time

import pytest

from toolbox import sweep


class FakeRun:
    """In place of toolbox.run.Run: a number, and how `work` ends on it."""
    max_steps, record = 3, {"scores": "of another sweep"}

    def __init__(self, number, ends="well"):
        self.number, self.ends = number, ends

    def reusable(self, quiet):
        return self.ends == "finished before"

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def work(run, factor):
    run.bar.update()
    if run.ends == "itself":
        sys.exit(1)
    if run.ends == "never":
        time.sleep(600)
    return factor * run.number


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX")
def test_a_run_that_ends_itself_yields_none_and_a_killed_worker_is_a_clear_error():
    runs = [FakeRun(1), FakeRun(2, "itself"), FakeRun(3), FakeRun(4, "finished before"), FakeRun(5, "never")]
    results = sweep.train_all(work, runs, (10,), workers=1)
    assert {run.number: result for run, result in (next(results) for _ in range(4))} == {
        1: 10, 2: None, 3: 30, 4: "of another sweep"}
    worker, = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(ValueError, match="a worker was killed.*fewer --workers; what was finished is kept"):
        next(results)
    assert not multiprocessing.active_children()


def test_an_error_in_a_worker_is_raised_and_ends_the_others():
    with pytest.raises(TypeError, match="can't multiply"):
        list(sweep.train_all(work, [FakeRun("text"), FakeRun(1, "never")], (0.5,), workers=2))
    assert not multiprocessing.active_children()


def test_no_runs_need_no_processes(monkeypatch):
    monkeypatch.setattr(sweep, "ProcessPoolExecutor", None)
    assert list(sweep.train_all(work, [], (10,), workers=2)) == []
