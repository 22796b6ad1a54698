"""Rewards by a network: CLIP's, ImageReward, text by OCR, GenEval's rules by a detector and CLIP, a server's model.

The networks are small and random, in the format of the published ones.
"""

import base64
import io
import itertools
import json
import math
import shutil
import string
import threading
import time
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
import urllib3
import yaml
from conftest import read_csv
from PIL import Image, ImageDraw, ImageFont
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from harness.judges import clip, geneval, imagereward, ocr, vlm
from harness.judges.weights import to_pil
from rewards import RewardError, check_rewards, make_reward

SIZE, LIMIT = 32, 29  # pixels a side and tokens of the small models
PROMPTS = ["red", "a blue square", "two", "a very long prompt of many letters"]
BY_A_MODEL = ("pickscore", "clipscore", "hpsv2", "aesthetic", "imagereward")


# four images of the small models' own size, in 8-bit steps, so that a processor changes nothing but the scale
IMAGES = torch.randint(0, 256, (4, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0)) / 255


# ------------------------------------------------------------------------------------------------ small models


def spread(kind, *config):
    """A model of always the same weights, large enough for the outputs to depend on the inputs."""
    torch.manual_seed(0)
    model = kind(*config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def head(width):
    """The linear layers of the aesthetic predictor and of ImageReward, (B, width) -> (B, 1)."""
    torch.manual_seed(1)
    layers, sizes = torch.nn.Sequential(), itertools.pairwise((width, 1024, 128, 64, 16, 1))
    for name, (size, out) in zip("02467", sizes, strict=True):
        layers.add_module(name, torch.nn.Linear(size, out))
        layers[-1].weight.data *= 3**0.5
    return layers.requires_grad_(False)


def named(prefix, model):
    return {f"{prefix}{name}": value for name, value in model.state_dict().items()}


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A CLIP that reads letters, with its tokenizer and image processor, and the head of the aesthetic predictor."""
    folder = tmp_path_factory.mktemp("clip")
    letters = string.ascii_lowercase + "-"
    names = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[]).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE).save_pretrained(folder)
    shared = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = dict(vocab_size=len(names), bos_token_id=0, eos_token_id=1, pad_token_id=1, max_position_embeddings=LIMIT)
    vision = shared | dict(image_size=SIZE, patch_size=8)
    config = transformers.CLIPConfig(text_config=text | shared, vision_config=vision, projection_dim=8)
    spread(CLIPModel, config).save_pretrained(folder)
    torch.save(named("layers.", head(8)), folder / "aesthetic-model.pth")
    return folder


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "square", "two", "very", "long", "of"]
MED = dict(vocab_size=len(WORDS), hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
MED |= dict(max_position_embeddings=40, layer_norm_eps=1e-12, pad_token_id=0, model_type="bert", encoder_width=768)


class Blip(torch.nn.Module):
    """ImageReward's BLIP by torch's own transformer and BERT; parts are named as in its checkpoint but for RENAMED."""

    RENAMED = {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj": "attn.proj", "linear": "mlp.fc"}

    def __init__(self):
        super().__init__()
        self.visual_encoder = eye = torch.nn.Module()
        eye.cls_token, eye.pos_embed = (torch.nn.Parameter(torch.empty(1, n, 64)) for n in (1, 1 + (SIZE // 16) ** 2))
        eye.patch_embed = torch.nn.ModuleDict({"proj": torch.nn.Conv2d(3, 64, 16, 16)})
        how = dict(dropout=0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True)
        eye.blocks = torch.nn.ModuleList(torch.nn.TransformerEncoderLayer(64, 2, 256, **how) for _ in range(2))
        eye.norm = torch.nn.LayerNorm(64, 1e-6)
        bert = transformers.BertConfig(**MED, is_decoder=True, add_cross_attention=True)
        self.text_encoder = transformers.BertModel(bert, add_pooling_layer=False).eval()

    def forward(self, pixels, words):
        """(1, 64) of the prompt's first token, [CLS]. pixels: (1, 3, SIZE, SIZE); words: token ids."""
        eye = self.visual_encoder
        x = torch.cat([eye.cls_token, eye.patch_embed.proj(pixels).flatten(2).mT], dim=1) + eye.pos_embed
        for block in eye.blocks:
            x = block(x)
        both_ways = torch.zeros(1, 1, len(words), len(words))  # where a decoder would look back only
        read = self.text_encoder(torch.tensor([words]), both_ways, encoder_hidden_states=eye.norm(x), use_cache=False)
        return read.last_hidden_state[:, 0]


@pytest.fixture(scope="session")
def imagereward_model(tmp_path_factory):
    """(folder, Blip): its weights in the layout of THUDM/ImageReward, and a BERT tokenizer."""
    folder, model = tmp_path_factory.mktemp("imagereward"), spread(Blip)
    transformers.BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)
    dropout = dict(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    (folder / "med_config.json").write_text(json.dumps(MED | dropout))
    weights = named("blip.", model)
    weights.pop("blip.text_encoder.embeddings.token_type_embeddings.weight").zero_()  # which BLIP does not have
    for ours, theirs in model.RENAMED.items():
        weights = {name.replace(ours, theirs): value for name, value in weights.items()}
    buffer = {"blip.text_encoder.embeddings.position_ids": torch.zeros(1, 40)}
    unused = {"blip.vision_proj.weight": torch.zeros(8, 64)}
    torch.save(weights | buffer | unused | named("mlp.layers.", head(64)), folder / "ImageReward.pt")
    return folder, model


@pytest.fixture
def options_of(clip_folder, imagereward_model, monkeypatch):
    """options_of(name): the command line's options for a reward by a small model."""
    sizes = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE)
    monkeypatch.setattr(imagereward, "VISION", imagereward.VISION | sizes)
    folder, clip_folder = str(imagereward_model[0]), str(clip_folder)
    more = {"imagereward": {"model": folder, "tokenizer": folder}, "aesthetic": {"head": clip_folder}}
    return lambda name: {f"{name}.{k}": v for k, v in ({"model": clip_folder} | more.get(name, {})).items()}


