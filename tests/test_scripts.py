"""The scripts as a user meets them: short runs, the run folder, and every refusal."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import SMALL, handlers_kept, read_csv
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

import common
import dynamics
import grpo
import grpo_guard
import nft
import rewards

ROOT = Path(common.__file__).parent


# A whole run


def test_a_run_from_the_shell(tmp_path, prompt_files):
    argv = [*SMALL, *prompt_files, "--output-dir", str(tmp_path), "--run-name", "run", "--train.kl-beta", "0.04"]
    argv += ["--reward", "shapes=1", "jpeg_compressibility=0.1"]
    done = subprocess.run([sys.executable, ROOT / "grpo.py", *argv], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "max |log ratio| before the first update, first call: 0\n" in done.stdout
    assert "KL gradient" in done.stdout and "BROKEN" not in done.stdout
    folder = tmp_path / "run"
    assert (folder / "log.txt").read_text() == done.stdout
    rows = read_csv(folder / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["0", "1", "2"] and [row["images"] for row in rows] == ["0", "8", "16"]
    assert list(rows[0])[:3] == ["epoch", "images", "seconds"] and "eval/total" in rows[0] and "eval/shapes" in rows[0]
    assert rows[0]["eval/total"] != "" and rows[1]["eval/total"] == "" and rows[2]["eval/total"] != ""
    assert rows[0]["train/policy_loss"] == "" and float(rows[1]["train/kl"]) >= 0
    args = yaml.safe_load((folder / "args.yaml").read_text())
    assert args["train"]["kl_beta"] == 0.04 and args["train"]["trainer_type"] == "grpo"
    assert (folder / "grpo.py").read_text() == (ROOT / "grpo.py").read_text()
    assert "torch" in yaml.safe_load((folder / "environment.yaml").read_text())
    assert (folder / "images" / "epoch_0000.png").stat().st_size > 1000
    assert [row["prompt"] for row in read_csv(folder / "images" / "epoch_0002.csv")] == [
        "a white cross",
        "two red circles",
    ]


def test_the_same_command_twice(run):
    first, second = (read_csv(run(name=name) / "metrics.csv") for name in ("a", "b"))
    for row in first + second:
        row.pop("seconds")
    assert first == second
    other = read_csv(run("--train.seed", 1, name="c") / "metrics.csv")
    assert other[1]["train/contrast"] != first[1]["train/contrast"]


@pytest.mark.parametrize(
    "options",
    [
        "--train.dynamics-type Dance-SDE --train.noise-level 0.3 --train.same-init-noise",
        "--train.dynamics-type CPS --train.noise-level 0.8 --train.kl-beta 0.1 --train.kl-type x-based",
        "--finetune-type full --train.kl-beta 0.04 --train.ref-param-device cpu --train.ema-decay 0.9",
        "--train.train-steps 1 2 3 --train.num-train-steps 1 --train.loss-weighting noise-aware",
        "--train.resolution 32 --eval.resolution 64 --train.guidance-scale 2 --train.num-inner-epochs 2",
        "--train.resolution 32 48 --train.global-std",
        "--dtype bfloat16 --train.enable-gradient-checkpointing",
        "--train.num-train-steps 1 --train.tail-steps 1 --train.loss-weighting noise-aware --train.seed 2",  # 0, then 1
        "--eval.solver DPM-Solver++ --eval.num-inference-steps 3",
    ],
)
def test_options(run, options):
    rows = read_csv(run(*options.split()) / "metrics.csv")
    assert len(rows) == 3 and rows[-1]["eval/total"] != ""
    assert float(rows[1]["train/log_ratio"]) != 0  # the second update of an epoch is off-policy


def test_the_plan_counts_the_calls_of_a_tail(run, monkeypatch):  # M5
    plain, tapes = grpo.rollout, []
    monkeypatch.setattr(grpo, "rollout", lambda *args, **known: tapes.append(plain(*args, **known)) or tapes[-1])
    cases = (
        ("--train.train-steps 0", 4, "          32 network"),
        ("--train.train-steps 0 --train.tail-steps 2", 3, "at most 24 network"),
        ("--train.train-steps 0 --train.tail-steps 1", 2, "at most 16 network"),
        ("--train.train-steps 0 1 --train.num-train-steps 1 --train.tail-steps 3", 4, "at most 32 network"),
    )
    for name, (options, calls, plan) in enumerate(cases):
        tapes.clear()
        folder = run(*options.split(), "--train.max-epochs", 1, name=str(name))
        assert plan in (folder / "log.txt").read_text()
        assert max(len(tape.outputs) for tape in tapes) <= calls and {tape.sigmas[-1].item() for tape in tapes} == {0}
        if "num-train-steps" not in options:
            assert {len(tape.outputs) for tape in tapes} == {calls}


@pytest.mark.parametrize("script", [grpo, grpo_guard], ids=["grpo", "guard"])
def test_a_run_with_a_sliding_window(start, monkeypatch, script):  # M4
    plain, noisy = script.rollout, []
    monkeypatch.setattr(script, "rollout", lambda *args, **known: noisy.append(args[4]) or plain(*args, **known))
    options = "--train.max-epochs 3 --train.train-steps 2 0 1 --train.num-train-steps 2 --train.shift-interval 1"
    folder = start(script, *options.split(), "--train.tail-steps", 2)
    assert noisy == [[0, 1]] * 2 + [[1, 2]] * 4  # two calls in an epoch
    plan = (folder / "log.txt").read_text()
    assert "2 updates over 2 steps each" in plan and "at most 32 network" in plan and ", 16 to train" in plan
    assert len(read_csv(folder / "metrics.csv")) == 4


def test_evaluation_by_the_second_order_solver(make_pipe, call):
    pipe, _ = make_pipe()
    prompts = call()["prompt"]
    images = {}
    for solver in dynamics.SOLVERS:
        section = common.EvalArgs(num_inference_steps=5, guidance_scale=1.0, resolution=32, solver=solver)
        args = grpo.Args(call={"max_sequence_length": 1}, eval=section)

        def keep(seen, _, solver=solver):
            images[solver] = seen
            return {"total": seen.mean((1, 2, 3))}

        common.evaluate(pipe, args, prompts, keep)
    request = call()
    del request["generator"]
    plain, solved = (
        common.rollout(pipe, request, "ODE", 0.0, (), common.generators(*((section.seed, i) for i in range(4))), tail)
        for tail in (None, 5)
    )
    assert torch.equal(images["Euler"], plain.images) and torch.equal(images["DPM-Solver++"], solved.images)
    assert not torch.equal(plain.images, solved.images)


def test_the_rows_follow_the_rewards(run):
    rows = read_csv(run("--reward", "shapes=2", "jpeg_incompressibility=0.5") / "metrics.csv")
    last = {key: float(value) for key, value in rows[-1].items() if value}
    total = 2 * last["eval/shapes"] + 0.5 * last["eval/jpeg_incompressibility"]
    assert last["eval/total"] == pytest.approx(total, rel=1e-5)


def test_one_update_per_epoch_is_on_policy(run):
    rows = read_csv(run("--train.gradient-step-per-epoch", 1) / "metrics.csv")
    for row in rows[1:]:
        assert float(row["train/log_ratio"]) == 0 == float(row["train/log_ratio_std"])


def test_a_users_reward(run, tmp_path):
    (tmp_path / "mine.py").write_text("def brightness(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n")
    rows = read_csv(run("--reward", f"{tmp_path}/mine.py:brightness=1") / "metrics.csv")
    assert 0 < float(rows[0]["eval/total"]) < 1


def test_lora_loads_in_plain_diffusers(run, call):
    folder = run("--lora-alpha", 12)  # not the rank
    pipe = StableDiffusion3Pipeline.from_pretrained(common.RunArgs.model, text_encoder_3=None, tokenizer_3=None)
    base = pipe(**call(), output_type="pt").images
    pipe.load_lora_weights(folder / "lora")
    assert pipe.transformer.peft_config["default_0"].lora_alpha == 12
    assert not torch.equal(pipe(**call(), output_type="pt").images, base)


def test_full_weights_load_in_plain_diffusers(run):
    folder = run("--finetune-type", "full")
    pipe = common.load_pipeline(common.RunArgs.model, "cpu", torch.float32)
    trained = type(pipe.transformer).from_pretrained(folder / "transformer")
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), pipe.transformer.parameters(), strict=True))


def test_evaluation_images_are_those_of_plain_diffusers(run, tmp_path):
    folder = run("--finetune-type", "full")
    config = yaml.safe_load((folder / "args.yaml").read_text())["eval"]
    pipe = common.load_pipeline(common.RunArgs.model, "cpu", torch.float32)
    pipe.transformer = type(pipe.transformer).from_pretrained(folder / "transformer")
    seed = config["seed"]
    images = pipe(
        prompt=["a white cross", "two red circles"], height=32, width=32, num_inference_steps=2, guidance_scale=1.0,
        max_sequence_length=1, generator=common.generators((seed, 0), (seed, 1)), output_type="pt",
    ).images  # fmt: skip
    scored = rewards.make_reward({"jpeg_compressibility": 1.0}, "cpu")(images, ["a white cross", "two red circles"])[
        "total"
    ]
    kept = [float(row["total"]) for row in read_csv(folder / "images" / "epoch_0002.csv")]
    assert scored.tolist() == kept


# Refusals: the key, the value and what would do; status 2; nothing loaded, nothing written


REFUSALS = [
    ("--train.dynamics-type ODE", "train.dynamics_type = 'ODE'", "nft.py"),
    ("--train.group-size 1", "train.group_size = 1", "at least 2"),
    ("--train.train-steps 1 9", "train.train_steps = [1, 9]", "from 0 to 3"),
    ("--train.train-steps -1", "train.train_steps = [-1]", "from 0 to 3"),
    ("--train.train-steps 1 1", "train.train_steps = [1, 1]", "different"),
    ("--train.dynamics-type CPS --train.train-steps 3", "train.train_steps = [3]", "CPS has no noise"),
    ("--train.train-steps 1 2 --train.num-train-steps 3", "train.num_train_steps = 3", "must be 1 to 2, or None"),
    ("--train.num-train-steps 0", "train.num_train_steps = 0", "candidate"),
    ("--train.tail-steps 0", "train.tail_steps = 0", "1 to that many"),
    ("--train.tail-steps 2", "train.tail_steps = 2", "step is 2 or later, and after it come at most 1 steps"),
    ("--train.train-steps 2 0 1 --train.num-train-steps 2 --train.tail-steps 3", "train.tail_steps = 3", "at most 2"),
    ("--train.train-steps 3 --train.tail-steps 1", "train.tail_steps = 1", "at most 0 steps"),
    ("--train.num-train-steps 2 --train.shift-interval 0", "train.shift_interval = 0", "at least 1"),
    ("--train.num-train-steps 2 --train.shift-interval -25", "train.shift_interval = -25", "at least 1"),
    ("--train.shift-interval 25", "train.shift_interval = 25", "train.num_train_steps steps, which is None; set that"),
    (
        "--train.num-train-steps 2 --train.shift-interval 1 --train.tail-steps 3",
        "train.tail_steps = 3",
        "step is 1 or later, and after it come at most 2 steps",
    ),
    ("--eval.solver Heun", "--eval.solver", "DPM-Solver++"),
    ("--train.noise-level 0", "train.noise_level = 0.0", "above 0"),
    ("--train.per-device-batch-size 3", "train.per_device_batch_size = 3", "2 would"),
    ("--train.gradient-step-per-epoch 3", "train.gradient_step_per_epoch = 3", "one of [1, 2]"),
    ("--train.resolution 33", "train.resolution = 33", "multiples of 8"),
    ("--eval.resolution 32 4096", "eval.resolution = (32, 4096)", "at most"),
    ("--train.learning-rate -1", "train.learning_rate = -1.0", "at least 0"),
    ("--train.learning-rate nan", "train.learning_rate = nan", "finite"),
    ("--train.num-inner-epochs 0", "train.num_inner_epochs = 0", "at least 1"),
    ("--train.clip-range 0", "train.clip_range = 0.0", "above 0"),
    ("--train.ema-update-interval 0", "train.ema_update_interval = 0", "at least 1"),
    ("--train.seed -1", "train.seed = -1", "at least 0"),
    ("--train.seed 4294967296", "train.seed = 4294967296", "at most 4294967295"),
    ("--cpu-threads 100000000000000", "cpu_threads = 100000000000000", "at most 4096"),
    ("--train.num-inference-steps 1000000000000", "train.num_inference_steps = 1000000000000", "at most 10000"),
    (
        "--train.unique-sample-num-per-epoch 1000000007",
        "train.unique_sample_num_per_epoch = 1000000007",
        "4000000028 images an epoch (x group_size); at most 1000000",
    ),
    (
        "--eval.images-per-prompt 1000000000000",
        "eval.images_per_prompt = 1000000000000",
        "2000000000000 images an evaluation (2 prompts); at most 1000000",
    ),
    ("--train.adam-betas 0.9 1", "train.adam_betas = (0.9, 1.0)", "below 1"),
    ("--train.num-inference-steps 0", "train.num_inference_steps = 0", "at least 1"),
    ("--train.num-inference-steps 1", "train.num_inference_steps = 1", "None is all but the last step, so none"),
    ("--lora-rank 0", "lora_rank = 0", "at least 1"),
    ("--call height=64", "call = 'height=64'", "set by the script"),
    ("--call max_sequence_lenght=1", "call = 'max_sequence_lenght'", "did you mean max_sequence_length?"),
    ("--call prompt_2=a", "call = 'prompt_2=a'", "set by the script"),
    ("--call prompt_embeds=3", "call = 'prompt_embeds'", "takes a tensor or a function"),
    ("--call max_sequence_length=a", "call = 'max_sequence_length=a'", "takes int there"),
    ("--call callback_on_step_end=3", "call = 'callback_on_step_end'", "takes a tensor or a function"),
    ("--call sigmas=3", "call = 'sigmas=3'", "as long as train.num_inference_steps and eval.num_inference_steps"),
    ("--call sigmas=[1.0,0.5]", "call = 'sigmas=[1.0, 0.5]'", "must be a list as long"),  # as those of evaluation
    ("--eval.num-inference-steps 4 --call sigmas=[a,b,c,d]", "sigmas=['a', 'b', 'c', 'd']", "must be numbers above 0"),
    ("--eval.num-inference-steps 4 --call sigmas=[1,1,1,1]", "call = 'sigmas=[1, 1, 1, 1]'", "below the one before it"),
    ("--eval.num-inference-steps 4 --call sigmas=[.2,.5,.7,1]", "sigmas=[0.2, 0.5, 0.7, 1]", "below the one before it"),
    ("--eval.num-inference-steps 4 --call sigmas=[.inf,3,2,1]", "sigmas=[inf, 3, 2, 1]", "below the one before it"),
    (
        "--eval.num-inference-steps 4 --call timesteps=[3,2,1,0]",
        "call = 'timesteps=[3, 2, 1, 0]'",
        "must be numbers above 0",
    ),
    ("--call self=1", "call = 'self'", "takes no such argument"),
    ("--call negative_prompt=2001-99-99", "negative_prompt=2001-99-99", "month must be in 1..12"),
    ("--reward shapes=a", "shapes=a", "is not a number"),
    ("--run-name a/b", "run_name = 'a/b'", "without a path"),
    ("--reward shapes=nan", "reward shapes = nan", "finite"),
    ("--reward shapes=1 shapes=2", "shapes", "given twice"),
    ("--eval.eval-freq 0", "eval.eval_freq = 0", "at least 1"),
    ("--reward shape=1", "reward", "did you mean shapes?"),
    ("--reward nowhere.py:f=1", "reward", "there is no file nowhere.py"),
    ("--reward", "reward", "name at least one"),
    ("--prompts nowhere.txt", "prompts = 'nowhere.txt'", "no such file"),
    ("--eval.prompts nowhere.txt", "eval.prompts = 'nowhere.txt'", "no such file"),
    ("--model nowhere", "model = 'nowhere'", "no diffusers folder"),
    ("--config nowhere.yaml", "--config = 'nowhere.yaml'", "no such file"),
    ("--prompts /dev/null", "prompts = '/dev/null'", "is no file"),
    ("--prompts /tmp", "prompts = '/tmp'", "is a folder"),
    ("--config /tmp", "--config = '/tmp'", "is a folder"),
    ("--resume", "Missing value", "--resume"),
    ("--resume=", "--resume = ''", "names nothing"),
    ("--config=", "--config = ''", "names nothing"),
    (f"--resume {'x' * 300}", "resume = 'xxx", "there is no run"),
    (f"--model {'x' * 300}", "model = 'xxx", "no diffusers folder"),
    ("--device quantum", "device = 'quantum'", "quantum"),
    ("--device meta", "device = 'meta'", "no data"),
    ("--train.dynamics-type Flow-ODE", "--train.dynamics-type", "Flow-SDE"),
    ("--train.trainer-type nft", "--train.trainer-type", "grpo"),
    ("--train.kl-betta 1", "--train.kl-betta", "--train.kl-beta"),
    ("--train.clip-range much", "--train.clip-range", "much"),
]


@pytest.mark.parametrize("options, what, remedy", REFUSALS)
def test_refusals(refused, options, what, remedy):
    message = refused(*options.split())
    assert what in message and remedy in message


def test_a_value_that_has_itself_as_a_part_is_refused(refused):
    assert "Circular reference" in refused("--call", "negative_prompt=&a [*a]")


def test_refusal_from_the_shell(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "grpo.py", "--train.group-size", "1"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and "train.group_size = 1" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "call, options, said",
    [
        ("max_sequence_length=1000", "", "cannot be greater than 512"),  # the pipeline's own check
        ("max_sequence_length=-1", "", "RuntimeError"),
        ("max_sequence_length=1.5", "", "TypeError"),
        ("max_sequence_length=[1]", "", "TypeError"),
        ("clip_skip=99", "", "IndexError"),
        ("joint_attention_kwargs=[1]", "", "AttributeError"),
        ("negative_prompt=3", "--train.guidance-scale 3", "TypeError"),  # in epoch 1
        ("negative_prompt=[a,b,c]", "--train.guidance-scale 3", "batch size"),
    ],
)
def test_what_a_pipeline_cannot_do_with_a_call_is_refused_in_its_words(start, tmp_path, capsys, call, options, said):
    """At its first call, since only the pipeline knows."""
    with handlers_kept(), pytest.raises(SystemExit) as exit:
        common.start(lambda: start(grpo, "--call", call, *options.split()))
    message = capsys.readouterr().err
    assert exit.value.code == 2 and message.startswith("error: call = {'max_sequence_length': ")
    assert said in message and message.count("\n") == 1 and "continue with" not in message
    assert "Traceback" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize("epoch, options", [(1, ["--call", "negative_prompt=x"]), (0, [])], ids=["late", "not given"])
def test_a_fault_in_a_pipeline_that_is_not_the_calls_is_shown_whole(start, monkeypatch, epoch, options):
    """In an evaluation after training, or of a pipeline that was given no more than the model's own."""

    def fail(*_, **__):
        raise RuntimeError("a mistake")

    def log_and_spoil(run, row, log=common.Run.log):
        if row["epoch"] == epoch:
            monkeypatch.setattr(StableDiffusion3Pipeline, "encode_prompt", fail)
        log(run, row)

    monkeypatch.setattr(common.Run, "log", log_and_spoil)
    with handlers_kept(), pytest.raises(RuntimeError, match="a mistake") as raised:
        common.start(lambda: start(grpo, *options))
    assert "continue with" in raised.value.__notes__[0]


