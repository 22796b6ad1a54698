"""The loss and the loop of nft.py, from first principles."""

import dataclasses
import itertools
from contextlib import contextmanager

import pytest
import torch
from conftest import read_csv, record
from test_dynamics import randn

import common
import dynamics
import nft
import rewards
from common import Snapshot, generators
from nft import TrainArgs, nft_loss, noised, old_decay

C = 5.0  # the clip range of the advantages, so that r = 1/2 + A / 2C


def per_image(values):
    """(B,) as (B, 1, 1, 1)."""
    return torch.as_tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 1)


def world(sigma=0.6):
    """(x_t, x0, v_target, v_old) of six images: v_target is noise − x0, v_old a wrong guess of it."""
    x0, noise, wrong = randn(3, 6, 4, 3, 3)
    sigma = per_image(sigma)
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
    for size in (1e-3, 0.1, 3.0):
        away = size * randn(*v_old.shape, seed=1)
        assert self_normalised or nft_loss(v_old + away, *rest)[0] > nft_loss(v_old, *rest)[0]
        assert (loss_gradient(v_old + away, *rest) * away).sum() > 0  # back to v_old
    # but without the negative term v_old is left behind
    assert loss_gradient(v_old, *rest, negative_term=False).abs().max() > 1e-4


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 2.0])
def test_minimiser_of_a_sample(beta):  # N2: v_old + (2r − 1)(v_target − v_old) / β
    x_t, x0, v_target, v_old = world()
    r = torch.tensor([0.0, 0.1, 0.5, 0.6, 0.9, 1.0], dtype=torch.float64)
    rest = (v_old, x_t, x0, 0.6, advantages_of(r), beta, C, False)
    best = v_old + per_image(2 * r - 1) * (v_target - v_old) / beta
    assert loss_gradient(best, *rest).abs().max() < 1e-14
    # a quadratic with a minimum: its curvature is 10 β σ² (per latent and image)
    curvature = (loss_gradient(best + 1, *rest) - loss_gradient(best, *rest)) * 36 * 6
    assert torch.allclose(curvature, torch.full_like(curvature, 2 * C * beta * 0.6**2))


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_minimiser_of_a_population(beta):  # N2: v_old + (2/β) α (v⁺ − v_old) if v_old fits its samples; N5
    """Of samples that share one x_t, as all that could have led there, with optimalities of their own."""
    x0, x_t = randn(9, 2), randn(1, 2, seed=1).expand(9, 2)
    r, v_target = torch.linspace(0.2, 0.8, 9, dtype=torch.float64), (x_t - x0) / 0.5  # noise − x0, where sigma is 1/2

    def slope(v, v_old, r):
        v, v_old = v.expand_as(x0), v_old.expand_as(x0)
        return loss_gradient(v, v_old, x_t, x0, 0.5, advantages_of(r), beta, C, False).sum(0)

    def minimiser(v_old, r):
        """(2,): by one step of Newton."""
        here = slope(v_old, v_old, r)
        best = v_old - here / (slope(v_old + 1, v_old, r) - here)
        assert slope(best, v_old, r).abs().max() < 1e-14
        return best

    v_old, alpha = v_target.mean(0), r.mean()
    v_positive = (r[:, None] * v_target).mean(0) / alpha
    best = minimiser(v_old, r)
    assert torch.allclose(best, v_old + 2 / beta * alpha * (v_positive - v_old), rtol=1e-9, atol=1e-9)
    assert (best - v_old).abs().max() > 0.1
    # a reward that is higher by a constant moves nothing, but where v_old does not fit its samples
    assert (minimiser(v_old, r + 0.15) - best).abs().max() < 1e-12
    moved = minimiser(v_old + 0.3, r + 0.15) - minimiser(v_old + 0.3, r)
    assert torch.allclose(moved, torch.full_like(v_old, 2 * 0.15 * -0.3 / beta))


@pytest.mark.parametrize("clip", [1.0, C])  # without effect on what is not clipped
@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("sigma", [0.3, [0.1, 0.3, 0.5, 0.7, 0.9, 1.0]])
def test_first_gradient_is_the_advantage(beta, sigma, clip):  # N3
    x_t, x0, v_target, v_old = world(sigma)
    advantages = torch.tensor([-9.0, -5.0, -0.3, 0.0, 0.8, 7.0], dtype=torch.float64)
    rest = (v_old, x_t, x0, torch.as_tensor(sigma, dtype=torch.float64), advantages, beta, clip)
    A, s = per_image(advantages.clamp(-clip, clip)), per_image(sigma)
    expected = -2 * A * s**2 * (v_target - v_old) / (36 * 6)  # the loss is a mean over 36 latents and 6 images
    assert torch.allclose(loss_gradient(v_old, *rest, False), expected, rtol=1e-9, atol=1e-15)
    # with x0 errors divided by their own mean size, σ mean |v_target − v_old|
    size = s * (v_target - v_old).abs().mean(dim=(1, 2, 3), keepdim=True)
    normalised = loss_gradient(v_old, *rest, True)
    assert torch.allclose(normalised, expected / size, rtol=1e-9, atol=1e-15)
    assert torch.equal(loss_gradient(v_old, *rest), normalised)  # the default