# ------------------------------------------------------------------------------------------------ CLIP, ImageReward


@pytest.mark.parametrize("name", BY_A_MODEL)
def test_scores_are_one_number_an_image_whatever_the_batch(options_of, name):
    def score(batch_size, images=IMAGES, prompts=PROMPTS, **more):
        options = options_of(name) | {f"{name}.batch_size": batch_size} | more
        return make_reward({name: 2.0}, "cpu", options)(images, prompts)

    scores = score(4)
    assert scores[name].shape == (4,) and scores[name].dtype == torch.float32
    assert torch.equal(scores["total"], 2 * scores[name])
    assert scores[name].std() > 1e-3
    assert torch.equal(score(4)[name], scores[name])
    assert torch.allclose(score(1)[name], scores[name], atol=1e-5)
    assert torch.allclose(score(3, IMAGES.flip(0), PROMPTS[::-1])[name].flip(0), scores[name], atol=1e-5)
    same = torch.isclose(scores[name], score(4, prompts=["blue"] * 4)[name], atol=1e-4)
    assert same.tolist() == [name == "aesthetic"] * 4  # which alone ignores the prompt
    rough = score(4, **{f"{name}.dtype": "bfloat16"})[name]
    assert rough.dtype == torch.float32
    assert 0 < (rough - scores[name]).abs().max() < 0.15 * scores[name].abs().max()
    assert not score(4, IMAGES.clone().requires_grad_())["total"].requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", BY_A_MODEL)
def test_a_reward_on_a_device_of_its_own(options_of, name):
    there = make_reward({name: 1.0}, "cpu", options_of(name) | {f"{name}.device": "cuda"})(IMAGES, PROMPTS)
    here = make_reward({name: 1.0}, "cpu", options_of(name))(IMAGES, PROMPTS)
    assert there["total"].device == IMAGES.device
    assert torch.allclose(there[name], here[name], atol=1e-2 * here[name].abs().max())
    on_gpu = make_reward({name: 1.0}, "cuda", options_of(name))(IMAGES.cuda(), PROMPTS)
    assert on_gpu["total"].is_cuda and torch.allclose(on_gpu[name].cpu(), there[name], atol=1e-4)


@pytest.mark.parametrize("height, width", [(SIZE, SIZE), (24, 40), (97, 61)])
def test_clip_scores_are_those_of_the_model_itself(clip_folder, options_of, height, width):
    images = torch.rand(4, 3, height, width, generator=torch.Generator().manual_seed(0))
    model = CLIPModel.from_pretrained(clip_folder)
    tokens = CLIPTokenizer.from_pretrained(clip_folder)(
        PROMPTS, padding="max_length", max_length=LIMIT, truncation=True, return_tensors="pt"
    )
    assert tokens.input_ids[3, -1] == 1 and (tokens.input_ids[3, :-1] != 1).all()  # too long, and cut off
    with torch.no_grad():
        out = model(**tokens, **CLIPImageProcessorPil.from_pretrained(clip_folder)(to_pil(images), return_tensors="pt"))
    names = ("pickscore", "clipscore", "hpsv2", "aesthetic")
    options = {key: value for name in names for key, value in options_of(name).items()} | {"pickscore.divide_by": 26}
    scores = make_reward(dict.fromkeys(names, 1.0), "cpu", options)(images, PROMPTS)
    scaled = out.logits_per_image.diagonal()
    assert torch.allclose(scores["pickscore"], scaled / 26, atol=1e-5)
    for name in ("clipscore", "hpsv2"):
        assert torch.allclose(scores[name], scaled / model.logit_scale.exp(), atol=1e-5)
    assert torch.allclose(scores["aesthetic"], head(8)(out.image_embeds)[:, 0], atol=1e-4)
    half = clip.Clip("cpu", str(clip_folder), dtype="bfloat16")
    for vectors in (half.images(to_pil(images)), half.prompts(PROMPTS)):  # of length 1 in float32
        assert torch.allclose(vectors.norm(dim=1), torch.ones(4), atol=1e-6)


def test_the_aesthetic_head_from_a_folder_or_a_file(clip_folder, tmp_path):
    path, model = clip_folder / "aesthetic-model.pth", str(clip_folder)
    safetensors.torch.save_file(torch.load(path), tmp_path / "head.safetensors")
    heads = (clip_folder, path, tmp_path / "head.safetensors")
    scores = [clip.aesthetic("cpu", head=str(head), model=model)(IMAGES, PROMPTS) for head in heads]
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[0], scores[2])
    torch.save({"layers.0.weight": SimpleNamespace()}, tmp_path / "pickle.pth")
    with pytest.raises(Exception, match="Weights only load failed"):  # of anything but tensors, which may be code
        clip.aesthetic("cpu", head=str(tmp_path / "pickle.pth"), model=model)


def test_imagereward_is_what_its_checkpoint_says(imagereward_model, options_of):
    folder, model = imagereward_model
    tokenizer = transformers.BertTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE)
    prompts, states = ["red", "a blue square", "two red", " ".join(["a very long"] * 20)], []
    for picture, prompt in zip(to_pil(IMAGES), prompts, strict=True):
        words = tokenizer(prompt).input_ids
        words = words if len(words) <= 35 else [*words[:34], words[-1]]
        states.append(model(processor(picture, return_tensors="pt")["pixel_values"], words))
    expected = (head(64)(torch.cat(states))[:, 0] - 0.16717362830052426) / 1.0333394966054072
    scores = make_reward({"imagereward": 1.0}, "cpu", options_of("imagereward"))(IMAGES, prompts)
    assert torch.allclose(scores["imagereward"], expected, atol=1e-4)


