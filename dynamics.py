"""One step of sampling a rectified flow, four ways: Flow-SDE, Dance-SDE, CPS and ODE; and a faster way for the ODE.

Pure functions of tensors: no model, no schedule, no state. All of them share these names.

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

DYNAMICS = ("Flow-SDE", "Dance-SDE", "CPS", "ODE")
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


def step(
    dynamics_type,
    v,
    x,
    sigma,
    sigma_next,
    noise_level,
    *,
    sigma_second=None,
    x_next=None,
    generator=None,
) -> Step:
    """Take one step from sigma to sigma_next, or score a step already taken.

    v, x: (B, ...) of any float dtype. Everything is computed in float32 (in float64 if either is float64).
    sigma, sigma_next, sigma_second: a float, a scalar tensor or a (B,) tensor, with 1 >= sigma > sigma_next >= 0.
    sigma_second: the second sigma of the schedule. Flow-SDE's g is infinite at sigma = 1, so in the first step, and
        only there, it stands in for sigma in the denominator (the released code of Flow-GRPO; the paper is silent).
        The first step is the one with sigma > sigma_second, so a schedule that starts at 0.999 is treated alike.
        Left out, it is sigma_next wherever sigma is 1.
    x_next: (B, ...) the step that was taken; drawn if None, and then rounded to x's dtype before it is scored, so
        that what is stored is what was scored.
    generator: a torch.Generator, or a list of B of them on the CPU, one per sample.

    Raises ValueError for an unknown dynamics_type.
    """
    if dynamics_type not in DYNAMICS:
        raise ValueError(f"dynamics_type {dynamics_type!r} is not one of {', '.join(DYNAMICS)}")
    dtype = torch.promote_types(torch.promote_types(v.dtype, x.dtype), torch.float32)
    storage = x.dtype
    v, x = v.to(dtype), x.to(dtype)
    sigma, sigma_next = _like(sigma, x), _like(sigma_next, x)
    sigma_second = torch.where(sigma < 1, sigma, sigma_next) if sigma_second is None else _like(sigma_second, x)
    h = sigma - sigma_next

    if dynamics_type == "CPS":  # arXiv 2509.05952: split the noise σ' x̂1 into a kept part and a fresh part
        std = sigma_next * math.sin(noise_level * math.pi / 2)
        kept = sigma_next * math.cos(noise_level * math.pi / 2)  # √(σ'² − τ²)
        mean = (1 - sigma_next) * (x - sigma * v) + kept * (x + (1 - sigma) * v)
    else:
        if dynamics_type == "Flow-SDE":  # arXiv 2505.05470: g = a √(σ / (1 − σ))
            g = noise_level * torch.sqrt(sigma / (1 - torch.minimum(sigma, sigma_second)))
        elif dynamics_type == "Dance-SDE":  # arXiv 2505.07818: g = η
            g = noise_level * torch.ones_like(sigma)
        else:
            g = torch.zeros_like(sigma)
        std = g * torch.sqrt(h)
        # Euler-Maruyama, μ = x − h (v + g²/2σ · x̂1), gathered by x and v
        mean = x * (1 - g**2 * h / (2 * sigma)) - h * v * (1 + g**2 * (1 - sigma) / (2 * sigma))

    random = dynamics_type != "ODE" and bool((std > 0).any())
    if x_next is None:
        x_next = mean.detach()
        if random:
            x_next = x_next + std * _randn(x, generator)
        x_next = x_next.to(storage)
    log_prob = _log_prob(dynamics_type, x_next.detach().to(dtype), mean, std) if random else None
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


def _log_prob(dynamics_type, x_next, mean, std):
    """(B,): the mean over the latent dimensions D of log N(x_next; mean, std²), that is, log p(x_next) / D.

    For CPS it is the surrogate −(x_next − mean)² of the authors and of every implementation: 1/(2 std²) is dropped
    although it differs from step to step, which weights step i by 2 std_i² against the true density.
    """
    if dynamics_type == "CPS":
        log_density = -((x_next - mean) ** 2)
    else:
        log_density = -((x_next - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
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
