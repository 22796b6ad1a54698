"""What an epoch costs on this machine, and how it grows: tables, always against eager in the same process.

    python tests/bench.py shapes                  the embedded model
    python tests/bench.py sd35                    the architecture of SD3.5-medium with random weights; or flux
    python tests/bench.py sd35 --mode memory      peak memory, all networks of the pipeline included
    python tests/bench.py sd35 --mode scaling     the cost as steps, trained steps, images and resolution grow
    python tests/bench.py shapes --mode share     where the time of `python grpo.py` goes
    python tests/bench.py sd35 --mode caps        two epochs of grpo.py by each recipe for a small GPU, under its limit
    python tests/bench.py sd35 --mode rewards     reward networks of the published sizes, alone and beside sampling
    torchrun --nproc-per-node 2 tests/bench.py sd35 --mode ranks            an epoch by several GPUs; 1 to compare with
    torchrun --nproc-per-node 2 tests/bench.py sd35 --mode ranks --shard    and with full, sharded fine-tuning

--how adds, to "eager" and "compiled", the options of `HOW`, to compare what torch makes of the same network.

Run by hand. Times are medians; those of the VAE, and of the forward pass alone, means. But for --mode memory, a prompt
is encoded once. A TFLOP/s counts what the transformer multiplies, and a backward pass as twice its forward pass.
"""

import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import diffusers
import filelock
import peft
import torch
import transformers
import tyro
from tiny_pipelines import tokenizer
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).parent.parent))

import common  # noqa: E402
import grpo  # noqa: E402
from harness import compiled, evaluation, listening, machine, parallel, settings, sharded  # noqa: E402
from harness.judges import geneval, imagereward  # noqa: E402
from harness.run import Run  # noqa: E402
from rewards import make_reward  # noqa: E402


@dataclass
class Args:
    model: tyro.conf.Positional[Literal["shapes", "sd35", "flux", "qwen", "wan"]]
    mode: Literal["speed", "memory", "scaling", "share", "ranks", "build", "caps", "rewards"] = "speed"
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
    models: Path = Path("/tmp/random-models")  # where --mode build and caps write models, and rewards its networks
    recipes: str = "*"  # of --mode caps: those of the model with such names
    script: str = ""  # more arguments of grpo.py in --mode caps
    limit: int = 240  # seconds for a recipe in --mode caps
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
        words = clip(768, 12, transformers.CLIPTextModel)
        return diffusers.FluxPipeline(scheduler, vae(0.3611, 0.1159), *words, *t5(), transformer)
    if model == "qwen":  # 20 B in the transformer, 8.3 B in the text encoder
        rope = {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"}
        eye = dict(hidden_size=1280, intermediate_size=3420, out_hidden_size=3584)
        text = transformers.Qwen2_5_VLConfig(vision_config=eye, text_config=dict(
            hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
            num_key_value_heads=4, vocab_size=152064, rope_theta=1e6, rope_scaling=rope,
        ))  # fmt: skip
        text = transformers.Qwen2_5_VLForConditionalGeneration(text)
        parts = dict(text_encoder=text, tokenizer=tokenizer(1024), vae=diffusers.AutoencoderKLQwenImage())
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
        transformer = diffusers.QwenImageTransformer2DModel(guidance_embeds=False)
        return diffusers.QwenImagePipeline(scheduler=scheduler, transformer=transformer, **parts)
    if model == "wan":  # 1.4 B in the transformer, 5.7 B in the text encoder
        transformer = diffusers.WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30)
        text, words = t5("UMT5", 256384)
        parts = dict(text_encoder=text, tokenizer=words, vae=diffusers.AutoencoderKLWan())
        return diffusers.WanPipeline(scheduler=scheduler, transformer=transformer, **parts)
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


def clip(width, layers, cls=transformers.CLIPTextModelWithProjection):
    config = transformers.CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, projection_dim=width, num_hidden_layers=layers,
        num_attention_heads=width // 64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return cls(config), tokenizer(77)