@pytest.mark.parametrize(
    "name, broken, complaint",
    [
        ("aesthetic", "head", "the weights have no layers"),
        ("imagereward", "model", "the weights have no blip.visual_encoder"),
        ("clipscore", "model", "text_projection.weight is missing"),
        ("clipscore", "processor", "no whole tokenizer: it knows 2 tokens"),
        # a hub that cannot be reached
        *((name, None, " does not load as CLIPModel: ") for name in ("pickscore", "clipscore", "hpsv2", "aesthetic")),
        ("imagereward", None, "OSError: "),
        ("geneval", None, " PekingU/rtdetr_r50vd does not load as AutoModelForObjectDetection: "),
    ],
)
def test_models_that_do_not_load_are_named_in_one_line(options_of, clip_folder, tmp_path, name, broken, complaint):
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    for file in ("aesthetic-model.pth", "ImageReward.pt"):
        torch.save({"other": torch.zeros(1)}, folder / file)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    del weights["text_projection.weight"]
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for file in folder.glob("tokenizer*"):
        file.unlink()
    options = options_of(name) | {f"{name}.{broken}": str(folder)} if broken else {}
    with pytest.raises(SystemExit, match=f"^error: reward '{name}' cannot be made: [^\n]*{complaint}[^\n]*$"):
        make_reward({name: 1.0}, "cpu", options)


def test_the_default_processor_is_the_models_own_where_it_has_one(clip_folder, monkeypatch):
    asked = []
    model = CLIPModel.from_pretrained(clip_folder)
    monkeypatch.setattr(CLIPModel, "from_pretrained", lambda *_, **__: (model, {"missing_keys": set()}))
    for kind in (CLIPTokenizer, CLIPImageProcessorPil):
        monkeypatch.setattr(kind, "from_pretrained", lambda where: asked.append(where) or range(100))
    for name, options, processor in [
        ("clipscore", {}, "openai/clip-vit-large-patch14"),
        ("clipscore", {"clipscore.model": "a/b-v1.0", "clipscore.processor": None}, "a/b-v1.0"),
        ("clipscore", {"clipscore.model": "a/b", "clipscore.processor": "c/d"}, "c/d"),
        ("hpsv2", {}, "openai/clip-vit-base-patch32"),
        ("pickscore", {}, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    ]:
        make_reward({name: 1.0}, "cpu", options)
        assert asked[-2:] == [processor] * 2


def test_a_run_with_a_model(run, clip_folder, tmp_path):
    options = {"pickscore.model": str(clip_folder), "pickscore.batch_size": 3}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"reward_options": options}))
    folder = run("--reward", "pickscore=2", "--config", tmp_path / "run.yaml", "--train.max-epochs", 1)
    for row, kind in zip(read_csv(folder / "metrics.csv"), ("eval", "train/reward"), strict=True):
        assert float(row[f"{kind}/total"]) == pytest.approx(2 * float(row[f"{kind}/pickscore"]))
    assert yaml.safe_load((folder / "args.yaml").read_text())["reward_options"] == options


# ------------------------------------------------------------------------------------------------ ocr


@pytest.fixture(scope="module")
def read():
    pytest.importorskip("rapidocr_onnxruntime")
    return ocr.ocr("cpu")


def written(text, side):
    """(1, 3, side, side): the text in black on white, as wide as four fifths of it."""
    picture = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(picture)
    size = next(n for n in range(side, 0, -1) if draw.textlength(text, font=ImageFont.load_default(n)) < 0.8 * side)
    draw.text((side / 2, side / 2), text, fill="black", font=ImageFont.load_default(size), anchor="mm")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize("side", [48, 64, 128, 256])
def test_clean_words_are_read(read, side):
    words = ["HELLO", "stop", "Flow", "Open 24"]
    images = torch.cat([written(word, side) for word in words])
    right = read(images, [f"a sign that says '{word}'" for word in words])
    assert right.shape == (4,) and right.tolist() == [1, 1, 1, 1]
    assert (read(images, ['a sign that says "zigzag"'] * 4) <= 0.2).all()  # another word: what letters they share
    assert read(images[1:2], ["a sign that says 'stops'"]).item() == pytest.approx(0.8)  # one letter of five is missing


def test_no_text_scores_0(read):
    plain = torch.tensor([0.0, 1.0, 0.5, 0.2])[:, None, None, None].expand(4, 3, 64, 64)
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert read(torch.cat([plain, noise]), ["'stop'"] * 5).tolist() == [0] * 5


def test_small_images_are_enlarged_for_reading(read):
    images, prompts = torch.cat([written("coffee", 32), written("Flow", 32)]), ["'coffee'", "'Flow'"]
    assert read(images, prompts).mean() > ocr.ocr("cpu", side=32)(images, prompts).mean()
    assert read(F.pad(written("Flow", 48), (24, 24), value=1), ["'Flow'"]).item() == 1  # any shape


def test_red_is_not_read_as_blue(read, monkeypatch):
    import rapidocr_onnxruntime

    seen = []
    monkeypatch.setattr(rapidocr_onnxruntime.RapidOCR, "__call__", lambda self, image, **_: (seen.append(image), None))
    read(torch.tensor([1.0, 0.5, 0.0])[None, :, None, None].expand(1, 3, 128, 128), ["'a'"])
    assert seen[0][0, 0].tolist() == [0, 128, 255]  # the reader takes BGR
    read((torch.arange(64) > 31).float().expand(1, 3, 32, 64), ["'a'"])
    assert seen[1].shape == (128, 256, 3) and len(np.unique(seen[1])) > 2  # enlarged by the shorter side, smoothly


