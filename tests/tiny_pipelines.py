"""Tiny pipelines of random weights, one row of FAMILIES per family, for the tests of the tape; nothing is downloaded.

Each row makes (pipe, call): the pipeline with the kind of scheduler that its published models bring, and the keyword
arguments of a call with two prompts of different lengths, guidance on where the family has it, and 4 steps.
"""

import copy
import inspect
import typing
from functools import partial

import diffusers
import torch
import transformers
from diffusers.pipelines import ltx2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

PROMPTS = ["a red circle", "a blue square left of a white cross"]
NEGATIVE = ["blurry", "bad quality"]

# Texts


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
SMALL = dict(hidden_size=16, intermediate_size=16)
DECODER = dict(
    vocab_size=VOCABULARY, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, bos_token_id=1,
    eos_token_id=2, pad_token_id=0,
)  # fmt: skip
QWEN = DECODER | SMALL | dict(head_dim=8)
SEEING = dict(SMALL, depth=1, num_heads=2, out_hidden_size=16)


def network(kind, model, **settings):
    """A function that makes a network of transformers: the class kind + model, with the configuration of kind."""
    config = getattr(transformers, f"{kind}Config")
    return lambda: getattr(transformers, f"{kind}{model}")(config(**settings))


def t5(width=32, kind="T5"):
    sizes = dict(d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=VOCABULARY)
    return network(kind, "EncoderModel", **sizes, feed_forward_proj="gated-gelu")


def qwen_vl():
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
    text = DECODER | SMALL | dict(rope_theta=1e6, rope_scaling=rope)
    return network("Qwen2_5_VL", "ForConditionalGeneration", text_config=text, vision_config=SEEING)()


CLIP = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, projection_dim=32, num_hidden_layers=2,
    num_attention_heads=4, hidden_act="gelu", pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
clip, clip_projected = (network("CLIPText", model, **CLIP) for model in ("Model", "ModelWithProjection"))
qwen3, qwen3_lm = (network("Qwen3", model, **QWEN) for model in ("Model", "ForCausalLM"))
qwen3_vl = network(
    "Qwen3VL", "Model", vision_config=SEEING,
    text_config=QWEN | dict(rope_parameters=dict(mrope_section=[2, 1, 1], rope_type="default", rope_theta=1e6)),
)  # fmt: skip
gemma = network("Gemma2", "Model", **QWEN | dict(hidden_size=8))
gemma3 = network(
    "Gemma3", "ForConditionalGeneration", text_config=QWEN, mm_tokens_per_image=4,
    vision_config=dict(SMALL, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8),
)  # fmt: skip
glm = network("Glm", "Model", **DECODER, hidden_size=32, intermediate_size=8, head_dim=16)

# Images


def deep(blocks):
    """Of a VAE's configuration, what makes it halve the resolution blocks - 1 times."""
    kinds = dict(down_block_types=["DownEncoderBlock2D"] * blocks, up_block_types=["UpDecoderBlock2D"] * blocks)
    return kinds | dict(block_out_channels=[4] * blocks)


