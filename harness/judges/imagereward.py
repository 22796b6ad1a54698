"""ImageReward: a BLIP that reads the prompt while it looks at the image, from its authors' checkpoint."""

import re

import torch
import transformers
from transformers.utils import cached_file

from harness.fields import Count
from harness.judges.weights import Dtype, Model, in_batches, linear_layers, load, part, read, to_pil

VISION = dict(  # ViT-L/16, as ImageReward has it
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224,
    patch_size=16, layer_norm_eps=1e-6,
)  # fmt: skip
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
    dtype: Dtype = "float32", batch_size: Count = 16,
):  # fmt: skip
    """ImageReward (arXiv 2304.05977), standardised as its authors do: about -2 to 2.

    model: a folder or hub id with ImageReward.pt and med_config.json. A prompt is cut off at 35 tokens.
    """
    weights = read(model, "ImageReward.pt")
    seen, said = part(weights, "blip.visual_encoder."), part(weights, "blip.text_encoder.")
    for old, new in BLIP_NAMES.items():
        seen = {re.sub(old, new, key): value for key, value in seen.items()}
    said.pop("embeddings.position_ids", None)  # a buffer
    config = transformers.BlipTextConfig.from_json_file(cached_file(model, "med_config.json"))
    config.encoder_hidden_size = VISION["hidden_size"]
    vision = transformers.BlipVisionModel(transformers.BlipVisionConfig(**VISION))
    text = transformers.BlipTextModel(config, add_pooling_layer=False)
    for network, values in ((vision, seen), (text, said)):
        network.load_state_dict(values)
        network.to(device, getattr(torch, dtype)).eval()
    predict = linear_layers(part(weights, "mlp.layers."), device)
    tokenizer = load(transformers.AutoTokenizer, tokenizer)
    side = VISION["image_size"]
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=side)

    def score(images, prompts):
        patches = vision(**processor(images=to_pil(images), return_tensors="pt").to(device)).last_hidden_state
        words = tokenizer(prompts, padding=True, truncation=True, max_length=35, return_tensors="pt").to(device)
        states = text(words.input_ids, words.attention_mask, encoder_hidden_states=patches).last_hidden_state
        return (predict(states[:, 0].float()) - 0.16717362830052426) / 1.0333394966054072

    return in_batches(score, batch_size)
