"""Every family of pipelines in the scripts themselves, for an epoch, as a user runs them (`-m families`)."""

import inspect

import pytest
import tiny_pipelines
import torch
from conftest import read_csv

import grpo
import nft
from harness import checks, machine
from harness.flow_models import use_flow_matching

SHORT = (
    *("--train.max-epochs", 1, "--train.unique-sample-num-per-epoch", 1, "--train.group-size", 2),
    *("--train.per-device-batch-size", 2, "--train.num-inference-steps", 2, "--train.gradient-step-per-epoch", 1),
    *("--train.train-steps", 0, "--eval.num-inference-steps", 2, "--dtype", "float32", "--cpu-threads", 1),
)
FULL = {"lumina"}  # diffusers gives it no adapters


@pytest.mark.families
@pytest.mark.parametrize("script", [grpo, nft], ids=["grpo", "nft"])
@pytest.mark.parametrize("family", tiny_pipelines.FAMILIES)
def test_a_family_in_a_script(start, monkeypatch, tmp_path, family, script):
    (tmp_path / "mine.py").write_text("def brightness(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n")
    torch.manual_seed(0)
    pipe, call = tiny_pipelines.FAMILIES[family]()
    use_flow_matching(pipe)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    takes = inspect.signature(type(pipe).__call__).parameters
    monkeypatch.setattr(machine, "load_pipeline", lambda *_: pipe)
    monkeypatch.setattr(checks, "check_model", lambda args: list(takes))
    parse = script.arguments.parse_args

    def parse_for_the_family(*args):
        parsed, said = parse(*args)
        height, width = call.get("height", 32), call.get("width", 32)
        parsed.train.resolution = parsed.eval.resolution = (height, width)
        parsed.train.guidance_scale = call.get("guidance_scale", 1.0)
        extra = {k: v for k, v in call.items() if k not in checks.SET_BY_THE_SCRIPT}
        parsed.call = extra | ({"negative_prompt": "blurry"} if "negative_prompt" in call else {})
        return parsed, said

    monkeypatch.setattr(script.arguments, "parse_args", parse_for_the_family)
    kind = ["--finetune-type", "full"] if family in FULL else []
    targets = ["--target-modules", "all-linear"] if family in tiny_pipelines.OTHER_TARGETS else []
    folder = start(script, *SHORT, *kind, *targets, "--reward", f"{tmp_path}/mine.py:brightness=1")
    assert "contract holds" in (folder / "log.txt").read_text()
    assert len(read_csv(folder / "metrics.csv")) == 2
