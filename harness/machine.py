"""What the flags about devices, memory and speed ask for."""

import os

import torch

from common import denoisers, load_pipeline, networks, trainable_parameters
from harness.fields import refuse
from harness.parallel import world_size


def pick_device(args):
    """The torch device of --device, made ready; auto is the GPU if there is one, to each process its own."""
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
    if args.cpu_threads:
        torch.set_num_threads(args.cpu_threads)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # float32 models use the tensor cores
        torch.backends.cuda.enable_cudnn_sdp(args.cudnn_attention)  # torch itself would prefer it
        torch.compiler.config.cache_key_tag += "" if args.cudnn_attention else " no cuDNN"  # that is other code
    if device.type == "cuda" and world_size() > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def make_policy(args, device):
    """The pipeline that the arguments ask for, and what of it is trained: (pipeline, {name: parameter})."""
    place = None if args.shard or args.offload else device
    pipe = load_pipeline(args.model, place, getattr(torch, args.dtype), args.pipeline)
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
        from harness.compiled import compile_blocks, compile_decoder

        compile_decoder(pipe)
        for denoiser in denoisers(pipe).values():
            compile_blocks(denoiser)
    return pipe, policy


def offload(pipe, device):
    """Put the denoisers on the device; all other networks stay on the CPU and visit it, layer by layer, to work."""
    stream = device.type == "cuda"  # the next layer travels while one works
    pipe.enable_group_offload(device, offload_type="leaf_level", use_stream=stream, exclude_modules=[*denoisers(pipe)])


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
        "--dtype bfloat16": args.dtype == "float32",
    }
    on_resume, otherwise = (", ".join(name for name, would in o.items() if would) for o in (on_resume, otherwise))
    resumable = f"adding {on_resume} on resume would help; " if on_resume else ""
    what = str(error).partition(". GPU ")[0]
    return f"out of GPU memory ({what}): {resumable}or a new run with {otherwise}"
