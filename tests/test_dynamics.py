"""`dynamics.step` against closed forms, in float64 unless a dtype is the point.

The laboratory is a Gaussian world: x0 ~ N(M, var) has a velocity that is affine in x, so that every step is too. Its
coefficients are read off `step` at x = 0 and x = 1, and the mean and variance of a whole rollout follow exactly,
without sampling. var = 0 is data that is a single point.
"""

import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch.distributions import Normal

from dynamics import DYNAMICS, dpm_step, step

torch.set_num_threads(1)
SDES = ("Flow-SDE", "Dance-SDE")
RANDOM = (*SDES, "CPS")
USUAL = {"Flow-SDE": 0.7, "Dance-SDE": 0.3, "CPS": 0.8, "ODE": 0.0}
M = 0.7


def pipeline_sigmas(T, shift=3.0):
    """(T+1,): the schedule as pipelines ask for it."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(T)
    return scheduler.sigmas.double()


def shifted(sigmas, shift):
    """Explicit sigmas through the scheduler's shift, which computes in float32, without the 0 it appends."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=sigmas.tolist())
    return scheduler.sigmas[:-1].double()


def shift_once(T):
    return torch.cat([shifted(torch.linspace(1, 1 / T, T), 3.0), torch.zeros(1)])


SIGMAS = pipeline_sigmas(10)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def close(actual, expected, tolerance=1e-12):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected.expand_as(actual), atol=tolerance, rtol=tolerance)


def variance(sigma, var):
    """Of the marginal at sigma; its mean is (1 - sigma) M."""
    return (1 - sigma) ** 2 * var + sigma**2


def velocity(x, sigma, var):
    """E[ε - x0 | x]."""
    z = (x - (1 - sigma) * M) / variance(sigma, var)
    return sigma * z - (M + (1 - sigma) * var * z)


def coefficients(dynamics_type, sigmas, var, noise_level=None, score=None, **kwargs):
    """a, b, std, each (T,), of every step x' ~ N(a x + b, std²); `score` replaces the score inside the drift."""
    noise_level = USUAL[dynamics_type] if noise_level is None else noise_level
    sigma = sigmas[:-1, None]

    def taken(x):
        x = torch.full_like(sigma, x)
        v = velocity(x, sigma, var)
        taken = step(dynamics_type, v, x, sigmas[:-1], sigmas[1:], noise_level, **kwargs)
        if score is not None:
            euler = step("ODE", v, x, sigmas[:-1], sigmas[1:], 0.0).mean
            taken = taken._replace(mean=euler + taken.std**2 / 2 * score(x, v, sigma))
        return taken.mean[:, 0], taken.std[:, 0]

    (b, std), (a_plus_b, _) = taken(0.0), taken(1.0)
    return a_plus_b - b, b, std


def propagate(a, b, std, sigmas, var):
    """Mean and variance of x along a rollout that starts on the marginal, each (T+1,)."""
    means, variances = [((1 - sigmas[0]) * M).item()], [variance(sigmas[0], var).item()]
    for slope, offset, noise in torch.stack([a, b, std], dim=1).tolist():
        means.append(slope * means[-1] + offset)
        variances.append(slope**2 * variances[-1] + noise**2)
    return torch.tensor(means, dtype=torch.float64), torch.tensor(variances, dtype=torch.float64)


def derivatives(dynamics_type, sigmas, noise_level=None):
    """∂mean/∂x, ∂mean/∂v and std of every step of a schedule, each (T,)."""
    noise_level = USUAL[dynamics_type] if noise_level is None else noise_level
    v, x = (randn(len(sigmas) - 1, 1, seed=seed).requires_grad_() for seed in (0, 1))
    taken = step(dynamics_type, v, x, sigmas[:-1], sigmas[1:], noise_level, sigma_second=sigmas[1])
    dx, dv = torch.autograd.grad(taken.mean.sum(), (x, v))
    return dx[:, 0], dv[:, 0], taken.std[:, 0]


# ---- Schedule ----


def test_the_pipelines_own_schedule_shifts_twice():  # S2; this one is used
    expected = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
    close(SIGMAS, expected, 5e-5)


def test_explicit_sigmas_shift_once():  # S2
    expected = [1, 0.9643, 0.9231, 0.8750, 0.8182, 0.7500, 0.6667, 0.5625, 0.4286, 0.2500, 0]
    close(shift_once(10), expected, 5e-5)


def test_shift_is_a_group_of_monotone_maps_of_the_unit_interval():  # S1
    sigmas = torch.linspace(1, 0, 33, dtype=torch.float64)
    for shift in (0.5, 1.0, 3.0, 5.0):
        assert shifted(sigmas, shift)[[0, -1]].tolist() == [1, 0]
        assert (shifted(sigmas, shift).diff() < 0).all()
        close(shifted(sigmas, shift), shift * sigmas / (1 + (shift - 1) * sigmas), 1e-6)
    close(shifted(sigmas, 1.0), sigmas, 1e-7)
    close(shifted(shifted(sigmas, 2.0), 1.5), shifted(sigmas, 3.0), 1e-6)


