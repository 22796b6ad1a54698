"""Rewards: one small function each, a registry, and the weighted sum.

A reward is `fn(images, prompts) -> (B,)` for images (B, 3, H, W) in [0, 1] and B prompts; higher is better. To add one
here, write a factory `name(device, **options) -> fn` and put it into REWARDS; its keyword parameters are its options,
`--reward-options name.option=value`, checked by their annotations. To use one of your own without touching this file,
write the function anywhere and name it: `--reward my_rewards.py:brightness=1`.
"""

import difflib
import functools
import importlib.util
import inspect
import io
import json
import re
import sys
import traceback
import types
from pathlib import Path
from typing import Annotated, Literal, Optional, Union, get_args, get_origin

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    AutoTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
)
from transformers.utils import cached_file

from shapes import world

Model = Annotated[str, "a local folder or file, or a hub id"]
Dtype = Literal["float32", "bfloat16", "float16"]

# ---------------------------------------------------------------------------------------------------------------------
# Rewards without a model


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


# ---------------------------------------------------------------------------------------------------------------------
# Rewards by a transformers model. Their options: `model`, where the weights are; `processor`, where the tokenizer and
# the image preprocessing are, the model's own by default; `dtype` of the weights; `batch_size`, images in one forward.


def pickscore(
    device,
    model: Model = "yuvalkirstain/PickScore_v1",
    processor: Optional[Model] = None,
    dtype: Dtype = "float32",
    batch_size: int = 16,
    divide_by: float = 1.0,
):
    """PickScore (arXiv 2305.01569): the model's logit scale times the cosine of image and prompt, about 20 to 24.

    That is the number papers report. Flow-GRPO's code trains on it divided by 26: divide_by=26.
    """
    clip = _Clip(device, model, processor, dtype, batch_size)
    scale = clip.model.logit_scale.float().exp().item() / divide_by
    return lambda images, prompts: scale * clip.cosine(images, prompts)


def clipscore(
    device,
    model: Model = "openai/clip-vit-large-patch14",
    processor: Optional[Model] = None,
    dtype: Dtype = "float32",
    batch_size: int = 16,
):
    """The cosine of image and prompt in CLIP, about 0.2 to 0.35, as DiffusionNFT's tables have it (arXiv 2509.16117).

    Elsewhere it is scaled: by 2.5 and cut off at 0 (arXiv 2104.08718, which named it), by 100 (torchmetrics), by
    100 / 30 (Flow-GRPO's code).
    """
    return _Clip(device, model, processor, dtype, batch_size).cosine


def hpsv2(
    device,
    model: Model = "adams-story/HPSv2-hf",
    processor: Optional[Model] = None,
    dtype: Dtype = "float32",
    batch_size: int = 16,
):
    """Human Preference Score v2 (arXiv 2306.09341): the cosine in a CLIP tuned on preferences, about 0.2 to 0.35.

    The default is v2.0 converted to transformers. For v2.1, which was published as an OpenCLIP checkpoint, name a
    converted folder. An image that is not square is cropped to its middle, where the authors' code pads it.
    """
    return _Clip(device, model, processor, dtype, batch_size).cosine


def aesthetic(
    device,
    head: Model = "trl-lib/ddpo-aesthetic-predictor",
    model: Model = "openai/clip-vit-large-patch14",
    processor: Optional[Model] = None,
    dtype: Dtype = "float32",
    batch_size: int = 16,
):
    """LAION's improved aesthetic predictor, about 1 to 10, whatever the prompt: linear layers on CLIP's embedding.

    head: its layers.0.weight, ...: a .pth or .safetensors file, or a folder or hub id with aesthetic-model.pth.
    Source: github.com/christophschuhmann/improved-aesthetic-predictor; a reward since DDPO (arXiv 2305.13301).
    """
    clip = _Clip(device, model, processor, dtype, batch_size)
    predict = _linear_layers(_part(_weights(head, "aesthetic-model.pth"), "layers."), device)
    return lambda images, prompts: predict(clip.images(images))


def imagereward(
    device,
    model: Model = "THUDM/ImageReward",
    tokenizer: Model = "google-bert/bert-base-uncased",
    dtype: Dtype = "float32",
    batch_size: int = 16,
):
    """ImageReward (arXiv 2304.05977), standardised as its authors do: about -2 to 2.

    model: a folder or hub id with ImageReward.pt and med_config.json. A prompt is cut off at 35 tokens.
    """
    weights = _weights(model, "ImageReward.pt")
    vision, text = (part.to(device, getattr(torch, dtype)) for part in _blip(model, weights))
    predict = _linear_layers(_part(weights, "mlp.layers."), device)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    side = vision.config.image_size
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

    @torch.no_grad()
    def score(images, prompts):
        read = []
        for batch in _slices(len(prompts), batch_size):
            seen = vision(_preprocess(images[batch].to(device), processor)).last_hidden_state
            words = tokenizer(prompts[batch], padding=True, truncation=True, max_length=35, return_tensors="pt")
            words = words.to(device)
            states = text(words.input_ids, words.attention_mask, encoder_hidden_states=seen).last_hidden_state
            read.append(states[:, 0])
        return (predict(torch.cat(read).float()) - 0.16717362830052426) / 1.0333394966054072

    return score


