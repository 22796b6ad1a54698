"""The processes of torchrun. Each samples the groups of its own part of an epoch's prompts; what is computed does not
depend on how many there are. Process 0 alone writes and prints.
"""

import os
import sys
import threading
import traceback
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

PATIENCE = timedelta(minutes=30)  # with a process that is slow; of one that ended the others know at once

recording = threading.Lock()
"""Held while a CUDA graph is recorded, and while a reward is computed in its thread: a GPU's other work spoils it."""


def world_size():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def processes():
    """Join the processes that torchrun has started, if it has; where this one fails, torchrun ends the others."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backends, timeout=PATIENCE)
    try:
        yield
    except BaseException as error:
        if world_size() == 1:
            raise
        code = error.code if isinstance(error, SystemExit) else "".join(traceback.format_exception(error)).rstrip()
        if isinstance(code, str):
            print(code, file=sys.stderr, flush=True)
        os._exit(code if isinstance(code, int) else 1)  # at once: exiting could wait for threads, and NCCL for others
    if dist.is_initialized():
        dist.destroy_process_group()


def local_shard(items):
    """The part of a sequence that belongs to this process: a block, in the order of the ranks."""
    return items[len(items) * rank() // world_size() : len(items) * (rank() + 1) // world_size()]


def gather(value):
    """[the value of each process], in the order of their ranks, in each of them; any value that can be pickled."""
    values = [value] * world_size()
    if world_size() > 1:
        with _together():
            dist.all_gather_object(values, value)
    return values


def gather_rows(named):
    """{name: (n,)} of this process -> {name: (N,)} of all, in the order of their ranks; some may lack a name."""
    if world_size() == 1:
        return named
    parts = gather({name: value.detach().cpu() for name, value in named.items()})
    device = next((value.device for value in named.values()), None)
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: torch.cat([part[name] for part in parts if name in part]).to(device) for name in names}


def first_not_finite(named):
    """The name of the first of {name: tensor} with a value that is not finite, in any process; or None."""
    local = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in named.items()}
    finite = {name: t.isfinite().all() for name, t in local.items()}  # all of them before the device is waited for
    wrong = gather([name for name, holds in finite.items() if not holds])
    return next((name for names in wrong for name in names), None)


def average_gradients(parameters):
    """Make each gradient its mean over the processes, by one all-reduce of all of them.

    One that only some processes have counts as 0 in the others; one that none has stays None. Gradients of sharded
    parameters are left alone: the backward pass has averaged them already.
    """
    parameters = [p for p in parameters if not isinstance(p, DTensor)]
    if world_size() == 1 or not parameters:
        return
    zero_or = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    exist = torch.tensor([p.grad is not None for p in parameters]).to(zero_or[0])
    flat = torch.cat([exist, *(gradient.flatten() for gradient in zero_or)])
    with _together():
        dist.all_reduce(flat)
    exist, *gradients = (flat / world_size()).split([len(exist), *(p.numel() for p in parameters)])
    for p, exists, gradient in zip(parameters, (exist > 0).tolist(), gradients, strict=True):
        p.grad = gradient.view_as(p) if exists else None


@contextmanager
def _together():
    """Around what all processes do: one that waits in vain for another says so in a line; the other said why."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise SystemExit(f"error: process {rank()} of {world_size()} has lost another one ({reason})") from error
