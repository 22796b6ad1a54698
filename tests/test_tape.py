"""The tape: what is replayed is what was sampled, what is sampled by the ODE is what diffusers samples."""

import collections
import copy
import itertools

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import common
import dynamics
from common import generators, replay, rollout

SAMPLERS = [("Flow-SDE", 0.7), ("Dance-SDE", 0.3), ("CPS", 0.8)]


def sde_noise(count=4):
    return generators(*((1, i) for i in range(count)))


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dynamics_type, noise_level", SAMPLERS)
def test_replay_is_bitwise_exact(make_pipe, call, dtype, guidance_scale, dynamics_type, noise_level):  # G1
    pipe, parameters = make_pipe(dtype)
    tape = rollout(pipe, call(guidance_scale=guidance_scale), dynamics_type, noise_level, range(4), sde_noise())
    assert sorted(tape.steps) == [0, 1, 2, 3]
    for k, taken in tape.steps.items():
        velocity, step = replay(pipe, tape, k)
        assert torch.equal(velocity, taken.velocity)
        assert torch.equal(step.log_prob, taken.log_prob) and step.log_prob.shape == (4,)
        assert torch.equal(step.mean, taken.mean) and torch.equal(step.x_next, taken.x_next)
        step.log_prob.sum().backward()
    assert all(p.dtype == torch.float32 for p in parameters.values())
    assert sum(p.grad.norm() for p in parameters.values() if p.grad is not None) > 0


def test_gradient_checkpointing_keeps_the_replay_exact(make_pipe, call):
    pipe, parameters = make_pipe(enable_gradient_checkpointing=True)
    tape = rollout(pipe, call(), "Flow-SDE", 0.7, [2], sde_noise())
    step = replay(pipe, tape, 2)[1]
    assert torch.equal(step.log_prob, tape.steps[2].log_prob)
    step.log_prob.sum().backward()
    assert any(p.grad is not None and p.grad.norm() > 0 for p in parameters.values())


@pytest.mark.parametrize(
    "prompts, shared", [(["a red circle"] * 4, True), (["a red circle", "a blue cross"] * 2, False)]
)
def test_the_embeddings_of_one_prompt_are_kept_once(make_pipe, call, prompts, shared):
    pipe, _ = make_pipe()
    tape = rollout(pipe, call() | dict(prompt=prompts), "Flow-SDE", 0.7, [2], sde_noise())
    embeddings = tape.answers["encode_prompt"][0][0]
    assert len(embeddings) == 4 and (embeddings.stride(0) == 0) == shared
    assert torch.equal(replay(pipe, tape, 2)[1].log_prob, tape.steps[2].log_prob)


def test_diffusers_looks_for_the_device_once(make_pipe, call, monkeypatch):
    """It goes through all modules for it, in each call: 0.1 s in one of SD3.5, on the CPU, while the GPU waits."""
    pipe, _ = make_pipe()
    assert pipe._execution_device == torch.device("cpu") and type(pipe).__name__ == "StableDiffusion3Pipeline"
    monkeypatch.setattr("diffusers.hooks.group_offloading._get_group_onload_device", lambda module: 1 / 0)
    tape = rollout(pipe, call(), "Flow-SDE", 0.7, [2], sde_noise())
    assert torch.equal(replay(pipe, tape, 2)[1].log_prob, tape.steps[2].log_prob)


def test_a_replay_finds_the_schedule_as_its_rollout_did(make_pipe, call, monkeypatch):
    """To make it again is to wait for its copies to the GPU, in each replay."""
    pipe, _ = make_pipe()
    tape = rollout(pipe, call(), "Flow-SDE", 0.7, [2], sde_noise())
    rollout(pipe, call(steps=3), "ODE", 0.0, ())
    monkeypatch.setattr(FlowMatchEulerDiscreteScheduler, "set_timesteps", lambda *args, **kwargs: 1 / 0)
    assert torch.equal(replay(pipe, tape, 2)[1].log_prob, tape.steps[2].log_prob)
    assert torch.equal(common._noise_levels(pipe.scheduler), tape.sigmas)