def test_every_process_knows_the_rows(monkeypatch):
    """By which it tells whether something was trained."""
    run = SimpleNamespace(started=0, rows=[], skipped=0)
    monkeypatch.setattr(common, "rank", lambda: 1)
    common.Run.log(run, {"epoch": 1, "images": 2})
    assert len(run.rows) == 1


@pytest.mark.parametrize("begun", [False, True], ids=["help", "run"])
def test_a_closed_stdout_ends_a_script_in_a_line(monkeypatch, begun):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed, handlers_kept(), pytest.raises(SystemExit) as exit:
        monkeypatch.setattr(sys, "stdout", closed)
        monkeypatch.setattr(common.Run, "current", SimpleNamespace(command="a command") if begun else None)
        common.start(lambda: common.parse_args(grpo.Args, "", ["--help"]))
    assert exit.value.code == ("error: nobody reads the output any more; continue with: a command" if begun else 141)


@pytest.mark.parametrize("length", [300, 254])
def test_a_name_that_is_too_long_is_refused(start, monkeypatch, capsys, length):
    monkeypatch.setattr(common, "load_pipeline", lambda *_: pytest.fail("went on"))
    with pytest.raises(SystemExit) as exit:
        start(grpo, name="x" * length)
    assert exit.value.code == 2 and "xx: File name too long" in capsys.readouterr().err


