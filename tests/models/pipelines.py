"""Tiny pipelines of diffusers with random weights: nothing is downloaded, a call takes milliseconds.

`PIPELINES[name]()` gives a pipeline and the arguments of its call for two samples, by embeddings, so that neither tokenizers
nor text encoders are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

diffusers: Any = import_module("diffusers")  # it says neither which names are its own nor what may be None

B = 2
Made = tuple[Any, dict[str, Any]]
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(a: Tensor, b: Tensor) -> float:
    """How far a is from b, as a share of the length of b."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def embeddings(length: int, width: int, pooled: int = 0, mask: str = "", negative: bool = True) -> dict[str, Any]:
    """Embeddings of two prompts and of two negative ones, by the names that pipelines use."""
    out: dict[str, Any] = {}
    for number, prefix in enumerate(("", "negative_") if negative else ("",)):
        out[f"{prefix}prompt_embeds"] = normal(B, length, width, seed=1 + 10 * number)
        if pooled:
            out[f"{prefix}pooled_prompt_embeds"] = normal(B, pooled, seed=2 + 10 * number)
        if mask:
            out[f"{prefix}prompt_{mask}"] = torch.ones(B, length, dtype=torch.long)
    return out


def without(*names: str) -> dict[str, None]:
    return dict.fromkeys(names)


def network(cls: Any, **config: Any) -> Any:
    torch.manual_seed(0)
    return cls(**config).eval()


# --- autoencoders ----------------------------------------------------------------------------------------------------
def vae_kl(channels: int = 4, shift: float | None = 0.06) -> Any:
    return network(
        diffusers.AutoencoderKL, sample_size=32, block_out_channels=(4,), latent_channels=channels, norm_num_groups=1,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=shift, scaling_factor=1.5,
    )  # fmt: skip


def vae_video(channels: int = 16) -> Any:
    statistics = {"latents_mean": [0.1 * i for i in range(channels)], "latents_std": [1.0 + 0.1 * i for i in range(channels)]}
    return network(
        diffusers.AutoencoderKLWan, base_dim=3, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True], **statistics,
    )  # fmt: skip


def vae_deep() -> Any:
    return network(
        diffusers.AutoencoderDC, in_channels=3, latent_channels=4, attention_head_dim=2, scaling_factor=0.4,
        encoder_block_types=("ResBlock", "EfficientViTBlock"), decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1), decoder_layers_per_block=[1, 1],
        downsample_block_type="conv", upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu",
    )  # fmt: skip


# --- flow matching ---------------------------------------------------------------------------------------------------
def flux(dev: bool = True, **parts: Any) -> Made:
    transformer = network(
        diffusers.FluxTransformer2DModel, patch_size=1, in_channels=16, num_layers=1, num_single_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8], guidance_embeds=dev,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dev, shift=3.0 if dev else 1.0)
    parts = without("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2") | parts
    pipe = diffusers.FluxPipeline(scheduler=scheduler, vae=vae_kl(), transformer=transformer, **parts)
    return pipe, {**embeddings(7, 32, pooled=32, negative=False), "height": 16, "width": 24}


def sd3(scheduler: Any = None, **parts: Any) -> Made:
    transformer = network(
        diffusers.SD3Transformer2DModel, sample_size=32, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=64, out_channels=4,
    )  # fmt: skip
    encoders = [f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")]
    scheduler = scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=scheduler, vae=vae_kl(), **(without(*encoders) | parts)
    )
    return pipe, {**embeddings(7, 32, pooled=64), "height": 8, "width": 8}


def sana(**parts: Any) -> Made:
    transformer = network(diffusers.SanaTransformer2DModel, **SANA)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = without("text_encoder", "tokenizer") | parts
    pipe = diffusers.SanaPipeline(vae=vae_deep(), transformer=transformer, scheduler=scheduler, **parts)
    call = embeddings(6, 8, mask="attention_mask") | {"height": 32, "width": 32, "use_resolution_binning": False}
    return pipe, call | {"negative_prompt": None, "complex_human_instruction": None}


SANA: dict[str, Any] = {
    "patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 4,
    "num_cross_attention_heads": 2, "cross_attention_head_dim": 4, "cross_attention_dim": 8, "caption_channels": 8,
    "sample_size": 32,
}  # fmt: skip


