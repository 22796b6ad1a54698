"""The shapes world: a text-to-image task in miniature, with captions, a renderer and a checker.

    single     "a red circle"
    count      "three green triangles"                  two, three, four
    two        "a blue square and a white cross"
    position   "a red circle left of a blue square"     left of, right of, above, below

`render` draws a caption, `check` reads images back and says whether each one is what its caption asks. Both know
the shapes by the same few numbers (`OUTLINES`), in units of the object's radius, y pointing down.

`python -m shapes.world` writes the prompt lists `prompts/train.txt` and `prompts/eval.txt`.
"""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

COLOURS = {
    "red": (225, 45, 45),
    "green": (45, 190, 75),
    "blue": (50, 95, 245),
    "yellow": (245, 215, 50),
    "purple": (185, 60, 215),
    "white": (240, 240, 240),
}
BACKGROUND = (16, 16, 24)
SHAPES = ("circle", "square", "triangle", "cross")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
COUNTS = {"two": 2, "three": 3, "four": 4}
RELATIONS = ("left of", "right of", "above", "below")
PAIRS = tuple(itertools.product(COLOURS, SHAPES))  # the 24 (colour, shape) pairs
HELD_OUT = (("green", "square"), ("purple", "cross"), ("yellow", "triangle"))  # never in train.txt, often in eval.txt

# Half extents (left/right, up, down) and area of each shape at radius 1; every centroid is the origin.
OUTLINES = {
    "circle": (1.0, 1.0, 1.0, np.pi),
    "square": (0.88, 0.88, 0.88, 1.76**2),
    "triangle": (1.1, 1.2, 0.6, 1.98),
    "cross": (1.05, 1.05, 1.05, 4 * 1.05 * 0.7 - 0.7**2),
}
ARM = 0.35  # half width of the cross's arms

# Lengths as fractions of the image's shorter side.
RADIUS = (0.12, 0.16)  # drawn
GAP = 0.07  # between the bounding boxes of two drawn objects
BORDER = 0.03  # between a drawn object and the image's edge
DRAWN_MARGIN, MARGIN = 0.25, 0.15  # a relation's least distance between centroids: drawn, and accepted


# ------------------------------------------------------------------------------------------------ captions


@dataclass(frozen=True)
class Scene:
    """What a caption asks for: `objects` as (colour, shape) pairs, and the relation of the first to the second."""

    objects: tuple[tuple[str, str], ...]
    relation: str | None = None

    @property
    def kind(self) -> str:
        if self.relation:
            return "position"
        if len(self.objects) == 1:
            return "single"
        return "two" if self.objects[0] != self.objects[1] else "count"

    @property
    def prompt(self) -> str:
        (colour, shape), *rest = self.objects
        if self.kind == "count":
            return f"{list(COUNTS)[len(rest) - 1]} {colour} {PLURALS[shape]}"
        link = f" {self.relation or 'and'} "
        return link.join(f"a {colour} {shape}" for colour, shape in self.objects)


_THING = rf"a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_SOME = re.compile(rf"({'|'.join(COUNTS)}) ({'|'.join(COLOURS)}) ({'|'.join(PLURALS.values())})")
_THINGS = re.compile(rf"{_THING}(?: (and|{'|'.join(RELATIONS)}) {_THING})?")


def parse(prompt: str) -> Scene:
    """Reads a caption. Raises ValueError for a caption outside the grammar."""
    if match := _SOME.fullmatch(prompt):
        count, colour, plural = match.groups()
        shape = next(shape for shape in SHAPES if PLURALS[shape] == plural)
        return Scene(((colour, shape),) * COUNTS[count])
    if match := _THINGS.fullmatch(prompt):
        colour, shape, link, colour_2, shape_2 = match.groups()
        if link is None:
            return Scene(((colour, shape),))
        if (colour, shape) == (colour_2, shape_2):
            raise ValueError(f"{prompt!r} names the same object twice; write 'two {colour} {PLURALS[shape]}'")
        return Scene(((colour, shape), (colour_2, shape_2)), None if link == "and" else link)
    raise ValueError(
        f"{prompt!r} is outside the grammar: 'a red circle', 'three green triangles', 'a blue square and a white "
        f"cross' or 'a red circle left of a blue square', with colours {', '.join(COLOURS)}; shapes "
        f"{', '.join(SHAPES)}; counts {', '.join(COUNTS)}; relations {', '.join(RELATIONS)}"
    )