def t5(kind="T5", words=32128):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=words, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )
    return getattr(transformers, f"{kind}EncoderModel")(config), tokenizer()


def build(args, model=None):
    """The folder of a pipeline with random weights in bfloat16, written once; equal networks are written once too."""
    model = model or args.model
    folder, parts = args.models / model, args.models / "parts"
    for made in (folder, parts):
        made.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(args.models / f"{model}.lock"):
        if (folder / "model_index.json").exists():
            return folder
        with torch.device("meta"):
            pipe = make(model)
        for name, part in pipe.components.items():
            if hasattr(part, "save_pretrained") and not isinstance(part, torch.nn.Module):
                part.save_pretrained(folder / name)
            if not isinstance(part, torch.nn.Module):
                continue
            place = parts / f"{type(part).__name__}-{sum(p.numel() for p in part.parameters())}"
            with filelock.FileLock(f"{place}.lock"):
                if not place.exists():
                    part.config.save_pretrained(place) if model_of_transformers(part) else part.save_config(place)
                    kind = "model" if model_of_transformers(part) else "diffusion_pytorch_model"
                    write_random(part, place / f"{kind}.safetensors")
            (folder / name).symlink_to(place.resolve())
        pipe.save_config(folder)
    return folder


def model_of_transformers(part):
    return isinstance(part, transformers.PreTrainedModel)


def write_random(network, path, deviation=0.02, most=2**26):
    """A safetensors file of a network: matrices of random numbers, scales 1, biases 0, all in bfloat16."""
    torch.manual_seed(0)
    kept = {name: t for name, t in network.state_dict().items() if t.is_floating_point()}
    numbers = torch.randn(most).mul(deviation).bfloat16().view(torch.int16).numpy()
    flat = {value: torch.full((2**16,), value).bfloat16().view(torch.int16).numpy() for value in (0.0, 1.0)}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, t in kept.items():
        header[name] = {"dtype": "BF16", "shape": list(t.shape), "data_offsets": [end, end + 2 * t.numel()]}
        end += 2 * t.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, (name, t) in enumerate(kept.items()):
            values, left = numbers if t.ndim > 1 else flat[1.0 if name.endswith("weight") else 0.0], t.numel()
            start = number * 7919 * 64 % most if t.ndim > 1 else 0
            while left:
                written = values[start : start + left]
                file.write(written.data)
                left, start = left - len(written), 0


class Workload:
    """A model with what trains it, and one call of its pipeline as an epoch."""

    def __init__(self, args, device):
        assert args.model not in ("qwen", "wan"), "of qwen and wan there are --mode build and caps"
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
        self.pipe.__class__ = listening.with_known_device(type(self.pipe))
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


HOW = ("whole", "one")
"""Of --how, joined by +: the whole transformer compiled at once, not block by block; adapters that share their input
have one product with it."""


def one_product(layers):
    """Let the first of some adapters, which are called with one input in this order, multiply it for all."""
    held = []

    def forward(i, layer, x):
        if i == 0:
            downs = [each.lora_A["default"].weight for each in layers]
            held[:] = torch.nn.functional.linear(x, torch.cat(downs)).split([len(down) for down in downs], dim=-1)
        up = layer.lora_B["default"](held[i]) * layer.scaling["default"]
        if i == len(layers) - 1:
            held.clear()
        return layer.base_layer(x) + up

    for i, layer in enumerate(layers):
        layer.forward = functools.partial(forward, i, layer)


