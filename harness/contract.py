"""What must hold before the first update of any algorithm here: terms for Run.contract, {what: (value, it holds)}."""

from collections import defaultdict
from dataclasses import replace

import torch
from PIL import ImageOps

from common import Snapshot, autocast, copy_nested, generators, gradient_norm, replay, rollout
from harness.data import is_picture
from harness.fields import refuse


def kl_gradient(policy, reference, predict, penalty):
    """The KL penalty has a gradient. At the base model that is 0 as the penalty is, so look from a little beside it.

    policy: {name: parameter}; predict() -> what the parameters predict; penalty(that, the reference's) -> a scalar.
    """
    beside = Snapshot(policy.values())
    beside.values = [value + 1e-3 * torch.randn_like(value) for value in beside.values]
    with torch.no_grad(), reference.loaded():
        base = predict()
    with beside.loaded():
        penalty(predict(), base).backward()
    norm = gradient_norm(policy.values()).item()
    for p in policy.values():
        p.grad = None
    return {"KL gradient beside the base model": (norm, norm > 0)}


def sampling(pipe, rollouts, group_size, same_init_noise=False):
    """No two images of a group have the same noise, and without noise a rollout is what the plain pipeline makes."""
    same = count_repeated_noise(rollouts, group_size, same_init_noise)
    difference = ode_difference(pipe, rollouts[0].call)
    terms = {
        "images with the noise of another": (same, same == 0),
        "ODE against the plain pipeline": (difference, difference == 0),
    }
    check_pictures(pipe, rollouts[0].call)
    scale = rollouts[0].call.get("guidance_scale", 1)
    if scale > 1 and not guidance_counts(pipe, rollouts[0]):
        terms[f"NOTE, without effect in {type(pipe).__name__}: guidance_scale"] = (scale, True)
    return terms


def first_images(call):
    """The call for its first two images alone, from given noise; some pipelines also draw from the global generator."""
    few = {key: value[:2] if isinstance(value, list) else value for key, value in call.items()}
    torch.manual_seed(0)
    return copy_nested({**few, "generator": generators(*((0, i) for i in range(len(few["prompt"]))))})


def check_pictures(pipe, call):
    """Refuse several pictures in a call where another prompt's picture changes an image: they are then references."""
    pictures = [key for key, value in call.items() if is_picture(key) and isinstance(value, list) and len(value) > 1]
    other = call | {key: [call[key][0], ImageOps.invert(call[key][1])] for key in pictures}
    if pictures and not torch.equal(*(rollout(pipe, first_images(c), "ODE", 0.0, ()).x0[0] for c in (call, other))):
        remedy = f"{type(pipe).__name__} does not make one image of each picture; 1 would do, and for eval too"
        refuse("train.per_device_batch_size", len(call["prompt"]), remedy)


@torch.no_grad()
def guidance_counts(pipe, rollout):
    """Whether another guidance_scale would give another velocity; some pipelines take it and make no use of it."""
    other = replace(rollout, call=rollout.call | {"guidance_scale": rollout.call["guidance_scale"] + 1})
    k = min(rollout.steps, default=0)
    x = None if rollout.steps else rollout.noise
    return not torch.equal(*(replay(pipe, tape, k, x)[0] for tape in (rollout, other)))


def count_repeated_noise(rollouts, group_size, same_init_noise):
    """How many images have the noise of another image of their group, at the start or in any step.

    With same_init_noise the start is shared on purpose and not looked at.
    """
    drawn, repeated = defaultdict(list), 0
    for tape in rollouts:
        noises = {} if same_init_noise else {"start": tape.noise}
        noises |= {k: (step.x_next - step.mean) / step.std for k, step in tape.steps.items()}
        for when, noise in noises.items():
            drawn[when].append(noise.flatten(1)[:, :64].clone())  # 64 numbers tell images apart
    for noise in drawn.values():
        groups = torch.cat(noise).float().unflatten(0, (-1, group_size))
        apart = torch.cdist(groups, groups, p=torch.inf)  # noise of two images differs by about 3
        apart.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        repeated += int((apart.amin(dim=2) < 0.05).sum())
    return repeated


@torch.no_grad()
def ode_difference(pipe, call):
    """The largest difference between the images of a rollout without noise and of the plain pipeline."""
    with autocast(pipe):
        plain = pipe(**first_images(call))[0]
    return (rollout(pipe, first_images(call), "ODE", 0.0, ()).images - plain).abs().max().item()
