"""DiffusionNFT: reinforcement learning of a flow-matching image model on its forward process.

One epoch: a group of images for each of a few prompts, by any sampler and without densities; rewards; A = (reward −
group mean) / std, squeezed to an optimality r in [0, 1]; then plain flow matching on noised versions of those images,
once with an implicit positive policy v⁺ = (1 − β) v_old + β v, weighted by r, and once with an implicit negative one
v⁻ = (1 + β) v_old − β v, weighted by 1 − r. What the policy learns from is the old policy, an average that trails it.

    DiffusionNFT   arXiv 2509.16117   the defaults
    CPS            arXiv 2509.05952   --train.dynamics-type CPS --train.noise-level 0.8   (slower here)

Where the paper and the released code differ, this file follows the code: the loss is divided by β and multiplied by
the clip range of the advantage, so that the first gradient in v is −2 A σ² (v_target − v_old) whatever β is (if x0
errors are not divided as below); the two x0 errors have their own weights; there may be a KL to the base model, which
Algorithm 1 lacks; advantages are divided by the std of all rewards. Dividing each x0 error by its own size
(--train.self-normalised) makes the pull towards v_target one of constant strength, like an L1 loss: it does not fade
as v gets there. One thing is this file's own: a call of the pipeline is trained at one timestep at a time, all its
images together, because a network's output can depend on its batch. Several updates per epoch matter: only away from
v_old do the two losses pull back to it (docs/results.md).

    python nft.py                                         the embedded model, on the machine in front of you
    python nft.py --model stabilityai/stable-diffusion-3.5-medium --prompts prompts.txt --reward mine.py:f=1
    python nft.py --help
"""

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Literal, Optional

import numpy as np
import torch

import common
import dynamics
import rewards
from common import Resolution, Snapshot, generators, refuse, replay, rollout, size


