"""Rewards: the registry, the weighted sum, a user's own functions, and the rewards that need no network.

A reward is `fn(images, prompts) -> (B,)` for images (B, 3, H, W) in [0, 1] and B prompts; higher is better. In REWARDS
are factories `name(device, **options) -> fn`, whose keyword parameters are the options, `--reward-options`, checked by
their annotations. docs/rewards.md says how to add one, here or in a file of your own, and what fn may ask for.
"""

import contextlib
import copy
import difflib
import functools
import importlib.util
import inspect
import sys
import traceback
from pathlib import Path
from typing import Literal

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError

from harness.judges import clip, geneval, imagereward, ocr, vlm
from harness.judges.weights import encode, to_pil
from shapes import world


def jpeg_kilobytes(images):
    """(B,): the size of each image as a JPEG of quality 95. DDPO (arXiv 2305.13301) rewards small and large ones."""
    return torch.tensor([len(encode(image, "JPEG", quality=95)) / 1000 for image in to_pil(images)])


REWARDS = {
    "shapes": lambda device: world.check,
    "jpeg_compressibility": lambda device: lambda images, prompts: -jpeg_kilobytes(images),
    "jpeg_incompressibility": lambda device: lambda images, prompts: jpeg_kilobytes(images),
    "pickscore": clip.pickscore,
    "clipscore": clip.clipscore,
    "hpsv2": clip.hpsv2,
    "aesthetic": clip.aesthetic,
    "imagereward": imagereward.imagereward,
    "ocr": ocr.ocr,
    "geneval": geneval.geneval,
    "vlm": vlm.vlm,
}
PROMPT_CHECKS = {  # functions of a prompt and its row that raise ValueError where a reward cannot score them
    "shapes": lambda prompt, row: world.parse(prompt),
    "ocr": lambda prompt, row: ocr.quoted_text(prompt),
    "geneval": geneval.metadata,
}
PACKAGES = {"ocr": "rapidocr_onnxruntime"}  # the optional package that a reward imports
SENDS_IMAGES = {"vlm"}  # rewards that give the images away, to a server


def find_reward(name):
    """The factory of a reward in REWARDS, or of `file.py:function` a user's own function.

    Raises ValueError, saying what would do, where there is none. Runs a user's file, once.
    """
    if name in REWARDS:
        return REWARDS[name]
    path, _, function = name.rpartition(":")
    if not path.endswith(".py"):
        raise ValueError(f"no reward {name!r}; {_known(name, REWARDS)}, or your own as file.py:function")
    if not Path(path).is_file():
        raise ValueError(f"reward {name!r}: there is no file {path}")
    own = getattr(_load(Path(path).resolve()), function, None)
    if not callable(own):
        raise ValueError(f"reward {name!r}: {path} has no function {function}")
    return own


def _known(name, known):
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{hint}known: {', '.join(known)}"


@functools.cache
def _load(path):
    """A user's file as a module; loaded once."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)  # dataclasses look their module up
    try:
        with contextlib.chdir("."):  # which brings a file that changes the directory back
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path} does not load: {type(error).__name__}: {error}") from error
    return module


def takes_rows(weights):
    """Whether a reward of {"name": weight} reads the objects of the data file. Runs a user's file, once."""
    return any(name == "geneval" or _takes_rows(find_reward(name)) for name in weights)


def check_rewards(weights, prompts=(), options=None, rows=None):
    """Raise ValueError, saying what would do, unless rewards, prompts and options go together. Loads no weights.

    weights: {"name": weight}. options: {"name.option": value}. rows: the prompts' objects in the data file, if any.
    """
    if not weights:
        raise ValueError(f"name at least one; known: {', '.join(REWARDS)}, or your own as file.py:function")
    for name in weights:
        find_reward(name)
        if (package := PACKAGES.get(name)) and importlib.util.find_spec(package) is None:
            raise ValueError(f"reward {name!r} needs the package {package}: pip install {package}")
        for prompt, row in zip(prompts, rows or [{}] * len(prompts), strict=True) if name in PROMPT_CHECKS else ():
            PROMPT_CHECKS[name](prompt, row)
    for key, value in (options or {}).items():
        if reason := _wrong_option(weights, key, value):
            raise ValueError(f"--reward-options {key}={value}: {reason}")


def check_untrusted(weights, options):
    """Raise ValueError unless a stranger's file may ask for these rewards and options. Runs and loads nothing.

    It may name what is in REWARDS and gives no image away, and set numbers, true or false, and choices: no code, path
    or hub id, address, device or name of an environment variable.
    """
    for name in weights:
        if name not in REWARDS or name in SENDS_IMAGES:
            raise ValueError(f"a model folder may not ask for the reward {name!r}, which is code or sends images away")
    for key, value in options.items():
        if _wrong_option(REWARDS, str(key), value, kinds=(int, float, bool, Literal)):
            raise ValueError(f"a model folder may set numbers, true or false and choices of rewards, not {key}={value}")


