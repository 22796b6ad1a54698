"""GRPO-Guard: Flow-GRPO with a ratio that is not biased, and steps that weigh alike (arXiv 2510.22319).

The same as grpo.py but for what is marked "new in GRPO-Guard", and without what only other dynamics and TempFlow's
weights need. A step is x' = μ_old + τ ε. With Δμ = μ − μ_old the log of the true ratio is ε·Δμ/τ − |Δμ|²/2τ²: under
the old policy its mean is −|Δμ|²/2τ², always negative and different from step to step, so clipping bites on one side
only. (The true ratio has mean 1 all the same; but grpo.py, like all released codes, takes the mean over D dimensions,
and the D-th root of a ratio of mean 1 has a mean below 1.)

    RatioNorm     log r = τ (log-prob difference + mean Δμ² / 2τ²) = mean(ε Δμ) has mean 0, a spread without τ in it,
                  and is linear in μ. It is computed as mean(ε Δμ): the difference of log-probs loses it in rounding.
    Reweighting   its gradient still contains |∂μ/∂v| = h (1 + a²/2), so the loss of a step is divided by h.

Only for Flow-SDE: CPS's log-prob has no variance in it, and this formula would be wrong.

    python grpo_guard.py
    diff grpo.py grpo_guard.py
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
    """GRPO-Guard's settings for SD3.5-medium are the defaults."""

    trainer_type: Literal["grpo-guard"] = "grpo-guard"
    """Names this script in YAML files."""

    # What is sampled in an epoch

    unique_sample_num_per_epoch: int = 48
    """Prompts in an epoch; a shorter file is gone through again."""
    group_size: int = 24
    """Images of each prompt; their rewards are compared with one another."""
    per_device_batch_size: int = 12
    """Images in one call of the pipeline, in sampling and in training alike. Where it divides group_size, a call has
    one prompt: groups of equal rewards cost no training (without a KL), and same_init_noise shares the steps before the
    noise."""
    resolution: Resolution = 512
    """Pixels in training: one side of a square, or height and width."""
    num_inference_steps: int = 10
    """Sampling steps T in training; far fewer than for evaluation will do (Flow-GRPO)."""
    guidance_scale: float = 4.5
    """Classifier-free guidance in sampling and in training alike; 1 is none."""
    same_init_noise: bool = False
    """Start all images of a group from one noise (DanceGRPO, MixGRPO) instead of each from its own (Flow-GRPO)."""

    # Where the noise goes

    dynamics_type: Literal[dynamics.DYNAMICS] = "Flow-SDE"
    """Only Flow-SDE."""
    noise_level: float = 0.7
    """a of Flow-SDE (0.7), eta of Dance-SDE (0.3), a of CPS (0.8)."""
    train_steps: Optional[list[int]] = None
    """Candidates for the steps that are stochastic and trained, from 0 (all noise); None is all but the last."""
    num_train_steps: Optional[int] = None
    """How many of the candidates are drawn in each epoch; the other steps are ODE. None is all of them."""
    shift_interval: Optional[int] = None
    """Epochs after which MixGRPO's window, num_train_steps neighbouring candidates, moves on by one, up to the last
    ones. None draws the candidates anew in each epoch."""
    tail_steps: Optional[int] = None
    """Network calls after the last stochastic step, at most, by DPM-Solver++(2M) on a coarser grid (MixGRPO-Flash).
    None keeps the whole schedule there, with Euler's steps."""

    # The loss

    clip_range: float = 2e-6  # new in GRPO-Guard
    """The normalised ratio counts within 1 ± this; 2e-6 for GenEval and OCR, 4e-6 for PickScore."""
    adv_clip_range: float = 5.0
    """Advantages are clipped to ± this."""
    global_std: bool = False
    """Divide advantages by the standard deviation of all rewards of the epoch instead of the group's. Not in gdpo."""
    advantage_aggregation: Literal["sum", "gdpo"] = "sum"
    """Of several weighted rewards: sum takes the advantages of their sum, gdpo adds up those of each (group std)."""
    reweight: bool = True  # new in GRPO-Guard
    """Divide the loss of a step by its length h."""
    kl_type: Literal["v-based", "x-based"] = "v-based"
    """The penalty: mean (v − v_ref)² or mean (mean − mean_ref)². In Flow-SDE the second is (h (1 + a²/2))²
    times the first (h² in the first step)."""
    kl_beta: float = 0.0  # new in GRPO-Guard
    """Weight of the KL penalty; 0 keeps no copy of the base model. The loss beside it is divided by h, so that 1 / h
    times as much weighs as it does in grpo.py."""
    ref_param_device: Literal["same_as_model", "cpu"] = "same_as_model"
    """Where the base model's copy of the trained parameters waits."""

    # The optimizer

    max_epochs: int = 1000
    """Epochs of the run."""
    gradient_step_per_epoch: int = 2
    """Optimizer steps in one pass over an epoch's images; after the first the policy is no longer that of sampling."""
    num_inner_epochs: int = 1
    """Passes over an epoch's images."""
    learning_rate: float = 1e-4  # new in GRPO-Guard
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
    ema_update_interval: int = 8
    """Optimizer steps between updates of that average."""
    seed: int = 0
    """With the other settings this decides the run."""