def prepare(load, how):
    """Make the workload's network what --how says."""
    how = how.split("+")
    assert set(how) <= {"eager", "compiled", *HOW}, how
    for module in load.denoiser.modules() if "one" in how else ():
        for names in (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")):
            layers = [getattr(module, name, None) for name in names]
            if all(isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer) for layer in layers):
                one_product(layers)
    if "whole" in how:
        load.denoiser.forward = torch.compile(load.denoiser.forward, dynamic=False, options={"combo_kernels": True})
        compiled.repeated_blocks = lambda *_: ()
    if {"compiled", "whole"} & set(how):
        compiled.compile_blocks(load.denoiser)
        compiled.compile_decoder(load.pipe)


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
        if scale == args.guidance[0]:
            prepare(load, how)
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


CONTEXT = 0.6  # GiB that CUDA takes for itself and torch does not count
SHORT = (
    *("--reward", "jpeg_compressibility=1", "--train.unique-sample-num-per-epoch", "2", "--train.max-epochs", "2"),
    *("--train.gradient-step-per-epoch", "1", "--train.num-train-steps", "2", "--eval.num-inference-steps", "10"),
    *("--eval.eval-freq", "2", "--train.group-size"),
)


def caps(args):
    """Two epochs of `grpo.py` by each recipe whose name says how many GiB are enough, in a process with so many."""
    found = (settings.HERE / "docs" / "recipes").glob(f"{args.model}-{args.recipes}gib.yaml")
    found = sorted(found, key=lambda path: [int(number) for number in re.findall(r"\d+", path.stem)])
    assert found, f"no recipe is named {args.model}-{args.recipes}gib.yaml"
    spawn = multiprocessing.get_context("spawn")
    turns = [spawn.Event() for _ in found]
    runs = [spawn.Process(target=capped, args=(recipe, args, turn)) for recipe, turn in zip(found, turns, strict=True)]
    runs[0].start()
    build(args)
    print(f"python grpo.py --config RECIPE {' '.join(SHORT)} 4 (2 of wan)")
    table("recipe", "result", "ms/image", "peak GiB", "reserved", "max abs log ratio", "evaluation, s", "all, s")
    for i, (recipe, run, turn) in enumerate(zip(found, runs, turns, strict=True)):
        turn.set()
        for later in runs[i + 1 : i + 2]:  # one loads its packages while another works
            later.start()
        run.join(args.limit)
        if run.is_alive():
            run.kill()
            row(recipe.stem, f"not done in {args.limit} s")


def capped(recipe, args, turn):
    """A recipe in this process, when it is its turn; prints its row."""
    turn.wait()
    gib, began, clock = int(re.findall(r"\d+", recipe.stem)[-1]), time.perf_counter(), Clock()
    gpu, log, lines, result = torch.cuda.is_available(), Run.log, [], "works"
    if gpu:
        torch.cuda.set_per_process_memory_fraction((gib - CONTEXT) * 2**30 / torch.cuda.mem_get_info()[1])

    def logged(run, epoch, columns):
        log(run, epoch, columns)
        lines.append((time.perf_counter() - clock.spent["evaluation"], run.rows[-1]["images"]))

    Run.log = logged
    clock.add(Run, "evaluate", "evaluation")
    with tempfile.TemporaryDirectory() as folder:
        prompts, group = Path(folder) / "prompts.txt", 2 if args.model == "wan" else 4
        prompts.write_text("a red circle\na blue square left of a white cross\n")
        sys.argv = ["grpo.py", "--config", str(recipe), "--model", str(args.models / args.model), *SHORT, str(group)]
        sys.argv += ["--prompts", str(prompts), "--output-dir", folder, "--run-name", "run", *args.script.split()]
        said = open(os.devnull, "w") if not args.script else sys.stderr  # noqa: SIM115
        try:
            with contextlib.redirect_stdout(said):
                grpo.main()
        except torch.OutOfMemoryError as error:
            frames = traceback.extract_tb(error.__traceback__)
            own = next(f.name for f in frames[::-1] if str(settings.HERE) in f.filename and "site" not in f.filename)
            result = f"out of memory in {own}, {Path(frames[-1].filename).stem}.{frames[-1].name}: {str(error)[:90]}"
        except BaseException as error:
            traceback.print_exc()
            result = f"{type(error).__name__}: {error}"[:300]
        log = Path(folder) / "run" / "log.txt"
        ratio = re.findall(r"max .log ratio. of the first call ([^ ,]+)", log.read_text() if log.exists() else "")
    ms = [1e3 * (b[0] - a[0]) / (b[1] - a[1]) for a, b in itertools.pairwise(lines)][-1:]
    most = [torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30] if gpu else [0.0, 0.0]
    spent = clock.spent["evaluation"], time.perf_counter() - began
    row(recipe.stem, result, *(ms or ["-"]), *most, *(ratio or ["-"]), *spent)


