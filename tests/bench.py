"""What an epoch costs on this machine, and how it grows: tables, always against eager in the same process.

    python tests/bench.py shapes                  the embedded model
    python tests/bench.py sd35                    the architecture of SD3.5-medium with random weights, on a GPU
    python tests/bench.py flux                    the architecture of FLUX.1-dev with random weights, on a GPU
    python tests/bench.py sd35 --mode memory      peak memory, all networks of the pipeline included
    python tests/bench.py sd35 --mode scaling     the cost as steps, trained steps, images and resolution grow
    python tests/bench.py shapes --mode share     where the time of `python grpo.py` goes
    torchrun --nproc-per-node 2 tests/bench.py sd35 --mode ranks            an epoch by several GPUs; 1 to compare with
    torchrun --nproc-per-node 2 tests/bench.py sd35 --mode ranks --shard    and with full, sharded fine-tuning

Run by hand; nothing here is a test. Times are medians. A TFLOP/s counts what the transformer multiplies, and a backward
pass as twice its forward pass.
"""

import argparse
import contextlib
import gc
import inspect
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import diffusers
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
tokenizer = __import__("tiny_pipelines").tokenizer
common, grpo = __import__("common"), __import__("grpo")

PROJECTIONS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
)  # fmt: skip
"""The layers that Flow-GRPO gives adapters on SD3.5: not those of its second attention, attn2."""
WORDS = "a red fox asleep under an old apple tree, evening light"


# ---------------------------------------------------------------------------------------------------------------------
# Models: (pipeline, arguments of its call, {embedding: shape} that stand in for text encoders left out)


def sd35(text_encoders):
    """SD3.5-medium: 2.2 B parameters in the transformer, 5.6 B in the text encoders."""
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=128, patch_size=2, in_channels=16, num_layers=24, attention_head_dim=64, num_attention_heads=24,
        joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048, out_channels=16,
        pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
    )  # fmt: skip
    texts = dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer_3"))
    if text_encoders:
        texts = dict(
            text_encoder=clip(768, 12, 12, "quick_gelu"), text_encoder_2=clip(1280, 32, 20, "gelu"),
            text_encoder_3=t5(), tokenizer_3=tokenizer(),
        )  # fmt: skip
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae(scaling_factor=1.5305, shift_factor=0.0609), tokenizer=tokenizer(77), tokenizer_2=tokenizer(77), **texts,
    )  # fmt: skip
    return pipe, dict(max_sequence_length=128), dict(prompt_embeds=(205, 4096), pooled_prompt_embeds=(2048,))


def flux(text_encoders):
    """FLUX.1-dev: 11.9 B parameters in the transformer, 4.9 B in the text encoders."""
    transformer = diffusers.FluxTransformer2DModel(guidance_embeds=True)
    texts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer_2"))
    if text_encoders:
        texts = dict(text_encoder=clip(768, 12, 12, "quick_gelu"), text_encoder_2=t5(), tokenizer_2=tokenizer())
    pipe = diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae(scaling_factor=0.3611, shift_factor=0.1159), tokenizer=tokenizer(77), transformer=transformer, **texts,
    )  # fmt: skip
    return pipe, dict(max_sequence_length=512), dict(prompt_embeds=(512, 4096), pooled_prompt_embeds=(768,))


def shapes(text_encoders):
    """The embedded model, with its text encoders."""
    return common.load_pipeline(common.RunArgs.model, "cpu", torch.float32), dict(max_sequence_length=1), {}


def vae(**scale):
    return diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, norm_num_groups=32,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, sample_size=1024,
        use_quant_conv=False, use_post_quant_conv=False, **scale,
    )  # fmt: skip


def clip(width, layers, heads, activation):
    config = transformers.CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, projection_dim=width, num_hidden_layers=layers,
        num_attention_heads=heads, hidden_act=activation, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.CLIPTextModelWithProjection(config)


def t5():
    config = transformers.T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )
    return transformers.T5EncoderModel(config)


# ---------------------------------------------------------------------------------------------------------------------
# The work


