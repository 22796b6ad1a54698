import csv
import functools
import logging
import os
import signal
import sys
from pathlib import Path

os.environ["HF_HUB_CACHE"] = os.devnull  # whatever is in the cache of this machine
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the hub client is imported

import pytest
import torch

import common
import grpo
import grpo_guard
import nft
from harness import ending, machine
from harness.settings import RunArgs

SCRIPTS = {"grpo.py": grpo, "grpo_guard.py": grpo_guard, "nft.py": nft}
MINE = Path(__file__).with_name("mine.py")  # rewards
logging.disable(logging.DEBUG)  # thousands of lines of torch's checkpoints beside each failure
torch.set_num_threads(1)  # the same result on every machine, and the fastest where the cores are shared


@pytest.fixture
def make_pipe():
    """The embedded pipeline with an adapter that does something, in a dtype."""

    def make(dtype=torch.float32, finetune_type="lora", **train):
        pipe = common.load_pipeline(RunArgs.model, "cpu", dtype)
        args = grpo.Args(finetune_type=finetune_type, lora_rank=4, train=grpo.TrainArgs(**train))
        parameters = common.trainable_parameters(pipe, args, seed=0)
        torch.manual_seed(1)
        for parameter in parameters.values():
            parameter.data += 0.02 * torch.randn_like(parameter)
        return pipe, parameters

    return make


@pytest.fixture
def call():
    """Keyword arguments for four images of the embedded pipeline, with fresh generators each time."""

    def make(count=4, steps=5, guidance_scale=1.0, resolution=32, same_noise=False):
        height, width = common.height_width(resolution)
        return dict(
            prompt=["a red circle", "two blue squares", "a red circle left of a blue square", "a white cross"][:count],
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            max_sequence_length=1,
            generator=common.generators(*((0, 0 if same_noise else i) for i in range(count))),
        )

    return make


def write_prompts(folder):
    """The command line that names two short prompt files in a folder."""
    (folder / "train.txt").write_text("a red circle\na blue square\nthree green triangles\n")
    (folder / "eval.txt").write_text("a white cross\ntwo red circles\n")
    return ["--prompts", f"{folder}/train.txt", "--eval.prompts", f"{folder}/eval.txt"]


@pytest.fixture
def prompt_files(tmp_path):
    return write_prompts(tmp_path)


SMALL = [
    *("--train.max-epochs", "2", "--train.unique-sample-num-per-epoch", "2", "--train.group-size", "4"),
    *("--train.per-device-batch-size", "4", "--train.num-inference-steps", "4", "--train.gradient-step-per-epoch", "2"),
    *("--train.train-steps", "None", "--train.num-train-steps", "None", "--train.noise-level", "0.7"),
    *("--eval.num-inference-steps", "2", "--eval.eval-freq", "2", "--eval.images-per-prompt", "1"),
    *("--finetune-type", "lora", "--lora-rank", "4", "--train.learning-rate", "1e-3", "--train.kl-beta", "0"),
    *("--reward", "jpeg_compressibility=1"),
]
"""The command line of a run of seconds, whatever the embedded model's defaults are."""


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True)
def handlers_kept():
    """Leaves the handlers of signals as they were, which ending.start sets."""
    kept = {number: signal.getsignal(number) for number in ending.SIGNALS}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def start(tmp_path, monkeypatch, prompt_files):
    """Run a script in this process with more arguments than SMALL; returns its run folder."""

    def call(script, *argv, name="run"):
        argv = [*SMALL, *prompt_files, "--output-dir", str(tmp_path), "--run-name", name, *map(str, argv)]
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *argv])
        script.main()
        return tmp_path / name

    return call


def record(monkeypatch, change=lambda tape: tape):
    """The list that the rollouts of runs' epochs will be in; `change` makes another of each."""
    tapes, plain = [], common.rollout
    monkeypatch.setattr(common, "rollout", lambda *a, **named: tapes.append(change(plain(*a, **named))) or tapes[-1])
    return tapes


@pytest.fixture
def tapes(monkeypatch):
    return record(monkeypatch)


@pytest.fixture
def ends(capsys):
    """The message with which a function refuses, with status 2."""

    def call(function, *args):
        with pytest.raises(SystemExit) as exit:
            function(*args)
        assert exit.value.code == 2
        return capsys.readouterr().err

    return call


@pytest.fixture
def refusal(start, monkeypatch, ends):
    """The message of a command that must be refused with status 2 before anything is loaded or written."""

    def call(script, *argv):
        monkeypatch.setattr(machine, "load_pipeline", lambda *_: pytest.fail("went on"))
        monkeypatch.setattr(script, "Run", lambda *_: pytest.fail("went on"))
        return ends(start, script, *argv)

    return call


@pytest.fixture
def run(start):
    """Run grpo.py with more arguments; returns its run folder."""
    return functools.partial(start, grpo)


@pytest.fixture
def refused(refusal):
    """The message of a grpo.py command that must be refused."""
    return functools.partial(refusal, grpo)
