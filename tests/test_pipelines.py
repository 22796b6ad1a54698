"""The tape on every family of pipelines: a replay is the rollout again, bit by bit, and nothing is left behind.

The core families run by default, the others with `-m families`.
"""

import contextlib
import copy
import functools
import json
import shutil
from types import SimpleNamespace

import diffusers
import peft
import pytest
import tiny_pipelines
import torch

import common
import dynamics

torch.set_num_threads(1)


def lora(pipe, targets="all-linear", rank=4, alpha=6):
    """Adapters on the denoisers, float32, with a B that is not zero."""
    generator = torch.Generator().manual_seed(2)
    parameters = []
    for denoiser in common.denoisers(pipe).values():
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
    denoisers = common.denoisers(pipe).values()
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
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"], scope="module")
    if "family" in metafunc.fixturenames:
        others = [name for name in tiny_pipelines.FAMILIES if name not in tiny_pipelines.CORE]
        marked = [pytest.param(name, marks=pytest.mark.families) for name in others]
        asked = "families" in metafunc.config.option.markexpr
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


def test_what_is_known_already_changes_nothing(family, dtype):
    """Texts that were encoded before, and the steps before the noise of a call from the same start."""
    pipe, call, *_ = taped(family, dtype)
    texts, sample = (
        {},
        lambda **known: common.rollout(
            pipe, call | {"generator": noise(0)}, "Flow-SDE", 0.7, [1, 2], noise(1), **known
        ),
    )
    first = sample(texts=texts)
    with no_encoding(pipe) if family != "krea2" else contextlib.nullcontext():  # it gives positions by another order
        alone = sample(texts=texts)
        shared = sample(texts=texts, sibling=first)
    for other in (alone, shared):
        assert torch.equal(other.images, first.images)
        for k, taken in first.steps.items():
            again = common.replay(pipe, other, k)[1].log_prob
            assert torch.equal(again, taken.log_prob) and torch.equal(again, other.steps[k].log_prob)


@contextlib.contextmanager
def no_encoding(pipe):
    """Within it the text encoders fail where they are called in the ordinary way; some pipelines call parts of them."""
    handles = [
        module.register_forward_pre_hook(lambda *_: pytest.fail("encodes again"))
        for name, module in pipe.components.items()
        if name.startswith("text_encoder") and module is not None
    ]
    yield
    for handle in handles:
        handle.remove()


def test_ode_is_the_plain_pipeline(family, dtype):
    pipe, call, parameters, plain, before, rollout = taped(family, dtype)
    ode = common.rollout(pipe, call | {"generator": noise(0)}, "ODE", 0.0, ())
    assert torch.equal(ode.images, plain)
    assert not torch.equal(ode.images, rollout.images)


def test_without_noise_every_step_is_the_ode(family, dtype):
    """So the velocity that reaches the tape is noise - data, and the noise levels are its own."""
    pipe, call, parameters, plain, before, rollout = taped(family, dtype)
    ode = common.rollout(pipe, call | {"generator": noise(0)}, "ODE", 0.0, ())
    steps = range(call["num_inference_steps"])
    sde = common.rollout(pipe, call | {"generator": noise(0)}, "Flow-SDE", 0.0, steps)
    off = (sde.x0.float() - ode.x0.float()).norm() / (ode.x0.float() - ode.noise.float()).norm()
    assert off < (1e-4 if dtype == torch.float32 else 0.1)
    assert sde.sigmas[0] > 0.9 and sde.sigmas[-1] == 0 and (sde.sigmas.diff() < 0).all()


