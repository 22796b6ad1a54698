"""Runs by several processes, started by a real torchrun and talking through gloo: the same as by one."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, read_csv
from safetensors.torch import load_file

import common
import grpo
import grpo_guard
import nft

ROOT = Path(common.__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
SCRIPTS = {"grpo.py": grpo, "grpo_guard.py": grpo_guard, "nft.py": nft}
RUN = [
    *("--train.unique-sample-num-per-epoch", "4", "--train.group-size", "2", "--train.per-device-batch-size", "1"),
    *("--train.num-inference-steps", "3", "--train.kl-beta", "0.04"),
    *("--train.ema-update-interval", "1", "--train.global-std", "--reward", "mine.py:smooth=1", "mine.py:other=0.5"),
    *("--eval.images-per-prompt", "3", "--eval.per-device-batch-size", "2"),
]
"""After SMALL: 4 prompts x 2 images in 8 calls, 2 updates; evaluation in 5 calls, whose groups straddle calls."""
FULL = ["--finetune-type", "full", "--train.learning-rate", "1e-4", "--eval.images-per-prompt", "1"]
SHARDED = [
    *(*FULL, "--train.unique-sample-num-per-epoch", "2", "--train.gradient-step-per-epoch", "1"),
    *("--train.num-inference-steps", "2", "--eval.per-device-batch-size", "1"),
]
"""The second of two processes has one evaluation call less."""

REWARD = """
import os

def smooth(images, prompts):
    return images.mean(dim=(1, 2, 3))

def other(images, prompts):
    return (images[:, 0] - images[:, 1] ** 2).mean(dim=(1, 2))

calls = []

def fails_in_the_second(images, prompts):
    calls.append(1)
    if os.environ.get("RANK") == "1" and len(calls) > 6:
        raise KeyError("a reward of the second process")
    return smooth(images, prompts)
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder to run in; the runs are in its folder runs."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "mine.py").write_text(REWARD)
    (folder / "train.txt").write_text(
        "a red circle\na blue square\nthree green triangles\ntwo white crosses\na red square\n"
    )
    (folder / "eval.txt").write_text("a white cross\ntwo red circles\na green square\n")
    return folder


def arguments(name, *more):
    return [*SMALL, "--prompts", "train.txt", "--eval.prompts", "eval.txt", *RUN, "--run-name", name, *more]


def begin(work, count, *command):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*TORCHRUN, str(count), *map(str, command)], cwd=work, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def together(work, count, *jobs):
    """Run jobs (script, argument, ...) by so many processes; their parameters must be the same after each epoch."""
    (work / "jobs.json").write_text(json.dumps(jobs))
    process = begin(work, count, ROOT / "tests" / "ranks.py", "jobs.json")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    sums = [json.loads((work / f"checksums-{r}.json").read_text()) for r in range(count)]
    assert all(own == sums[0] for own in sums) and [len(job) for job in sums[0]]
    return said


def alone(work, monkeypatch, script, *argv):
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "argv", [script, *argv])
    SCRIPTS[script].main()


def assert_alike(one, other, tolerance=1e-5):
    """metrics.csv but for seconds, the rewards of each evaluation image, and the shown images but for rounding."""
    for file in ("metrics.csv", *(f"images/{path.name}" for path in (one / "images").glob("*.csv"))):
        rows, others = read_csv(one / file), read_csv(other / file)
        assert len(rows) == len(others) and list(rows[0]) == list(others[0])
        for row, same in zip(rows, others, strict=True):
            for key in row.keys() - {"seconds", "prompt"}:
                assert bool(row[key]) == bool(same[key]), key
                assert not row[key] or float(row[key]) == pytest.approx(float(same[key]), tolerance, tolerance), key
            assert row.get("prompt") == same.get("prompt")
    shown = [np.load(folder / "images" / "base.npz")["shown"].astype(int) for folder in (one, other)]
    assert shown[0].shape == shown[1].shape and abs(shown[0] - shown[1]).max() <= 1
    assert {path.name for path in one.rglob("*")} == {path.name for path in other.rglob("*")}


def assert_close_weights(one, other, path, tolerance=1e-4):
    one, other = load_file(one / path), load_file(other / path)
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[key], other[key], atol=tolerance) for key in one)


# One, two and four


EPOCHS = {"grpo.py": "2", "grpo_guard.py": "1", "nft.py": "1"}


def sharded(script):
    """The jobs of a sharded run that is resumed after its first epoch."""
    argv = arguments(f"sharded-{script}", *SHARDED, "--shard", "--train.max-epochs", "1")
    return (script, *argv), (script, "--resume", f"runs/sharded-{script}", "--train.max-epochs", "2")


