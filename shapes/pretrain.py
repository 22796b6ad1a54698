"""Makes the embedded model: a small StableDiffusion3Pipeline that draws the shapes world, from random weights.

    python -m shapes.pretrain                       # everything, on one GPU; writes shapes/model
    python -m shapes.pretrain --init shapes/model   # more flow training, from the weights that are there
    python -m shapes.pretrain --report-only         # accuracy of shapes/model; without a GPU also its cost

1. Data: images rendered from random captions; a quarter of them get a wrong caption, like images of the web, so
   that the base model knows the world but does not obey: what is left for RL (and guidance) to mend.
2. VAE: L1 + MSE + a little KL. Its latents, shifted and scaled to mean 0 and standard deviation 1, are kept.
3. Flow: the transformer and both text encoders together, rectified flow with caption dropout:
       x_sigma = (1 - sigma) x0 + sigma eps,    v = eps - x0,    loss = mean |v_theta(x_sigma, caption, sigma) - v|^2
4. The scheduler's shift is measured and chosen, and accuracy is reported through the saved pipeline.

Both trainings last a given number of seconds, and their learning rates follow the elapsed fraction of it. Whatever
is finished in `work` is not done again, and a broken flow training goes on from its last checkpoint.
"""

import copy
import functools
import math
import multiprocessing
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from shapes import world
from shapes.world import COLOURS, COUNTS, PAIRS, RELATIONS, SHAPES, Scene


@dataclass
class Args:
    out: str = "shapes/model"
    """folder of the finished model, in diffusers format"""
    work: str = "runs/pretrain"
    """folder of the data, the VAE and the checkpoint"""
    seed: int = 0
    """seed of data, weights and noise"""

    patch_size: int = 2
    """side of the transformer's patches, in latents (one latent is 4x4 pixels)"""
    width: int = 128
    """width of the transformer, a multiple of 32"""
    layers: int = 7
    """layers of the transformer"""

    images_32: int = 400_000
    """number of images of 32x32 pixels"""
    images_64: int = 64_000
    """number of images of 64x64 pixels"""
    wrong_captions: float = 0.25
    """share of images with a wrong caption: half of these with one wrong attribute, half of another scene"""

    vae_seconds: float = 75
    """duration of the VAE's training"""
    vae_batch: int = 512
    """images of 32x32 pixels, or a quarter as many of 64x64"""
    vae_lr: float = 2e-3
    """peak learning rate of the VAE"""
    kl_weight: float = 2e-4
    """weight of the KL divergence per latent"""

    flow_seconds: float = 330
    """duration of the flow training"""
    batch: int = 1024
    """images of 32x32 pixels, or half as many of 64x64"""
    init: str = ""
    """go on from the weights of this model folder, with its VAE (the optimizer starts afresh)"""
    lr: float = 1e-3
    """peak learning rate"""
    ema_decay: float = 0.9995
    """decay of the averaged weights, which are the ones saved"""
    dropout: float = 0.1
    """share of captions replaced by the empty one, for guidance"""
    share_64: float = 0.15
    """share of steps at 64x64 pixels"""
    checkpoint_seconds: float = 60
    """time between checkpoints"""

    compile: bool = True
    """compile the transformer's blocks (half a minute); GPU only"""
    graph: bool = True
    """capture the flow step as a CUDA graph: launching its many small kernels takes longer than running them"""
    eval_images: int = 16
    """images per evaluation prompt in the final report"""
    workers: int = os.cpu_count() or 1
    """rendering processes"""
    data_only: bool = False
    """stop after data and VAE, so that several models can then be trained on them side by side"""
    report_only: bool = False
    """only report on the model in `out`"""


def log(*words):
    print(f"[{time.perf_counter() - START:6.1f} s]", *words, flush=True)


