"""Advantage Weighted Matching: flow matching on a policy's own images, each weighted by its advantage.

One epoch: a group of images for each of a few prompts, by any sampler and without densities; rewards; A = (reward −
group mean) / std; then, with e = mean |v − (ε − x0)|² at x_t = (1 − σ) x0 + σ ε, the clipped policy gradient of PPO on
the ratio r = exp(w(e_old) − w(e)), with a matching error in the place of a log-probability. As long as r = 1 this is
flow matching with weights A: towards what was better than its group, and away from what was worse. That has no end of
its own, which is what clip_range, ema_beta and kl_beta are for.

    AWM   arXiv 2509.25050   the defaults, with the weights and penalties of the released run on GenEval

The paper's weights are A on e itself (--train.weighting uniform). The released code goes beyond them, and this file
follows it: w is its ghuber, advantages are divided by the std of all rewards, and there is a KL to an average that
trails. That code divides advantages by their clip range, so its ema_beta 1 and beta 0.003 are 5 and 0.015 here, and it
makes one update an epoch, where r is 1 and nothing is clipped. Timesteps are steps of the sampling schedule, as in its
recipes and because a replay runs at the schedule's noise levels alone; with --train.time-sampling logit-normal the
schedule's own shift is that of the logit-normal, whose published shift is 3. e is a mean over the latent dimensions, so
clip_range goes with the inverse of their square root: 1e-4 is for 65,536.

    cp docs/examples/awm.py . && python awm.py
    diff nft.py awm.py
"""

from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Literal, Optional

import numpy as np
import torch

import common
import dynamics
from common import Snapshot, gdpo_advantages, group_advantages, replay, sample
from harness import arguments, console, contract, data, ending, evaluation, machine, settings
from harness.checkpoint import Checkpoint
from harness.checks import check_args
from harness.fields import Count, Decay, NotNegative, Positive, refuse
from harness.run import Run
from rewards import make_rewards


@dataclass
class TrainArgs(settings.TrainArgs):
    """Beside the settings of all algorithms (harness/settings.py). The defaults are the paper's for SD3.5-medium."""

    trainer_type: Literal["awm"] = "awm"
    """Names this script in YAML files."""

    # What is sampled in an epoch

    per_device_batch_size: Count = 16
    """Images in one call of the pipeline, in sampling and in training alike."""
    solver: Literal[dynamics.SOLVERS] = "Euler"
    """Of the ODE sampler: Euler, or DPM-Solver++, which is of second order (as the paper's is) at the same cost."""
    guidance_scale: NotNegative = 1.0
    """Classifier-free guidance in sampling and in all predictions; the paper trains without, which is 1."""
    dynamics_type: Literal[dynamics.DYNAMICS] = "ODE"
    """The sampler only: ODE, or Flow-SDE, Dance-SDE or CPS with noise in all steps but the last."""
    noise_level: Positive = 0.7
    """a of Flow-SDE (0.7), eta of Dance-SDE (0.3), a of CPS (0.8)."""
    old_decay_start: NotNegative = 0
    """Optimizer steps i before the average begins to trail."""
    old_decay_slope: NotNegative = 0.001
    """Its decay is slope * (i − start), up to the maximum."""
    old_decay_max: Decay = 0.3
    """average <- decay * average + (1 − decay) * policy, once per epoch."""

    # The loss

    train_steps: Optional[list[int]] = None
    """Candidates for the timesteps of the loss, as indices of the sampling schedule; None is all but the last."""
    num_train_steps: Optional[int] = None
    """How many of the candidates are drawn in each epoch. None is all of them."""
    time_sampling: Literal["steps", "logit-normal"] = "steps"  # new in AWM
    """The candidates are drawn evenly, or by a logit-normal, which prefers the middle of the schedule."""
    weighting: Literal["uniform", "t", "t2", "huber", "ghuber"] = "ghuber"  # new in AWM
    """w(e): e, σ e, σ² e, σ √e or σ e^p / p. The last two let a small error pull as hard as a large one, or harder."""
    ghuber_power: Positive = 0.25
    """p of ghuber."""
    clip_range: Positive = 1e-4
    """The ratio counts within 1 ± this; from the second update of an epoch on it can be outside."""
    adv_clip_range: Positive = 5.0
    """Advantages are clipped to ± this."""
    global_std: bool = True
    """Divide advantages by the standard deviation of all rewards of the epoch instead of the group's. Not in gdpo."""
    advantage_aggregation: Literal["sum", "gdpo"] = "sum"
    """Of several weighted rewards: sum takes the advantages of their sum, gdpo adds up those of each (group std)."""
    ema_beta: NotNegative = 5.0  # new in AWM
    """Weight of the KL penalty to the average that trails, mean (v − v_average)²."""
    kl_type: Literal["v-based", "x-based", "exact"] = "v-based"
    """The penalty mean (v − v_ref)². There are no transition means here, so the others are refused."""
    kl_beta: NotNegative = 0.015
    """Weight of the KL penalty to the base model; 0 keeps no copy of it."""

    # The optimizer

    gradient_step_per_epoch: int = 1
    """Optimizer steps in one pass over an epoch's images, each pass with noise of its own."""
    ema_update_interval: Count = 1
    """Optimizer steps between updates of the average."""