@dataclass
class TrainArgs:
    """DiffusionNFT's settings for SD3.5-medium are the defaults."""

    trainer_type: Literal["nft"] = "nft"
    """Names this script in YAML files."""

    # What is sampled in an epoch

    unique_sample_num_per_epoch: int = 48
    """Prompts in an epoch; a shorter file is gone through again."""
    group_size: int = 24
    """Images of each prompt; their rewards are compared with one another."""
    per_device_batch_size: int = 16
    """Images in one call of the pipeline, in sampling and in training alike."""
    resolution: Resolution = 512
    """Pixels in training: one side of a square, or height and width."""
    num_inference_steps: int = 10
    """Sampling steps T in training."""
    solver: Literal[dynamics.SOLVERS] = "Euler"
    """Of the ODE sampler: Euler, or DPM-Solver++, which is of second order (as the paper's is) at the same cost."""
    guidance_scale: float = 1.0
    """Classifier-free guidance in sampling and in all predictions; the paper trains without, which is 1."""
    dynamics_type: Literal[dynamics.DYNAMICS] = "ODE"
    """The sampler only: ODE, or Flow-SDE, Dance-SDE or CPS with noise in all steps but the last."""
    noise_level: float = 0.7
    """a of Flow-SDE (0.7), eta of Dance-SDE (0.3), a of CPS (0.8)."""
    off_policy: bool = True
    """Sample and predict with an old policy that trails; otherwise it is the policy at the start of the epoch."""
    old_decay_start: int = 0
    """Optimizer steps i before the old policy begins to trail."""
    old_decay_slope: float = 0.001
    """Its decay is slope * (i − start), up to the maximum. The paper: 0, 0.001, 0.5; for OCR 75, 0.0075, 0.999."""
    old_decay_max: float = 0.5
    """old <- decay * old + (1 − decay) * policy, once per epoch."""

    # The loss

    train_steps: Optional[list[int]] = None
    """Candidates for the timesteps of the loss, as indices of the sampling schedule; None is all but the last."""
    num_train_steps: Optional[int] = None
    """How many of the candidates are drawn in each epoch. None is all of them."""
    nft_beta: float = 1.0
    """β: how far the implicit policies are from the old one. The smaller it is, the further v can go before
    the losses pull it back; the paper has 1 and 0.1."""
    negative_term: bool = True
    """Train v⁻, weighted by 1 − r, too. Without it only v⁺, weighted by r, is trained: the ablation in which the paper
    saw the reward collapse."""
    adv_clip_range: float = 5.0
    """Advantages are clipped to ± this, which makes the optimality r = 1/2 + A / (2 · this)."""
    global_std: bool = True
    """Divide advantages by the standard deviation of all rewards of the epoch instead of the group's. Not in gdpo."""
    advantage_aggregation: Literal["sum", "gdpo"] = "sum"
    """Of several weighted rewards: sum takes the advantages of their sum, gdpo adds up those of each (group std)."""
    self_normalised: bool = True
    """Divide each squared x0 error by its own mean absolute error, without a gradient, as the paper does."""
    kl_type: Literal["v-based", "x-based"] = "v-based"
    """The penalty mean (v − v_ref)². There are no transition means here, so x-based is refused."""
    kl_beta: float = 1e-4
    """Weight of the KL penalty to the base model; 0 keeps no copy of it."""
    ref_param_device: Literal["same_as_model", "cpu"] = "same_as_model"
    """Where the copies of the trained parameters, base model and old policy, wait."""

    # The optimizer

    max_epochs: int = 1000
    """Epochs of the run."""
    gradient_step_per_epoch: int = 1
    """Optimizer steps in one pass over an epoch's images."""
    num_inner_epochs: int = 1
    """Passes over an epoch's images, each with noise of its own."""
    learning_rate: float = 3e-4
    """Of AdamW, constant."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's first and second moments."""
    adam_weight_decay: float = 1e-4
    """Decoupled weight decay."""
    adam_epsilon: float = 1e-8
    """Must be well below the gradients, which a mean over dimensions makes small."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    enable_gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    ema_decay: float = 0.9
    """Of the average of the trained parameters that is evaluated and saved; 0 keeps none."""
    ema_update_interval: int = 1
    """Optimizer steps between updates of that average."""
    seed: int = 0
    """With the other settings this decides the run."""


@dataclass
class Args(common.RunArgs):
    """DiffusionNFT. See the top of nft.py."""

    train: TrainArgs = field(default_factory=TrainArgs)
    eval: common.EvalArgs = field(default_factory=common.EvalArgs)


def check(args):
    """Refuse settings that cannot work, before anything is loaded."""
    train = args.train
    if train.kl_type == "x-based":
        remedy = "the loss has no transitions whose means could be compared; take v-based"
        refuse("train.kl_type", "x-based", remedy)
    if train.nft_beta <= 0:
        refuse("train.nft_beta", train.nft_beta, "must be above 0; the paper has 1 and 0.1")
    if not 0 <= train.old_decay_max < 1:
        refuse("train.old_decay_max", train.old_decay_max, "must be at least 0 and below 1")
    if train.dynamics_type != "ODE" and not 0 < train.noise_level <= (1 if train.dynamics_type == "CPS" else np.inf):
        refuse("train.noise_level", train.noise_level, "must be above 0 (and at most 1 for CPS); 0.7 is usual")
    if train.solver != "Euler" and train.dynamics_type != "ODE":
        refuse("train.solver", train.solver, f"is for the ODE, and {train.dynamics_type} has steps of its own")
    if train.group_size < 2:
        refuse("train.group_size", train.group_size, "an image alone in its group has advantage 0; take at least 2")
    checks = common.check_args(args)
    steps, last = candidate_steps(train), train.num_inference_steps - 1
    if train.train_steps is None and not steps:
        refuse("train.num_inference_steps", 1, "train.train_steps = None is all but the last step, so none; take more")
    if not steps or sorted(set(steps)) != sorted(steps) or not all(0 <= k <= last for k in steps):
        refuse(
            "train.train_steps",
            train.train_steps,
            f"with train.num_inference_steps = {last + 1} needs different indices from 0 to {last}",
        )
    if train.num_train_steps is not None and not 1 <= train.num_train_steps <= len(steps):
        remedy = f"must be 1 to {len(steps)}, or None: train.train_steps has the candidates {sorted(steps)}"
        refuse("train.num_train_steps", train.num_train_steps, remedy)
    for key, value, checked in checks:
        with common.refusing(key, value):
            rewards.check_rewards(*checked)


def candidate_steps(train):
    """Indices of the timesteps that the loss may be trained on."""
    return list(range(train.num_inference_steps - 1)) if train.train_steps is None else train.train_steps


def drawn_steps(train, epoch):
    """The trained timesteps of an epoch, decided by (seed, epoch) alone."""
    candidates = candidate_steps(train)
    rng = np.random.default_rng([train.seed, epoch])
    return sorted(rng.choice(candidates, train.num_train_steps or len(candidates), replace=False).tolist())


def old_decay(train, updates):
    """How much of the old policy stays when it is updated after so many optimizer steps."""
    if not train.off_policy:
        return 0.0
    return min(train.old_decay_max, train.old_decay_slope * max(0, updates - train.old_decay_start))


def group_advantages(rewards, group_size, global_std=True):
    """A = (R − group mean) / std. rewards: (N,), groups contiguous. Returns (N,).

    The std is that of all rewards, or else the group's (both without Bessel's correction). A group of equal rewards
    has advantage 0: it says nothing about which image is better.
    """
    groups = rewards.reshape(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    std = rewards.std(correction=0) if global_std else groups.std(dim=1, correction=0, keepdim=True)
    constant = (groups == groups[:, :1]).all(dim=1, keepdim=True)
    return torch.where(constant, 0, centred / (std + 1e-4)).reshape(-1)


def gdpo_advantages(scores, weights, group_size):
    """GDPO, arXiv 2601.05242: the weighted sum of each reward's own advantages in its groups, over the sum's std.

    scores: {"name": (N,)}, groups contiguous; weights: {"name": weight}. Returns (N,), of mean 0 and, over the epoch,
    std 1. So the scale of a reward does not count (if its std is well above 1e-4), only its weight; one that is
    constant in a group adds 0 there.
    """
    total = sum(weight * group_advantages(scores[name], group_size, False) for name, weight in weights.items())
    return total / (total.std(correction=0) + 1e-4)


def nft_loss(v, v_old, x_t, x0, sigma, advantages, nft_beta, adv_clip_range, self_normalised=True, negative_term=True):
    """The two weighted flow-matching losses of the paper's objective, or the first alone, as regressions of x0.

    v, v_old, x_t, x0: (B, ...); x_t = (1 − sigma) x0 + sigma noise; sigma: a float or (B,); advantages: (B,).
    Returns (loss, metrics).
    """
    batch = len(advantages)
    assert v.shape == v_old.shape == x_t.shape == x0.shape and advantages.shape == (batch,)
    v, v_old, x_t, x0 = (t if t.dtype == torch.float64 else t.float() for t in (v, v_old.detach(), x_t, x0))
    sigma = torch.as_tensor(sigma, dtype=x_t.dtype, device=x_t.device).reshape(-1, *[1] * (x_t.ndim - 1))
    r = (advantages / (2 * adv_clip_range) + 0.5).clamp(0, 1)

    def x0_loss(implicit_v):  # (B,)
        error = x_t - sigma * implicit_v - x0
        scale = 1.0
        if self_normalised:
            scale = error.detach().abs().flatten(1).mean(dim=1).clamp(min=1e-5)
        return (error**2).flatten(1).mean(dim=1) / scale

    positive = x0_loss((1 - nft_beta) * v_old + nft_beta * v)
    negative = x0_loss((1 + nft_beta) * v_old - nft_beta * v)
    weighted = r * positive + (1 - r) * negative if negative_term else r * positive
    loss = adv_clip_range * (weighted / nft_beta).mean()
    return loss, {
        "policy_loss": loss.detach(),
        "positive_loss": positive.detach().mean(),
        "negative_loss": negative.detach().mean(),
        "optimality_std": r.std(correction=0),
        "v_old_distance": ((v - v_old).detach() ** 2).mean(),
    }


def main():
    args, sources = common.parse_args(Args, __doc__)
    check(args)
    train = args.train
    run = common.Run(args, sources, __file__)

    # Model, reward, optimizer
    device = common.pick_device(args)
    made = rewards.make_rewards(args.reward, args.eval.reward, device, args.reward_options)
    reward, eval_reward = map(run.watch, made)
    judge = common.Judge(reward)
    pipe = common.make_pipeline(args, device)
    named = common.trainable_parameters(pipe, args, train.seed)
    parameters = list(named.values())
    copies = device if train.ref_param_device == "same_as_model" else "cpu"
    old = Snapshot(parameters, copies)
    reference = Snapshot(parameters, copies) if train.kl_beta > 0 else None
    ema = Snapshot(parameters) if train.ema_decay > 0 else None
    optimizer = torch.optim.AdamW(
        parameters, train.learning_rate, train.adam_betas, train.adam_epsilon, train.adam_weight_decay, fused=True
    )
    checkpoint = common.Checkpoint(run, named, optimizer, old=old, reference=reference, ema=ema)
    prompts = common.read_prompts(args.prompts)
    # DPM-Solver++ takes the steps after the last noisy one; the ODE has none, so these are all
    tail_steps = train.num_inference_steps if train.solver == "DPM-Solver++" else None
    noisy_steps = range(train.num_inference_steps - 1) if train.dynamics_type != "ODE" else ()
    common.print_plan(run, args, parameters, trained_steps=len(drawn_steps(train, 1)), networks=2 + bool(reference))

    def evaluate(epoch):
        with ema.loaded() if ema else nullcontext():
            columns = run.evaluate(epoch, pipe, eval_reward)
            run.save_weights(pipe)
        return columns

    first, updates = checkpoint.load(evaluate)  # 0, 0 of a new run; one that ends where it stopped is evaluated
    if first == 0:
        run.log({"epoch": 0, "images": 0, **evaluate(0)})
        checkpoint.save(0, updates)
    height, width = size(train.resolution)
    for epoch in range(max(first, 1), train.max_epochs + 1):
        metrics = common.Metrics()

        # Sampling by the old policy: the images of the epoch in order of (prompt, member), in calls of one batch
        steps = drawn_steps(train, epoch)
        chosen = common.epoch_prompts(prompts, train.unique_sample_num_per_epoch, train.seed, epoch)
        members = [(group, member) for group in range(len(chosen)) for member in range(train.group_size)]
        batches = common.batches(common.own(members), train.per_device_batch_size)
        rollouts, texts, looks = [], {}, common.Looks(train.group_size)  # texts: what was encoded already
        for batch in common.progress(batches, "sampling and rewards"):
            start_seeds, step_seeds = ([(train.seed, epoch, g, m, part) for g, m in batch] for part in (0, 1))
            call = dict(
                prompt=[chosen[g] for g, _ in batch],
                height=height,
                width=width,
                num_inference_steps=train.num_inference_steps,
                guidance_scale=train.guidance_scale,
                generator=generators(*start_seeds),
                **args.call,
            )
            noise = generators(*step_seeds)
            with old.loaded():
                tape = rollout(
                    pipe, call, train.dynamics_type, train.noise_level, noisy_steps, noise, tail_steps, texts=texts
                )
            images = tape.images.float()
            judge.submit(images, call["prompt"])
            looks.add(images)
            rollouts.append(replace(tape, images=None))  # a replay does not need them
        scores = judge.scores()
        totals = scores["total"]
        metrics.add({f"reward/{name}": value.mean() for name, value in scores.items()})
        if train.advantage_aggregation == "gdpo":
            advantages = gdpo_advantages(scores, args.reward, train.group_size)
        else:
            advantages = group_advantages(totals, train.group_size, train.global_std)
        advantages = common.own(advantages).split(train.per_device_batch_size)  # scores are of all processes
        metrics.add(common.group_metrics(looks, totals, train.group_size))
        if epoch == 1:
            first_step_contract(run, pipe, train, parameters, old, reference, rollouts, totals)

        # Training: each optimizer step over whole calls x trained timesteps, on the images with fresh noise
        for number, chunk in enumerate(common.calls_of_updates(train, epoch)):
            update = common.Metrics()
            for i, k in common.progress(list(product(chunk, steps)), "training"):
                x0, sigma = rollouts[i].x0, rollouts[i].sigmas[k].item()
                x_t = noised(x0, sigma, generators(*((train.seed, epoch, g, m, 2, number, k) for g, m in batches[i])))
                with torch.no_grad(), old.loaded():
                    v_old, _ = replay(pipe, rollouts[i], k, x_t)
                if reference:
                    with torch.no_grad(), reference.loaded():
                        v_ref, _ = replay(pipe, rollouts[i], k, x_t)
                v, _ = replay(pipe, rollouts[i], k, x_t)
                loss, terms = nft_loss(
                    v, v_old, x_t, x0, sigma, advantages[i],
                    train.nft_beta, train.adv_clip_range, train.self_normalised, train.negative_term,
                )  # fmt: skip
                update.add(terms)
                if reference:
                    penalty = ((v.float() - v_ref.float()) ** 2).mean()
                    loss = loss + train.kl_beta * penalty
                    update.add({"v_ref_distance": penalty})
                update.add({"loss": loss})
                (loss / (len(chunk) * len(steps))).backward()
            metrics.add(common.step_optimizer(run, optimizer, named, update, train.max_grad_norm))
            updates += 1
            if ema and updates % train.ema_update_interval == 0:
                ema.update(min(train.ema_decay, (1 + updates) / (10 + updates)))  # sooner away from the base model
        assert updates == epoch * train.num_inner_epochs * train.gradient_step_per_epoch
        decay = old_decay(train, updates)
        old.update(decay)
        metrics.add({"old_decay": decay})

        due = epoch % args.eval.eval_freq == 0 or epoch == train.max_epochs
        row = {"epoch": epoch, "images": epoch * len(members), **metrics.means("train/")}
        run.log(row | (evaluate(epoch) if due else {}))
        checkpoint.save(epoch, updates)


def noised(x0, sigma, generator):
    """x_t = (1 − σ) x0 + σ ε with one generator per image, in the dtype of x0."""
    noise = torch.stack([torch.randn(x0.shape[1:], generator=g) for g in generator]).to(x0.device)
    return ((1 - sigma) * x0.float() + sigma * noise).to(x0.dtype)


def first_step_contract(run, pipe, train, parameters, old, reference, rollouts, totals):
    """Print what must hold before the first update, and stop the run if it does not."""
    k = drawn_steps(train, 1)[0]
    x = rollouts[0].noise
    v = replay(pipe, rollouts[0], k, x)[0].detach()
    with torch.no_grad(), old.loaded():
        distance = (replay(pipe, rollouts[0], k, x)[0] - v).abs().max().item()
    run.contract("max |v - v_old| before the first update", distance, distance == 0)
    if reference:
        # at the base model the penalty and its gradient are 0, so look from a little beside it
        beside = Snapshot(parameters)
        beside.values = [value + 1e-3 * torch.randn_like(value) for value in beside.values]
        with torch.no_grad(), reference.loaded():
            v_ref = replay(pipe, rollouts[0], k, x)[0]
        with beside.loaded():
            ((replay(pipe, rollouts[0], k, x)[0].float() - v_ref.float()) ** 2).mean().backward()
        gradient = common.gradient_norm(parameters).item()
        for p in parameters:
            p.grad = None
        run.contract("KL gradient, a little away from the base model", gradient, gradient > 0)
    same = common.shared_noise(rollouts, train.group_size, same_init_noise=False)
    run.contract("images that share their noise with another", same, same == 0)
    difference = common.ode_difference(pipe, rollouts[0].call)
    run.contract("ODE rollout against the plain pipeline, max |difference|", difference, difference == 0)
    run.check_signal(totals, train.group_size)


if __name__ == "__main__":
    common.start(main)
