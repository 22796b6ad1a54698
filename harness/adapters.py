"""Low-rank adapters of the denoisers: new ones, or those that somebody saved, to begin with."""

import json
from pathlib import Path

import peft
import safetensors.torch

from harness.fields import refuse, refusing

PLAIN = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora")
"""Of a saved configuration, which may be a stranger's, what is taken: others can name modules to import."""
SAVED_AS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # by diffusers, by peft


def add_adapters(denoisers, args):
    """Give the denoisers {name: network} trainable adapters, in float32 or, where they are new, the model's dtype."""
    every = args.target_modules == ("all-linear",)
    for name, denoiser in denoisers.items():
        if not hasattr(denoiser, "add_adapter"):
            refuse("finetune_type", "lora", f"{type(denoiser).__name__} takes no adapters; full would do")
        if args.lora:
            with refusing("lora", args.lora):
                _add_saved(denoiser, name, [*denoisers], Path(args.lora))
            continue
        modules = [f".{module}" for module, _ in denoiser.named_modules()]
        unmatched = [t for t in args.target_modules if not any(module.endswith(f".{t}") for module in modules)]
        if unmatched and not every and args.target_modules != type(args).target_modules:  # the default: for many models
            refuse("target_modules", args.target_modules, f"{unmatched[0]!r} is no module of {type(denoiser).__name__}")
        targets = "all-linear" if every else [*args.target_modules]
        how = dict(r=args.lora_rank, lora_alpha=args.lora_alpha, init_lora_weights="gaussian", target_modules=targets)
        with refusing("target_modules", args.target_modules):
            denoiser.add_adapter(peft.LoraConfig(**how))


def saved_file(path):
    """The file of a saved adapter: itself, or in a folder. Raises ValueError where there is none."""
    found = [file for file in (Path(path), *(Path(path) / name for name in SAVED_AS)) if file.is_file()]
    if not found or found[0].suffix != ".safetensors":
        raise ValueError(f"no .safetensors file of adapters, nor a folder with {' or '.join(SAVED_AS)}")
    return found[0]


def _add_saved(denoiser, name, names, path):
    """Give a denoiser, one of these names, the adapters that are saved for it; ValueError where they do not fit.

    Rank, alpha and targets are the file's (without a configuration alpha is the rank, as in diffusers).
    """
    file = saved_file(path / name if (path / name).is_dir() else path)
    try:
        state = safetensors.torch.load_file(file)
        with safetensors.safe_open(file, "pt") as opened:
            saved = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "null"))
        if (beside := file.with_name("adapter_config.json")).is_file():
            saved = json.loads(beside.read_text())
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    others = [key for key in state if key.partition(".")[0] not in names]
    if 0 < len(others) < len(state):
        raise ValueError(f"{others[0]} is of no denoiser ({', '.join(names)})")
    prefix = "" if others else f"{name}."  # without: of one network, as peft saves it
    state = {k.removeprefix(prefix).removeprefix("base_model.model."): state[k] for k in state if k.startswith(prefix)}
    if not state:
        raise ValueError(f"holds nothing for {name}")
    modules = dict(denoiser.named_modules())
    if strange := [key for key in state if key.partition(".lora_")[0] not in modules]:
        raise ValueError(f"{strange[0]} fits no module of {type(denoiser).__name__}")
    try:
        config = saved and {key: value for key in PLAIN if (value := saved.get(f"{prefix}{key}", saved.get(key)))}
        denoiser.load_lora_adapter(state, prefix=None, adapter_name="default", metadata=config)
        for key, value in state.items():  # again, in float32: a model in bfloat16 has rounded them
            parameter = denoiser.get_parameter(f"{key.removesuffix('.weight')}.default.weight")
            parameter.data = value.float().to(parameter.device)
    except (RuntimeError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"does not fit {type(denoiser).__name__}: {str(error).splitlines()[0]}") from error
