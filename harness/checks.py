"""What relates several settings, and the model that they are for: refused before any weights are loaded."""

import difflib
import importlib.util
import inspect
import itertools
import math
import os
import re
from pathlib import Path

import diffusers
import torch
from diffusers import ConfigMixin, DiffusionPipeline, FlowMatchEulerDiscreteScheduler

import rewards
from common import candidate_steps, height_width
from harness.adapters import saved_file
from harness.console import quiet
from harness.data import check_rows, read_rows
from harness.fields import refuse, refusing
from harness.flow_models import no_rectified_flow
from harness.parallel import world_size
from harness.run import is_unused

MOST_IMAGES = 1_000_000  # of an epoch, or of an evaluation
SET_BY_THE_SCRIPT = (
    *("prompt", "height", "width", "num_inference_steps", "guidance_scale", "generator", "latents"),
    *("num_images_per_prompt", "num_videos_per_prompt", "output_type", "return_dict"),
    *("prompt_2", "prompt_3", "prompt_4"),  # of each prompt, which they are by default
)
"""Arguments of the pipeline that --call cannot set."""


def check_args(args):
    """Refuse what no script can run, with the key, the value and what would do. Loads no weights."""
    check_steps(args.train)
    check_call(args)
    check_batches(args)
    check_machine(args)
    check_run_folder(args)
    takes = ()
    try:
        takes = check_model(args)
    except (AttributeError, LookupError, TypeError) as error:  # in what should be mappings and lists
        reason = f"its model_index.json, or a config.json in it, is not diffusers' ({type(error).__name__}: {error})"
        refuse("model", args.model, reason)
    check_prompts_and_rewards(args, takes)


def check_steps(train):
    """Refuse candidates and numbers of trained steps that the schedule does not have."""
    steps, last = candidate_steps(train), train.num_inference_steps - 1
    if train.train_steps is None and not steps:
        refuse("train.num_inference_steps", 1, "train.train_steps = None is all but the last step, so none; take more")
    if not steps or sorted(set(steps)) != sorted(steps) or not all(0 <= k <= last for k in steps):
        remedy = f"with train.num_inference_steps = {last + 1} needs different indices from 0 to {last}"
        refuse("train.train_steps", train.train_steps, remedy)
    if train.dynamics_type == "CPS" and train.noise_level > 1:
        refuse("train.noise_level", train.noise_level, "CPS takes at most 1, which replaces all noise by fresh noise")
    if train.num_train_steps is not None and not 1 <= train.num_train_steps <= len(steps):
        remedy = f"must be 1 to {len(steps)}, or None: train.train_steps has the candidates {sorted(steps)}"
        refuse("train.num_train_steps", train.num_train_steps, remedy)


def check_call(args):
    """Refuse arguments of the pipeline that are the script's, and noise levels that do not fall."""
    for key in SET_BY_THE_SCRIPT:
        if key in args.call:
            remedy = "is set by the script; see --train and --eval for what can be changed"
            refuse("call", f"{key}={args.call[key]}", remedy)
    for key in ("sigmas", "timesteps"):
        levels, steps = args.call.get(key), {args.train.num_inference_steps, args.eval.num_inference_steps}
        if levels is not None and (not isinstance(levels, list) or steps != {len(levels)}):
            remedy = "must be a list as long as train.num_inference_steps and eval.num_inference_steps are, both"
            refuse("call", f"{key}={levels}", remedy)
        numbers = all(isinstance(level, (int, float)) for level in levels or ())
        if not numbers or not all(a > b for a, b in itertools.pairwise([math.inf, *(levels or ()), 0])):
            refuse("call", f"{key}={levels}", "must be numbers above 0, each below the one before it")
        full = 1 if key == "sigmas" else 1000
        if levels and not 0.9 * full <= levels[0] <= full:
            refuse("call", f"{key}={levels}", f"must begin near {full}: sampling starts from noise alone")