def test_the_plan_counts_what_is_one(run):
    argv = ("--train.unique-sample-num-per-epoch", 1, "--train.gradient-step-per-epoch", 1, "--train.max-epochs", 1)
    plan = (run(*argv, "--train.train-steps", 0) / "log.txt").read_text()
    assert "an epoch: 1 prompt x 4 = 4 images in 1 call of 4; 1 update over 1 step;" in plan


@pytest.mark.parametrize(
    "text, what, remedy",
    [
        ("train: {kl_betta: 0.1}", "train.kl_betta", "did you mean train.kl_beta?"),
        ("modell: x", "modell", "did you mean model?"),
        ("learning_rate: 1", "learning_rate", "did you mean train.learning_rate?"),
        ("train: {trainer_type: nft}", "trainer_type = 'nft'", "nft.py"),
        ("train: {trainer_type: [grpo]}", "trainer_type = ['grpo']", "another script"),
        ("resume: runs/other", "resume = 'runs/other'", "give --resume on the command line"),
        ("trainers: {grpo: {config: c.yaml}}", "config = 'c.yaml'", "give --config on the command line"),
        ("train: 3", "train = 3", "mapping"),
        ("train: {group_size: many}", "--train.group-size", "many"),
        ("- 1", "--config", "no mapping"),
        ("trainers: 3", "--config", "no mapping"),
        ("trainers: {grpo: 3}", "--config", "no mapping"),
        ("a: [", "--config", "not a YAML file"),
        ("reward: &r {shapes: *r}", "--config", "Circular reference"),
        ("train: &t {seed: *t}", "--config", "Circular reference"),
        ("run_name: 2001-99-99", "--config", "month must be in 1..12"),
        ("output_dir: null", "output_dir = None", "cannot be null"),
        ("target_modules: null", "target_modules = None", "cannot be null"),
        ("train: {seed: null}", "train.seed = None", "cannot be null"),
    ],
)
def test_refusals_of_a_yaml(refused, tmp_path, text, what, remedy):
    (tmp_path / "bad.yaml").write_text(text)
    message = refused("--config", tmp_path / "bad.yaml")
    assert what in message and remedy in message and "unicode string" not in message