@dataclass
class Args(settings.RunArgs):
    """All settings of this script."""

    train: TrainArgs = field(default_factory=TrainArgs)
    eval: settings.EvalArgs = field(default_factory=lambda: settings.EvalArgs(guidance_scale=1.0))


def check(args):
    """Refuse settings that cannot work, before anything is loaded."""
    train = args.train
    if train.kl_type != "v-based":
        remedy = "the loss has no transitions whose means could be compared; take v-based"
        refuse("train.kl_type", train.kl_type, remedy)
    if train.solver != "Euler" and train.dynamics_type != "ODE":
        refuse("train.solver", train.solver, f"is for the ODE, and {train.dynamics_type} has steps of its own")
    check_args(args)


def drawn_steps(train, epoch):
    """The trained timesteps of an epoch, decided by (seed, epoch) alone."""
    candidates, weights = common.candidate_steps(train), None
    rng = np.random.default_rng([train.seed, epoch])
    if train.time_sampling == "logit-normal":  # new in AWM: step k is at the time 1 − k / T, before the shift
        edges = (torch.arange(train.num_inference_steps + 1.0).double() - 0.5).clamp(min=0) / train.num_inference_steps
        weights = torch.special.ndtr(torch.logit(edges)).diff()[candidates].numpy()
        weights = weights / weights.sum()
    return sorted(rng.choice(candidates, train.num_train_steps or len(candidates), replace=False, p=weights).tolist())


def old_decay(train, updates):
    """How much of the average stays when it is updated after so many optimizer steps."""
    return min(train.old_decay_max, train.old_decay_slope * max(0, updates - train.old_decay_start))


def weighted_error(error, sigma, weighting, ghuber_power):  # new in AWM
    """w(e), in the place of a negative log-probability. error: (B,); sigma: a float or (B,). Returns (B,)."""
    if weighting in ("huber", "ghuber"):
        power, scale = (0.5, 1.0) if weighting == "huber" else (ghuber_power, 1 / ghuber_power)
        return sigma * scale * ((error + 1e-10) ** power - 1e-10**power)  # with a finite slope at 0
    return sigma ** {"uniform": 0, "t": 1, "t2": 2}[weighting] * error