def check_batches(args):
    """Refuse prompts, calls and updates that do not divide."""
    train = args.train
    prompts, batch = train.unique_sample_num_per_epoch, train.per_device_batch_size
    images, updates = prompts * train.group_size, train.gradient_step_per_epoch
    if images > MOST_IMAGES:
        remedy = f"makes {images} images an epoch (x group_size); at most {MOST_IMAGES} will do"
        refuse("train.unique_sample_num_per_epoch", prompts, remedy)
    images = images // world_size()
    each = f" of each of {world_size()} processes" if world_size() > 1 else ""
    if prompts % world_size():
        would_do = max(1, round(prompts / world_size())) * world_size()
        remedy = f"each of {world_size()} processes takes as many prompts, with all images of each; {would_do} would do"
        refuse("train.unique_sample_num_per_epoch", prompts, remedy)
    if images % batch:
        nearest = min((b for b in range(1, images + 1) if images % b == 0), key=lambda b: abs(b - batch))
        what = f"the {images} images of an epoch{each} (unique_sample_num_per_epoch x group_size)"
        refuse("train.per_device_batch_size", batch, f"does not divide {what}; {nearest} would")
    calls = images // batch
    if updates < 1 or calls % updates:
        good = [u for u in range(1, calls + 1) if calls % u == 0]
        what = f"the {calls} pipeline calls of an epoch{each} (its images / per_device_batch_size)"
        remedy = f"does not divide {what}; one of {good} would, or another train.per_device_batch_size"
        refuse("train.gradient_step_per_epoch", updates, remedy)


def check_machine(args):
    """Refuse devices, processes and packages that are not there."""
    if args.shard and world_size() == 1:
        refuse("shard", True, "needs several processes to share the model: torchrun --nproc-per-node 2 ...")
    if args.shard and args.finetune_type != "full":
        refuse("shard", True, f"is for full fine-tuning, not {args.finetune_type}; add --finetune-type full")
    if args.lora and args.finetune_type != "lora":
        refuse("lora", args.lora, "begins with adapters, and --finetune-type full trains none; leave one of them out")
    if args.lora:
        with refusing("lora", args.lora):
            saved_file(args.lora)
    if args.shard and args.offload:
        refuse("offload", True, "does not go with --shard; leave one of them out")
    if world_size() > 1 and args.device not in ("auto", "cuda", "cpu"):
        refuse("device", args.device, "each process has a device of its own; auto, cuda or cpu would do")
    if args.device != "auto":
        try:
            torch.zeros(1, device=args.device).cpu()  # which a device without memory, meta, refuses
        except (RuntimeError, AssertionError) as error:
            refuse("device", args.device, str(error).splitlines()[0])
    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if world_size() > 1 and gpus and args.device != "cpu" and local > gpus:
        refuse("--nproc-per-node", local, f"each process takes a GPU, and this machine has {gpus}")
    for key, package in (("track", "wandb"), ("tensorboard", "tensorboard")):
        if getattr(args, key) and importlib.util.find_spec(package) is None:
            refuse(key, True, f"needs the package {package}: pip install {package}")


def check_run_folder(args):
    """Refuse a name that is none, or that another run has."""
    name = args.run_name
    if name is not None and (name in ("", ".", "..") or Path(name).name != name or not name.isprintable()):
        refuse("run_name", name, "must be the printable name of a folder, without a path")
    folder = Path(args.output_dir) / (name or "")
    free = not os.path.exists(folder) or folder.is_dir() and not any(folder.iterdir()) or is_unused(folder)
    if name and not args.resume and not free:
        refuse("run_name", name, f"{folder} already holds a run; choose another name or remove it")


