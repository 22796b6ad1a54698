"""The run folder: all that a run was and did, written as it goes."""

import csv
import functools
import inspect
import io
import itertools
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path

import diffusers
import filelock
import numpy as np
import peft
import torch
import transformers
from PIL import Image
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from common import denoisers, seed_global_generators
from harness.arguments import began_with, repeatable
from harness.checkpoint import MOST_SKIPPED, atomic_folder, check_finite, newest_checkpoint, sha256, write_file
from harness.console import epoch_line, listened_to, outcome
from harness.data import read_rows
from harness.ending import Current, RunError
from harness.evaluation import evaluate
from harness.fields import MAY_CHANGE, fields_of, refuse, to_yaml
from harness.parallel import gather, rank, world_size
from harness.pictures import save_curve, save_grid
from harness.settings import HERE


class Run:
    """A folder runs/<run_name>/; it is made before the model is loaded.

    Of several processes the first one writes there and prints; all read the checkpoint that a run is resumed from.
    """

    def __init__(self, args, said, script):
        """said: lines about where the arguments come from; script: the path of the file that runs."""
        self.args, self.rows, self.started = args, [], time.time()
        self.skipped, self.skipped_in_a_row = 0, 0  # updates since the last row, and without one taken in between
        self.interrupted = None  # the signal that asks the run to end after this epoch
        self.in_loop = False
        self.eval_rows = read_rows(args.eval.prompts or args.prompts)
        self.folder = Path(args.resume or args.output_dir)  # a new run's is in there
        gather("the name is free")  # as all have checked; from now on it is not
        self.checkpoint, environment, notes = self._open(script) if rank() == 0 else (None, None, ())
        self.folder, self.checkpoint = gather((self.folder, self.checkpoint))[0]
        Current.run = self
        self.trackers = self._trackers(environment["started"]) if rank() == 0 else []
        self.print(f"{Path(script).name} -> {self.folder}")
        for line in (*said, *(f"note: {note}" for note in notes)):
            self.print(line)

    def _open(self, script):
        """Make the folder, or look at what is in it: (checkpoint, the environment that the run began in, notes)."""
        args = self.args
        settings, environment = to_yaml(repeatable(args)), _environment(args, script)
        try:
            if not args.resume:
                self.folder = _new_folder(args, script)
                again = is_unused(self.folder)
                if again:
                    self._lock()
                with nullcontext(self.folder) if again else atomic_folder(self.folder) as folder:
                    (folder / "images").mkdir(exist_ok=True)
                    (folder / "environment.yaml").write_text(to_yaml(environment))
                    (folder / "args.yaml").write_text(settings)
                    shutil.copy(script, folder)
            self._lock()
            began = began_with(self.folder)
            notes = _compare(args, began, environment)
            checkpoint = newest_checkpoint(self)
            if checkpoint:
                _check_unchanged(args, checkpoint)
            write_file(self.folder / "args.yaml", settings)
        except OSError as error:
            refuse("output_dir", args.output_dir, f"cannot write {self.folder}: {error.strerror}")
        return checkpoint, began, notes

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
        trackers = []
        if self.args.track:
            import wandb

            name = self.folder.name
            same = {"id": f"{name}-{started}", "resume": "allow"}
            wandb.init(project="flow-rl", name=name, dir=self.folder, config=repeatable(self.args), **same)
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

    def print(self, line=""):
        """A line on the console and in log.txt."""
        if rank():
            return
        with open(self.folder / "log.txt", "a", encoding="utf-8") as log:
            log.write(f"{line}\n")
        last_words = f"error: nobody reads the output any more; continue with: {self.command}"
        with listened_to(last_words if Current.run else None):
            tqdm.write(str(line), file=sys.stdout)

    def log(self, row):
        """One row of metrics.csv ({column: number}), one console line with the most telling of them."""
        seconds = round(time.time() - self.started, 2)
        row = {"epoch": row.pop("epoch"), "images": row.pop("images"), "seconds": seconds} | row
        if row["epoch"]:
            row["train/skipped"], self.skipped = self.skipped, 0
        self.rows.append(row)
        if rank():
            return
        self.write_metrics()
        for track in self.trackers:
            track(row)
        self.print(epoch_line(row))
        if "eval/total" in row:
            save_curve(self.folder / "curve.png", self.rows)

    def write_metrics(self):
        """metrics.csv, complete."""
        columns = list(dict.fromkeys(key for row in self.rows[::-1] for key in row))
        order = {"train": 1, "eval": 2}
        columns.sort(key=lambda key: order.get(key.split("/")[0], 0))
        table = io.StringIO()
        writer = csv.DictWriter(table, columns)
        writer.writeheader()
        writer.writerows(self.rows)
        write_file(self.folder / "metrics.csv", table.getvalue())

    def skipped_update(self, culprit):
        """Count an update that was skipped because something in it, culprit, was not finite."""
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        self.culprit = culprit
        self.print(f"update skipped, {self.skipped_in_a_row} in a row: {culprit} is not finite")

    def took_update(self):
        """Count an update that was taken."""
        self.skipped_in_a_row = 0 if self.skipped_in_a_row < MOST_SKIPPED else self.skipped_in_a_row

    def watch(self, reward):
        """The reward, but where it fails, the images and prompts of that call are kept."""

        def watched(images, prompts, rows=None):
            try:
                return reward(images, prompts, rows)
            except ValueError as error:  # which is what rewards.py makes of all failures
                failed = self.folder / f"failed_reward{rank() or ''}"
                with atomic_folder(failed, replace=True) as folder:
                    for i, image in enumerate(images.flatten(0, -4)):  # the frames of videos, one after another
                        pixels = (image.float().permute(1, 2, 0) * 255).round().clamp(0, 255).byte()
                        Image.fromarray(pixels.cpu().numpy()).save(folder / f"{i:04d}.png")
                    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
                what = str(error).removeprefix("error: ")
                raise RunError(f"{what}; its images and prompts are in {failed}") from error

        watched.takes_groups = reward.takes_groups
        return watched

    def contract(self, terms):
        """What must hold before the first update, each in the process where it is worst; ends the run if one does not.

        terms: {what: (value, whether it holds)}.
        """
        terms = {what: min(gather(term), key=lambda found: (found[1], -found[0])) for what, term in terms.items()}
        if all(holds for _, holds in terms.values()):
            self.print(f"contract holds: {', '.join(f'{what} {value:.6g}' for what, (value, _) in terms.items())}")
            return
        for what, (value, holds) in terms.items():
            self.print(f"contract: {what}: {value:.6g}{'' if holds else '   BROKEN'}")
        broken = "; ".join(f"{what} is {value:.6g}" for what, (value, holds) in terms.items() if not holds)
        raise SystemExit(f"error: the first-step contract is broken: {broken}; nothing was trained")

    def evaluate(self, epoch, pipe, reward, policy):
        """Evaluate, keep the grid and each image's rewards and the weights; returns the columns of metrics.csv."""
        check_finite(policy, epoch)
        seed_global_generators(self.args.eval.seed, epoch)
        prompts, scores, statistics, shown = evaluate(pipe, self.args, self.eval_rows, reward)
        self._save_weights(pipe)
        names = ["total", *(name for name in scores if name != "total")]
        columns = {f"eval/{name}": scores[name].mean().item() for name in names}
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
        trained, states = denoisers(pipe), {}
        if any(isinstance(module, FSDPModule) for module in trained.values()):
            from harness.sharded import full_state

            states = {name: full_state(module) for name, module in trained.items()}
        if rank():
            return
        if self.args.finetune_type == "full":
            for name, module in trained.items():
                with atomic_folder(self.folder / name, replace=True) as folder, ExitStack() as stack:
                    if name in states:
                        module.state_dict = lambda name=name: states[name]
                        stack.callback(delattr, module, "state_dict")
                    module.save_pretrained(folder)
            with atomic_folder(self.folder / "scheduler", replace=True) as folder:
                pipe.scheduler.save_pretrained(folder)
            return
        saves = inspect.signature(pipe.save_lora_weights).parameters if hasattr(pipe, "save_lora_weights") else {}
        layers = {}
        with atomic_folder(self.folder / "lora", replace=True) as folder:
            for name, module in trained.items():
                if f"{name}_lora_layers" in saves:
                    layers[f"{name}_lora_layers"] = peft.get_peft_model_state_dict(module)
                    # without its metadata a LoRA is loaded again with another alpha
                    layers[f"{name}_lora_adapter_metadata"] = module.peft_config["default"].to_dict()
                else:  # load it with pipe.<name>.load_lora_adapter(folder, prefix=None, use_safetensors=True)
                    module.save_lora_adapter(folder / name)
            if layers:
                pipe.save_lora_weights(folder, **layers)

    def finish(self, pipe):
        """The last lines: what was gained, where it is, and how the weights are loaded."""
        self.print(outcome(self.folder, self.rows, denoisers(pipe), self.args.finetune_type))


