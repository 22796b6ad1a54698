"""harness/checkpoint and run: a run that was stopped goes on as if it had not been, what would change it is refused,
what was damaged is found, and an update that is not sound is not taken.
"""

import copy
import functools
import itertools
import json
import math
import os
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import MINE, SMALL, read_csv
from safetensors.torch import load_file, save_file

import common
import grpo
import grpo_guard
import nft
from harness import machine
from harness import run as harness_run
from harness.checkpoint import Checkpoint, checkpoints, damage, sha256
from harness.run import Run
from harness.settings import RunArgs

TINY = [
    *(*SMALL, "--train.unique-sample-num-per-epoch", "1", "--train.ema-update-interval", "3", "--lora-rank", "2"),
    *("--train.per-device-batch-size", "2", "--train.num-inference-steps", "2", "--eval.num-inference-steps", "1"),
    *("--train.max-epochs", "4", "--train.kl-beta", "0.04", "--train.ema-decay", "0.9", "--reward", f"{MINE}:noisy=1"),
]
"""A run of a second with every kind of state, whose reward draws from all generators."""


def rows_of(folder):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read_csv(folder / "metrics.csv")]


def files_of(folder, *patterns):
    """{path in it: bytes} of the files that match."""
    return {str(path.relative_to(folder)): path.read_bytes() for p in patterns for path in sorted(folder.glob(p))}


def assert_same_run(one, other):
    """Bit for bit: metrics, all that a checkpoint has, saved weights, evaluation images and their rewards."""
    assert [[*row.items()] for row in rows_of(one)] == [[*row.items()] for row in rows_of(other)]  # in order
    assert files_of(one, "images/*") == files_of(other, "images/*")
    newest = checkpoints(one)[-1].relative_to(one)
    states = [json.loads((folder / newest / "state.json").read_text()) for folder in (one, other)]
    assert all(states[0][key] == states[1][key] for key in ("epoch", "updates", "skipped_in_a_row"))
    patterns = [f"{part}/*.safetensors" for part in (newest, "lora", "transformer")]
    saved, same = (files_of(folder, *patterns).keys() for folder in (one, other))
    assert saved == same and len(saved) == 2
    for path in saved:
        torch.testing.assert_close(load_file(one / path), load_file(other / path), rtol=0, atol=0)
    seconds = [float(row["seconds"]) for row in read_csv(other / "metrics.csv")]
    assert seconds == sorted(seconds) and not list(other.rglob("*.tmp"))


loaded = functools.cache(common.load_pipeline)


class Runs:
    """Tiny runs in this process, of a pipeline that is loaded already, without the contract: other tests check it."""

    undisturbed = {}

    def __init__(self, start, monkeypatch, ends, tmp_path):
        self.start, self.monkeypatch, self.ends, self.folder = start, monkeypatch, ends, tmp_path / "run"
        for script in (grpo, grpo_guard, nft):
            monkeypatch.setattr(script, "first_step_contract", lambda *_: None)
        pipe = loaded(RunArgs.model, "cpu", torch.float32)
        monkeypatch.setattr(machine, "load_pipeline", lambda *_: copy.deepcopy(pipe))

    def new(self, script, *argv, name="run"):
        """A run of two epochs; returns its folder."""
        return self.start(script, *TINY, "--train.max-epochs", 2, *argv, name=name)

    def whole(self, epochs):
        """The folder of a run of so many epochs that nothing happened to, the same for all tests."""
        if epochs not in self.undisturbed:
            self.undisturbed[epochs] = self.new(grpo, "--train.max-epochs", epochs, name=f"undisturbed-{epochs}")
        return self.undisturbed[epochs]

    def resume(self, script, *argv, folder=None):
        argv = [f"{script.__name__}.py", "--resume", str(folder or self.folder), *map(str, argv)]
        self.monkeypatch.setattr(sys, "argv", argv)
        script.main()
        return self.folder

    def refusal(self, script, *argv, folder=None):
        """The message of a resumption that must be refused with status 2 before anything is loaded."""
        with self.monkeypatch.context() as patch:
            patch.setattr(machine, "load_pipeline", lambda *_: pytest.fail("went on"))
            return self.ends(lambda: self.resume(script, *argv, folder=folder))


@pytest.fixture
def runs(start, monkeypatch, ends, tmp_path):
    return Runs(start, monkeypatch, ends, tmp_path)


@pytest.fixture
def finished(runs):
    """The folder of a run of two epochs, for each test its own."""
    return shutil.copytree(runs.whole(2), runs.folder)