@pytest.mark.parametrize(
    "prompt, text",
    [
        ('a sign that says "Open"', "Open"),
        ("a sign that says 'Open'", "Open"),
        ("a sign that says “Open”, at night", "Open"),
        ("a sign that says ‘Open’.", "Open"),
        ("the dog's sign says 'don't stop', and the dogs' bowl is empty", "don't stop"),
        ("the dog’s sign says ‘don’t stop’", "don’t stop"),
        ("\"It's 'late'\" on a clock", "It's 'late'"),
        ('"Hello" above "World"', "Hello World"),
        *((prompt, None) for prompt in ("a red circle", "the dog's bowl", 'an empty "" quote', 'a "  " blank')),
    ],
)
def test_the_quoted_text_of_a_prompt_without_which_it_is_refused(prompt, text):
    if text:
        assert ocr.quoted_text(prompt) == text
    else:
        with pytest.raises(ValueError, match="needs the text in quotes"):
            check_rewards({"ocr": 1.0}, ["a 'good' one", prompt])


@pytest.mark.parametrize(
    "text, reading, score",
    [
        *[("Open 24", "open24", 1), ("Hello World", "HELLO\nWORLD", 1), ("open", "the shop is open today", 1)],
        *[("open", "oqen", 0.75), ("open", "", 0), ("open", "a long and other text", 0)],  # never below
        *[("sitting", "kitten", 4 / 7), ("flaw", "lawn", 0.5)],  # 3 and 2 edits
    ],
)
def test_the_score_of_a_reading(text, reading, score):
    assert ocr.text_score(text, reading) == pytest.approx(score)


# ------------------------------------------------------------------------------------------------ geneval


def a(thing):
    return f"an {thing}" if thing[0] in "aeiou" else f"a {thing}"


def test_every_class_colour_number_and_relation_is_read_from_its_prompt_or_from_its_row():
    objects, colours = geneval.OBJECTS, geneval.COLOURS
    assert len(set(objects)) == 80
    for n, word in enumerate(["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"], start=2):
        assert geneval.parse(f"a photo of {word} dogs")["include"] == [{"class": "dog", "count": n}]
    for i, (name, beside) in enumerate(zip(objects, objects[7:] + objects[:7], strict=True)):
        red, blue, place = colours[i % 10], colours[(i + 3) % 10], geneval.RELATIONS[i % 4]
        number, n = ("two", "three", "four")[i % 3], 2 + i % 3
        one, other = {"class": name, "count": 1}, {"class": beside, "count": 1}
        plural = name + ("es" if name.endswith("s") else "s")
        for prompt, include in {
            a(name): [one],
            f"{a(name)} and {a(beside)}": [one, other],
            f"{number} {plural}": [one | {"count": n}],
            a(f"{red} {name}"): [one | {"color": red}],
            f"{a(beside)} {place} {a(name)}": [one, other | {"position": [place, 0]}],
            f"{a(f'{red} {name}')} and {a(f'{blue} {beside}')}": [one | {"color": red}, other | {"color": blue}],
        }.items():
            asked = {"include": include} | ({"exclude": [one | {"count": n + 1}]} if plural in prompt else {})
            assert geneval.metadata(f"a photo of {prompt}", {"prompt": "a dog"}) == asked
            row = {"tag": "any", "prompt": "a dog", **asked}
            check_rewards({"geneval": 1.0}, ["a dog"], rows=[row])
            assert geneval.metadata("a dog", row) == asked


DOG = {"class": "dog", "count": 1}
OTHER_PROMPTS = [
    *["a red circle", "a photo of a dragon", "a photo of one clock", "a photo of two clock", "a photo of a mauve car"],
    *["a photo of a dog beside a cat", "a photo of a dog and a dog", "a photo of a red dog and a blue dog"],
    *["a photo of a dog left of a dog", "a photo of a dog and a cat and a horse"],
]
OTHER_METADATA = [
    *[[], [{}], "dog", None, [3], [{"class": "dog"}], [DOG | {"class": "dragon"}], [DOG | {"count": 0}]],
    *[[DOG | {"count": "1"}], [DOG | {"color": "mauve"}], [DOG | {"size": 3}], [DOG | {"position": ["above", 0]}]],
    *[[DOG, DOG | {"position": place}] for place in (["beside", 0], ["above", 1], ["above", -1], ["above"], 3)],
]


@pytest.mark.parametrize(
    "prompt, row",
    [(prompt, {}) for prompt in OTHER_PROMPTS] + [("a dog", {"include": include}) for include in OTHER_METADATA],
)
def test_prompts_and_metadata_of_another_form_are_refused_before_anything_is_loaded(prompt, row):
    complaint = f"the metadata of {prompt!r} are not in" if row else f"{prompt!r} is not of"
    with pytest.raises(ValueError, match=f"^{complaint} GenEval's form"):
        check_rewards({"geneval": 1.0}, ["a photo of a cat", prompt], rows=[{}, row])


LEFT, RIGHT, TOP, BOTTOM = (10, 40, 30, 60), (70, 40, 90, 60), (40, 0, 60, 20), (40, 80, 60, 100)
COLOURS = {LEFT: "red", RIGHT: "blue", TOP: "red"}
PLACES = [("left of", LEFT, RIGHT), ("right of", RIGHT, LEFT), ("above", TOP, BOTTOM), ("below", BOTTOM, TOP)]


