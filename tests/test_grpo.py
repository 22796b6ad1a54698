"""The loss of grpo.py, from first principles."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import dynamics
import grpo
from common import Snapshot, replay, rollout
from grpo import TrainArgs, drawn_steps, group_advantages, grpo_loss, kl_loss, step_weights


def test_advantages_of_a_group():  # G2
    rewards = torch.rand(24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    groups = group_advantages(rewards, 8).reshape(3, 8)
    assert torch.allclose(groups.mean(1), torch.zeros(3, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(groups.std(1, correction=0), torch.ones(3, dtype=torch.float64), atol=1e-3)
    overall = group_advantages(rewards, 8, global_std=True).reshape(3, 8)
    assert torch.allclose(overall.mean(1), torch.zeros(3, dtype=torch.float64), atol=1e-12)
    of_all, of_group = rewards.std(correction=0), rewards.reshape(3, 8).std(1, correction=0)
    assert torch.allclose(overall * (of_all + 1e-4), groups * (of_group + 1e-4)[:, None])


@pytest.mark.parametrize("global_std", [False, True])
def test_a_constant_group_says_nothing(global_std):  # G2
    rewards = torch.tensor([0.1] * 3 + [0.0, 1.0, 0.0])  # 0.1 * 3 / 3 != 0.1 in floating point
    advantages = group_advantages(rewards, 3, global_std)
    assert (advantages[:3] == 0).all() and (advantages[3:] != 0).all()


def test_advantages_ignore_offset_and_scale():  # G4
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e4
    there = group_advantages(rewards, 4)
    assert torch.allclose(group_advantages(rewards + 7e4, 4), there)
    assert torch.allclose(group_advantages(rewards * 3, 4), there, atol=1e-6)


def test_gradient_at_ratio_1():  # G2
    log_prob = torch.randn(6, requires_grad=True)
    advantages = torch.tensor([3.0, -2.0, 0.5, -9.0, 9.0, 0.0])
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
    x, v, v_new = (torch.randn(2, 4, 3, 3, dtype=torch.float64) for _ in range(3))
    old = dynamics.step("Flow-SDE", v, x, 0.8, 0.7, 0.7)
    new = dynamics.step("Flow-SDE", v + 0.01 * v_new, x, 0.8, 0.7, 0.7, x_next=old.x_next)
    densities = (torch.distributions.Normal(step.mean, step.std).log_prob(old.x_next) for step in (new, old))
    true = torch.sub(*densities).flatten(1).sum(1).exp()
    assert torch.allclose((new.log_prob - old.log_prob).exp(), true ** (1 / 36))


def test_accumulated_gradient_is_the_batch_gradient():  # G8
    generator = torch.Generator().manual_seed(0)
    log_prob = torch.randn(8, generator=generator, requires_grad=True)
    old, advantages = log_prob.detach() + 0.1 * torch.randn(8, generator=generator), torch.randn(8, generator=generator)
    grpo_loss(log_prob, old, advantages, 0.1, 5.0)[0].backward()
    whole, log_prob.grad = log_prob.grad, None
    for i in range(0, 8, 2):
        part = slice(i, i + 2)
        (grpo_loss(log_prob[part], old[part], advantages[part], 0.1, 5.0)[0] / 4).backward()
    assert torch.allclose(log_prob.grad, whole)


@pytest.mark.parametrize("sign", [1, -1])
def test_updates_raise_the_reward(sign):  # G7
    torch.manual_seed(0)
    mean = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([mean], 0.05)
    for _ in range(30):
        sample = mean.detach() + torch.randn(64)
        advantages = sign * group_advantages(sample, 64)  # the reward is the sample itself
        old = torch.distributions.Normal(mean.detach(), 1.0).log_prob(sample)
        for _ in range(2):
            loss, _ = grpo_loss(torch.distributions.Normal(mean, 1.0).log_prob(sample), old, advantages, 0.2, 5.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert sign * mean.item() > 0.5


def test_kl_in_closed_form():  # G5
    a, sigma, sigma_next = 0.7, 0.8, 0.7
    x, v = (torch.randn(2, 4, 3, 3, dtype=torch.float64) for _ in range(2))
    v_new = (v + 0.1 * torch.randn_like(v)).requires_grad_()
    reference = dynamics.step("Flow-SDE", v, x, sigma, sigma_next, a)
    policy = dynamics.step("Flow-SDE", v_new, x, sigma, sigma_next, a, x_next=reference.x_next)
    by_x, metrics = kl_loss("x-based", v_new, policy, v, reference)
    by_v, same = kl_loss("v-based", v_new, policy, v, reference)
    h = sigma - sigma_next
    assert by_x.item() == pytest.approx((h * (1 + a**2 / 2)) ** 2 * by_v.item(), rel=1e-5)
    normals = (torch.distributions.Normal(step.mean, step.std) for step in (policy, reference))
    exact = torch.distributions.kl_divergence(*normals).mean().item()
    assert metrics["kl"].item() == pytest.approx(exact) and same["kl"].item() == pytest.approx(exact)
    for penalty in (by_x, by_v):
        assert penalty > 0 and torch.autograd.grad(penalty, v_new, retain_graph=True)[0].abs().min() > 0
    zero, _ = kl_loss("x-based", v, reference, v, reference)
    assert zero == 0


@pytest.mark.parametrize("kl_type", ["v-based", "x-based"])
def test_kl_reaches_the_parameters_but_not_the_reference(make_pipe, call, kl_type):  # G5
    pipe, parameters = make_pipe()
    reference = Snapshot(parameters.values())
    tape = rollout(pipe, call(count=2), "Flow-SDE", 0.7, [1])

    def gradient():
        for p in parameters.values():
            p.grad = None
        with torch.no_grad(), reference.loaded():
            ref = replay(pipe, tape, 1)
        penalty, _ = kl_loss(kl_type, *replay(pipe, tape, 1), *ref)
        penalty.backward()
        return penalty.item(), sum(p.grad.norm().item() for p in parameters.values() if p.grad is not None)

    assert gradient() == (0, 0)
    for p in parameters.values():
        p.data += 0.01
    penalty, norm = gradient()
    assert penalty > 0 and norm > 0


def sd35_sigmas():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    return scheduler.sigmas.tolist()


def test_noise_aware_weights():  # T1
    weights = step_weights(TrainArgs(loss_weighting="noise-aware"), sd35_sigmas())
    published = [1.577, 1.673, 1.208, 1.004, 0.882, 0.795, 0.719, 0.635, 0.508]
    assert list(weights.values()) == pytest.approx(published, abs=1e-3)
    assert sum(weights.values()) / 9 == pytest.approx(1)
    assert set(step_weights(TrainArgs(), sd35_sigmas()).values()) == {1.0}
    drawn = TrainArgs(loss_weighting="noise-aware", train_steps=[1, 2, 3], num_train_steps=1)
    assert list(step_weights(drawn, sd35_sigmas())) == [1, 2, 3]  # over the candidates, whichever is drawn


def test_noise_aware_gradient_scale():  # T4: |d loss / d v| is h (1 + a²/2), with no 1/std left in it
    sigmas, a = sd35_sigmas(), 0.7
    weights = step_weights(TrainArgs(loss_weighting="noise-aware"), sigmas)
    scale = {}
    for k in range(1, 9):
        x, noise = torch.zeros(1, 4, dtype=torch.float64), torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)
        v = torch.zeros_like(x, requires_grad=True)
        old = dynamics.step("Flow-SDE", v.detach(), x, sigmas[k], sigmas[k + 1], a, sigma_second=sigmas[1])
        x_next = old.mean + old.std * noise
        old = dynamics.step("Flow-SDE", v.detach(), x, sigmas[k], sigmas[k + 1], a, x_next=x_next)
        new = dynamics.step("Flow-SDE", v, x, sigmas[k], sigmas[k + 1], a, x_next=x_next)
        loss, _ = grpo_loss(new.log_prob, old.log_prob, torch.ones(1, dtype=torch.float64), 0.1, 5.0)
        (weights[k] * loss).backward()
        scale[k] = v.grad.abs().mean().item() / ((sigmas[k] - sigmas[k + 1]) * (1 + a**2 / 2))
    assert max(scale.values()) == pytest.approx(min(scale.values()), rel=1e-4)


def test_drawn_steps():
    train = TrainArgs(train_steps=[1, 2, 3], num_train_steps=1)
    drawn = [drawn_steps(train, epoch) for epoch in range(1, 60)]
    assert {k for steps in drawn for k in steps} == {1, 2, 3} and all(len(steps) == 1 for steps in drawn)
    assert drawn == [drawn_steps(train, epoch) for epoch in range(1, 60)]  # from (seed, epoch) alone
    assert drawn != [drawn_steps(TrainArgs(train_steps=[1, 2, 3], num_train_steps=1, seed=1), e) for e in range(1, 60)]
    assert drawn_steps(TrainArgs(), 1) == list(range(9)) == grpo.candidate_steps(TrainArgs())


@pytest.mark.parametrize("last", [23, 24])
def test_the_window_slides(last):  # M4: l(i) = min(⌊i / 25⌋, T − w), never empty
    steps = list(range(last + 1))
    named = None if last == 23 else steps  # all but the last of T = 25
    train = TrainArgs(num_inference_steps=25, train_steps=named, num_train_steps=4, shift_interval=25)
    drawn = [drawn_steps(train, epoch) for epoch in range(1, 1001)]
    for i, window in enumerate(drawn):
        start = min(i // 25, last + 1 - 4)
        assert window == [start, start + 1, start + 2, start + 3]
    assert drawn[-1][-1] == last
    others = (dict(seed=1), dict(train_steps=steps[1::2] + steps[::2]))  # the seed has no part in it, nor has the order
    for other in others:
        same = TrainArgs(**{**vars(train), **other})
        assert [drawn_steps(same, epoch) for epoch in range(1, 1001)] == drawn


def test_the_window_is_of_neighbouring_candidates():
    train = TrainArgs(train_steps=[7, 0, 5, 2], num_train_steps=2, shift_interval=1)
    assert [drawn_steps(train, epoch) for epoch in range(1, 6)] == [[0, 2], [2, 5], [5, 7], [5, 7], [5, 7]]
    train = TrainArgs(train_steps=[7, 0, 5, 2], num_train_steps=4, shift_interval=1)
    assert drawn_steps(train, 1) == drawn_steps(train, 9) == [0, 2, 5, 7]


@pytest.mark.parametrize("tail", [1, 3, 6])
@pytest.mark.parametrize("shift_interval", [None, 2])
def test_the_most_steps_of_an_image(shift_interval, tail):  # M5
    train = TrainArgs(train_steps=[5, 1, 2], num_train_steps=2, shift_interval=shift_interval, tail_steps=tail)
    ends = {drawn_steps(train, epoch)[-1] + 1 for epoch in range(1, 60)}
    assert ends == {3, 6} and grpo.most_steps(train) == max(end + min(tail, 10 - end) for end in ends)
