"""What grpo_guard.py changes in the loss of grpo.py, from first principles, and its runs."""

import ast
import functools
import inspect
import math
from pathlib import Path

import pytest
import torch
from conftest import read_csv
from diffusers import FlowMatchEulerDiscreteScheduler

import common
import dynamics
import grpo
import grpo_guard
import rewards
from grpo_guard import TrainArgs, grpo_loss, guard_log_ratio, ratio_metrics, step_weights

A = 0.7  # the noise level


def sd35_sigmas():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    return scheduler.sigmas.tolist()


def two_policies(k, shape=(3, 4, 3, 3), apart=0.1, dtype=torch.float64, seed=0, noise=None):
    """A Flow-SDE step k of SD3.5's schedule taken by an old policy, and scored by a new one `apart` in velocity.

    Returns (v_new with a gradient, old Step, new Step).
    """
    sigmas, generator = sd35_sigmas(), torch.Generator().manual_seed(seed)
    x, v, away = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3))
    where = dict(sigma=sigmas[k], sigma_next=sigmas[k + 1], noise_level=A, sigma_second=sigmas[1])
    old = dynamics.step("Flow-SDE", v, x, **where, generator=generator)
    if noise is not None:
        old = dynamics.step("Flow-SDE", v, x, **where, x_next=old.mean + old.std * noise)
    v_new = (v + apart * away).requires_grad_()
    return v_new, old, dynamics.step("Flow-SDE", v_new, x, **where, x_next=old.x_next)


def gradient(scalar, of):
    return torch.autograd.grad(scalar, of, retain_graph=True)[0]


# RatioNorm


@pytest.mark.parametrize("k", range(10))
def test_the_normalised_ratio_is_the_corrected_raw_one(k):  # Q1
    _, old, new = two_policies(k)
    bias = ((new.mean - old.mean) ** 2).flatten(1).mean(1) / (2 * old.std**2)
    by_hand = old.std * (new.log_prob - old.log_prob + bias)
    log_ratio = guard_log_ratio(old.x_next, old.mean, new.mean, new.std)
    assert log_ratio.shape == (3,) and log_ratio.dtype == torch.float64
    assert torch.allclose(log_ratio, by_hand, rtol=1e-9, atol=1e-13) and log_ratio.abs().min() > 1e-6
    epsilon = (old.x_next - old.mean) / old.std
    assert torch.allclose(log_ratio, (epsilon * (new.mean - old.mean)).flatten(1).mean(1), rtol=1e-12)


@pytest.mark.parametrize("k", [0, 1, 4, 8])
def test_float32_resolves_it_where_a_difference_of_log_probs_does_not(k):  # Q1
    sigmas = sd35_sigmas()
    slope = (sigmas[k] - sigmas[k + 1]) * (1 + A**2 / 2 if k else 1)
    _, old, new = two_policies(k, (16, 16, 64, 64), apart=1e-3 / slope, dtype=torch.float32)  # D = 65536
    moved = new.mean.detach() - old.mean
    assert (moved**2).mean().sqrt().item() == pytest.approx(1e-3, rel=0.02)
    direct = guard_log_ratio(old.x_next, old.mean, new.mean, new.std).detach()
    by_difference = (
        old.std * (new.log_prob - old.log_prob + (moved**2).flatten(1).mean(1) / (2 * old.std**2))
    ).detach()
    assert direct.dtype == by_difference.dtype == torch.float32
    true = guard_log_ratio(old.x_next.double(), old.mean.double(), new.mean.detach().double(), old.std.double())
    assert true.std().item() == pytest.approx(1e-3 / 65536**0.5, rel=0.5)  # about the clip range, 2e-6
    assert (direct - true).abs().max() < 1e-11
    assert (by_difference - true).abs().max() > 2e-9 > 100 * (direct - true).abs().max()