@pytest.mark.parametrize(
    "prompt, objects, correct, reward",
    [
        ("a traffic light", {"traffic light": [LEFT]}, 1, 1),
        ("a traffic light", {"car": [LEFT]}, 0, 0),
        ("a dog", {"dog": [LEFT], "cat": [RIGHT]}, 1, 1),  # others may be there too
        ("a dog", {"dog": [LEFT, RIGHT]}, 1, 0),  # the reward takes "a" for exactly one
        ("a dog", {"dog": [LEFT, RIGHT, TOP]}, 1, -1),
        ("a cat and a dog", {"cat": [LEFT], "dog": [RIGHT]}, 1, 1),
        *[("a cat and a dog", {one: [LEFT]}, 0, 1 / 2) for one in ("cat", "dog")],
        *[("three clocks", {"clock": [LEFT] * n}, int(n == 3), 1 - abs(3 - n) / 3) for n in range(5)],
        ("a red car", {"car": [LEFT]}, 1, 1),
        ("a blue car", {"car": [LEFT]}, 0, 1 / 2),
        ("a red car", {}, 0, 0),
        ("a red car", {"car": [LEFT, TOP]}, 1, 0),  # the wrong count forfeits the colour
        ("a red car", {"car": [LEFT, RIGHT]}, 1, 0),  # the benchmark judges the surest
        ("a red car", {"car": [RIGHT, LEFT]}, 0, 0),
        ("a red car and a blue bench", {"car": [LEFT], "bench": [RIGHT]}, 1, 1),
        ("a blue car and a red bench", {"car": [LEFT], "bench": [RIGHT]}, 0, 1 / 2),
        ("a red car and a green bench", {"car": [LEFT], "bench": [RIGHT]}, 0, 3 / 4),
        *[(f"a dog {name} a cat", {"dog": [a], "cat": [b]}, 1, 1) for name, a, b in PLACES],
        *[(f"a dog {name} a cat", {"dog": [b], "cat": [a]}, 0, 2 / 3) for name, a, b in PLACES],
        *[(f"a dog {name} a cat", {"dog": [a], "cat": [a]}, 0, 2 / 3) for name, a, _ in PLACES],  # in the same place
        *[(f"a dog {name} a cat", {"dog": [a]}, 0, 1 / 3) for name, a, _ in PLACES],  # nothing to be beside
        *[(f"a dog {name} a cat", {"cat": [b]}, 0, 1 / 3) for name, _, b in PLACES],
        *[(f"a dog {name} a cat", {"dog": [a, b], "cat": [b]}, 1, 1 / 3) for name, a, b in PLACES],  # the surest of two
        *[(f"a dog {name} a cat", {"dog": [a], "cat": [b, b]}, 1, 1 / 3) for name, a, b in PLACES],  # which cat?
        ("a red dog left of a cat", {"dog": [LEFT], "cat": [RIGHT]}, 1, 1),
        ("a blue dog left of a cat", {"dog": [LEFT], "cat": [RIGHT]}, 0, 1 / 2),  # a place counts with the right colour
        ("a dog left of a blue cat", {"dog": [LEFT], "cat": [RIGHT]}, 1, 1),
        ("a dog left of a red cat", {"dog": [LEFT], "cat": [RIGHT]}, 0, 1 / 2),
    ],
)
def test_the_rules(prompt, objects, correct, reward):
    wanted = geneval.parse(f"a photo of {prompt}")
    for strict, score in ((True, correct), (False, reward)):
        found = geneval.verdict(wanted, objects, lambda _, boxes: [COLOURS[box] for box in boxes], strict)
        assert found == pytest.approx(score)


def test_relations_of_boxes():
    for other, names in {
        (0, 0, 20, 20): set(),
        (3, 0, 23, 20): set(),  # 3 of 40 pixels of both: within the slack of a tenth
        (4.1, 0, 24.1, 20): set(),  # beyond, but most of the way is slack
        (9, 0, 29, 20): {"left of"},  # 5 of 9 pixels are beyond
        (40, 40, 60, 60): {"left of", "above"},  # a diagonal is both
        (100, 20, 120, 40): {"left of"},  # mostly to the side
        (-2, -100, 18, -80): {"below"},
    }.items():
        assert geneval.relations((0, 0, 20, 20), other) == names


def test_detections_are_chosen_by_score():
    found = [("dog", 0.3, TOP), ("dog", 0.31, LEFT), ("cat", 0.1, TOP), ("dog", 0.95, RIGHT), ("dog", 0.94, RIGHT)]
    assert geneval.surest(found, 0.3) == {"dog": [RIGHT, RIGHT, LEFT]}  # surest first, overlaps stay
    assert geneval.surest(found, 0.9) == {"dog": [RIGHT, RIGHT]}
    many = [("dog", i / 100, (i, 0, i, 0)) for i in range(30, 60)]
    assert [box[0] for box in geneval.surest(many, 0)["dog"]] == list(range(59, 43, -1))


LABELS = dict(enumerate({v: k for k, v in geneval.COCO_NAMES.items()}.get(name, name) for name in geneval.OBJECTS))


def rt_detr(labels):
    """A small detector of the default's kind, sigmoid scores, with labels as its publisher spells them."""
    stages = dict(hidden_sizes=[8] * 4, depths=[1] * 4, out_features=["stage2", "stage3", "stage4"])
    model = transformers.RTDetrForObjectDetection(
        transformers.RTDetrConfig(
            backbone_config=transformers.RTDetrResNetConfig(embedding_size=8, layer_type="basic", **stages),
            **dict(encoder_hidden_dim=16, encoder_in_channels=[8, 8, 8], encoder_ffn_dim=16, encoder_attention_heads=2),
            **dict(d_model=16, decoder_in_channels=[16, 16, 16], decoder_ffn_dim=16, decoder_attention_heads=2),
            **dict(decoder_layers=1, decoder_n_points=2, num_queries=4, num_denoising=0, id2label=labels),
        )
    )
    biases = [model.model.decoder.class_embed[-1].bias, model.model.enc_score_head.bias]
    return model, transformers.RTDetrImageProcessor(size={"height": 64, "width": 64}), biases


