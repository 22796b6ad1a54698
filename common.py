"""Everything that is not the algorithm: arguments, the pipeline and its tape, parameter snapshots, prompts,
evaluation and the run folder.

The pipeline is the model adapter. `rollout` calls any diffusers flow pipeline as a user would, with a scheduler whose
`step()` runs `dynamics.step` and writes down what happened. `replay` repeats that very call up to one step and lets
the pipeline run that step again, now with gradients, so packing, guidance and sign conventions are those of inference
and the ratio before the first update is exactly 1. There is no code for any one model in here.
"""

import argparse
import copy
import csv
import dataclasses
import difflib
import errno
import fcntl
import functools
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, NoReturn, Optional, Union, get_args

import diffusers
import numpy as np
import peft
import torch
import torch._dynamo.config
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
import tyro
import yaml
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import AutoencoderKL, ConfigMixin, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten
from tqdm import tqdm

import dynamics

HERE = Path(__file__).resolve().parent
Resolution = Union[int, tuple[int, int]]

# ---------------------------------------------------------------------------------------------------------------------
# Processes: torchrun starts several that run the same script. Each has the whole policy and samples the groups of its
# own part of an epoch's prompts; what is computed does not depend on how many they are.

PATIENCE = timedelta(minutes=30)  # with a process that is slow; of one that ended the others know at once


def world():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """The number of this process, from 0; process 0 writes and prints."""
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
        if world() == 1:
            raise
        code = error.code if isinstance(error, SystemExit) else "".join(traceback.format_exception(error)).rstrip()
        if isinstance(code, str):
            print(code, file=sys.stderr)
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)  # at once: exiting could wait for threads, and NCCL for others
    if dist.is_initialized():
        dist.destroy_process_group()


def own(items):
    """The part of a sequence that belongs to this process: a block, in the order of the ranks."""
    return items[len(items) * rank() // world() : len(items) * (rank() + 1) // world()]


def gather(value):
    """[the value of each process], in the order of their ranks, in each of them; any value that can be pickled."""
    values = [value] * world()
    if world() > 1:
        with _together():
            dist.all_gather_object(values, value)
    return values


def gather_rows(named):
    """{name: (n,)} of this process -> {name: (N,)} of all, in the order of their ranks; some may lack a name."""
    if world() == 1:
        return named
    parts = gather({name: value.detach().cpu() for name, value in named.items()})
    device = next((value.device for value in named.values()), None)
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: torch.cat([part[name] for part in parts if name in part]).to(device) for name in names}


def average_gradients(parameters):
    """Make each gradient its mean over the processes, by one all-reduce of all of them.

    One that only some processes have counts as 0 in the others; one that none has stays None. Gradients of sharded
    parameters are left alone: the backward pass has averaged them already.
    """
    parameters = [p for p in parameters if not isinstance(p, DTensor)]
    if world() == 1 or not parameters:
        return
    zero_or = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    exist = torch.tensor([p.grad is not None for p in parameters]).to(zero_or[0])
    flat = torch.cat([exist, *(gradient.flatten() for gradient in zero_or)])
    with _together():
        dist.all_reduce(flat)
    exist, *gradients = (flat / world()).split([len(exist), *(p.numel() for p in parameters)])
    for p, exists, gradient in zip(parameters, (exist > 0).tolist(), gradients, strict=True):
        p.grad = gradient.view_as(p) if exists else None


@contextmanager
def _together():
    """Around what all processes do: one that waits in vain for another says so in a line; the other said why."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise SystemExit(f"error: process {rank()} of {world()} has lost another one ({reason})") from error


# ---------------------------------------------------------------------------------------------------------------------
# Arguments: the script's dataclass < the model folder's defaults.yaml < --config < the command line

for kind in (yaml.SafeLoader, yaml.SafeDumper):  # 1e-4 is a number in YAML 1.2, and a string in 1.1, which PyYAML reads
    exponential = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")
    kind.add_implicit_resolver("tag:yaml.org,2002:float", exponential, list("-+.0123456789"))


def _from_yaml(text):
    """What a YAML text says; a ValueError where it is none, or has itself as a part."""
    try:
        value = yaml.safe_load(text)
        json.dumps(value, default=str, skipkeys=True)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error).replace(' in "<unicode string>",', " at")) from error
    return value


def _pairs(value_type):
    """`--flag name=value name=value` as a dict; the values are read as YAML."""
    convert, kind = (float, "a number") if value_type is float else (_from_yaml, "YAML")

    def parse(tokens):
        pairs = {}
        for token in tokens:
            name, equals, value = token.rpartition("=") if value_type is float else token.partition("=")
            if not equals:
                raise ValueError(f"{token!r} is not of the form NAME=VALUE")
            if name in pairs:
                raise ValueError(f"{name!r} is given twice")
            try:
                pairs[name] = convert(value)
            except ValueError as error:
                raise ValueError(f"the value of {token!r} is not {kind}: {error}") from error
        return pairs

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME=VALUE",
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda pairs: [f"{name}={json.dumps(value)}" for name, value in pairs.items()],
    )


@dataclass
class EvalArgs:
    """Evaluation is the plain pipeline under its own ODE, on fixed prompts and fixed noise."""

    prompts: Optional[str] = None
    """Text file of held-out prompts, one a line. None evaluates on the training prompts."""
    images_per_prompt: int = 1
    """Images made of each evaluation prompt. From 2 on the spread within these groups is logged."""
    reward: Annotated[dict, _pairs(float)] = field(default_factory=dict)
    """Weighted rewards whose sum is eval/total, e.g. one that is held out of training, which shows hacking. Those of
    training are logged beside them. None given: the rewards of training."""
    resolution: Resolution = 512
    """Pixels: one side of a square, or height and width. Independent of train.resolution (PaCo-RL)."""
    num_inference_steps: int = 40
    """ODE steps of an evaluation image."""
    solver: Literal[dynamics.SOLVERS] = "Euler"
    """Of the evaluation's ODE: Euler is the plain pipeline; DPM-Solver++ is of second order at the same cost."""
    guidance_scale: float = 4.5
    """Classifier-free guidance of an evaluation image; 1 is none."""
    per_device_batch_size: int = 16
    """Images in one call of the pipeline."""
    eval_freq: int = 10
    """Epochs between evaluations. Epoch 0 and the last are always evaluated."""
    seed: int = 1
    """Seed of the evaluation noise; the same noise at every evaluation."""


@dataclass
class RunArgs:
    """What every script takes beside its algorithm's own settings."""

    model: str = str(HERE / "shapes" / "model")
    """A diffusers folder or hub id. Its folder may bring a defaults.yaml, which the embedded model does."""
    config: Optional[str] = None
    """A YAML file with these same keys; the command line wins over it."""
    call: Annotated[dict, _pairs(object)] = field(default_factory=dict)
    """Extra keyword arguments of the pipeline call, read as YAML and added to the model's own, e.g.
    max_sequence_length=256 negative_prompt=blurry."""
    finetune_type: Literal["lora", "full"] = "lora"
    """Train low-rank adapters or the whole denoiser."""
    lora_rank: int = 32
    """Rank of the adapters."""
    lora_alpha: float = 64.0
    """Scale of the adapters: they add alpha / rank times their product."""
    target_modules: tuple[str, ...] = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    )  # fmt: skip
    """Names of the linear layers that get adapters: the attention projections, or all-linear."""
    shard: bool = False
    """Full fine-tuning of a model that one GPU cannot hold, in several processes: each keeps its share of the trained
    parameters, their copies and the optimizer (FSDP2). Groups of equal rewards are then trained on like others."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the frozen weights and the arithmetic. Trained parameters are always float32."""
    device: str = "auto"
    """A torch device; auto takes the GPU if there is one."""
    compile: bool = False
    """Compile the denoiser's repeated blocks and the VAE's decoder, and sample by CUDA graphs (but not with
    train.enable_gradient_checkpointing): a minute at the start, then 1.4 to 2 times as fast on a GPU; slower on a
    CPU."""
    cudnn_attention: bool = False
    """Let torch choose cuDNN's attention, the fastest on Hopper GPUs, for models like SD3.5. On FLUX its backward pass
    ends in an illegal memory access (torch 2.11, H200), and under some masks it gives NaN
    (github.com/pytorch/pytorch/issues/196678)."""
    offload: bool = False
    """Keep text encoders and VAE on the CPU, each on the device only while it works."""
    vae_tiling: bool = False
    """Decode large images in overlapping tiles: less memory, and faint seams."""
    vae_slicing: bool = False
    """Decode the images of a call one by one: less memory, the same images."""
    cpu_threads: Optional[int] = None
    """Threads of torch on the CPU; None leaves the choice to torch. Another number can change the last digits."""
    prompts: Optional[str] = None
    """Text file of training prompts, one a line; blank lines do not count."""
    reward: Annotated[dict, _pairs(float)] = field(default_factory=dict)
    """Weighted rewards, in the place of the model's own, e.g. jpeg_compressibility=0.1 my_rewards.py:brightness=1."""
    reward_options: Annotated[dict, _pairs(object)] = field(default_factory=dict)
    """Options of these rewards, read as YAML, e.g. pickscore.batch_size=8; rewards.py says which each one has."""
    output_dir: str = "runs"
    """Where the run folder is made."""
    run_name: Optional[str] = None
    """Name of the run folder; the script's name and the time by default."""
    resume: Optional[str] = None
    """Continue a run exactly: its folder, or its name in output_dir. Its arguments are taken from there, and others are
    refused, but for these, which do not change what it computes: train.max_epochs (a later end; the old one stays
    evaluated), train.enable_gradient_checkpointing, train.ref_param_device, device, offload, checkpoint_freq,
    keep_checkpoints, track and tensorboard."""
    checkpoint_freq: int = 1
    """Epochs between checkpoints, which are what a run can be resumed from; the last epoch always leaves one."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints are kept."""
    track: bool = False
    """Log to Weights & Biases."""
    tensorboard: bool = False
    """Log to TensorBoard, in the run folder."""


_said_by = {}  # {dotted key: the file that set it}, so that a refusal can name it


