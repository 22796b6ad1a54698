"""Everything that is not the algorithm: arguments, the pipeline and its tape, parameter snapshots, prompts,
evaluation and the run folder.

The pipeline is the model adapter. `rollout` calls any diffusers flow pipeline as a user would, with a scheduler whose
`step()` runs `dynamics.step` and writes down what happened. `replay` repeats that very call up to one step and lets
the pipeline run that step again, now with gradients, so packing, guidance and sign conventions are those of inference
and the ratio before the first update is exactly 1. There is no code for any one model in here.
"""

import argparse
import csv
import dataclasses
import difflib
import functools
import importlib.util
import inspect
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NoReturn, Optional, Union

import diffusers
import numpy as np
import peft
import torch
import transformers
import tyro
import yaml
from diffusers import ConfigMixin, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from PIL import Image, ImageDraw
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

import dynamics

HERE = Path(__file__).resolve().parent
Resolution = Union[int, tuple[int, int]]

# ---------------------------------------------------------------------------------------------------------------------
# Arguments: the script's dataclass < the model folder's defaults.yaml < --config < the command line


def _pairs(value_type):
    """`--flag name=value name=value` as a dict; the values are read as YAML."""

    def parse(tokens):
        pairs = {}
        for token in tokens:
            name, equals, value = token.rpartition("=") if value_type is float else token.partition("=")
            if not equals:
                raise ValueError(f"{token!r} is not of the form NAME=VALUE")
            if name in pairs:
                raise ValueError(f"{name!r} is given twice")
            try:
                pairs[name] = float(value) if value_type is float else yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise ValueError(f"the value of {token!r} is not YAML: {error}") from error
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
    """Images made of each evaluation prompt."""
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
    lora_alpha: float = 64
    """Scale of the adapters: they add alpha / rank times their product."""
    target_modules: tuple[str, ...] = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    )  # fmt: skip
    """Names of the linear layers that get adapters: the attention projections, or all-linear."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the frozen weights and the arithmetic. Trained parameters are always float32."""
    device: str = "auto"
    """A torch device; auto takes the GPU if there is one."""
    cpu_threads: Optional[int] = None
    """Threads of torch on the CPU; None leaves the choice to torch. Another number can change the last digits."""
    prompts: Optional[str] = None
    """Text file of training prompts, one a line."""
    reward: Annotated[dict, _pairs(float)] = field(default_factory=dict)
    """Weighted rewards, in the place of the model's own, e.g. jpeg_compressibility=0.1 my_rewards.py:brightness=1."""
    output_dir: str = "runs"
    """Where the run folder is made."""
    run_name: Optional[str] = None
    """Name of the run folder; the script's name and the time by default."""
    track: bool = False
    """Log to Weights & Biases."""
    tensorboard: bool = False
    """Log to TensorBoard, in the run folder."""


_said_by = {}  # {dotted key: the file that set it}, so that a refusal can name it


def refuse(key, value, remedy) -> NoReturn:
    """End the program with one readable message and exit status 2."""
    file = f" (from {_said_by[key]})" if key in _said_by else ""
    print(f"error: {key} = {value!r}{file}: {remedy}", file=sys.stderr)
    raise SystemExit(2)


