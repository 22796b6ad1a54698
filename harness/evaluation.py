"""Scoring images while the next are made; the evaluation, on fixed prompts and fixed noise; its grid and curve."""

import importlib.util
import math
import textwrap
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw

from common import autocast, call_arguments, copy_nested, generators, in_pipeline_call, rollout
from harness.console import progress
from harness.data import with_pictures
from harness.judges.weights import pixels
from harness.parallel import gather, gather_rows, local_shard, recording


class Scoring:
    """Scores the images of one call, in a thread of its own, while the pipeline makes the next, and looks at them.

    Images come in the order of their groups. What is kept of them is the group that is not complete yet.
    """

    def __init__(self, reward, group_size, statistics=lambda images: {"contrast": images.flatten(1).std(dim=1)}):
        """statistics: images (B, ...) -> {"name": (B,)}; contrast is the std of an image's pixels."""
        self.reward, self.group_size, self.statistics = reward, group_size, statistics
        self.thread, self.calls = ThreadPoolExecutor(1), []
        self.columns, self.incomplete = defaultdict(list), []

    def add(self, images, rows):
        """images: (B, 3, H, W) in [0, 1], or videos, made of B rows. Raises what the reward raised for the last."""
        images = images.float()
        for call in self.calls:
            call.result()
        for name, values in self.statistics(images).items():
            self.columns[name].append(values)
        self.incomplete.extend(zip(images, rows, strict=True))
        while len(self.incomplete) >= self.group_size:
            group, self.incomplete = self.incomplete[: self.group_size], self.incomplete[self.group_size :]
            of_group = torch.stack([image for image, _ in group])
            if self.group_size > 1:
                self.columns["group_spread"].append(of_group.std(dim=0).mean()[None])
            if self.reward.takes_groups:
                self.calls.append(self.thread.submit(self._score, of_group, [row for _, row in group]))
        if not self.reward.takes_groups:
            self.calls.append(self.thread.submit(self._score, images, rows))

    def _score(self, images, rows):
        with recording:
            return self.reward(images, [row["prompt"] for row in rows], rows)

    def finish(self):
        """What was found of all images, of all processes in the order of their ranks.

        Returns (scores, statistics): {"name": (N,), ..., "total": (N,)} and {"name": mean}: those of the images and
        group_spread, a pixel's std over the images of its group, averaged.
        """
        scores = [call.result() for call in self.calls]
        scores = gather_rows({name: torch.cat([s[name] for s in scores]) for name in (scores[0] if scores else ())})
        columns = gather_rows({name: torch.cat(values) for name, values in self.columns.items()})
        return scores, {name: values.mean() for name, values in columns.items()}


def epoch_metrics(scores, statistics, group_size):
    """The metrics of an epoch's images; zero_std is the share of groups whose rewards are all equal."""
    groups = scores["total"].reshape(-1, group_size)
    metrics = {f"reward/{name}": value.mean() for name, value in scores.items()}
    metrics["reward_std"] = groups.std(dim=1, correction=0).mean()
    metrics["zero_std"] = (groups == groups[:, :1]).all(dim=1).float().mean()
    return metrics | statistics


def image_statistics(images):
    """{"name": (N,)}: how images look, whatever they show; a policy that hacks its reward often moves one of these.

    images: (N, 3, H, W) in [0, 1], or videos (N, frames, 3, H, W), of which the frames' mean is taken. Grey is the
    mean of the three channels; a neighbour is one pixel to the left, right, above or below.
    """
    frames = images.float().flatten(0, -4)
    grey = frames.mean(dim=1)
    around = (grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:] + grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1]) / 4
    steps = torch.cat([grey.diff(dim=1).flatten(1), grey.diff(dim=2).flatten(1)], dim=1)
    most, least = frames.amax(dim=1), frames.amin(dim=1)
    statistics = {
        "mean": frames.flatten(1).mean(dim=1),  # of all values; 0 black to 1 white
        "contrast": frames.flatten(1).std(dim=1, correction=0),  # of all values; 0 to 0.5
        "sharpness": (grey[:, 1:-1, 1:-1] - around).abs().flatten(1).mean(dim=1),  # 1 is a checkerboard of pixels
        "edge_density": (steps.abs() > 0.1).float().mean(dim=1),  # share of the pairs of neighbours
        "saturation": ((most - least) / most.clamp(min=1e-6)).flatten(1).mean(dim=1),  # HSV's; 0 grey to 1 pure colours
    }
    return {name: value.reshape(len(images), -1).mean(dim=1) for name, value in statistics.items()}


