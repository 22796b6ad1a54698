"""Rewards: the weighted sum, users' own functions, options, and what a stranger's file may ask for."""

import io
import re
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import rewards
from harness.judges.weights import to_pil
from rewards import RewardError, check_rewards, check_untrusted, make_reward, make_rewards

IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
MEANS = IMAGES.mean(dim=(1, 2, 3))
PROMPTS = ["red", "a blue square", "two", "a very long prompt of many letters"]


@pytest.fixture
def own(tmp_path):
    """Write a user's file; returns the name of the function f in it."""

    def write(source, file="mine.py"):
        (tmp_path / file).write_text(source)
        return f"{tmp_path / file}:f"

    return write


def test_jpeg_rewards():
    images = torch.stack([torch.full((3, 32, 32), 0.5), torch.rand(3, 32, 32)])
    scores = make_reward({"jpeg_compressibility": 1.0, "jpeg_incompressibility": 3.0}, "cpu")(images, ["", ""])
    assert scores["jpeg_compressibility"][0] > scores["jpeg_compressibility"][1]
    assert torch.equal(scores["jpeg_compressibility"], -scores["jpeg_incompressibility"])
    assert torch.allclose(scores["total"], 2 * scores["jpeg_incompressibility"])
    to_pil(images)[1].save(file := io.BytesIO(), "JPEG", quality=95)
    assert scores["jpeg_incompressibility"][1].item() == pytest.approx(len(file.getvalue()) / 1000)


# A user's own function


@pytest.mark.parametrize(
    "body, complaint",
    [
        ("return images.mean()", r"returned shape \(\) for 4 images"),
        ("return images.mean(dim=(1, 2, 3))[:, None]", r"returned shape \(4, 1\)"),
        ("return images.mean(dim=(1, 2, 3)) / 0", "returned inf for image 0"),
        ("return images[99]", "failed: IndexError"),
        ("raise SystemExit(0)", "failed: SystemExit: 0"),
        ("import sys; sys.exit()", "failed: SystemExit"),
        ("raise KeyboardInterrupt", "failed: KeyboardInterrupt"),
    ],
)
def test_a_reward_that_is_wrong_or_raises_is_named(own, body, complaint, capsys):
    reward = make_reward({own(f"def f(images, prompts):\n    {body}\n"): 1.0}, "cpu")
    with pytest.raises(RewardError, match=f"^error: reward '.*mine.py:f' {complaint}[^\n]*$") as error:
        reward(IMAGES, PROMPTS)
    assert isinstance(error.value, ValueError) and isinstance(error.value.code, str)  # ends a script with status 1
    assert ("failed" not in complaint) or body in capsys.readouterr().err  # where it was


def test_a_reward_file_is_loaded_once(own, capsys):
    one = own(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nprint('loaded')\n"
        "@dataclass\nclass A:\n    b: int\n"
        "def f(i, p):\n    return i.mean((1, 2, 3))\ndef two(i, p):\n    return f(i, p)\n"
    )
    reward = make_reward({one: 1.0, one[:-1] + "two": 1.0}, "cpu")
    assert torch.allclose(reward(IMAGES, PROMPTS)["total"], 2 * MEANS)
    assert capsys.readouterr().out == "loaded\n"


def test_rows_go_to_the_functions_that_take_them(own, monkeypatch):
    size = "def f(images, prompts, {}):\n    return [len(str(row)) for row in rows]\n"
    names = [own(size.format(kind), f"{i}.py") for i, kind in enumerate(("rows", "rows=None", "scale=1, *, rows"))]
    names.append(own("def f(images, prompts, scale=7):\n    return [scale] * len(images)\n"))
    unknown = "class F:\n    __signature__ = 0\n    def __call__(self, i, p):\n        return [8] * len(i)\nf = F()\n"
    names.append(own(unknown, "a.py"))
    monkeypatch.setitem(rewards.REWARDS, "own", lambda device: lambda i, p, rows: [len(str(row)) for row in rows])
    reward = make_reward(dict.fromkeys([*names, "own"], 1.0), "cpu")
    rows, prompts = [{}, {"a": 1}, {"a": 1, "b": 2}, {"a": 1, "b": 2, "c": 3}], [{"prompt": p} for p in PROMPTS]
    videos = IMAGES[:, None].expand(-1, 2, -1, -1, -1)  # whose frames have the row of the video
    for images, given, seen in ((IMAGES, rows, rows), (videos, rows, rows), (IMAGES, None, prompts)):
        sizes = [len(str(row)) for row in seen]
        values = [value.tolist() for value in reward(images, PROMPTS, given).values()]
        assert values[:-1] == [sizes, sizes, sizes, [7] * 4, [8] * 4, sizes]


