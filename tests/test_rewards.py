import json
import re
import string
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import yaml
from conftest import read_csv
from PIL import Image
from transformers import (
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
)

import grpo
import grpo_guard
import nft
import rewards
from rewards import make_reward

SIZE, LIMIT = 32, 12  # pixels a side and tokens of the tiny models
PROMPTS = ["red", "a blue square", "two", "a very long prompt of many letters"]


@pytest.fixture
def images():
    """Four images of the tiny models' own size, in 8-bit steps, so that a processor changes nothing but the scale."""
    return torch.randint(0, 256, (4, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0)) / 255


def to_pil(images):
    return [Image.fromarray(image) for image in (images * 255).round().byte().permute(0, 2, 3, 1).numpy()]


def scatter(module):
    """Weights large enough for the outputs to depend on the inputs."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A tiny random CLIP with its tokenizer and image processor, in the format of the hub."""
    folder = tmp_path_factory.mktemp("clip")
    names = ["<|startoftext|>", "<|endoftext|>", *string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase)]
    CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[]).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE).save_pretrained(folder)
    shared = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = CLIPTextConfig(
        vocab_size=len(names), max_position_embeddings=LIMIT, bos_token_id=0, eos_token_id=1, pad_token_id=1, **shared
    )
    vision = CLIPVisionConfig(image_size=SIZE, patch_size=8, **shared)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8))
    scatter(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def head_file(tmp_path_factory):
    """The aesthetic predictor's layers, named as in LAION's file, for embeddings of 8."""
    path = tmp_path_factory.mktemp("head") / "head.pth"
    torch.save(linear_layers("layers.", 8), path)
    return path


def linear_layers(prefix, width):
    torch.manual_seed(1)
    weights = {}
    for name, size in zip((0, 2, 4, 6, 7), (1024, 128, 64, 16, 1), strict=True):
        weights |= {f"{prefix}{name}.weight": torch.randn(size, width) / width**0.5}
        weights |= {f"{prefix}{name}.bias": torch.randn(size)}
        width = size
    return weights


@pytest.fixture(scope="session")
def imagereward_folder(tmp_path_factory):
    """Random weights in the layout of THUDM/ImageReward (salesforce/BLIP's names), and a BERT tokenizer."""
    folder = tmp_path_factory.mktemp("imagereward")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "square", "two", "very", "long", "of"]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    wide, width, patches = 128, 32, (SIZE // 16) ** 2  # of the vision and the text encoder
    med = dict(
        vocab_size=len(words), hidden_size=width, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=40, hidden_act="gelu", layer_norm_eps=1e-12, pad_token_id=0, model_type="bert",
        architectures=["BertModel"], add_cross_attention=True, encoder_width=768,
    )  # fmt: skip
    (folder / "med_config.json").write_text(json.dumps(med))
    torch.manual_seed(2)
    weights = {}

    def linear(name, *shape):
        weights[f"blip.{name}.weight"], weights[f"blip.{name}.bias"] = 0.3 * torch.randn(shape), torch.randn(shape[0])

    def norm(name, size):
        weights[f"blip.{name}.weight"], weights[f"blip.{name}.bias"] = 1 + 0.3 * torch.randn(size), torch.randn(size)

    eye = "visual_encoder"
    weights[f"blip.{eye}.cls_token"] = torch.randn(1, 1, wide)
    weights[f"blip.{eye}.pos_embed"] = torch.randn(1, patches + 1, wide)
    weights[f"blip.{eye}.patch_embed.proj.weight"] = torch.randn(wide, 3, 16, 16) / 16
    weights[f"blip.{eye}.patch_embed.proj.bias"] = torch.randn(wide)
    for block in (f"{eye}.blocks.0", f"{eye}.blocks.1"):
        norm(f"{block}.norm1", wide)
        linear(f"{block}.attn.qkv", 3 * wide, wide)
        linear(f"{block}.attn.proj", wide, wide)
        norm(f"{block}.norm2", wide)
        linear(f"{block}.mlp.fc1", 4 * wide, wide)
        linear(f"{block}.mlp.fc2", wide, 4 * wide)
    norm(f"{eye}.norm", wide)
    embeddings = "text_encoder.embeddings"
    weights[f"blip.{embeddings}.position_ids"] = torch.arange(40)[None]
    weights[f"blip.{embeddings}.word_embeddings.weight"] = torch.randn(len(words), width)
    weights[f"blip.{embeddings}.position_embeddings.weight"] = torch.randn(40, width)
    norm(f"{embeddings}.LayerNorm", width)
    for layer in ("text_encoder.encoder.layer.0", "text_encoder.encoder.layer.1"):
        for attention, into in ((f"{layer}.attention", width), (f"{layer}.crossattention", wide)):
            linear(f"{attention}.self.query", width, width)
            linear(f"{attention}.self.key", width, into)
            linear(f"{attention}.self.value", width, into)
            linear(f"{attention}.output.dense", width, width)
            norm(f"{attention}.output.LayerNorm", width)
        linear(f"{layer}.intermediate.dense", 48, width)
        linear(f"{layer}.output.dense", width, 48)
        norm(f"{layer}.output.LayerNorm", width)
    weights["blip.vision_proj.weight"] = torch.randn(8, wide)  # in the checkpoint and not used
    torch.save(weights | linear_layers("mlp.layers.", width), folder / "ImageReward.pt")
    return folder


def options_of(name, request):
    """The command line's options for a reward on the tiny models."""
    if name == "imagereward":
        folder = str(request.getfixturevalue("imagereward_folder"))
        return {"imagereward.model": folder, "imagereward.tokenizer": folder}
    options = {f"{name}.model": str(request.getfixturevalue("clip_folder"))}
    if name == "aesthetic":
        options["aesthetic.head"] = str(request.getfixturevalue("head_file"))
    return options


BY_A_MODEL = ("pickscore", "clipscore", "hpsv2", "aesthetic", "imagereward")


# Each reward by a model


@pytest.mark.parametrize("name", BY_A_MODEL)
def test_scores_are_one_number_an_image_whatever_the_batch(request, images, name):
    def score(batch_size, images=images, prompts=PROMPTS):
        reward = make_reward({name: 2.0}, "cpu", options_of(name, request) | {f"{name}.batch_size": batch_size})
        return reward(images, prompts)

    scores = score(4)
    assert scores[name].shape == (4,) and scores[name].dtype == torch.float32
    assert torch.equal(scores["total"], 2 * scores[name])
    assert scores[name].std() > 1e-3
    assert torch.equal(score(4)[name], scores[name])
    for batch_size in (1, 3):
        assert torch.allclose(score(batch_size)[name], scores[name], atol=1e-5)
    assert torch.allclose(score(3, images.flip(0), PROMPTS[::-1])[name].flip(0), scores[name], atol=1e-5)


@pytest.mark.parametrize("name", BY_A_MODEL)
def test_only_the_aesthetic_reward_ignores_the_prompt(request, images, name):
    reward = make_reward({name: 1.0}, "cpu", options_of(name, request))
    same = torch.isclose(reward(images, PROMPTS)[name], reward(images, ["blue"] * 4)[name], atol=1e-4)
    assert same.tolist() == [name == "aesthetic"] * 4


@pytest.mark.parametrize("name", BY_A_MODEL)
def test_a_half_precision_model_agrees_roughly(request, images, name):
    options = options_of(name, request)
    exact = make_reward({name: 1.0}, "cpu", options)(images, PROMPTS)[name]
    rough = make_reward({name: 1.0}, "cpu", options | {f"{name}.dtype": "bfloat16"})(images, PROMPTS)[name]
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.15 * exact.abs().max()


@pytest.mark.parametrize("name", BY_A_MODEL)
def test_the_score_has_no_gradient(request, images, name):
    options = {key.partition(".")[2]: value for key, value in options_of(name, request).items()}
    assert not rewards.REWARDS[name]("cpu", **options)(images.requires_grad_(), PROMPTS).requires_grad


def test_the_models_are_frozen(clip_folder, imagereward_folder):
    blip = rewards._blip(str(imagereward_folder), torch.load(imagereward_folder / "ImageReward.pt"))
    for model in (*blip, rewards._Clip("cpu", str(clip_folder), None, "float32", 1).model):
        assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", BY_A_MODEL)
def test_a_reward_on_a_device_of_its_own(request, images, name):
    there = make_reward({name: 1.0}, "cpu", options_of(name, request) | {f"{name}.device": "cuda"})(images, PROMPTS)
    here = make_reward({name: 1.0}, "cpu", options_of(name, request))(images, PROMPTS)
    assert there["total"].device == images.device
    assert torch.allclose(there[name], here[name], atol=1e-2 * here[name].abs().max())
    on_gpu = make_reward({name: 1.0}, "cuda", options_of(name, request))(images.cuda(), PROMPTS)
    assert on_gpu["total"].is_cuda and torch.allclose(on_gpu[name].cpu(), there[name], atol=1e-4)


def test_clip_scores_are_those_of_the_model_itself(clip_folder, head_file, images, request):
    model = CLIPModel.from_pretrained(clip_folder)
    tokens = CLIPTokenizer.from_pretrained(clip_folder)(
        PROMPTS, padding="max_length", max_length=LIMIT, truncation=True, return_tensors="pt"
    )
    assert tokens.input_ids[3, -1] == 1 and (tokens.input_ids[3, :-1] != 1).all()  # too long, and cut off
    pixels = CLIPImageProcessorPil.from_pretrained(clip_folder)(to_pil(images), return_tensors="pt")
    with torch.no_grad():
        out = model(**tokens, **pixels)
    names = ("pickscore", "clipscore", "hpsv2", "aesthetic")
    options = {key: value for name in names for key, value in options_of(name, request).items()}
    scores = make_reward(dict.fromkeys(names, 1.0), "cpu", options)(images, PROMPTS)
    scaled = out.logits_per_image.diagonal()
    assert torch.allclose(scores["pickscore"], scaled, atol=1e-4)
    for name in ("clipscore", "hpsv2"):
        assert torch.allclose(scores[name], scaled / model.logit_scale.exp(), atol=1e-5)
        assert scores[name].abs().max() <= 1
    x = out.image_embeds
    layers = list(torch.load(head_file).values())
    for weight, bias in zip(layers[::2], layers[1::2], strict=True):
        x = x @ weight.T + bias
    assert torch.allclose(scores["aesthetic"], x[:, 0], atol=1e-4)
    divided = make_reward({"pickscore": 1.0}, "cpu", options_of("pickscore", request) | {"pickscore.divide_by": 26})
    assert torch.allclose(divided(images, PROMPTS)["pickscore"], scaled / 26, atol=1e-5)


def test_the_aesthetic_head_from_safetensors_and_from_a_folder(clip_folder, head_file, images, tmp_path):
    safetensors.torch.save_file(torch.load(head_file), tmp_path / "head.safetensors")
    (tmp_path / "aesthetic-model.pth").write_bytes(head_file.read_bytes())
    scores = [
        rewards.aesthetic("cpu", head=str(head), model=str(clip_folder))(images, PROMPTS)
        for head in (head_file, tmp_path / "head.safetensors", tmp_path)
    ]
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[0], scores[2])


