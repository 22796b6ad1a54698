"""The tape: what is replayed is what was sampled, what is sampled by the ODE is what diffusers samples."""

import collections
import copy
import itertools

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.hooks.group_offloading import ModuleGroup, _is_group_offload_enabled
from torch.utils._pytree import tree_leaves

import common
import dynamics
import grpo
from common import generators, replay, rollout
from harness import listening
from harness.contract import count_repeated_noise, ode_difference
from harness.machine import Rollouts, offload
from harness.settings import RunArgs

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture
def pipe(make_pipe):
    return make_pipe()[0]


def noise(seed=1):
    return generators(*((seed, i) for i in range(4)))


def sde(pipe, call, steps, generator=None, **more):
    """A rollout of four images by Flow-SDE."""
    return rollout(pipe, call, "Flow-SDE", 0.7, steps, generator or noise(), **more)


def ode(pipe, call):
    return rollout(pipe, call, "ODE", 0.0, ())


def replayed(pipe, tape):
    """Replay every step, which comes out as it was recorded; returns the sum of the log-probs."""
    total = 0
    for k, taken in tape.steps.items():
        velocity, step = replay(pipe, tape, k)
        assert torch.equal(velocity, taken.velocity) and torch.equal(step.log_prob, taken.log_prob), f"step {k}"
        assert torch.equal(step.mean, taken.mean) and torch.equal(step.x_next, taken.x_next), f"step {k}"
        total = total + step.log_prob.sum()
    return total


def gradients(value, parameters):
    return torch.autograd.grad(value, list(parameters.values()), allow_unused=True, materialize_grads=True)


def count_rows(pipe, *names):
    """A Counter of the rows that networks of a pipeline work on from now on."""
    rows = collections.Counter()
    for name in names:

        def count(module, args, kwargs, name=name):
            rows[name] += len((*args, *kwargs.values())[0])

        getattr(pipe, name).register_forward_pre_hook(count, with_kwargs=True)
    return rows


@pytest.mark.parametrize("guidance_scale, checkpointing", [(1.0, False), (3.0, False), (1.0, True)])
@DTYPES
@pytest.mark.parametrize("dynamics_type, noise_level", [("Flow-SDE", 0.7), ("Dance-SDE", 0.3), ("CPS", 0.8)])
def test_replay_is_bitwise_exact(make_pipe, call, dtype, guidance_scale, checkpointing, dynamics_type, noise_level):
    pipe, parameters = make_pipe(dtype, enable_gradient_checkpointing=checkpointing)  # G1
    tape = rollout(pipe, call(guidance_scale=guidance_scale), dynamics_type, noise_level, range(4), noise())
    assert sorted(tape.steps) == [0, 1, 2, 3] and tape.steps[0].log_prob.shape == (4,)
    assert sum(g.norm() for g in gradients(replayed(pipe, tape), parameters)) > 0
    assert all(p.dtype == torch.float32 for p in parameters.values())


@pytest.mark.parametrize("other, shared", [("a red circle", True), ("a blue cross", False)])
def test_the_embeddings_of_one_prompt_are_kept_once(pipe, call, other, shared):
    tape = sde(pipe, call() | dict(prompt=["a red circle", other] * 2), [2])
    embeddings = tape.answers["encode_prompt"][0][0]
    assert len(embeddings) == 4 and (embeddings.stride(0) == 0) == shared
    replayed(pipe, tape)


def test_a_replay_waits_for_nothing_that_is_known(pipe, call, monkeypatch):
    """To find the device diffusers goes through all modules, and a schedule that is made again waits for its copies."""
    assert pipe._execution_device == torch.device("cpu") and type(pipe).__name__ == "StableDiffusion3Pipeline"
    monkeypatch.setattr("diffusers.hooks.group_offloading._get_group_onload_device", lambda module: 1 / 0)
    tape = sde(pipe, call(), [2])
    ode(pipe, call(steps=3))
    monkeypatch.setattr(FlowMatchEulerDiscreteScheduler, "set_timesteps", lambda *args, **kwargs: 1 / 0)
    replayed(pipe, tape)
    assert torch.equal(pipe.scheduler.sigmas, tape.sigmas)


