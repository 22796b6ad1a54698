"""A script's arguments: its dataclass < the model's defaults.yaml, or a resumed run's args.yaml < --config < typed."""

import argparse
import dataclasses
import os
from pathlib import Path
from typing import get_args

import tyro

import rewards
from harness import fields
from harness.fields import MAY_CHANGE, fields_of, flatten, mapping, refuse, refusing, set_by

FROM_A_MODEL = (  # which may be a stranger's: numbers, words and rewards that are built in
    *("dtype", "cpu_threads", "finetune_type", "lora_rank", "lora_alpha", "target_modules", "prompts", "reward"),
    *("reward_options", "call", "train", "eval"),
)


def parse_args(Args, description, argv=None):
    """An instance of the dataclass Args, and lines that say which settings are not the script's own."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # of what decides what else is read
    for flags in (["--model"], ["--config"], ["--resume"], ["--output-dir", "--output_dir"]):
        parser.add_argument(*flags, nargs="?")  # of one without a value tyro speaks
    given, _ = parser.parse_known_args(argv)
    args, kinds, said = Args(), fields_of(Args), []
    set_by.clear()
    config = _read_yaml("config", given.config, kinds, said) if given.config is not None else {}
    defaults = Path(str(given.model or config.get("model") or args.model)) / "defaults.yaml"
    if given.resume:
        places = Path(given.resume), Path(given.output_dir or args.output_dir) / given.resume
        run = next((folder for folder in places if os.path.isfile(folder / "args.yaml")), None)
        if not run:
            refuse("resume", given.resume, f"there is no run: neither {places[0]} nor {places[1]} has an args.yaml")
        _lay_over(args, _read_yaml("resume", run / "args.yaml", kinds, said), run / "args.yaml")
    elif os.path.isfile(defaults):
        _lay_over(args, _read_yaml("model", defaults, kinds, said), defaults)
        _check_model_settings(args, defaults)
    recorded = flatten(args)
    _lay_over(args, config, given.config)
    args.config = given.config
    before, typed = flatten(args), flatten(tyro.cli(Args, description=description, args=argv, default=args))
    _lay_over(args, {key: value for key, value in typed.items() if value != before[key]}, "you")
    fields.validated(kinds, flatten(args))  # what no layer has set is a copied script's own
    if given.resume:
        _check_resumed(args, run, recorded, kinds)
        return args, said
    settings = flatten(args)
    if by_model := [*set_by.values()].count(str(defaults)):
        said.append(f"from {os.path.relpath(defaults)}: {by_model} settings; all are in args.yaml")
    for source in (given.config, "you"):
        if by_it := [f"{key} {settings[key]}" for key, by in set_by.items() if by == source]:
            said.append(f"from {source}: {', '.join(by_it)}")
    by_file = [name for key in ("reward", "eval.reward") if set_by.get(key) == given.config for name in settings[key]]
    if given.config and (code := sorted({name.rpartition(":")[0] for name in by_file} - {""})):
        said.append(f"note: {given.config} names rewards of {', '.join(code)}, whose code will run")
    return args, said


def _read_yaml(key, path, kinds, said):
    """{dotted key: value} of a YAML file, with what it says under `trainers` for one of the script's over the rest."""
    trainers = get_args(kinds["train.trainer_type"])  # the script's own, then those whose settings it takes
    with refusing(f"--{key}", str(path)):
        settings = mapping(fields.from_yaml(fields.read_text(f"--{key}", path)))
        if key == "resume" and not settings:
            raise ValueError("is empty; put back what the run wrote there")
        sections = {name: _flat(section) for name, section in mapping(settings.pop("trainers", None)).items()}
        layer = _flat(settings)
        chosen = next((name for name in trainers if name in sections), None)
        for name, value in sections.get(chosen, {}).items():
            if name in kinds or chosen == trainers[0]:
                layer[name] = mapping(layer.get(name)) | mapping(value) if name == "call" else value
            else:
                said.append(f"note: {path} sets {name} for {chosen}, which this script does not have")
    if sections and chosen is None:
        lost = ", ".join(f"{name}: {' '.join(section)}" for name, section in sections.items())
        takes = f"trainer_type: Literal[{trainers[0]!r}, {next(iter(sections))!r}] in the script takes one's"
        said.append(f"note: {path} has settings of their own for trainers ({lost}), none for {trainers[0]!r}; {takes}")
    named = layer.pop("train.trainer_type", trainers[0])
    if named not in trainers:
        script = f"{named}.py".replace("-", "_")
        refuse("train.trainer_type", named, f"{path} is for {script}; this script is the trainer {trainers[0]!r}")
    for name in sorted({"train", "eval"} & layer.keys()):
        refuse(name, None, f"is empty in {path}; leave it out, or write its settings under it")
    for name in ("config", "resume"):  # which are known before any file is read
        if layer.get(name) is not None:
            refuse(name, layer[name], f"cannot be said in {path}; give --{name} on the command line")
    return layer