def test_imagereward_is_what_its_checkpoint_says(imagereward_folder, images, request):
    """Against BLIP written out from the names of its own checkpoint."""
    weights = torch.load(imagereward_folder / "ImageReward.pt")

    def linear(x, name):
        return F.linear(x, weights[f"blip.{name}.weight"], weights[f"blip.{name}.bias"])

    def norm(x, name, eps):
        return F.layer_norm(x, x.shape[-1:], weights[f"blip.{name}.weight"], weights[f"blip.{name}.bias"], eps)

    def attend(q, k, v, heads):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        return ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)

    eye = "visual_encoder"
    pixels = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE)(to_pil(images), return_tensors="pt")
    kernel, bias = (weights[f"blip.{eye}.patch_embed.proj.{part}"] for part in ("weight", "bias"))
    x = F.conv2d(pixels["pixel_values"], kernel, bias, stride=16).flatten(2).mT
    x = torch.cat([weights[f"blip.{eye}.cls_token"].expand(4, 1, -1), x], dim=1) + weights[f"blip.{eye}.pos_embed"]
    for block in (f"{eye}.blocks.0", f"{eye}.blocks.1"):
        q, k, v = linear(norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, dim=-1)
        x = x + linear(attend(q, k, v, heads=2), f"{block}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    seen = norm(x, f"{eye}.norm", 1e-6)

    tokenizer = BertTokenizer.from_pretrained(imagereward_folder)
    prompts = ["red", "a blue square", "two red", " ".join(["a very long"] * 20)]
    expected = []
    for i, prompt in enumerate(prompts):
        words = tokenizer(prompt).input_ids
        words = words if len(words) <= 35 else [*words[:34], words[-1]]
        embeddings = "text_encoder.embeddings"
        x = weights[f"blip.{embeddings}.word_embeddings.weight"][words]
        x = x + weights[f"blip.{embeddings}.position_embeddings.weight"][: len(words)]
        x = norm(x, f"{embeddings}.LayerNorm", 1e-12)[None]
        for layer in ("text_encoder.encoder.layer.0", "text_encoder.encoder.layer.1"):
            for name in (f"{layer}.attention", f"{layer}.crossattention"):
                source = seen[i : i + 1] if name.endswith("crossattention") else x
                q, k, v = (
                    linear(y, f"{name}.self.{part}") for y, part in ((x, "query"), (source, "key"), (source, "value"))
                )
                attended = linear(attend(q, k, v, heads=4), f"{name}.output.dense")
                x = norm(x + attended, f"{name}.output.LayerNorm", 1e-12)
            y = linear(F.gelu(linear(x, f"{layer}.intermediate.dense")), f"{layer}.output.dense")
            x = norm(x + y, f"{layer}.output.LayerNorm", 1e-12)
        x = x[0, 0]
        for name in (0, 2, 4, 6, 7):
            x = F.linear(x, weights[f"mlp.layers.{name}.weight"], weights[f"mlp.layers.{name}.bias"])
        expected.append((x.item() - 0.16717362830052426) / 1.0333394966054072)
    scores = make_reward({"imagereward": 1.0}, "cpu", options_of("imagereward", request))(images, prompts)
    assert torch.allclose(scores["imagereward"], torch.tensor(expected), atol=1e-4)


@pytest.mark.parametrize("height, width", [(32, 32), (24, 40), (97, 61), (256, 512), (30, 31)])
@pytest.mark.parametrize(
    "settings",
    [
        dict(size={"shortest_edge": 32}, crop_size=32),
        dict(size={"shortest_edge": 40}, crop_size=(32, 28), image_mean=(0.5, 0.4, 0.3), image_std=(0.2, 0.3, 0.4)),
        dict(size={"height": 36, "width": 28}, crop_size=16, do_center_crop=False),
    ],
)
def test_preprocessing_is_that_of_the_image_processor(height, width, settings):
    torch.manual_seed(0)
    smooth = F.interpolate(torch.rand(2, 3, 9, 9), (height, width), mode="bilinear")
    images = (smooth + 0.1 * torch.randn(2, 3, height, width)).clamp(0, 1).mul(255).round() / 255
    processor = CLIPImageProcessorPil(**settings)
    expected = processor(to_pil(images), return_tensors="pt")["pixel_values"]
    difference = (rewards._preprocess(images, processor) - expected).abs().mean(dim=(0, 2, 3))
    levels = difference * torch.tensor(processor.image_std) * 255
    assert levels.max() < 0.02  # of 255: PIL's weights are rounded, so that now and then a pixel is one level off


def test_a_model_that_lacks_weights_is_refused(clip_folder, tmp_path):
    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = safetensors.torch.load_file(clip_folder / "model.safetensors")
    del weights["text_projection.weight"]
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit, match="'clipscore' cannot be made: .* text_projection.weight is missing"):
        make_reward({"clipscore": 1.0}, "cpu", {"clipscore.model": str(tmp_path)})


