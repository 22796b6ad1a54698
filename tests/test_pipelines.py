"""The tape on every family of pipelines: a replay is the rollout again, bit by bit, and nothing is left behind.

With pictures too: control, editing, inpainting, image-to-image, image-to-video. And the families in the scripts, as a
user runs them. The core families run by default, the others with `-m families`.
"""

import contextlib
import copy
import gc
import importlib.util
import inspect
import json
import re
import shutil
import weakref
from types import SimpleNamespace

import conditioned_pipelines as conditioned
import diffusers
import numpy as np
import pytest
import tiny_pipelines
import torch
from conditioned_pipelines import BARE, CONDITIONED, GIVEN, LTX
from conftest import MINE, read_csv
from PIL import Image
from test_tape import by_hand

import common
import grpo
import nft
from harness import checks, compiled, contract, machine
from harness.flow_models import use_flow_matching

WORDED = tiny_pipelines.FAMILIES
FAMILIES = {"family": WORDED | CONDITIONED, "worded": WORDED, "pictured": CONDITIONED}  # by the name of the argument
FULL = {"finetune_type": "full"}  # where diffusers gives a network no adapters
CORE = {*tiny_pipelines.CORE, *conditioned.CORE}
# Whose texts are encoded again: with pictures in them, and by krea2 with positions in another order
ENCODE_AGAIN = {"krea2", "qwen_edit", "qwen_edit_plus", "hunyuan_video_concat", "hunyuan_video_replace"}


def pytest_generate_tests(metafunc):
    """The families beside the core ones take part when the marker is asked for."""
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"], scope="module")
    for argument in FAMILIES.keys() & set(metafunc.fixturenames):
        marked = [pytest.param(name, marks=pytest.mark.families) for name in FAMILIES[argument] if name not in CORE]
        asked = "families" in metafunc.config.option.markexpr
        core = [name for name in FAMILIES[argument] if name in CORE]
        metafunc.parametrize(argument, [*core, *(marked if asked else ())], scope="module")


def trainable(pipe, **args):
    return common.trainable_parameters(pipe, grpo.Args(lora_rank=4, lora_alpha=6, **args), seed=0)


def moved(parameters):
    """As a list, with values with which adapters do something."""
    torch.manual_seed(2)
    for parameter in parameters.values():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return list(parameters.values())


def noise(seed, call):
    return common.generators(*((seed, i) for i in range(len(call["prompt"]))))


def plain(pipe, call):
    torch.manual_seed(5)  # SD3's ControlNet and CogView4 draw from the global generator
    return pipe(**copy.deepcopy(call), generator=noise(0, call), output_type="pt", return_dict=False)[0]


def sample(pipe, call, steps=(), rule="Flow-SDE", noise_level=0.7, **more):
    """A rollout; by the ODE, if no steps are stochastic."""
    torch.manual_seed(5)
    return common.rollout(pipe, call | {"generator": noise(0, call)}, rule, noise_level, steps, noise(1, call), **more)


def fresh(family):
    torch.manual_seed(0)
    pipe, call = FAMILIES["family"][family]()
    use_flow_matching(pipe)
    return pipe, call


def traces(pipe):
    """What a rollout or a replay could leave behind on a pipeline."""
    return {
        "scheduler": (pipe.scheduler, type(pipe.scheduler), dict(pipe.scheduler.config)),
        "pipeline": (copy.deepcopy(dict(pipe.config)), set(vars(pipe))),
        "denoisers": [(type(denoiser), set(vars(denoiser))) for denoiser in common.denoisers(pipe).values()],
    }


@pytest.fixture(scope="module")
def made(family, dtype):
    """A pipeline with adapters, its call, what the plain pipeline and the ODE make of it, a tape of all but a step."""
    pipe, call = fresh(family)
    pipe.to(dtype)
    instead = {"target_modules": ("all-linear",)} if hasattr(pipe.transformer, "add_adapter") else FULL
    parameters = moved(trainable(pipe, **instead))
    with torch.no_grad(), common.autocast(pipe):
        images = plain(pipe, call)
    before, ode = traces(pipe), sample(pipe, call)
    tape = sample(pipe, call, range(len(ode.sigmas) - 2))
    whole = call.get("strength", 1) == 1  # image-to-image begins in the middle of its schedule
    return SimpleNamespace(
        pipe=pipe, call=call, parameters=parameters, plain=images, before=before, ode=ode, tape=tape, whole=whole
    )