# ---- Every quantity of every step ----

# fmt: off
TABLE = [
    #            Flow-SDE, 0.7             |  Dance-SDE, 0.3 |         CPS, 0.8
    #   g     std    d/dx    -d/dv     w   |   std      w    |  std    -d/dv  2 std|d/dv|
    [3.506, 0.7000, 0.7550, 0.0399, 0.057,   0.0599, 0.666,   0.9131, 0.0399, 0.0728],
    [3.435, 0.7430, 0.7125, 0.0582, 0.078,   0.0649, 0.722,   0.8686, 0.0719, 0.1250],
    [2.273, 0.5362, 0.8426, 0.0693, 0.129,   0.0708, 0.790,   0.8157, 0.1070, 0.1746],
    [1.719, 0.4459, 0.8841, 0.0838, 0.188,   0.0778, 0.871,   0.7517, 0.1450, 0.2181],
    [1.359, 0.3918, 0.9029, 0.1034, 0.264,   0.0865, 0.972,   0.6727, 0.1855, 0.2496],
    [1.088, 0.3528, 0.9120, 0.1309, 0.371,   0.0973, 1.101,   0.5727, 0.2269, 0.2599],
    [0.861, 0.3191, 0.9155, 0.1709, 0.536,   0.1112, 1.272,   0.4421, 0.2651, 0.2344],
    [0.652, 0.2820, 0.9145, 0.2326, 0.825,   0.1297, 1.515,   0.2644, 0.2896, 0.1532],
    [0.434, 0.2254, 0.9087, 0.3351, 1.487,   0.1556, 1.931,   0.0085, 0.2736, 0.0046],
    [0.066, 0.0063, 0.9978, 0.0111, 1.771,   0.0283, 1.888,   0.0000, 0.0089, 0.0000],
]
# fmt: on


def test_table_of_step_quantities():  # w = |∂mean/∂v| / std is the gradient scale of a step in the plain GRPO loss
    h = -SIGMAS.diff()
    dx, dv, std = derivatives("Flow-SDE", SIGMAS)
    columns = [std / h.sqrt(), std, dx, -dv, -dv / std]
    _, dv, std = derivatives("Dance-SDE", SIGMAS)
    columns += [std, -dv / std]
    _, dv, std = derivatives("CPS", SIGMAS)
    columns += [std, -dv, -2 * std * dv]
    error = (torch.stack(columns, dim=1) - torch.tensor(TABLE)).abs()
    three_decimals = torch.tensor([0, 4, 6])
    assert error[:, three_decimals].max() < 6e-4
    error[:, three_decimals] = 0
    assert error.max() < 6e-5


# ---- Flow-SDE and Dance-SDE ----


def by_noise(x, v, sigma):
    return -(x + (1 - sigma) * v) / sigma


def by_image(x, v, sigma):
    return -(x - (1 - sigma) * (x - sigma * v)) / sigma**2


def by_unscaled_image(x, v, sigma):
    """A formula in circulation, without the (1 - sigma) on x0."""
    return -(x - (x - sigma * v)) / sigma**2


def no_score(x, v, sigma):
    return torch.zeros_like(x)


G = {"Flow-SDE": lambda sigma: 0.7 * (sigma / (1 - sigma)).sqrt(), "Dance-SDE": lambda sigma: 0.3 * sigma**0}


@pytest.mark.parametrize("score", [by_noise, by_image])
@pytest.mark.parametrize("sde", SDES)
def test_mean_and_std_are_euler_maruyama(sde, score):  # F1, D1
    sigma, sigma_next = SIGMAS[1:-1], SIGMAS[2:]
    v, x = randn(9, 5), randn(9, 5, seed=1)
    g, dt = G[sde](sigma[:, None]), (sigma_next - sigma)[:, None]
    taken = step(sde, v, x, sigma, sigma_next, USUAL[sde])
    close(taken.mean, x + dt * (v - g**2 / 2 * score(x, v, sigma[:, None])))
    close(taken.std, g * (-dt).sqrt())


@pytest.mark.parametrize("dynamics_type", DYNAMICS)
def test_noise_level_0_is_euler(dynamics_type):  # F1, C2
    v, x = randn(10, 5), randn(10, 5, seed=1)
    taken = step(dynamics_type, v, x, SIGMAS[:-1], SIGMAS[1:], 0.0, sigma_second=SIGMAS[1])
    close(taken.mean, x + SIGMAS.diff()[:, None] * v)
    assert torch.equal(taken.x_next, taken.mean) and (taken.std == 0).all() and taken.log_prob is None


@pytest.mark.parametrize("a", [0.3, 0.7, 1.2])
def test_flow_sde_velocity_factor_is_the_same_at_every_sigma(a):  # F2
    _, dv, _ = derivatives("Flow-SDE", SIGMAS, a)
    close(dv[1:] / SIGMAS.diff()[1:], 1 + a**2 / 2)
    close(dv[0] / SIGMAS.diff()[0], 1)


