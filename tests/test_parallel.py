"""harness/parallel and sharded: runs by several processes, started by torchrun and talking by gloo, are as by one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import MINE, SCRIPTS, SMALL, read_csv, write_prompts
from safetensors.torch import load_file

import common
import grpo
from harness import checkpoint, checks, parallel
from harness.checkpoint import checkpoints, damage

ROOT = Path(common.__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
RUN = [
    *("--train.unique-sample-num-per-epoch", "4", "--train.group-size", "2", "--train.per-device-batch-size", "1"),
    *("--train.num-inference-steps", "3", "--train.kl-beta", "0.04", "--train.max-grad-norm", "1e-3"),
    *("--train.num-train-steps", "1", "--train.seed", "3"),  # which draws other steps than 4 in each epoch
    *("--train.ema-update-interval", "1", "--train.global-std", "--reward", f"{MINE}:smooth=1", f"{MINE}:other=0.5"),
    *("--eval.images-per-prompt", "3", "--eval.per-device-batch-size", "2"),
]
"""After SMALL: 4 prompts x 2 images in 8 calls, 2 updates; evaluation in 5 calls, whose groups straddle calls."""
FULL = ["--finetune-type", "full", "--train.learning-rate", "1e-4", "--eval.images-per-prompt", "1"]
SHARDED = [*FULL, "--train.gradient-step-per-epoch", "1", "--train.num-inference-steps", "2"]
SHARDED += ["--eval.per-device-batch-size", "1"]  # so that the second of two processes has one call less
LONG = ["--train.max-epochs", "200", "--eval.eval-freq", "500"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder to run in; the runs are in its folder runs."""
    folder = tmp_path_factory.mktemp("processes")
    write_prompts(folder)
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
    assert all(each == sums[0] for each in sums) and len(sums[0]) == len(jobs) and all(sums[0])
    return said


def alone(work, monkeypatch, script, *argv):
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "argv", [script, *argv])
    SCRIPTS[script].main()


def assert_same_rows(one, other, tolerance=1e-5):
    """Those of a CSV file, but for seconds and rounding."""
    rows, others = read_csv(one), read_csv(other)
    assert list(rows[0]) == list(others[0])
    for row, same in zip(rows, others, strict=True):
        assert row.get("prompt") == same.get("prompt")
        for key in row.keys() - {"seconds", "prompt"}:
            assert bool(row[key]) == bool(same[key]), key
            assert not row[key] or float(row[key]) == pytest.approx(float(same[key]), tolerance, tolerance), key


def assert_alike(one, other):
    """The metrics, the rewards of each evaluation image and the shown images, but for rounding."""
    for file in ("metrics.csv", *(f"images/{path.name}" for path in (one / "images").glob("*.csv"))):
        assert_same_rows(one / file, other / file)
    shown = [np.load(folder / "images" / "base.npz")["shown"].astype(int) for folder in (one, other)]
    assert shown[0].shape == shown[1].shape and abs(shown[0] - shown[1]).max() <= 1
    assert {path.name for path in one.rglob("*")} == {path.name for path in other.rglob("*")}


def assert_close_weights(one, other, path, tolerance=1e-4):
    torch.testing.assert_close(load_file(one / path), load_file(other / path), rtol=1e-5, atol=tolerance)


EPOCHS = {"grpo.py": "2", "grpo_guard.py": "1", "nft.py": "1"}


def sharded(script):
    """The jobs of a sharded run that is resumed after its first epoch."""
    argv = arguments(f"sharded-{script}", *SHARDED, "--shard", "--train.max-epochs", "1")
    return (script, *argv), (script, "--resume", f"runs/sharded-{script}", "--train.max-epochs", "2")


