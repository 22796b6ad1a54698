"""What an epoch costs on this machine, and what of it is the network: a table, always against eager in the same process.

    python tests/bench.py shapes                the embedded model, here
    python tests/bench.py sd35                  the architecture of SD3.5-medium with random weights, on a GPU
    python tests/bench.py flux                  the architecture of FLUX.1-dev with random weights, on a GPU
    python tests/bench.py sd35 --scaling        how the cost grows with steps, trained steps, group, batch, resolution
    python tests/bench.py sd35 --memory         peak memory with each of the options that save it

Run by hand; nothing here is a test. Times are medians; a TFLOP/s counts the network's matrix products and attention,
and a backward pass twice its forward pass.
"""

import argparse
import contextlib
import gc
import inspect
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import diffusers
import torch
import transformers
from tiny_pipelines import tokenizer
from torch.utils.flop_counter import FlopCounterMode

import common
import grpo

WORDS = "a red fox asleep under an old apple tree, evening light"


def sd35(text_encoders):
    """SD3.5-medium: 2.24 B parameters in the transformer; with text encoders 5.5 B more."""
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=128, patch_size=2, in_channels=16, num_layers=24, attention_head_dim=64, num_attention_heads=24,
        joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048, out_channels=16,
        pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
    )  # fmt: skip
    vae = image_vae(scaling_factor=1.5305, shift_factor=0.0609)
    texts = dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer_3"))
    if text_encoders:
        texts = dict(
            text_encoder=clip(768, 12, 12, "quick_gelu"), text_encoder_2=clip(1280, 32, 20, "gelu"),
            text_encoder_3=t5(), tokenizer_3=tokenizer(),
        )  # fmt: skip
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae, tokenizer=tokenizer(77),
        tokenizer_2=tokenizer(77), **texts,
    )  # fmt: skip
    return pipe, dict(max_sequence_length=128), dict(prompt_embeds=(205, 4096), pooled_prompt_embeds=(2048,))


def flux(text_encoders):
    """FLUX.1-dev: 11.9 B parameters in the transformer; with text encoders 4.9 B more."""
    transformer = diffusers.FluxTransformer2DModel(guidance_embeds=True)
    vae = image_vae(scaling_factor=0.3611, shift_factor=0.1159)
    texts = dict(text_encoder=clip(768, 12, 12, "quick_gelu"), text_encoder_2=t5(), tokenizer_2=tokenizer())
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = diffusers.FluxPipeline(
        scheduler, vae, tokenizer=tokenizer(77), transformer=transformer,
        **(texts if text_encoders else dict.fromkeys(texts)),
    )  # fmt: skip
    return pipe, dict(max_sequence_length=512), dict(prompt_embeds=(512, 4096), pooled_prompt_embeds=(768,))


def shapes(text_encoders):
    """The embedded model."""
    return common.load_pipeline(common.RunArgs.model, "cpu", torch.float32), dict(max_sequence_length=1), None


def image_vae(**scales):
    return diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, norm_num_groups=32,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, sample_size=1024,
        use_quant_conv=False, use_post_quant_conv=False, **scales,
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


class Workload:
    """One of the models above with adapters, an optimizer and one call of the pipeline, and what they cost."""

    def __init__(self, model, device, *, text_encoders=False, offload=False, checkpointing=False, slicing=False):
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16 if model is not shapes else torch.float32)
        with torch.device(device):
            self.pipe, self.call, self.embeddings = model(text_encoders)
        torch.set_default_dtype(torch.float32)
        self.device, self.full = device, model is shapes
        for module in self.pipe.components.values():
            if isinstance(module, torch.nn.Module):
                module.requires_grad_(False).eval()
                module.to("cpu" if offload else device)
        if offload:
            common.let_visit(self.pipe, device)
        if slicing:
            self.pipe.vae.enable_slicing()
        self.pipe.set_progress_bar_config(disable=True)
        if text_encoders or self.embeddings is None:
            self.embeddings = {}
        train = grpo.TrainArgs(enable_gradient_checkpointing=checkpointing)
        args = grpo.Args(finetune_type="full" if self.full else "lora", train=train)
        self.parameters = list(common.trainable_parameters(self.pipe, args, 0).values())
        self.optimizer = torch.optim.AdamW(self.parameters, 1e-6, fused=True)
        self.denoiser = self.pipe.transformer

    def arguments(self, batch, resolution, steps, guidance):
        """Keyword arguments of the pipeline for a batch of images; embeddings stand in for missing text encoders."""
        call = dict(
            height=resolution, width=resolution, num_inference_steps=steps, guidance_scale=guidance,
            generator=common.generators(*((0, i) for i in range(batch))), **self.call,
        )  # fmt: skip
        if not self.embeddings:
            return call | dict(prompt=[WORDS] * batch if not self.full else ["a red circle"] * batch)
        torch.manual_seed(0)
        dtype = torch.bfloat16
        given = {k: torch.randn(batch, *shape, device=self.device, dtype=dtype) for k, shape in self.embeddings.items()}
        if "negative_prompt_embeds" in inspect.signature(self.pipe.__call__).parameters and guidance > 1:
            given |= {f"negative_{k}": torch.zeros_like(value) for k, value in given.items()}
        return call | given

    def rollout(self, call, trained):
        seeds = common.generators(*((1, i) for i in range(len(call["generator"]))))
        return common.rollout(self.pipe, call, "Flow-SDE", 0.7, trained, seeds)

    def update(self, tape):
        """Forward and backward of every trained step, and an optimizer step. Returns max |log ratio| on the way."""
        ratios = []
        for k, taken in tape.steps.items():
            _, step = common.replay(self.pipe, tape, k)
            advantages = torch.linspace(-1, 1, len(step.log_prob), device=self.device)
            loss, _ = grpo.grpo_loss(step.log_prob, taken.log_prob, advantages, 1e-4, 5.0)
            (loss / len(tape.steps)).backward()
            ratios.append((step.log_prob - taken.log_prob).abs().max().detach())
        common.step_optimizer(self.optimizer, self.parameters, 1.0)
        return torch.stack(ratios).max().item()

    def flops(self, call):
        """Floating-point operations of the denoiser in one step of a call: all its images, and both guidance branches."""
        with FlopCounterMode(display=False) as counter:
            self.rollout(call | dict(num_inference_steps=1), [])
        return sum(counter.get_flop_counts()[type(self.denoiser).__name__].values())

    def step_inputs(self, call):
        """What the denoiser is given in the first step of a call."""
        given = {}

        def keep(module, args, kwargs):
            given["args"], given["kwargs"] = args, kwargs
            raise common._Arrived

        handle = self.denoiser.register_forward_pre_hook(keep, with_kwargs=True)
        with contextlib.suppress(common._Arrived):
            self.rollout(call, [])
        handle.remove()
        return given["args"], given["kwargs"]