def test_dance_sde_velocity_factor_grows_towards_the_image():  # D4
    _, dv, _ = derivatives("Dance-SDE", SIGMAS)
    close(dv / SIGMAS.diff(), 1 + 0.3**2 * (1 - SIGMAS[:-1]) / (2 * SIGMAS[:-1]))


def test_dance_sde_with_flow_sdes_g_is_flow_sde():  # D3
    v, x = randn(2, 5), randn(2, 5, seed=1)
    for sigma, sigma_next in zip(SIGMAS[1:-1], SIGMAS[2:], strict=True):
        flow = step("Flow-SDE", v, x, sigma, sigma_next, 0.7, generator=seeded())
        dance = step("Dance-SDE", v, x, sigma, sigma_next, G["Flow-SDE"](sigma).item(), generator=seeded())
        for a, b in zip(flow, dance, strict=True):
            close(a, b)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("T", [1, 2, 10, 50])
def test_flow_sde_first_step_for_any_schedule(T, shift):  # F3
    dx, dv, std = derivatives("Flow-SDE", pipeline_sigmas(T, shift))
    close(torch.stack([std[0], dx[0]]), [0.7, 1 - 0.7**2 / 2])


def test_first_step_without_sigma_second_takes_sigma_next():
    v, x = randn(2, 5), randn(2, 5, seed=1)
    with_second, without = (step("Flow-SDE", v, x, 1.0, 0.96, 0.7, **k) for k in ({"sigma_second": 0.96}, {}))
    assert torch.equal(with_second.mean, without.mean) and torch.equal(with_second.std, without.std)


@pytest.mark.parametrize("sigma", [1.0, 1 - 1e-7, 0.999])
def test_schedule_that_starts_below_1_has_the_same_first_step(sigma):
    second = 0.96
    taken = step("Flow-SDE", randn(2, 5), randn(2, 5, seed=1), sigma, second, 0.7, sigma_second=second)
    close(taken.std, 0.7 * math.sqrt(sigma * (sigma - second) / (1 - second)))
    assert taken.std < 0.7 + 1e-12  # without the rule 4.4 at 0.999, and without bound towards 1


@pytest.mark.parametrize("dynamics_type", DYNAMICS)
def test_sigma_second_has_no_effect_on_later_steps(dynamics_type):
    v, x = randn(2, 5), randn(2, 5, seed=1)
    for sigma, sigma_next in zip(SIGMAS[1:-1].tolist(), SIGMAS[2:].tolist(), strict=True):
        without, *others = (
            step(dynamics_type, v, x, sigma, sigma_next, 0.7, sigma_second=second, generator=seeded())
            for second in (None, SIGMAS[1].item(), 0.999)
        )
        assert all(torch.equal(without.mean, o.mean) and torch.equal(without.x_next, o.x_next) for o in others)


# ---- Marginals ----


@pytest.mark.parametrize(
    ("dynamics_type", "expected"),
    [
        ("Flow-SDE", [0.074, 0.027, 0.0118, 0.0055, 0.0027]),
        ("Dance-SDE", [0.046, 0.023, 0.0116, 0.0058, 0.0029]),
        ("ODE", [0.054, 0.027, 0.0137, 0.0069, 0.0034]),
    ],
)
def test_marginals_converge_like_1_over_T(dynamics_type, expected):  # F4, D2
    worst = []
    for T in (50, 100, 200, 400, 800):
        sigmas = torch.linspace(0.98, 0.02, T + 1, dtype=torch.float64)
        means, variances = propagate(*coefficients(dynamics_type, sigmas, 0.25), sigmas, 0.25)
        close(means, (1 - sigmas) * M)
        worst.append((variances / variance(sigmas, 0.25) - 1).abs().max().item())
    assert worst == pytest.approx(expected, rel=0.02)
    assert worst[3] / worst[4] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize(
    ("sde", "score", "mean", "var"),
    [
        ("Flow-SDE", by_noise, 0.70, 0.250),
        ("Flow-SDE", no_score, 0.70, 1.590),
        ("Flow-SDE", by_unscaled_image, 1.146, 0.337),
        ("Dance-SDE", by_image, 0.70, 0.249),
        ("Dance-SDE", no_score, 0.70, 0.320),
        ("Dance-SDE", by_unscaled_image, 0.954, 0.435),
    ],
)
def test_no_other_score_keeps_the_marginals(sde, score, mean, var):  # F4, D2, negative controls; the data's: 0.7, 0.25
    sigmas = shift_once(2000)
    law = coefficients(sde, sigmas, 0.25, score=score, sigma_second=sigmas[1])
    means, variances = propagate(*law, sigmas, 0.25)
    close(torch.stack([means[-1], variances[-1]]), [mean, var], 6e-4)