def parse_args(Args, description, argv=None):
    """Read an instance of the dataclass Args from its four layers.

    Returns (args, sources): sources maps a dotted key to (value, where it came from) for all that is not the script's.
    Ends with exit status 2 and a message at an unknown key, a value of a wrong type or a missing file.
    """
    argv = sys.argv[1:] if argv is None else argv
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--model", default=None)
    files.add_argument("--config", default=None)
    known, _ = files.parse_known_args(argv)
    args = Args()
    trainer = args.train.trainer_type

    config = _read_yaml("config", known.config, trainer, Args) if known.config else {}
    model = Path(str(known.model or config.get("model") or args.model))
    defaults = {}
    if (model / "defaults.yaml").is_file():
        defaults = _read_yaml("model", model / "defaults.yaml", trainer, Args)
        for section in (defaults, defaults.get("eval", {})):
            if section.get("prompts"):  # a model folder names files beside itself
                section["prompts"] = os.path.relpath(model / section["prompts"])

    sources = {}
    _said_by.clear()
    layers = [
        (f"{model / 'defaults.yaml'}", _tokens(defaults)),
        (known.config, _tokens(config)),
        ("the command line", argv),
    ]
    for source, tokens in layers:
        before = _flatten(args)
        if source != layers[-1][0] and not tokens:
            continue
        try:
            args = tyro.cli(Args, description=description, args=tokens, default=args)
        except SystemExit as exit:
            if exit.code and source != layers[-1][0]:
                print(f"error: the box above is about {source}", file=sys.stderr)
            raise
        args.call = {**before["call"], **args.call}
        sources |= {key: (value, source) for key, value in _flatten(args).items() if value != before[key]}
    _said_by.update({key: source for key, (_, source) in sources.items() if source != layers[-1][0]})
    return args, sources


def _read_yaml(key, path, trainer, Args):
    """The settings of a YAML file, with what it says under `trainers` for this trainer folded in."""
    if not Path(path).is_file():
        refuse(f"--{key}", str(path), "no such file")
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
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
        script = {"grpo": "grpo.py", "grpo-guard": "grpo_guard.py", "nft": "nft.py"}.get(named, "another script")
        refuse("train.trainer_type", named, f"{path} is for {script}; this script is the trainer {trainer!r}")
    _check_keys(settings, Args, path)
    return settings


def _check_keys(settings, cls, path, prefix=""):
    types = {f.name: f.type for f in dataclasses.fields(cls)}
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if name not in types:
            near = difflib.get_close_matches(str(name), types, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(types)}"
            refuse(key, value, f"unknown key in {path}; {hint}")
        if dataclasses.is_dataclass(types[name]):
            if not isinstance(value, dict):
                refuse(key, value, f"in {path} should be a mapping of keys to values")
            _check_keys(value, types[name], path, f"{key}.")


def _tokens(settings, prefix=""):
    """The command line that says what a nested mapping says, so that one parser checks every layer."""
    tokens = []
    for name, value in settings.items():
        flag = f"--{prefix}{name}".replace("_", "-")
        if isinstance(value, dict) and name not in ("call", "reward"):
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
    1: "cpu_threads lora_rank train.num_inference_steps train.per_device_batch_size train.unique_sample_num_per_epoch "
    "train.num_inner_epochs train.ema_update_interval eval.num_inference_steps eval.per_device_batch_size "
    "eval.images_per_prompt eval.eval_freq",
    0: "train.max_epochs train.learning_rate train.kl_beta train.ema_decay train.guidance_scale train.adam_epsilon "
    "train.adam_weight_decay train.seed train.old_decay_start train.old_decay_slope eval.guidance_scale eval.seed",
}
ABOVE_0 = "lora_alpha train.clip_range train.adv_clip_range train.max_grad_norm"
OF_THE_CALL = (
    *("prompt", "height", "width", "num_inference_steps", "guidance_scale", "generator", "latents"),
    *("num_images_per_prompt", "output_type", "return_dict"),
)


