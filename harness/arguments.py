"""The arguments of a script, in four layers: its dataclass < the model folder's defaults.yaml < --config < the command
line. On --resume the run's own args.yaml takes the place of the model's, and what would change the run is refused.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import get_args

import tyro

import rewards
from harness.console import listened_to
from harness.fields import (
    MAY_CHANGE,
    fields_of,
    flatten,
    from_yaml,
    read_text,
    refuse,
    refusing,
    set_by,
    to_yaml,
    validated,
)

FROM_A_MODEL = (
    *("dtype", "cpu_threads", "finetune_type", "lora_rank", "lora_alpha", "target_modules", "prompts", "reward"),
    *("reward_options", "call", "train", "eval", "trainers"),
)
"""What a model folder, which may be a stranger's, can set: numbers, words and rewards that are built in."""


def parse_args(Args, description, argv=None):
    """Read an instance of the dataclass Args. Returns (args, lines that say which settings are not the script's own).

    Ends with exit status 2 and a message at an unknown key, a value of a wrong type, a missing file, or an argument
    that would change a resumed run.
    """
    argv = sys.argv[1:] if argv is None else argv
    given = _files_named(argv)
    args, said = Args(), []
    set_by.clear()
    known = fields_of(Args)
    trainers = get_args(known["train.trainer_type"])  # the script's own, then those whose settings it takes
    config = _read_yaml("config", given.config, trainers, known, said) if given.config else {}
    model = Path(str(given.model or config.get("model") or args.model))
    lowest, settings, run = model / "defaults.yaml", {}, None
    if given.resume:
        run = find_run(given.resume, given.output_dir or args.output_dir)
        lowest = run / "args.yaml"
        settings = _read_yaml("resume", lowest, trainers, known, said)
        if not settings:
            refuse("--resume", str(lowest), "is empty; put back what the run wrote there")
    elif os.path.isfile(lowest):
        settings = _read_yaml("model", lowest, trainers, known, said)
        _check_model_settings(settings, lowest)
    merged = dataclasses.asdict(args)
    _lay_over(merged, settings, lowest)
    args = validated(Args, merged)
    recorded = flatten(args)
    _lay_over(merged, config, given.config)
    args = validated(Args, merged)
    before = flatten(args)
    with listened_to():  # --help
        args = tyro.cli(Args, description=description, args=argv, default=args)
    args.call = {**before["call"], **args.call}
    typed = {key: value for key, value in flatten(args).items() if value != before[key] and key != "config"}
    for key in typed:
        set_by.pop(key, None)
    args = validated(Args, dataclasses.asdict(args))
    if run:
        _check_resumed(args, run, recorded)
        return args, said
    by_model = sum(path == str(lowest) for path in set_by.values())
    if by_model:
        said.append(f"from {os.path.relpath(lowest)}: {by_model} settings; all are in args.yaml")
    flat = flatten(args)
    for source, keys in ((given.config, [k for k, path in set_by.items() if path == given.config]), ("you", typed)):
        if keys:
            said.append(f"from {source}: {', '.join(f'{key} {flat[key]}' for key in keys)}")
    named = {name for key in ("reward", "eval.reward") if set_by.get(key) == given.config for name in flat[key]}
    if given.config and (code := sorted({name.rpartition(":")[0] for name in named} - {""})):
        said.append(f"note: {given.config} names rewards of {', '.join(code)}, whose code will run")
    return args, said