@pytest.fixture(scope="module")
def two(work):
    """What two processes say that run each script, and one sharded, so that they are started once."""
    jobs = [(script, *arguments(f"two-{script}", "--train.max-epochs", EPOCHS[script])) for script in SCRIPTS]
    return together(work, 2, *jobs, *sharded("grpo.py"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_are_as_one(work, two, monkeypatch, script):
    assert f"{script} -> runs/two-{script}" in two and "in 8 calls of 1 by 2 processes" in two
    alone(work, monkeypatch, script, *arguments(f"one-{script}", "--train.max-epochs", EPOCHS[script]))
    one, other = (work / "runs" / f"{count}-{script}" for count in ("one", "two"))
    assert_alike(one, other)
    assert_close_weights(one, other, "lora/pytorch_lora_weights.safetensors")
    assert (other / "log.txt").read_text().count("\nepoch") == int(EPOCHS[script]) + 1


def test_four_go_on_where_one_has_stopped_and_one_where_four_have(work, monkeypatch):
    gdpo = ["--train.advantage-aggregation", "gdpo", "--train.kl-beta", "0"]
    alone(work, monkeypatch, "nft.py", *arguments("stopped", "--train.max-epochs", "1"))
    shutil.copytree(work / "runs" / "stopped", work / "runs" / "continued")  # this process keeps its lock on the first
    together(
        work, 4,
        ("nft.py", "--resume", "runs/continued", "--train.max-epochs", "2"),
        ("grpo.py", *arguments("back", *gdpo, "--train.max-epochs", "1")),
    )  # fmt: skip
    assert "note: processes is 4, and was 1 when the run began" in (work / "runs/continued/log.txt").read_text()
    alone(work, monkeypatch, "grpo.py", "--resume", "runs/back", "--train.max-epochs", "2")
    for script, name, *more in (("nft.py", "continued", "--eval.eval-freq", "1"), ("grpo.py", "back", *gdpo)):
        alone(work, monkeypatch, script, *arguments(f"not-{name}", *more, "--eval.eval-freq", "1"))
        assert_alike(work / "runs" / f"not-{name}", work / "runs" / name)


@pytest.mark.faults
@pytest.mark.parametrize("script", SCRIPTS)
def test_four_processes_are_as_one(work, monkeypatch, script):
    one, four = (work / "runs" / f"{count}-again-{script}" for count in ("one", "four"))
    together(work, 4, (script, *arguments(four.name, *FULL)))
    alone(work, monkeypatch, script, *arguments(one.name, *FULL))
    assert_alike(one, four)
    assert_close_weights(one, four, "transformer/diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("updates, passes", [(1, 1), (2, 2), (4, 1)])
def test_the_calls_of_an_update_do_not_depend_on_the_processes(monkeypatch, count, updates, passes):
    train = grpo.TrainArgs(
        unique_sample_num_per_epoch=8, group_size=4, per_device_batch_size=2, gradient_step_per_epoch=updates,
        num_inner_epochs=passes,
    )  # fmt: skip
    alone = [set(chunk) for chunk in common.calls_of_updates(train, 3)]
    assert alone != [set(chunk) for chunk in common.calls_of_updates(train, 4)] or updates == 1
    assert len(alone) == updates * passes
    assert all(set().union(*alone[i : i + updates]) == set(range(16)) for i in range(0, len(alone), updates))
    found = [set() for _ in alone]
    monkeypatch.setattr(common, "world", lambda: count)
    for rank in range(count):
        monkeypatch.setattr(common, "rank", lambda rank=rank: rank)
        for calls, own in zip(found, common.calls_of_updates(train, 3), strict=True):
            assert len(own) == 16 // updates // count
            calls |= {call + rank * 16 // count for call in own}
    assert found == alone


# Sharded


def test_a_sharded_network_learns_the_same(work, two, monkeypatch):
    assert_shards_alike(work, monkeypatch, "grpo.py")


@pytest.mark.faults
def test_a_sharded_network_learns_the_same_by_nft(work, monkeypatch):
    together(work, 2, *sharded("nft.py"))
    assert_shards_alike(work, monkeypatch, "nft.py")


def assert_shards_alike(work, monkeypatch, script):
    name = f"sharded-{script}"
    alone(work, monkeypatch, script, *arguments(f"un{name}", *SHARDED, "--eval.eval-freq", "1"))
    shards, whole = work / "runs" / name, work / "runs" / f"un{name}"
    rows, others = (read_csv(folder / "metrics.csv") for folder in (shards, whole))
    for row, other in zip(rows, others, strict=True):
        for key in row.keys() - {"seconds"}:
            assert not row[key] or float(row[key]) == pytest.approx(float(other[key]), 1e-4, 1e-4), key
    assert_close_weights(whole, shards, "transformer/diffusion_pytorch_model.safetensors")
    configs = [(folder / "transformer" / "config.json").read_text() for folder in (shards, whole)]
    assert configs[0] == configs[1]  # with the class that plain diffusers knows
    checkpoint = common.checkpoints(shards)[-1]
    assert common.damage(checkpoint) is None and len(list(checkpoint.glob("*.distcp"))) == 2


def test_damage_to_any_file_of_a_checkpoint_is_found(tmp_path):
    for name in (".metadata", "__0_0.distcp", "__1_0.distcp", "state.json"):
        (tmp_path / name).write_text(f"{name} is whole")
    sums = "".join(f"{common.sha256(path)}  {path.name}\n" for path in sorted(tmp_path.iterdir()))
    (tmp_path / "SHA256SUMS").write_text(sums)
    assert common.damage(tmp_path) is None
    for name in (".metadata", "__0_0.distcp", "__1_0.distcp", "state.json"):
        kept = (tmp_path / name).read_text()
        (tmp_path / name).write_text(kept[:-1])
        assert name in common.damage(tmp_path)
        (tmp_path / name).unlink()
        assert name in common.damage(tmp_path)
        (tmp_path / name).write_text(kept)
    for lines in range(4):
        (tmp_path / "SHA256SUMS").write_text("\n".join(sums.splitlines()[:lines]))
        assert common.damage(tmp_path)


# One that dies


def test_a_killed_process_ends_the_others_and_resume_goes_on(work, monkeypatch):
    process = begin(
        work, 2, ROOT / "grpo.py", *arguments("killed", "--train.max-epochs", "200", "--eval.eval-freq", "500")
    )
    for _ in range(6000):
        if (work / "runs" / "killed" / "checkpoints" / "epoch_0001").exists() or process.poll() is not None:
            break
        time.sleep(0.01)
    os.kill(second_process(process), signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "has lost another one" in said, said
    done = int(common.checkpoints(work / "runs" / "killed")[-1].name.removeprefix("epoch_"))
    alone(work, monkeypatch, "grpo.py", "--resume", "runs/killed", "--train.max-epochs", str(done + 1))
    rows = read_csv(work / "runs" / "killed" / "metrics.csv")
    assert [int(row["epoch"]) for row in rows] == list(range(done + 2))


def second_process(torchrun):
    """The id of the process of rank 1."""
    for child in Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split():
        with contextlib.suppress(OSError):
            if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes():
                return int(child)
    pytest.fail("there is no second process")


@pytest.mark.faults
def test_a_reward_that_fails_in_one_process_ends_all(work, monkeypatch):
    argv = arguments("failing", "--reward", "mine.py:fails_in_the_second=1", "--eval.images-per-prompt", "1")
    process = begin(work, 2, ROOT / "grpo.py", *argv)
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    failed = said.index("error: reward 'mine.py:fails_in_the_second' failed: KeyError")
    assert "Traceback" in said[:failed] and "has lost another one" not in said[:failed]
    assert "continue with: torchrun --nproc-per-node 2" in said
    assert (work / "runs" / "failing" / "failed_reward1" / "prompts.txt").exists()
    alone(work, monkeypatch, "grpo.py", "--resume", "runs/failing")
    assert read_csv(work / "runs" / "failing" / "metrics.csv")[-1]["epoch"] == "2"


@pytest.mark.faults
def test_a_signal_to_torchrun_finishes_the_epoch(work):
    process = begin(
        work, 2, ROOT / "grpo.py", *arguments("asked", "--train.max-epochs", "200", "--eval.eval-freq", "500")
    )
    while not (work / "runs" / "asked" / "checkpoints" / "epoch_0001").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert "is finished and saved; continue with: torchrun --nproc-per-node 2" in said
    assert said.count("once more ends at once") == 1


def test_processes_that_drift_apart_are_found(start, monkeypatch):
    gather = common.gather
    twice = lambda value: [value, value + 1] if isinstance(value, int) and value else gather(value)  # noqa: E731
    monkeypatch.setattr(common, "gather", twice)
    with pytest.raises(SystemExit, match="different parameters"):
        start(grpo)


# Refusals


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--train.unique-sample-num-per-epoch", "7"], "each of 4 processes takes as many prompts"),
        (["--train.unique-sample-num-per-epoch", "7"], "8 would do"),
        (["--train.unique-sample-num-per-epoch", "1"], "4 would do"),
        (
            ["--train.unique-sample-num-per-epoch", "4", "--train.per-device-batch-size", "8"],
            "the 4 images of an epoch of each of 4 processes (unique_sample_num_per_epoch x group_size); 4 would",
        ),
        (
            ["--train.unique-sample-num-per-epoch", "4", "--train.gradient-step-per-epoch", "2"],
            "1 pipeline calls of an epoch of each of 4 processes (its images / per_device_batch_size); one of [1]",
        ),
        (["--train.unique-sample-num-per-epoch", "8", "--device", "meta"], "each process has a device of its own"),
        (["--train.unique-sample-num-per-epoch", "8", "--shard"], "add --finetune-type full"),
    ],
)
@pytest.mark.parametrize("script", SCRIPTS.values())
def test_what_four_processes_cannot_share_is_refused(refusal, monkeypatch, script, argv, message):
    monkeypatch.setattr(common, "world", lambda: 4)
    assert message in refusal(script, *argv)


def test_sharding_needs_several_processes(refusal):
    assert "torchrun" in refusal(grpo, "--finetune-type", "full", "--shard")


def test_more_processes_than_gpus_are_refused(refusal, monkeypatch):
    monkeypatch.setattr(common, "world", lambda: 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert "this machine has 2" in refusal(grpo, "--train.unique-sample-num-per-epoch", "8")


def test_a_machine_says_a_refusal_once(refusal, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    refusal(grpo, "--train.group-size", "1")
    assert not waits
    monkeypatch.setenv("LOCAL_RANK", "1")
    refusal(grpo, "--train.group-size", "1")
    assert waits == [10]
