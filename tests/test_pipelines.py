"""The tape on every family of pipelines: a replay is the rollout again, bit by bit, and nothing is left behind.

The core families run by default, the others with `-m families`.
"""

import copy
import functools

import peft
import pytest
import tiny_pipelines
import torch

import common

torch.set_num_threads(1)


def lora(pipe, targets="all-linear", rank=4, alpha=6):
    """Adapters on the denoisers, float32, with a B that is not zero."""
    generator = torch.Generator().manual_seed(2)
    parameters = []
    for denoiser in common.denoisers(pipe):
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
        if hasattr(denoiser, "add_adapter"):
            denoiser.add_adapter(config)
        else:
            peft.inject_adapter_in_model(config, denoiser)
        for name, p in denoiser.named_parameters():
            if p.requires_grad:
                p.data = p.data.float()
                if "lora_B" in name:
                    p.data.normal_(0, 0.3, generator=generator)
                parameters.append(p)
    return parameters


def noise(*seeds):
    return common.generators(*((seed, i) for seed in seeds for i in range(2)))


@functools.lru_cache(1)  # the tests of one family and dtype follow each other
def taped(family, dtype):
    torch.manual_seed(0)
    pipe, call = tiny_pipelines.FAMILIES[family]()
    pipe.to(dtype)
    common.use_flow_matching(pipe)
    parameters = lora(pipe)
    with torch.no_grad(), common.autocast(pipe):
        plain = pipe(**copy.deepcopy(call), generator=noise(0), output_type="pt", return_dict=False)[0]
    before = traces(pipe)
    steps = range(call["num_inference_steps"] - 1)
    rollout = common.rollout(pipe, call | {"generator": noise(0)}, "Flow-SDE", 0.7, steps, noise(1))
    return pipe, call, parameters, plain, before, rollout


def traces(pipe):
    """What a rollout or a replay could leave behind on a pipeline."""
    denoisers = common.denoisers(pipe)
    return {
        "scheduler": pipe.scheduler,
        "scheduler class": type(pipe.scheduler),
        "scheduler config": dict(pipe.scheduler.config),
        "pipeline config": copy.deepcopy(dict(pipe.config)),
        "pipeline attributes": {key for key in vars(pipe) if not key.startswith("_")},
        "denoiser classes": [type(denoiser) for denoiser in denoisers],
        "denoiser attributes": [set(vars(denoiser)) for denoiser in denoisers],
    }


def pytest_generate_tests(metafunc):
    """The families beside the core ones take part when the marker is asked for."""
    if "family" in metafunc.fixturenames:
        others = [name for name in tiny_pipelines.FAMILIES if name not in tiny_pipelines.CORE]
        marked = [pytest.param(name, marks=pytest.mark.families) for name in others]
        asked = "families" in metafunc.config.option.markexpr
        metafunc.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"], scope="module")
        metafunc.parametrize("family", [*tiny_pipelines.CORE, *(marked if asked else ())], scope="module")


def test_replay_is_the_rollout(family, dtype):
    pipe, call, parameters, plain, before, rollout = taped(family, dtype)
    assert len(rollout.steps) == 3 and rollout.images.isfinite().all()
    for k, taken in rollout.steps.items():
        velocity, step = common.replay(pipe, rollout, k)
        assert torch.equal(velocity, taken.velocity), f"velocity of step {k}"
        assert torch.equal(step.log_prob, taken.log_prob), f"log-prob of step {k}"
        assert taken.log_prob.shape == (2,) and taken.velocity.std() > 0


def test_gradients_reach_the_adapters(family, dtype):
    pipe, call, parameters, plain, before, rollout = taped(family, dtype)
    for k in rollout.steps:
        _, step = common.replay(pipe, rollout, k)
        gradients = torch.autograd.grad(step.log_prob.sum(), parameters, allow_unused=True)
        assert sum(g.float().square().sum() for g in gradients if g is not None) > 0, f"step {k}"


def test_ode_is_the_plain_pipeline(family, dtype):
    pipe, call, parameters, plain, before, rollout = taped(family, dtype)
    ode = common.rollout(pipe, call | {"generator": noise(0)}, "ODE", 0.0, ())
    assert torch.equal(ode.images, plain)
    assert not torch.equal(ode.images, rollout.images)


def test_nothing_is_left_behind(family, dtype):
    pipe, call, parameters, plain, before, rollout = taped(family, dtype)
    common.replay(pipe, rollout, 1)
    assert traces(pipe) == before


def test_replay_at_other_latents(family, dtype):
    pipe, call, parameters, plain, before, rollout = taped(family, dtype)
    for k, taken in rollout.steps.items():
        other = taken.x + 0.1 * torch.randn(taken.x.shape, generator=torch.Generator().manual_seed(3)).to(taken.x)
        velocity, step = common.replay(pipe, rollout, k, other)
        same, _ = common.replay(pipe, rollout, k, taken.x)
        assert step is None and velocity.shape == taken.velocity.shape and velocity.requires_grad
        assert not torch.equal(velocity, taken.velocity), f"step {k} does not depend on x"
        assert torch.equal(same, taken.velocity), f"step {k}"