def seconds(work, device, repeats):
    """Median, and the value of the last call."""
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
    """GiB of the device's memory in use at most since the last call."""
    if device.type != "cuda":
        return float("nan")
    most = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return most


def speed(model, device, args):
    """The network alone, then whole epochs of Flow-GRPO and of the mixed setting: eager, then compiled."""
    load = Workload(model, device)
    plain = load.arguments(args.batch, args.resolution, args.steps, 1.0)
    guided = load.arguments(args.batch, args.resolution, args.steps, 4.5)
    tera = load.flops(plain) / args.batch / 1e12
    print(f"{tera:.3g} TFLOP per image and forward; batch {args.batch}, {args.resolution} px, {args.steps} steps")
    print("| | forward ms/image | TFLOP/s | rollout TFLOP/s | forward+backward ms/image | TFLOP/s | peak GiB |"
          " epoch, guided, all steps, ms/image | mixed, 2 steps | max abs log ratio |")  # fmt: skip
    print("|---" * 10 + "|")
    for name in ("eager", "compiled"):
        if name == "compiled":
            start = time.perf_counter()
            common.compile_blocks(load.denoiser)
        inputs = load.step_inputs(plain)

        def forward(inputs=inputs):
            with torch.no_grad(), common.autocast(load.pipe):
                load.denoiser(*inputs[0], **inputs[1])

        def roll(call, trained):
            return load.rollout(call, trained)

        def epoch(call, trained):
            return load.update(load.rollout(call, trained))

        everything = list(range(args.steps - 1))
        tape = roll(plain, everything[:2])  # a first time, to warm up and to compile
        ratio = load.update(tape)
        if name == "compiled":
            print(f"compiled in {time.perf_counter() - start:.0f} s")
        one, _ = seconds(forward, device, 10)
        peak(device)
        sample, tape = seconds(lambda: roll(plain, everything[:2]), device, args.repeats)
        both, _ = seconds(lambda tape=tape: load.update(tape), device, args.repeats)
        most = peak(device)
        del tape
        full, ratio_full = seconds(lambda: epoch(guided, everything), device, args.epochs)
        mixed, ratio_mixed = seconds(lambda: epoch(guided, [1, 2]), device, args.epochs)
        per = 1e3 / args.batch
        print(
            f"| {name} | {one * per:.2f} | {tera / one * args.batch:.0f} | {tera * args.steps / sample * args.batch:.0f} "
            f"| {both / 2 * per:.2f} | {3 * tera / both * 2 * args.batch:.0f} | {most:.1f} "
            f"| {full * per:.0f} | {mixed * per:.0f} | {max(ratio, ratio_full, ratio_mixed):.3g} |",
            flush=True,
        )


def memory(model, device, args):  # noqa: B023
    """Peak memory and time of an epoch with two trained steps, all networks of the pipeline included."""
    print("| px | batch | options | sampling GiB | update GiB | sampling s/image | update s/image |")
    print("|---" * 7 + "|")
    for resolution, batch in ((512, args.batch), (1024, max(1, args.batch // 4)), (512, 1), (1024, 1)):
        for options in ({}, {"offload": True}, {"checkpointing": True}, {"offload": True, "checkpointing": True},
                        {"offload": True, "checkpointing": True, "slicing": True}):  # fmt: skip
            gc.collect()
            torch.cuda.empty_cache()
            load = Workload(model, device, text_encoders=True, **options)
            call = load.arguments(batch, resolution, args.steps, 4.5)
            tape = load.rollout(call, [1])
            load.update(tape)  # the optimizer has its state now
            peak(device)
            sample, tape = seconds(lambda: load.rollout(call, [1, 2]), device, 1)  # noqa: B023
            sampling = peak(device)
            update, _ = seconds(lambda: load.update(tape), device, 1)  # noqa: B023
            print(
                f"| {resolution} | {batch} | {', '.join(options) or '-'} | {sampling:.1f} | {peak(device):.1f} "
                f"| {sample / batch:.2f} | {update / batch:.2f} |",
                flush=True,
            )
            del load, tape


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["shapes", "sd35", "flux"])
    parser.add_argument("--mode", choices=["speed", "memory", "scaling", "share"], default="speed")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2, help="repetitions of a whole epoch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.resolution = args.resolution or (32 if args.model == "shapes" else 512)
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    else:
        torch.set_num_threads(1)
    model = {"shapes": shapes, "sd35": sd35, "flux": flux}[args.model]
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.processor()}, one thread"
    print(f"{args.model} on {machine}, torch {torch.__version__}, diffusers {diffusers.__version__}")
    {"speed": speed, "memory": memory}[args.mode](model, device, args)


if __name__ == "__main__":
    main()
