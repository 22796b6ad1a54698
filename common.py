"""What an algorithm is written with: the pipeline as a policy, its tape, snapshots, prompts and seeds, optimizer steps.

The pipeline is the model adapter. `rollout` calls any diffusers flow pipeline as a user would, with a scheduler whose
`step()` runs `dynamics.step` and writes down what happened. `replay` repeats that very call up to one step and lets
the pipeline run that step again, now with gradients, so packing, guidance and sign conventions are those of inference
and the ratio before the first update is exactly 1. There is no code for any one model in here.
"""

import copy
import functools
import inspect
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Optional, Union

import diffusers
import numpy as np
import torch
from accelerate.utils import set_seed
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

import dynamics
from harness.adapters import add_adapters
from harness.console import quiet
from harness.data import call_of, with_pictures
from harness.fields import refuse
from harness.flow_models import use_flow_matching
from harness.listening import listening, remembering, routed, with_known_device
from harness.parallel import average_gradients, first_not_finite, gather_rows, local_shard, rank

# ---------------------------------------------------------------------------------------------------------------------
# The pipeline as a policy


def load_pipeline(model, device, dtype, pipeline=None, **settings) -> DiffusionPipeline:
    """Load a diffusers folder or hub id, frozen and in eval mode, on a device (None is the CPU) and in a dtype.

    Components that model_index.json holds as null are passed as None, the idiom by which SD3's T5 is left out.
    pipeline: the name of another class of diffusers over the same weights. settings: of `from_pretrained`.
    """
    kind = getattr(diffusers, pipeline) if pipeline else DiffusionPipeline
    index = DiffusionPipeline.load_config(model)
    absent = {name: None for name, spec in index.items() if isinstance(spec, (list, tuple)) and spec[0] is None}
    try:
        with quiet():
            pipe = kind.from_pretrained(model, dtype=dtype, **absent, **settings)
    except (OSError, ValueError, SafetensorError) as error:  # a file of weights that is missing or cut
        refuse("model", model, f"does not load: {str(error).splitlines()[0]}")
    if device is not None:
        pipe.to(device)
    use_flow_matching(pipe)
    pipe.set_progress_bar_config(disable=True)
    for module in networks(pipe).values():
        module.requires_grad_(False)
    pipe.__class__ = with_known_device(type(pipe))
    return pipe


def networks(pipe):
    """{name: network} of all the pipeline's networks."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def denoisers(pipe):
    """{name: network} of those that predict the velocity; some pipelines have two, for high and for low noise."""
    return {name: network for name, network in networks(pipe).items() if name.startswith("transformer")}


def trainable_parameters(pipe, args, seed):
    """Make the denoiser's adapters (or all of it) trainable, in float32. Returns {name: parameter}."""
    torch.manual_seed(seed)  # of the adapters' initial values
    if args.finetune_type == "lora":
        add_adapters(denoisers(pipe), args)
    for denoiser in denoisers(pipe).values():
        if args.finetune_type == "full":
            denoiser.requires_grad_(True)
        if args.train.enable_gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
    named = {f"{name}.{key}": p for name, module in denoisers(pipe).items() for key, p in module.named_parameters()}
    named = {name: p for name, p in named.items() if p.requires_grad}
    for parameter in named.values():
        if parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    return named


def autocast(pipe):
    """The arithmetic of the pipeline: autocast where float32 parameters are trained in a half-precision model."""
    dtypes = (p.dtype for m in networks(pipe).values() for p in m.parameters())
    half = next((dtype for dtype in dtypes if dtype in (torch.bfloat16, torch.float16)), None)
    trained = (p for m in denoisers(pipe).values() for p in m.parameters() if p.requires_grad)
    single = any(p.dtype == torch.float32 for p in trained)
    return torch.autocast(pipe._execution_device.type, dtype=half) if half and single else nullcontext()


# ---------------------------------------------------------------------------------------------------------------------
# The tape


