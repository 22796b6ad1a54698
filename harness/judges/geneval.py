"""GenEval: objects, counts, colours, places."""

import functools
import math
import re

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from harness.judges.clip import VIT_L, Clip
from harness.judges.weights import Model, load, to_pil

OBJECTS = (  # the 80 classes of COCO as GenEval names them
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant"),
    *("bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard"),
    *("sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle"),
    *("wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli"),
    *("carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet"),
    *("tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster"),
    *("sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)
COCO_NAMES = {  # what detectors call a class -> what GenEval calls it, where they differ
    **{"motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch", "pottedplant": "potted plant"},
    **{"diningtable": "dining table", "tvmonitor": "tv", "mouse": "computer mouse", "remote": "tv remote"},
    **{"keyboard": "computer keyboard", "hair dryer": "hair drier"},
}
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
NUMBERS = dict(two=2, three=3, four=4, five=5, six=6, seven=7, eight=8, nine=9, ten=10)
RELATIONS = ("left of", "right of", "above", "below")
MAX_OBJECTS = 16  # of a class in an image
POSITION_SLACK = 0.1  # the distance of two centres counts from this share of the sum of the two sizes on


def geneval(
    device, detector: Model = "PekingU/rtdetr_r50vd", clip: Model = VIT_L, strict: bool = False,
    threshold: float = 0.3, counting_threshold: float = 0.9,
):  # fmt: skip
    """Whether the image shows the objects, counts, colours and positions of a prompt of GenEval (arXiv 2310.11513).

    By default Flow-GRPO's training reward with partial credit, at most 1, and below 0 with more than twice the objects
    asked for; with strict, the benchmark's 0 or 1 (see `verdict`). What is asked for is GenEval's published metadata,
    `include` and `exclude` of the prompt's row in the data file, or where it has none, read from the prompt.

    detector: folder or hub id of a model of transformers for object detection with the classes of COCO. clip: of a CLIP
    model, which names the colours. threshold: least score of an object; counting_threshold: the same for prompts with
    a number. GenEval chose the two for its Mask2Former; another detector's scores may ask for others. It also greys the
    background out by that model's masks before the colour is judged; here there are boxes only, judged as they are.
    """
    model, processor = load(AutoModelForObjectDetection, detector), load(AutoImageProcessor, detector)
    model.to(device, torch.float32)
    names = {i: COCO_NAMES.get(label, label) for i, label in model.config.id2label.items()}
    if missing := [name for name in OBJECTS if name not in names.values()]:
        raise ValueError(f"geneval.detector {detector} does not know {', '.join(missing)}; take one trained on COCO")
    colours_of = _colour_classifier(clip, device)

    def score(images, prompts, rows=None):
        pictures = to_pil(images)
        outputs = model(**processor(images=pictures, return_tensors="pt").to(device))
        size = images.shape[-2:]
        edges = torch.tensor([*size[::-1], *size[::-1]], device=device)
        found = processor.post_process_object_detection(outputs, threshold=0, target_sizes=[size] * len(images))
        values = []
        for picture, prompt, row, image in zip(pictures, prompts, rows or [{}] * len(prompts), found, strict=True):
            wanted = metadata(prompt, row)
            labels = [names[label] for label in image["labels"].tolist()]
            boxes = image["boxes"].clamp(min=0).minimum(edges).tolist()
            detections = zip(labels, image["scores"].tolist(), boxes, strict=True)
            objects = surest(detections, counting_threshold if "exclude" in wanted else threshold)
            values.append(verdict(wanted, objects, functools.partial(colours_of, picture), strict))
        return torch.tensor(values)

    return score


def metadata(prompt, row):
    """What a prompt of GenEval asks for, in the benchmark's own form: as its row in the data file says, or else parsed.

    {"include": [{"class", "count", and maybe "color" or "position": [relation, index of the other in include]}],
    "exclude": [{"class", "count"}]}: the first must all be there; of the second, in counts only, fewer. Raises
    ValueError for metadata or a prompt of another form.
    """
    if "include" not in row:
        return parse(prompt)
    asked = {key: row[key] for key in ("include", "exclude") if key in row}
    try:
        good = bool(row["include"])
        for clauses in asked.values():
            for i, clause in enumerate(clauses):
                places = [[relation, earlier] for relation in RELATIONS for earlier in range(i)]
                known = {"class": OBJECTS, "count": range(1, 100), "color": COLOURS, "position": places}
                good &= {"class", "count"} <= clause.keys() and all(clause[key] in known[key] for key in clause)
    except (TypeError, AttributeError, KeyError):  # no mappings in lists, or of other keys
        good = False
    if not good:
        raise ValueError(f"the metadata of {prompt!r} are not in GenEval's form: {asked}")
    return asked


_ANY_OBJECT, _ANY_COLOUR = "|".join(OBJECTS), "|".join(COLOURS)
_THING = rf"an? (?:({_ANY_COLOUR}) )?({_ANY_OBJECT})"
_THINGS = re.compile(rf"a photo of {_THING}(?: (and|{'|'.join(RELATIONS)}) {_THING})?")
# the benchmark's own plurals: s or es, "benchs" among them, and no irregular ones
_COUNT = re.compile(rf"a photo of ({'|'.join(NUMBERS)}) ({_ANY_OBJECT})e?s")


def parse(prompt):
    """The metadata of a prompt. Raises ValueError for a prompt of another form."""
    if match := _COUNT.fullmatch(prompt):
        count, name = NUMBERS[match[1]], match[2]
        return {"include": [{"class": name, "count": count}], "exclude": [{"class": name, "count": count + 1}]}
    match = _THINGS.fullmatch(prompt)
    if not match or match[2] == match[5]:
        raise ValueError(
            f"{prompt!r} is not of GenEval's form: 'a photo of a bench', 'a photo of a red car and a dog', 'a photo of "
            f"two clocks' or 'a photo of a dog {'/'.join(RELATIONS)} a cat', with two different objects of COCO"
        )
    link, things = match[3], (match.group(1, 2), match.group(4, 5))
    first, second = ({"class": name, "count": 1} | ({"color": colour} if colour else {}) for colour, name in things)
    if link in RELATIONS:
        return {"include": [second, first | {"position": [link, 0]}]}
    return {"include": [first, second] if link else [first]}


def surest(detections, threshold):
    """The boxes of each class with a score above the threshold, the surest first, at most 16: {name: [box]}.

    detections: (name, score, box), a box being (left, top, right, bottom) in pixels. Overlaps stay, as in GenEval.
    """
    objects = {}
    for name, score, box in sorted(detections, key=lambda detection: -detection[1]):
        if score > threshold and len(objects.setdefault(name, [])) < MAX_OBJECTS:
            objects[name].append(box)
    return objects


def verdict(wanted, objects, colours_of, strict):
    """The score of what was found in an image; strict: GenEval's 0 or 1, else Flow-GRPO's reward (arXiv 2505.05470).

    wanted: as `metadata` returns. objects: {name: [box]}, the surest first. colours_of(name, boxes): colours.

    GenEval: 1 where the surest objects of each class are enough, and right, and none is too many. Flow-GRPO: the mean
    of one term for each count, colour and position. Count: 1 - |wanted - found| / wanted, at any other number below 1
    (so "a dog" means exactly one). Colour: the share of the objects that have it, 0 where the count is wrong. Position:
    0 or 1, 0 where anything about the two is wrong (its code adds a 1 beside that 0, which looks like an oversight).
    """
    terms, found = [], []
    for clause in wanted["include"]:
        name, count = clause["class"], clause["count"]
        boxes = objects.get(name, [])[: count if strict else None]
        terms.append(1 - abs(count - len(boxes)) / count)
        right = len(boxes) == count
        if "color" in clause:
            terms.append(colours_of(name, boxes).count(clause["color"]) / count if right else 0)
            right = terms[-1] == 1
        if "position" in clause:
            relation, other = clause["position"]
            placed = all(relation in relations(box, beside) for box in boxes for beside in found[other])
            right = right and bool(found[other]) and placed
            terms.append(right)
        found.append(boxes if right else [])
    if not strict:
        return sum(terms) / len(terms)
    few = all(len(objects.get(clause["class"], [])) < clause["count"] for clause in wanted.get("exclude", []))
    return float(few and all(term == 1 for term in terms))


def relations(a, b):
    """Which of RELATIONS box a has to box b: none, one or, on a diagonal, two."""
    a, b = np.reshape(a, (2, 2)), np.reshape(b, (2, 2))  # corners x (x, y)
    offset = a.mean(0) - b.mean(0)
    beyond = np.maximum(np.abs(offset) - POSITION_SLACK * (np.ptp(a, 0) + np.ptp(b, 0)), 0) * np.sign(offset)
    x, y = beyond / (np.linalg.norm(offset) or 1)
    return {name for name, way in zip(RELATIONS, (-x, x, -y, y), strict=True) if way > 0.5}


def _colour_classifier(source, device):
    """A CLIP model as a function of (picture, object's name, boxes) -> the colour of what is in each box."""
    clip = Clip(device, source)

    @functools.cache
    def directions(name):
        """(dimension, colours), the mean over three ways to say it."""
        ways = [[f"a {colour} {name}", f"a {colour}-colored {name}", f"a {colour} object"] for colour in COLOURS]
        features = clip.prompts([f"a photo of {way}" for three in ways for way in three])
        return F.normalize(features.unflatten(0, (len(COLOURS), 3)).mean(1), dim=-1).T

    def colours_of(picture, name, boxes):
        # whole pixels, outwards: no crop is empty
        crops = [picture.crop((math.floor(x), math.floor(y), math.ceil(r), math.ceil(b))) for x, y, r, b in boxes]
        return [COLOURS[i] for i in (clip.images(crops) @ directions(name)).argmax(-1).tolist()]

    return colours_of