def _new_folder(args, script):
    """The folder of a new run; without a name it gets the time's, and is made, so that no other run takes it too."""
    parent = Path(args.output_dir)
    if args.run_name:
        return parent / args.run_name
    parent.mkdir(parents=True, exist_ok=True)
    name = time.strftime(f"{Path(script).stem}-%Y%m%d-%H%M%S")
    for attempt in itertools.count(1):
        folder = parent / (name if attempt == 1 else f"{name}-{attempt}")
        with suppress(FileExistsError):
            folder.mkdir()
            return folder


def is_unused(folder):
    """Whether a run folder holds no rows, images, weights or checkpoints: that of a start that was refused."""
    made = {path.name for path in (*folder.glob("*/"), *folder.glob("images/*"), *folder.glob("metrics.csv"))}
    return (folder / "environment.yaml").is_file() and made <= {"images", "wandb"}


def _check_unchanged(args, checkpoint):
    """Refuse arguments that are not those that the checkpoint was made with, and an end that lies behind it."""
    state, kinds = json.loads((checkpoint / "state.json").read_text()), fields_of(type(args))
    for key, kind in kinds.items():
        now, then = (functools.reduce(dict.get, key.split("."), s) for s in (repeatable(args), state["args"]))
        if now != then and MAY_CHANGE not in getattr(kind, "__metadata__", ()):
            refuse(key, now, f"args.yaml was changed: {checkpoint.name} was made with {then!r}; put that back")
    if args.train.max_epochs < state["epoch"]:
        done = state["epoch"]
        refuse("train.max_epochs", args.train.max_epochs, f"{done} epochs are done already; take at least {done}")


