"""Runs scripts one after another in the processes of one torchrun: their start is what takes the time.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/ranks.py jobs.json

jobs.json: [[script, argument, ...], ...]. Each process writes the checksum of its trained parameters after each epoch
into checksums-RANK.json of the current folder, [[one of each epoch] of each job].
"""

import importlib
import json
import sys
from pathlib import Path
from unittest.mock import Mock

import torch

from common import Metrics, average_clip_step
from harness import ending
from harness.checkpoint import Checkpoint, checksum
from harness.parallel import average_gradients, rank, world_size


def check_gradients():
    """What only one process has counts as 0 in the others; what none has stays None."""
    mine, none, all_have = (torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(3))
    all_have.grad = torch.full((2, 3), 1.0 + rank())
    if rank() == 1:
        mine.grad = torch.ones(2, 3)
    average_gradients([mine, none, all_have])
    n = world_size()
    assert none.grad is None
    assert torch.equal(mine.grad, torch.full((2, 3), 1 / n))
    assert torch.equal(all_have.grad, torch.full((2, 3), (1 + n) / 2))


def check_update():
    """What is clipped is the mean over the processes, and one that is not finite in a process is skipped by all."""
    last = rank() == world_size() - 1
    for gradient, expected in ((2.0 * world_size() - 1 if last else -1.0, -0.5), (torch.nan if last else -1.0, 0)):
        parameter, update, run = torch.nn.Parameter(torch.zeros(1)), Metrics(), Mock()
        parameter.grad = torch.tensor([gradient])  # on average 1
        update.add({"loss": 0.0})
        average_clip_step(run, torch.optim.SGD([parameter], 1.0), {"name": parameter}, update, 0.5)
        assert abs(parameter.item() - expected) < 1e-5
        assert run.skipped_update.called == (expected == 0) and (run.skipped_in_a_row == 0) == (expected != 0)


def main():
    check_gradients()
    check_update()
    save, sums = Checkpoint.save, []

    def watched(self, epoch, updates):
        sums[-1].append(checksum(self.policy.values()))
        save(self, epoch, updates)

    Checkpoint.save = watched
    for script, *argv in json.loads(Path(sys.argv[1]).read_text()):
        sums.append([])
        sys.argv = [script, *argv]
        importlib.import_module(script.removesuffix(".py")).main()
    Path(f"checksums-{rank()}.json").write_text(json.dumps(sums))


if __name__ == "__main__":
    ending.start(main)