PROCESSORS = {  # of models that come without their own
    "yuvalkirstain/PickScore_v1": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "adams-story/HPSv2-hf": "openai/clip-vit-base-patch32",
}


class _Clip:
    """A frozen CLIP on a device of its own: unit vectors (B, D) of images and of prompts, in float32."""

    def __init__(self, device, model, processor, dtype, batch_size):
        processor = processor or PROCESSORS.get(model, model)
        self.model, loaded = CLIPModel.from_pretrained(model, dtype=getattr(torch, dtype), output_loading_info=True)
        if loaded["missing_keys"]:  # transformers would go on with random weights
            raise ValueError(f"{model} holds no whole CLIP: {min(loaded['missing_keys'])} is missing")
        self.model = self.model.to(device).requires_grad_(False)
        self.tokenizer = CLIPTokenizer.from_pretrained(processor)
        self.processor = CLIPImageProcessorPil.from_pretrained(processor)
        self.device, self.batch_size = device, batch_size

    @torch.no_grad()
    def images(self, images):
        pixels = (_preprocess(batch.to(self.device), self.processor) for batch in images.split(self.batch_size))
        features = [self.model.get_image_features(batch).pooler_output for batch in pixels]
        return F.normalize(torch.cat(features).float(), dim=1)

    @torch.no_grad()
    def prompts(self, prompts):
        limit = self.model.config.text_config.max_position_embeddings
        settings = dict(padding=True, truncation=True, max_length=limit, return_tensors="pt")
        tokens = (self.tokenizer(prompts[batch], **settings) for batch in _slices(len(prompts), self.batch_size))
        features = [self.model.get_text_features(**batch.to(self.device)).pooler_output for batch in tokens]
        return F.normalize(torch.cat(features).float(), dim=1)

    def cosine(self, images, prompts):
        """(B,): each image with its own prompt."""
        return (self.images(images) * self.prompts(prompts)).sum(dim=1)


def _preprocess(images, processor):
    """What an image processor of CLIP does to PIL images, done to (B, 3, H, W) in [0, 1] where they are."""
    sides = images.shape[-2:]
    if edge := processor.size["shortest_edge"]:
        height, width = (int(edge * side / min(sides)) for side in sides)
    else:
        height, width = processor.size["height"], processor.size["width"]
    images = (images.float() * 255).round()
    for size in ((sides[0], width), (height, width)):  # like PIL one axis after the other, with 8 bits after each
        images = F.interpolate(images, size, mode="bicubic", antialias=True).round().clamp(0, 255)
    if processor.do_center_crop:
        rows, columns = processor.crop_size["height"], processor.crop_size["width"]
        top, left = (height - rows) // 2, (width - columns) // 2
        images = images[..., top : top + rows, left : left + columns]
    mean, std = (images.new_tensor(values).reshape(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    return (images / 255 - mean) / std


def _slices(count, length):
    return [slice(start, start + length) for start in range(0, count, length)]


def _weights(where, name):
    """{key: tensor} of a file, or of the file `name` in a local folder or a hub repository."""
    path = where if Path(where).is_file() else cached_file(where, name)
    if str(path).endswith(".safetensors"):
        return safetensors.torch.load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _part(weights, prefix):
    """The weights whose keys begin with `prefix`, without it."""
    part = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    if not part:
        raise ValueError(f"the weights have no {prefix}*")
    return part


def _linear_layers(weights, device):
    """The head of the aesthetic predictor and of ImageReward: linear layers, nothing between them. (B, D) -> (B,)"""
    names = sorted(key.removesuffix("weight") for key in weights if key.endswith("weight"))
    layers = [[weights[name + part].to(device).float() for part in ("weight", "bias")] for name in names]
    return lambda x: functools.reduce(lambda x, layer: F.linear(x, *layer), layers, x).squeeze(1)


BLIP_NAMES = {  # parts of the names in salesforce/BLIP's vision encoder -> in transformers'
    r"^cls_token": "embeddings.class_embedding",
    r"^pos_embed": "embeddings.position_embedding",
    r"^patch_embed\.proj": "embeddings.patch_embedding",
    r"^blocks": "encoder.layers",
    r"^norm": "post_layernorm",
    r"\.norm": ".layer_norm",
    r"\.attn\.proj": ".self_attn.projection",
    r"\.attn\.qkv": ".self_attn.qkv",
}
MED_CONFIG = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "hidden_act", "layer_norm_eps", "pad_token_id"),
)


