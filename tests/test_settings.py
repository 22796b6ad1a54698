"""Settings: four layers, YAML, and every refusal: the key, the value, what would do; status 2, nothing is loaded."""

import importlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from conftest import read_csv

import common
import grpo
import nft
from harness import arguments, checks, fields, machine
from harness import run as harness_run
from harness.fields import to_yaml
from harness.settings import HERE, RunArgs


def parse(*argv, Args=grpo.Args):
    return arguments.parse_args(Args, "", [*map(str, argv)])


@pytest.fixture
def config(tmp_path):
    """Write a --config; returns the two words that name it."""
    path = tmp_path / "c.yaml"
    return lambda text, encoding=None: path.write_text(text, encoding) and ("--config", str(path))


@pytest.fixture
def model(tmp_path):
    """A copy of the embedded model without its weights."""
    return shutil.copytree(RunArgs.model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))


def test_precedence(tmp_path, config):
    """The script < the model's defaults.yaml < --config < the command line."""
    (tmp_path / "defaults.yaml").write_text(
        "prompts: p.txt\ncall: {a: 1}\ntrain: {group_size: 4, learning_rate: 5e-5, train_steps: [1, 2]}\n"
        "trainers: {grpo: {call: {c: 3}, train: {noise_level: 0.5}}, nft: {train: {noise_level: 0.1}}}\n"
    )
    text = "train: {group_size: 6, global_std: true, resolution: [32, 48], train_steps: null}\nreward: {mine.py:f: 1}"
    args, said = parse("--model", tmp_path, *config(text), "--train.kl-beta", 0, "--call", "b=two words")
    train = args.train
    assert (train.group_size, train.learning_rate, train.noise_level, train.kl_beta) == (6, 5e-5, 0.5, 0)
    assert train.global_std is True and train.resolution == (32, 48) and train.train_steps is None
    assert args.call == {"a": 1, "c": 3, "b": "two words"} and Path(args.prompts).resolve() == tmp_path / "p.txt"
    assert said == [
        f"from {os.path.relpath(tmp_path / 'defaults.yaml')}: 3 settings; all are in args.yaml",
        f"from {tmp_path}/c.yaml: train.group_size 6, train.train_steps None, train.global_std True, "
        "train.resolution (32, 48), reward {'mine.py:f': 1.0}",
        f"from you: call {{'a': 1, 'c': 3, 'b': 'two words'}}, model {tmp_path}, train.kl_beta 0.0",
        f"note: {tmp_path}/c.yaml names rewards of mine.py, whose code will run",
    ]


def test_exponents_make_numbers_and_a_byte_order_mark_is_no_text(config):
    text = (
        "reward: {shapes: 1e-1}\nreward_options: {a.b: 1E+1}\ncall: {a: -.5e1, b: '1e-1', c: 1e, d: 5.e2}\n"
        "train: {learning_rate: 1e-4}"
    )
    args, _ = parse(*config(text, "utf-8-sig"), "--call", "e=1e1", "f=1.0", "g=1e-7x")
    assert args.reward == {"shapes": 0.1} and args.train.learning_rate == 1e-4 and args.reward_options == {"a.b": 10.0}
    values = {"a": -5.0, "b": "1e-1", "c": "1e", "d": 500.0, "e": 10.0, "f": 1.0, "g": "1e-7x"}
    assert {key: args.call[key] for key in values} == values
    assert fields.from_yaml(to_yaml(values)) == values


def test_a_copied_script_is_told_what_it_lost_or_keeps_it(tmp_path, monkeypatch, config, ends):
    source, argv = (HERE / "grpo.py").read_text(), config("train: {trainer_type: grpo, seed: 3}")
    source = source.replace("    clip_range: Positive", "    clip: Positive")
    for name, types in (("alone", '"mine"'), ("with_grpo", '"mine", "grpo"')):
        (tmp_path / f"{name}.py").write_text(source.replace('["grpo"] = "grpo"', f'[{types}] = "mine"'))
    monkeypatch.syspath_prepend(tmp_path)
    alone, with_grpo = (importlib.import_module(name).Args for name in ("alone", "with_grpo"))
    args, said = parse(Args=alone)
    lost = ", grpo-guard: train.train_steps train.num_train_steps train.learning_rate train.clip_range, nft: "
    assert args.train.train_steps is None and lost in said[0] and "none for 'mine'" in said[0] and "\n" not in said[0]
    assert "trainer_type: Literal['mine', 'grpo'] in the script takes one's" in said[0]
    refused = ends(lambda: parse(*argv, Args=alone))
    assert "train.trainer_type = 'grpo'" in refused and "this script is the trainer 'mine'" in refused
    wrong = (HERE / "grpo.py").read_text().replace("noise_level: Positive = 0.7", "noise_level: Positive = -0.7")
    (tmp_path / "wrong.py").write_text(wrong)
    refused = ends(lambda: parse(Args=importlib.import_module("wrong").Args))
    assert "train.noise_level = -0.7: should be greater than 0" in refused
    args, said = parse(*argv, Args=with_grpo)
    assert args.train.train_steps == [3, 4, 5] and args.train.seed == 3 and args.train.trainer_type == "mine"
    assert "sets train.clip_range for grpo, which this script does not have" in said[0] and "none for" not in str(said)


