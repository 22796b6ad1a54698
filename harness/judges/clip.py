"""Rewards by a CLIP: PickScore, CLIPScore, HPS v2 and the aesthetic predictor.

Their options: `model`, where the weights are; `processor`, where the tokenizer and the image preprocessing are, the
model's own by default; `dtype` of the weights; `batch_size`, images in one forward.
"""

import functools

import torch
import torch.nn.functional as F
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from harness.fields import Count, Positive
from harness.judges.weights import Dtype, Model, in_batches, linear_layers, load, part, read, to_pil

PICKSCORE, HPSV2, VIT_L = "yuvalkirstain/PickScore_v1", "adams-story/HPSv2-hf", "openai/clip-vit-large-patch14"
# of models that come without their own
PROCESSORS = {PICKSCORE: "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", HPSV2: "openai/clip-vit-base-patch32"}


def clipscore(
    device, model: Model = VIT_L, processor: Model | None = None, dtype: Dtype = "float32", batch_size: Count = 16
):
    """The cosine of image and prompt in CLIP, about 0.2 to 0.35, as DiffusionNFT's tables have it (arXiv 2509.16117).

    Elsewhere it is scaled: by 2.5 and cut off at 0 (arXiv 2104.08718, which named it), by 100 (torchmetrics), by
    100 / 30 (Flow-GRPO's code).
    """
    return in_batches(Clip(device, model, processor, dtype).cosine, batch_size)


hpsv2 = functools.partial(clipscore, model=HPSV2)
"""Human Preference Score v2 (arXiv 2306.09341): the cosine in a CLIP tuned on preferences, about 0.2 to 0.35.

The default is v2.0 converted to transformers. For v2.1, which was published as an OpenCLIP checkpoint, name a converted
folder. An image that is not square is cropped to its middle, where the authors' code pads it.
"""


def pickscore(
    device, model: Model = PICKSCORE, processor: Model | None = None, dtype: Dtype = "float32",
    batch_size: Count = 16, divide_by: Positive = 1.0,
):  # fmt: skip
    """PickScore (arXiv 2305.01569): the model's logit scale times the cosine of image and prompt, about 20 to 24.

    That is the number papers report. Flow-GRPO's code trains on it divided by 26: divide_by=26.
    """
    clip = Clip(device, model, processor, dtype)
    scale = clip.model.logit_scale.float().exp().item() / divide_by
    return in_batches(lambda images, prompts: scale * clip.cosine(images, prompts), batch_size)


def aesthetic(
    device, head: Model = "trl-lib/ddpo-aesthetic-predictor", model: Model = VIT_L,
    processor: Model | None = None, dtype: Dtype = "float32", batch_size: Count = 16,
):  # fmt: skip
    """LAION's improved aesthetic predictor, about 1 to 10, whatever the prompt: linear layers on CLIP's embedding.

    head: its layers.0.weight, ...: a .pth or .safetensors file, or a folder or hub id with aesthetic-model.pth.
    Source: github.com/christophschuhmann/improved-aesthetic-predictor; a reward since DDPO (arXiv 2305.13301).
    """
    clip = Clip(device, model, processor, dtype)
    predict = linear_layers(part(read(head, "aesthetic-model.pth"), "layers."), device)
    return in_batches(lambda images, prompts: predict(clip.images(to_pil(images))), batch_size)


class Clip:
    """A CLIP on a device of its own: unit vectors (B, D) of images and of prompts, in float32."""

    def __init__(self, device, model, processor=None, dtype="float32"):
        processor = processor or PROCESSORS.get(model, model)
        self.model, loaded = load(CLIPModel, model, dtype=getattr(torch, dtype), output_loading_info=True)
        if loaded["missing_keys"]:  # transformers would go on with random weights
            raise ValueError(f"{model} holds no whole CLIP: {min(loaded['missing_keys'])} is missing")
        self.model.to(device)
        self.tokenizer = load(CLIPTokenizer, processor)
        if len(self.tokenizer) < self.model.config.text_config.vocab_size:  # nor without a vocabulary
            raise ValueError(f"{processor} holds no whole tokenizer: it knows {len(self.tokenizer)} tokens")
        self.processor = load(CLIPImageProcessorPil, processor)
        self.device = device

    def images(self, pictures):
        pixels = self.processor(images=pictures, return_tensors="pt").to(self.device)
        return F.normalize(self.model.get_image_features(**pixels).pooler_output.float(), dim=1)

    def prompts(self, prompts):
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        return F.normalize(self.model.get_text_features(**tokens.to(self.device)).pooler_output.float(), dim=1)

    def cosine(self, images, prompts):
        """(B,): each image with its own prompt."""
        return (self.images(to_pil(images)) * self.prompts(prompts)).sum(dim=1)