class Workload:
    """A model with what trains it, and one call of its pipeline as an epoch."""

    def __init__(self, model, device, text_encoders=False, shard=False, checkpointing=False):
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float32 if model is shapes else torch.bfloat16)
        with torch.device(device):
            self.pipe, self.call, self.embeddings = model(text_encoders)
        torch.set_default_dtype(torch.float32)
        self.embeddings = {} if text_encoders else self.embeddings
        self.words = "a red circle" if model is shapes else WORDS
        self.device, self.denoiser, self.decoding = device, self.pipe.transformer, 0.0
        for module in self.pipe.components.values():
            if isinstance(module, torch.nn.Module):
                module.to(device).requires_grad_(False).eval()
        if checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.__class__ = common._settled(type(self.pipe))
        clocked(self.pipe.vae, self, device)
        args = grpo.Args(finetune_type="full" if model is shapes or shard else "lora", target_modules=PROJECTIONS)
        if shard:
            common.shard_blocks(self.denoiser, device)
        self.parameters = list(common.trainable_parameters(self.pipe, args, 0).values())
        self.optimizer = torch.optim.AdamW(self.parameters, 1e-6, fused=True)

    def arguments(self, batch, resolution, steps, guidance):
        """Keyword arguments of the pipeline."""
        call = dict(
            height=resolution, width=resolution, num_inference_steps=steps, guidance_scale=guidance,
            generator=common.generators(*((0, i) for i in range(batch))), **self.call,
        )  # fmt: skip
        if not self.embeddings:
            return call | dict(prompt=[self.words] * batch)
        torch.manual_seed(0)
        shapes = {name: (batch, *shape) for name, shape in self.embeddings.items()}
        given = {name: torch.randn(shape, device=self.device, dtype=torch.bfloat16) for name, shape in shapes.items()}
        if guidance > 1 and "negative_prompt_embeds" in inspect.signature(self.pipe.__call__).parameters:
            given |= {f"negative_{name}": torch.zeros_like(value) for name, value in given.items()}
        return call | given

    def sample(self, call, trained):
        seeds = common.generators(*((1, i) for i in range(len(call["generator"]))))
        return common.rollout(self.pipe, call, "Flow-SDE", 0.7, trained, seeds)

    def update(self, tape):
        """Forward and backward of every trained step and an optimizer step; returns max |log ratio| before it."""
        ratios = []
        for k, taken in tape.steps.items():
            _, step = common.replay(self.pipe, tape, k)
            advantages = torch.linspace(-1, 1, len(step.log_prob), device=self.device)
            loss, _ = grpo.grpo_loss(step.log_prob, taken.log_prob, advantages, 1e-4, 5.0)
            (loss / len(tape.steps)).backward()
            ratios.append((step.log_prob - taken.log_prob).abs().max().detach())
        common.average_gradients(self.parameters)
        torch.nn.utils.clip_grads_with_norm_(self.parameters, 1.0, common.gradient_norm(self.parameters))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.stack(ratios).max().item()

    def flops(self, call):
        """Floating-point operations of the denoiser in one step of a call."""
        with FlopCounterMode(display=False) as counter:
            self.sample(call | dict(num_inference_steps=1), [])
        return sum(counter.get_flop_counts()[type(self.denoiser).__name__].values())

    def forward_once(self, call):
        """A function that runs the denoiser alone, on what the first step of a call gives it."""
        given = {}

        def keep(module, args, kwargs):
            given.update(args=args, kwargs=kwargs)
            raise common._Arrived

        handle = self.denoiser.register_forward_pre_hook(keep, with_kwargs=True)
        with contextlib.suppress(common._Arrived):
            self.sample(call, [])
        handle.remove()

        def forward():
            with torch.no_grad(), common.autocast(self.pipe):
                self.denoiser(*given["args"], **given["kwargs"])

        return forward


def clocked(vae, load, device):
    """Add the seconds that the VAE decodes to load.decoding."""
    decode = vae.decode

    def clock(*args, **kwargs):
        seconds, images = timed(lambda: decode(*args, **kwargs), device)
        load.decoding += seconds
        return images

    vae.decode = clock


def timed(work, device, repeats=1):
    """(median seconds of a call, what the last one returned)."""
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        value = work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times), value


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak(device):
    """The most GiB of the device's memory in use since the last call."""
    if device.type != "cuda":
        return float("nan")
    most = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return most


def graphs():
    """GiB of the device's memory that is kept for CUDA graphs."""
    kept = torch.cuda.memory_snapshot() if torch.cuda.is_available() else []
    return sum(segment["total_size"] for segment in kept if tuple(segment["segment_pool_id"]) != (0, 0)) / 2**30


def table(*columns):
    row(*columns)
    row(*["---"] * len(columns))