def awm_loss(v, v_old, x_t, x0, sigma, advantages, clip_range, adv_clip_range, weighting="ghuber", ghuber_power=0.25):
    """PPO's clipped objective as a loss, mean max(−A r, −A clip(r, 1 − c, 1 + c)), of r = exp(w(e_old) − w(e)).

    v, v_old, x_t, x0: (B, ...); x_t = (1 − sigma) x0 + sigma noise; sigma: a float or (B,); advantages: (B,).
    Returns (loss, metrics).
    """
    batch = len(advantages)
    assert v.shape == v_old.shape == x_t.shape == x0.shape and advantages.shape == (batch,)
    v, v_old, x_t, x0 = (t if t.dtype == torch.float64 else t.float() for t in (v, v_old.detach(), x_t, x0))
    sigma = torch.as_tensor(sigma, dtype=x_t.dtype, device=x_t.device).expand(batch)
    target = (x_t - x0) / sigma.reshape(-1, *[1] * (x_t.ndim - 1))  # noise − x0
    error, old_error = (((u - target) ** 2).flatten(1).mean(dim=1) for u in (v, v_old))  # (B,)
    new, before = (weighted_error(e, sigma, weighting, ghuber_power) for e in (error, old_error))
    advantages, ratio = advantages.clamp(-adv_clip_range, adv_clip_range), torch.exp(before - new)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped).mean()
    return loss, {
        "policy_loss": loss.detach(),
        "matching_error": error.detach().mean(),
        "log_ratio": (before - new).detach().mean(),
        "log_ratio_std": (before - new).detach().std(correction=0),
        "clip_fraction": (clipped != ratio).float().mean(),
        "v_old_distance": ((v - v_old).detach() ** 2).mean(),
    }


def main():
    args, said = arguments.parse_args(Args, __doc__)
    check(args)
    train = args.train
    run = Run(args, said, __file__)

    # Model, reward, optimizer
    device = machine.pick_device(args)
    reward, eval_reward = map(run.watch, make_rewards(args.reward, args.eval.reward, device, args.reward_options))
    pipe, policy = machine.make_policy(args, device)  # policy: {name: trained parameter}
    old = Snapshot(policy.values(), None if train.ref_param_device == "same_as_model" else "cpu")
    average = Snapshot(policy.values(), old.values[0].device) if train.ema_beta > 0 else None  # new in AWM
    reference = common.kl_reference(policy, train) if train.kl_beta > 0 else None
    ema = Snapshot(policy.values()) if train.ema_decay > 0 else None
    optimizer = torch.optim.AdamW(
        policy.values(), train.learning_rate, train.adam_betas, train.adam_epsilon, train.adam_weight_decay, fused=True
    )
    checkpoint = Checkpoint(run, policy, optimizer, old=old, average=average, reference=reference, ema=ema)
    rows = data.read_rows(args.prompts)
    # DPM-Solver++ takes the steps after the last noisy one; the ODE has none, so these are all
    tail_steps = train.num_inference_steps if train.solver == "DPM-Solver++" else None
    noisy_steps = range(train.num_inference_steps - 1) if train.dynamics_type != "ODE" else ()
    run.print(console.plan(args, policy, len(drawn_steps(train, 1)), 2 + bool(reference) + bool(average)))
    evaluate = partial(run.evaluate, pipe=pipe, reward=eval_reward, policy=policy, average=ema)  # if one is due

    first, updates = checkpoint.begin(evaluate)  # evaluates the base model, or takes a run up again
    for epoch in range(first, train.max_epochs + 1):
        metrics = common.Metrics()

        # Sampling by the old policy: the images of the epoch in order of (prompt, member), in calls of one batch
        steps = drawn_steps(train, epoch)
        calls = common.epoch_calls(pipe, args, rows, epoch)
        rollouts, scoring = machine.Rollouts(args), evaluation.Scoring(reward, train.group_size)
        bar = console.progress(calls, "sampling and rewards")
        with old.loaded():
            for tape in sample(pipe, bar, train.dynamics_type, train.noise_level, noisy_steps, tail_steps):
                scoring.add(tape.images, tape.rows)
                rollouts.append(replace(tape, images=None))  # a replay does not need them
        scores, statistics = scoring.finish()
        metrics.add(evaluation.epoch_metrics(scores, statistics, train.group_size))
        if train.advantage_aggregation == "gdpo":
            advantages = gdpo_advantages(scores, args.reward, train.group_size)
        else:
            advantages = group_advantages(scores["total"], train.group_size, train.global_std)
        advantages = common.local_shard(advantages).split(train.per_device_batch_size)  # scores are of all processes
        if epoch == 1:
            first_step_contract(run, pipe, train, policy, old, reference, rollouts, scores["total"])

        # Training: each optimizer step over whole calls x trained timesteps, on the images with fresh noise
        for number, chunk in enumerate(common.minibatches(train, epoch)):
            update = common.Metrics()
            for i, k in console.progress(list(product(chunk, steps)), "training"):
                x0, sigma = rollouts[i].x0, rollouts[i].sigmas[k].item()
                seeds = [(train.seed, epoch, g, m, 2, number, k) for g, m in calls[i].members]
                x_t = noised(x0, sigma, common.generators(*seeds))
                with torch.no_grad(), old.loaded():
                    v_old, _ = replay(pipe, rollouts[i], k, x_t)
                if reference:
                    with torch.no_grad(), reference.loaded():
                        v_ref, _ = replay(pipe, rollouts[i], k, x_t)
                v, _ = replay(pipe, rollouts[i], k, x_t)
                loss, terms = awm_loss(
                    v, v_old, x_t, x0, sigma, advantages[i],
                    train.clip_range, train.adv_clip_range, train.weighting, train.ghuber_power,
                )  # fmt: skip
                update.add(terms)
                if average:  # new in AWM
                    with torch.no_grad(), average.loaded():
                        v_average, _ = replay(pipe, rollouts[i], k, x_t)
                    penalty = ((v.float() - v_average.float()) ** 2).mean()
                    loss = loss + train.ema_beta * penalty
                    update.add({"v_average_distance": penalty})
                if reference:
                    penalty = ((v.float() - v_ref.float()) ** 2).mean()
                    loss = loss + train.kl_beta * penalty
                    update.add({"v_ref_distance": penalty})
                update.add({"loss": loss})
                (loss / (len(chunk) * len(steps))).backward()
            metrics.add(common.average_clip_step(run, optimizer, policy, update, train.max_grad_norm))
            updates += 1
            if ema and updates % train.ema_update_interval == 0:
                ema.update(min(train.ema_decay, (1 + updates) / (10 + updates)))  # sooner away from the base model
        assert updates == epoch * train.num_inner_epochs * train.gradient_step_per_epoch
        decay = old_decay(train, updates)
        old.update(0)  # new in AWM: what samples is the policy itself
        if average:
            average.update(decay)
        metrics.add({"old_decay": decay})

        run.log(epoch, metrics.means("train/") | evaluate(epoch))
        checkpoint.save(epoch, updates)
    run.finish(pipe)