# Types and bounds: what no field takes, from a YAML file

FIELDS = {**fields.flatten(nft.Args()), **fields.flatten(grpo.Args())}
FLOATS = " ".join(key for key, value in FIELDS.items() if type(value) is float)
SWITCHES = " ".join(key for key, value in FIELDS.items() if type(value) is bool)
OTHERS = " ".join(FIELDS.keys() - {*SWITCHES.split(), "train.trainer_type", "config", "resume"})
AT_LEAST, AT_MOST = "should be greater than or equal to", "should be less than or equal to"
NOT_TAKEN = [
    ("0", f"{AT_LEAST} 1", "cpu_threads lora_rank checkpoint_freq keep_checkpoints train.num_inference_steps "
    "train.per_device_batch_size train.unique_sample_num_per_epoch train.num_inner_epochs train.ema_update_interval "
    "train.resolution eval.num_inference_steps eval.per_device_batch_size eval.images_per_prompt eval.eval_freq"),
    ("1", f"{AT_LEAST} 2", "train.group_size"),
    ("-1", f"{AT_LEAST} 0", "train.max_epochs train.learning_rate train.kl_beta train.ema_decay eval.seed train.seed "
    "train.guidance_scale train.adam_epsilon train.adam_weight_decay train.old_decay_start train.old_decay_slope "
    "train.old_decay_max train.shift_interval eval.guidance_scale"),
    ("0", "should be greater than 0", "lora_alpha train.clip_range train.adv_clip_range train.max_grad_norm "
    "train.noise_level train.nft_beta"),
    ("1", "should be less than 1", "train.ema_decay train.old_decay_max"),
    ("[0.9, 1]", "should be less than 1", "train.adam_betas"),
    ("[-0.1, 0.9]", f"{AT_LEAST} 0", "train.adam_betas"),
    ("[0, 32]", f"{AT_LEAST} 1", "eval.resolution"),
    ("4294967296", f"{AT_MOST} 4294967295", "train.seed eval.seed"),
    ("100001", f"{AT_MOST} 100000", "train.unique_sample_num_per_epoch"),
    ("10001", f"{AT_MOST} 10000", "lora_rank train.num_inference_steps train.num_inner_epochs "
    "eval.num_inference_steps eval.images_per_prompt"),
    ("4097", f"{AT_MOST} 4096", "cpu_threads"),
    ("1001", f"{AT_MOST} 1000", "train.group_size"),
    (".nan", "should be a finite number", FLOATS),
    (".inf", "should be a finite number", FLOATS),
    ("{shapes: 1, ocr: .nan}", "ocr should be a finite number", "reward eval.reward"),
    ("1", "true and false are for on-off", SWITCHES),
    ("true", "", OTHERS),
    ("{shapes: true}", "true and false are for on-off", "reward eval.reward"),
    ("[1, true]", "true and false are for on-off", "train.train_steps train.resolution"),
    ("null", "should be a valid string", "output_dir"),
    ("{shapes: null}", "shapes should be a valid number", "reward eval.reward"),
    ("many", "should be a valid integer", "train.group_size"),
]  # fmt: skip


@pytest.mark.parametrize("value, words, keys", NOT_TAKEN)
def test_what_no_field_takes(value, words, keys, config, ends):
    assert keys
    for key in keys.split():
        *section, name = key.split(".")
        argv = config(f"{section[0]}: {{{name}: {value}}}" if section else f"{name}: {value}")
        said = ends(lambda: parse(*argv, Args=grpo.Args if key in fields.flatten(grpo.Args()) else nft.Args))  # noqa: B023
        assert said.startswith(f"error: {key} = {yaml.safe_load(value)!r} (from {argv[1]}): {words}"), said
        assert said.count("\n") == 1