@pytest.mark.parametrize("r, metric", [(1.0, "positive_loss"), (0.0, "negative_loss")])
def test_full_optimality_is_flow_matching(r, metric):  # N4
    x_t, x0, v_target, v_old = world()
    v = v_old + 0.3
    loss, metrics = nft_loss(v, v_old, x_t, x0, 0.6, advantages_of([r] * 6), 1.0, C, False)
    fitted = v if r else 2 * v_old - v  # at no optimality the policy mirrored in the old one is fitted to the data
    assert loss.item() == pytest.approx(C * 0.36 * ((fitted - v_target) ** 2).mean().item())
    assert loss.item() == pytest.approx(C * metrics[metric].item())


@pytest.mark.parametrize("negative_term", [True, False])
@pytest.mark.parametrize("self_normalised", [True, False])
def test_each_error_has_its_own_weight_without_a_gradient(self_normalised, negative_term):
    x_t, x0, _, v_old = world()
    v = (v_old + 0.7).requires_grad_()
    r = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    loss, metrics = nft_loss(v, v_old, x_t, x0, 0.6, advantages_of(r), 0.5, C, self_normalised, negative_term)
    sides = []
    for implicit in (0.5 * v_old + 0.5 * v, 1.5 * v_old - 0.5 * v):
        error = x_t - 0.6 * implicit - x0
        sides.append((error**2).mean((1, 2, 3)) / (error.detach().abs().mean((1, 2, 3)) if self_normalised else 1))
    by_hand = C * ((r * sides[0] + negative_term * (1 - r) * sides[1]) / 0.5).mean()
    assert torch.allclose(*(torch.autograd.grad(value, v, retain_graph=True)[0] for value in (loss, by_hand)))
    expected = dict(
        policy_loss=by_hand.item(), positive_loss=sides[0].mean().item(), negative_loss=sides[1].mean().item(),
        v_old_distance=0.49, optimality_std=r.std(correction=0).item(),
    )  # fmt: skip
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected)
    assert loss.item() == metrics["policy_loss"].item() and not any(value.requires_grad for value in metrics.values())


def test_a_perfect_prediction_is_finite():
    v = torch.ones(2, 4, 3, 3)
    rest = (v, 0.5 * v, torch.zeros_like(v), 0.5, torch.ones(2), 1.0, C)
    assert nft_loss(v, *rest)[0] == 0 and (loss_gradient(v, *rest) == 0).all()
    assert nft_loss(v + 1e-3, *rest)[0].item() == pytest.approx(C * 5e-4, rel=1e-3)  # beside it of an error's size


def test_half_precision_is_computed_in_float32_and_shapes_are_checked():
    x_t, x0, _, v_old = (t.bfloat16() for t in world())
    v, old = (v_old + 0.1).requires_grad_(), v_old.clone().requires_grad_()
    rest = (0.6, torch.linspace(-1, 1, 6), 1.0, C)
    loss, exact = (nft_loss(*(t.to(to) for t in (v, old, x_t, x0)), *rest)[0] for to in (v.dtype, torch.float64))
    loss.backward()
    assert v.grad.abs().max() > 0 and old.grad is None
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=1e-5)
    with pytest.raises(AssertionError):  # (B, 1) against (B,) would broadcast to (B, B)
        nft_loss(v, v_old, x_t, x0, 0.6, torch.zeros(6, 1), 1.0, C)


# What the loss is made of


PAPERS = dict(old_decay_start=75, old_decay_slope=0.0075, old_decay_max=0.999)  # for OCR
DECAYS = [
    ({}, {0: 0, 1: 0.001, 100: 0.1, 499: 0.499, 500: 0.5, 1000: 0.5}),
    (PAPERS, {0: 0, 74: 0, 75: 0, 76: 0.0075, 175: 0.75, 208: 0.9975, 209: 0.999, 1000: 0.999}),
    (PAPERS | dict(off_policy=False), {0: 0, 74: 0, 175: 0, 1000: 0}),
]


@pytest.mark.parametrize("settings, values", DECAYS)
def test_decay_of_the_old_policy(settings, values):  # N6
    assert {i: old_decay(TrainArgs(**settings), i) for i in values} == pytest.approx(values)