@dataclass
class Args(common.RunArgs):
    """GRPO-Guard. See the top of grpo_guard.py."""

    train: TrainArgs = field(default_factory=TrainArgs)
    eval: common.EvalArgs = field(default_factory=common.EvalArgs)


def check(args):
    """Refuse settings that cannot work, before anything is loaded."""
    train = args.train
    if train.dynamics_type != "Flow-SDE":  # new in GRPO-Guard
        remedy = "GRPO-Guard is derived for Flow-SDE alone; take that, or train the others with grpo.py"
        refuse("train.dynamics_type", train.dynamics_type, remedy)
    if train.noise_level <= 0:
        refuse("train.noise_level", train.noise_level, "must be above 0; 0.7 is usual")
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
    if train.shift_interval is not None and train.shift_interval < 1:
        refuse("train.shift_interval", train.shift_interval, "must be at least 1; MixGRPO has 25")
    if train.shift_interval is not None and train.num_train_steps is None:
        remedy = "moves a window of train.num_train_steps steps, which is None; set that too (MixGRPO has 4)"
        refuse("train.shift_interval", train.shift_interval, remedy)
    most = last - sorted(steps)[(train.num_train_steps or len(steps)) - 1]
    if train.tail_steps is not None and not 1 <= train.tail_steps <= most:
        remedy = f"the last stochastic step is {last - most} or later, and after it come at most {most} steps"
        refuse("train.tail_steps", train.tail_steps, f"{remedy}; take 1 to that many, or None")
    for key, value, checked in checks:
        with common.refusing(key, value):
            rewards.check_rewards(*checked)


def candidate_steps(train):
    """Indices of the steps that may be stochastic and trained."""
    return list(range(train.num_inference_steps - 1)) if train.train_steps is None else train.train_steps