@torch.no_grad()
def evaluate(pipe, args, rows, reward):
    """Make images of the evaluation's rows with the plain pipeline, and look at them.

    Returns (prompts of length N, scores {"name": (N,), ..., "total": (N,)}, statistics {"name": mean}, shown). The
    statistics are those of image_statistics and, where a prompt has several images, group_spread. shown: {i: (frames,
    H, W, 3) uint8} for at most 32 images, evenly taken, as are at most 8 frames of a video.
    """
    each = args.eval.images_per_prompt
    rows = [row for row in rows for _ in range(each)]
    prompts = [row["prompt"] for row in rows]
    noise = generators(*((args.eval.seed, i) for i in range(len(prompts))))
    scoring, shown, to_show = Scoring(reward, each, image_statistics), {}, evenly(len(prompts), 32)
    length = args.eval.per_device_batch_size
    runs = range(0, len(prompts), math.lcm(length, each))  # of whole calls and of all images of a prompt
    starts = [start for run in local_shard(runs) for start in range(run, min(run + runs.step, len(prompts)), length)]
    idle = max(gather(len(starts))) - len(starts) if args.shard else 0  # a sharded network works in all processes
    for number, start in enumerate(progress([*starts, *[0] * idle], "evaluation")):
        batch = slice(start, start + length)
        given = [with_pictures(row) for row in rows[batch]]
        call = call_arguments(pipe, args.eval, args.call, given) | {"generator": noise[batch]}
        if args.eval.solver == "Euler":
            with autocast(pipe), in_pipeline_call():
                images = pipe(**copy_nested(call), output_type="pt", return_dict=False)[0].float()
        else:
            images = rollout(pipe, call, "ODE", 0.0, (), tail_steps=args.eval.num_inference_steps).images.float()
        if number >= len(starts):
            continue
        scoring.add(images, given)
        for i, image in enumerate(images, start):
            if i in to_show:
                shown[i] = pixels(image[evenly(len(image), 8)] if image.ndim == 4 else image[None])
    scores, statistics = scoring.finish()
    shown = {i: frames for part in gather(shown) for i, frames in part.items()}
    scores = {name: value.cpu() for name, value in scores.items()}
    return prompts, scores, {name: mean.item() for name, mean in statistics.items()}, shown


def evenly(count, most):
    """Up to `most` indices below count, evenly taken, the first and the last among them."""
    return np.linspace(0, count - 1, min(most, count)).astype(int).tolist()


def save_grid(path, shown, prompts, totals, base=None):
    """A PNG of images (a row of frames for a video), each with its prompt and its reward under it.

    shown: {i: (frames, H, W, 3) uint8}; prompts, totals: by the same i. base: (shown, totals) of the base model for
    the same noise, drawn at the left of each image (above each video), with a line between them and its reward.
    """
    gap = 2  # pixels of that line
    frames, side = next(iter(shown.values())).shape[:2]
    scale, axis, tiles = max(1, 128 // side), 1 if frames == 1 else 0, []
    for i, policy in shown.items():
        tile, caption = np.hstack(policy).repeat(scale, axis=0).repeat(scale, axis=1), f"{totals[i]:.3g}"
        if base is not None:
            before = np.hstack(base[0][i]).repeat(scale, axis=0).repeat(scale, axis=1)
            tile = np.concatenate([before, np.full_like(tile.take(range(gap), axis), 255), tile], axis)
            caption = f"base {base[1][i]:.3g}{' | ' if frames == 1 else ', below '}policy {caption}"
        height, width = tile.shape[:2]
        tiles.append(Image.new("RGB", (width + 8, height + 44), "white"))
        tiles[-1].paste(Image.fromarray(tile), (4, 4))
        prompt = "\n".join(textwrap.wrap(prompts[i], width // 6)[:2])
        ImageDraw.Draw(tiles[-1]).text((4, height + 6), f"{prompt}\n{caption}", fill="black")
    columns = min(max(1, 8 * side * scale // (width - gap)), len(tiles))
    tiles += [Image.new("RGB", tiles[0].size, "white")] * (-len(tiles) % columns)
    make_image_grid(tiles, len(tiles) // columns, columns).save(path)


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
