"""The rewards by another model: text by OCR, GenEval's rules by a detector and CLIP, a model behind a server."""

import base64
import importlib.util
import io
import json
import math
import shutil
import threading
import time
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_pipelines
import torch
import transformers
from PIL import Image, ImageDraw, ImageFont
from tokenizers.processors import TemplateProcessing

import rewards
from rewards import Detection


def tensor(picture):
    """A picture as a batch of one: (1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255


# ------------------------------------------------------------------------------------------------ ocr


@pytest.fixture(scope="module")
def ocr():
    pytest.importorskip("rapidocr_onnxruntime")
    return rewards.ocr("cpu")


def written(text, side, colour="black"):
    """A white image with the text as wide as four fifths of it."""
    picture = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(picture)
    size = next(n for n in range(side, 0, -1) if draw.textlength(text, font=ImageFont.load_default(n)) < 0.8 * side)
    draw.text((side / 2, side / 2), text, fill=colour, font=ImageFont.load_default(size), anchor="mm")
    return tensor(picture)


@pytest.mark.parametrize("side", [48, 64, 128, 256])
def test_clean_words_are_read(ocr, side):
    words = ["HELLO", "stop", "Flow", "Open 24"]
    images = torch.cat([written(word, side) for word in words])
    right = ocr(images, [f"a sign that says '{word}'" for word in words])
    assert right.shape == (4,) and right.tolist() == [1, 1, 1, 1]
    assert (ocr(images, ['a sign that says "zigzag"'] * 4) <= 0.2).all()  # another word: what letters they share
    assert ocr(images[1:2], ["a sign that says 'stops'"]).item() == pytest.approx(0.8)  # one letter of five is missing


def test_an_image_without_text_scores_0(ocr):
    images = torch.stack([torch.zeros(3, 64, 64), torch.ones(3, 64, 64), torch.full((3, 64, 64), 0.5)])
    assert ocr(images, ["'hello'"] * 3).tolist() == [0, 0, 0]


def test_noise_lowers_the_reading(ocr):
    words = ["HELLO", "stop", "Flow", "Open 24"]
    images, prompts = torch.cat([written(word, 128) for word in words]), [f"'{word}'" for word in words]
    generator = torch.Generator().manual_seed(0)
    share, noise = torch.rand(4, 1, 128, 128, generator=generator), torch.rand(4, 3, 128, 128, generator=generator)
    means = [ocr(torch.where(share < amount, noise, images), prompts).mean().item() for amount in (0, 0.4, 0.9)]
    assert means[0] > means[1] > means[2] == 0


def test_small_images_are_enlarged_for_reading(ocr):
    images, prompts = torch.cat([written("coffee", 32), written("Flow", 32)]), ["'coffee'", "'Flow'"]
    assert ocr(images, prompts).mean() > rewards.ocr("cpu", side=32)(images, prompts).mean()
    wide = torch.nn.functional.pad(written("Flow", 48), (24, 24), value=1)  # any shape
    assert ocr(wide, ["'Flow'"]).item() == 1


def test_red_is_not_read_as_blue(ocr, monkeypatch):
    import rapidocr_onnxruntime

    seen = []
    monkeypatch.setattr(rapidocr_onnxruntime.RapidOCR, "__call__", lambda self, image, **_: (seen.append(image), None))
    rewards.ocr("cpu")(torch.tensor([1.0, 0.5, 0.0])[None, :, None, None].expand(1, 3, 128, 128), ["'a'"])
    assert seen[0][0, 0].tolist() == [0, 128, 255]  # the reader takes BGR


def test_a_missing_reader_is_named(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "ocr" in name else find_spec(name))
    with pytest.raises(ValueError, match="pip install rapidocr_onnxruntime"):
        rewards.check_rewards({"ocr": 1.0}, ["a sign that says 'Open'"])


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign that says "Open"', "Open"),
        ("a sign that says 'Open'", "Open"),
        ("a sign that says “Open”, at night", "Open"),
        ("a sign that says ‘Open’.", "Open"),
        ("the dog's sign says 'don't stop', and the dogs' bowl is empty", "don't stop"),
        ("the dog’s sign says ‘don’t stop’", "don’t stop"),
        ("\"It's 'late'\" on a clock", "It's 'late'"),
        ('"Hello" above "World"', "Hello World"),
    ],
)
def test_the_quoted_text_of_a_prompt(prompt, text):
    assert rewards.quoted_text(prompt) == text


@pytest.mark.parametrize("prompt", ["a red circle", "the dog's bowl", 'an empty "" quote', 'a "  " blank'])
def test_a_prompt_without_quotes_is_refused_before_anything_is_loaded(prompt):
    with pytest.raises(ValueError, match="needs the text in quotes"):
        rewards.check_rewards({"ocr": 1.0}, ["a 'good' one", prompt])
    rewards.check_rewards({"ocr": 1.0}, ["a 'good' one"])


def test_the_score_of_a_reading():
    assert rewards.text_score("Open 24", "open24") == 1
    assert rewards.text_score("Hello World", "HELLO\nWORLD") == 1
    assert rewards.text_score("open", "the shop is open today") == 1
    assert rewards.text_score("open", "oqen") == 0.75
    assert rewards.text_score("open", "") == 0
    assert rewards.text_score("open", "a long and other text") == 0  # never below


def test_edit_distance():
    assert rewards.edit_distance("kitten", "sitting") == 3
    assert rewards.edit_distance("flaw", "lawn") == 2
    assert rewards.edit_distance("", "abc") == rewards.edit_distance("abc", "") == 3
    assert rewards.edit_distance("abc", "abc") == 0


# ------------------------------------------------------------------------------------------------ geneval: prompts


def prompt_of(metadata):
    """The prompt that GenEval writes for its metadata; the inverse of `parse_geneval`."""

    def thing(clause):
        words = " ".join(filter(None, (clause.get("color"), clause["class"])))
        return f"an {words}" if words[0] in "aeiou" else f"a {words}"

    first, *rest = metadata["include"]
    if "exclude" in metadata:
        plural = first["class"] + ("es" if first["class"].endswith("s") else "s")
        return f"a photo of {dict(zip(range(2, 5), ('two', 'three', 'four'), strict=True))[first['count']]} {plural}"
    if rest and "position" in rest[0]:
        return f"a photo of {thing(rest[0])} {rest[0]['position'][0]} {thing(first)}"
    return "a photo of " + " and ".join(map(thing, metadata["include"]))


def test_the_metadata_of_the_six_kinds():
    parse = rewards.parse_geneval
    assert parse("a photo of a bench") == {"include": [{"class": "bench", "count": 1}]}
    assert parse("a photo of two clocks") == {
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
    }
    assert parse("a photo of a cat and a dog") == {
        "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1}]
    }
    assert parse("a photo of a red car") == {"include": [{"class": "car", "count": 1, "color": "red"}]}
    assert parse("a photo of a dog left of a cat") == {
        "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ("left of", 0)}]
    }
    assert parse("a photo of a red car and a blue bench") == {
        "include": [{"class": "car", "count": 1, "color": "red"}, {"class": "bench", "count": 1, "color": "blue"}]
    }


def test_every_class_colour_number_and_relation_survives_the_way_to_a_prompt_and_back():
    assert len(set(rewards.OBJECTS)) == 80
    count = len(rewards.OBJECTS)
    for i, name in enumerate(rewards.OBJECTS):
        colour, other_colour = (rewards.GENEVAL_COLOURS[(i + n) % 10] for n in (0, 3))
        one, number = {"class": name, "count": 1}, 2 + i % 3
        other = {"class": rewards.OBJECTS[(i + 7) % count], "count": 1}
        for metadata in (
            {"include": [one]},
            {"include": [one, other]},
            {"include": [one | {"count": number}], "exclude": [one | {"count": number + 1}]},
            {"include": [one | {"color": colour}]},
            {"include": [one, other | {"position": (rewards.RELATIONS[i % 4], 0)}]},
            {"include": [one | {"color": colour}, other | {"color": other_colour}]},
        ):
            assert rewards.parse_geneval(prompt_of(metadata)) == metadata


@pytest.mark.parametrize(
    "prompt",
    [
        "a red circle",
        "a photo of a dragon",
        "a photo of one clock",
        "a photo of two clock",
        "a photo of a mauve car",
        "a photo of a dog beside a cat",
        "a photo of a dog and a dog",
        "a photo of a red dog and a blue dog",
        "a photo of a dog and a cat and a horse",
        "a photo of a dog left of a dog",
    ],
)
def test_a_prompt_of_another_form_is_refused_before_anything_is_loaded(prompt):
    with pytest.raises(ValueError, match="is not of GenEval's form"):
        rewards.check_rewards({"geneval": 1.0}, ["a photo of a dog", prompt])


# ------------------------------------------------------------------------------------------------ geneval: rules

LEFT, RIGHT, FAR_RIGHT = (10, 40, 30, 60), (70, 40, 90, 60), (100, 40, 120, 60)
TOP, BOTTOM = (40, 0, 60, 20), (40, 80, 60, 100)


def red(name, boxes):
    return ["red"] * len(boxes)


def verdicts(prompt, colours_of=red, **objects):
    """(the benchmark's verdict, the training reward) for boxes of each class."""
    wanted, objects = rewards.parse_geneval(prompt), {name.replace("_", " "): boxes for name, boxes in objects.items()}
    return tuple(rule(wanted, objects, colours_of) for rule in (rewards.geneval_correct, rewards.geneval_partial))


def test_an_object_is_there():
    assert verdicts("a photo of a traffic light", traffic_light=[LEFT]) == (True, 1)
    assert verdicts("a photo of a traffic light") == (False, 0)
    assert verdicts("a photo of a traffic light", car=[LEFT]) == (False, 0)
    assert verdicts("a photo of a dog", dog=[LEFT], cat=[RIGHT]) == (True, 1)  # others may be there too
    assert verdicts("a photo of a dog", dog=[LEFT, RIGHT]) == (True, 0)  # the reward takes "a" for exactly one
    assert verdicts("a photo of a dog", dog=[LEFT, RIGHT, TOP]) == (True, -1)


def test_both_objects_are_there():
    assert verdicts("a photo of a cat and a dog", cat=[LEFT], dog=[RIGHT]) == (True, 1)
    assert verdicts("a photo of a cat and a dog", cat=[LEFT]) == (False, 0.5)
    assert verdicts("a photo of a cat and a dog", dog=[LEFT]) == (False, 0.5)
    assert verdicts("a photo of a cat and a dog") == (False, 0)


@pytest.mark.parametrize(("found", "partial"), [(0, 0), (1, 1 / 3), (2, 2 / 3), (3, 1), (4, 2 / 3)])
def test_as_many_as_asked_and_no_more(found, partial):
    boxes = [LEFT, RIGHT, TOP, BOTTOM][:found]
    assert verdicts("a photo of three clocks", clock=boxes) == (found == 3, pytest.approx(partial))


def test_the_object_has_its_colour():
    assert verdicts("a photo of a red car", car=[LEFT]) == (True, 1)
    assert verdicts("a photo of a blue car", car=[LEFT]) == (False, 0.5)
    assert verdicts("a photo of a red car") == (False, 0)
    assert verdicts("a photo of a red car", car=[LEFT, RIGHT]) == (True, 0)  # the wrong count forfeits the colour


def test_the_benchmark_judges_the_colour_of_the_surest_object():
    def by_place(name, boxes):
        return ["red" if box == LEFT else "blue" for box in boxes]

    assert verdicts("a photo of a red car", by_place, car=[LEFT, RIGHT])[0]
    assert not verdicts("a photo of a red car", by_place, car=[RIGHT, LEFT])[0]


def test_each_of_two_objects_has_its_own_colour():
    def colours(name, boxes):
        return [{"car": "red", "bench": "blue"}[name]] * len(boxes)

    things = dict(car=[LEFT], bench=[RIGHT])
    assert verdicts("a photo of a red car and a blue bench", colours, **things) == (True, 1)
    assert verdicts("a photo of a blue car and a red bench", colours, **things) == (False, 0.5)
    assert verdicts("a photo of a red car and a green bench", colours, **things) == (False, 0.75)


@pytest.mark.parametrize(
    ("relation", "dog", "cat"),
    [("left of", LEFT, RIGHT), ("right of", RIGHT, LEFT), ("above", TOP, BOTTOM), ("below", BOTTOM, TOP)],
)
def test_the_first_object_has_its_place(relation, dog, cat):
    prompt = f"a photo of a dog {relation} a cat"
    assert verdicts(prompt, dog=[dog], cat=[cat]) == (True, 1)
    assert verdicts(prompt, dog=[cat], cat=[dog]) == (False, pytest.approx(2 / 3))
    assert verdicts(prompt, dog=[dog], cat=[dog]) == (False, pytest.approx(2 / 3))  # in the same place
    assert verdicts(prompt, dog=[dog]) == (False, pytest.approx(1 / 3))  # nothing to be beside
    assert verdicts(prompt, cat=[cat]) == (False, pytest.approx(1 / 3))
    assert verdicts(prompt, dog=[dog, cat], cat=[cat]) == (True, pytest.approx(1 / 3))  # the surest dog; two dogs
    assert verdicts(prompt, dog=[dog], cat=[cat, cat]) == (True, pytest.approx(1 / 3))  # which of two cats?


@pytest.mark.parametrize("prompt", ["a photo of a red dog left of a cat", "a photo of a dog left of a red cat"])
def test_a_place_counts_only_for_objects_of_their_colour(prompt):
    assert verdicts(prompt, dog=[LEFT], cat=[RIGHT]) == (True, 1)
    assert verdicts(prompt.replace("red", "blue"), dog=[LEFT], cat=[RIGHT]) == (False, 0.5)


def test_relations_of_boxes():
    box = (0, 0, 20, 20)
    assert rewards.relations(box, box) == set()
    assert rewards.relations(box, (3, 0, 23, 20)) == set()  # 3 of 40 pixels of both: within the slack of a tenth
    assert rewards.relations(box, (4.1, 0, 24.1, 20)) == set()  # beyond, but most of the way is slack
    assert rewards.relations(box, (9, 0, 29, 20)) == {"left of"}  # 5 of 9 pixels are beyond
    assert rewards.relations(box, (40, 40, 60, 60)) == {"left of", "above"}  # a diagonal is both
    assert rewards.relations(box, (100, 20, 120, 40)) == {"left of"}  # mostly to the side
    assert rewards.relations((40, 100, 60, 120), (38, 0, 58, 20)) == {"below"}


def test_detections_are_chosen_by_score():
    detections = [
        Detection("dog", 0.3, TOP),
        Detection("dog", 0.31, LEFT),
        Detection("cat", 0.1, TOP),
        Detection("dog", 0.95, RIGHT),
        Detection("dog", 0.94, RIGHT),
    ]
    assert rewards.geneval_objects(detections, 0.3) == {"dog": [RIGHT, RIGHT, LEFT]}  # surest first, overlaps stay
    assert rewards.geneval_objects(detections, 0.9) == {"dog": [RIGHT, RIGHT]}
    many = [Detection("dog", i / 100, (i, 0, i, 0)) for i in range(30, 60)]
    assert [box[0] for box in rewards.geneval_objects(many, 0)["dog"]] == list(range(59, 43, -1))


# ------------------------------------------------------------------------------------------------ geneval: models

LABELS = dict(enumerate({v: k for k, v in rewards.COCO_NAMES.items()}.get(name, name) for name in rewards.OBJECTS))


def rt_detr(labels):
    """A tiny detector of the default's kind, sigmoid scores, with labels as its publisher spells them."""
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 8, 8],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.RTDetrConfig(
        backbone_config=backbone,
        **dict(encoder_hidden_dim=16, encoder_in_channels=[8, 8, 8], encoder_ffn_dim=16, encoder_attention_heads=2),
        **dict(d_model=16, decoder_in_channels=[16, 16, 16], decoder_ffn_dim=16, decoder_attention_heads=2),
        **dict(decoder_layers=1, decoder_n_points=2, num_queries=4, num_denoising=0),
        id2label=labels,
    )
    model = transformers.RTDetrForObjectDetection(config)
    processor = transformers.RTDetrImageProcessor(size={"height": 64, "width": 64})
    return model, processor, [model.model.decoder.class_embed[-1].bias, model.model.enc_score_head.bias]