def refuse(key, value, remedy) -> NoReturn:
    """End the program with one readable message and exit status 2."""
    if int(os.environ.get("LOCAL_RANK", 0)):
        time.sleep(10)  # the first process of this machine says the same, and torchrun ends this one then
    file = f" (from {_said_by[key]})" if key in _said_by else ""
    print(f"error: {key} = {value!r}{file}: {remedy}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def refusing(key, value):
    """Within it a ValueError refuses the value of a key."""
    try:
        yield
    except ValueError as error:
        refuse(key, value, error)


ON_RESUME = (
    *("train.max_epochs", "train.enable_gradient_checkpointing", "train.ref_param_device", "device", "offload"),
    *("checkpoint_freq", "keep_checkpoints", "track", "tensorboard"),
    *("resume", "config", "output_dir", "run_name"),  # these name the run
)


def parse_args(Args, description, argv=None):
    """Read an instance of the dataclass Args from its four layers; on --resume the run's args.yaml is the lowest.

    Returns (args, sources): sources maps a dotted key to (value, where it came from) for all that is not the script's.
    Ends with exit status 2 and a message at an unknown key, a value of a wrong type, a missing file, or an argument
    that would change a resumed run.
    """
    argv = sys.argv[1:] if argv is None else argv
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flags in (["--model"], ["--config"], ["--resume"], ["--output-dir", "--output_dir"]):
        files.add_argument(*flags, nargs="?")  # of one without a value tyro speaks
    known, _ = files.parse_known_args(argv)
    for name in ("config", "resume"):
        if getattr(known, name) == "":
            refuse(f"--{name}", "", "names nothing; leave it out, or give it a value")
    args = Args()
    trainer = args.train.trainer_type

    config = _read_yaml("config", known.config, trainer, Args) if known.config else {}
    model = Path(str(known.model or config.get("model") or args.model))
    defaults, lowest = {}, model / "defaults.yaml"
    if known.resume:
        run = find_run(known.resume, known.output_dir or args.output_dir)
        lowest = run / "args.yaml"
        defaults = _read_yaml("resume", lowest, trainer, Args)
        if not defaults:
            refuse("--resume", str(lowest), "is empty; put back what the run wrote there")
    elif os.path.isfile(lowest):
        defaults = _read_yaml("model", lowest, trainer, Args)
        for section in (defaults, defaults.get("eval", {})):
            if section.get("prompts"):  # a model folder names files beside itself
                section["prompts"] = os.path.relpath(model / str(section["prompts"]))

    sources = {}
    _said_by.clear()
    layers = [
        (str(lowest), _tokens(defaults)),
        (known.config, _tokens(config)),
        ("the command line", argv),
    ]
    for source, tokens in layers:
        before = _flatten(args)
        if source != layers[-1][0] and not tokens:
            continue
        try:
            with _heard():  # --help
                args = tyro.cli(Args, description=description, args=tokens, default=args)
        except SystemExit as exit:
            if exit.code and source != layers[-1][0]:
                print(f"error: the box above is about {source}", file=sys.stderr)
            raise
        args.call = {**before["call"], **args.call}
        sources |= {key: (value, source) for key, value in _flatten(args).items() if value != before[key]}
        if source == layers[0][0]:
            recorded = _flatten(args)
    _said_by.update({key: source for key, (_, source) in sources.items() if source != layers[-1][0]})
    if known.resume:
        for key, (value, source) in sources.items():
            same_file = key.endswith(("prompts", "model")) and _absolute(value) == _absolute(recorded[key])
            if source != layers[0][0] and key not in ON_RESUME and not same_file:
                refuse(key, value, f"{run} was begun with {recorded[key]!r}, and this would change it; leave it out")
        if args.run_name not in (None, run.name):
            refuse("run_name", args.run_name, f"--resume continues {run} under its own name; leave it out")
        args.model, args.prompts, args.eval.prompts = (recorded[key] for key in ("model", "prompts", "eval.prompts"))
        began = _began(run)["folder"]
        if began != os.getcwd() and os.path.isdir(began):  # from there a user named reward files
            run = Path(os.path.abspath(run))
            os.chdir(began)
        args.resume, args.output_dir, args.run_name = str(run), str(run.parent), run.name
    return args, sources


def find_run(name, output_dir):
    """The folder of a run, given itself or its name in output_dir."""
    for folder in (Path(name), Path(output_dir) / name):
        if os.path.isfile(folder / "args.yaml"):
            return folder
    refuse("resume", name, f"there is no run: neither {name} nor {Path(output_dir) / name} has an args.yaml")


def _began(run):
    """The environment that a run began in, from its folder."""
    path = run / "environment.yaml"
    with refusing("--resume", str(path)):
        began = _from_yaml(read_text("--resume", path))
    mapping = isinstance(began, dict) and isinstance(began.get("files"), dict)
    known = {**began, **began["files"]} if mapping else {}
    if not {"prompts", "eval.prompts", "script", "started"} <= known.keys() or not isinstance(known.get("folder"), str):
        refuse("--resume", str(path), "does not say what the run began with; put back what the run wrote there")
    return began


def _read_yaml(key, path, trainer, Args):
    """The settings of a YAML file, with what it says under `trainers` for this trainer folded in."""
    try:
        settings = _from_yaml(read_text(f"--{key}", path)) or {}
    except ValueError as error:
        refuse(f"--{key}", str(path), f"not a YAML file: {error}")
    trainers = settings.pop("trainers", None) or {} if isinstance(settings, dict) else None
    own = trainers.get(trainer) or {} if isinstance(trainers, dict) else None
    if not isinstance(own, dict):
        refuse(f"--{key}", str(path), "holds no mapping of keys to values")
    for name in own:
        both = isinstance(own[name], dict) and isinstance(settings.get(name), dict)
        settings[name] = {**settings[name], **own[name]} if both else own[name]
    train = settings.get("train")
    named = train.get("trainer_type", trainer) if isinstance(train, dict) else trainer
    if named != trainer:
        script = {"grpo": "grpo.py", "grpo-guard": "grpo_guard.py", "nft": "nft.py"}.get(str(named), "another script")
        refuse("train.trainer_type", named, f"{path} is for {script}; this script is the trainer {trainer!r}")
    _check_keys(settings, Args, path)
    for name in ("config", "resume"):  # which are known before any file is read
        if settings.get(name) is not None:
            refuse(name, settings[name], f"cannot be said in {path}; give --{name} on the command line")
    return settings


def read_text(key, path):
    """What is in a UTF-8 file, without the mark that some editors begin it with."""
    try:
        if Path(path).exists() and not Path(path).is_file():
            refuse(key, str(path), "is a folder; name a file in it" if Path(path).is_dir() else "is no file")
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        refuse(key, str(path), error.strerror.lower())
    except ValueError as error:
        refuse(key, str(path), f"not a UTF-8 text file: {error}")


def _check_keys(settings, cls, path, prefix=""):
    types = {f.name: f.type for f in dataclasses.fields(cls)}
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if name not in types:
            near = [f"{s}.{name}" for s, t in types.items() if name in getattr(t, "__dataclass_fields__", ())]
            near = near or difflib.get_close_matches(str(name), types, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(types)}"
            hint = "write a section as a mapping of its own, not with a dot" if "." in str(name) else hint
            refuse(key, value, f"unknown key in {path}; {hint}")
        if dataclasses.is_dataclass(types[name]):
            if not isinstance(value, dict):
                refuse(key, value, f"in {path} should be a mapping of keys to values")
            _check_keys(value, types[name], path, f"{key}.")
        elif value is None and name not in PAIRS and type(None) not in get_args(types[name]):
            refuse(key, None, f"cannot be null in {path}; leave it out, or give it a value")


PAIRS = ("call", "reward", "reward_options")


def _tokens(settings, prefix=""):
    """The command line that says what a nested mapping says, so that one parser checks every layer."""
    tokens = []
    for name, value in settings.items():
        flag = f"--{prefix}{name}".replace("_", "-")
        value = {} if value is None and name in PAIRS else value
        if isinstance(value, dict) and name not in PAIRS:
            tokens += _tokens(value, f"{prefix}{name}.")
        elif isinstance(value, dict):
            tokens += [flag, *(f"{key}={json.dumps(item, default=str)}" for key, item in value.items())]
        elif isinstance(value, bool):
            head, _, last = flag.rpartition(".")
            tokens += [flag if value else f"{head}.no-{last}" if head else f"--no-{flag[2:]}"]
        elif isinstance(value, (list, tuple)):
            tokens += [flag, *map(str, value)]
        else:
            tokens += [flag, str(value)]
    return tokens


def _flatten(args, prefix=""):
    flat = {}
    for f in dataclasses.fields(args):
        value = getattr(args, f.name)
        flat |= _flatten(value, f"{prefix}{f.name}.") if dataclasses.is_dataclass(value) else {prefix + f.name: value}
    return flat


AT_LEAST = {
    1: "cpu_threads lora_rank checkpoint_freq keep_checkpoints train.num_inference_steps train.per_device_batch_size "
    "train.unique_sample_num_per_epoch train.num_inner_epochs train.ema_update_interval eval.num_inference_steps "
    "eval.per_device_batch_size eval.images_per_prompt eval.eval_freq",
    0: "train.max_epochs train.learning_rate train.kl_beta train.ema_decay train.guidance_scale train.adam_epsilon "
    "train.adam_weight_decay train.seed train.old_decay_start train.old_decay_slope eval.guidance_scale eval.seed",
}
AT_MOST = {
    2**32 - 1: "train.seed eval.seed",
    4096: "cpu_threads",
    10_000: "lora_rank train.num_inference_steps train.num_inner_epochs eval.num_inference_steps",
}
MOST_IMAGES = 1_000_000  # of an epoch, or of an evaluation
ABOVE_0 = "lora_alpha train.clip_range train.adv_clip_range train.max_grad_norm"
OF_THE_CALL = (
    *("prompt", "height", "width", "num_inference_steps", "guidance_scale", "generator", "latents"),
    *("num_images_per_prompt", "num_videos_per_prompt", "output_type", "return_dict"),
    *("prompt_2", "prompt_3", "prompt_4"),  # of each prompt, which they are by default
)


def check_args(args):
    """Refuse what no script can run: before any weights are loaded, with the key, the value and what would do.

    Returns [(key, value, (weights, prompts, options))] of the rewards, for rewards.check_rewards to look at.
    """
    flat = _flatten(args)
    weights = [("reward", args.reward), ("eval.reward", args.eval.reward)]
    weights = {f"{key} {name}": weight for key, named in weights for name, weight in named.items()}
    for key, value in {**flat, **weights}.items():
        if isinstance(value, float) and not np.isfinite(value):
            refuse(key, value, "must be a finite number")
    for least, keys in AT_LEAST.items():
        for key in keys.split():
            if flat.get(key) is not None and flat[key] < least:
                refuse(key, flat[key], f"must be at least {least}")
    for most, keys in AT_MOST.items():
        for key in keys.split():
            if flat.get(key) is not None and flat[key] > most:
                refuse(key, flat[key], f"must be at most {most}")
    for key in ABOVE_0.split():
        if key in flat and flat[key] <= 0:
            refuse(key, flat[key], "must be above 0")
    if args.train.ema_decay >= 1:
        refuse("train.ema_decay", args.train.ema_decay, "must be below 1; 0 keeps no average")
    if not all(0 <= beta < 1 for beta in args.train.adam_betas):
        refuse("train.adam_betas", args.train.adam_betas, "must be at least 0 and below 1")
    for key in OF_THE_CALL:
        if key in args.call:
            refuse(
                "call",
                f"{key}={args.call[key]}",
                "is set by the script; see --train and --eval for what can be changed",
            )
    for key in ("sigmas", "timesteps"):
        levels, steps = args.call.get(key), {args.train.num_inference_steps, args.eval.num_inference_steps}
        if levels is not None and (not isinstance(levels, list) or steps != {len(levels)}):
            remedy = "must be a list as long as train.num_inference_steps and eval.num_inference_steps are, both"
            refuse("call", f"{key}={levels}", remedy)
        numbers = all(isinstance(level, (int, float)) for level in levels or ())
        if not numbers or not all(a > b for a, b in itertools.pairwise([math.inf, *(levels or ()), 0])):
            refuse("call", f"{key}={levels}", "must be numbers above 0, each below the one before it")
    prompts, batch = args.train.unique_sample_num_per_epoch, args.train.per_device_batch_size
    images, updates = prompts * args.train.group_size, args.train.gradient_step_per_epoch
    if images > MOST_IMAGES:
        remedy = f"makes {images} images an epoch (x group_size); at most {MOST_IMAGES} will do"
        refuse("train.unique_sample_num_per_epoch", prompts, remedy)
    images = images // world()
    each = f" of each of {world()} processes" if world() > 1 else ""
    if prompts % world():
        nearest = max(1, round(prompts / world())) * world()
        refuse(
            "train.unique_sample_num_per_epoch", prompts,
            f"each of {world()} processes takes as many prompts, with all images of each; {nearest} would do",
        )  # fmt: skip
    if args.shard and world() == 1:
        refuse("shard", True, "needs several processes to share the model: torchrun --nproc-per-node 2 ...")
    if args.shard and args.finetune_type != "full":
        refuse("shard", True, f"is for full fine-tuning, not {args.finetune_type}; add --finetune-type full")
    if args.shard and args.offload:
        refuse("offload", True, "does not go with --shard; leave one of them out")
    if images % batch:
        good = [b for b in range(1, images + 1) if images % b == 0]
        nearest = min(good, key=lambda b: abs(b - batch))
        refuse(
            "train.per_device_batch_size", batch,
            f"does not divide the {images} images of an epoch{each} (unique_sample_num_per_epoch x group_size); "
            f"{nearest} would",
        )  # fmt: skip
    if updates < 1 or (images // batch) % updates:
        good = [u for u in range(1, images // batch + 1) if (images // batch) % u == 0]
        refuse(
            "train.gradient_step_per_epoch", updates,
            f"does not divide the {images // batch} pipeline calls of an epoch{each} (its images / "
            f"per_device_batch_size); one of {good} would, or another train.per_device_batch_size",
        )  # fmt: skip

    if world() > 1 and args.device not in ("auto", "cuda", "cpu"):
        refuse("device", args.device, "each process has a device of its own; auto, cuda or cpu would do")
    if args.device != "auto":
        try:
            torch.zeros(1, device=args.device).cpu()  # which a device without memory, meta, refuses
        except (RuntimeError, AssertionError) as error:
            refuse("device", args.device, str(error).splitlines()[0])
    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if world() > 1 and gpus and args.device != "cpu" and local > gpus:
        refuse("--nproc-per-node", local, f"each process takes a GPU, and this machine has {gpus}")
    for key, package in (("track", "wandb"), ("tensorboard", "tensorboard")):
        if getattr(args, key) and importlib.util.find_spec(package) is None:
            refuse(key, True, f"needs the package {package}: pip install {package}")
    name = args.run_name
    if name is not None and (name in ("", ".", "..") or Path(name).name != name):
        refuse("run_name", name, "must be the name of a folder, without a path")
    folder = Path(args.output_dir) / (name or "")
    free = not os.path.exists(folder) or folder.is_dir() and not any(folder.iterdir()) or came_to_nothing(folder)
    if name and not args.resume and not free:
        refuse("run_name", name, f"{folder} already holds a run; choose another name or remove it")
    try:
        check_model(args)
    except (AttributeError, LookupError, TypeError) as error:  # in what should be mappings and lists
        reason = f"its model_index.json, or a config.json in it, is not diffusers' ({type(error).__name__}: {error})"
        refuse("model", args.model, reason)
    if not args.prompts:
        refuse("prompts", args.prompts, "name a text file of training prompts, one a line")
    asked = {**args.reward, **args.eval.reward}
    checks = [
        ("reward", args.reward, (args.reward,)),
        ("eval.reward", args.eval.reward, (asked,)),
        ("reward_options", args.reward_options, (asked, (), args.reward_options)),
        ("prompts", args.prompts, (args.reward, read_prompts(args.prompts))),
    ]
    key, path = ("eval.prompts", args.eval.prompts) if args.eval.prompts else ("prompts", args.prompts)
    shown, each = read_prompts(path, key), args.eval.images_per_prompt
    if len(shown) * each > MOST_IMAGES:
        remedy = f"makes {len(shown) * each} images an evaluation ({len(shown)} prompts); at most {MOST_IMAGES} will do"
        refuse("eval.images_per_prompt", each, remedy)
    if args.eval.prompts or args.eval.reward:
        checks.append((key, path, (asked, shown)))
    return checks


def check_model(args):
    """Refuse a model that is missing or no rectified flow, or a resolution that it cannot take; loads no weights."""
    try:
        index = DiffusionPipeline.load_config(args.model)
    except Exception as error:  # the hub client raises many kinds
        if os.path.exists(f"{args.model}/args.yaml"):  # no error, however long the name
            refuse("model", args.model, 'a run\'s folder; README, "What a run leaves", says how its weights are used')
        reason = str(error).splitlines()[0]
        refuse("model", args.model, f"no diffusers folder there, and the hub gave none ({reason})")
    scheduler = (index.get("scheduler") or [None, None])[1]
    try:
        config = FlowMatchEulerDiscreteScheduler.load_config(args.model, subfolder="scheduler") if scheduler else {}
    except OSError as error:
        refuse("model", args.model, f"its {scheduler} has no configuration ({str(error).splitlines()[0]})")
    if reason := no_rectified_flow(scheduler, config):
        refuse("model", args.model, reason)
    with _quiet():
        pipeline = getattr(diffusers, str(index.get("_class_name")), None)
    if not inspect.isclass(pipeline) or not issubclass(pipeline, DiffusionPipeline):
        named = f"its model_index.json names the class {index.get('_class_name')!r}"
        refuse("model", args.model, f"{named}, which is no pipeline of diffusers {diffusers.__version__}")
    _, *takes = inspect.signature(pipeline.__call__).parameters.values()  # after self
    takes = {parameter.name: parameter.annotation for parameter in takes}
    for key, value in args.call.items():
        if key not in takes:
            near = difflib.get_close_matches(key, takes, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            refuse("call", key, f"{pipeline.__name__} takes no such argument{hint}")
        annotation = str(takes[key])
        if re.search("Tensor|Callable", annotation) and "float" not in annotation:  # nor a list[float] instead
            refuse("call", key, "takes a tensor or a function, which cannot be written down; leave it out")
        if isinstance(value, str) and not re.search("str|Any|_empty", annotation):
            kind = getattr(takes[key], "__name__", annotation)
            refuse("call", f"{key}={value}", f"{pipeline.__name__} takes {kind} there")

    try:
        parts = {
            name: _Part.load_config(args.model, subfolder=name) for name in ("vae", "transformer") if name in index
        }
    except Exception as error:
        refuse("model", args.model, str(error).splitlines()[0])
    vae, denoiser = parts.get("vae", {}), parts.get("transformer", {})
    patch = denoiser.get("patch_size") or 1
    if "block_out_channels" not in vae or not isinstance(patch, int):
        return  # another kind of VAE: the pipeline's own check of its inputs speaks at the first call
    multiple = 2 ** (len(vae["block_out_channels"]) - 1) * patch
    most = denoiser.get("pos_embed_max_size")
    for key, resolution in (("train.resolution", args.train.resolution), ("eval.resolution", args.eval.resolution)):
        for side in size(resolution):
            if side < multiple or side % multiple:
                refuse(key, resolution, f"this model takes multiples of {multiple} pixels")
            if most and side > most * multiple:
                refuse(key, resolution, f"this model takes at most {most * multiple} pixels a side")


class _Part(ConfigMixin):
    """Reads the config.json of a pipeline's component, whatever its class."""

    config_name = "config.json"


def size(resolution):
    """(height, width) in pixels of a resolution given as an int or a pair."""
    return (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)


@contextmanager
def _quiet():
    """No chatter of the libraries about bars, optional packages and components on their way in."""
    libraries = (diffusers.logging, transformers.logging)
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
            library.enable_progress_bar()


# ---------------------------------------------------------------------------------------------------------------------
# The pipeline


def pick_device(args):
    """The torch device of --device, made ready; auto is the GPU if there is one, to each process its own."""
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
    if args.cpu_threads:
        torch.set_num_threads(args.cpu_threads)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # float32 models use the tensor cores
        torch.backends.cuda.enable_cudnn_sdp(args.cudnn_attention)  # torch itself would prefer it
        torch.compiler.config.cache_key_tag += "" if args.cudnn_attention else " no cuDNN"  # that is other code
    if device.type == "cuda" and world() > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def make_pipeline(args, device):
    """The pipeline that the arguments ask for: its model, its dtype, and where its memory goes."""
    pipe = load_pipeline(args.model, "cpu" if args.shard else device, getattr(torch, args.dtype), args.offload)
    for name, module in pipe.components.items() if args.shard else ():
        if name in denoisers(pipe):
            shard_blocks(module, device)
        elif isinstance(module, torch.nn.Module):
            module.to(device)
    for key, method in (("vae_tiling", "enable_tiling"), ("vae_slicing", "enable_slicing")):
        if getattr(args, key):
            if not hasattr(getattr(pipe, "vae", None), method):
                refuse(key, True, f"the VAE of {type(pipe).__name__} cannot do that; leave it out")
            getattr(pipe.vae, method)()
    if args.compile:
        compile_decoder(pipe)
    return pipe


def load_pipeline(model, device, dtype, offload=False) -> DiffusionPipeline:
    """Load a diffusers folder or hub id, frozen, on a device and in a dtype.

    Components that model_index.json holds as null are passed as None, the idiom by which SD3's T5 is left out.
    offload: text encoders and VAE stay on the CPU and visit the device.
    """
    index = DiffusionPipeline.load_config(model)
    absent = {name: None for name, spec in index.items() if isinstance(spec, (list, tuple)) and spec[0] is None}
    try:
        with _quiet():
            pipe = DiffusionPipeline.from_pretrained(model, dtype=dtype, **absent)
    except (OSError, ValueError, SafetensorError) as error:  # a file of weights that is missing or cut
        refuse("model", model, f"does not load: {str(error).splitlines()[0]}")
    if offload:
        let_visit(pipe, device)
    else:
        pipe.to(device)
    use_flow_matching(pipe)
    pipe.set_progress_bar_config(disable=True)
    for module in _modules(pipe):
        module.requires_grad_(False)
    pipe.__class__ = _settled(type(pipe))
    return pipe


@functools.cache
def _settled(cls):
    """A pipeline that stays on its device: diffusers goes through all modules, in every call, to find out which."""
    device = functools.cached_property(DiffusionPipeline._execution_device.fget)
    settled = type(cls.__name__, (cls,), {"_execution_device": device, "__module__": cls.__module__})
    device.__set_name__(settled, "_execution_device")
    return settled


def let_visit(pipe, device):
    """Put the denoisers on the device; all other networks stay on the CPU and visit it while they work."""
    visits = []
    for name, module in pipe.components.items():
        if name in denoisers(pipe):
            module.to(device)
        elif isinstance(module, torch.nn.Module):
            visits.append(_Visit(module, device))
            add_hook_to_module(module, visits[-1])
    # diffusers calls this at the end of a pipeline; a VAE's decode() has no other end
    pipe.maybe_free_model_hooks = lambda: [visit.leave() for visit in visits]


class _Visit(ModelHook):
    """Brings a frozen network to the device before it works, and forgets that copy afterwards."""

    def __init__(self, module, device):
        self.execution_device = device
        self.tensors = [*module.to("cpu").parameters(), *module.buffers()]
        pinned = torch.device(device).type == "cuda"  # pinned memory travels several times as fast
        self.homes = [t.data.pin_memory() if pinned else t.data for t in self.tensors]

    def pre_forward(self, module, *args, **kwargs):
        for tensor, home in zip(self.tensors, self.homes, strict=True):
            tensor.data = home.to(self.execution_device, non_blocking=True)
        return args, kwargs

    def post_forward(self, module, output):
        self.leave()
        return output

    def leave(self):
        for tensor, home in zip(self.tensors, self.homes, strict=True):
            tensor.data = home


def use_flow_matching(pipe):
    """Put Euler's method in the place of another solver of the same flow (DPM, UniPC), with that solver's shift.

    The rollout, the evaluation and the plain pipeline then all run one ODE.
    """
    config = pipe.scheduler.config
    if reason := no_rectified_flow(type(pipe.scheduler).__name__, config):
        raise ValueError(reason)
    if not isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
        with _quiet():  # about settings of the other solver that this one has not
            pipe.scheduler = _EvenFlowMatching.from_config(config, shift=config.get("flow_shift") or 1.0)


def no_rectified_flow(scheduler, config):
    """Why a model with this scheduler (name, configuration) is no rectified flow with an ODE; None if it is one."""
    if scheduler != FlowMatchEulerDiscreteScheduler.__name__:
        if config.get("prediction_type") != "flow_prediction" or not config.get("use_flow_sigmas"):
            predicts = config.get("prediction_type")
            return f"its scheduler is {scheduler} with prediction_type {predicts}; only rectified flows will do"
    elif (config.get("sigma_max") or 1) > 1:
        return f"its noise levels begin at {config['sigma_max']:g}; only rectified flows, from 1 to 0, will do"
    elif config.get("stochastic_sampling"):
        return "its scheduler has stochastic_sampling, so it has no ODE of its own; only rectified flows will do"
    return None


class _EvenFlowMatching(FlowMatchEulerDiscreteScheduler):
    """Noise levels 1, ..., 2/n, 1/n before the shift, as those solvers have; saved under its parent's name."""

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        if sigmas is None and timesteps is None:
            sigmas = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)


_EvenFlowMatching.__name__ = FlowMatchEulerDiscreteScheduler.__name__
_EvenFlowMatching.__module__ = FlowMatchEulerDiscreteScheduler.__module__


def trainable_parameters(pipe, args, seed):
    """Make the denoiser's adapters (or all of it) trainable, in float32. Returns {name: parameter}."""
    torch.manual_seed(seed)  # of the adapters' initial values
    for denoiser in denoisers(pipe).values():
        if args.finetune_type == "full":
            denoiser.requires_grad_(True)
        elif not hasattr(denoiser, "add_adapter"):
            refuse("finetune_type", "lora", f"{type(denoiser).__name__} takes no adapters; full would do")
        else:
            targets = args.target_modules[0] if args.target_modules == ("all-linear",) else list(args.target_modules)
            lora = peft.LoraConfig(
                r=args.lora_rank, lora_alpha=args.lora_alpha, init_lora_weights="gaussian", target_modules=targets
            )
            try:
                denoiser.add_adapter(lora)
            except ValueError as error:
                refuse("target_modules", args.target_modules, str(error).splitlines()[0])
        if args.train.enable_gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        if args.compile:
            compile_blocks(denoiser)
    named = {f"{name}.{key}": p for name, module in denoisers(pipe).items() for key, p in module.named_parameters()}
    named = {name: p for name, p in named.items() if p.requires_grad}
    for parameter in named.values():
        if parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    return named


def _blocks(denoiser, key):
    """The blocks that a transformer repeats; without any the option `key` is refused."""
    kinds = getattr(denoiser, "_repeated_blocks", None) or getattr(denoiser, "_no_split_modules", None) or ()
    blocks = [module for module in denoiser.modules() if type(module).__name__ in kinds]
    if not blocks:
        refuse(key, True, f"diffusers does not say which blocks {type(denoiser).__name__} repeats; leave it out")
    return blocks


def shard_blocks(denoiser, device):
    """Divide a network's parameters, in float32, among the processes; it comes from the CPU block by block.

    A block is put together while it works, and then forgotten again.
    """
    mesh, name = dist.init_device_mesh(device.type, (world(),)), type(denoiser).__name__
    for module in (*_blocks(denoiser, "shard"), denoiser):  # the root too is forgotten: it would miss loaded snapshots
        for parameter in module.parameters():
            if not isinstance(parameter, DTensor):
                parameter.data = parameter.data.float()
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    type(denoiser).__name__ = name  # under which diffusers saves it


def compile_blocks(denoiser):
    """Compile the blocks that a transformer repeats; those of one kind share their code.

    What is compiled for gradients rounds in other places than what is compiled without. So sampling runs the code of
    training too, and forgets the activations after each call of the network: else the ratio is not 1 in bfloat16.
    """
    torch._dynamo.config.recompile_limit = 64  # kinds of blocks x shapes
    torch._functorch.config.activation_memory_budget = 0.9  # what is quick to compute again is not kept for training
    for block in _blocks(denoiser, "compile"):
        # a training call has one shape, and gets the fastest code for it; the adapters' many casts share kernels
        block.compile(dynamic=False, options={"combo_kernels": True})
    forward = denoiser.forward

    def forward_for_gradients(*args, **kwargs):
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda _: None, lambda _: None):
            return tree_map_only(torch.Tensor, torch.Tensor.detach, forward(*args, **kwargs))

    recorded = _Recorded(forward_for_gradients, denoiser)

    @functools.wraps(forward)
    def forward_or_record(*args, **kwargs):
        return (forward if torch.is_grad_enabled() else recorded)(*args, **kwargs)

    denoiser.forward = forward_or_record


def compile_decoder(pipe):
    """Compile what makes the pixels, where that is the usual convolutional VAE."""
    if isinstance(getattr(pipe, "vae", None), AutoencoderKL):
        pipe.vae.decoder.to(memory_format=torch.channels_last).compile(dynamic=False)


class _Recorded:
    """A network's call without gradients, by CUDA graphs: the GPU repeats the kernels that it ran the second time.

    So it need not wait for the CPU, which takes as long to launch the kernels of a compiled transformer as an H200 to
    run them. A call is known by all that it is given and by where the network's parameters are. What cannot be recorded
    (on a CPU, in parts on several GPUs, with checkpointing, a network that looks at its own numbers) is called as ever.
    """

    PLAIN = (type(None), bool, int, float, str, torch.dtype)
    MOST = 16  # calls to remember
    alone = threading.Lock()
    """Held while a call is recorded, and while a reward is computed in its thread: a GPU's other work can spoil it."""

    def __init__(self, function, network):
        self.function, self.network = function, network
        self.known = {}  # {call: "once" when it was seen once, then (graph, inputs, outputs), or "never"}
        self.stream = self.memory = None  # the same for all graphs, which so share what they need for a while

    def __call__(self, *args, **kwargs):
        leaves, tree = tree_flatten((args, kwargs))
        key = self.key(leaves, tree)
        if key is None:
            return self.function(*args, **kwargs)
        state = self.known.pop(key, None)  # and back again: those longest unused are the first
        if state == "once":
            state = self.record(leaves, tree)
        self.known[key] = state or "once"
        if len(self.known) > self.MOST:
            self.known.pop(next(iter(self.known)))
        if not isinstance(state, tuple):
            return self.function(*args, **kwargs)
        graph, inputs, outputs = state
        for own, leaf in zip(inputs, leaves, strict=True):
            if isinstance(leaf, torch.Tensor):
                own.copy_(leaf)
        graph.replay()
        return tree_map_only(torch.Tensor, torch.clone, outputs)

    @functools.cached_property
    def own(self):
        """The network's parameters and buffers; looked up once, since that takes as long as a small network's call."""
        return [*self.network.parameters(), *self.network.buffers()]

    @functools.cached_property
    def whole(self):
        """Whether the network is on one GPU, all of it."""
        places = {None if isinstance(t, DTensor) else t.device for t in self.own}
        return len(places) == 1 and places.pop() == torch.device("cuda", torch.cuda.current_device())

    def key(self, leaves, tree):
        """What a call is known by; None if it cannot be recorded."""
        given = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        fixed = [leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)]
        if any(type(leaf) not in self.PLAIN for leaf in fixed) or not all(t.is_cuda for t in given) or not self.whole:
            return None
        tensors = tuple((t.shape, t.stride(), t.dtype) for t in given)
        mode = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"), self.network.training
        return str(tree), tuple(fixed), tensors, mode, tuple(map(torch.Tensor.data_ptr, self.own))

    def record(self, leaves, tree):
        """(graph, inputs, outputs); "never" where the network waits for the GPU, which no graph can."""
        if self.network.is_gradient_checkpointing:
            return "never"
        inputs = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(inputs, tree)
        with self.alone, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode")
            torch.cuda.set_sync_debug_mode("error")  # a recording that fails would leave torch's allocator in disorder
            try:
                self.function(*args, **kwargs)
            except RuntimeError as error:
                print(f"sampling without CUDA graphs: {str(error).splitlines()[0]}", flush=True)
                return "never"
            finally:
                torch.cuda.set_sync_debug_mode("default")
            if tuple not in map(type, self.known.values()):  # torch gives up the memory of graphs that are all gone
                self.stream, self.memory = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            torch.clear_autocast_cache()  # of halves made before, which are gone when the graph is replayed
            with torch.cuda.graph(graph, self.memory, self.stream, capture_error_mode="thread_local"):
                outputs = self.function(*args, **kwargs)
            torch.clear_autocast_cache()
        return graph, inputs, outputs


def denoisers(pipe):
    """{name: network} of those that predict the velocity; some pipelines have two, for high and for low noise."""
    return {name: m for name, m in pipe.components.items() if name.startswith("transformer") and m is not None}


def _modules(pipe):
    return [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]


def autocast(pipe):
    """The arithmetic of the pipeline: autocast where float32 parameters are trained in a half-precision model."""
    halves = (p.dtype for m in _modules(pipe) for p in m.parameters() if p.dtype in (torch.bfloat16, torch.float16))
    full = any(p.requires_grad and p.dtype == torch.float32 for m in denoisers(pipe).values() for p in m.parameters())
    half = next(halves, None) if full else None
    return torch.autocast(pipe._execution_device.type, dtype=half) if half else nullcontext()


# ---------------------------------------------------------------------------------------------------------------------
# The tape


@dataclass
class Transition:
    """One stochastic step of a rollout; tensors as in dynamics.Step, and detached."""

    x: torch.Tensor
    x_next: torch.Tensor
    log_prob: torch.Tensor
    velocity: torch.Tensor
    rule: Callable
    """`dynamics.step` of this step's noise levels."""

    def scored(self, velocity):
        """The Step from x to x_next under a velocity."""
        return self.rule(v=velocity, x=self.x, x_next=self.x_next)

    @property
    def mean(self):
        return self.scored(self.velocity).mean

    @property
    def std(self):
        return self.scored(self.velocity).std


@dataclass
class Rollout:
    """What one call of the pipeline did; the unit of replay, because a network's output can depend on its batch."""

    images: torch.Tensor = None
    """(B, 3, H, W) in [0, 1]; videos (B, frames, 3, H, W)."""
    noise: torch.Tensor = None
    """The initial latents, as the first step received them."""
    x0: torch.Tensor = None
    """The final latents, as the last step left them."""
    sigmas: torch.Tensor = None
    """(T + 1,) float32 noise levels, 1 -> 0, on the CPU."""
    schedule: torch.Tensor = None
    """Those of the pipeline itself, before a tail of fewer steps."""
    steps: dict = field(default_factory=dict)
    """{k: Transition} for the stochastic steps."""
    call: dict = None
    dynamics_type: str = None
    noise_level: float = None
    tail_start: int = 0
    tail_steps: Optional[int] = None
    answers: dict = field(default_factory=lambda: defaultdict(list))
    """{method: [returned]} of its encode_, prepare_ and generate_ methods, and what set_timesteps left behind."""
    outputs: dict = field(default_factory=lambda: defaultdict(list))
    """{k: [output]} of the denoiser in step k: tensors without storage, or with it if the guidance remembers them."""


def rollout(
    pipe, call, dynamics_type, noise_level, sde_steps, generator=None, tail_steps=None, *, texts=None, sibling=None
) -> Rollout:
    """Sample images with `pipe(**call)`, stochastically in sde_steps and by the pipeline's own ODE elsewhere.

    call: keyword arguments of the pipeline; its `generator` draws the initial noise.
    sde_steps: indices k, 0-based, whose step is `dynamics.step(dynamics_type, ..., noise_level)`.
    generator: of the noise of those steps, one torch.Generator or a list of one per image; also of the initial noise
        if the call names none.
    tail_steps: take what is left after the last of sde_steps (everything, if there are none) by `dynamics.dpm_step`, in
        at most so many steps, evenly over that part of the schedule. None leaves it to the pipeline.
    texts: a dict that remembers what the text encoders made of the prompts, for the next call.
    sibling: an earlier Rollout. If it had the same call from the same start, then so are its steps up to the first
        stochastic one, and they are taken from its tape.
    """
    call = {"generator": generator, **call, "output_type": "pt", "return_dict": False}
    tape = Rollout(call=call, dynamics_type=dynamics_type, noise_level=noise_level)
    tape.tail_start, tape.tail_steps = max(sde_steps, default=-1) + 1, tail_steps
    # guidance that is an object may have momentum: step k then depends on what the denoiser said before
    whole = any(isinstance(component, diffusers.guiders.BaseGuidance) for component in pipe.components.values())
    ahead = None
    if sde_steps and sibling is not None and min(sibling.steps) == min(sde_steps) and _alike(sibling.call, call):
        ahead = _Player(sibling, min(sde_steps), sibling.steps[min(sde_steps)].x)
    recorder = _Recorder(tape, pipe.scheduler, sde_steps, generator, whole, ahead)
    with torch.no_grad(), autocast(pipe), _taped(pipe, recorder), _remembering(pipe, texts):
        tape.images = pipe(**_copy(call))[0]
    for k, taken in tape.steps.items():
        if k - 1 in tape.steps and torch.equal(taken.x, tape.steps[k - 1].x_next):
            taken.x = tape.steps[k - 1].x_next  # one copy serves two steps
    return tape


def _alike(a, b):
    """Whether two calls have the same arguments and generators with the same seeds."""
    if not all(isinstance(call["generator"], list) for call in (a, b)):
        return False
    seeds = [[g.initial_seed() for g in call["generator"]] for call in (a, b)]
    return seeds[0] == seeds[1] and {**a, "generator": None} == {**b, "generator": None}


def replay(pipe, rollout, k, x=None):
    """Run step k of a rollout again, with gradients if grad mode is on.

    The pipeline repeats its call: up to step k its methods and its denoiser answer from the tape, and step k itself
    runs for real, at the recorded latents or, if given, at x (of their shape).

    Returns (velocity, Step): the velocity that reached the scheduler, and the recorded transition scored under it
    (None for a step that was not stochastic, or at another x).
    """
    call = inspect.unwrap(type(pipe).__call__)  # without the decorator that turns gradients off
    player = _Player(rollout, k, rollout.steps[k].x if x is None else x)
    again = _copy(rollout.call)
    if "prepare_latents" not in rollout.answers:  # then the pipeline draws them in its call, unless it is given some
        again["latents"] = player.handed(rollout.noise)
    with autocast(pipe), _taped(pipe, player), suppress(_Arrived):
        call(pipe, **again)
    velocity = player.velocity
    if x is not None or k not in rollout.steps:
        return velocity, None
    return velocity, rollout.steps[k].scored(velocity)


class _Recorder:
    """Lets everything happen and writes it down."""

    def __init__(self, tape, scheduler, sde_steps, generator, whole, ahead):
        self.tape, self.scheduler, self.sde_steps, self.generator = tape, scheduler, set(sde_steps), generator
        self.k = 0  # the step under way
        self.ahead = ahead  # a _Player that knows the steps before the first stochastic one
        self.skipping = ahead is not None  # those steps, up to the denoiser's call of the first stochastic one
        self.inside = False  # a recorded method may call another
        self.whole = whole  # keep the denoiser's outputs, not only their shapes
        self.x0 = None  # of the step before, in the tail

    def method(self, name, method, *args, **kwargs):
        if self.inside:
            return method(*args, **kwargs)
        self.inside = True
        try:
            answer = next(self.ahead.answers[name]) if self.skipping else method(*args, **kwargs)
        finally:
            self.inside = False
        self.tape.answers[name].append(tree_map_only(torch.Tensor, _once, answer))
        return _copy(answer)

    def set_timesteps(self, scheduler, work):
        work()
        _regrid_tail(scheduler, self.tape)
        self.tape.sigmas = None  # one that was read before was of another schedule
        if not self.inside:
            plain = (torch.Tensor, int, float, type(None))
            found = {name: value for name, value in vars(scheduler).items() if isinstance(value, plain)}
            self.tape.answers["set_timesteps"].append(_copy(found))

    def denoiser(self, forward, *args, **kwargs):
        if self.tape.sigmas is None:  # before the device has work that it would have to end
            self.tape.sigmas = _noise_levels(self.scheduler)
        self.skipping = self.skipping and self.k < self.ahead.target
        if self.skipping:
            self.tape.outputs[self.k] = self.ahead.tape.outputs[self.k]
            return self.ahead.denoiser(forward)
        caches = [key for key, value in kwargs.items() if key.endswith("cache") and value is not None]
        if caches:  # filled in one step and read in the next: a replay of one step has it empty
            raise NotImplementedError(f"cannot replay a step that needs {caches[0]}; try use_{caches[0]}=False in call")
        output = forward(*args, **kwargs)
        kept = _copy(output) if self.whole else tree_map_only(torch.Tensor, lambda t: t.to("meta"), output)
        self.tape.outputs[self.k].append(kept)
        return output

    def step(self, scheduler, output, timestep, sample):
        tape, k = self.tape, self.k
        inverted = scheduler.config.invert_sigmas  # such models run from 0 to 1 and predict x0 - noise
        if k == 0:
            tape.noise = sample.detach().clone()
        if self.skipping:
            self.k += 1
            return self.ahead.step(scheduler, output, timestep, sample)
        if k in self.sde_steps:
            x, velocity = sample.detach().clone(), -output if inverted else output
            sigma, sigma_next, second = tape.sigmas[[k, k + 1, 1]].tolist()
            rule = functools.partial(
                dynamics.step, tape.dynamics_type, sigma=sigma, sigma_next=sigma_next, noise_level=tape.noise_level,
                sigma_second=second,
            )  # fmt: skip
            taken = rule(v=velocity, x=x, generator=self.generator)
            if taken.x_next.dtype != output.dtype:  # pass on the dtype that diffusers passes on, and score that
                taken = rule(v=velocity, x=x, x_next=taken.x_next.to(output.dtype))
            tape.steps[k] = Transition(x, taken.x_next, taken.log_prob, velocity.detach(), rule)
            tape.x0 = taken.x_next
        elif tape.tail_steps and k >= tape.tail_start:
            velocity, sigmas = -output if inverted else output, tape.sigmas.tolist()
            x_next, self.x0 = dynamics.dpm_step(velocity, sample, *sigmas[k : k + 2], sigmas[k - 1], self.x0)
            tape.x0 = x_next.to(output.dtype)
        else:
            scheduler._step_index = k  # by index: a timestep may occur twice
            tape.x0 = FlowMatchEulerDiscreteScheduler.step(scheduler, output, timestep, sample, return_dict=False)[0]
        self.k += 1
        return tape.x0.clone()


class _Player:
    """Answers from the tape until step k, lets that happen, and stops there."""

    def __init__(self, tape, target, x):
        self.tape, self.target, self.x = tape, target, x
        self.k = 0
        self.answers = {name: iter(answers) for name, answers in tape.answers.items()}
        self.outputs = iter([output for k in range(target) for output in tape.outputs[k]])
        self.velocity = None
        self.latents = None  # as the pipeline was last handed them

    def handed(self, like):
        """x for the pipeline, as a tensor like another."""
        self.latents = self.x.to(like, copy=True)
        return self.latents

    def method(self, name, method, *args, **kwargs):
        answer = _copy(next(self.answers[name]))
        if self.target == 0 and name.startswith("prepare_"):
            answer = tree_map_only(torch.Tensor, self._initial, answer)
        return answer

    def _initial(self, tensor):
        """The given x in the place of the initial latents."""
        noise = self.tape.noise
        same = tensor.shape == noise.shape and torch.equal(tensor.to(noise), noise)
        return self.handed(tensor) if same else tensor

    def set_timesteps(self, scheduler, work):
        """Leave what the rollout found, without the copies to the device that its next step would wait for."""
        vars(scheduler).update(_copy(next(self.answers["set_timesteps"])))

    def denoiser(self, forward, *args, **kwargs):
        if self.k == self.target:
            return forward(*args, **kwargs)
        device = self.x.device
        return tree_map_only(
            torch.Tensor, lambda t: torch.zeros_like(t, device=device) if t.is_meta else t.clone(), next(self.outputs)
        )

    def step(self, scheduler, output, timestep, sample):
        if self.k < self.target:
            self.k += 1
            return self.handed(self.tape.x0)
        untouched = sample is self.latents and sample._version == 0
        if not (untouched or self.same(sample)):
            raise NotImplementedError("this pipeline changes its latents between two steps; cannot replay there")
        self.velocity = -output if scheduler.config.invert_sigmas else output
        raise _Arrived

    def same(self, sample):
        """Whether these latents are x, or x rounded to the model's dtype if it is not a recorded one.

        To know, one waits for the device; so it is not asked where the pipeline brings the very tensor it was handed.
        """
        recorded = self.target in self.tape.steps and self.x is self.tape.steps[self.target].x
        return (sample - self.x.to(sample)).abs().max() <= (0 if recorded else 2**-8 * self.x.abs().max())


class _Arrived(BaseException):
    """Ends a replayed call; no pipeline catches it."""


@functools.cache
def _stepping(cls):
    """A subclass of a scheduler's class whose `step()` is handed to a listener, on a schedule with the tape's tail."""

    def step(self, model_output, timestep, sample, *args, return_dict=True, **kwargs):
        x_next = self.listener.step(self, model_output, timestep, sample)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=x_next) if return_dict else (x_next,)

    def scale_model_input(self, sample, timestep=None):  # called where the class is not diffusers' very own
        return sample

    @functools.wraps(cls.set_timesteps)  # pipelines look at its arguments
    def set_timesteps(self, *args, **kwargs):
        self.listener.set_timesteps(self, functools.partial(cls.set_timesteps, self, *args, **kwargs))

    def deepcopy(self, memo):  # with a copy a pipeline steps latents of another kind, sound: that stays its own ODE
        twin, listener = copy.copy(self), self.listener

        def step(*args, **kwargs):
            twin._step_index = len(listener.tape.answers["step"])  # earlier steps may have been answered from a tape
            return cls.step(twin, *args, **kwargs)

        twin.step = functools.partial(listener.method, "step", step)
        return twin

    members = {"step": step, "scale_model_input": scale_model_input, "set_timesteps": set_timesteps}
    members |= {"__deepcopy__": deepcopy, "__module__": cls.__module__}
    return type(cls.__name__, (cls,), members)


def _regrid_tail(scheduler, tape):
    """Put tail_steps in the place of more steps that a schedule has from tail_start on, evenly by index."""
    tape.schedule = _noise_levels(scheduler)
    start, steps, end = tape.tail_start, tape.tail_steps, len(scheduler.timesteps)
    if not steps or steps >= end - start:
        return
    before, almost, last = tape.schedule[-3:].tolist()
    place = np.arange(end + 1.0)
    place[-1] = end - 1 + min(1, (almost - last) / (before - almost))  # the last step of SD3's is next to nothing
    even = np.linspace(place[start], place[-1], steps + 1)[1:]

    def regridded(levels, places):  # up to tail_start they stay as they are
        tail = np.interp(places, place[: len(levels)], levels.double().cpu())
        return torch.cat([levels[: start + 1], torch.from_numpy(tail).to(levels)])

    scheduler.sigmas = regridded(scheduler.sigmas, even)
    scheduler.timesteps = regridded(scheduler.timesteps, even[:-1])


def _noise_levels(scheduler):
    """(T + 1,) float32, 1 -> 0, on the CPU."""
    sigmas = scheduler.sigmas.float().cpu()
    return 1 - sigmas if scheduler.config.invert_sigmas else sigmas


@contextmanager
def _taped(pipe, listener):
    """Route the pipeline's methods, denoisers and scheduler through a listener; put everything back at the end."""
    with ExitStack() as stack:
        for name in dir(type(pipe)):
            if name.startswith(("encode_", "prepare_", "generate_")) and callable(getattr(pipe, name)):
                setattr(pipe, name, functools.partial(listener.method, name, getattr(pipe, name)))
                stack.callback(delattr, pipe, name)
        stack.enter_context(_routed(pipe.scheduler, _stepping, listener))
        for denoiser in denoisers(pipe).values():
            stack.enter_context(_routed(denoiser, _listening, listener.denoiser))
        yield


@contextmanager
def _remembering(pipe, texts):
    """Let a text encoder work on each row of tokens once; when a row comes again, the answer is in `texts`."""
    with ExitStack() as stack:
        for name, module in pipe.components.items() if texts is not None else ():
            if name.startswith("text_encoder") and isinstance(module, torch.nn.Module):
                known, texts[name] = texts.get(name, {}), {}  # only what a call needs is kept for the next
                stack.enter_context(_routed(module, _listening, functools.partial(_recall, known, texts[name])))
        yield


def _recall(known, used, encode, *args, **kwargs):
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if not tensors or len({t.shape[:1] for t in tensors} | {()}) != 2:  # not rows of tokens
        return encode(*args, **kwargs)
    how = repr([leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)])
    keys = [(how, repr(row)) for row in zip(*(t.tolist() for t in tensors), strict=True)]
    used |= {key: known[key] for key in keys if key in known}
    new = {key: row for row, key in enumerate(keys) if key not in used}
    if new:
        rows = list(new.values())
        args, kwargs = tree_map_only(torch.Tensor, lambda t: t[rows], (args, kwargs))
        output = encode(*args, **kwargs)
        for i, key in enumerate(new):
            used[key] = tree_map(lambda t: t[i : i + 1] if isinstance(t, torch.Tensor) else None, output)  # noqa: B023
    answers = [used[key] for key in keys]
    return tree_map(lambda *rows: None if rows[0] is None else torch.cat(rows), *answers)