@pytest.mark.parametrize(
    "name, broken, complaint",
    [
        ("aesthetic", "aesthetic.head", "the weights have no layers"),
        ("imagereward", "imagereward.model", "the weights have no blip.visual_encoder"),
        ("clipscore", "clipscore.model", "cannot be made"),
    ],
)
def test_files_that_hold_something_else_are_named(request, tmp_path, name, broken, complaint):
    for file in ("aesthetic-model.pth", "ImageReward.pt"):
        torch.save({"other": torch.zeros(1)}, tmp_path / file)
    with pytest.raises(SystemExit, match=f"reward '{name}' .*{complaint}"):
        make_reward({name: 1.0}, "cpu", options_of(name, request) | {broken: str(tmp_path)})


@pytest.mark.parametrize("name", BY_A_MODEL)
def test_a_hub_that_cannot_be_reached_gives_one_line(name):
    with pytest.raises(SystemExit, match=f"^error: reward '{name}' cannot be made: [^\n]*$"):
        make_reward({name: 1.0}, "cpu")


# Options and checks


def test_the_default_processor_is_the_models_own_where_it_has_one(monkeypatch):
    asked = []
    monkeypatch.setattr(CLIPModel, "from_pretrained", lambda *_, **__: (torch.nn.Linear(1, 1), {"missing_keys": set()}))
    monkeypatch.setattr(CLIPTokenizer, "from_pretrained", lambda where: asked.append(where))
    monkeypatch.setattr(CLIPImageProcessorPil, "from_pretrained", lambda where: asked.append(where))
    for options in ({}, {"clipscore.model": "a/b"}, {"clipscore.model": "a/b", "clipscore.processor": "c/d"}):
        make_reward({"clipscore": 1.0}, "cpu", options)
    make_reward({"hpsv2": 1.0}, "cpu")
    expected = ["openai/clip-vit-large-patch14", "a/b", "c/d", "openai/clip-vit-base-patch32"]
    assert asked == [where for where in expected for _ in range(2)]


