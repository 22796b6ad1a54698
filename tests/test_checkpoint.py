"""Runs that are killed, interrupted, starved and fed with rubbish, and how they go on."""

import contextlib
import copy
import functools
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import SMALL, handlers_kept, read_csv
from safetensors.torch import load_file

import common
import grpo
import grpo_guard
import nft

ROOT = Path(common.__file__).parent
TINY = [
    *("--train.max-epochs", "4", "--train.unique-sample-num-per-epoch", "1", "--train.per-device-batch-size", "2"),
    *("--train.num-inference-steps", "2", "--eval.num-inference-steps", "1", "--lora-rank", "2"),
    *("--train.kl-beta", "0.04", "--train.ema-decay", "0.9"),
]
"""After SMALL: a run of a second with every kind of state, and draws from every generator that a reward could use."""

REWARD = """
import random, time
from pathlib import Path
import numpy, torch

def noisy(images, prompts):
    draws = torch.rand(len(images)) + float(numpy.random.rand()) + random.random()
    return images.mean(dim=(1, 2, 3)) + 0.01 * draws

def gated(images, prompts):  # waits for a file named go after saying that it is here, but not for ever
    Path("here").touch()
    for _ in range(3000):
        if not Path("go").exists():
            time.sleep(0.01)
    return images.mean(dim=(1, 2, 3))

def broken(images, prompts):
    raise KeyError("broken")
"""


class Forks:
    """Scripts as processes of their own; see forks.py."""

    def __init__(self, folder, prompts):
        self.folder, self.prompts = folder, prompts
        (folder / "mine.py").write_text(REWARD)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "forks.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip

    def begin(self, script, *argv, **faults):
        """Start a process; returns its id."""
        self.output = self.folder / "output"
        job = {"script": script, "argv": [str(a) for a in argv], "cwd": str(self.folder), "output": str(self.output)}
        self.server.stdin.write(json.dumps(job | faults) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def end(self):
        """Wait for it. Returns its exit status, minus the number of the signal that ended it, and what it said."""
        return int(self.server.stdout.readline()), self.output.read_text()

    def new(self, script, name, *argv, **faults):
        argv = (*SMALL, *TINY, *self.prompts, "--reward", "mine.py:noisy=1", "--run-name", name, *argv)
        return self.begin(script, *argv, **faults)

    def new_or_resume(self, script, name, *argv, **faults):
        """What someone does who finds a run dead: resume it if it is there."""
        if (self.folder / "runs" / name).exists():
            return self.begin(script, "--resume", name, **faults)
        return self.new(script, name, *argv, **faults)


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forks")
    (folder / "train.txt").write_text("a red circle\na blue square\nthree green triangles\n")
    (folder / "eval.txt").write_text("a white cross\ntwo red circles\n")
    forks = Forks(folder, ["--prompts", "train.txt", "--eval.prompts", "eval.txt"])
    yield forks
    forks.server.stdin.close()
    forks.server.wait()


@pytest.fixture(scope="module")
def undisturbed(forks):
    """The folder of a run that nothing happened to, and how long it took; one for each script."""

    @functools.cache
    def run(script):
        forks.new(script, f"undisturbed-{script}")
        begin = time.monotonic()
        status, said = forks.end()
        assert status == 0, said
        return forks.folder / "runs" / f"undisturbed-{script}", time.monotonic() - begin

    return run


def rows_of(folder):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read_csv(folder / "metrics.csv")]


def assert_same_run(one, other):
    """Bit for bit: metrics, all that a checkpoint has, saved weights, evaluation images and their rewards."""
    assert rows_of(one) == rows_of(other)
    assert list(read_csv(one / "metrics.csv")[0]) == list(read_csv(other / "metrics.csv")[0])  # the columns' order too
    last = [common.checkpoints(folder)[-1] for folder in (one, other)]
    assert last[0].name == last[1].name
    assert_same_tensors(*(checkpoint / "tensors.safetensors" for checkpoint in last))
    states = [json.loads((checkpoint / "state.json").read_text()) for checkpoint in last]
    for key in ("epoch", "updates", "in_a_row", "random"):
        assert states[0][key] == states[1][key]
    weights = sorted(path.relative_to(one) for path in (*one.glob("lora/*"), *one.glob("transformer/*.safetensors")))
    assert weights
    for path in weights:
        assert_same_tensors(one / path, other / path)
    images = [{path.name: path.read_bytes() for path in (folder / "images").iterdir()} for folder in (one, other)]
    assert images[0] == images[1]
    assert not list(other.rglob("*.tmp"))


