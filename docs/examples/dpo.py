"""Online Diffusion-DPO: the best image of each group against its worst, by direct preference optimization.

One epoch: a group of images for each of a few prompts, by any sampler and without densities; rewards; of each group
the best image (w) and the worst (l); then, with e = mean |v − (ε − x0)|² at x_t = (1 − σ) x0 + σ ε, the same ε and σ
for both, the loss −log sigmoid(−β/2 · [(e_w − e_w,ref) − (e_l − e_l,ref)]). A group of equal rewards has no pair.

    Diffusion-DPO   arXiv 2311.12908   its loss, here on pairs of the policy's own images

The paper learns from people's choices between images that are there already. Released codes for flow matching make the
pairs anew in each epoch, as here, and draw σ from a logit-normal; here it is a step of the sampling schedule, because a
replay runs at the schedule's noise levels alone. The reference is the base model, as in the paper: the larger β is, the
nearer the policy stays to it. With --train.dpo-reference old it is the policy at the start of the epoch, and nothing
but kl_beta holds what many epochs do. e is a mean over the latent dimensions, so β goes with their square root: 2000 is
for 65,536. Two things are this file's own: the pairs have calls of their own, sampled once more for their tapes, which
costs 2 / group_size of the sampling and leaves as much of training; and an update takes the mean over the pairs of each
call, then over calls, so that in a call with few pairs each weighs more.

    cp docs/examples/dpo.py . && python dpo.py
    diff nft.py dpo.py
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
from harness.parallel import gather
from harness.run import Run
from rewards import make_rewards


@dataclass
class TrainArgs(settings.TrainArgs):
    """Beside the settings of all algorithms (harness/settings.py). The defaults are for SD3.5-medium."""

    trainer_type: Literal["dpo"] = "dpo"
    """Names this script in YAML files."""

    # What is sampled in an epoch

    per_device_batch_size: Count = 24
    """Images in one call of the pipeline in sampling: whole groups, of each of which two are in a call of training."""
    solver: Literal[dynamics.SOLVERS] = "Euler"
    """Of the ODE sampler: Euler, or DPM-Solver++, which is of second order (as the paper's is) at the same cost."""
    guidance_scale: NotNegative = 1.0
    """Classifier-free guidance in sampling and in all predictions; the paper trains without, which is 1."""
    dynamics_type: Literal[dynamics.DYNAMICS] = "ODE"
    """The sampler only: ODE, or Flow-SDE, Dance-SDE or CPS with noise in all steps but the last."""
    noise_level: Positive = 0.7
    """a of Flow-SDE (0.7), eta of Dance-SDE (0.3), a of CPS (0.8)."""
    off_policy: bool = False
    """Sample and predict with an old policy that trails; otherwise it is the policy at the start of the epoch."""
    old_decay_start: NotNegative = 0
    """Optimizer steps i before the old policy begins to trail."""
    old_decay_slope: NotNegative = 0.001
    """Its decay is slope * (i − start), up to the maximum."""
    old_decay_max: Decay = 0.5
    """old <- decay * old + (1 − decay) * policy, once per epoch."""

    # The loss

    train_steps: Optional[list[int]] = None
    """Candidates for the timesteps of the loss, as indices of the sampling schedule; None is all but the last."""
    num_train_steps: Optional[int] = None
    """How many of the candidates are drawn in each epoch. None is all of them."""
    dpo_reference: Literal["base", "old"] = "base"  # new in DPO
    """What e_ref is the error of: the base model, or the old policy."""
    dpo_beta: Positive = 2000.0  # new in DPO
    """β: a pair counts until the policy is some 2 / β better at it than the reference, in errors."""
    advantage_aggregation: Literal["sum", "gdpo"] = "sum"
    """Of several weighted rewards: sum takes the advantages of their sum, gdpo adds up those of each (group std)."""
    kl_type: Literal["v-based", "x-based", "exact"] = "v-based"
    """The penalty mean (v − v_ref)². There are no transition means here, so the others are refused."""
    kl_beta: NotNegative = 0.0
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
    if train.per_device_batch_size % train.group_size:  # new in DPO
        remedy = f"pairs are of one call, so a call takes whole groups: a multiple of group_size = {train.group_size}"
        refuse("train.per_device_batch_size", train.per_device_batch_size, remedy)
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


def pair_call(pipe, args, epoch, call, advantages):  # new in DPO
    """The best image of each group of a call, then the worst of each: (their Call, their places, is it a pair).

    advantages: (B,); places: (2P,), which group is a pair: (P,) booleans, no pair where all advantages are equal.
    """
    groups = advantages.reshape(-1, args.train.group_size)
    first = torch.arange(0, len(advantages), args.train.group_size, device=groups.device)
    places = torch.cat([first + groups.argmax(dim=1), first + groups.argmin(dim=1)]).tolist()
    members, rows = zip(*((call.members[i], call.rows[i]) for i in places), strict=True)
    start, steps = (common.generators(*((args.train.seed, epoch, g, m, n) for g, m in members)) for n in (0, 1))
    kwargs = common.call_arguments(pipe, args.train, args.call, list(rows)) | {"generator": start}
    return common.Call(list(members), list(rows), kwargs, steps), places, groups.amax(dim=1) > groups.amin(dim=1)


def dpo_loss(v, v_ref, x_t, x0, sigma, is_pair, dpo_beta):
    """The loss −log sigmoid(z), the mean over pairs, of z = −β/2 · [(e_w − e_w,ref) − (e_l − e_l,ref)].

    v, v_ref, x_t, x0: (2P, ...), the chosen images, then the rejected ones; x_t = (1 − sigma) x0 + sigma noise;
    sigma: a float; is_pair: (P,) booleans. Returns (loss, metrics).
    """
    assert v.shape == v_ref.shape == x_t.shape == x0.shape and is_pair.shape == (len(x0) // 2,)
    v, v_ref, x_t, x0 = (t if t.dtype == torch.float64 else t.float() for t in (v, v_ref.detach(), x_t, x0))
    target = (x_t - x0) / sigma  # noise − x0
    error, ref_error = (((u - target) ** 2).flatten(1).mean(dim=1) for u in (v, v_ref))  # (2P,)
    chosen, rejected = (error - ref_error).chunk(2)
    z = -dpo_beta / 2 * (chosen - rejected)
    weight = is_pair / is_pair.sum().clamp(min=1)
    loss = -(weight * torch.nn.functional.logsigmoid(z)).sum()
    return loss, {
        "policy_loss": loss.detach(),
        "argument": (weight * z.detach()).sum(),
        "implicit_accuracy": (weight * (z > 0)).sum(),
        "chosen_error": (weight * error.detach().chunk(2)[0]).sum(),
        "rejected_error": (weight * error.detach().chunk(2)[1]).sum(),
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
    reference = common.kl_reference(policy, train) if train.kl_beta > 0 or train.dpo_reference == "base" else None
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
    share = f"{2 / train.group_size:.3g} of its images, those of the pairs, which are sampled twice"
    run.print(f"          but training is on {share}")  # new in DPO
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
            advantages = group_advantages(scores["total"], train.group_size)
        advantages = common.local_shard(advantages).split(train.per_device_batch_size)  # scores are of all processes
        if epoch == 1:
            first_step_contract(run, pipe, train, policy, old, reference, rollouts, scores["total"])

        # new in DPO: from here on the calls are those of the pairs, of the latents that were scored
        found = [pair_call(pipe, args, epoch, *of) for of in zip(calls, advantages, strict=True)]
        calls, places, is_pair = zip(*found, strict=True)
        with old.loaded():
            tapes = sample(pipe, calls, train.dynamics_type, train.noise_level, noisy_steps, tail_steps)
            pairs = zip(tapes, rollouts, places, strict=True)
            rollouts = [replace(tape, images=None, x0=scored.x0[place]) for tape, scored, place in pairs]
        metrics.add({"pairs": sum(gather(torch.cat(is_pair).sum().item()))})

        # Training: each optimizer step over whole calls x trained timesteps, on the images with fresh noise
        for number, chunk in enumerate(common.minibatches(train, epoch)):
            update = common.Metrics()
            for i, k in console.progress(list(product(chunk, steps)), "training"):
                if not (is_pair[i].any() or args.shard):  # new in DPO; with --shard all run every call
                    continue
                x0, sigma = rollouts[i].x0, rollouts[i].sigmas[k].item()
                seeds = [(train.seed, epoch, g, 2, number, k) for g, _ in calls[i].members]  # new in DPO
                x_t = noised(x0, sigma, common.generators(*seeds))
                with torch.no_grad(), old.loaded():
                    v_old, _ = replay(pipe, rollouts[i], k, x_t)
                if reference:
                    with torch.no_grad(), reference.loaded():
                        v_ref, _ = replay(pipe, rollouts[i], k, x_t)
                v, _ = replay(pipe, rollouts[i], k, x_t)
                anchor = v_ref if train.dpo_reference == "base" else v_old
                loss, terms = dpo_loss(v, anchor, x_t, x0, sigma, is_pair[i], train.dpo_beta)
                update.add({"v_old_distance": ((v - v_old).detach().float() ** 2).mean()})
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