def row(*cells):
    print("|", " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells), "|", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The tables


def speed(model, device, args):
    """The network, sampling and training by it, and whole epochs of Flow-GRPO and of the mixed setting."""
    load = Workload(model, device, checkpointing=args.checkpointing)
    calls = {scale: load.arguments(args.batch, args.resolution, args.steps, scale) for scale in args.guidance}
    tera, per = {scale: load.flops(call) / 1e12 for scale, call in calls.items()}, 1e3 / args.batch
    least = min(tera.values()) / args.batch
    print(f"{least:.3g} TFLOP per image and forward; {args.batch} images of {args.resolution} px")
    table(
        "", "guidance", "forward ms/image", "TFLOP/s", "sampling but for the VAE, ms/image", "TFLOP/s", "VAE ms/image",
        "forward+backward ms/image", "TFLOP/s", "peak GiB", "max abs log ratio",
    )  # fmt: skip
    epochs, notes = [], []
    for how in args.how.split(","):
        if how == "compiled":
            common.compile_blocks(load.denoiser)
            common.compile_decoder(load.pipe)
        for scale, call in calls.items():
            started = time.perf_counter()
            ratio = load.update(load.sample(call, [0, 1]))
            warm = time.perf_counter() - started
            forward = load.forward_once(call)
            forward()
            one, _ = timed(forward, device, 10)
            peak(device)
            sampling, decoding = [], []
            for _ in range(args.repeats):
                load.decoding = 0.0
                seconds, tape = timed(lambda call=call: load.sample(call, [0, 1]), device)
                sampling.append(seconds - load.decoding)
                decoding.append(load.decoding)
            both, _ = timed(lambda tape=tape: load.update(tape), device, args.repeats)
            del tape
            row(
                how, scale, one * per, tera[scale] / one, statistics.median(sampling) * per,
                tera[scale] * args.steps / statistics.median(sampling), statistics.median(decoding) * per,
                both / 2 * per, 6 * tera[scale] / both, peak(device), ratio,
            )  # fmt: skip
            notes += [f"{how}, {scale:g}: first rollout and update {warm:.0f} s; {graphs():.3g} GiB in CUDA graphs"]
        for trained in (range(args.steps - 1), [1, 2]):
            seconds, _ = timed(lambda c=call, k=trained: load.update(load.sample(c, list(k))), device, args.epochs)
            epochs.append((how, len(trained), seconds * per))
    print("\n".join(notes))
    table("", "trained steps", f"epoch with guidance {scale:g}, ms/image")
    for cells in epochs:
        row(*cells)


def memory(model, device, args):
    """Peak memory and time of a guided epoch with two trained steps, text encoders and VAE included."""
    load = Workload(model, device, text_encoders=True)
    table("px", "batch", "options", "sampling GiB", "update GiB", "sampling s/image", "update s/image")

    def measure(resolution, batch):
        call = load.arguments(batch, resolution, args.steps, 4.5)
        load.update(load.sample(call, [1]))  # Adam has its moments from here on
        gc.collect()
        torch.cuda.empty_cache()
        peak(device)
        sampling, tape = timed(lambda: load.sample(call, [1, 2]), device)
        most = peak(device)
        update, _ = timed(lambda: load.update(tape), device)
        return most, peak(device), sampling / batch, update / batch

    base = ("offload", "checkpointing")
    for options in ((), ("checkpointing",), base, (*base, "VAE slicing"), (*base, "VAE tiling"), ("offload",)):
        if args.options and not set(args.options) & set(options):
            continue
        if "offload" in options and not hasattr(load.pipe.vae, "_hf_hook"):
            common.let_visit(load.pipe, device)
        for option, owner, name in (
            ("checkpointing", load.denoiser, "gradient_checkpointing"),
            ("VAE slicing", load.pipe.vae, "slicing"),
            ("VAE tiling", load.pipe.vae, "tiling"),
        ):
            getattr(owner, f"{'enable' if option in options else 'disable'}_{name}")()
        for resolution, batch in ((512, 16), (512, 4), (1024, 4), (1024, 1)):
            try:
                figures = measure(resolution, batch)
            except torch.OutOfMemoryError:
                figures = ["out of memory"] * 4
            row(resolution, batch, ", ".join(options) or "none", *figures)


def scaling(model, device, args):
    """The seconds of an epoch as one of its sizes grows, beside what proportion would give."""
    load = Workload(model, device, checkpointing=args.checkpointing)
    passes = 4 if args.checkpointing else 3  # of a trained step: forward, backward for twice that, and forward again
    base = dict(batch=args.batch, resolution=args.resolution, steps=args.steps, trained=2)
    table("what grows", "size", "network TFLOP", "seconds", "relative to the first", "TFLOP relative to the first")

    def cost(batch, resolution, steps, trained):
        call = load.arguments(batch, resolution, steps, 1.0)
        load.update(load.sample(call, list(range(trained))))
        seconds, _ = timed(lambda: load.update(load.sample(call, list(range(trained)))), device, args.repeats)
        return seconds, load.flops(call) / 1e12 * (steps + passes * trained)

    grown = dict(
        batch=[args.batch, 2 * args.batch, 4 * args.batch], steps=[10, 20, 40], trained=[2, 4, 8],
        resolution=[args.resolution, 2 * args.resolution],
    )  # fmt: skip
    for what, values in grown.items():
        costs = [cost(**base | {what: value}) for value in values]
        for value, (seconds, tera) in zip(values, costs, strict=True):
            row(what, value, tera, seconds, seconds / costs[0][0], tera / costs[0][1])


def ranks(model, device, args):
    """The seconds of a guided epoch with two trained steps by the processes of torchrun, each with as many images.

    Each process makes --calls calls and an optimizer step over each of them, which is the only thing that it waits for
    others in: the fewer calls to a step, the more that counts.
    """
    load = Workload(model, device, shard=args.shard, checkpointing=args.checkpointing)
    if args.how.endswith("compiled"):
        common.compile_blocks(load.denoiser)
    call = load.arguments(args.batch, args.resolution, args.steps, 4.5)

    def epoch():
        for tape in [load.sample(call, [1, 2]) for _ in range(args.calls)]:
            load.update(tape)

    epoch()
    peak(device)
    seconds, _ = timed(epoch, device, args.repeats)
    images = args.batch * args.calls
    table("processes", "images of each", "updates", "seconds", "images/s of all", "peak GiB of the first")
    row(common.world(), images, args.calls, seconds, common.world() * images / seconds, peak(device))


def share(model, device, args):
    """What `python grpo.py` does with the time of an epoch, in the script itself; evaluation not counted."""
    spent, inside = Counter(), []

    def clock(name, work):
        def call(*a, **k):
            synchronize(device)
            start = time.perf_counter()
            inside.append(0.0)
            try:
                return work(*a, **k)
            finally:
                synchronize(device)
                total = time.perf_counter() - start
                spent[name] += total - inside.pop()  # what it called is counted there
                if inside:
                    inside[-1] += total

        return call

    def patch(owner, attribute, name):
        setattr(owner, attribute, clock(name, getattr(owner, attribute)))

    make_pipeline = common.make_pipeline

    def watched(*a):
        pipe = make_pipeline(*a)
        patch(pipe.transformer, "forward", "transformer")
        patch(pipe.vae, "decode", "VAE")
        return pipe

    common.make_pipeline = watched
    patch(torch.Tensor, "backward", "backward pass")
    patch(common, "step_optimizer", "optimizer")
    patch(grpo, "rollout", "pipeline and tape while sampling")
    patch(grpo, "replay", "pipeline and tape while training")
    patch(common.Run, "evaluate", "evaluation")
    log, begun = common.Run.log, []

    def mark(run, row):
        if row["epoch"] == 0:
            begun.append((time.perf_counter(), Counter(spent)))
        log(run, row)

    common.Run.log = mark
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["grpo.py", "--train.max-epochs", str(args.epochs), "--output-dir", folder]
        sys.argv += ["--eval.images-per-prompt", "1", "--eval.num-inference-steps", "1"]  # evaluation is not the matter
        grpo.main()
    total = time.perf_counter() - begun[0][0]
    spent = spent - begun[0][1]
    total -= spent.pop("evaluation")
    spent["the rest of the script, rewards included"] = total - sum(spent.values())
    table("part", "seconds an epoch", "share of the epoch")
    for name, seconds in spent.most_common():
        row(name, seconds / args.epochs, f"{seconds / total:.1%}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["shapes", "sd35", "flux"])
    parser.add_argument("--mode", choices=["speed", "memory", "scaling", "share", "ranks"], default="speed")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--resolution", type=int, help="32 for shapes, else 512")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3, help="of what is timed")
    parser.add_argument("--epochs", type=int, default=2, help="of whole epochs that are timed")
    parser.add_argument("--calls", type=int, default=4, help="of the pipeline in an epoch of --mode ranks")
    parser.add_argument("--shard", action="store_true", help="full, sharded fine-tuning in --mode ranks")
    parser.add_argument(
        "--guidance", type=float, nargs="+", default=[1.0, 4.5], help="scales; epochs take the last one"
    )
    parser.add_argument("--how", default="eager,compiled")
    parser.add_argument("--options", nargs="*", default=[], help="of --mode memory: rows that have one of these")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--cudnn-attention", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.resolution = args.resolution or (32 if args.model == "shapes" else 512)
    device = common.pick_device(grpo.Args(device=args.device, cudnn_attention=args.cudnn_attention))
    if common.rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if device.type == "cpu":
        torch.set_num_threads(1)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, one thread"
    print(f"{args.model} on {machine}, torch {torch.__version__}, diffusers {diffusers.__version__}", flush=True)
    tables = {"speed": speed, "memory": memory, "scaling": scaling, "share": share, "ranks": ranks}
    tables[args.mode]({"shapes": shapes, "sd35": sd35, "flux": flux}[args.model], device, args)


if __name__ == "__main__":
    with common.processes():
        main()