START = time.perf_counter()
BY_KIND = {  # every scene of the world; "two" in both orders
    "single": [Scene((a,)) for a in PAIRS],
    "count": [Scene((a,) * n) for a in PAIRS for n in COUNTS.values()],
    "two": [Scene((a, b)) for a in PAIRS for b in PAIRS if a != b],
    "position": [Scene((a, b), relation) for a in PAIRS for b in PAIRS if a != b for relation in RELATIONS],
}
MIX = {"single": 0.1, "count": 0.25, "two": 0.25, "position": 0.4}
SCENES = [scene for scenes in BY_KIND.values() for scene in scenes]
PROMPTS = [""] + [scene.prompt for scene in SCENES]  # a caption is an index into this list

# ------------------------------------------------------------------------------------------------ data


def random_scene(rng: np.random.Generator) -> Scene:
    scenes = BY_KIND[rng.choice(list(MIX), p=list(MIX.values()))]
    return scenes[rng.integers(len(scenes))]


def wrong_scene(scene: Scene, rng: np.random.Generator) -> Scene:
    """A scene other than the given one: with one attribute changed, or another altogether."""
    while True:
        other = random_scene(rng)
        if rng.random() < 0.5:
            objects, relation = list(scene.objects), scene.relation
            attributes = {"position": 3, "two": 2, "single": 3, "count": 3}[scene.kind]
            attribute = rng.integers(attributes)
            if attribute < 2:  # the colour or the shape of one object (of all, where they are the same)
                i = rng.integers(len(objects))
                colour, shape = objects[i]
                pair = (rng.choice(list(COLOURS)), shape) if attribute == 0 else (colour, rng.choice(SHAPES))
                pair = (str(pair[0]), str(pair[1]))
                objects = [pair] * len(objects) if scene.kind == "count" else objects[:i] + [pair] + objects[i + 1 :]
            elif relation:
                relation = str(rng.choice(RELATIONS))
            else:
                objects = objects[:1] * int(rng.integers(1, 5))
            other = Scene(tuple(objects), relation)
        same_twice = other.kind == "position" and other.objects[0] == other.objects[1]
        turned_count = scene.kind == "two" and other.kind == "count" and len(other.objects) == 2
        same_scene = (sorted(other.objects), other.relation) == (sorted(scene.objects), scene.relation)
        if not (same_scene or same_twice or turned_count):
            return other


def draw(job: tuple[tuple, int, int, float]) -> tuple[np.ndarray, np.ndarray]:
    """(seeds, n, side, share of wrong captions) -> images uint8 (n, side, side, 3), captions int16 (n,)."""
    seed, n, side, wrong = job
    rng = np.random.default_rng(seed)
    index = {prompt: i for i, prompt in enumerate(PROMPTS)}
    images, captions = np.empty((n, side, side, 3), np.uint8), np.empty(n, np.int16)
    for i in range(n):
        scene = random_scene(rng)
        images[i] = world.render(scene, side, rng)
        captions[i] = index[(wrong_scene(scene, rng) if rng.random() < wrong else scene).prompt]
    return images, captions


def draw_all(args: Args) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """{side: (images uint8 (N, 3, side, side), captions (N,))} for both sides."""
    data = {}
    with multiprocessing.Pool(args.workers) as pool:
        for side, total in ((32, args.images_32), (64, args.images_64)):
            sizes = [min(1000, total - start) for start in range(0, total, 1000)]
            jobs = [((args.seed, side, i), n, side, args.wrong_captions) for i, n in enumerate(sizes)]
            images, captions = zip(*pool.imap(draw, jobs), strict=True)
            images, captions = torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(captions))
            data[side] = images.permute(0, 3, 1, 2), captions.long()
    return data


# ------------------------------------------------------------------------------------------------ models