def test_options_reach_the_reward_they_name(monkeypatch, images):
    made = {}

    def probe(name):
        def factory(device, size: int = 1, names: list[str] = ()):
            made[name] = (device, size, names)
            return lambda images, prompts: torch.full((len(images),), float(size))

        return factory

    for name in ("one", "two"):
        monkeypatch.setitem(rewards.REWARDS, name, probe(name))
    options = {"one.size": 5, "one.names": ["x"], "two.device": "meta"}
    scores = make_reward({"one": 1.0, "two": 10.0}, "cpu", options)(images, PROMPTS)
    assert made == {"one": ("cpu", 5, ["x"]), "two": ("meta", 1, ())}
    assert scores["total"].tolist() == [15] * 4


def test_the_readmes_reward_with_an_option(monkeypatch, images):
    monkeypatch.setattr(rewards, "REWARDS", dict(rewards.REWARDS))
    blocks = re.findall(r"```python\n(.*?)```", (Path(rewards.__file__).parent / "README.md").read_text(), re.DOTALL)
    exec(next(block for block in blocks if "REWARDS" in block), dict(vars(rewards)))
    rows = torch.zeros(4, 3, 8, 8)
    rows[:, :, ::2] = 1
    assert make_reward({"sharpness": 1.0}, "cpu", {"sharpness.scale": 3})(rows, PROMPTS)["total"].tolist() == [3] * 4