def kind(prompt: str) -> str:
    """ "single", "two", "count" or "position". Raises ValueError for a caption outside the grammar."""
    return parse(prompt).kind


# ------------------------------------------------------------------------------------------------ renderer


def _place(scene: Scene, height: int, width: int, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Random (x, y, radius) in pixels for each object: apart from each other, inside the image, relation kept."""
    unit = min(height, width)
    sides, ups, downs, _ = np.array([OUTLINES[shape] for _, shape in scene.objects]).T
    for attempt in range(10_000):
        largest = RADIUS[1] - (RADIUS[1] - RADIUS[0]) * min(1, attempt / 500)  # a crowded scene gets smaller objects
        r = rng.uniform(RADIUS[0], largest, len(scene.objects)) * unit
        edge = BORDER * unit
        x = rng.uniform(edge + sides * r, width - edge - sides * r)
        y = rng.uniform(edge + ups * r, height - edge - downs * r)
        boxes = list(zip(x - sides * r, x + sides * r, y - ups * r, y + downs * r, strict=True))
        apart = all(
            max(a[0] - b[1], b[0] - a[1], a[2] - b[3], b[2] - a[3]) >= GAP * unit
            for a, b in itertools.combinations(boxes, 2)
        )
        if not apart:
            continue
        if scene.relation:
            dx, dy = x[1] - x[0], y[1] - y[0]
            towards = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[scene.relation]
            if towards < DRAWN_MARGIN * unit:
                continue
        return list(zip(x, y, r, strict=True))
    raise ValueError(f"{len(scene.objects)} objects do not fit into {height}x{width} pixels")


def render(prompt: str | Scene, resolution: int | tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Draws a caption with random sizes and places.

    `resolution` is in pixels, one side or (height, width), from 32 up. Returns uint8 (height, width, 3).
    Raises ValueError for a caption outside the grammar.
    """
    scene = parse(prompt) if isinstance(prompt, str) else prompt
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    scale = max(4, 256 // min(height, width))  # drawn this much larger, then averaged: anti-aliasing
    image = Image.new("RGB", (width * scale, height * scale), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for (colour, shape), (x, y, r) in zip(scene.objects, _place(scene, height, width, rng), strict=True):
        x, y, r = x * scale - 0.5, y * scale - 0.5, r * scale  # Pillow's coordinates name pixel centres
        side, up, down, _ = OUTLINES[shape]
        box = (x - side * r, y - up * r, x + side * r, y + down * r)
        if shape == "circle":
            draw.ellipse(box, COLOURS[colour])
        elif shape == "square":
            draw.rectangle(box, COLOURS[colour])
        elif shape == "triangle":
            draw.polygon([(x, box[1]), (box[2], box[3]), (box[0], box[3])], COLOURS[colour])
        else:
            draw.rectangle((box[0], y - ARM * r, box[2], y + ARM * r), COLOURS[colour])
            draw.rectangle((x - ARM * r, box[1], x + ARM * r, box[3]), COLOURS[colour])
    return np.asarray(image.reduce(scale))


# ------------------------------------------------------------------------------------------------ checker

SOLID = 0.5  # a pixel belongs to an object when its colour covers at least this much of it
SPECK = 0.004  # components below this fraction of the image's area are no objects ...
STRAY = 0.008  # ... but all that lies outside the objects may together not exceed this one
BRIGHT = 0.2  # RGB distance from the background above which a pixel outside the objects counts
MISMATCH = 0.22  # largest sum |coverage - template| / area
PURITY = 0.85  # least share of an object's area in one colour
OFF_COLOUR = 0.15  # largest mean RGB distance of an object's pixels from its colour's line to the background
ACCEPTED_RADIUS = (0.095, 0.195)


def _distance(shape: str, x: torch.Tensor, y: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Signed distance in pixels to a shape's outline, negative inside."""
    side, up, down, _ = OUTLINES[shape]
    if shape == "circle":
        return (x * x + y * y).sqrt() - r
    x = x.abs()
    if shape == "triangle":
        flank = ((up + down) * x - side * (y + up * r)) / np.hypot(up + down, side)
        return torch.maximum(flank, y - down * r)
    y = y.abs()
    if shape == "square":
        return torch.maximum(x, y) - side * r
    return torch.maximum(torch.maximum(x, y) - side * r, torch.minimum(x, y) - ARM * r)


def check(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """1.0 where an image shows exactly what its caption asks, else 0.0.

    `images` (B, 3, H, W) float in [0, 1], on any device; `prompts` B captions. Returns (B,) float32 on that device.
    Raises ValueError for a caption outside the grammar, or for shapes that do not match.

    Every pixel is explained as background mixed with one colour; connected solid pixels are an object; an object
    must match the template of one shape, of its own area and centroid, in one colour and a sensible size. The image
    is right when its objects are exactly those asked for, in the right relation, on an otherwise dark image.
    """
    if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(prompts):
        raise ValueError(f"images {tuple(images.shape)} should be ({len(prompts)}, 3, H, W), one for each prompt")
    scenes = [parse(prompt) for prompt in prompts]
    at_once = 128 if images.device.type == "cpu" else 2048  # what a CPU's cache holds; a GPU is waited for once a chunk
    chunks = [_check(images[i : i + at_once], scenes[i : i + at_once]) for i in range(0, len(scenes), at_once)]
    return torch.cat(chunks) if chunks else images.new_zeros(0, dtype=torch.float32)


@torch.no_grad()
def _check(images: torch.Tensor, scenes: list[Scene]) -> torch.Tensor:
    B, _, H, W = images.shape
    device, unit = images.device, min(H, W)
    background = torch.tensor(BACKGROUND, device=device) / 255
    palette = torch.tensor(list(COLOURS.values()), device=device) / 255 - background  # (6, 3)

    # Each pixel = background + coverage * palette colour, by the colour that leaves the smallest remainder.
    d = images.float().nan_to_num(0.5).clamp(0, 1) - background[:, None, None]
    dot = torch.einsum("kc,bchw->bkhw", palette, d)
    norm = palette.square().sum(1)[:, None, None]
    covers = (dot / norm).clamp(0, 1)
    remainder, colour = (covers * (covers * norm - 2 * dot)).min(1)  # (B, H, W), short of |d|^2
    brightness = d.square().sum(1)
    remainder = (brightness + remainder).clamp(min=0).sqrt()
    coverage = covers.gather(1, colour[:, None])[:, 0]

    # Connected components: every solid pixel takes the largest label around it until nothing changes.
    def spread(label):
        return F.max_pool2d(label, 3, stride=1, padding=1)

    solid = coverage > SOLID
    label = torch.arange(1, H * W + 1, device=device, dtype=torch.float32).view(1, H, W) * solid
    for _ in range(0, unit, 4):
        last = label
        for _ in range(4):
            label = spread(label) * solid
        if torch.equal(label, last):
            break
    first = torch.arange(B, device=device)[:, None, None] * (H * W + 1)  # makes labels distinct in the batch
    distinct = label.long() + first * solid
    sizes = torch.bincount(distinct.flatten(), minlength=B * (H * W + 1))
    sizes[0] = 0
    large = sizes[distinct] >= SPECK * H * W
    label = label * large
    owner = torch.where(label > 0, label, spread(label)).long()  # objects with their soft rim of one pixel
    owner = owner + first * (owner > 0)
    label = distinct * large
    stray = ((brightness > BRIGHT**2) & (owner == 0)).sum((1, 2))
    right = stray <= STRAY * H * W

    # Each of the N objects, as an image of its own.
    ids = label.unique()
    ids = ids[ids > 0]
    index = ids // (H * W + 1)  # (N,) the image it is in
    mine = (owner[index] == ids[:, None, None]) * coverage[index]  # (N, H, W)
    x = torch.arange(W, device=device) + 0.5
    y = torch.arange(H, device=device)[:, None] + 0.5
    area = mine.sum((1, 2))
    cx, cy = (mine * x).sum((1, 2)) / area, (mine * y).sum((1, 2)) / area
    x, y = x - cx[:, None, None], y - cy[:, None, None]
    radii = torch.stack([(area / OUTLINES[shape][3]).sqrt() for shape in SHAPES], 1)  # (N, 4)
    templates = [(0.5 - _distance(s, x, y, radii[:, i, None, None])).clamp(0, 1) for i, s in enumerate(SHAPES)]
    mismatch = torch.stack([(mine - t).abs().sum((1, 2)) / area for t in templates], 1)
    mismatch, shape = mismatch.min(1)
    radius = radii.gather(1, shape[:, None])[:, 0] / unit
    shares = torch.stack([(mine * (colour[index] == k)).sum((1, 2)) / area for k in range(len(COLOURS))], 1)
    purity, hue = shares.max(1)
    off_colour = (mine * remainder[index]).sum((1, 2)) / area
    clean = (mismatch < MISMATCH) & (purity > PURITY) & (off_colour < OFF_COLOUR)
    clean &= (radius > ACCEPTED_RADIUS[0]) & (radius < ACCEPTED_RADIUS[1])
    right[index[~clean]] = False

    # Exactly the objects asked for ...
    pair = hue * len(SHAPES) + shape
    seen = torch.zeros(B, len(PAIRS), device=device)
    seen.index_put_((index, pair), torch.ones_like(area), accumulate=True)
    asked = torch.tensor([[scene.objects.count(pair) for pair in PAIRS] for scene in scenes], device=device)
    right &= (seen == asked).all(1)

    # ... and, for positions, in their relation.
    place = torch.zeros(B, len(PAIRS), 2, device=device)
    place[index, pair] = torch.stack([cx, cy], 1)
    rows = [b for b, scene in enumerate(scenes) if scene.relation]
    if rows:
        first, second = (torch.tensor([PAIRS.index(scenes[b].objects[i]) for b in rows]) for i in (0, 1))
        axis = torch.tensor([int(scenes[b].relation in ("above", "below")) for b in rows])
        sign = torch.tensor([1 if scenes[b].relation in ("left of", "above") else -1 for b in rows], device=device)
        offset = place[rows, second, axis] - place[rows, first, axis]
        right[rows] &= sign * offset > MARGIN * unit
    return right.float()


# ------------------------------------------------------------------------------------------------ prompt lists


def prompt_lists(seed: int = 0) -> tuple[list[str], list[str]]:
    """The 384 training and 96 evaluation captions: disjoint scenes, the pairs of `HELD_OUT` in evaluation alone.

    Of every kind, 3 in 8 evaluation captions show a held-out pair.
    """
    rng = np.random.default_rng(seed)

    def either(a, relation, b):  # two ways to say the same: only one of them is in the lists
        return Scene((a, b), relation) if rng.random() < 0.5 else Scene((b, a), inverse[relation])

    inverse = {"left of": "right of", "above": "below"}
    scenes = {
        "single": [Scene((pair,)) for pair in PAIRS],
        "count": [Scene((pair,) * n) for pair in PAIRS for n in COUNTS.values()],
        "two": [Scene((a, b)) for a, b in itertools.combinations(PAIRS, 2)],
        "position": [either(a, relation, b) for a, b in itertools.permutations(PAIRS, 2) for relation in inverse],
    }
    sizes = {"single": (16, 8), "count": (48, 24), "two": (160, 32), "position": (160, 32)}
    train, evaluation = [], []
    for name, (n_train, n_eval) in sizes.items():
        prompts = [scenes[name][i].prompt for i in rng.permutation(len(scenes[name]))]
        unseen = [p for p in prompts if set(parse(p).objects) & set(HELD_OUT)]
        seen = [p for p in prompts if p not in set(unseen)]
        n_unseen = n_eval * 3 // 8
        train += seen[:n_train]
        evaluation += seen[n_train : n_train + n_eval - n_unseen] + unseen[:n_unseen]
    return train, evaluation


if __name__ == "__main__":
    for name, prompts in zip(("train", "eval"), prompt_lists(), strict=True):
        path = Path(__file__).parent / "prompts" / f"{name}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(prompts) + "\n")
        print(f"{path}: {len(prompts)} prompts")
