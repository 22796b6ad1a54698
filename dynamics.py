"""One step of sampling a rectified flow, four ways: Flow-SDE, Dance-SDE, CPS and ODE; and a faster way for the ODE.

Pure functions of tensors: no model, no schedule, no state. A rule of your own is a function like `dance_sde`, given to
`step` in place of a name; an entry in RULES makes it a name. All of them share these names.

    name         symbol        shape            meaning
    sigma        σ             float or (B,)    noise level now, from 1 (noise) down to 0 (image)
    sigma_next   σ'            float or (B,)    noise level after the step, σ' < σ
    h            σ − σ'        float or (B,)    length of the step, positive
    x            x_σ           (B, ...)         latents, x_σ = (1 − σ) x0 + σ ε
    v            v             (B, ...)         velocity ε − x0 as the network predicts it, guidance included
    x0           x̂0 = x − σ v         (B, ...)  what the network takes for the clean latents
    x1           x̂1 = x + (1 − σ) v   (B, ...)  what it takes for the noise; the score is −x̂1 / σ
    g            g             as sigma         diffusion coefficient of the SDE
    mean, std    μ, τ          (B, ...), ()     x' ~ N(μ, τ² I); τ is the std of the whole transition, √h included
    noise_level  a or η        float            0 is deterministic; 0.7 Flow-SDE, 0.3 Dance-SDE, 0.8 CPS are usual

Flow-SDE and Dance-SDE discretise one SDE, dx = [v − g²/2 · score] dt + g dw run from σ = 1 to 0, with two choices
of g. CPS leaves the amounts of image and noise in x' exactly those of the schedule, but for data that is not a
point it does not keep the marginals of the flow, at any number of steps (`tests/test_dynamics.py` measures it).

Papers: Flow-GRPO arXiv 2505.05470; DanceGRPO arXiv 2505.07818; CPS arXiv 2509.05952; DPM-Solver++ arXiv 2211.01095.
"""

import math
from typing import NamedTuple, Optional

import torch

SOLVERS = ("Euler", "DPM-Solver++")


class Step(NamedTuple):
    """One transition x -> x_next."""

    x_next: torch.Tensor
    """(B, ...) in the dtype of x."""
    log_prob: Optional[torch.Tensor]
    """(B,), the mean over all other dimensions, of x_next under N(mean, std²); None where nothing is random."""
    mean: torch.Tensor
    """(B, ...) in the dtype of the computation; carries the gradient to v."""
    std: torch.Tensor
    """Standard deviation of the whole transition, broadcastable to x: 0-dimensional, or (B, 1, ...) for (B,) sigmas."""


# The rules: (v, x, sigma, sigma_next, noise_level, sigma_second) -> (mean, std), on tensors in one dtype that broadcast


def flow_sde(v, x, sigma, sigma_next, noise_level, sigma_second):
    """g = a √(σ / (1 − σ)), arXiv 2505.05470, is infinite at σ = 1.

    So in the first step, the one with σ > sigma_second, the schedule's second sigma stands in for σ in the denominator
    (the released code of Flow-GRPO; the paper is silent). A schedule that starts at 0.999 is treated alike.
    """
    g = noise_level * torch.sqrt(sigma / (1 - torch.minimum(sigma, sigma_second)))
    return _euler_maruyama(v, x, sigma, sigma - sigma_next, g)


def dance_sde(v, x, sigma, sigma_next, noise_level, sigma_second):
    """g = η, arXiv 2505.07818."""
    g = noise_level * torch.ones_like(sigma)
    return _euler_maruyama(v, x, sigma, sigma - sigma_next, g)


def cps(v, x, sigma, sigma_next, noise_level, sigma_second):
    """τ = σ' sin(aπ/2), μ = (1 − σ') x̂0 + √(σ'² − τ²) x̂1, arXiv 2509.05952: fresh noise replaces a part of x̂1."""
    x0, x1 = x - sigma * v, x + (1 - sigma) * v
    kept = sigma_next * math.cos(noise_level * math.pi / 2)  # √(σ'² − τ²)
    return (1 - sigma_next) * x0 + kept * x1, sigma_next * math.sin(noise_level * math.pi / 2)


def ode(v, x, sigma, sigma_next, noise_level, sigma_second):
    """μ = x − h v, τ = 0: Euler's step, at any noise level."""
    h = sigma - sigma_next
    return x - h * v, torch.zeros_like(h)


def _euler_maruyama(v, x, sigma, h, g):
    """μ = x − h (v + g²/2σ · x̂1), gathered by x and v, and τ = g √h."""
    mean = x * (1 - g**2 * h / (2 * sigma)) - h * v * (1 + g**2 * (1 - sigma) / (2 * sigma))
    return mean, g * torch.sqrt(h)


RULES = {"Flow-SDE": flow_sde, "Dance-SDE": dance_sde, "CPS": cps, "ODE": ode}
DYNAMICS = tuple(RULES)


