"""The tape where pictures are given: control, editing, inpainting, image-to-image, image-to-video.

A few pipelines run by default, the others with `-m families`.
"""

import copy
import functools
import gc
import weakref
from types import SimpleNamespace

import conditioned_pipelines as conditioned
import pytest
import tiny_pipelines
import torch
from conditioned_pipelines import BARE, CONDITIONED, CORE, GIVEN, LTX
from PIL import ImageOps
from test_pipelines import lora

import common
from harness.flow_models import use_flow_matching


def noise(seed, call):
    return common.generators(*((seed, i) for i in range(len(call["prompt"]))))


def fresh(family):
    torch.manual_seed(0)
    pipe, call = CONDITIONED[family]()
    use_flow_matching(pipe)
    return pipe, call


def sample(pipe, call, dynamics_type="Flow-SDE", noise_level=0.7, steps=(), **more):
    torch.manual_seed(5)  # SD3's ControlNet and CogView4 draw from the global generator
    start = call | {"generator": noise(0, call)}
    return common.rollout(pipe, start, dynamics_type, noise_level, steps, noise(1, call), texts={}, **more)


@functools.lru_cache(1)  # the tests of one pipeline and dtype follow each other
def taped(family, dtype):
    pipe, call = fresh(family)
    pipe.to(dtype)
    parameters = lora(pipe)
    with torch.no_grad(), common.autocast(pipe):
        torch.manual_seed(5)
        plain = pipe(**copy.deepcopy(call), generator=noise(0, call), output_type="pt", return_dict=False)[0]
    ode = sample(pipe, call, "ODE")
    return pipe, call, parameters, plain, ode, sample(pipe, call, steps=range(len(ode.sigmas) - 2))


def pytest_generate_tests(metafunc):
    if "family" in metafunc.fixturenames:
        marked = [pytest.param(name, marks=pytest.mark.families) for name in CONDITIONED if name not in CORE]
        asked = "families" in metafunc.config.option.markexpr
        metafunc.parametrize("family", [*CORE, *(marked if asked else ())], scope="module")
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"], scope="module")


def test_replay_is_the_rollout(family, dtype):
    pipe, call, parameters, plain, ode, tape = taped(family, dtype)
    assert len(tape.steps) == (2 if call.get("strength", 1) < 1 else 3) and tape.images.isfinite().all()
    for k, taken in tape.steps.items():
        velocity, step = common.replay(pipe, tape, k)
        assert torch.equal(velocity, taken.velocity) and torch.equal(step.log_prob, taken.log_prob), f"step {k}"
        assert step.log_prob.shape == (len(call["prompt"]),) and velocity.std() > 0
        gradients = torch.autograd.grad(step.log_prob.sum(), parameters, allow_unused=True)
        assert sum(g.square().sum() for g in gradients if g is not None) > 0, f"step {k}"


def test_without_noise_it_is_the_plain_pipeline(family, dtype):
    pipe, call, parameters, plain, ode, tape = taped(family, dtype)
    assert torch.equal(ode.images, plain) and not torch.equal(tape.images, plain)
    silent = sample(pipe, call, noise_level=0.0, steps=range(len(ode.sigmas) - 1))
    off = (silent.x0.float() - ode.x0.float()).norm() / (ode.x0.float() - ode.noise.float()).norm()
    assert off < (1e-4 if dtype == torch.float32 else 0.1)  # so its noise levels are the pipeline's own
    assert (ode.sigmas[0] > 0.99) == (call.get("strength", 1) == 1) and ode.sigmas[-1] == 0


def test_replay_at_other_latents(family, dtype):
    pipe, call, parameters, plain, ode, tape = taped(family, dtype)
    for k, taken in tape.steps.items():
        other = taken.x + 0.1 * torch.randn(taken.x.shape, generator=torch.Generator().manual_seed(3)).to(taken.x)
        if k in GIVEN.get(family, ()):
            with pytest.raises(common.CannotReplay, match=f"step {k} .* where a part of them is given"):
                common.replay(pipe, tape, k, other)
            continue
        velocity, step = common.replay(pipe, tape, k, other)
        assert step is None and velocity.requires_grad and not torch.equal(velocity, taken.velocity), f"step {k}"
        assert torch.equal(common.replay(pipe, tape, k, taken.x)[0], taken.velocity), f"step {k}"


def test_a_sibling_shares_its_pictures_and_first_steps(family, dtype):
    pipe, call, *_ = taped(family, dtype)
    alone = sample(pipe, call, steps=[1])
    shared = sample(pipe, call, steps=[1], sibling=alone)
    assert torch.equal(shared.images, alone.images)
    assert torch.equal(common.replay(pipe, shared, 1)[1].log_prob, alone.steps[1].log_prob)


def picture_keys(call):
    return [key for key in call if key.endswith("image")]


