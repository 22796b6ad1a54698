"""The loss and the loop of nft.py, from first principles."""

import dataclasses
import functools
import itertools
from contextlib import contextmanager

import pytest
import torch
from conftest import read_csv

import common
import dynamics
import nft
import rewards
from common import Snapshot, generators, replay, rollout
from nft import TrainArgs, drawn_steps, group_advantages, nft_loss, noised, old_decay

C = 5.0  # the clip range of the advantages, so that r = 1/2 + A / 2C


def world(batch=6, sigma=0.6, seed=0):
    """(x_t, x0, v_target, v_old) of a few images: v_target is noise − x0, v_old a wrong guess of it."""
    generator = torch.Generator().manual_seed(seed)
    x0, noise, wrong = (torch.randn(batch, 4, 3, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    sigma = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1, 1, 1)
    return (1 - sigma) * x0 + sigma * noise, x0, noise - x0, noise - x0 + 0.5 * wrong


def advantages_of(r):
    return 2 * C * (torch.as_tensor(r, dtype=torch.float64) - 0.5)


def loss_gradient(v, *rest, **options):
    v = v.detach().requires_grad_()
    return torch.autograd.grad(nft_loss(v, *rest, **options)[0], v)[0]


# The loss


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("self_normalised", [True, False])
def test_no_advantage_has_no_gradient(beta, self_normalised):  # N1
    x_t, x0, _, v_old = world()
    rest = (v_old, x_t, x0, 0.6, torch.zeros(6, dtype=torch.float64), beta, C, self_normalised)
    assert loss_gradient(v_old, *rest).abs().max() < 1e-15
    assert loss_gradient(v_old + 1, *rest).abs().max() > 1e-4
    least, generator = nft_loss(v_old, *rest)[0], torch.Generator().manual_seed(1)
    for size in (1e-3, 0.1, 3.0):
        away = size * torch.randn(v_old.shape, generator=generator, dtype=torch.float64)
        if not self_normalised:
            assert nft_loss(v_old + away, *rest)[0] > least
        pull = loss_gradient(v_old + away, *rest)
        assert (pull * away).sum() > 0  # back to v_old


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 2.0])
def test_minimiser_of_a_sample(beta):  # N2: v_old + (2r − 1)(v_target − v_old) / β
    x_t, x0, v_target, v_old = world()
    r = torch.tensor([0.0, 0.1, 0.5, 0.6, 0.9, 1.0], dtype=torch.float64)
    rest = (v_old, x_t, x0, 0.6, advantages_of(r), beta, C, False)
    best = v_old + (2 * r - 1).reshape(-1, 1, 1, 1) * (v_target - v_old) / beta
    assert loss_gradient(best, *rest).abs().max() < 1e-14
    away = torch.randn(best.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for size in (1e-3, 1.0):
        assert nft_loss(best + size * away, *rest)[0] > nft_loss(best, *rest)[0]
    # a quadratic: its curvature is 10 β σ² (per latent and image)
    curvature = (loss_gradient(best + 1, *rest) - loss_gradient(best, *rest)) * 36 * 6
    assert torch.allclose(curvature, torch.full_like(curvature, 2 * C * beta * 0.6**2))


def test_self_normalised_minimiser_is_at_full_optimality():  # departs from N2, as the released code does
    x_t, x0, v_target, v_old = world()
    r = torch.tensor([0.0, 0.1, 0.4, 0.6, 0.9, 1.0], dtype=torch.float64)
    rest = (v_old, x_t, x0, 0.6, advantages_of(r), 0.5, C, True)
    sign = (2 * r - 1).sign().reshape(-1, 1, 1, 1)
    pulls = []
    for t in (0.1, 0.5, 0.9, 1.1):  # of the way to v_old ± (v_target − v_old) / β, where the weight of one error is 0
        v = v_old + t * sign * (v_target - v_old) / 0.5
        pulls.append(-(loss_gradient(v, *rest) * sign * (v_target - v_old)).flatten(1).sum(1))
    assert torch.allclose(pulls[0], pulls[1]) and torch.allclose(pulls[0], pulls[2])  # the pull does not slacken
    assert (pulls[0] > 0).all() and (pulls[3] < 0).all()


@pytest.fixture(scope="module")
def lattice():
    """A world that can be enumerated: x0 and noise in {0, 1, 2}² evenly, sigma 1/2, so that x_t is on a 5 x 5 grid.

    Returns (x0, x_t, v_target, where, r): one row per pair (81, 2), the index of x_t (81,) and an optimality (81,) that
    depends on x0 alone.
    """
    atoms = torch.tensor(list(itertools.product(range(3), repeat=2)), dtype=torch.float64)
    pairs = torch.tensor(list(itertools.product(range(9), repeat=2)))
    x0, noise = atoms[pairs[:, 0]], atoms[pairs[:, 1]]
    x_t = (x0 + noise) / 2
    where = (2 * x_t[:, 0] * 5 + 2 * x_t[:, 1]).long()
    r = 0.2 + 0.6 * torch.rand(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x0, x_t, noise - x0, where, r[pairs[:, 0]]


def given_x_t(values, where):
    """The mean of (81, ...) values over the pairs of each x_t, (25, ...)."""
    return torch.stack([values[where == place].mean(0) for place in range(25)])


def population_minimiser(lattice, v_old, r, beta):
    """The table of velocities (25, 2) that minimises the loss over all pairs, by one step of Newton."""
    x0, x_t, _, where, _ = lattice

    def slope(table):
        table = table.clone().requires_grad_()
        rest = (v_old[where], x_t, x0, 0.5, advantages_of(r), beta, C, False)
        return torch.autograd.grad(nft_loss(table[where], *rest)[0], table)[0]

    there = v_old - slope(v_old) / (slope(v_old + 1) - slope(v_old))
    assert slope(there).abs().max() < 1e-14
    return there


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_minimiser_of_a_population(lattice, beta):  # N2: v_old + (2/β) α (v⁺ − v_old) for a v_old that fits its samples
    _, _, v_target, where, r = lattice
    v_old, alpha = given_x_t(v_target, where), given_x_t(r, where)[:, None]
    v_positive = given_x_t(r[:, None] * v_target, where) / alpha
    best = population_minimiser(lattice, v_old, r, beta)
    assert torch.allclose(best, v_old + 2 / beta * alpha * (v_positive - v_old), rtol=1e-9, atol=1e-9)
    assert (best - v_old).abs().max() > 0.1
    other = v_old + torch.randn(25, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)  # any v_old
    pull = given_x_t((2 * r - 1)[:, None] * (v_target - other[where]), where)
    assert torch.allclose(population_minimiser(lattice, other, r, beta), other + pull / beta, rtol=1e-9, atol=1e-9)


def test_a_constant_reward_moves_nothing(lattice):  # N5
    _, _, v_target, where, r = lattice
    v_old = given_x_t(v_target, where)
    best = population_minimiser(lattice, v_old, r, 1.0)
    assert torch.allclose(population_minimiser(lattice, v_old, r + 0.15, 1.0), best, atol=1e-12)
    even = torch.full_like(r, 0.9)
    assert torch.allclose(population_minimiser(lattice, v_old, even, 1.0), v_old, atol=1e-12)
    other = v_old + 0.3  # which does not fit its own samples
    moved = population_minimiser(lattice, other, r + 0.15, 1.0) - population_minimiser(lattice, other, r, 1.0)
    assert torch.allclose(moved, torch.full_like(moved, 2 * 0.15 * -0.3))


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("sigma", [0.3, [0.1, 0.3, 0.5, 0.7, 0.9, 1.0]])
def test_first_gradient_is_the_advantage(beta, sigma):  # N3
    x_t, x0, v_target, v_old = world(sigma=sigma)
    advantages = torch.tensor([-9.0, -5.0, -0.3, 0.0, 2.0, 7.0], dtype=torch.float64)
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    A, s = advantages.clamp(-C, C).reshape(-1, 1, 1, 1), sigma.reshape(-1, 1, 1, 1)
    expected = -2 * A * s**2 * (v_target - v_old) / (36 * 6)  # the loss is a mean over 36 latents and 6 images
    plain = loss_gradient(v_old, v_old, x_t, x0, sigma, advantages, beta, C, False)
    assert torch.allclose(plain, expected, rtol=1e-9, atol=1e-15)
    # with x0 errors divided by their own mean size, σ mean |v_target − v_old|
    size = s * (v_target - v_old).abs().mean(dim=(1, 2, 3), keepdim=True)
    normalised = loss_gradient(v_old, v_old, x_t, x0, sigma, advantages, beta, C, True)
    assert torch.allclose(normalised, expected / size, rtol=1e-9, atol=1e-15)
    by_default = loss_gradient(v_old, v_old, x_t, x0, sigma, advantages, beta, C)
    assert torch.equal(by_default, normalised)


@pytest.mark.parametrize("clip", [1.0, 5.0])
def test_first_gradient_does_not_depend_on_the_clip_range(clip):  # N3, while nothing is clipped
    x_t, x0, v_target, v_old = world()
    advantages = torch.linspace(-1, 1, 6, dtype=torch.float64)
    expected = -2 * advantages.reshape(-1, 1, 1, 1) * 0.36 * (v_target - v_old) / (36 * 6)
    assert torch.allclose(loss_gradient(v_old, v_old, x_t, x0, 0.6, advantages, 1.0, clip, False), expected, rtol=1e-9)


def test_full_optimality_is_flow_matching():  # N4
    x_t, x0, v_target, v_old = world()
    v = v_old + 0.3
    best = torch.full((6,), 2 * C, dtype=torch.float64)
    loss, metrics = nft_loss(v, v_old, x_t, x0, 0.6, best, 1.0, C, False)
    assert loss.item() == pytest.approx(C * ((x_t - 0.6 * v - x0) ** 2).mean().item())
    assert loss.item() == pytest.approx(C * 0.36 * ((v - v_target) ** 2).mean().item())
    assert metrics["positive_loss"].item() * C == pytest.approx(loss.item())
    assert torch.allclose(
        loss_gradient(v, v_old, x_t, x0, 0.6, best, 1.0, C, False), C * 0.36 * 2 * (v - v_target) / (36 * 6)
    )
    # no optimality: the policy mirrored in the old one is fitted to the data
    worst, metrics = nft_loss(v, v_old, x_t, x0, 0.6, -best, 1.0, C, False)
    assert worst.item() == pytest.approx(C * 0.36 * ((2 * v_old - v - v_target) ** 2).mean().item())
    assert metrics["negative_loss"].item() * C == pytest.approx(worst.item())


def test_each_error_has_its_own_weight_without_a_gradient():
    x_t, x0, _, v_old = world()
    v = (v_old + 0.7).requires_grad_()
    advantages = torch.linspace(-4, 4, 6, dtype=torch.float64)
    loss, metrics = nft_loss(v, v_old, x_t, x0, 0.6, advantages, 0.5, C, True)
    sides = []
    for implicit in (0.5 * v_old + 0.5 * v, 1.5 * v_old - 0.5 * v):
        error = x_t - 0.6 * implicit - x0
        sides.append((error**2).mean((1, 2, 3)) / error.detach().abs().mean((1, 2, 3)))
    r = advantages / (2 * C) + 0.5
    by_hand = C * ((r * sides[0] + (1 - r) * sides[1]) / 0.5).mean()
    assert loss.item() == pytest.approx(by_hand.item())
    assert metrics["positive_loss"].item() == pytest.approx(sides[0].mean().item())
    assert metrics["negative_loss"].item() == pytest.approx(sides[1].mean().item())
    assert metrics["v_old_distance"].item() == pytest.approx(0.49)
    assert metrics["optimality_std"].item() == pytest.approx(r.std(correction=0).item())
    assert not any(value.requires_grad for value in metrics.values())
    slopes = [torch.autograd.grad(value, v)[0] for value in (loss, by_hand)]
    assert torch.allclose(*slopes)


@pytest.mark.parametrize("self_normalised", [True, False])
def test_without_the_negative_term(self_normalised):
    x_t, x0, _, v_old = world()
    v = (v_old + 0.7).requires_grad_()
    advantages = torch.linspace(-4, 4, 6, dtype=torch.float64)
    rest = (v_old, x_t, x0, 0.6, advantages, 0.5, C, self_normalised)
    (both, metrics), (loss, same_metrics) = nft_loss(v, *rest), nft_loss(v, *rest, negative_term=False)
    error = x_t - 0.6 * (0.5 * v_old + 0.5 * v) - x0
    size = error.detach().abs().mean((1, 2, 3)) if self_normalised else 1.0
    by_hand = C * ((advantages / (2 * C) + 0.5) * ((error**2).mean((1, 2, 3)) / size) / 0.5).mean()
    assert torch.equal(loss, by_hand)
    alone, expected, slope = (torch.autograd.grad(value, v)[0] for value in (loss, by_hand, both))
    assert torch.equal(alone, expected) and (alone - slope).abs().min() > 0
    assert torch.equal(loss_gradient(v, *rest, negative_term=True), slope)
    assert (metrics.pop("policy_loss"), same_metrics.pop("policy_loss")) == (both, loss) and metrics == same_metrics
    # images of no optimality teach nothing, and without an advantage v_old is still left behind
    worst = (v_old, x_t, x0, 0.6, advantages_of(torch.zeros(6)), 0.5, C, self_normalised)
    assert (loss_gradient(v, *worst, negative_term=False) == 0).all() and loss_gradient(v, *worst).abs().min() > 0
    even = (v_old, x_t, x0, 0.6, torch.zeros(6, dtype=torch.float64), 0.5, C, self_normalised)
    assert loss_gradient(v_old, *even).abs().max() < 1e-15
    assert loss_gradient(v_old, *even, negative_term=False).abs().max() > 1e-4


def test_a_perfect_prediction_is_finite():
    x0, v_target = torch.zeros(2, 4, 3, 3), torch.ones(2, 4, 3, 3)
    v = v_target.clone().requires_grad_()
    loss, _ = nft_loss(v, v_target, 0.5 * v_target, x0, 0.5, torch.ones(2), 1.0, C)
    loss.backward()
    assert loss == 0 and (v.grad == 0).all()


def test_half_precision_is_computed_in_float32_and_shapes_are_checked():
    x_t, x0, v_target, v_old = (t.bfloat16() for t in world())
    old = v_old.clone().requires_grad_()
    v = (v_old + 0.1).requires_grad_()
    rest = (0.6, torch.linspace(-1, 1, 6), 1.0, C)
    loss, _ = nft_loss(v, old, x_t, x0, *rest)
    loss.backward()
    assert loss.dtype == torch.float32 and v.grad.abs().max() > 0 and old.grad is None
    exact, _ = nft_loss(v.double(), old.double(), x_t.double(), x0.double(), *rest)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    with pytest.raises(AssertionError):  # (B, 1) against (B,) would broadcast to (B, B)
        nft_loss(v, v_old, x_t, x0, 0.6, torch.zeros(6, 1), 1.0, C)


def test_a_batch_is_the_mean_of_its_images():
    sigma = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9, 1.0], dtype=torch.float64)
    x_t, x0, _, v_old = world(sigma=sigma)
    advantages, v = torch.linspace(-6, 6, 6, dtype=torch.float64), v_old + 0.2
    whole, _ = nft_loss(v, v_old, x_t, x0, sigma, advantages, 0.5, C)
    parts = []
    for i in range(6):
        one = slice(i, i + 1)
        rest = (x_t[one], x0[one], sigma[i].item(), advantages[one], 0.5, C)
        parts.append(nft_loss(v[one], v_old[one], *rest)[0])
    assert whole.item() == pytest.approx(torch.stack(parts).mean().item())