def test_a_network_may_work_before_the_schedule_is_made(make_pipe, call):
    pipe, _ = make_pipe()
    given = {}
    handle = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: given.update(kwargs), with_kwargs=True)
    sigmas = rollout(pipe, call(), "ODE", 0.0, ()).sigmas
    handle.remove()
    pipe.check_inputs = lambda *args, **kwargs: pipe.transformer(**given)
    rollout(pipe, call(steps=3), "ODE", 0.0, ())
    assert torch.equal(rollout(pipe, call(), "ODE", 0.0, ()).sigmas, sigmas)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ode_rollout_is_the_plain_pipeline(make_pipe, call, dtype, guidance_scale):
    pipe, _ = make_pipe(dtype)
    tape = rollout(pipe, call(guidance_scale=guidance_scale), "ODE", 0.0, ())
    with common.autocast(pipe):
        plain = pipe(**call(guidance_scale=guidance_scale), output_type="pt").images
    assert torch.equal(tape.images, plain)
    assert tape.images.shape == (4, 3, 32, 32) and tape.images.min() >= 0 and tape.images.max() <= 1
    assert tape.sigmas.shape == (6,) and tape.sigmas[0] == 1 and tape.sigmas[-1] == 0 and not tape.steps


def test_noise_level_0_is_the_ode(make_pipe, call):
    pipe, _ = make_pipe()
    ode = rollout(pipe, call(), "ODE", 0.0, ())
    for dynamics_type, _ in SAMPLERS:
        silent = rollout(pipe, call(), dynamics_type, 0.0, range(4), sde_noise())
        assert (silent.images - ode.images).abs().max() < 1e-4
        assert all(taken.log_prob is None for taken in silent.steps.values())


def test_shared_start_is_shared_up_to_the_window(make_pipe, call):  # M1
    pipe, _ = make_pipe()
    request = call(same_noise=True) | {"prompt": ["a red circle"] * 4}
    tape = rollout(pipe, request, "Flow-SDE", 0.7, [2], sde_noise())
    x, x_next = tape.steps[2].x, tape.steps[2].x_next
    assert torch.equal(x, x[:1].expand_as(x))
    assert all(not torch.equal(x_next[0], x_next[i]) for i in range(1, 4))


def test_steps_outside_the_window_are_deterministic(make_pipe, call):  # M2
    pipe, _ = make_pipe()
    first, second = (rollout(pipe, call(), "Flow-SDE", 0.7, [1, 3], generators((s,)) * 4) for s in (5, 6))
    assert sorted(first.steps) == [1, 3]
    assert torch.equal(first.steps[1].x, second.steps[1].x)  # the ODE before the window does not see the noise
    assert not torch.equal(first.steps[1].x_next, second.steps[1].x_next)
    again = rollout(pipe, call(), "Flow-SDE", 0.7, [1, 3], generators((5,)) * 4)
    assert torch.equal(first.x0, again.x0)


def test_gradient_does_not_depend_on_other_transitions(make_pipe, call):  # M3
    pipe, parameters = make_pipe()
    tape = rollout(pipe, call(), "Flow-SDE", 0.7, [1, 2], sde_noise())

    def gradient():
        for p in parameters.values():
            p.grad = None
        replay(pipe, tape, 2)[1].log_prob.sum().backward()
        return [p.grad.clone() for p in parameters.values() if p.grad is not None]

    before = gradient()
    tape.noise += 1
    tape.steps[1].x_next = tape.steps[1].x_next + 1  # not in place: step 2 begins with the same tensor
    tape.steps[1].velocity += 1
    assert all(torch.equal(a, b) for a, b in zip(before, gradient(), strict=True))
    tape.steps[2].x += 1
    assert not all(torch.equal(a, b) for a, b in zip(before, gradient(), strict=True))


def test_replay_at_other_latents(make_pipe, call):
    pipe, _ = make_pipe()
    tape = rollout(pipe, call(), "Flow-SDE", 0.7, range(4), sde_noise())
    other = torch.randn_like(tape.x0)
    for k in range(5):
        there, step = replay(pipe, tape, k, x=other)
        assert step is None and there.shape == other.shape
        if k in tape.steps:
            here = replay(pipe, tape, k, x=tape.steps[k].x)[0]
            assert torch.equal(here, tape.steps[k].velocity) and not torch.equal(here, there)