@pytest.mark.parametrize(
    "text, what, remedy",
    [
        ("prompts: 3", "model/3' (from ", "no such file"),
        ("resume: runs/other", "resume = 'runs/other'", "give --resume on the command line"),
    ],
)
def test_refusals_of_a_models_defaults(tmp_path, capsys, text, what, remedy):
    model = shutil.copytree(common.RunArgs.model, tmp_path / "model")
    lines = (model / "defaults.yaml").read_text()
    (model / "defaults.yaml").write_text(lines.replace("prompts: ../prompts/train.txt", text))
    with pytest.raises(SystemExit) as exit:
        grpo.check(common.parse_args(grpo.Args, "", ["--model", str(model)])[0])
    message = capsys.readouterr().err
    assert exit.value.code == 2 and what in message and remedy in message


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 1000)], ids=["missing", "cut"])
@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_weights_that_do_not_load_are_refused(tmp_path, capsys, part, damage):
    model = shutil.copytree(common.RunArgs.model, tmp_path / "model")
    damage(next((model / part).glob("*.safetensors")))
    with pytest.raises(SystemExit) as exit:
        common.load_pipeline(str(model), "cpu", torch.float32)
    assert exit.value.code == 2 and f"error: model = {str(model)!r}: does not load: " in capsys.readouterr().err


