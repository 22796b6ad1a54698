"""Checkpoints: what is written is complete or counts for nothing, and what was damaged later is found out."""

import hashlib
import json
import os
import re
import shutil
import signal
import time
import warnings
from contextlib import contextmanager

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from harness.arguments import repeatable
from harness.fields import refuse
from harness.parallel import first_not_finite, gather, rank

OURS = re.compile(r"epoch_\d+(_evaluated)?")  # a copy that somebody keeps beside them has another name


@contextmanager
def atomic_file(path):
    """A text file to write, which then takes the place of what was there before."""
    new = path.with_name(f"{path.name}.tmp")
    with open(new, "w", encoding="utf-8", newline="") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())  # what takes its place is on the disk
    os.replace(new, path)


@contextmanager
def atomic_folder(folder):
    """An empty folder to fill, which then takes the place of `folder`; where that fails nothing of it is left."""
    new = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        readers = new.stat().st_mode & 0o444
        for path in (*new.rglob("*"), new):
            path.chmod(path.stat().st_mode | readers)  # safetensors are the owner's alone
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def sha256(path):
    """The checksum of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(parameters):
    """The sum of all bits of float32 parameters as integers; 0 of sharded ones."""
    return int(sum(p.detach().view(torch.int32).sum() for p in parameters if not isinstance(p, DTensor)))


def check_finite(run, epoch, policy):
    """End the run where a trained parameter is not finite: nothing of it is saved. policy: {name: parameter}."""
    if wrong := first_not_finite(policy):
        remedy = "nothing of it was saved; a smaller train.learning_rate would do"
        raise run.error(f"after epoch {epoch} {wrong} is not finite; {remedy}")


def checkpoints(run_folder):
    """The checkpoints of a run, oldest first; without its SHA256SUMS one is being written or removed, and is none."""
    complete = [path.parent for path in run_folder.glob("checkpoints/*/SHA256SUMS") if OURS.fullmatch(path.parent.name)]
    return sorted(complete, key=lambda path: (int(path.name.split("_")[1]), path.name))


def damage(checkpoint):
    """What is wrong with a checkpoint, by its checksums; None if nothing is."""
    try:
        lines = (checkpoint / "SHA256SUMS").read_text().splitlines()
        sums = {name: digits for digits, name in (line.split("  ") for line in lines)}
        for name in {path.name for path in checkpoint.iterdir()} - {"SHA256SUMS"} | sums.keys() | {"state.json"}:
            if sha256(checkpoint / name) != sums[name]:
                return f"{name} does not have its checksum"
        if {"epoch", "updates", "args", "rows"} - json.loads((checkpoint / "state.json").read_text()).keys():
            return "state.json is not a run's"
    except (OSError, ValueError, KeyError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"


def newest_checkpoint(run):
    """The newest checkpoint of a run that is undamaged, and its state; (None, None) if no epoch was finished."""
    damaged = []
    for checkpoint in reversed(checkpoints(run.folder)):
        if (reason := damage(checkpoint)) is None:
            for bad in damaged:
                run.print(f"damaged: {bad}; {checkpoint.name} is used")
            return checkpoint, json.loads((checkpoint / "state.json").read_text())
        damaged.append(f"{checkpoint.name}: {reason}")
    table = run.folder / "metrics.csv"
    if damaged or (table.is_file() and table.read_bytes().count(b"\n") > 2):  # more than epoch 0
        found = "; ".join(damaged) or "there is none"
        refuse("resume", str(run.folder), f"has no checkpoint that is whole ({found})")
    return None, None


class Checkpoint:
    """All that decides how a run goes on, in a folder of checkpoints/ in the run folder.

    *.safetensors hold tensors by parameter name, parameters/NAME, <snapshot>/NAME and optimizer/NAME/KEY, in the form
    of torch.distributed.checkpoint: one file, or with --shard one of each process, readable by any number of them.
    state.json has the numbers, the rows of metrics.csv among them; SHA256SUMS is theirs. What is random comes from the
    seed and the epoch, so an epoch is repeated exactly.
    """

    def __init__(self, run, policy, optimizer, **snapshots):
        """policy: {name: parameter}, in the optimizer's order; snapshots: Snapshots of the same parameters, or None."""
        self.run, self.policy, self.optimizer = run, policy, optimizer
        self.snapshots = {name: snapshot for name, snapshot in snapshots.items() if snapshot}

    def _tensors(self):
        """{set/NAME: tensor} of the parameters and of their snapshots."""
        sets = {"parameters": [p.detach() for p in self.policy.values()]}
        sets |= {name: snapshot.values for name, snapshot in self.snapshots.items()}
        return {f"{of}/{name}": t for of, tensors in sets.items() for name, t in zip(self.policy, tensors, strict=True)}

    def save(self, epoch, updates):
        """At the end of an epoch: write what is due, and end the run if it was asked to or cannot learn any more."""
        run = self.run
        last = epoch >= run.args.train.max_epochs
        interrupted = max(gather(run.interrupted))  # in any process
        check_finite(run, epoch, self.policy)
        if len(set(gather(checksum(self.policy.values())))) > 1:
            raise run.error("the processes have come to different parameters; is the hardware sound?")
        if last or run.broken or interrupted or epoch % run.args.checkpoint_freq == 0:
            self._write(epoch, updates)
        run.in_loop = not last
        if run.broken:
            raise run.error(run.broken)
        if interrupted and not last:
            name = signal.Signals(interrupted).name
            run.print(f"{name}: epoch {epoch} is finished and saved; continue with: {run.command}")
            raise SystemExit(128 + interrupted)

    def _write(self, epoch, updates):
        run, sharded = self.run, self.run.args.shard
        tensors = self._tensors()
        for name, p in self.policy.items():
            tensors |= {f"optimizer/{name}/{key}": t for key, t in self.optimizer.state.get(p, {}).items()}
        state = {"epoch": epoch, "updates": updates, "args": repeatable(run.args), "rows": run.rows}
        state |= {"seconds": time.time() - run.started, "skipped_in_a_row": run.skipped_in_a_row}
        evaluated = "_evaluated" if "eval/total" in run.rows[-1] else ""  # so that no whole checkpoint is written over
        folder = run.folder / "checkpoints" / f"epoch_{epoch:04d}{evaluated}"
        if rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        gather("the folder is there")
        if sharded or rank() == 0:
            with _its_own_error():
                writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
                dcp.save(tensors, storage_writer=writer, no_dist=not sharded)
        if rank():
            return
        (folder / "state.json").write_text(json.dumps(state))
        sums = "".join(f"{sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir()))
        with atomic_file(folder / "SHA256SUMS") as file:  # now it is complete
            file.write(sums)
        found = checkpoints(run.folder)
        kept = found[max(0, found.index(folder) + 1 - run.args.keep_checkpoints) :]  # later ones are damaged
        for other in set(run.folder.glob("checkpoints/*/")) - set(kept):
            if OURS.fullmatch(other.name):
                shutil.rmtree(other)

    def begin(self, evaluate):
        """Log the base model, or take up a resumed run where its newest checkpoint is.

        evaluate(epoch) -> its columns of metrics.csv. Returns (the first epoch to train, updates done).
        """
        run, state = self.run, self.run.state
        run.in_loop = True
        if state is None:
            if run.args.resume:
                run.print("no epoch was finished; beginning again")
            run.log(0, evaluate(0))
            self.save(0, 0)
            return 1, 0
        self._read()
        run.rows, run.skipped_in_a_row = state["rows"], state["skipped_in_a_row"]
        run.started = time.time() - state["seconds"]
        if rank() == 0:
            run.write_metrics()
        epochs = run.args.train.max_epochs
        done = f"; all {epochs} are, and a larger --train.max-epochs adds more" if state["epoch"] >= epochs else ""
        run.print(f"resumed: epochs up to {state['epoch']} are done{done}")
        if state["epoch"] == epochs and "eval/total" not in run.rows[-1]:
            row = run.rows.pop()
            run.skipped = row["train/skipped"]
            run.log(epochs, row | evaluate(epochs))
            self.save(epochs, state["updates"])
        return state["epoch"] + 1, state["updates"]

    def _read(self):
        """Put what the checkpoint has, this process's shard of it, into parameters, snapshots and optimizer."""
        reader, run = HuggingFaceStorageReader(str(self.run.checkpoint)), self.run
        saved = reader.read_metadata().state_dict_metadata
        local = self._tensors()
        for key, tensor in local.items():
            if key not in saved or saved[key].size != tensor.shape:
                name, model = key.partition("/")[2], run.args.model
                raise run.error(f"{name} is not as in {run.checkpoint}; is {model} the model that it was?")
        states = {name: {} for name in self.policy}  # of the optimizer
        for _, name, kind in (key.split("/") for key in saved if key.startswith("optimizer/")):
            empty = torch.zeros(()) if kind == "step" else torch.zeros_like(self.policy[name].detach())
            local[f"optimizer/{name}/{kind}"] = states[name][kind] = empty
        with torch.no_grad(), _its_own_error():
            dcp.load(local, storage_reader=reader, no_dist=True)
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": dict(enumerate(states.values()))})


@contextmanager
def _its_own_error():
    """Raise what went wrong in a process as it was there, and say nothing of there being only one."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error
