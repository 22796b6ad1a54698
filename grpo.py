"""Flow-GRPO: group-relative policy optimisation of a flow-matching image model (arXiv 2505.05470).

One epoch: a group of images for each of a few prompts, sampled by an SDE that has the marginals of the model's ODE, so
that every step has a density; rewards; A = (reward − group mean) / group std; then, for each trained step k, the
clipped policy gradient of PPO on the ratio r = p_new(x_{k+1} | x_k) / p_old(x_{k+1} | x_k), with an optional KL to the
base model.

By its flags this is also DanceGRPO (arXiv 2505.07818), CPS (2509.05952), MixGRPO, its window and Flash (2507.21802),
the weights of TempFlow-GRPO (2508.04324) and PaCo-RL's resolutions (2512.04784): README.md has a line for each.

Where papers and released codes differ, this file does the following. A log-probability is, as in all released codes,
the mean over the latent dimensions and not the sum: that is what makes clip ranges as small as 1e-4 sensible. The
standard deviation of the advantage is the group's (the paper's equation 4); its code takes that of all rewards, as
does the option train.global-std. The last step is sampled by the ODE and not trained, unless train_steps names it.

    python grpo.py                                         the embedded model, on the machine in front of you
    python grpo.py --model stabilityai/stable-diffusion-3.5-medium --prompts prompts.txt --reward mine.py:f=1
    python grpo.py --help
"""

from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Annotated, Literal, Optional

import numpy as np
import torch
from pydantic import Field

import common
import dynamics
from common import Snapshot, gdpo_advantages, group_advantages, replay, sample
from harness import arguments, console, contract, data, ending, evaluation, machine, settings
from harness.checkpoint import Checkpoint
from harness.checks import check_args
from harness.fields import NotNegative, Positive, refuse
from harness.run import Run
from rewards import make_rewards


@dataclass
class TrainArgs(settings.TrainArgs):
    """Beside the settings of all algorithms (harness/settings.py). The defaults are the paper's for SD3.5-medium."""

    trainer_type: Literal["grpo"] = "grpo"
    """Names this script in YAML files."""
    same_init_noise: bool = False
    """Start all images of a group from one noise (DanceGRPO, MixGRPO) instead of each from its own (Flow-GRPO)."""

    # Where the noise goes

    dynamics_type: Literal[dynamics.DYNAMICS] = "Flow-SDE"
    """The stochastic step: Flow-SDE, Dance-SDE or CPS. ODE has no density and is for nft.py."""
    noise_level: Positive = 0.7
    """a of Flow-SDE (0.7), eta of Dance-SDE (0.3), a of CPS (0.8)."""
    train_steps: Optional[list[int]] = None
    """Candidates for the trained steps, from 0 (all noise); None is all but the last."""
    num_train_steps: Optional[int] = None
    """How many of the candidates are drawn in each epoch. None is all of them."""
    sde_steps: Literal["trained", "all"] = "trained"
    """Which steps are stochastic: the trained ones, or all but the last, of which some are trained (DanceGRPO)."""
    shift_interval: Optional[Annotated[int, Field(ge=0)]] = None
    """Epochs after which MixGRPO's window, num_train_steps neighbouring candidates, moves on by one, up to the last
    ones; 0 draws its place anew in each epoch (Flow-GRPO-Fast). None draws the candidates one by one."""
    tail_steps: Optional[int] = None
    """Network calls after the last stochastic step, at most, by DPM-Solver++(2M) on a coarser grid (MixGRPO-Flash).
    None keeps the whole schedule there, with Euler's steps."""

    # The loss

    clip_range: Positive = 1e-4
    """The ratio counts within 1 ± this, which is small because log-densities are averaged over dimensions."""
    adv_clip_range: Positive = 5.0
    """Advantages are clipped to ± this."""
    global_std: bool = False
    """Divide advantages by the standard deviation of all rewards of the epoch instead of the group's. Not in gdpo."""
    advantage_aggregation: Literal["sum", "gdpo"] = "sum"
    """Of several weighted rewards: sum takes the advantages of their sum, gdpo adds up those of each (group std)."""
    loss_weighting: Literal["uniform", "noise-aware"] = "uniform"
    """Noise-aware weights step k by std_k over the mean std of the candidates (TempFlow-GRPO, eq. 8)."""
    kl_type: Literal["v-based", "x-based", "exact"] = "v-based"
    """The penalty: mean (v − v_ref)², mean (mean − mean_ref)² or Flow-GRPO's own, the KL of the two Gaussians per
    dimension, mean (mean − mean_ref)² / 2 std². In Flow-SDE the second is (h (1 + a²/2))² times the first
    (h² times in the first step)."""
    kl_beta: NotNegative = 2e-3
    """Weight of the KL penalty; 0 keeps no copy of the base model. On SD3.5's schedule 0.002 of the v-based penalty is
    on average as strong as 0.009 of the exact one, and as the 0.04 of Flow-GRPO's code, which lacks a factor h."""