def test_pipeline_is_left_as_it_was(make_pipe, call):
    pipe, _ = make_pipe()
    pipe(**call())  # which leaves attributes of its own
    before = (pipe.scheduler, type(pipe.transformer), dict(pipe.config), set(vars(pipe)), set(vars(pipe.transformer)))
    tape = rollout(pipe, call(), "Flow-SDE", 0.7, [0], sde_noise())
    replay(pipe, tape, 0)
    with pytest.raises(RuntimeError, match="boom"):
        broken = call()
        pipe.transformer.proj_out.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("boom")))
        rollout(pipe, broken, "Flow-SDE", 0.7, [0], sde_noise())
    after = (pipe.scheduler, type(pipe.transformer), dict(pipe.config), set(vars(pipe)), set(vars(pipe.transformer)))
    assert before[0] is after[0] and before[1:] == after[1:]


def test_schedule_follows_the_resolution(make_pipe, call):  # P3
    pipe, _ = make_pipe()
    shifts = dict(base_image_seq_len=256, max_image_seq_len=4096, base_shift=0.5, max_shift=1.15)
    config = {**pipe.scheduler.config, "use_dynamic_shifting": True, **shifts}
    pipe.scheduler = type(pipe.scheduler).from_config(config)
    patch = pipe.transformer.config.patch_size
    for resolution in (32, 64):
        tape = rollout(pipe, call(resolution=resolution), "Flow-SDE", 0.7, [1], sde_noise())
        tokens = (tape.x0.shape[-1] // patch) ** 2
        shift = torch.tensor(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)).exp()
        even = torch.linspace(1, 1 / 1000, 5)
        assert torch.allclose(tape.sigmas[:-1], shift / (shift + 1 / even - 1), atol=1e-6)
        assert torch.equal(replay(pipe, tape, 1)[1].log_prob, tape.steps[1].log_prob)


def test_shared_noise_is_found(make_pipe, call):
    pipe, _ = make_pipe()
    request = call() | {"prompt": ["a red circle"] * 4}
    sound = rollout(pipe, request, "Flow-SDE", 0.7, [0, 2], sde_noise())
    assert common.shared_noise([sound], 4, same_init_noise=False) == 0
    start = rollout(pipe, call(same_noise=True), "Flow-SDE", 0.7, [0, 2], sde_noise())
    assert common.shared_noise([start], 4, same_init_noise=False) == 4
    assert common.shared_noise([start], 4, same_init_noise=True) == 0
    later = rollout(pipe, call(), "Flow-SDE", 0.7, [0, 2], generators((1, 0), (1, 1), (1, 0), (1, 3)))
    assert common.shared_noise([later], 4, same_init_noise=False) > 0


def test_ode_difference_sees_a_changed_sampler(make_pipe, call, monkeypatch):
    pipe, _ = make_pipe()
    request = call() | {"output_type": "pt", "return_dict": False}
    assert common.ode_difference(pipe, request) == 0
    euler = common.FlowMatchEulerDiscreteScheduler.step
    monkeypatch.setattr(
        common.FlowMatchEulerDiscreteScheduler,
        "step",
        lambda self, v, t, x, **how: euler(self, v * (1.01 if hasattr(self, "listener") else 1), t, x, **how),
    )
    assert common.ode_difference(pipe, request) > 0


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


@pytest.fixture
def counted(make_pipe):
    """A pipeline and the list of the batches that its denoiser was called with."""

    def make(dtype=torch.float32):
        pipe, _ = make_pipe(dtype)
        calls = []
        pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
        return pipe, calls

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tail_steps", [1, 2, 3, 4])
def test_a_tail_leaves_the_steps_before_it_alone(counted, call, dtype, tail_steps):  # M5
    pipe, calls = counted(dtype)
    tape = rollout(pipe, call(steps=8), "Flow-SDE", 0.7, [1, 3], sde_noise(), tail_steps)
    assert len(calls) == 4 + tail_steps
    whole = rollout(pipe, call(steps=8), "Flow-SDE", 0.7, [1, 3], sde_noise())
    assert len(tape.sigmas) == 4 + tail_steps + 1 and tape.sigmas[-1] == 0
    assert torch.equal(tape.sigmas[:5], whole.sigmas[:5]) and tail_steps < 4 or torch.equal(tape.sigmas, whole.sigmas)
    assert torch.equal(tape.schedule, whole.sigmas) and torch.equal(whole.schedule, whole.sigmas)
    for k, taken in tape.steps.items():
        assert torch.equal(taken.x_next, whole.steps[k].x_next)
        velocity, step = replay(pipe, tape, k)
        assert torch.equal(velocity, taken.velocity) and torch.equal(step.log_prob, taken.log_prob)
    assert tape.images.isfinite().all()
    assert torch.equal(tape.x0, by_hand(pipe, tape, tape.steps[3].x_next, start=4))