def test_a_network_may_work_before_the_schedule_is_made(pipe, call):
    given = {}
    handle = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: given.update(kwargs), with_kwargs=True)
    sigmas = ode(pipe, call()).sigmas
    handle.remove()
    pipe.check_inputs = lambda *args, **kwargs: pipe.transformer(**given)
    ode(pipe, call(steps=3))
    assert torch.equal(ode(pipe, call()).sigmas, sigmas)


def test_steps_outside_the_window_are_deterministic(pipe, call):  # M2
    first, second, again = (sde(pipe, call(), [1, 3], generators((s,)) * 4) for s in (5, 6, 5))
    assert sorted(first.steps) == [1, 3]
    assert torch.equal(first.steps[1].x, second.steps[1].x)  # the ODE before the window does not see the noise
    assert not torch.equal(first.steps[1].x_next, second.steps[1].x_next)
    assert torch.equal(first.x0, again.x0)


def test_gradient_does_not_depend_on_other_transitions(make_pipe, call):  # M3
    pipe, parameters = make_pipe()
    tape = sde(pipe, call(), [1, 2])

    def gradient():
        return gradients(replay(pipe, tape, 2)[1].log_prob.sum(), parameters)

    before = gradient()
    tape.noise += 1
    assert tape.steps[2].x is tape.steps[1].x_next  # one copy serves two steps, so the next line is not in place
    tape.steps[1].x_next = tape.steps[1].x_next + 1
    tape.steps[1].velocity += 1
    assert all(torch.equal(a, b) for a, b in zip(before, gradient(), strict=True))
    tape.steps[2].x += 1
    assert not all(torch.equal(a, b) for a, b in zip(before, gradient(), strict=True))


def test_schedule_follows_the_resolution(pipe, call):  # P3
    shifts = dict(base_image_seq_len=256, max_image_seq_len=4096, base_shift=0.5, max_shift=1.15)
    config = {**pipe.scheduler.config, "use_dynamic_shifting": True, **shifts}
    pipe.scheduler = type(pipe.scheduler).from_config(config)
    for resolution in (32, 64):
        tape = sde(pipe, call(resolution=resolution), [1])
        tokens = (tape.x0.shape[-1] // pipe.transformer.config.patch_size) ** 2
        shift = torch.tensor(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)).exp()
        even = torch.linspace(1, 1 / 1000, 5)
        assert torch.allclose(tape.sigmas[:-1], shift / (shift + 1 / even - 1), atol=1e-6)
        replayed(pipe, tape)


def test_repeated_noise_is_found(pipe, call):
    def repeated(generator=None, same_init_noise=False, **of_call):
        return count_repeated_noise([sde(pipe, call(**of_call), [0, 2], generator)], 4, same_init_noise)

    assert repeated() == 0 and repeated(same_noise=True) == 4
    assert repeated(same_init_noise=True, same_noise=True) == 0
    assert repeated(generators((1, 0), (1, 1), (1, 0), (1, 3))) > 0


def test_ode_difference_sees_a_changed_sampler(pipe, call, monkeypatch):
    request = call() | {"output_type": "pt", "return_dict": False}
    assert ode_difference(pipe, request) == 0
    euler = FlowMatchEulerDiscreteScheduler.step

    def off(self, v, *rest, **how):
        return euler(self, v * (1.01 if hasattr(self, "listener") else 1), *rest, **how)

    monkeypatch.setattr(FlowMatchEulerDiscreteScheduler, "step", off)
    assert ode_difference(pipe, request) > 0