def wan(scheduler: Any = None, **parts: Any) -> Made:
    transformer = network(
        diffusers.WanTransformer3DModel, patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16,
        out_channels=16, text_dim=32, freq_dim=64, ffn_dim=32, num_layers=1, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    scheduler = scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    parts = without("text_encoder", "tokenizer", "transformer_2") | parts
    pipe = diffusers.WanPipeline(vae=vae_video(), scheduler=scheduler, transformer=transformer, **parts)
    return pipe, {**embeddings(16, 32), "height": 16, "width": 16, "num_frames": 9}


def anyflow(delta: str = "r", **parts: Any) -> Made:
    transformer = network(
        diffusers.AnyFlowTransformer3DModel, patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16,
        out_channels=16, text_dim=32, freq_dim=64, ffn_dim=32, num_layers=1, cross_attn_norm=True, rope_max_seq_len=32,
        gate_value=0.25, deltatime_type=delta,
    )  # fmt: skip
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(num_train_timesteps=1000, shift=5.0)
    parts = without("text_encoder", "tokenizer") | parts
    pipe = diffusers.AnyFlowPipeline(vae=vae_video(), scheduler=scheduler, transformer=transformer, **parts)
    return pipe, {**embeddings(16, 32, negative=False), "height": 16, "width": 16, "num_frames": 9}


def qwen(**parts: Any) -> Made:
    transformer = network(
        diffusers.QwenImageTransformer2DModel, patch_size=2, in_channels=16, out_channels=4, num_layers=1,
        attention_head_dim=16, num_attention_heads=3, joint_attention_dim=16, guidance_embeds=False, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    vae = network(
        diffusers.AutoencoderKLQwenImage, base_dim=8, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1,
        temperal_downsample=[False, True], latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 1.1, 1.2, 1.3],
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift_terminal=0.02, max_shift=0.9, base_shift=0.5, max_image_seq_len=8192
    )
    parts = without("text_encoder", "tokenizer") | parts
    pipe = diffusers.QwenImagePipeline(scheduler=scheduler, vae=vae, transformer=transformer, **parts)
    return pipe, {**embeddings(7, 16, mask="embeds_mask", negative=False), "height": 32, "width": 32}


def z_image(**parts: Any) -> Made:
    transformer = network(
        diffusers.ZImageTransformer2DModel, all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, dim=32, n_layers=1,
        n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    with torch.no_grad():
        for token in (transformer.x_pad_token, transformer.cap_pad_token):
            token.fill_(1.0)
    parts = without("text_encoder", "tokenizer") | parts
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = diffusers.ZImagePipeline(scheduler=scheduler, vae=vae_kl(16), transformer=transformer, **parts)
    texts = {"prompt_embeds": [normal(9, 16, seed=1), normal(11, 16, seed=2)]}
    negative = {"negative_prompt_embeds": [normal(9, 16, seed=11), normal(5, 16, seed=12)]}
    return pipe, {**texts, **negative, "prompt": None, "height": 16, "width": 16}


def lumina2(**parts: Any) -> Made:
    transformer = network(
        diffusers.Lumina2Transformer2DModel, sample_size=4, patch_size=2, in_channels=4, hidden_size=8, num_layers=1,
        num_attention_heads=1, num_kv_heads=1, multiple_of=16, axes_dim_rope=[4, 2, 2], cap_feat_dim=8,
    )  # fmt: skip
    parts = without("text_encoder", "tokenizer") | parts
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0)
    pipe = diffusers.Lumina2Pipeline(transformer=transformer, scheduler=scheduler, vae=vae_kl(), **parts)
    return pipe, {**embeddings(7, 8, mask="attention_mask"), "height": 16, "width": 16}


def hunyuan(meanflow: bool = True, guider: Any = None, **parts: Any) -> Made:
    transformer = network(
        diffusers.HunyuanImageTransformer2DModel, in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8,
        num_layers=1, num_single_layers=1, num_refiner_layers=1, patch_size=(1, 1), guidance_embeds=True, text_embed_dim=32,
        text_embed_2_dim=32, rope_axes_dim=(4, 4), use_meanflow=meanflow,
    )  # fmt: skip
    vae = network(
        diffusers.AutoencoderKLHunyuanImage, in_channels=3, out_channels=3, latent_channels=4,
        block_out_channels=(32, 32, 32, 32), layers_per_block=1, scaling_factor=0.48, spatial_compression_ratio=8,
        sample_size=128,
    )  # fmt: skip
    parts = without("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2") | parts
    pipe = diffusers.HunyuanImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=4.0), vae=vae, transformer=transformer, guider=guider,
        ocr_guider=None, **parts,
    )  # fmt: skip
    texts = embeddings(6, 32, mask="embeds_mask")
    texts |= {f"{name}_2": value for name, value in texts.items()}
    return pipe, {**texts, "height": 32, "width": 32}


