"""The settings that every script takes beside its algorithm's own, each with its bounds and what it means."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, Optional

from pydantic import Field

from dynamics import SOLVERS
from harness.fields import MAY_CHANGE, Count, Decay, Name, NotNegative, Positive, Resolution, Seed, Size, pairs

HERE = Path(__file__).resolve().parent.parent
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
QUANTIZED = {"nf4": "bitsandbytes", "int8": "torchao", "fp8": "torchao"}  # by an optional package


@dataclass
class TrainArgs:
    """What every algorithm takes under `train`; a script adds its own."""

    unique_sample_num_per_epoch: Annotated[int, Field(ge=1, le=100_000)] = 48
    """Prompts in an epoch; a shorter file is gone through again."""
    group_size: Annotated[int, Field(ge=2, le=1000)] = 24
    """Images of each prompt; their rewards are compared with one another, so that one alone would have advantage 0."""
    per_device_batch_size: Count = 12
    """Images in one call; a divisor of group_size saves work on groups of equal rewards and with same_init_noise."""
    resolution: Resolution = 512
    """Pixels in training: one side of a square, or height and width."""
    num_inference_steps: Size = 10
    """Sampling steps T in training; far fewer than for evaluation will do (Flow-GRPO)."""
    guidance_scale: NotNegative = 4.5
    """Classifier-free guidance in sampling and in training alike; 1 is none."""
    max_epochs: Annotated[int, Field(ge=0), MAY_CHANGE] = 1000
    """Epochs of the run."""
    gradient_step_per_epoch: int = 2
    """Optimizer steps in one pass over an epoch's images; after the first the policy is no longer that of sampling."""
    num_inner_epochs: Size = 1
    """Passes over an epoch's images."""
    learning_rate: NotNegative = 3e-4
    """Of AdamW, constant."""
    adam_betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of AdamW's first and second moments."""
    adam_weight_decay: NotNegative = 1e-4
    """Decoupled weight decay."""
    adam_epsilon: NotNegative = 1e-8
    """Must be well below the gradients, which a mean over dimensions makes small."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this norm."""
    enable_gradient_checkpointing: Annotated[bool, MAY_CHANGE] = False
    """Recompute activations in the backward pass: less memory, more time."""
    ema_decay: Decay = 0.9
    """Of the average of the trained parameters that is evaluated and saved; 0 keeps none."""
    ema_update_interval: Count = 8
    """Optimizer steps between updates of that average."""
    kl_reference: Literal["base", "start"] = "base"
    """What a KL is to: the base model, or the policy that the run began with (--lora)."""
    ref_param_device: Annotated[Literal["same_as_model", "cpu"], MAY_CHANGE] = "same_as_model"
    """Where copies of the trained parameters, such as the base model's for the KL, wait."""
    seed: Seed = 0
    """With the other settings this decides the run."""


@dataclass
class EvalArgs:
    """Evaluation is the plain pipeline under its own ODE, on fixed prompts and fixed noise."""

    prompts: Optional[str] = None
    """Held-out prompts, in a file of either kind. None evaluates on the training prompts."""
    images_per_prompt: Size = 1
    """Images made of each evaluation prompt. From 2 on the spread within these groups is logged."""
    reward: pairs(float) = field(default_factory=dict)
    """Weighted rewards whose sum is eval/total, such as one held out of training, to show hacking; else training's."""
    resolution: Resolution = 512
    """Pixels: one side of a square, or height and width. Independent of train.resolution (PaCo-RL)."""
    num_inference_steps: Size = 40
    """ODE steps of an evaluation image."""
    solver: Literal[SOLVERS] = "Euler"
    """Of the evaluation's ODE: Euler is the plain pipeline; DPM-Solver++ is of second order at the same cost."""
    guidance_scale: NotNegative = 4.5
    """Classifier-free guidance of an evaluation image; 1 is none."""
    per_device_batch_size: Count = 16
    """Images in one call of the pipeline."""
    eval_freq: Count = 10
    """Epochs between evaluations. Epoch 0 and the last are always evaluated."""
    seed: Seed = 1
    """Seed of the evaluation noise; the same noise at every evaluation."""


