"""Networks of diffusers for ``coverage.py wild``: small, and called as its pipelines and training scripts call them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from _coverage_networks import Inputs
from _wild_common import MakeInputs, called, made, pixels, random, whole
from torch import Tensor

__all__ = ["DIFFUSERS"]


def _diffused(*shape: int, tokens: int = 0, width: int = 0, **more: Callable[[int, torch.dtype], Any]) -> MakeInputs:
    """A noised image, timesteps and, with ``tokens``, a text of as many embeddings; ``more`` are other arguments."""

    def inputs(batch: int, small: bool, dtype: torch.dtype) -> Inputs:
        named = {name: make(batch, dtype) for name, make in more.items()}
        if tokens:
            named["encoder_hidden_states"] = random(batch + 1, batch, tokens, width, dtype=dtype)
        return (random(batch, batch, *shape, dtype=dtype),), {"timestep": whole(1000, batch), **named}

    return inputs


def _extra(*shape: int) -> Callable[[int, torch.dtype], Tensor]:
    return lambda batch, dtype: random(batch + 2, batch, *shape, dtype=dtype)


def _flux_inputs(batch: int, small: bool, dtype: torch.dtype) -> Inputs:
    rows = torch.zeros(16, 3)
    rows[:, 1], rows[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    return (), {
        "hidden_states": random(batch, batch, 16, 16, dtype=dtype),
        "encoder_hidden_states": random(batch + 1, batch, 8, 32, dtype=dtype),
        "pooled_projections": random(batch + 2, batch, 32, dtype=dtype),
        "timestep": random(batch + 3, batch, dtype=dtype).sigmoid(),
        "img_ids": rows.to(dtype),
        "txt_ids": torch.zeros(8, 3, dtype=dtype),
    }


def _sizes(batch: int, dtype: torch.dtype) -> dict[str, Any]:
    return {"resolution": None, "aspect_ratio": None}


_BLOCKS: dict[str, Any] = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
_CROSS: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
}
_CODER: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    **_BLOCKS,
}
_DIT: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "sample_size": 16, "patch_size": 2}

DIFFUSERS = {
    "unet2d": made(
        "diffusers:UNet2DModel",
        _diffused(3, 32, 32),
        sample_size=32,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        **_BLOCKS,
    ),
    "unet2d_condition": made(
        "diffusers:UNet2DConditionModel", _diffused(4, 32, 32, tokens=7, width=32), sample_size=32, **_CROSS, **_BLOCKS
    ),
    "unet2d_condition_sdxl": made(
        "diffusers:UNet2DConditionModel",
        _diffused(
            4,
            32,
            32,
            tokens=7,
            width=32,
            added_cond_kwargs=lambda batch, dtype: {
                "text_embeds": random(batch + 2, batch, 32, dtype=dtype),
                "time_ids": random(batch + 3, batch, 6, dtype=dtype),
            },
        ),
        sample_size=32,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        **_CROSS,
        **_BLOCKS,
    ),
    "unet3d_condition": made(
        "diffusers:UNet3DConditionModel",
        _diffused(4, 4, 16, 16, tokens=7, width=32),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        **_BLOCKS,
    ),
    "controlnet": made(
        "diffusers:ControlNetModel",
        _diffused(4, 16, 16, tokens=7, width=32, controlnet_cond=_extra(3, 128, 128)),
        down_block_types=_CROSS["down_block_types"],
        cross_attention_dim=32,
        attention_head_dim=8,
        conditioning_embedding_out_channels=(8, 16, 16, 32),
        **_BLOCKS,
    ),
    "autoencoder_kl": made("diffusers:AutoencoderKL", pixels(3, 64, 64, small=(3, 32, 32)), **_CODER),
    "autoencoder_tiny": dataclasses.replace(
        made(
            "diffusers:AutoencoderTiny",
            pixels(3, 64, 64, small=(3, 32, 32)),
            encoder_block_out_channels=(32, 32, 32),
            decoder_block_out_channels=(32, 32, 32),
            num_encoder_blocks=(1, 2, 2),
            num_decoder_blocks=(2, 2, 1),
        ),
        dtype=torch.float32,  # its code makes float32 images
    ),
    "vq_model": called(
        made("diffusers:VQModel", pixels(3, 64, 64, small=(3, 32, 32)), num_vq_embeddings=64, **_CODER),
        lambda network, x: network(x).sample,
    ),
    "dit": made(
        "diffusers:DiTTransformer2DModel",
        _diffused(4, 16, 16, class_labels=lambda batch, dtype: whole(10, batch)),
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=10,
        norm_num_groups=8,
        **_DIT,
    ),
    "pixart": made(
        "diffusers:PixArtTransformer2DModel",
        _diffused(4, 16, 16, tokens=7, width=32, added_cond_kwargs=_sizes),
        cross_attention_dim=64,
        caption_channels=32,
        in_channels=4,
        out_channels=8,
        norm_num_groups=8,
        use_additional_conditions=False,
        **_DIT,
    ),
    "sd3": made(
        "diffusers:SD3Transformer2DModel",
        _diffused(16, 16, 16, tokens=7, width=32, pooled_projections=_extra(64)),
        joint_attention_dim=32,
        caption_projection_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
        **_DIT,
    ),
    "flux": made(
        "diffusers:FluxTransformer2DModel",
        _flux_inputs,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ),
    "sana": made(
        "diffusers:SanaTransformer2DModel",
        _diffused(8, 16, 16, tokens=7, width=32),
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=4,
        cross_attention_head_dim=16,
        cross_attention_dim=64,
        caption_channels=32,
        sample_size=16,
    ),
}