GROUP = (
    "def f(images, prompts, rows):\n    return images.mean((1, 2, 3)) - images.mean() + len(rows)\n"
    "f.takes_groups = True\n"
)


def test_a_function_that_takes_groups_gets_all_images_of_a_call_and_all_their_frames(own):
    name = own(GROUP)
    training, evaluation = make_rewards({name: 1.0}, {"jpeg_compressibility": 1.0}, "cpu")
    assert training.takes_groups and evaluation.takes_groups
    assert torch.allclose(training(IMAGES, PROMPTS)[name], MEANS - MEANS.mean() + 4, atol=1e-6)
    videos = torch.stack([IMAGES, 1 - IMAGES], dim=1)  # which all have the mean brightness 1/2
    assert torch.allclose(training(videos, PROMPTS)[name], torch.full((4,), 8.0), atol=1e-6)


def test_who_takes_groups_or_rows(own, monkeypatch):
    def factory(device): ...

    monkeypatch.setitem(rewards.REWARDS, "spread", factory)
    neither, both = ({"spread": 1.0, own(*file): 1.0} for file in (("def f(images, prompts): ...", "a.py"), (GROUP,)))
    assert make_reward(both, "cpu").takes_groups and not make_reward(neither, "cpu").takes_groups
    assert rewards.takes_rows(both) and rewards.takes_rows({"geneval": 1.0}) and not rewards.takes_rows(neither)
    factory.takes_groups = True
    assert make_reward({"spread": 1.0}, "cpu").takes_groups


def test_a_function_that_writes_into_what_it_gets_changes_nothing_for_others(own):
    name = own(
        "def f(images, prompts, rows):\n    images.zero_()\n    prompts.clear()\n    rows[0]['a'].clear()\n"
        "    return images.mean((1, 2, 3))\n"
    )
    images, prompts, rows = IMAGES.clone(), list(PROMPTS), [{"a": [1]}] * 4
    values = make_reward({name: 1.0, "jpeg_compressibility": 1.0}, "cpu")(images, prompts, rows)
    assert values[name].tolist() == [0] * 4 and values["jpeg_compressibility"].isfinite().all()
    assert torch.equal(images, IMAGES) and prompts == PROMPTS and rows == [{"a": [1]}] * 4


@pytest.mark.parametrize("end", ["return [0.0] * 4", "raise ValueError"])
def test_a_function_that_changes_the_directory_leaves_the_run_in_its_own(own, tmp_path, monkeypatch, end):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    name = own(f"import os\nos.chdir('elsewhere')\ndef f(images, prompts):\n    os.chdir('elsewhere')\n    {end}\n")
    reward = make_reward({name: 1.0}, "cpu")
    assert Path.cwd() == tmp_path
    with pytest.raises(RewardError) if end.startswith("raise") else nullcontext():
        reward(IMAGES, PROMPTS)
    assert Path.cwd() == tmp_path


# What a stranger's file may ask for


def test_a_stranger_may_ask_for_what_is_built_in_and_set_numbers_and_choices():
    options = {"pickscore.divide_by": 26, "pickscore.dtype": "bfloat16", "pickscore.batch_size": 8}
    options |= {"geneval.strict": True, "geneval.threshold": 0.5}
    check_untrusted({"shapes": 1.0, "pickscore": 0.1, "geneval": 1, "ocr": 1}, options)


def test_a_stranger_may_not_have_code_run_or_images_sent(own):
    name = own("raise SystemExit('it ran')\n")
    for reward in (name, "some-model/readme.py:f", "vlm", "no_such_reward", 3):
        with pytest.raises(ValueError, match=re.escape(f"may not ask for the reward {reward!r}")):
            check_untrusted({"shapes": 1.0, reward: 1.0}, {})
    assert name.partition(":")[0] not in str(sys.modules)