def test_a_tail_has_its_grid_in_the_replay_too(family, dtype):
    pipe, call, parameters, plain, before, rollout = taped(family, dtype)
    tape = common.rollout(pipe, call | {"generator": noise(0)}, "Flow-SDE", 0.7, [0], noise(1), tail_steps=2)
    assert torch.equal(tape.sigmas[:2], rollout.sigmas[:2]) and torch.equal(tape.schedule, rollout.sigmas)
    assert len(tape.sigmas) == 4 and rollout.sigmas[3] < tape.sigmas[2] < rollout.sigmas[1] and tape.sigmas[3] == 0
    velocity, step = common.replay(pipe, tape, 0)
    assert torch.equal(step.log_prob, rollout.steps[0].log_prob) and torch.equal(velocity, rollout.steps[0].velocity)
    x, sigmas, last = tape.steps[0].x_next, tape.sigmas.tolist(), (None, None)
    for k in (1, 2):
        with torch.no_grad():
            velocity, _ = common.replay(pipe, tape, k, x)
        x, x0 = dynamics.dpm_step(velocity, x, sigmas[k], sigmas[k + 1], *last)
        x, last = x.to(velocity.dtype), (sigmas[k], x0)
    off = (x - tape.x0).abs().max() / x.abs().max()
    assert off <= (0 if dtype == torch.float32 else 0.03)  # Mochi rounds its latents between two steps


def test_nothing_is_left_behind(family, dtype):
    pipe, call, parameters, plain, before, rollout = taped(family, dtype)
    common.replay(pipe, rollout, 1)
    assert traces(pipe) == before
    given = {key: value for key, value in rollout.call.items() if key in call}
    assert given == call == tiny_pipelines.FAMILIES[family]()[1]  # some pipelines write into their arguments


def test_replay_at_other_latents(family, dtype):
    pipe, call, parameters, plain, before, rollout = taped(family, dtype)
    for k, taken in rollout.steps.items():
        other = taken.x + 0.1 * torch.randn(taken.x.shape, generator=torch.Generator().manual_seed(3)).to(taken.x)
        velocity, step = common.replay(pipe, rollout, k, other)
        same, _ = common.replay(pipe, rollout, k, taken.x)
        assert step is None and velocity.shape == taken.velocity.shape and velocity.requires_grad
        assert not torch.equal(velocity, taken.velocity), f"step {k} does not depend on x"
        assert torch.equal(same, taken.velocity), f"step {k}"


def test_prompts_and_guidance_take_part(family):
    pipe, call = fresh(family)
    images = pipe(**copy.deepcopy(call), generator=noise(0), output_type="pt", return_dict=False)[0]
    for key in {"prompt", "negative_prompt"} & set(call):
        other = copy.deepcopy(call) | {key: ["three green triangles", "ugly"]}
        assert not torch.equal(images, pipe(**other, generator=noise(0), output_type="pt", return_dict=False)[0]), key


def fresh(family):
    torch.manual_seed(0)
    pipe, call = tiny_pipelines.FAMILIES[family]()
    common.use_flow_matching(pipe)
    return pipe, call


def settings(**changed):
    targets = common.RunArgs().target_modules
    defaults = dict(finetune_type="lora", lora_rank=4, lora_alpha=6, target_modules=targets, compile=False)
    return SimpleNamespace(train=SimpleNamespace(enable_gradient_checkpointing=False), **defaults | changed)


def test_default_targets(family):
    pipe, _ = fresh(family)
    args = settings()
    if not hasattr(pipe.transformer, "add_adapter"):
        with pytest.raises(SystemExit):
            common.trainable_parameters(pipe, args, seed=0)
        args = settings(finetune_type="full")
    elif family in tiny_pipelines.OTHER_TARGETS:
        with pytest.raises(SystemExit):
            common.trainable_parameters(pipe, args, seed=0)
        pipe, args = fresh(family)[0], settings(target_modules=("all-linear",))
    parameters = common.trainable_parameters(pipe, args, seed=0)
    trained = [p for denoiser in common.denoisers(pipe).values() for p in denoiser.parameters() if p.requires_grad]
    assert len(parameters) == len(trained) > 0
    assert all(p.dtype == torch.float32 for p in trained)