@pytest.mark.parametrize(
    ("dynamics_type", "T_10", "T_2000"),
    [("ODE", 0.137, 0.2493), ("Flow-SDE", 0.180, 0.2500), ("Dance-SDE", 0.148, 0.2494), ("CPS", 0.099, 0.1618)],
)
def test_terminal_variance_of_a_whole_rollout(dynamics_type, T_10, T_2000):  # the data's is 0.25
    for T, expected, decimals in ((10, T_10, 3), (2000, T_2000, 4)):
        sigmas = shift_once(T)
        _, variances = propagate(*coefficients(dynamics_type, sigmas, 0.25, sigma_second=sigmas[1]), sigmas, 0.25)
        assert variances[-1] == pytest.approx(expected, abs=0.6 * 10**-decimals)


@pytest.mark.parametrize("T", [3, 10, 50])
@pytest.mark.parametrize("noise_level", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("dynamics_type", DYNAMICS)
def test_point_data_keeps_its_signal_and_gains_known_noise(dynamics_type, noise_level, T):  # F5, C1
    sigmas = pipeline_sigmas(T)
    sigma, sigma_next, h = sigmas[:-1], sigmas[1:], -sigmas.diff()
    a, b, std = coefficients(dynamics_type, sigmas, 0.0, noise_level, sigma_second=sigmas[1])
    close(a * (1 - sigma) * M + b, (1 - sigma_next) * M)
    excess = std**2 * h / sigma + (std**2 / (2 * sigma)) ** 2 if dynamics_type in SDES else 0
    close((a * sigma) ** 2 + std**2, sigma_next**2 + excess)


@pytest.mark.parametrize(
    ("dynamics_type", "last_two"),
    [("Flow-SDE", [0.3223, 0.2279]), ("Dance-SDE", [0.2662, 0.1575]), ("CPS", [0.25, 0]), ("ODE", [0.25, 0])],
)
def test_noise_left_in_point_data_after_a_rollout(dynamics_type, last_two):  # the schedule's is 0.25, 0
    sigmas = shift_once(10)
    law = coefficients(dynamics_type, sigmas, 0.0, sigma_second=sigmas[1])
    close(propagate(*law, sigmas, 0.0)[1].sqrt()[-2:], last_two, 6e-5)


# ---- CPS ----


def test_cps_at_full_noise_forgets_x_given_x0():  # C2
    x0, sigma, sigma_next = randn(2, 5), 0.8, 0.6
    means = [step("CPS", (x - x0) / sigma, x, sigma, sigma_next, 1.0).mean for x in (randn(2, 5, seed=1), 3 * x0)]
    close(means[0], (1 - sigma_next) * x0)
    close(means[1], means[0])


@pytest.mark.parametrize("a", [0.0, 0.3, 0.8, 1.0])
def test_cps_kept_and_fresh_noise_add_up_to_the_schedules(a):  # C3
    dx, dv, std = derivatives("CPS", SIGMAS, a)
    kept = dx * SIGMAS[:-1] + dv  # x = σ ε and v = ε: no image
    close(kept**2 + std**2, SIGMAS[1:] ** 2)
    close(std, SIGMAS[1:] * math.sin(a * math.pi / 2))


@pytest.mark.parametrize("a", [0.3, 0.5, 0.8])
def test_cps_does_not_keep_the_marginals_at_any_number_of_steps(a):  # C4
    c = math.cos(a * math.pi / 2)
    sigmas = torch.linspace(1, 0, 8001, dtype=torch.float64)
    _, variances = propagate(*coefficients("CPS", sigmas, 0.25, a), sigmas, 0.25)
    q = variance(sigmas, 0.25)
    close((variances / q)[4000:], ((1 + c) / (2 - (1 - c) * sigmas**2 / q))[4000:], 0.004)
    assert variances[-1] / 0.25 == pytest.approx((1 + c) / 2, rel=0.004)


def test_cps_last_step_is_the_clean_image_with_a_finite_gradient():  # C5
    v, x = randn(2, 5).requires_grad_(), randn(2, 5, seed=1)
    last = step("CPS", v, x, 0.25, 0.0, 0.8)
    close(last.mean, x - 0.25 * v)
    assert last.std == 0 and last.log_prob is None and torch.equal(last.x_next, last.mean)
    mixed = step("CPS", v, x, torch.tensor([0.25, 0.5]), torch.tensor([0.0, 0.25]), 0.8, generator=seeded())
    assert mixed.log_prob[0] == 0 and mixed.log_prob[1] < 0
    (gradient,) = torch.autograd.grad(mixed.log_prob.sum(), v)
    assert gradient.isfinite().all() and (gradient[0] == 0).all() and (gradient[1] != 0).all()


# ---- Log-probability ----

SHAPES = [(3, 6, 4), (3, 4, 5, 2), (3, 4, 2, 3, 2)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sde", SDES)
def test_log_prob_is_the_normal_density_per_dimension(sde, shape):  # F6
    taken = step(sde, randn(*shape), randn(*shape, seed=1), 0.8, 0.7, 0.7, generator=seeded())
    assert taken.log_prob.shape == (3,)
    D = math.prod(shape[1:])
    close(taken.log_prob * D, Normal(taken.mean, taken.std).log_prob(taken.x_next).flatten(1).sum(1))


@pytest.mark.parametrize("shape", SHAPES)
def test_cps_log_prob_is_the_surrogate_of_the_authors(shape):  # C6
    v = randn(*shape).requires_grad_()
    taken = step("CPS", v, randn(*shape, seed=1), 0.8, 0.7, 0.8, generator=seeded())
    close(taken.log_prob, torch.stack([-((a - b) ** 2).mean() for a, b in zip(taken.x_next, taken.mean, strict=True)]))
    density = Normal(taken.mean, taken.std).log_prob(taken.x_next).flatten(1).mean(1)
    (surrogate,) = torch.autograd.grad(taken.log_prob.sum(), taken.mean, retain_graph=True)
    close(surrogate, 2 * taken.std**2 * torch.autograd.grad(density.sum(), taken.mean)[0])


@pytest.mark.parametrize("dynamics_type", RANDOM)
def test_gradient_reaches_v_through_the_mean_alone(dynamics_type):  # F6
    v, x = randn(2, 5).requires_grad_(), randn(2, 5, seed=1)
    drawn = step(dynamics_type, v, x, 0.8, 0.7, 0.7, generator=seeded())
    assert not drawn.x_next.requires_grad
    x_next = drawn.x_next.clone().requires_grad_()
    scored = step(dynamics_type, v, x, 0.8, 0.7, 0.7, x_next=x_next)
    to_mean = (x_next - scored.mean).detach() / 5 * (2 if dynamics_type == "CPS" else 1 / scored.std**2)
    (dv,) = torch.autograd.grad(scored.mean.sum(), v, retain_graph=True)
    to_v, to_x_next = torch.autograd.grad(scored.log_prob.sum(), (v, x_next), allow_unused=True)
    close(to_v, to_mean * dv)
    assert to_x_next is None
    assert torch.equal(torch.autograd.grad(drawn.log_prob.sum(), v)[0], to_v)


def test_log_prob_is_none_where_nothing_is_random():
    v, x = randn(2, 5), randn(2, 5, seed=1)
    assert step("ODE", v, x, 0.8, 0.7, 0.7).log_prob is None  # whatever the noise level
    assert step("ODE", v, x, 0.8, 0.7, 0.7, x_next=x).log_prob is None
    assert all(step(d, v, x, 0.8, 0.7, 0.0, x_next=x).log_prob is None for d in DYNAMICS)
    assert all(step(d, v, x, 0.8, 0.0, 0.7).log_prob is not None for d in SDES)


# ---- Dtypes ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dynamics_type", DYNAMICS)
def test_computes_in_float32_or_float64_and_stores_in_the_dtype_of_x(dynamics_type, dtype):
    wide = torch.promote_types(dtype, torch.float32)
    v, x = randn(2, 50, dtype=dtype), randn(2, 50, seed=1, dtype=dtype)
    taken = step(dynamics_type, v, x, 0.79, 0.71, 0.7, generator=seeded())
    reference = step(dynamics_type, v.to(wide), x.to(wide), 0.79, 0.71, 0.7, generator=seeded())
    assert taken.x_next.dtype == dtype and torch.equal(taken.x_next, reference.x_next.to(dtype))
    assert taken.mean.dtype == wide and torch.equal(taken.mean, reference.mean)
    assert taken.std.dtype == wide and (taken.log_prob is None or taken.log_prob.dtype == wide)


@pytest.mark.parametrize(
    ("v_dtype", "x_dtype", "computed"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float64),
    ],
)
def test_v_and_x_may_differ_in_dtype(v_dtype, x_dtype, computed):
    v, x = randn(2, 5, dtype=v_dtype), randn(2, 5, seed=1, dtype=x_dtype)
    taken = step("Flow-SDE", v, x, 0.8, 0.7, 0.7)
    assert (taken.x_next.dtype, taken.mean.dtype, taken.log_prob.dtype) == (x_dtype, computed, computed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dynamics_type", RANDOM)
def test_rounds_before_scoring(dynamics_type, dtype):
    v, x = randn(2, 50, dtype=dtype), randn(2, 50, seed=1, dtype=dtype)
    drawn = step(dynamics_type, v, x, 0.79, 0.71, 0.7, generator=seeded())
    again = step(dynamics_type, v, x, 0.79, 0.71, 0.7, x_next=drawn.x_next)
    assert torch.equal(again.log_prob, drawn.log_prob) and torch.equal(again.x_next, drawn.x_next)
    unrounded = step(dynamics_type, v.float(), x.float(), 0.79, 0.71, 0.7, generator=seeded())
    assert (unrounded.log_prob != drawn.log_prob).all()


# ---- Sigmas ----


@pytest.mark.parametrize("dynamics_type", DYNAMICS)
def test_sigmas_per_sample_agree_with_a_loop_over_samples(dynamics_type):
    steps = [0, 8, 4]  # the first step of the schedule among others
    v, x = randn(3, 4, 3, 2), randn(3, 4, 3, 2, seed=1)
    sigma, sigma_next = SIGMAS[steps], SIGMAS[[k + 1 for k in steps]]
    generators = [seeded(i) for i in range(3)]
    batch = step(dynamics_type, v, x, sigma, sigma_next, 0.7, sigma_second=SIGMAS[1], generator=generators)
    for i, k in enumerate(steps):
        sigmas = SIGMAS[k].item(), SIGMAS[k + 1].item()
        row = v[i : i + 1], x[i : i + 1]
        alone = step(dynamics_type, *row, *sigmas, 0.7, sigma_second=SIGMAS[1].item(), generator=seeded(i))
        close(batch.mean[i], alone.mean[0])
        close(batch.std.expand_as(x)[i], alone.std)
        close(batch.x_next[i], alone.x_next[0])
        assert alone.log_prob is batch.log_prob is None or batch.log_prob[i] == pytest.approx(alone.log_prob.item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dynamics_type", RANDOM)
def test_floats_scalar_tensors_and_batches_of_sigmas_agree(dynamics_type, dtype):
    v, x = randn(2, 4, 3, 2, dtype=dtype), randn(2, 4, 3, 2, seed=1, dtype=dtype)
    for sigmas in ((1.0, 0.75, 0.75), (0.5, 0.25, 0.75)):
        scalar, *others = (
            step(dynamics_type, v, x, sigma, sigma_next, 0.7, sigma_second=second, generator=seeded())
            for sigma, sigma_next, second in (
                sigmas,
                torch.tensor(sigmas),
                torch.tensor(sigmas)[:, None].expand(3, 2),
                (torch.tensor([sigmas[0]] * 2), sigmas[1], torch.tensor(sigmas[2])),
            )
        )
        assert scalar.std.shape == () and others[1].std.shape == (2, 1, 1, 1)
        for other in others:
            assert torch.equal(other.x_next, scalar.x_next) and torch.equal(other.mean, scalar.mean)
            assert torch.equal(other.log_prob, scalar.log_prob) and (other.std == scalar.std).all()


# ---- Noise ----


@pytest.mark.parametrize("dynamics_type", RANDOM)
def test_noise_is_standard_normal_times_std(dynamics_type):
    v, x = randn(32, 4096), randn(32, 4096, seed=1)
    taken = step(dynamics_type, v, x, 0.8, 0.7, 0.7, generator=seeded())
    z = (taken.x_next - taken.mean) / taken.std
    n = z.numel()
    assert abs(z.mean()) < 4 / n**0.5 and abs(z.std() - 1) < 4 / (2 * n) ** 0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert (torch.corrcoef(z) - torch.eye(32)).abs().max() < 6 / 4096**0.5  # samples do not share it


@pytest.mark.parametrize("dynamics_type", RANDOM)
def test_equal_generators_reproduce(dynamics_type):
    v, x = randn(2, 5), randn(2, 5, seed=1)
    first, again, other = (step(dynamics_type, v, x, 0.8, 0.7, 0.7, generator=seeded(s)).x_next for s in (3, 3, 4))
    assert torch.equal(first, again) and (first != other).all()


def test_one_generator_per_sample_makes_noise_independent_of_the_batch():
    v, x = randn(3, 4, 2), randn(3, 4, 2, seed=1)
    batch = step("Flow-SDE", v, x, 0.8, 0.7, 0.7, generator=[seeded(i) for i in range(3)])
    for rows in ([1], [2, 0]):
        part = step("Flow-SDE", v[rows], x[rows], 0.8, 0.7, 0.7, generator=[seeded(i) for i in rows])
        assert torch.equal(part.x_next, batch.x_next[rows])
    with pytest.raises(ValueError):
        step("Flow-SDE", v, x, 0.8, 0.7, 0.7, generator=[seeded(), seeded()])


def test_draws_only_where_noise_is_needed():
    v, x, generator = randn(2, 5), randn(2, 5, seed=1), seeded()
    for dynamics_type in RANDOM:
        step(dynamics_type, v, x, 0.8, 0.7, 0.7, x_next=x, generator=generator)
        step(dynamics_type, v, x, 0.8, 0.7, 0.0, generator=generator)
    step("ODE", v, x, 0.8, 0.7, 0.7, generator=generator)
    assert torch.equal(generator.get_state(), seeded().get_state())


# ---- Whole schedules ----


def test_ode_is_bitwise_the_step_of_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    x = randn(2, 4, 8, 8, dtype=torch.float32)
    for k, t in enumerate(scheduler.timesteps):
        v = randn(2, 4, 8, 8, seed=k, dtype=torch.float32)
        ours = step("ODE", v, x, scheduler.sigmas[k].item(), scheduler.sigmas[k + 1].item(), 0.0)
        x = scheduler.step(v, t, x, return_dict=False)[0]
        assert torch.equal(ours.x_next, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("noise_level", [0.0, 1e-3, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("dynamics_type", DYNAMICS)
def test_everything_is_finite_over_whole_schedules(dynamics_type, noise_level, dtype):
    below_1 = torch.cat([torch.tensor([0.999]), SIGMAS[1:]])
    for sigmas in (SIGMAS, below_1, pipeline_sigmas(1)):
        x, sigmas = randn(2, 8, dtype=dtype), sigmas.tolist()
        for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
            v = velocity(x, sigma, 0.25).requires_grad_()
            taken = step(dynamics_type, v, x, sigma, sigma_next, noise_level, sigma_second=sigmas[1])
            assert taken.x_next.isfinite().all() and taken.mean.isfinite().all() and taken.std.isfinite().all()
            if taken.log_prob is not None:
                assert taken.log_prob.isfinite().all()
                assert torch.autograd.grad(taken.log_prob.sum(), v)[0].isfinite().all()
            x = taken.x_next


@pytest.mark.parametrize("name", ["ode", "SDE", "", None])
def test_unknown_dynamics_are_refused_by_name(name):
    with pytest.raises(ValueError, match="Flow-SDE, Dance-SDE, CPS, ODE"):
        step(name, randn(2, 5), randn(2, 5), 0.8, 0.7, 0.7)


# ---- DPM-Solver++ ----


def exact(x, sigma, sigma_next, var):
    """The flow of the Gaussian world: (x − (1 − σ) M) / √q does not change along the ODE."""
    z = (x - (1 - sigma) * M) / variance(sigma, var) ** 0.5
    return (1 - sigma_next) * M + z * variance(sigma_next, var) ** 0.5


def error(solver, sigmas, var):
    """Of x at the end of a schedule, where x was M + 2 √q at its start, over that 2."""
    start = (1 - sigmas[0]) * M + 2 * variance(sigmas[0], var).sqrt().reshape(1, 1)
    x, last = start, (None, None)
    for sigma, sigma_next in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        v = velocity(x, sigma, var)
        if solver == "Euler":
            x = step("ODE", v, x, sigma, sigma_next, 0.0).x_next
        else:
            x, x0 = dpm_step(v, x, sigma, sigma_next, *last)
            last = (sigma, x0)
    return (x - exact(start, sigmas[0], sigmas[-1], var)).item() / 2


def even_lambda(T):
    return torch.sigmoid(torch.linspace(4, -4, T + 1, dtype=torch.float64))


@pytest.mark.parametrize("var", [0.04, 0.25, 1.0])
@pytest.mark.parametrize(("solver", "order"), [("DPM-Solver++", 2), ("Euler", 1)])
def test_order_of_convergence(solver, order, var):  # M6
    coarse, fine = (error(solver, even_lambda(T), var) for T in (320, 640))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.01)


@pytest.mark.parametrize(("first", "last"), [(1.0, 0.02), (0.98, 0.0), (1.0, 0.0)])
@pytest.mark.parametrize("var", [0.04, 0.25, 1.0])
def test_error_of_the_ends_where_lambda_is_infinite(first, last, var):  # M6
    """There a step has a length in λ that does not shrink with h: j steps from an end the error is C h² / j.

    Its sum over the steps is C h² log T: of second order but for the logarithm. To leading order C follows from x0' at
    σ = 1 and x0'' at σ = 0. For x one √q above its mean it is −var √q / 2 from one end and 3 / (4 √var) from the other.
    """
    schedules = (torch.linspace(first, last, T + 1, dtype=torch.float64) for T in (1280, 2560, 5120))
    a, b, c = (error("DPM-Solver++", sigmas, var) / (sigmas[0] - sigmas[1]).item() ** 2 for sigmas in schedules)
    C = ((2 * c - b) - (2 * b - a)) / math.log(2)  # the differences cancel h², the brackets h³
    from_noise = -var / 2 * variance(last, var) ** 0.5 * (first == 1)
    to_image = 0.75 / var**0.5 * (last == 0)
    assert pytest.approx(from_noise + to_image, rel=0.01, abs=5e-4) == C


@pytest.mark.parametrize(("sigma", "sigma_next"), [(1.0, 0.96), (0.6, 0.4), (0.25, 0.0), (1.0, 0.0)])
def test_dpm_step_without_a_past_is_euler(sigma, sigma_next):
    v, x = randn(2, 5), randn(2, 5, seed=1)
    x_next, x0 = dpm_step(v, x, sigma, sigma_next)
    close(x_next, step("ODE", v, x, sigma, sigma_next, 0.0).mean)
    close(x0, x - sigma * v)
    assert sigma_next > 0 or torch.equal(x_next, x0)


@pytest.mark.parametrize(
    "sigmas", [(1.0, 0.9, 0.8), (0.6, 0.4, 0.0), (1.0, 0.5, 0.0), (1.0, 1.0, 0.9), (0.5, 0.5, 0.4)]
)
def test_dpm_step_is_of_first_order_where_lambda_is_infinite(sigmas):  # M5; also after a step of no length
    is_of_first_order(sigmas)


def test_dpm_step_is_of_first_order_where_it_is_much_longer_than_the_last():
    for T in (4, 5, 10, 20, 40):
        *_, last, sigma, sigma_next, _ = pipeline_sigmas(T).tolist()  # SD3's, whose second to last sigma is 0.009
        is_of_first_order((last, sigma, sigma_next))


def is_of_first_order(sigmas):
    v, x, past = (randn(2, 5, seed=seed) for seed in range(3))
    last, sigma, sigma_next = sigmas
    close(dpm_step(v, x, sigma, sigma_next, last, past)[0], x - (sigma - sigma_next) * v)


def test_dpm_step_looks_half_a_step_ahead():
    sigma, sigma_next, last = 0.6, 0.4, 0.7
    v, x, past = (randn(2, 5, seed=seed) for seed in range(3))
    lambda_last, lambda_, lambda_next = (math.log((1 - s) / s) for s in (last, sigma, sigma_next))
    x0 = x - sigma * v
    ahead = past + (x0 - past) * ((lambda_ + lambda_next) / 2 - lambda_last) / (lambda_ - lambda_last)
    x_next, now = dpm_step(v, x, sigma, sigma_next, last, past)
    close(x_next, sigma_next / sigma * x - (1 - sigma_next) * math.expm1(lambda_ - lambda_next) * ahead)
    assert torch.equal(now, x0)


@pytest.mark.parametrize("T", [1, 2, 10, 20])
@pytest.mark.parametrize("first", [1.0, 0.999])
def test_dpm_step_is_that_of_diffusers(T, first):
    scheduler = DPMSolverMultistepScheduler(
        solver_order=2, solver_type="midpoint", algorithm_type="dpmsolver++", lower_order_final=True,
        prediction_type="flow_prediction", use_flow_sigmas=True, final_sigmas_type="zero",
    )  # fmt: skip
    scheduler.set_timesteps(T)
    sigmas = torch.cat([torch.tensor([first]), shift_once(T)[1:].float()])
    scheduler.sigmas, scheduler.timesteps = sigmas, 1000 * sigmas[:-1]
    x, last = randn(2, 4, 8, 8, dtype=torch.float32), (None, None)
    for k, t in enumerate(scheduler.timesteps):
        v = randn(2, 4, 8, 8, seed=k, dtype=torch.float32)
        ours, x0 = dpm_step(v, x, sigmas[k], sigmas[k + 1], *last)
        x, last = scheduler.step(v, t, x, return_dict=False)[0], (sigmas[k], x0)
        close(ours, x, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_shapes_of_dpm_step(dtype):
    wide = torch.promote_types(dtype, torch.float32)
    v, x, past = (randn(3, 4, 2, seed=seed, dtype=dtype) for seed in range(3))
    sigmas = torch.tensor([[1.0, 0.8, 0.6], [0.6, 0.5, 0.0], [0.7, 0.6, 0.5]])  # sigma_last, sigma, sigma_next
    batch, x0 = dpm_step(v, x, sigmas[:, 1], sigmas[:, 2], sigmas[:, 0], past)
    assert batch.dtype == dtype and x0.dtype == wide and batch.isfinite().all()
    for i, (last, sigma, sigma_next) in enumerate(sigmas.tolist()):
        row = (t[i : i + 1].to(wide) for t in (v, x))
        alone, _ = dpm_step(*row, sigma, sigma_next, last, past[i : i + 1])
        close(batch[i], alone[0].to(dtype), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dpm_step_is_finite_over_whole_schedules(dtype):  # M5
    for sigmas in (SIGMAS, shift_once(10), pipeline_sigmas(1), pipeline_sigmas(2)):
        x, last = randn(2, 8, dtype=dtype), (None, None)
        for sigma, sigma_next in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
            x, x0 = dpm_step(velocity(x, sigma, 0.25), x, sigma, sigma_next, *last)
            last = (sigma, x0)
            assert x.isfinite().all()
        assert torch.equal(x, x0.to(dtype))


# ---- Noise-aware weights of TempFlow-GRPO ----


def test_noise_aware_weights_average_to_1():  # T1
    _, _, std = derivatives("Flow-SDE", SIGMAS)
    std = std[:9]  # the trained steps
    assert 1 / std.mean() == pytest.approx(2.2522, abs=1e-4)
    weights = std / std.mean()
    assert weights.mean() == pytest.approx(1)
    close(weights, [1.577, 1.673, 1.208, 1.004, 0.882, 0.795, 0.719, 0.635, 0.508], 6e-4)


def test_noise_aware_weights_leave_h_in_the_gradient():  # T4
    v, x, z = (randn(9, 5, seed=seed) for seed in range(3))
    sigma, sigma_next, second, v = SIGMAS[:9], SIGMAS[1:10], SIGMAS[1], v.requires_grad_()
    old = step("Flow-SDE", v.detach(), x, sigma, sigma_next, 0.7, sigma_second=second)
    taken = step("Flow-SDE", v, x, sigma, sigma_next, 0.7, sigma_second=second, x_next=old.mean + old.std * z)
    weights = (taken.std / taken.std.mean())[:, 0]
    (gradient,) = torch.autograd.grad((weights * taken.log_prob).sum(), v)
    scale = gradient / (-z / (5 * taken.std.mean()))
    factor = torch.tensor([1.0] + [1 + 0.7**2 / 2] * 8, dtype=torch.float64)
    close(scale, ((sigma - sigma_next) * factor)[:, None].expand(9, 5))