LEVELS = ["3", "[1.0,0.5]", "[a,b,c,d]", "[1,1,1,1]", "[.inf,3,2,1]", "[.8,.6,.4,.2]", "[30,20,10,5]", "[1,.5,.2,0]"]
FALLING = "must be numbers, as many as train and eval have steps, falling from near"
REFUSALS = [
    *((f"--eval.num-inference-steps 4 --call sigmas={levels}", "call = ", f"{FALLING} 1 to > 0") for levels in LEVELS),
    ("--eval.num-inference-steps 4 --call timesteps=[1000,500,200,0]", "call = ", f"{FALLING} 1000 to > 0"),
    ("--train.dynamics-type ODE", "train.dynamics_type = 'ODE'", "nft.py"),
    ("--train.train-steps 1 9", "train.train_steps = [1, 9]", "different indices from 0 to 3"),
    ("--train.train-steps 1 1", "train.train_steps = [1, 1]", "different indices from 0 to 3"),
    ("--train.num-inference-steps 1", "train.train_steps = None", "from 0 to 0; None: all below"),
    ("--train.dynamics-type CPS --train.train-steps 3", "train.train_steps = [3]", "CPS has no noise"),
    ("--train.dynamics-type CPS --train.noise-level 1.1", "train.noise_level = 1.1", "CPS takes at most 1"),
    ("--train.train-steps 1 2 --train.num-train-steps 3", "train.num_train_steps = 3", "must be 1 to 2, or None"),
    ("--train.tail-steps 0", "train.tail_steps = 0", "1 to that many"),
    ("--train.tail-steps 2", "train.tail_steps = 2", "step is 2 or later, and after it come at most 1 steps"),
    ("--train.train-steps 2 0 1 --train.num-train-steps 2 --train.tail-steps 3", "train.tail_steps = 3", "at most 2"),
    ("--train.sde-steps all --train.train-steps 0 --train.tail-steps 2", "train.tail_steps = 2", "come at most 1"),
    ("--train.shift-interval 25", "train.shift_interval = 25", "train.num_train_steps steps, which is None; set that"),
    ("--train.per-device-batch-size 3", "train.per_device_batch_size = 3", "2 would"),
    ("--train.gradient-step-per-epoch 3", "train.gradient_step_per_epoch = 3", "one of [1, 2]"),
    ("--train.resolution 33", "train.resolution = 33", "multiples of 8"),
    ("--eval.resolution 32 4096", "eval.resolution = (32, 4096)", "at most"),
    ("--call max_sequence_lenght=1", "call = 'max_sequence_lenght=1'", "did you mean max_sequence_length?"),
    ("--call foo=1", "takes no such argument", "help(diffusers.StableDiffusion3Pipeline.__call__) has all"),
    ("--call prompt_2=a", "call = 'prompt_2=a'", "set by the script"),
    ("--call prompt_embeds=3", "call = 'prompt_embeds=3'", "takes a tensor or a function"),
    ("--call callback_on_step_end=3", "call = 'callback_on_step_end=3'", "takes a tensor or a function"),
    ("--call max_sequence_length=a", "call = 'max_sequence_length=a'", "takes int there"),
    ("--call self=1", "call = 'self=1'", "takes no such argument"),
    ("--call negative_prompt=[&a,*a]", "'[&a,*a]' is not YAML", "found an alias, *a;"),
    ("--call negative_prompt=2001-99-99", "--call: '2001-99-99' is not YAML", "month must be in 1..12"),
    ("--reward shapes=a", "reward = {'shapes': 'a'}", "should be a valid number"),
    ("--eval.reward ocr=1 shapes=inf", "eval.reward = {'ocr': 1, 'shapes': 'inf'}", "shapes should be a finite number"),
    ("--reward shapes=1 shapes=2", "shapes", "given twice"),
    ("--reward shape=1", "reward = {'shape': 1.0}: no reward 'shape'", "did you mean shapes?"),
    ("--eval.reward shape=1", "eval.reward = {'shape': 1.0}: no reward 'shape'", "did you mean shapes?"),
    ("--reward nowhere.py:f=1", "reward", "there is no file nowhere.py"),
    ("--reward", "reward", "name at least one"),
    ("--run-name a/b", "run_name = 'a/b'", "without a path"),
    (f"--output-dir {os.fsdecode(b'a%c' % 255)}", r"output_dir = 'a\udcff'", "should be a valid string"),
    ("--prompts /dev/null", "prompts = '/dev/null'", "is a folder or a device"),
    ("--prompts /tmp", "prompts = '/tmp'", "is a folder"),
    ("--shard --finetune-type full", "shard = True", "is for full fine-tuning in several processes: torchrun"),
    ("--eval.prompts nowhere.txt", "eval.prompts = 'nowhere.txt'", "No such file"),
    (f"--model {'x' * 300}", "model = 'xxx", "no diffusers folder"),
    ("--pipeline AutoencoderKL", "pipeline = 'AutoencoderKL'", "is no pipeline of diffusers"),
    ("--config nowhere.yaml", "--config = 'nowhere.yaml'", "No such file"),
    ("--resume", "Missing value", "--resume"),
    ("--resume=", "resume = ''", "should match pattern"),
    ("--config=", "--config = ''", "is a folder or a device"),
    (
        "--train.group-size 1000 --train.unique-sample-num-per-epoch 9999",
        "train.unique_sample_num_per_epoch = 9999",
        "makes 9999000 images an epoch",
    ),
    ("--eval.images-per-prompt 10000 --eval.prompts shapes/prompts/train.txt", "per_prompt = 10000: makes ", " images"),
    (f"--resume {'x' * 300}", "resume = 'xxx", "there is no run"),
    ("--lora nowhere", "lora = 'nowhere'", "no .safetensors file of adapters"),
    (f"--lora {__file__}", "lora = '/", "no .safetensors file of adapters"),
    ("--device quantum", "device = 'quantum'", "quantum"),
    ("--device meta", "device = 'meta'", "no data"),
    ("--train.trainer-type nft", "--train.trainer-type", "grpo"),
    ("--train.kl-betta 1", "--train.kl-betta", "--train.kl-beta"),
    ("--track", "track = True", "pip install wandb"),
    ("--tensorboard", "tensorboard = True", "pip install tensorboard"),
    ("--train.clip-range much", "--train.clip-range", "much"),
]


