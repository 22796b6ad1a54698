"""Scoring images while the next are made, what they look like, and the evaluation: the plain pipeline under its own
ODE, on fixed prompts and fixed noise.
"""

import math
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import torch

from common import autocast, call_arguments, copy_nested, generators, in_pipeline_call, rollout
from harness.console import progress
from harness.data import with_pictures
from harness.parallel import gather, gather_rows, local_shard, recording
from harness.pictures import evenly


def silent_groups(totals, group_size):
    """Which groups have rewards that are all equal, and so say nothing. totals: (N,); returns (groups,) booleans."""
    groups = totals.reshape(-1, group_size)
    return (groups == groups[:, :1]).all(dim=1)


def contrast(images):
    """{"contrast": (N,)}: std of the pixels of an image. images: (N, ...)."""
    return {"contrast": images.flatten(1).std(dim=1)}


class Scoring:
    """Scores the images of one call, in a thread of its own, while the pipeline makes the next, and looks at them.

    Images come in the order of their groups. What is kept of them is the group that is not complete yet.
    """

    def __init__(self, reward, group_size, statistics=contrast):
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
    """The metrics of an epoch's images; some show a run going wrong before its reward does.

    zero_std: share of groups whose rewards are all equal; group_spread: how different a group's images are.
    """
    totals = scores["total"]
    return {
        **{f"reward/{name}": value.mean() for name, value in scores.items()},
        "reward_std": totals.reshape(-1, group_size).std(dim=1, correction=0).mean(),
        "zero_std": silent_groups(totals, group_size).float().mean(),
        **statistics,
    }


def image_statistics(images):
    """{"name": (N,)}: how images look, whatever they show; a policy that hacks its reward often moves one of these.

    images: (N, 3, H, W) in [0, 1], or videos (N, frames, 3, H, W), of which the frames' mean is taken. Grey is the
    mean of the three channels; a neighbour is one pixel to the left, right, above or below.

    mean: of all values; 0 black to 1 white.
    contrast: standard deviation of all values; 0 to 0.5.
    sharpness: mean |grey of a pixel - mean of its four neighbours'|; 0 to 1, a checkerboard of pixels.
    edge_density: share of the pairs of neighbours whose grey differs by more than 0.1; 0 to 1.
    saturation: mean of (max - min) / max of a pixel's channels, that of HSV; 0 grey to 1 pure colours.
    """
    frames = images.float().flatten(0, -4)
    grey = frames.mean(dim=1)
    around = (grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:] + grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1]) / 4
    steps = torch.cat([grey.diff(dim=1).flatten(1), grey.diff(dim=2).flatten(1)], dim=1)
    most, least = frames.amax(dim=1), frames.amin(dim=1)
    statistics = {
        "mean": frames.flatten(1).mean(dim=1),
        "contrast": frames.flatten(1).std(dim=1, correction=0),
        "sharpness": (grey[:, 1:-1, 1:-1] - around).abs().flatten(1).mean(dim=1),
        "edge_density": (steps.abs() > 0.1).float().mean(dim=1),
        "saturation": ((most - least) / most.clamp(min=1e-6)).flatten(1).mean(dim=1),
    }
    return {name: value.reshape(len(images), -1).mean(dim=1) for name, value in statistics.items()}


SHOWN = 32  # images of an evaluation that are kept and drawn
FRAMES = 8  # of a video among them


@torch.no_grad()
def evaluate(pipe, args, rows, reward):
    """Make images of the evaluation's rows with the plain pipeline, and look at them.

    Returns (prompts of length N, scores {"name": (N,), ..., "total": (N,)}, statistics {"name": mean}, shown). The
    statistics are those of image_statistics and, where a prompt has several images, group_spread. shown: {i: (frames,
    H, W, 3) uint8} for a few images, evenly taken, as are the frames of a video.
    """
    each = args.eval.images_per_prompt
    rows = [row for row in rows for _ in range(each)]
    prompts = [row["prompt"] for row in rows]
    noise = generators(*((args.eval.seed, i) for i in range(len(prompts))))
    scoring, shown = Scoring(reward, each, image_statistics), dict.fromkeys(evenly(len(prompts), SHOWN))
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
            if i in shown:
                frames = image[evenly(len(image), FRAMES)] if image.ndim == 4 else image[None]
                shown[i] = (frames.permute(0, 2, 3, 1) * 255).round().clamp(0, 255).byte().cpu().numpy()
    scores, statistics = scoring.finish()
    parts = gather({i: frames for i, frames in shown.items() if frames is not None})
    shown = {i: frames for part in parts for i, frames in part.items()}
    scores = {name: value.cpu() for name, value in scores.items()}
    return prompts, scores, {name: mean.item() for name, mean in statistics.items()}, shown
