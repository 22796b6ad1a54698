"""ImageReward: a BLIP that reads the prompt while it looks at the image, from its authors' checkpoint."""

import re

import torch
import transformers
from transformers.utils import cached_file

from harness.judges.clip import preprocess
from harness.judges.weights import Dtype, Model, in_batches, linear_layers, load, part, read

BLIP_NAMES = {  # parts of the names in salesforce/BLIP's vision encoder -> in transformers'
    r"^cls_token": "embeddings.class_embedding",
    r"^pos_embed": "embeddings.position_embedding",
    r"^patch_embed\.proj": "embeddings.patch_embedding",
    r"^blocks": "encoder.layers",
    r"^norm": "post_layernorm",
    r"\.norm": ".layer_norm",
    r"\.attn\.proj": ".self_attn.projection",
    r"\.attn\.qkv": ".self_attn.qkv",
}


def imagereward(
    device, model: Model = "THUDM/ImageReward", tokenizer: Model = "google-bert/bert-base-uncased",
    dtype: Dtype = "float32", batch_size: int = 16,
):  # fmt: skip
    """ImageReward (arXiv 2304.05977), standardised as its authors do: about -2 to 2.

    model: a folder or hub id with ImageReward.pt and med_config.json. A prompt is cut off at 35 tokens.
    """
    weights = read(model, "ImageReward.pt")
    vision, text = (network.to(device, getattr(torch, dtype)) for network in blip(model, weights))
    predict = linear_layers(part(weights, "mlp.layers."), device)
    tokenizer = load(transformers.AutoTokenizer, tokenizer)
    side = vision.config.image_size
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=side)

    @torch.no_grad()
    def read_together(images, prompts):
        seen = vision(preprocess(images.to(device), processor)).last_hidden_state
        words = tokenizer(prompts, padding=True, truncation=True, max_length=35, return_tensors="pt").to(device)
        return text(words.input_ids, words.attention_mask, encoder_hidden_states=seen).last_hidden_state[:, 0].float()

    states = in_batches(read_together, batch_size)
    return lambda images, prompts: (predict(states(images, prompts)) - 0.16717362830052426) / 1.0333394966054072


def blip(model, weights):
    """BLIP's vision encoder and the text encoder that attends to it, from a checkpoint in salesforce/BLIP's layout."""
    seen, said = part(weights, "blip.visual_encoder."), part(weights, "blip.text_encoder.")
    said.pop("embeddings.position_ids", None)  # a buffer
    width, _, patch, _ = seen["patch_embed.proj.weight"].shape
    for old, new in BLIP_NAMES.items():
        seen = {re.sub(old, new, key): value for key, value in seen.items()}
    vision = transformers.BlipVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=sum(key.endswith("fc1.weight") for key in seen),
        num_attention_heads=width // 64,
        image_size=patch * round((seen["embeddings.position_embedding"].shape[1] - 1) ** 0.5),
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    text = transformers.BlipTextConfig.from_json_file(cached_file(model, "med_config.json"))
    text.encoder_hidden_size = width
    networks = transformers.BlipVisionModel(vision), transformers.BlipTextModel(text, add_pooling_layer=False)
    for network, values in zip(networks, (seen, said), strict=True):
        network.load_state_dict(values)
        network.eval().requires_grad_(False)
    return networks