@pytest.mark.parametrize("options, what, remedy", REFUSALS)
def test_refusals(refused, monkeypatch, options, what, remedy):
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    message = refused(*options.split())
    assert what in message and remedy in message


@pytest.mark.parametrize(
    "text, what, remedy",
    [
        ("train: {kl_betta: 0.1}", "train.kl_betta = 0.1 (from @)", "unknown key; did you mean train.kl_beta?"),
        ("learning_rate: 1", "learning_rate", "did you mean train.learning_rate?"),
        ("xyz: 1", "xyz", "unknown key; --help has all"),
        ("train.seed: 3", "train.seed", "as a mapping of its own, not with a dot"),
        ("train: {trainer_type: nft}", "trainer_type = 'nft'", "is for nft.py; this script is the trainer 'grpo'"),
        ("train: {trainer_type: [grpo]}", "trainer_type = ['grpo']", "this script is the trainer 'grpo'"),
        ("resume: runs/other", "resume = 'runs/other'", "give --resume on the command line"),
        ("trainers: {grpo: {config: c.yaml}}", "config = 'c.yaml'", "give --config on the command line"),
        ("train:", "train = None", "is empty in @; leave it out"),
        ("trainers: {grpo: {call: 3}}", "--config", "3 should be a mapping"),
        ("train: 3", "--config", "3 should be a mapping"),
        ("train: []", "--config", "[] should be a mapping"),
        ('output_dir: "a\\0b"', "output_dir = 'a\\x00b'", "should match pattern"),
        ("- 1", "--config", "[1] should be a mapping"),
        ("trainers: {nft: 3}", "--config", "3 should be a mapping"),
        ("a: [", "--config", "'a: [' is not YAML"),
        ("seed: !!bool x", "--config", "is not YAML"),
        ("lora_rank: 3\nlora_rank: 4", "--config", "'lora_rank' is given twice"),
    ],
)
def test_refusals_of_a_yaml(refused, config, text, what, remedy):
    words = config(text)
    message = refused(*words).replace(words[1], "@")
    assert what in message and remedy in message and "unicode string" not in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("section", ["null", "{train: null}", "{train: {3: 4}}"])
def test_what_a_yaml_says_to_others_does_no_harm(config, section):
    assert parse(*config(f"trainers: {{nft: {section}}}\nreward: null\neval: {{reward: null}}"))