@pytest.mark.parametrize("script", [grpo, nft])
@pytest.mark.parametrize("keep", [1, 2])
def test_a_stopped_run_that_ends_there_is_evaluated(runs, monkeypatch, script, keep):
    argv, log = ("--eval.eval-freq", 4, "--keep-checkpoints", keep), Run.log

    def signalled(run, epoch, columns):
        run.interrupted = signal.SIGINT if epoch == 2 else 0
        run.skipped = epoch
        log(run, epoch, columns)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(Run, "log", signalled)
        undisturbed = runs.new(script, *argv, name="undisturbed")
        runs.new(script, *argv, "--train.max-epochs", 6)
    assert exit.value.code == 130 and rows_of(runs.folder)[-1]["eval/total"] == ""
    for _ in range(2):  # the second changes nothing
        assert_same_run(undisturbed, runs.resume(script, "--train.max-epochs", 2))
        monkeypatch.setattr(harness_run, "evaluate", lambda *_: pytest.fail("evaluated once more"))


def edit(folder, section, **settings):
    """Write other settings into its args.yaml, as by hand."""
    known = yaml.safe_load((folder / "args.yaml").read_text())
    known[section] |= settings
    (folder / "args.yaml").write_text(yaml.dump(known))


def test_a_finished_run_is_left_alone_or_extended(runs, finished, capsys):
    environment, before = finished / "environment.yaml", files_of(finished, "metrics.csv", "checkpoints/*/*")
    environment.write_text(environment.read_text().replace(f"torch: {torch.__version__}", "torch: 1.0"))
    runs.resume(grpo)
    said = capsys.readouterr().out
    assert f"note: torch is {torch.__version__}, and was 1.0 when the run began" in said
    assert "all 2 are, and a larger --train.max-epochs adds more" in said
    assert files_of(finished, "metrics.csv", "checkpoints/*/*") == before
    may_change = {"max_epochs": 4, "enable_gradient_checkpointing": True, "ref_param_device": "cpu"}
    edit(finished, "train", **may_change)
    assert_same_run(runs.whole(4), runs.resume(grpo))  # eval_freq is 2: the same rows


def test_a_run_goes_on_from_another_folder(runs, tmp_path, monkeypatch, capsys):
    work, reward = tmp_path / "work", "def bright(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n"
    work.mkdir()
    (work / "own.py").write_text(reward)
    (work / "model").symlink_to(RunArgs.model)
    monkeypatch.chdir(work)
    options = ("--reward", "own.py:bright=1", "--model", "model", "--prompts", "../train.txt")
    runs.new(grpo, *options, "--train.max-epochs", 1)
    runs.resume(grpo, *options)  # as it was typed
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text("def bright(images, prompts):\n    raise KeyError")  # is another file
    rows = rows_of(runs.resume(grpo, "--train.max-epochs", 2))
    assert "note:" not in capsys.readouterr().out
    assert {"train/reward/own.py:bright", "eval/own.py:bright"} <= rows[-1].keys()
    (work / "own.py").write_text(reward.replace("mean", "amax"))
    runs.resume(grpo)
    assert "note: own.py is not as it was when the run began" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, what",
    [
        ("--train.learning-rate 0.5", "train.learning_rate = 0.5"),
        ("--eval.resolution 64", "eval.resolution = 64"),
        ("--call negative_prompt=x", "call = {'max_sequence_length': 1, 'negative_prompt': 'x'}"),
        ("--prompts @/eval.txt", "prompts = "),
        ("--run-name other", "run_name = 'other'"),
        ("--config @/c.yaml", "train.clip_range = 0.25 (from @/c.yaml)"),
    ],
)
def test_arguments_that_would_change_the_run_are_refused(runs, finished, tmp_path, options, what):
    (tmp_path / "c.yaml").write_text("train: {clip_range: 0.25}")
    before = files_of(finished, "args.yaml", "log.txt")
    said = runs.refusal(grpo, *options.replace("@", str(tmp_path)).split())
    assert f"error: {what.replace('@', str(tmp_path))}" in said and "leave it out" in said
    assert files_of(finished, "args.yaml", "log.txt") == before


