"""`dynamics.step` against closed forms, in float64 unless a dtype is the point.

The laboratory is a Gaussian world: x0 ~ N(M, var) has a velocity that is affine in x, so that every step is too. Its
coefficients are read off `step` at x = 0 and x = 1, and the mean and variance of a whole rollout follow exactly,
without sampling. var = 0 is data that is a single point.
"""

import itertools
import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch.distributions import Normal

from dynamics import DYNAMICS, RULES, cps, dpm_step, step

M = 0.7

SCORES = {
    "by noise": lambda x, v, sigma: -(x + (1 - sigma) * v) / sigma,
    "by image": lambda x, v, sigma: -(x - (1 - sigma) * (x - sigma * v)) / sigma**2,
    "by unscaled image": lambda x, v, sigma: -(x - (x - sigma * v)) / sigma**2,  # in circulation: no (1 - sigma) on x0
    "none": lambda x, v, sigma: 0 * x,
}


def sde(g, score="by image"):
    """The rule of Euler and Maruyama for a diffusion coefficient g(a, sigma, second)."""

    def rule(v, x, sigma, sigma_next, a, second):
        h, g_now = sigma - sigma_next, g(a, sigma, second)
        return x - h * (v - g_now**2 / 2 * SCORES[score](x, v, sigma)), g_now * h.sqrt()

    return rule


def cps_law(v, x, sigma, sigma_next, a, second):
    std = sigma_next * math.sin(a * math.pi / 2)
    return (1 - sigma_next) * (x - sigma * v) + (sigma_next**2 - std**2).sqrt() * (x + (1 - sigma) * v), std


G = {
    "Flow-SDE": lambda a, sigma, second: a * (sigma / (1 - torch.minimum(sigma, second))).sqrt(),
    "Dance-SDE": lambda a, sigma, second: a * sigma**0,
    "ODE": lambda *_: torch.zeros(()),
}
CLOSED_FORMS = {"CPS": cps_law} | {name: sde(g) for name, g in G.items()}
LEVELS = {"Flow-SDE": 0.7, "Dance-SDE": 0.3, "CPS": 0.8, "ODE": 0.0}  # the usual ones
SDES, RANDOM = ["Flow-SDE", "Dance-SDE"], ["Flow-SDE", "Dance-SDE", "CPS"]
every_rule = pytest.mark.parametrize("name", DYNAMICS)
random_rules = pytest.mark.parametrize("name", RANDOM)


def schedule(T=None, shift=3.0, sigmas=None):
    """(T+1,): as pipelines ask for it, by T, or explicit sigmas through the shift, in float32, and then 0."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(T, sigmas=sigmas)
    return scheduler.sigmas.double()


def shift_once(T):
    return schedule(sigmas=torch.linspace(1, 1 / T, T).tolist())


SIGMAS = schedule(10)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def v_and_x(*shape, dtype=torch.float64):
    return randn(*shape, dtype=dtype), randn(*shape, seed=1, dtype=dtype)


def close(actual, expected, tolerance=1e-12):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected.expand_as(actual), atol=tolerance, rtol=tolerance)


def same(first, second):
    """Whether two Steps are equal bit for bit."""
    pairs = zip(first, second, strict=True)
    return all(a is b is None or (a.dtype == b.dtype and torch.equal(a, b)) for a, b in pairs)


def variance(sigma, var):
    """Of the marginal at sigma; its mean is (1 - sigma) M."""
    return (1 - sigma) ** 2 * var + sigma**2


def velocity(x, sigma, var):
    """E[ε - x0 | x]."""
    z = (x - (1 - sigma) * M) / variance(sigma, var)
    return sigma * z - (M + (1 - sigma) * var * z)


def coefficients(rule, sigmas, var, level):
    """a, b, std, each (T,), of every step x' ~ N(a x + b, std²)."""
    second = sigmas[1] if sigmas[0] == 1 else None
    x = torch.tensor([0.0, 1.0], dtype=torch.float64).expand(len(sigmas) - 1, 2)
    v = velocity(x, sigmas[:-1, None], var)
    _, _, mean, std = step(rule, v, x, sigmas[:-1], sigmas[1:], level, sigma_second=second)
    return mean[:, 1] - mean[:, 0], mean[:, 0], std[:, 0]