# What the loss is made of


@pytest.mark.parametrize(
    "settings, values",
    [
        ({}, {0: 0, 1: 0.001, 100: 0.1, 499: 0.499, 500: 0.5, 1000: 0.5}),
        (
            dict(old_decay_start=75, old_decay_slope=0.0075, old_decay_max=0.999),
            {0: 0, 74: 0, 75: 0, 76: 0.0075, 175: 0.75, 208: 0.9975, 209: 0.999, 1000: 0.999},
        ),
        (dict(off_policy=False), {0: 0, 100: 0, 500: 0, 1000: 0}),
        (dict(off_policy=False, old_decay_start=75, old_decay_slope=0.0075, old_decay_max=0.999), {74: 0, 175: 0}),
    ],
)
def test_decay_of_the_old_policy(settings, values):  # N6
    train = TrainArgs(**settings)
    assert {i: old_decay(train, i) for i in values} == pytest.approx(values)


def test_defaults_are_those_of_the_released_code():
    train = TrainArgs()
    assert (train.nft_beta, train.adv_clip_range, train.kl_beta, train.guidance_scale) == (1, C, 1e-4, 1)
    assert train.self_normalised and train.global_std and train.off_policy and train.negative_term
    assert train.dynamics_type == "ODE"


def test_noised_latents():
    x0 = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    seeds = [(0, i) for i in range(3)]
    noise = torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators(*seeds)])
    x_t = noised(x0, 0.3, generators(*seeds))
    assert torch.allclose(x_t, 0.7 * x0 + 0.3 * noise)
    assert torch.equal(noised(x0, 1.0, generators(*seeds)), noise)
    assert torch.equal(noised(x0[1:2], 0.3, generators(seeds[1])), x_t[1:2])  # an image's noise is its own
    half = noised(x0.bfloat16(), 0.3, generators(*seeds))
    exact = 0.7 * x0.bfloat16().float() + 0.3 * noise
    assert half.dtype == torch.bfloat16 and torch.equal(half, exact.bfloat16())