@pytest.mark.parametrize(
    "key, value",
    [
        *[(f"pickscore.{option}", "someone/something") for option in ("model", "processor", "device", "modle")],
        *[("aesthetic.head", "x.pth"), ("imagereward.tokenizer", "a/b"), ("geneval.detector", "a/b")],
        *[("vlm.url", "http://a"), ("vlm.api_key_env", "HOME"), ("vlm.question", "{prompt}"), ("vlm.model", "a")],
        *[("pickscore.batch_size", "8"), ("pickscore.dtype", "float8"), ("geneval.strict", 1)],
        *[("f.py:f.gain", 1), ("geneval.clip", "a"), (3, 1)],
    ],
)
def test_a_stranger_sets_no_path_address_device_or_text(key, value):
    with pytest.raises(ValueError, match=re.escape(f"not {key}={value}")):
        check_untrusted({"shapes": 1.0}, {key: value})


# Options and checks


def test_a_reward_may_have_a_device_of_its_own(monkeypatch):
    made = []
    monkeypatch.setitem(rewards.REWARDS, "one", lambda device: made.append(device))
    for options in ({}, {"one.device": "meta"}):
        make_reward({"one": 1.0}, "cpu", options)
    assert made == ["cpu", "meta"]


def test_the_documented_reward_with_an_option(monkeypatch):
    monkeypatch.setattr(rewards, "REWARDS", dict(rewards.REWARDS))
    page = Path(rewards.__file__).parent / "docs" / "rewards.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    exec(next(block for block in blocks if "REWARDS" in block), dict(vars(rewards)))
    rows = torch.zeros(4, 3, 8, 8)
    rows[:, :, ::2] = 1
    assert make_reward({"sharpness": 1.0}, "cpu", {"sharpness.scale": 3})(rows, PROMPTS)["total"].tolist() == [3] * 4


@pytest.mark.parametrize(
    "key, value, complaint",
    [
        ("clipscore.model", "x", "NAME.OPTION: VALUE) of a reward asked for: pickscore, shapes, vlm, mine.py:f"),
        ("model", "x", "should be NAME.OPTION=VALUE"),
        ("jpeg_compressibility", {"device": "cpu"}, "should be NAME.OPTION=VALUE"),
        ("pickscore.modle", "x", "pickscore has no option 'modle'; did you mean model?"),
        ("shapes.model", "x", "shapes has no option 'model'; known: device"),
        ("pickscore.model", "/nowhere/at/all", "no such file or folder"),
        ("pickscore.processor", "./nowhere", "no such file or folder"),
        ("pickscore.model", 3, "should be a valid string"),
        ("pickscore.batch_size", "many", "should be a valid integer"),
        ("pickscore.batch_size", True, "should be a valid integer"),
        ("pickscore.batch_size", 0, "should be greater than or equal to 1"),
        ("pickscore.dtype", "float8", "should be 'float32', 'bfloat16' or 'float16'"),
        ("pickscore.device", "quantum", "quantum"),
        ("pickscore.divide_by", "little", "should be a valid number"),
        ("pickscore.divide_by", float("nan"), "should be a finite number"),
        ("vlm.retries", -1, "should be greater than or equal to 0"),
        ("mine.py:f.gain", 2, "a function of your own takes no options; write a factory into rewards.py"),
    ],
)
def test_wrong_options_are_refused(own, tmp_path, monkeypatch, key, value, complaint):
    monkeypatch.chdir(tmp_path)
    own("def f(images, prompts, gain=1): ...")
    with pytest.raises(ValueError, match=re.escape(f"--reward-options {key}={value}: ")) as error:
        check_rewards({"pickscore": 1.0, "shapes": 1.0, "vlm": 1.0, "mine.py:f": 1.0}, options={key: value})
    assert complaint in str(error.value)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(rewards.PACKAGES, "shapes", "nowhere_at_all")
    with pytest.raises(ValueError, match="'shapes' needs the package nowhere_at_all: pip install nowhere_at_all"):
        check_rewards({"shapes": 1.0})


def test_options_of_a_command_replace_those_of_a_yaml_as_its_rewards_do(refused, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("reward: {clipscore: 1}\nreward_options: {clipscore.batch_size: 0}")
    of_shapes = refused("--config", file, "--reward", "shapes=1")
    assert "clipscore.batch_size=0" in of_shapes and "asked for: shapes" in of_shapes
    with pytest.raises(pytest.fail.Exception, match="went on"):
        refused("--config", file, "--reward", "shapes=1", "--reward-options")
    assert "not of the form NAME=VALUE" in refused("--reward-options", "shapes")
