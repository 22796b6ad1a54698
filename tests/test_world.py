"""The shapes world: captions, renderer, checker, prompt lists, and the shipped model folder."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

from shapes import world
from shapes.world import HELD_OUT, Scene, check, kind, parse, prompt_lists, render

SHAPES = Path(__file__).parents[1] / "shapes"
KINDS = {
    "a red circle": "single",
    "three green triangles": "count",
    "a blue square and a white cross": "two",
    "a red circle left of a blue square": "position",
}


def draw(prompts, resolution=32, seed=0):
    """Renders captions as the checker wants them: (B, 3, H, W) in [0, 1]."""
    rng = np.random.default_rng(seed)
    images = np.stack([render(prompt, resolution, rng) for prompt in prompts])
    assert images.dtype == np.uint8
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 255


def right(images, prompt):
    """(B,): which images are what one prompt asks."""
    return check(images, [prompt] * len(images)) == 1


def test_captions_are_parsed():
    assert [(parse(prompt).prompt, kind(prompt)) for prompt in KINDS] == [*KINDS.items()]
    assert parse("four white crosses") == Scene((("white", "cross"),) * 4)
    assert parse("a red circle below a red cross") == Scene((("red", "circle"), ("red", "cross")), "below")


@pytest.mark.parametrize(
    "prompt",
    ["", "a pink circle", "a red circles", "one red circle", "five red circles", "two red circle", "red circle",
     "a red circle beside a blue square", "a red circle and a red circle", "A red circle", "a red circle and"],
)  # fmt: skip
def test_parse_refuses(prompt):
    with pytest.raises(ValueError, match="outside the grammar|same object twice"):
        parse(prompt)


@pytest.mark.parametrize("height, width", [(32, 32), (64, 64), (32, 48), (64, 40)])
def test_rendered_images_pass_and_depend_on_the_generator_alone(height, width):
    train, evaluation = prompt_lists()
    prompts = (evaluation + train[::4]) * (3 if height == width == 32 else 1)
    images = draw(prompts, (height, width))
    assert images.shape == (len(prompts), 3, height, width)
    passed = check(images, prompts)
    assert passed.shape == (len(prompts),) and passed.dtype == torch.float32
    assert passed.all(), [prompt for prompt, ok in zip(prompts, passed, strict=True) if not ok]
    assert torch.equal(draw(prompts[:9], (height, width)), images[:9])
    assert (draw(prompts[:9], (height, width), seed=1) != images[:9]).flatten(1).any(1).all()


def test_small_noise_blur_specks_and_precision_are_forgiven():
    images = draw(prompts := prompt_lists()[1])
    noisy = (images + 0.03 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert check(noisy, prompts).mean() > 0.98
    assert check(images.bfloat16(), prompts).all()
    blurred = 0.8 * images + 0.2 * torch.nn.functional.avg_pool2d(images, 3, 1, 1)
    assert check(blurred, prompts).mean() > 0.95
    images[:, :, 0, 0] = 0.9
    assert check(images, prompts).mean() > 0.9


def test_check_refuses_mismatched_shapes():
    assert check(torch.zeros(0, 3, 32, 32), []).shape == (0,)
    with pytest.raises(ValueError, match="one for each prompt"):
        check(torch.zeros(2, 3, 32, 32), ["a red circle"])
    with pytest.raises(ValueError, match="outside the grammar"):
        check(torch.zeros(1, 3, 32, 32), ["a dog"])


WRONG = {
    "a red circle": ["a purple circle", "a red square", "two red circles", "a red circle and a blue cross"],
    "three green triangles": ["two green triangles", "four green triangles", "three green crosses"],
    "a blue square and a white cross": [
        "a blue square", "a white square and a blue cross", "a blue square and a white circle"
    ],
    "a red circle left of a blue square": [
        "a red circle right of a blue square", "a blue circle left of a red square"
    ],
    "a red circle above a blue square": ["a red circle below a blue square", "a blue square above a red circle"],
}  # fmt: skip


@pytest.mark.parametrize("resolution", [32, 64])
@pytest.mark.parametrize("asked, drawn", [(asked, drawn) for asked in WRONG for drawn in WRONG[asked]])
def test_wrong_scenes_fail(asked, drawn, resolution):
    assert not right(draw([drawn] * 12, resolution), asked).any()


@pytest.mark.parametrize("radius", [(0.06, 0.08), (0.21, 0.23)])
def test_objects_of_another_size_fail(radius, monkeypatch):
    monkeypatch.setattr(world, "RADIUS", radius)
    assert not right(draw(["a red circle"] * 12, 64), "a red circle").any()


def test_objects_of_two_colours_or_of_another_fail():
    images, x = draw(["a red square"] * 12), torch.arange(32)
    red = images[:, 0] > 0.3
    centre = (red * x).sum((1, 2)) / red.sum((1, 2))
    half_blue = torch.where(x > centre[:, None, None, None], images.flip(1), images)
    crimson = images + torch.tensor([0, 0, 0.2])[:, None, None] * red[:, None]
    for wrong in (half_blue, crimson):
        assert not right(wrong, "a red square").any() and not right(wrong, "a blue square").any()


@pytest.mark.parametrize("prompt", KINDS)
def test_junk_fails(prompt):
    generator = torch.Generator().manual_seed(0)
    fills = torch.stack([torch.full((3, 32, 32), grey) for grey in (0.0, 0.07, 0.5, 1.0, float("nan"))])
    smooth = torch.nn.functional.interpolate(torch.rand(8, 3, 4, 4, generator=generator), 32, mode="bicubic")
    for images in (torch.rand(8, 3, 32, 32, generator=generator), fills, smooth):
        assert not right(images, prompt).any()


@pytest.mark.parametrize("prompt", KINDS)
def test_damaged_images_fail(prompt):
    images = draw([prompt] * 24)
    assert right(images, prompt).all()

    lit = images.clone()  # an extra white blob of 4x4 pixels wherever there is room for it
    free = torch.nn.functional.max_pool2d(images.amax(1, keepdim=True), 7, 1, 3)[:, 0] < 0.15
    for image, room in zip(lit, free, strict=True):
        y, x = room[3:-3, 3:-3].nonzero()[0] + 3
        image[:, y - 2 : y + 2, x - 2 : x + 2] = 0.94
    assert not right(lit, prompt).any()

    half = images.clone()  # the upper half of every object is missing, by the rows of its first object
    for image in half:
        rows = (image.amax(0) > 0.3).any(1).nonzero()[:, 0]
        image[:, : rows[0] + 4] = images[0, :, :1, :1]
    assert not right(half, prompt).any()

    grey, blue = (torch.maximum(images, torch.tensor(c)[:, None, None]) for c in ([0.3] * 3, [0.05, 0.1, 0.4]))
    swapped = images.flip(1) if "green" not in prompt else images[:, [1, 0, 2]]  # other colours
    for damaged in (grey, blue, 0.6 * images, swapped):  # backgrounds, dimmed
        assert not right(damaged, prompt).any()


def scenes(prompts):
    """What prompts ask for; the same scene in other words counts as the same."""
    opposite, found = {"right of": "left of", "below": "above"}, set()
    for scene in map(parse, prompts):
        objects = scene.objects if scene.relation else tuple(sorted(scene.objects))
        turned = scene.relation in opposite
        found.add((objects[::-1], opposite[scene.relation]) if turned else (objects, scene.relation))
    return found


def test_prompt_lists():
    train, evaluation = prompt_lists()
    for name, prompts in (("train", train), ("eval", evaluation)):
        assert (SHAPES / "prompts" / f"{name}.txt").read_text().splitlines() == prompts
    assert len(scenes(train)) == len(train) == 384 and len(scenes(evaluation)) == len(evaluation) == 96
    assert not scenes(train) & scenes(evaluation)
    for prompts, counts in ((train, (16, 48, 160, 160)), (evaluation, (8, 24, 32, 32))):
        kinds = [kind(prompt) for prompt in prompts]
        assert tuple(kinds.count(k) for k in ("single", "count", "two", "position")) == counts
    trained = [pair for prompt in train for pair in set(parse(prompt).objects)]
    assert len({colour for colour, _ in HELD_OUT}) == len({shape for _, shape in HELD_OUT}) == 3
    for pair in world.PAIRS:
        assert trained.count(pair) == 0 if pair in HELD_OUT else trained.count(pair) >= 15, pair
    for name in ("single", "two", "count", "position"):
        shown = {pair for prompt in evaluation if kind(prompt) == name for pair in parse(prompt).objects}
        assert set(HELD_OUT) <= shown, name


def test_model_folder():
    folder = SHAPES / "model"
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 10.5e6
    for loader in (StableDiffusion3Pipeline, DiffusionPipeline):
        pipe = loader.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
        assert type(pipe) is StableDiffusion3Pipeline
        assert {m.dtype for m in pipe.components.values() if isinstance(m, torch.nn.Module)} == {torch.float32}
    pipe.set_progress_bar_config(disable=True)
    for prompt in prompt_lists()[1] + ["a red circle right of a yellow triangle"]:  # one token a word
        assert len(pipe.tokenizer(prompt).input_ids) == len(prompt.split()) + 2 <= pipe.tokenizer.model_max_length
    prompts = ["a red circle", "a white cross", "a blue square"] * 4
    call = dict(num_inference_steps=8, guidance_scale=3, max_sequence_length=1, output_type="pt")
    images = pipe(prompts, height=32, width=32, generator=torch.Generator().manual_seed(0), **call).images
    assert images.shape == (12, 3, 32, 32) and check(images, prompts).mean() > 0.5
    assert pipe("a red circle", height=64, width=64, **call).images.shape == (1, 3, 64, 64)
