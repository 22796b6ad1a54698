"""What grpo_guard.py changes in the loss of grpo.py, from first principles, and its runs."""

import inspect
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import read_csv
from diffusers import FlowMatchEulerDiscreteScheduler
from test_dynamics import SIGMAS
from test_grpo import FACTOR, A, two_policies

import grpo
import grpo_guard
import rewards
from grpo_guard import TrainArgs, grpo_loss, guard_log_ratio, step_weights


def log_ratio_of(old, new):
    return guard_log_ratio(old.x_next, old.mean, new.mean, old.std)


def gradient(scalar, of):
    return torch.autograd.grad(scalar, of, retain_graph=True)[0]


# RatioNorm


@pytest.mark.parametrize("k", range(10))
def test_the_normalised_ratio_is_the_corrected_raw_one(k):  # Q1
    _, old, new = two_policies(k)
    bias = ((new.mean - old.mean) ** 2).flatten(1).mean(1) / (2 * old.std**2)
    corrected = old.std * (new.log_prob - old.log_prob + bias)
    log_ratio, epsilon = log_ratio_of(old, new), (old.x_next - old.mean) / old.std
    assert log_ratio.shape == (3,) and log_ratio.dtype == torch.float64 and log_ratio.abs().min() > 1e-6
    assert torch.allclose(log_ratio, corrected, rtol=1e-9, atol=1e-13)
    assert torch.allclose(log_ratio, (epsilon * (new.mean - old.mean)).flatten(1).mean(1), rtol=1e-12)


@pytest.mark.parametrize("k", [0, 1, 4, 8])
def test_float32_resolves_it_where_a_difference_of_log_probs_does_not(k):  # Q1
    slope = -SIGMAS.diff()[k].item() * (FACTOR if k else 1)
    with torch.no_grad():
        _, old, new = two_policies(k, (16, 16, 64, 64), apart=1e-3 / slope, dtype=torch.float32)  # D = 65536
    squared = ((new.mean - old.mean) ** 2).flatten(1).mean(1)
    assert squared.mean().sqrt().item() == pytest.approx(1e-3, rel=0.02)
    direct = log_ratio_of(old, new)
    by_difference = old.std * (new.log_prob - old.log_prob + squared / (2 * old.std**2))
    assert direct.dtype == by_difference.dtype == torch.float32
    true = guard_log_ratio(old.x_next.double(), old.mean.double(), new.mean.double(), old.std.double())
    assert true.std().item() == pytest.approx(1e-3 / 65536**0.5, rel=0.5)  # about the clip range, 2e-6
    assert (direct - true).abs().max() < 1e-11
    assert (by_difference - true).abs().max() > 2e-9 > 100 * (direct - true).abs().max()


def is_mean(draws, expected, errors=4):
    """Whether the mean of draws is the expected one, to a number of standard errors."""
    return abs(draws.mean().item() - expected) < errors * draws.std().item() / len(draws) ** 0.5


def test_only_the_normalised_log_ratio_is_centred():  # Q2: many draws of one step under the old policy
    D = 16
    with torch.no_grad():
        _, old, new = two_policies(6, (1, 4, 2, 2), apart=0.5, draws=200_000)
    squared = ((new.mean - old.mean)[0] ** 2).sum().item()  # |Δμ|²
    K = squared / (2 * old.std.item() ** 2)  # the exact KL
    assert 0.3 < K < 3
    raw = D * (new.log_prob - old.log_prob)  # of the densities
    assert is_mean(raw, -K) and not is_mean(raw, 0, errors=50)
    assert is_mean((raw + K) ** 2, 2 * K) and is_mean(raw.exp(), 1)
    root = (raw / D).exp()  # the ratio as coded, the D-th root of the true one, is biased low
    assert is_mean(root, math.exp(-K / D * (1 - 1 / D))) and root.mean() < 1 and not is_mean(root, 1, errors=50)
    log_ratio = log_ratio_of(old, new)
    assert is_mean(log_ratio, 0) and is_mean(log_ratio**2, squared / D**2)  # without std in it
    assert is_mean(log_ratio.exp(), math.exp(squared / (2 * D**2)))


