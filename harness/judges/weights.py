"""What the judges share: where weights come from, how they are read, and images as files."""

import functools
import io
import re
from pathlib import Path
from typing import Annotated, Literal

import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import AfterValidator
from transformers.utils import cached_file


def _can_be_found(source):
    if not Path(source).exists() and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source):
        raise ValueError("no such file or folder, and no hub id either")
    return source


Model = Annotated[str, AfterValidator(_can_be_found)]
Dtype = Literal["float32", "bfloat16", "float16"]


def pixels(images):
    """Images (B, 3, H, W) in [0, 1] as an array (B, H, W, 3) of uint8."""
    return (images.float().permute(0, 2, 3, 1) * 255).round().clamp(0, 255).byte().cpu().numpy()


def to_pil(images) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] as PIL images, of 8 bits."""
    return [Image.fromarray(image) for image in pixels(images)]


def encode(image: Image.Image, kind, **settings) -> bytes:
    """The contents of an image file of a kind: PNG, JPEG, ..."""
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def in_batches(score, size):
    """score(images, prompts) -> (B,), called for at most `size` images at once."""
    return lambda images, prompts: torch.cat(
        [score(images[i : i + size], prompts[i : i + size]) for i in range(0, len(images), size)]
    )


def load(kind, source, **settings):
    """kind.from_pretrained(source), a folder or hub id; ValueError in one line where it is not to be had."""
    try:
        return kind.from_pretrained(source, **settings)
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(f"{source} does not load as {kind.__name__}: {' '.join(str(error).split())}") from error


def read(source, name):
    """{key: tensor} of a file, or of the file `name` in a local folder or a hub repository."""
    path = source if Path(source).is_file() else cached_file(source, name)
    if str(path).endswith(".safetensors"):
        return safetensors.torch.load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def part(weights, prefix):
    """The weights whose keys begin with `prefix`, without it. Raises ValueError where there are none."""
    found = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    if not found:
        raise ValueError(f"the weights have no {prefix}*")
    return found


def linear_layers(weights, device):
    """The head of the aesthetic predictor and of ImageReward: linear layers, nothing between them. (B, D) -> (B,)"""
    names = sorted(key.removesuffix("weight") for key in weights if key.endswith("weight"))
    layers = [[weights[name + kind].to(device).float() for kind in ("weight", "bias")] for name in names]
    return lambda x: functools.reduce(lambda x, layer: F.linear(x, *layer), layers, x).squeeze(1)
