"""What a run is judged by: several rewards, those of evaluation, statistics of images, grids, videos, saved weights."""

import threading

import numpy as np
import pytest
import tiny_pipelines
import torch
import yaml
from conftest import read_csv
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image, ImageFilter

import common
import grpo
import grpo_guard
import nft
import rewards

SCRIPTS = pytest.mark.parametrize("script", [grpo, grpo_guard, nft], ids=lambda script: script.__name__)


@pytest.fixture
def brightness(tmp_path):
    """The name of a user's reward."""
    (tmp_path / "mine.py").write_text("def brightness(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n")
    return f"{tmp_path}/mine.py:brightness"


@pytest.fixture
def seen(monkeypatch):
    """What the reward `spy` was given, as a list of (images, prompts)."""
    calls = []

    def spy(images, prompts):
        calls.append((images.clone(), prompts))
        return images.flatten(1).mean(dim=1)

    monkeypatch.setitem(rewards.REWARDS, "spy", lambda device: spy)
    return calls


@pytest.fixture
def tiny(tmp_path):
    """Save a tiny pipeline; returns the command line to run a script on it."""

    def save(family):
        torch.manual_seed(0)
        pipe, call = tiny_pipelines.FAMILIES[family]()
        pipe.save_pretrained(tmp_path / family)
        side = call["height"]
        more = [f"{key}={call[key]}" for key in ("num_frames", "max_sequence_length") if key in call]
        argv = ["--model", tmp_path / family, "--train.resolution", side, "--eval.resolution", side, "--call", *more]
        return [*argv, "--train.ema-decay", 0, "--train.learning-rate", 0.02]

    return save


# Several rewards


def test_gdpo_in_closed_form():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 12, generator=generator, dtype=torch.float64) * 100
    advantages = grpo.gdpo_advantages({"a": first, "b": second}, {"a": 1.0, "b": -0.5}, 4).numpy()
    z = [[(g - g.mean()) / g.std() for g in np.split(values.numpy(), 3)] for values in (first, second)]
    total = np.concatenate(z[0]) - 0.5 * np.concatenate(z[1])
    assert np.allclose(advantages, total / total.std(), atol=1e-3)
    assert abs(advantages.mean()) < 1e-12 and advantages.std() == pytest.approx(1, abs=1e-3)


@SCRIPTS
def test_gdpo_does_not_see_the_scale_of_a_reward(script):
    first, second = torch.randn(2, 12, generator=torch.Generator().manual_seed(0)) * 10
    there = script.gdpo_advantages({"a": first, "b": second}, {"a": 1.0, "b": 2.0}, 4)
    scaled = script.gdpo_advantages({"a": 1000 * first + 3, "b": second}, {"a": 1.0, "b": 2.0}, 4)
    assert torch.allclose(scaled, there, atol=1e-3)
    doubled = script.gdpo_advantages({"a": first, "b": second}, {"a": 2.0, "b": 4.0}, 4)  # only proportions count
    assert torch.allclose(doubled, there, atol=1e-3)
    opposite = script.gdpo_advantages({"a": first, "b": second}, {"a": -1.0, "b": -2.0}, 4)
    assert torch.equal(opposite, -there)


@SCRIPTS
def test_gdpo_of_one_reward_is_sum_over_its_std(script):
    reward = torch.randn(12, generator=torch.Generator().manual_seed(0))
    reward[:4] = 0.1  # a group that says nothing, so that the std of the others' z-scores is not 1
    of_groups = script.group_advantages(reward, 4, global_std=False)
    advantages = script.gdpo_advantages({"a": reward}, {"a": 3.0}, 4)
    assert torch.allclose(advantages, of_groups / of_groups.std(correction=0), atol=1e-3)
    assert (advantages[:4] == 0).all() and of_groups.std(correction=0) < 0.9