def test_replay_is_the_rollout(made):
    assert len(made.tape.steps) == (3 if made.whole else 2) and made.tape.images.isfinite().all()
    trained = [p for each in common.denoisers(made.pipe).values() for p in each.parameters() if p.requires_grad]
    assert len(made.parameters) == len(trained) > 0 and all(p.dtype == torch.float32 for p in trained)
    for k, taken in made.tape.steps.items():
        velocity, step = common.replay(made.pipe, made.tape, k)
        assert torch.equal(velocity, taken.velocity), f"velocity of step {k}"
        assert torch.equal(step.log_prob, taken.log_prob), f"log-prob of step {k}"
        assert taken.log_prob.shape == (len(made.call["prompt"]),) and taken.velocity.std() > 0
        assert taken.x_next.dtype == taken.velocity.dtype  # what is scored is what is passed on
        gradients = torch.autograd.grad(step.log_prob.sum(), made.parameters, allow_unused=True)
        assert sum(g.float().square().sum() for g in gradients if g is not None) > 0, f"gradient of step {k}"


def test_what_is_known_already_changes_nothing(made, family):
    """Texts that were encoded before, and the pictures and steps before the noise of a call from the same start."""
    texts = {}
    first = sample(made.pipe, made.call, [1], texts=texts)
    with contextlib.ExitStack() as stack:
        for name, network in common.networks(made.pipe).items():
            if name.startswith("text_encoder") and family not in ENCODE_AGAIN:
                stack.enter_context(network.register_forward_pre_hook(lambda *_: pytest.fail("encodes again")))
        alone = sample(made.pipe, made.call, [1], texts=texts)
        shared = sample(made.pipe, made.call, [1], texts=texts, sibling=first)
    for other in (alone, shared):
        assert torch.equal(other.images, first.images)
        again = common.replay(made.pipe, other, 1)[1].log_prob
        assert torch.equal(again, first.steps[1].log_prob) and torch.equal(again, other.steps[1].log_prob)


def test_ode_is_the_plain_pipeline(made, dtype):
    """And so is every step without noise: the velocity on the tape is noise - data, the noise levels are its own."""
    flow = made.ode
    assert torch.equal(flow.images, made.plain) and not torch.equal(flow.images, made.tape.images)
    silent = sample(made.pipe, made.call, range(len(flow.sigmas) - 1), noise_level=0.0)
    off = (silent.x0.float() - flow.x0.float()).norm() / (flow.x0.float() - flow.noise.float()).norm()
    assert off < (1e-4 if dtype == torch.float32 else 0.1)
    assert (silent.sigmas[0] > 0.98) == made.whole and silent.sigmas[-1] == 0 and (silent.sigmas.diff() < 0).all()


def test_a_tail_has_its_grid_in_the_replay_too(made, dtype):
    if not made.whole:
        pytest.skip("begins in the middle: test_a_schedule_that_begins_in_the_middle")
    whole, tape = made.tape, sample(made.pipe, made.call, [0], tail_steps=2)
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
    assert given == made.call == FAMILIES["family"][family]()[1]  # some pipelines write into their arguments


def test_replay_at_other_latents(made, family):
    for k, taken in made.tape.steps.items():
        other = taken.x + 0.1 * torch.randn(taken.x.shape, generator=torch.Generator().manual_seed(3)).to(taken.x)
        if k in GIVEN.get(family, ()):
            with pytest.raises(common.CannotReplay, match=f"step {k} .* where a part of them is given"):
                common.replay(made.pipe, made.tape, k, other)
            continue
        velocity, step = common.replay(made.pipe, made.tape, k, other)
        same, _ = common.replay(made.pipe, made.tape, k, taken.x)
        assert step is None and velocity.shape == taken.velocity.shape and velocity.requires_grad
        assert not torch.equal(velocity, taken.velocity), f"step {k} does not depend on x"
        assert torch.equal(same, taken.velocity), f"step {k}"
    if family not in GIVEN:
        assert common.replay(made.pipe, made.tape, k + 1, other)[0].shape == other.shape  # of no stochastic step