def test_a_tail_that_is_longer_than_the_schedule_is_the_schedule(counted, call):
    pipe, calls = counted()
    for sde_steps, sigmas in (([3], 6), ([4], 6), ((), 6)):
        tape = rollout(pipe, call(), "Flow-SDE", 0.7, sde_steps, sde_noise(), 9)
        assert len(tape.sigmas) == sigmas and torch.equal(tape.sigmas, tape.schedule)
    assert len(calls) == 3 * 5


def unshifted(sigmas, shift=3.0):
    return sigmas / (shift - (shift - 1) * sigmas)


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
            sigmas = common._noise_levels(scheduler)
            assert sigmas[-1] == 0 and (sigmas.diff() < 0).all() and len(tape.schedule) == steps + 1
            if most < steps - start:  # as even before the shift as linear interpolation between levels can be
                gaps = -unshifted(sigmas[start:]).diff()
                assert gaps.max() - gaps.min() < 0.25 / steps, (steps, start, most)


def test_without_noise_the_tail_is_everything(counted, call):
    pipe, calls = counted()
    tape = rollout(pipe, call(), "ODE", 0.0, (), tail_steps=5)
    assert len(calls) == 5 and torch.equal(tape.x0, by_hand(pipe, tape, tape.noise))
    assert len(rollout(pipe, call(), "ODE", 0.0, (), tail_steps=3).sigmas) == 4


def test_one_step_is_eulers(make_pipe, call):
    pipe, _ = make_pipe()
    solver, euler = (rollout(pipe, call(steps=1), "ODE", 0.0, (), tail_steps=tail) for tail in (1, None))
    assert (solver.images - euler.images).abs().max() < 1e-5


def test_the_solver_is_nearer_to_the_flow_than_euler(call):
    pipe = common.load_pipeline(common.RunArgs.model, "cpu", torch.float32)
    fine = rollout(pipe, call(steps=100), "ODE", 0.0, ()).images
    for steps, ratio in ((5, 0.9), (10, 0.5)):
        solver, euler = (rollout(pipe, call(steps=steps), "ODE", 0.0, (), tail_steps=t).images for t in (steps, None))
        assert (solver - fine).square().mean() < ratio * (euler - fine).square().mean()


def count_rows(pipe, *names):
    """A Counter of the rows that networks of a pipeline work on from now on."""
    rows = collections.Counter()

    def count(module, args, kwargs):
        rows[next(name for name in names if getattr(pipe, name) is module)] += len(
            args[0] if args else kwargs["hidden_states"]
        )

    for name in names:
        getattr(pipe, name).register_forward_pre_hook(count, with_kwargs=True)
    return rows


def test_texts_are_encoded_once(make_pipe, call):
    pipe, _ = make_pipe()
    plain = rollout(pipe, call(guidance_scale=3.0), "Flow-SDE", 0.7, [1, 3], sde_noise())
    rows, texts = count_rows(pipe, "text_encoder", "text_encoder_2"), {}
    repeated = {**call(guidance_scale=3.0), "prompt": ["a red circle", "a red circle", "a white cross", "a red circle"]}
    rollout(pipe, repeated, "Flow-SDE", 0.7, [1], sde_noise(), texts=texts)
    assert rows == {"text_encoder": 3, "text_encoder_2": 3}  # two prompts and the empty negative one
    tape = rollout(pipe, call(guidance_scale=3.0), "Flow-SDE", 0.7, [1, 3], sde_noise(), texts=texts)
    assert rows == {"text_encoder": 5, "text_encoder_2": 5}  # two prompts more
    assert (tape.images - plain.images).abs().max() < 1e-4  # a row's last bits depend on its batch
    for k, taken in tape.steps.items():
        assert torch.equal(replay(pipe, tape, k)[1].log_prob, taken.log_prob)
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
        before = len(asked)
        answer = common._recall(memory, memory, encode, ids, **how)
        assert asked[before:] == [rows]
        expected = encode(ids, **how)
        assert torch.equal(answer["states"], expected["states"]) and torch.equal(answer["layers"][0], ids + 1)
        asked.pop()
    for odd in ("words", torch.tensor(1)):  # no rows of tokens: asked as ever
        assert common._recall(memory, memory, lambda x: x, odd) is odd


