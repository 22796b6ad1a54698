"""The tape on every family of pipelines: a replay is the rollout again, bit by bit, and nothing is left behind.

The core families run by default, the others with `-m families`.
"""

import contextlib
import copy
import json
import shutil
from types import SimpleNamespace

import diffusers
import peft
import pytest
import tiny_pipelines
import torch
from test_tape import by_hand

import common
import grpo
from harness import checks, compiled, contract
from harness.flow_models import use_flow_matching


def lora(pipe):
    """Adapters on the denoisers, float32, with a B that is not zero."""
    generator = torch.Generator().manual_seed(2)
    parameters = []
    for denoiser in common.denoisers(pipe).values():
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear")
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


def noise(seed):
    return common.generators((seed, 0), (seed, 1))


def plain(pipe, call):
    return pipe(**copy.deepcopy(call), generator=noise(0), output_type="pt", return_dict=False)[0]


def ode(pipe, call):
    return common.rollout(pipe, call | {"generator": noise(0)}, "ODE", 0.0, ())


def sde(pipe, call, steps, noise_level=0.7, **more):
    return common.rollout(pipe, call | {"generator": noise(0)}, "Flow-SDE", noise_level, steps, noise(1), **more)


def fresh(family):
    torch.manual_seed(0)
    pipe, call = tiny_pipelines.FAMILIES[family]()
    use_flow_matching(pipe)
    return pipe, call


