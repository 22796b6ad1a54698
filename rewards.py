"""Rewards: one small function each, a registry, and the weighted sum.

A reward is `fn(images, prompts) -> (B,)` for images (B, 3, H, W) in [0, 1] and B prompts; higher is better. To add one
here, write a factory `name(device, **options) -> fn` and put it into REWARDS; its keyword parameters are its options,
`--reward-options name.option=value`, checked by their annotations. To use one of your own without touching this file,
write the function anywhere and name it: `--reward my_rewards.py:brightness=1`.
"""

import base64
import difflib
import functools
import http.client
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import re
import sys
import time
import traceback
import types
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Optional, Union, get_args, get_origin

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
        return torch.tensor([_jpeg_bytes(image) / 1000 for image in _pixels(images)])

    return kilobytes


def jpeg_compressibility(device):
    """Minus the kilobytes of the image as a JPEG of quality 95 (DDPO, arXiv 2305.13301)."""
    kilobytes = jpeg_incompressibility(device)
    return lambda images, prompts: -kilobytes(images, prompts)


def _jpeg_bytes(image: np.ndarray) -> int:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95)
    return file.tell()


def _pixels(images) -> np.ndarray:
    """(B, 3, H, W) in [0, 1] as (B, H, W, 3) bytes."""
    return (images.permute(0, 2, 3, 1) * 255).round().clamp(0, 255).byte().cpu().numpy()


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
# OCR: text in images


def ocr(device, side: int = 128, threads: int = 1):
    """How much of the prompt's quoted text the image shows: max(0, 1 - edit distance / length of the text), 0 to 1.

    PP-OCRv4 reads the image, on the CPU (pip install rapidocr-onnxruntime, which brings the weights). As in Flow-GRPO
    (arXiv 2505.05470) case and spaces do not count, and a reading that contains the whole text has distance 0. Unlike
    there, the text of all quotes counts, not that of the first, and an image that cannot be read ends the run.

    side: smaller images are enlarged until their shorter side has so many pixels. threads: of one image's reading.
    """
    from rapidocr_onnxruntime import RapidOCR

    # by default every image is enlarged to 736 pixels, which takes several times as long
    engine = RapidOCR(det_limit_type="max", det_limit_side_len=960, intra_op_num_threads=threads)

    def read(image):
        found, _ = engine(image[..., ::-1], use_cls=False)  # BGR, and no search for text that is upside down
        return "".join(text for _, text, _ in found or [])

    def score(images, prompts):
        height, width = images.shape[-2:]
        zoom = max(1, side / min(height, width))
        size = round(height * zoom), round(width * zoom)
        larger = F.interpolate(images.float(), size, mode="bicubic") if zoom > 1 else images
        readings = [read(image) for image in _pixels(larger)]
        return torch.tensor([text_score(quoted_text(p), reading) for p, reading in zip(prompts, readings, strict=True)])

    return score


# "...", “...”, ‘...’ and '...'; where a quotation mark may be an apostrophe, quotes begin and end at the edge of a word
_QUOTED = re.compile(r"\"(.+?)\"|“(.+?)”|(?<!\w)‘(.+?)’(?!\w)|(?<!\w)'(.+?)'(?!\w)")


def quoted_text(prompt):
    """The text that a prompt quotes; several quotes are joined by a space. Raises ValueError where there is none."""
    text = " ".join(filter(None, (part for quote in _QUOTED.findall(prompt) for part in quote)))
    if not text.strip():
        raise ValueError(f"ocr needs the text in quotes, as in: a sign that says 'hello'; there is none in {prompt!r}")
    return text


def text_score(text, reading):
    """max(0, 1 - edit distance / length of text) without case and spaces; 1 where the reading contains the text."""
    text, reading = ("".join(string.lower().split()) for string in (text, reading))
    return 1.0 if text in reading else max(0.0, 1 - edit_distance(text, reading) / len(text))


def edit_distance(a, b):
    """Levenshtein: the least number of insertions, deletions and substitutions that make b of a."""
    row = list(range(len(b) + 1))  # distances of the first i characters of a to each beginning of b
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