def picture_keys(call):
    return [key for key in call if key.endswith("image")]


def test_what_is_given_takes_part(family):
    pipe, call = fresh(family)
    images = plain(pipe, call)
    for key in picture_keys(call) or {"prompt", "negative_prompt"} & set(call):
        other = ["three green triangles", "ugly"] if "prompt" in key else conditioned.inverted(call[key])
        assert not torch.equal(images, plain(pipe, call | {key: other})), key


def test_one_prompt_with_its_bare_pictures(pictured):
    """The call that every pipeline takes."""
    pipe, call = fresh(pictured)
    one = {key: value[:1] if "prompt" in key and isinstance(value, list) else value for key, value in call.items()}
    one |= {key: call[key][0] for key in picture_keys(call) if isinstance(call[key], list)}
    tape = sample(pipe, one, [1])
    assert len(tape.images) == 1 and torch.equal(common.replay(pipe, tape, 1)[1].log_prob, tape.steps[1].log_prob)


def test_a_list_of_pictures_is_one_for_each_prompt(pictured):
    """Then the first prompt's image does not depend on the second's picture."""
    pipe, call = fresh(pictured)
    size = 64 if pictured.startswith("flux2") else call["height"]
    call |= {key: conditioned.pictures(size) for key in picture_keys(call)}
    call["prompt"] = tiny_pipelines.PROMPTS
    key = picture_keys(call)[0]
    try:
        one, other = (sample(pipe, call | {key: conditioned.pictures(size, 0, last)}).x0 for last in (1, 2))
        apart = torch.equal(one[0], other[0]) and not torch.equal(one[1], other[1])
    except ValueError as error:
        assert "batch_size=1" in str(error) or "has to be of type" in str(error)
        apart = False
    assert apart == (pictured not in BARE)


@pytest.mark.parametrize("name", ["sd3_controlnet", "flux_control"])
def test_a_replay_encodes_nothing_and_skips_the_controlnet(name, monkeypatch):
    pipe, call = fresh(name)
    tape = sample(pipe, call, [2])
    monkeypatch.setattr(pipe.vae, "_encode", lambda _: pytest.fail("encodes again"))
    calls = []
    getattr(pipe, "controlnet", pipe.transformer).register_forward_pre_hook(lambda *_: calls.append(1))
    assert torch.equal(common.replay(pipe, tape, 2)[1].log_prob, tape.steps[2].log_prob) and len(calls) == 1


def test_a_tape_is_let_go_of_at_once(request):
    """No circle of references keeps its tensors until Python looks for one."""
    pipe, call = fresh("flux_control")
    gc.collect()
    gc.disable()
    request.addfinalizer(gc.enable)
    tape = sample(pipe, call, [2])
    common.replay(pipe, tape, 2)
    tape = weakref.ref(tape)
    assert tape() is None


def test_a_schedule_that_begins_in_the_middle():
    pipe, call = fresh("sd3_image_to_image")
    levels = sample(pipe, call | {"strength": 1.0}).sigmas
    assert torch.equal(sample(pipe, call).sigmas, levels[1:])
    std = sample(pipe, call, [0]).steps[0].std  # which is no first step of Flow-SDE, at a noise level of 1
    assert torch.allclose(std, 0.7 * (levels[1] / (1 - levels[1]) * (levels[1] - levels[2])).sqrt())
    with pytest.raises(common.CannotReplay, match="step 3 is beyond the last: this call takes 3 steps"):
        sample(pipe, call, [3])
    with pytest.raises(common.CannotReplay, match="StableDiffusion3Img2ImgPipeline begins in the middle"):
        sample(pipe, call, [0], tail_steps=1)


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
        sample(pipe, call)


@pytest.mark.parametrize(
    "name, what, remedy",
    [
        ("lumina", "finetune_type = 'lora'", ": LuminaNextDiT2DModel takes no adapters; full would do\n"),
        ("kandinsky5", f"target_modules = {grpo.Args.target_modules}", "found in the base model"),
    ],
)
def test_networks_without_layers_for_the_default_adapters(ends, name, what, remedy):
    said = ends(trainable, fresh(name)[0])
    assert said.startswith(f"error: {what}") and remedy in said


