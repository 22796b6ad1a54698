"""docs/examples/: each algorithm's loss in closed form, and each script as its reader runs it, copied to the top."""

import difflib
import importlib
import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL, read_csv
from safetensors.torch import load_file
from test_checkpoint import assert_same_run
from test_nft import Watched
from torch.nn.functional import logsigmoid

import common
import nft
import rewards

ROOT = Path(__file__).resolve().parent.parent
SIGMA, BETA = 0.6, 3.0
A = torch.tensor([2.0, -1.0, -1.0, 0.5, -1.5, 1.0], dtype=torch.float64)  # two groups of three
PAIRS = torch.ones(3, dtype=torch.bool)

sys.path.insert(0, str(ROOT / "docs" / "examples"))  # before a copy at the top
SCRIPTS = awm, dpo, dgpo = [importlib.import_module(name) for name in ("awm", "dpo", "dgpo")]
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)


def world(batch=6):
    """(v, (v_old, x_t, x0), target) of a few images: target is noise − x0, v_old a wrong guess of it, v another."""
    x0, noise, wrong, moved = torch.randn(4, batch, 4, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    target, x_t = noise - x0, (1 - SIGMA) * x0 + SIGMA * noise
    return target + 0.5 * wrong + 0.1 * moved, (target + 0.5 * wrong, x_t, x0), target


def error(v, target):
    return ((v - target) ** 2).mean((1, 2, 3))


def gradient(function, v):
    v = v.detach().requires_grad_()
    return torch.autograd.grad(function(v), v)[0]


def alive(slope):
    return slope.abs().amax((1, 2, 3)) > 0  # (B,)


def near(a, b):
    return torch.allclose(*(torch.as_tensor(t).double() for t in (a, b)), rtol=1e-6, atol=1e-15)


# Advantage Weighted Matching


WEIGHTS = {  # w(e), with p of ghuber 0.3, and its slope at e = 0
    "uniform": (lambda e: e, 1),
    "t": (lambda e: SIGMA * e, SIGMA),
    "t2": (lambda e: SIGMA**2 * e, SIGMA**2),
    "huber": (lambda e: SIGMA * ((e + 1e-10).sqrt() - 1e-5), SIGMA / 2 * 1e5),
    "ghuber": (lambda e: SIGMA / 0.3 * ((e + 1e-10) ** 0.3 - 1e-3), SIGMA * 1e7),
}


@pytest.mark.parametrize("weighting", WEIGHTS)
def test_awm_begins_as_matching_with_advantages_for_weights(weighting):  # W1, W3, W4
    w, at_0 = WEIGHTS[weighting]
    e = torch.tensor([0.0, 1e-4, 0.3, 2.0], dtype=torch.float64)
    for sigma in (SIGMA, torch.full((4,), SIGMA).double()):
        slope = gradient(lambda e, s=sigma: awm.weighted_error(e, s, weighting, 0.3).sum(), e)
        assert near(awm.weighted_error(e, sigma, weighting, 0.3), w(e)) and near(slope[0], at_0)
        assert near(slope, gradient(lambda e: w(e).sum(), e))
    _, (v_old, x_t, x0), target = world()
    rest = (v_old, x_t, x0, SIGMA, A, 1e-4, 1.2, weighting, 0.3)
    loss, terms = awm.awm_loss(v_old, *rest)
    clipped = A.clamp(-1.2, 1.2)
    assert loss == -clipped.mean() and terms["log_ratio"] == terms["log_ratio_std"] == terms["clip_fraction"] == 0
    slope = gradient(lambda v: awm.awm_loss(v, *rest)[0], v_old)
    assert near(slope, gradient(lambda v: (clipped * w(error(v, target))).mean(), v_old))


@pytest.mark.parametrize("c", [0.0, 0.02, 10.0])
def test_awm_clips_what_is_past_the_range(c):
    v, (v_old, x_t, x0), target = world()
    ratio = (error(v_old, target) - error(v, target)).exp()
    rest = (v_old, x_t, x0, SIGMA, A, c, 5.0, "uniform")
    loss, terms = awm.awm_loss(v, *rest)
    assert near(loss, torch.maximum(-A * ratio, -A * ratio.clamp(1 - c, 1 + c)).mean())
    past = torch.where(A > 0, ratio > 1 + c, ratio < 1 - c)
    assert torch.equal(alive(gradient(lambda v: awm.awm_loss(v, *rest)[0], v)), ~past)
    assert near(terms["clip_fraction"], ((ratio - 1).abs() > c).float().mean()) and (0 < past.sum() < 6 or c == 10)
    assert awm.awm_loss(v, v_old, x_t, x0, SIGMA, 0 * A, c, 5.0)[0] == 0  # W2


def test_awm_draws_steps_by_a_logit_normal():
    train = awm.TrainArgs(num_train_steps=1, train_steps=[0, 1, 5, 8], time_sampling="logit-normal")
    drawn = torch.tensor([awm.drawn_steps(train, epoch)[0] for epoch in range(3000)])
    u = torch.sigmoid(torch.randn(100_000, generator=torch.Generator().manual_seed(0)))
    nearest = (10 * (1 - u)).round()
    share, expected = (torch.stack([(of == k).double().mean() for k in (0, 1, 5, 8)]) for of in (drawn, nearest))
    assert torch.allclose(share, expected / expected.sum(), atol=0.03)


# Online Diffusion-DPO


def test_dpo_begins_at_log_2_and_descends_to_the_chosen():  # O1
    _, (v_ref, x_t, x0), target = world()
    loss, terms = dpo.dpo_loss(v_ref, v_ref, x_t, x0, SIGMA, PAIRS, BETA)
    assert near(loss, -logsigmoid(torch.zeros(()))) and terms["argument"] == 0
    slope = gradient(lambda v: dpo.dpo_loss(v, v_ref, x_t, x0, SIGMA, PAIRS, BETA)[0], v_ref)
    signs = torch.tensor([1.0, 1, 1, -1, -1, -1]).double()
    assert near(slope, gradient(lambda v: BETA / 4 * (signs * error(v, target)).sum() / 3, v_ref))
    assert torch.equal((error(v_ref - 0.1 * slope, target) - error(v_ref, target)).sign(), -signs)


def test_dpo_compares_a_pair_with_the_reference():  # O2, O3
    v, rest, target = world()
    z = BETA / 2 * (error(v, target) - error(rest[0], target)).reshape(2, 3).diff(dim=0)[0]
    loss, terms = dpo.dpo_loss(v, *rest, SIGMA, PAIRS, BETA)
    assert near(loss, -logsigmoid(z).mean()) and near(terms["argument"], z.mean())
    assert near(terms["implicit_accuracy"], (z > 0).float().mean())
    swapped = [t.roll(3, 0) for t in (v, *rest)]
    assert near(dpo.dpo_loss(*swapped, SIGMA, PAIRS, BETA)[1]["argument"], -terms["argument"])
    some = torch.tensor([True, False, True])
    assert near(dpo.dpo_loss(v, *rest, SIGMA, some, BETA)[0], -logsigmoid(z[some]).mean())
    assert torch.equal(alive(gradient(lambda v: dpo.dpo_loss(v, *rest, SIGMA, some, BETA)[0], v)), some.repeat(2))
    assert dpo.dpo_loss(v, *rest, SIGMA, ~PAIRS, BETA)[0] == 0


# Direct Group Preference Optimization


def dgpo_gradient(v, v_ref, x_t, x0, advantages=A, size=3, clip=9.0):
    rest = (x_t, x0, SIGMA, advantages, size, BETA, 5.0, clip)
    return gradient(lambda v: dgpo.dgpo_loss(v, v_ref, v_ref, *rest)[0], v)


def test_dgpo_begins_with_half_the_weight():  # G1'
    _, (v_ref, x_t, x0), target = world()
    _, terms = dgpo.dgpo_loss(v_ref, v_ref, v_ref, x_t, x0, SIGMA, A, 3, BETA, 5.0, 1e-3)
    assert terms["group_weight"] == 0.5 and terms["group_weight_std"] == 0 and terms["clip_fraction"] == 0
    assert near(dgpo_gradient(v_ref, v_ref, x_t, x0), gradient(lambda v: (A * error(v, target)).mean() / 2, v_ref))


def test_dgpo_has_the_gradient_of_the_preference_of_groups():  # G4', G2'
    v, rest, target = world()

    def preference(v):
        s = (BETA * A * (error(v, target) - error(rest[0], target))).reshape(2, 3).mean(1)
        return -logsigmoid(-s).mean() / BETA

    assert near(dgpo_gradient(v, *rest), gradient(preference, v))
    totals = torch.tensor([[1, 0, 0, 0.5, 0, 1], [6, 5, 5, -2.5, -3, -2]]).double()
    assert near(*(dgpo_gradient(v, *rest, common.group_advantages(t, 3)) for t in totals))


@pytest.mark.parametrize("a", [0.7, 1.3])
def test_dgpo_of_two_images_is_dpo(a):  # G3': S is −z at β' = 2 β a / G, and the gradients then differ by β
    v, rest, _ = world(2)
    slope = gradient(lambda v: dpo.dpo_loss(v, *rest, SIGMA, PAIRS[:1], 2 * BETA * a / 2)[0], v)
    assert near(slope, BETA * dgpo_gradient(v, *rest, torch.tensor([a, -a]).double(), 2))


def test_dgpo_clips_what_has_moved_past_the_range():
    v, rest, target = world()
    ratio = (error(rest[0], target) - error(v, target)).exp()
    past, slope = torch.where(A > 0, ratio > 1.02, ratio < 0.98), dgpo_gradient(v, *rest, clip=0.02)
    assert torch.equal(alive(slope), ~past) and 0 < past.sum() < 6
    assert near(slope[~past], dgpo_gradient(v, *rest)[~past])


@each_script
def test_the_difference_is_small_and_marked(script):
    texts = [path.read_text(encoding="utf-8").splitlines() for path in (ROOT / "nft.py", Path(script.__file__))]
    changed = [line for line in difflib.unified_diff(*texts, n=0) if line[0] in "+-" and line[:3] not in ("+++", "---")]
    assert len(changed) <= 160 and sum("# new in " in line for line in changed) >= 5


def test_copies_at_the_top_run(tmp_path, prompt_files):
    for part in ("harness", "shapes"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.py"), *(script.__file__ for script in SCRIPTS)):
        shutil.copy(path, tmp_path)
    code = "import runpy, sys; argv = sys.argv[1:]\nfor name in 'awm', 'dpo', 'dgpo':"
    code += " sys.argv = [name + '.py', *argv, name]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, *SMALL, *prompt_files, "--run-name"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("contract holds: max |v - v_old| of the first call 0, ") == 3
    for name in ("awm", "dpo", "dgpo"):
        assert float(read_csv(tmp_path / "runs" / name / "metrics.csv")[2]["train/grad_norm"]) > 0


@pytest.mark.parametrize(
    "script, options",
    [
        (awm, "--train.old-decay-slope 0.2 --train.kl-beta 0.1"),
        (awm, "--train.ema-beta 0 --train.time-sampling logit-normal"),
        (dpo, "--train.dpo-reference old --train.dynamics-type CPS"),
        (dgpo, "--train.dgpo-reference base --train.old-decay-slope 0.2"),
    ],
)
def test_a_resumed_run_is_the_run(start, monkeypatch, script, options):
    options = ["--eval.eval-freq", 1, *options.split()]
    whole = start(script, *options, name="whole")
    folder = start(script, *options, "--train.max-epochs", 1)
    monkeypatch.setattr(sys, "argv", [script.__name__, "--resume", str(folder), "--train.max-epochs", "2"])
    script.main()
    assert_same_run(whole, folder)


@pytest.mark.parametrize("script", [dpo, dgpo])
def test_a_group_has_one_noise_and_a_pair_is_its_best_and_worst(monkeypatch, start, script):
    seen, tapes, name = [], [], f"{script.__name__}_loss"
    loss, sample = getattr(script, name), script.sample
    monkeypatch.setattr(script, "first_step_contract", lambda *_: None)
    monkeypatch.setattr(script, name, lambda *args: seen.append(args) or loss(*args))
    monkeypatch.setattr(script, "sample", lambda *args: (tapes.append(tape) or tape for tape in sample(*args)))
    start(script, "--train.max-epochs", 1, "--train.train-steps", 1)
    seen = [args[2:5] if script is dpo else args[3:6] for args in seen]
    noises = [(x_t - (1 - sigma) * x0) / sigma for x_t, x0, sigma in seen]
    assert len(noises) == 2 and not torch.allclose(noises[0], noises[1], atol=0.1)
    assert all(torch.allclose(noise, noise[:1].expand_as(noise), atol=1e-5) for noise in noises)
    reward, best = rewards.make_reward({"jpeg_compressibility": 1.0}, "cpu"), []
    for tape, again in zip(tapes[:2], tapes[2:], strict=script is dpo):
        totals = reward(tape.images, tape.rows)["total"]
        best.append(torch.stack([tape.x0[totals.argmax()], tape.x0[totals.argmin()]]))
        assert torch.allclose(again.x0, best[-1], atol=1e-4)  # the same images once more
    assert script is dgpo or all(any(torch.equal(x0, pair) for pair in best) for _, x0, _ in seen)


@pytest.mark.parametrize("script", [nft, *SCRIPTS])
def test_all_policies_see_the_same_latents(start, monkeypatch, script):  # W3
    seen = []
    monkeypatch.setattr(script, "first_step_contract", lambda *_: None)
    monkeypatch.setattr(script, "replay", lambda *args: seen.append(args[1:]) or common.replay(*args))
    start(script, "--train.max-epochs", 1, "--train.kl-beta", 0.1)
    for _, replays in itertools.groupby(seen, lambda of: (id(of[0]), of[1])):  # of a rollout's step
        latents = [x for _, _, x in replays]
        assert len(latents) >= 3 and all(torch.equal(x, latents[0]) for x in latents)  # old, base and policy at least
    assert seen


@pytest.mark.parametrize("script", [nft, *SCRIPTS])
def test_another_old_policy_breaks_the_contract(start, monkeypatch, script):
    count = itertools.count()
    monkeypatch.setattr(script, "replay", lambda *args: (common.replay(*args)[0] + next(count), None))
    with pytest.raises(SystemExit, match="contract is broken: max .v - v_old. of the first call is "):
        start(script)


@pytest.fixture
def watched(start, monkeypatch):
    """watched(script, *argv): run folder, [arguments of the loss], {id: (the loaded set, velocity)}, [seeds of x_t]."""

    def call(script, *argv):
        given, velocities, seeds, name = [], {}, [], f"{script.__name__}_loss"
        loss, noised = getattr(script, name), script.noised

        def replay(*args):
            velocity, step = common.replay(*args)
            velocities[id(velocity)] = Watched.loaded_now, velocity
            return velocity, step

        monkeypatch.setattr(Watched, "made", [])
        for module in (script, common):
            monkeypatch.setattr(module, "Snapshot", Watched)
        monkeypatch.setattr(script, "first_step_contract", lambda *_: None)
        monkeypatch.setattr(script, "replay", replay)
        monkeypatch.setattr(script, name, lambda *args: given.append(args) or loss(*args))
        monkeypatch.setattr(script, "noised", lambda *a: seeds.append([g.initial_seed() for g in a[2]]) or noised(*a))
        folder = start(script, "--train.train-steps", 1, 2, "--train.num-train-steps", None, *argv)
        return folder, given, velocities, seeds

    return call


def test_awm_samples_by_the_policy_and_is_held_by_an_average(watched, tapes):
    loss = "--train.clip-range 1e-3 --train.adv-clip-range 3 --train.weighting huber --train.ghuber-power 0.5"
    held = "--train.old-decay-slope 0.2 --train.old-decay-max 0.7 --train.kl-beta 0.1 --train.ema-beta 3"
    folder, given, velocities, seeds = watched(awm, *loss.split(), *held.split())
    old, average, reference = Watched.made
    assert [of for of, _ in velocities.values()] == [old, reference, None, average] * 8
    old.assert_trails([0, 0])
    average.assert_trails([0.4, 0.7])
    for row in read_csv(folder / "metrics.csv")[1:]:
        names = ("loss", "policy_loss", "v_ref_distance", "v_average_distance")
        loss, policy_loss, *penalties = (float(row[f"train/{name}"]) for name in names)
        assert loss - policy_loss == pytest.approx(0.1 * penalties[0] + 3 * penalties[1], rel=1e-3) and all(penalties)
    reward = rewards.make_reward({"jpeg_compressibility": 1.0}, "cpu")
    for first in (0, 2):
        totals = torch.cat([reward(tape.images, tape.rows)["total"] for tape in tapes[first : first + 2]])
        advantages = common.group_advantages(totals, 4, True).split(4)
        for v, v_old, _, x0, _, a, *rest in given[2 * first : 2 * first + 4]:
            (i,) = (i for i in (0, 1) if tapes[first + i].x0 is x0)
            assert torch.equal(a, advantages[i]) and rest == [1e-3, 3.0, "huber", 0.5]
            assert velocities[id(v)][0] is None and velocities[id(v_old)][0] is old
    assert len({*sum(seeds, [])}) == 8 * 4  # each image has noise of its own, in each update and timestep


@pytest.mark.parametrize("reference", ["base", "old"])
@pytest.mark.parametrize("script", [dpo, dgpo])
def test_pairs_and_groups_are_compared_with_what_is_asked_for(watched, tapes, script, reference):
    trails = "--train.off-policy --train.old-decay-slope 0.2 --train.old-decay-max 0.7 --train.kl-beta 0.1"
    asked = [f"--train.{script.__name__}-reference", reference]
    _, given, velocities, seeds = watched(script, *trails.split(), *asked)
    old, base = Watched.made
    for v, v_ref, v_old, *_ in given:
        assert velocities[id(v)][0] is None and velocities[id(v_ref)][0] is (base if reference == "base" else old)
        if script is dgpo:
            assert velocities[id(v_old)][0] is old
    assert len(given) == 8 and [len({*each}) for each in seeds] == [1] * 8 == [1] * len({*sum(seeds, [])})
    reward = rewards.make_reward({"jpeg_compressibility": 1.0}, "cpu")
    for *_, x0, _, advantages, size, beta, adv_clip, clip in given if script is dgpo else ():
        (tape,) = (tape for tape in tapes if tape.x0 is x0)  # of one group
        totals = reward(tape.images, tape.rows)["total"]
        assert torch.equal(advantages, common.group_advantages(totals, 4))
        assert (size, beta, adv_clip, clip) == (4, 125.0, 5.0, 1.6e-2)
    old.assert_trails([0.4, 0.7])


def test_dpo_of_equal_rewards_learns_nothing(start, tmp_path):  # O3
    (tmp_path / "flat.py").write_text("def flat(images, prompts):\n    return images.new_ones(len(images))\n")
    folder = start(dpo, "--reward", f"{tmp_path / 'flat.py'}:flat=1")
    rows, (file,) = read_csv(folder / "metrics.csv"), folder.glob("checkpoints/epoch_0002*/*.safetensors")
    assert [(row["train/pairs"], row["train/grad_norm"]) for row in rows[1:]] == [("0.0", "0.0")] * 2
    tensors = load_file(file)
    trained = [name for name in tensors if name.startswith("parameters/")]
    assert trained and all(torch.equal(tensors[of], tensors[of.replace("parameters", "reference")]) for of in trained)


@each_script
def test_refusals(refusal, script, tmp_path):
    (tmp_path / "other.yaml").write_text("train: {trainer_type: grpo}")
    for options, what, remedy in [
        ("--train.kl-type x-based", "train.kl_type = 'x-based'", "v-based"),
        ("--train.dynamics-type CPS --train.solver DPM-Solver++", "train.solver = 'DPM-Solver++'", "is for the ODE"),
        (f"--config {tmp_path / 'other.yaml'}", "train.trainer_type = 'grpo'", f"trainer {script.__name__!r}"),
        ("--train.per-device-batch-size 2", "train.per_device_batch_size = 2", "a multiple of group_size = 4"),
    ][: -1 if script is awm else None]:
        message = refusal(script, *options.split())
        assert what in message and remedy in message