@dataclass
class Transition:
    """One stochastic step of a rollout; tensors as in dynamics.Step, and detached."""

    x: torch.Tensor
    x_next: torch.Tensor
    log_prob: torch.Tensor
    velocity: torch.Tensor
    step: Callable
    """`dynamics.step` with the rule and noise levels of this step."""

    def scored(self, velocity):
        """The Step from x to x_next under a velocity."""
        return self.step(v=velocity, x=self.x, x_next=self.x_next)

    @property
    def mean(self):
        return self.scored(self.velocity).mean

    @property
    def std(self):
        return self.scored(self.velocity).std


@dataclass
class Rollout:
    """The tape of one call of the pipeline; the unit of replay, because a network's output can depend on its batch."""

    images: torch.Tensor = None
    """(B, 3, H, W) in [0, 1]; videos (B, frames, 3, H, W)."""
    noise: torch.Tensor = None
    """The initial latents, as the first step received them."""
    x0: torch.Tensor = None
    """The final latents, as the last step left them."""
    sigmas: torch.Tensor = None
    """(T + 1,) float32 noise levels, 1 -> 0, on the CPU."""
    schedule: torch.Tensor = None
    """The pipeline's own noise levels, before a tail of fewer steps."""
    steps: dict = field(default_factory=dict)
    """{k: Transition} for the stochastic steps."""
    call: dict = None
    rows: list = None
    """Of a `Call`: what each image was made of."""
    dynamics_type: Union[str, Callable] = None
    noise_level: float = None
    tail_start: int = 0
    tail_steps: Optional[int] = None
    answers: dict = field(default_factory=lambda: defaultdict(list))
    """{method: [returned]} of its encode_, prepare_ and generate_ methods, and what set_timesteps left behind."""
    outputs: dict = field(default_factory=lambda: defaultdict(list))
    """{k: [output]} of the denoiser in step k: tensors without storage, or with it if the guidance remembers them."""


def sample(pipe, calls, dynamics_type, noise_level, sde_steps, tail_steps=None):
    """Yield the `rollout` of each Call, without computing twice what a call has in common with the one before it:
    what the text encoders make of a prompt, and from the same initial noise the steps before the first stochastic one.
    """
    texts, tape, start = {}, None, None
    for call in calls:
        before, start = start, (call.rows, [g.initial_seed() for g in call.kwargs["generator"]])
        tape = rollout(
            pipe, call.kwargs, dynamics_type, noise_level, sde_steps, call.step_generators, tail_steps,
            texts=texts, sibling=tape if start == before else None,
        )  # fmt: skip
        tape.rows = call.rows
        yield tape


def rollout(
    pipe, call, dynamics_type, noise_level, sde_steps, generator=None, tail_steps=None, *, texts=None, sibling=None
) -> Rollout:
    """Sample images with `pipe(**call)`, stochastically in sde_steps and by the pipeline's own ODE elsewhere.

    call: keyword arguments of the pipeline; its `generator` draws the initial noise.
    dynamics_type, noise_level: as `dynamics.step` takes them; a name or a rule.
    sde_steps: indices k, 0-based, of the steps that it takes.
    generator: of the noise of those steps, one torch.Generator or a list of one per image; also of the initial noise
        if the call names none.
    tail_steps: take what is left after the last of sde_steps (everything, if there are none) by `dynamics.dpm_step`, in
        at most so many steps, evenly over that part of the schedule. None leaves it to the pipeline.
    texts: a dict that remembers what the text encoders made of the prompts, for the next call.
    sibling: an earlier Rollout of the same call from the same start, whose steps up to the first stochastic one are
        taken from its tape.
    """
    call = {"generator": generator, **call, "output_type": "pt", "return_dict": False}
    tape = Rollout(call=call, dynamics_type=dynamics_type, noise_level=noise_level)
    tape.tail_start, tape.tail_steps = max(sde_steps, default=-1) + 1, tail_steps
    # guidance that is an object may have momentum: step k then depends on what the denoiser said before
    with_momentum = any(isinstance(part, diffusers.guiders.BaseGuidance) for part in pipe.components.values())
    ahead = None
    if sde_steps and sibling is not None and min(sibling.steps, default=None) == min(sde_steps):
        ahead = _Player(sibling, min(sde_steps), sibling.steps[min(sde_steps)].x)
    recorder = _Recorder(tape, pipe, sde_steps, generator, with_momentum, ahead)
    with torch.no_grad(), autocast(pipe), _taped(pipe, recorder), remembering(pipe, texts), in_pipeline_call():
        tape.images = pipe(**copy_nested(call))[0]
    if missing := set(sde_steps) - set(tape.steps):
        said = f"step {max(missing)} is beyond the last: this call takes {recorder.k} steps, from 0"
        raise CannotReplay(f"{said}; train.train_steps can name others")
    for k, taken in tape.steps.items():
        if k - 1 in tape.steps and torch.equal(taken.x, tape.steps[k - 1].x_next):
            taken.x = tape.steps[k - 1].x_next  # one copy serves two steps
    return tape