def yolos(labels):
    """A tiny detector of another kind: softmax scores with a class for nothing."""
    config = transformers.YolosConfig(
        **dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16),
        **dict(image_size=[32, 32], patch_size=16, num_detection_tokens=4),
        id2label=labels,
    )
    model = transformers.YolosForObjectDetection(config)
    processor = transformers.YolosImageProcessor(size={"shortest_edge": 32, "longest_edge": 64})
    return model, processor, [model.class_labels_classifier.layers[-1].bias]


@pytest.fixture(scope="module")
def processors():
    if getattr(transformers.AutoImageProcessor, "is_dummy", False):
        pytest.skip("this version of transformers needs torchvision to load images")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, processors):
    """save(kind, name=None): the folder of a tiny random detector that sees four objects of that class everywhere."""

    def save(kind, name=None, labels=LABELS):
        folder = tmp_path_factory.mktemp("detector")
        torch.manual_seed(0)
        model, processor, biases = kind(labels)
        for bias in biases if name else ():
            bias.data[list(labels.values()).index(name)] = 20
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture(scope="module")
def clip(tmp_path_factory, processors):
    """The folder of a tiny random CLIP that reads bytes."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=16)
    tokenizer = tiny_pipelines.tokenizer(77)
    tokenizer.add_special_tokens({"eos_token": "<end>"})  # of the highest number, by which CLIP finds it
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <end>", special_tokens=[("<bos>", 1), ("<end>", end)]
    )
    special = dict(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=end, pad_token_id=0)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=dict(max_position_embeddings=77, **sizes, **special),
            vision_config=dict(image_size=32, patch_size=8, **sizes),
            projection_dim=16,
        )
    )
    for parameter in model.parameters():  # its own start is so small that all colours look the same
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder
    )
    return str(folder)


@pytest.mark.parametrize("kind", [rt_detr, yolos])
def test_the_detector_finds_by_genevals_names(saved, clip, kind):
    images = torch.rand(3, 3, 48, 40, generator=torch.Generator().manual_seed(0))
    prompts = ["a photo of four tvs", "a photo of three tvs", "a photo of four benchs"]
    television = saved(kind, "tvmonitor")
    assert rewards.geneval("cpu", television, clip, strict=True)(images, prompts).tolist() == [1, 0, 0]
    partial = rewards.geneval("cpu", television, clip)(images, prompts)
    assert partial.tolist() == pytest.approx([1, 2 / 3, 0])
    nothing = rewards.geneval("cpu", saved(kind), clip, strict=True, threshold=0.9)
    assert nothing(images, ["a photo of a tv"] * 3).tolist() == [0, 0, 0]


def test_counting_has_its_own_threshold(saved, clip):
    images, prompts = torch.rand(2, 3, 32, 32), ["a photo of four tvs", "a photo of a tv"]
    judge = rewards.geneval("cpu", saved(rt_detr, "tvmonitor"), clip, strict=True, counting_threshold=1.0)
    assert judge(images, prompts).tolist() == [0, 1]


@pytest.mark.parametrize("kind", [rt_detr, yolos])
def test_geneval_is_the_same_in_batches_of_any_size_and_every_time(saved, clip, kind):
    judge = rewards.geneval("cpu", saved(kind), clip, threshold=0.0, counting_threshold=0.0)
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    things = [name for name in rewards.OBJECTS if name != "dog"][:6]
    prompts = [f"a photo of a dog left of a red {name}" for name in things[:3]]
    prompts += [f"a photo of two {name}s" for name in things[3:]]
    together = judge(images, prompts)
    assert together.shape == (6,) and together.dtype == torch.float32 and (together <= 1).all()
    assert torch.equal(judge(images, prompts), together)
    assert torch.equal(torch.cat([judge(images[i : i + 1], prompts[i : i + 1]) for i in range(6)]), together)


def test_boxes_are_in_pixels_and_end_at_the_edge(saved):
    folder = saved(yolos)
    model = transformers.YolosForObjectDetection.from_pretrained(folder)
    last = model.bbox_predictor.layers[-1]
    last.weight.data.zero_()
    last.bias.data = torch.tensor([0.8, 0.5, 0.6, 0.5]).logit()  # centre and size, as shares of the image
    model.save_pretrained(folder)
    found, larger = rewards._object_detector(folder, "cpu")([Image.new("RGB", (40, 20)), Image.new("RGB", (80, 40))])
    assert len(found) == 4
    assert [detection.box for detection in found] == [pytest.approx((20, 5, 40, 15))] * 4
    assert [detection.box for detection in larger] == [pytest.approx((40, 10, 80, 30))] * 4


def test_the_colour_is_clips_choice_for_the_crop(clip):
    """As CLIP's own forward has it, with the mean over the three phrases, and for the box alone."""
    model, tokenizer = transformers.CLIPModel.from_pretrained(clip), transformers.AutoTokenizer.from_pretrained(clip)
    processor = transformers.AutoImageProcessor.from_pretrained(clip)
    rng = np.random.default_rng(0)
    squares = [Image.fromarray(rng.integers(0, 256, (3, 3, 3), np.uint8)).resize((20, 20)) for _ in range(8)]
    picture = Image.new("RGB", (160, 20))
    for i, square in enumerate(squares):
        picture.paste(square, (20 * i, 0))

    expected = []
    for square in squares:
        scores = []
        for colour in rewards.GENEVAL_COLOURS:
            ways = [f"a photo of a {colour} cup", f"a photo of a {colour}-colored cup", f"a photo of a {colour} object"]
            tokens = tokenizer(ways, padding=True, return_tensors="pt")
            out = model(**tokens, pixel_values=processor(images=square, return_tensors="pt")["pixel_values"])
            mean = out.text_embeds.mean(0)
            scores.append((out.image_embeds[0] @ mean / mean.norm()).item())
        expected.append(rewards.GENEVAL_COLOURS[int(np.argmax(scores))])
    boxes = [(20.0 * i + 0.4, 0.2, 20.0 * i + 19.7, 19.9) for i in range(8)]  # cut at whole pixels, outwards
    assert rewards._colour_classifier(clip, "cpu")(picture, "cup", boxes) == expected
    assert len(set(expected)) > 1