@pytest.mark.parametrize("name", ["sana", "wan"])
def test_other_solvers_become_the_euler_method_of_their_flow(name):
    torch.manual_seed(0)
    pipe, call = tiny_pipelines.FAMILIES[name]()
    pipe.scheduler.set_timesteps(4)
    theirs = pipe.scheduler.sigmas
    use_flow_matching(pipe)
    sigmas = sample(pipe, call).sigmas
    even, shift = torch.tensor([1, 0.75, 0.5, 0.25, 0]), tiny_pipelines.FLOW_SIGMAS["flow_shift"]
    assert torch.allclose(sigmas, shift * even / (1 + (shift - 1) * even))
    assert torch.allclose(sigmas, theirs, atol=2e-3)
    assert tuple(pipe.config["scheduler"]) == ("diffusers", "FlowMatchEulerDiscreteScheduler")  # as it is saved


@pytest.mark.parametrize("shrunk", [lambda x: 0.9 * x, lambda x: x.mul_(0.9)], ids=["others", "in place"])
def test_latents_changed_between_steps_are_refused(shrunk):
    pipe, call = fresh("stable_diffusion_3")
    shrink = {"callback_on_step_end": lambda pipe, k, timestep, tensors: {"latents": shrunk(tensors["latents"])}}
    tape = sample(pipe, call | shrink, (0, 1))
    common.replay(pipe, tape, 0)
    with pytest.raises(common.CannotReplay, match="changes its latents"):
        common.replay(pipe, tape, 1)


@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize("name", ["stable_diffusion_3", "flux"])
def test_latents_that_arrive_untouched_are_not_compared(name, k, monkeypatch):
    pipe, call = fresh(name)
    tape = sample(pipe, call, (0, 1))
    monkeypatch.delattr(common._Player, "same")
    assert torch.equal(common.replay(pipe, tape, k)[1].log_prob, tape.steps[k].log_prob)


def test_a_cache_between_steps_is_refused():
    pipe, call = fresh("qwen_image_21")
    plain(pipe, call)
    before = traces(pipe)
    with pytest.raises(common.CannotReplay, match="use_kv_cache=False"):
        sample(pipe, call | {"use_kv_cache": True})
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
    parameters = trainable(pipe)
    for parameter in parameters.values():
        parameter.data = parameter.data.to(device)
    compiled.compile_blocks(pipe.transformer)
    return moved(parameters)


def assert_compiled_replays(pipe, tape):
    """And leave gradients."""
    for k, taken in tape.steps.items():
        velocity, step = common.replay(pipe, tape, k)
        assert torch.equal(velocity, taken.velocity) and torch.equal(step.log_prob, taken.log_prob), k
        assert not taken.velocity.requires_grad and not tape.images.requires_grad
        step.log_prob.sum().backward()


@pytest.mark.families
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles for a CPU with g++")
def test_compiled_blocks_replay_exactly(capsys):
    """In bfloat16 the code compiled for gradients rounds elsewhere than that without: sampling must run it too."""
    pipe, call = fresh("stable_diffusion_3")
    compiled.say_progress()
    pipe.transformer.transformer_blocks = pipe.transformer.transformer_blocks[-1:]  # compiling takes its time
    parameters = compile_on("cpu", pipe)
    blocks = [module for module in pipe.transformer.modules() if module._compiled_call_impl is not None]
    assert {type(block).__name__ for block in blocks} == set(pipe.transformer._no_split_modules)
    tape = sample(pipe, call, [0, 2])
    assert_compiled_replays(pipe, tape)
    assert sum(p.grad.norm() for p in parameters if p.grad is not None) > 0
    assert contract.ode_difference(pipe, tape.call) == 0
    assert re.search(r"first update wait.*\ncompiled part 1 \(\d+ s\)\ncompiled part 2 ", capsys.readouterr().out)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("looks", [False, True], ids=["", "a network that looks at its own numbers"])