@dataclass
class Args(settings.RunArgs):
    """All settings of this script."""

    train: TrainArgs = field(default_factory=TrainArgs)
    eval: settings.EvalArgs = field(default_factory=settings.EvalArgs)


def check(args):
    """Refuse settings that cannot work, before anything is loaded."""
    train = args.train
    if train.dynamics_type == "ODE":
        remedy = "the ODE has no density to train on; take Flow-SDE, Dance-SDE or CPS, or train with nft.py"
        refuse("train.dynamics_type", "ODE", remedy)
    check_args(args)
    steps, last = common.candidate_steps(train), train.num_inference_steps - 1
    if train.dynamics_type == "CPS" and last in steps:
        refuse("train.train_steps", train.train_steps, f"CPS has no noise in its last step; leave out {last}")
    if train.shift_interval is not None and train.num_train_steps is None:
        remedy = "moves a window of train.num_train_steps steps, which is None; set that too (MixGRPO has 4)"
        refuse("train.shift_interval", train.shift_interval, remedy)
    earliest = last - 1 if train.sde_steps == "all" else steps[(train.num_train_steps or len(steps)) - 1]
    if train.tail_steps is not None and not 1 <= train.tail_steps <= last - earliest:
        remedy = f"the last stochastic step is {earliest} or later, and after it come at most {last - earliest} steps"
        refuse("train.tail_steps", train.tail_steps, f"{remedy}; take 1 to that many, or None")


