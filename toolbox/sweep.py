"""Many small runs at a time, in a pool of processes."""
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

import torch
from tqdm import tqdm

from toolbox.output import unfailing_output


def cores():
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def train_all(train, runs, arguments, workers):
    """Trains each run by train(run, *arguments); yields (run, what train returned) in the order in which they finish.

    train is a function of a module; it runs in one of `workers` processes, which share the cores. A run that ends by
    itself (SystemExit: its loss was not finite) yields None. Other errors are
    raised. A killed worker is a ValueError; what was finished is kept.
    """
    if not runs:
        return
    spawn = multiprocessing.get_context("spawn")                      # CUDA cannot be used in a fork
    workers = min(workers, len(runs))
    counter = spawn.Value("q", 0)                                     # steps done by all workers
    pool = ProcessPoolExecutor(workers, spawn, start_worker, (counter, max(1, cores() // workers)))
    bar = tqdm(total=sum(run.max_steps for run in runs), unit="step", leave=False, disable=not sys.stderr.isatty())
    try:
        waiting = {pool.submit(train_one, train, run, arguments): run for run in runs}
        while waiting:
            done, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            bar.update(counter.value - bar.n)
            for future in done:
                ended = isinstance(future.exception(), SystemExit)
                yield waiting.pop(future), None if ended else future.result()
    except BrokenProcessPool:
        raise ValueError("a worker was killed, perhaps because it was out of memory: repeat the command, with fewer "
                         "--workers; what was finished is kept") from None
    finally:
        bar.close()
        for worker in multiprocessing.active_children():              # after Ctrl-C or an error they would train on
            worker.terminate()
        pool.shutdown(cancel_futures=True)


def start_worker(counter, threads):
    """Runs first in each worker. Ctrl-C ends it silently, and it does not outlive the main process."""
    StepCounter.counter = counter
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def train_one(train, run, arguments):
    """In a worker: one run."""
    run.bar = StepCounter()
    with unfailing_output(), run:
        if run.reusable(quiet=True):               # another command finished it meanwhile
            return run.record["scores"]
        return train(run, *arguments)


class StepCounter:
    """In place of a run's own progress bar: adds its steps to those of all workers, and prints nothing."""
    counter, disable = None, False

    def update(self, n=1):
        with self.counter.get_lock():
            self.counter.value += n

    def write(self, text):
        pass

    def set_postfix_str(self, text):
        pass

    def close(self):
        pass
