"""The run folder: all that a run was and did, written as it goes."""

import csv
import functools
import inspect
import itertools
import os
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from importlib.metadata import version
from pathlib import Path

import filelock
import numpy as np
import torch
from peft import get_peft_model_state_dict
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from tqdm import tqdm

from common import denoisers, seed_global_generators
from harness.arguments import began_with, repeatable
from harness.checkpoint import atomic_file, atomic_folder, check_finite, newest_checkpoint, sha256
from harness.data import read_rows
from harness.evaluation import evaluate, save_curve, save_grid
from harness.fields import MAY_CHANGE, fields_of, refuse, to_yaml
from harness.judges.weights import to_pil
from harness.parallel import gather, rank, world_size
from harness.settings import HERE

MOST_SKIPPED = 5  # updates in a row
TELLING = ("reward/total", "zero_std", "group_spread", "kl", "clip_fraction", "v_old_distance", "v_ref_distance")
"""Of the metrics of an epoch, those on its line."""


class Run:
    """A folder runs/<run_name>/, made before the model is loaded; of several processes the first writes and prints."""

    current = None  # the run of this process, if one has begun, for what ends it from outside the loop
    folder = checkpoint = state = None  # its own, and what it is resumed from

    def __init__(self, args, said, script):
        """said: lines about where the arguments come from; script: the path of the file that runs."""
        self.args, self.rows, self.started = args, [], time.time()
        self.skipped, self.skipped_in_a_row = 0, 0  # updates since the last row, and without one taken in between
        self.broken = None  # why the run has to end after this epoch
        self.interrupted = 0  # the signal that asks it to
        self.in_loop = False
        self.eval_rows = read_rows(args.eval.prompts or args.prompts)
        gather("the name is free")  # as all have checked; from now on it is not
        began, notes = self._open(script) if rank() == 0 else (None, ())
        self.folder, self.checkpoint, self.state = gather((self.folder, self.checkpoint, self.state))[0]
        Run.current = self
        self.trackers = self._trackers(began["started"]) if rank() == 0 else []
        for line in (f"{Path(script).name} -> {self.folder}", *said, *(f"note: {note}" for note in notes)):
            self.print(line)

    def _open(self, script):
        """Make the folder, or look at what is in it: the environment that the run began in, and notes."""
        args = self.args
        now = _environment(args, script)
        try:
            self.folder = Path(args.resume) if args.resume else _new_folder(args, script)
            self._lock()
            if not args.resume:
                with atomic_file(self.folder / "environment.yaml") as file:
                    file.write(to_yaml(now))
                (self.folder / "images").mkdir(exist_ok=True)
                shutil.copy(script, self.folder)
            began = began_with(self.folder)
            self.checkpoint, self.state = newest_checkpoint(self)
            notes = _compare(args, began, now, self.state)
            with atomic_file(self.folder / "args.yaml") as file:  # from now on it is a run to resume
                file.write(to_yaml(repeatable(args)))
        except OSError as error:
            refuse("output_dir", args.output_dir, f"cannot write {error.filename or self.folder}: {error.strerror}")
        return began, notes

    def _lock(self):
        """One process to a run; the lock goes with the process, however it ends."""
        try:
            self.lock = filelock.FileLock(self.folder / "lock", timeout=0, is_singleton=True)
            self.lock.acquire()
        except filelock.Timeout:
            refuse("resume", str(self.folder), "another process is working on this run")
        except (OSError, NotImplementedError):  # a file system without locks
            pass

    def _trackers(self, started):
        """Functions that take a row of metrics."""
        trackers, name = [], self.folder.name
        if self.args.track:
            import wandb

            same = {"project": "flow-rl", "name": name, "id": f"{name}-{started}", "resume": "allow"}
            wandb.init(**same, dir=self.folder, config=repeatable(self.args))
            trackers.append(lambda row: wandb.log(row, step=row["epoch"]))
        if self.args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(self.folder)
            trackers.append(lambda row: [board.add_scalar(k, v, row["epoch"]) for k, v in row.items()])
        return trackers

    @property
    def command(self):
        """What continues this run, typed where it was begun."""
        launcher = f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}" if world_size() > 1 else "python"
        return f"{launcher} {shlex.quote(sys.argv[0])} --resume {shlex.quote(str(self.folder))}"

    def error(self, message):
        """What to raise to end a run that has begun: a line."""
        return SystemExit(f"error: {message}; continue with: {self.command}")

    def print(self, line):
        """A line on the console and in log.txt."""
        if rank():
            return
        with open(self.folder / "log.txt", "a", encoding="utf-8") as log:
            log.write(f"{line}\n")
        tqdm.write(str(line), file=sys.stdout)
        sys.stdout.flush()

    def log(self, epoch, columns):
        """One row of metrics.csv, and one console line with the most telling of its columns, {name: number}."""
        images = epoch * self.args.train.unique_sample_num_per_epoch * self.args.train.group_size
        row = columns | {"epoch": epoch, "images": images, "seconds": round(time.time() - self.started, 2)}
        if epoch:
            row["train/skipped"], self.skipped = self.skipped, 0
        self.rows.append(row)
        if rank():
            return
        self.write_metrics()
        for track in self.trackers:
            track(row)
        shown = {key: row[f"train/{key}"] for key in TELLING if f"train/{key}" in row}
        shown |= {key: value for key, value in row.items() if key.startswith("eval/") and "/image/" not in key}
        values = "  ".join(f"{key} {value:.3g}" for key, value in shown.items())
        self.print(f"epoch {epoch:4d}  images {images:7d}  {row['seconds']:6.0f} s  {values}")
        if "eval/total" in row:
            save_curve(self.folder / "curve.png", self.rows)

    def write_metrics(self):
        """metrics.csv, complete."""
        columns = dict.fromkeys(key for row in self.rows[::-1] for key in row)
        columns = sorted(columns, key=lambda key: (key.startswith("eval/"), key.startswith("train/")))
        with atomic_file(self.folder / "metrics.csv") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)

    def skipped_update(self, culprit):
        """Count an update that was skipped because something in it, culprit, was not finite."""
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        self.print(f"update skipped, {self.skipped_in_a_row} in a row: {culprit} is not finite")
        if self.skipped_in_a_row == MOST_SKIPPED:
            self.broken = f"{MOST_SKIPPED} updates in a row were skipped, the last because {culprit} is not finite"
            self.skipped_in_a_row = 0

    def watch(self, reward):
        """The reward, but where it fails, the images and prompts of that call are kept."""

        @functools.wraps(reward)
        def watched(images, prompts, rows=None):
            try:
                return reward(images, prompts, rows)
            except ValueError as error:  # which is what rewards.py makes of all failures
                failed = self.folder / f"failed_reward{rank() or ''}"
                with atomic_folder(failed) as folder:
                    for i, frame in enumerate(to_pil(images.flatten(0, -4))):  # those of videos one after another
                        frame.save(folder / f"{i:04d}.png")
                    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
                what = str(error).removeprefix("error: ")
                raise self.error(f"{what}; its images and prompts are in {failed}") from error

        return watched

    def contract(self, terms):
        """End the run if one of {what: (value, whether it holds)} does not, in the process where it is worst."""
        terms = {what: min(gather(term), key=lambda found: (found[1], -found[0])) for what, term in terms.items()}
        said = ", ".join(f"{what} {value:.6g}{'' if holds else ' BROKEN'}" for what, (value, holds) in terms.items())
        broken = "; ".join(f"{what} is {value:.6g}" for what, (value, holds) in terms.items() if not holds)
        self.print(f"contract{'' if broken else ' holds'}: {said}")
        if broken:
            raise SystemExit(f"error: the first-step contract is broken: {broken}; nothing was trained")

    def evaluate(self, epoch, pipe, reward, policy, average):
        """Evaluate, keep the grid and each image's rewards and the weights; returns the columns of metrics.csv.

        average: a Snapshot of the policy that is evaluated and saved in its place. Where no evaluation is due: {}.
        """
        if epoch % self.args.eval.eval_freq and epoch != self.args.train.max_epochs:
            return {}
        check_finite(self, epoch, policy)
        with average.loaded() if average else nullcontext():
            seed_global_generators(self.args.eval.seed, epoch)
            prompts, scores, statistics, shown = evaluate(pipe, self.args, self.eval_rows, reward)
            self._save_weights(pipe)
        columns = {f"eval/{name}": scores[name].mean().item() for name in dict.fromkeys(["total", *scores])}
        columns |= {f"eval/image/{name}": value for name, value in statistics.items()}
        if rank():
            return columns
        images, base = self.folder / "images", None
        if epoch == 0:
            np.savez_compressed(images / "base.npz", totals=scores["total"], shown=np.stack(list(shown.values())))
        else:
            with suppress(Exception):  # a grid without the base model's images, where their file is lost or damaged
                kept = np.load(images / "base.npz")
                base = dict(zip(shown, kept["shown"], strict=True)), kept["totals"]
        save_grid(images / f"epoch_{epoch:04d}.png", shown, prompts, scores["total"], base)
        with open(images / f"epoch_{epoch:04d}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["prompt", *scores])
            writer.writerows(zip(prompts, *(v.tolist() for v in scores.values()), strict=True))
        return columns

    def _save_weights(self, pipe):
        """The trained weights in diffusers' own format: lora/ (with its alpha), or the denoiser's own folder."""
        trained, full = denoisers(pipe), self.args.finetune_type == "full"
        on_first = StateDictOptions(full_state_dict=True, cpu_offload=True)  # on its CPU, by all processes together
        states = {name: get_model_state_dict(module, options=on_first) for name, module in trained.items() if full}
        if rank():
            return
        for name, state in states.items():
            with atomic_folder(self.folder / name) as folder:
                trained[name].state_dict = lambda state=state: state
                trained[name].save_pretrained(folder)
                del trained[name].state_dict
        if full:
            with atomic_folder(self.folder / "scheduler") as folder:
                pipe.scheduler.save_pretrained(folder)
            return
        save, layers = getattr(pipe, "save_lora_weights", lambda: None), {}
        with atomic_folder(self.folder / "lora") as folder:
            for name, module in trained.items():
                if f"{name}_lora_layers" in inspect.signature(save).parameters:
                    layers[f"{name}_lora_layers"] = get_peft_model_state_dict(module)
                    # without its metadata a LoRA is loaded again with another alpha
                    layers[f"{name}_lora_adapter_metadata"] = module.peft_config["default"].to_dict()
                else:  # load it with pipe.<name>.load_lora_adapter(folder, prefix=None, use_safetensors=True)
                    module.save_lora_adapter(folder / name)
            if layers:
                save(folder, **layers)

    def finish(self, pipe):
        """The last lines: what was gained, where it is, and the Python that loads its weights."""
        folder, totals = self.folder, [row["eval/total"] for row in self.rows if "eval/total" in row]
        load = [f'pipe.load_lora_weights("{folder}/lora")']
        if self.args.finetune_type == "full":
            load = [f'pipe.{name} = pipe.{name}.from_pretrained("{folder}/{name}")' for name in denoisers(pipe)]
        gained = f"eval/total {totals[0]:.3f} -> {totals[-1]:.3f} in {self.rows[-1]['images']} images"
        left = f"in {folder} are metrics.csv, curve.png (with matplotlib), images/ and the weights:"
        self.print(f"done: {gained}; {left}\n      {'; '.join(load)}")


def _new_folder(args, script):
    """Make the folder of a new run; without a name it gets the time's, and one that no other run has taken."""
    folder = named = Path(args.output_dir) / (args.run_name or time.strftime(f"{Path(script).stem}-%Y%m%d-%H%M%S"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    for attempt in itertools.count(2):
        with suppress(FileExistsError):
            folder.mkdir(exist_ok=bool(args.run_name))
            return folder
        folder = named.with_name(f"{named.name}-{attempt}")


def is_unused(folder):
    """Whether a run folder holds no rows, images, weights or checkpoints: that of a start that was refused or cut."""
    names = {path.name for path in folder.glob("*")}
    made = {path.name for path in (*folder.glob("*/"), *folder.glob("images/*"), *folder.glob("metrics.csv"))}
    begun = "environment.yaml" in names or names <= {"lock", "environment.yaml.tmp"}
    return folder.is_dir() and begun and made <= {"images", "wandb"}


def _environment(args, script):
    """The command, the versions, the commit and the checksums of the files of a run."""
    commit = ""
    with suppress(OSError):  # no git
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        commit = subprocess.run(describe, cwd=HERE, capture_output=True, text=True).stdout.strip()
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers", "peft", "numpy")}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    asked = [name.rpartition(":")[0] for name in {**args.reward, **args.eval.reward}]  # "" of those in rewards.py
    files = {"prompts": args.prompts, "eval.prompts": args.eval.prompts, "script": script}
    files = {key: path and sha256(path) for key, path in (files | {path: path for path in asked if path}).items()}
    began = {"command": " ".join(sys.argv), "folder": os.getcwd(), "started": time.strftime("%Y%m%d-%H%M%S")}
    machine = {"python": sys.version.split()[0], **versions, "gpu": gpu, "processes": world_size()}
    return {**began, "commit": commit, **machine, "files": files}


def _compare(args, began, now, state):
    """What is different from when the run began, as lines; refuses what would change it, and an end that lies behind.

    began, now: environments; state: of the checkpoint, or None.
    """
    files = [file for file, digits in now["files"].items() if digits != began["files"].get(file, digits)]
    for key, path in (("prompts", args.prompts), ("eval.prompts", args.eval.prompts)):
        if key in files:
            refuse(key, path, "has changed since the run began; put it back as it was")
    settings = repeatable(args)
    for key, kind in fields_of(type(args)).items() if state else ():
        value, then = (functools.reduce(dict.get, key.split("."), s) for s in (settings, state["args"]))
        if value != then and MAY_CHANGE not in getattr(kind, "__metadata__", ()):
            refuse(key, value, f"args.yaml was changed: its checkpoints were made with {then!r}; put that back")
    if state and args.train.max_epochs < (done := state["epoch"]):
        refuse("train.max_epochs", args.train.max_epochs, f"{done} epochs are done already; take at least {done}")
    of_a_start = ("command", "folder", "started", "files")
    changed = [key for key in now if now[key] != began.get(key) and key not in of_a_start]
    lines = [f"{key} is {now[key]}, and was {began.get(key)} when the run began" for key in changed]
    return lines + [f"{file} is not as it was when the run began" for file in files]