def test_gradient_is_the_same_at_any_mean():  # Q3
    _, old, new = two_policies(5)
    epsilon = (old.x_next - old.mean) / old.std
    for mean in (old.mean, new.mean, new.mean + 7.0):
        mean = mean.detach().requires_grad_()
        here = gradient(log_ratio_of(old, new._replace(mean=mean)).sum(), mean)
        assert torch.allclose(here, epsilon / 36, rtol=1e-9)
        # the correction must carry a gradient too: without it the gradient has the mean in it
        raw = -((old.x_next - mean) ** 2 - (old.x_next - old.mean) ** 2) / (2 * old.std**2)
        bias = (mean - old.mean) ** 2 / (2 * old.std**2)
        assert torch.allclose(gradient((old.std * (raw + bias)).sum() / 36, mean), here)
        detached = gradient((old.std * (raw + bias.detach())).sum() / 36, mean)
        assert torch.allclose(detached, here) == torch.equal(mean, old.mean)


def test_ratio_and_gradient_at_the_old_policy():  # Q5
    v, old, new = two_policies(3, apart=0.0)
    log_ratio = log_ratio_of(old, new)
    assert torch.equal(new.mean, old.mean) and (log_ratio == 0).all()
    advantages = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    guarded, metrics = grpo_loss(log_ratio, torch.zeros_like(log_ratio), advantages, 2e-6, 5.0)
    plain, _ = grpo_loss(new.log_prob, old.log_prob, advantages, 1e-4, 5.0)
    assert guarded.item() == plain.item() == pytest.approx(-advantages.mean().item()) and metrics["clip_fraction"] == 0
    assert gradient(guarded, v).abs().min() > 0
    assert torch.allclose(gradient(guarded, v), old.std * gradient(plain, v), rtol=1e-9)


@pytest.mark.parametrize("shape", [(5, 6, 4), (5, 4, 3, 3)])  # packed, and an image
def test_steps_can_be_mixed_in_a_batch(shape):  # Q6; test_dynamics.py has the Step of each sample
    _, old, new = two_policies(torch.tensor([0, 8, 3, 3, 9]), shape)
    rows = zip(*(t.split(1) for t in (old.x_next, old.mean, new.mean)), old.std.flatten().tolist(), strict=True)
    alone = torch.cat([guard_log_ratio(*row) for row in rows])
    for std in (old.std, old.std.flatten(), old.std.flatten().tolist()):
        log_ratio = guard_log_ratio(old.x_next, old.mean, new.mean, std)
        assert log_ratio.shape == (5,) and torch.allclose(log_ratio, alone, rtol=1e-9)


@pytest.mark.parametrize("std", [0.3, torch.tensor(0.3), torch.tensor([0.3]), torch.full((1, 1, 1, 1), 0.3)])
def test_a_batch_of_one_and_latents_in_half_precision(std):
    mean = torch.zeros(1, 4, 3, 3, requires_grad=True)
    log_ratio = guard_log_ratio(torch.ones(1, 4, 3, 3, dtype=torch.bfloat16), torch.full((1, 4, 3, 3), 0.4), mean, std)
    assert log_ratio.shape == (1,) and log_ratio.dtype == torch.float32 and log_ratio.requires_grad
    assert log_ratio.item() == pytest.approx(-0.4 * 0.6 / 0.3)


# Reweighting


def test_defaults_are_those_of_the_released_code():
    train = TrainArgs()
    assert (train.clip_range, train.adv_clip_range, train.noise_level, train.kl_beta) == (2e-6, 5, A, 0)
    assert train.reweight and not train.global_std and train.dynamics_type == "Flow-SDE"


