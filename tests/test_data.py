"""Data files, other pipeline classes over the same weights, and adapters to begin with."""

import json

import numpy as np
import peft
import pytest
import torch
import yaml
from conftest import read_csv
from PIL import Image
from safetensors.torch import save, save_file

import common
import grpo
from harness import data, ending
from harness.settings import HERE, RunArgs

EDIT = ("--pipeline", "StableDiffusion3Img2ImgPipeline", "--call", "strength=0.5")


@pytest.fixture
def edits(tmp_path):
    """The command line of a data file of pictures to be edited, for training and evaluation."""
    rows = []
    for i, prompt in enumerate(["a red circle", "a blue square", "three green triangles"]):
        Image.new("RGB", (40, 40), (80 * i, 0, 99)).save(tmp_path / f"{i}.png")
        rows.append({"prompt": prompt, "image": f"{i}.png", "number": i})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.py").write_text(
        "def told(images, prompts, rows):\n"
        "    assert [row['prompt'] for row in rows] == prompts and rows[0]['image'].size == (40, 40)\n"
        "    return images.mean(dim=(1, 2, 3)) + images.new_tensor([row['number'] for row in rows])\n"
        "def apart(images, prompts, rows):\n"
        "    assert len(set(prompts)) == 1\n"
        "    return (images - images.mean(dim=0)).abs().mean(dim=(1, 2, 3))\n"
        "apart.takes_groups = True\n"
    )
    file = str(tmp_path / "rows.jsonl")
    return [*EDIT, "--prompts", file, "--eval.prompts", file, "--reward", f"{tmp_path}/mine.py:told=1"]


