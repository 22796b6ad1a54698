"""harness/ending: runs that are killed, interrupted, starved or fed with rubbish, what they say, and how they go on."""

import itertools
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from unittest.mock import Mock

import pytest
import torch
from conftest import MINE, SCRIPTS, write_prompts
from test_checkpoint import TINY, assert_same_run

import common
import grpo
from harness import ending, machine
from harness.checkpoint import checkpoints, damage
from harness.settings import RunArgs


def work(forks, script, argv, die, limit):
    """Be a process that runs a script with a pipeline that is loaded already; see Forks.begin."""
    os.chdir(forks.folder)
    sys.stdout = sys.stderr = open("output", "w", buffering=1)  # noqa: SIM115
    os.dup2(sys.stdout.fileno(), 2)
    sys.argv, machine.load_pipeline, ending.Run.current = [script, *argv], lambda *_: forks.pipe, None
    calls = itertools.count(1)

    def deadly(event, _):
        if event in ("os.rename", "os.remove", "os.rmdir") and next(calls) == die:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(deadly)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    ending.start(SCRIPTS[script].main)


OPTIONS = {
    "grpo.py": "--train.num-inner-epochs 2 --checkpoint-freq 2",
    "grpo_guard.py": "--train.num-inference-steps 3 --train.num-train-steps 1 --train.ema-update-interval 3",
    "nft.py": "--train.ref-param-device cpu",
}
"""With TINY, every kind of state."""


class Forks:
    """Scripts as processes of their own, one at a time, forked from this one."""

    def __init__(self, folder):
        self.folder, self.output, self.whole = folder, folder / "output", {}
        prompts = write_prompts(folder)
        self.new = {script: [*TINY, *OPTIONS[script].split(), *prompts, "--run-name"] for script in SCRIPTS}
        self.pipe = common.load_pipeline(RunArgs.model, "cpu", torch.float32)

    def begin(self, script, name, *argv, die=None, limit=None):
        """Start a process that begins a run, or resumes it if it has begun, as someone does who finds it dead.

        die: it kills itself just before that many-th call of those that make files move or vanish; limit: the largest
        file that it can write, in bytes.
        """
        begin = ["--resume"] if (self.folder / "runs" / name / "args.yaml").exists() else self.new[script]
        known = (self, script, [*begin, name, *argv], die, limit)
        self.process = multiprocessing.get_context("fork").Process(target=work, args=known)
        self.process.start()
        return self.process

    def end(self):
        """Wait for it. Returns its exit status, minus the number of the signal that ended it, and what it said."""
        self.process.join()
        return self.process.exitcode, self.output.read_text()

    def run(self, script, name):
        """Begin a run or go on with it to its end; returns its folder."""
        self.begin(script, name)
        status, said = self.end()
        assert status == 0, said
        return self.folder / "runs" / name

    def undisturbed(self, script):
        """The folder of a run that nothing happened to, and how long it took; one for each script."""
        if script not in self.whole:
            begin = time.monotonic()
            self.whole[script] = self.run(script, f"undisturbed-{script}"), time.monotonic() - begin
        return self.whole[script]

    def gated(self, name):
        """Start a run whose first call of its reward waits until there is a file go; returns when it does."""
        for file in ("here", "go"):
            (self.folder / file).unlink(missing_ok=True)
        process = self.begin("grpo.py", name, "--reward", f"{MINE}:gated=1")
        wait_for((self.folder / "here").exists)
        return process