def test_two_processes_are_as_one(work, monkeypatch):
    """Each script, and one with a sharded network; the two are started once for all."""
    jobs = [(script, *arguments(f"two-{script}", "--train.max-epochs", EPOCHS[script])) for script in SCRIPTS]
    said = together(work, 2, *jobs, *sharded("grpo.py"))
    for script in SCRIPTS:
        assert f"{script} -> runs/two-{script}" in said and "in calls of 1 by 2 processes" in said
        alone(work, monkeypatch, script, *arguments(f"one-{script}", "--train.max-epochs", EPOCHS[script]))
        one, other = (work / "runs" / f"{count}-{script}" for count in ("one", "two"))
        assert_alike(one, other)
        assert_close_weights(one, other, "lora/pytorch_lora_weights.safetensors")
        assert (other / "log.txt").read_text().count("\nepoch") == int(EPOCHS[script]) + 1
    assert_sharded_as_whole(work, monkeypatch, "grpo.py", 2)


def test_four_go_on_where_one_has_stopped_and_one_where_four_have(work, monkeypatch):
    gdpo = [*FULL, "--train.advantage-aggregation", "gdpo", "--train.kl-beta", "0"]
    alone(work, monkeypatch, "nft.py", *arguments("stopped", "--train.max-epochs", "1"))
    shutil.copytree(work / "runs" / "stopped", work / "runs" / "continued")  # this process keeps its lock on the first
    together(
        work, 4,
        ("nft.py", "--resume", "runs/continued", "--train.max-epochs", "2"),
        ("grpo_guard.py", *arguments("back", *gdpo, "--train.max-epochs", "1")),
    )  # fmt: skip
    assert "note: processes is 4, and was 1 when the run began" in (work / "runs/continued/log.txt").read_text()
    alone(work, monkeypatch, "grpo_guard.py", "--resume", "runs/back", "--train.max-epochs", "2")
    for script, name, *more in (("nft.py", "continued"), ("grpo_guard.py", "back", *gdpo)):
        alone(work, monkeypatch, script, *arguments(f"not-{name}", *more, "--eval.eval-freq", "1"))
        assert_alike(work / "runs" / f"not-{name}", work / "runs" / name)


@pytest.mark.faults
def test_four_processes_go_on_with_a_network_that_two_have_sharded(work, monkeypatch):
    begun, resumed = sharded("nft.py")
    together(work, 2, begun)
    together(work, 4, resumed)
    assert_sharded_as_whole(work, monkeypatch, "nft.py", 4)