def test_models_saved_in_half_precision(saved, clip, tmp_path):
    halves = []
    for folder, kind in ((saved(yolos, "tvmonitor"), "YolosForObjectDetection"), (clip, "CLIPModel")):
        halves.append(shutil.copytree(folder, tmp_path / kind))
        getattr(transformers, kind).from_pretrained(folder).half().save_pretrained(halves[-1])
    images, prompts = torch.rand(2, 3, 32, 32), ["a photo of four tvs", "a photo of a red tv"]
    value = rewards.geneval("cpu", *map(str, halves), strict=True)(images, prompts)
    assert value[0] == 1 and value[1] in (0, 1)


def test_a_crop_is_never_empty(clip):
    colours = rewards._colour_classifier(clip, "cpu")(Image.new("RGB", (32, 32)), "cup", [(5.2, 5.2, 5.4, 5.4)])
    assert len(colours) == 1


def test_a_detector_of_other_classes_is_refused(saved, clip):
    labels = {i: name for i, name in LABELS.items() if name not in ("mouse", "zebra")}
    labels = dict(enumerate([*labels.values(), "N/A", "street sign"]))
    with pytest.raises(ValueError, match="does not know zebra, computer mouse; take one trained on COCO"):
        rewards.geneval("cpu", saved(yolos, labels=labels), clip)