def test_a_reward_file_that_exits_is_refused(refused, tmp_path):
    (tmp_path / "mine.py").write_text("import sys\nsys.exit(3)\n")
    assert "mine.py does not load: SystemExit: 3" in refused("--reward", f"{tmp_path}/mine.py:brightness=1")


def test_an_empty_prompt_file_is_refused(refused, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    assert "holds no prompt" in refused("--prompts", tmp_path / "empty.txt")


def test_prompts_that_a_reward_cannot_score_are_refused(refused, tmp_path):
    (tmp_path / "other.txt").write_text("a red circle\nan astronaut on a horse\n")
    message = refused("--prompts", tmp_path / "other.txt", "--reward", "shapes=1")
    assert "'an astronaut on a horse' is outside the grammar" in message


def test_a_refusal_names_the_file_that_set_the_value(refused, tmp_path):
    (tmp_path / "c.yaml").write_text("train: {max_grad_norm: -1}")
    assert f"train.max_grad_norm = -1.0 (from {tmp_path}/c.yaml)" in refused("--config", tmp_path / "c.yaml")


def test_an_existing_run_is_refused(refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").touch()
    assert "already holds a run" in refused()


def test_a_refused_start_leaves_its_name_free(start, tmp_path):
    for options in ("--target-modules nothing", "--reward vlm=1 --reward-options vlm.url=http://127.0.0.1:9"):
        with pytest.raises(SystemExit):
            start(grpo, *options.split())
    assert (tmp_path / "run" / "log.txt").read_text().count("grpo.py -> ") == 2
    (tmp_path / "run" / "mine.txt").touch()
    folder = start(grpo, "--train.max-epochs", 1)
    assert len(read_csv(folder / "metrics.csv")) == 2 and (folder / "mine.txt").exists()
    assert yaml.safe_load((folder / "args.yaml").read_text())["reward"] == {"jpeg_compressibility": 1.0}


@pytest.mark.parametrize("made", ["metrics.csv", "images/epoch_0000.png", "checkpoints/", "lora/", "failed_reward/"])
def test_what_a_start_has_made_is_kept(refused, tmp_path, made):
    for path in (tmp_path / "run" / "images", tmp_path / "run" / made if made.endswith("/") else tmp_path):
        path.mkdir(parents=True, exist_ok=True)
    for file in ("environment.yaml", *([] if made.endswith("/") else [made])):
        (tmp_path / "run" / file).touch()
    assert "already holds a run" in refused()


def test_runs_that_start_together_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(common.time, "strftime", lambda *_: "grpo-now")
    args = grpo.Args(output_dir=str(tmp_path / "runs"))
    with common.ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: common._new_folder(args, "grpo.py"), range(8)))
    names = {"grpo-now", *(f"grpo-now-{i}" for i in range(2, 9))}
    assert {folder.name for folder in folders} == names == {path.name for path in (tmp_path / "runs").iterdir()}