class CannotReplay(NotImplementedError):
    """This pipeline, or what it was asked for, has no tape whose replay is exact; the message says why."""


@contextmanager
def in_pipeline_call(its_own=True):
    """Around a call of the pipeline: what it raises is marked as its own, but for what a step rule within it raises."""
    try:
        yield
    except Exception as error:
        error.in_pipeline_call = getattr(error, "in_pipeline_call", its_own)
        raise


def replay(pipe, rollout, k, x=None):
    """Run step k of a rollout again, with gradients if grad mode is on.

    The pipeline repeats its call: up to step k its methods and its denoiser answer from the tape, and step k itself
    runs for real, at the recorded latents or, if given, at x (of their shape).

    Returns (velocity, Step): the velocity that reached the scheduler, and the recorded transition scored under it,
    or None at another x, which a step that was not stochastic needs.
    """
    run = inspect.unwrap(type(pipe).__call__)  # without the decorator that turns gradients off
    player = _Player(rollout, k, rollout.steps[k].x if x is None else x)
    again = copy_nested(rollout.call)
    if "prepare_latents" not in rollout.answers:  # then the pipeline draws them in its call, unless it is given x
        again["latents"] = player.x_like(rollout.noise)
    with autocast(pipe), _taped(pipe, player), suppress(_Arrived):
        run(pipe, **again)
    return player.velocity, rollout.steps[k].scored(player.velocity) if x is None else None