def test_a_missing_model_is_named_in_one_line(saved, tmp_path, clip):
    for nowhere in (str(tmp_path / "nowhere"), "no-such/model"):
        for models, kind in ((nowhere, clip), "AutoModelForObjectDetection"), ((saved(yolos), nowhere), "CLIPModel"):
            with pytest.raises(ValueError, match=f"{nowhere} does not load as {kind}") as error:
                rewards.geneval("cpu", *models)
            assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ vlm


class Judge(ThreadingHTTPServer):
    """A server that answers with the brightness of the image from 0 to 10, unless a prompt's faults come first."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.models, self.models_status = ["judge"], 200
        self.faults = defaultdict(list)  # prompt -> what happens to its next requests
        self.asked, self.bodies, self.keys = Counter(), [], []
        self.together = None  # a barrier that each request waits at
        self.lock, self.now, self.most = threading.Lock(), 0, 0
        self.over = threading.Event()

    def handle_error(self, request, client_address):
        pass  # clients that give up are part of the tests


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def reply(self, status, body, headers=()):
        body = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        for name, value in (("Content-Length", len(body)), *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.server.keys.append(self.headers["Authorization"])
        found = self.path == "/v1/models"
        data = {"object": "list", "data": [{"id": name} for name in self.server.models]}
        self.reply(self.server.models_status if found else 404, data if found else "no such page")

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        picture, text = body["messages"][0]["content"]
        with server.lock:
            server.now += 1
            server.most = max(server.most, server.now)
            server.asked[text["text"]] += 1
            server.bodies.append(body)
            server.keys.append(self.headers["Authorization"])
            faults = server.faults[text["text"]]
            fault = faults.pop(0) if faults else None
        try:
            if server.together:
                server.together.wait(10)
        finally:
            with server.lock:
                server.now -= 1
        self.answer(fault, body, picture["image_url"]["url"])

    def answer(self, fault, body, url):
        if fault == "slow":
            self.server.over.wait(3)
            fault = None
        if fault == "cut":  # in the middle of the reply
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
        elif fault == "drop":  # without a reply
            self.close_connection = True
        elif isinstance(fault, tuple):
            self.reply(*fault)
        elif isinstance(fault, dict):
            self.reply(200, {"choices": [fault]})
        else:
            content = fault or f"{10 * brightness(url):.2f}"
            self.reply(200, {"choices": [{"message": {"role": "assistant", "content": content}}]})


def brightness(url):
    kind, data = url.split(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).mean() / 255


@pytest.fixture
def judge():
    server = Judge()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def waits(monkeypatch):
    """The seconds that would have been waited."""
    seconds = []
    monkeypatch.setattr(rewards, "time", SimpleNamespace(sleep=seconds.append))
    return seconds


GREYS = torch.linspace(0, 1, 6)[:, None, None, None].expand(6, 3, 8, 8)
PROMPTS = [f"grey {i}" for i in range(6)]


def ask(judge, images=GREYS, prompts=PROMPTS, **options):
    return rewards.vlm("cpu", judge.url, question="{prompt}", **options)(images, prompts)


def test_scores_come_back_in_the_order_of_the_images(judge):
    scores = ask(judge)
    assert scores.shape == (6,) and torch.allclose(scores, GREYS[:, 0, 0, 0], atol=0.003)
    body = judge.bodies[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge", 0, 32)
    assert judge.asked == dict.fromkeys(PROMPTS, 1)
    assert torch.equal(ask(judge), scores)


def test_the_image_arrives_exactly(judge):
    image = torch.rand(1, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    ask(judge, image, ["x"])
    data = judge.bodies[0]["messages"][0]["content"][0]["image_url"]["url"].split(",")[1]
    arrived = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert np.array_equal(arrived, (image[0].permute(1, 2, 0) * 255).round().numpy())


def test_requests_are_under_way_together_and_no_more_than_said(judge):
    # breaks unless three arrive while three wait; then lets a fourth arrive, if there is one
    judge.together = threading.Barrier(3, action=lambda: time.sleep(0.2))
    ask(judge, concurrency=3, retries=0)
    assert judge.most == 3


@pytest.mark.parametrize(
    "fault",
    [
        (500, "out of memory"),
        (503, "loading"),
        (408, "too slow"),
        (200, "<html>not JSON</html>"),
        (200, {"choices": []}),
        (200, [1, 2]),
        (200, {"choices": [{"message": {"content": None}}]}),
        "I cannot say",
        "11 of 10",
        "-1",
        "cut",
        "drop",
    ],
)
def test_what_may_pass_is_tried_again(judge, waits, fault):
    judge.faults["grey 2"] = [fault, fault, fault]
    scores = ask(judge, backoff=0.5)
    assert torch.allclose(scores, GREYS[:, 0, 0, 0], atol=0.003)
    assert judge.asked == dict.fromkeys(PROMPTS, 1) | {"grey 2": 4}
    assert waits == [0.5, 1, 2]


def test_a_silent_server_is_asked_again(judge, waits):
    judge.faults["grey 2"] = ["slow"]
    scores = ask(judge, timeout=0.5)
    assert torch.allclose(scores, GREYS[:, 0, 0, 0], atol=0.003) and judge.asked["grey 2"] > 1


def test_retry_after_is_honoured(judge, waits):
    judge.faults["grey 2"] = [(429, "", [("Retry-After", "7")]), (429, "", [("Retry-After", "1")]), (429, "")]
    ask(judge, backoff=1.0)
    assert waits == [7, 2, 4]  # the longer of the server's wish and the back-off


def test_what_does_not_pass_ends_the_run_with_one_line(judge, waits):
    judge.faults["grey 2"] = [(500, "first"), (500, "out\nof memory"), (500, "out\nof memory"), (500, "out\nof memory")]
    reward = rewards.vlm("cpu", judge.url, question="{prompt}", retries=3)
    with pytest.raises(rewards.RewardError) as error:
        rewards._checked("vlm", reward, GREYS, PROMPTS)
    assert str(error.value) == (
        "error: reward 'vlm' failed: ConnectionError: image 2 (grey 2): "
        f"{judge.url}/chat/completions failed 4 times, at last: HTTP 500 out of memory"
    )


def test_a_refusal_is_not_tried_again(judge, waits):
    judge.faults["grey 2"] = [(400, "this model takes no images")]
    with pytest.raises(ConnectionError, match="failed once: HTTP 400 this model takes no images"):
        ask(judge)
    assert judge.asked["grey 2"] == 1 and waits == []


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("I cannot say", "the first number is none from 0 to 10 in 'I cannot say'"),
        ((200, "<html>"), "JSONDecodeError: Expecting value"),
        ((200, {"error": "what?"}), 'a reply of another form: {"error": "what\\?"}'),
        ("cut", "IncompleteRead"),
        ("drop", "RemoteDisconnected"),
    ],
)
def test_the_last_failure_is_told(judge, waits, fault, reason):
    judge.faults["grey 2"] = [fault, fault]
    with pytest.raises(ConnectionError, match=f"2 times, at last: .*{reason}"):
        ask(judge, retries=1)
    assert waits == [1]  # none after the last


@pytest.mark.parametrize(
    ("reply", "low", "high", "score"),
    [
        ("7", 0, 10, 0.7),
        ("Score: 4.5/5", 1, 5, 0.875),
        ("1", 1, 5, 0),
        ("10 (perfect)", 0, 10, 1),
        ("-0.5", -1, 1, 0.25),
    ],
)
def test_the_first_number_on_its_scale(judge, reply, low, high, score):
    judge.faults["grey 0"] = [reply]
    assert ask(judge, GREYS[:1], PROMPTS[:1], low=low, high=high).item() == pytest.approx(score)


def likely(**chances):
    """A choice with the chances of its first token."""
    top = [{"token": token.replace("_", " "), "logprob": math.log(chance)} for token, chance in chances.items()]
    return {"message": {"content": "Yes"}, "logprobs": {"content": [{"token": "Yes", "top_logprobs": top}]}}


def test_the_chance_of_yes(judge, waits):
    judge.faults |= {
        "grey 0": [likely(Yes=0.6, No=0.2, Maybe=0.2)],
        "grey 1": [likely(Yes=0.3, _yes=0.1, no=0.3, NO=0.3)],
        "grey 2": [likely(No=0.9)],
        "grey 3": [likely(Well=0.9), likely(Yes=0.9)],  # neither: asked again
        "grey 4": ["Yes", likely(Yes=0.5, No=0.5)],  # a server that sends no chances
    }
    scores = ask(judge, GREYS[:5], PROMPTS[:5], score="yes")
    assert scores.tolist() == pytest.approx([0.75, 0.4, 0, 1, 0.5]) and len(waits) == 2
    body = judge.bodies[0]
    assert (body["logprobs"], body["top_logprobs"], body["max_tokens"]) == (True, 20, 1)


def test_the_question_by_default(judge):
    rewards.vlm("cpu", judge.url, low=1, high=5)(GREYS[2:3], ["a {low} red circle"])
    (question,) = judge.asked
    assert "Prompt: a {low} red circle\n" in question and "from 1 (not at all) to 5 (perfectly)" in question


def test_the_key_comes_from_the_environment(judge, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    ask(judge, GREYS[:1], PROMPTS[:1], api_key_env="JUDGE_KEY")
    assert judge.keys == ["Bearer secret", "Bearer secret"]
    ask(judge, GREYS[:1], PROMPTS[:1])
    assert judge.keys[2:] == [None, None]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (dict(url="http://127.0.0.1:9/v1"), "vlm.url: http://127.0.0.1:9/v1/models failed once: .*; start a server"),
        (dict(url="nonsense"), "vlm.url: unknown url type: 'nonsense/models'"),
        (dict(model="other"), "vlm.model = 'other': the server at .* has judge"),
        (dict(score="maybe"), "vlm.score = 'maybe': number or yes"),
        (dict(low=5, high=5), "vlm: low = 5, high = 5"),
        (dict(retries=-1), "retries = -1"),
        (dict(concurrency=0), "concurrency = 0"),
        (dict(api_key_env="NO_SUCH_KEY"), "there is no environment variable NO_SUCH_KEY"),
    ],
)
def test_what_cannot_work_is_refused_when_the_reward_is_made(judge, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        rewards.vlm("cpu", **{"url": judge.url, **options})
    assert not judge.asked


def test_the_server_and_its_models_are_checked_at_once(judge):
    judge.models = ["one", "two"]
    with pytest.raises(ValueError, match="vlm.model = '': the server at .* has one, two"):
        ask(judge)
    ask(judge, model="two")
    assert judge.bodies[0]["model"] == "two"
    judge.models_status = 401
    with pytest.raises(ValueError, match="vlm.url: .* HTTP 401"):
        ask(judge, model="two")
    judge.url += "/wrong"
    with pytest.raises(ValueError, match="vlm.url: .* HTTP 404 no such page"):
        ask(judge)


def test_the_judges_are_known_by_name(judge):
    assert {"ocr", "geneval", "vlm"} <= rewards.REWARDS.keys()
    rewards.check_rewards({"vlm": 1.0}, ["any prompt at all"])
