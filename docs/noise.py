"""How much noise a sampler leaves in its images: the embedded base model under each dynamics, by number of steps.

    python docs/noise.py    some minutes on one CPU core: the table of docs/results/claim-7.md, and noise.csv beside it

Every step but the last is stochastic. "Noise" is the size of what the checker's world has none of, pixel to pixel
differences on flat background: 1.4826 x the median of |pixel - mean of its four neighbours|, in thousandths of the
range [0, 1]. Three seeds, 96 held-out prompts x 2 each: mean ± half of their range.
"""

import statistics
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
common, world = __import__("common"), __import__("shapes.world", fromlist=["world"])

SAMPLERS = [("ODE", 0.0), ("Flow-SDE", 0.7), ("Flow-SDE", 1.0), ("Dance-SDE", 0.3), ("CPS", 0.5), ("CPS", 0.8)]
STEPS = (4, 6, 10, 20)


def left_noise(images):
    """images: (B, 3, H, W) in [0, 1]. The noise of each, (B,)."""
    inner = images[:, :, 1:-1, 1:-1]
    around = (images[:, :, :-2, 1:-1] + images[:, :, 2:, 1:-1] + images[:, :, 1:-1, :-2] + images[:, :, 1:-1, 2:]) / 4
    return 1.4826 * (inner - around).abs().flatten(1).median(dim=1).values


def measure(pipe, prompts, dynamics_type, level, steps, seed):
    """(accuracy, noise) of a sampler."""
    right, noise = [], []
    for start in range(0, len(prompts), 64):
        batch = prompts[start : start + 64]
        places = range(start, start + len(batch))
        begin, draws = (common.generators(*((seed, i, part) for i in places)) for part in (0, 1))
        call = dict(
            prompt=batch, height=32, width=32, num_inference_steps=steps, guidance_scale=1.0, generator=begin,
            max_sequence_length=1,
        )  # fmt: skip
        noisy = () if dynamics_type == "ODE" else range(steps - 1)
        images = common.rollout(pipe, call, dynamics_type, level, noisy, draws).images
        right.append(world.check(images, batch))
        noise.append(left_noise(images))
    return torch.cat(right).mean().item(), 1e3 * torch.cat(noise).mean().item()


def spread(values, form):
    return f"{statistics.mean(values):{form}} ± {(max(values) - min(values)) / 2:{form}}"


def main():
    torch.set_num_threads(1)
    pipe = common.load_pipeline(str(ROOT / "shapes" / "model"), torch.device("cpu"), torch.float32)
    prompts = [p for p in (ROOT / "shapes" / "prompts" / "eval.txt").read_text().splitlines() for _ in range(2)]
    cells = [f"{steps} steps: accuracy | noise" for steps in STEPS]
    print("| sampler |", " | ".join(cells), "|\n|---|" + "---|---|" * len(STEPS))
    kept = ["sampler,steps,seed,accuracy,noise"]
    for dynamics_type, level in SAMPLERS:
        sampler = f"{dynamics_type} {level:g}" if level else dynamics_type
        row = [sampler]
        for steps in STEPS:
            seeds = [measure(pipe, prompts, dynamics_type, level, steps, seed) for seed in range(3)]
            kept += [f"{sampler},{steps},{seed},{right:.5g},{noise:.5g}" for seed, (right, noise) in enumerate(seeds)]
            right, noise = zip(*seeds, strict=True)
            row += [spread(right, ".3f"), spread(noise, ".2f")]
        print("|", " | ".join(row), "|", flush=True)
    (ROOT / "docs" / "results" / "noise.csv").write_text("\n".join(kept) + "\n")


if __name__ == "__main__":
    main()