class _Recorder:
    """Lets everything happen and writes it down."""

    def __init__(self, tape, pipe, sde_steps, generator, keep_outputs, ahead):
        self.tape, self.pipe, self.sde_steps, self.generator = tape, pipe, set(sde_steps), generator
        self.k = 0  # the step under way
        self.begin = 0  # of a schedule that the pipeline enters in the middle, as image-to-image does
        self.second = None  # the second noise level of the schedule
        self.drawn = None  # the state of the call's generator after the last recorded method
        self.ahead = ahead  # a _Player that knows the steps before the first stochastic one
        self.skipping = ahead is not None  # those steps, up to the denoiser's call of the first stochastic one
        self.inside = False  # a recorded method may call another
        self.keep_outputs = keep_outputs  # of the denoiser, not only their shapes
        self.x0_last = None  # what the network took for x0 in the step before, in the tail

    def method(self, name, method, *args, **kwargs):
        if self.inside:
            return method(*args, **kwargs)
        self.inside = True
        try:
            answer = next(self.ahead.answers[name]) if self.skipping else method(*args, **kwargs)
        finally:
            self.inside = False
        self.tape.answers[name].append(tree_map_only(torch.Tensor, rows_once, answer))
        self.drawn = self.generator_state()
        return copy_nested(answer)

    def generator_state(self):
        generator = self.tape.call["generator"]
        first = generator[0] if isinstance(generator, list) else generator
        return first and first.get_state()

    def begin_schedule(self):
        """At the denoiser's first call: where the schedule begins, and whether a replay finds all that was drawn."""
        tape, levels = self.tape, _noise_levels(self.pipe.scheduler)
        self.begin, self.second = self.pipe.scheduler.begin_index or 0, levels[1].item()
        tape.sigmas = levels[self.begin :]
        tape.schedule = (levels if tape.schedule is None else tape.schedule)[self.begin :]
        name, state = type(self.pipe).__name__, self.generator_state()
        if self.begin and tape.tail_steps:
            raise CannotReplay(f"{name} begins in the middle of its schedule, where there is no tail of fewer steps")
        if "prepare_latents" in tape.answers and state is not None and not torch.equal(state, self.drawn):
            raise CannotReplay(f"{name} draws from the call's generator where a replay would draw something else")

    def set_timesteps(self, scheduler, work):
        work()
        _regrid_tail(scheduler, self.tape)
        self.tape.sigmas = None  # one that was read before was of another schedule
        if not self.inside:
            plain = (torch.Tensor, int, float, type(None))
            found = {name: value for name, value in vars(scheduler).items() if isinstance(value, plain)}
            self.tape.answers["set_timesteps"].append(copy_nested(found))

    def denoiser(self, forward, *args, **kwargs):
        if self.tape.sigmas is None:  # before the first forward, which reading them later would wait for
            self.begin_schedule()
        self.skipping = self.skipping and self.k < self.ahead.target
        if self.skipping:
            self.tape.outputs[self.k] = self.ahead.tape.outputs[self.k]
            return self.ahead.denoiser(forward)
        caches = [key for key, value in kwargs.items() if key.endswith("cache") and value is not None]
        if caches:  # filled in one step and read in the next: a replay of one step has it empty
            without = f"use_{caches[0]}"
            takes = without in inspect.signature(type(self.pipe).__call__).parameters
            remedy = f"; --call {without}=False would do" if takes else ""
            raise CannotReplay(f"{type(self.pipe).__name__} hands {caches[0]} from step to step{remedy}")
        output = forward(*args, **kwargs)
        kept = copy_nested(output) if self.keep_outputs else tree_map_only(torch.Tensor, lambda t: t.to("meta"), output)
        self.tape.outputs[self.k].append(kept)
        return output

    def step(self, scheduler, output, timestep, sample):
        tape, k = self.tape, self.k
        inverted = scheduler.config.invert_sigmas  # such models run from 0 to 1 and predict x0 - noise
        if k == 0:
            tape.noise = sample.detach().clone()
        if self.skipping:
            self.k += 1
            return self.ahead.step(scheduler, output, timestep, sample)
        if k in self.sde_steps:
            x, velocity = sample.detach().clone(), -output if inverted else output
            sigma, sigma_next = tape.sigmas[k : k + 2].tolist()
            step = functools.partial(
                dynamics.step, tape.dynamics_type, sigma=sigma, sigma_next=sigma_next, noise_level=tape.noise_level,
                sigma_second=self.second,
            )  # fmt: skip
            with in_pipeline_call(its_own=False):
                taken = step(v=velocity, x=x, generator=self.generator)
            if taken.x_next.dtype != output.dtype:  # pass on the dtype that diffusers passes on, and score that
                taken = step(v=velocity, x=x, x_next=taken.x_next.to(output.dtype))
            tape.steps[k] = Transition(x, taken.x_next, taken.log_prob, velocity.detach(), step)
            tape.x0 = taken.x_next
        elif tape.tail_steps and k >= tape.tail_start:
            velocity, sigmas = -output if inverted else output, tape.sigmas.tolist()
            x_next, self.x0_last = dynamics.dpm_step(velocity, sample, *sigmas[k : k + 2], sigmas[k - 1], self.x0_last)
            tape.x0 = x_next.to(output.dtype)
        else:
            scheduler._step_index = self.begin + k  # by index: a timestep may occur twice
            tape.x0 = FlowMatchEulerDiscreteScheduler.step(scheduler, output, timestep, sample, return_dict=False)[0]
        self.k += 1
        return tape.x0.clone()