def test_recorded_calls_replay_exactly(looks, capsys):
    """By CUDA graphs, from the second call of the same shapes on; also after updates, and beside other calls."""
    pipe, call = fresh("stable_diffusion_3")
    if looks:
        pipe.transformer.norm_out.register_forward_pre_hook(lambda module, args: args[0].sum().item() and None)
    parameters, before = compile_on("cuda", pipe), None
    for _ in range(3):
        tape = sample(pipe, call, [0, 1, 2])
        assert before is None or not torch.equal(tape.x0, before)
        before = tape.x0
        assert_compiled_replays(pipe, tape)
        for parameter in parameters:
            parameter.data -= 0.01 * parameter.grad.sign()
            parameter.grad = None
    assert contract.ode_difference(pipe, tape.call) == 0
    one = call | {name: call[name][:1] for name in ("prompt", "negative_prompt")}
    for _ in range(3):  # another size, and random numbers of the GPU's own, after what cannot be recorded too
        sample(pipe, one, [0])
        torch.randn(2, device="cuda")
    assert ("without CUDA graphs" in capsys.readouterr().out) == looks


@pytest.mark.parametrize("script", [grpo, nft], ids=["grpo", "nft"])
def test_a_family_in_a_script(start, monkeypatch, tmp_path, worded, script):
    (tmp_path / "model_index.json").write_text("{}")
    pipe, call = fresh(worded)
    monkeypatch.setattr(machine, "load_pipeline", lambda *_: pipe)
    monkeypatch.setattr(checks, "check_model", lambda _: inspect.signature(pipe.__call__).parameters)
    short = (
        "--train.max-epochs 1 --train.unique-sample-num-per-epoch 1 --train.group-size 2 --train.num-inference-steps 2 "
        "--train.per-device-batch-size 2 --train.gradient-step-per-epoch 1 --train.train-steps 0 --dtype float32 "
        "--train.learning-rate 0.02 --train.ema-decay 0 --cpu-threads 1"
    )
    argv = [*short.split(), "--reward", f"{MINE}:smooth=1", "--model", tmp_path]
    argv += ["--train.resolution", call["height"], "--eval.resolution", call["height"]]
    argv += ["--train.guidance-scale", call.get("guidance_scale", 1)]
    argv += [] if hasattr(pipe.transformer, "add_adapter") else ["--finetune-type", "full"]
    argv += ["--target-modules", "all-linear"] if worded in tiny_pipelines.OTHER_TARGETS else []
    call |= {"negative_prompt": "blurry"} if "negative_prompt" in call else {}
    extra = [f"{k}={json.dumps(v)}" for k, v in call.items() if k not in checks.SET_BY_THE_SCRIPT]
    folder = start(script, *argv, "--call", *extra)
    assert "contract holds" in (folder / "log.txt").read_text()
    before, after = read_csv(folder / "metrics.csv")
    assert before["eval/total"] != after["eval/total"] and float(after["train/grad_norm"]) > 0
    assert (folder / "curve.png").exists() == (importlib.util.find_spec("matplotlib") is not None)
    base, pair = (np.array(Image.open(folder / "images" / f"epoch_000{epoch}.png")) for epoch in (0, 1))
    across = 4 + 128 * min(call.get("num_frames", 1), 8)
    assert (pair[4:132, 4:across] == base[4:132, 4:across]).all() and pair.size > base.size and base.shape[1] >= across


def test_the_recipe_for_kontext_runs(start, tmp_path):
    """An epoch of image editing on random weights, saved as a user's model is."""
    FAMILIES["family"]["flux_kontext"]()[0].save_pretrained(tmp_path / "kontext")
    rows = [{"prompt": f"make it {color}", "image": f"{color}.png"} for color in ("red", "blue")]
    for row in rows:
        Image.new("RGB", (16, 16), row["prompt"].split()[-1]).save(tmp_path / row["image"])
    (tmp_path / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = start(
        *(grpo, "--config", "docs/recipes/flux-kontext-edit.yaml", "--model", tmp_path / "kontext"),
        *("--prompts", tmp_path / "edits.jsonl", "--reward", f"{MINE}:smooth=1", "--train.max-epochs", 1),
        *("--eval.prompts", tmp_path / "edits.jsonl", "--call", "max_area=64", "_auto_resize=False"),
        *("--train.resolution", 16, "--eval.resolution", 16, "--train.unique-sample-num-per-epoch", 2),
    )
    assert "contract holds" in (folder / "log.txt").read_text()
    assert len(read_csv(folder / "metrics.csv")) == 2 and (folder / "lora").is_dir()