def _wrong_option(weights, key, value, kinds=None):
    """Why a reward does not take this value of this option, or it is not of one of these kinds; None if all is well."""
    name, _, option = key.rpartition(".")
    if name not in weights:
        return f"should be NAME.OPTION=VALUE (in YAML NAME.OPTION: VALUE) of a reward asked for: {', '.join(weights)}"
    if name not in REWARDS:
        return "a function of your own takes no options; write a factory into rewards.py"
    takes = inspect.signature(REWARDS[name]).parameters
    if option not in takes:
        return f"{name} has no option {option!r}; {_known(option, takes)}"
    kind = takes[option].annotation
    if kinds and getattr(kind, "__origin__", kind) not in kinds:  # __origin__: without its bounds
        return "is of another kind"
    try:
        if option == "device":
            torch.empty(0, device=value)
        elif kind is not inspect.Parameter.empty:
            TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False)).validate_python(value, strict=True)
    except ValidationError as error:
        return error.errors()[0]["msg"].removeprefix("Value error, ").replace("Input should", "should")
    except (RuntimeError, AssertionError, TypeError) as error:
        return str(error).splitlines()[0]


def make_reward(weights, device, options=None):
    """The weighted sum of rewards, as `make_rewards` says."""
    return make_rewards(weights, {}, device, options)[0]


def make_rewards(weights, eval_weights, device, options=None):
    """(reward, eval_reward): by weights, and by the rewards of both with eval_weights' total, or the same without any.

    Weights: {"name": weight}, at least one. options: {"name.option": value}, among them the `device` of any reward.
    Each is a fn(images, prompts, rows=None) -> {"name": (B,), ..., "total": (B,)}, float32 on the images' device; where
    `fn.takes_groups`, the images of a call are one group. Raises ValueError for an unknown name or option; RewardError
    for a model that does not load and, in fn, for a reward that returns anything but B finite numbers.
    """
    asked = {**weights, **eval_weights}
    check_rewards(asked, options=options)
    made = {}
    for name in asked:
        own = {key.removeprefix(f"{name}."): v for key, v in (options or {}).items() if key.rpartition(".")[0] == name}
        try:
            made[name] = REWARDS[name](**{"device": device, **own}) if name in REWARDS else find_reward(name)
        except (OSError, ValueError, KeyError, RuntimeError) as error:  # files that are missing or hold something else
            raise RewardError(name, f"cannot be made: {type(error).__name__}: {error}") from error

    def weighted(names, weights):
        @torch.no_grad()
        def reward(images, prompts, rows=None):
            rows = [{"prompt": prompt} for prompt in prompts] if rows is None else rows
            values = {name: _scores(name, made[name], images, prompts, rows) for name in names}
            return values | {"total": sum(weight * values[name] for name, weight in weights.items())}

        reward.takes_groups = any(getattr(find_reward(name), "takes_groups", False) for name in names)
        return reward

    return weighted(weights, weights), weighted(asked, eval_weights or weights)


class RewardError(SystemExit, ValueError):
    """A reward that fails ends the run with one line that names it."""

    def __init__(self, name, what):
        super().__init__(" ".join(f"error: reward {name!r} {what}".split()))


def _scores(name, function, images, prompts, rows):
    """What a reward returns for images or videos, (B,); of a video the mean over its frames, unless it takes videos."""
    frames = 1
    if images.ndim == 5 and not getattr(function, "takes_video", False):
        frames, images = images.shape[1], images.flatten(0, 1)
    prompts, rows = ([each for each in of_images for _ in range(frames)] for of_images in (prompts, rows))
    if name not in REWARDS:  # a user's function may write into what it is given
        images, rows = images.clone(), copy.deepcopy(rows)
    try:
        with contextlib.chdir("."):  # which brings a function that changes the directory back
            values = function(images, prompts, **({"rows": rows} if _takes_rows(function) else {}))
        values = torch.as_tensor(values, dtype=torch.float32, device=images.device)
    # Also SystemExit and KeyboardInterrupt, which would end the run without a word, and as if all were well. They are
    # the function's own: a run scores in a thread, and what a signal's handler raises comes up in the main thread.
    except BaseException as error:
        traceback.print_exc()  # the user's own code: show where
        raise RewardError(name, f"failed: {type(error).__name__}: {error}") from error
    if values.shape != (len(images),):
        raise RewardError(name, f"returned shape {tuple(values.shape)} for {len(images)} images")
    for bad in (~values.isfinite()).nonzero():
        raise RewardError(name, f"returned {values[bad].item()} for image {bad.item()}")
    return values.reshape(-1, frames).mean(dim=1)


def _takes_rows(function):
    try:
        return "rows" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # of a function written in C
        return False