def test_an_output_dir_that_cannot_be_made_is_refused(tmp_path, prompt_files, monkeypatch, capsys):
    (tmp_path / "file").touch()
    for name in ([], ["--run-name", "run"]):
        monkeypatch.setattr(sys, "argv", ["grpo.py", *SMALL, *prompt_files, "--output-dir", f"{tmp_path}/file", *name])
        with pytest.raises(SystemExit) as exit:
            grpo.main()
        assert exit.value.code == 2 and "output_dir = " in capsys.readouterr().err


def test_a_missing_package_is_refused(refused, monkeypatch):
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None)
    assert "pip install wandb" in refused("--track")
    assert "pip install tensorboard" in refused("--tensorboard")


def test_a_model_without_a_flow_is_refused(refused, tmp_path):
    (tmp_path / "other").mkdir()
    index = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "DDIMScheduler"]}
    (tmp_path / "other" / "model_index.json").write_text(json.dumps(index))
    assert "DDIMScheduler" in refused("--model", tmp_path / "other")


@pytest.mark.parametrize(
    "index, remedy",
    [
        ("[]", "its model_index.json, or a config.json in it, is not diffusers'"),
        ('{"_class_name": "StableDiffusion3Pipeline", "scheduler": 3}', "its model_index.json, or a config.json in it"),
        ('{"_class_name": "NoPipeline"', "its model_index.json names the class 'NoPipeline', which is no pipeline"),
        (
            '{"_class_name": "AutoencoderKL"',
            "its model_index.json names the class 'AutoencoderKL', which is no pipeline",
        ),
        ('{"name": "x"', "its model_index.json names the class None"),
    ],
)
def test_an_index_that_is_none_is_refused(refused, tmp_path, index, remedy):
    model = shutil.copytree(common.RunArgs.model, tmp_path / "model")
    rest = (model / "model_index.json").read_text().partition(",")[2]
    (model / "model_index.json").write_text(index if index.endswith(("]", "}")) else f"{index},{rest}")
    assert f"error: model = '{model}': {remedy}" in refused("--model", model)


# Settings come in four layers


def test_precedence(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "defaults.yaml").write_text(
        "prompts: p.txt\ncall: {a: 1}\ntrain: {group_size: 4, learning_rate: 5e-5, train_steps: [1, 2]}\n"
        "trainers: {grpo: {train: {noise_level: 0.5}}, nft: {train: {noise_level: 0.1}}}\n"
    )
    (tmp_path / "c.yaml").write_text(
        "train: {group_size: 6, global_std: true, resolution: [32, 48], train_steps: null}"
    )
    argv = [
        "--model",
        str(model),
        "--config",
        str(tmp_path / "c.yaml"),
        "--train.kl-beta",
        "0",
        "--call",
        "b=two words",
    ]
    args, sources = common.parse_args(grpo.Args, "", argv)
    train = args.train
    assert (train.group_size, train.learning_rate, train.noise_level, train.kl_beta) == (6, 5e-5, 0.5, 0)
    assert train.global_std is True and train.resolution == (32, 48) and train.train_steps is None
    assert args.call == {"a": 1, "b": "two words"} and Path(args.prompts).resolve() == (model / "p.txt").resolve()
    assert sources["train.group_size"] == (6, str(tmp_path / "c.yaml")) and "train.seed" not in sources
    assert sources["train.noise_level"][1].endswith("defaults.yaml")