class _Player:
    """Answers from the tape. The first step() already hands out the latents of step k; that one happens and ends it."""

    def __init__(self, tape, target, x):
        self.tape, self.target, self.x = tape, target, x
        self.k = 0
        self.answers = {name: iter(answers) for name, answers in tape.answers.items()}
        self.outputs = iter([output for k in range(target) for output in tape.outputs[k]])
        self.velocity = None
        self.latents = None  # as the pipeline was last handed them

    def x_like(self, like):
        """x for the pipeline, as a tensor like another."""
        self.latents = self.x.to(like, copy=True)
        return self.latents

    def method(self, name, method, *args, **kwargs):
        answer = copy_nested(next(self.answers[name]))
        if self.target == 0 and name.startswith("prepare_"):
            answer = tree_map_only(torch.Tensor, self._initial, answer)
        return answer

    def _initial(self, tensor):
        """The given x in the place of the initial latents."""
        noise = self.tape.noise
        same = tensor.shape == noise.shape and torch.equal(tensor.to(noise), noise)
        return self.x_like(tensor) if same else tensor

    def set_timesteps(self, scheduler, work):
        """Leave what the rollout found, without the copies to the device that its next step would wait for."""
        vars(scheduler).update(copy_nested(next(self.answers["set_timesteps"])))

    def denoiser(self, forward, *args, **kwargs):
        if self.k == self.target:
            return forward(*args, **kwargs)
        device = self.x.device  # zeros will do: step() answers with the latents of step k, whatever was said before
        return tree_map_only(
            torch.Tensor, lambda t: torch.zeros_like(t, device=device) if t.is_meta else t.clone(), next(self.outputs)
        )

    def step(self, scheduler, output, timestep, sample):
        if self.k < self.target:
            self.k += 1
            return self.x_like(self.tape.x0)  # x at once; x0 for its dtype and device
        untouched = sample is self.latents and sample._version == 0
        if not (untouched or self.same(sample)):
            reason = "the pipeline changes its latents itself, as where a part of them is given"
            raise CannotReplay(f"step {self.target} would not begin at these latents: {reason}")
        self.velocity = -output if scheduler.config.invert_sigmas else output
        raise _Arrived

    def same(self, sample):
        """Whether these latents are x, or x rounded to the model's dtype if it is not a recorded one.

        To know, one waits for the device; so it is not asked where the pipeline brings the very tensor it was handed.
        """
        recorded = self.target in self.tape.steps and self.x is self.tape.steps[self.target].x
        return (sample - self.x.to(sample)).abs().max() <= (0 if recorded else 2**-8 * self.x.abs().max())


class _Arrived(BaseException):
    """Ends a replayed call; no pipeline catches it."""


@functools.cache
def _stepping(cls):
    """A subclass of a scheduler's class whose `step()` is handed to a listener, on a schedule with the tape's tail."""

    def step(self, model_output, timestep, sample, *args, return_dict=True, **kwargs):
        if kwargs.get("per_token_timesteps") is not None:
            raise CannotReplay("the pipeline steps each token at a noise level of its own")
        x_next = self.listener.step(self, model_output, timestep, sample)
        self._step_index = (self.begin_index or 0) + self.listener.k  # by which inpainting noises what is given
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=x_next) if return_dict else (x_next,)

    def scale_model_input(self, sample, timestep=None):  # called where the class is not diffusers' very own
        return sample

    @functools.wraps(cls.set_timesteps)  # pipelines look at its arguments
    def set_timesteps(self, *args, **kwargs):
        self.listener.set_timesteps(self, functools.partial(cls.set_timesteps, self, *args, **kwargs))

    def deepcopy(self, memo):  # with a copy a pipeline steps latents of another kind, sound: that stays its own ODE
        twin, listener = copy.copy(self), self.listener

        def step(*args, **kwargs):
            twin._step_index = len(listener.tape.answers["step"])  # earlier steps may have been answered from a tape
            return cls.step(twin, *args, **kwargs)

        twin.step = functools.partial(listener.method, "step", step)
        return twin

    members = {"step": step, "scale_model_input": scale_model_input, "set_timesteps": set_timesteps}
    members |= {"__deepcopy__": deepcopy, "__module__": cls.__module__}
    return type(cls.__name__, (cls,), members)