def yolos(labels):
    """A small detector of another kind: softmax scores with a class for nothing."""
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, patch_size=16)
    config = transformers.YolosConfig(image_size=[32, 32], num_detection_tokens=4, id2label=labels, **sizes)
    model = transformers.YolosForObjectDetection(config)
    processor = transformers.YolosImageProcessor(size={"shortest_edge": 32, "longest_edge": 64})
    return model, processor, [model.class_labels_classifier.layers[-1].bias]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(kind, name=None): a random detector in half precision, which sees four of that class everywhere."""
    if getattr(transformers.AutoImageProcessor, "is_dummy", False):
        pytest.skip("this version of transformers needs torchvision to load images")

    def save(kind, name=None, labels=LABELS):
        folder = tmp_path_factory.mktemp("detector")
        torch.manual_seed(0)
        model, processor, biases = kind(labels)
        for bias in biases if name else ():
            bias.data[list(labels.values()).index(name)] = 20
        model.half().save_pretrained(folder)
        processor.save_pretrained(folder)
        return str(folder)

    return save


@pytest.mark.parametrize("kind", [rt_detr, yolos])
def test_the_detector_finds_by_genevals_names(saved, clip_folder, monkeypatch, kind):
    images = torch.rand(3, 3, 48, 40, generator=torch.Generator().manual_seed(0))
    prompts = ["a photo of four tvs", "a photo of three tvs", "a photo of a tv"]
    rows = [{"include": [{"class": "tv", "count": count}]} for count in (4, 5, 6)]

    def found(name="tvmonitor", rows=None, **options):
        return geneval.geneval("cpu", saved(kind, name), str(clip_folder), **options)(images, prompts, rows).tolist()

    assert found(strict=True) == [1, 0, 1]
    assert found() == pytest.approx([1, 2 / 3, -2])
    assert found(rows=rows) == pytest.approx([1, 4 / 5, 4 / 6])
    assert found(strict=True, counting_threshold=1.0) == [0, 0, 1]  # which is that of counts alone
    assert found(None, strict=True, threshold=0.9) == [0, 0, 0]
    least = []
    monkeypatch.setattr(geneval, "surest", lambda detections, threshold: least.append(threshold) or {})
    assert found(strict=True) == [0, 0, 0] and least == [0.9, 0.9, 0.3]  # the defaults, of counts and of others


def test_geneval_is_the_same_in_batches_of_any_size_and_every_time(saved, clip_folder):
    judge = geneval.geneval("cpu", saved(rt_detr), str(clip_folder), threshold=0.0, counting_threshold=0.0)
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompts = [f"a photo of a dog left of a red {name}" for name in geneval.OBJECTS[:3]]
    prompts += [f"a photo of two {name}s" for name in geneval.OBJECTS[3:6]]
    together = judge(images, prompts)
    assert together.shape == (6,) and together.dtype == torch.float32 and together.unique().numel() > 1
    assert torch.equal(judge(images, prompts), together)
    assert torch.equal(torch.cat([judge(images[i : i + 1], prompts[i : i + 1]) for i in range(6)]), together)


def test_boxes_are_in_pixels_and_end_at_the_edge(saved, clip_folder, monkeypatch):
    folder, found = saved(yolos), []
    model = transformers.YolosForObjectDetection.from_pretrained(folder, dtype=torch.float32)
    last = model.bbox_predictor.layers[-1]
    last.weight.data.zero_()
    last.bias.data = torch.tensor([0.8, 0.5, 0.6, 0.5]).logit()  # centre and size, as shares of the image
    model.save_pretrained(folder)
    monkeypatch.setattr(geneval, "verdict", lambda wanted, objects, *_: found.extend(*objects.values()) or 1.0)
    judge = geneval.geneval("cpu", folder, str(clip_folder), threshold=0.0)
    for side, box in ((20, (20, 5, 40, 15)), (40, (40, 10, 80, 30))):
        found.clear()
        judge(torch.zeros(1, 3, side, 2 * side), ["a photo of a dog"])
        assert found == [pytest.approx(box)] * 4


def test_the_colour_is_clips_choice_for_the_crop(clip_folder):
    """As CLIP's own forward has it, with the mean over the three phrases, and for the box alone."""
    model, tokenizer = CLIPModel.from_pretrained(clip_folder), CLIPTokenizer.from_pretrained(clip_folder)
    processor, rng = CLIPImageProcessorPil.from_pretrained(clip_folder), np.random.default_rng(0)
    picture, boxes, expected = Image.new("RGB", (160, 20)), [], []
    ways = ("a photo of a {} cup", "a photo of a {}-colored cup", "a photo of a {} object")
    tokens = tokenizer([way.format(c) for c in geneval.COLOURS for way in ways], padding=True, return_tensors="pt")
    for x in range(0, 160, 20):
        square = Image.fromarray(rng.integers(0, 256, (3, 3, 3), np.uint8)).resize((20, 20))
        picture.paste(square, (x, 0))
        boxes.append((x + 0.4, 0.2, x + 19.7, 19.9))  # cut at whole pixels, outwards
        out = model(**tokens, **processor(images=square, return_tensors="pt"))
        means = F.normalize(out.text_embeds.unflatten(0, (-1, 3)).mean(1), dim=1)
        expected.append(geneval.COLOURS[(means @ out.image_embeds[0]).argmax()])
    colours_of = geneval._colour_classifier(str(clip_folder), "cpu")
    assert colours_of(picture, "cup", boxes) == expected and len(set(expected)) > 1
    assert len(colours_of(picture, "cup", [(5.2, 5.2, 5.4, 5.4)])) == 1  # a crop is never empty