@pytest.mark.parametrize("reweight", [True, False])
def test_steps_weigh_alike_only_with_reweighting(reweight):  # Q4: D d loss / d v over ε, alike in all latents
    raw_scale = [0.057, 0.078, 0.129, 0.188, 0.264, 0.371, 0.536, 0.825, 1.487, 1.771]  # late steps weigh most
    weights = step_weights(TrainArgs(reweight=reweight, train_steps=list(range(10))), SIGMAS.tolist())
    assert list(weights) == list(range(10))
    for k, weight in weights.items():
        h = (SIGMAS[k] - SIGMAS[k + 1]).item()
        assert weight == pytest.approx(1 / h if reweight else 1)
        v, old, new = two_policies(k, (1, 4, 3, 3), apart=0.0)
        epsilon = (old.x_next - old.mean) / old.std
        loss, _ = grpo_loss(log_ratio_of(old, new), torch.zeros(1), torch.ones(1), 2e-6, 5.0)
        size, raw = (36 * gradient(of, v) / epsilon for of in (weight * loss, -new.log_prob.sum()))
        assert torch.allclose(size, torch.full_like(size, weight * h * (FACTOR if k else 1)), rtol=1e-6)
        assert torch.allclose(raw, torch.full_like(raw, raw_scale[k]), rtol=0, atol=1e-3)


def test_what_is_logged_of_a_step():  # Q4
    v, old, new = two_policies(2)
    raw, log_ratio = new.log_prob - old.log_prob, log_ratio_of(old, new)
    metrics = grpo_guard.ratio_metrics(2, raw, log_ratio, v, 3.0)
    epsilon, h = (old.x_next - old.mean) / old.std, -SIGMAS.diff()[2]
    expected = {"gradient_scale@2": (3 * h * FACTOR * (epsilon**2).mean().sqrt()).item()}  # root mean square
    for name, value in (("raw_log_ratio", raw), ("log_ratio", log_ratio)):
        expected |= {f"{name}@2": value.mean().item(), f"{name}_std@2": value.std(correction=0).item()}
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected, rel=1e-6)
    log_ratio.sum().backward()  # the graph is still there for the loss
    assert v.grad is not None


# A whole run


@pytest.fixture
def run(start):
    """Run the script in this process with more arguments; returns the rows of metrics.csv."""
    return lambda *argv, name="run": read_csv(start(grpo_guard, *argv, name=name) / "metrics.csv")


def test_a_run_logs_every_step(run):
    rows = run("--train.kl-beta", 0.01)
    assert [row["epoch"] for row in rows] == ["0", "1", "2"] and rows[-1]["eval/total"] != ""
    for row in rows[1:]:
        row = {key.removeprefix("train/"): float(value) for key, value in row.items() if value}
        assert {"grad_norm", "zero_std", "group_spread", "contrast", "clip_fraction", "kl"} <= set(row)
        for name in ("raw_log_ratio", "log_ratio", "raw_log_ratio_std", "log_ratio_std", "gradient_scale"):
            assert [f"{name}@{k}" in row for k in range(4)] == [True, True, True, False]
        for name in ("log_ratio", "log_ratio_std"):  # what is clipped is the normalised ratio
            assert row[name] == pytest.approx(sum(row[f"{name}@{k}"] for k in range(3)) / 3, rel=1e-4)
            assert row[f"{name}@2"] != 0 != row[f"raw_{name}@2"]  # the second update of an epoch is off-policy
        assert [row[f"gradient_scale@{k}"] for k in range(3)] == pytest.approx([1, FACTOR, FACTOR], rel=0.1)


def test_a_tail_does_not_change_the_weights(run):
    """Nor does it change the step that is drawn; the weights of all candidates are those of the whole schedule."""
    draw = ["--train.num-train-steps", 1, "--train.seed", 2, "--train.learning-rate", 0]  # step 0, then 1
    tail, whole = run(*draw, "--train.tail-steps", 1, name="a"), run(*draw, name="b")
    scales = [{k: v for k, v in row.items() if "gradient_scale" in k} for row in (*tail[1:], *whole[1:])]
    assert scales[:2] == scales[2:] and any(map(float, filter(None, scales[0].values())))
    assert [row["train/contrast"] for row in tail] != [row["train/contrast"] for row in whole]


