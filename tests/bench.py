"""What an epoch costs on this machine, and how it grows: tables, always against eager in the same process.

    python tests/bench.py shapes                  the embedded model
    python tests/bench.py sd35                    the architecture of SD3.5-medium with random weights; or flux
    python tests/bench.py sd35 --mode memory      peak memory, all networks of the pipeline included
    python tests/bench.py sd35 --mode scaling     the cost as steps, trained steps, images and resolution grow
    python tests/bench.py shapes --mode share     where the time of `python grpo.py` goes
    torchrun --nproc-per-node 2 tests/bench.py sd35 --mode ranks            an epoch by several GPUs; 1 to compare with
    torchrun --nproc-per-node 2 tests/bench.py sd35 --mode ranks --shard    and with full, sharded fine-tuning

Run by hand. Times are medians; those of the VAE, and of the forward pass alone, means. But for --mode memory, a prompt
is encoded once. A TFLOP/s counts what the transformer multiplies, and a backward pass as twice its forward pass.
"""

import functools
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import diffusers
import torch
import transformers
import tyro
from tiny_pipelines import tokenizer
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).parent.parent))

import common  # noqa: E402
import grpo  # noqa: E402
from harness import compiled, machine, parallel, settings, sharded  # noqa: E402
from harness.run import Run  # noqa: E402


@dataclass
class Args:
    model: tyro.conf.Positional[Literal["shapes", "sd35", "flux"]]
    mode: Literal["speed", "memory", "scaling", "share", "ranks"] = "speed"
    batch: int = 16
    resolution: int = 0  # 0 is 32 for shapes, else 512
    steps: int = 10
    repeats: int = 3  # of what is timed
    epochs: int = 2  # of whole epochs that are timed
    calls: int = 4  # of the pipeline in an epoch of --mode ranks
    shard: bool = False  # full, sharded fine-tuning in --mode ranks
    guidance: tuple[float, ...] = (1.0, 4.5)  # scales
    how: str = "eager,compiled"
    options: tuple[str, ...] = ()  # of --mode memory: rows that have one of these
    checkpointing: bool = False
    cudnn_attention: bool = False
    device: str = "auto"


def make(model):
    """The pipeline with random weights (the embedded model has its own)."""
    if model == "shapes":
        return common.load_pipeline(settings.RunArgs.model, "cpu", torch.float32)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=model == "flux")
    if model == "flux":  # 11.9 B parameters in the transformer, 4.9 B in the text encoders
        transformer = diffusers.FluxTransformer2DModel(guidance_embeds=True)
        return diffusers.FluxPipeline(scheduler, vae(0.3611, 0.1159), *clip(768, 12), *t5(), transformer)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=128, patch_size=2, in_channels=16, num_layers=24, attention_head_dim=64, num_attention_heads=24,
        joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048, out_channels=16,
        pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
    )  # fmt: skip
    texts = (*clip(768, 12), *clip(1280, 32), *t5())  # 2.2 B parameters in the transformer, 5.6 B in these
    return diffusers.StableDiffusion3Pipeline(transformer, scheduler, vae(1.5305, 0.0609), *texts)


def vae(scale, shift):
    return diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, norm_num_groups=32,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, sample_size=1024,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=scale, shift_factor=shift,
    )  # fmt: skip


def clip(width, layers):
    config = transformers.CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, projection_dim=width, num_hidden_layers=layers,
        num_attention_heads=width // 64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.CLIPTextModelWithProjection(config), tokenizer(77)


def t5():
    config = transformers.T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )
    return transformers.T5EncoderModel(config), tokenizer()