def reward_networks(folder, device):
    """{reward: its options}: networks of the published architectures and sizes, in the published formats."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    letters = ["<|startoftext|>", "<|endoftext|>", *words[5:], *(f"{letter}</w>" for letter in words[5:])]
    letters += [f"<{i}>" for i in range(len(letters), 49408)]  # as many as there are, not the same
    torch.manual_seed(0)
    torch.set_default_device(device)  # where random numbers are made at once

    def clip_of(name, vision, text, width):
        tokens = dict(vocab_size=49408, bos_token_id=0, eos_token_id=1, pad_token_id=1)
        config = transformers.CLIPConfig(
            vision_config=vision | dict(patch_size=14), text_config=text | tokens, projection_dim=width
        )
        transformers.CLIPModel(config).save_pretrained(folder / name)
        transformers.CLIPTokenizer(vocab={w: i for i, w in enumerate(letters)}, merges=[]).save_pretrained(
            folder / name
        )
        transformers.CLIPImageProcessorPil().save_pretrained(folder / name)
        return str(folder / name)

    def size(width, layers, heads):
        named = dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers)
        return named | dict(num_attention_heads=heads)

    def head(prefix, width):
        sizes = [width, 1024, 128, 64, 16, 1]
        layers = zip((0, 2, 4, 6, 7), sizes, sizes[1:], strict=False)
        made = {f"{prefix}{i}.weight": torch.randn(b, a) / a**0.5 for i, a, b in layers}
        return made | {name.replace("weight", "bias"): torch.randn(len(w)) for name, w in made.items()}

    large = clip_of("large", size(1024, 24, 16), size(768, 12, 12), 768)
    huge = clip_of("huge", size(1280, 32, 16), size(1024, 24, 16), 1024)
    torch.save(head("layers.", 768), folder / "head.pth")

    text = dict(size(768, 12, 12), vocab_size=30524, max_position_embeddings=512, hidden_act="gelu", pad_token_id=0)
    text |= dict(layer_norm_eps=1e-12, model_type="bert", add_cross_attention=True, encoder_width=768)
    (folder / "med_config.json").write_text(json.dumps(text))
    transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    vision = transformers.BlipVisionConfig(**size(1024, 24, 16), image_size=224, patch_size=16)
    said = transformers.BlipTextConfig(**text, encoder_hidden_size=1024)
    seen = transformers.BlipVisionModel(vision).state_dict()
    for old, new in reversed(imagereward.BLIP_NAMES.items()):
        new, old = re.escape(new), old.replace("\\", "").removeprefix("^")
        seen = {re.sub(rf"^{new}" if not new.startswith(r"\.") else new, old, name): t for name, t in seen.items()}
    made = {f"blip.visual_encoder.{name}": t for name, t in seen.items()} | head("mlp.layers.", 768)
    reader = transformers.BlipTextModel(said, add_pooling_layer=False).state_dict()
    torch.save(made | {f"blip.text_encoder.{name}": t for name, t in reader.items()}, folder / "ImageReward.pt")

    labels = dict(enumerate(geneval.OBJECTS))
    transformers.RTDetrForObjectDetection(transformers.RTDetrConfig(id2label=labels)).save_pretrained(folder / "detr")
    transformers.RTDetrImageProcessor().save_pretrained(folder / "detr")
    torch.set_default_device(None)
    return {
        "clipscore": {"model": large},
        "pickscore": {"model": huge, "processor": huge},
        "hpsv2": {"model": huge, "processor": huge},
        "aesthetic": {"model": large, "head": str(folder / "head.pth")},
        "imagereward": {"model": str(folder), "tokenizer": str(folder)},
        "geneval": {"detector": str(folder / "detr"), "clip": large, "threshold": 0.0},
    }


def rewards(load, args):
    """Each reward for a batch: alone on this device and on the CPU, and beside the sampling of the next batches."""
    calls, per = args.calls, 1e3 / args.batch
    made = reward_networks(args.models / "rewards", load.device)
    prompts = ["a photo of a red car and a dog"] * args.batch
    images = torch.rand(args.batch, 3, args.resolution, args.resolution, generator=torch.Generator().manual_seed(0))
    call, rows = load.arguments(1.0), [{"prompt": prompt} for prompt in prompts]
    table(
        "sampling", "reward", "ms/image", "weights, GiB", "and peak", "CPU, ms/image", "max abs value", "difference",
        "sampling alone, ms/image", "both", "both over the longer",
    )  # fmt: skip
    for how in args.how.split(","):
        prepare(load, how)
        load.sample(call, []), load.sample(call, []), load.sample(call, [])
        alone = timed(lambda: [load.sample(call, []) for _ in range(calls)])[0] * per / calls
        for name, given in made.items():
            before, options = torch.cuda.memory_allocated() / 2**30, {f"{name}.{key}": v for key, v in given.items()}
            peak()
            reward = make_reward({name: 1.0}, load.device, options)
            weights, here = torch.cuda.memory_allocated() / 2**30 - before, images.to(load.device)
            reward(here, prompts), reward(here, prompts)
            seconds, scores = timed(reward, here, prompts, repeats=args.repeats)
            most, on_cpu, few = peak() - before, ["-", "-", "-"], slice(4)
            if how == args.how.split(",")[0]:
                slow, there = timed(make_reward({name: 1.0}, "cpu", options), images[few], prompts[few])
                gap = (scores["total"][few].cpu() - there["total"]).abs().max().item()
                on_cpu = [slow * 1e3 / 4, there["total"].abs().max().item(), f"{gap:.2g}"]

            def both(reward=reward):
                scoring = evaluation.Scoring(reward, args.batch)
                for _ in range(calls):
                    scoring.add(load.sample(call, []).images, rows)
                scoring.finish()

            together = timed(both)[0] * per / calls
            row(
                how, name, seconds * per, weights, most, *on_cpu, alone, together,
                together / max(alone, seconds * per),
            )  # fmt: skip
            del reward


def share(_, args):
    """What `python grpo.py` does with the time of an epoch, in the script itself; evaluation not counted."""
    clock, begun, log = Clock(), [], Run.log

    def mark(run, epoch, columns):
        if epoch == 0:
            clock.spent.clear()
            begun.append(time.perf_counter())
        log(run, epoch, columns)

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
    if args.mode == "build":
        return print(build(args))
    if args.mode == "caps":
        return caps(args)
    device = machine.pick_device(grpo.Args(device=args.device, cudnn_attention=args.cudnn_attention))
    if parallel.rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if device.type == "cpu":
        torch.set_num_threads(1)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "the CPU, one thread"
    print(f"{args.model} on {where}, torch {torch.__version__}, diffusers {diffusers.__version__}", flush=True)
    tables = {"speed": speed, "memory": memory, "scaling": scaling, "share": share, "ranks": ranks}
    tables |= {"rewards": rewards}
    tables[args.mode](None if args.mode == "share" else Workload(args, device), args)


if __name__ == "__main__":
    with parallel.processes():
        main()