def test_settings_prompts_and_ends_that_changed_since_are_refused(runs, finished, tmp_path):
    assert "is for grpo.py" in runs.refusal(nft)
    assert "neither" in runs.refusal(grpo, folder="nowhere")
    assert "train.max_epochs = 1: 2 epochs are done" in runs.refusal(grpo, "--train.max-epochs", 1)
    arguments = (finished / "args.yaml").read_text()
    changed = shutil.copy(tmp_path / "train.txt", str(tmp_path / "changed.txt"))
    for key, value in (("learning_rate", 0.5), ("group_size", 8), ("ema_decay", 0.5)):
        edit(finished, "train", **{key: value})
        said = runs.refusal(grpo)
        assert f"error: train.{key} = {value}" in said and "args.yaml was changed: its checkpoints were made w" in said
        (finished / "args.yaml").write_text(arguments)
    edit(finished, "eval", prompts=changed)
    said = runs.refusal(grpo)
    assert f"error: eval.prompts = '{changed}'" in said and "has changed since the run began" in said


WRONG = {
    "environment.yaml": [None, "", "- 1", "{", "\xff\x00", "folder: /", "files: {}", "&a [*a]"],
    "args.yaml": ["", "{}", "[]"],
}


@pytest.mark.parametrize("file, text", [(file, text) for file, texts in WRONG.items() for text in texts])
def test_what_the_run_began_with_must_be_there(runs, finished, file, text):
    (finished / file).unlink()
    if text is not None:
        (finished / file).write_bytes(text.encode("latin-1"))
    said, what = runs.refusal(grpo), "[] should be a mapping" if text == "[]" else "is empty"
    assert f"error: --resume = '{finished / file}': " in said and (file != "args.yaml" or what in said)


@pytest.mark.parametrize("name", ["a\0b", os.fsdecode(b"a\xff")], ids=["NUL", "not UTF-8"])
def test_names_that_cannot_be_printed_are_refused(runs, finished, refused, tmp_path, name):
    sys.stderr.reconfigure(errors="backslashreplace")  # as it is outside of pytest
    said = [refused("--run-name", name), runs.refusal(grpo, folder=tmp_path / name)]
    if "\0" not in name:
        finished.rename(tmp_path / name)
        said.append(runs.refusal(grpo, folder=tmp_path / name))
    for line, key in zip(said, ("run_name", "resume", "resume"), strict=False):
        assert line.startswith(f"error: {key} = ") and line.count("\n") == 1


def test_how_many_checkpoints_there_are(runs, finished):
    assert [path.name for path in checkpoints(finished)] == ["epoch_0001", "epoch_0002_evaluated"]
    folder = runs.new(grpo, "--checkpoint-freq", 2, "--keep-checkpoints", 3, "--train.max-epochs", 5, name="three")
    assert [path.name for path in checkpoints(folder)] == [f"epoch_000{epoch}_evaluated" for epoch in (2, 4, 5)]


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def write_sums(checkpoint):
    files = [path for path in sorted(checkpoint.iterdir()) if path.name != "SHA256SUMS"]
    (checkpoint / "SHA256SUMS").write_text("".join(f"{sha256(path)}  {path.name}\n" for path in files))


def without_a_line(path):
    path.write_text(path.read_text().partition("\n")[2])


@pytest.mark.parametrize("spoil", [flip_a_bit, os.unlink, without_a_line, lambda path: os.truncate(path, 70)])
@pytest.mark.parametrize("name", ["SHA256SUMS", "shard-1.safetensors", "shard-2.safetensors", "state.json"])
def test_damage_is_found(tmp_path, name, spoil):
    for file in ("shard-1.safetensors", "shard-2.safetensors", "state.json"):
        (tmp_path / file).write_text(f"{file}\n" * 10)
    for text in ("{", "[1]", '{"epoch": 1}'):  # with checksums that are right
        (tmp_path / "state.json").write_text(text)
        write_sums(tmp_path)
        assert damage(tmp_path)
    state = dict.fromkeys(("epoch", "updates", "args", "rows"), [*range(9)])
    (tmp_path / "state.json").write_text(json.dumps(state, indent=1))
    write_sums(tmp_path)
    assert damage(tmp_path) is None
    spoil(tmp_path / name)
    assert name in damage(tmp_path) or name == "SHA256SUMS"