def test_defaults_are_those_of_the_released_code():
    train = TrainArgs()
    assert (train.nft_beta, train.adv_clip_range, train.kl_beta, train.guidance_scale) == (1, C, 1e-4, 1)
    assert train.self_normalised and train.global_std and train.off_policy and train.negative_term
    assert train.dynamics_type == "ODE"


def test_noised_latents():
    x0, seeds = randn(3, 4, 8, 8).float(), [(0, i) for i in range(3)]
    noise = torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators(*seeds)])
    x_t = noised(x0, 0.3, generators(*seeds))
    assert torch.allclose(x_t, 0.7 * x0 + 0.3 * noise)
    assert torch.equal(noised(x0, 1.0, generators(*seeds)), noise)
    assert torch.equal(noised(x0[1:2], 0.3, generators(seeds[1])), x_t[1:2])  # an image's noise is its own
    half = noised(x0.bfloat16(), 0.3, generators(*seeds))
    assert half.dtype == torch.bfloat16 and torch.equal(half, (0.7 * x0.bfloat16().float() + 0.3 * noise).bfloat16())


# A whole run


STEPS = ("--train.num-inference-steps", "3", "--eval.eval-freq", "10")


@pytest.fixture
def run(start):
    """Run the script in this process with more arguments; returns the rows of metrics.csv."""
    return lambda *argv, name="run": read_csv(start(nft, *STEPS, *argv, name=name) / "metrics.csv")


def test_the_solver_is_that_of_the_rollouts(run, tapes):
    few = ["--train.max-epochs", 1, "--train.num-inference-steps", 6]
    euler, solver = (run(*few, "--train.solver", name, name=name[:3])[1] for name in dynamics.SOLVERS)
    assert [tape.tail_steps for tape in tapes] == [None, None, 6, 6]
    assert euler["train/contrast"] != solver["train/contrast"]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Watched(Snapshot):
    """A Snapshot that tells when it is loaded, and what the parameters and its values are after each update."""

    made, loaded_now = [], None

    def __init__(self, *args):
        super().__init__(*args)
        self.place = args[1] if len(args) > 1 else None
        self.first, self.updates = [value.clone() for value in self.values], []
        Watched.made.append(self)

    @contextmanager
    def loaded(self):
        assert Watched.loaded_now is None
        with super().loaded():
            Watched.loaded_now = self
            yield
            Watched.loaded_now = None

    def update(self, decay):
        super().update(decay)
        self.updates.append([[p.detach().clone() for p in those] for those in (self.parameters, self.values)])

    def assert_trails(self, decays):
        """That it is the average by these decays, one for each update, of a policy that moved before each."""
        expected, before = [p.double() for p in self.first], self.first
        for decay, (policy, values) in zip(decays, self.updates, strict=True):
            expected = [decay * a + (1 - decay) * b.double() for a, b in zip(expected, policy, strict=True)]
            pairs = zip(values, expected, strict=True)
            assert all(torch.allclose(a.double(), b, rtol=1e-5, atol=1e-7) for a, b in pairs)
            assert same(values, policy) == (decay == 0) and not same(policy, before)
            before = policy


OLD_POLICIES = [
    ("--train.old-decay-max 0.7 --train.ref-param-device cpu", [0.4, 0.7, 0.7]),
    ("--train.old-decay-start 3 --train.old-decay-max 0.5 --finetune-type full", [0, 0.2, 0.5]),
    ("--train.no-off-policy", [0, 0, 0]),
]


@pytest.mark.parametrize("options, decays", OLD_POLICIES)
def test_parameter_sets_of_a_run(run, monkeypatch, options, decays):  # N7; loaded() is tested apart
    forwards, samplers = [], []

    def watched_replay(*args):
        velocity, step = common.replay(*args)
        forwards.append((Watched.loaded_now, velocity.requires_grad))
        return velocity, step

    record(monkeypatch, lambda tape: samplers.append(Watched.loaded_now) or tape)
    monkeypatch.setattr(Watched, "made", [])
    monkeypatch.setattr(nft, "replay", watched_replay)
    for module in (nft, common):
        monkeypatch.setattr(module, "Snapshot", Watched)
    sets = ("--train.old-decay-slope", 0.2, "--train.kl-beta", 0.1, "--train.ema-decay", 0.9)
    _, *rows = run("--train.max-epochs", 3, *sets, *options.split())
    for row, decay in zip(rows, decays, strict=True):
        for name in ("v_old_distance", "v_ref_distance", "grad_norm", "group_spread", "reward_std", "policy_loss"):
            assert float(row[f"train/{name}"]) > 0, name  # the second update of an epoch is away from the old policy
        assert float(row["train/old_decay"]) == pytest.approx(decay) and float(row["train/zero_std"]) == 0

    old, reference = Watched.made[:2]
    assert old.place == reference.place == ("cpu" if "cpu" in options else None)
    assert samplers == 6 * [old]  # epochs x calls
    # in each of epochs x calls x timesteps: old and base without a gradient, the policy with one
    assert forwards[-36:] == 12 * [(old, False), (reference, False), (None, True)]
    assert same(reference.first, old.first) and same(reference.values, old.first)
    old.assert_trails(decays)


