"""What a run is judged by: rewards in training and evaluation, statistics of images, pictures, videos, weights."""

import importlib.util
import threading

import numpy as np
import pytest
import tiny_pipelines
import torch
from conftest import MINE, read_csv
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image

import common
import grpo
import grpo_guard
import nft
import rewards
from common import gdpo_advantages
from harness import arguments, evaluation
from harness import run as harness_run
from harness.evaluation import image_statistics
from harness.judges.weights import pixels

BRIGHTNESS = f"{MINE}:smooth"
SCRIPTS = pytest.mark.parametrize("script", [grpo, grpo_guard, nft], ids=lambda script: script.__name__)


@pytest.fixture
def seen(monkeypatch):
    """What the reward `spy` was given, as a list of (images, prompts)."""
    calls = []
    spy = lambda images, prompts: calls.append((images.clone(), prompts)) or images.flatten(1).mean(dim=1)  # noqa: E731
    monkeypatch.setitem(rewards.REWARDS, "spy", lambda device: spy)
    return calls


@pytest.mark.parametrize("scale", [1, 1000])
@pytest.mark.parametrize("weights", [(1.0, -0.5), (2.0, -1.0), (-1.0, 0.5), (3.0,)])
def test_gdpo_in_closed_form(weights, scale):
    """By z-scores, so that only proportions of the weights count; a group of equal rewards adds nothing."""
    values = np.random.default_rng(0).normal(size=(len(weights), 3, 4)) * 100
    values[0, 0] = 0.1
    z = [[(group - group.mean()) / (np.ptp(group) and group.std() or 1) for group in groups] for groups in values]
    total = np.tensordot(weights, z, 1).flatten()
    scores = {name: torch.from_numpy(groups.flatten() * scale + 3) for name, groups in zip("ab", values, strict=False)}
    advantages = gdpo_advantages(scores, dict(zip("ab", weights, strict=False)), 4).numpy()
    assert np.allclose(advantages, total / total.std(), atol=1e-3)
    assert abs(advantages.mean()) < 1e-12 and advantages.std() == pytest.approx(1, abs=1e-3)
    assert len(weights) > 1 or (advantages[:4] == 0).all()
    assert (gdpo_advantages({"a": torch.full((8,), 0.1), "b": torch.ones(8)}, {"a": 1.0, "b": 1.0}, 4) == 0).all()