# ---------------------------------------------------------------------------------------------------------------------
# GenEval: objects, counts, colours, places

OBJECTS = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant"),
    *("bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard"),
    *("sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle"),
    *("wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli"),
    *("carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet"),
    *("tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster"),
    *("sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)
"""The 80 classes of COCO as GenEval names them."""

COCO_NAMES = {
    **{"motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch", "pottedplant": "potted plant"},
    **{"diningtable": "dining table", "tvmonitor": "tv", "mouse": "computer mouse", "remote": "tv remote"},
    **{"keyboard": "computer keyboard", "hair dryer": "hair drier"},
}
"""What detectors call a class -> what GenEval calls it, where they differ."""

GENEVAL_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
NUMBERS = dict(two=2, three=3, four=4, five=5, six=6, seven=7, eight=8, nine=9, ten=10)
RELATIONS = ("left of", "right of", "above", "below")
MAX_OBJECTS = 16  # of a class in an image
POSITION_SLACK = 0.1  # the distance of two centres counts from this share of the sum of the two sizes on


class Detection(NamedTuple):
    name: str
    score: float
    box: tuple[float, float, float, float]  # left, top, right, bottom in pixels


def geneval(
    device,
    detector: Model = "PekingU/rtdetr_r50vd",
    clip: Model = "openai/clip-vit-large-patch14",
    strict: bool = False,
    threshold: float = 0.3,
    counting_threshold: float = 0.9,
):
    """Whether the image shows the objects, counts, colours and positions of a prompt of GenEval (arXiv 2310.11513).

    By default Flow-GRPO's training reward with partial credit (`geneval_partial`: at most 1, and below 0 with more than
    twice the objects asked for); with strict, the benchmark's 0 or 1 (`geneval_correct`).

    detector: folder or hub id of a model of transformers for object detection with the classes of COCO. clip: of a CLIP
    model, which names the colours. threshold: least score of an object; counting_threshold: the same for prompts with
    a number. GenEval chose the two for its Mask2Former; another detector's scores may ask for others. It also greys the
    background out by that model's masks before the colour is judged; here there are boxes only, judged as they are.
    """
    detect = _object_detector(detector, device)
    colours_of = _colour_classifier(clip, device)
    rule = geneval_correct if strict else geneval_partial

    def score(images, prompts):
        pictures = [Image.fromarray(image) for image in _pixels(images)]
        values = []
        for picture, prompt, detections in zip(pictures, prompts, detect(pictures), strict=True):
            wanted = parse_geneval(prompt)
            objects = geneval_objects(detections, counting_threshold if "exclude" in wanted else threshold)
            values.append(float(rule(wanted, objects, functools.partial(colours_of, picture))))
        return torch.tensor(values)

    return score


_ANY_OBJECT, _ANY_COLOUR = "|".join(OBJECTS), "|".join(GENEVAL_COLOURS)
_THING = rf"an? (?:({_ANY_COLOUR}) )?({_ANY_OBJECT})"
_THINGS = re.compile(rf"a photo of {_THING}(?: (and|{'|'.join(RELATIONS)}) {_THING})?")
# the benchmark's own plurals: s or es, "benchs" among them, and no irregular ones
_COUNT = re.compile(rf"a photo of ({'|'.join(NUMBERS)}) ({_ANY_OBJECT})e?s")


def parse_geneval(prompt):
    """GenEval's metadata of a prompt, in the benchmark's own form; include must all be there, exclude must not.

    {"include": [{"class", "count", and maybe "color" or "position": (relation, index of the other in include)}],
    "exclude": [{"class", "count"}]}, the last for counts only. Raises ValueError for a prompt of another form.
    """
    if match := _COUNT.fullmatch(prompt):
        count, name = NUMBERS[match[1]], match[2]
        return {"include": [{"class": name, "count": count}], "exclude": [{"class": name, "count": count + 1}]}
    match = _THINGS.fullmatch(prompt)
    if not match or match[2] == match[5]:
        raise ValueError(
            f"{prompt!r} is not of GenEval's form: 'a photo of a bench', 'a photo of a red car and a dog', 'a photo of "
            f"two clocks' or 'a photo of a dog {'/'.join(RELATIONS)} a cat', with two different objects of COCO"
        )
    colour, name, link, other_colour, other = match.groups()
    first, second = _clause(name, colour), _clause(other, other_colour)
    if link in RELATIONS:
        return {"include": [second, first | {"position": (link, 0)}]}
    return {"include": [first, second] if link else [first]}


def _clause(name, colour):
    return {"class": name, "count": 1} | ({"color": colour} if colour else {})


def geneval_objects(detections, threshold):
    """The boxes of each class with a score above the threshold, the surest first, at most 16: {name: [box]}.

    Overlapping boxes all stay, as in GenEval, whose limit of overlap is 1.
    """
    objects = {}
    for name, score, box in sorted(detections, key=lambda detection: -detection.score):
        if score > threshold and len(objects.setdefault(name, [])) < MAX_OBJECTS:
            objects[name].append(box)
    return objects


def geneval_correct(wanted, objects, colours_of):
    """GenEval's verdict: True where the surest objects of each class are enough, and right, and none is too many.

    wanted: as `parse_geneval` returns. objects: {name: [box]}, the surest first. colours_of(name, boxes): colours.
    """
    found = []
    for clause in wanted["include"]:
        name, count = clause["class"], clause["count"]
        boxes = objects.get(name, [])[:count]
        if len(boxes) < count:
            return False
        if "color" in clause and set(colours_of(name, boxes)) != {clause["color"]}:
            return False
        if "position" in clause and not _all_are(boxes, *clause["position"], found):
            return False
        found.append(boxes)
    return all(len(objects.get(clause["class"], [])) < clause["count"] for clause in wanted.get("exclude", []))


def geneval_partial(wanted, objects, colours_of):
    """The reward that Flow-GRPO trains on (arXiv 2505.05470): the mean of one term for each count, colour and position.

    Count: 1 - |wanted - found| / wanted, at any other number below 1 (so "a dog" means exactly one). Colour: the share
    of the objects that have it, 0 where the count is wrong. Position: 0 or 1, 0 where anything about the two is wrong
    (there a wrong position adds a 1 beside its 0, which looks like an oversight). Arguments as for `geneval_correct`.
    """
    terms, found = [], []
    for clause in wanted["include"]:
        name, count = clause["class"], clause["count"]
        boxes = objects.get(name, [])
        terms.append(1 - abs(count - len(boxes)) / count)
        right = len(boxes) == count
        if "color" in clause:
            terms.append(colours_of(name, boxes).count(clause["color"]) / count if right else 0)
            right = terms[-1] == 1
        if "position" in clause:
            right = right and _all_are(boxes, *clause["position"], found)
            terms.append(right)
        found.append(boxes if right else [])
    return sum(terms) / len(terms)


def _all_are(boxes, relation, target, found):
    """Whether all boxes stand in the relation to all that was found for the clause `target`, if anything was."""
    return bool(found[target]) and all(relation in relations(a, b) for a in boxes for b in found[target])


def relations(a, b):
    """Which of RELATIONS box a has to box b: none, one or, on a diagonal, two."""
    a, b = np.reshape(a, (2, 2)), np.reshape(b, (2, 2))  # corners x (x, y)
    offset = a.mean(0) - b.mean(0)
    beyond = np.maximum(np.abs(offset) - POSITION_SLACK * (np.ptp(a, 0) + np.ptp(b, 0)), 0) * np.sign(offset)
    if not beyond.any():
        return set()
    x, y = beyond / np.linalg.norm(offset)
    return {name for name, way in zip(RELATIONS, (-x, x, -y, y), strict=True) if way > 0.5}


def _object_detector(source, device):
    """A detector of transformers as a function of pictures -> for each a list of Detection, by GenEval's names."""
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    model = _pretrained(AutoModelForObjectDetection, source).to(device, torch.float32).eval()
    processor = _pretrained(AutoImageProcessor, source)
    names = {i: COCO_NAMES.get(label, label) for i, label in model.config.id2label.items()}
    if missing := [name for name in OBJECTS if name not in names.values()]:
        raise ValueError(f"geneval.detector {source} does not know {', '.join(missing)}; take one trained on COCO")

    def detect(pictures):
        outputs = model(**processor(images=pictures, return_tensors="pt").to(device))
        sizes = [(picture.height, picture.width) for picture in pictures]
        found = processor.post_process_object_detection(outputs, threshold=0, target_sizes=sizes)
        return [_detections(image, names, *size) for image, size in zip(found, sizes, strict=True)]

    return detect


def _detections(image, names, height, width):
    """One image's result of a detector of transformers, with boxes cut off at the edges of the image."""
    edges = torch.tensor([width, height, width, height], device=image["boxes"].device)
    boxes = image["boxes"].clamp(min=0).minimum(edges).tolist()
    rows = zip(image["labels"].tolist(), image["scores"].tolist(), boxes, strict=True)
    return [Detection(names[label], score, tuple(box)) for label, score, box in rows]


def _colour_classifier(source, device):
    """A CLIP model as a function of (picture, object's name, boxes) -> the colour of what is in each box."""
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    model = _pretrained(CLIPModel, source).to(device, torch.float32).eval()
    tokenizer, processor = _pretrained(AutoTokenizer, source), _pretrained(AutoImageProcessor, source)

    @functools.cache
    def directions(name):
        """(dimension, colours), the mean over three ways to say it."""
        phrases = [
            [f"a photo of a {c} {name}", f"a photo of a {c}-colored {name}", f"a photo of a {c} object"]
            for c in GENEVAL_COLOURS
        ]
        tokens = tokenizer(sum(phrases, []), padding=True, return_tensors="pt").to(device)
        features = model.text_projection(model.text_model(**tokens).pooler_output)
        features = F.normalize(features, dim=-1).unflatten(0, (len(phrases), -1)).mean(1)
        return F.normalize(features, dim=-1).T

    def colours_of(picture, name, boxes):
        # whole pixels, outwards: no crop is empty
        crops = [picture.crop((math.floor(x), math.floor(y), math.ceil(r), math.ceil(b))) for x, y, r, b in boxes]
        pixels = processor(images=crops, return_tensors="pt").to(device)
        features = model.visual_projection(model.vision_model(**pixels).pooler_output)
        return [GENEVAL_COLOURS[i] for i in (features @ directions(name)).argmax(-1).tolist()]

    return colours_of


def _pretrained(kind, source):
    """kind.from_pretrained(source), a folder or hub id; ValueError in one line where it is not to be had."""
    try:
        return kind.from_pretrained(source)
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(f"{source} does not load as {kind.__name__}: {' '.join(str(error).split())}") from error


# ---------------------------------------------------------------------------------------------------------------------
# VLM: a model behind a server

QUESTIONS = {
    "number": "How well does the image show what this prompt asks for? Prompt: {prompt}\n"
    "Answer with one number from {low} (not at all) to {high} (perfectly) and nothing else.",
    "yes": "Does the image show what this prompt asks for? Prompt: {prompt}\nAnswer Yes or No.",
}


def vlm(
    device,
    url: str = "http://localhost:8000/v1",
    model: str = "",
    score: Literal["number", "yes"] = "number",
    question: str = "",
    low: float = 0.0,
    high: float = 10.0,
    max_tokens: int = 32,
    concurrency: int = 16,
    timeout: float = 120.0,
    retries: int = 5,
    backoff: float = 1.0,
    api_key_env: str = "",
):
    """What a vision-language model says of the image, from 0 to 1, asked of a server with OpenAI's API (vLLM, SGLang).

    url: up to /v1. model: as the server names it; may be left out where it has only one. score: "number" is the first
    number of the reply, which must lie between low and high, as a fraction of the way; "yes" is P(Yes) divided by
    P(Yes) + P(No) of the reply's first token (PaCo-RL, arXiv 2512.04784). question: in it {prompt}, {low} and {high}
    are filled in; by default QUESTIONS[score]. max_tokens: of a reply with a number.

    concurrency: requests under way at once. timeout: seconds that the server may be silent. A request that fails, or
    whose reply cannot be read, is repeated up to `retries` times after backoff, 2 backoff, 4 backoff, ... seconds, or
    what the server's Retry-After says if that is more; refusals (4xx other than 408 and 429) are not repeated, and the
    run ends. api_key_env: the environment variable that holds the server's key.
    """
    if score not in QUESTIONS:
        raise ValueError(f"vlm.score = {score!r}: {' or '.join(QUESTIONS)}")
    if not low < high or retries < 0 or concurrency < 1:
        raise ValueError(f"vlm: low = {low}, high = {high}, retries = {retries}, concurrency = {concurrency} cannot be")
    if api_key_env and not os.environ.get(api_key_env):
        raise ValueError(f"vlm.api_key_env: there is no environment variable {api_key_env}")
    key = {"Authorization": f"Bearer {os.environ[api_key_env]}"} if api_key_env else {}
    headers = {"Content-Type": "application/json", **key}
    model = _served_model(url, model, headers, timeout)
    question = (question or QUESTIONS[score]).replace("{low}", f"{low:g}").replace("{high}", f"{high:g}")
    answer = {"max_tokens": 1, "logprobs": True, "top_logprobs": 20} if score == "yes" else {"max_tokens": max_tokens}
    read = _chance_of_yes if score == "yes" else functools.partial(_number, low=low, high=high)
    pool = ThreadPoolExecutor(concurrency)

    def ask(i, image, prompt):
        content = [
            {"type": "image_url", "image_url": {"url": _data_url(image)}},
            {"type": "text", "text": question.replace("{prompt}", prompt)},
        ]
        body = {"model": model, "temperature": 0, "messages": [{"role": "user", "content": content}], **answer}
        request = urllib.request.Request(f"{url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
        try:
            return _insist(request, lambda reply: read(reply["choices"][0]), timeout, retries, backoff)
        except ConnectionError as error:
            raise ConnectionError(f"image {i} ({prompt}): {error}") from error

    return lambda images, prompts: torch.tensor(list(pool.map(ask, itertools.count(), _pixels(images), prompts)))


def _served_model(url, model, headers, timeout):
    """The model's name, once the server has answered that it has it. Raises ValueError, saying what would do."""
    try:
        request = urllib.request.Request(f"{url.rstrip('/')}/models", headers=headers)
        served = _insist(request, lambda reply: [each["id"] for each in reply["data"]], timeout, retries=0, backoff=0)
    except (ConnectionError, ValueError) as error:
        raise ValueError(f"vlm.url: {error}; start a server (vllm serve MODEL), or say where there is one") from error
    if model not in served and (model or len(served) != 1):
        raise ValueError(f"vlm.model = {model!r}: the server at {url} has {', '.join(served) or 'none'}")
    return model or served[0]


def _insist(request, read, timeout, retries, backoff):
    """read(the reply's JSON), with the patience that `vlm` describes. Raises ConnectionError with the last failure."""
    for attempt in range(retries + 1):
        wait = backoff * 2**attempt
        try:
            status, after, text = _send(request, timeout)
            if status == 200:
                return read(json.loads(text))
            failure = f"HTTP {status} {text[:300]}"
            if status < 500 and status not in (408, 429):
                break
            wait = max(wait, int(after) if after.isdigit() else 0)
        except (LookupError, TypeError):
            failure = f"a reply of another form: {text[:300]}"
        except (OSError, http.client.HTTPException, ValueError) as error:
            failure = f"{type(error).__name__}: {error}"
        if attempt < retries:
            time.sleep(wait)
    times = f"{attempt + 1} times, at last" if attempt else "once"
    raise ConnectionError(f"{request.full_url} failed {times}: {' '.join(failure.split())}")


def _send(request, timeout):
    """(status, Retry-After or "", text) of the reply to an HTTP request."""
    try:
        reply = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        reply = error  # a reply too, with a status from 300 up
    with reply:
        return reply.status, reply.headers.get("Retry-After", ""), reply.read().decode(errors="replace")


def _number(choice, low, high):
    """The first number in a reply, as a fraction of the way from low to high."""
    text = choice["message"]["content"]
    number = re.search(r"-?\d+(\.\d+)?", text)
    if not number or not low <= float(number[0]) <= high:
        raise ValueError(f"the first number is none from {low:g} to {high:g} in {text[:300]!r}")
    return (float(number[0]) - low) / (high - low)


def _chance_of_yes(choice):
    """P(yes) / (P(yes) + P(no)) of a reply's first token, in any case."""
    chances = {"yes": 0.0, "no": 0.0}
    for token in choice["logprobs"]["content"][0]["top_logprobs"]:
        word = token["token"].strip().lower()
        if word in chances:
            chances[word] += math.exp(token["logprob"])
    if not any(chances.values()):
        raise ValueError(f"neither Yes nor No among the likely first words of {choice['message']['content']!r}")
    return chances["yes"] / sum(chances.values())


def _data_url(image: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


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
    "ocr": ocr,
    "geneval": geneval,
    "vlm": vlm,
}
PROMPT_CHECKS = {"shapes": world.parse, "ocr": quoted_text, "geneval": parse_geneval}
"""Functions that raise ValueError for a prompt that a reward cannot score."""
PACKAGES = {"ocr": ["rapidocr_onnxruntime"]}
"""Optional packages that a reward imports."""


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
    except (Exception, SystemExit) as error:
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
        return f"should be NAME.OPTION=VALUE (in YAML NAME.OPTION: VALUE) of a reward asked for: {', '.join(weights)}"
    if name not in REWARDS:
        return "a function of your own takes no options; write a factory into rewards.py"
    takes = inspect.signature(find_reward(name)).parameters
    if option not in takes:
        near = difflib.get_close_matches(option, takes, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"{name} has no option {option!r}; {hint}it has: {', '.join(takes)}"
    kind = takes[option].annotation
    if kind is not inspect.Parameter.empty and not _fits(value, kind):
        return f"should be {inspect.formatannotation(kind).replace('typing.', '')}"
    if option in ("batch_size", "divide_by", "side", "threads", "concurrency", "timeout") and value <= 0:
        return "must be above 0"
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
    Returns fn(images, prompts) -> {"name": (B,), ..., "total": (B,)}, float32 on the images' device. Of a video
    (B, frames, 3, H, W) a reward scores each frame, and the mean of them counts; a function with an attribute
    takes_video gets it whole. Raises ValueError for an unknown name or option and RewardError for a model that does
    not load; fn raises RewardError, naming the reward, where one returns anything but B finite numbers.
    """
    return make_rewards(weights, {}, device, options)[0]


def make_rewards(weights, eval_weights, device, options=None):
    """(reward, eval_reward): that of training as `make_reward` says, and one with the total of eval_weights.

    The second scores the images by the rewards of both; without eval_weights its total is that of the first.
    """
    asked = {**weights, **eval_weights}
    check_rewards(asked, options=options)
    functions = {name: _made(name, device, options or {}) for name in asked}

    def weighted(names, weights):
        @torch.no_grad()
        def reward(images, prompts):
            values = {name: _checked(name, functions[name], images, list(prompts)) for name in names}
            return values | {"total": sum(weight * values[name] for name, weight in weights.items())}

        return reward

    return weighted(weights, weights), weighted(asked, eval_weights or weights)


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
    frames = 1
    if images.ndim == 5 and not getattr(function, "takes_video", False):
        frames = images.shape[1]
        images, prompts = images.flatten(0, 1), [prompt for prompt in prompts for _ in range(frames)]
    try:
        value = torch.as_tensor(function(images, prompts), dtype=torch.float32, device=images.device)
    except Exception as error:
        traceback.print_exc()  # the user's own code: show where
        raise RewardError(name, f"failed: {' '.join(f'{type(error).__name__}: {error}'.split())}") from error
    if value.shape != (len(images),):
        raise RewardError(name, f"returned shape {tuple(value.shape)} for {len(images)} images")
    if not value.isfinite().all():
        bad = int((~value.isfinite()).nonzero()[0])
        raise RewardError(name, f"returned {value[bad].item()} for image {bad}")
    return value.reshape(-1, frames).mean(dim=1)


def check_untrusted(weights, options):
    pass
