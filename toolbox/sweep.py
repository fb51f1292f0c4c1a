"""Many small trainings at a time: a pool of processes, and a file for each result, so that a sweep may be cut short."""
import json
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

import torch
from tqdm import tqdm

from toolbox.training import write_atomically


def cores():
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def run(train, jobs, n_steps, workers):
    """Yields (path, result) as the trainings finish, each written to its path as JSON before.

    train: a function of a module, train(*job, step_done) -> dict, that calls step_done() after each step; it runs in
    one of `workers` processes, which share the cores. jobs: {path: arguments}; n_steps: of them all, for the bar.
    A kill loses only the trainings in flight. Raises what train raises, ValueError if a worker is killed.
    """
    spawn = multiprocessing.get_context("spawn")                      # CUDA cannot be used in a fork
    workers = min(workers, len(jobs))
    counter = spawn.Value("q", 0)                                     # steps done by all of them
    pool = ProcessPoolExecutor(workers, spawn, start_worker, (counter, max(1, cores() // workers)))
    bar = tqdm(total=n_steps, unit="step", leave=False, disable=not sys.stderr.isatty())
    try:
        waiting = {pool.submit(run_one, train, path, job): path for path, job in jobs.items()}
        while waiting:
            done, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            bar.update(counter.value - bar.n)
            for future in done:
                yield waiting.pop(future), future.result()
    except BrokenProcessPool:
        raise ValueError("a worker was killed, perhaps for want of memory: repeat the command, with fewer --workers; "
                         "what was finished is kept") from None
    finally:
        bar.close()
        for worker in multiprocessing.active_children():              # after Ctrl-C or an error they would train on
            worker.terminate()
        pool.shutdown(cancel_futures=True)


def start_worker(counter, threads):
    """Runs first in each worker. It dies silently of Ctrl-C, and does not outlive the main process."""
    global steps
    steps = counter
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def run_one(train, path, job):
    """In a worker: one training, and its file."""
    result = train(*job, count_step)
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(result, indent=1)))
    return result


def count_step():
    with steps.get_lock():
        steps.value += 1


def load(path):
    """A result's file as a dict; {} if there is none or it is damaged."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return result if isinstance(result, dict) else {}