@contextmanager
def _routed(component, kind, listener):
    """The component as one whose calls or steps go to a listener, for a while."""
    own = type(component)
    component.__class__, component.listener = kind(own), listener
    try:
        yield
    finally:
        component.__class__ = own
        del component.listener


@functools.cache
def _listening(cls):
    """A subclass whose calls go through a listener, outside all hooks: a skipped sharded model gathers nothing."""

    def call(self, *args, **kwargs):
        return self.listener(functools.partial(cls.__call__, self), *args, **kwargs)

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})


def _once(tensor):
    """Equal rows, such as the embeddings of one prompt for its images, in the memory of one of them."""
    alike = tensor.ndim > 1 and len(tensor) > 1 and torch.equal(tensor, tensor[:1].expand_as(tensor))
    return tensor[:1].clone().expand_as(tensor) if alike else tensor


def _copy(tree):
    """A copy of nested arguments or results: some pipelines write into the lists and tensors that they are given."""
    if isinstance(tree, torch.Tensor):
        return tree.clone()
    if isinstance(tree, dict):
        return {key: _copy(value) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_copy(value) for value in tree)
    return tree


def shared_noise(rollouts, group_size, same_init_noise):
    """How many images have the noise of another image of their group, at the start or in any step; 0 in a sound run.

    With same_init_noise the start is shared on purpose and not looked at.
    """
    drawn = {} if same_init_noise else {-1: [tape.noise.flatten(1)[:, :64] for tape in rollouts]}
    for k in rollouts[0].steps:
        drawn[k] = []
        for taken in (tape.steps[k] for tape in rollouts):
            x_next, mean = (t.flatten(1)[:, :64].float() for t in (taken.x_next, taken.mean))
            drawn[k].append((x_next - mean) / taken.std.to(mean).reshape(-1, 1))
    shared = 0
    for noise in drawn.values():
        noise = torch.cat(noise).float()
        groups = noise.reshape(-1, group_size, noise.shape[1])
        apart = (groups[:, :, None] - groups[:, None]).abs().amax(dim=3)  # noise of two images differs by about 3
        apart.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        shared += int((apart.amin(dim=2) < 0.05).sum())
    return shared


