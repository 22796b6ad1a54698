"""What the papers' schemes need of the settings, and what a pipeline makes of them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import read_csv

import common
import dynamics
import grpo
import grpo_guard
import nft
from harness import contract


@pytest.mark.parametrize("script", [grpo, grpo_guard], ids=["grpo", "guard"])
def test_a_window_of_neighbours_is_drawn_anew(script):  # Flow-GRPO-Fast
    train = script.TrainArgs(train_steps=[6, 1, 2, 3, 4], num_train_steps=3, shift_interval=0)
    drawn = [script.drawn_steps(train, epoch) for epoch in range(1, 60)]
    assert {tuple(steps) for steps in drawn} == {(1, 2, 3), (2, 3, 4), (3, 4, 6)}  # of neighbouring candidates
    assert drawn[7] == script.drawn_steps(train, 8)


def test_all_steps_may_be_stochastic_and_some_of_them_trained(start, monkeypatch):  # DanceGRPO
    plain, noisy, trained = common.rollout, [], set()
    monkeypatch.setattr(common, "rollout", lambda *a, **known: noisy.append(list(a[4])) or plain(*a, **known))
    replay = grpo.replay
    monkeypatch.setattr(grpo, "replay", lambda pipe, tape, k: trained.add(k) or replay(pipe, tape, k))
    monkeypatch.setattr(grpo, "first_step_contract", lambda *_: None)
    start(grpo, "--train.sde-steps", "all", "--train.num-train-steps", 1, "--train.max-epochs", 1)
    assert noisy == [[0, 1, 2]] * 2 and len(trained) == 1
    start(grpo, "--train.sde-steps", "all", "--train.train-steps", 3, "--train.max-epochs", 1, name="last")
    assert noisy[2:] == [[0, 1, 2, 3]] * 2 and 3 in trained


def test_the_exact_kl_is_that_of_the_gaussians():  # G5
    generator = torch.Generator().manual_seed(0)
    x, v, v_ref = (torch.randn(3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    v.requires_grad_()
    taken, reference = (dynamics.step("Flow-SDE", u, x, 0.6, 0.5, 0.7) for u in (v, v_ref))
    penalty, terms = grpo.kl_loss("exact", v, taken, v_ref, reference)
    normals = (torch.distributions.Normal(step.mean, step.std) for step in (taken, reference))
    assert torch.allclose(penalty, torch.distributions.kl_divergence(*normals).mean())
    assert torch.equal(terms["kl"], penalty.detach()) and torch.autograd.grad(penalty, v)[0].abs().sum() > 0


def test_nft_evaluates_as_it_trains():
    assert nft.Args().train.guidance_scale == nft.Args().eval.guidance_scale == 1


def test_a_target_that_matches_nothing_beside_one_that_does_is_refused(make_pipe, ends):
    said = ends(common.trainable_parameters, make_pipe()[0], grpo.Args(target_modules=("to_q", "to_nothing")), 0)
    assert "'to_nothing' is no module of SD3Transformer2DModel" in said


def test_guidance_without_effect_is_said(make_pipe, call):
    pipe, _ = make_pipe()
    noise = common.generators(*((1, i) for i in range(4)))
    tape = common.rollout(pipe, call(guidance_scale=3.0), "Flow-SDE", 0.7, [1], noise)
    assert contract.guidance_counts(pipe, tape)
    blind = type(pipe)
    pipe.__class__ = type(blind.__name__, (blind,), {"do_classifier_free_guidance": False, "__module__": "x"})
    tape = common.rollout(pipe, call(guidance_scale=3.0), "Flow-SDE", 0.7, [1], noise)
    assert not contract.guidance_counts(pipe, tape)
    (note,) = (key for key in contract.sampling(pipe, [tape], 4) if "guidance_scale" in key)
    assert "without effect in StableDiffusion3Pipeline" in note


def test_what_a_pipeline_does_not_take_is_not_passed():
    class Pipeline:
        def __call__(self, prompt, height, width, num_inference_steps, generator):
            pass

    section = SimpleNamespace(resolution=(32, 48), num_inference_steps=3, guidance_scale=4.5)
    given = common.call_arguments(Pipeline(), section, {}, [{"prompt": "a", "other": 1}])
    assert given == {"prompt": ["a"], "height": 32, "width": 48, "num_inference_steps": 3}


def test_a_reward_that_draws_and_the_average_of_an_epoch(start, tmp_path):
    """The generators that a reward may draw from are those of the epoch, whatever was drawn before."""
    (tmp_path / "mine.py").write_text("import torch\ndef drawn(images, prompts):\n    return torch.rand(len(images))\n")
    argv = ("--reward", f"{tmp_path}/mine.py:drawn=1", "--train.max-epochs", 2)
    one = read_csv(start(grpo, *argv, name="a") / "metrics.csv")
    torch.rand(100), np.random.rand(9)
    other = read_csv(start(grpo, *argv, name="b") / "metrics.csv")
    assert [row["train/reward/total"] for row in one] == [row["train/reward/total"] for row in other]
    assert one[1]["train/reward/total"] != one[2]["train/reward/total"]