def _flat(settings):
    """{dotted key: value} of the nested settings of a YAML text. Raises ValueError where a section is no mapping."""
    flat = {}
    for name, value in mapping(settings).items():
        if "." in str(name):
            raise ValueError(f"{name!r}: write a section as a mapping of its own, not with a dot")
        section = name in ("train", "eval") and value is not None
        flat |= {f"{name}.{key}": each for key, each in mapping(value).items()} if section else {str(name): value}
    return flat


def _lay_over(args, layer, source):
    """Set what a layer says; `call` is added to, anything else replaced."""
    set_by.update(dict.fromkeys(layer, str(source)))
    for key, value in fields.validated(fields_of(type(args)), layer).items():
        section, _, name = key.rpartition(".")
        setattr(getattr(args, section) if section else args, name, args.call | value if key == "call" else value)


def _check_model_settings(args, path):
    """Refuse what a model folder may not set, and find its prompt files beside it."""
    for key in set_by:
        if key.partition(".")[0] not in FROM_A_MODEL:
            refuse(key, flatten(args)[key], f"cannot be set by a model folder ({path}); say it yourself")
    asked = args.reward | args.eval.reward
    with refusing("reward", asked):
        rewards.check_untrusted(asked, args.reward_options)
    for section in (args, args.eval):
        if section.prompts:
            section.prompts = os.path.relpath(path.parent / section.prompts)


def began_with(run):
    """The environment that a run began in, from its folder."""
    path = run / "environment.yaml"
    with refusing("--resume", str(path)):
        began = mapping(fields.from_yaml(fields.read_text("--resume", path)))
        files = mapping(began.get("files"))
        if missing := {"folder", "started"} - began.keys() | {"prompts", "eval.prompts", "script"} - files.keys():
            raise ValueError(f"does not say {min(missing)!r} of the run's beginning; put back what the run wrote there")
    return began


def _check_resumed(args, run, recorded, kinds):
    """Refuse what would change a resumed run; name it as it was begun, from the folder that it was begun in."""
    for key, value in flatten(args).items():
        absolute = os.path.realpath(value) if value and key.endswith(("prompts", "model")) else value  # as recorded
        if recorded[key] not in (value, absolute) and MAY_CHANGE not in get_args(kinds[key]):
            refuse(key, value, f"{run} was begun with {recorded[key]!r}, and this would change it; leave it out")
    if args.run_name not in (None, run.name):
        refuse("run_name", args.run_name, f"--resume continues {run} under its own name; leave it out")
    args.model, args.prompts, args.eval.prompts = (recorded[key] for key in ("model", "prompts", "eval.prompts"))
    began = str(began_with(run)["folder"])
    if began != os.getcwd() and os.path.isdir(began):  # from there a user named reward files
        run = Path(os.path.abspath(run))
        os.chdir(began)
    args.resume, args.output_dir, args.run_name = str(run), str(run.parent), run.name


def repeatable(args):
    """The arguments as args.yaml has them: nested settings that repeat the run from any folder, without its name."""
    settings = dataclasses.asdict(args) | {"run_name": None, "config": None, "resume": None}
    for section, key in ((settings, "prompts"), (settings["eval"], "prompts"), (settings, "model")):
        if section[key] and (key != "model" or os.path.isdir(args.model)):  # or else a hub id
            section[key] = os.path.realpath(section[key])
    return fields.from_yaml(fields.to_yaml(settings))