def _regrid_tail(scheduler, tape):
    """Put tail_steps in the place of more steps that a schedule has from tail_start on, evenly by index."""
    tape.schedule = _noise_levels(scheduler)
    start, steps, end = tape.tail_start, tape.tail_steps, len(scheduler.timesteps)
    if not steps or steps >= end - start:
        return
    before, almost, last = tape.schedule[-3:].tolist()
    place = np.arange(end + 1.0)
    place[-1] = end - 1 + min(1, (almost - last) / (before - almost))  # the last step of SD3's is next to nothing
    even = np.linspace(place[start], place[-1], steps + 1)[1:]

    def regridded(levels, places):  # up to tail_start they stay as they are
        tail = np.interp(places, place[: len(levels)], levels.double().cpu())
        return torch.cat([levels[: start + 1], torch.from_numpy(tail).to(levels)])

    scheduler.sigmas = regridded(scheduler.sigmas, even)
    scheduler.timesteps = regridded(scheduler.timesteps, even[:-1])


def _noise_levels(scheduler):
    """(T + 1,) float32, 1 -> 0, on the CPU."""
    sigmas = scheduler.sigmas.float().cpu()
    return 1 - sigmas if scheduler.config.invert_sigmas else sigmas


@contextmanager
def _taped(pipe, listener):
    """Route the pipeline's methods, denoisers and scheduler through a listener; put everything back at the end."""
    with ExitStack() as stack:
        for name in dir(type(pipe)):
            if name.startswith(("encode_", "prepare_", "generate_")) and callable(getattr(pipe, name)):
                setattr(pipe, name, functools.partial(listener.method, name, getattr(pipe, name)))
                stack.callback(delattr, pipe, name)
        if hasattr(getattr(pipe, "vae", None), "encode"):
            pipe.vae.encode = functools.partial(_encode, pipe.vae.encode, listener)
            stack.callback(delattr, pipe.vae, "encode")
        stack.enter_context(routed(pipe.scheduler, _stepping, listener))
        for name, network in networks(pipe).items():
            if name.startswith(("transformer", "controlnet")):
                stack.enter_context(routed(network, listening, listener.denoiser))
        yield


def _encode(encode, listener, *args, **kwargs):
    """The VAE's encoding of a given image, and what a pipeline then draws from it, from the tape or onto it."""
    answer = listener.method("vae.encode", encode, *args, **kwargs)
    if hasattr(answer, "latent_dist"):  # the tape's own stays as it is
        sample, answer.latent_dist = answer.latent_dist.sample, copy.copy(answer.latent_dist)
        answer.latent_dist.sample = functools.partial(listener.method, "sample", sample)
    return answer


def rows_once(tensor):
    """Equal rows, such as the embeddings of one prompt for its images, in the memory of one of them."""
    alike = tensor.ndim > 1 and len(tensor) > 1 and torch.equal(tensor, tensor[:1].expand_as(tensor))
    return tensor[:1].clone().expand_as(tensor) if alike else tensor


def copy_nested(tree):
    """A copy of nested arguments or results: some pipelines write into the lists and tensors that they are given."""
    return tree_map_only(torch.Tensor, torch.clone, tree)


# ---------------------------------------------------------------------------------------------------------------------
# Parameter sets: the reference, the average and other policies are copies of the trainable parameters only


class Snapshot:
    """A copy of parameters, on their own device or another, that can take their place for a while.

    Of sharded parameters it holds the same shard.
    """

    def __init__(self, parameters, device=None):
        self.parameters = list(parameters)
        self.values = [p.detach().to(device or p.device, copy=True) for p in self.parameters]

    @contextmanager
    def loaded(self):
        """Within it the parameters have the snapshot's values; afterwards always their own again."""
        own = [p.detach().clone() if isinstance(p, DTensor) else p.data for p in self.parameters]
        try:
            self._put(self.values)
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, values):
        for p, value in zip(self.parameters, values, strict=True):
            if isinstance(p, DTensor):
                p.copy_(value.to(p.device))  # in place: blocks are put together from this memory
            else:
                p.data = value.to(p.device)

    @torch.no_grad()
    def update(self, decay):
        """values <- decay * values + (1 - decay) * parameters."""
        for value, p in zip(self.values, self.parameters, strict=True):
            value.lerp_(p.detach().to(value.device), 1 - decay)