def klein(**parts: Any) -> Made:
    transformer = network(
        diffusers.Flux2Transformer2DModel, patch_size=1, in_channels=16, num_layers=1, num_single_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16, timestep_guidance_channels=64,
        axes_dims_rope=[4, 4, 4, 4], guidance_embeds=False,
    )  # fmt: skip
    vae = network(
        diffusers.AutoencoderKLFlux2, sample_size=32, down_block_types=("DownEncoderBlock2D",), latent_channels=4,
        up_block_types=("UpDecoderBlock2D",), block_out_channels=(4,), layers_per_block=1, norm_num_groups=1,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    with torch.no_grad():
        vae.bn.running_mean.copy_(normal(16, seed=8))
        vae.bn.running_var.copy_(normal(16, seed=9).exp())
    parts = without("text_encoder", "tokenizer") | parts
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = diffusers.Flux2KleinPipeline(scheduler=scheduler, vae=vae, transformer=transformer, is_distilled=True, **parts)
    return pipe, {**embeddings(6, 16, negative=False), "height": 16, "width": 24}


def chroma(**parts: Any) -> Made:
    transformer = network(
        diffusers.ChromaTransformer2DModel, patch_size=1, in_channels=16, num_layers=1, num_single_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=[4, 4, 8],
        approximator_num_channels=16, approximator_hidden_dim=32, approximator_layers=1,
    )  # fmt: skip
    scheduler, parts = diffusers.FlowMatchEulerDiscreteScheduler(), without("text_encoder", "tokenizer") | parts
    pipe = diffusers.ChromaPipeline(vae=vae_kl(), transformer=transformer, scheduler=scheduler, **parts)
    texts = embeddings(7, 32, mask="attention_mask")
    return pipe, {k: v.bool() if "mask" in k else v for k, v in texts.items()} | {"height": 16, "width": 24}


def aura_flow(**parts: Any) -> Made:
    transformer = network(
        diffusers.AuraFlowTransformer2DModel, sample_size=32, patch_size=2, in_channels=4, num_mmdit_layers=1,
        num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=4, caption_projection_dim=32,
        joint_attention_dim=32, out_channels=4, pos_embed_max_size=256,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73)
    parts = without("text_encoder", "tokenizer") | parts
    pipe = diffusers.AuraFlowPipeline(vae=vae_kl(shift=None), transformer=transformer, scheduler=scheduler, **parts)
    return pipe, embeddings(7, 32, mask="attention_mask") | {"height": 16, "width": 16}


def mochi(**parts: Any) -> Made:
    """Its scheduler counts sigma from 0, noise, to 1."""
    transformer = network(
        diffusers.MochiTransformer3DModel, patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=1,
        pooled_projection_dim=16, in_channels=12, text_embed_dim=32, time_embed_dim=4, max_sequence_length=16,
    )  # fmt: skip
    statistics = {"latents_mean": [0.1 * i for i in range(12)], "latents_std": [1.0 + 0.1 * i for i in range(12)]}
    vae = network(
        diffusers.AutoencoderKLMochi, latent_channels=12, out_channels=3, encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32), layers_per_block=(1, 1, 1, 1, 1), **statistics,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    parts = without("text_encoder", "tokenizer") | parts
    pipe = diffusers.MochiPipeline(vae=vae, transformer=transformer, scheduler=scheduler, **parts)
    return pipe, embeddings(16, 32, mask="attention_mask") | {"height": 16, "width": 16, "num_frames": 7}


def ltx(timed: bool = False, **parts: Any) -> Made:
    """A token for each place in space and time; its autoencoder may be told a time."""
    transformer = network(
        diffusers.LTXVideoTransformer3DModel, in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=8,
        cross_attention_dim=32, num_layers=1, caption_channels=32,
    )  # fmt: skip
    vae = network(
        diffusers.AutoencoderKLLTXVideo, latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False), patch_size=1, decoder_causal=False,
        timestep_conditioning=timed,
    )  # fmt: skip
    scheduler, parts = diffusers.FlowMatchEulerDiscreteScheduler(), without("text_encoder", "tokenizer") | parts
    pipe = diffusers.LTXPipeline(vae=vae, transformer=transformer, scheduler=scheduler, **parts)
    return pipe, embeddings(16, 32, mask="attention_mask") | {"height": 32, "width": 32, "num_frames": 9}