def test_one_update_is_on_policy_and_its_loss_divided_by_the_step_length(run):  # Q4
    options = ["--train.max-epochs", 1, "--train.gradient-step-per-epoch", 1, "--train.train-steps", 1]
    rows = [run(*options, name="a")[1], run(*options, "--train.no-reweight", name="b")[1]]
    for name in ("log_ratio", "log_ratio_std", "raw_log_ratio", "raw_log_ratio_std"):
        assert all(float(row[f"train/{name}@1"]) == 0 for row in rows)
    norms, policy_losses = ([float(row[f"train/{name}"]) for row in rows] for name in ("grad_norm", "policy_loss"))
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(grpo_guard.Args.model, subfolder="scheduler")
    scheduler.set_timesteps(4)
    h = (scheduler.sigmas[1] - scheduler.sigmas[2]).item()
    assert norms[0] * h == pytest.approx(norms[1], rel=1e-4) and policy_losses[0] == policy_losses[1]
    row = run("--train.max-epochs", 1, "--train.train-steps", 1, "--train.kl-beta", 100, name="kl")[1]
    loss, policy_loss, penalty = (float(row[f"train/{name}"]) for name in ("loss", "policy_loss", "kl_penalty"))
    assert loss - policy_loss / h == pytest.approx(100 * penalty, rel=1e-3) and penalty > 0  # which is not divided


def test_what_a_run_trains_on(run, monkeypatch, tapes):
    ratios, losses = [], []
    for name, seen in (("guard_log_ratio", ratios), ("grpo_loss", losses)):
        shipped = getattr(grpo_guard, name)
        monkeypatch.setattr(grpo_guard, name, lambda *args, f=shipped, seen=seen: seen.append(args) or f(*args))
    (_, row) = run("--train.max-epochs", 1, "--train.clip-range", 1e-3, "--train.adv-clip-range", 3)
    reward = rewards.make_reward({"jpeg_compressibility": 1.0}, "cpu")
    totals = torch.cat([reward(tape.images, tape.call["prompt"])["total"] for tape in tapes])
    advantages, raw = grpo_guard.group_advantages(totals, 4).split(4), {}
    for (x_next, old_mean, mean, std), (log_ratio, zero, given, *clips) in zip(ratios, losses, strict=True):
        ((i, k),) = ((i, k) for i, tape in enumerate(tapes) for k in tape.steps if tape.steps[k].x_next is x_next)
        taken = tapes[i].steps[k]
        assert torch.equal(old_mean, taken.mean) and torch.equal(std, taken.std) and mean.requires_grad
        assert (zero == 0).all() and torch.equal(given, advantages[i]) and clips == [1e-3, 3]
        bias = ((mean - old_mean) ** 2).flatten(1).mean(1) / (2 * std**2)
        raw[i, k] = (log_ratio / std - bias).mean().item()
    assert min(bias) > 1e-5  # of the second update
    assert len(losses) == 6 and set(raw) == {(i, k) for i in range(2) for k in range(3)}
    for k in range(3):
        assert float(row[f"train/raw_log_ratio@{k}"]) == pytest.approx((raw[0, k] + raw[1, k]) / 2, rel=1e-3, abs=1e-6)


# One file, one algorithm


def test_all_else_is_that_of_grpo():  # so that what is shown of grpo.py holds here
    ours, theirs = (dict(inspect.getmembers(script, inspect.isfunction)) for script in (grpo_guard, grpo))
    assert set(ours) - set(theirs) == {"guard_log_ratio", "ratio_metrics"} and set(theirs) <= set(ours)
    other = {name for name in theirs if inspect.getsource(ours[name]) != inspect.getsource(theirs[name])}
    assert other == {"check", "step_weights", "main"}
    mains = ({line.strip() for line in inspect.getsource(script.main).splitlines()} for script in (grpo_guard, grpo))
    assert all("log_" in line for line in set.symmetric_difference(*mains))  # nothing but the ratio


def test_no_file_imports_a_script_and_dynamics_nothing_of_the_project():
    files = {path.stem: path for path in Path(grpo.__file__).parent.glob("*.py")}
    for name, path in files.items():
        imported = set(re.findall(r"^ *(?:import|from) (\w+)", path.read_text(), re.MULTILINE))
        assert not imported & ({*files, "harness", "shapes"} if name == "dynamics" else {"grpo", "grpo_guard", "nft"})