def check_prompts_and_rewards(args, takes):
    """Refuse data that is not there or not used, rewards that are none, and prompts that a reward cannot score.

    takes: names of the pipeline's arguments.
    """
    if not args.prompts:
        refuse("prompts", args.prompts, "name a text file of training prompts, one a line")
    asked = {**args.reward, **args.eval.reward}
    with refusing("reward", args.reward):
        rewards.check_rewards(args.reward)
    with refusing("eval.reward", args.eval.reward):
        rewards.check_rewards(asked)
    with refusing("reward_options", args.reward_options):
        rewards.check_rewards(asked, options=args.reward_options)
    evaluated = ("eval.prompts", args.eval.prompts) if args.eval.prompts else ("prompts", args.prompts)
    for key, path, named in (("prompts", args.prompts, args.reward), (*evaluated, asked)):
        rows = read_rows(path, key)
        check_rows(rows, path, key, takes, rewards.takes_rows(named))
        with refusing(key, path):
            rewards.check_rewards(named, [row["prompt"] for row in rows], rows=rows)
    images = len(rows) * args.eval.images_per_prompt
    if images > MOST_IMAGES:
        remedy = f"makes {images} images an evaluation ({len(rows)} prompts); at most {MOST_IMAGES} will do"
        refuse("eval.images_per_prompt", args.eval.images_per_prompt, remedy)


def check_model(args):
    """Refuse a model that is missing or no rectified flow, or a resolution that it cannot take; loads no weights.

    Returns the names of the arguments that its pipeline takes.
    """
    try:
        index = DiffusionPipeline.load_config(args.model)
    except Exception as error:  # the hub client raises many kinds
        if os.path.exists(f"{args.model}/args.yaml"):  # no error, however long the name
            refuse("model", args.model, "a run's folder; docs/runs.md says how its weights are used")
        reason = str(error).splitlines()[0]
        refuse("model", args.model, f"no diffusers folder there, and the hub gave none ({reason})")
    scheduler = (index.get("scheduler") or [None, None])[1]
    try:
        config = FlowMatchEulerDiscreteScheduler.load_config(args.model, subfolder="scheduler") if scheduler else {}
    except OSError as error:
        refuse("model", args.model, f"its {scheduler} has no configuration ({str(error).splitlines()[0]})")
    if reason := no_rectified_flow(scheduler, config):
        refuse("model", args.model, reason)
    named = args.pipeline or str(index.get("_class_name"))
    with quiet():
        pipeline = getattr(diffusers, named, None)
    if not inspect.isclass(pipeline) or not issubclass(pipeline, DiffusionPipeline):
        reason = f"is no pipeline of diffusers {diffusers.__version__}"
        if args.pipeline:
            refuse("pipeline", named, f"{reason}; StableDiffusion3Img2ImgPipeline is one")
        refuse(
            "model", args.model, f"its model_index.json names the class {index.get('_class_name')!r}, which {reason}"
        )
    check_call_of(pipeline, args.call)
    try:
        parts = {
            name: _Part.load_config(args.model, subfolder=name) for name in ("vae", "transformer") if name in index
        }
    except Exception as error:
        refuse("model", args.model, str(error).splitlines()[0])
    check_resolutions(args, parts.get("vae", {}), parts.get("transformer", {}))
    return [*inspect.signature(pipeline.__call__).parameters]


def check_call_of(pipeline, call):
    """Refuse arguments that a pipeline class does not take, or not of this kind."""
    _, *takes = inspect.signature(pipeline.__call__).parameters.values()  # after self
    takes = {parameter.name: parameter.annotation for parameter in takes}
    for key, value in call.items():
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


def check_resolutions(args, vae, denoiser):
    """Refuse sides that are no multiple of a latent patch, or too long for the position embedding.

    vae, denoiser: their config.json. Of another kind of VAE the pipeline's own check speaks at the first call.
    """
    patch = denoiser.get("patch_size") or 1
    if "block_out_channels" not in vae or not isinstance(patch, int):
        return
    multiple = 2 ** (len(vae["block_out_channels"]) - 1) * patch
    most = denoiser.get("pos_embed_max_size")
    for key, resolution in (("train.resolution", args.train.resolution), ("eval.resolution", args.eval.resolution)):
        for side in height_width(resolution):
            if side < multiple or side % multiple:
                refuse(key, resolution, f"this model takes multiples of {multiple} pixels")
            if most and side > most * multiple:
                refuse(key, resolution, f"this model takes at most {most * multiple} pixels a side")


class _Part(ConfigMixin):
    """Reads the config.json of a pipeline's component, whatever its class."""

    config_name = "config.json"