def _files_named(argv):
    """--model, --config, --resume and --output-dir as typed, which decide what else is read."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flags in (["--model"], ["--config"], ["--resume"], ["--output-dir", "--output_dir"]):
        parser.add_argument(*flags, nargs="?")  # of one without a value tyro speaks
    given, _ = parser.parse_known_args(argv)
    for name in ("config", "resume"):
        if getattr(given, name) == "":
            refuse(f"--{name}", "", "names nothing; leave it out, or give it a value")
    return given


def _read_yaml(key, path, trainers, known, said):
    """The settings of a YAML file, with what it says under `trainers` for one of these folded in."""
    try:
        settings = from_yaml(read_text(f"--{key}", path)) or {}
    except ValueError as error:
        refuse(f"--{key}", str(path), f"not a YAML file: {error}")
    sections = settings.pop("trainers", None) or {} if isinstance(settings, dict) else None
    chosen = next((name for name in trainers if name in sections), None) if isinstance(sections, dict) else None
    own = sections.get(chosen) or {} if isinstance(sections, dict) else None
    if not isinstance(own, dict):
        refuse(f"--{key}", str(path), "holds no mapping of keys to values")
    if chosen != trainers[0] and isinstance(own.get("train"), dict):  # another script's section: what is unknown here
        dropped = [name for name in own["train"] if f"train.{name}" not in known]
        own = own | {"train": {name: value for name, value in own["train"].items() if name not in dropped}}
        said.extend(f"note: {path} sets {name} for {chosen}, which this script does not have" for name in dropped)
    if sections and chosen is None:
        trains = {name: section.get("train") for name, section in sections.items() if isinstance(section, dict)}
        lost = ", ".join(f"{name}: {' '.join(map(str, t))}" for name, t in trains.items() if isinstance(t, dict))
        said.append(
            f"note: {path} has settings of their own for trainers ({lost}), none for {trainers[0]!r}; "
            f"trainer_type: Literal[{trainers[0]!r}, {next(iter(sections))!r}] in the script takes one's"
        )
    for name in own:
        both = isinstance(own[name], dict) and isinstance(settings.get(name), dict)
        settings[name] = {**settings[name], **own[name]} if both else own[name]
    train = settings.get("train")
    named = train.pop("trainer_type", trainers[0]) if isinstance(train, dict) else trainers[0]
    if named not in trainers:
        script = {"grpo": "grpo.py", "grpo-guard": "grpo_guard.py", "nft": "nft.py"}.get(str(named), "another script")
        refuse("train.trainer_type", named, f"{path} is for {script}; this script is the trainer {trainers[0]!r}")
    for name in ("config", "resume"):  # which are known before any file is read
        if settings.get(name) is not None:
            refuse(name, settings[name], f"cannot be said in {path}; give --{name} on the command line")
    return settings


def _check_model_settings(settings, path):
    """Refuse what a model folder may not set, and find its prompt files beside it."""
    for name in settings:
        if name not in FROM_A_MODEL:
            refuse(name, settings[name], f"cannot be set by a model folder ({path}); say it yourself")
    evaluation = settings.get("eval") if isinstance(settings.get("eval"), dict) else {}
    asked = [section.get("reward") for section in (settings, evaluation)]
    asked = {name: weight for named in asked if isinstance(named, dict) for name, weight in named.items()}
    with refusing("reward", f"{asked} (from {path})"):
        rewards.check_untrusted(asked, settings.get("reward_options"))
    for section in (settings, evaluation):
        if section.get("prompts"):
            section["prompts"] = os.path.relpath(path.parent / str(section["prompts"]))


def _lay_over(below, settings, path, prefix=""):
    """Put the nested settings of a file over others, in place; `call` is added to, anything else replaced."""
    for name, value in settings.items():
        section = isinstance(value, dict) and isinstance(below.get(name), dict)
        if section and name in ("train", "eval"):
            _lay_over(below[name], value, path, f"{name}.")
        else:
            set_by[f"{prefix}{name}"] = str(path)
            below[name] = {**below[name], **value} if section and name == "call" else value
            if value is None and name in ("call", "reward", "reward_options"):
                below[name] = {}


def find_run(name, output_dir):
    """The folder of a run, given itself or its name in output_dir."""
    for folder in (Path(name), Path(output_dir) / name):
        with refusing("resume", name):  # a name with a NUL in it
            if os.path.isfile(folder / "args.yaml"):
                return folder
    refuse("resume", name, f"there is no run: neither {name} nor {Path(output_dir) / name} has an args.yaml")


def began_with(run):
    """The environment that a run began in, from its folder."""
    path = run / "environment.yaml"
    with refusing("--resume", str(path)):
        began = from_yaml(read_text("--resume", path))
    mapping = isinstance(began, dict) and isinstance(began.get("files"), dict)
    known = {**began, **began["files"]} if mapping else {}
    if not {"prompts", "eval.prompts", "script", "started"} <= known.keys() or not isinstance(known.get("folder"), str):
        refuse("--resume", str(path), "does not say what the run began with; put back what the run wrote there")
    return began


def _check_resumed(args, run, recorded):
    """Refuse what would change a resumed run; name it as it was begun, from the folder that it was begun in."""
    kinds = fields_of(type(args))
    for key, value in flatten(args).items():
        same = value == recorded[key] or key.endswith(("prompts", "model")) and absolute(value) == recorded[key]
        if not same and MAY_CHANGE not in get_args(kinds[key]):
            refuse(key, value, f"{run} was begun with {recorded[key]!r}, and this would change it; leave it out")
    if args.run_name not in (None, run.name):
        refuse("run_name", args.run_name, f"--resume continues {run} under its own name; leave it out")
    args.model, args.prompts, args.eval.prompts = (recorded[key] for key in ("model", "prompts", "eval.prompts"))
    began = began_with(run)["folder"]
    if began != os.getcwd() and os.path.isdir(began):  # from there a user named reward files
        run = Path(os.path.abspath(run))
        os.chdir(began)
    args.resume, args.output_dir, args.run_name = str(run), str(run.parent), run.name


def absolute(path):
    """A path that means the same from any folder; None stays None."""
    return None if path is None else str(Path(path).resolve())


def repeatable(args):
    """The arguments as args.yaml has them: nested settings that repeat the run, without what names it."""
    settings = dataclasses.asdict(args) | {"run_name": None, "config": None, "resume": None}
    settings["prompts"], settings["eval"]["prompts"] = absolute(args.prompts), absolute(args.eval.prompts)
    if Path(args.model).is_dir():  # or else a hub id
        settings["model"] = absolute(args.model)
    return from_yaml(to_yaml(settings))