def drawn_steps(train, epoch):
    """The trained steps of an epoch (from 1), decided by (seed, epoch) alone."""
    candidates, rng = common.candidate_steps(train), np.random.default_rng([train.seed, epoch])
    count = train.num_train_steps or len(candidates)
    if train.shift_interval is None:
        return sorted(rng.choice(candidates, count, replace=False).tolist())
    last = len(candidates) - count
    start = min((epoch - 1) // train.shift_interval, last) if train.shift_interval else rng.integers(last + 1)
    return candidates[start : start + count]


def step_weights(train, sigmas):
    """{k: weight} of each candidate step in the loss; they average to 1. sigmas: (T + 1,)."""
    steps = common.candidate_steps(train)
    if train.loss_weighting == "uniform":
        return dict.fromkeys(steps, 1.0)
    x, kind, level = torch.zeros(1, 1), train.dynamics_type, train.noise_level
    taken = {k: dynamics.step(kind, x, x, *sigmas[k : k + 2], level, sigma_second=sigmas[1]) for k in steps}
    std = {k: step.std.item() for k, step in taken.items()}
    return {k: std[k] * len(steps) / sum(std.values()) for k in steps}


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


def has_gradient(advantages):
    """Whether grpo_loss has one: where all advantages are 0, as in groups of equal rewards, it has none, and a call
    need not be replayed. That is so of this loss; another may have a gradient there.
    """
    return bool(advantages.any())


def kl_loss(kl_type, velocity, step, ref_velocity, ref_step):
    """The KL penalty of one step, and the exact KL of its two Gaussians per latent dimension.

    Returns (penalty, metrics). Both policies have the same std, so the exact KL is (mean − mean_ref)² / 2 std².
    """
    squared = (step.mean - ref_step.mean) ** 2
    exact = (squared / (2 * step.std**2)).mean()
    v_based = ((velocity.float() - ref_velocity.float()) ** 2).mean()
    penalty = {"v-based": v_based, "x-based": squared.mean(), "exact": exact}[kl_type]
    return penalty, {"kl_penalty": penalty.detach(), "kl": exact.detach()}


def main():
    args, said = arguments.parse_args(Args, __doc__)
    check(args)
    train = args.train
    run = Run(args, said, __file__)

    # Model, reward, optimizer
    device = machine.pick_device(args)
    reward, eval_reward = map(run.watch, make_rewards(args.reward, args.eval.reward, device, args.reward_options))
    pipe, policy = machine.make_policy(args, device)  # policy: {name: trained parameter}
    reference = common.kl_reference(policy, train) if train.kl_beta > 0 else None
    ema = Snapshot(policy.values()) if train.ema_decay > 0 else None
    optimizer = torch.optim.AdamW(
        policy.values(), train.learning_rate, train.adam_betas, train.adam_epsilon, train.adam_weight_decay, fused=True
    )
    checkpoint = Checkpoint(run, policy, optimizer, reference=reference, ema=ema)
    rows = data.read_rows(args.prompts)
    run.print(console.plan(args, policy, len(drawn_steps(train, 1)), 1 + bool(reference)))
    evaluate = partial(run.evaluate, pipe=pipe, reward=eval_reward, policy=policy, average=ema)  # if one is due

    first, updates = checkpoint.begin(evaluate)  # evaluates the base model, or takes a run up again
    for epoch in range(first, train.max_epochs + 1):
        metrics = common.Metrics()

        # Sampling: the images of the epoch in order of (prompt, member), in calls of one batch
        steps = drawn_steps(train, epoch)
        noisy = steps if train.sde_steps == "trained" else sorted({*steps, *range(train.num_inference_steps - 1)})
        calls = common.epoch_calls(pipe, args, rows, epoch, train.same_init_noise)
        rollouts, scoring = machine.Rollouts(args), evaluation.Scoring(reward, train.group_size)
        calls = console.progress(calls, "sampling and rewards")
        for tape in sample(pipe, calls, train.dynamics_type, train.noise_level, noisy, train.tail_steps):
            scoring.add(tape.images, tape.rows)
            rollouts.append(replace(tape, images=None))  # a replay does not need them
        scores, statistics = scoring.finish()
        metrics.add(evaluation.epoch_metrics(scores, statistics, train.group_size))
        if train.advantage_aggregation == "gdpo":
            advantages = gdpo_advantages(scores, args.reward, train.group_size)
        else:
            advantages = group_advantages(scores["total"], train.group_size, train.global_std)
        advantages = common.local_shard(advantages).split(train.per_device_batch_size)  # scores are of all processes
        weights = step_weights(train, rollouts[0].schedule.tolist())  # of the whole schedule, before a shorter tail
        if epoch == 1:
            first_step_contract(run, pipe, train, policy, reference, rollouts, scores["total"])

        # Training: an optimizer step takes some of the calls, each with all of the trained steps
        for chunk in common.minibatches(train, epoch):
            update = common.Metrics()
            for i, k in console.progress(list(product(chunk, steps)), "training"):
                if not (has_gradient(advantages[i]) or reference or args.shard):  # with --shard all run every call
                    continue
                if reference:
                    with torch.no_grad(), reference.loaded():
                        ref_velocity, ref_step = replay(pipe, rollouts[i], k)
                velocity, step = replay(pipe, rollouts[i], k)
                taken = rollouts[i].steps[k]
                policy_loss, terms = grpo_loss(
                    step.log_prob, taken.log_prob, advantages[i], train.clip_range, train.adv_clip_range
                )
                loss = weights[k] * policy_loss
                update.add(terms)
                if reference:
                    penalty, terms = kl_loss(train.kl_type, velocity, step, ref_velocity, ref_step)
                    loss = loss + train.kl_beta * penalty
                    update.add(terms)
                update.add({"loss": loss})
                (loss / (len(chunk) * len(steps))).backward()
            metrics.add(common.average_clip_step(run, optimizer, policy, update, train.max_grad_norm))
            updates += 1
            if ema and updates % train.ema_update_interval == 0:
                ema.update(min(train.ema_decay, (1 + updates) / (10 + updates)))  # sooner away from the base model
        assert updates == epoch * train.num_inner_epochs * train.gradient_step_per_epoch

        run.log(epoch, metrics.means("train/") | evaluate(epoch))
        checkpoint.save(epoch, updates)
    run.finish(pipe)


def first_step_contract(run, pipe, train, policy, reference, rollouts, totals):
    """What must hold before the first update; otherwise the run ends."""
    first = rollouts[0]
    log_ratios = [(replay(pipe, first, k)[1].log_prob - old.log_prob).detach() for k, old in first.steps.items()]
    log_ratio = torch.stack(log_ratios).abs().max().item()
    terms = {"max |log ratio| of the first call": (log_ratio, log_ratio == 0)}
    if reference:
        predict = partial(replay, pipe, first, next(iter(first.steps)))
        terms |= contract.kl_gradient(policy, reference, predict, lambda v, ref: kl_loss(train.kl_type, *v, *ref)[0])
    run.contract(terms | contract.sampling(pipe, rollouts, train.group_size, train.same_init_noise))
    if not has_gradient(group_advantages(totals, train.group_size)):
        run.print("warning: no reward differs within its group, so there is nothing to learn from it")


if __name__ == "__main__":
    ending.start(main)