def test_siblings_share_the_steps_before_the_noise(make_pipe, call):  # M1
    pipe, parameters = make_pipe()
    start = lambda: {**call(same_noise=True), "prompt": ["a red circle"] * 4}  # noqa: E731
    first = rollout(pipe, start(), "Flow-SDE", 0.7, [2, 3], sde_noise())
    rows = count_rows(pipe, "transformer")
    other = generators(*((2, i) for i in range(4)))
    alone = rollout(pipe, start(), "Flow-SDE", 0.7, [2, 3], other)
    assert rows["transformer"] == 5 * 4
    other = generators(*((2, i) for i in range(4)))
    tape = rollout(pipe, start(), "Flow-SDE", 0.7, [2, 3], other, sibling=first)
    assert rows["transformer"] == (5 + 3) * 4  # the first two steps are taken from the tape
    assert torch.equal(tape.images, alone.images) and torch.equal(tape.noise, alone.noise)
    for k in (2, 3):
        for name in ("x", "x_next", "velocity", "log_prob", "mean", "std"):
            assert torch.equal(getattr(tape.steps[k], name), getattr(alone.steps[k], name))
        assert torch.equal(replay(pipe, tape, k)[1].log_prob, tape.steps[k].log_prob)
    third = rollout(pipe, start(), "Flow-SDE", 0.7, [2, 3], sde_noise(), sibling=tape)  # from a tape that was shared
    assert torch.equal(third.images, first.images)


@pytest.mark.parametrize(
    "change",
    [dict(generator=generators((9,), (9,), (9,), (9,))), dict(prompt=["a blue square"] * 4), dict(guidance_scale=2.0)],
    ids=["start", "prompt", "guidance"],
)
def test_only_equal_calls_are_siblings(make_pipe, call, change):
    pipe, _ = make_pipe()
    first = rollout(pipe, {**call(same_noise=True), "prompt": ["a red circle"] * 4}, "Flow-SDE", 0.7, [2], sde_noise())
    changed = lambda: {**first.call, **copy.deepcopy(call(same_noise=True)), "prompt": ["a red circle"] * 4}  # noqa: E731
    alone = rollout(pipe, {**changed(), **copy.deepcopy(change)}, "Flow-SDE", 0.7, [2], sde_noise())
    tape = rollout(pipe, {**changed(), **copy.deepcopy(change)}, "Flow-SDE", 0.7, [2], sde_noise(), sibling=first)
    assert torch.equal(tape.images, alone.images) and not torch.equal(tape.images, first.images)


def test_steps_in_a_row_share_their_latents(make_pipe, call):
    pipe, _ = make_pipe()
    tape = rollout(pipe, call(), "Flow-SDE", 0.7, [0, 1, 3], sde_noise())
    assert tape.steps[1].x is tape.steps[0].x_next and tape.steps[3].x is not tape.steps[1].x_next


def test_guests_visit_and_leave(call, monkeypatch):
    """On a CPU there is nowhere to go: that memory is freed is seen in docs/performance.md."""
    plain = common.load_pipeline(common.RunArgs.model, "cpu", torch.float32)
    pipe = common.load_pipeline(common.RunArgs.model, "cpu", torch.float32, offload=True)
    guests = {name for name, module in pipe.components.items() if hasattr(module, "_hf_hook")}
    assert guests == {"text_encoder", "text_encoder_2", "vae"}
    here, most = set(), []

    def arrive(visit, module, *args, **kwargs):
        here.add(id(visit))
        most.append(len(here))
        return args, kwargs

    monkeypatch.setattr(common._Visit, "pre_forward", arrive)
    monkeypatch.setattr(common._Visit, "leave", lambda visit: here.discard(id(visit)))
    images = rollout(pipe, call(guidance_scale=3.0), "ODE", 0.0, ()).images
    assert torch.equal(images, rollout(plain, call(guidance_scale=3.0), "ODE", 0.0, ()).images)
    assert most == [1] * 5 and not here  # two text encoders for two branches, and the VAE, one at a time