@pytest.mark.parametrize("name", ["stable_diffusion_3", "flux"])
def test_saved_adapters_load_in_diffusers(name, tmp_path):
    pipe, call = fresh(name)
    lora(pipe, list(common.RunArgs().target_modules), rank=4, alpha=6)
    trained = pipe(**call, generator=noise(0), output_type="pt").images
    common.Run.save_weights(SimpleNamespace(args=settings(), folder=tmp_path), pipe)

    pipe, call = fresh(name)
    base = pipe(**call, generator=noise(0), output_type="pt").images
    pipe.load_lora_weights(tmp_path / "lora")
    assert torch.equal(pipe(**call, generator=noise(0), output_type="pt").images, trained)
    assert not torch.equal(base, trained)


@pytest.mark.parametrize("name", ["sana", "wan"])
def test_other_solvers_become_the_euler_method_of_their_flow(name):
    torch.manual_seed(0)
    pipe, call = tiny_pipelines.FAMILIES[name]()
    pipe.scheduler.set_timesteps(4)
    theirs = pipe.scheduler.sigmas
    common.use_flow_matching(pipe)
    tape = common.rollout(pipe, call | {"generator": noise(0)}, "ODE", 0.0, ())
    even = torch.tensor([1, 0.75, 0.5, 0.25, 0])
    shift = tiny_pipelines.FLOW_SIGMAS["flow_shift"]
    assert torch.allclose(tape.sigmas, shift * even / (1 + (shift - 1) * even))
    assert torch.allclose(tape.sigmas, theirs, atol=2e-3)
    assert tuple(pipe.config["scheduler"]) == ("diffusers", "FlowMatchEulerDiscreteScheduler")  # as it is saved


@pytest.mark.parametrize("shrunk", [lambda x: 0.9 * x, lambda x: x.mul_(0.9)], ids=["others", "in place"])
def test_latents_changed_between_steps_are_refused(shrunk):
    pipe, call = fresh("stable_diffusion_3")

    def shrink(pipe, k, timestep, tensors):
        return {"latents": shrunk(tensors["latents"])}

    call |= {"generator": noise(0), "callback_on_step_end": shrink}
    rollout = common.rollout(pipe, call, "Flow-SDE", 0.7, (0, 1), noise(1))
    common.replay(pipe, rollout, 0)
    with pytest.raises(NotImplementedError, match="changes its latents"):
        common.replay(pipe, rollout, 1)


@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize("name", ["stable_diffusion_3", "flux"])
def test_latents_that_arrive_untouched_are_not_compared(name, k, monkeypatch):
    pipe, call = fresh(name)
    rollout = common.rollout(pipe, call | {"generator": noise(0)}, "Flow-SDE", 0.7, (0, 1), noise(1))
    monkeypatch.delattr(common._Player, "same")
    _, step = common.replay(pipe, rollout, k)
    assert torch.equal(step.log_prob, rollout.steps[k].log_prob)


def test_a_cache_between_steps_is_refused():
    pipe, call = fresh("qwen_image_21")
    pipe(**call, generator=noise(0))
    before = traces(pipe)
    with pytest.raises(NotImplementedError, match="use_kv_cache=False"):
        common.rollout(pipe, call | {"generator": noise(0), "use_kv_cache": True}, "ODE", 0.0, ())
    assert traces(pipe) == before


def scheduler_configs():
    good = dict(
        euler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        dpm=diffusers.DPMSolverMultistepScheduler(**tiny_pipelines.FLOW_SIGMAS),
        unipc=diffusers.UniPCMultistepScheduler(**tiny_pipelines.FLOW_SIGMAS),
    )
    bad = dict(
        scm=(diffusers.SCMScheduler(), {}, "trigflow"),
        epsilon=(diffusers.DDIMScheduler(), {}, "epsilon"),
        dpm_epsilon=(diffusers.DPMSolverMultistepScheduler(), {}, "epsilon"),
        edm=(diffusers.EDMEulerScheduler(), {}, "epsilon"),
        edm_as_flow=(diffusers.FlowMatchEulerDiscreteScheduler(), {"sigma_max": 80.0}, "begin at 80"),
        stochastic=(diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), {}, "stochastic_sampling"),
    )
    return [pytest.param(s, {}, None, id=name) for name, s in good.items()] + [
        pytest.param(*case, id=name) for name, case in bad.items()
    ]