def propagate(rule, sigmas, var, level):
    """Mean and variance of x along a rollout that starts on the marginal, each (T+1,)."""
    means, variances = [((1 - sigmas[0]) * M).item()], [variance(sigmas[0], var).item()]
    for a, b, std in torch.stack(coefficients(rule, sigmas, var, level), dim=1).tolist():
        means.append(a * means[-1] + b)
        variances.append(a**2 * variances[-1] + std**2)
    return torch.tensor(means, dtype=torch.float64), torch.tensor(variances, dtype=torch.float64)


# ---- Schedule ----


def test_schedules_of_sd35():  # S2
    twice = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
    once = [1, 0.9643, 0.9231, 0.8750, 0.8182, 0.7500, 0.6667, 0.5625, 0.4286, 0.2500, 0]
    close(SIGMAS, twice, 5e-5)  # the pipelines' own, which is used
    close(shift_once(10), once, 5e-5)


def test_shift_is_a_group_of_monotone_maps_of_the_unit_interval():  # S1
    def shifted(sigmas, shift):
        return schedule(shift=shift, sigmas=sigmas.tolist())[:-1]

    sigmas = torch.linspace(1, 0, 33, dtype=torch.float64)
    for shift in (0.5, 1.0, 3.0, 5.0):
        assert shifted(sigmas, shift)[[0, -1]].tolist() == [1, 0] and (shifted(sigmas, shift).diff() < 0).all()
        close(shifted(sigmas, shift), shift * sigmas / (1 + (shift - 1) * sigmas), 1e-6)
    close(shifted(shifted(sigmas, 2.0), 1.5), shifted(sigmas, 3.0), 1e-6)


# ---- Mean and std ----


@pytest.mark.parametrize("second", [None, SIGMAS[1].item(), 0.999])  # which has no effect after the first step
@every_rule
def test_mean_and_std_are_the_closed_form(name, second):  # F1, D1, D3: the SDEs differ in g alone
    (v, x), sigma, sigma_next = v_and_x(9, 5), SIGMAS[1:-1, None], SIGMAS[2:, None]
    taken = step(name, v, x, sigma, sigma_next, LEVELS[name], sigma_second=second)
    mean, std = CLOSED_FORMS[name](v, x, sigma, sigma_next, LEVELS[name], sigma)
    close(taken.mean, mean)
    close(taken.std, std.to(mean))
    close(SCORES["by image"](x, v, sigma), SCORES["by noise"](x, v, sigma))


@every_rule
def test_noise_level_0_is_euler_and_has_no_density(name):  # F1, C2
    v, x = v_and_x(10, 5)
    for level in (0.0, 0.7) if name == "ODE" else (0.0,):
        taken = step(name, v, x, SIGMAS[:-1], SIGMAS[1:], level, sigma_second=SIGMAS[1])
        close(taken.mean, x + SIGMAS.diff()[:, None] * v)
        assert torch.equal(taken.x_next, taken.mean) and (taken.std == 0).all() and taken.log_prob is None
        assert step(name, v, x, 0.8, 0.7, level, x_next=x).log_prob is None


@pytest.mark.parametrize("a", [0.3, 0.7, 1.2])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("T", [1, 2, 10, 50])
def test_factors_of_the_sdes_on_any_schedule(T, shift, a):
    sigmas = schedule(T, shift)
    v, x = (t.requires_grad_() for t in v_and_x(T, 1))
    h, sigma = -sigmas.diff(), sigmas[:-1]
    flow, dance = (step(name, v, x, sigma, sigmas[1:], a, sigma_second=sigmas[1]) for name in SDES)
    dx, dv = (slope[:, 0] for slope in torch.autograd.grad(flow.mean.sum(), (x, v)))
    close(torch.stack([flow.std[0, 0], dx[0], -dv[0] / h[0]]), [a, 1 - a**2 / 2, 1])  # F3
    close(-dv[1:] / h[1:], 1 + a**2 / 2)  # F2
    (dv,) = torch.autograd.grad(dance.mean.sum(), v)
    close(-dv[:, 0] / h, 1 + a**2 * (1 - sigma) / (2 * sigma))  # D4