def noised(x0, sigma, generator):
    """x_t = (1 − σ) x0 + σ ε with one generator per image, in the dtype of x0."""
    noise = torch.stack([torch.randn(x0.shape[1:], generator=g) for g in generator]).to(x0.device)
    return ((1 - sigma) * x0.float() + sigma * noise).to(x0.dtype)


def first_step_contract(run, pipe, train, policy, old, reference, rollouts, totals):
    """What must hold before the first update; otherwise the run ends."""
    k = drawn_steps(train, 1)[0]
    seeds = [(train.seed, 1, i, 3) for i in range(len(rollouts[0].x0))]
    x = noised(rollouts[0].x0, rollouts[0].sigmas[k].item(), common.generators(*seeds))  # as in training
    v = replay(pipe, rollouts[0], k, x)[0].detach()
    with torch.no_grad(), old.loaded():
        distance = (replay(pipe, rollouts[0], k, x)[0] - v).abs().max().item()
    terms = {"max |v - v_old| of the first call": (distance, distance == 0)}
    if reference:
        predict = partial(replay, pipe, rollouts[0], k, x)
        terms |= contract.kl_gradient(policy, reference, predict, lambda v, ref: ((v[0] - ref[0]).float() ** 2).mean())
    run.contract(terms | contract.sampling(pipe, rollouts, train.group_size))
    if not group_advantages(totals, train.group_size).any():
        run.print("warning: no reward differs within its group, so there is nothing to learn from it")


if __name__ == "__main__":
    ending.start(main)