def wait_for(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("waited in vain")


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    return Forks(tmp_path_factory.mktemp("forks"))


@pytest.mark.parametrize(
    "script, moments",
    [
        ("nft.py", [None] * 3),
        ("grpo.py", range(1, 22, 3)),
        *(pytest.param(script, [None] * 10, marks=pytest.mark.faults) for script in SCRIPTS),
        pytest.param("grpo_guard.py", range(1, 40), marks=pytest.mark.faults),
    ],
)
def test_killed_again_and_again(forks, script, moments):
    """At random moments (None), or before the first, second, ... of the calls that make files move or vanish."""
    whole, seconds = forks.undisturbed(script)
    name = f"killed-{len(moments)}-{script}"
    for moment in moments:
        process = forks.begin(script, name, die=moment)
        timer = threading.Timer(random.uniform(0, 0.8 * seconds) if moment is None else 600, process.kill)
        timer.start()
        status, said = forks.end()
        timer.cancel()
        assert status in (0, -signal.SIGKILL), said
        if status == 0:  # it was faster; try again from the beginning
            assert_same_run(whole, forks.folder / "runs" / name)
            shutil.rmtree(forks.folder / "runs" / name)
    assert_same_run(whole, forks.run(script, name))


@pytest.mark.parametrize("number", ending.SIGNALS)
def test_a_signal_at_a_random_moment(forks, number):
    whole, seconds = forks.undisturbed("grpo.py")
    name = signal.Signals(number).name
    process = forks.begin("grpo.py", name)
    wait_for((forks.folder / "runs" / name / "args.yaml").exists)
    time.sleep(random.uniform(0, 0.6) * seconds)
    os.kill(process.pid, number)  # until it is joined there is such a process
    status, said = forks.end()
    assert status in (128 + number, 0) and "Traceback" not in said, said
    assert (status == 0) == ("epoch    4" in said)
    assert status == 0 or f"continue with: python grpo.py --resume runs/{name}" in said
    assert_same_run(whole, forks.run("grpo.py", name))


@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
def test_a_signal_finishes_and_saves_the_epoch_and_a_second_one_ends_at_once(forks, again):
    process = forks.gated(f"signal-{again}")
    os.kill(process.pid, signal.SIGTERM)
    wait_for(lambda: "once more ends at once; continue with: python grpo.py" in forks.output.read_text())
    if again:
        os.kill(process.pid, signal.SIGTERM)
        assert forks.end()[0] == -signal.SIGTERM  # the shell says 143
        return
    (forks.folder / "go").touch()
    status, said = forks.end()
    assert status == 143 and "SIGTERM: epoch 0 is finished and saved; continue with: python grpo.py --resume" in said
    (checkpoint,) = checkpoints(forks.folder / "runs" / "signal-False")
    assert checkpoint.name == "epoch_0000_evaluated" and damage(checkpoint) is None


def test_a_signal_before_training_ends_at_once(monkeypatch, capfd):
    monkeypatch.setattr(ending.Run, "current", None)
    with pytest.raises(SystemExit) as exit:
        ending.start(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert exit.value.code == 143 and "SIGTERM: ended before training" in capfd.readouterr().err


def test_two_processes_on_one_run(forks, monkeypatch, ends):
    process = forks.gated("twice")
    monkeypatch.chdir(forks.folder)
    settings = forks.folder / "runs" / "twice" / "args.yaml"
    began = settings.read_text()
    for argv in (["--resume", "twice"], [*forks.new["grpo.py"], "twice"]):
        monkeypatch.setattr(sys, "argv", ["grpo.py", *argv])
        assert "another process is working on this run" in ends(grpo.main)
        assert settings.read_text() == began
    process.kill()
    assert forks.end()[0] == -signal.SIGKILL


def test_a_full_disk(forks):
    whole, _ = forks.undisturbed("grpo.py")
    forks.begin("grpo.py", "full", die=7)  # in epoch 1
    assert forks.end()[0] == -signal.SIGKILL
    folder = forks.folder / "runs" / "full"
    before = checkpoints(folder)
    (tensors,) = before[-1].glob("*.safetensors")
    for limit in (tensors.stat().st_size // 2, 3000):  # of a checkpoint's tensors, of metrics.csv
        forks.begin("grpo.py", "full", limit=limit)
        status, said = forks.end()
        assert status == 1 and "error: cannot write in runs/full" in said and "Traceback" not in said, said
        assert "too large" in said and "continue with: python grpo.py --resume runs/full" in said
        assert checkpoints(folder) == before and not any(damage(path) for path in before)
    assert_same_run(whole, forks.run("grpo.py", "full"))


FULL = "CUDA out of memory. Tried to allocate 2.00 GiB"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(f"{FULL}. GPU 0 has 1 GiB"), ValueError("a mistake")])
def test_a_full_gpu_ends_in_a_line_and_a_mistake_in_its_traceback(run, tmp_path, monkeypatch, error):
    monkeypatch.setattr(common, "rollout", Mock(side_effect=error))
    with pytest.raises(BaseException) as raised:  # noqa: B017
        ending.start(lambda: run(*TINY))
    if isinstance(error, ValueError):
        assert raised.value is error and not hasattr(error, "__notes__")
        return
    said = str(raised.value)
    assert said.startswith(f"error: out of GPU memory ({FULL}): adding --train.en") and "\n" not in said
    for option in ("--train.ref-param-device cpu", "--train.per-device-batch-size (now 2)", "--train.resolution (32)"):
        assert option in said
    assert said.endswith(f"continue with: python grpo.py --resume {tmp_path}/run")