@pytest.mark.parametrize("sigma, second", [(1.0, None), (1.0, 0.96), (1.0, 0.9), (1 - 1e-7, 0.96), (0.999, 0.96)])
def test_first_step_of_a_schedule_that_starts_at_1_or_a_little_below(sigma, second):
    taken = step("Flow-SDE", *v_and_x(2, 5), sigma, 0.96, 0.7, sigma_second=second)  # without the rule 4.4 at 0.999
    close(taken.std, 0.7 * math.sqrt(sigma * (sigma - 0.96) / (1 - (second or 0.96))))


# ---- Marginals ----


@pytest.mark.parametrize(
    "name, at_50, at_800", [("Flow-SDE", 0.074, 0.0027), ("Dance-SDE", 0.046, 0.0029), ("ODE", 0.054, 0.0034)]
)
def test_marginals_converge_like_1_over_T(name, at_50, at_800):  # F4, D2
    worst = []
    for T in (50, 400, 800):
        sigmas = torch.linspace(0.98, 0.02, T + 1, dtype=torch.float64)
        means, variances = propagate(name, sigmas, 0.25, LEVELS[name])
        close(means, (1 - sigmas) * M)
        worst.append((variances / variance(sigmas, 0.25) - 1).abs().max().item())
    assert worst[::2] == pytest.approx([at_50, at_800], rel=0.02) and worst[1] / worst[2] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize(
    "name, score, mean, var",
    [
        ("Flow-SDE", "none", 0.70, 1.590),
        ("Flow-SDE", "by unscaled image", 1.146, 0.337),
        ("Dance-SDE", "none", 0.70, 0.320),
        ("Dance-SDE", "by unscaled image", 0.954, 0.435),
    ],
)
def test_no_other_score_keeps_the_marginals(name, score, mean, var):  # F4, D2, controls; the data's: 0.7, 0.25
    means, variances = propagate(sde(G[name], score), shift_once(2000), 0.25, LEVELS[name])
    close(torch.stack([means[-1], variances[-1]]), [mean, var], 6e-4)


@pytest.mark.parametrize(
    "name, T_10, T_2000, last_two",
    [
        ("ODE", 0.137, 0.2493, [0.25, 0]),
        ("Flow-SDE", 0.180, 0.2500, [0.3223, 0.2279]),
        ("Dance-SDE", 0.148, 0.2494, [0.2662, 0.1575]),
        ("CPS", 0.099, 0.1618, [0.25, 0]),
    ],
)
def test_noise_at_the_end_of_a_whole_rollout(name, T_10, T_2000, last_two):
    few, many, point = ((shift_once(10), 0.25), (shift_once(2000), 0.25), (shift_once(10), 0.0))
    few, many, point = (propagate(name, *world, LEVELS[name])[1] for world in (few, many, point))
    assert few[-1] == pytest.approx(T_10, abs=6e-4) and many[-1] == pytest.approx(T_2000, abs=6e-5)  # the data's: 0.25
    close(point.sqrt()[-2:], last_two, 6e-5)  # the schedule's: 0.25, 0


@pytest.mark.parametrize("T", [3, 10, 50])
@pytest.mark.parametrize("level", [0.0, 0.3, 0.7, 1.0])
@every_rule
def test_point_data_keeps_its_signal_and_gains_known_noise(name, level, T):  # F5, C1, C3
    sigmas = schedule(T)
    sigma, sigma_next, h = sigmas[:-1], sigmas[1:], -sigmas.diff()
    a, b, std = coefficients(name, sigmas, 0.0, level)
    close(a * (1 - sigma) * M + b, (1 - sigma_next) * M)
    excess = 0 if name == "CPS" else std**2 * h / sigma + (std**2 / (2 * sigma)) ** 2
    close((a * sigma) ** 2 + std**2, sigma_next**2 + excess)