REFUSALS = [
    (
        "clipscore.model=x",
        "should be NAME.OPTION=VALUE (in YAML NAME.OPTION: VALUE) of a reward asked for: pickscore, shapes",
    ),
    ("model=x", "should be NAME.OPTION=VALUE"),
    ("pickscore.modle=x", "pickscore has no option 'modle'; did you mean model?"),
    ("shapes.model=x", "shapes has no option 'model'; it has: device"),
    ("pickscore.model=/nowhere/at/all", "no such file or folder"),
    ("pickscore.processor=./nowhere", "no such file or folder"),
    ("pickscore.model=3", "should be"),
    ("pickscore.batch_size=many", "pickscore.batch_size=many: should be int"),
    ("pickscore.batch_size=True", "should be int"),
    ("pickscore.batch_size=0", "must be above 0"),
    ("pickscore.dtype=float8", "should be Literal['float32', 'bfloat16', 'float16']"),
    ("pickscore.device=quantum", "quantum"),
    ("pickscore.divide_by=little", "should be float"),
    ("pickscore", "not of the form NAME=VALUE"),
]


@pytest.mark.parametrize("option, complaint", REFUSALS)
def test_wrong_options_are_refused(refusal, option, complaint):
    message = refusal(grpo, "--reward", "pickscore=1", "shapes=1", "--reward-options", option)
    assert option in message and complaint in " ".join(message.replace("│", " ").split())