@pytest.mark.parametrize("scheduler, more, reason", scheduler_configs())
def test_only_rectified_flows_are_accepted(scheduler, more, reason, tmp_path, capsys):
    scheduler.save_pretrained(tmp_path / "scheduler")
    config = tmp_path / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | more))
    index = {"_class_name": "SanaPipeline", "scheduler": ["diffusers", type(scheduler).__name__]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    side = SimpleNamespace(resolution=64)
    args = SimpleNamespace(model=str(tmp_path), call={}, train=side, eval=side)
    if reason is None:
        return common.check_model(args)
    with pytest.raises(SystemExit) as exit:
        common.check_model(args)
    message = capsys.readouterr().err
    assert exit.value.code == 2 and message.count("\n") == 1 and reason in message


@pytest.mark.families
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles for a CPU with g++")
def test_compiled_blocks_replay_exactly():
    """In bfloat16 the code compiled for gradients rounds elsewhere than that without: sampling must run it too."""
    pipe, call = fresh("stable_diffusion_3")
    pipe.transformer.transformer_blocks = pipe.transformer.transformer_blocks[-1:]  # compiling takes its time
    pipe.to(torch.bfloat16)
    for module in common._modules(pipe):
        module.requires_grad_(False)
    common.compile_decoder(pipe)
    parameters = common.trainable_parameters(pipe, settings(compile=True), 0).values()
    for parameter in parameters:
        parameter.data += 0.02 * torch.randn_like(parameter)
    blocks = [module for module in pipe.transformer.modules() if module._compiled_call_impl is not None]
    assert {type(block).__name__ for block in blocks} == set(pipe.transformer._no_split_modules)
    tape = common.rollout(pipe, call, "Flow-SDE", 0.7, [0, 2], common.generators((1,), (2,)))
    for k, taken in tape.steps.items():
        log_prob = common.replay(pipe, tape, k)[1].log_prob
        assert torch.equal(log_prob, taken.log_prob)
        log_prob.sum().backward()
        assert not taken.velocity.requires_grad
    assert sum(p.grad.norm() for p in parameters if p.grad is not None) > 0
    assert not tape.images.requires_grad
    assert common.ode_difference(pipe, tape.call) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("looks", [False, True], ids=["", "a network that looks at its own numbers"])
def test_recorded_calls_replay_exactly(looks, capsys):
    """By CUDA graphs, from the second call of the same shapes on; also after updates, and beside other calls."""
    pipe, call = fresh("stable_diffusion_3")
    if looks:
        block = pipe.transformer.norm_out
        block.register_forward_pre_hook(lambda module, args: args[0].sum().item() and None)
    pipe.to("cuda", torch.bfloat16)
    for module in common._modules(pipe):
        module.requires_grad_(False)
    parameters = list(common.trainable_parameters(pipe, settings(compile=True), 0).values())
    for parameter in parameters:
        parameter.data = parameter.data.cuda() + 0.02 * torch.randn_like(parameter, device="cuda")
    first = None
    for turn in range(3):
        tape = common.rollout(pipe, call, "Flow-SDE", 0.7, [0, 1, 2], common.generators((1,), (2,)))
        assert first is None or not torch.equal(tape.x0, first.x0)
        first = tape
        for k, taken in tape.steps.items():
            velocity, step = common.replay(pipe, tape, k)
            assert torch.equal(velocity, taken.velocity) and torch.equal(step.log_prob, taken.log_prob), (turn, k)
            step.log_prob.sum().backward()
        for parameter in parameters:
            parameter.data -= 0.01 * parameter.grad.sign()
            parameter.grad = None
    assert common.ode_difference(pipe, tape.call) == 0
    one = {name: call[name][:1] for name in ("prompt", "negative_prompt")} | {"generator": common.generators((3,))}
    for _ in range(3):  # another size, and random numbers of the GPU's own, after what cannot be recorded too
        common.rollout(pipe, call | one, "Flow-SDE", 0.7, [0], common.generators((4,)))
        torch.randn(2, device="cuda")
    assert ("without CUDA graphs" in capsys.readouterr().out) == looks
