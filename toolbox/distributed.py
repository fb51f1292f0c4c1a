"""Several processes train one model: data parallelism by hand.

    torchrun --standalone --nproc_per_node=8 train_lm.py --preset=fineweb_350m

Every process holds the whole model, reads its share of each batch, and computes that share's part of the gradient. The
parts are summed over the processes (all_reduce), so that all take the same step as one process would on the whole
batch. Process 0 writes the run's folder; to resume, the others read its checkpoint: all are on one machine, or share a
file system. Without torchrun there is one process and no sum.

On Ctrl-C or SIGTERM the current step is finished and saved if that takes less than 30 seconds, after which torchrun
kills its processes; for larger models give it --shutdown_timeout=300.
"""
import os
import sys

import torch
import torch.distributed as dist

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))     # set by torchrun


def start():
    """Joins the other processes: nccl between GPUs, gloo between CPUs. Process 0 alone prints."""
    if WORLD == 1:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    # gloo in any case: the numbers that `total` sums stay on the CPU
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if RANK:
        sys.stdout = open(os.devnull, "w")


def check(device):
    """Raises ValueError if processes would have to share a GPU."""
    n_gpus, n_here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type == "cuda" and n_gpus < n_here:
        raise ValueError(f"{n_here} processes need {n_here} GPUs, here are {n_gpus}: give torchrun "
                         f"--nproc_per_node={n_gpus}, or --device=cpu")


def end():
    """The processes wait for each other and end, without Python's cleaning up: a thread of gloo's that still holds a
    tensor while Python is taken apart aborts its process ("terminate called without an active exception").
    """
    if WORLD == 1:
        return
    total([0])
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def total(values):
    """The sum over all processes of each of these numbers."""
    if WORLD == 1:
        return values
    values = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(values)
    return values.tolist()


def sum_gradients(model):
    """Each process has the gradient of its share of the mean loss: their sum is the gradient of the mean."""
    if WORLD > 1:
        for p in model.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad)
