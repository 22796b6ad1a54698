"""The last weights of a run on the embedded model, evaluated with 10 and 40 steps, without guidance and with 3.

    python docs/evaluate.py runs/NAME                     a line for each, and a table in runs/NAME/finals.csv
    python docs/evaluate.py runs/NAME --resolution 64 --images-per-prompt 1

By plain diffusers, on the held-out prompts and the noise of the scripts' own evaluations. Accuracy is the share of
right images, of all prompts and of each kind.
"""

import argparse
import csv
import statistics
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
common, world = __import__("common"), __import__("shapes.world", fromlist=["world"])


def trained(folder):
    """The embedded pipeline with a run's LoRA or transformer."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe = common.load_pipeline(str(ROOT / "shapes" / "model"), device, torch.float32)
    if (folder / "lora").exists():
        pipe.load_lora_weights(str(folder / "lora"))
    else:
        pipe.transformer.load_state_dict(load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def evaluate(pipe, prompts, side, steps, guidance):
    """{"accuracy": share of right images, kind of prompt: share of its images}"""
    noise, kinds = common.generators(*((1, i) for i in range(len(prompts)))), {}
    calls = 384 if pipe.device.type == "cuda" else 64
    for start in range(0, len(prompts), calls):
        part = slice(start, start + calls)
        images = pipe(
            prompts[part], height=side, width=side, num_inference_steps=steps, guidance_scale=guidance,
            generator=noise[part], max_sequence_length=1, output_type="pt",
        ).images  # fmt: skip
        for prompt, right in zip(prompts[part], world.check(images.float(), prompts[part]).tolist(), strict=True):
            kinds.setdefault(world.kind(prompt), []).append(right)
    accuracy = statistics.mean(right for scores in kinds.values() for right in scores)
    return {"accuracy": accuracy} | {kind: statistics.mean(scores) for kind, scores in sorted(kinds.items())}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--images-per-prompt", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = trained(args.folder)
    prompts = (ROOT / "shapes" / "prompts" / "eval.txt").read_text().splitlines()
    prompts = [prompt for prompt in prompts for _ in range(args.images_per_prompt)]
    rows = []
    for steps, guidance in ((10, 1.0), (10, 3.0), (40, 1.0), (40, 3.0)):
        rows.append({"steps": steps, "guidance": guidance} | evaluate(pipe, prompts, args.resolution, steps, guidance))
        print(", ".join(f"{name} {value:.3g}" for name, value in rows[-1].items()), flush=True)
    with open(args.folder / "finals.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
