"""Runs scripts one after another in the processes of one torchrun: their start is what takes the time.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/ranks.py jobs.json

jobs.json: [[script, argument, ...], ...]. Each process writes the checksum of its trained parameters after each epoch
into checksums-RANK.json of the current folder, [[one of each epoch] of each job].
"""

import importlib
import json
import sys
from pathlib import Path

import torch

import common


def check_gradients():
    """What only one process has counts as 0 in the others; what none has stays None."""
    mine, none, all_have = (torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(3))
    all_have.grad = torch.full((2, 3), 1.0 + common.rank())
    if common.rank() == 1:
        mine.grad = torch.ones(2, 3)
    common.average_gradients([mine, none, all_have])
    n = common.world()
    assert none.grad is None
    assert torch.equal(mine.grad, torch.full((2, 3), 1 / n))
    assert torch.equal(all_have.grad, torch.full((2, 3), (1 + n) / 2))


def check_gathering():
    """Parts of different lengths come together in the order of the ranks, and so do names that some lack."""
    items = list(range(7))
    rows = {"all": torch.tensor(common.own(items)).float()} | (
        {"last": torch.ones(1)} if common.own(items)[-1:] == [6] else {}
    )
    gathered = common.gather_rows(rows)
    assert gathered["all"].tolist() == items and gathered["last"].tolist() == [1]


def main():
    check_gradients()
    check_gathering()
    save, sums = common.Checkpoint.save, []

    def watched(self, epoch, updates):
        sums[-1].append(common.checksum(self.named.values()))
        save(self, epoch, updates)

    common.Checkpoint.save = watched
    for script, *argv in json.loads(Path(sys.argv[1]).read_text()):
        sums.append([])
        sys.argv = [script, *argv]
        importlib.import_module(script.removesuffix(".py")).main()
    Path(f"checksums-{common.rank()}.json").write_text(json.dumps(sums))


if __name__ == "__main__":
    common.start(main)
