"""Tiny pipelines that are given pictures: other classes over the networks of tiny_pipelines, one a row of CONDITIONED.

As there, each gives (pipe, call) with two prompts, 4 steps and random weights. A list of pictures is one for each
prompt. A bare picture is of all prompts, where a pipeline takes no list or makes something else of it.
"""

import inspect
import re
from functools import partial

import diffusers
import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit as qwen_edit
import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus as qwen_edit_plus
import diffusers.pipelines.wan.pipeline_wan_i2v as wan_i2v
import numpy as np
import tiny_pipelines as tiny
import transformers
from PIL import Image, ImageOps

qwen_edit.calculate_dimensions = lambda *_: (32, 32, None)  # instead of a megapixel
qwen_edit_plus.calculate_dimensions = lambda *_: (32, 32)
wan_i2v.prompt_clean = str  # without the package ftfy


def picture(size, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def pictures(size, *seeds):
    return [picture(size, seed) for seed in seeds or range(2)]


def inverted(given):
    """A picture, or a list of them, in the opposite colours."""
    return [ImageOps.invert(one) for one in given] if isinstance(given, list) else ImageOps.invert(given)


def masks(size):
    """White, which is painted, on the right."""
    return [Image.fromarray(np.tile(np.repeat(np.uint8([0, 255]), size // 2), (size, 1)))] * 2


def configuration(network):
    return {key: value for key, value in network.config.items() if not key.startswith("_")}


def over(family, cls, transformer=None, vae=None, controlnet=None, parts=None, **call):
    """A class of diffusers over the components of a family.

    transformer, vae: what changes in their configurations; controlnet: a class, which takes the transformer's.
    parts: a function that makes further components; call: further arguments, functions of the height in pixels.
    """
    base, given = tiny.FAMILIES[family]()
    made = {**base.config, **base.components, **(parts() if parts else {})}
    for name, changes in (("transformer", transformer), ("transformer_2", transformer), ("vae", vae)):
        if changes and made.get(name):
            made[name] = type(made[name]).from_config(configuration(made[name]) | changes)
    if controlnet:
        made["controlnet"] = getattr(diffusers, controlnet).from_config(configuration(made["transformer"]))
    cls = getattr(diffusers, cls)
    takes = inspect.signature(cls.__init__).parameters
    pipe = tiny.build(cls, **{name: part for name, part in made.items() if name in takes})
    given |= {name: value(given["height"]) if callable(value) else value for name, value in call.items()}
    return pipe, {name: value for name, value in given.items() if name in inspect.signature(cls.__call__).parameters}


class SeeingProcessor(tiny.Processor):
    """Qwen's own asks for torchvision. The mark of a picture in a text becomes as many as the picture has tokens."""

    def __call__(self, text, images, **settings):
        seen = transformers.Qwen2VLImageProcessorPil(min_pixels=784, max_pixels=784)(images, return_tensors="pt")
        lengths = iter(seen["image_grid_thw"].prod(dim=1) // 4)
        marked = [re.sub(r"<\|image_pad\|>", lambda mark: mark[0] * next(lengths), prompt) for prompt in text]
        tokens = self.tokenizer(marked, **settings)
        tokens.update(seen)
        return tokens


def seeing_qwen():
    encoder = tiny.qwen_vl()
    encoder.config.image_token_id = tiny.tokenizer().convert_tokens_to_ids("<|image_pad|>")
    return dict(text_encoder=encoder, processor=SeeingProcessor())


VISION = dict(tiny.SMALL, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)


def mistral():
    text, vision = dict(tiny.QWEN, model_type="mistral"), dict(VISION, model_type="pixtral")
    encoder = tiny.network("Mistral3", "ForConditionalGeneration", text_config=text, vision_config=vision)
    return dict(text_encoder=encoder())


def clip_vision():
    seen = transformers.CLIPImageProcessorPil(size=28, crop_size=28)
    return dict(image_encoder=tiny.network("CLIPVision", "Model", **VISION)(), image_processor=seen)


def llava():
    """The mark of a picture is a token that no prompt has."""
    text, vision = dict(tiny.DECODER, **tiny.SMALL, model_type="llama"), dict(VISION, model_type="clip_vision_model")
    marks = dict(image_token_index=250, pad_token_id=0)
    encoder = tiny.network("Llava", "ForConditionalGeneration", text_config=text, vision_config=vision, **marks)
    return clip_vision() | dict(text_encoder=encoder())


SD3, FLUX, FLUX2, QWEN = "stable_diffusion_3", "flux", "flux2_klein", "qwen_image"
HALF, MASKED = dict(image=pictures, strength=0.6), dict(image=pictures, mask_image=masks)
CONTROL = dict(control_image=pictures)
# FLUX.2 takes pictures of at least 64 pixels a side: few latents of them
DOWN = tiny.deep(3)
HUNYUAN = partial(
    over, "hunyuan_video", "HunyuanVideoImageToVideoPipeline", parts=llava, image=pictures, true_cfg_scale=1.0,
    prompt_template=dict(template="{}", crop_start=0, image_emb_len=4, image_emb_start=5, image_emb_end=9),
)  # fmt: skip
LTX = partial(
    over, "ltx", "LTXConditionPipeline", parts=lambda: dict(scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
)
CONDITIONED = dict(
    sd3_image_to_image=partial(over, SD3, "StableDiffusion3Img2ImgPipeline", **HALF),
    sd3_inpainting=partial(
        over, SD3, "StableDiffusion3InpaintPipeline", dict(in_channels=16, out_channels=16), dict(latent_channels=16),
        **HALF | MASKED,
    ),
    sd3_controlnet=partial(over, SD3, "StableDiffusion3ControlNetPipeline", controlnet="SD3ControlNetModel", **CONTROL),
    flux_kontext=partial(over, FLUX, "FluxKontextPipeline", image=pictures, max_area=64, _auto_resize=False),
    flux_fill=partial(over, FLUX, "FluxFillPipeline", dict(in_channels=36, out_channels=16), **MASKED),
    flux_image_to_image=partial(over, FLUX, "FluxImg2ImgPipeline", **HALF),
    flux_inpainting=partial(over, FLUX, "FluxInpaintPipeline", **HALF | MASKED),
    flux_control=partial(over, FLUX, "FluxControlPipeline", dict(in_channels=32, out_channels=16), **CONTROL),
    flux_controlnet=partial(over, FLUX, "FluxControlNetPipeline", controlnet="FluxControlNetModel", **CONTROL),
    flux2_edit=partial(
        over, FLUX2, "Flux2Pipeline", dict(guidance_embeds=True), DOWN, parts=mistral, image=lambda _: picture(64),
        max_sequence_length=192,
    ),
    flux2_klein_edit=partial(over, FLUX2, "Flux2KleinPipeline", vae=DOWN, image=lambda _: picture(64)),
    qwen_edit=partial(over, QWEN, "QwenImageEditPipeline", parts=seeing_qwen, image=pictures),
    qwen_edit_plus=partial(
        over, QWEN, "QwenImageEditPlusPipeline", parts=seeing_qwen, image=pictures, prompt=tiny.PROMPTS[:1],
        negative_prompt=tiny.NEGATIVE[:1],
    ),
    qwen_image_to_image=partial(over, QWEN, "QwenImageImg2ImgPipeline", **HALF),
    qwen_controlnet=partial(
        over, QWEN, "QwenImageControlNetPipeline", controlnet="QwenImageControlNetModel", **CONTROL
    ),
    z_image_to_image=partial(over, "z_image", "ZImageImg2ImgPipeline", **HALF),
    cogview4_control=partial(over, "cogview4", "CogView4ControlPipeline", dict(in_channels=8), **CONTROL),
    wan_image_to_video=partial(
        over, "wan", "WanImageToVideoPipeline", dict(in_channels=36, image_dim=16, added_kv_proj_dim=24,
        pos_embed_seq_len=10), parts=clip_vision, image=picture, last_image=partial(picture, seed=1),
    ),
    wan_image_to_video_two_denoisers=partial(
        over, "wan_two_denoisers", "WanImageToVideoPipeline", dict(in_channels=36), image=picture
    ),
    wan_image_to_video_expanded=partial(over, "wan_expanded_timesteps", "WanImageToVideoPipeline", image=picture),
    ltx_image_to_video=partial(over, "ltx", "LTXImageToVideoPipeline", image=pictures),
    hunyuan_video_concat=partial(HUNYUAN, dict(in_channels=9, image_condition_type="latent_concat")),
    hunyuan_video_replace=partial(HUNYUAN, dict(in_channels=4, image_condition_type="token_replace")),
)  # fmt: skip
CORE = ("sd3_image_to_image", "sd3_controlnet", "flux_control")
BARE = ("flux2_edit", "flux2_klein_edit", "qwen_edit_plus", *(name for name in CONDITIONED if name.startswith("wan")))
"""Whose list of pictures is not one for each prompt: of these a call has one picture or one prompt."""
GIVEN = dict(sd3_inpainting={1}, flux_inpainting={1}, ltx_image_to_video={0}, hunyuan_video_replace={0})
"""{name: the steps before which a part of the latents is given}."""