@pytest.mark.parametrize("global_std", [True, False])
def test_advantages(global_std):
    totals = torch.tensor([0.1] * 3 + [0.0, 1.0, 0.0] + [2.0, 4.0, 9.0], dtype=torch.float64)
    advantages = group_advantages(totals, 3, global_std).reshape(3, 3)
    assert (advantages[0] == 0).all()  # although 0.1 * 3 / 3 != 0.1 in floating point
    for group, of_group in zip(advantages[1:], totals.reshape(3, 3)[1:], strict=True):
        std = (totals if global_std else of_group).std(correction=0)
        assert torch.allclose(group, (of_group - of_group.mean()) / (std + 1e-4))
    assert torch.equal(group_advantages(totals, 3), group_advantages(totals, 3, True))


def test_drawn_timesteps():
    train = TrainArgs(train_steps=[1, 2, 9], num_train_steps=2)
    drawn = [drawn_steps(train, epoch) for epoch in range(1, 60)]
    assert {k for steps in drawn for k in steps} == {1, 2, 9} and all(len(set(steps)) == 2 for steps in drawn)
    assert drawn == [drawn_steps(train, epoch) for epoch in range(1, 60)] and drawn_steps(TrainArgs(), 1) == list(
        range(9)
    )


def test_the_loss_knows_nothing_of_the_sampler(make_pipe, call):  # N8
    pipe, parameters = make_pipe()
    old = Snapshot(parameters.values())
    for parameter in parameters.values():
        parameter.data += 0.02
    x0, losses = None, []
    for dynamics_type, level in (("ODE", 0.0), ("CPS", 0.8), ("Flow-SDE", 0.7), ("Dance-SDE", 0.3)):
        noisy = range(4) if dynamics_type != "ODE" else ()
        tape = rollout(pipe, call(), dynamics_type, level, noisy, generators(*((7, i) for i in range(4))))
        assert x0 is None or not torch.equal(tape.x0, x0)
        x0 = tape.x0 if x0 is None else x0
        tape = dataclasses.replace(tape, x0=x0)
        sigma = tape.sigmas[2].item()
        x_t = noised(tape.x0, sigma, generators(*((8, i) for i in range(4))))
        with torch.no_grad(), old.loaded():
            v_old, step = replay(pipe, tape, 2, x_t)
        v, _ = replay(pipe, tape, 2, x_t)
        assert step is None and not torch.equal(v, v_old)
        losses.append(nft_loss(v, v_old, x_t, tape.x0, sigma, torch.linspace(-1, 1, 4), 1.0, C)[0])
    assert losses[0] > 0 and all(torch.equal(loss, losses[0]) for loss in losses)