def test_cps_at_full_noise_forgets_x_given_x0():  # C2
    x0, sigma, sigma_next = randn(2, 5), 0.8, 0.6
    for x in (randn(2, 5, seed=1), 3 * x0):
        close(step("CPS", (x - x0) / sigma, x, sigma, sigma_next, 1.0).mean, (1 - sigma_next) * x0)


@pytest.mark.parametrize("a", [0.3, 0.5, 0.8])
def test_cps_does_not_keep_the_marginals_at_any_number_of_steps(a):  # C4
    c = math.cos(a * math.pi / 2)
    sigmas = torch.linspace(1, 0, 8001, dtype=torch.float64)
    ratio, q = propagate("CPS", sigmas, 0.25, a)[1] / variance(sigmas, 0.25), variance(sigmas, 0.25)
    close(ratio[4000:], ((1 + c) / (2 - (1 - c) * sigmas**2 / q))[4000:], 0.004)
    assert ratio[-1] == pytest.approx((1 + c) / 2, rel=0.004)


def test_cps_last_step_is_the_clean_image_with_a_finite_gradient():  # C5
    v, x = v_and_x(2, 5)
    v.requires_grad_()
    last = step("CPS", v, x, 0.25, 0.0, 0.8)
    assert torch.equal(last.x_next, x - 0.25 * v) and last.std == 0 and last.log_prob is None
    assert all(step(name, v, x, 0.25, 0.0, 0.7).log_prob is not None for name in SDES)
    mixed = step("CPS", v, x, torch.tensor([0.25, 0.5]), torch.tensor([0.0, 0.25]), 0.8, generator=seeded())
    assert mixed.log_prob[0] == 0 and mixed.log_prob[1] < 0
    (gradient,) = torch.autograd.grad(mixed.log_prob.sum(), v)
    assert gradient.isfinite().all() and (gradient[0] == 0).all() and (gradient[1] != 0).all()


# ---- Log-probability, and rules of the user's own ----


def density(taken):
    """(B,): of x_next, per dimension."""
    return Normal(taken.mean, taken.std).log_prob(taken.x_next.to(taken.mean.dtype)).flatten(1).mean(1)


@pytest.mark.parametrize("shape", [(3, 6, 4), (3, 4, 5, 2), (3, 4, 2, 3, 2)])
@random_rules
def test_log_prob_is_the_normal_density_per_dimension(name, shape):  # F6, C6: CPS has the surrogate of its authors
    taken = step(name, *v_and_x(*shape), 0.8, 0.7, 0.7, generator=seeded())
    surrogate = -((taken.x_next - taken.mean) ** 2).flatten(1).mean(1)
    assert taken.log_prob.shape == (3,)
    close(taken.log_prob, surrogate if name == "CPS" else density(taken))


@random_rules
def test_gradient_reaches_v_through_the_mean_alone(name):  # F6; C6: CPS's is 2 std² times that of the density
    v, x = v_and_x(2, 5)
    v.requires_grad_()
    drawn = step(name, v, x, 0.8, 0.7, 0.7, generator=seeded())
    assert not drawn.x_next.requires_grad
    x_next = drawn.x_next.clone().requires_grad_()
    scored = step(name, v, x, 0.8, 0.7, 0.7, x_next=x_next)
    top = scored.log_prob.sum()
    to_mean, to_v, to_x_next = torch.autograd.grad(top, (scored.mean, v, x_next), allow_unused=True)
    close(to_mean, (x_next - scored.mean).detach() / 5 * (2 if name == "CPS" else scored.std**-2))
    assert to_x_next is None and torch.equal(torch.autograd.grad(drawn.log_prob.sum(), v)[0], to_v)