def test_all_pictures_take_part(family):
    pipe, call, parameters, plain, ode, tape = taped(family, torch.float32)
    for key in picture_keys(call):
        given = call[key]
        other = [ImageOps.invert(p) for p in given] if isinstance(given, list) else ImageOps.invert(given)
        assert not torch.equal(sample(pipe, call | {key: other}, "ODE").images, plain), key


def test_one_prompt_with_its_bare_pictures(family):
    """The call that every pipeline takes."""
    pipe, call, *_ = taped(family, torch.float32)
    one = {key: value[:1] if "prompt" in key and isinstance(value, list) else value for key, value in call.items()}
    one |= {key: call[key][0] for key in picture_keys(call) if isinstance(call[key], list)}
    tape = sample(pipe, one, steps=[1])
    assert len(tape.images) == 1 and torch.equal(common.replay(pipe, tape, 1)[1].log_prob, tape.steps[1].log_prob)


def first_velocity(pipe, call):
    """What the first step is given, of a call that ends there."""

    class Found(BaseException):
        pass

    def found(velocity, *_):
        raise Found(velocity)

    with pytest.raises(Found) as caught:
        sample(pipe, call, found, 1.0, [0])
    return caught.value.args[0]


def test_a_list_of_pictures_is_one_for_each_prompt(family):
    """Then the first prompt's image does not depend on the second's picture."""
    pipe, call, *_ = taped(family, torch.float32)
    size = 64 if family.startswith("flux2") else call["height"]
    call = call | {key: conditioned.pictures(size) for key in picture_keys(call)} | {"prompt": tiny_pipelines.PROMPTS}
    key = picture_keys(call)[0]
    try:
        one, other = (first_velocity(pipe, call | {key: conditioned.pictures(size, 0, last)}) for last in (1, 2))
        apart = torch.equal(one[0], other[0]) and not torch.equal(one[1], other[1])
    except ValueError as error:
        assert "batch_size=1" in str(error) or "has to be of type" in str(error)
        apart = False
    assert apart == (family not in BARE)


@pytest.mark.parametrize("name", ["sd3_controlnet", "flux_control"])
def test_a_replay_encodes_nothing_and_skips_the_controlnet(name, monkeypatch):
    pipe, call = fresh(name)
    tape = sample(pipe, call, steps=[2])
    monkeypatch.setattr(pipe.vae, "_encode", lambda _: pytest.fail("encodes again"))
    calls = []
    getattr(pipe, "controlnet", pipe.transformer).register_forward_pre_hook(lambda *_: calls.append(1))
    assert torch.equal(common.replay(pipe, tape, 2)[1].log_prob, tape.steps[2].log_prob) and len(calls) == 1


def test_a_tape_is_let_go_of_at_once():
    """No circle of references keeps its tensors until Python looks for one."""
    pipe, call = fresh("flux_control")
    gc.collect()
    gc.disable()
    try:
        tape = sample(pipe, call, steps=[2])
        common.replay(pipe, tape, 2)
        tape = weakref.ref(tape)
        assert tape() is None
    finally:
        gc.enable()


def test_a_schedule_that_begins_in_the_middle():
    pipe, call = fresh("sd3_image_to_image")
    levels = sample(pipe, call | {"strength": 1.0}, "ODE").sigmas
    assert torch.equal(sample(pipe, call, "ODE").sigmas, levels[1:])
    with pytest.raises(common.CannotReplay, match="step 3 is beyond the last: this call takes 3 steps"):
        sample(pipe, call, steps=[3])
    with pytest.raises(common.CannotReplay, match="StableDiffusion3Img2ImgPipeline begins in the middle"):
        sample(pipe, call, steps=[0], tail_steps=1)


@pytest.mark.parametrize(
    "more, reason",
    [
        (dict(image=conditioned.picture), "LTXConditionPipeline draws from the call's generator"),
        (dict(image=conditioned.picture, image_cond_noise_scale=0), "steps each token at a noise level of its own"),
        (dict(), "steps each token at a noise level of its own"),
    ],
)
def test_noise_levels_of_each_token_are_refused(more, reason):
    pipe, call = LTX(**more)
    with pytest.raises(common.CannotReplay, match=reason):
        sample(pipe, call, "ODE")


@pytest.mark.families
@pytest.mark.parametrize("name", ["hunyuan_image", "hunyuan_video_15", "motif_video"])
def test_guidance_of_an_object_is_not_an_argument(name):
    pipe, call = tiny_pipelines.FAMILIES[name]()
    section = SimpleNamespace(resolution=call["height"], num_inference_steps=2, guidance_scale=3.0)
    given = common.call_arguments(
        pipe, section, {"num_frames": 5} if "num_frames" in call else {}, [{"prompt": p} for p in call["prompt"]]
    )
    assert "guidance_scale" not in given
    tape = sample(pipe, given, steps=[0])
    assert torch.equal(common.replay(pipe, tape, 0)[1].log_prob, tape.steps[0].log_prob)