def places(pipe):
    return {name: {p.device.type for p in network.parameters()} for name, network in common.networks(pipe).items()}


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_offloaded_networks_visit_and_leave(call, monkeypatch, device):
    """On a CPU there is nowhere to go: that memory is freed is seen in docs/performance.md."""
    plain, pipe = (common.load_pipeline(RunArgs.model, where, torch.float32) for where in (device, None))
    visits, here = [], set()  # of layers, or of parameters that are in none
    onload, leave = ModuleGroup.onload_, ModuleGroup.offload_
    offload(pipe, torch.device(device))
    monkeypatch.setattr(ModuleGroup, "onload_", lambda g: (onload(g), here.add(g), visits.append(len(here))))
    monkeypatch.setattr(ModuleGroup, "offload_", lambda g: (leave(g), here.discard(g)))
    home = {"transformer": {device}, "text_encoder": {"cpu"}, "text_encoder_2": {"cpu"}, "vae": {"cpu"}}
    assert places(pipe) == home
    own, tape = (sde(p, call(guidance_scale=3.0), [1, 2]) for p in (plain, pipe))
    assert len(visits) > 50 and max(visits) <= 3 and not here and places(pipe) == home
    assert torch.equal(tape.images, own.images)
    assert all(torch.equal(tape.steps[k].log_prob, own.steps[k].log_prob) for k in (1, 2))
    replayed(pipe, tape)
    guests = {name: _is_group_offload_enabled(network) for name, network in common.networks(pipe).items()}
    assert guests == dict(transformer=False, text_encoder=True, text_encoder_2=True, vae=True)


def memory(tape):
    """Bytes that its tensors take."""
    storages = [t.untyped_storage() for t in tree_leaves(tape) if isinstance(t, torch.Tensor) and not t.is_meta]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
@pytest.mark.parametrize("flags", [{}, {"offload": True}, {"quantize": "nf4"}, {"quantize_text": "int8"}])
def test_rollouts_wait_on_the_cpu(call, device, flags, monkeypatch):
    pipe, kept = common.load_pipeline(RunArgs.model, device, torch.float32), Rollouts(grpo.Args(**flags))
    prompts = {"prompt": ["a red circle"] * 4}
    tapes = [sde(pipe, call(guidance_scale=scale) | prompts, [1, 2]) for scale in (1.0, 3.0)]
    full = lambda t: t.new_empty(t.shape, device="cpu").copy_(t)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "cpu", full)  # as from a GPU, equal rows and all
    for tape in tapes:
        kept.append(tape)
    assert len([*kept]) == 2 and all((kept[i] is tape) != bool(flags) for i, tape in enumerate(tapes))
    for i, tape in enumerate(tapes):
        again = kept[i]
        assert again is kept[i] and again.steps[1].step is tape.steps[1].step
        for left, right in zip(tree_leaves(again), tree_leaves(tape), strict=True):
            if isinstance(left, torch.Tensor):
                assert left.device == right.device and (left.is_meta or torch.equal(left, right))
        replayed(pipe, again)
        assert device == "cuda" or memory(again) < 1.01 * memory(tape)
    if device == "cuda" and flags:
        inside = torch.cuda.memory_allocated()
        del tapes, tape, left, right
        assert torch.cuda.memory_allocated() < inside


# A tail by DPM-Solver++


def by_hand(pipe, tape, x, start=0):
    """What the solver makes of x from a step on, with the velocities of a replay."""
    sigmas, last = tape.sigmas.tolist(), (None, None)
    for k in range(start, len(sigmas) - 1):
        with torch.no_grad():
            velocity, _ = replay(pipe, tape, k, x)
        x, x0 = dynamics.dpm_step(velocity, x, sigmas[k], sigmas[k + 1], *last)
        x, last = x.to(velocity.dtype), (sigmas[k], x0)
    return x