def make_tokenizer() -> CLIPTokenizer:
    """One token per word of the grammar: a BPE vocabulary whose merges build exactly these words."""
    words = ["a", "and", *COUNTS, *COLOURS, *SHAPES, *world.PLURALS.values(), *" ".join(RELATIONS).split()]
    merges, letters = [], set()
    for word in dict.fromkeys(words):
        tokens = [*word[:-1], word[-1] + "</w>"]
        letters |= set(tokens)
        for left, right in merges:  # earlier merges come first, so this word's own are those still missing
            i = 0
            while i < len(tokens) - 1:
                if (tokens[i], tokens[i + 1]) == (left, right):
                    tokens[i : i + 2] = [left + right]
                i += 1
        while len(tokens) > 1:
            merges.append((tokens[0], tokens[1]))
            tokens[:2] = ["".join(tokens[:2])]
    names = ["<|startoftext|>", "<|endoftext|>", *sorted(letters), *dict.fromkeys(a + b for a, b in merges)]
    tokenizer = CLIPTokenizer(vocab={n: i for i, n in enumerate(names)}, merges=merges, model_max_length=10)
    for prompt in PROMPTS:  # 10 = the longest caption, 8 words, with its start and end
        assert len(tokenizer(prompt).input_ids) == len(prompt.split()) + 2, prompt
    return tokenizer


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=32,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def make_flow(args: Args, vocabulary: int) -> torch.nn.ModuleDict:
    """The trained trio. The text embedding is both encoders' hidden states side by side: 2 x 64 features."""
    text = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=256,
        projection_dim=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=10,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=args.patch_size,
        in_channels=4,
        out_channels=4,
        num_layers=args.layers,
        attention_head_dim=32,
        num_attention_heads=args.width // 32,
        caption_projection_dim=args.width,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        pos_embed_max_size=24 // args.patch_size,  # images up to 96 pixels
        qk_norm="rms_norm",
    )
    encoders = {name: CLIPTextModelWithProjection(text) for name in ("text_encoder", "text_encoder_2")}
    return torch.nn.ModuleDict({"transformer": transformer, **encoders})