@torch.no_grad()
def ode_difference(pipe, call, count=2):
    """The largest difference between the images of a rollout without noise and of the plain pipeline."""

    def first_images():
        few = {key: value[:count] if isinstance(value, list) else value for key, value in call.items()}
        return {**few, "generator": generators(*((0, i) for i in range(len(few["prompt"]))))}

    with autocast(pipe):
        plain = pipe(**first_images())[0]
    return (rollout(pipe, first_images(), "ODE", 0.0, ()).images - plain).abs().max().item()


# ---------------------------------------------------------------------------------------------------------------------
# Parameter sets: the reference, the average and other policies are copies of the trainable parameters only


class Snapshot:
    """A copy of parameters, on their own device or another, that can take their place for a while.

    Of sharded parameters it holds the same shard.
    """

    def __init__(self, parameters, device=None):
        self.parameters = list(parameters)
        self.values = [p.detach().to(device or p.device, copy=True) for p in self.parameters]

    @contextmanager
    def loaded(self):
        """Within it the parameters have the snapshot's values; afterwards always their own again."""
        own = [p.detach().clone() if isinstance(p, DTensor) else p.data for p in self.parameters]
        try:
            self._put(self.values)
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, values):
        for p, value in zip(self.parameters, values, strict=True):
            if isinstance(p, DTensor):
                p.copy_(value.to(p.device))  # in place: blocks are put together from this memory
            else:
                p.data = value.to(p.device)

    @torch.no_grad()
    def update(self, decay):
        """values <- decay * values + (1 - decay) * parameters."""
        for value, p in zip(self.values, self.parameters, strict=True):
            value.lerp_(p.detach().to(value.device), 1 - decay)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and seeds: all from (seed, epoch, prompt, member), nothing from what was drawn before


