"""The loss of grpo.py, from first principles, and what the loops of all scripts have in common."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import read_csv
from safetensors.torch import load_file
from test_dynamics import SIGMAS, seeded
from torch.distributions import Normal, kl_divergence

import common
import dynamics
import grpo
import grpo_guard
import nft
import rewards
from grpo import TrainArgs, drawn_steps, group_advantages, grpo_loss, kl_loss, step_weights

A = 0.7  # the noise level
FACTOR = 1 + A**2 / 2  # |∂μ/∂v| / h of Flow-SDE after its first step, where it is 1


def two_policies(k, shape=(3, 4, 3, 3), apart=0.1, dtype=torch.float64, draws=1):
    """A Flow-SDE step of SD3.5's schedule taken by an old policy, and scored by a new one `apart` in velocity.

    k: the step, or those of the samples (B,); draws: how often all samples are taken, each time with fresh noise.
    Returns (v_new with a gradient, old Step, new Step).
    """
    generator, times = seeded(), (draws, *[1] * (len(shape) - 1))
    x, v, away = (torch.randn(shape, generator=generator, dtype=dtype).repeat(times) for _ in range(3))
    where = dict(sigma=SIGMAS[k], sigma_next=SIGMAS[k + 1], noise_level=A, sigma_second=SIGMAS[1])
    old = dynamics.step("Flow-SDE", v, x, **where, generator=generator)
    v_new = (v + apart * away).requires_grad_()
    return v_new, old, dynamics.step("Flow-SDE", v_new, x, **where, x_next=old.x_next)


def test_advantages_of_a_group():  # G2
    rewards = torch.rand(24, generator=seeded(), dtype=torch.float64)
    groups, overall = (group_advantages(rewards, 8, global_std).reshape(3, 8) for global_std in (False, True))
    assert groups.mean(1).abs().max() < 1e-12 and overall.mean(1).abs().max() < 1e-12
    assert (groups.std(1, correction=0) - 1).abs().max() < 1e-3
    of_all, of_group = rewards.std(correction=0), rewards.reshape(3, 8).std(1, correction=0)
    assert torch.allclose(overall * (of_all + 1e-4), groups * (of_group + 1e-4)[:, None])


@pytest.mark.parametrize("global_std", [False, True])
def test_a_constant_group_says_nothing(global_std):  # G2
    rewards = torch.tensor([0.1] * 3 + [0.0, 1.0, 0.0])  # 0.1 * 3 / 3 != 0.1 in floating point
    advantages = group_advantages(rewards, 3, global_std)
    assert (advantages[:3] == 0).all() and (advantages[3:] != 0).all()


def test_advantages_ignore_offset_and_scale():  # G4
    rewards = torch.randn(12, generator=seeded(), dtype=torch.float64) * 1e4
    for other in (rewards + 7e4, rewards * 3):
        assert torch.allclose(group_advantages(other, 4), group_advantages(rewards, 4), atol=1e-6)


def test_gradient_at_ratio_1():  # G2
    log_prob, advantages = torch.randn(6, requires_grad=True), torch.tensor([3.0, -2.0, 0.5, -9.0, 9.0, 0.0])
    loss, metrics = grpo_loss(log_prob, log_prob.detach(), advantages, 1e-4, 5.0)
    loss.backward()
    assert torch.allclose(log_prob.grad, -advantages.clamp(-5, 5) / 6)
    assert metrics["clip_fraction"] == 0 and metrics["log_ratio"] == 0 and not metrics["policy_loss"].requires_grad


@pytest.mark.parametrize(
    "advantage, ratio, clipped", [(1, 1.2, True), (-1, 0.8, True), (1, 0.8, False), (-1, 1.2, False)]
)
def test_clipping(advantage, ratio, clipped):  # G3
    log_prob = torch.tensor([math.log(ratio)], requires_grad=True)
    grpo_loss(log_prob, torch.zeros(1), torch.tensor([float(advantage)]), 0.1, 5.0)[0].backward()
    assert (log_prob.grad == 0).item() == clipped


def test_old_log_prob_has_no_gradient_and_shapes_are_checked():
    old = torch.zeros(3, requires_grad=True)
    grpo_loss(torch.zeros(3, requires_grad=True), old, torch.ones(3), 0.1, 5.0)[0].backward()
    assert old.grad is None
    with pytest.raises(AssertionError):  # (B, 1) against (B,) would broadcast to (B, B)
        grpo_loss(torch.zeros(3, 1), torch.zeros(3), torch.zeros(3), 0.1, 5.0)


def test_mean_ratio_is_a_root_of_the_true_one():  # G6
    _, old, new = two_policies(3)
    densities = (Normal(step.mean, step.std).log_prob(old.x_next) for step in (new, old))
    true = torch.sub(*densities).flatten(1).sum(1).exp()
    assert torch.allclose((new.log_prob - old.log_prob).exp(), true ** (1 / 36))


def test_accumulated_gradient_is_the_batch_gradient():  # G8
    log_prob, away, advantages = torch.randn(3, 8, generator=seeded())
    log_prob, old = log_prob.requires_grad_(), log_prob + 0.1 * away
    (whole,) = torch.autograd.grad(grpo_loss(log_prob, old, advantages, 0.1, 5.0)[0], log_prob)
    for part in torch.arange(8).split(2):
        (grpo_loss(log_prob[part], old[part], advantages[part], 0.1, 5.0)[0] / 4).backward()
    assert torch.allclose(log_prob.grad, whole)


@pytest.mark.parametrize("sign", [1, -1])
def test_updates_raise_the_reward(sign):  # G7
    mean, generator = torch.zeros(1, requires_grad=True), seeded()
    for _ in range(30):
        sample = mean.detach() + torch.randn(64, generator=generator)
        log_prob, advantages = Normal(mean, 1.0).log_prob(sample), sign * group_advantages(sample, 64)
        loss, _ = grpo_loss(log_prob, log_prob.detach(), advantages, 0.2, 5.0)  # the reward is the sample itself
        mean.data -= 0.1 * torch.autograd.grad(loss, mean)[0]
    assert sign * mean.item() > 0.5


def test_kl_in_closed_form():  # G5
    (v, reference, _), (v_new, _, policy) = two_policies(3, apart=0.0), two_policies(3)
    exact = kl_divergence(*(Normal(step.mean, step.std) for step in (policy, reference))).mean().item()
    penalties = {}
    for kl_type in ("v-based", "x-based", "exact"):
        penalty, metrics = kl_loss(kl_type, v_new, policy, v, reference)
        assert metrics["kl_penalty"] == penalty and metrics["kl"].item() == pytest.approx(exact)
        assert torch.autograd.grad(penalty, v_new, retain_graph=True)[0].abs().min() > 0
        assert kl_loss(kl_type, v, reference, v, reference)[0] == 0
        penalties[kl_type] = penalty.item()
    by_v, slope = ((v_new - v) ** 2).mean().item(), (SIGMAS[3] - SIGMAS[4]).item() * FACTOR  # ∂mean/∂v
    expected = {"v-based": by_v, "x-based": slope**2 * by_v, "exact": exact}
    assert penalties == pytest.approx(expected, rel=1e-5)


def test_noise_aware_weights():  # T1
    train = TrainArgs(loss_weighting="noise-aware")
    weights, below_1 = (step_weights(train, [first, *SIGMAS.tolist()[1:]]) for first in (1.0, 0.999))
    assert list(below_1.values()) == pytest.approx(list(weights.values()), rel=0.02)
    published = [1.577, 1.673, 1.208, 1.004, 0.882, 0.795, 0.719, 0.635, 0.508]
    assert list(weights.values()) == pytest.approx(published, abs=1e-3)
    assert sum(weights.values()) / 9 == pytest.approx(1)
    assert weights[0] / 0.7 == pytest.approx(2.2522, abs=1e-4)  # over std_0 = a: one over the mean std
    assert set(step_weights(TrainArgs(), SIGMAS.tolist()).values()) == {1.0}
    drawn = replace(train, train_steps=[1, 2, 3], num_train_steps=1)
    assert list(step_weights(drawn, SIGMAS.tolist())) == [1, 2, 3]  # over the candidates, whichever is drawn


def test_noise_aware_gradient_scale():  # T4: d loss / d v is h (1 + a²/2) ε, h ε in the first step, with no 1/std left
    v, old, new = two_policies(torch.arange(9), (9, 4), apart=0.0)
    for k, weight in step_weights(TrainArgs(loss_weighting="noise-aware"), SIGMAS.tolist()).items():
        loss, _ = grpo_loss(new.log_prob[k : k + 1], old.log_prob[k : k + 1], torch.ones(1), 0.1, 5.0)
        (weight * loss).backward(retain_graph=True)
    epsilon, factor = (old.x_next - old.mean) / old.std, torch.tensor([1.0] + [FACTOR] * 8, dtype=torch.float64)
    assert torch.allclose(v.grad, (-SIGMAS.diff()[:9] * factor / (4 * old.std.mean()))[:, None] * epsilon)


@pytest.mark.parametrize("shift_interval, possible", [(None, {(0,), (2,), (7,)}), (0, {(0, 2), (2, 7)})])
def test_drawn_steps(shift_interval, possible):  # 0: a window at a place drawn anew
    (count,) = {len(steps) for steps in possible}
    train = TrainArgs(train_steps=[2, 7, 0], num_train_steps=count, shift_interval=shift_interval)
    trains = train, replace(train, train_steps=[0, 2, 7]), replace(train, seed=1)
    drawn, again, other = ([drawn_steps(each, epoch) for epoch in range(1, 60)] for each in trains)
    assert {tuple(steps) for steps in drawn} == possible
    assert again == drawn != other  # from (seed, epoch) and which candidates there are
    assert shift_interval is not None or drawn == [nft.drawn_steps(train, epoch) for epoch in range(1, 60)]
    assert drawn_steps(TrainArgs(), 1) == nft.drawn_steps(nft.TrainArgs(), 1) == list(range(9))


@pytest.mark.parametrize(
    "named, count, interval", [(None, 4, 25), ([*range(25)], 4, 25), ([7, 0, 5, 2], 2, 1), ([7, 0, 5, 2], 4, 1)]
)
def test_the_window_slides(named, count, interval):  # M4: l(i) = min(⌊i / 25⌋, T − w), never empty
    candidates = sorted(named or range(24))  # all but the last of T = 25
    train = TrainArgs(num_inference_steps=25, train_steps=named, num_train_steps=count, shift_interval=interval)
    starts = [min(i // interval, len(candidates) - count) for i in range(1000)]
    for seed in (0, 1):
        drawn = [drawn_steps(replace(train, seed=seed), epoch) for epoch in range(1, 1001)]
        assert drawn == [candidates[start : start + count] for start in starts]


# The loops of the scripts


def test_what_a_run_trains_on(start, monkeypatch, tapes):
    """That of grpo_guard.py is the same but for the ratio: test_guard.py compares the two."""
    losses, kinds, places, snapshot = [], [], [], common.Snapshot
    monkeypatch.setattr(common, "Snapshot", lambda *args: places.append(args[1]) or snapshot(*args))
    monkeypatch.setattr(grpo, "grpo_loss", lambda *args: losses.append(args) or grpo_loss(*args))
    monkeypatch.setattr(grpo, "kl_loss", lambda *args: kinds.append(args[0]) or kl_loss(*args))
    options = "--train.dynamics-type Dance-SDE --train.noise-level 0.3 --train.same-init-noise --train.global-std"
    options += " --train.clip-range 1e-3 --train.adv-clip-range 3 --train.kl-beta 100 --train.kl-type x-based"
    options += " --train.ref-param-device cpu --train.ema-decay 0.9 --train.ema-update-interval 1 --train.max-epochs 1"
    folder = start(grpo, *options.split())

    assert [(tape.dynamics_type, tape.noise_level) for tape in tapes] == [("Dance-SDE", 0.3)] * 2
    assert all(torch.equal(tape.noise, tape.noise[:1].expand_as(tape.noise)) for tape in tapes)
    assert set(kinds) == {"x-based"} and places == ["cpu"] and len(losses) == 2 * 3  # calls x trained steps
    reward = rewards.make_reward({"jpeg_compressibility": 1.0}, "cpu")
    totals = torch.cat([reward(tape.images, tape.call["prompt"])["total"] for tape in tapes])
    advantages = group_advantages(totals, 4, True).split(4)
    for _, old, given, *clips in losses:
        (i,) = (i for i, tape in enumerate(tapes) if any(step.log_prob is old for step in tape.steps.values()))
        assert torch.equal(given, advantages[i]) and clips == [1e-3, 3]
    row = read_csv(folder / "metrics.csv")[1]
    loss, policy_loss, penalty = (float(row[f"train/{name}"]) for name in ("loss", "policy_loss", "kl_penalty"))
    assert loss - policy_loss == pytest.approx(100 * penalty, rel=1e-3) and penalty > 0


@pytest.mark.parametrize("script", [grpo, nft])
def test_the_average_is_evaluated_and_left(start, script):
    average = ("--train.ema-decay", 0.9, "--train.ema-update-interval", 1)
    folder = start(script, "--train.max-epochs", 1, *average, "--eval.reward", "shapes=1")
    assert "eval/shapes" in read_csv(folder / "metrics.csv")[1]
    (saved,) = folder.glob("checkpoints/epoch_0001*/*.safetensors")
    saved, lora, changed = load_file(saved), load_file(folder / "lora/pytorch_lora_weights.safetensors"), 0
    for name, tensor in lora.items():
        policy, average = (saved[f"{of}/{name.replace('.weight', '.default.weight')}"] for of in ("parameters", "ema"))
        assert torch.equal(tensor, average)
        changed += not torch.equal(tensor, policy)
    assert changed


@pytest.mark.parametrize("script", [grpo, grpo_guard, nft])
def test_every_epoch_draws_its_own(start, monkeypatch, script):
    drawn = []
    for room, name, place in ((script, "drawn_steps", 1), (common, "epoch_calls", 3), (common, "minibatches", 1)):
        plain = getattr(room, name)
        watched = lambda *a, f=plain, n=name, i=place: drawn.append((n, a[i])) or f(*a)  # noqa: E731
        monkeypatch.setattr(room, name, watched)
    monkeypatch.setattr(script, "first_step_contract", lambda *_: None)
    start(script)
    names = ("drawn_steps", "epoch_calls", "minibatches")
    assert drawn == [("drawn_steps", 1), *((name, epoch) for epoch in (1, 2) for name in names)]  # first the plan


@pytest.mark.parametrize("options", ["--train.gradient-step-per-epoch 1", "--train.train-steps 1"])
@pytest.mark.parametrize("script, loss", [(grpo, "grpo_loss"), (grpo_guard, "grpo_loss"), (nft, "nft_loss")])
def test_an_update_is_over_the_mean_of_its_losses(start, monkeypatch, script, loss, options):
    trained, adamw = [], torch.optim.AdamW

    def optimizer(parameters, *settings, **named):
        trained.extend(parameters)
        return adamw(trained, *settings, **named)

    def flat_loss(first, *_):  # whose gradient is 1 in one parameter
        return 0 * first.sum() + trained[0].sum(), {}

    monkeypatch.setattr(torch.optim, "AdamW", optimizer)
    monkeypatch.setattr(script, loss, flat_loss)
    unweighted = ["--train.no-reweight"] if script is grpo_guard else []
    rows = read_csv(start(script, "--train.max-epochs", 1, *unweighted, *options.split()) / "metrics.csv")
    assert float(rows[1]["train/grad_norm"]) == pytest.approx(trained[0].numel() ** 0.5, rel=1e-5)


REFUSALS = [
    (grpo, "--train.trainer-type nft", "--train.trainer-type", "('grpo',)"),
    (grpo_guard, "--train.dynamics-type Dance-SDE", "train.dynamics_type = 'Dance-SDE'", "Flow-SDE alone"),
    (grpo_guard, "--train.dynamics-type CPS", "train.dynamics_type = 'CPS'", "Flow-SDE alone"),
    (grpo_guard, "--train.dynamics-type ODE", "train.dynamics_type = 'ODE'", "grpo.py"),
    (grpo_guard, "--train.noise-level 0", "train.noise_level = 0.0", "greater than 0"),
    (grpo_guard, "--train.train-steps 4", "train.train_steps = [4]", "from 0 to 3"),
    (grpo_guard, "--train.tail-steps 2", "train.tail_steps = 2", "step is 2 or later, and after it come at most 1"),
    (grpo_guard, "--train.shift-interval -1", "train.shift_interval = -1", "greater than or equal to 0"),
    (grpo_guard, "--train.trainer-type grpo", "--train.trainer-type", "('grpo-guard',)"),
    (grpo_guard, "--train.shift-interval 25", "train.shift_interval = 25", "which is None; set that too"),
    (nft, "--train.trainer-type grpo", "--train.trainer-type", "('nft',)"),
    (nft, "--train.kl-type x-based", "train.kl_type = 'x-based'", "v-based"),
    (nft, "--train.kl-type exact", "train.kl_type = 'exact'", "v-based"),
    (nft, "--train.dynamics-type CPS --train.noise-level 1.1", "train.noise_level = 1.1", "at most 1"),
    (nft, "--train.dynamics-type Flow-SDE --train.noise-level 0", "train.noise_level = 0.0", "greater than 0"),
    (nft, "--train.train-steps 4", "train.train_steps = [4]", "from 0 to 3"),
    (nft, "--train.dynamics-type CPS --train.solver DPM-Solver++", "train.solver = 'DPM-Solver++'", "is for the ODE"),
]  # the others of grpo.py are in test_settings.py


@pytest.mark.parametrize("script, options, what, remedy", REFUSALS)
def test_refusals(refusal, script, options, what, remedy):
    message = refusal(script, *options.split())
    assert what in message and remedy in message