USERS_RULES = {
    "std of the sigmas": lambda v, x, sigma, after, level, second: (x - sigma * v, level * after + 0.1 * second),
    "std of every latent": lambda v, x, sigma, after, level, second: (x + v, level * torch.sigmoid(x)),
    "around cps": lambda *given: cps(*given),  # whose surrogate belongs to cps itself
}


@pytest.mark.parametrize("rule", USERS_RULES.values(), ids=USERS_RULES)
def test_a_rule_of_the_users_own_has_the_normal_density(rule):
    (v, x), sigmas = v_and_x(3, 4, 2), torch.tensor([[0.9, 0.7, 0.5], [0.8, 0.6, 0.4], [0.7, 0.6, 0.5]]).double()
    taken = step(rule, v, x, *sigmas[:2], 0.7, sigma_second=sigmas[2], generator=seeded())
    sigma, sigma_next, second = sigmas.reshape(3, 3, 1, 1)
    mean, std = rule(v, x, sigma, sigma_next, 0.7, second)
    assert torch.equal(taken.mean, mean) and torch.equal(taken.std, std) and taken.log_prob.shape == (3,)
    close(taken.log_prob, density(taken))


def test_what_a_rule_returns_is_checked():
    v, x = v_and_x(3, 4, 3)
    assert step(lambda v, x, *_: (x, 0.0), v, x, 0.8, 0.7, 0.7).log_prob is None
    for mean, std in ((x, torch.ones(3)), (x, torch.ones(3, 2, 1)), (x[:1], torch.tensor(1.0)), (x.flatten(1), 1.0)):
        with pytest.raises(ValueError, match="mean .* and std .* for x .3, 4, 3."):
            step(lambda *_, given=(mean, std): given, v, x, 0.8, 0.7, 0.7)


def test_unknown_dynamics_are_refused_by_name():
    for name in ("ode", "SDE", "", None):
        with pytest.raises(ValueError, match=", ".join(DYNAMICS)):
            step(name, *v_and_x(2, 5), 0.8, 0.7, 0.7)


# ---- Dtypes, sigmas and noise ----

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("v_dtype", FLOATS)
@every_rule
def test_computes_in_float32_or_float64_and_rounds_to_the_dtype_of_x_before_scoring(name, v_dtype, x_dtype):
    wide = torch.float64 if torch.float64 in (v_dtype, x_dtype) else torch.float32
    v, x = randn(2, 50, dtype=v_dtype), randn(2, 50, seed=1, dtype=x_dtype)
    taken = step(name, v, x, 0.79, 0.71, 0.7, generator=seeded())
    exact = step(name, v.to(wide), x.to(wide), 0.79, 0.71, 0.7, generator=seeded())
    assert taken.x_next.dtype == x_dtype and torch.equal(taken.x_next, exact.x_next.to(x_dtype))
    assert taken.mean.dtype == taken.std.dtype == wide and torch.equal(taken.mean, exact.mean)
    if name in RANDOM:
        assert same(taken, step(name, v, x, 0.79, 0.71, 0.7, x_next=taken.x_next))
        assert taken.log_prob.dtype == wide and (x_dtype == wide or (taken.log_prob != exact.log_prob).all())


@pytest.mark.parametrize("sigma_next", [SIGMAS[[1, 9, 5]], SIGMAS[9]])
@every_rule
def test_sigmas_per_sample_agree_with_a_loop_over_samples(name, sigma_next):  # and a rule with its name
    (v, x), second = v_and_x(3, 4, 3, 2), SIGMAS[1]
    sigma, generators = SIGMAS[[0, 8, 4]], [seeded(i) for i in range(3)]  # the first step of the schedule among others
    batch = step(name, v, x, sigma, sigma_next, 0.7, sigma_second=second, generator=generators)
    for i in range(3):
        one, sigmas = slice(i, i + 1), (sigma[i], sigma_next.expand(3)[i], second)
        alone, by_numbers = (
            step(RULES[name], v[one], x[one], *now, 0.7, sigma_second=then, generator=seeded(i))
            for *now, then in (sigmas, [s.item() for s in sigmas])
        )
        assert same(alone, by_numbers) and alone.std.shape == ()
        close(batch.mean[one], alone.mean)
        close(batch.std.expand_as(x)[one], alone.std)
        close(batch.x_next[one], alone.x_next)
        assert alone.log_prob is batch.log_prob is None or batch.log_prob[i] == pytest.approx(alone.log_prob.item())