def test_exponents_make_numbers(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "reward: {shapes: 1e-1}\nreward_options: {a.b: 1E+1}\ncall: {a: -.5e1, b: '1e-1', c: 1e, d: 5.e2}\n"
        "train: {learning_rate: 1e-4}"
    )
    argv = ["--config", str(tmp_path / "c.yaml"), "--call", "e=1e1", "f=1.0", "g=1e-7x"]
    args, _ = common.parse_args(grpo.Args, "", argv)
    assert args.reward == {"shapes": 0.1} and args.train.learning_rate == 1e-4
    assert args.reward_options == {"a.b": 10.0}
    values = {"a": -5.0, "b": "1e-1", "c": "1e", "d": 500.0, "e": 10.0, "f": 1.0, "g": "1e-7x"}
    assert {key: args.call[key] for key in values} == values
    assert yaml.safe_load(yaml.safe_dump(values)) == values


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "c.yaml").write_text("lora_rank: 3", encoding="utf-8-sig")
    (tmp_path / "p.txt").write_text("a red circle\n", encoding="utf-8-sig")
    assert common.parse_args(grpo.Args, "", ["--config", str(tmp_path / "c.yaml")])[0].lora_rank == 3
    assert common.read_prompts(tmp_path / "p.txt") == ["a red circle"]


def test_noise_levels_of_ones_own(run):
    folder = run("--call", "sigmas=[1.0,0.9,0.5,0.2]", "--eval.num-inference-steps", 4, "--train.max-epochs", 1)
    other = run("--eval.num-inference-steps", 4, "--train.max-epochs", 1, name="other")
    first, second = (read_csv(path / "metrics.csv")[0]["eval/total"] for path in (folder, other))
    assert first != second


def test_a_runs_own_arguments_repeat_it(run):
    folder = run("--train.kl-beta", 0.04)
    again, _ = common.parse_args(grpo.Args, "", ["--config", str(folder / "args.yaml")])
    again.config = None
    assert yaml.safe_load((folder / "args.yaml").read_text()) == common._plain(common.dataclasses.asdict(again))


# The contract


@pytest.mark.parametrize("breach", ["ratio", "kl", "noise", "ode"])
def test_a_breach_stops_the_run(run, monkeypatch, breach):
    if breach == "ratio":
        replay = common.replay
        monkeypatch.setattr(
            grpo, "replay", lambda *a: (lambda v, s: (v, s._replace(log_prob=s.log_prob + 1e-7)))(*replay(*a))
        )
    elif breach == "kl":
        monkeypatch.setattr(grpo, "kl_loss", lambda kind, v, *_: (v.mean() * 0, {}))
    elif breach == "noise":
        monkeypatch.setattr(grpo, "generators", lambda *seeds: common.generators(*[(0,)] * len(seeds)))
    else:
        monkeypatch.setattr(common, "ode_difference", lambda *_: 1e-6)
    with pytest.raises(SystemExit, match="contract is broken"):
        run("--train.kl-beta", 0.04)


# Rewards


@pytest.mark.parametrize(
    "body, complaint",
    [
        ("images.mean()", "returned shape"),
        ("images.mean(dim=(1, 2, 3))[:, None]", "returned shape"),
        ("images.mean(dim=(1, 2, 3)) / 0", "returned inf for image 0"),
    ],
)
def test_a_wrong_reward_is_named(tmp_path, body, complaint):
    (tmp_path / "mine.py").write_text(f"def bad(images, prompts):\n    return {body}\n")
    reward = rewards.make_reward({f"{tmp_path}/mine.py:bad": 1.0}, "cpu")
    with pytest.raises(ValueError, match=complaint) as error:
        reward(torch.rand(3, 3, 8, 8), ["a"] * 3)
    assert "mine.py:bad" in str(error.value)


