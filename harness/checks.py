"""What relates several settings, and the model that they are for: refused before any weights are loaded."""

import difflib
import importlib.util
import inspect
import itertools
import os
import re
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler

import rewards
from common import candidate_steps, height_width
from harness.adapters import saved_file
from harness.console import quiet
from harness.data import check_rows, read_rows
from harness.fields import flatten, refuse, refusing
from harness.flow_models import no_rectified_flow
from harness.parallel import world_size
from harness.run import is_unused
from harness.settings import QUANTIZED

MOST_IMAGES = 1_000_000  # of an epoch, or of an evaluation
SET_BY_THE_SCRIPT = (  # arguments of the pipeline that --call cannot set; prompt_2 to 4 are each prompt by default
    *("prompt", "height", "width", "num_inference_steps", "guidance_scale", "generator", "latents"),
    *("num_images_per_prompt", "num_videos_per_prompt", "output_type", "return_dict"),
    *("prompt_2", "prompt_3", "prompt_4"),
)


def check_args(args):
    """Refuse what no script can run, with the key, the value and what would do. Loads no weights."""
    check_steps(args)
    check_batches(args)
    check_machine(args)
    check_run_folder(args)
    check_prompts_and_rewards(args, takes=check_model(args))


def require(holds, args, key, remedy):
    """Refuse the value of a dotted key where what must hold does not."""
    if not holds:
        refuse(key, flatten(args)[key], remedy)


def check_steps(args):
    """Refuse candidates and numbers of trained steps that the schedule does not have."""
    train, steps, last = args.train, candidate_steps(args.train), args.train.num_inference_steps - 1
    remedy = f"with train.num_inference_steps = {last + 1} needs different indices from 0 to {last}; None: all below"
    require(steps and steps == sorted({*steps} & {*range(last + 1)}), args, "train.train_steps", remedy)
    remedy = f"must be 1 to {len(steps)}, or None: train.train_steps has the candidates {steps}"
    require(train.num_train_steps in (None, *range(1, len(steps) + 1)), args, "train.num_train_steps", remedy)
    cps = getattr(train, "dynamics_type", None) == "CPS"  # a copied script may have but one rule
    require(not cps or train.noise_level <= 1, args, "train.noise_level", "CPS takes at most 1")


def check_batches(args):
    """Refuse prompts, calls and updates that do not divide."""
    train, processes = args.train, world_size()
    prompts, batch = train.unique_sample_num_per_epoch, train.per_device_batch_size
    nearest = max(1, round(prompts / processes)) * processes
    remedy = f"each of {processes} processes takes as many prompts, with all images of each; {nearest} would do"
    require(prompts % processes == 0, args, "train.unique_sample_num_per_epoch", remedy)
    images = prompts * train.group_size
    remedy = f"makes {images} images an epoch (x group_size); at most {MOST_IMAGES} will do"
    require(images <= MOST_IMAGES, args, "train.unique_sample_num_per_epoch", remedy)
    images //= processes
    each = f" of each of {processes} processes" if processes > 1 else ""
    nearest = min((b for b in range(1, images + 1) if images % b == 0), key=lambda b: abs(b - batch))
    what = f"the {images} images of an epoch{each} (unique_sample_num_per_epoch x group_size)"
    require(images % batch == 0, args, "train.per_device_batch_size", f"does not divide {what}; {nearest} would")
    calls = images // batch
    good = [u for u in range(1, calls + 1) if calls % u == 0]
    remedy = f"must divide the {calls} calls of {batch} images of an epoch{each}: take one of {good}, or other calls"
    require(train.gradient_step_per_epoch in good, args, "train.gradient_step_per_epoch", remedy)


def check_machine(args):
    """Refuse devices, processes and packages that are not there."""
    several, full = world_size() > 1, args.finetune_type == "full"
    remedy = "is for full fine-tuning in several processes: torchrun --nproc-per-node 2 ...; add --finetune-type full"
    require(several and full or not args.shard, args, "shard", remedy)
    require(not (args.shard and args.offload), args, "offload", "does not go with --shard; leave one of them out")
    require(not (full and args.lora), args, "lora", "has adapters, and --finetune-type full trains none; leave one out")
    require(not (full and args.quantize), args, "quantize", "is of frozen weights, which only --finetune-type lora has")
    if args.lora:
        with refusing("lora", args.lora):
            saved_file(args.lora)
    shared = several and args.device not in ("auto", "cuda", "cpu")
    require(not shared, args, "device", "each process has a device of its own; auto, cuda or cpu would do")
    with refusing("device", args.device, RuntimeError, AssertionError):
        torch.zeros(1, device="cpu" if args.device == "auto" else args.device).cpu()  # which one without memory refuses
    gpus, local = args.device != "cpu" and torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if several and 0 < gpus < local:
        refuse("--nproc-per-node", local, f"each process takes a GPU, and this machine has {gpus}")
    quantized = {key: QUANTIZED.get(getattr(args, key)) for key in ("quantize", "quantize_text")}
    for key, package in {"track": "wandb", "tensorboard": "tensorboard", **quantized}.items():
        there = not getattr(args, key) or importlib.util.find_spec(package)
        require(there, args, key, f"needs the package {package}: pip install {package}")
        require(getattr(args, key) != "nf4" or gpus, args, key, "needs a GPU in diffusers; int8 or fp8 would do")


