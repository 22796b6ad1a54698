"""The pictures of a run: a grid of images at each evaluation, and the curve."""

import importlib.util
import textwrap

import numpy as np
from PIL import Image, ImageDraw

GAP = 2  # pixels of the line between the base model's image and the policy's


def evenly(count, most):
    """Up to `most` indices below count, evenly taken, the first and the last among them."""
    return np.linspace(0, count - 1, min(most, count)).astype(int).tolist()


def save_grid(path, shown, prompts, totals, base=None):
    """A PNG of images (a row of frames for a video), each with its prompt and its reward under it.

    shown: {i: (frames, H, W, 3) uint8}; prompts, totals: by the same i. base: (shown, totals) of the base model for
    the same noise, drawn at the left of each image (above each video), with a line between them and its reward.
    """
    frames, side = next(iter(shown.values())).shape[:2]
    scale = max(1, 128 // side)
    tiles, captions = [], []
    for i, policy in shown.items():
        strips = [np.hstack(policy)] if base is None else [np.hstack(base[0][i]), np.hstack(policy)]
        strips = [strip.repeat(scale, axis=0).repeat(scale, axis=1) for strip in strips]
        axis = 1 if frames == 1 else 0
        line = np.full_like(strips[0].take(range(GAP), axis), 255)
        tiles.append(np.concatenate([strips[0], *(part for strip in strips[1:] for part in (line, strip))], axis))
        before = "" if base is None else f"base {base[1][i]:.3g}{' | ' if frames == 1 else ', below '}policy "
        captions.append(f"{before}{totals[i]:.3g}")
    height, width = tiles[0].shape[:2]
    columns = min(max(1, 8 * side * scale // (width - GAP)), len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (width + 8), rows * (height + 44)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (i, tile) in enumerate(zip(shown, tiles, strict=True)):
        left, top = place % columns * (width + 8) + 4, place // columns * (height + 44) + 4
        sheet.paste(Image.fromarray(tile), (left, top))
        prompt = "\n".join(textwrap.wrap(prompts[i], width // 6)[:2])
        draw.text((left, top + height + 2), f"{prompt}\n{captions[place]}", fill="black")
    sheet.save(path)


def save_curve(path, rows):
    """A PNG of eval/total and its rewards, and of the training reward, against images; where matplotlib is installed.

    rows: of metrics.csv, {column: number}.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure  # without a display

    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    of_evaluation = [key for key in rows[0] if key.startswith("eval/") and not key.startswith("eval/image/")]
    for key in [*(of_evaluation if len(of_evaluation) > 2 else of_evaluation[:1]), "train/reward/total"]:
        points = [(row["images"], row[key]) for row in rows if key in row]
        if points:
            style = {"alpha": 0.4} if key.startswith("train/") else {"marker": "o", "markersize": 3}
            axes.plot(*zip(*points, strict=True), label=key, **style)
    axes.set(xlabel="images sampled in training")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=90, bbox_inches="tight")