def _compare(args, began, now):
    """What is different at a resumption from when the run began, as lines; prompts that are different are refused."""
    for key, path in (("prompts", args.prompts), ("eval.prompts", args.eval.prompts)):
        if now["files"][key] != began["files"][key]:
            refuse(key, path, "has changed since the run began; put it back as it was")
    per_start = ("command", "folder", "started", "files")
    changed = [key for key in now if now[key] != began.get(key) and key not in per_start]
    lines = [f"{key} is {now[key]}, and was {began.get(key)} when the run began" for key in changed]
    if now["files"]["script"] != began["files"]["script"]:
        lines.append("the script is not the one that the run began with; a copy of that is in the run folder")
    for path, digits in now["files"].items():
        if path.endswith(".py") and digits != began["files"].get(path, digits):
            lines.append(f"{path} is not as it was when the run began")
    return lines


def _environment(args, script):
    """The command, the versions, the commit and the checksums of the files of a run."""
    git = functools.partial(subprocess.run, cwd=HERE, capture_output=True, text=True)
    try:
        commit = git(["git", "rev-parse", "HEAD"]).stdout.strip()
        commit += " with uncommitted changes" if git(["git", "status", "--porcelain"]).stdout.strip() else ""
    except OSError:  # no git
        commit = ""
    versions = {m.__name__: str(m.__version__) for m in (torch, diffusers, transformers, peft, np)}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    machine = {"python": platform.python_version(), **versions, "gpu": gpu, "processes": world_size()}
    files = {"prompts": args.prompts, "eval.prompts": args.eval.prompts, "script": script}
    asked = [name.rpartition(":")[0] for name in {**args.reward, **args.eval.reward}]  # "" of those in rewards.py
    files |= {path: path for path in asked if path}
    files = {key: path and sha256(path) for key, path in files.items()}
    began = {"command": " ".join(sys.argv), "folder": os.getcwd(), "started": time.strftime("%Y%m%d-%H%M%S")}
    return {**began, "commit": commit, **machine, "files": files}