# --- consistency in angles -------------------------------------------------------------------------------------------
def sana_sprint(**parts: Any) -> Made:
    transformer = network(diffusers.SanaTransformer2DModel, qk_norm="rms_norm_across_heads", guidance_embeds=True, **SANA)
    parts = without("text_encoder", "tokenizer") | parts
    pipe = diffusers.SanaSprintPipeline(vae=vae_deep(), transformer=transformer, scheduler=diffusers.SCMScheduler(), **parts)
    call = embeddings(6, 8, mask="attention_mask", negative=False) | {"height": 32, "width": 32}
    return pipe, call | {"use_resolution_binning": False, "complex_human_instruction": None}


# --- diffusion -------------------------------------------------------------------------------------------------------
UNET: dict[str, Any] = {
    "sample_size": 16, "in_channels": 4, "out_channels": 4, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
SAFETY = {"safety_checker": None, "feature_extractor": None, "image_encoder": None, "requires_safety_checker": False}


def sd15(cls: Any = diffusers.DDIMScheduler, parts: dict[str, Any] | None = None, **config: Any) -> Made:
    unet = network(
        diffusers.UNet2DConditionModel, block_out_channels=(4, 8), layers_per_block=1, cross_attention_dim=32,
        norm_num_groups=2, **UNET,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae_kl(shift=None), unet=unet, scheduler=cls(**BETAS, **config), **SAFETY,
        **(without("text_encoder", "tokenizer") | (parts or {})),
    )  # fmt: skip
    return pipe, {**embeddings(7, 32), "height": 16, "width": 16}


def sdxl(cls: Any = diffusers.EulerDiscreteScheduler, parts: dict[str, Any] | None = None, **config: Any) -> Made:
    unet = network(
        diffusers.UNet2DConditionModel, block_out_channels=(2, 4), layers_per_block=1, attention_head_dim=(2, 4),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8, cross_attention_dim=64,
        transformer_layers_per_block=(1, 2), projection_class_embeddings_input_dim=80, norm_num_groups=1, **UNET,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=vae_kl(shift=None), unet=unet, scheduler=cls(**BETAS, **config),
        **(without("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2") | (parts or {})),
    )  # fmt: skip
    return pipe, {**embeddings(7, 64, pooled=32), "height": 16, "width": 16}


def edm(**config: Any) -> Made:
    """As Playground 2.5 has it: a network that its scheduler scales at both ends."""
    pipe, call = sdxl()
    pipe.scheduler = diffusers.EDMEulerScheduler(**config)
    return pipe, call


def lcm(parts: dict[str, Any] | None = None) -> Made:
    unet = network(
        diffusers.UNet2DConditionModel, block_out_channels=(4, 8), layers_per_block=1, cross_attention_dim=32,
        norm_num_groups=2, time_cond_proj_dim=32, **UNET,
    )  # fmt: skip
    scheduler = diffusers.LCMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False)
    pipe = diffusers.LatentConsistencyModelPipeline(
        vae=vae_kl(shift=None), unet=unet, scheduler=scheduler, **SAFETY,
        **(without("text_encoder", "tokenizer") | (parts or {})),
    )  # fmt: skip
    return pipe, {**embeddings(7, 32, negative=False), "height": 16, "width": 16}