WAN_VAE = dict(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
QWEN_VAE = dict(base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
VAES = dict(
    AutoencoderKL=dict(
        deep(1), norm_num_groups=1, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06,
        scaling_factor=1.5,
    ),
    AutoencoderKLWan=WAN_VAE,
    AutoencoderKLQwenImage=dict(QWEN_VAE, dim_mult=[1, 1, 1, 1]),
    AutoencoderKLQwenImage21=dict(QWEN_VAE, dim_mult=[1, 1, 1, 1, 1], decoder_base_dim=8),
    AutoencoderKLFlux2=dict(deep(1), layers_per_block=1, latent_channels=4, norm_num_groups=1),
    AutoencoderKLHunyuanVideo=dict(
        latent_channels=4, block_out_channels=[8] * 4, layers_per_block=1, norm_num_groups=4
    ),
)  # fmt: skip
"""{class: the configuration of a tiny one}; the other classes are of one family each."""

# Families

UNSET = ("x_pad_token", "cap_pad_token", "gate_up_proj", "down_proj")
"""Ends of the names of parameters that diffusers leaves as the memory was."""


def build(cls, **components):
    """A pipeline whose every layer does something; each text encoder brings its tokenizer."""
    for name in inspect.signature(cls.__init__).parameters:
        encoder = components.get(name.replace("tokenizer", "text_encoder"))
        if name.startswith("tokenizer") and encoder is not None:
            components.setdefault(name, tokenizer(77 if "CLIP" in type(encoder).__name__ else 512))
    pipe = cls(**components)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval().requires_grad_(False)
            for name, p in module.named_parameters():  # one that is zero would hide what comes before
                if name.endswith(UNSET) or not (p.abs() < 1e3).all() or not p.any():
                    p.normal_(0, 0.1, generator=generator)
    return pipe


def family(name, size, transformer, scheduler, texts, vae=None, parts=None, attributes=None, **call):
    """(pipe, call) of a pipeline of diffusers, whose transformer and VAE have the classes that it asks for.

    size: height and width in pixels. transformer: its configuration; vae: what differs in its from VAES.
    scheduler: the settings of Euler's method. texts: functions that make the text encoders.
    parts: other components, or these in another way; functions make them. attributes: of the pipeline and,
        with a dot, of its parts.
    call: what differs from the usual arguments; None leaves one out.
    """
    cls = getattr(diffusers, f"{name}Pipeline")
    asked = {part: (typing.get_args(kind) or [kind])[0] for part, kind in typing.get_type_hints(cls.__init__).items()}
    components = dict(
        transformer=partial(asked["transformer"], **transformer),
        vae=partial(asked["vae"], **VAES.get(asked["vae"].__name__, {}) | (vae or {})),
        scheduler=partial(diffusers.FlowMatchEulerDiscreteScheduler, **scheduler),
    )
    components |= {f"text_encoder_{i}" if i > 1 else "text_encoder": make for i, make in enumerate(texts, 1)}
    components |= parts or {}
    pipe = build(cls, **{part: make() if callable(make) else make for part, make in components.items()})
    for path, value in (attributes or {}).items():
        part, _, attribute = path.rpartition(".")
        setattr(pipe.components.get(part, pipe), attribute, value)
    takes = inspect.signature(cls.__call__).parameters
    usual = dict(
        prompt=PROMPTS, negative_prompt=NEGATIVE, height=size, width=size, num_inference_steps=4,
        max_sequence_length=48, guidance_scale=3.0,
    )  # fmt: skip
    arguments = {argument: value for argument, value in usual.items() if argument in takes} | call
    return pipe, {name: copy.deepcopy(value) for name, value in arguments.items() if value is not None}


FLOW_SIGMAS = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
DPM = partial(diffusers.DPMSolverMultistepScheduler, **FLOW_SIGMAS)
UNIPC = partial(diffusers.UniPCMultistepScheduler, **FLOW_SIGMAS)
DYNAMIC = dict(use_dynamic_shifting=True)
LTX_FLOW = dict(DYNAMIC, base_shift=0.95, max_shift=2.05, shift_terminal=0.1)
HEADS = dict(num_attention_heads=2, attention_head_dim=16)
BLOCKS = dict(HEADS, num_layers=1, num_single_layers=1)
FLUX = dict(BLOCKS, in_channels=16, axes_dims_rope=[4, 4, 8])
TWO, FOUR = (dict(num_attention_heads=heads, attention_head_dim=8, num_layers=2) for heads in (2, 4))
FOUR_CHANNELS = dict(in_channels=4, out_channels=4)
LUMINA = dict(in_channels=4, num_layers=2, num_kv_heads=1, multiple_of=16)
KANDINSKY = dict(
    in_text_dim=16, in_text_dim2=32, time_dim=16, model_dim=32, ff_dim=32, num_text_blocks=1, num_visual_blocks=2,
    axes_dims=(4, 2, 2),
)  # fmt: skip
WAN = dict(
    num_attention_heads=2, attention_head_dim=12, text_dim=32, freq_dim=32, ffn_dim=32, num_layers=2,
    rope_max_seq_len=32,
)  # fmt: skip
WHOLE = {"vae.use_framewise_encoding": False, "vae.use_framewise_decoding": False}
SANA = dict(complex_human_instruction=["say: "], use_resolution_binning=False)

CORE = dict(
    stable_diffusion_3=partial(
        family, "StableDiffusion3", 8,
        dict(FOUR, **FOUR_CHANNELS, sample_size=16, patch_size=1, caption_projection_dim=32, joint_attention_dim=64,
             pooled_projection_dim=64, pos_embed_max_size=16),
        dict(shift=3.0), [clip_projected, clip_projected, t5(64)],
    ),
    flux=partial(
        family, "Flux", 8, dict(FLUX, joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True),
        dict(DYNAMIC, shift=3.0), [clip, t5()], negative_prompt=None,
    ),
    z_image=partial(
        family, "ZImage", 16,
        dict(in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
             axes_dims=[8, 4, 4], axes_lens=[256, 32, 32]),
        dict(shift=6.0), [qwen3], deep(2),
    ),
    wan=partial(family, "Wan", 16, WAN, {}, [t5(kind="UMT5")], parts=dict(scheduler=UNIPC), num_frames=5),
)  # fmt: skip
FAMILIES = CORE | dict(
    flux2_klein=partial(
        family, "Flux2Klein", 8,
        dict(BLOCKS, in_channels=4, joint_attention_dim=16, timestep_guidance_channels=32,
             axes_dims_rope=[4, 4, 4, 4], guidance_embeds=False),
        dict(DYNAMIC, shift=3.0), [qwen3_lm], dict(latent_channels=1), text_encoder_out_layers=(1,),
    ),
    qwen_image=partial(
        family, "QwenImage", 32,
        dict(in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
             joint_attention_dim=16, axes_dims_rope=(8, 4, 4)),
        dict(DYNAMIC, shift_terminal=0.02), [qwen_vl], max_sequence_length=192, guidance_scale=None,
        true_cfg_scale=3.0,
    ),
    sana=partial(
        family, "Sana", 32,
        dict(TWO, **FOUR_CHANNELS, num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
             caption_channels=8),
        {}, [gemma],
        dict(latent_channels=4, attention_head_dim=2, downsample_block_type="conv",
             upsample_block_type="interpolate", scaling_factor=0.41407,
             **{f"{coder}_{name}": value for coder in ("encoder", "decoder") for name, value in dict(
                 block_types=("ResBlock", "EfficientViTBlock"), block_out_channels=(8, 8), layers_per_block=(1, 1),
                 qkv_multiscales=((), (5,))).items()}),
        dict(scheduler=DPM), **SANA,
    ),
    lumina2=partial(
        family, "Lumina2", 64,
        dict(LUMINA, sample_size=4, hidden_size=24, num_attention_heads=3, axes_dim_rope=[4, 2, 2], cap_feat_dim=8),
        dict(shift=6.0), [gemma], system_prompt="draw",
    ),
    aura_flow=partial(
        family, "AuraFlow", 16,
        dict(sample_size=16, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
             num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32, pos_embed_max_size=64),
        dict(shift=1.73), [t5(kind="UMT5")],
    ),
    cogview4=partial(
        family, "CogView4", 16, dict(FOUR, **FOUR_CHANNELS, text_embed_dim=32, time_embed_dim=8, condition_dim=4),
        dict(DYNAMIC, base_shift=0.25, max_shift=0.75, time_shift_type="linear"), [glm], deep(2),
    ),
    chroma=partial(
        family, "Chroma", 8,
        dict(FLUX, joint_attention_dim=32, approximator_hidden_dim=32, approximator_layers=1,
             approximator_num_channels=16),
        {}, [t5()],
    ),
    hunyuan_image=partial(
        family, "HunyuanImage", 16,
        dict(FOUR_CHANNELS, num_attention_heads=4, attention_head_dim=8, num_layers=1, num_single_layers=1,
             num_refiner_layers=1, text_embed_dim=16, text_embed_2_dim=32, rope_axes_dim=(4, 4)),
        dict(shift=7.0), [qwen_vl, t5()],
        dict(in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32), layers_per_block=1,
             spatial_compression_ratio=2, sample_size=128, scaling_factor=0.476986),
        {guider: partial(diffusers.AdaptiveProjectedMixGuidance, adaptive_projected_guidance_start_step=1)
         for guider in ("guider", "ocr_guider")},  # from step 1, so that momentum counts within 4 steps
        dict(tokenizer_max_length=192),  # bytes, of which the template takes most
    ),
    ltx=partial(
        family, "LTX", 32, dict(FOUR, in_channels=8, out_channels=8, cross_attention_dim=32, caption_channels=32),
        LTX_FLOW, [t5()],
        dict(latent_channels=8, block_out_channels=[8] * 4, decoder_block_out_channels=[8] * 4,
             layers_per_block=[1] * 5, decoder_layers_per_block=[1] * 5, patch_size=1,
             spatio_temporal_scaling=[True, True, False, False],
             decoder_spatio_temporal_scaling=[True, True, False, False]),
        attributes=WHOLE, num_frames=9,
    ),
    ltx2=partial(
        family, "LTX2", 32,
        dict(TWO, **FOUR_CHANNELS, cross_attention_dim=16, audio_in_channels=4, audio_out_channels=4,
             audio_num_attention_heads=2, audio_attention_head_dim=4, audio_cross_attention_dim=8,
             caption_channels=16, rope_double_precision=False, rope_type="split"),
        LTX_FLOW, [gemma3],
        dict(latent_channels=4, block_out_channels=[8], decoder_block_out_channels=[8], layers_per_block=[1],
             decoder_layers_per_block=[1, 1], spatio_temporal_scaling=[True], decoder_spatio_temporal_scaling=[True],
             decoder_inject_noise=[False] * 2, downsample_type=["spatial"], upsample_residual=[False],
             upsample_factor=[1], patch_size=1),
        dict(
            connectors=partial(
                ltx2.LTX2TextConnectors, caption_channels=16, text_proj_in_factor=3, connector_rope_base_seq_len=32,
                rope_double_precision=False, rope_type="split",
                **{f"{kind}_connector_{name}": value for kind in ("video", "audio")
                   for name, value in dict(TWO, num_layers=1, num_learnable_registers=None).items()},
            ),
            audio_vae=partial(
                diffusers.AutoencoderKLLTX2Audio, base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32,
                latent_channels=2, mel_bins=8,
            ),
            vocoder=partial(
                ltx2.LTX2Vocoder, in_channels=16, hidden_channels=32, upsample_kernel_sizes=[4, 4],
                upsample_factors=[2, 2], resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]],
                output_sampling_rate=16000,
            ),
        ),
        WHOLE, num_frames=5, frame_rate=25.0, spatio_temporal_guidance_blocks=[1],
    ),
    lumina=partial(
        family, "Lumina", 64,
        dict(LUMINA, sample_size=16, hidden_size=32, num_attention_heads=2, cross_attention_dim=8),
        {}, [gemma], clean_caption=False,
    ),
    mochi=partial(
        family, "Mochi", 16,
        dict(TWO, pooled_projection_dim=16, text_embed_dim=32, time_embed_dim=4, max_sequence_length=48),
        dict(invert_sigmas=True), [t5()],
        dict(encoder_block_out_channels=[32] * 4, decoder_block_out_channels=[32] * 4, layers_per_block=[1] * 5),
        num_frames=7,
    ),
    bria=partial(
        family, "Bria", 16, dict(FLUX, joint_attention_dim=32), DYNAMIC, [t5()], dict(deep(2), shift_factor=None)
    ),
    ovis=partial(
        family, "OvisImage", 16, dict(FLUX, out_channels=16, joint_attention_dim=16), DYNAMIC, [qwen3], deep(2),
        max_sequence_length=160,
    ),
    kandinsky5=partial(
        family, "Kandinsky5T2I", 64, KANDINSKY, dict(shift=5.0), [qwen_vl, clip],
        parts=dict(tokenizer=partial(tokenizer, 1024)), attributes=dict(resolutions=[(64, 64)]),
        max_sequence_length=256,
    ),
    krea2=partial(
        family, "Krea2", 32,
        dict(HEADS, in_channels=16, num_layers=2, num_key_value_heads=1, intermediate_size=32, timestep_embed_dim=16,
             text_hidden_dim=16, num_text_layers=2, text_num_attention_heads=2, text_num_key_value_heads=2,
             text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
             axes_dims_rope=(4, 6, 6)),
        DYNAMIC, [qwen3_vl], parts=dict(text_encoder_select_layers=(1, 2)), max_sequence_length=256,
    ),
    hunyuan_video=partial(
        family, "HunyuanVideo", 16,
        dict(BLOCKS, **FOUR_CHANNELS, num_refiner_layers=1, patch_size=1, text_embed_dim=16,
             pooled_projection_dim=32, rope_axes_dim=(4, 4, 8)),
        dict(shift=7.0), [qwen3, clip], num_frames=5, true_cfg_scale=2.0,
        prompt_template=dict(template="draw: {}", crop_start=6),
    ),
    hidream=partial(
        family, "HiDreamImage", 16,
        dict(BLOCKS, patch_size=2, in_channels=4, caption_channels=[32, 16], text_emb_dim=64, num_routed_experts=2,
             axes_dims_rope=(8, 4, 4), max_resolution=(16, 16), llama_layers=[0, 1]),
        dict(shift=3.0), [clip_projected, clip_projected, t5(), qwen3_lm], attributes=dict(default_sample_size=8),
    ),
    sana_video=partial(
        family, "SanaVideo", 32,
        dict(num_layers=2, num_attention_heads=2, attention_head_dim=12, num_cross_attention_heads=2,
             cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=8, sample_size=8),
        {}, [gemma], parts=dict(scheduler=DPM, vae=partial(diffusers.AutoencoderKLWan, **WAN_VAE)), frames=5, **SANA,
    ),
    ernie=partial(
        family, "ErnieImage", 16,
        dict(hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=32, in_channels=16,
             out_channels=16, text_in_dim=16, rope_axes_dim=(4, 6, 6)),
        dict(shift=4.0), [qwen3], use_pe=False,
    ),
    qwen_image_21=partial(
        family, "QwenImage21", 64,
        dict(HEADS, **FOUR_CHANNELS, num_layers=2, context_in_dim=16, mlp_ratio=2, axes_dims_rope=(4, 6, 6)),
        dict(shift=3.0), [qwen3_lm], parts=dict(processor=Processor), guidance_scale=None, true_cfg_scale=3.0,
        use_kv_cache=False,
    ),
    longcat=partial(
        family, "LongCatImage", 16,
        dict(BLOCKS, joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=[4, 4, 8]),
        DYNAMIC, [qwen_vl], dict(latent_channels=16), dict(text_processor=tokenizer),
        dict(tokenizer_max_length=48), enable_prompt_rewrite=False,
    ),
    motif_video=partial(
        family, "MotifVideo", 32, dict(BLOCKS, text_embed_dim=16, rope_axes_dim=(4, 6, 6)), dict(shift=15.0),
        [qwen3], num_frames=5,
        parts=dict(guider=partial(diffusers.AdaptiveProjectedGuidance, adaptive_projected_guidance_momentum=-0.5)),
    ),
    hunyuan_video_15=partial(
        family, "HunyuanVideo15", 16,
        dict(HEADS, in_channels=9, out_channels=4, num_layers=2, num_refiner_layers=1, text_embed_dim=16,
             text_embed_2_dim=32, image_embed_dim=12, rope_axes_dim=(4, 6, 6), target_size=16, task_type="t2v"),
        dict(shift=7.0), [qwen3, t5()],
        dict(latent_channels=4, block_out_channels=(16, 16, 16), layers_per_block=1, spatial_compression_ratio=4,
             temporal_compression_ratio=2),
        dict(guider=partial(diffusers.ClassifierFreeGuidance, guidance_scale=3.0)),
        {"tokenizer_max_length": 416, "tokenizer_2_max_length": 64,
         "vae.use_slicing": True},  # diffusers' decoder fails on a batch
        num_frames=5,
    ),
    nucleus_moe=partial(
        family, "NucleusMoEImage", 32,
        dict(HEADS, in_channels=16, out_channels=4, num_layers=3, joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
             num_experts=4, moe_intermediate_dim=16, dense_moe_strategy="leave_first_block_dense",
             capacity_factors=2.0),
        DYNAMIC, [qwen3_vl], parts=dict(processor=Processor), max_sequence_length=512, return_index=-1,
    ),
    bria_fibo=partial(
        family, "BriaFibo", 32, dict(FLUX, joint_attention_dim=32, text_encoder_dim=16), DYNAMIC, [qwen3_lm]
    ),
    kandinsky5_video=partial(
        family, "Kandinsky5T2V", 32, KANDINSKY, dict(shift=5.0), [qwen_vl, clip],
        parts=dict(tokenizer=partial(tokenizer, 1024)), max_sequence_length=640, num_frames=5,
    ),
    stable_diffusion_3_skip_layers=partial(
        CORE["stable_diffusion_3"], skip_guidance_layers=[0], skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=0.7,
    ),
    flux_true_cfg=partial(CORE["flux"], true_cfg_scale=2.0, negative_prompt=NEGATIVE),
    wan_expanded_timesteps=partial(CORE["wan"], parts=dict(scheduler=UNIPC, expand_timesteps=True)),
    wan_two_denoisers=partial(CORE["wan"], parts=dict(
        scheduler=UNIPC, boundary_ratio=0.8, transformer_2=partial(diffusers.WanTransformer3DModel, **WAN)
    )),
)  # fmt: skip
OTHER_TARGETS = {"kandinsky5", "kandinsky5_video"}  # none of their layers has a name in the default target_modules