def assert_same_tensors(one, other):
    one, other = load_file(one), load_file(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


# kill -9


@pytest.mark.parametrize("script", ["nft.py"])
def test_killed_at_random_moments(forks, undisturbed, script, kills=3):
    whole, seconds = undisturbed(script)
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    moments = random.Random(seed)
    name, killed = f"killed-{script}", 0
    while killed < kills:
        process = forks.new_or_resume(script, name)
        timer = threading.Timer(moments.uniform(0, 0.8 * seconds), _kill, (process,))
        timer.start()
        status, said = forks.end()
        timer.cancel()
        if status == 0:  # it was faster; try again from the beginning
            assert_same_run(whole, forks.folder / "runs" / name)
            shutil.rmtree(forks.folder / "runs" / name)
            continue
        assert status == -signal.SIGKILL, said
        killed += 1
    forks.new_or_resume(script, name)
    status, said = forks.end()
    assert status == 0, said
    assert_same_run(whole, forks.folder / "runs" / name)


def _kill(process):
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(process, signal.SIGKILL)


@pytest.mark.parametrize("script, calls", [("grpo.py", range(3, 34, 6))])
def test_killed_between_writing_and_renaming(forks, undisturbed, script, calls):
    whole, _ = undisturbed(script)
    name = f"died-{script}"
    for count in calls:
        forks.new_or_resume(script, name, die=count)
        status, said = forks.end()
        assert status in (0, -signal.SIGKILL), said
        if status == 0:
            break
    assert count > 8  # of the calls of one epoch
    forks.new_or_resume(script, name)
    status, said = forks.end()
    assert status == 0, said
    assert_same_run(whole, forks.folder / "runs" / name)


@pytest.mark.faults
@pytest.mark.parametrize("script", ["grpo.py", "grpo_guard.py", "nft.py"])
def test_killed_dozens_of_times(forks, undisturbed, script):
    test_killed_at_random_moments(forks, undisturbed, script, kills=10)


@pytest.mark.faults
def test_killed_at_every_call(forks, undisturbed):
    test_killed_between_writing_and_renaming(forks, undisturbed, "grpo_guard.py", range(1, 41))


# Signals


def test_a_signal_at_a_random_moment(forks, undisturbed):
    whole, seconds = undisturbed("grpo.py")
    for name, number in (("int", signal.SIGINT), ("term", signal.SIGTERM)):
        process = forks.new("grpo.py", name)
        timer = threading.Timer(random.uniform(0.3, 0.8) * seconds, os.kill, (process, number))
        timer.start()
        status, said = forks.end()
        timer.join()
        assert status in (128 + number, 0) and "Traceback" not in said, said
        assert (status == 0) == ("epoch    4" in said)
        assert status == 0 or f"continue with: python grpo.py --resume runs/{name}" in said
        forks.new_or_resume("grpo.py", name)
        assert forks.end()[0] == 0
        assert_same_run(whole, forks.folder / "runs" / name)


def gated(forks, name):
    """A process whose first call of its reward waits."""
    for file in ("here", "go"):
        (forks.folder / file).unlink(missing_ok=True)
    process = forks.new("grpo.py", name, "--reward", "mine.py:gated=1")
    wait_for((forks.folder / "here").exists)
    return process


def wait_for(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("waited in vain")


def test_a_signal_lets_the_epoch_finish_and_be_saved(forks):
    process = gated(forks, "first-signal")
    os.kill(process, signal.SIGTERM)
    wait_for(lambda: "once more ends at once" in forks.output.read_text())
    (forks.folder / "go").touch()
    status, said = forks.end()
    assert status == 143 and "SIGTERM: epoch 0 is finished and saved; continue with: python grpo.py --resume" in said
    (checkpoint,) = common.checkpoints(forks.folder / "runs" / "first-signal")
    assert checkpoint.name == "epoch_0000" and common.damage(checkpoint) is None


def test_a_second_signal_ends_at_once(forks):
    process = gated(forks, "second-signal")
    os.kill(process, signal.SIGINT)
    wait_for(lambda: "once more ends at once; continue with: python grpo.py" in forks.output.read_text())
    os.kill(process, signal.SIGINT)
    assert forks.end()[0] == -signal.SIGINT  # the shell says 130


def test_a_signal_before_training_ends_at_once(monkeypatch, capfd):
    monkeypatch.setattr(common.Run, "current", None)
    with handlers_kept(), pytest.raises(SystemExit) as exit:
        common.start(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert exit.value.code == 143 and "SIGTERM: ended before training" in capfd.readouterr().err


def test_two_processes_on_one_run(forks, monkeypatch, capsys):
    process = gated(forks, "twice")
    monkeypatch.chdir(forks.folder)
    began = (forks.folder / "runs" / "twice" / "args.yaml").read_text()
    for argv in (["--resume", "twice"], [*SMALL, *TINY, *forks.prompts, "--run-name", "twice"]):
        monkeypatch.setattr(sys, "argv", ["grpo.py", *argv])
        assert "another process is working on this run" in refusal_of(grpo.main, capsys)
        assert (forks.folder / "runs" / "twice" / "args.yaml").read_text() == began
    os.kill(process, signal.SIGKILL)
    assert forks.end()[0] == -signal.SIGKILL


# A disk that takes no more


def test_a_full_disk(forks, undisturbed):
    whole, _ = undisturbed("grpo.py")
    forks.new("grpo.py", "full", die=26)  # in epoch 1
    assert forks.end()[0] == -signal.SIGKILL
    folder = forks.folder / "runs" / "full"
    before = [path.name for path in common.checkpoints(folder)]
    size = (common.checkpoints(folder)[-1] / "tensors.safetensors").stat().st_size
    for limit in (size // 2, 3000):  # of a checkpoint's tensors, of metrics.csv
        forks.begin("grpo.py", "--resume", "full", limit=limit)
        status, said = forks.end()
        assert status == 1 and "error: cannot write in runs/full" in said and "Traceback" not in said
        assert "too large" in said and "continue with: python grpo.py --resume runs/full" in said
        assert [path.name for path in common.checkpoints(folder)] == before
        assert not any(common.damage(path) for path in common.checkpoints(folder))
        assert not list((folder / "checkpoints").glob("*.tmp"))
    forks.new_or_resume("grpo.py", "full")
    assert forks.end()[0] == 0
    assert_same_run(whole, folder)


# In one process: runs that end in the middle, and are resumed


@pytest.fixture(scope="module")
def loaded():
    return common.load_pipeline(common.RunArgs.model, "cpu", torch.float32)


@pytest.fixture
def start(start, loaded, monkeypatch):
    """A tiny run in this process, of a pipeline that is loaded already, without the contract: other tests check it."""
    for script in (grpo, grpo_guard, nft):
        monkeypatch.setattr(script, "first_step_contract", lambda *_: None)
    monkeypatch.setattr(common, "load_pipeline", lambda model, device, dtype, *_: copy.deepcopy(loaded).to(dtype))
    return lambda script, *argv, name="run": start(script, *TINY, "--train.max-epochs", 2, *argv, name=name)


@pytest.fixture(scope="module")
def originals():
    return {}


@pytest.fixture
def finished(start, tmp_path, originals):
    """A copy of a run of two epochs."""
    if "run" not in originals:
        originals["run"] = start(grpo, name="original")
    return shutil.copytree(originals["run"], tmp_path / "run")


@pytest.fixture
def whole_run(start, originals):
    """A run of four epochs."""
    if "whole" not in originals:
        originals["whole"] = start(grpo, "--train.max-epochs", 4, name="whole")
    return originals["whole"]


@pytest.fixture
def resume(monkeypatch, tmp_path):
    """Resume a run of `start` in this process."""

    def call(script, *argv, name="run"):
        argv = [f"{script.__name__}.py", "--resume", str(tmp_path / name), *map(str, argv)]
        monkeypatch.setattr(sys, "argv", argv)
        script.main()
        return tmp_path / name

    return call


@pytest.fixture
def stopped(start, monkeypatch):
    """A run that was stopped in its second epoch, after the row and before the checkpoint."""

    def call(script, *argv, name="run", epoch=2):
        save = common.Checkpoint.save

        def stop(checkpoint, done, updates):
            if done == epoch:
                raise KeyboardInterrupt
            save(checkpoint, done, updates)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(common.Checkpoint, "save", stop)
            start(script, *argv, name=name)

    return call


@pytest.mark.parametrize(
    "script, options",
    [
        ("grpo", "--train.num-inner-epochs 2 --checkpoint-freq 2"),
        ("grpo_guard", "--train.num-inference-steps 3 --train.num-train-steps 1 --train.ema-update-interval 3"),
        ("nft", "--finetune-type full --train.ref-param-device cpu"),
    ],
)
def test_every_kind_of_state_is_taken_up(start, stopped, resume, script, options):
    script = importlib.import_module(script)
    argv = [*options.split(), "--train.max-epochs", 3, "--eval.eval-freq", 3]
    start(script, *argv, name="whole")
    stopped(script, *argv)
    folder = resume(script)
    assert_same_run(folder.parent / "whole", folder)


def test_rows_after_the_checkpoint_are_cut(stopped, resume, tmp_path, capsys):
    stopped(grpo)
    assert [row["epoch"] for row in rows_of(tmp_path / "run")] == ["0", "1", "2"]
    resume(grpo, "--train.max-epochs", 1)  # which evaluates it, and nothing else
    assert [row["epoch"] for row in rows_of(tmp_path / "run")] == ["0", "1"]
    capsys.readouterr()
    resume(grpo, "--train.max-epochs", 2)
    said = capsys.readouterr().out
    assert "resumed: epochs up to 1 are done" in said and "epoch    2" in said and "epoch    1" not in said
    rows = read_csv(tmp_path / "run" / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)


def test_a_run_without_an_epoch_begins_again(stopped, resume, finished, capsys):
    stopped(grpo, name="again", epoch=0)
    folder = resume(grpo, name="again")
    assert "no epoch was finished; beginning again" in capsys.readouterr().out
    assert_same_run(finished, folder)


def test_a_finished_run_is_left_alone_or_extended(finished, whole_run, resume, capsys):
    folder = finished
    before = (folder / "metrics.csv").read_bytes()
    resume(grpo)
    assert "all 2 are, and a larger --train.max-epochs adds more" in capsys.readouterr().out
    assert (folder / "metrics.csv").read_bytes() == before
    resume(grpo, "--train.max-epochs", 4)
    assert_same_run(whole_run, folder)  # eval_freq is 2: the same rows
    assert "max_epochs: 4" in (folder / "args.yaml").read_text()


@pytest.mark.parametrize("script", [grpo, nft], ids=["grpo", "nft"])
@pytest.mark.parametrize("keep", [1, 2])
def test_a_stopped_run_that_ends_there_is_evaluated(start, resume, monkeypatch, tmp_path, script, keep):
    (tmp_path / "mine.py").write_text(REWARD)
    argv = ("--reward", f"{tmp_path}/mine.py:noisy=1", "--eval.eval-freq", 4, "--keep-checkpoints", keep)
    log = common.Run.log

    def signalled(run, row):
        run.interrupted = signal.SIGINT if row["epoch"] == 2 else None
        run.skipped = row["epoch"]
        log(run, row)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(common.Run, "log", signalled)
        whole = start(script, *argv, "--train.max-epochs", 2, name="whole")
        start(script, *argv, "--train.max-epochs", 6)
    assert exit.value.code == 130 and rows_of(tmp_path / "run")[-1]["eval/total"] == ""
    for _ in range(2):  # the second changes nothing
        assert_same_run(whole, resume(script, "--train.max-epochs", 2))
        monkeypatch.setattr(common, "evaluate", lambda *_: pytest.fail("evaluated once more"))


@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_a_whole_checkpoint_that_was_not_renamed_is_taken(finished, resume, moment):
    """A process was killed while it put a checkpoint in the place of an older one of the same epoch."""
    newest = common.checkpoints(finished)[-1]
    shutil.copytree(newest, common.temporary(newest))
    if moment == "before":
        (common.temporary(newest) / "SHA256SUMS").unlink()
    elif moment == "between":
        (newest / "state.json").unlink()
    else:
        shutil.rmtree(newest)
    resume(grpo)
    assert common.checkpoints(finished)[-1] == newest and not common.damage(newest)
    assert not list(finished.rglob("*.tmp")) + list(finished.rglob("*.damaged"))


def test_how_many_checkpoints_there_are(start):
    def kept(*argv, name):
        argv = ("--train.max-epochs", 5, "--eval.eval-freq", 5, *argv)
        return [path.name for path in common.checkpoints(start(grpo, *argv, name=name))]

    assert kept(name="a") == ["epoch_0004", "epoch_0005"]
    assert kept("--checkpoint-freq", 2, "--keep-checkpoints", 3, name="b") == ["epoch_0002", "epoch_0004", "epoch_0005"]


def test_gradient_checkpointing_may_change(finished, whole_run, resume):
    folder = resume(grpo, "--train.max-epochs", 4, "--train.enable-gradient-checkpointing")
    assert rows_of(whole_run) == rows_of(folder)


def test_saved_weights_are_replaced_whole(tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "old").touch()
    with pytest.raises(OSError), common.whole(tmp_path / "lora", replace=True) as folder:
        (folder / "new").touch()
        raise OSError
    assert [path.name for path in tmp_path.rglob("*")] == ["lora", "old"]
    with common.whole(tmp_path / "lora", replace=True) as folder:
        (folder / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["lora", "new"]


# Damaged checkpoints


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: os.truncate(c / "tensors.safetensors", 1000),
        lambda c: os.truncate(c / "state.json", 0),
        lambda c: flip_a_bit(c / "tensors.safetensors"),
        lambda c: flip_a_bit(c / "SHA256SUMS"),
        lambda c: os.truncate(c / "SHA256SUMS", 70),
        lambda c: (c / "state.json").unlink(),
        lambda c: (c / "SHA256SUMS").unlink(),
    ],
)
def test_damage_is_found(tmp_path, spoil):
    for name, size in (("tensors.safetensors", 5000), ("state.json", 100)):
        (tmp_path / name).write_bytes(random.Random(size).randbytes(size))
    sums = [f"{common.sha256(tmp_path / name)}  {name}\n" for name in ("state.json", "tensors.safetensors")]
    (tmp_path / "SHA256SUMS").write_text("".join(sums))
    assert common.damage(tmp_path) is None
    spoil(tmp_path)
    assert common.damage(tmp_path)


def test_a_damaged_checkpoint_is_passed_over(finished, whole_run, resume, capsys):
    folder = finished
    flip_a_bit(common.checkpoints(folder)[-1] / "tensors.safetensors")
    (folder / "checkpoints" / "epoch_0007.tmp").mkdir()  # left by a process that was killed, to be cleared away
    capsys.readouterr()
    resume(grpo, "--train.max-epochs", 4)
    said = capsys.readouterr().out
    assert "epoch_0002 is damaged (tensors.safetensors does not have its checksum), now epoch_0002.damaged" in said
    assert "epoch_0001 is used" in said and "resumed: epochs up to 1 are done" in said
    assert_same_run(whole_run, folder)


def refusal_of(call, capsys):
    with pytest.raises(SystemExit) as exit:
        call()
    assert exit.value.code == 2
    return capsys.readouterr().err


def test_no_checkpoint_that_is_whole_is_refused(finished, nothing_loads, resume, capsys):
    folder = finished
    flip_a_bit(common.checkpoints(folder)[0] / "state.json")
    flip_a_bit(common.checkpoints(folder)[1] / "tensors.safetensors")
    for _ in range(2):  # the first refusal leaves everything as it was
        said = refusal_of(lambda: resume(grpo), capsys)
        assert "epoch_0002: tensors.safetensors does not have its checksum; epoch_0001: state.json" in said
    shutil.rmtree(folder / "checkpoints")
    assert "no checkpoint that is whole (there is none)" in refusal_of(lambda: resume(grpo), capsys)


def test_a_checkpoint_of_another_model_is_refused(finished, resume):
    path = common.checkpoints(finished)[-1]
    tensors = load_file(path / "tensors.safetensors")
    name = next(name for name in tensors if name.startswith("parameters/"))
    tensors[name] = tensors[name][:1]
    common.save_file(tensors, path / "tensors.safetensors")
    sums = [f"{common.sha256(path / name)}  {name}\n" for name in ("state.json", "tensors.safetensors")]
    (path / "SHA256SUMS").write_text("".join(sums))
    with pytest.raises(SystemExit, match="is .* the model that it was"):
        resume(grpo, "--train.max-epochs", 3)


# Arguments at a resumption


@pytest.fixture
def nothing_loads(finished, monkeypatch):
    """Whatever resumes the run must be refused before anything is loaded."""
    monkeypatch.setattr(common, "load_pipeline", lambda *_: pytest.fail("went on"))


def test_arguments_that_would_change_the_run_are_refused(finished, nothing_loads, resume, capsys, tmp_path):
    for options, what in (
        ("--train.learning-rate 0.5", "train.learning_rate = 0.5"),
        ("--train.seed 3", "train.seed = 3"),
        ("--eval.resolution 64", "eval.resolution = 64"),
        ("--cpu-threads 2", "cpu_threads = 2"),
        ("--reward shapes=1", "reward = {'shapes': 1.0}"),
        ("--call negative_prompt=x", "call = {'max_sequence_length': 1, 'negative_prompt': 'x'}"),
        (f"--prompts {tmp_path / 'eval.txt'}", "prompts = "),
        ("--run-name other", "run_name = 'other'"),
    ):
        before = (finished / "args.yaml").read_text(), (finished / "log.txt").read_text()
        said = refusal_of(lambda options=options: resume(grpo, *options.split()), capsys)
        assert f"error: {what}" in said and "leave it out" in said
        assert before == ((finished / "args.yaml").read_text(), (finished / "log.txt").read_text())
    (tmp_path / "c.yaml").write_text("train: {clip_range: 0.25}")
    said = refusal_of(lambda: resume(grpo, "--config", tmp_path / "c.yaml"), capsys)
    assert f"train.clip_range = 0.25 (from {tmp_path}/c.yaml)" in said
    assert "is for grpo.py" in refusal_of(lambda: resume(nft), capsys)
    assert "neither" in refusal_of(lambda: resume(grpo, name="nowhere"), capsys)
    said = refusal_of(lambda: resume(grpo, "--train.max-epochs", 1), capsys)
    assert "train.max_epochs = 1: 2 epochs are done" in said
    assert yaml.safe_load((finished / "args.yaml").read_text())["train"]["max_epochs"] == 2


def test_prompts_that_have_changed_are_refused(finished, nothing_loads, resume, capsys, tmp_path):
    arguments = (finished / "args.yaml").read_text()
    path = common.yaml.safe_load(arguments)["eval"]["prompts"]
    (tmp_path / "changed.txt").write_text("a blue cross\n")
    (finished / "args.yaml").write_text(arguments.replace(path, str(tmp_path / "changed.txt")))
    said = refusal_of(lambda: resume(grpo), capsys)
    assert "eval.prompts" in said and "has changed since the run began" in said


def test_the_same_command_resumes(finished, originals, start, capsys, monkeypatch):
    monkeypatch.chdir(originals["run"].parent)  # where the prompts have shorter names
    start(grpo, "--prompts", "train.txt", "--eval.prompts", "eval.txt", "--resume", finished, "--device", "cpu")
    said = capsys.readouterr().out
    assert f"grpo.py -> {finished}" in said and "resumed: epochs up to 2 are done" in said


def test_a_run_goes_on_from_another_folder(start, resume, tmp_path, monkeypatch, capsys):
    work = tmp_path / "work"
    work.mkdir()
    (work / "mine.py").write_text(REWARD)
    (work / "model").symlink_to(common.RunArgs.model)
    monkeypatch.chdir(work)
    options = ("--reward", "mine.py:noisy=1", "--model", "model")
    folder = start(grpo, *options, "--train.max-epochs", 1)
    resume(grpo, *options)  # as it was typed
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def noisy(images, prompts):\n    raise KeyError")  # is another file
    resume(grpo, "--train.max-epochs", 2)
    assert "note:" not in capsys.readouterr().out
    assert {"reward/mine.py:noisy", "eval/mine.py:noisy"} <= {
        key.removeprefix("train/") for key in read_csv(folder / "metrics.csv")[-1]
    }
    (work / "mine.py").write_text(REWARD.replace("+ 0.01", "- 0.01"))
    resume(grpo)
    assert "note: mine.py is not as it was when the run began" in capsys.readouterr().out


def test_a_lost_environment_is_named(finished, nothing_loads, resume, capsys):
    (finished / "environment.yaml").unlink()
    assert f"{finished}/environment.yaml" in refusal_of(lambda: resume(grpo), capsys)


@pytest.mark.parametrize("text", [b"", b"- 1", b"{", b"\xff\xfe\x00", b"folder: /", b"files: {}", b"&a [*a]"])
def test_an_environment_that_says_nothing_is_refused(finished, nothing_loads, resume, capsys, text):
    (finished / "environment.yaml").write_bytes(text)
    assert f"error: --resume = '{finished}/environment.yaml': " in refusal_of(lambda: resume(grpo), capsys)


@pytest.mark.parametrize("text", ["", "{}", "[]"])
def test_arguments_that_are_lost_are_refused(finished, nothing_loads, resume, capsys, text):
    (finished / "args.yaml").write_text(text)
    said = refusal_of(lambda: resume(grpo), capsys)
    assert f"error: --resume = '{finished}/args.yaml': is empty" in said


def test_another_environment_is_told(finished, resume, capsys):
    path = finished / "environment.yaml"
    path.write_text(path.read_text().replace(f"torch: {torch.__version__}", "torch: 1.0"))
    resume(grpo)
    assert f"note: torch is {torch.__version__}, and was 1.0 when the run began" in capsys.readouterr().out


# Numbers that are not finite


def spoilt(monkeypatch, spoil, at):
    """Let `spoil(loss)` take the place of grpo's policy loss in some of its calls, counted from 1."""
    calls, loss = iter(range(1, 10**6)), grpo.grpo_loss

    def spoiling(*args):
        value, terms = loss(*args)
        if next(calls) not in at:
            return value, terms
        value = spoil(value)
        return value, terms | {"policy_loss": value.detach()}

    monkeypatch.setattr(grpo, "grpo_loss", spoiling)


INF = float("inf")


@pytest.mark.parametrize(
    "spoil, culprit",
    [
        (lambda loss: loss * INF, "policy_loss"),
        (lambda loss: loss + INF, "policy_loss"),  # with a gradient that is finite
        (lambda loss: GoodLossBadGradient.apply(loss), "the gradient of transformer."),
    ],
)
def test_an_update_that_is_not_finite_is_skipped(start, monkeypatch, capsys, spoil, culprit):
    spoilt(monkeypatch, spoil, at=[1])  # in the first of the two updates of epoch 1
    steps = []
    adam = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args: (steps.append(1), adam(*args))[1])
    rows = read_csv(start(grpo) / "metrics.csv")
    assert len(steps) == 3
    assert f"update skipped, 1 in a row: {culprit}" in capsys.readouterr().out
    assert [row["train/skipped"] for row in rows] == ["", "1", "0"]
    assert all(common.np.isfinite(float(value)) for row in rows for value in row.values() if value)


class GoodLossBadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


def test_five_skipped_updates_in_a_row_end_the_run(start, resume, monkeypatch):
    with monkeypatch.context() as patch:
        spoilt(patch, lambda loss: loss * INF, at=range(1, 6))  # of two updates an epoch; the sixth is sound
        with pytest.raises(SystemExit, match="5 updates in a row were skipped, .*policy_loss.*continue with") as exit:
            start(grpo, "--train.max-epochs", 6, name="run")
    assert exit.value.code != 0
    resumed = resume(grpo, "--train.max-epochs", 4)  # and the trouble is gone
    assert [row["train/skipped"] for row in rows_of(resumed)] == ["", "2", "2", "1", "0"]


def test_four_skipped_updates_in_a_row_do_not(start, monkeypatch):
    spoilt(monkeypatch, lambda loss: loss * INF, at=[1, 2, 3, 4, 6, 7, 8, 9])
    rows = rows_of(start(grpo, "--train.max-epochs", 5))
    assert sum(int(row["train/skipped"] or 0) for row in rows) == 8


def test_skipped_updates_in_a_row_are_counted_over_a_resumption(stopped, resume, monkeypatch, tmp_path):
    spoilt(monkeypatch, lambda loss: loss * INF, at=range(1, 100))
    stopped(grpo, "--train.max-epochs", 6, epoch=3)  # epochs 1 and 2 have four
    with pytest.raises(SystemExit, match="6 updates in a row"):
        resume(grpo)
    assert len(rows_of(tmp_path / "run")) == 4  # at the end of epoch 3


# A reward that fails, a GPU that is full, a mistake


def test_the_batch_of_a_reward_that_fails_is_kept(start, tmp_path):
    (tmp_path / "mine.py").write_text(REWARD)
    with pytest.raises(SystemExit, match="mine.py:broken' failed: KeyError.*; its images and prompts are in .*/failed"):
        start(grpo, "--reward", f"{tmp_path}/mine.py:broken=1")
    kept = tmp_path / "run" / "failed_reward"
    assert sorted(path.name for path in kept.iterdir()) == ["0000.png", "0001.png", "prompts.txt"]
    assert (kept / "prompts.txt").read_text() == "a white cross\ntwo red circles\n"
    assert common.Image.open(kept / "0001.png").size == (32, 32)


@pytest.fixture
def ends(start, monkeypatch):
    """How a run ends that meets an error in its first rollout."""

    def call(error, *argv):
        def fail(*_, **__):
            raise error

        monkeypatch.setattr(grpo, "rollout", fail)
        with handlers_kept(), pytest.raises(BaseException) as raised:  # noqa: B017
            common.start(lambda: start(grpo, *argv))
        return raised.value

    return call


def test_out_of_memory_names_what_would_help(ends, tmp_path):
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB"
    )
    said = str(ends(error, "--train.kl-beta", 0.1))
    assert said.startswith(
        "error: out of GPU memory (CUDA out of memory. Tried to allocate 2.00 GiB): adding --train.en"
    )
    for option in ("--train.ref-param-device cpu", "--train.per-device-batch-size (now 2)", "--train.resolution (32)"):
        assert option in said
    assert said.endswith(f"continue with: python grpo.py --resume {tmp_path}/run") and "\n" not in said


def test_any_other_error_says_how_to_go_on(ends, tmp_path):
    error = ends(ValueError("a mistake"))
    assert isinstance(error, ValueError)
    assert error.__notes__ == [f"continue with: python grpo.py --resume {tmp_path}/run"]