class Workload:
    """A model with what trains it, and one call of its pipeline as an epoch."""

    def __init__(self, args, device):
        small, self.tokens = args.model == "shapes", {"shapes": 1, "sd35": 128, "flux": 512}[args.model]
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float32 if small else torch.bfloat16)
        with torch.device(device):
            self.pipe = make(args.model)
        torch.set_default_dtype(torch.float32)
        self.args, self.device, self.denoiser, self.clock = args, device, self.pipe.transformer, Clock()
        self.texts = None if args.mode == "memory" else {}  # elsewhere the prompt is encoded once
        for network in common.networks(self.pipe).values():
            network.to(device).requires_grad_(False).eval()
        if args.checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.__class__ = common._with_known_device(type(self.pipe))
        self.clock.add(self.pipe.vae, "decode", "VAE")
        targets = tuple(f"attn.{name}" for name in settings.RunArgs.target_modules)  # not of attn2 of SD3.5
        trained = grpo.Args(finetune_type="full" if small or args.shard else "lora", target_modules=targets)
        if args.shard:
            sharded.shard_blocks(self.denoiser, device)
        self.parameters = list(common.trainable_parameters(self.pipe, trained, 0).values())
        self.optimizer = torch.optim.AdamW(self.parameters, 1e-6, fused=True)

    def arguments(self, guidance, batch=None, resolution=None, steps=None):
        """Keyword arguments of the pipeline; by default as many as the command line says."""
        batch, side = batch or self.args.batch, resolution or self.args.resolution
        return dict(
            prompt=["a red circle"] * batch, height=side, width=side, num_inference_steps=steps or self.args.steps,
            guidance_scale=guidance, max_sequence_length=self.tokens,
            generator=common.generators(*((0, i) for i in range(batch))),
        )  # fmt: skip

    def sample(self, call, trained):
        noise = common.generators(*((1, i) for i in range(len(call["generator"]))))
        return common.rollout(self.pipe, call, "Flow-SDE", 0.7, list(trained), noise, texts=self.texts)

    def update(self, tape):
        """Forward and backward of every trained step and an optimizer step; returns max |log ratio| before it."""
        ratios = []
        for k, taken in tape.steps.items():
            _, step = common.replay(self.pipe, tape, k)
            advantages = torch.linspace(-1, 1, len(step.log_prob), device=self.device)
            loss, _ = grpo.grpo_loss(step.log_prob, taken.log_prob, advantages, 1e-4, 5.0)
            (loss / len(tape.steps)).backward()
            ratios.append((step.log_prob - taken.log_prob).abs().max().detach())
        parallel.average_gradients(self.parameters)
        torch.nn.utils.clip_grads_with_norm_(self.parameters, 1.0, common.gradient_norm(self.parameters))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.stack(ratios).max().item()

    def epoch(self, call, trained):
        return self.update(self.sample(call, trained))

    def flops(self, call):
        """Floating-point operations of the denoiser in one step of a call."""
        with FlopCounterMode(display=False) as counter:
            self.sample(call | dict(num_inference_steps=1), [])
        return sum(counter.get_flop_counts()[type(self.denoiser).__name__].values())


class Clock:
    """The seconds spent in some functions, each but for what it calls that is on the clock too."""

    def __init__(self):
        self.spent, self.inside = Counter(), []

    def add(self, owner, attribute, name):
        """Put a function on the clock; returns what takes it off again."""
        work = getattr(owner, attribute)

        def call(*args, **kwargs):
            self.inside.append(0.0)
            total, value = timed(work, *args, **kwargs)
            self.spent[name] += total - self.inside.pop()
            if self.inside:
                self.inside[-1] += total
            return value

        setattr(owner, attribute, call)
        return functools.partial(setattr, owner, attribute, work)


def timed(work, *args, repeats=1, **kwargs):
    """(median seconds of a call, what the last one returned)."""
    wait, times = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None, []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        value = work(*args, **kwargs)
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times), value


def peak():
    """The most GiB of the GPU's memory in use since the last call."""
    most = torch.cuda.max_memory_allocated() / 2**30  # 0 without one
    if most:
        torch.cuda.reset_peak_memory_stats()
    return most


def table(*columns):
    row(*columns)
    row(*["---"] * len(columns))