@SCRIPTS
def test_a_run_with_gdpo(start, monkeypatch, script):
    given, trained = [], []
    name, place = ("nft_loss", 5) if script is nft else ("grpo_loss", 2)
    loss = getattr(script, name)
    monkeypatch.setattr(script, "gdpo_advantages", lambda *a: given.append((*a, gdpo_advantages(*a))) or given[-1][-1])
    monkeypatch.setattr(script, name, lambda *a: trained.append(a[place]) or loss(*a))
    weights = {"jpeg_compressibility": 1.0, BRIGHTNESS: 0.5}
    argv = ["--reward", *(f"{name}={weight}" for name, weight in weights.items()), "--train.per-device-batch-size", 4]
    start(script, *argv, "--train.advantage-aggregation", "gdpo")
    (scores, used, size, advantages), _ = given
    assert used == weights and size == 4 and {*scores} == {*weights, "total"} and scores[BRIGHTNESS].shape == (8,)
    assert {tuple(a.tolist()) for a in trained[: len(trained) // 2]} == {tuple(a.tolist()) for a in advantages.split(4)}


def firsts(images, prompts, rows):
    return {"total": images[:, 0, 0, 0]}


ROWS, firsts.takes_groups = [{"prompt": "a red circle"}] * 12, False


def test_images_are_scored_while_others_are_made(monkeypatch):
    sampled, images = threading.Event(), torch.rand(4, 3, 8, 8)
    scoring = evaluation.Scoring(firsts, 2)
    score = scoring._score
    monkeypatch.setattr(scoring, "_score", lambda *given: sampled.wait(10) and score(*given))
    scoring.add(images[:2], ROWS[:2])
    sampled.set()  # which the next images do not wait for
    scoring.add(images[2:], ROWS[2:4])
    assert torch.equal(scoring.finish()[0]["total"], images[:, 0, 0, 0])


@pytest.mark.parametrize("calls", [[12], [4, 8], [5, 5, 2], [1] * 12])
def test_how_groups_look_does_not_depend_on_the_calls(calls):
    images, scoring = torch.rand(12, 3, 8, 8), evaluation.Scoring(firsts, 4)
    for part in images.split(calls):
        scoring.add(part, ROWS[: len(part)])
    assert not scoring.incomplete
    _, means = scoring.finish()
    assert torch.allclose(means["contrast"], images.flatten(1).std(dim=1).mean())
    assert torch.allclose(means["group_spread"], images.reshape(3, 4, 3, 8, 8).std(dim=1).mean())


def test_metrics_of_rewards_in_closed_form():
    totals = torch.tensor([0.0, 2.0, 5.0, 5.0, 1.0, 7.0])  # in groups of two, of std 1, 0 and 3
    metrics = evaluation.epoch_metrics({"a": totals / 2, "total": totals}, {"contrast": 9}, 2)
    expected = {"reward/a": 10 / 6, "reward/total": 20 / 6, "reward_std": 4 / 3, "zero_std": 1 / 3, "contrast": 9}
    assert metrics == pytest.approx(expected)


@SCRIPTS
def test_a_failing_reward_ends_the_run_at_once(start, monkeypatch, tmp_path, script):
    (tmp_path / "mine.py").write_text(
        "calls = []\ndef bad(i, p):\n    calls.append(1)\n    return i[99] if len(calls) == 3 else [0] * len(i)\n"
    )  # the third call comes after evaluation
    sampled, rollout = [], common.rollout
    monkeypatch.setattr(common, "rollout", lambda *a, **k: sampled.append(1) or rollout(*a, **k))
    argv = ["--reward", f"{tmp_path}/mine.py:bad=1", "--train.unique-sample-num-per-epoch", 8]
    with pytest.raises(SystemExit, match=r"^error: reward '.*mine.py:bad' failed: IndexError: [^\n]*$") as exit:
        start(script, *argv, "--eval.per-device-batch-size", 1)
    assert len(sampled) == 2  # of 8: the second was under way
    kept = tmp_path / "run" / "failed_reward"
    assert f"; its images and prompts are in {kept}; continue with: python " in str(exit.value)
    assert {path.name for path in kept.iterdir()} == {*(f"000{i}.png" for i in range(4)), "prompts.txt"}
    (prompt,) = set((kept / "prompts.txt").read_text().splitlines())  # of the group that could not be scored
    assert prompt in (tmp_path / "train.txt").read_text() and Image.open(kept / "0003.png").size == (32, 32)


def test_evaluation_has_rewards_and_prompts_of_its_own(run, refused, tmp_path, monkeypatch):
    grids = []
    monkeypatch.setattr(harness_run, "save_grid", lambda *args: grids.append(args))
    (tmp_path / "other.txt").write_text("an astronaut on a horse\n")  # which the reward of evaluation cannot score
    asked = ["--eval.reward", f"{BRIGHTNESS}=2", "shapes=0.5", "--eval.images-per-prompt", 2]
    folder = run("--prompts", tmp_path / "other.txt", *asked, name="first")
    last = {key: float(value) for key, value in read_csv(folder / "metrics.csv")[-1].items()}
    assert last["eval/total"] == pytest.approx(2 * last[f"eval/{BRIGHTNESS}"] + 0.5 * last["eval/shapes"])
    assert last["eval/jpeg_compressibility"] < 0 > last["train/reward/total"]
    assert f"train/reward/{BRIGHTNESS}" not in last
    kept = read_csv(folder / "images" / "epoch_0002.csv")
    totals = [[float(row["total"]) for row in read_csv(folder / "images" / f"epoch_000{n}.csv")] for n in (0, 2)]
    (_, shown, _, at_base, _), (*_, at_end, base) = grids  # each with its own, the base model's beside them
    assert [at_base.tolist(), at_end.tolist()] == totals and base[1].tolist() == totals[0] != totals[1]
    assert base[0].keys() == shown.keys() and all(np.array_equal(base[0][i], shown[i]) for i in shown)
    assert {*kept[0]} == {"prompt", "jpeg_compressibility", BRIGHTNESS, "shapes", "total"} and len(kept) == 4
    again, _ = arguments.parse_args(grpo.Args, "", ["--config", str(folder / "args.yaml")])
    assert again.eval.reward == {BRIGHTNESS: 2, "shapes": 0.5}
    message = refused("--eval.prompts", tmp_path / "other.txt", "--eval.reward", "shapes=1")
    assert "eval.prompts" in message and "'an astronaut on a horse' is outside the grammar" in message


def test_a_reward_is_made_only_once(monkeypatch):
    made = []
    for name in "abc":
        factory = lambda device, name=name: made.append(name) or (lambda images, prompts: images + ord(name))  # noqa
        monkeypatch.setitem(rewards.REWARDS, name, factory)
    training = {"a": 97, "b": 98, "total": 97 + 3 * 98}
    evaluated = {"a": 97, "b": 98, "c": 99, "total": 2 * 98 - 99}
    for own, expected in (({"b": 2, "c": -1}, evaluated), ({"b": 2}, training | {"total": 196}), ({}, training)):
        made.clear()
        pair = rewards.make_rewards({"a": 1, "b": 3}, own, "cpu")
        assert made == sorted(expected.keys() - {"total"})
        assert [{k: v.item() for k, v in f(torch.zeros(1), ["x"]).items()} for f in pair] == [training, expected]


def test_statistics_in_closed_form():
    plain = torch.tensor([[0.5, 0.5, 0.5], [0.5, 0, 0], [0.4, 0.3, 0.2], [0, 0, 0]])[..., None, None].expand(4, 3, 8, 8)
    board = (torch.arange(8)[:, None] + torch.arange(8)).remainder(2).float().expand(1, 3, 8, 8)
    half = torch.zeros(1, 3, 8, 8)
    half[..., 4:] = 1  # 8 of 2 * 8 * 7 pairs of neighbours differ; in 2 of 6 inner columns a pixel, by 1/4
    values = image_statistics(images := torch.cat([plain, board, half]))
    assert values["mean"].tolist() == pytest.approx([0.5, 1 / 6, 0.3, 0, 0.5, 0.5])
    assert values["contrast"].tolist() == pytest.approx([0, 0.5 * 2**0.5 / 3, (0.02 / 3) ** 0.5, 0, 0.5, 0.5])
    assert values["sharpness"].tolist() == pytest.approx([0, 0, 0, 0, 1, 1 / 12], abs=1e-6)
    assert values["edge_density"].tolist() == pytest.approx([0, 0, 0, 0, 1, 1 / 14])
    assert values["saturation"].tolist() == pytest.approx([0, 1, 0.5, 0, 0, 0])
    alone = [image_statistics(image[None]) for image in images]
    assert all(torch.allclose(v, torch.cat([a[n] for a in alone])) for n, v in values.items())  # of each by itself
    of_videos = image_statistics(images.reshape(3, 2, 3, 8, 8))  # the mean of their frames
    assert all(torch.allclose(of_videos[n], v.reshape(3, 2).mean(dim=1)) for n, v in values.items())


def test_statistics_are_logged_after_the_rewards(run, seen, capsys):
    base = ["--reward", "spy=1", "--train.max-epochs", 0, "--eval.per-device-batch-size", 2]
    folder = run(*base, "--eval.images-per-prompt", 3, name="three")
    row = read_csv(folder / "metrics.csv")[0]
    names = ["mean", "contrast", "sharpness", "edge_density", "saturation", "group_spread"]
    columns = [name for name in row if name.startswith("eval/")]
    assert columns == ["eval/total", "eval/spy", *(f"eval/image/{name}" for name in names)]
    images = torch.cat([images for images, _ in seen])
    spread = torch.stack([images[:3].std(dim=0), images[3:].std(dim=0)]).mean().item()
    assert float(row["eval/image/group_spread"]) == pytest.approx(spread) and spread > 0.01
    assert np.array_equal(np.load(folder / "images" / "base.npz")["shown"][:, 0], pixels(images))
    assert float(row["eval/image/sharpness"]) == pytest.approx(image_statistics(images)["sharpness"].mean().item())
    console = capsys.readouterr().out
    assert "eval/spy" in console and "eval/image" not in console
    assert "eval/image/group_spread" not in read_csv(run(*base, name="one") / "metrics.csv")[0]


def test_frames_of_videos_are_shown_evenly():
    class Pipeline:
        components = {}

        def __call__(self, prompt, generator, output_type, return_dict):
            return (torch.arange(21).reshape(1, 21, 1, 1, 1).expand(len(prompt), 21, 3, 8, 8) / 255,)

    reward = rewards.make_reward({BRIGHTNESS: 1.0}, "cpu")
    *_, shown = evaluation.evaluate(Pipeline(), grpo.Args(), ROWS[:1] * 40, reward)
    assert [*shown] == evaluation.evenly(40, 32) and shown[39][:, 0, 0, 0].tolist() == evaluation.evenly(21, 8)


def test_grids_of_many_images(tmp_path):
    shown = {i: np.full((1, 16, 16, 3), i, np.uint8) for i in evaluation.evenly(100, 32)}
    assert len(shown) == 32 and min(shown) == 0 and max(shown) == 99
    assert evaluation.evenly(2, 32) == [0, 1] and evaluation.evenly(81, 8)[::7] == [0, 80]
    prompts, totals, path = ["a red circle"] * 100, torch.arange(100), tmp_path / "grid.png"
    evaluation.save_grid(path, shown, prompts, totals)
    assert Image.open(path).size == (8 * 136, 4 * 172)
    evaluation.save_grid(path, shown, prompts, totals, ({i: image + 100 for i, image in shown.items()}, totals))
    assert Image.open(path).size == (4 * 266, 8 * 172)
    last = [(3 * 266 + 4 + x, 7 * 172 + 4) for x in (0, 127, 128, 129, 130, 257)]
    assert [Image.open(path).getpixel(place)[0] for place in last] == [199, 199, 255, 255, 99, 99]
    videos = {i: np.full((5, 32, 32, 3), i, np.uint8) for i in range(3)}
    evaluation.save_grid(path, videos, prompts, totals, ({i: video + 100 for i, video in videos.items()}, totals))
    assert Image.open(path).size == (648, 3 * 302)  # the base model's frames above the policy's
    places = [(643, 2 * 302 + 4 + y) for y in (0, 127, 128, 129, 130, 257)]
    assert [Image.open(path).getpixel(place)[0] for place in places] == [102, 102, 255, 255, 2, 2]


def test_captions_fill_their_lines(tmp_path, monkeypatch):
    said, prompts = [], ["a red circle", "x" * 30 + " and more", "红" * 50]
    monkeypatch.setattr(evaluation.ImageDraw.ImageDraw, "text", lambda draw, place, text, **_: said.append(text))
    shown = {i: np.zeros((1, 128, 128, 3), np.uint8) for i in range(3)}
    evaluation.save_grid(tmp_path / "grid.png", shown, prompts, [0.5] * 3)  # 21 letters on each line
    evaluation.save_grid(tmp_path / "grid.png", shown, prompts, [0.5] * 3, (shown, [0.25] * 3))
    assert said[:2] == ["a red circle\n0.5", f"{'x' * 21}\n{'x' * 9} and more\n0.5"]
    assert said[2:4] == [f"{'红' * 21}\n{'红' * 21}\n0.5", "a red circle\nbase 0.25 | policy 0.5"]
    evaluation.save_grid(tmp_path / "grid.png", {2: shown[2]}, ["a", "b", "c"], [0.1, 0.2, 0.3], (shown, [1, 2, 3]))
    assert said[6:] == ["c\nbase 3 | policy 0.3"]  # of many images, some are shown


def test_the_curve_is_of_what_was_evaluated(tmp_path, monkeypatch):
    axes, drawn = pytest.importorskip("matplotlib.axes").Axes, []
    monkeypatch.setattr(axes, "plot", lambda self, x, y, label, **style: drawn.append((label, x, y)))
    rows = [{"images": 0, "eval/total": 1, "eval/a": 1, "eval/image/mean": 2}, {"images": 8, "train/reward/total": 3}]
    evaluation.save_curve(tmp_path / "curve.png", rows)
    assert drawn == [("eval/total", (0,), (1,)), ("train/reward/total", (8,), (3,))]  # of one reward, the total
    evaluation.save_curve(tmp_path / "curve.png", [rows[0] | {"eval/b": 1}, rows[1]])
    assert [label for label, *_ in drawn[2:]] == ["eval/total", "eval/a", "eval/b", "train/reward/total"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    evaluation.save_curve(tmp_path / "none.png", rows)
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]


def test_a_reward_of_images_scores_the_frames_of_a_video(tmp_path):
    source = "def motion(v, p):\n    return v.diff(dim=1).abs().mean(dim=(1, 2, 3, 4))\nmotion.takes_video = True\n"
    (tmp_path / "mine.py").write_text(source)
    video, motion = torch.rand(2, 5, 3, 8, 8), f"{tmp_path}/mine.py:motion"
    scores = rewards.make_reward({BRIGHTNESS: 1.0, motion: 1.0}, "cpu")(video, ["a", "bb"])
    assert torch.allclose(scores[BRIGHTNESS], video.mean(dim=(1, 2, 3, 4)))
    assert torch.allclose(scores[motion], video.diff(dim=1).abs().mean(dim=(1, 2, 3, 4)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["stable_diffusion_3", "flux"])
@pytest.mark.parametrize("finetune_type", ["lora", "full"])
def test_saved_weights_reproduce_the_evaluation_in_plain_diffusers(run, seen, tmp_path, family, dtype, finetune_type):
    torch.manual_seed(0)
    tiny_pipelines.FAMILIES[family]()[0].save_pretrained(tmp_path / "tiny")
    argv = ["--model", tmp_path / "tiny", "--dtype", dtype, "--finetune-type", finetune_type, "--lora-alpha", 6]
    argv += ["--train.resolution", 8, "--eval.resolution", 8, "--call", "max_sequence_length=48", "--reward", "spy=1"]
    folder = run(*argv, "--train.ema-decay", 0.5, "--train.ema-update-interval", 1, "--train.learning-rate", 0.02)
    args, _ = arguments.parse_args(grpo.Args, "", ["--config", str(folder / "args.yaml")])
    images, prompts = seen[-1]
    assert {i.dtype for i, _ in seen} == {torch.float32}
    own = dict(height=args.eval.resolution, width=args.eval.resolution, guidance_scale=args.eval.guidance_scale)
    own |= dict(num_inference_steps=args.eval.num_inference_steps, output_type="pt", **args.call)

    def evaluate(pipe):
        pipe.set_progress_bar_config(disable=True)
        noise = common.generators(*((args.eval.seed, i) for i in range(len(prompts))))
        return pipe(prompts, generator=noise, **own).images.float()

    half = getattr(torch, dtype)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "tiny", dtype=half)
    assert not torch.equal(evaluate(pipe), images)
    if finetune_type == "lora":
        pipe.load_lora_weights(folder / "lora")
    else:
        pipe.transformer = type(pipe.transformer).from_pretrained(folder / "transformer", dtype=torch.float32)
        stock = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
        assert dict(stock.config) == dict(pipe.scheduler.config)
        pipe.scheduler = stock
    pipe.vae.requires_grad_(False)  # torch's linear() takes another path, one bit off, for a weight with a gradient
    with torch.autocast("cpu", half, enabled=half != torch.float32):
        assert torch.equal(evaluate(pipe), images)
