"""Low-rank adapters of the denoisers: new ones, or those that somebody saved, to begin with."""

import json
from pathlib import Path

import peft
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from harness.fields import refuse, refusing

PLAIN = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora")
"""Of a saved configuration, which may be a stranger's, what is taken: others can name modules to import."""
SAVED_AS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # by diffusers, by peft


def add_adapters(denoisers, args):
    """Give the denoisers {name: network} trainable adapters, in float32 or, where they are new, the model's dtype."""
    for name, denoiser in denoisers.items():
        if not hasattr(denoiser, "add_adapter"):
            refuse("finetune_type", "lora", f"{type(denoiser).__name__} takes no adapters; full would do")
        if args.lora:
            with refusing("lora", args.lora):
                _add_saved(denoiser, name, *_read(args.lora, name, [*denoisers]))
            continue
        every = args.target_modules == ("all-linear",)
        unmatched = [] if every else _unmatched(denoiser, args.target_modules)
        if unmatched and args.target_modules != type(args).target_modules:  # the default list is for many models
            refuse("target_modules", args.target_modules, f"{unmatched[0]!r} is no module of {type(denoiser).__name__}")
        lora = peft.LoraConfig(
            r=args.lora_rank,
            lora_alpha=args.lora_alpha,
            init_lora_weights="gaussian",
            target_modules="all-linear" if every else list(args.target_modules),
        )
        try:
            denoiser.add_adapter(lora)
        except ValueError as error:
            refuse("target_modules", args.target_modules, str(error).splitlines()[0])


def _unmatched(denoiser, targets):
    names = [name for name, _ in denoiser.named_modules()]
    return [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names)]


def saved_file(path):
    """The file of a saved adapter: itself, or in a folder. Raises ValueError where there is none."""
    path = Path(path)
    found = [path] if path.is_file() else [path / name for name in SAVED_AS if (path / name).is_file()]
    if not found or found[0].suffix != ".safetensors":
        raise ValueError(f"no .safetensors file of adapters, nor a folder with {' or '.join(SAVED_AS)}")
    return found[0]


def _read(path, name, names):
    """({key: tensor} of a denoiser without prefixes, the saved configuration or None). Raises ValueError."""
    file = saved_file(Path(path) / name if (Path(path) / name).is_dir() else path)
    try:
        state = load_file(file)
        with safe_open(file, "pt") as opened:
            metadata = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "null"))
        if (beside := file.with_name("adapter_config.json")).is_file():
            metadata = json.loads(beside.read_text())
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    bare = not any(key.startswith(tuple(f"{n}." for n in names)) for key in state)  # of one network, as peft saves it
    prefix = "" if bare else f"{name}."
    others = [key for key in state if not bare and key.partition(".")[0] not in names]
    if others:
        raise ValueError(f"{others[0]} is of no denoiser ({', '.join(names)})")
    state = {k.removeprefix(prefix).removeprefix("base_model.model."): v for k, v in state.items() if prefix in k[:99]}
    return state, metadata and {
        key: value for key in PLAIN if (value := metadata.get(f"{prefix}{key}", metadata.get(key)))
    }


def _add_saved(denoiser, name, state, metadata):
    """Rank, alpha and targets are the file's (without a configuration alpha is the rank, as in diffusers)."""
    if not state:
        raise ValueError(f"holds nothing for {name}")
    modules = dict(denoiser.named_modules())
    for key in state:
        module = key.partition(".lora_")[0]
        if module not in modules:
            raise ValueError(f"{key} fits no module of {type(denoiser).__name__}")
    try:
        denoiser.load_lora_adapter(state, prefix=None, adapter_name="default", metadata=metadata)
    except (RuntimeError, TypeError, KeyError) as error:
        raise ValueError(f"does not fit {type(denoiser).__name__}: {str(error).splitlines()[0]}") from error
    parameters = dict(denoiser.named_parameters())
    for key, value in state.items():  # again, in float32: a model in bfloat16 has rounded them
        parameters[f"{key.removesuffix('.weight')}.default.weight"].data = value.float()