def test_a_detector_of_other_classes_is_refused(saved, clip_folder):
    labels = [name for name in LABELS.values() if name not in ("mouse", "zebra")]
    other = saved(yolos, labels=dict(enumerate([*labels, "N/A", "street sign"])))
    with pytest.raises(ValueError, match="does not know zebra, computer mouse; take one trained on COCO"):
        geneval.geneval("cpu", other, str(clip_folder))


# ------------------------------------------------------------------------------------------------ vlm


class Judge(BaseHTTPRequestHandler):
    """A server that answers with the brightness of the image from 0 to 10, unless a prompt's faults come first."""

    def log_message(self, *_):
        """Says nothing of a request, which may come when its test is over."""

    def reply(self, status, body, length=None, **headers):
        body = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        for name, value in {"Content-Length": length or len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.server.keys.append(self.headers["Authorization"])
        status = {"/v1/models": 200, "/v1/locked/models": 401}.get(self.path, 404)
        models = {"data": [{"id": name} for name in self.server.models]}
        self.reply(status, models if status == 200 else "no such page")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.keys.append(self.headers["Authorization"])
        self.server.bodies.append(body)
        self.server.arrived()
        faults = self.server.faults[prompt_in(body)]
        fault = faults.pop(0) if faults else f"{10 * picture_in(body).mean() / 255:.2f}"
        if fault == "slow":
            self.server.over.wait(3)
        elif fault == "cut":  # in the middle of the reply
            self.reply(200, '{"choices": [', length=1000)
        elif fault == "drop":  # without a reply
            self.close_connection = True
        elif isinstance(fault, tuple):
            self.reply(*fault[:2], **dict(fault[2:]))
        else:
            choice = fault if isinstance(fault, dict) else {"message": {"role": "assistant", "content": fault}}
            self.reply(200, {"choices": [choice]})


def prompt_in(body):
    return body["messages"][0]["content"][1]["text"]


def picture_in(body):
    kind, data = body["messages"][0]["content"][0]["image_url"]["url"].split(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


@pytest.fixture
def judge():
    with ThreadingHTTPServer(("127.0.0.1", 0), Judge) as server:
        server.url, server.models = f"http://127.0.0.1:{server.server_port}/v1", ["judge"]
        server.faults = defaultdict(list)  # prompt -> what happens to its next requests
        server.bodies, server.keys, server.over, server.arrived = [], [], threading.Event(), lambda: None
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server
        server.over.set()
        server.shutdown()


@pytest.fixture
def waits(monkeypatch):
    """The seconds that would have been waited, but for requests that a test before has left under way."""
    seconds, before = [], {*threading.enumerate()} - {threading.current_thread()}
    waited = SimpleNamespace(sleep=lambda n: threading.current_thread() in before or seconds.append(n))
    monkeypatch.setattr(urllib3.util.retry, "time", waited)
    return seconds


GREYS = torch.linspace(0, 1, 6)[:, None, None, None].expand(6, 3, 8, 8)
GREY_PROMPTS = [f"grey {i}" for i in range(6)]


def ask(judge, images=GREYS, prompts=GREY_PROMPTS, **options):
    return vlm.vlm("cpu", judge.url, question="{prompt}", **options)(images, prompts)


def times_asked(judge):
    return Counter(map(prompt_in, judge.bodies))


def test_scores_come_back_in_the_order_of_the_images_which_arrive_exactly(judge):
    scores = ask(judge)
    torch.testing.assert_close(scores, GREYS[:, 0, 0, 0], atol=0.003, rtol=0)
    assert (judge.bodies[0]["model"], judge.bodies[0]["temperature"]) == ("judge", 0)
    assert times_asked(judge) == dict.fromkeys(GREY_PROMPTS, 1)
    assert torch.equal(ask(judge), scores)
    image = torch.rand(1, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    judge.models.append("other")
    ask(judge, image, ["x"], model="other")
    assert judge.bodies[-1]["model"] == "other"
    assert np.array_equal(picture_in(judge.bodies[-1]), (image[0].permute(1, 2, 0) * 255).round().numpy())


def test_requests_are_under_way_together_and_no_more_than_said(judge):
    arrived = []  # when three wait at once, without which the barrier breaks, and a fourth has had the time to come
    barrier = threading.Barrier(3, action=lambda: time.sleep(0.2) or arrived.append(len(judge.bodies)))
    judge.arrived = lambda: barrier.wait(10)
    ask(judge, concurrency=3, retries=0)
    assert arrived == [3, 6]


YES = {"score": "yes"}


def likely(**chances):
    """A choice with the chances of its first token."""
    top = [{"token": token.replace("_", " "), "logprob": math.log(chance)} for token, chance in chances.items()]
    return {"message": {"content": "Yes"}, "logprobs": {"content": [{"token": "Yes", "top_logprobs": top}]}}


MAY_PASS = [(500, "out of memory"), (503, "loading"), (408, "too slow"), (429, ""), "cut", "drop", "slow"]
LATER = [(429, "", ("Retry_After", "7")), (503, "", ("Retry_After", "1")), (429, "")]


@pytest.mark.parametrize("faults, waited", [*(([fault] * 3, [1, 2]) for fault in MAY_PASS), (LATER, [7, 1, 2])])
def test_what_may_pass_is_tried_again_after_a_while_or_when_the_server_says(judge, waits, faults, waited):
    judge.faults["grey 2"] = [*faults]
    torch.testing.assert_close(ask(judge, backoff=0.5, timeout=0.5), GREYS[:, 0, 0, 0], atol=0.003, rtol=0)
    assert times_asked(judge)["grey 2"] == 4 and waits[-len(waited) :] == waited  # of the first failure, at once


@pytest.mark.parametrize(
    "fault, reason, options",
    [
        ((500, "out\nof memory"), "HTTPError: 500 out of memory", {}),
        ("drop", "MaxRetryError: .*Remote end closed", {}),
        ("cut", "MaxRetryError: .*IncompleteRead", {}),
        # what would be the same again
        ((400, "this model takes no images"), "HTTPError: 400 this model takes no images", {}),
        ((200, "<html>"), "JSONDecodeError: Expecting value.* <html>", {}),
        ((200, [1, 2]), r"TypeError: .* \[1, 2\]", {}),
        ((200, {"error": "what?"}), "KeyError: 'choices' .*what", {}),
        ((200, {"choices": []}), "IndexError: ", {}),
        ({"message": {"content": None}}, "TypeError: ", {}),
        ("I cannot say", "ValueError: the first number is none from 0 to 10 .*I cannot say", {}),
        ("11 of 10", "ValueError: the first number is none from 0 to 10 .*11 of 10", {}),
        ("-1", "ValueError: the first number is none from 0 to 10", {}),
        ("Yes", "KeyError: 'logprobs'", YES),  # a server that sends no chances
        (likely(Well=0.9), "ValueError: neither Yes nor No among the likely first words", YES),
    ],
)
def test_what_does_not_pass_ends_the_run_with_one_line(judge, waits, fault, reason, options):
    judge.faults |= {prompt: [likely(Yes=1.0)] for prompt in GREY_PROMPTS if options}
    judge.faults["grey 2"] = [fault] * 3
    options = options | {"url": judge.url, "question": "{prompt}", "retries": 2}
    reward = make_reward({"vlm": 1.0}, "cpu", {f"vlm.{key}": value for key, value in options.items()})
    told = f"error: reward 'vlm' failed: ValueError: {judge.url}/chat/completions: "
    with pytest.raises(RewardError, match=rf"^{told}{reason}[^\n]*; asked about image 2 \(grey 2\)$"):
        reward(GREYS, GREY_PROMPTS)
    again = "500" in reason or "MaxRetry" in reason
    assert times_asked(judge)["grey 2"] == (3 if again else 1) and waits == ([2] if again else [])


@pytest.mark.parametrize(
    "reply, options, score",
    [
        ("7", {}, 0.7),
        ("Score: 4.5/5", dict(low=1, high=5), 0.875),  # the first number
        ("1", dict(low=1, high=5), 0),
        ("10 (best)", {}, 1),
        ("-0.5", dict(low=-1, high=1), 0.25),
        (likely(Yes=0.6, No=0.2, Maybe=0.2), YES, 0.75),
        (likely(Yes=0.3, _yes=0.1, no=0.3, NO=0.3), YES, 0.4),
        (likely(No=0.9), YES, 0),
        (likely(Yes=0.9), YES, 1),
    ],
)
def test_a_reply_is_scored(judge, reply, options, score):
    judge.faults["grey 0"] = [reply]
    assert ask(judge, GREYS[:1], GREY_PROMPTS[:1], **options).item() == pytest.approx(score)
    asked = (1, True, 20) if options is YES else (32, None, None)
    assert tuple(map(judge.bodies[0].get, ("max_tokens", "logprobs", "top_logprobs"))) == asked


def test_the_question_by_default(judge):
    vlm.vlm("cpu", judge.url, low=1, high=5)(GREYS[2:3], ["a {low} red circle"])
    (question,) = times_asked(judge)
    assert "Prompt: a {low} red circle\n" in question and "from 1 (not at all) to 5 (perfectly)" in question
    judge.faults["Does the image show what this prompt asks for? Prompt: x\nAnswer Yes or No."] = [likely(Yes=1.0)]
    assert vlm.vlm("cpu", judge.url, **YES)(GREYS[:1], ["x"]).item() == 1


def test_the_key_comes_from_the_environment(judge, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    ask(judge, GREYS[:1], GREY_PROMPTS[:1], api_key_env="JUDGE_KEY")
    ask(judge, GREYS[:1], GREY_PROMPTS[:1])
    assert judge.keys == ["Bearer secret", "Bearer secret", None, None]


@pytest.mark.parametrize(
    "options, complaint",
    [
        (dict(url="http://127.0.0.1:9/v1"), "http://127.0.0.1:9/v1/models: .*; start a server .*, or say in vlm.url"),
        (dict(url="http://no such host"), "http://no such host/models: .*; start a server"),
        (dict(url="ftp://nowhere"), "ftp://nowhere/models: .*; start a server"),
        (dict(url="@/wrong"), "@/wrong/models: HTTPError: 404 no such page; start a server"),
        (dict(url="@/locked"), "@/locked/models: HTTPError: 401 .*; start a server"),
        (dict(model="other"), "vlm.model = 'other': the server at @ has one, two"),
        ({}, "vlm.model = '': the server at @ has one, two"),
        (dict(low=5, high=5), "vlm: low = 5, high = 5"),
        (dict(api_key_env="NO_SUCH_KEY"), "there is no environment variable NO_SUCH_KEY"),
    ],
)
def test_what_cannot_work_is_refused_when_the_reward_is_made(judge, waits, options, complaint):
    judge.models, url = ["one", "two"], options.get("url", "@").replace("@", judge.url)
    with pytest.raises(ValueError, match=complaint.replace("@", judge.url)):
        vlm.vlm("cpu", **options | {"url": url})
    assert not judge.bodies and not waits