@random_rules
def test_noise_is_standard_normal_times_std(name):
    taken = step(name, *v_and_x(32, 4096), 0.8, 0.7, 0.7, generator=seeded())
    z = (taken.x_next - taken.mean) / taken.std
    n = z.numel()
    assert abs(z.mean()) < 4 / n**0.5 and abs(z.std() - 1) < 4 / (2 * n) ** 0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert (torch.corrcoef(z) - torch.eye(32)).abs().max() < 6 / 4096**0.5  # samples do not share it


def test_generators_decide_the_noise():
    v, x = v_and_x(3, 4, 2)

    def x_next(generator, rows=slice(None)):
        return step("Flow-SDE", v[rows], x[rows], 0.8, 0.7, 0.7, generator=generator).x_next

    first, again, other = (x_next(seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again) and (first != other).all()
    batch = x_next([seeded(i) for i in range(3)])  # one per sample: its noise is independent of the batch
    for rows in ([1], [2, 0]):
        assert torch.equal(x_next([seeded(i) for i in rows], rows), batch[rows])
    with pytest.raises(ValueError):
        x_next([seeded(), seeded()])


def test_draws_only_where_noise_is_needed():
    (v, x), generator = v_and_x(2, 5), seeded()
    for name in RANDOM:
        step(name, v, x, 0.8, 0.7, 0.7, x_next=x, generator=generator)
        step(name, v, x, 0.8, 0.7, 0.0, generator=generator)
    step("ODE", v, x, 0.8, 0.7, 0.7, generator=generator)
    assert torch.equal(generator.get_state(), seeded().get_state())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("level", [0.0, 1e-3, 0.3, 0.7, 1.0])
@every_rule
def test_everything_is_finite_over_whole_schedules(name, level, dtype):
    schedule = SIGMAS.tolist()
    for sigmas in (schedule, [0.999, *schedule[1:]], [1.0, 0.0]):
        x = randn(2, 8, dtype=dtype)
        for sigma, sigma_next in itertools.pairwise(sigmas):
            v = velocity(x, sigma, 0.25).requires_grad_()
            x, log_prob, mean, std = step(name, v, x, sigma, sigma_next, level, sigma_second=sigmas[1])
            scored = [] if log_prob is None else [log_prob, *torch.autograd.grad(log_prob.sum(), v)]
            assert all(t.isfinite().all() for t in (x, mean, std, *scored))


# ---- The ODE by two solvers ----


def solve(solver, x, sigmas, velocity):
    """Take a schedule by steps of the ODE; velocity(x, k) is that of step k. Returns x at every sigma."""
    xs, last = [x], (None, None)
    for k, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas.tolist())):
        v = velocity(xs[-1], k)
        if solver == "Euler":
            xs.append(step("ODE", v, xs[-1], sigma, sigma_next, 0.0).x_next)
        else:
            x, x0 = dpm_step(v, xs[-1], sigma, sigma_next, *last)
            xs, last = [*xs, x], (sigma, x0)
    return xs