@DTYPES
@pytest.mark.parametrize("sde_steps, tail_steps", [([1, 3], 1), ([1, 3], 3), ([1, 3], 4), ([3], 9), ([7], 9), ((), 9)])
def test_a_tail_leaves_the_steps_before_it_alone(make_pipe, call, dtype, sde_steps, tail_steps):  # M5
    """One that is longer than the schedule is the schedule, and without noise the tail is everything."""
    pipe, _ = make_pipe(dtype)
    rows, start = count_rows(pipe, "transformer"), max(sde_steps, default=-1) + 1
    tape, T = sde(pipe, call(steps=8), sde_steps, tail_steps=tail_steps), min(start + tail_steps, 8)
    assert rows["transformer"] == 4 * T and len(tape.sigmas) == T + 1 and tape.sigmas[-1] == 0
    whole = sde(pipe, call(steps=8), sde_steps)
    unchanged = start + 1 if T < 8 else 9
    assert torch.equal(tape.sigmas[:unchanged], whole.sigmas[:unchanged])
    assert torch.equal(tape.schedule, whole.sigmas) and torch.equal(whole.schedule, whole.sigmas)
    assert all(torch.equal(taken.x_next, whole.steps[k].x_next) for k, taken in tape.steps.items())
    replayed(pipe, tape)
    assert tape.images.isfinite().all()
    assert torch.equal(tape.x0, by_hand(pipe, tape, tape.steps[start - 1].x_next if start else tape.noise, start))


@pytest.mark.parametrize("kind", ["shifted once", "as SD3's pipeline has it", "inverted"])
def test_every_tail_is_even_and_keeps_the_steps_before_it(kind):  # M5
    for steps in range(1, 12):
        for start, most in itertools.product(range(steps + 1), range(1, steps + 2)):
            scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, invert_sigmas=kind == "inverted")
            even = None if kind.startswith("as") else np.linspace(1, 1 / steps, steps)
            scheduler.set_timesteps(steps, sigmas=even)
            before, timesteps = scheduler.sigmas, scheduler.timesteps
            tape = common.Rollout(tail_start=start, tail_steps=most)
            common._regrid_tail(scheduler, tape)
            assert len(scheduler.sigmas) == len(scheduler.timesteps) + 1 == start + min(most, steps - start) + 1
            assert torch.equal(scheduler.sigmas[: start + 1], before[: start + 1])
            assert torch.equal(scheduler.timesteps[: start + 1], timesteps[: len(scheduler.timesteps)][: start + 1])
            assert torch.allclose(scheduler.timesteps, 1000 * scheduler.sigmas[:-1], atol=1e-3)
            sigmas = 1 - scheduler.sigmas if kind == "inverted" else scheduler.sigmas
            assert sigmas[-1] == 0 and (sigmas.diff() < 0).all() and len(tape.schedule) == steps + 1
            if most < steps - start:  # as even before the shift as linear interpolation between levels can be
                gaps = -(sigmas / (3 - 2 * sigmas))[start:].diff()
                assert gaps.max() - gaps.min() < 0.25 / steps, (steps, start, most)


# What calls have in common


def test_texts_are_encoded_once(pipe, call):
    plain = sde(pipe, call(guidance_scale=3.0), [1, 3])
    rows, texts = count_rows(pipe, "text_encoder", "text_encoder_2"), {}
    repeated = {**call(guidance_scale=3.0), "prompt": ["a red circle", "a red circle", "a white cross", "a red circle"]}
    sde(pipe, repeated, [1], texts=texts)
    assert rows == {"text_encoder": 3, "text_encoder_2": 3}  # two prompts and the empty negative one
    tape = sde(pipe, call(guidance_scale=3.0), [1, 3], texts=texts)
    assert rows == {"text_encoder": 5, "text_encoder_2": 5}  # two prompts more
    assert (tape.images - plain.images).abs().max() < 1e-4  # a row's last bits depend on its batch
    replayed(pipe, tape)
    assert rows == {"text_encoder": 5, "text_encoder_2": 5}  # a replay encodes nothing
    rollout(pipe, {**call(), "prompt": ["a red circle"] * 4}, "ODE", 0.0, (), texts=texts)
    assert rows["text_encoder"] == 5 and len(texts["text_encoder"]) == 1  # the others are forgotten


