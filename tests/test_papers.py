"""What the papers' schemes need of the settings, and what a pipeline makes of them."""

import random
from types import SimpleNamespace

import numpy as np
import torch

import common
import grpo
import nft
from harness import contract


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


def test_nft_evaluates_as_it_trains():
    assert nft.Args().train.guidance_scale == nft.Args().eval.guidance_scale == 1


def test_a_target_that_matches_nothing_beside_one_that_does_is_refused(make_pipe, ends):
    said = ends(common.trainable_parameters, make_pipe()[0], grpo.Args(target_modules=("to_q", "to_nothing")), 0)
    assert "'to_nothing' is no module of SD3Transformer2DModel" in said


def test_guidance_without_effect_is_said(make_pipe, call):
    pipe, _ = make_pipe()
    for kind in (type(pipe), type("Blind", (type(pipe),), {"do_classifier_free_guidance": False, "__module__": "x"})):
        pipe.__class__ = kind
        noise = common.generators(*((1, i) for i in range(4)))
        tape = common.rollout(pipe, call(guidance_scale=3.0), "Flow-SDE", 0.7, [1], noise)
        notes = [key for key in contract.sampling(pipe, [tape], 4) if "NOTE" in key]
        assert notes == ["NOTE, without effect in Blind: guidance_scale"] * (kind.__name__ == "Blind")


def test_a_pipeline_is_given_what_it_takes():
    class Pipeline:
        def __call__(self, prompt, negative_prompt, image, height, width, num_inference_steps, generator):
            pass

    section = SimpleNamespace(resolution=(32, 48), num_inference_steps=3, guidance_scale=4.5)
    row = {"negative_prompt": "b", "weight": 2, "other": 1}
    rows = [row | {"prompt": prompt, "image": f"{prompt}.png"} for prompt in "ac"]
    given = dict(prompt=["a", "c"], negative_prompt=["b", "b"], height=32, width=48, num_inference_steps=3)
    given["image"] = ["a.png", "c.png"]  # each row's own
    for extra in ({}, {"negative_prompt": "of all"}):  # a row's own counts
        assert common.call_arguments(Pipeline(), section, extra, rows) == given


def test_rewards_draw_from_generators_of_the_epoch(make_pipe, monkeypatch):
    pipe, _ = make_pipe()
    args = grpo.Args(train=grpo.TrainArgs(unique_sample_num_per_epoch=1))

    def drawn(epoch):
        common.epoch_calls(pipe, args, [{"prompt": "a red circle"}], epoch)
        return torch.rand(1).item(), np.random.rand(), random.random()

    first, second, again = map(drawn, (1, 2, 1))
    monkeypatch.setattr(common, "rank", lambda: 1)
    of_another_process = drawn(1)
    args.train.seed = 1
    assert first == again and len({*first, *second, *of_another_process, *drawn(1)}) == 12


def test_every_noise_of_a_run_is_its_own(make_pipe):
    """Of each image at its start and in its steps; but for starts that a group shares on purpose."""
    pipe, rows = make_pipe()[0], [{"prompt": "a red circle"}] * 2
    args = grpo.Args(train=grpo.TrainArgs(unique_sample_num_per_epoch=2, group_size=2, per_device_batch_size=2))
    for shared, count in ((False, 16), (True, 12)):
        drawn = []
        for args.train.seed in (0, 1):
            calls = [call for epoch in (1, 2) for call in common.epoch_calls(pipe, args, rows, epoch, shared)]
            drawn += [g.initial_seed() for call in calls for g in (*call.kwargs["generator"], *call.step_generators)]
        assert len(drawn) == 2 * 16 and len({*drawn}) == 2 * count
