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

    trainer_type: Literal["nft"] = "nft"
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
    off_policy: bool = True
    """Sample and predict with an old policy that trails; otherwise it is the policy at the start of the epoch."""
    old_decay_start: NotNegative = 0
    """Optimizer steps i before the old policy begins to trail."""
    old_decay_slope: NotNegative = 0.001
    """Its decay is slope * (i − start), up to the maximum. The paper: 0, 0.001, 0.5; for OCR 75, 0.0075, 0.999."""
    old_decay_max: Decay = 0.5
    """old <- decay * old + (1 − decay) * policy, once per epoch."""

    # The loss

    train_steps: Optional[list[int]] = None
    """Candidates for the timesteps of the loss, as indices of the sampling schedule; None is all but the last."""
    num_train_steps: Optional[int] = None
    """How many of the candidates are drawn in each epoch. None is all of them."""
    nft_beta: Positive = 1.0
    """β: how far the implicit policies are from the old one. The smaller it is, the further v can go before
    the losses pull it back; the paper has 1 and 0.1."""
    negative_term: bool = True
    """Train v⁻, weighted by 1 − r, too. Without it only v⁺, weighted by r, is trained: the ablation in which the paper
    saw the reward collapse."""
    adv_clip_range: Positive = 5.0
    """Advantages are clipped to ± this, which makes the optimality r = 1/2 + A / (2 · this)."""
    global_std: bool = True
    """Divide advantages by the standard deviation of all rewards of the epoch instead of the group's. Not in gdpo."""
    advantage_aggregation: Literal["sum", "gdpo"] = "sum"
    """Of several weighted rewards: sum takes the advantages of their sum, gdpo adds up those of each (group std)."""
    self_normalised: bool = True
    """Divide each squared x0 error by its own mean absolute error, without a gradient, as the paper does."""
    kl_type: Literal["v-based", "x-based", "exact"] = "v-based"
    """The penalty mean (v − v_ref)². There are no transition means here, so the others are refused."""
    kl_beta: NotNegative = 1e-4
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
    candidates = common.candidate_steps(train)
    rng = np.random.default_rng([train.seed, epoch])
    return sorted(rng.choice(candidates, train.num_train_steps or len(candidates), replace=False).tolist())


def old_decay(train, updates):
    """How much of the old policy stays when it is updated after so many optimizer steps."""
    if not train.off_policy:
        return 0.0
    return min(train.old_decay_max, train.old_decay_slope * max(0, updates - train.old_decay_start))


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
    args, said = arguments.parse_args(Args, __doc__)
    check(args)
    train = args.train
    run = Run(args, said, __file__)

    # Model, reward, optimizer
    device = machine.pick_device(args)
    reward, eval_reward = map(run.watch, make_rewards(args.reward, args.eval.reward, device, args.reward_options))
    pipe, policy = machine.make_policy(args, device)  # policy: {name: trained parameter}
    old = Snapshot(policy.values(), None if train.ref_param_device == "same_as_model" else "cpu")
    reference = common.kl_reference(policy, train) if train.kl_beta > 0 else None
    ema = Snapshot(policy.values()) if train.ema_decay > 0 else None
    optimizer = torch.optim.AdamW(
        policy.values(), train.learning_rate, train.adam_betas, train.adam_epsilon, train.adam_weight_decay, fused=True
    )
    checkpoint = Checkpoint(run, policy, optimizer, old=old, reference=reference, ema=ema)
    rows = data.read_rows(args.prompts)
    # DPM-Solver++ takes the steps after the last noisy one; the ODE has none, so these are all
    tail_steps = train.num_inference_steps if train.solver == "DPM-Solver++" else None
    noisy_steps = range(train.num_inference_steps - 1) if train.dynamics_type != "ODE" else ()
    run.print(console.plan(args, policy, len(drawn_steps(train, 1)), 2 + bool(reference)))
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
            metrics.add(common.average_clip_step(run, optimizer, policy, update, train.max_grad_norm))
            updates += 1
            if ema and updates % train.ema_update_interval == 0:
                ema.update(min(train.ema_decay, (1 + updates) / (10 + updates)))  # sooner away from the base model
        assert updates == epoch * train.num_inner_epochs * train.gradient_step_per_epoch
        decay = old_decay(train, updates)
        old.update(decay)
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