@pytest.mark.parametrize(
    "settings, what, remedy",
    [
        ({"prompts": 3}, "model/3' (from ", "No such file"),
        ({"output_dir": "/"}, "output_dir = '/'", "cannot be set by a model folder (@/defaults.yaml); say it yourself"),
        ({"trainers": {"grpo": {"track": True}}}, "track = True", "cannot be set by a model folder"),
        ({"reward": {"mine.py:f": 1}}, "reward = {'mine.py:f': 1.0} (from @/defaults.yaml)", "may not ask for"),
        ({"eval": {"reward": {"vlm": 1}}}, "reward = ", "may not ask for the reward 'vlm'"),
        ({"reward_options": {"clipscore.model": "x"}}, "reward = ", "not clipscore.model=x"),
        ({"reward_options": [1]}, "reward_options = [1]", "should be a valid dictionary"),
    ],
)
def test_refusals_of_a_models_defaults(model, ends, settings, what, remedy):
    known = yaml.safe_load((model / "defaults.yaml").read_text())
    (model / "defaults.yaml").write_text(to_yaml(known | settings))
    message = ends(lambda: grpo.check(parse("--model", model)[0]))
    assert what.replace("@", str(model)) in message and remedy.replace("@", str(model)) in message


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 1000)], ids=["missing", "cut"])
@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_weights_that_do_not_load_are_refused(tmp_path, ends, part, damage):
    model = shutil.copytree(RunArgs.model, tmp_path / "model")
    damage(next((model / part).glob("*.safetensors")))
    said = ends(common.load_pipeline, str(model), "cpu", torch.float32)
    assert f"error: model = {str(model)!r}: does not load: " in said


FLOW = '"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]'


@pytest.mark.parametrize(
    "name, text, options, remedy",
    [
        ("model_index.json", "[]", "--model @", "@': no diffusers folder or hub id, or not readable (AttributeError"),
        ("model_index.json", '{"scheduler": 3}', "--model @", "or not readable (TypeError: 'int' object"),
        ("model_index.json", f'{{"_class_name": "X", {FLOW}}}', "--model @", "its class 'X' is no pipeline of diff"),
        ("model_index.json", f'{{"_class_name": "AutoencoderKL", {FLOW}}}', "--model @", "'AutoencoderKL' is no pipel"),
        ("model_index.json", '{"scheduler": ["diffusers", "FlowMatchLCMScheduler"]}', "--model @", "FlowMatchLCM"),
        ("args.yaml", "", "--model @/..", "a run's folder"),
        ("vae/config.json", '{"block_out_channels": 4}', "--model @", "object of type 'int' has no len()"),
        ("transformer/config.json", '{"pos_embed_max_size": "abc"}', "--model @", "model = '"),
        ("mine.py", "import sys\nsys.exit(3)\n", "--reward @/mine.py:f=1", "mine.py does not load: SystemExit: 3"),
        ("p.txt", "\n \n", "--prompts @/p.txt", "holds no prompt"),
        ("p.txt", "a red circle\nan astronaut\n", "--prompts @/p.txt --reward shapes=1", "'an astronaut' is outside"),
    ],
)
def test_files_that_are_not_what_is_asked_for_are_refused(refused, model, name, text, options, remedy):
    (model / ".." / name if name == "args.yaml" else model / name).write_text(text)
    assert remedy.replace("@", str(model)) in refused(*options.replace("@", str(model)).split())


@pytest.mark.parametrize("made", ["mine.txt", "images/epoch_0000.png", "metrics.csv", "checkpoints/", "lora/"])
def test_an_existing_run_is_refused(refused, tmp_path, made):
    (tmp_path / "run" / "images").mkdir(parents=True)
    path = tmp_path / "run" / made
    path.mkdir() if made.endswith("/") else path.touch()
    if made != "mine.txt":  # without it the folder is no run's at all
        (tmp_path / "run" / "environment.yaml").touch()
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


@pytest.mark.parametrize(
    "options, said",
    [(f"--run-name {'x' * 300}", "xx: File name too long"), ("--output-dir @/train.txt", "cannot write")],
)
def test_folders_that_cannot_be_made_are_refused(start, tmp_path, monkeypatch, ends, options, said):
    monkeypatch.setattr(machine, "load_pipeline", lambda *_: pytest.fail("went on"))
    message = ends(lambda: start(grpo, *options.replace("@", str(tmp_path)).split()))
    assert message.startswith("error: output_dir = ") and said in message


def test_runs_that_start_together_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(harness_run.time, "strftime", lambda *_: "grpo-now")
    args = grpo.Args(output_dir=str(tmp_path / "runs"))
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: harness_run._new_folder(args, "grpo.py"), range(8)))
    names = {"grpo-now", *(f"grpo-now-{i}" for i in range(2, 9))}
    assert {folder.name for folder in folders} == names == {path.name for path in (tmp_path / "runs").iterdir()}