def assert_sharded_as_whole(work, monkeypatch, script, count):
    """A sharded network, last run by so many processes, learns the same as a whole one."""
    alone(work, monkeypatch, script, *arguments(f"whole-{script}", *SHARDED, "--eval.eval-freq", "1"))
    shards, whole = work / "runs" / f"sharded-{script}", work / "runs" / f"whole-{script}"
    assert_same_rows(shards / "metrics.csv", whole / "metrics.csv", 1e-4)
    assert_close_weights(whole, shards, "transformer/diffusion_pytorch_model.safetensors")
    configs = [(folder / "transformer" / "config.json").read_text() for folder in (shards, whole)]
    assert configs[0] == configs[1]  # with the class that plain diffusers knows
    newest = checkpoints(shards)[-1]
    assert damage(newest) is None and len(list(newest.glob("*.safetensors"))) == count


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("updates, passes", [(1, 1), (2, 2), (4, 1)])
def test_the_calls_of_an_update_do_not_depend_on_the_processes(monkeypatch, count, updates, passes):
    train = grpo.TrainArgs(unique_sample_num_per_epoch=8, group_size=4, per_device_batch_size=2)
    train.gradient_step_per_epoch, train.num_inner_epochs = updates, passes
    alone = [set(chunk) for chunk in common.minibatches(train, 3)]
    assert alone != [set(chunk) for chunk in common.minibatches(train, 4)] or updates == 1
    assert [set().union(*alone[i : i + updates]) for i in range(0, len(alone), updates)] == [set(range(16))] * passes
    assert len({tuple(sorted(calls)) for calls in alone}) == (1 if updates == 1 else len(alone))  # each pass anew
    train.seed = 1
    assert alone != [set(chunk) for chunk in common.minibatches(train, 3)] or updates == 1
    train.seed, found = 0, [set() for _ in alone]
    monkeypatch.setattr(parallel, "world_size", lambda: count)
    for rank in range(count):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        for calls, local in zip(found, common.minibatches(train, 3), strict=True):
            assert len(local) == 16 // updates // count
            calls |= {call + rank * 16 // count for call in local}
    assert found == alone


def begin_long(work, name):
    """Start a long run by two processes; returns when its first epoch is saved."""
    process = begin(work, 2, ROOT / "grpo.py", *arguments(name, *LONG))
    while len(checkpoints(work / "runs" / name)) < 2 and process.poll() is None:
        time.sleep(0.01)
    return process


def test_a_killed_process_ends_the_others_and_resume_goes_on(work, monkeypatch):
    process = begin_long(work, "killed")
    (second,) = (p for p in psutil.Process(process.pid).children() if p.environ().get("RANK") == "1")
    second.kill()
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "has lost another one" in said, said
    done = int(checkpoints(work / "runs" / "killed")[-1].name.split("_")[1])
    alone(work, monkeypatch, "grpo.py", "--resume", "runs/killed", "--train.max-epochs", str(done + 1))
    rows = read_csv(work / "runs" / "killed" / "metrics.csv")
    assert [int(row["epoch"]) for row in rows] == list(range(done + 2))


@pytest.mark.faults
def test_a_reward_that_fails_in_one_process_ends_all(work, monkeypatch):
    argv = arguments("failing", "--reward", f"{MINE}:fails_in_the_second=1", "--eval.images-per-prompt", "1")
    process = begin(work, 2, ROOT / "grpo.py", *argv)
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    failed = said.index("mine.py:fails_in_the_second' failed: KeyError")
    assert "Traceback" in said[:failed] and "has lost another one" not in said[:failed]
    assert "continue with: torchrun --nproc-per-node 2" in said
    assert (work / "runs" / "failing" / "failed_reward1" / "prompts.txt").exists()
    alone(work, monkeypatch, "grpo.py", "--resume", "runs/failing")
    assert read_csv(work / "runs" / "failing" / "metrics.csv")[-1]["epoch"] == "2"


@pytest.mark.faults
def test_a_signal_to_torchrun_finishes_the_epoch(work):
    process = begin_long(work, "asked")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert "is finished and saved; continue with: torchrun --nproc-per-node 2" in said
    assert said.count("once more ends at once") == 1


def test_processes_that_drift_apart_are_found(start, monkeypatch):
    gather = parallel.gather
    twice = lambda value: [value, value + 1] if isinstance(value, int) and value else gather(value)  # noqa: E731
    monkeypatch.setattr(checkpoint, "gather", twice)
    with pytest.raises(SystemExit, match="different parameters"):
        start(grpo)


@pytest.mark.parametrize("script", SCRIPTS.values())
@pytest.mark.parametrize(
    "prompts, options, message",
    [
        (7, "", "each of 4 processes takes as many prompts, with all images of each; 8 would do"),
        (1, "", "4 would do"),
        (4, "--train.per-device-batch-size 8", "of each of 4 processes (unique_sample_num_per_epoch x group_size); 4"),
        (4, "--train.gradient-step-per-epoch 2", "images of an epoch of each of 4 processes"),
        (8, "--device meta", "each process has a device of its own"),
        (8, "--shard", "add --finetune-type full"),
        (8, "", "this machine has 2"),
    ],
)
def test_what_four_processes_cannot_share_is_refused(refusal, monkeypatch, script, prompts, options, message):
    monkeypatch.setattr(checks, "world_size", lambda: 4)
    if "machine" in message:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert message in refusal(script, "--train.unique-sample-num-per-epoch", prompts, *options.split())


def test_a_machine_says_a_refusal_once(refusal, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    refusal(grpo, "--train.group-size", "1")
    assert not waits
    monkeypatch.setenv("LOCAL_RANK", "1")
    refusal(grpo, "--train.group-size", "1")
    assert waits == [10]