def step(
    dynamics_type, v, x, sigma, sigma_next, noise_level, *, sigma_second=None, x_next=None, generator=None
) -> Step:
    """Take one step from sigma to sigma_next, or score a step already taken.

    dynamics_type: a name of DYNAMICS, or a rule: any function like the four above. Anything else raises ValueError.
    v, x: (B, ...) of any float dtype. Everything is computed in float32 (in float64 if either is float64).
    sigma, sigma_next, sigma_second: a float, a scalar tensor or a (B,) tensor, with 1 >= sigma > sigma_next >= 0.
    sigma_second: the second sigma of the schedule (see `flow_sde`); left out, it is sigma_next wherever sigma is 1.
    x_next: (B, ...) the step that was taken; drawn if None, and rounded to x's dtype, as it is stored, before scoring.
    generator: a torch.Generator, or a list of B of them on the CPU, one per sample.
    """
    if not callable(dynamics_type) and dynamics_type not in DYNAMICS:
        raise ValueError(f"dynamics_type {dynamics_type!r} is not one of {', '.join(DYNAMICS)}, nor a function")
    rule = dynamics_type if callable(dynamics_type) else RULES[dynamics_type]
    dtype = torch.promote_types(torch.promote_types(v.dtype, x.dtype), torch.float32)
    storage = x.dtype
    v, x = v.to(dtype), x.to(dtype)
    sigma, sigma_next = _like(sigma, x), _like(sigma_next, x)
    sigma_second = torch.where(sigma < 1, sigma, sigma_next) if sigma_second is None else _like(sigma_second, x)

    mean, std = rule(v, x, sigma, sigma_next, noise_level, sigma_second)
    std = torch.as_tensor(std, dtype=dtype)  # a number will do
    # a std of (B,) would run along the last dimension of x
    fits = std.ndim == 0 or (std.ndim == x.ndim and all(n in (1, of) for n, of in zip(std.shape, x.shape, strict=True)))
    if mean.shape != x.shape or not fits:
        given = f"mean {tuple(mean.shape)} and std {tuple(std.shape)} for x {tuple(x.shape)}"
        raise ValueError(f"{rule} returned {given}; mean must have x's shape, std be 0-dimensional or (B, 1, ...)")
    if not (std >= 0).all():
        raise ValueError(f"{rule} returned a std that is negative or no number")
    random = bool((std > 0).any())
    if x_next is None:
        drawn = mean + std * _randn(x, generator) if random else mean
        x_next = drawn.detach().to(storage)
    log_prob = _log_prob(rule, x_next.detach().to(dtype), mean, std) if random else None
    return Step(x_next, log_prob, mean, std)


def dpm_step(v, x, sigma, sigma_next, sigma_last=None, x0_last=None):
    """Take one step of the ODE by DPM-Solver++(2M), which is of second order and calls the network once, as Euler does.

    sigma_last, x0_last: the sigma and the x0 (B, ...) of the step before; without them the step is of first order.
    Dtypes and shapes are those of `step`. Returns (x_next in the dtype of x, x0 for the next step).

    With λ = log((1 − σ) / σ) the exact flow is x' = σ'/σ x + σ' ∫ e^λ x0 dλ, from λ to λ'. A constant x0 makes that
    x' = σ'/σ x + (1 − σ'/σ) x0, which is Euler's step and finite at every σ. The second order takes x0 from half a
    step ahead in λ, on the line through the last two (arXiv 2211.01095 with α = 1 − σ). With an infinite λ the step is
    of first order: to σ' = 0, and the first two from σ = 1 (as in MixGRPO-Flash, arXiv 2507.21802). So it is, unlike
    there, if it is more than twice as long in λ as the last one, where the line would lead too far: no even schedule
    has such a step, whatever its shift, but diffusers' for SD3 jumps from 0.278 (at T = 10) to 0.009.
    """
    dtype = torch.promote_types(torch.promote_types(v.dtype, x.dtype), torch.float32)
    storage = x.dtype
    v, x = v.to(dtype), x.to(dtype)
    sigma, sigma_next = _like(sigma, x), _like(sigma_next, x)
    x0 = ahead = x - sigma * v
    if x0_last is not None:
        last, now, after = (torch.logit(s) for s in (_like(sigma_last, x), sigma, sigma_next))  # −λ
        half = (after - now) / (2 * (now - last))  # half of this step, in units of the last
        ahead = x0 + torch.where(half.abs() <= 1, half, 0) * (x0 - x0_last)
    return (ahead + sigma_next / sigma * (x - ahead)).to(storage), x0


def _log_prob(rule, x_next, mean, std):
    """(B,): the mean over the latent dimensions D of log N(x_next; mean, std²), that is, log p(x_next) / D.

    For `cps` alone it is the surrogate −(x_next − mean)² of the authors and of every implementation: 1/(2 std²) is
    dropped although it differs from step to step, which weights step i by 2 std_i² against the true density.
    """
    log_density = -((x_next - mean) ** 2)
    if rule is not cps:
        log_density = log_density / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return log_density.flatten(1).mean(dim=1)


def _like(sigma, x):
    """A noise level in x's dtype: a scalar stays 0-dimensional, (B,) becomes (B, 1, ...) on x's device."""
    sigma = torch.as_tensor(sigma, dtype=x.dtype)
    return sigma if sigma.ndim == 0 else sigma.to(x.device).reshape(-1, *[1] * (x.ndim - 1))


def _randn(x, generator):
    """Standard normal noise of x's shape. One generator per sample makes a sample's noise independent of its batch."""
    if isinstance(generator, list):
        noise = [torch.randn(row.shape, generator=g, dtype=x.dtype) for row, g in zip(x, generator, strict=True)]
        noise = torch.stack(noise)  # one copy: many would each wait for the device
        return (noise.pin_memory() if x.is_cuda else noise).to(x.device, non_blocking=x.is_cuda)  # pinned, none waits
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)