def make_pipeline(flow: torch.nn.ModuleDict, vae, tokenizer, shift: float = 1.0) -> StableDiffusion3Pipeline:
    pipe = StableDiffusion3Pipeline(
        **dict(flow.items()),
        vae=vae,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(pipe: StableDiffusion3Pipeline, out: str):
    """Half precision, to keep the repository small; loading converts to the precision asked for, by default float32."""
    modules = {name: copy.deepcopy(m).half() for name, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    StableDiffusion3Pipeline(**{**pipe.components, **modules}).save_pretrained(out)
    for config in Path(out).glob("text_encoder*/config.json"):  # transformers would otherwise load what is stored
        config.write_text(config.read_text().replace('"float16"', '"float32"'))


def load(out: str, device) -> StableDiffusion3Pipeline:
    pipe = StableDiffusion3Pipeline.from_pretrained(out, text_encoder_3=None, tokenizer_3=None, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


# ------------------------------------------------------------------------------------------------ training


def rate(elapsed: float, peak: float) -> float:
    """Learning rate at an elapsed fraction: warm-up over 2 %, then a cosine to 1 % of the peak."""
    return peak * min(elapsed / 0.02, 0.01 + 0.99 * (1 + math.cos(math.pi * min(elapsed, 1.0))) / 2)


def pixels(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 127.5 - 1


def train_vae(args: Args, data: dict, device) -> AutoencoderKL:
    vae = make_vae().to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=1e-4, fused=device.type == "cuda")
    start, step = time.perf_counter(), 0
    while (elapsed := (time.perf_counter() - start) / args.vae_seconds) < 1:
        optimizer.param_groups[0]["lr"] = rate(elapsed, args.vae_lr)
        side = 64 if step % 4 == 3 else 32
        images = data[side][0]
        index = torch.randint(len(images), (args.vae_batch if side == 32 else args.vae_batch // 4,), device=device)
        x = pixels(images[index])
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample()).sample - x
        l1, mse = error.abs().mean(), error.square().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = l1 + mse + args.kl_weight * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 500 == 0 or step == 10:
            log(f"vae step {step}: L1 {l1.item():.4f}  MSE {mse.item():.5f}  KL per latent {kl.item():.2f}")
    log(f"vae trained: {step} steps in {time.perf_counter() - start:.0f} s, L1 {l1.item():.4f}, MSE {mse.item():.5f}")
    return vae.eval()


@torch.no_grad()
def encode_all(vae: AutoencoderKL, data: dict, rescale: bool) -> dict:
    """{side: (standardised latents float16, captions)}; `rescale` sets the VAE's shift and scale to standardise."""
    latents = {}
    for side, (images, _) in data.items():
        n = 8192 if side == 32 else 2048
        latents[side] = torch.cat([vae.encode(pixels(x)).latent_dist.mean for x in images.split(n)])
        log(f"latents at {side} px: mean {latents[side].mean().item():.3f}, std {latents[side].std().item():.3f}")
    if rescale:
        shift, std = latents[32].mean().item(), latents[32].std().item()
        vae.register_to_config(shift_factor=round(shift, 5), scaling_factor=round(1 / std, 5))
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    return {side: (((z - shift) * scale).half(), data[side][1]) for side, z in latents.items()}


@torch.no_grad()
def reconstructed(vae: AutoencoderKL, side: int, n: int, seed: int = 1) -> float:
    """Share of freshly rendered images that still pass their check after the VAE."""
    rng, device = np.random.default_rng(seed), next(vae.parameters()).device
    scenes = [random_scene(rng) for _ in range(n)]
    images = torch.from_numpy(np.stack([world.render(s, side, rng) for s in scenes])).permute(0, 3, 1, 2).to(device)
    decoded = [vae.decode(vae.encode(pixels(x)).latent_dist.mean).sample for x in images.split(256)]
    decoded = (torch.cat(decoded) / 2 + 0.5).clamp(0, 1)
    return world.check(decoded, [s.prompt for s in scenes]).mean().item()


def predict(flow: torch.nn.ModuleDict, x: torch.Tensor, tokens: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """v_theta as the pipeline computes it: x (B, 4, h, w), tokens (B, 10), sigma (B,) -> (B, 4, h, w)."""
    encoded = [flow[name](tokens, output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")]
    embeds = torch.cat([e.hidden_states[-2] for e in encoded], -1)  # (B, 10, 128)
    embeds = F.pad(embeds, (0, 0, 0, 1))  # the one zero token that stands for the absent T5
    pooled = torch.cat([e.text_embeds for e in encoded], -1)
    return flow["transformer"](x, embeds, pooled, 1000 * sigma, return_dict=False)[0]


def train_flow(args: Args, latents: dict, vae: AutoencoderKL, device):
    """Trains, and saves the averaged weights to `out` at every checkpoint."""
    tokenizer = make_tokenizer()
    tokens = tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids.to(device)
    flow = make_flow(args, len(tokenizer)).to(device)
    ema = copy.deepcopy(flow).requires_grad_(False).eval()
    if args.init:
        start = load(args.init, device)
        for name in flow:
            flow[name].load_state_dict(start.components[name].state_dict())
            ema[name].load_state_dict(start.components[name].state_dict())
    cuda = device.type == "cuda"
    lr, average = torch.zeros((), device=device), torch.zeros((), device=device)  # tensors, so that a graph reads them
    optimizer = torch.optim.AdamW(
        flow.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.01, fused=cuda, foreach=False, capturable=cuda
    )
    log(f"flow: {sum(p.numel() for p in flow.parameters()) / 1e6:.2f} M parameters, {len(tokenizer)} tokens")
    path, seconds, step = Path(args.work) / f"flow-{Path(args.out).name}.pt", 0.0, 0
    if path.exists():
        state = torch.load(path, map_location=device)
        flow.load_state_dict(state["flow"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        optimizer.param_groups[0]["lr"] = lr
        seconds, step = state["seconds"], state["step"]
        log(f"going on from step {step}, {seconds:.0f} s")
    weights, averages = list(flow.parameters()), list(ema.parameters())
    total = torch.zeros((), device=device)

    def train_step(side: int):  # waits for nothing on the host, so that it can be captured
        z, captions = latents[side]
        n = args.batch if side == 32 else args.batch // 2
        index = torch.randint(len(z), (n,), device=device)
        caption = captions[index] * (torch.rand(n, device=device) >= args.dropout)  # caption 0 is the empty one
        x0 = z[index].float()
        eps = torch.randn_like(x0)
        sigma = torch.sigmoid(0.3 + 1.2 * torch.randn(n, device=device))
        s = sigma.view(-1, 1, 1, 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda, cache_enabled=False):
            v = predict(flow, (1 - s) * x0 + s * eps, tokens[caption], sigma)
        loss = (v.float() - (eps - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        with torch.no_grad():
            change = torch._foreach_sub(weights, averages)
            torch._foreach_mul_(change, average)
            torch._foreach_add_(averages, change)
            total.add_(loss.detach())

    if args.compile and cuda:
        for block in flow["transformer"].transformer_blocks:  # all layers share one compilation
            block.compile(dynamic=False)
    steps = warm_up(train_step, args.graph and cuda)
    total.zero_()
    log("ready to train")
    rng = np.random.default_rng(args.seed + step)
    since, clock, saved = 0, time.perf_counter(), seconds
    while True:
        elapsed = seconds / args.flow_seconds
        if elapsed >= 1 or seconds - saved >= args.checkpoint_seconds:
            saved = seconds
            state = {"flow": flow.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "seconds": seconds, "step": step}, path)
            pipe = make_pipeline(ema, vae, tokenizer, shift=2.0)
            save(pipe, args.out)
            result = evaluate(pipe, 10, 1, 32, min(4, args.eval_images))
            log(f"step {step}, {seconds:.0f} s: 10 steps, no guidance: {result}")
            clock = time.perf_counter()
        if elapsed >= 1:
            return
        lr.fill_(rate(elapsed, args.lr))
        average.fill_(max(1 - args.ema_decay, 9 / (step + 10)))
        steps[64 if rng.random() < args.share_64 else 32]()
        step, since = step + 1, since + 1
        if cuda and step % 20 == 0:  # the host must not run ahead of the clock
            torch.cuda.synchronize()
        if step in (1, 10, 100) or step % 1000 == 0:
            log(f"flow step {step}: loss {total.item() / since:.4f}")
            total.zero_()
            since = 0
        seconds += time.perf_counter() - clock
        clock = time.perf_counter()


def warm_up(train_step, graph: bool) -> dict:
    """{side: function of no arguments that trains one step}, after some steps with learning rate 0; maybe captured."""
    if not graph:
        for side in (32, 64):
            train_step(side)
        return {side: functools.partial(train_step, side) for side in (32, 64)}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for side in (32, 64) * 3:
            train_step(side)
    torch.cuda.current_stream().wait_stream(stream)
    graphs = {}
    for side in (32, 64):
        graphs[side] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[side]):
            train_step(side)
    return {side: graph.replay for side, graph in graphs.items()}


# ------------------------------------------------------------------------------------------------ evaluation


def evaluate(pipe, steps: int, guidance: float, side: int, images_per_prompt: int, seed: int = 0) -> str:
    """Accuracy on eval.txt through the pipeline, overall and for each kind of caption."""
    prompts = (Path(__file__).parent / "prompts" / "eval.txt").read_text().splitlines() * images_per_prompt
    generator = torch.Generator(pipe.device).manual_seed(seed)
    n, right = 768 if pipe.device.type == "cuda" else 96, []
    for i in range(0, len(prompts), n):
        call = dict(num_inference_steps=steps, guidance_scale=guidance, height=side, width=side, max_sequence_length=1)
        images = pipe(prompts[i : i + n], generator=generator, output_type="pt", **call).images
        right.append(world.check(images, prompts[i : i + n]).cpu())
    right = torch.cat(right)
    kinds = np.array([world.kind(prompt) for prompt in prompts])
    each = "  ".join(f"{kind} {right[kinds == kind].mean():.3f}" for kind in MIX)
    return f"{right.mean():.3f}  ({each})"


@torch.no_grad()
def cost(pipe, batch: int = 24) -> str:
    """Milliseconds per image of 32x32 pixels on one CPU core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    z, words, pooled = torch.randn(batch, 4, 8, 8), torch.randn(batch, 11, 128), torch.randn(batch, 128)
    jobs = {
        "transformer": lambda: pipe.transformer(z, words, pooled, torch.full((batch,), 500.0)),
        "VAE decoder": lambda: pipe.vae.decode(z),
    }
    times = {}
    for name, job in jobs.items():
        runs = []
        for _ in range(12):
            start = time.perf_counter()
            job()
            runs.append(time.perf_counter() - start)
        times[name] = 1e3 * sorted(runs)[len(runs) // 2] / batch
    torch.set_num_threads(threads)
    return ", ".join(f"{name} {ms:.2f} ms" for name, ms in times.items())


def report(args: Args, device, choose_shift: bool):
    pipe = load(args.out, device)
    size = sum(f.stat().st_size for f in Path(args.out).rglob("*") if f.is_file())
    log(f"{args.out}: {size / 1e6:.2f} MB")
    for side in (32, 64):
        log(f"{side} px: {reconstructed(pipe.vae, side, 32 * args.eval_images):.4f} of images pass after the VAE")
    if device.type == "cpu":
        log("one CPU core, per image of 32 px:", cost(pipe))
    if choose_shift:
        results = {}
        for shift in (1.0, 2.0, 3.0):
            pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
            results[shift] = evaluate(pipe, 10, 1, 32, args.eval_images)
            log(f"shift {shift:.0f}: {results[shift]}")
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=max(results, key=results.get))
        pipe.scheduler.save_pretrained(Path(args.out) / "scheduler")
    log(f"shift {pipe.scheduler.config.shift:.0f}")
    settings = [(32, guidance, steps) for guidance in (1, 3) for steps in (10, 20, 40)]
    for side, guidance, steps in settings + [(64, 1, 10), (64, 3, 10), (64, 3, 20)]:
        n = args.eval_images if side == 32 else max(1, args.eval_images // 2)
        result = evaluate(pipe, steps, guidance, side, n)
        log(f"{side} px, guidance {guidance}, {steps} steps: {result}")


def main(args: Args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.report_only:
        return report(args, device, choose_shift=False)
    log(f"{args.images_32} + {args.images_64} images, VAE {args.vae_seconds} s, flow {args.flow_seconds} s on {device}")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = True
    torch.manual_seed(args.seed)
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "latents.pt").exists():
        data = {side: (x.to(device), y.to(device)) for side, (x, y) in draw_all(args).items()}
        log("rendered")
        vae = load(args.init, device).vae if args.init else train_vae(args, data, device)
        torch.save(encode_all(vae, data, rescale=not args.init), work / "latents.pt")
        vae.save_pretrained(work / "vae")
        log(f"after the VAE {reconstructed(vae, 32, 500):.3f} (32 px), {reconstructed(vae, 64, 500):.3f} (64 px) pass")
        del data
    if args.data_only:
        return
    vae = AutoencoderKL.from_pretrained(work / "vae").to(device).eval()
    vae.register_to_config(_name_or_path="")
    latents = torch.load(work / "latents.pt", map_location=device)
    train_flow(args, latents, vae, device)
    report(args, device, choose_shift=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
