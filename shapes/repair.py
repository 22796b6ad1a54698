"""Image to image in the embedded world: pictures that show something else than their prompt asks, to be put right.

    python -m shapes.repair     writes repair/train.jsonl and repair/eval.jsonl with their pictures, 32 x 32 pixels

The picture of a prompt is that of another prompt of the same list; the held-out prompts are all in eval.jsonl.
`--config docs/recipes/shapes-repair.yaml` trains on it, rewarded for what is right and for what was left as it was.
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from shapes import world

HERE = Path(__file__).resolve().parent


def close(images, prompts, rows):
    """1 − mean |image − given picture|, (B,), 0 to 1. images: (B, 3, H, W) in [0, 1]; the picture is the row's."""
    height, width = images.shape[-2:]
    given = [np.asarray(row["image"].resize((width, height))) for row in rows]
    given = torch.from_numpy(np.stack(given)).permute(0, 3, 1, 2).to(images) / 255
    return 1 - (images - given).abs().flatten(1).mean(dim=1)


def write(name, prompts, rng):
    """repair/NAME.jsonl, with a picture for each prompt."""
    folder = HERE / "repair" / name
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, prompt in enumerate(prompts):
        other = rng.choice([p for p in prompts if p != prompt])
        picture = f"{name}/{number:03d}.png"
        Image.fromarray(world.render(str(other), 32, rng)).save(folder.parent / picture, optimize=True)
        lines.append(json.dumps({"prompt": prompt, "image": picture, "shows": str(other)}))
    (folder.parent / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def main():
    rng = np.random.default_rng(0)
    train, held_out = ((HERE / "prompts" / f"{name}.txt").read_text().splitlines() for name in ("train", "eval"))
    write("train", rng.choice(train, 128, replace=False).tolist(), rng)
    write("eval", held_out, rng)


if __name__ == "__main__":
    main()