# A whole run


STEPS = ("--train.num-inference-steps", "3", "--eval.eval-freq", "10")


@pytest.fixture
def run(start):
    """Run the script in this process with more arguments; returns the rows of metrics.csv."""
    return lambda *argv, name="run": read_csv(start(nft, *STEPS, *argv, name=name) / "metrics.csv")


@pytest.mark.parametrize(
    "options",
    [
        "--train.dynamics-type ODE --train.off-policy --finetune-type lora",
        "--train.dynamics-type ODE --train.no-off-policy --finetune-type full",
        "--train.dynamics-type ODE --train.solver DPM-Solver++ --eval.solver DPM-Solver++",
        "--train.dynamics-type CPS --train.noise-level 0.8 --train.off-policy --finetune-type full",
        "--train.dynamics-type CPS --train.noise-level 0.8 --train.no-off-policy --finetune-type lora",
        "--train.dynamics-type Flow-SDE --train.off-policy --finetune-type full --train.ref-param-device cpu",
        "--train.dynamics-type Flow-SDE --train.no-off-policy --finetune-type lora --train.no-self-normalised",
        "--train.dynamics-type Dance-SDE --train.noise-level 0.3 --train.off-policy --finetune-type lora",
        "--train.dynamics-type Dance-SDE --train.noise-level 0.3 --train.no-off-policy --finetune-type full",
    ],
)
def test_samplers_and_old_policies(run, options):
    slow = ["--train.old-decay-slope", 0.25, "--train.old-decay-max", 0.9]
    rows = run("--train.kl-beta", 0.1, *slow, *options.split())
    assert [row["epoch"] for row in rows] == ["0", "1", "2"] and [row["images"] for row in rows] == ["0", "8", "16"]
    assert rows[0]["eval/total"] != "" and rows[1]["eval/total"] == "" and rows[2]["eval/total"] != ""
    for row in rows[1:]:
        row = {key.removeprefix("train/"): float(value) for key, value in row.items() if value}
        for name in ("v_old_distance", "v_ref_distance", "grad_norm", "group_spread", "reward_std", "policy_loss"):
            assert row[name] > 0, name  # the second update of an epoch is away from the old policy
        assert row["zero_std"] == 0
    decays = [0.5, 0.9] if "no-off-policy" not in options else [0, 0]
    assert [float(row["train/old_decay"]) for row in rows[1:]] == pytest.approx(decays)


