"""The scripts as a user meets them: whole runs, the commands of the pages, what a run leaves and how it ends."""

import importlib
import io
import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from conftest import MINE, SMALL, read_csv
from diffusers import StableDiffusion3Pipeline

import common
import dynamics
import grpo
import grpo_guard
import nft
from harness import arguments, checks, contract, ending, evaluation
from harness import run as harness_run
from harness.checkpoint import atomic_folder
from harness.fields import to_yaml
from harness.settings import HERE, EvalArgs, RunArgs


def test_what_diffusers_warns_of_in_every_call_is_said_once(monkeypatch):
    handler, said = logging.getLogger("diffusers").handlers[0], io.StringIO()
    monkeypatch.setattr(handler, "stream", said)
    logger = diffusers.logging.get_logger("diffusers.pipeline")
    ending.start(lambda: [logger.warning(text) for text in ("ignored", "ignored", "also", "ignored")])
    assert said.getvalue().split() == ["ignored", "also"]


def test_a_run_from_the_shell(tmp_path, prompt_files):
    argv = [*SMALL, *prompt_files, "--output-dir", str(tmp_path), "--run-name", "run", "--train.kl-beta", "0.04"]
    argv += ["--reward", "shapes=2", "jpeg_compressibility=0.1"]
    done = subprocess.run([sys.executable, HERE / "grpo.py", *argv], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\ncontract holds: max |log ratio| of the first call 0, KL gradient beside the base model 0." in done.stdout
    assert "\nfrom you: " in done.stdout and "BROKEN" not in done.stdout and "warning" not in done.stdout
    folder = tmp_path / "run"
    assert (folder / "log.txt").read_text() == done.stdout
    rows = read_csv(folder / "metrics.csv")
    assert [(row["epoch"], row["images"]) for row in rows] == [("0", "0"), ("1", "8"), ("2", "16")]
    assert list(rows[0])[:3] == ["epoch", "images", "seconds"]
    assert [row["eval/total"] != "" for row in rows] == [True, False, True]
    assert rows[0]["train/policy_loss"] == "" and float(rows[1]["train/kl"]) >= 0
    assert (folder / "grpo.py").read_text() == (HERE / "grpo.py").read_text()
    assert (folder / "images" / "epoch_0000.png").stat().st_size > 1000
    images = read_csv(folder / "images" / "epoch_0002.csv")
    assert [row["prompt"] for row in images] == ["a white cross", "two red circles"]
    for row in images:
        total = 2 * float(row["shapes"]) + 0.1 * float(row["jpeg_compressibility"])
        assert float(row["total"]) == pytest.approx(total, rel=1e-5)
    assert float(rows[2]["eval/total"]) == pytest.approx(sum(float(row["total"]) for row in images) / 2)


def test_refusal_from_the_shell(tmp_path):
    command = [sys.executable, HERE / "grpo.py", "--train.group-size", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr == "error: train.group_size = 1: should be greater than or equal to 2\n"
    assert not list(tmp_path.iterdir())


def test_the_same_command_twice_and_by_its_own_arguments(run):
    options = "--train.kl-beta", 0.04, "--reward", f"{MINE}:noisy=1"
    first = run(*options, name="a")
    again, _ = arguments.parse_args(grpo.Args, "", ["--config", str(first / "args.yaml")])
    assert (first / "args.yaml").read_text() == to_yaml(arguments.repeatable(again))
    first, second = (read_csv(f / "metrics.csv") for f in (first, run(*options, name="b")))
    assert [row | {"seconds": 0} for row in first] == [row | {"seconds": 0} for row in second]
    other = read_csv(run(*options, "--train.seed", 1, name="c") / "metrics.csv")
    assert other[1]["train/contrast"] != first[1]["train/contrast"]
    assert other[0]["eval/total"] == first[0]["eval/total"]  # of the seed of evaluation alone


@pytest.mark.parametrize(
    "options",
    [
        "--train.dynamics-type CPS --train.noise-level 0.8 --train.kl-beta 0.1 --train.kl-type x-based",
        "--finetune-type full --train.kl-beta 0.04 --train.ref-param-device cpu --train.ema-decay 0.9",
        "--train.train-steps 1 2 3 --train.num-train-steps 1 --train.loss-weighting noise-aware",
        "--train.resolution 32 --eval.resolution 64 --train.guidance-scale 2 --train.num-inner-epochs 2",
        "--train.resolution 32 48 --train.global-std",
        "--dtype bfloat16 --train.enable-gradient-checkpointing --train.kl-beta 0.1 --train.kl-type exact",
        "--train.num-train-steps 1 --train.tail-steps 1 --train.loss-weighting noise-aware --train.seed 2",  # 0, then 1
        "--eval.solver DPM-Solver++ --eval.num-inference-steps 3",
        "--train.gradient-step-per-epoch 1",
    ],
)
def test_options(run, options):
    rows = read_csv(run(*options.split()) / "metrics.csv")
    assert len(rows) == 3 and rows[-1]["eval/total"] != ""
    on_policy = [float(row["train/log_ratio"]) == 0 == float(row["train/log_ratio_std"]) for row in rows[1:]]
    assert on_policy == [options == "--train.gradient-step-per-epoch 1"] * 2  # a second update of one is off-policy
    assert (float(rows[1].get("train/kl", 0)) > 0) == ("kl-beta" in options)  # to the base model


@pytest.mark.parametrize(
    "options, calls, plan",
    [
        ("--train.train-steps 0", {4}, "          32"),
        ("--train.train-steps 0 --train.tail-steps 2", {3}, "at most 32"),
        ("--train.train-steps 0 1 --train.num-train-steps 1 --train.tail-steps 3", {2, 3, 4}, "at most 32"),
    ],
)
def test_the_plan_counts_the_calls_of_a_tail(run, tapes, options, calls, plan):  # M5
    log = (run(*options.split(), "--train.max-epochs", 1) / "log.txt").read_text()
    assert "an epoch: 2 x 4 = 8 images, in calls of 4; updates: 2, each over trained steps: 1;" in log
    assert f"{plan} network evaluations to sample, 8 to train" in log
    assert {tape.sigmas[-1].item() for tape in tapes} == {0} and {len(tape.outputs) for tape in tapes} <= calls


@pytest.mark.parametrize("script", [grpo, grpo_guard], ids=["grpo", "guard"])
def test_a_run_with_a_sliding_window(start, tapes, script):  # M4
    options = "--train.max-epochs 3 --train.train-steps 2 0 1 --train.num-train-steps 2 --train.shift-interval 1"
    plan = (start(script, *options.split(), "--train.tail-steps", 2) / "log.txt").read_text()
    assert [list(tape.steps) for tape in tapes] == [[0, 1]] * 2 + [[1, 2]] * 4  # two calls in an epoch
    assert "each over trained steps: 2;" in plan and "at most 32 network" in plan and ", 16 to train" in plan


def test_evaluation_by_the_second_order_solver(make_pipe, call):
    (pipe, _), seen = make_pipe(), []
    keep = lambda images, *_: seen.append(images) or {"total": images.mean((1, 2, 3))}  # noqa: E731
    keep.takes_groups = False
    for solver, tail_steps in zip(dynamics.SOLVERS, (None, 5), strict=True):
        section = EvalArgs(num_inference_steps=5, guidance_scale=1.0, resolution=32, solver=solver, seed=0)
        args = grpo.Args(call={"max_sequence_length": 1}, eval=section)
        evaluation.evaluate(pipe, args, [{"prompt": prompt} for prompt in call()["prompt"]], keep)
        assert torch.equal(seen[-1], common.rollout(pipe, call(), "ODE", 0.0, (), tail_steps=tail_steps).images)
    assert not torch.equal(*seen)


def test_noise_levels_of_ones_own(run):
    short = ("--eval.num-inference-steps", 4, "--train.max-epochs", 0)
    folders = run("--call", "sigmas=[1.0,0.9,0.5,0.2]", *short), run(*short, name="other")
    first, second = (read_csv(folder / "metrics.csv")[0]["eval/total"] for folder in folders)
    assert first != second


@pytest.mark.parametrize("script", [grpo, grpo_guard], ids=["grpo", "guard"])
def test_groups_of_equal_rewards_are_not_replayed(start, monkeypatch, tmp_path, script):
    (tmp_path / "mine.py").write_text(
        "def circles(images, prompts):\n"
        "    return images.mean(dim=(1, 2, 3)) * images.new_tensor(['circle' in p for p in prompts])\n"
    )
    replayed, replay = [], common.replay
    monkeypatch.setattr(script, "replay", lambda p, t, k: replayed.append(t.call["prompt"][0]) or replay(p, t, k))
    argv = f"--reward {tmp_path}/mine.py:circles=1 --train.unique-sample-num-per-epoch 3 --train.max-epochs 1"
    argv = [*argv.split(), "--train.gradient-step-per-epoch", 3]
    folder = start(script, *argv)
    assert replayed[3:] == ["a red circle"] * 3  # after the contract: of 3 calls, of one prompt with three steps each
    assert read_csv(folder / "metrics.csv")[1]["train/zero_std"] == "0.6666666865348816"
    replayed.clear()
    start(script, *argv, "--train.kl-beta", 0.1, name="kl")
    assert replayed.count("a blue square") >= 2 * 3  # the penalty concerns every image


def test_rewards_that_never_differ_are_warned_of(run, tmp_path):
    (tmp_path / "mine.py").write_text("def equal(images, prompts):\n    return images.new_zeros(len(images))\n")
    folder = run("--reward", f"{tmp_path}/mine.py:equal=1")
    assert "\nwarning: no reward differs within its group" in (folder / "log.txt").read_text()


@pytest.mark.parametrize(
    "room, name, spoilt, broken",
    [
        (grpo, "replay", lambda _, tape, k: (0, SimpleNamespace(log_prob=tape.steps[k].log_prob + 1e-7)), "max .log "),
        (grpo, "kl_loss", lambda kind, v, *_: (v.mean() * 0, {}), "KL gradient beside the base model is 0;"),
        (common, "generators", lambda *seeds, make=common.generators: make(*[(0,)] * len(seeds)), "images with "),
        (contract, "ode_difference", lambda *_: 1e-6, "ODE against the plain pipeline is 1e-06;"),
    ],
    ids=["ratio", "kl", "noise", "ode"],
)
def test_a_breach_stops_the_run(run, monkeypatch, tmp_path, room, name, spoilt, broken):
    monkeypatch.setattr(room, name, spoilt)
    with pytest.raises(SystemExit, match=f"error: the first-step contract is broken: {broken}.* nothing was trained"):
        run("--train.kl-beta", 0.04 if name == "kl_loss" else 0)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("BROKEN") == 1 == log.count("\ncontract: ") and "contract holds" not in log


@pytest.mark.parametrize(
    "call, options, said",
    [
        ("max_sequence_length=1000", "", "cannot be greater than 512"),  # the pipeline's own check
        ("max_sequence_length=1.5", "", "TypeError"),
        ("clip_skip=99", "", "IndexError"),
        ("negative_prompt=3", "--train.guidance-scale 3", "TypeError"),  # in epoch 1
        ("negative_prompt=[a,b,c]", "--train.guidance-scale 3", "batch size"),
        (None, "--pipeline FluxPipeline", "AttributeError"),  # not of this model
        (None, "--pipeline StableDiffusion3Img2ImgPipeline", "Input is in incorrect format"),
    ],
)
def test_what_a_pipeline_cannot_do_with_a_call_is_refused_in_its_words(start, tmp_path, ends, call, options, said):
    """At its first call, since only the pipeline knows."""
    message = ends(ending.start, lambda: start(grpo, *(["--call", call] if call else []), *options.split()))
    assert message.startswith("error: call = {'max_sequence_length': " if call else "error: pipeline = '")
    assert said in message and message.count("\n") == 1 and "continue with" not in message
    assert "Traceback" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize("epoch, options", [(1, ["--call", "negative_prompt=x"]), (0, [])], ids=["late", "not given"])
def test_a_fault_in_a_pipeline_that_is_not_the_calls_is_shown_whole(start, monkeypatch, epoch, options):
    """In an evaluation after training, or of a pipeline that was given no more than the model's own."""

    def log_and_spoil(run, now, columns, log=harness_run.Run.log):
        if now == epoch:
            monkeypatch.setattr(StableDiffusion3Pipeline, "encode_prompt", None)
        log(run, now, columns)

    monkeypatch.setattr(harness_run.Run, "log", log_and_spoil)
    with pytest.raises(TypeError, match="not callable") as raised:
        ending.start(lambda: start(grpo, *options))
    assert not hasattr(raised.value, "__notes__")


@pytest.mark.parametrize("begun", [False, True], ids=["help", "run"])
def test_a_closed_stdout_ends_a_script_in_a_line(monkeypatch, tmp_path, begun):
    run = SimpleNamespace(command="a command", folder=tmp_path) if begun else None
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed, pytest.raises(SystemExit) as exit:
        monkeypatch.setattr(sys, "stdout", closed)
        monkeypatch.setattr(ending.Run, "current", run)
        ending.start(lambda: harness_run.Run.print(run, "x") if begun else arguments.parse_args(grpo.Args, "", ["-h"]))
    assert exit.value.code == ("error: nobody reads the output any more; continue with: a command" if begun else 141)


@pytest.mark.parametrize("script", [grpo, grpo_guard, nft], ids=["grpo", "guard", "nft"])
def test_every_column_is_explained(start, script):
    columns = read_csv(start(script, "--train.kl-beta", 0.1) / "metrics.csv")[0]
    own = {re.sub("@.*", "@K", name) for name in columns if not name.startswith(("eval/", "train/reward/"))}
    explained = set(re.findall(r"`([^`]+)`", (HERE / "docs" / "metrics.md").read_text()))
    assert own <= explained, own - explained


def test_what_a_run_leaves_is_as_readable_as_its_folder(tmp_path):
    with atomic_folder(tmp_path / "new") as folder:
        (folder / "weights").touch(mode=0o600)
        folder.chmod(0o750)
    assert (tmp_path / "new" / "weights").stat().st_mode & 0o777 == 0o640


def test_the_last_lines_are_of_the_last_evaluation():
    rows, said = [{"eval/total": 1.0}, {}, {"eval/total": 3.0}, {"eval/total": 2.0, "images": 16}], []
    run = SimpleNamespace(folder="runs/x", rows=rows, args=RunArgs(), print=said.append)
    harness_run.Run.finish(run, None)
    assert said[0].startswith("done: eval/total 1.000 -> 2.000 in 16 images; in runs/x ")


def test_prompts_come_from_seed_and_epoch():
    rows = [f"p{i}" for i in range(10)]
    epochs = [common.epoch_rows(rows, 4, 0, e) for e in range(1, 6)]
    assert sorted(sum(epochs, [])) == sorted(rows * 2)  # each once in every pass
    assert epochs[3] == common.epoch_rows(rows, 4, 0, 4)
    assert epochs != [common.epoch_rows(rows, 4, 1, e) for e in range(1, 6)]
    assert common.epoch_rows(rows, 10, 0, 1) != common.epoch_rows(rows, 10, 0, 2)  # each pass in an order of its own
    assert len(common.epoch_rows(rows, 25, 0, 1)) == 25


def test_snapshots_swap_and_return():
    p = torch.nn.Parameter(torch.ones(3))
    snapshot = common.Snapshot([p])
    with torch.no_grad():
        p += 1
    with pytest.raises(RuntimeError), snapshot.loaded():
        assert p.tolist() == [1, 1, 1]
        raise RuntimeError
    assert p.tolist() == [2, 2, 2]
    snapshot.update(0.75)
    assert snapshot.values[0].tolist() == [1.25] * 3 and snapshot.values[0].data_ptr() != p.data_ptr()


def commands():
    """{what a user types: the page it is on}, also of recipes, and of methods by their flags in the README."""
    found, docs = {}, HERE / "docs"
    for page in (HERE / "README.md", *sorted(docs.rglob("*.md")), *sorted(docs.glob("recipes/*.yaml"))):
        text = page.read_text(encoding="utf-8")
        lines = re.findall(r"^(?:# )?(?:python|torchrun .*?) ((?:grpo|grpo_guard|nft)\.py .+)$", text, re.MULTILINE)
        for script, flags in re.findall(r"^\|[^|]*\| `(\w+\.py)` \|(.*)\|$", text, re.MULTILINE):
            flags = re.findall(r"`(--[^`]+)`", flags)  # the first, and what is added to it
            lines += [" ".join([script, *flags[: i + 1]]) for i in range(len(flags))]
        found |= {line: page for line in lines}
        assert page.suffix == ".md" or any(str(page.relative_to(HERE)) in line for line in lines), page
    pages = [page.name for page in found.values()]
    assert pages.count("README.md") > 10 and len(pages) > 25
    return found


@pytest.mark.parametrize("command", commands())
def test_commands_of_the_pages(tmp_path, monkeypatch, command):
    functions = re.findall(r"my_rewards\.py:(\w+)", command)
    mine = "".join(f"def {name}(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n" for name in functions)
    for name, text in (("my_rewards.py", mine), ("prompts.txt", "a cat"), ("edits.jsonl", '{"prompt": "a cat"}')):
        (tmp_path / name).write_text(text)
        command = command.replace(name, str(tmp_path / name))
    command = command.replace("runs/<", f"{tmp_path}/<").replace("shapes/mine", RunArgs.model)
    monkeypatch.chdir(HERE)
    script, *argv = shlex.split(command, comments=True)
    script = importlib.import_module(script.removesuffix(".py"))
    if "--help" in argv:
        with pytest.raises(SystemExit, match="^0$"):
            arguments.parse_args(script.Args, "", argv)
        return
    if "--resume" in argv:
        begun = Path(argv[argv.index("--resume") + 1])
        begun.mkdir()
        args = arguments.parse_args(script.Args, "", [])[0]
        (begun / "args.yaml").write_text(to_yaml(arguments.repeatable(args)))
        (begun / "environment.yaml").write_text(to_yaml(harness_run._environment(args, script.__file__)))
    args, _ = arguments.parse_args(script.Args, "", argv)
    if args.quantize or args.quantize_text:
        monkeypatch.setattr(checks, "check_machine", lambda args: ())  # that of who reads the page
    if not Path(args.model).is_dir():
        monkeypatch.setattr(checks, "check_model", lambda args: ())  # it would ask the hub
    script.check(args)