@SCRIPTS
def test_gdpo_keeps_apart_what_sum_does_not(script):
    """The example of the paper: one reward met, or both, in groups of two."""
    a, b = torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([0.0, 0.0, 0.0, 1.0])
    summed = script.group_advantages(a + b, 2, global_std=False)
    assert torch.allclose(summed[:2], summed[2:], atol=1e-3)
    apart = script.gdpo_advantages({"a": a, "b": b}, {"a": 1.0, "b": 1.0}, 2)
    assert torch.allclose(apart[2:], 2 * apart[:2], rtol=1e-3)


@SCRIPTS
def test_rewards_that_say_nothing_have_no_advantage(script):
    silent = script.gdpo_advantages({"a": torch.full((8,), 0.1), "b": torch.ones(8)}, {"a": 1.0, "b": 1.0}, 4)
    assert (silent == 0).all()


@SCRIPTS
def test_a_run_with_gdpo(start, monkeypatch, script, brightness):
    given, trained = [], []
    gdpo, name = script.gdpo_advantages, "nft_loss" if script is nft else "grpo_loss"
    loss = getattr(script, name)
    monkeypatch.setattr(script, "gdpo_advantages", lambda *a: given.append((*a, gdpo(*a))) or given[-1][-1])
    place = 5 if script is nft else 2
    monkeypatch.setattr(script, name, lambda *a: trained.append(a[place]) or loss(*a))
    weights = {"jpeg_compressibility": 1.0, brightness: 0.5}
    argv = ["--reward", *(f"{name}={weight}" for name, weight in weights.items()), "--train.per-device-batch-size", 4]
    start(script, *argv, "--train.advantage-aggregation", "gdpo")
    (scores, used, size, advantages), _ = given
    assert used == weights and size == 4 and {*scores} == {*weights, "total"} and scores[brightness].shape == (8,)
    assert {tuple(a.tolist()) for a in trained[: len(trained) // 2]} == {tuple(a.tolist()) for a in advantages.split(4)}


# Rewards while the pipeline samples


def test_images_are_scored_while_others_are_made():
    sampled = threading.Event()

    def reward(images, prompts):
        assert sampled.wait(10), "the next images waited for the reward of these"
        return {"total": images}

    judge = common.Judge(reward)
    judge.submit(torch.arange(2), ["a", "b"])
    sampled.set()
    judge.submit(torch.arange(2, 4), ["a", "b"])
    assert judge.scores()["total"].tolist() == [0, 1, 2, 3]
    judge.submit(torch.arange(4, 6), ["a", "b"])
    assert judge.scores()["total"].tolist() == [4, 5]  # and nothing of the epoch before


@SCRIPTS
def test_a_failing_reward_ends_the_run_at_once(start, monkeypatch, tmp_path, script):
    (tmp_path / "mine.py").write_text(
        "calls = []\ndef bad(images, prompts):\n    calls.append(1)\n"
        "    return images[99] if len(calls) == 3 else images.mean(dim=(1, 2, 3))\n"  # the third: after evaluation
    )
    sampled, rollout = [], common.rollout
    monkeypatch.setattr(script, "rollout", lambda *a, **k: sampled.append(1) or rollout(*a, **k))
    with pytest.raises(SystemExit, match=r"^error: reward '.*mine.py:bad' failed: IndexError: [^\n]*$"):
        start(
            script, "--reward", f"{tmp_path}/mine.py:bad=1", "--train.unique-sample-num-per-epoch", 8,
            "--eval.per-device-batch-size", 1,
        )  # fmt: skip
    assert len(sampled) == 2  # of 8: the second was under way


def test_rewards_get_float32(run, seen):
    run("--dtype", "bfloat16", "--reward", "spy=1", "--train.max-epochs", 1)
    assert {images.dtype for images, _ in seen} == {torch.float32}


# Rewards of evaluation


def test_evaluation_has_rewards_of_its_own(run, brightness):
    folder = run("--eval.reward", f"{brightness}=2", "--eval.images-per-prompt", 2)
    rows = read_csv(folder / "metrics.csv")
    last = {key: float(value) for key, value in rows[-1].items()}
    assert last["eval/total"] == pytest.approx(2 * last[f"eval/{brightness}"])
    assert last["eval/jpeg_compressibility"] < 0 and last["train/reward/total"] < 0
    assert f"train/reward/{brightness}" not in last
    kept = read_csv(folder / "images" / "epoch_0002.csv")
    assert set(kept[0]) == {"prompt", "jpeg_compressibility", brightness, "total"} and len(kept) == 4
    again, _ = common.parse_args(grpo.Args, "", ["--config", str(folder / "args.yaml")])
    assert again.eval.reward == {brightness: 2}


def test_a_reward_is_made_only_once(monkeypatch):
    made = []
    for name in "abc":
        factory = lambda device, name=name: made.append(name) or (lambda images, prompts: images + ord(name))  # noqa
        monkeypatch.setitem(rewards.REWARDS, name, factory)
    weights = {"a": 1.0, "b": 3.0}
    pair = rewards.make_rewards(weights, {"b": 2.0, "c": -1.0}, "cpu")
    assert made == ["a", "b", "c"]
    training, evaluation = ({k: v.item() for k, v in f(torch.zeros(1), ["x"]).items()} for f in pair)
    assert training == {"a": 97, "b": 98, "total": 97 + 3 * 98}
    assert evaluation == {"a": 97, "b": 98, "c": 99, "total": 2 * 98 - 99}
    _, only_b = rewards.make_rewards(weights, {"b": 2.0}, "cpu")
    assert {k: v.item() for k, v in only_b(torch.zeros(1), ["x"]).items()} == {"a": 97, "b": 98, "total": 196}
    _, same = rewards.make_rewards(weights, {}, "cpu")
    assert same(torch.zeros(1), ["x"])["total"].item() == training["total"]


def test_rewards_of_evaluation_are_checked(refused, tmp_path):
    assert "eval.reward = {'shape': 1.0}: no reward 'shape'; did you mean shapes?" in refused(
        "--eval.reward", "shape=1"
    )
    assert "eval.reward shapes = inf: must be a finite number" in refused("--eval.reward", "shapes=inf")
    (tmp_path / "other.txt").write_text("an astronaut on a horse\n")
    message = refused("--eval.prompts", tmp_path / "other.txt", "--eval.reward", "shapes=1")
    assert "eval.prompts" in message and "'an astronaut on a horse' is outside the grammar" in message


def test_rewards_of_evaluation_score_no_training_prompt(run, tmp_path):
    (tmp_path / "other.txt").write_text("an astronaut on a horse\n")
    rows = read_csv(run("--prompts", tmp_path / "other.txt", "--eval.reward", "shapes=1") / "metrics.csv")
    assert rows[-1]["eval/total"] == rows[-1]["eval/shapes"] != ""


# Statistics of images


def flat(*colour, side=8):
    return torch.tensor(colour, dtype=torch.float32).reshape(1, 3, 1, 1).expand(1, 3, side, side)


def checkerboard(side=8):
    return (torch.arange(side)[:, None] + torch.arange(side)).remainder(2).float().expand(1, 3, side, side)


def statistics(images):
    return {name: value.tolist() for name, value in common.image_statistics(images).items()}


def test_statistics_in_closed_form():
    half = torch.zeros(1, 3, 8, 8)
    half[..., 4:] = 1  # 8 of 2 * 8 * 7 pairs of neighbours differ; in 2 of 6 inner columns a pixel, by 1/4
    images = torch.cat([flat(0.5, 0.5, 0.5), checkerboard(), flat(0.5, 0, 0), flat(0.4, 0.3, 0.2), half, flat(0, 0, 0)])
    values = statistics(images)
    assert values["mean"] == pytest.approx([0.5, 0.5, 1 / 6, 0.3, 0.5, 0])
    assert values["contrast"] == pytest.approx([0, 0.5, 0.5 * 2**0.5 / 3, (0.02 / 3) ** 0.5, 0.5, 0])
    assert values["sharpness"] == pytest.approx([0, 1, 0, 0, 1 / 12, 0], abs=1e-6)
    assert values["edge_density"] == pytest.approx([0, 1, 0, 0, 1 / 14, 0])
    assert values["saturation"] == pytest.approx([0, 0, 1, 0.5, 0, 0])
    alone = [statistics(image[None]) for image in images]
    assert all(v == pytest.approx([a[n][0] for a in alone]) for n, v in values.items())  # of each image by itself


def test_statistics_of_a_photograph_like_image():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((64, 64), Image.BICUBIC)

    def of(image):
        return common.image_statistics(torch.tensor(np.array(image) / 255).permute(2, 0, 1)[None])

    here, blurred = of(image), of(image.filter(ImageFilter.GaussianBlur(2)))
    for name in ("sharpness", "edge_density", "contrast", "saturation"):
        assert blurred[name] < here[name], name
    assert blurred["mean"].item() == pytest.approx(here["mean"].item(), abs=0.01)
    assert here["saturation"].item() == pytest.approx(np.array(image.convert("HSV"))[..., 1].mean() / 255, abs=0.01)


def test_statistics_of_a_video_are_the_mean_of_its_frames():
    video = torch.rand(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    frames = common.image_statistics(video.flatten(0, 1))
    for name, value in common.image_statistics(video).items():
        assert torch.allclose(value, frames[name].reshape(2, 3).mean(dim=1)) and value.shape == (2,)


def test_statistics_are_logged_after_the_rewards(run, seen, capsys):
    rows = read_csv(run("--reward", "spy=1", "--eval.images-per-prompt", 3, "--train.max-epochs", 0) / "metrics.csv")
    columns = [name for name in rows[0] if name.startswith("eval/")]
    names = ["mean", "contrast", "sharpness", "edge_density", "saturation", "group_spread"]
    assert columns == ["eval/total", "eval/spy", *(f"eval/image/{name}" for name in names)]
    images = torch.cat([images for images, _ in seen])
    spread = torch.stack([images[:3].std(dim=0), images[3:].std(dim=0)]).mean().item()
    assert float(rows[0]["eval/image/group_spread"]) == pytest.approx(spread)
    mean = common.image_statistics(images)["sharpness"].mean().item()
    assert float(rows[0]["eval/image/sharpness"]) == pytest.approx(mean)
    console = capsys.readouterr().out
    assert "eval/spy" in console and "eval/image" not in console


def test_the_spread_does_not_depend_on_the_batch(run):
    spread = {}
    for batch in (1, 4, 16):
        argv = ["--eval.images-per-prompt", 3, "--eval.per-device-batch-size", batch, "--train.max-epochs", 0]
        spread[batch] = float(read_csv(run(*argv, name=f"b{batch}") / "metrics.csv")[0]["eval/image/group_spread"])
    assert spread[1] == pytest.approx(spread[4], rel=1e-3) and spread[4] == pytest.approx(spread[16], rel=1e-3)
    assert "eval/image/group_spread" not in read_csv(run("--train.max-epochs", 0, name="one") / "metrics.csv")[0]


# Grids


def test_the_grid_shows_the_base_model_beside_the_policy(run):
    images = run("--train.learning-rate", 0.02) / "images"
    base, policy = (np.array(Image.open(images / f"epoch_000{epoch}.png")) for epoch in (0, 2))
    assert base.shape == (172, 2 * 136, 3) and policy.shape == (172, 2 * 264, 3)
    for i in range(2):
        alone = base[4:132, 136 * i + 4 :][:, :128]
        pair = policy[4:132, 264 * i + 4 :][:, :256]
        assert (pair[:, :128] == alone).all() and (pair[:, 128:] != alone).any()


def test_grids_of_many_images(tmp_path):
    shown = {i: np.full((1, 16, 16, 3), i, np.uint8) for i in common.evenly(100, 32)}
    assert len(shown) == 32 and min(shown) == 0 and max(shown) == 99 and common.evenly(2, 32) == [0, 1]
    prompts, totals = ["a red circle"] * 100, torch.arange(100)
    common.save_grid(tmp_path / "plain.png", shown, prompts, totals)
    assert Image.open(tmp_path / "plain.png").size == (8 * 136, 4 * 172)
    base = {i: image + 100 for i, image in shown.items()}
    common.save_grid(tmp_path / "pairs.png", shown, prompts, totals, (base, totals))
    pairs = Image.open(tmp_path / "pairs.png")
    assert pairs.size == (4 * 264, 8 * 172)
    last = tuple(pairs.getpixel((3 * 264 + 4 + x, 7 * 172 + 4)) for x in (0, 127, 128, 255))
    assert last == ((199,) * 3,) * 2 + ((99,) * 3,) * 2


def test_captions_fill_their_lines(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(common.ImageDraw.ImageDraw, "text", lambda draw, place, text, **_: said.append(text))
    prompts = ["a red circle", "x" * 30 + " and more", "红" * 50]
    shown = {i: np.zeros((1, 128, 128, 3), np.uint8) for i in range(3)}
    common.save_grid(tmp_path / "grid.png", shown, prompts, [0.5, 0.5, 0.5])  # 21 letters on each line
    assert said == ["a red circle\n0.5", f"{'x' * 21}\n{'x' * 9} and more\n0.5", f"{'红' * 21}\n{'红' * 21}\n0.5"]


def test_a_contact_sheet_of_videos(tmp_path):
    assert common.evenly(81, common.FRAMES)[0] == 0 and common.evenly(81, common.FRAMES)[-1] == 80
    frames = np.stack([np.full((16, 16, 3), 10 * f, np.uint8) for f in range(5)])
    common.save_grid(tmp_path / "sheet.png", {0: frames, 1: frames}, ["a", "b"], [0.0, 1.0])
    assert Image.open(tmp_path / "sheet.png").size == (5 * 128 + 8, 2 * 172)  # a row each
    base = ({0: frames + 100, 1: frames + 100}, [0.0, 0.0])
    common.save_grid(tmp_path / "pairs.png", {0: frames, 1: frames}, ["a", "b"], [0.0, 1.0], base)
    pairs = Image.open(tmp_path / "pairs.png")
    assert pairs.size == (5 * 128 + 8, 2 * (172 + 128))
    column = [pairs.getpixel((4 + 128 * 3, y))[0] for y in (4, 131, 132, 259)]
    assert column == [130, 130, 30, 30]  # the base model's frames above


# Videos


def test_a_reward_of_images_scores_the_frames_of_a_video(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\ndef length(images, prompts):\n    assert images.ndim == 4 and len(images) == len(prompts)\n"
        "    return images.mean(dim=(1, 2, 3)) + torch.tensor([float(len(p)) for p in prompts])\n"
        "def motion(images, prompts):\n    assert images.shape[1] == 5 and len(images) == len(prompts)\n"
        "    return images.diff(dim=1).abs().mean(dim=(1, 2, 3, 4))\nmotion.takes_video = True\n"
    )
    video = torch.rand(2, 5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    names = [f"{tmp_path}/mine.py:length", f"{tmp_path}/mine.py:motion", "jpeg_compressibility"]
    scores = rewards.make_reward(dict.fromkeys(names, 1.0), "cpu")(video, ["a", "bb"])
    assert torch.allclose(scores[names[0]], video.mean(dim=(1, 2, 3, 4)) + torch.tensor([1.0, 2.0]))
    assert torch.allclose(scores[names[1]], video.diff(dim=1).abs().mean(dim=(1, 2, 3, 4)))
    alone = rewards.make_reward({names[2]: 1.0}, "cpu")
    for i in range(2):
        of_frames = alone(video[i], ["a"] * 5)[names[2]]
        assert scores[names[2]][i].item() == pytest.approx(of_frames.mean().item())
    assert {value.shape for value in scores.values()} == {(2,)}


@pytest.mark.parametrize("family, script", [("wan", grpo), ("ltx", nft), ("flux", grpo_guard)])
def test_a_run_on_another_family(start, tiny, seen, family, script, capsys):
    folder = start(script, *tiny(family), "--reward", "jpeg_compressibility=1", "spy=1", "--train.train-steps", 0, 1)
    assert "BROKEN" not in capsys.readouterr().out
    rows = read_csv(folder / "metrics.csv")
    assert float(rows[-1]["eval/jpeg_compressibility"]) < 0 and float(rows[1]["train/grad_norm"]) > 0
    call = yaml.safe_load((folder / "args.yaml").read_text())["call"]
    frames, side = call.get("num_frames", 1), tiny_pipelines.FAMILIES[family]()[1]["height"]
    assert seen[0][0].shape == (2 * frames, 3, side, side) and (seen[-1][0] != seen[0][0]).any()
    scale = 128 // side
    width, height = Image.open(folder / "images" / "epoch_0000.png").size
    assert (width, height) == ((min(frames, 8) * side * scale + 8, 2 * 172) if frames > 1 else (2 * 136, 172))
    paired = Image.open(folder / "images" / "epoch_0002.png").size
    assert paired == ((width, height + 2 * 128) if frames > 1 else (2 * 264, 172))


# Weights out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["stable_diffusion_3", "flux"])
@pytest.mark.parametrize("finetune_type", ["lora", "full"])
def test_saved_weights_reproduce_the_evaluation_in_plain_diffusers(run, tiny, seen, family, dtype, finetune_type):
    argv = tiny(family)
    folder = run(*argv, "--dtype", dtype, "--finetune-type", finetune_type, "--lora-alpha", 6, "--reward", "spy=1")
    args = yaml.safe_load((folder / "args.yaml").read_text())
    images, prompts = seen[-1]

    def evaluation(pipe):
        pipe.set_progress_bar_config(disable=True)
        own = {"height": args["eval"]["resolution"], "width": args["eval"]["resolution"]}
        own |= {key: args["eval"][key] for key in ("num_inference_steps", "guidance_scale")} | args["call"]
        noise = common.generators(*((args["eval"]["seed"], i) for i in range(len(prompts))))
        return pipe(prompts, generator=noise, output_type="pt", **own).images.float()

    half = getattr(torch, dtype)
    pipe = DiffusionPipeline.from_pretrained(argv[1], torch_dtype=half)
    assert not torch.equal(evaluation(pipe), images)
    if finetune_type == "lora":
        pipe.load_lora_weights(folder / "lora")
    else:
        cls = type(pipe.transformer)
        pipe.transformer = cls.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
        stock = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
        assert dict(stock.config) == dict(pipe.scheduler.config)
        pipe.scheduler = stock
    pipe.vae.requires_grad_(False)  # torch's linear() takes another path, one bit off, for a weight with a gradient
    with torch.autocast("cpu", half, enabled=half != torch.float32):
        off = (evaluation(pipe) - images).abs().max()
        assert off == 0


@pytest.mark.parametrize("calls", [[12], [4, 8], [5, 5, 2], [1] * 12])
def test_how_groups_look_does_not_depend_on_the_calls(calls):
    images = torch.rand(12, 3, 8, 8)
    looks = common.Looks(4)
    for part in images.split(calls):
        looks.add(part)
    assert not looks.begun
    means = looks.means()
    assert torch.allclose(means["contrast"], images.flatten(1).std(dim=1).mean())
    assert torch.allclose(means["group_spread"], images.reshape(3, 4, 3, 8, 8).std(dim=1).mean())