def test_a_run_depends_on_the_final_latents_alone(run, monkeypatch):  # N8
    def with_those_of_the_first_run(tape):
        first = tapes[len(tapes) % 2] if len(tapes) >= 2 else tape
        assert first is tape or not torch.equal(tape.x0, first.x0)
        return dataclasses.replace(tape, x0=first.x0, images=first.images)

    tapes, options = record(monkeypatch, with_those_of_the_first_run), ["--train.max-epochs", 1, "--train.kl-beta", 0.1]
    ode, *others = (run(*options, "--train.dynamics-type", name, name=name) for name in dynamics.DYNAMICS[::-1])
    assert [list(tape.steps) for tape in tapes] == 2 * [[]] + 6 * [[0, 1]]  # noise in all steps but the last
    for rows in others:
        assert [{**row, "seconds": None} for row in ode] == [{**row, "seconds": None} for row in rows]


@pytest.mark.parametrize("option", ["", "--train.no-negative-term"])
def test_what_a_run_trains_on(run, monkeypatch, tapes, option):
    seen = []
    monkeypatch.setattr(nft, "nft_loss", lambda *args: seen.append(args) or nft_loss(*args))
    few = "--train.max-epochs 1 --train.gradient-step-per-epoch 1 --train.num-inner-epochs 2 --train.train-steps 1 2"
    loss = "--train.nft-beta 0.5 --train.adv-clip-range 3 --train.no-self-normalised"
    run(*few.split(), *loss.split(), *option.split())
    assert len(seen) == 2 * 2 * 2  # passes x calls x timesteps
    reward = rewards.make_reward({"jpeg_compressibility": 1.0}, "cpu")
    totals = torch.cat([reward(tape.images, tape.call["prompt"])["total"] for tape in tapes])
    advantages_of_tapes = nft.group_advantages(totals, 4, True).split(4)
    noises, used = [], set()
    for _, _, x_t, x0, sigma, advantages, *rest in seen:
        (tape,) = (i for i, tape in enumerate(tapes) if tape.x0 is x0)
        (k,) = (k for k in (1, 2) if tapes[tape].sigmas[k] == sigma)
        used.add((tape, k))
        assert rest == [0.5, 3.0, False, not option] and torch.equal(advantages, advantages_of_tapes[tape])
        noises += ((x_t - (1 - sigma) * x0) / sigma).unbind()
    assert used == set(itertools.product((0, 1), (1, 2)))
    assert torch.stack(noises).std().item() == pytest.approx(1, abs=0.05)
    noises = torch.cat([torch.stack(noises), *(tape.noise for tape in tapes)]).flatten(1)
    apart = torch.cdist(noises, noises) + 1e9 * torch.eye(len(noises))
    assert apart.min() > 0.5 * (2 * noises.shape[1]) ** 0.5  # fresh for every image, timestep and pass


def test_the_penalty_reaches_the_gradient(run):
    options = ["--train.max-epochs", 1, "--train.kl-beta"]
    weak, strong = (run(*options, beta, name=name)[1] for beta, name in ((1e-6, "a"), (1e3, "b")))
    # of the first two updates, before the KL acts
    assert weak["train/v_ref_distance"] == strong["train/v_ref_distance"]
    assert float(strong["train/grad_norm"]) > 10 * float(weak["train/grad_norm"])
    loss, policy_loss, penalty = (float(strong[f"train/{name}"]) for name in ("loss", "policy_loss", "v_ref_distance"))
    assert loss - policy_loss == pytest.approx(1e3 * penalty, rel=1e-3) and penalty > 0


def test_the_noise_of_training_is_new_in_every_epoch_and_for_every_seed(run, monkeypatch):
    drawn = []
    monkeypatch.setattr(nft, "first_step_contract", lambda *_: None)
    monkeypatch.setattr(nft, "noised", lambda *a: drawn.extend(g.initial_seed() for g in a[2]) or noised(*a))
    for seed in (0, 1):
        run("--train.seed", seed, name=str(seed))
    assert len({*drawn}) == len(drawn) == 2 * 2 * 2 * 2 * 4  # seeds x epochs x calls x timesteps x images