def drawn_steps(train, epoch):
    """The stochastic, trained steps of an epoch (from 1), decided by (seed, epoch) alone."""
    candidates = candidate_steps(train)
    count = train.num_train_steps or len(candidates)
    if train.shift_interval:
        start = min((epoch - 1) // train.shift_interval, len(candidates) - count)
        return sorted(candidates)[start : start + count]
    rng = np.random.default_rng([train.seed, epoch])
    return sorted(rng.choice(candidates, count, replace=False).tolist())


def most_steps(train):
    """Sampling steps of an image with a tail, at most: those up to the last stochastic one, and the tail."""
    start, end = max(candidate_steps(train)) + 1, train.num_inference_steps
    return start + min(train.tail_steps, end - start) if train.tail_steps else None


def step_weights(train, sigmas):
    """{k: weight} of each candidate step in the loss: 1 / h, or 1. sigmas: (T + 1,)."""  # new in GRPO-Guard
    # they do not average to 1: the loss grows by 1 / h against the KL, and so kl_beta weighs less than in grpo.py
    return {k: 1 / (sigmas[k] - sigmas[k + 1]) if train.reweight else 1.0 for k in candidate_steps(train)}


def group_advantages(rewards, group_size, global_std=False):
    """A = (R − group mean) / std, Flow-GRPO eq. 4. rewards: (N,), groups contiguous. Returns (N,).

    The std is the group's, or with global_std that of all rewards (both without Bessel's correction). A group of
    equal rewards has advantage 0: it says nothing about which image is better.
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


def guard_log_ratio(x_next, old_mean, mean, std):  # new in GRPO-Guard
    """RatioNorm: mean over the latent dimensions of ε (mean − old_mean), with ε = (x_next − old_mean) / std.

    x_next, old_mean, mean: (B, ...); std: a scalar, (B,) or (B, 1, ...). Returns (B,), with the gradient to mean.
    """
    std = torch.as_tensor(std, device=mean.device).reshape(-1, *[1] * (mean.ndim - 1))
    epsilon = (x_next.to(mean.dtype) - old_mean) / std
    return (epsilon * (mean - old_mean)).flatten(1).mean(dim=1)


def grpo_loss(log_prob, old_log_prob, advantages, clip_range, adv_clip_range):
    """PPO's clipped objective as a loss: mean max(−A r, −A clip(r, 1 − c, 1 + c)).

    log_prob, old_log_prob, advantages: (B,). Returns (loss, metrics).
    """
    assert log_prob.shape == old_log_prob.shape == advantages.shape == (len(advantages),)
    advantages = advantages.clamp(-adv_clip_range, adv_clip_range)
    log_ratio = log_prob - old_log_prob.detach()
    ratio = torch.exp(log_ratio)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped).mean()
    return loss, {
        "policy_loss": loss.detach(),
        "log_ratio": log_ratio.detach().mean(),
        "log_ratio_std": log_ratio.detach().std(correction=0),
        "clip_fraction": (clipped != ratio).float().mean(),
    }


def kl_loss(kl_type, velocity, step, ref_velocity, ref_step):
    """The KL penalty of one step, and the exact KL of its two Gaussians per latent dimension.

    Returns (penalty, metrics). Both policies have the same std, so the exact KL is (mean − mean_ref)² / 2 std².
    """
    squared = (step.mean - ref_step.mean) ** 2
    penalty = ((velocity.float() - ref_velocity.float()) ** 2).mean() if kl_type == "v-based" else squared.mean()
    return penalty, {"kl_penalty": penalty.detach(), "kl": (squared.detach() / (2 * step.std**2)).mean()}


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
    reference = None
    if train.kl_beta > 0:
        reference = Snapshot(parameters, device if train.ref_param_device == "same_as_model" else "cpu")
    ema = Snapshot(parameters) if train.ema_decay > 0 else None
    optimizer = torch.optim.AdamW(
        parameters, train.learning_rate, train.adam_betas, train.adam_epsilon, train.adam_weight_decay, fused=True
    )
    checkpoint = common.Checkpoint(run, named, optimizer, reference=reference, ema=ema)
    prompts = common.read_prompts(args.prompts)
    networks = 1 + bool(reference)
    common.print_plan(run, args, parameters, len(drawn_steps(train, 1)), networks, most_steps(train))

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

        # Sampling: the images of the epoch in order of (prompt, member), in calls of one batch
        steps = drawn_steps(train, epoch)
        chosen = common.epoch_prompts(prompts, train.unique_sample_num_per_epoch, train.seed, epoch)
        members = [(group, member) for group in range(len(chosen)) for member in range(train.group_size)]
        rollouts, texts, looks = [], {}, common.Looks(train.group_size)  # texts: what was encoded already
        batches = common.batches(common.own(members), train.per_device_batch_size)
        for batch in common.progress(batches, "sampling and rewards"):
            # the last number tells the noise at the start, 0, from that of the steps, 1
            start_seeds = [(train.seed, epoch, g, 0 if train.same_init_noise else m, 0) for g, m in batch]
            step_seeds = [(train.seed, epoch, g, m, 1) for g, m in batch]
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
            sibling = rollouts[-1] if rollouts else None  # whose ODE steps before the SDE are shared, if it began alike
            tape = rollout(
                pipe, call, train.dynamics_type, train.noise_level, steps, noise, train.tail_steps,
                texts=texts, sibling=sibling,
            )  # fmt: skip
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
        silent = [not args.shard and not advantage.any() for advantage in advantages]  # of --shard, all run every call
        weights = step_weights(train, rollouts[0].schedule.tolist())  # of the whole schedule, before a shorter tail
        metrics.add(common.group_metrics(looks, totals, train.group_size))
        if epoch == 1:
            first_step_contract(run, pipe, train, parameters, reference, rollouts, totals)

        # Training: an optimizer step takes some of the calls, each with all of the trained steps
        for chunk in common.calls_of_updates(train, epoch):
            update = common.Metrics()
            for i, k in common.progress(list(product(chunk, steps)), "training"):
                if silent[i] and not reference:
                    continue  # equal rewards give no gradient; what is logged is of the other calls
                if reference:
                    with torch.no_grad(), reference.loaded():
                        ref_velocity, ref_step = replay(pipe, rollouts[i], k)
                velocity, step = replay(pipe, rollouts[i], k)
                taken = rollouts[i].steps[k]
                log_ratio = guard_log_ratio(taken.x_next, taken.mean, step.mean, step.std)  # new in GRPO-Guard
                policy_loss, terms = grpo_loss(
                    log_ratio, torch.zeros_like(log_ratio), advantages[i], train.clip_range, train.adv_clip_range
                )
                update.add(ratio_metrics(k, step.log_prob - taken.log_prob, log_ratio, velocity, weights[k]))
                loss = weights[k] * policy_loss
                update.add(terms)
                if reference:
                    penalty, terms = kl_loss(train.kl_type, velocity, step, ref_velocity, ref_step)
                    loss = loss + train.kl_beta * penalty
                    update.add(terms)
                update.add({"loss": loss})
                (loss / (len(chunk) * len(steps))).backward()
            metrics.add(common.step_optimizer(run, optimizer, named, update, train.max_grad_norm))
            updates += 1
            if ema and updates % train.ema_update_interval == 0:
                ema.update(min(train.ema_decay, (1 + updates) / (10 + updates)))  # sooner away from the base model
        assert updates == epoch * train.num_inner_epochs * train.gradient_step_per_epoch

        due = epoch % args.eval.eval_freq == 0 or epoch == train.max_epochs
        row = {"epoch": epoch, "images": epoch * len(members), **metrics.means("train/")}
        run.log(row | (evaluate(epoch) if due else {}))
        checkpoint.save(epoch, updates)


def ratio_metrics(k, raw, log_ratio, velocity, weight):  # new in GRPO-Guard
    """The bias and its cure, step by step: log-ratios before and after RatioNorm, and the size of the gradient.

    gradient_scale: root mean square over the latents of D · weight · d log_ratio / d v, which ε leaves at
    weight · |∂μ/∂v|; the raw log-ratio would have |∂μ/∂v| / std.
    """
    gradient = torch.autograd.grad(log_ratio.sum(), velocity, retain_graph=True)[0].float()
    named = {"raw_log_ratio": raw, "log_ratio": log_ratio}
    metrics = {f"{name}@{k}": value.mean() for name, value in named.items()}
    metrics |= {f"{name}_std@{k}": value.std(correction=0) for name, value in named.items()}
    return metrics | {f"gradient_scale@{k}": weight * gradient[0].numel() * (gradient**2).mean().sqrt()}


def first_step_contract(run, pipe, train, parameters, reference, rollouts, totals):
    """Print what must hold before the first update, and stop the run if it does not."""
    steps = rollouts[0].steps.items()
    log_ratios = [(replay(pipe, rollouts[0], k)[1].log_prob - old.log_prob).detach() for k, old in steps]
    log_ratio = torch.stack(log_ratios).abs().max().item()
    run.contract("max |log ratio| before the first update, first call", log_ratio, log_ratio == 0)
    if reference:
        # at the base model the penalty and its gradient are 0, so look from a little beside it
        beside = Snapshot(parameters)
        beside.values = [value + 1e-3 * torch.randn_like(value) for value in beside.values]
        k = next(iter(rollouts[0].steps))
        with beside.loaded():
            with torch.no_grad(), reference.loaded():
                ref = replay(pipe, rollouts[0], k)
            kl_loss(train.kl_type, *replay(pipe, rollouts[0], k), *ref)[0].backward()
        gradient = common.gradient_norm(parameters).item()
        for p in parameters:
            p.grad = None
        run.contract("KL gradient, a little away from the base model", gradient, gradient > 0)
    same = common.shared_noise(rollouts, train.group_size, train.same_init_noise)
    run.contract("images that share their noise with another", same, same == 0)
    difference = common.ode_difference(pipe, rollouts[0].call)
    run.contract("ODE rollout against the plain pipeline, max |difference|", difference, difference == 0)
    run.check_signal(totals, train.group_size)


if __name__ == "__main__":
    common.start(main)
