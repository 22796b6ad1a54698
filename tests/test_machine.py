"""What the flags about memory ask for: frozen weights in few bits, in a run as in its tape."""

import importlib.util
import sys

import pytest
import torch
from conftest import read_csv
from test_checkpoint import assert_same_run

import common
import grpo
import nft
from harness import machine
from harness.settings import QUANTIZED, RunArgs
from rewards import make_reward


def here(kind):
    """Whether this machine can quantise so."""
    return importlib.util.find_spec(QUANTIZED[kind]) and (kind != "nf4" or torch.cuda.is_available())


SKIPS = {kind: pytest.mark.skipif(not here(kind), reason=f"no {kind} here") for kind in QUANTIZED}


def policy_of(kind, dtype, device=None):
    args = grpo.Args(quantize=kind, quantize_text=kind, lora_rank=4, dtype=dtype)
    return machine.make_policy(args, torch.device(device or ("cuda" if kind == "nf4" else "cpu")))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=skip) for kind, skip in SKIPS.items()])
def test_a_quantised_base_replays_exactly_and_trains(call, kind, dtype):
    pipe, policy = policy_of(kind, dtype)
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        assert any(type(p) is not torch.nn.Parameter for p in common.networks(pipe)[name].parameters()), name
    torch.manual_seed(1)
    for parameter in policy.values():
        parameter.data += 0.02 * torch.randn_like(parameter)
    noise = common.generators(*((1, i) for i in range(4)))
    tape = common.rollout(pipe, call(guidance_scale=2.0), "Flow-SDE", 0.7, [0, 2], noise)
    for k, taken in tape.steps.items():
        velocity, step = common.replay(pipe, tape, k)
        assert torch.equal(velocity, taken.velocity) and torch.equal(step.log_prob, taken.log_prob)
    step.log_prob.sum().backward()
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in policy.values())


@pytest.mark.parametrize(
    "kind, script", [pytest.param(kind, nft if kind == "int8" else grpo, marks=skip) for kind, skip in SKIPS.items()]
)
def test_a_run_on_a_quantised_base(start, monkeypatch, kind, script):
    """It resumes exactly, begins with saved adapters, and those it saves give its images in plain diffusers."""
    options = ("--quantize", kind, "--quantize-text", kind, "--train.kl-beta", 0.1, "--eval.eval-freq", 1)
    whole, half = start(script, *options, name="whole"), start(script, *options, "--train.max-epochs", 1, name="half")
    monkeypatch.setattr(sys, "argv", [script.__file__, "--resume", str(half), "--train.max-epochs", "2"])
    script.main()
    assert_same_run(whole, half)
    assert "contract holds" in (whole / "log.txt").read_text()
    start(script, *options, "--lora", whole / "lora", "--train.max-epochs", 0, name="begun")

    found = read_csv(whole / "images" / "epoch_0002.csv")
    device = "cuda" if kind == "nf4" else None
    quantized = machine.quantization(grpo.Args(quantize=kind, quantize_text=kind, dtype="float32"))
    pipe = common.load_pipeline(RunArgs.model, device, torch.float32, **quantized)
    pipe.load_lora_weights(whole / "lora")
    images = pipe(
        [row["prompt"] for row in found], height=32, width=32, num_inference_steps=2, guidance_scale=1.0,
        max_sequence_length=1, generator=common.generators((1, 0), (1, 1)), output_type="pt",
    ).images  # fmt: skip
    scores = make_reward({"jpeg_compressibility": 1}, "cpu")(images, [""] * 2)["total"]
    assert scores.tolist() == pytest.approx([float(row["total"]) for row in found], abs=1e-6)


def test_what_is_made_is_what_was_asked_for(monkeypatch):
    """New adapters of the seed, normal, of std 1 / rank; the VAE's modes; threads; what of the weights in few bits."""
    made, threads = [], []
    for seed in (0, 1, 1):
        own = dict(vae_tiling=True, vae_slicing=True, train=grpo.TrainArgs(seed=seed))
        args = grpo.Args(dtype="float32", lora_rank=8, **own)
        pipe, policy = machine.make_policy(args, torch.device("cpu"))
        made.append(torch.cat([p.detach().flatten() for name, p in policy.items() if ".lora_A." in name]))
        assert pipe.vae.use_tiling and pipe.vae.use_slicing
    assert torch.equal(made[1], made[2]) and not torch.equal(made[0], made[1])
    assert made[0].std().item() == pytest.approx(1 / 8, rel=0.03)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    machine.pick_device(grpo.Args(cpu_threads=3, device="cpu"))
    assert threads == [3]

    def mapping(quant_mapping):
        return quant_mapping

    for library in (machine.diffusers, machine.transformers):
        monkeypatch.setattr(library, "BitsAndBytesConfig", lambda *, of=library.__name__, **_: of)
    monkeypatch.setattr(machine.diffusers, "PipelineQuantizationConfig", mapping)
    kinds = {"quantization_config": {"transformer": "diffusers"}}
    assert machine.quantization(grpo.Args(quantize="nf4")) == kinds
    texts = {name: "transformers" for name in ("text_encoder", "text_encoder_2", "text_encoder_3")}
    found = machine.quantization(grpo.Args(quantize_text="nf4"))["quantization_config"]
    assert found.items() <= texts.items() and "text_encoder" in found


def test_what_is_quantised_is_frozen_and_its_packages_are_there(refused, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert "quantize = 'fp8': is of frozen weights" in refused("--quantize", "fp8", "--finetune-type", "full")
    assert "quantize_text = 'nf4': needs a GPU" in refused("--quantize-text", "nf4", "--device", "cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "quantize = 'int8': needs the package torchao: pip install torchao" in refused("--quantize", "int8")