def test_an_encoder_is_asked_again_for_other_words_or_in_another_way():
    memory, asked = {}, []

    def encode(ids, mask=None, scale=1.0):
        asked.append(len(ids))
        return {"states": ids.float() * scale + (0 if mask is None else mask), "layers": (ids + 1,)}

    a, b = torch.tensor([[1, 2], [3, 4], [1, 2]]), torch.tensor([[3, 4], [5, 6]])
    for ids, rows, how in [(a, 2, {}), (b, 1, {}), (b, 2, dict(scale=2.0)), (b, 2, dict(mask=torch.ones(2, 2)))]:
        asked.clear()
        answer = listening._recall(memory, memory, encode, ids, **how)
        assert asked == [rows]
        assert torch.equal(answer["states"], encode(ids, **how)["states"]) and torch.equal(answer["layers"][0], ids + 1)
    for odd in ("words", torch.tensor(1)):  # no rows of tokens: asked as ever
        assert listening._recall(memory, memory, lambda x: x, odd) is odd


def circles(call, seed, prompt="a red circle", **more):
    """A Call of four images from one start."""
    kwargs = {**call(same_noise=True), "prompt": [prompt] * 4, **more}
    return common.Call([], [{"prompt": prompt}] * 4, kwargs, noise(seed))


def test_calls_from_one_start_share_the_steps_before_the_noise(pipe, call):  # M1
    alone = [sde(pipe, circles(call, seed).kwargs, [2, 3], noise(seed), texts={}) for seed in range(3)]
    rows, calls = count_rows(pipe, "transformer", "text_encoder"), [circles(call, seed) for seed in range(3)]
    tapes = list(common.sample(pipe, calls, "Flow-SDE", 0.7, [2, 3]))
    assert rows == {"transformer": (5 + 3 + 3) * 4, "text_encoder": 1}  # the third from a tape that was shared itself
    for tape, own in zip(tapes, alone, strict=True):
        assert torch.equal(tape.images, own.images) and torch.equal(tape.noise, own.noise)
        assert tape.rows == [{"prompt": "a red circle"}] * 4
        for k, name in itertools.product((2, 3), ("x", "x_next", "velocity", "log_prob", "mean", "std")):
            assert torch.equal(getattr(tape.steps[k], name), getattr(own.steps[k], name))
        replayed(pipe, tape)
        x, x_next = tape.steps[2].x, tape.steps[2].x_next
        assert torch.equal(x, x[:1].expand_as(x)) and not any(torch.equal(x_next[0], x_next[i]) for i in (1, 2, 3))


@pytest.mark.parametrize("change", [dict(generator=generators((9,), (9,), (9,), (9,))), dict(prompt="a blue square")])
def test_only_equal_calls_share_them(pipe, call, change):
    own, again = (circles(call, 1, **copy.deepcopy(change)) for _ in range(2))
    alone = sde(pipe, own.kwargs, [2], own.step_generators, texts={})
    first, tape = common.sample(pipe, [circles(call, 0), again], "Flow-SDE", 0.7, [2])
    assert torch.equal(tape.images, alone.images) and not torch.equal(tape.images, first.images)


def test_a_mistake_in_a_step_rule_is_the_scripts_own(pipe, call):
    """Not the pipeline's, which would be taken for a fault of what it was called with."""

    def misspelt(v, x, *_):
        return x - v, no_such_name  # noqa: F821

    with pytest.raises(NameError) as found:
        rollout(pipe, call(), misspelt, 0.7, [0])
    assert not found.value.in_pipeline_call
    for std in (float("nan"), -1.0):
        with pytest.raises(ValueError, match="returned a std that is negative or no number"):
            rollout(pipe, call(), lambda v, x, *_, std=std: (x - v, torch.tensor(std)), 0.7, [0])
    with pytest.raises(TypeError) as found:
        rollout(pipe, call() | {"no_such_argument": 1}, "Flow-SDE", 0.7, [0])
    assert found.value.in_pipeline_call
