"""Tiny pipelines of random weights, one function per family, for the tests of the tape; nothing is downloaded.

Each function returns (pipe, call): the pipeline with the kind of scheduler that its published models bring, and the
keyword arguments of a call with two prompts of different lengths, guidance on where the family has it, and 4 steps.
"""

from functools import partial

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

PROMPTS = ["a red circle", "a blue square left of a white cross"]
NEGATIVE = ["blurry", "bad quality"]
FLOW_SIGMAS = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)

# ---------------------------------------------------------------------------------------------------------------------
# Parts


def tokenizer(max_length=512):
    """Every byte is a token; a chat is the contents of its messages."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytewise = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    named = {f"{name[1:-1]}_token": name for name in special}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bytewise, model_max_length=max_length, **named)
    fast.add_tokens(["<|im_start|>", "<|im_end|>", "<|image_pad|>"], special_tokens=True)
    fast.chat_template = (
        "{% for m in messages %}{% if m.content is string %}{{ m.role + ': ' + m.content }}"
        "{% else %}{% for c in m.content %}{{ m.role + ': ' + c.text }}{% endfor %}{% endif %}{% endfor %}"
    )
    return fast


class Processor:
    """A tokenizer behind the interface of a processor of texts and images."""

    def __init__(self):
        self.tokenizer = tokenizer()

    def __call__(self, text, **settings):
        return self.tokenizer(text, **settings)

    def apply_chat_template(self, messages, tokenize=False, **settings):
        chat = self.tokenizer.apply_chat_template(messages, tokenize=tokenize, **settings)
        return [chat] if tokenize else chat


VOCABULARY = len(tokenizer())
DECODER = dict(
    vocab_size=VOCABULARY, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, bos_token_id=1,
    eos_token_id=2, pad_token_id=0,
)  # fmt: skip
VISION = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16)


def clip(cls=transformers.CLIPTextModelWithProjection):
    config = transformers.CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, projection_dim=32, num_hidden_layers=2,
        num_attention_heads=4, hidden_act="gelu", pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return cls(config)


def t5(width=32, kind="T5"):
    config = getattr(transformers, f"{kind}Config")(
        d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=VOCABULARY, feed_forward_proj="gated-gelu"
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


def qwen3(cls=transformers.Qwen3Model):
    return cls(transformers.Qwen3Config(**DECODER, hidden_size=16, intermediate_size=16, head_dim=8))


def qwen_vl():
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
    text = DECODER | dict(hidden_size=16, intermediate_size=16, rope_theta=1e6, rope_scaling=rope)
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=VISION)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl():
    rope = {"mrope_section": [2, 1, 1], "rope_type": "default", "rope_theta": 1e6}
    text = DECODER | dict(hidden_size=16, intermediate_size=16, head_dim=8, rope_parameters=rope)
    return transformers.Qwen3VLModel(transformers.Qwen3VLConfig(text_config=text, vision_config=VISION))


def gemma():
    return transformers.Gemma2Model(
        transformers.Gemma2Config(**DECODER, hidden_size=8, intermediate_size=16, head_dim=8)
    )


def vae_2d(channels=4, widths=(4,), shift_factor=0.06):
    return diffusers.AutoencoderKL(
        block_out_channels=widths, down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths), layers_per_block=1, latent_channels=channels,
        norm_num_groups=1, use_quant_conv=False, use_post_quant_conv=False, shift_factor=shift_factor,
        scaling_factor=1.5,
    )  # fmt: skip


def vae_3d(cls=diffusers.AutoencoderKLWan, channels=16):
    return cls(
        base_dim=8, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * channels, latents_std=[1.0] * channels,
    )  # fmt: skip


def vae_qwen():
    return vae_3d(diffusers.AutoencoderKLQwenImage, 4)


def vae_flux2(channels=4):
    return diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), block_out_channels=(4,),
        layers_per_block=1, latent_channels=channels, norm_num_groups=1,
    )  # fmt: skip


def flow(**settings):
    return diffusers.FlowMatchEulerDiscreteScheduler(**settings)


def build(cls, scheduler, transformer, vae, *text_encoders, **components):
    """A pipeline; each text encoder brings its tokenizer."""
    for number, encoder in enumerate(text_encoders, 1):
        suffix = f"_{number}" if number > 1 else ""
        words = tokenizer(77 if "CLIP" in type(encoder).__name__ else 512)
        components = {f"text_encoder{suffix}": encoder, f"tokenizer{suffix}": words} | components
    pipe = cls(scheduler=scheduler, transformer=transformer, vae=vae, **components)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval().requires_grad_(False)
            for p in module.parameters():  # layers initialised to zero, or not at all, would hide what comes before
                if not (p.abs() < 1e3).all() or not p.any():
                    p.normal_(0, 0.1, generator=generator)
    return pipe


def arguments(size, length=48, guidance="guidance_scale", negative=True, **more):
    call = dict(prompt=list(PROMPTS), height=size, width=size, num_inference_steps=4)
    if length:
        call["max_sequence_length"] = length
    if guidance:
        call[guidance] = 3.0
    if negative:
        call["negative_prompt"] = list(NEGATIVE)
    return call | more


# ---------------------------------------------------------------------------------------------------------------------
# Families

HEADS = dict(num_attention_heads=2, attention_head_dim=16)
BLOCKS = HEADS | dict(num_layers=1, num_single_layers=1)


def stable_diffusion_3(layers=2, **more):
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=1, in_channels=4, out_channels=4, num_layers=layers, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=64, pooled_projection_dim=64,
        pos_embed_max_size=16,
    )  # fmt: skip
    cls, scheduler = diffusers.StableDiffusion3Pipeline, flow(shift=3.0)
    return build(cls, scheduler, transformer, vae_2d(), clip(), clip(), t5(64)), arguments(8, **more)


def flux(**more):
    transformer = diffusers.FluxTransformer2DModel(
        **BLOCKS, patch_size=1, in_channels=16, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8], guidance_embeds=True,
    )  # fmt: skip
    scheduler = flow(use_dynamic_shifting=True, shift=3.0)
    pipe = build(diffusers.FluxPipeline, scheduler, transformer, vae_2d(), clip(transformers.CLIPTextModel), t5())
    return pipe, arguments(8, negative=False, **more)


def flux2_klein():
    transformer = diffusers.Flux2Transformer2DModel(
        **BLOCKS, patch_size=1, in_channels=4, joint_attention_dim=16, timestep_guidance_channels=32,
        axes_dims_rope=[4, 4, 4, 4], guidance_embeds=False,
    )  # fmt: skip
    scheduler = flow(use_dynamic_shifting=True, shift=3.0)
    texts = qwen3(transformers.Qwen3ForCausalLM)
    pipe = build(diffusers.Flux2KleinPipeline, scheduler, transformer, vae_flux2(1), texts)
    return pipe, arguments(8, negative=False, text_encoder_out_layers=(1,))


def qwen_image():
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=16, guidance_embeds=False, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    scheduler = flow(use_dynamic_shifting=True, shift_terminal=0.02)
    pipe = build(diffusers.QwenImagePipeline, scheduler, transformer, vae_qwen(), qwen_vl())
    return pipe, arguments(32, 192, "true_cfg_scale")


def z_image():
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    for name in ("x_pad_token", "cap_pad_token"):  # made by torch.empty
        torch.nn.init.ones_(getattr(transformer, name))
    return build(diffusers.ZImagePipeline, flow(shift=6.0), transformer, vae_2d(widths=(4, 4)), qwen3()), arguments(16)


def sana():
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=8,
        sample_size=32,
    )  # fmt: skip
    coder = dict(block_types=("ResBlock", "EfficientViTBlock"), block_out_channels=(8, 8), layers_per_block=(1, 1))
    coder["qkv_multiscales"] = ((), (5,))
    vae = diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=2, downsample_block_type="conv", upsample_block_type="interpolate",
        decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41407,
        **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in coder.items()},
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(**FLOW_SIGMAS)
    pipe = build(diffusers.SanaPipeline, scheduler, transformer, vae, gemma())
    return pipe, arguments(32, complex_human_instruction=["say: "], use_resolution_binning=False)


def sana_video():
    transformer = diffusers.SanaVideoTransformer3DModel(
        in_channels=16, out_channels=16, num_layers=2, num_attention_heads=2, attention_head_dim=12,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=8,
        mlp_ratio=2.5, sample_size=8, patch_size=(1, 2, 2),
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(**FLOW_SIGMAS)
    pipe = build(diffusers.SanaVideoPipeline, scheduler, transformer, vae_3d(), gemma())
    return pipe, arguments(32, frames=5, complex_human_instruction=["say: "], use_resolution_binning=False)


LUMINA = dict(
    patch_size=2, in_channels=4, num_layers=2, num_kv_heads=1, multiple_of=16, norm_eps=1e-5, scaling_factor=1.0
)


def lumina():
    transformer = diffusers.LuminaNextDiT2DModel(
        **LUMINA, sample_size=16, hidden_size=32, num_attention_heads=2, learn_sigma=True, cross_attention_dim=8
    )
    pipe = build(diffusers.LuminaPipeline, flow(), transformer, vae_2d(), gemma())
    return pipe, arguments(64, clean_caption=False)


def lumina2():
    transformer = diffusers.Lumina2Transformer2DModel(
        **LUMINA, sample_size=4, hidden_size=24, num_attention_heads=3, axes_dim_rope=[4, 2, 2], cap_feat_dim=8
    )
    pipe = build(diffusers.Lumina2Pipeline, flow(shift=6.0), transformer, vae_2d(), gemma())
    return pipe, arguments(64, system_prompt="draw")


def aura_flow():
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=8, num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32,
        pos_embed_max_size=64,
    )  # fmt: skip
    return build(diffusers.AuraFlowPipeline, flow(shift=1.73), transformer, vae_2d(), t5(kind="UMT5")), arguments(16)


def cogview4():
    transformer = diffusers.CogView4Transformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        text_embed_dim=32, time_embed_dim=8, condition_dim=4,
    )  # fmt: skip
    texts = transformers.GlmModel(transformers.GlmConfig(**DECODER, hidden_size=32, intermediate_size=8, head_dim=16))
    shifts = dict(base_shift=0.25, max_shift=0.75, base_image_seq_len=256, time_shift_type="linear")
    scheduler = flow(use_dynamic_shifting=True, **shifts)
    return build(diffusers.CogView4Pipeline, scheduler, transformer, vae_2d(widths=(4, 4)), texts), arguments(16)


def chroma():
    transformer = diffusers.ChromaTransformer2DModel(
        **BLOCKS, patch_size=1, in_channels=16, joint_attention_dim=32, axes_dims_rope=[4, 4, 8],
        approximator_hidden_dim=32, approximator_layers=1, approximator_num_channels=16,
    )  # fmt: skip
    return build(diffusers.ChromaPipeline, flow(), transformer, vae_2d(), t5()), arguments(8)


def hunyuan_image():
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=(1, 1), guidance_embeds=False, text_embed_dim=16, text_embed_2_dim=32,
        rope_axes_dim=(4, 4),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32), layers_per_block=1,
        spatial_compression_ratio=2, sample_size=128, scaling_factor=0.476986,
    )  # fmt: skip
    guider = partial(diffusers.AdaptiveProjectedMixGuidance, adaptive_projected_guidance_start_step=1)
    both = dict(guider=guider(), ocr_guider=guider())  # from step 1, so that momentum counts within 4 steps
    pipe = build(diffusers.HunyuanImagePipeline, flow(shift=7.0), transformer, vae, qwen_vl(), t5(), **both)
    pipe.tokenizer_max_length = 192  # bytes, of which the template takes most
    return pipe, arguments(16, None, None)


def hunyuan_video():
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        **BLOCKS, in_channels=4, out_channels=4, num_refiner_layers=1, patch_size=1, patch_size_t=1,
        guidance_embeds=True, text_embed_dim=16, pooled_projection_dim=32, rope_axes_dim=(4, 4, 8),
    )  # fmt: skip
    texts = qwen3(), clip(transformers.CLIPTextModel)
    pipe = build(diffusers.HunyuanVideoPipeline, flow(shift=7.0), transformer, vae_hunyuan_video(), *texts)
    template = {"template": "draw: {}", "crop_start": 6}
    return pipe, arguments(16, num_frames=5, true_cfg_scale=2.0, prompt_template=template)


def vae_hunyuan_video():
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )


def hunyuan_video_15():
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        **HEADS, in_channels=9, out_channels=4, num_layers=2, num_refiner_layers=1, text_embed_dim=16,
        text_embed_2_dim=32, image_embed_dim=12, rope_axes_dim=(4, 6, 6), target_size=16, task_type="t2v",
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(16, 16, 16), layers_per_block=1, spatial_compression_ratio=4,
        temporal_compression_ratio=2,
    )  # fmt: skip
    vae.use_slicing = True  # diffusers' decoder fails on a batch
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=3.0)
    cls, scheduler = diffusers.HunyuanVideo15Pipeline, flow(shift=7.0)
    pipe = build(cls, scheduler, transformer, vae, qwen3(), t5(), guider=guider)
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = 416, 64
    return pipe, arguments(16, None, None, num_frames=5)


def wan(boundary_ratio=None, **settings):
    transformer, second = (
        diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
            text_dim=32, freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
        )
        for _ in range(2)
    )  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(**FLOW_SIGMAS)
    settings |= dict(boundary_ratio=boundary_ratio, transformer_2=second if boundary_ratio else None)
    pipe = build(diffusers.WanPipeline, scheduler, transformer, vae_3d(), t5(kind="UMT5"), **settings)
    return pipe, arguments(16, num_frames=5)


LTX_FLOW = dict(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1)


def ltx():
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=4, attention_head_dim=8,
        cross_attention_dim=32, num_layers=2, caption_channels=32,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False, False, False, False, False), upsample_residual=(False, False, False, False),
        upsample_factor=(1, 1, 1, 1), timestep_conditioning=False, patch_size=1, patch_size_t=1, encoder_causal=True,
        decoder_causal=False,
    )  # fmt: skip
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return build(diffusers.LTXPipeline, flow(**LTX_FLOW), transformer, vae, t5()), arguments(32, num_frames=9)


def ltx2():
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
        audio_cross_attention_dim=8, num_layers=2, caption_channels=16, rope_double_precision=False, rope_type="split",
    )  # fmt: skip
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,), layers_per_block=(1,),
        decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False), downsample_type=("spatial",), upsample_residual=(False,),
        upsample_factor=(1,), patch_size=1, patch_size_t=1,
    )  # fmt: skip
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    text = DECODER | dict(hidden_size=16, intermediate_size=16, head_dim=8)
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    gemma3 = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    connector = dict(num_attention_heads=2, attention_head_dim=8, num_layers=1, num_learnable_registers=None)
    connectors = diffusers.pipelines.ltx2.LTX2TextConnectors(
        caption_channels=16, text_proj_in_factor=3, connector_rope_base_seq_len=32, rope_double_precision=False,
        rope_theta=1e4, causal_temporal_positioning=False, rope_type="split",
        **{f"{kind}_connector_{name}": value for kind in ("video", "audio") for name, value in connector.items()},
    )  # fmt: skip
    sound = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4, output_channels=2, ch_mult=(1,), num_res_blocks=1, in_channels=2, resolution=32,
        latent_channels=2, mid_block_add_attention=False, mel_bins=8,
    )  # fmt: skip
    vocoder = diffusers.pipelines.ltx2.LTX2Vocoder(
        in_channels=16, hidden_channels=32, out_channels=2, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2],
        resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]], output_sampling_rate=16000,
    )  # fmt: skip
    pipe = build(
        diffusers.LTX2Pipeline, flow(**LTX_FLOW), transformer, vae,
        transformers.Gemma3ForConditionalGeneration(gemma3), audio_vae=sound, connectors=connectors, vocoder=vocoder,
    )  # fmt: skip
    return pipe, arguments(32, num_frames=5, frame_rate=25.0, spatio_temporal_guidance_blocks=[1])


def mochi():
    transformer = diffusers.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
        in_channels=12, out_channels=12, text_embed_dim=32, time_embed_dim=4, max_sequence_length=48,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLMochi(
        latent_channels=12, encoder_block_out_channels=(32, 32, 32, 32), decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1), temporal_expansions=(1, 2, 3), spatial_expansions=(2, 2, 2),
    )  # fmt: skip
    pipe = build(diffusers.MochiPipeline, flow(invert_sigmas=True), transformer, vae, t5())
    return pipe, arguments(16, num_frames=7)


def bria():
    transformer = diffusers.BriaTransformer2DModel(
        **BLOCKS, patch_size=1, in_channels=16, joint_attention_dim=32, axes_dims_rope=[4, 4, 8]
    )
    vae = vae_2d(widths=(4, 4), shift_factor=None)
    return build(diffusers.BriaPipeline, flow(use_dynamic_shifting=True), transformer, vae, t5()), arguments(16)


def bria_fibo():
    transformer = diffusers.BriaFiboTransformer2DModel(
        **BLOCKS, patch_size=1, in_channels=16, joint_attention_dim=32, text_encoder_dim=16, axes_dims_rope=[4, 4, 8]
    )
    cls, scheduler = diffusers.BriaFiboPipeline, flow(use_dynamic_shifting=True)
    return build(cls, scheduler, transformer, vae_3d(), qwen3(transformers.Qwen3ForCausalLM)), arguments(32)


def ovis():
    transformer = diffusers.OvisImageTransformer2DModel(
        **BLOCKS, patch_size=1, in_channels=16, out_channels=16, joint_attention_dim=16, axes_dims_rope=[4, 4, 8]
    )
    cls, scheduler = diffusers.OvisImagePipeline, flow(use_dynamic_shifting=True)
    return build(cls, scheduler, transformer, vae_2d(widths=(4, 4)), qwen3()), arguments(16, 160)


def kandinsky5(cls=diffusers.Kandinsky5T2IPipeline, make_vae=vae_2d, size=64, length=256, **more):
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=16, in_text_dim2=32, time_dim=16, out_visual_dim=4, patch_size=(1, 2, 2),
        model_dim=32, ff_dim=32, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 2, 2),
    )  # fmt: skip
    texts = qwen_vl(), clip(transformers.CLIPTextModel)
    pipe = build(cls, flow(shift=5.0), transformer, make_vae(), *texts, tokenizer=tokenizer(1024))
    pipe.resolutions = [(64, 64)]  # of the pipeline of images
    return pipe, arguments(size, length, **more)


def krea2():
    transformer = diffusers.Krea2Transformer2DModel(
        **HEADS, in_channels=16, num_layers=2, num_key_value_heads=1, intermediate_size=32, timestep_embed_dim=16,
        text_hidden_dim=16, num_text_layers=2, text_num_attention_heads=2, text_num_key_value_heads=2,
        text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    cls, scheduler = diffusers.Krea2Pipeline, flow(use_dynamic_shifting=True)
    pipe = build(cls, scheduler, transformer, vae_qwen(), qwen3_vl(), text_encoder_select_layers=(1, 2))
    return pipe, arguments(32, 256)


def hidream():
    transformer = diffusers.HiDreamImageTransformer2DModel(
        **BLOCKS, patch_size=2, in_channels=4, out_channels=4, caption_channels=[32, 16], text_emb_dim=64,
        num_routed_experts=2, num_activated_experts=2, axes_dims_rope=(8, 4, 4), max_resolution=(16, 16),
        llama_layers=[0, 1],
    )  # fmt: skip
    texts = clip(), clip(), t5(), qwen3(transformers.Qwen3ForCausalLM)
    pipe = build(diffusers.HiDreamImagePipeline, flow(shift=3.0), transformer, vae_2d(), *texts)
    pipe.default_sample_size = 8
    return pipe, arguments(16)


def ernie():
    transformer = diffusers.ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=32, in_channels=16, out_channels=16,
        patch_size=1, text_in_dim=16, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    cls, scheduler = diffusers.ErnieImagePipeline, flow(shift=4.0)
    pipe = build(cls, scheduler, transformer, vae_flux2(), qwen3(), pe=None, pe_tokenizer=None)
    return pipe, arguments(16, None, use_pe=False)


def qwen_image_21():
    transformer = diffusers.QwenImage21Transformer2DModel(
        **HEADS, patch_size=1, in_channels=4, out_channels=4, num_layers=2, context_in_dim=16, mlp_ratio=2,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLQwenImage21(
        base_dim=8, decoder_base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )  # fmt: skip
    texts = dict(text_encoder=qwen3(transformers.Qwen3ForCausalLM), processor=Processor())
    pipe = build(diffusers.QwenImage21Pipeline, flow(shift=3.0), transformer, vae, **texts)
    return pipe, arguments(64, None, "true_cfg_scale", use_kv_cache=False)


def longcat():
    transformer = diffusers.LongCatImageTransformer2DModel(
        **BLOCKS, patch_size=1, in_channels=64, joint_attention_dim=16, pooled_projection_dim=16,
        axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    cls, scheduler = diffusers.LongCatImagePipeline, flow(use_dynamic_shifting=True)
    pipe = build(cls, scheduler, transformer, vae_2d(16), qwen_vl(), text_processor=tokenizer())
    pipe.tokenizer_max_length = 48
    return pipe, arguments(16, None, enable_prompt_rewrite=False)


def motif_video():
    transformer = diffusers.MotifVideoTransformer3DModel(
        **BLOCKS, in_channels=33, out_channels=16, patch_size=2, text_embed_dim=16, rope_axes_dim=(4, 6, 6)
    )
    guider = diffusers.AdaptiveProjectedGuidance(adaptive_projected_guidance_momentum=-0.5)
    cls, scheduler = diffusers.MotifVideoPipeline, flow(shift=15.0)
    return build(cls, scheduler, transformer, vae_3d(), qwen3(), guider=guider), arguments(32, 48, None, num_frames=5)


def nucleus_moe():
    transformer = diffusers.NucleusMoEImageTransformer2DModel(
        **HEADS, patch_size=2, in_channels=16, out_channels=4, num_layers=3, joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6), num_experts=4, moe_intermediate_dim=16,
        dense_moe_strategy="leave_first_block_dense", capacity_factors=2.0,
    )  # fmt: skip
    for name, weight in transformer.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")):  # which it leaves as the memory was
            torch.nn.init.normal_(weight, std=0.1)
    scheduler, texts = flow(use_dynamic_shifting=True), dict(text_encoder=qwen3_vl(), processor=Processor())
    pipe = build(diffusers.NucleusMoEImagePipeline, scheduler, transformer, vae_qwen(), **texts)
    return pipe, arguments(32, 512, return_index=-1)


CORE = {family.__name__: family for family in (stable_diffusion_3, flux, z_image, wan)}
FAMILIES = CORE | {
    family.__name__: family
    for family in (
        flux2_klein, qwen_image, sana, lumina2, aura_flow, cogview4, chroma, hunyuan_image, ltx, ltx2, lumina, mochi,
        bria, ovis, kandinsky5, krea2, hunyuan_video, hidream, sana_video, ernie, qwen_image_21, longcat, motif_video,
        hunyuan_video_15, nucleus_moe, bria_fibo,
    )
}  # fmt: skip
SKIPPED = dict(skip_guidance_layers=[1], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=0.7)
VIDEO = dict(make_vae=vae_hunyuan_video, size=32, length=640, num_frames=5)
FAMILIES |= {
    "stable_diffusion_3_skip_layers": partial(stable_diffusion_3, 3, **SKIPPED),
    "flux_true_cfg": partial(flux, true_cfg_scale=2.0, negative_prompt=list(NEGATIVE)),
    "wan_two_denoisers": partial(wan, boundary_ratio=0.8),
    "wan_expanded_timesteps": partial(wan, expand_timesteps=True),
    "kandinsky5_video": partial(kandinsky5, diffusers.Kandinsky5T2VPipeline, **VIDEO),
}
OTHER_TARGETS = {"kandinsky5", "kandinsky5_video"}  # none of their layers has a name in the default target_modules
