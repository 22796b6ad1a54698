"""Rewards: one small function each, a registry, and the weighted sum.

A reward is `fn(images, prompts) -> (B,)` for images (B, 3, H, W) in [0, 1] and B prompts; higher is better. To add one
here, write a factory `device -> fn` and put it into REWARDS. To use one of your own without touching this file, write
the function anywhere and name it: `--reward my_rewards.py:brightness=1`.
"""

import difflib
import functools
import importlib.util
import io
import sys
import traceback
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from shapes import world


def shapes(device):
    """1 where an image of the embedded world shows exactly what its prompt asks, else 0. See shapes/world.py."""
    return world.check


def jpeg_incompressibility(device):
    """Kilobytes of the image as a JPEG of quality 95 (DDPO, arXiv 2305.13301)."""

    def kilobytes(images, prompts):
        pixels = (images.permute(0, 2, 3, 1) * 255).round().clamp(0, 255).byte().cpu().numpy()
        return torch.tensor([_jpeg_bytes(image) / 1000 for image in pixels])

    return kilobytes


def jpeg_compressibility(device):
    """Minus the kilobytes of the image as a JPEG of quality 95 (DDPO, arXiv 2305.13301)."""
    kilobytes = jpeg_incompressibility(device)
    return lambda images, prompts: -kilobytes(images, prompts)


def _jpeg_bytes(image: np.ndarray) -> int:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95)
    return file.tell()


REWARDS = {
    "shapes": shapes,
    "jpeg_compressibility": jpeg_compressibility,
    "jpeg_incompressibility": jpeg_incompressibility,
}


def find_reward(name):
    """The factory of a reward: a name in REWARDS, or `file.py:function` for a user's own function.

    Raises ValueError, saying what would do, where there is none. Runs a user's file, once.
    """
    if name in REWARDS:
        return REWARDS[name]
    path, _, function = name.rpartition(":")
    if not path.endswith(".py"):
        near = difflib.get_close_matches(name, REWARDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"no reward {name!r}; {hint}known: {', '.join(REWARDS)}, or your own as file.py:function")
    if not Path(path).is_file():
        raise ValueError(f"reward {name!r}: there is no file {path}")
    module = _load(Path(path).resolve())
    if not callable(getattr(module, function, None)):
        raise ValueError(f"reward {name!r}: {path} has no function {function}")
    return lambda device: getattr(module, function)


@functools.cache
def _load(path):
    """A user's file as a module; loaded once."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path} does not load: {type(error).__name__}: {error}") from error
    return module


def check_rewards(weights, prompts=()):
    """Raise ValueError, saying what would do, unless {"name": weight} names rewards that can score the prompts."""
    if not weights:
        raise ValueError(f"name at least one; known: {', '.join(REWARDS)}, or your own as file.py:function")
    for name in weights:
        find_reward(name)
    for prompt in prompts if "shapes" in weights else ():
        world.parse(prompt)


def make_reward(weights, device):
    """The weighted sum of rewards.

    weights: {"name": weight}, at least one. Returns fn(images, prompts) -> {"name": (B,), ..., "total": (B,)}, float32
    on the images' device. Of a video (B, frames, 3, H, W) a reward scores each frame, and the mean of them counts; a
    function with an attribute takes_video gets it whole. Raises ValueError for an unknown name; fn raises ValueError,
    naming the reward, where one returns anything but B finite numbers.
    """
    check_rewards(weights)
    functions = {name: find_reward(name)(device) for name in weights}

    @torch.no_grad()
    def reward(images, prompts):
        values = {name: _checked(name, fn, images, list(prompts)) for name, fn in functions.items()}
        return values | {"total": sum(weights[name] * value for name, value in values.items())}

    return reward


def make_eval_reward(reward, weights, eval_weights, device):
    """The reward of evaluation: what `reward` gives for its weights, and more, with the total of eval_weights.

    Both weights are {"name": weight}. A function is made only once. Without eval_weights it is `reward`.
    """
    if not eval_weights:
        return reward
    others = {name: weight for name, weight in eval_weights.items() if name not in weights}
    more = make_reward(others, device) if others else lambda images, prompts: {}

    def eval_reward(images, prompts):
        scores = {**reward(images, prompts), **more(images, prompts)}
        return scores | {"total": sum(weight * scores[name] for name, weight in eval_weights.items())}

    return eval_reward


class RewardError(SystemExit, ValueError):
    """A reward that fails ends the run with one line that names it."""

    def __init__(self, name, what):
        super().__init__(f"error: reward {name!r} {what}")


def _checked(name, function, images, prompts):
    frames = 1
    if images.ndim == 5 and not getattr(function, "takes_video", False):
        frames = images.shape[1]
        images, prompts = images.flatten(0, 1), [prompt for prompt in prompts for _ in range(frames)]
    try:
        value = torch.as_tensor(function(images, prompts), dtype=torch.float32, device=images.device)
    except Exception as error:
        traceback.print_exc()  # the user's own code: show where
        raise RewardError(name, f"failed: {type(error).__name__}: {error}") from error
    if value.shape != (len(images),):
        raise RewardError(name, f"returned shape {tuple(value.shape)} for {len(images)} images")
    if not value.isfinite().all():
        bad = int((~value.isfinite()).nonzero()[0])
        raise RewardError(name, f"returned {value[bad].item()} for image {bad}")
    return value.reshape(-1, frames).mean(dim=1)