@pytest.fixture(scope="module")
def many():
    """Many draws of one step under the old policy: (D, K, the old Step, the new Step). K is the exact KL."""
    sigmas, generator = sd35_sigmas(), torch.Generator().manual_seed(0)
    x, v, away = (torch.randn(1, 4, 2, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    where = dict(sigma=sigmas[6], sigma_next=sigmas[7], noise_level=A)
    x, old_v, new_v = (t.expand(200_000, 4, 2, 2) for t in (x, v, v + 0.5 * away))
    old = dynamics.step("Flow-SDE", old_v, x, **where, generator=generator)
    new = dynamics.step("Flow-SDE", new_v, x, **where, x_next=old.x_next)
    moved = (new.mean - old.mean)[0]
    return 16, ((moved**2).sum() / (2 * old.std**2)).item(), old, new


def is_mean(draws, expected, errors=4):
    """Whether the mean of draws is the expected one, to a number of standard errors."""
    return abs(draws.mean().item() - expected) < errors * draws.std().item() / len(draws) ** 0.5


def test_raw_log_ratio_is_biased_and_its_ratio_is_not(many):  # Q2
    D, K, old, new = many
    assert 0.3 < K < 3
    raw = D * (new.log_prob - old.log_prob)  # of the densities
    assert is_mean(raw, -K) and not is_mean(raw, 0, errors=50)
    assert is_mean((raw + K) ** 2, 2 * K)
    assert is_mean(raw.exp(), 1)


def test_mean_reduced_ratio_is_biased_low(many):  # Q2: it is the D-th root of the true one
    D, K, old, new = many
    ratio = (new.log_prob - old.log_prob).exp()
    assert is_mean(ratio, math.exp(-K / D * (1 - 1 / D)))
    assert ratio.mean() < 1 and not is_mean(ratio, 1, errors=50)


def test_normalised_log_ratio_is_centred(many):  # Q2
    D, K, old, new = many
    log_ratio = guard_log_ratio(old.x_next, old.mean, new.mean, new.std)
    squared = 2 * K * old.std.item() ** 2  # |Δμ|²
    assert is_mean(log_ratio, 0) and is_mean(log_ratio**2, squared / D**2)  # without std in it
    assert is_mean(log_ratio.exp(), math.exp(squared / (2 * D**2)))


def test_gradient_is_the_same_at_any_mean():  # Q3
    _, old, new = two_policies(5)
    epsilon = (old.x_next - old.mean) / old.std
    for mean in (old.mean, new.mean, new.mean + 7.0):
        mean = mean.detach().requires_grad_()
        here = gradient(guard_log_ratio(old.x_next, old.mean, mean, old.std).sum(), mean)
        assert torch.allclose(here, epsilon / 36, rtol=1e-9)
        # the correction must carry a gradient too: without it the gradient has the mean in it
        raw = -((old.x_next - mean) ** 2 - (old.x_next - old.mean) ** 2) / (2 * old.std**2)
        bias = (mean - old.mean) ** 2 / (2 * old.std**2)
        assert torch.allclose(gradient((old.std * (raw + bias)).sum() / 36, mean), here)
        detached = gradient((old.std * (raw + bias.detach())).sum() / 36, mean)
        assert torch.allclose(detached, here) == torch.equal(mean, old.mean)


def test_ratio_and_gradient_at_the_old_policy():  # Q5
    v, old, new = two_policies(3, apart=0.0)
    log_ratio = guard_log_ratio(old.x_next, old.mean, new.mean, new.std)
    assert torch.equal(new.mean, old.mean) and (log_ratio == 0).all()
    advantages = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    guarded, metrics = grpo_loss(log_ratio, torch.zeros_like(log_ratio), advantages, 2e-6, 5.0)
    plain, _ = grpo_loss(new.log_prob, old.log_prob, advantages, 1e-4, 5.0)
    assert guarded.item() == plain.item() == pytest.approx(-advantages.mean().item()) and metrics["clip_fraction"] == 0
    assert gradient(guarded, v).abs().min() > 0
    assert torch.allclose(gradient(guarded, v), old.std * gradient(plain, v), rtol=1e-9)


@pytest.mark.parametrize("packed", [False, True])
def test_steps_can_be_mixed_in_a_batch(packed):  # Q6
    sigmas, generator = sd35_sigmas(), torch.Generator().manual_seed(0)
    shape = (5, 6, 4) if packed else (5, 4, 3, 3)
    x, v, away = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    ks = [0, 8, 3, 3, 9]
    now, after = torch.tensor([sigmas[k] for k in ks]), torch.tensor([sigmas[k + 1] for k in ks])
    where = dict(sigma=now, sigma_next=after, noise_level=A, sigma_second=sigmas[1])
    old = dynamics.step("Flow-SDE", v, x, **where, generator=generator)
    new = dynamics.step("Flow-SDE", v + 0.1 * away, x, **where, x_next=old.x_next)
    assert old.std.shape == (5, *[1] * (len(shape) - 1))
    alone = []
    for i, k in enumerate(ks):
        one = slice(i, i + 1)
        where = dict(sigma=now[i], sigma_next=after[i], noise_level=A, sigma_second=sigmas[1])
        then = dynamics.step("Flow-SDE", v[one], x[one], **where, x_next=old.x_next[one])
        step = dynamics.step("Flow-SDE", (v + 0.1 * away)[one], x[one], **where, x_next=old.x_next[one])
        assert then.std.shape == () and then.std.item() == pytest.approx(old.std[i].item())
        alone.append(guard_log_ratio(old.x_next[one], then.mean, step.mean, then.std))
        assert alone[-1].shape == (1,), k
    for std in (old.std, old.std.flatten(), old.std.flatten().tolist()):
        log_ratio = guard_log_ratio(old.x_next, old.mean, new.mean, std)
        assert log_ratio.shape == (5,) and torch.allclose(log_ratio, torch.cat(alone), rtol=1e-9)


@pytest.mark.parametrize("std", [0.3, torch.tensor(0.3), torch.tensor([0.3]), torch.full((1, 1, 1, 1), 0.3)])
def test_a_batch_of_one_and_latents_in_half_precision(std):
    mean = torch.zeros(1, 4, 3, 3, requires_grad=True)
    log_ratio = guard_log_ratio(torch.ones(1, 4, 3, 3, dtype=torch.bfloat16), torch.full((1, 4, 3, 3), 0.4), mean, std)
    assert log_ratio.shape == (1,) and log_ratio.dtype == torch.float32 and log_ratio.requires_grad
    assert log_ratio.item() == pytest.approx(-0.4 * 0.6 / 0.3)


# Reweighting


def test_weights_are_the_inverse_step_lengths():  # Q4
    sigmas = sd35_sigmas()
    weights = step_weights(TrainArgs(), sigmas)
    assert list(weights) == list(range(9))
    assert all(weights[k] * (sigmas[k] - sigmas[k + 1]) == pytest.approx(1) for k in weights)
    assert set(step_weights(TrainArgs(reweight=False), sigmas).values()) == {1.0}
    assert list(step_weights(TrainArgs(train_steps=[2, 9], num_train_steps=1), sigmas)) == [2, 9]


def test_defaults_are_those_of_the_released_code():
    train = TrainArgs()
    assert (train.clip_range, train.adv_clip_range, train.noise_level, train.kl_beta) == (2e-6, 5, A, 0)
    assert train.reweight and not train.global_std and train.dynamics_type == "Flow-SDE"


@pytest.mark.parametrize("reweight", [True, False])
def test_steps_weigh_alike_only_with_reweighting(reweight):  # Q4
    sigmas, noise = sd35_sigmas(), torch.tensor([[1.0, -1.0] * 18], dtype=torch.float64).reshape(1, 4, 3, 3)
    weights = step_weights(TrainArgs(reweight=reweight, train_steps=list(range(10))), sigmas)
    scale, logged = {}, {}
    for k, weight in weights.items():
        v, old, new = two_policies(k, (1, 4, 3, 3), apart=0.0, noise=noise)
        log_ratio = guard_log_ratio(old.x_next, old.mean, new.mean, new.std)
        loss, _ = grpo_loss(log_ratio, torch.zeros(1), torch.ones(1), 2e-6, 5.0)
        size = 36 * gradient(weight * loss, v).abs()  # of D |d loss / d v|, alike in all latents
        assert torch.allclose(size, size.mean(), rtol=1e-6)
        scale[k] = size.mean().item()
        metrics = ratio_metrics(k, new.log_prob - old.log_prob, log_ratio, v, weight)
        logged[k] = metrics[f"gradient_scale@{k}"].item()
    assert logged == pytest.approx(scale, rel=1e-6)
    if reweight:
        assert scale.pop(0) == pytest.approx(1, rel=1e-6)  # g at σ = 1 leaves v a factor of 1
        assert list(scale.values()) == pytest.approx([1 + A**2 / 2] * 9, rel=1e-6)
    else:
        table = [0.0399, 0.0582, 0.0693, 0.0838, 0.1034, 0.1309, 0.1709, 0.2326, 0.3351, 0.0111]
        assert list(scale.values()) == pytest.approx(table, abs=1e-4)
        assert max(scale.values()) > 8 * scale[0]


def test_raw_ratio_weighs_late_steps_most():  # Q4: 26 times as much over the trained steps
    noise = torch.tensor([[1.0, -1.0] * 18], dtype=torch.float64).reshape(1, 4, 3, 3)
    scale = []
    for k in range(9):
        v, _, new = two_policies(k, (1, 4, 3, 3), apart=0.0, noise=noise)
        scale.append(36 * gradient(new.log_prob.sum(), v).abs().mean().item())
    assert scale == pytest.approx([0.057, 0.078, 0.129, 0.188, 0.264, 0.371, 0.536, 0.825, 1.487], abs=1e-3)


def test_what_is_logged_of_a_step():  # Q4
    v, old, new = two_policies(2)
    raw, log_ratio = new.log_prob - old.log_prob, guard_log_ratio(old.x_next, old.mean, new.mean, new.std)
    metrics = ratio_metrics(2, raw, log_ratio, v, 3.0)
    names = ("raw_log_ratio", "log_ratio", "raw_log_ratio_std", "log_ratio_std", "gradient_scale")
    assert set(metrics) == {f"{name}@2" for name in names}
    assert metrics["raw_log_ratio@2"] == raw.mean() and metrics["raw_log_ratio_std@2"] == raw.std(correction=0)
    assert metrics["log_ratio@2"] == log_ratio.mean() and metrics["log_ratio_std@2"] == log_ratio.std(correction=0)
    epsilon, slope = (old.x_next - old.mean) / old.std, 3.0 * (0.9133 - 0.8577) * (1 + A**2 / 2)
    expected = slope * (epsilon**2).mean().sqrt().item()
    assert metrics["gradient_scale@2"].item() == pytest.approx(expected, rel=2e-3)
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
        assert [row[f"gradient_scale@{k}"] for k in range(3)] == pytest.approx([1, 1 + A**2 / 2, 1 + A**2 / 2], rel=0.1)


def test_one_update_per_epoch_is_on_policy(run):
    for row in run("--train.gradient-step-per-epoch", 1, "--train.no-reweight")[1:]:
        for k in range(3):
            assert float(row[f"train/log_ratio@{k}"]) == 0 == float(row[f"train/log_ratio_std@{k}"])
            assert float(row[f"train/raw_log_ratio@{k}"]) == 0 == float(row[f"train/raw_log_ratio_std@{k}"])
        scale = [float(row[f"train/gradient_scale@{k}"]) for k in range(3)]
        assert scale[0] < 0.9 * scale[1] < 0.81 * scale[2]


def test_a_tail_does_not_change_the_weights(run, tmp_path):
    """Nor does it change the step that is drawn; the weights of all candidates are those of the whole schedule."""
    draw = ["--train.num-train-steps", 1, "--train.seed", 2, "--train.learning-rate", 0]  # step 0, then 1
    tail, whole = run(*draw, "--train.tail-steps", 1, name="a"), run(*draw, name="b")
    scales = [{k: v for k, v in row.items() if "gradient_scale" in k} for row in (*tail[1:], *whole[1:])]
    assert "at most 32 network" in (tmp_path / "a" / "log.txt").read_text()
    assert scales[:2] == scales[2:] and any(map(float, filter(None, scales[0].values())))
    assert [row["train/contrast"] for row in tail] != [row["train/contrast"] for row in whole]


def test_the_loss_of_a_run_is_divided_by_the_step_length(run):  # Q4
    options = ["--train.max-epochs", "1", "--train.gradient-step-per-epoch", "1", "--train.train-steps", "1"]
    rows = [run(*options, name="a")[1], run(*options, "--train.no-reweight", name="b")[1]]
    norms, policy_losses = ([float(row[f"train/{name}"]) for row in rows] for name in ("grad_norm", "policy_loss"))
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(common.RunArgs.model, subfolder="scheduler")
    scheduler.set_timesteps(4)
    h = (scheduler.sigmas[1] - scheduler.sigmas[2]).item()
    assert norms[0] * h == pytest.approx(norms[1], rel=1e-4) and policy_losses[0] == policy_losses[1]


def test_what_a_run_trains_on(run, monkeypatch):
    ratios, losses, logged, tapes = [], [], [], []
    for name, seen in (("guard_log_ratio", ratios), ("grpo_loss", losses), ("ratio_metrics", logged)):
        shipped = getattr(grpo_guard, name)
        monkeypatch.setattr(grpo_guard, name, lambda *args, f=shipped, seen=seen: seen.append(args) or f(*args))
    recorded = lambda *args, **known: tapes.append(common.rollout(*args, **known)) or tapes[-1]  # noqa: E731
    monkeypatch.setattr(grpo_guard, "rollout", recorded)
    run("--train.max-epochs", 1, "--train.clip-range", 1e-3, "--train.adv-clip-range", 3)
    reward = rewards.make_reward({"jpeg_compressibility": 1.0}, "cpu")
    totals = torch.cat([reward(tape.images, tape.call["prompt"])["total"] for tape in tapes])
    advantages, used = grpo_guard.group_advantages(totals, 4).split(4), set()
    for (x_next, old_mean, mean, std), (log_ratio, zero, given, *clips), row in zip(
        ratios, losses, logged, strict=True
    ):
        ((i, k),) = ((i, k) for i, tape in enumerate(tapes) for k in tape.steps if tape.steps[k].x_next is x_next)
        taken = tapes[i].steps[k]
        assert torch.equal(old_mean, taken.mean) and torch.equal(std, taken.std)
        assert mean.requires_grad and (zero == 0).all() and torch.equal(given, advantages[i]) and clips == [1e-3, 3]
        used.add((i, k))
        bias = ((mean - old_mean) ** 2).flatten(1).mean(1) / (2 * std**2)
        assert row[0] == k and row[2] is log_ratio and row[3].requires_grad
        assert torch.allclose(row[1], log_ratio / std - bias, rtol=1e-3, atol=1e-6)  # the raw log-ratio
    assert min(bias) > 1e-5  # of the second update
    assert len(losses) == 6 and used == {(i, k) for i in range(2) for k in range(3)}


@pytest.mark.parametrize("options", ["--train.gradient-step-per-epoch 1", "--train.train-steps 1"])
def test_an_update_is_over_the_mean_of_its_losses(run, monkeypatch, options):
    made = []
    find = common.trainable_parameters
    monkeypatch.setattr(common, "trainable_parameters", lambda *args: made.append(find(*args)) or made[0])

    def flat_loss(log_ratio, *_):  # whose gradient is 1 in one parameter
        return 0 * log_ratio.sum() + next(iter(made[0].values())).sum(), {}

    monkeypatch.setattr(grpo_guard, "grpo_loss", flat_loss)
    rows = run("--train.max-epochs", 1, "--train.no-reweight", *options.split())
    count = next(iter(made[0].values())).numel()
    assert float(rows[1]["train/grad_norm"]) == pytest.approx(count**0.5, rel=1e-5)


@pytest.fixture
def refused(refusal):
    """The message of a command that must be refused."""
    return functools.partial(refusal, grpo_guard)


@pytest.mark.parametrize("dynamics_type", ["Dance-SDE", "CPS", "ODE"])
def test_other_dynamics_are_refused(refused, dynamics_type):
    message = refused("--train.dynamics-type", dynamics_type)
    assert f"train.dynamics_type = '{dynamics_type}'" in message
    assert "Flow-SDE alone" in message and "grpo.py" in message


@pytest.mark.parametrize(
    "options, what, remedy",
    [
        ("--train.group-size 1", "train.group_size = 1", "at least 2"),
        ("--train.noise-level 0", "train.noise_level = 0.0", "above 0"),
        ("--train.num-inference-steps 0", "train.num_inference_steps = 0", "at least 1"),
        ("--train.num-inference-steps 1", "train.num_inference_steps = 1", "None is all but the last step, so none"),
        ("--train.train-steps 4", "train.train_steps = [4]", "from 0 to 3"),
        ("--train.num-train-steps 4", "train.num_train_steps = 4", "must be 1 to 3, or None: train.train_steps has"),
        ("--train.tail-steps 2", "train.tail_steps = 2", "step is 2 or later, and after it come at most 1 steps"),
        ("--train.num-train-steps 2 --train.shift-interval 0", "train.shift_interval = 0", "at least 1"),
        ("--train.shift-interval 25", "train.shift_interval = 25", "which is None; set that too"),
    ],
)
def test_refusals(refused, options, what, remedy):
    message = refused(*options.split())
    assert what in message and remedy in message


@pytest.mark.parametrize("other", ["grpo", "nft"])
def test_the_settings_of_another_trainer_are_refused(refused, tmp_path, other):
    (tmp_path / "other.yaml").write_text(f"train: {{trainer_type: {other}}}")
    message = refused("--config", tmp_path / "other.yaml")
    assert f"train.trainer_type = '{other}'" in message and "'grpo-guard'" in message


# One file, one algorithm


@pytest.mark.parametrize("name", ["candidate_steps", "drawn_steps", "group_advantages", "grpo_loss", "kl_loss"])
def test_all_else_is_that_of_grpo(name):  # so that what is shown of grpo.py holds here
    assert inspect.getsource(getattr(grpo_guard, name)) == inspect.getsource(getattr(grpo, name))


def imported(module):
    """Names of the top-level modules that a file of the project imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse((Path(common.__file__).parent / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(node.module.partition(".")[0])
    return names


def test_scripts_share_no_algorithm():
    scripts, shared = {"grpo", "grpo_guard", "nft"}, {"common", "dynamics", "rewards", "shapes"}
    for script in scripts:
        assert imported(script) & (scripts | shared) == {"common", "dynamics", "rewards"}
    assert not imported("dynamics") & (scripts | shared)
    assert imported("common") & (scripts | shared) == {"dynamics"}
    assert imported("rewards") & (scripts | shared) == {"shapes"}
