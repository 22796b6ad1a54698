"""What the flags about devices, memory and speed ask for."""

import os

import diffusers
import torch
import transformers
from torch.utils._pytree import register_dataclass, tree_flatten, tree_unflatten

from common import Rollout, Transition, denoisers, load_pipeline, networks, rows_once, trainable_parameters
from harness.fields import refuse
from harness.parallel import rank, world_size


def pick_device(args):
    """The torch device of --device, made ready; auto is the GPU if there is one, to each process its own."""
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
    if args.cpu_threads:
        torch.set_num_threads(args.cpu_threads)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # float32 models use the tensor cores
        torch.backends.cuda.enable_cudnn_sdp(args.cudnn_attention)  # torch itself would prefer it
        torch.compiler.config.cache_key_tag += "" if args.cudnn_attention else " no cuDNN"  # that is other code
        if world_size() > 1:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device.index or 0)
    return device


def make_policy(args, device):
    """The pipeline that the arguments ask for, and what of it is trained: (pipeline, {name: parameter})."""
    place = None if args.shard or args.offload else device
    pipe = load_pipeline(args.model, place, getattr(torch, args.dtype), args.pipeline, **quantization(args))
    if args.offload:
        offload(pipe, device)
    if args.shard:
        from harness.sharded import shard_blocks

        for name, network in networks(pipe).items():
            shard_blocks(network, device) if name in denoisers(pipe) else network.to(device)
    for key, method in (("vae_tiling", "enable_tiling"), ("vae_slicing", "enable_slicing")):
        if getattr(args, key):
            if not hasattr(getattr(pipe, "vae", None), method):
                refuse(key, True, f"the VAE of {type(pipe).__name__} cannot do that; leave it out")
            getattr(pipe.vae, method)()
    policy = trainable_parameters(pipe, args, args.train.seed)
    if args.compile:
        from harness.compiled import compile_blocks, compile_decoder, say_progress

        if rank() == 0:
            say_progress()
        compile_decoder(pipe)
        for denoiser in denoisers(pipe).values():
            compile_blocks(denoiser)
    return pipe, policy


def quantization(args):
    """What of `from_pretrained` quantises the frozen weights as they are loaded."""
    parts = {"transformer": (args.quantize, diffusers), "text_encoder": (args.quantize_text, transformers)}
    mapping = {}
    for name in diffusers.DiffusionPipeline.load_config(args.model):
        kind, library = next((part for prefix, part in parts.items() if name.startswith(prefix)), (None, None))
        if kind == "nf4":
            bits = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=args.dtype)
            mapping[name] = library.BitsAndBytesConfig(**bits)
        elif kind:
            from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

            mapping[name] = library.TorchAoConfig({"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[kind]())
    return {"quantization_config": diffusers.PipelineQuantizationConfig(quant_mapping=mapping)} if mapping else {}


def offload(pipe, device):
    """Put what is trained or quantised on the device; other networks visit it from the CPU, layer by layer, to work."""
    stream = device.type == "cuda"  # the next layer travels while one works
    kept = denoisers(pipe)
    stay = [name for name, part in networks(pipe).items() if name in kept or getattr(part, "hf_quantizer", None)]
    pipe.enable_group_offload(device, offload_type="leaf_level", use_stream=stream, exclude_modules=stay)


class Rollouts:
    """A list of rollouts. With --offload, --quantize or --quantize-text all but the last asked for wait on the CPU."""

    def __init__(self, args):
        self.waiting, self.kept = args.offload or args.quantize or args.quantize_text, []
        self.last = self.rollout = None

    def append(self, rollout):
        self.kept.append(_left_on_cpu(rollout) if self.waiting else lambda: rollout)

    def __getitem__(self, i):
        if i != self.last:
            self.last, self.rollout = i, self.kept[i]()
        return self.rollout


register_dataclass(Transition)  # as trees of tensors
register_dataclass(Rollout)


def _left_on_cpu(rollout):
    """A function that gives the Rollout back, each tensor on its device again."""
    leaves, tree = tree_flatten(rollout)
    names = [id(leaf) if isinstance(leaf, torch.Tensor) and not leaf.is_meta else None for leaf in leaves]
    waiting = {name: (leaf.device, rows_once(leaf.cpu())) for name, leaf in zip(names, leaves, strict=True) if name}
    leaves = [None if name else leaf for name, leaf in zip(names, leaves, strict=True)]

    def back():
        moved = {name: tensor.to(device) for name, (device, tensor) in waiting.items()}
        return tree_unflatten([moved.get(name, leaf) for name, leaf in zip(names, leaves, strict=True)], tree)

    return back


def out_of_memory(error, args):
    """What happened, and what would help: first what --resume allows, then what makes another run."""
    train = args.train
    on_resume = {
        "--train.enable-gradient-checkpointing": not train.enable_gradient_checkpointing,
        "--train.ref-param-device cpu": train.ref_param_device != "cpu",
        "--offload": not args.offload,
    }
    otherwise = {
        f"a smaller --train.per-device-batch-size (now {train.per_device_batch_size})": True,
        f"--eval.per-device-batch-size ({args.eval.per_device_batch_size})": True,
        f"--train.resolution ({train.resolution})": True,
        "--finetune-type lora": args.finetune_type == "full",
        "--quantize nf4": args.finetune_type == "lora" and not args.quantize,
        "--quantize-text nf4": not args.quantize_text,
        "--dtype bfloat16": args.dtype == "float32",
    }
    on_resume, otherwise = (", ".join(name for name, would in o.items() if would) for o in (on_resume, otherwise))
    resumable = f"adding {on_resume} on resume would help; " if on_resume else ""
    what = str(error).partition(". GPU ")[0]
    return f"out of GPU memory ({what}): {resumable}or a new run with {otherwise}"