def pixart(**parts: Any) -> Made:
    """Its network gives a variance, too."""
    transformer = network(
        diffusers.PixArtTransformer2DModel, sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8,
        num_attention_heads=2, caption_channels=32, in_channels=4, cross_attention_dim=16, out_channels=8,
        norm_type="ada_norm_single", norm_elementwise_affine=False, use_additional_conditions=False,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(beta_start=0.0001, beta_end=0.02, timestep_spacing="trailing", clip_sample=False)
    parts = without("text_encoder", "tokenizer") | parts
    pipe = diffusers.PixArtSigmaPipeline(vae=vae_kl(shift=None), transformer=transformer, scheduler=scheduler, **parts)
    size = {"height": 64, "width": 64, "use_resolution_binning": False}
    return pipe, embeddings(6, 32, mask="attention_mask") | size | {"negative_prompt": None}


def cogvideo(**parts: Any) -> Made:
    """A video, frames first, from noise without any data in it."""
    transformer = network(
        diffusers.CogVideoXTransformer3DModel, num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4,
        time_embed_dim=2, text_embed_dim=32, num_layers=1, sample_width=2, sample_height=2, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=16,
    )  # fmt: skip
    vae = network(
        diffusers.AutoencoderKLCogVideoX, down_block_types=("CogVideoXDownBlock3D",) * 4, layers_per_block=1,
        up_block_types=("CogVideoXUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8), latent_channels=4, norm_num_groups=2,
        temporal_compression_ratio=4,
    )  # fmt: skip
    scheduler = diffusers.CogVideoXDDIMScheduler(
        clip_sample=False, timestep_spacing="trailing", prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    parts = without("text_encoder", "tokenizer") | parts
    pipe = diffusers.CogVideoXPipeline(vae=vae, transformer=transformer, scheduler=scheduler, **parts)
    return pipe, embeddings(16, 32) | {"height": 16, "width": 16, "num_frames": 8}


STABLE: dict[str, Any] = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
"""Settings of Stable Diffusion's own folders."""

PIPELINES: dict[str, Callable[..., Made]] = {
    "flux dev": flux,
    "flux schnell": partial(flux, dev=False),
    "flux 2 klein": klein,
    "sd3": sd3,
    "sd3 re-noising": lambda: sd3(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)),
    "sd3 lcm": lambda: sd3(diffusers.FlowMatchLCMScheduler(shift=3.0)),
    "sana": sana,
    "wan": wan,
    "anyflow r": anyflow,
    "anyflow t-r": partial(anyflow, delta="t-r"),
    "qwen": qwen,
    "z-image": z_image,
    "lumina 2": lumina2,
    "hunyuan": partial(hunyuan, meanflow=False),
    "hunyuan meanflow": hunyuan,
    "chroma": chroma,
    "aura flow": aura_flow,
    "mochi": mochi,
    "ltx": ltx,
    "sana-sprint": sana_sprint,
    "lcm": lcm,
    "lcm-lora sd 1.5": partial(sd15, diffusers.LCMScheduler),
    "lcm-lora sdxl": partial(sdxl, diffusers.LCMScheduler),
    "sd 1.5 ddim": partial(sd15, **STABLE),
    "sd 1.5 ddim v": partial(sd15, prediction_type="v_prediction", **STABLE),
    "sd 1.5 ddim data": partial(sd15, prediction_type="sample", **STABLE),
    "sd 1.5 ddpm": partial(sd15, diffusers.DDPMScheduler, clip_sample=False, timestep_spacing="trailing"),
    "sd 1.5 tcd": lambda: sd15(diffusers.TCDScheduler),
    "sdxl euler to sigma": partial(sdxl, timestep_spacing="trailing", final_sigmas_type="sigma_min"),
    "sdxl euler karras": partial(sdxl, use_karras_sigmas=True),
    "pixart sigma": pixart,
    "cogvideox": cogvideo,
    "sdxl ddim": partial(sdxl, diffusers.DDIMScheduler, timestep_spacing="trailing", clip_sample=False),
    "sdxl euler": partial(sdxl, timestep_spacing="leading", steps_offset=1),
    "sdxl lightning": partial(sdxl, timestep_spacing="trailing"),
    "sdxl edm": edm,
    "sdxl edm v": lambda: edm(prediction_type="v_prediction", sigma_schedule="exponential", final_sigmas_type="sigma_min"),
    "sdxl turbo": partial(sdxl, diffusers.EulerAncestralDiscreteScheduler, timestep_spacing="trailing"),
}
"""Pipelines by name; classes and their variants."""


# --- with words ------------------------------------------------------------------------------------------------------
def tokenizer(length: int = 32, **settings: Any) -> Any:
    """A token a character."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "?", *map(chr, range(32, 127))])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="?"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    model.post_processor = tokenizers.processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 1), ("</s>", 2)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "?"}
    return PreTrainedTokenizerFast(tokenizer_object=model, model_max_length=length, **special, **settings)


def clip(width: int = 32, projection: int = 0) -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=0, hidden_size=width, intermediate_size=37, num_attention_heads=4,
        num_hidden_layers=2, vocab_size=100, max_position_embeddings=32, projection_dim=projection or width,
    )  # fmt: skip
    cls = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return network(cls, config=config)


def t5(width: int = 32) -> Any:
    import transformers

    config = transformers.T5Config(vocab_size=100, d_model=width, d_kv=8, d_ff=37, num_layers=1, num_heads=4, pad_token_id=0)
    return network(transformers.T5EncoderModel, config=config)


def gemma(width: int = 8) -> Any:
    import transformers

    config = transformers.Gemma2Config(
        head_dim=4, hidden_size=width, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1, num_key_value_heads=2,
        vocab_size=100, query_pre_attn_scalar=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return network(transformers.Gemma2Model, config=config)


SIZE = {"height": 16, "width": 16}
CLIP_TWICE = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


def in_words() -> dict[str, Callable[[], Made]]:
    """Pipelines that read prompts, and the sizes that they are called with."""
    return {
        "sd 1.5": lambda: (sd15(parts={"text_encoder": clip(), "tokenizer": tokenizer()}, **STABLE)[0], SIZE),
        "lcm": lambda: (lcm({"text_encoder": clip(), "tokenizer": tokenizer()})[0], SIZE),
        "sdxl": lambda: (
            sdxl(
                timestep_spacing="trailing",
                parts=dict(zip(CLIP_TWICE, (clip(), tokenizer(), clip(32, 32), tokenizer()))),
            )[0],
            SIZE,
        ),
        "sd3": lambda: (
            sd3(
                text_encoder=clip(32, 32), tokenizer=tokenizer(), text_encoder_2=clip(32, 32), tokenizer_2=tokenizer()
            )[0],
            {"height": 8, "width": 8},
        ),
        "flux": lambda: (
            flux(text_encoder=clip(), tokenizer=tokenizer(), text_encoder_2=t5(), tokenizer_2=tokenizer())[0],
            {**SIZE, "max_sequence_length": 16},
        ),
        "sana-sprint": lambda: (
            sana_sprint(text_encoder=gemma(), tokenizer=tokenizer(300, padding_side="right"))[0],
            {"height": 32, "width": 32, "use_resolution_binning": False, "complex_human_instruction": None},
        ),
    }  # fmt: skip


class Reader(torch.nn.Module):
    """A text encoder of embeddings alone, for pipelines whose own would be large."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = torch.nn.Embedding(100, width)

    @property
    def dtype(self) -> torch.dtype:
        return self.words.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.words.weight.device

    def forward(self, input_ids: Tensor, attention_mask: Tensor, output_hidden_states: bool = True) -> Any:
        states = self.words(input_ids)
        return SimpleNamespace(hidden_states=[states, states])


def of_any_length() -> dict[str, Callable[[], Made]]:
    """Pipelines whose prompts are as long as they are."""
    chat = tokenizer(600)
    chat.chat_template = "{{ messages[0]['content'] }}"
    return {
        "qwen": lambda: (qwen(text_encoder=Reader(16), tokenizer=tokenizer(2000))[0], {"height": 32, "width": 32}),
        "z-image": lambda: (z_image(text_encoder=Reader(16), tokenizer=chat)[0], SIZE | {"guidance_scale": 0.0}),
    }