def check_args(args):
    """Refuse what no script can run: before any weights are loaded, with the key, the value and what would do.

    Returns all prompts of the run, those of training and of evaluation.
    """
    flat = _flatten(args)
    for key, value in {**flat, **{f"reward {name}": weight for name, weight in args.reward.items()}}.items():
        if isinstance(value, float) and not np.isfinite(value):
            refuse(key, value, "must be a finite number")
    for least, keys in AT_LEAST.items():
        for key in keys.split():
            if flat.get(key) is not None and flat[key] < least:
                refuse(key, flat[key], f"must be at least {least}")
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
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        refuse("WORLD_SIZE", os.environ["WORLD_SIZE"], "the scripts run in one process; start them without torchrun")

    images = args.train.unique_sample_num_per_epoch * args.train.group_size
    batch, updates = args.train.per_device_batch_size, args.train.gradient_step_per_epoch
    if images % batch:
        good = [b for b in range(1, images + 1) if images % b == 0]
        nearest = min(good, key=lambda b: abs(b - batch))
        refuse(
            "train.per_device_batch_size", batch,
            f"does not divide the {images} images of an epoch (unique_sample_num_per_epoch x group_size); "
            f"{nearest} would",
        )  # fmt: skip
    if updates < 1 or (images // batch) % updates:
        good = [u for u in range(1, images // batch + 1) if (images // batch) % u == 0]
        refuse(
            "train.gradient_step_per_epoch", updates,
            f"does not divide the {images // batch} pipeline calls of an epoch; one of {good} would, "
            f"or another train.per_device_batch_size",
        )  # fmt: skip

    if args.device != "auto":
        try:
            torch.empty(0, device=args.device)
        except (RuntimeError, AssertionError) as error:
            refuse("device", args.device, str(error).splitlines()[0])
    for key, package in (("track", "wandb"), ("tensorboard", "tensorboard")):
        if getattr(args, key) and importlib.util.find_spec(package) is None:
            refuse(key, True, f"needs the package {package}: pip install {package}")
    name = args.run_name
    if name is not None and (name in ("", ".", "..") or Path(name).name != name):
        refuse("run_name", name, "must be the name of a folder, without a path")
    folder = Path(args.output_dir) / (name or "")
    if name and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        refuse("run_name", name, f"{folder} already holds a run; choose another name or remove it")
    check_model(args)
    if not args.prompts:
        refuse("prompts", args.prompts, "name a text file of training prompts, one a line")
    return read_prompts(args.prompts) + (read_prompts(args.eval.prompts, "eval.prompts") if args.eval.prompts else [])


def check_model(args):
    """Refuse a model that is missing or no rectified flow, or a resolution that it cannot take; loads no weights."""
    try:
        index = DiffusionPipeline.load_config(args.model)
    except Exception as error:  # the hub client raises many kinds
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
    if pipeline is not None:
        takes = inspect.signature(pipeline.__call__).parameters
        for key in args.call:
            if key not in takes:
                near = difflib.get_close_matches(key, takes, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                refuse("call", key, f"{pipeline.__name__} takes no such argument{hint}")

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
    """The torch device of --device, made ready; auto is the GPU if there is one."""
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
    if args.cpu_threads:
        torch.set_num_threads(args.cpu_threads)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # float32 models use the tensor cores
    return device


def load_pipeline(model, device, dtype) -> DiffusionPipeline:
    """Load a diffusers folder or hub id, frozen, on a device and in a dtype.

    Components that model_index.json holds as null are passed as None, the idiom by which SD3's T5 is left out.
    """
    index = DiffusionPipeline.load_config(model)
    absent = {name: None for name, spec in index.items() if isinstance(spec, (list, tuple)) and spec[0] is None}
    with _quiet():
        pipe = DiffusionPipeline.from_pretrained(model, dtype=dtype, **absent).to(device)
    use_flow_matching(pipe)
    pipe.set_progress_bar_config(disable=True)
    for module in _modules(pipe):
        module.requires_grad_(False)
    return pipe


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
    named = {f"{name}.{key}": p for name, module in denoisers(pipe).items() for key, p in module.named_parameters()}
    named = {name: p for name, p in named.items() if p.requires_grad}
    for parameter in named.values():
        parameter.data = parameter.data.float()
    return named


def denoisers(pipe):
    """{name: network} of those that predict the velocity; some pipelines have two, for high and for low noise."""
    return {name: m for name, m in pipe.components.items() if name.startswith("transformer") and m is not None}


def _modules(pipe):
    return [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]


def autocast(pipe):
    """The arithmetic of the pipeline: autocast where float32 parameters are trained in a half-precision model."""
    half = {p.dtype for m in _modules(pipe) for p in m.parameters()} & {torch.bfloat16, torch.float16}
    full = any(p.requires_grad and p.dtype == torch.float32 for m in denoisers(pipe).values() for p in m.parameters())
    return torch.autocast(pipe.device.type, dtype=half.pop()) if half and full else nullcontext()


# ---------------------------------------------------------------------------------------------------------------------
# The tape


@dataclass
class Transition:
    """One stochastic step of a rollout; tensors as in dynamics.Step, and detached."""

    x: torch.Tensor
    x_next: torch.Tensor
    log_prob: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    velocity: torch.Tensor


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
    """{method: [returned]} of the pipeline's encode_, prepare_ and generate_ methods."""
    outputs: dict = field(default_factory=lambda: defaultdict(list))
    """{k: [output]} of the denoiser in step k: tensors without storage, or with it if the guidance remembers them."""


def rollout(pipe, call, dynamics_type, noise_level, sde_steps, generator=None, tail_steps=None) -> Rollout:
    """Sample images with `pipe(**call)`, stochastically in sde_steps and by the pipeline's own ODE elsewhere.

    call: keyword arguments of the pipeline; its `generator` draws the initial noise.
    sde_steps: indices k, 0-based, whose step is `dynamics.step(dynamics_type, ..., noise_level)`.
    generator: of the noise of those steps, one torch.Generator or a list of one per image; also of the initial noise
        if the call names none.
    tail_steps: take what is left after the last of sde_steps (everything, if there are none) by `dynamics.dpm_step`, in
        at most so many steps, evenly over that part of the schedule. None leaves it to the pipeline.
    """
    call = {"generator": generator, **call, "output_type": "pt", "return_dict": False}
    tape = Rollout(call=call, dynamics_type=dynamics_type, noise_level=noise_level)
    tape.tail_start, tape.tail_steps = max(sde_steps, default=-1) + 1, tail_steps
    # guidance that is an object may have momentum: step k then depends on what the denoiser said before
    whole = any(isinstance(component, diffusers.guiders.BaseGuidance) for component in pipe.components.values())
    recorder = _Recorder(tape, sde_steps, generator, whole)
    with torch.no_grad(), autocast(pipe), _taped(pipe, recorder):
        tape.images = pipe(**_copy(call))[0]
    return tape


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
        again["latents"] = player.x.to(rollout.noise, copy=True)
    with autocast(pipe), _taped(pipe, player), suppress(_Arrived):
        call(pipe, **again)
    velocity = player.velocity
    if x is not None or k not in rollout.steps:
        return velocity, None
    taken = rollout.steps[k]
    return velocity, _step(rollout, velocity, taken.x, k, x_next=taken.x_next)


def _step(rollout, velocity, x, k, **how):
    sigmas = rollout.sigmas.tolist()
    return dynamics.step(
        rollout.dynamics_type, velocity, x, sigmas[k], sigmas[k + 1], rollout.noise_level, sigma_second=sigmas[1], **how
    )


class _Recorder:
    """Lets everything happen and writes it down."""

    def __init__(self, tape, sde_steps, generator, whole):
        self.tape, self.sde_steps, self.generator = tape, set(sde_steps), generator
        self.k = 0  # the step under way
        self.inside = False  # a recorded method may call another
        self.whole = whole  # keep the denoiser's outputs, not only their shapes
        self.x0 = None  # of the step before, in the tail

    def method(self, name, method, *args, **kwargs):
        if self.inside:
            return method(*args, **kwargs)
        self.inside = True
        try:
            answer = method(*args, **kwargs)
        finally:
            self.inside = False
        self.tape.answers[name].append(_copy(answer))
        return answer

    def denoiser(self, forward, *args, **kwargs):
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
            tape.sigmas = _noise_levels(scheduler)
        if k in self.sde_steps:
            x, velocity = sample.detach().clone(), -output if inverted else output
            taken = _step(tape, velocity, x, k, generator=self.generator)
            if taken.x_next.dtype != output.dtype:  # pass on the dtype that diffusers passes on, and score that
                taken = _step(tape, velocity, x, k, x_next=taken.x_next.to(output.dtype))
            tape.steps[k] = Transition(x, taken.x_next, taken.log_prob, taken.mean, taken.std, velocity.detach())
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

    def method(self, name, method, *args, **kwargs):
        answer = _copy(next(self.answers[name]))
        if self.target == 0 and name.startswith("prepare_"):
            answer = tree_map_only(torch.Tensor, lambda t: self._initial(t), answer)
        return answer

    def _initial(self, tensor):
        """The given x in the place of the initial latents."""
        noise = self.tape.noise
        same = tensor.shape == noise.shape and torch.equal(tensor.to(noise), noise)
        return self.x.to(tensor, copy=True) if same else tensor

    def denoiser(self, forward, *args, **kwargs):
        if self.k == self.target:
            return forward(*args, **kwargs)
        device = self.x.device
        return tree_map_only(
            torch.Tensor, lambda t: torch.zeros_like(t, device=device) if t.is_meta else t.clone(), next(self.outputs)
        )

    def step(self, scheduler, output, timestep, sample):
        if self.k == self.target:
            off = (sample - self.x.to(sample)).abs().max()
            recorded = self.target in self.tape.steps and self.x is self.tape.steps[self.target].x
            if off > (0 if recorded else 2**-8 * self.x.abs().max()):  # others may be rounded to the model's dtype
                raise NotImplementedError("this pipeline changes its latents between two steps; cannot replay there")
            self.velocity = -output if scheduler.config.invert_sigmas else output
            raise _Arrived
        self.k += 1
        return self.x.to(self.tape.x0, copy=True)


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
        cls.set_timesteps(self, *args, **kwargs)
        _regrid_tail(self, self.listener.tape)

    members = {"step": step, "scale_model_input": scale_model_input, "set_timesteps": set_timesteps}
    return type(cls.__name__, (cls,), members | {"__module__": cls.__module__})


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
        kinds = [(denoiser, _listening) for denoiser in denoisers(pipe).values()] + [(pipe.scheduler, _stepping)]
        for component, kind in kinds:
            stack.callback(setattr, component, "__class__", type(component))
            component.__class__ = kind(type(component))
            component.listener = listener
            stack.callback(delattr, component, "listener")
        yield


@functools.cache
def _listening(cls):
    """A subclass whose calls go through a listener, outside all hooks: a skipped sharded model gathers nothing."""

    def call(self, *args, **kwargs):
        return self.listener.denoiser(functools.partial(cls.__call__, self), *args, **kwargs)

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})


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
    """A copy of parameters, on their own device or another, that can take their place for a while."""

    def __init__(self, parameters, device=None):
        self.parameters = list(parameters)
        self.values = [p.detach().to(device or p.device, copy=True) for p in self.parameters]

    @contextmanager
    def loaded(self):
        """Within it the parameters have the snapshot's values; afterwards always their own again."""
        own = [p.data for p in self.parameters]
        try:
            for p, value in zip(self.parameters, self.values, strict=True):
                p.data = value.to(p.device)
            yield
        finally:
            for p, data in zip(self.parameters, own, strict=True):
                p.data = data

    @torch.no_grad()
    def update(self, decay):
        """values <- decay * values + (1 - decay) * parameters."""
        for value, p in zip(self.values, self.parameters, strict=True):
            value.lerp_(p.detach().to(value.device), 1 - decay)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and seeds: all from (seed, epoch, prompt, member), nothing from what was drawn before


def read_prompts(path, key="prompts"):
    """The non-empty lines of a text file."""
    if not Path(path).is_file():
        refuse(key, path, "no such file")
    try:
        prompts = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        refuse(key, path, f"not a UTF-8 text file: {error}")
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


def silent_groups(totals, group_size):
    """Which groups have rewards that are all equal, and so say nothing. totals: (N,); returns (groups,) booleans."""
    groups = totals.reshape(-1, group_size)
    return (groups == groups[:, :1]).all(dim=1)


def group_metrics(rollouts, totals, group_size):
    """What shows a run going wrong before its reward does: silent groups, and images growing alike.

    zero_std: share of groups whose rewards are all equal. contrast: std of the pixels of an image. group_spread: std
    of a pixel over a group, averaged.
    """
    images = torch.cat([tape.images.float() for tape in rollouts])
    groups = images.reshape(-1, group_size, *images.shape[1:])
    return {
        "reward_std": totals.reshape(-1, group_size).std(dim=1, correction=0).mean(),
        "zero_std": silent_groups(totals, group_size).float().mean(),
        "contrast": images.flatten(1).std(dim=1).mean(),
        "group_spread": groups.std(dim=1).mean(),
    }


@torch.no_grad()
def evaluate(pipe, args, prompts, reward):
    """Images of the evaluation prompts under the plain pipeline, and their rewards.

    Returns (images (N, 3, H, W), prompts of length N, {"name": (N,), ..., "total": (N,)}).
    """
    prompts = [prompt for prompt in prompts for _ in range(args.eval.images_per_prompt)]
    noise = generators(*((args.eval.seed, i) for i in range(len(prompts))))
    height, width = size(args.eval.resolution)
    images, rewards = [], defaultdict(list)
    for start in progress(range(0, len(prompts), args.eval.per_device_batch_size), "evaluation"):
        batch = slice(start, start + args.eval.per_device_batch_size)
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
                image = pipe(**_copy({**call, **args.call}), output_type="pt", return_dict=False)[0].float()
        else:
            tail = args.eval.num_inference_steps
            image = rollout(pipe, {**call, **args.call}, "ODE", 0.0, (), tail_steps=tail).images.float()
        for name, value in reward(image, prompts[batch]).items():
            rewards[name].append(value.cpu())
        images.append(image.cpu())
    return torch.cat(images), prompts, {name: torch.cat(values) for name, values in rewards.items()}


def save_grid(path, images, prompts, totals, most=32):
    """A PNG of up to `most` images, evenly taken, with the prompt and the reward under each."""
    chosen = [int(i) for i in np.linspace(0, len(images) - 1, min(most, len(images)))]
    scale = max(1, 128 // images.shape[-1])
    height, width = images.shape[-2] * scale, images.shape[-1] * scale
    columns = min(8, len(chosen))
    rows = -(-len(chosen) // columns)
    sheet = Image.new("RGB", (columns * (width + 8), rows * (height + 44)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, i in enumerate(chosen):
        left, top = place % columns * (width + 8) + 4, place // columns * (height + 44) + 4
        pixels = (images[i].permute(1, 2, 0) * 255).round().clamp(0, 255).byte().numpy()
        sheet.paste(Image.fromarray(pixels).resize((width, height), Image.NEAREST), (left, top))
        draw.text((left, top + height + 2), f"{_wrap(prompts[i], width // 6)}\n{totals[i]:.3g}", fill="black")
    sheet.save(path)


def _wrap(text, width, lines=2):
    out = [""]
    for word in text.split():
        out = out[:-1] + [f"{out[-1]} {word}".strip()] if len(out[-1]) + len(word) < width else out + [word]
    return "\n".join(out[:lines])


def step_optimizer(optimizer, parameters, max_grad_norm):
    """Clip the gradients and take an optimizer step. Returns the norm before clipping; ends the run if not finite."""
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    if not grad_norm.isfinite():
        raise RunError(f"the gradient is {grad_norm.item()}; the weights of the last evaluation are kept")
    optimizer.step()
    optimizer.zero_grad()
    return grad_norm


class RunError(SystemExit):
    """Ends a run that has begun with one line."""

    def __init__(self, message):
        super().__init__(f"error: {message}")


def start(main):
    """Run a script; an interrupt ends it with a line instead of a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; the run folder has the weights and images of the last evaluation", file=sys.stderr)
        raise SystemExit(130) from None


def progress(items, what):
    """A progress bar, on a terminal only."""
    return tqdm(items, desc=what, leave=False, disable=None)


# ---------------------------------------------------------------------------------------------------------------------
# The run folder


class Run:
    """A folder runs/<run_name>/ with all that a run was and did; it is made before the model is loaded."""

    def __init__(self, args, sources, script):
        name = args.run_name or time.strftime(f"{Path(script).stem}-%Y%m%d-%H%M%S")
        self.folder = Path(args.output_dir) / name
        for attempt in range(2, 100):
            if args.run_name or not self.folder.exists():
                break
            self.folder = Path(args.output_dir) / f"{name}-{attempt}"
        try:
            (self.folder / "images").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            refuse("output_dir", args.output_dir, f"cannot make {self.folder}: {error.strerror}")
        self.args, self.rows, self.started = args, [], time.time()
        self.eval_prompts = read_prompts(args.eval.prompts or args.prompts)
        settings = dataclasses.asdict(args) | {"run_name": None, "config": None, "prompts": _absolute(args.prompts)}
        settings["eval"]["prompts"] = _absolute(args.eval.prompts)
        (self.folder / "args.yaml").write_text(yaml.safe_dump(_plain(settings), sort_keys=False))
        (self.folder / "environment.yaml").write_text(yaml.safe_dump(_environment(), sort_keys=False))
        shutil.copy(script, self.folder)
        self.trackers = []
        if args.track:
            import wandb

            wandb.init(project="flow-rl", name=self.folder.name, dir=self.folder, config=settings)
            self.trackers.append(lambda row: wandb.log(row, step=row["epoch"]))
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(self.folder)
            self.trackers.append(lambda row: [board.add_scalar(k, v, row["epoch"]) for k, v in row.items()])
        self.print(f"{Path(script).name} -> {self.folder}")
        for source in dict.fromkeys(source for _, source in sources.values()):
            said = [f"{key} {value}" for key, (value, where) in sources.items() if where == source]
            self.print(f"from {source}: {', '.join(said)}")

    def print(self, line=""):
        """A line on the console and in log.txt."""
        tqdm.write(str(line), file=sys.stdout)
        sys.stdout.flush()
        with open(self.folder / "log.txt", "a") as log:
            log.write(f"{line}\n")

    def log(self, row):
        """One row of metrics.csv ({column: number}), one console line with the most telling of them."""
        seconds = round(time.time() - self.started, 2)
        row = {"epoch": row.pop("epoch"), "images": row.pop("images"), "seconds": seconds} | row
        self.rows.append(row)
        columns = list(dict.fromkeys(key for row in self.rows[::-1] for key in row))
        rank = {"train": 1, "eval": 2}
        columns.sort(key=lambda key: rank.get(key.split("/")[0], 0))
        temporary = self.folder / "metrics.csv.tmp"
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(temporary, self.folder / "metrics.csv")
        for track in self.trackers:
            track(row)
        self.print(_console_line(row))

    def contract(self, what, value, holds):
        """One line of the first-step contract; ends the run if it does not hold."""
        self.print(f"contract: {what}: {value:.6g}{'' if holds else '   BROKEN'}")
        if not holds:
            raise SystemExit(f"error: the first-step contract is broken: {what} is {value:.6g}; nothing was trained")

    def evaluate(self, epoch, pipe, reward):
        """Evaluate, keep the grid and each image's rewards, and return the columns of metrics.csv."""
        images, prompts, rewards = evaluate(pipe, self.args, self.eval_prompts, reward)
        save_grid(self.folder / "images" / f"epoch_{epoch:04d}.png", images, prompts, rewards["total"])
        with open(self.folder / "images" / f"epoch_{epoch:04d}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["prompt", *rewards])
            writer.writerows(zip(prompts, *(v.tolist() for v in rewards.values()), strict=True))
        names = ["total", *(name for name in rewards if name != "total")]
        return {f"eval/{name}": rewards[name].mean().item() for name in names}

    def save_weights(self, pipe):
        """The trained weights in diffusers' own format: lora/ (with its alpha), or the denoiser's own folder."""
        trained = denoisers(pipe)
        if self.args.finetune_type == "full":
            for name, module in trained.items():
                module.save_pretrained(self.folder / name)
            return
        saves = inspect.signature(pipe.save_lora_weights).parameters if hasattr(pipe, "save_lora_weights") else {}
        whole = {}
        for name, module in trained.items():
            if f"{name}_lora_layers" in saves:
                whole[f"{name}_lora_layers"] = peft.get_peft_model_state_dict(module)
                # without its metadata a LoRA is loaded again with another alpha
                whole[f"{name}_lora_adapter_metadata"] = module.peft_config["default"].to_dict()
            else:  # load it with pipe.<name>.load_lora_adapter(folder, prefix=None, use_safetensors=True)
                module.save_lora_adapter(self.folder / "lora" / name)
        if whole:
            pipe.save_lora_weights(self.folder / "lora", **whole)


def print_plan(run, args, parameters, trained_steps, networks, most_steps=None):
    """What will happen, before it does. networks: evaluations per image and trained step, of policy and references.

    most_steps: sampling steps of an image, at most; None is exactly train.num_inference_steps.
    """
    train = args.train
    images = train.unique_sample_num_per_epoch * train.group_size
    calls = images // train.per_device_batch_size
    updates = train.gradient_step_per_epoch * train.num_inner_epochs
    forwards = images * (most_steps or train.num_inference_steps)
    replays = images * trained_steps * train.num_inner_epochs * networks
    run.print(
        f"training {sum(p.numel() for p in parameters):,} parameters ({args.finetune_type}) of {args.model}\n"
        f"an epoch: {train.unique_sample_num_per_epoch} prompts x {train.group_size} = {images} images "
        f"in {calls} calls of {train.per_device_batch_size}; {updates} updates over {trained_steps} steps each;\n"
        f"          {'at most ' if most_steps else ''}{forwards:,} network evaluations to sample, {replays:,} to train"
        f"{' (true classifier-free guidance doubles both)' if train.guidance_scale > 1 else ''}"
    )


CONSOLE = ("reward/total", "zero_std", "group_spread", "kl", "clip_fraction", "v_old_distance", "v_ref_distance")


def _console_line(row):
    shown = {key: row[f"train/{key}"] for key in CONSOLE if f"train/{key}" in row}
    shown |= {key: value for key, value in row.items() if key.startswith("eval/")}
    values = "  ".join(f"{key} {value:.3g}" for key, value in shown.items())
    return f"epoch {row['epoch']:4d}  images {row['images']:7d}  {row['seconds']:6.0f} s  {values}"


def _absolute(path):
    return None if path is None else str(Path(path).resolve())


def _plain(settings):
    if isinstance(settings, dict):
        return {key: _plain(value) for key, value in settings.items()}
    return list(settings) if isinstance(settings, tuple) else settings


def _environment():
    """The command, the versions and the commit of a run."""
    git = functools.partial(subprocess.run, cwd=HERE, capture_output=True, text=True)
    try:
        commit = git(["git", "rev-parse", "HEAD"]).stdout.strip()
        commit += " with uncommitted changes" if git(["git", "status", "--porcelain"]).stdout.strip() else ""
    except OSError:  # no git
        commit = ""
    versions = {m.__name__: str(m.__version__) for m in (torch, diffusers, transformers, peft, np)}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    machine = {"python": platform.python_version(), **versions, "gpu": gpu}
    return {"command": " ".join(sys.argv), "commit": commit, **machine}