def row(*cells):
    print("|", " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells), "|", flush=True)


def speed(load, args):
    """The network, sampling and training by it, and whole epochs of Flow-GRPO and of the mixed setting."""
    calls, per = {scale: load.arguments(scale) for scale in args.guidance}, 1e3 / args.batch
    tera = {scale: load.flops(call) / 1e12 for scale, call in calls.items()}
    print(f"{min(tera.values()) / args.batch:.3g} TFLOP per image and forward; times of images in ms")
    table(
        "", "guidance", "first rollout and update, s", "forward", "TFLOP/s", "sampling without VAE", "TFLOP/s", "VAE",
        "forward+backward", "TFLOP/s", "peak GiB", "GiB in CUDA graphs", "max abs log ratio",
        f"epoch of {args.steps - 1} trained steps", "of 2",
    )  # fmt: skip
    for how, (scale, call) in itertools.product(args.how.split(","), calls.items()):
        if how == "compiled" and scale == args.guidance[0]:
            compiled.compile_blocks(load.denoiser)
            compiled.compile_decoder(load.pipe)
        first, ratio = timed(load.epoch, call, [0, 1])
        load.clock.spent.clear()
        forget = load.clock.add(load.denoiser, "forward", "network")
        load.sample(call, [])
        forget()
        peak()
        sampled, tape = timed(load.sample, call, [0, 1], repeats=args.repeats)
        forward, decoded = load.clock.spent["network"] / args.steps, load.clock.spent["VAE"] / (args.repeats + 1)
        both, _ = timed(load.update, tape, repeats=args.repeats)
        most, sampled = peak(), sampled - decoded
        kept = torch.cuda.memory_snapshot() if torch.cuda.is_initialized() else []
        graphs = sum(part["total_size"] for part in kept if tuple(part["segment_pool_id"]) != (0, 0)) / 2**30
        del tape
        epochs = [timed(load.epoch, call, k, repeats=args.epochs)[0] * per for k in (range(args.steps - 1), [1, 2])]
        row(
            how, scale, first, forward * per, tera[scale] / forward, sampled * per, tera[scale] * args.steps / sampled,
            decoded * per, both / 2 * per, 6 * tera[scale] / both, most, graphs, ratio, *epochs,
        )  # fmt: skip


def memory(load, args):
    """Peak memory and time of a guided epoch with two trained steps, text encoders and VAE included."""
    table("px", "batch", "options", "sampling GiB", "update GiB", "sampling s/image", "update s/image")

    def measure(resolution, batch):
        call = load.arguments(4.5, batch, resolution)
        load.epoch(call, [1])  # Adam has its moments from here on
        torch.cuda.empty_cache()
        peak()
        sampling, tape = timed(load.sample, call, [1, 2])
        most = peak()
        update, _ = timed(load.update, tape)
        return most, peak(), sampling / batch, update / batch

    switches = [("checkpointing", load.denoiser, "gradient_checkpointing")]
    switches += [(f"VAE {name}", load.pipe.vae, name) for name in ("slicing", "tiling")]
    base, offloaded = ("offload", "checkpointing"), []
    for options in ((), ("checkpointing",), base, (*base, "VAE slicing"), (*base, "VAE tiling"), ("offload",)):
        if args.options and not set(args.options) & set(options):
            continue
        if "offload" in options and not offloaded:
            offloaded.append(machine.offload(load.pipe, load.device))
        for option, owner, name in switches:
            getattr(owner, f"{'enable' if option in options else 'disable'}_{name}")()
        for resolution, batch in ((512, 16), (512, 4), (1024, 4), (1024, 1)):
            try:
                figures = measure(resolution, batch)
            except torch.OutOfMemoryError:
                figures = ["out of memory"] * 4
            row(resolution, batch, ", ".join(options) or "none", *figures)


def scaling(load, args):
    """The seconds of an epoch as one of its sizes grows, beside what proportion would give."""
    passes = 4 if args.checkpointing else 3  # of a trained step: forward, backward for twice that, and forward again
    table("what grows", "size", "network TFLOP", "seconds", "relative to the first", "TFLOP relative to the first")

    def cost(trained=2, **sizes):
        call = load.arguments(1.0, **sizes)
        load.epoch(call, range(trained))
        seconds, _ = timed(load.epoch, call, range(trained), repeats=args.repeats)
        return seconds, load.flops(call) / 1e12 * (call["num_inference_steps"] + passes * trained)

    grown = dict(
        batch=[args.batch, 2 * args.batch, 4 * args.batch], steps=[10, 20, 40], trained=[2, 4, 8],
        resolution=[args.resolution, 2 * args.resolution],
    )  # fmt: skip
    for what, values in grown.items():
        costs = [cost(**{what: value}) for value in values]
        for value, (seconds, tera) in zip(values, costs, strict=True):
            row(what, value, tera, seconds, seconds / costs[0][0], tera / costs[0][1])


def ranks(load, args):
    """The seconds of a guided epoch with two trained steps by the processes of torchrun, each with as many images.

    An update is over each call, the only thing that processes wait for: the fewer calls to it, the more that counts.
    """
    if args.how.endswith("compiled"):
        compiled.compile_blocks(load.denoiser)
    call = load.arguments(4.5)

    def epoch():
        for tape in [load.sample(call, [1, 2]) for _ in range(args.calls)]:
            load.update(tape)

    epoch()
    peak()
    seconds, _ = timed(epoch, repeats=args.repeats)
    images, world = args.batch * args.calls, parallel.world_size()
    table("processes", "images of each", "updates", "seconds", "images/s of all", "peak GiB of the first")
    row(world, images, args.calls, seconds, world * images / seconds, peak())


def share(_, args):
    """What `python grpo.py` does with the time of an epoch, in the script itself; evaluation not counted."""
    clock, begun, log = Clock(), [], Run.log

    def mark(run, line):
        if line["epoch"] == 0:
            clock.spent.clear()
            begun.append(time.perf_counter())
        log(run, line)

    Run.log = mark
    clock.add(diffusers.SD3Transformer2DModel, "forward", "transformer")
    clock.add(diffusers.AutoencoderKL, "decode", "VAE")
    clock.add(torch.Tensor, "backward", "backward pass")
    clock.add(common, "average_clip_step", "optimizer")
    clock.add(common, "rollout", "pipeline and tape while sampling")
    clock.add(grpo, "replay", "pipeline and tape while training")
    clock.add(Run, "evaluate", "evaluation")
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["grpo.py", "--train.max-epochs", str(args.epochs), "--output-dir", folder]
        sys.argv += ["--eval.images-per-prompt", "1", "--eval.num-inference-steps", "1"]  # evaluation is not the matter
        grpo.main()
    spent = clock.spent
    total = time.perf_counter() - begun[0] - spent.pop("evaluation")
    spent["the rest of the script, rewards included"] = total - sum(spent.values())
    table("part", "seconds an epoch", "share of the epoch")
    for name, seconds in spent.most_common():
        row(name, seconds / args.epochs, f"{seconds / total:.1%}")


def main():
    args = tyro.cli(Args, description=__doc__)
    args.resolution = args.resolution or (32 if args.model == "shapes" else 512)
    device = machine.pick_device(grpo.Args(device=args.device, cudnn_attention=args.cudnn_attention))
    if parallel.rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if device.type == "cpu":
        torch.set_num_threads(1)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "the CPU, one thread"
    print(f"{args.model} on {where}, torch {torch.__version__}, diffusers {diffusers.__version__}", flush=True)
    tables = {"speed": speed, "memory": memory, "scaling": scaling, "share": share, "ranks": ranks}
    tables[args.mode](None if args.mode == "share" else Workload(args, device), args)


if __name__ == "__main__":
    with parallel.processes():
        main()