def test_a_reward_that_raises_is_named(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def bad(images, prompts):\n    return images[99]\n")
    with pytest.raises(SystemExit, match="mine.py:bad' failed: IndexError"):
        rewards.make_reward({f"{tmp_path}/mine.py:bad": 1.0}, "cpu")(torch.rand(3, 3, 8, 8), ["a"] * 3)
    assert "return images[99]" in capsys.readouterr().err


def test_a_reward_file_is_loaded_once(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nprint('loaded')\n"
        "@dataclass\nclass A:\n    b: int\ndef one(i, p):\n    return i.mean((1, 2, 3))\n"
        "def two(i, p):\n    return one(i, p)\n"
    )
    reward = rewards.make_reward({f"{tmp_path}/mine.py:one": 1.0, f"{tmp_path}/mine.py:two": 1.0}, "cpu")
    assert reward(torch.ones(2, 3, 8, 8), ["a"] * 2)["total"].tolist() == [2, 2]
    assert (
        rewards.find_reward(f"{tmp_path}/mine.py:one")("cpu").__globals__
        is rewards.find_reward(f"{tmp_path}/mine.py:two")("cpu").__globals__
    )


def test_jpeg_rewards():
    flat, noisy = torch.full((1, 3, 32, 32), 0.5), torch.rand(1, 3, 32, 32)
    reward = rewards.make_reward({"jpeg_compressibility": 1.0, "jpeg_incompressibility": 3.0}, "cpu")
    value = reward(torch.cat([flat, noisy]), ["", ""])
    assert value["jpeg_compressibility"][0] > value["jpeg_compressibility"][1]
    assert torch.equal(value["jpeg_compressibility"], -value["jpeg_incompressibility"])
    assert torch.allclose(value["total"], value["jpeg_compressibility"] + 3 * value["jpeg_incompressibility"])


# Prompts and parameter sets


def test_prompts_come_from_seed_and_epoch():
    prompts = [f"p{i}" for i in range(10)]
    epochs = [common.epoch_prompts(prompts, 4, seed=0, epoch=e) for e in range(1, 6)]
    assert sorted(p for epoch in epochs for p in epoch) == sorted(prompts * 2)  # each once in every pass
    assert epochs[3] == common.epoch_prompts(prompts, 4, seed=0, epoch=4)
    assert epochs != [common.epoch_prompts(prompts, 4, seed=1, epoch=e) for e in range(1, 6)]
    assert len(common.epoch_prompts(prompts, 25, seed=0, epoch=1)) == 25


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


def test_components_absent_from_the_index_are_passed_as_none():
    assert DiffusionPipeline.load_config(common.RunArgs.model)["text_encoder_3"] == [None, None]
    assert common.load_pipeline(common.RunArgs.model, "cpu", torch.float32).text_encoder_3 is None


def test_a_run_is_no_model_and_is_told_so(refused, tmp_path):
    (tmp_path / "args.yaml").touch()
    assert "a run's folder" in refused("--model", tmp_path)


def test_rewards_that_never_differ_are_warned_of(run, tmp_path):
    (tmp_path / "mine.py").write_text("def equal(images, prompts):\n    return images.new_zeros(len(images))\n")
    log = (run("--reward", f"{tmp_path}/mine.py:equal=1", name="equal") / "log.txt").read_text()
    assert "rewards are all equal (no signal), of 2: 2\nwarning: no reward differs" in log
    assert "warning" not in (run(name="other") / "log.txt").read_text()


@pytest.mark.parametrize("script", [grpo, grpo_guard, nft], ids=["grpo", "guard", "nft"])
def test_every_column_is_explained(start, script):
    columns = read_csv(start(script, "--train.kl-beta", 0.1) / "metrics.csv")[0]
    own = {re.sub("@.*", "@K", name) for name in columns if not name.startswith(("eval/", "train/reward/"))}
    explained = set(re.findall(r"`([^`]+)`", (ROOT / "docs" / "metrics.md").read_text()))
    assert own <= explained, own - explained


def test_what_a_run_leaves_is_as_readable_as_its_folder(tmp_path):
    with common.whole(tmp_path / "new") as folder:
        (folder / "weights").touch(mode=0o600)
        folder.chmod(0o750)
    assert (tmp_path / "new" / "weights").stat().st_mode & 0o777 == 0o640


# The README


def readme_commands():
    text = (ROOT / "README.md").read_text()
    return [line for line in text.splitlines() if line.startswith("python ") and "--" in line and "pytest" not in line]


def test_the_readme_has_commands():
    assert len(readme_commands()) > 8


@pytest.mark.parametrize("command", readme_commands())
def test_commands_of_the_readme(tmp_path, monkeypatch, command):
    for name in ("prompts.txt", "my_rewards.py"):
        (tmp_path / name).write_text("def brightness(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n")
    _, script, *argv = shlex.split(command, comments=True)
    script = importlib.import_module(script.removesuffix(".py"))
    monkeypatch.chdir(tmp_path)
    if "shapes/mine" in argv:
        shutil.copytree(Path(common.RunArgs.model).parent / "prompts", tmp_path / "shapes" / "prompts")
        (tmp_path / "shapes" / "mine").symlink_to(common.RunArgs.model)
    if "--resume" in argv:
        begun = tmp_path / argv[argv.index("--resume") + 1]
        begun.mkdir(parents=True)
        args = common.parse_args(script.Args, "", [])[0]
        (begun / "args.yaml").write_text(yaml.safe_dump(common._settings(args)))
        (begun / "environment.yaml").write_text(yaml.safe_dump(common._environment(args, script.__file__)))
    if "/" in command.partition("--model")[2]:
        monkeypatch.setattr(common, "check_model", lambda args: None)  # it would ask the hub
    if "--help" in argv:
        with pytest.raises(SystemExit) as exit:
            common.parse_args(script.Args, "", argv)
        assert exit.value.code == 0
    else:
        script.check(common.parse_args(script.Args, "", argv)[0])


@pytest.mark.parametrize("script", [grpo, grpo_guard], ids=["grpo", "guard"])
def test_groups_of_equal_rewards_are_not_replayed(start, monkeypatch, tmp_path, script):
    (tmp_path / "mine.py").write_text(
        "def circles(images, prompts):\n"
        "    return images.mean(dim=(1, 2, 3)) * images.new_tensor(['circle' in p for p in prompts])\n"
    )
    replayed, replay = [], script.replay

    def counted(pipe, tape, k):
        replayed.append(tape.call["prompt"][0])
        return replay(pipe, tape, k)

    monkeypatch.setattr(script, "replay", counted)
    reward = ["--reward", f"{tmp_path}/mine.py:circles=1", "--train.unique-sample-num-per-epoch", 3]
    folder = start(script, *reward, "--train.gradient-step-per-epoch", 3, "--train.max-epochs", 1)
    # after the contract: of three calls, each of one prompt, with three steps each
    assert replayed[3:] == ["a red circle"] * 3
    assert read_csv(folder / "metrics.csv")[1]["train/zero_std"] == "0.6666666865348816"
    replayed.clear()
    start(
        script,
        *reward,
        "--train.kl-beta",
        0.1,
        "--train.max-epochs",
        1,
        "--train.gradient-step-per-epoch",
        3,
        name="kl",
    )
    assert replayed.count("a blue square") >= 2 * 3  # the penalty concerns every image