@dataclass
class RunArgs:
    """What every script takes at the top."""

    model: str = str(HERE / "shapes" / "model")
    """A diffusers folder or hub id. Its folder may bring a defaults.yaml, which the embedded model does."""
    config: Annotated[Optional[Name], MAY_CHANGE] = None
    """A YAML file with these same keys; the command line wins over it."""
    call: pairs(object) = field(default_factory=dict)
    """Extra arguments of the pipeline's call, read as YAML, beside the model's own, e.g. negative_prompt=blurry."""
    pipeline: Optional[str] = None
    """Another pipeline class of diffusers over the same weights, e.g. StableDiffusion3Img2ImgPipeline."""
    finetune_type: Literal["lora", "full"] = "lora"
    """Train low-rank adapters or the whole denoiser."""
    lora: Optional[str] = None
    """Begin with these adapters, of their own rank, alpha and targets: a .safetensors file, or its folder."""
    lora_rank: Size = 32
    """Rank of the adapters."""
    lora_alpha: Positive = 64.0
    """Scale of the adapters: they add alpha / rank times their product."""
    target_modules: tuple[str, ...] = PROJECTIONS
    """Names of the linear layers that get adapters: the attention projections, or all-linear."""
    shard: bool = False
    """Full fine-tuning of a model that one GPU cannot hold: each process keeps a share of what is trained (FSDP2)."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the frozen weights and the arithmetic. Trained parameters are always float32."""
    quantize: Optional[Literal[tuple(QUANTIZED)]] = None
    """Keep the denoiser's frozen weights in 4 or 8 bits: nf4 by bitsandbytes, on a GPU; int8 and fp8 by torchao."""
    quantize_text: Optional[Literal[tuple(QUANTIZED)]] = None
    """The same of the text encoders."""
    device: Annotated[str, MAY_CHANGE] = "auto"
    """A torch device; auto takes the GPU if there is one."""
    compile: bool = False
    """Compile denoiser and VAE decoder: a minute at first, then 1.4 to 2 times as fast on a GPU; slower on a CPU."""
    cudnn_attention: bool = False
    """Let torch choose cuDNN's attention: fastest on Hopper GPUs; FLUX crashes, some masks give NaN (torch #196678)."""
    offload: Annotated[bool, MAY_CHANGE] = False
    """Keep text encoders, VAE and an epoch's rollouts on the CPU, each on the device only while it works."""
    vae_tiling: bool = False
    """Decode large images in overlapping tiles: less memory, and faint seams."""
    vae_slicing: bool = False
    """Decode the images of a call one by one: less memory, the same images."""
    cpu_threads: Optional[Annotated[int, Field(ge=1, le=4096)]] = None
    """Threads of torch on the CPU; None leaves the choice to torch. Another number can change the last digits."""
    prompts: Optional[str] = None
    """Training prompts: a text file, one a line, or a .jsonl file of rows (docs/data.md)."""
    reward: pairs(float) = field(default_factory=dict)
    """Weighted rewards, in the place of the model's own, e.g. jpeg_compressibility=0.1 my_rewards.py:brightness=1."""
    reward_options: pairs(object) = field(default_factory=dict)
    """Options of these rewards, read as YAML, e.g. pickscore.batch_size=8; docs/rewards.md says which each one has."""
    output_dir: Annotated[Name, MAY_CHANGE] = "runs"
    """Where the run folder is made."""
    run_name: Annotated[Optional[str], MAY_CHANGE] = None
    """Name of the run folder; the script's name and the time by default."""
    resume: Annotated[Optional[Name], MAY_CHANGE] = None
    """Continue a run exactly: its folder, or its name in output_dir. docs/runs.md says what may then change."""
    checkpoint_freq: Annotated[Count, MAY_CHANGE] = 1
    """Epochs between checkpoints, which are what a run can be resumed from; the last epoch always leaves one."""
    keep_checkpoints: Annotated[Count, MAY_CHANGE] = 2
    """How many of the newest checkpoints are kept."""
    track: Annotated[bool, MAY_CHANGE] = False
    """Log to Weights & Biases."""
    tensorboard: Annotated[bool, MAY_CHANGE] = False
    """Log to TensorBoard, in the run folder."""