def check_run_folder(args):
    """Refuse a name that is none, or that another run has."""
    name, folder = args.run_name, Path(args.output_dir) / (args.run_name or "")
    is_name = name is None or name not in ("", "..") and Path(name).name == name and name.isprintable()
    require(is_name, args, "run_name", "must be the printable name of a folder, without a path")
    free = not name or args.resume or not os.path.exists(folder) or is_unused(folder)
    require(free, args, "run_name", f"{folder} already holds a run; choose another name")


def check_prompts_and_rewards(args, takes):
    """Refuse data that is not there or not used, rewards that are none, and prompts that a reward cannot score."""
    require(args.prompts, args, "prompts", "name a text file of training prompts, one a line")
    asked, settings = args.reward | args.eval.reward, flatten(args)
    evaluated = "eval.prompts" if args.eval.prompts else "prompts"
    for key, named, file in (("reward", args.reward, "prompts"), ("eval.reward", asked, evaluated)):
        with refusing(key, settings[key]):
            rewards.check_rewards(named)
        rows = read_rows(settings[file], file)
        check_rows(rows, settings[file], file, takes, rewards.takes_rows(named))
        with refusing(file, settings[file]):
            rewards.check_rewards(named, [row["prompt"] for row in rows], rows=rows)
    with refusing("reward_options", args.reward_options):
        rewards.check_rewards(asked, options=args.reward_options)
    images = len(rows) * args.eval.images_per_prompt
    require(images <= MOST_IMAGES, args, "eval.images_per_prompt", f"makes {images} images, not at most {MOST_IMAGES}")


def check_model(args):
    """{name: annotation} of what the pipeline takes; refuses a model or class that is none, or no rectified flow."""
    there = os.path.exists(args.model) or not args.model.startswith((".", "/", "~"))  # which no hub id does
    require(there, args, "model", "no diffusers folder: it is not there")
    try:
        index = DiffusionPipeline.load_config(args.model)
        scheduler = (index.get("scheduler") or [None, None])[1]
        flow = FlowMatchEulerDiscreteScheduler.load_config(args.model, subfolder="scheduler") if scheduler else {}
        load = AutoencoderKL.load_config  # of any class
        vae, denoiser = (load(args.model, subfolder=n) if n in index else {} for n in ("vae", "transformer"))
        wrong = no_rectified_flow(scheduler, flow)
    except Exception as error:  # the hub client raises many kinds, and files that are not diffusers' others
        wrong = f"no diffusers folder or hub id, or not readable ({type(error).__name__}: {error})".partition("\n")[0]
        if os.path.exists(f"{args.model}/args.yaml"):  # no error, however long the name
            wrong = "a run's folder; docs/runs.md says how its weights are used"
    require(not wrong, args, "model", wrong)
    named, key = (args.pipeline, "pipeline") if args.pipeline else (str(index.get("_class_name")), "model")
    with quiet():
        pipeline = getattr(diffusers, named, None)
    known = inspect.isclass(pipeline) and issubclass(pipeline, DiffusionPipeline)
    require(known, args, key, f"its class {named!r} is no pipeline of diffusers {diffusers.__version__}")
    _, *takes = inspect.signature(pipeline.__call__).parameters.values()  # after self
    takes = {parameter.name: inspect.formatannotation(parameter.annotation) for parameter in takes}
    check_call(args, named, takes)
    with refusing("model", args.model, AttributeError, LookupError, TypeError):  # a config.json that is not diffusers'
        check_resolutions(args, vae, denoiser)
    return takes


def check_call(args, pipeline, takes):
    """Refuse arguments that the script sets, or that a pipeline, which takes {name: annotation}, does not take so."""
    steps = {args.train.num_inference_steps, args.eval.num_inference_steps}
    for key, value in args.call.items():
        kind, near = takes.get(key, ""), difflib.get_close_matches(key, takes, n=1)
        other = f"did you mean {near[0]}?" if near else f"help(diffusers.{pipeline}.__call__) has all"
        full = None if value is None else {"sigmas": 1, "timesteps": 1000}.get(key)
        levels = value if isinstance(value, list) and {type(n) for n in value} <= {int, float} else []
        falling = {len(levels)} == steps and all(a > b for a, b in itertools.pairwise([*levels, 0]))
        fits = not full or falling and 0.9 * full <= levels[0] <= full
        writable = "float" in kind or not re.search("Tensor|Callable", kind)
        for holds, remedy in (
            (key not in SET_BY_THE_SCRIPT, "is set by the script; see --train and --eval for what can be changed"),
            (fits, f"must be numbers, as many as train and eval have steps, falling from near {full} to > 0"),
            (key in takes, f"{pipeline} takes no such argument; {other}"),
            (writable, "takes a tensor or a function, which cannot be written down; leave it out"),
            (not isinstance(value, str) or re.search("str|Any|_empty", kind), f"{pipeline} takes {kind} there"),
        ):
            if not holds:
                refuse("call", f"{key}={value}", remedy)


def check_resolutions(args, vae, denoiser):
    """Refuse sides that are no multiple of a latent patch, or too long for the position embedding, by their configs."""
    patch = denoiser.get("patch_size") or 1
    if "block_out_channels" not in vae or not isinstance(patch, int):
        return  # the pipeline's own check speaks at the first call
    multiple = 2 ** (len(vae["block_out_channels"]) - 1) * patch
    most = (denoiser.get("pos_embed_max_size") or float("inf")) * multiple
    for key in ("train.resolution", "eval.resolution"):
        sides = height_width(flatten(args)[key])
        require(not any(side % multiple for side in sides), args, key, f"must be multiples of {multiple} pixels")
        require(max(sides) <= most, args, key, f"this model takes at most {most} pixels a side")