def test_the_solver_is_that_of_the_rollouts(run, monkeypatch):
    plain, tails = nft.rollout, []
    monkeypatch.setattr(nft, "rollout", lambda *args, **known: tails.append(args[6]) or plain(*args, **known))
    few = ["--train.max-epochs", 1, "--train.num-inference-steps", 6]
    euler, solver = (run(*few, "--train.solver", name, name=name[:3])[1] for name in dynamics.SOLVERS)
    assert tails == [None, None, 6, 6] and euler["train/contrast"] != solver["train/contrast"]


class Watched(Snapshot):
    """A Snapshot that tells when it was made, and when it is loaded."""

    made, loaded_now = [], None

    def __init__(self, *args):
        super().__init__(*args)
        Watched.made.append(self)

    @contextmanager
    def loaded(self):
        assert Watched.loaded_now is None
        with super().loaded():
            Watched.loaded_now = self
            yield
            Watched.loaded_now = None


@pytest.mark.parametrize(
    "options, decays",
    [
        ("--train.old-decay-slope 0.2 --train.old-decay-max 0.7", [0.4, 0.7, 0.7]),
        (
            "--train.old-decay-slope 0.2 --train.old-decay-start 3 --train.old-decay-max 0.5 --finetune-type full",
            [0, 0.2, 0.5],
        ),
        ("--train.old-decay-slope 0.2 --train.no-off-policy", [0, 0, 0]),
    ],
)
def test_parameter_sets_of_a_run(run, monkeypatch, options, decays):  # N7
    monkeypatch.setattr(Watched, "made", [])
    forwards, samplings, losses, stepped, logged = [], [], [], [], []
    now = lambda: [p.detach().clone() for p in Watched.made[0].parameters]  # noqa: E731

    def watched_replay(*args):
        velocity, step = replay(*args)
        forwards.append((Watched.loaded_now, torch.is_grad_enabled(), velocity.requires_grad, now()))
        return velocity, step

    def watched_rollout(*args, **known):
        samplings.append((Watched.loaded_now, now()))
        return rollout(*args, **known)

    def watched_loss(v, v_old, *rest):
        losses.append((v.requires_grad, v_old.requires_grad, forwards[-3:]))
        return nft_loss(v, v_old, *rest)

    class Optimizer(torch.optim.AdamW):
        def step(self):
            assert Watched.loaded_now is None
            super().step()
            stepped.append(now())

    def watched_log(self, row):
        old, reference, ema = ([value.clone() for value in snapshot.values] for snapshot in Watched.made[:3])
        logged.append((now(), old, reference, ema))
        log(self, row)

    log = common.Run.log
    for place, name, value in (
        (nft, "Snapshot", Watched), (nft, "replay", watched_replay), (nft, "rollout", watched_rollout),
        (nft, "nft_loss", watched_loss), (torch.optim, "AdamW", Optimizer), (common.Run, "log", watched_log),
    ):  # fmt: skip
        monkeypatch.setattr(place, name, value)
    run("--train.max-epochs", 3, "--train.kl-beta", 0.1, "--train.ema-decay", 0.9, *options.split())

    def same(a, b):
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    old, reference = Watched.made[:2]
    base = logged[0][0]
    assert len(logged) == 4 and len(stepped) == 6 and not same(logged[1][0], base)
    assert same(logged[0][1], base) and same(logged[0][2], base)
    expected = [p.double() for p in base]
    for epoch, decay in enumerate(decays, start=1):
        policy, trailing, kept, _ = logged[epoch]
        assert same(policy, stepped[2 * epoch - 1])  # whatever was loaded since then is gone
        expected = [decay * a + (1 - decay) * b.double() for a, b in zip(expected, policy, strict=True)]
        assert all(torch.allclose(a.double(), b, rtol=1e-5, atol=1e-7) for a, b in zip(trailing, expected, strict=True))
        assert same(trailing, policy) == (decay == 0)
        assert same(kept, base)  # the reference stays where it was

    # every image is the old policy's of that epoch
    assert len(samplings) == 6 and all(snapshot is old for snapshot, _ in samplings)
    for number, (_, parameters) in enumerate(samplings):
        assert same(parameters, logged[number // 2][1])

    # every loss has three forwards: old and base without a gradient, the policy with one
    assert len(losses) == 3 * 2 * 2  # epochs x calls x timesteps
    for number, (policy_gradient, old_gradient, last) in enumerate(losses):
        assert policy_gradient and not old_gradient
        assert [(snapshot, *kind) for snapshot, *kind, _ in last] == [
            (old, False, False), (reference, False, False), (None, True, True)
        ]  # fmt: skip
        epoch, update = number // 4, number // 2
        assert same(last[0][3], logged[epoch][1]) and same(last[1][3], base)
        assert same(last[2][3], stepped[update - 1] if update else base)


def test_a_run_depends_on_the_final_latents_alone(run, monkeypatch):  # N8
    kept = []

    def recording(*args, **known):
        kept.append(rollout(*args, **known))
        return kept[-1]

    def swapping(*args, **known):
        tape, first = rollout(*args, **known), kept.pop(0)
        assert not torch.equal(tape.x0, first.x0)
        return dataclasses.replace(tape, x0=first.x0, images=first.images)

    options = ["--train.max-epochs", 1, "--train.kl-beta", 0.1]
    monkeypatch.setattr(nft, "rollout", recording)
    ode = run(*options, "--train.dynamics-type", "ODE", name="ode")
    monkeypatch.setattr(nft, "rollout", swapping)
    cps = run(*options, "--train.dynamics-type", "CPS", "--train.noise-level", 0.8, name="cps")
    for row in ode + cps:
        row.pop("seconds")
    assert not kept and ode == cps


@pytest.mark.parametrize("option", ["", "--train.no-negative-term"])
def test_what_a_run_trains_on(run, monkeypatch, option):
    seen, tapes = [], []

    def watched_loss(*args):
        seen.append(args)
        return nft_loss(*args)

    def watched_rollout(*args, **known):
        tapes.append(rollout(*args, **known))
        return tapes[-1]

    monkeypatch.setattr(nft, "nft_loss", watched_loss)
    monkeypatch.setattr(nft, "rollout", watched_rollout)
    few = "--train.max-epochs 1 --train.gradient-step-per-epoch 1 --train.num-inner-epochs 2 --train.train-steps 1 2"
    few = [*few.split(), *option.split()]
    run(*few, "--train.nft-beta", 0.5, "--train.adv-clip-range", 3, "--train.no-self-normalised")
    assert len(seen) == 2 * 2 * 2  # passes x calls x timesteps
    reward = rewards.make_reward({"jpeg_compressibility": 1.0}, "cpu")
    totals = torch.cat([reward(tape.images, tape.call["prompt"])["total"] for tape in tapes])
    advantages_of_tapes = group_advantages(totals, 4).split(4)
    noises, used = [], set()
    for _, _, x_t, x0, sigma, advantages, *rest in seen:
        (tape,) = (i for i, tape in enumerate(tapes) if tape.x0 is x0)
        (k,) = (k for k in (1, 2) if tapes[tape].sigmas[k] == sigma)
        used.add((tape, k))
        assert rest == [0.5, 3.0, False, not option] and torch.equal(advantages, advantages_of_tapes[tape])
        noises += ((x_t - (1 - sigma) * x0) / sigma).unbind()
    assert used == set(itertools.product((0, 1), (1, 2)))
    noises = torch.stack(noises)  # fresh for every image, timestep and pass
    assert noises.mean().abs() < 0.05 and noises.std().item() == pytest.approx(1, abs=0.05)
    apart = torch.cdist(noises.flatten(1), noises.flatten(1)) + 1e9 * torch.eye(len(noises))
    assert apart.min() > 0.5 * (2 * noises[0].numel()) ** 0.5
    assert all((noise - tape.noise).abs().amax((1, 2, 3)).min() > 1 for noise in noises for tape in tapes)


def test_the_penalty_reaches_the_gradient(run):
    options = ["--train.max-epochs", 1, "--train.kl-beta"]
    weak, strong = (run(*options, beta, name=name)[1] for beta, name in ((1e-6, "a"), (1e3, "b")))
    assert (
        weak["train/v_ref_distance"] == strong["train/v_ref_distance"]
    )  # of the first two updates, before the KL acts
    assert float(strong["train/grad_norm"]) > 10 * float(weak["train/grad_norm"])


@pytest.mark.parametrize("options", ["--train.gradient-step-per-epoch 1", "--train.train-steps 1"])
def test_an_update_is_over_the_mean_of_its_losses(run, monkeypatch, options):
    made = []
    find = common.trainable_parameters
    monkeypatch.setattr(common, "trainable_parameters", lambda *args: made.append(find(*args)) or made[0])

    def flat_loss(v, *_):  # whose gradient is 1 in one parameter
        return 0 * v.sum() + next(iter(made[0].values())).sum(), {}

    monkeypatch.setattr(nft, "nft_loss", flat_loss)
    rows = run("--train.max-epochs", 1, "--train.kl-beta", 0, *options.split())
    count = next(iter(made[0].values())).numel()
    assert float(rows[1]["train/grad_norm"]) == pytest.approx(count**0.5, rel=1e-5)


# Refusals: the key, the value and what would do; status 2; nothing loaded, nothing written


@pytest.fixture
def refused(refusal):
    """The message of a command that must be refused."""
    return functools.partial(refusal, nft, *STEPS)


@pytest.mark.parametrize(
    "options, what, remedy",
    [
        ("--train.kl-type x-based", "train.kl_type = 'x-based'", "v-based"),
        ("--train.nft-beta 0", "train.nft_beta = 0.0", "above 0"),
        ("--train.nft-beta -1", "train.nft_beta = -1.0", "above 0"),
        ("--train.old-decay-max 1", "train.old_decay_max = 1.0", "below 1"),
        ("--train.old-decay-max -0.1", "train.old_decay_max = -0.1", "at least 0"),
        ("--train.group-size 1", "train.group_size = 1", "at least 2"),
        ("--train.num-inference-steps 0", "train.num_inference_steps = 0", "at least 1"),
        ("--train.num-inference-steps 1", "train.num_inference_steps = 1", "None is all but the last step, so none"),
        ("--train.train-steps 1 3", "train.train_steps = [1, 3]", "from 0 to 2"),
        ("--train.train-steps -1", "train.train_steps = [-1]", "from 0 to 2"),
        ("--train.train-steps 1 1", "train.train_steps = [1, 1]", "different"),
        ("--train.num-train-steps 3", "train.num_train_steps = 3", "must be 1 to 2, or None: train.train_steps has"),
        ("--train.dynamics-type CPS --train.noise-level 1.1", "train.noise_level = 1.1", "at most 1 for CPS"),
        ("--train.dynamics-type Flow-SDE --train.noise-level 0", "train.noise_level = 0.0", "above 0"),
        ("--train.dynamics-type CPS --train.solver DPM-Solver++", "train.solver = 'DPM-Solver++'", "is for the ODE"),
        ("--train.trainer-type grpo", "--train.trainer-type", "nft"),
    ],
)
def test_refusals(refused, options, what, remedy):
    message = refused(*options.split())
    assert what in message and remedy in message


@pytest.mark.parametrize("other", ["grpo", "grpo-guard"])
def test_the_settings_of_another_trainer_are_refused(refused, tmp_path, other):
    (tmp_path / "other.yaml").write_text(f"train: {{trainer_type: {other}}}")
    message = refused("--config", tmp_path / "other.yaml")
    assert f"train.trainer_type = '{other}'" in message and "'nft'" in message