def read_prompts(path, key="prompts"):
    """The non-empty lines of a text file."""
    prompts = [line.strip() for line in read_text(key, path).splitlines() if line.strip()]
    if not prompts:
        refuse(key, path, "holds no prompt; it should have one a line")
    return prompts


def epoch_prompts(prompts, count, seed, epoch):
    """The prompts of an epoch (from 1): `count` of them, going through the whole list in a new order each time."""
    places = range((epoch - 1) * count, epoch * count)
    orders = {p // len(prompts): None for p in places}
    for turn in orders:
        orders[turn] = np.random.default_rng([seed, turn]).permutation(len(prompts))
    return [prompts[orders[p // len(prompts)][p % len(prompts)]] for p in places]


def batches(items, length):
    """Consecutive lists of `length` items."""
    return [items[start : start + length] for start in range(0, len(items), length)]


def calls_of_updates(train, epoch):
    """For each optimizer step of an epoch, the calls of this process that it is over, counted from 0.

    Of each `gradient_step_per_epoch` calls in a row every step of a pass takes one, at random from (seed, epoch): so a
    step is over the same calls whatever the number of processes.
    """
    calls = train.unique_sample_num_per_epoch * train.group_size // train.per_device_batch_size
    order, steps = np.random.default_rng([train.seed, epoch, 1]), []
    for _ in range(train.num_inner_epochs):
        rows = own(order.permuted(np.arange(calls).reshape(-1, train.gradient_step_per_epoch), axis=1))
        steps += list((rows - rows.min()).T)
    return steps


def generators(*seeds):
    """One CPU generator per tuple of integers: the same noise on every device, in every batch and on every rank."""
    states = [int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1) for seed in seeds]
    return [torch.Generator().manual_seed(state) for state in states]


# ---------------------------------------------------------------------------------------------------------------------
# Metrics and evaluation


class Metrics:
    """Collects scalars and gives their means; nothing waits for the device until then."""

    def __init__(self):
        self.values = defaultdict(list)

    def add(self, named):
        for name, value in named.items():
            self.values[name].append(torch.as_tensor(value).detach().float())

    def means(self, prefix):
        return {f"{prefix}{name}": torch.stack(values).mean().item() for name, values in self.values.items()}

    def gathered(self):
        """The same of all processes."""
        everyone = Metrics()
        rows = gather_rows({name: torch.stack(values) for name, values in self.values.items()})
        everyone.values.update({name: list(values) for name, values in rows.items()})
        return everyone

    def first_not_finite(self):
        """The name of the first scalar with a value that is not finite, in the order they were first added; or None."""
        return next((name for name, values in self.values.items() if not torch.stack(values).isfinite().all()), None)


def silent_groups(totals, group_size):
    """Which groups have rewards that are all equal, and so say nothing. totals: (N,); returns (groups,) booleans."""
    groups = totals.reshape(-1, group_size)
    return (groups == groups[:, :1]).all(dim=1)


def contrast(images):
    """{"contrast": (N,)}: std of the pixels of an image. images: (N, ...)."""
    return {"contrast": images.flatten(1).std(dim=1)}


class Looks:
    """How images look, one by one and in groups; what is kept of them is the group that is not whole yet."""

    def __init__(self, group_size, statistics=contrast):
        self.group_size, self.statistics = group_size, statistics
        self.columns, self.begun = defaultdict(list), []

    def add(self, images):
        """images: (B, ...) float, in the order of the groups."""
        for name, values in self.statistics(images).items():
            self.columns[name].append(values)
        self.begun.extend(images)
        while self.group_size > 1 and len(self.begun) >= self.group_size:
            group, self.begun = torch.stack(self.begun[: self.group_size]), self.begun[self.group_size :]
            self.columns["group_spread"].append(group.std(dim=0).mean()[None])

    def means(self):
        """{"name": mean} of all processes: the statistics, and group_spread, a pixel's std over its group, averaged."""
        columns = gather_rows({name: torch.cat(values) for name, values in self.columns.items()})
        return {name: values.mean() for name, values in columns.items()}


def group_metrics(looks, totals, group_size):
    """What shows a run going wrong before its reward does: silent groups, and images growing alike.

    looks: of this process; totals: (N,) of the epoch. zero_std: share of groups whose rewards are all equal.
    """
    return {
        "reward_std": totals.reshape(-1, group_size).std(dim=1, correction=0).mean(),
        "zero_std": silent_groups(totals, group_size).float().mean(),
        **looks.means(),
    }


class Judge:
    """A reward in a thread of its own, which scores the images of one call while the pipeline samples the next."""

    def __init__(self, reward):
        self.reward, self.thread, self.calls = reward, ThreadPoolExecutor(1), []

    def submit(self, images, prompts):
        """Score these images next. Raises here what the reward raised for the last ones: the run ends at once."""
        if self.calls:
            self.calls[-1].result()
        self.calls.append(self.thread.submit(self._score, images, prompts))

    def _score(self, images, prompts):
        with _Recorded.alone:
            return self.reward(images, prompts)

    def scores(self):
        """{"name": (N,), ..., "total": (N,)} of all that was submitted since the last time, in that order.

        The scores are those of all processes, one after another.
        """
        scores = [call.result() for call in self.calls]
        self.calls = []
        return gather_rows({name: torch.cat([s[name] for s in scores]) for name in (scores[0] if scores else ())})


def image_statistics(images):
    """{"name": (N,)}: how images look, whatever they show; a policy that hacks its reward often moves one of these.

    images: (N, 3, H, W) in [0, 1], or videos (N, frames, 3, H, W), of which the frames' mean is taken. Grey is the
    mean of the three channels; a neighbour is one pixel to the left, right, above or below.

    mean: of all values; 0 black to 1 white.
    contrast: standard deviation of all values; 0 to 0.5.
    sharpness: mean |grey of a pixel - mean of its four neighbours'|; 0 to 1, a checkerboard of pixels.
    edge_density: share of the pairs of neighbours whose grey differs by more than 0.1; 0 to 1.
    saturation: mean of (max - min) / max of a pixel's channels, that of HSV; 0 grey to 1 pure colours.
    """
    frames = images.float().flatten(0, -4)
    grey = frames.mean(dim=1)
    around = (grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:] + grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1]) / 4
    steps = torch.cat([grey.diff(dim=1).flatten(1), grey.diff(dim=2).flatten(1)], dim=1)
    most, least = frames.amax(dim=1), frames.amin(dim=1)
    statistics = {
        "mean": frames.flatten(1).mean(dim=1),
        "contrast": frames.flatten(1).std(dim=1, correction=0),
        "sharpness": (grey[:, 1:-1, 1:-1] - around).abs().flatten(1).mean(dim=1),
        "edge_density": (steps.abs() > 0.1).float().mean(dim=1),
        "saturation": ((most - least) / most.clamp(min=1e-6)).flatten(1).mean(dim=1),
    }
    return {name: value.reshape(len(images), -1).mean(dim=1) for name, value in statistics.items()}


SHOWN = 32  # images of an evaluation that are kept and drawn
FRAMES = 8  # of a video among them


@torch.no_grad()
def evaluate(pipe, args, prompts, reward):
    """Make images of the evaluation prompts with the plain pipeline, and look at them.

    Returns (prompts of length N, scores {"name": (N,), ..., "total": (N,)}, statistics {"name": mean}, shown). The
    statistics are those of image_statistics and, where a prompt has several images, group_spread: std of a pixel over
    them, averaged. shown: {i: (frames, H, W, 3) uint8} for a few images, evenly taken, as are the frames of a video.
    """
    each = args.eval.images_per_prompt
    prompts = [prompt for prompt in prompts for _ in range(each)]
    noise = generators(*((args.eval.seed, i) for i in range(len(prompts))))
    height, width = size(args.eval.resolution)
    judge, shown, looks = Judge(reward), dict.fromkeys(evenly(len(prompts), SHOWN)), Looks(each, image_statistics)
    length = args.eval.per_device_batch_size
    runs = range(0, len(prompts), math.lcm(length, each))  # of whole calls and of all images of a prompt
    starts = [start for run in own(runs) for start in range(run, min(run + runs.step, len(prompts)), length)]
    idle = max(gather(len(starts))) - len(starts) if args.shard else 0  # a sharded network works in all processes
    for number, start in enumerate(progress([*starts, *[0] * idle], "evaluation")):
        batch = slice(start, start + length)
        call = dict(
            prompt=prompts[batch],
            generator=noise[batch],
            height=height,
            width=width,
            num_inference_steps=args.eval.num_inference_steps,
            guidance_scale=args.eval.guidance_scale,
        )
        if args.eval.solver == "Euler":
            with autocast(pipe):
                images = pipe(**_copy({**call, **args.call}), output_type="pt", return_dict=False)[0].float()
        else:
            tail = args.eval.num_inference_steps
            images = rollout(pipe, {**call, **args.call}, "ODE", 0.0, (), tail_steps=tail).images.float()
        if number >= len(starts):
            continue
        judge.submit(images, prompts[batch])
        looks.add(images)
        for i, image in enumerate(images, start):
            if i in shown:
                frames = image[evenly(len(image), FRAMES)] if image.ndim == 4 else image[None]
                shown[i] = (frames.permute(0, 2, 3, 1) * 255).round().clamp(0, 255).byte().cpu().numpy()
    scores = {name: value.cpu() for name, value in judge.scores().items()}
    parts = gather({i: frames for i, frames in shown.items() if frames is not None})
    shown = {i: frames for part in parts for i, frames in part.items()}
    return prompts, scores, {name: mean.item() for name, mean in looks.means().items()}, shown


def evenly(count, most):
    """Up to `most` indices below count, evenly taken, the first and the last among them."""
    return np.linspace(0, count - 1, min(most, count)).astype(int).tolist()


def save_grid(path, shown, prompts, totals, base=None):
    """A PNG of images (a row of frames for a video), each with its prompt and its reward under it.

    shown: {i: (frames, H, W, 3) uint8}; prompts, totals: by the same i. base: (shown, totals) of the base model for
    the same noise, drawn before each image (above each video), with its reward before the other.
    """
    tiles, captions = [], []
    for i, frames in shown.items():
        strips = [np.hstack(frames)] if base is None else [np.hstack(base[0][i]), np.hstack(frames)]
        tiles.append(np.hstack(strips) if len(frames) == 1 else np.vstack(strips))
        captions.append(f"{totals[i]:.3g}" if base is None else f"{base[1][i]:.3g} -> {totals[i]:.3g}")
    side = next(iter(shown.values())).shape[2]
    scale = max(1, 128 // side)
    height, width = tiles[0].shape[0] * scale, tiles[0].shape[1] * scale
    columns = min(max(1, 8 * side * scale // width), len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (width + 8), rows * (height + 44)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (i, tile) in enumerate(zip(shown, tiles, strict=True)):
        left, top = place % columns * (width + 8) + 4, place // columns * (height + 44) + 4
        sheet.paste(Image.fromarray(tile).resize((width, height), Image.NEAREST), (left, top))
        prompt = "\n".join(textwrap.wrap(prompts[i], width // 6)[:2])
        draw.text((left, top + height + 2), f"{prompt}\n{captions[place]}", fill="black")
    sheet.save(path)


def step_optimizer(run, optimizer, named, update, max_grad_norm):
    """Clip the gradients and take an optimizer step; where a loss or a gradient is not finite, skip it and say so.

    named: {name: parameter}; update: the Metrics of this update, with each `loss` in it. Gradients and metrics are
    those of all processes. Returns the means and the norm of the gradient before clipping; nothing of an update that
    was skipped.
    """
    update = update.gathered()
    average_gradients(list(named.values()))
    gradients = {name: p.grad for name, p in named.items() if p.grad is not None}
    norm = gradient_norm(named.values())
    losses = [loss.to(norm.device) for loss in update.values.get("loss", ())]
    finite = torch.stack([norm.float(), *losses]).isfinite().all()
    if finite:
        torch.nn.utils.clip_grads_with_norm_(named.values(), max_grad_norm, norm)
        optimizer.step()
    else:
        parts = {name: g.to_local() if isinstance(g, DTensor) else g for name, g in gradients.items()}
        culprits = (f"the gradient of {name}" for name, g in parts.items() if not g.isfinite().all())
        culprit = next(filter(None, gather(next(culprits, None))), "the norm of the gradient")
        run.skip(update.first_not_finite() or culprit)
    optimizer.zero_grad()
    if not finite:
        return {}
    run.in_a_row = 0 if run.in_a_row < MOST_SKIPPED else run.in_a_row
    return {**update.means(""), "grad_norm": norm}


def gradient_norm(parameters):
    """That of all gradients together."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def progress(items, what):
    """A progress bar, on a terminal only."""
    return tqdm(items, desc=what, leave=False, disable=True if rank() else None)


# ---------------------------------------------------------------------------------------------------------------------
# The run folder


class Run:
    """A folder runs/<run_name>/ with all that a run was and did; it is made before the model is loaded.

    Of several processes the first one writes there and prints; all read the checkpoint that a run is resumed from.
    """

    current = None  # the run of this process, for what has to end it from outside the loop

    def __init__(self, args, sources, script):
        self.args, self.rows, self.started = args, [], time.time()
        self.skipped, self.in_a_row = 0, 0  # updates skipped since the last row, and without one taken in between
        self.interrupted = None  # the signal that asks the run to end after this epoch
        self.in_loop = False
        self.eval_prompts = read_prompts(args.eval.prompts or args.prompts)
        self.folder = Path(args.resume or args.output_dir)  # a new run's is in there
        gather("the name is free")  # as all have checked; from now on it is not
        self.checkpoint, environment, notes = self._open(script) if rank() == 0 else (None, None, ())
        self.folder, self.checkpoint = gather((self.folder, self.checkpoint))[0]
        Run.current = self
        self.trackers = self._trackers(environment["started"]) if rank() == 0 else []
        self.print(f"{Path(script).name} -> {self.folder}")
        for source in dict.fromkeys(source for _, source in sources.values()):
            said = [f"{key} {value}" for key, (value, where) in sources.items() if where == source]
            self.print(f"from {source}: {', '.join(said)}")
        for note in notes:
            self.print(f"note: {note}")

    def _open(self, script):
        """Make the folder, or look at what is in it: (checkpoint, the environment that the run began in, notes)."""
        args = self.args
        settings, environment = _settings(args), _environment(args, script)
        try:
            if not args.resume:
                self.folder = _new_folder(args, script)
                again = came_to_nothing(self.folder)
                if again:
                    self._lock()
                with nullcontext(self.folder) if again else whole(self.folder) as folder:
                    (folder / "images").mkdir(exist_ok=True)
                    (folder / "environment.yaml").write_text(yaml.safe_dump(environment, sort_keys=False))
                    (folder / "args.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
                    shutil.copy(script, folder)
            self._lock()
            began = _began(self.folder)
            notes = _compare(args, began, environment)
            checkpoint = newest_checkpoint(self)
            done = int(checkpoint.name.removeprefix("epoch_")) if checkpoint else 0
            if args.train.max_epochs < done:
                remedy = f"{done} epochs are done already; take at least {done}"
                refuse("train.max_epochs", args.train.max_epochs, remedy)
            write_file(self.folder / "args.yaml", yaml.safe_dump(settings, sort_keys=False))
        except OSError as error:
            refuse("output_dir", args.output_dir, f"cannot write {self.folder}: {error.strerror}")
        return checkpoint, began, notes

    def _trackers(self, started):
        """Functions that take a row of metrics."""
        trackers = []
        if self.args.track:
            import wandb

            name = self.folder.name
            same = {"id": f"{name}-{started}", "resume": "allow"}
            wandb.init(project="flow-rl", name=name, dir=self.folder, config=_settings(self.args), **same)
            trackers.append(lambda row: wandb.log(row, step=row["epoch"]))
        if self.args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(self.folder)
            trackers.append(lambda row: [board.add_scalar(k, v, row["epoch"]) for k, v in row.items()])
        return trackers

    def _lock(self):
        """One process to a run; the lock goes with the process, however it ends."""
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            refuse("resume", str(self.folder), "another process is working on this run")
        except OSError:  # a file system without locks
            pass

    @property
    def command(self):
        """What continues this run, typed where it was begun."""
        launcher = f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}" if world() > 1 else "python"
        return f"{launcher} {shlex.quote(sys.argv[0])} --resume {shlex.quote(str(self.folder))}"

    def print(self, line=""):
        """A line on the console and in log.txt."""
        if rank():
            return
        with open(self.folder / "log.txt", "a") as log:
            log.write(f"{line}\n")
        with _heard():
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
        self.print(_console_line(row))

    def write_metrics(self):
        """metrics.csv, whole."""
        columns = list(dict.fromkeys(key for row in self.rows[::-1] for key in row))
        rank = {"train": 1, "eval": 2}
        columns.sort(key=lambda key: rank.get(key.split("/")[0], 0))
        table = io.StringIO()
        writer = csv.DictWriter(table, columns)
        writer.writeheader()
        writer.writerows(self.rows)
        write_file(self.folder / "metrics.csv", table.getvalue())

    def skip(self, culprit):
        """Count an update that was skipped because something in it, culprit, was not finite."""
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        self.culprit = culprit
        self.print(f"update skipped, {self.in_a_row} in a row: {culprit} is not finite")

    def watch(self, reward):
        """The reward, but where it fails, the images and prompts of that call are kept."""

        def watched(images, prompts):
            try:
                return reward(images, prompts)
            except ValueError as error:  # which is what rewards.py makes of all failures
                failed = self.folder / f"failed_reward{rank() or ''}"
                with whole(failed, replace=True) as folder:
                    for i, image in enumerate(images.flatten(0, -4)):  # the frames of videos, one after another
                        pixels = (image.float().permute(1, 2, 0) * 255).round().clamp(0, 255).byte()
                        Image.fromarray(pixels.cpu().numpy()).save(folder / f"{i:04d}.png")
                    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
                what = str(error).removeprefix("error: ")
                raise RunError(f"{what}; its images and prompts are in {failed}") from error

        return watched

    def contract(self, what, value, holds):
        """One line of the first-step contract, from the process where it is worst; ends the run if it does not hold."""
        value, holds = min(gather((value, holds)), key=lambda found: (found[1], -found[0]))
        self.print(f"contract: {what}: {value:.6g}{'' if holds else '   BROKEN'}")
        if not holds:
            raise SystemExit(f"error: the first-step contract is broken: {what} is {value:.6g}; nothing was trained")

    def check_signal(self, totals, group_size):
        """How many groups say nothing, as a line of the contract that holds whatever it is; a warning if all do."""
        silent = silent_groups(totals, group_size)
        self.contract(f"groups whose rewards are all equal (no signal), of {len(silent)}", int(silent.sum()), True)
        if silent.all():
            self.print("warning: no reward differs within its group, so there is nothing to learn from it")

    def evaluate(self, epoch, pipe, reward):
        """Evaluate, keep the grid and each image's rewards, and return the columns of metrics.csv."""
        prompts, scores, statistics, shown = evaluate(pipe, self.args, self.eval_prompts, reward)
        names = ["total", *(name for name in scores if name != "total")]
        columns = {f"eval/{name}": scores[name].mean().item() for name in names}
        columns |= {f"eval/image/{name}": value for name, value in statistics.items()}
        if rank():
            return columns
        images = self.folder / "images"
        if epoch == 0:
            np.savez_compressed(images / "base.npz", totals=scores["total"], shown=np.stack(list(shown.values())))
            base = None
        else:  # from the file, which a resumed run has too
            kept = np.load(images / "base.npz")
            base = dict(zip(shown, kept["shown"], strict=True)), kept["totals"]
        save_grid(images / f"epoch_{epoch:04d}.png", shown, prompts, scores["total"], base)
        with open(images / f"epoch_{epoch:04d}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["prompt", *scores])
            writer.writerows(zip(prompts, *(v.tolist() for v in scores.values()), strict=True))
        return columns

    def save_weights(self, pipe):
        """The trained weights in diffusers' own format: lora/ (with its alpha), or the denoiser's own folder."""
        trained = denoisers(pipe)
        states = {name: whole_state(module) for name, module in trained.items() if isinstance(module, FSDPModule)}
        if rank():
            return
        if self.args.finetune_type == "full":
            for name, module in trained.items():
                with whole(self.folder / name, replace=True) as folder, ExitStack() as stack:
                    if name in states:
                        module.state_dict = lambda name=name: states[name]
                        stack.callback(delattr, module, "state_dict")
                    module.save_pretrained(folder)
            with whole(self.folder / "scheduler", replace=True) as folder:
                pipe.scheduler.save_pretrained(folder)
            return
        saves = inspect.signature(pipe.save_lora_weights).parameters if hasattr(pipe, "save_lora_weights") else {}
        layers = {}
        with whole(self.folder / "lora", replace=True) as folder:
            for name, module in trained.items():
                if f"{name}_lora_layers" in saves:
                    layers[f"{name}_lora_layers"] = peft.get_peft_model_state_dict(module)
                    # without its metadata a LoRA is loaded again with another alpha
                    layers[f"{name}_lora_adapter_metadata"] = module.peft_config["default"].to_dict()
                else:  # load it with pipe.<name>.load_lora_adapter(folder, prefix=None, use_safetensors=True)
                    module.save_lora_adapter(folder / name)
            if layers:
                pipe.save_lora_weights(folder, **layers)


def whole_state(module):
    """The state of a sharded network, put together on the CPU of the first process; nothing in the others."""
    state = {}
    for name, value in module.state_dict().items():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        if rank() == 0:
            state[name] = value.cpu()
    return state


def print_plan(run, args, parameters, trained_steps, networks, most_steps=None):
    """What will happen, before it does. networks: evaluations per image and trained step, of policy and references.

    most_steps: sampling steps of an image, at most; None is exactly train.num_inference_steps.
    """
    train = args.train
    images = train.unique_sample_num_per_epoch * train.group_size
    calls = images // train.per_device_batch_size
    by = f" by {world()} processes" if world() > 1 else ""
    updates = train.gradient_step_per_epoch * train.num_inner_epochs
    forwards = images * (most_steps or train.num_inference_steps)
    replays = images * trained_steps * train.num_inner_epochs * networks
    run.print(
        f"training {sum(p.numel() for p in parameters):,} parameters ({args.finetune_type}) of {args.model}\n"
        f"an epoch: {_count(train.unique_sample_num_per_epoch, 'prompt')} x {train.group_size} = {images} images in "
        f"{_count(calls, 'call')} of {train.per_device_batch_size}{by}; {_count(updates, 'update')} over "
        f"{_count(trained_steps, 'step')}{' each' if updates > 1 else ''};\n"
        f"          {'at most ' if most_steps else ''}{forwards:,} network evaluations to sample, {replays:,} to train"
        f"{' (true classifier-free guidance doubles both)' if train.guidance_scale > 1 else ''}"
    )


def _count(number, what):
    return f"{number} {what}{'' if number == 1 else 's'}"


CONSOLE = ("reward/total", "zero_std", "group_spread", "kl", "clip_fraction", "v_old_distance", "v_ref_distance")


def _console_line(row):
    shown = {key: row[f"train/{key}"] for key in CONSOLE if f"train/{key}" in row}
    shown |= {k: value for k, value in row.items() if k.startswith("eval/") and not k.startswith("eval/image/")}
    values = "  ".join(f"{key} {value:.3g}" for key, value in shown.items())
    return f"epoch {row['epoch']:4d}  images {row['images']:7d}  {row['seconds']:6.0f} s  {values}"


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


def came_to_nothing(folder):
    """Whether a run folder holds no rows, images, weights or checkpoints: that of a start that was refused."""
    made = {path.name for path in (*folder.glob("*/"), *folder.glob("images/*"), *folder.glob("metrics.csv"))}
    return (folder / "environment.yaml").is_file() and made <= {"images", "wandb"}


def _settings(args):
    """The arguments as args.yaml has them: those that repeat the run, not those that name it."""
    settings = dataclasses.asdict(args) | {"run_name": None, "config": None, "resume": None}
    settings["prompts"], settings["eval"]["prompts"] = _absolute(args.prompts), _absolute(args.eval.prompts)
    if Path(args.model).is_dir():  # or else a hub id
        settings["model"] = _absolute(args.model)
    return _plain(settings)


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


def _absolute(path):
    return None if path is None else str(Path(path).resolve())


def _plain(settings):
    if isinstance(settings, dict):
        return {key: _plain(value) for key, value in settings.items()}
    return list(settings) if isinstance(settings, tuple) else settings


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
    machine = {"python": platform.python_version(), **versions, "gpu": gpu, "processes": world()}
    files = {"prompts": args.prompts, "eval.prompts": args.eval.prompts, "script": script}
    asked = [name.rpartition(":")[0] for name in {**args.reward, **args.eval.reward}]  # "" of those in rewards.py
    files |= {path: path for path in asked if path}
    files = {key: path and sha256(path) for key, path in files.items()}
    began = {"command": " ".join(sys.argv), "folder": os.getcwd(), "started": time.strftime("%Y%m%d-%H%M%S")}
    return {**began, "commit": commit, **machine, "files": files}


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: what is written is whole or absent, and what was damaged later is found out


def sync(path):
    """Make what was written to a file or folder outlast a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path, text):
    """A text file, in the place of what was there before, whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, newline="")
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def temporary(folder):
    """Where a folder is until it is whole."""
    return folder.with_name(f"{folder.name}.tmp")


@contextmanager
def whole(folder, replace=False):
    """An empty folder to fill, which then becomes `folder`; where that fails nothing of it is left.

    What was there before goes only at the end, and only with `replace`; without, it may be an empty folder.
    """
    new = temporary(folder)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        readers = new.stat().st_mode & 0o444
        for path in (*new.rglob("*"), new):
            path.chmod(path.stat().st_mode | readers)  # safetensors are the owner's alone
            sync(path)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if replace:
        shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
    sync(folder.parent)


def sha256(path):
    """The checksum of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(parameters):
    """The sum of all bits of float32 parameters as integers, on their own device; 0 of sharded ones."""
    sums = [p.detach().view(torch.int32).sum() for p in parameters if not isinstance(p, DTensor)]
    return torch.stack(sums).sum().item() if sums else 0


def checkpoints(run_folder):
    """The checkpoints of a run, oldest first; one that is being written or removed has a suffix and is none."""
    folders = [path for path in (run_folder / "checkpoints").glob("epoch_*") if not path.suffix]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("epoch_")))


def damage(checkpoint):
    """What is wrong with a checkpoint, by its checksums; None if nothing is."""
    try:
        lines = (checkpoint / "SHA256SUMS").read_text().splitlines()
        sums = {name: digits for digits, name in (line.split("  ") for line in lines)}
        for name in {path.name for path in checkpoint.iterdir()} - {"SHA256SUMS"} | sums.keys() | {"state.json"}:
            if sha256(checkpoint / name) != sums[name]:
                return f"{name} does not have its checksum"
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"


def newest_checkpoint(run):
    """The newest checkpoint of a run that is whole, or None if no epoch was finished; newer ones are set aside."""
    for left in (run.folder / "checkpoints").glob("*.tmp"):  # by a process that was killed, maybe after it was whole
        if damage(left):
            shutil.rmtree(left)
        else:
            shutil.rmtree(left.with_suffix(""), ignore_errors=True)
            left.rename(left.with_suffix(""))
    damaged = {}
    for checkpoint in reversed(checkpoints(run.folder)):
        if reason := damage(checkpoint):
            damaged[checkpoint] = reason
            continue
        for bad, reason in damaged.items():
            aside = bad.with_suffix(".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            bad.rename(aside)
            run.print(f"{bad} is damaged ({reason}), now {aside.name}; {checkpoint.name} is used")
        return checkpoint
    table = run.folder / "metrics.csv"
    if damaged or (table.is_file() and len(table.read_text().splitlines()) > 2):  # more than epoch 0
        found = "; ".join(f"{bad.name}: {reason}" for bad, reason in damaged.items()) or "there is none"
        refuse("resume", str(run.folder), f"has no checkpoint that is whole ({found})")


class Checkpoint:
    """All that decides how a run goes on, in a folder checkpoints/epoch_NNNN of the run folder.

    tensors.safetensors has whole tensors by parameter name: parameters/NAME, <snapshot>/NAME and optimizer/NAME/KEY;
    state.json has the numbers, the rows of metrics.csv among them; SHA256SUMS is theirs. Noise and prompts come from
    (seed, epoch, prompt, member), so an epoch is repeated exactly, by any number of processes; the states of the
    random generators of each process are kept for rewards that draw from them.

    With --shard each process writes and reads its shards (torch.distributed.checkpoint, under the same names), again
    for any number of processes; the first one renames the folder when all that is in it has its checksum.
    """

    def __init__(self, run, named, optimizer, **snapshots):
        """named: {name: parameter}, in the optimizer's order; snapshots: Snapshots of the same parameters, or None."""
        self.run, self.named, self.optimizer = run, named, optimizer
        self.snapshots = {name: snapshot for name, snapshot in snapshots.items() if snapshot}

    def _sets(self):
        """{name of a set: its tensors, in the order of the parameters}."""
        own = [p.detach() for p in self.named.values()]
        return {"parameters": own, **{name: snapshot.values for name, snapshot in self.snapshots.items()}}

    def save(self, epoch, updates):
        """At the end of an epoch: write what is due, and end the run if it was asked to or cannot learn any more."""
        run = self.run
        last = epoch >= run.args.train.max_epochs
        broken = run.in_a_row >= MOST_SKIPPED
        interrupted = max(gather(run.interrupted or 0))  # in any process
        if len(set(gather(checksum(self.named.values())))) > 1:
            raise RunError("the processes have come to different parameters; is the hardware sound?")
        if last or broken or interrupted or epoch % run.args.checkpoint_freq == 0:
            self._write(epoch, updates)
        run.in_loop = not last
        if broken:
            raise RunError(
                f"{run.in_a_row} updates in a row were skipped, the last because {run.culprit} is not finite"
            )
        if interrupted and not last:
            name = signal.Signals(interrupted).name
            run.print(f"{name}: epoch {epoch} is finished and saved; continue with: {run.command}")
            raise SystemExit(128 + interrupted)

    def _write(self, epoch, updates):
        run = self.run
        tensors = {f"{of}/{name}": t for of, ts in self._sets().items() for name, t in zip(self.named, ts, strict=True)}
        for name, p in self.named.items():
            tensors |= {f"optimizer/{name}/{key}": t for key, t in self.optimizer.state.get(p, {}).items()}
        state = {
            **{"epoch": epoch, "updates": updates, "seconds": time.time() - run.started, "rows": run.rows},
            "in_a_row": run.in_a_row if run.in_a_row < MOST_SKIPPED else 0,
            "random": gather(_random_states()),
        }
        if rank() and not run.args.shard:
            return
        folder = run.folder / "checkpoints" / f"epoch_{epoch:04d}"
        with nullcontext(temporary(folder)) if rank() else whole(folder, replace=True) as new:
            if run.args.shard:
                gather("the folder is there")
                with _unwrapped():
                    dcp.save(tensors, checkpoint_id=new)
            else:
                save_file({name: t.contiguous() for name, t in tensors.items()}, new / "tensors.safetensors")
            if rank():
                return
            (new / "state.json").write_text(json.dumps(state))
            sums = "".join(f"{sha256(path)}  {path.name}\n" for path in sorted(new.iterdir()))
            (new / "SHA256SUMS").write_text(sums)
        for old in checkpoints(run.folder)[: -run.args.keep_checkpoints]:
            shutil.rmtree(old.rename(old.with_suffix(".tmp")))

    def load(self, evaluate):
        """Take up a resumed run where its newest checkpoint is. Returns (the epoch to begin with, updates done).

        evaluate(epoch) -> its columns of metrics.csv: for a run that is to end at the epoch where it was stopped.
        """
        run = self.run
        run.in_loop = True
        if run.checkpoint is None:
            if run.args.resume:
                run.print("no epoch was finished; beginning again")
            random.seed(run.args.train.seed)  # torch's generator was seeded for the adapters
            np.random.seed(run.args.train.seed)
            return 0, 0
        tensors = self._read_shards() if run.args.shard else load_file(run.checkpoint / "tensors.safetensors")
        state = json.loads((run.checkpoint / "state.json").read_text())
        for of, own in self._sets().items():
            for name, tensor in zip(self.named, own, strict=True):
                saved = tensors.get(f"{of}/{name}")
                if saved is None or saved.shape != tensor.shape:
                    raise RunError(f"{name} is not as in {run.checkpoint}; is {run.args.model} the model that it was?")
                tensor.copy_(saved)
        optimizer = self.optimizer.state_dict()
        for i, name in enumerate(self.named):
            own = f"optimizer/{name}/"
            optimizer["state"][i] = {key.removeprefix(own): t for key, t in tensors.items() if key.startswith(own)}
        self.optimizer.load_state_dict(optimizer)
        _set_random_states(state["random"][rank() % len(state["random"])])
        run.rows, run.in_a_row, run.started = state["rows"], state["in_a_row"], time.time() - state["seconds"]
        if rank() == 0:
            run.write_metrics()
        epochs = run.args.train.max_epochs
        done = f"; all {epochs} are, and a larger --train.max-epochs adds more" if state["epoch"] >= epochs else ""
        run.print(f"resumed: epochs up to {state['epoch']} are done{done}")
        if state["epoch"] == epochs and "eval/total" not in run.rows[-1]:
            row = run.rows.pop()
            run.skipped, _ = row.pop("train/skipped"), row.pop("seconds")
            run.log(row | evaluate(epochs))
            self.save(epochs, state["updates"])
        return state["epoch"] + 1, state["updates"]

    def _read_shards(self):
        """This process's shard of each tensor in the checkpoint that is as those of this run."""
        saved = dcp.FileSystemReader(self.run.checkpoint).read_metadata().state_dict_metadata
        like = {f"{of}/{name}": t for of, ts in self._sets().items() for name, t in zip(self.named, ts, strict=True)}
        for key in saved:
            of, _, name = key.partition("/")
            if of == "optimizer":
                name, _, kind = name.rpartition("/")
                like[key] = torch.zeros(()) if kind == "step" else self.named[name].detach()
        tensors = {key: torch.zeros_like(t) for key, t in like.items() if key in saved and saved[key].size == t.shape}
        with _unwrapped():
            dcp.load(tensors, checkpoint_id=self.run.checkpoint)
        return tensors


@contextmanager
def _unwrapped():
    """Raise what went wrong in a process as it was there."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def _random_states():
    """Those of the generators of Python, numpy and torch."""
    algorithm, key, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None
    own = {"python": random.getstate(), "numpy": [algorithm, key.tolist(), *rest]}
    return own | {"torch": torch.get_rng_state().tolist(), "cuda": cuda}


def _set_random_states(states):
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(states["numpy"])
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    if torch.cuda.is_available() and states["cuda"]:
        torch.cuda.set_rng_state(torch.tensor(states["cuda"], dtype=torch.uint8))


# ---------------------------------------------------------------------------------------------------------------------
# Ending early: with a line, with a status, and with what continues the run

SIGNALS = (signal.SIGINT, signal.SIGTERM)
MOST_SKIPPED = 5  # updates in a row
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


class RunError(SystemExit):
    """Ends a run that has begun with one line."""

    def __init__(self, message):
        then = f"; continue with: {Run.current.command}" if Run.current else ""
        super().__init__(f"error: {message}{then}")


def start(main):
    """Run a script; what ends it early ends it with a line that says how to go on.

    On Ctrl-C or SIGTERM the epoch in hand is finished, its row logged and a checkpoint saved, so that nothing is lost;
    the exit status is 130 or 143. A second signal ends the process at once; that loses the epoch in hand, which is
    repeated exactly on --resume.
    """
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    with processes():
        try:
            main()
        except Exception as error:
            if Run.current is None:
                raise
            if isinstance(error, torch.OutOfMemoryError):
                raise RunError(_out_of_memory(error, Run.current.args)) from error
            if isinstance(error, SafetensorError) or getattr(error, "errno", None) in NO_ROOM:
                raise RunError(
                    f"cannot write in {Run.current.folder}, where older checkpoints are whole: {error}"
                ) from error
            if _of_the_call(error, Run.current):
                path = Run.current.folder / "log.txt"
                with suppress(OSError), open(path, "a") as log:
                    traceback.print_exception(error, file=log)
                what = textwrap.shorten(f"{type(error).__name__}: {error}", 500)
                remedy = f"the pipeline fails on what it is given: {what} (in full: {path})"
                refuse("call", Run.current.args.call, remedy)
            error.add_note(f"continue with: {Run.current.command}")
            raise


def _of_the_call(error, run):
    """Whether an error says that the pipeline cannot do what it was called with.

    So it is where the pipeline's own check says so; and where anything goes wrong within a pipeline that was given more
    than the model's own --call, as long as nothing was trained.
    """
    *_, (last, _) = frames = [*traceback.walk_tb(error.__traceback__)]
    if isinstance(error, ValueError) and last.f_code.co_name == "check_inputs":
        return True
    given = run.args.call and _said_by.get("call") != str(Path(run.args.model) / "defaults.yaml")
    calls = [frame for frame, _ in frames if frame.f_code.co_name == "__call__"]
    within = any(isinstance(frame.f_locals.get("self"), DiffusionPipeline) for frame in calls)
    return given and within and len(run.rows) < 2  # that of epoch 0


@contextmanager
def _heard():
    """Around what prints: where nobody reads it any more, as after `| head`, the script ends; a run says so."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # not at the interpreter's end
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left
        if Run.current:
            raise RunError("nobody reads the output any more") from None
        raise SystemExit(128 + signal.SIGPIPE) from None


def _interrupt(number, frame):
    for each in SIGNALS:
        signal.signal(each, signal.SIG_DFL)
    run, name = Run.current, signal.Signals(number).name
    going_on = run is not None and run.in_loop
    line = "finishing and saving the epoch in hand; once more ends at once" if going_on else "ended before training"
    then = f"; continue with: {run.command}" if run else ""
    if rank() == 0:
        os.write(2, f"{name}: {line}{then}\n".encode())  # not print, which this may have interrupted
    if not going_on:
        raise SystemExit(128 + number)
    run.interrupted = number


def _out_of_memory(error, args):
    """What happened, and what would help: first what --resume allows, then what makes another run."""
    train = args.train
    free = {
        "--train.enable-gradient-checkpointing": not train.enable_gradient_checkpointing,
        "--train.ref-param-device cpu": train.ref_param_device != "cpu",
        "--offload": not args.offload,
    }
    other = {
        f"a smaller --train.per-device-batch-size (now {train.per_device_batch_size})": True,
        f"--eval.per-device-batch-size ({args.eval.per_device_batch_size})": True,
        f"--train.resolution ({train.resolution})": True,
        "--finetune-type lora": args.finetune_type == "full",
        "--dtype bfloat16": args.dtype == "float32",
    }
    free, other = (", ".join(option for option, would in options.items() if would) for options in (free, other))
    resumable = f"adding {free} on resume would help; " if free else ""
    what = str(error).partition(". GPU ")[0]
    return f"out of GPU memory ({what}): {resumable}or a new run with {other}"