def kl_reference(policy, train):
    """The Snapshot that the KL is measured against: the base model, or the policy as it is now.

    policy: {name: parameter}. The base model has adapters that add nothing.
    """
    reference = Snapshot(policy.values(), None if train.ref_param_device == "same_as_model" else "cpu")
    if train.kl_reference == "base":
        for value in (value for name, value in zip(policy, reference.values, strict=True) if ".lora_B." in name):
            value.zero_()
    return reference


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and seeds: all from (seed, epoch, prompt, member), nothing from what was drawn before


def epoch_rows(rows, count, seed, epoch):
    """The rows of an epoch (from 1): `count` of them, going through the whole list in a new order each time.

    If a row has a weight, they are drawn by their weights instead, anew in each epoch.
    """
    if any("weight" in row for row in rows):
        weights = np.array([row.get("weight", 1) for row in rows], float)
        rng, scarce = np.random.default_rng([seed, epoch]), count > np.count_nonzero(weights)
        return [rows[i] for i in rng.choice(len(rows), count, replace=scarce, p=weights / weights.sum())]
    places = range((epoch - 1) * count, epoch * count)
    turns = {place // len(rows) for place in places}
    orders = {turn: np.random.default_rng([seed, turn]).permutation(len(rows)) for turn in turns}
    return [rows[orders[p // len(rows)][p % len(rows)]] for p in places]


@dataclass
class Call:
    """One call of the pipeline in an epoch; the unit of sampling and of replay."""

    members: list
    """[(group, member)] of its images, both from 0."""
    rows: list
    """What each image is made of: the object of the data file, with its pictures."""
    kwargs: dict
    """Keyword arguments of the pipeline."""
    step_generators: list
    """A torch.Generator for each image, of the noise of its stochastic steps; kwargs have one of its initial noise."""


def call_arguments(pipe, section, extra, rows):
    """Keyword arguments of the pipeline: what it takes of a section of the settings and of rows, and the extra ones."""
    height, width = height_width(section.resolution)
    named = dict(height=height, width=width, num_inference_steps=section.num_inference_steps)
    named["guidance_scale"] = section.guidance_scale
    takes = inspect.signature(type(pipe).__call__).parameters
    if isinstance(extra.get("negative_prompt"), str):  # not every pipeline takes one text for several prompts
        extra = extra | {"negative_prompt": [extra["negative_prompt"]] * len(rows)}
    return {name: value for name, value in named.items() if name in takes} | extra | call_of(rows, takes)


def epoch_calls(pipe, args, rows, epoch, same_init_noise=False):
    """The calls that make this process's share of an epoch's images, in the order of (prompt, member).

    same_init_noise: start all images of a group from one noise, instead of each from its own.
    """
    train = args.train
    seed_global_generators(train.seed, epoch)
    chosen = epoch_rows(rows, train.unique_sample_num_per_epoch, train.seed, epoch)
    members = local_shard([(group, member) for group in range(len(chosen)) for member in range(train.group_size)])
    calls = []
    for first in range(0, len(members), train.per_device_batch_size):
        batch = members[first : first + train.per_device_batch_size]
        # the last number tells the noise at the start, 0, from that of the steps, 1
        start_seeds = [(train.seed, epoch, g, 0 if same_init_noise else m, 0) for g, m in batch]
        step_seeds = [(train.seed, epoch, g, m, 1) for g, m in batch]
        given = [with_pictures(chosen[g]) for g, _ in batch]
        kwargs = call_arguments(pipe, train, args.call, given) | {"generator": generators(*start_seeds)}
        calls.append(Call(batch, given, kwargs, generators(*step_seeds)))
    return calls


def candidate_steps(train):
    """Indices of the steps that may be trained, in order: train_steps, or all but the last."""
    return list(range(train.num_inference_steps - 1)) if train.train_steps is None else sorted(train.train_steps)


def minibatches(train, epoch):
    """For each optimizer step of an epoch, the calls of this process that it is over, counted from 0.

    Of each `gradient_step_per_epoch` calls in a row each step of a pass takes one, at random from (seed, epoch): of 8
    calls one step of two takes, say, 0, 3, 4, 6 and the other 1, 2, 5, 7, whatever the number of processes.
    """
    calls = train.unique_sample_num_per_epoch * train.group_size // train.per_device_batch_size
    order, steps = np.random.default_rng([train.seed, epoch, 1]), []
    for _ in range(train.num_inner_epochs):
        rows = local_shard(order.permuted(np.arange(calls).reshape(-1, train.gradient_step_per_epoch), axis=1))
        steps += list((rows - rows.min()).T)
    return steps


def height_width(resolution):
    """(height, width) in pixels of a resolution given as an int or a pair."""
    return (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)


def generators(*seeds):
    """One CPU generator per tuple of integers: the same noise on every device, in every batch and on every rank."""
    return [torch.Generator().manual_seed(_mixed(seed)) for seed in seeds]


def seed_global_generators(*seed):
    """Those of Python, numpy and torch, from which a user's reward may draw; each process has its own."""
    set_seed(_mixed((*seed, rank())) % 2**32)


def _mixed(seed):
    return int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)


# ---------------------------------------------------------------------------------------------------------------------
# Advantages and the optimizer step


def group_advantages(rewards, group_size, global_std=False):
    """A = (R − group mean) / std (Flow-GRPO, eq. 4). rewards: (N,), groups contiguous. Returns (N,).

    The std is the group's, or with global_std that of all rewards (both without Bessel's correction). A group of
    equal rewards has advantage 0: it says nothing about which image is better.
    """
    groups = rewards.reshape(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    std = rewards.std(correction=0) if global_std else groups.std(dim=1, correction=0, keepdim=True)
    constant = (groups == groups[:, :1]).all(dim=1, keepdim=True)
    return torch.where(constant, 0, centred / (std + 1e-4)).reshape(-1)


def gdpo_advantages(scores, weights, group_size):
    """GDPO, arXiv 2601.05242: the weighted sum of each reward's own advantages in its groups, over the sum's std.

    scores: {"name": (N,)}, groups contiguous; weights: {"name": weight}. Returns (N,), of mean 0 and, over the epoch,
    std 1. So the scale of a reward does not count (if its std is well above 1e-4), only its weight; one that is
    constant in a group adds 0 there.
    """
    total = sum(weight * group_advantages(scores[name], group_size, False) for name, weight in weights.items())
    return total / (total.std(correction=0) + 1e-4)


class Metrics:
    """Collects scalars and gives their means; nothing waits for the device until then."""

    def __init__(self):
        self.values = defaultdict(list)

    def add(self, named):
        for name, value in named.items():
            self.values[name].append(torch.as_tensor(value).detach().float())

    def means(self, prefix=""):
        return {f"{prefix}{name}": torch.stack(values).mean().item() for name, values in self.values.items()}

    def gather(self):
        """Take in those of all processes."""
        everyone = gather_rows({name: torch.stack(values) for name, values in self.values.items()})
        self.values.update({name: list(values) for name, values in everyone.items()})


def average_clip_step(run, optimizer, policy, update, max_grad_norm):
    """Average the gradients over the processes, clip their norm and take an optimizer step; zero the gradients.

    An update with a loss or a gradient that is not finite is skipped, and the run counts it. policy: {name: parameter};
    update: the Metrics of this update, with each `loss` in it. Returns the means over all processes and the norm of the
    gradient before clipping; nothing of an update that was skipped.
    """
    update.gather()
    average_gradients(list(policy.values()))
    norm = gradient_norm(policy.values())
    losses = [loss.to(norm.device) for loss in update.values.get("loss", ())]  # without gradients it is on the CPU
    finite = torch.stack([norm.float(), *losses]).isfinite().all()
    if finite:
        torch.nn.utils.clip_grads_with_norm_(policy.values(), max_grad_norm, norm)
        optimizer.step()
        run.skipped_in_a_row = 0
    else:
        parts = {name: torch.stack(values) for name, values in update.values.items()}
        parts |= {f"the gradient of {name}": p.grad for name, p in policy.items() if p.grad is not None}
        run.skipped_update(first_not_finite(parts) or "the norm of the gradient")
    optimizer.zero_grad()
    return {**update.means(), "grad_norm": norm.item()} if finite else {}


def gradient_norm(parameters):
    """That of all gradients together."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