@pytest.mark.parametrize("solver, order", [("DPM-Solver++", 2), ("Euler", 1)])
def test_order_of_convergence(solver, order):  # M6: exactly, (x − (1 − σ) M) / √q does not change along the ODE
    errors, var = [], torch.tensor([[0.04], [0.25], [1.0]], dtype=torch.float64)
    for T in (320, 640):
        sigmas = torch.sigmoid(torch.linspace(4, -4, T + 1, dtype=torch.float64))  # even in λ
        first, exact = ((1 - sigma) * M + 2 * variance(sigma, var).sqrt() for sigma in sigmas[[0, -1]])
        last = solve(solver, first, sigmas, lambda x, k, sigmas=sigmas: velocity(x, sigmas[k], var))[-1]
        errors.append(last - exact)
    assert (torch.log2(errors[0] / errors[1]) - order).abs().max() < 0.01


@pytest.mark.parametrize(
    "last, sigma, sigma_next",
    [
        *((None, 1.0, 0.96), (None, 0.6, 0.4), (None, 0.25, 0.0), (None, 1.0, 0.0)),  # without a past
        *((1.0, 0.9, 0.8), (0.6, 0.4, 0.0), (1.0, 0.5, 0.0), (1.0, 1.0, 0.9)),  # where λ is infinite (M5)
        (0.5, 0.5, 0.4),  # after a step of no length
        (0.731, 0.5, 0.1),  # 2.2 times as long in λ as the last
        *(schedule(T)[-4:-1].tolist() for T in (4, 5, 10, 20, 40)),  # much longer in λ than the last: to 0.009
    ],
)
def test_dpm_step_is_eulers_where_the_past_is_no_guide(last, sigma, sigma_next):
    (v, x), past = v_and_x(2, 5), None if last is None else randn(2, 5, seed=2)
    x_next, x0 = dpm_step(v, x, sigma, sigma_next, last, past)
    close(x_next, step("ODE", v, x, sigma, sigma_next, 0.0).mean)
    close(x0, x - sigma * v)
    assert sigma_next > 0 or torch.equal(x_next, x0)


SCHEDULERS = {
    "Euler": FlowMatchEulerDiscreteScheduler(),
    "DPM-Solver++": DPMSolverMultistepScheduler(
        solver_order=2, solver_type="midpoint", algorithm_type="dpmsolver++", lower_order_final=True,
        prediction_type="flow_prediction", use_flow_sigmas=True, final_sigmas_type="zero",
    ),
}  # fmt: skip


@pytest.mark.parametrize("T", [1, 2, 10, 20])
@pytest.mark.parametrize("first", [1.0, 0.999])
@pytest.mark.parametrize("solver, tolerance", [("Euler", 0), ("DPM-Solver++", 1e-5)])
def test_a_solver_is_that_of_diffusers(solver, tolerance, T, first):  # M5: finite where λ is not
    scheduler = SCHEDULERS[solver]
    scheduler.set_timesteps(T)
    sigmas = torch.cat([torch.tensor([first]), shift_once(T)[1:].float()])
    scheduler.sigmas, scheduler.timesteps = sigmas, 1000 * sigmas[:-1]
    vs = [randn(2, 4, 8, 8, seed=k, dtype=torch.float32) for k in range(T)]
    x, *ours = solve(solver, vs[0], sigmas, lambda x, k: vs[k])
    for t, v, x_next in zip(scheduler.timesteps, vs, ours, strict=True):
        x = scheduler.step(v, t, x, return_dict=False)[0]
        close(x_next, x, tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_shapes_of_dpm_step(dtype):
    wide = torch.promote_types(dtype, torch.float32)
    (v, x), past = v_and_x(3, 4, 2, dtype=dtype), randn(3, 4, 2, seed=2, dtype=dtype)
    sigmas = torch.tensor([[0.8, 0.6, 1.0], [0.5, 0.0, 0.6], [0.6, 0.5, 0.7]])  # sigma, sigma_next, sigma_last
    batch, x0 = dpm_step(v, x, *sigmas.T, past)
    assert batch.dtype == dtype and x0.dtype == wide
    for i, now in enumerate(sigmas.tolist()):
        one = slice(i, i + 1)
        alone, _ = dpm_step(v[one].to(wide), x[one].to(wide), *now, past[one])
        close(batch[one], alone.to(dtype), 1e-6)