@pytest.mark.parametrize("script", [grpo, grpo_guard, nft])
def test_every_script_checks_options(refusal, script):
    assert "did you mean model?" in refusal(script, "--reward", "hpsv2=1", "--reward-options", "hpsv2.modle=x")


def test_options_that_are_right_pass(clip_folder):
    options = {"model": str(clip_folder), "processor": None, "divide_by": 26, "device": "cpu", "dtype": "float16"}
    for right in (options, {"model": "someone/something-v1.0"}):
        rewards.check_rewards({"pickscore": 1.0}, ["a"], {f"pickscore.{key}": value for key, value in right.items()})


def test_a_users_reward_has_no_options(refusal, tmp_path):
    (tmp_path / "mine.py").write_text("def f(images, prompts, gain=1):\n    return images.mean(dim=(1, 2, 3))\n")
    name = f"{tmp_path}/mine.py:f"
    message = refusal(grpo, "--reward", f"{name}=1", "--reward-options", f"{name}.gain=2")
    assert "a function of your own takes no options; write a factory into rewards.py" in message


def test_a_missing_package_is_named(refusal, monkeypatch):
    monkeypatch.setitem(rewards.PACKAGES, "shapes", ["nowhere_at_all"])
    message = refusal(grpo, "--reward", "shapes=1")
    assert "reward 'shapes' needs the package nowhere_at_all: pip install nowhere_at_all" in message


def test_prompts_are_checked_for_the_rewards_asked_for(refusal, monkeypatch):
    def check(prompt):
        if "blue" in prompt:
            raise ValueError(f"no blue please: {prompt!r}")

    monkeypatch.setitem(rewards.PROMPT_CHECKS, "jpeg_compressibility", check)
    assert "no blue please: 'a blue square'" in refusal(grpo)
    rewards.check_rewards({"jpeg_incompressibility": 1.0}, ["a blue square"])


# In a run


@pytest.fixture
def with_pickscore(clip_folder, tmp_path):
    (tmp_path / "mine.py").write_text("def brightness(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n")
    rewarded = ["--reward", "pickscore=1", f"{tmp_path}/mine.py:brightness=0.5"]
    return [*rewarded, "--reward-options", f"pickscore.model={clip_folder}", "pickscore.batch_size=3"]


@pytest.mark.parametrize("script", [grpo, grpo_guard, nft])
def test_a_run_with_a_model_and_a_users_reward(start, with_pickscore, tmp_path, script):
    rows = read_csv(start(script, *with_pickscore) / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    for row, kind in ((rows[0], "eval"), (rows[1], "train/reward"), (rows[2], "eval")):
        pick, bright = float(row[f"{kind}/pickscore"]), float(row[f"{kind}/{tmp_path}/mine.py:brightness"])
        assert np.isclose(float(row[f"{kind}/total"]), pick + 0.5 * bright, rtol=1e-4)


def test_options_from_yaml(start, with_pickscore, clip_folder, tmp_path):
    first = start(grpo, *with_pickscore, "--train.max-epochs", 0, name="first")
    settings = yaml.safe_load((first / "args.yaml").read_text())
    assert settings["reward_options"] == {"pickscore.model": str(clip_folder), "pickscore.batch_size": 3}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"reward_options": settings["reward_options"]}))
    again = start(grpo, *with_pickscore[:3], "--config", file, "--train.max-epochs", 0, name="again")
    assert read_csv(again / "metrics.csv")[0]["eval/total"] == read_csv(first / "metrics.csv")[0]["eval/total"]


def test_options_of_a_yaml_are_replaced_as_the_rewards_are(refusal, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("reward: {clipscore: 1}\nreward_options: {clipscore.batch_size: 0}")
    of_shapes = refusal(grpo, "--config", file, "--reward", "shapes=1")
    assert "clipscore.batch_size=0" in of_shapes and "asked for: shapes" in of_shapes
    with pytest.raises(pytest.fail.Exception, match="went on"):
        refusal(grpo, "--config", file, "--reward", "shapes=1", "--reward-options")


def test_nested_options_in_a_yaml_are_refused(refusal, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("reward_options: {jpeg_compressibility: {device: cpu}}")
    assert "should be NAME.OPTION=VALUE" in refusal(grpo, "--config", file)