def test_damaged_checkpoints_are_passed_over(runs, finished, capsys):
    (file,) = checkpoints(finished)[-1].glob("*.safetensors")
    flip_a_bit(file)
    shutil.copytree(file.parent, file.parent.with_name("epoch_0007"))
    for epoch in (1, 4):  # left by processes that were killed while they removed one and wrote the other
        shutil.copytree(file.parent, finished / "checkpoints" / f"epoch_000{epoch}_evaluated")
        (finished / "checkpoints" / f"epoch_000{epoch}_evaluated" / "SHA256SUMS").unlink()
    copies = [finished / "checkpoints" / name for name in ("epoch_0001.bak", "epoch_0002_evaluated.bak", "epoch_best")]
    for copied in copies:  # which a user keeps: none of the run's own
        shutil.copytree(checkpoints(finished)[0], copied)
    capsys.readouterr()
    runs.resume(grpo, "--train.max-epochs", 4, "--keep-checkpoints", 1)
    said = capsys.readouterr().out
    for damaged in ("epoch_0002_evaluated", "epoch_0007"):
        assert f"damaged: {damaged}: {file.name} does not have its checksum; epoch_0001 is used" in said
    assert "resumed: epochs up to 1 are done" in said and "epoch    2" in said and "epoch    1" not in said
    assert "max_epochs: 4" in (finished / "args.yaml").read_text()
    for extra in (finished / "checkpoints" / "epoch_0007", *copies):
        shutil.rmtree(extra)
    assert [*(finished / "checkpoints").iterdir()] == checkpoints(finished)
    assert_same_run(runs.whole(4), finished)


def test_no_checkpoint_that_is_whole_is_refused(runs, finished):
    (file,) = checkpoints(finished)[1].glob("*.safetensors")
    flip_a_bit(file)
    flip_a_bit(checkpoints(finished)[0] / "state.json")
    for _ in range(2):  # the first refusal leaves everything as it was
        said = runs.refusal(grpo)
        assert f"epoch_0002_evaluated: {file.name} does not have its checksum; epoch_0001: state.json" in said
    shutil.rmtree(finished / "checkpoints")
    for table in ((finished / "metrics.csv").read_bytes(), b"\xff\x00\n" * 5):
        (finished / "metrics.csv").write_bytes(table)
        assert "no checkpoint that is whole (there is none)" in runs.refusal(grpo)


@pytest.mark.parametrize("change", ["shape", "name"])
def test_a_checkpoint_of_another_model_is_refused(runs, finished, change):
    (file,) = checkpoints(finished)[-1].glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.startswith("parameters/"))
    tensors[name if change == "shape" else f"{name}s"] = tensors.pop(name)[:1]
    save_file(tensors, file)
    write_sums(file.parent)
    with pytest.raises(SystemExit, match="is .* the model that it was"):
        runs.resume(grpo, "--train.max-epochs", 3)


@pytest.mark.parametrize("spoil", [os.unlink, lambda path: os.truncate(path, 500), lambda path: os.truncate(path, 0)])
def test_without_the_base_images_the_grid_is_drawn_alone(runs, finished, spoil):
    spoil(finished / "images" / "base.npz")
    runs.resume(grpo, "--train.max-epochs", 3)
    assert (finished / "images" / "epoch_0003.png").exists()


def watched(runs, script, *argv):
    """Run a script. Returns its rows, [(parameters, gradients, parameters after it)] of each optimizer step, and the
    averages at the end of each epoch, all in float64.
    """
    steps, averages, adam, save = [], [], torch.optim.AdamW.step, Checkpoint.save

    def step(optimizer):
        parameters = optimizer.param_groups[0]["params"]
        before, gradients = [p.detach().double() for p in parameters], [p.grad.double() for p in parameters]
        adam(optimizer)
        steps.append((before, gradients, [p.detach().double() for p in parameters]))

    def saved(checkpoint, epoch, updates):
        averages.append([value.double() for value in checkpoint.snapshots["ema"].values])
        save(checkpoint, epoch, updates)

    with runs.monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        patch.setattr(Checkpoint, "save", saved)
        return read_csv(runs.new(script, *argv) / "metrics.csv"), steps, averages


@pytest.mark.parametrize("most", [1e-4, 1e9], ids=["clipped", "free"])
@pytest.mark.parametrize("script", [grpo, grpo_guard, nft])
def test_an_update_is_adamws_of_clipped_gradients(runs, script, most):
    adam = ("--train.adam-betas", 0.7, 0.8, "--train.adam-weight-decay", 0.2, "--train.adam-epsilon", 1e-6)
    average = ("--train.ema-decay", 0.3, "--train.ema-update-interval", 2, "--train.learning-rate", 0.01)
    rows, steps, averages = watched(runs, script, *adam, *average, "--train.max-grad-norm", most)
    assert len(steps) == 4
    norms = [math.sqrt(sum((g**2).sum().item() for g in gradients)) for _, gradients, _ in steps]
    logged = [float(row["train/grad_norm"]) for row in rows[1:]]  # before clipping, of two updates each
    if most == 1e-4:
        assert min(logged) > 2 * most and norms == pytest.approx([most] * 4, rel=1e-2)
    else:
        assert logged == pytest.approx([sum(norms[:2]) / 2, sum(norms[2:]) / 2], rel=1e-4)

    parameters = [torch.nn.Parameter(p.clone()) for p in steps[0][0]]
    optimizer = torch.optim.AdamW(parameters, 0.01, (0.7, 0.8), 1e-6, 0.2)
    for _, gradients, after in steps:
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        optimizer.step()
        torch.testing.assert_close(after, parameters, rtol=0, atol=1e-6)

    expected = steps[0][0]
    for epoch, decay in ((1, 3 / 12), (2, 0.3)):  # after updates 2 and 4: (1 + u) / (10 + u), at most ema_decay
        expected = [decay * a + (1 - decay) * p for a, p in zip(expected, steps[2 * epoch - 1][2], strict=True)]
        torch.testing.assert_close(averages[epoch], expected, rtol=0, atol=1e-6)