def _blip(model, weights):
    """BLIP's vision encoder and the text encoder that attends to it, from a checkpoint in salesforce/BLIP's layout."""
    seen, read = _part(weights, "blip.visual_encoder."), _part(weights, "blip.text_encoder.")
    read.pop("embeddings.position_ids", None)  # a buffer
    width, _, patch, _ = seen["patch_embed.proj.weight"].shape
    for old, new in BLIP_NAMES.items():
        seen = {re.sub(old, new, key): value for key, value in seen.items()}
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=sum(key.endswith("fc1.weight") for key in seen),
        num_attention_heads=width // 64,
        image_size=patch * round((seen["embeddings.position_embedding"].shape[1] - 1) ** 0.5),
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    med = json.loads(Path(cached_file(model, "med_config.json")).read_text())
    text = BlipTextConfig(encoder_hidden_size=width, **{name: med[name] for name in MED_CONFIG})
    models = BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)
    for module, values in zip(models, (seen, read), strict=True):
        module.load_state_dict(values)
        module.eval().requires_grad_(False)
    return models


# ---------------------------------------------------------------------------------------------------------------------
# The registry

REWARDS = {
    "shapes": shapes,
    "jpeg_compressibility": jpeg_compressibility,
    "jpeg_incompressibility": jpeg_incompressibility,
    "pickscore": pickscore,
    "clipscore": clipscore,
    "hpsv2": hpsv2,
    "aesthetic": aesthetic,
    "imagereward": imagereward,
}
PROMPT_CHECKS = {"shapes": world.parse}  # {name: function that raises ValueError for a prompt the reward cannot score}
PACKAGES = {}  # {name: packages it imports beside those of requirements.txt}


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


def check_rewards(weights, prompts=(), options=None):
    """Raise ValueError, saying what would do, unless rewards, prompts and options go together. Loads no weights.

    weights: {"name": weight}. prompts: those that will be scored. options: {"name.option": value}.
    """
    if not weights:
        raise ValueError(f"name at least one; known: {', '.join(REWARDS)}, or your own as file.py:function")
    for name in weights:
        find_reward(name)
        for package in PACKAGES.get(name, ()):
            if importlib.util.find_spec(package) is None:
                raise ValueError(f"reward {name!r} needs the package {package}: pip install {package}")
    for key, value in (options or {}).items():
        if reason := _wrong_option(weights, key, value):
            raise ValueError(f"--reward-options {key}={value}: {reason}")
    for name in weights:
        for prompt in prompts if name in PROMPT_CHECKS else ():
            PROMPT_CHECKS[name](prompt)


def _wrong_option(weights, key, value):
    """Why a reward does not take this value of this option; None if it does."""
    name, _, option = key.rpartition(".")
    if name not in weights:
        return f"should be NAME.OPTION=VALUE of a reward that is asked for: {', '.join(weights)}"
    takes = inspect.signature(find_reward(name)).parameters
    if option not in takes:
        near = difflib.get_close_matches(option, takes, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"{name} has no option {option!r}; {hint}it has: {', '.join(takes)}"
    kind = takes[option].annotation
    if kind is not inspect.Parameter.empty and not _fits(value, kind):
        return f"should be {inspect.formatannotation(kind).replace('typing.', '')}"
    if option == "batch_size" and value < 1:
        return "must be at least 1"
    if option == "device":
        try:
            torch.empty(0, device=value)
        except (RuntimeError, AssertionError, TypeError) as error:
            return str(error).splitlines()[0]
    of_a_model = value is not None and Model in (kind, *get_args(kind))
    if of_a_model and not Path(value).exists() and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", value):
        return "no such file or folder, and no hub id either"
    return None


def _fits(value, kind):
    """Whether a value read from YAML is of an annotated type."""
    origin = get_origin(kind)
    if origin is Literal:
        return value in get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in get_args(kind))
    if origin is Annotated:
        return _fits(value, get_args(kind)[0])
    kinds = (int, float) if kind is float else origin or kind
    return isinstance(value, kinds) and isinstance(value, bool) == (kind is bool)


def make_reward(weights, device, options=None):
    """The weighted sum of rewards.

    weights: {"name": weight}, at least one. options: {"name.option": value}, among them the `device` of any reward.
    Returns fn(images, prompts) -> {"name": (B,), ..., "total": (B,)}, float32 on the images' device. Raises ValueError
    for an unknown name or option and RewardError for a model that does not load; fn raises RewardError, naming the
    reward, where one returns anything but B finite numbers.
    """
    check_rewards(weights, options=options)
    functions = {name: _made(name, device, options or {}) for name in weights}

    @torch.no_grad()
    def reward(images, prompts):
        values = {name: _checked(name, fn, images, list(prompts)) for name, fn in functions.items()}
        return values | {"total": sum(weights[name] * value for name, value in values.items())}

    return reward


def _made(name, device, options):
    own = {key.removeprefix(f"{name}."): value for key, value in options.items() if key.rpartition(".")[0] == name}
    try:
        return find_reward(name)(**{"device": device, **own})
    except (OSError, ValueError, KeyError, RuntimeError) as error:  # files that are missing or hold something else
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise RewardError(name, f"cannot be made: {what}") from error


class RewardError(SystemExit, ValueError):
    """A reward that fails ends the run with one line that names it."""

    def __init__(self, name, what):
        super().__init__(f"error: reward {name!r} {what}")


def _checked(name, function, images, prompts):
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
    return value