def traces(pipe):
    """What a rollout or a replay could leave behind on a pipeline."""
    denoisers = common.denoisers(pipe).values()
    return {
        "scheduler": pipe.scheduler,
        "scheduler class": type(pipe.scheduler),
        "scheduler config": dict(pipe.scheduler.config),
        "pipeline config": copy.deepcopy(dict(pipe.config)),
        "pipeline attributes": set(vars(pipe)),
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


@pytest.fixture(scope="module")
def made(family, dtype):
    """A pipeline with adapters, its call, what the plain pipeline makes of it, and a tape of all steps but the last."""
    pipe, call = fresh(family)
    pipe.to(dtype)
    parameters = lora(pipe)
    with torch.no_grad(), common.autocast(pipe):
        images = plain(pipe, call)
    before = traces(pipe)
    tape = sde(pipe, call, range(call["num_inference_steps"] - 1))
    return SimpleNamespace(pipe=pipe, call=call, parameters=parameters, plain=images, before=before, tape=tape)


def test_replay_is_the_rollout(made):
    assert len(made.tape.steps) == 3 and made.tape.images.isfinite().all()
    for k, taken in made.tape.steps.items():
        velocity, step = common.replay(made.pipe, made.tape, k)
        assert torch.equal(velocity, taken.velocity), f"velocity of step {k}"
        assert torch.equal(step.log_prob, taken.log_prob), f"log-prob of step {k}"
        assert taken.log_prob.shape == (2,) and taken.velocity.std() > 0
        gradients = torch.autograd.grad(step.log_prob.sum(), made.parameters, allow_unused=True)
        assert sum(g.float().square().sum() for g in gradients if g is not None) > 0, f"gradient of step {k}"


def test_what_is_known_already_changes_nothing(made, family):
    """Texts that were encoded before, and the steps before the noise of a call from the same start."""
    texts = {}
    first = sde(made.pipe, made.call, [1, 2], texts=texts)
    with contextlib.nullcontext() if family == "krea2" else no_encoding(made.pipe):  # it gives positions another order
        alone = sde(made.pipe, made.call, [1, 2], texts=texts)
        shared = sde(made.pipe, made.call, [1, 2], texts=texts, sibling=first)
    for other in (alone, shared):
        assert torch.equal(other.images, first.images)
        for k, taken in first.steps.items():
            again = common.replay(made.pipe, other, k)[1].log_prob
            assert torch.equal(again, taken.log_prob) and torch.equal(again, other.steps[k].log_prob)


@contextlib.contextmanager
def no_encoding(pipe):
    """Within it the text encoders fail where they are called in the ordinary way; some pipelines call parts of them."""
    encoders = [network for name, network in common.networks(pipe).items() if name.startswith("text_encoder")]
    handles = [e.register_forward_pre_hook(lambda *_: pytest.fail("encodes again")) for e in encoders]
    yield
    for handle in handles:
        handle.remove()


def test_ode_is_the_plain_pipeline(made, dtype):
    """And so is every step without noise: the velocity on the tape is noise - data, the noise levels are its own."""
    flow = ode(made.pipe, made.call)
    assert torch.equal(flow.images, made.plain) and not torch.equal(flow.images, made.tape.images)
    silent = sde(made.pipe, made.call, range(made.call["num_inference_steps"]), 0.0)
    off = (silent.x0.float() - flow.x0.float()).norm() / (flow.x0.float() - flow.noise.float()).norm()
    assert off < (1e-4 if dtype == torch.float32 else 0.1)
    assert silent.sigmas[0] > 0.9 and silent.sigmas[-1] == 0 and (silent.sigmas.diff() < 0).all()


def test_a_tail_has_its_grid_in_the_replay_too(made, dtype):
    whole, tape = made.tape, sde(made.pipe, made.call, [0], tail_steps=2)
    assert torch.equal(tape.sigmas[:2], whole.sigmas[:2]) and torch.equal(tape.schedule, whole.sigmas)
    assert len(tape.sigmas) == 4 and whole.sigmas[3] < tape.sigmas[2] < whole.sigmas[1] and tape.sigmas[3] == 0
    velocity, step = common.replay(made.pipe, tape, 0)
    assert torch.equal(step.log_prob, whole.steps[0].log_prob) and torch.equal(velocity, whole.steps[0].velocity)
    x = by_hand(made.pipe, tape, tape.steps[0].x_next, start=1)
    off = (x - tape.x0).abs().max() / x.abs().max()
    assert off <= (0 if dtype == torch.float32 else 0.03)  # Mochi rounds its latents between two steps


def test_nothing_is_left_behind(made, family):
    common.replay(made.pipe, made.tape, 1)
    assert traces(made.pipe) == made.before
    given = {key: value for key, value in made.tape.call.items() if key in made.call}
    assert given == made.call == tiny_pipelines.FAMILIES[family]()[1]  # some pipelines write into their arguments


def test_replay_at_other_latents(made):
    for k, taken in made.tape.steps.items():
        other = taken.x + 0.1 * torch.randn(taken.x.shape, generator=torch.Generator().manual_seed(3)).to(taken.x)
        velocity, step = common.replay(made.pipe, made.tape, k, other)
        same, _ = common.replay(made.pipe, made.tape, k, taken.x)
        assert step is None and velocity.shape == taken.velocity.shape and velocity.requires_grad
        assert not torch.equal(velocity, taken.velocity), f"step {k} does not depend on x"
        assert torch.equal(same, taken.velocity), f"step {k}"
    assert common.replay(made.pipe, made.tape, k + 1, other)[0].shape == other.shape  # of no stochastic step


def test_prompts_and_guidance_take_part(family):
    pipe, call = fresh(family)
    images = plain(pipe, call)
    for key in {"prompt", "negative_prompt"} & set(call):
        assert not torch.equal(images, plain(pipe, call | {key: ["three green triangles", "ugly"]})), key


def trainable(pipe, **args):
    return common.trainable_parameters(pipe, grpo.Args(lora_rank=4, lora_alpha=6, **args), seed=0)


def test_default_targets(family):
    pipe, _ = fresh(family)
    named = {"target_modules": ("all-linear",)} if family in tiny_pipelines.OTHER_TARGETS else {}
    instead = named if hasattr(pipe.transformer, "add_adapter") else {"finetune_type": "full"}
    if instead:
        with pytest.raises(SystemExit):
            trainable(pipe)
        pipe, _ = fresh(family)
    parameters = trainable(pipe, **instead)
    trained = [p for denoiser in common.denoisers(pipe).values() for p in denoiser.parameters() if p.requires_grad]
    assert len(parameters) == len(trained) > 0 and all(p.dtype == torch.float32 for p in trained)


@pytest.mark.parametrize("name", ["sana", "wan"])
def test_other_solvers_become_the_euler_method_of_their_flow(name):
    torch.manual_seed(0)
    pipe, call = tiny_pipelines.FAMILIES[name]()
    pipe.scheduler.set_timesteps(4)
    theirs = pipe.scheduler.sigmas
    use_flow_matching(pipe)
    sigmas = ode(pipe, call).sigmas
    even, shift = torch.tensor([1, 0.75, 0.5, 0.25, 0]), tiny_pipelines.FLOW_SIGMAS["flow_shift"]
    assert torch.allclose(sigmas, shift * even / (1 + (shift - 1) * even))
    assert torch.allclose(sigmas, theirs, atol=2e-3)
    assert tuple(pipe.config["scheduler"]) == ("diffusers", "FlowMatchEulerDiscreteScheduler")  # as it is saved


@pytest.mark.parametrize("shrunk", [lambda x: 0.9 * x, lambda x: x.mul_(0.9)], ids=["others", "in place"])
def test_latents_changed_between_steps_are_refused(shrunk):
    pipe, call = fresh("stable_diffusion_3")
    shrink = {"callback_on_step_end": lambda pipe, k, timestep, tensors: {"latents": shrunk(tensors["latents"])}}
    tape = sde(pipe, call | shrink, (0, 1))
    common.replay(pipe, tape, 0)
    with pytest.raises(common.CannotReplay, match="changes its latents"):
        common.replay(pipe, tape, 1)


@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize("name", ["stable_diffusion_3", "flux"])
def test_latents_that_arrive_untouched_are_not_compared(name, k, monkeypatch):
    pipe, call = fresh(name)
    tape = sde(pipe, call, (0, 1))
    monkeypatch.delattr(common._Player, "same")
    assert torch.equal(common.replay(pipe, tape, k)[1].log_prob, tape.steps[k].log_prob)


def test_a_cache_between_steps_is_refused():
    pipe, call = fresh("qwen_image_21")
    plain(pipe, call)
    before = traces(pipe)
    with pytest.raises(common.CannotReplay, match="use_kv_cache=False"):
        ode(pipe, call | {"use_kv_cache": True})
    assert traces(pipe) == before


FLOW = diffusers.FlowMatchEulerDiscreteScheduler
SCHEDULERS = dict(
    euler=(FLOW(shift=3.0), {}, None),
    dpm=(diffusers.DPMSolverMultistepScheduler(**tiny_pipelines.FLOW_SIGMAS), {}, None),
    unipc=(diffusers.UniPCMultistepScheduler(**tiny_pipelines.FLOW_SIGMAS), {}, None),
    scm=(diffusers.SCMScheduler(), {}, "trigflow"),
    epsilon=(diffusers.DDIMScheduler(), {}, "epsilon"),
    dpm_epsilon=(diffusers.DPMSolverMultistepScheduler(), {}, "epsilon"),
    edm=(diffusers.EDMEulerScheduler(), {}, "epsilon"),
    edm_as_flow=(FLOW(), {"sigma_max": 80.0}, "begin at 80"),
    stochastic=(FLOW(stochastic_sampling=True), {}, "stochastic_sampling"),
)


@pytest.mark.parametrize("scheduler, more, reason", SCHEDULERS.values(), ids=[*SCHEDULERS])
def test_only_rectified_flows_are_accepted(scheduler, more, reason, tmp_path, capsys):
    scheduler.save_pretrained(tmp_path / "scheduler")
    config = tmp_path / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | more))
    index = {"_class_name": "SanaPipeline", "scheduler": ["diffusers", type(scheduler).__name__]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(SystemExit) if reason else contextlib.nullcontext() as exit:
        checks.check_model(grpo.Args(model=str(tmp_path)))
    message = capsys.readouterr().err
    assert not reason or exit.value.code == 2 and message.count("\n") == 1 and reason in message


def compile_on(device, pipe):
    """Compile a pipeline in bfloat16, with adapters that do something; returns their parameters."""
    pipe.to(device, torch.bfloat16)
    for network in common.networks(pipe).values():
        network.requires_grad_(False)
    compiled.compile_decoder(pipe)
    parameters = list(trainable(pipe).values())
    for parameter in parameters:
        parameter.data = parameter.data.to(device) + 0.02 * torch.randn_like(parameter, device=device)
    compiled.compile_blocks(pipe.transformer)
    return parameters


def assert_compiled_replays(pipe, tape):
    """And leave gradients."""
    for k, taken in tape.steps.items():
        velocity, step = common.replay(pipe, tape, k)
        assert torch.equal(velocity, taken.velocity) and torch.equal(step.log_prob, taken.log_prob), k
        assert not taken.velocity.requires_grad and not tape.images.requires_grad
        step.log_prob.sum().backward()


@pytest.mark.families
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles for a CPU with g++")
def test_compiled_blocks_replay_exactly():
    """In bfloat16 the code compiled for gradients rounds elsewhere than that without: sampling must run it too."""
    pipe, call = fresh("stable_diffusion_3")
    pipe.transformer.transformer_blocks = pipe.transformer.transformer_blocks[-1:]  # compiling takes its time
    parameters = compile_on("cpu", pipe)
    blocks = [module for module in pipe.transformer.modules() if module._compiled_call_impl is not None]
    assert {type(block).__name__ for block in blocks} == set(pipe.transformer._no_split_modules)
    tape = sde(pipe, call, [0, 2])
    assert_compiled_replays(pipe, tape)
    assert sum(p.grad.norm() for p in parameters if p.grad is not None) > 0
    assert contract.ode_difference(pipe, tape.call) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("looks", [False, True], ids=["", "a network that looks at its own numbers"])
def test_recorded_calls_replay_exactly(looks, capsys):
    """By CUDA graphs, from the second call of the same shapes on; also after updates, and beside other calls."""
    pipe, call = fresh("stable_diffusion_3")
    if looks:
        pipe.transformer.norm_out.register_forward_pre_hook(lambda module, args: args[0].sum().item() and None)
    parameters, before = compile_on("cuda", pipe), None
    for _ in range(3):
        tape = sde(pipe, call, [0, 1, 2])
        assert before is None or not torch.equal(tape.x0, before)
        before = tape.x0
        assert_compiled_replays(pipe, tape)
        for parameter in parameters:
            parameter.data -= 0.01 * parameter.grad.sign()
            parameter.grad = None
    assert contract.ode_difference(pipe, tape.call) == 0
    one = {name: call[name][:1] for name in ("prompt", "negative_prompt")} | {"generator": noise(3)[:1]}
    for _ in range(3):  # another size, and random numbers of the GPU's own, after what cannot be recorded too
        common.rollout(pipe, call | one, "Flow-SDE", 0.7, [0], noise(4)[:1])
        torch.randn(2, device="cuda")
    assert ("without CUDA graphs" in capsys.readouterr().out) == looks