def test_the_norm_of_an_update_without_gradients_is_a_number():
    """A tensor would be on the CPU, and those of the epoch's other updates on a GPU: their mean fails."""
    parameter, run = torch.nn.Parameter(torch.ones(2)), SimpleNamespace()
    optimizer = torch.optim.AdamW([parameter])
    metrics = common.average_clip_step(run, optimizer, {"name": parameter}, common.Metrics(), 1.0)
    assert type(metrics["grad_norm"]) is float and metrics["grad_norm"] == 0


def spoil(monkeypatch, change, at):
    """Let `change(loss)` take the place of grpo's policy loss in some of its calls, counted from 1."""
    calls, loss = itertools.count(1), grpo.grpo_loss

    def spoiling(*args):
        value, terms = loss(*args)
        value = change(value) if next(calls) in at else value
        return value, terms | {"policy_loss": value.detach()}

    monkeypatch.setattr(grpo, "grpo_loss", spoiling)


def bad_gradient_of_a_good_loss(loss):
    loss.register_hook(lambda gradient: gradient * math.nan)
    return loss


@pytest.mark.parametrize(
    "change, culprit",
    [
        (lambda loss: loss * math.inf, "policy_loss"),
        (lambda loss: loss + math.inf, "policy_loss"),  # with a gradient that is finite
        (bad_gradient_of_a_good_loss, "the gradient of transformer."),
    ],
)
def test_an_update_that_is_not_finite_is_skipped(runs, monkeypatch, capsys, change, culprit):
    spoil(monkeypatch, change, at=[1])  # in the first of the two updates of epoch 1
    rows, steps, _ = watched(runs, grpo)
    assert len(steps) == 3 and f"update skipped, 1 in a row: {culprit}" in capsys.readouterr().out
    assert [row["train/skipped"] for row in rows] == ["", "1", "0"]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values() if value)


def test_five_skipped_updates_in_a_row_end_the_run(runs, monkeypatch):
    """Also where a resumption lies between them, and a sound one after them; four do not."""
    spoil(monkeypatch, lambda loss: loss * math.inf, at=[1, 2, 3, 5, 6, 7, 8, 9])  # two in an epoch
    runs.new(grpo, "--train.max-epochs", 4)
    with pytest.raises(SystemExit, match="5 updates in a row were skipped, .*policy_loss.*continue with"):
        runs.resume(grpo, "--train.max-epochs", 6)
    rows = rows_of(runs.resume(grpo, "--train.max-epochs", 6))  # and the trouble is gone
    assert [row["train/skipped"] for row in rows] == ["", "2", "1", "2", "2", "1", "0"]


@pytest.mark.parametrize("epochs", [2, 3], ids=["evaluated", "not evaluated"])
def test_weights_that_are_not_finite_end_the_run_unsaved(runs, monkeypatch, epochs):
    """Also where the average, which is evaluated and not updated here, is finite."""
    folder = runs.new(grpo, "--train.max-epochs", 1, "--eval.eval-freq", 5, "--train.ema-update-interval", 9)
    saved, step = ("checkpoints/*/*", "images/*", "lora/*"), torch.optim.AdamW.step
    before = files_of(folder, *saved)

    def infinite(optimizer):
        step(optimizer)
        optimizer.param_groups[0]["params"][-1].data[0, 0] = math.inf

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", infinite)
        with pytest.raises(SystemExit, match="after epoch 2 transformer.* is not finite; nothing of it was saved"):
            runs.resume(grpo, "--train.max-epochs", epochs)
    assert files_of(folder, *saved) == before
    assert [row["epoch"] for row in rows_of(runs.resume(grpo, "--train.max-epochs", 2))] == ["0", "1", "2"]