def test_lines_end_at_newlines_alone(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("one\u2028line\x0cof\x85 text\r\nand another\n\n".encode())
    assert data.read_rows(path) == [{"prompt": "one\u2028line\x0cof\x85 text"}, {"prompt": "and another"}]


def test_image_to_image_sees_its_pictures_and_rewards_their_rows(start, edits, tmp_path):
    folder = start(grpo, *edits, "--train.train-steps", 0, 1)
    assert "contract holds: max |log ratio| of the first call 0" in (folder / "log.txt").read_text()
    rows = read_csv(folder / "metrics.csv")  # `number` goes to the reward alone
    assert len(rows) == 3 and 1 < float(rows[0]["eval/total"]) < 2  # numbers 0, 1 and 2, and a mean brightness
    given = [data.with_pictures(row)["image"].getpixel((0, 0)) for row in data.read_rows(tmp_path / "rows.jsonl")]
    assert given == [(0, 0, 99), (80, 0, 99), (160, 0, 99)]
    for picture in tmp_path.glob("*.png"):
        Image.new("RGB", (40, 40), "white").save(picture)
    data.picture.cache_clear()
    other = start(grpo, *edits, "--train.max-epochs", 0, name="other")
    assert read_csv(other / "metrics.csv")[0]["eval/image/mean"] != rows[0]["eval/image/mean"]


def test_steps_that_image_to_image_does_not_take_are_refused(start, edits, ends):
    said = ends(ending.start, lambda: start(grpo, *edits, "--train.train-steps", 3))
    assert "step 3 is beyond the last: this call takes 2 steps" in said


def test_a_reward_of_whole_groups_sees_them(start, edits, tmp_path):
    argv = "--train.train-steps 0 --train.per-device-batch-size 2 --eval.images-per-prompt 2 --eval.reward shapes=1"
    folder = start(grpo, *edits, *argv.split(), "--reward", f"{tmp_path}/mine.py:apart=1")
    assert float(read_csv(folder / "metrics.csv")[1]["train/reward/total"]) > 0


@pytest.mark.parametrize(
    "line, remedy",
    [
        ("[1]", 'line 2: should be an object with a text under "prompt"'),
        ('{"image": "0.png"}', 'line 2: should be an object with a text under "prompt"'),
        ('{"prompt": "a"', "line 2: Expecting"),
        ('{"prompt": "a", "image": "no.png"}', "image = 'no.png' should be the path of a picture: [Errno 2]"),
        ('{"prompt": "a", "image": "mine.py"}', "image = 'mine.py' should be the path of a picture: cannot identify"),
        ('{"prompt": "a", "image": 3}', "line 2: image = 3 should be the path of a picture"),
        ('{"prompt": "a", "weight": -1}', "line 2: weight = -1 should be a number from 0 to 1e9"),
        ('{"prompt": "a", "weight": 1e308}', "line 2: weight = 1e+308 should be a number from 0 to 1e9"),
        ('{"prompt": "a"}', "row 2 gives the pipeline ['prompt'], unlike row 1"),
        ('{"prompt": "a", "image": "0.png", "tag": 1}', "row 2 has 'tag': the pipeline does not take it"),
    ],
)
def test_rows_that_are_none_are_refused(refused, edits, tmp_path, line, remedy):
    (tmp_path / "bad.jsonl").write_text(f'{{"prompt": "a blue square", "image": "1.png"}}\n{line}\n')
    message = refused(*edits, "--reward", "jpeg_compressibility=1", "--prompts", tmp_path / "bad.jsonl")
    assert f"error: prompts = '{tmp_path}/bad.jsonl': " in message and remedy in message


def test_rows_are_drawn_by_their_weights():
    rows = [{"prompt": str(i), "weight": weight} for i, weight in enumerate((0, 1, 3))]
    drawn = [row["prompt"] for epoch in range(1, 1001) for row in common.epoch_rows(rows, 1, 0, epoch)]
    assert drawn.count("0") == 0 and drawn.count("2") == pytest.approx(750, abs=60)
    assert common.epoch_rows(rows, 2, 0, 7) == common.epoch_rows(rows, 2, 0, 7)
    twos = [[common.epoch_rows(rows, 2, seed, epoch) for epoch in range(1, 21)] for seed in (0, 1)]
    assert all({row["prompt"] for row in two} == {"1", "2"} for two in twos[0])  # each once, if there are enough
    assert twos[0] != twos[1]
    without = [rows[2], {"prompt": "x"}]  # has the weight 1
    assert {row["prompt"] for row in common.epoch_rows(without, 2, 0, 1)} == {"2", "x"}


# Adapters to begin with


@pytest.fixture
def adapters(make_pipe, tmp_path):
    """A trained adapter as diffusers and as peft save it, and its parameters."""
    pipe, policy = make_pipe()
    state = peft.get_peft_model_state_dict(pipe.transformer)
    config = pipe.transformer.peft_config["default"]
    pipe.save_lora_weights(
        tmp_path / "diffusers", transformer_lora_layers=state, transformer_lora_adapter_metadata=config.to_dict()
    )
    (tmp_path / "peft").mkdir()
    prefixed = {f"base_model.model.{key}": value for key, value in state.items()}
    save_file(prefixed, tmp_path / "peft" / "adapter_model.safetensors")
    config.save_pretrained(tmp_path / "peft")
    return tmp_path, policy


def begun(lora, dtype=torch.float32):
    """The embedded pipeline with saved adapters, and what is trained of it."""
    pipe = common.load_pipeline(RunArgs.model, "cuda" if torch.cuda.is_available() else "cpu", dtype)
    return pipe, common.trainable_parameters(pipe, grpo.Args(lora=str(lora)), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("saved", ["diffusers", "peft", "diffusers/pytorch_lora_weights.safetensors"])
def test_saved_adapters_are_begun_with(adapters, dtype, saved):
    folder, trained = adapters
    pipe, policy = begun(folder / saved, dtype)
    assert policy.keys() == trained.keys()
    for name, value in trained.items():
        assert torch.equal(policy[name], value.to(pipe.device))  # where the model is, not rounded to its dtype
    assert pipe.transformer.peft_config["default"].lora_alpha == 64


def test_a_configuration_names_no_module_to_import(adapters):
    folder, _ = adapters
    path = folder / "peft" / "adapter_config.json"
    others = {"megatron_config": {}, "megatron_core": "antigravity", "use_rslora": True, "alpha_pattern": {"to_q": 8}}
    path.write_text(json.dumps(json.loads(path.read_text()) | others))
    pipe, _ = begun(folder / "peft")
    assert pipe.transformer.peft_config["default"].megatron_core == "megatron.core"
    attention = pipe.transformer.transformer_blocks[0].attn  # what is taken: alpha / the root of the rank, 4
    assert (attention.to_q.scaling["default"], attention.to_k.scaling["default"]) == (8 / 2, 64 / 2)


@pytest.mark.parametrize(
    "contents, remedy",
    [(save({"nowhere.lora_A.weight": torch.ones(2, 2)}), "nowhere.lora_A.weight fits no"), (b"", "cannot be read")],
)
def test_adapters_that_do_not_fit_are_refused(adapters, ends, contents, remedy):
    file = adapters[0] / "peft" / "adapter_model.safetensors"
    file.write_bytes(contents)
    message = ends(begun, file)
    assert message.startswith(f"error: lora = '{file}': ") and remedy in message


@pytest.mark.parametrize("kl_reference, distance", [("base", 1), ("start", 0)])
def test_the_kl_is_to_the_base_model_or_to_the_start(start, adapters, kl_reference, distance):
    options = ("--lora", adapters[0] / "diffusers", "--train.kl-beta", 0.1, "--train.gradient-step-per-epoch", 1)
    folder = start(grpo, *options, "--train.kl-reference", kl_reference, "--train.max-epochs", 1)
    assert (float(read_csv(folder / "metrics.csv")[1]["train/kl"]) > 0) == distance
    start(grpo, "--lora", folder / "lora", "--train.max-epochs", 0, name="again")  # what a run leaves


def test_the_recipe_of_repairs_is_whole():
    recipe = yaml.safe_load((HERE / "docs" / "recipes" / "shapes-repair.yaml").read_text())
    for path in (recipe["prompts"], recipe["eval"]["prompts"]):
        rows = data.read_rows(str(HERE / path))
        assert all(row["shows"] != row["prompt"] for row in rows)
        assert np.asarray(data.with_pictures(rows[0])["image"]).shape == (32, 32, 3)
