"""Networks on images and volumes from other libraries, for ``coverage.py wild``: small configurations, random weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from _coverage_networks import Inputs, Network
from torch import Tensor, nn

__all__ = ["IMAGES"]

MakeInputs = Callable[[int, bool, torch.dtype], Inputs]


def _random(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _whole(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(9))


def _pixels(*shape: int, small: tuple[int, ...] | None = None) -> MakeInputs:
    """One tensor ``[batch, *shape]``; ``small`` where the network takes any size."""
    return lambda batch, is_small, dtype: ((_random(batch, batch, *((is_small and small) or shape), dtype=dtype),), {})


def _made(path: str, inputs: MakeInputs, *arguments: Any, **options: Any) -> Network:
    """``path`` is ``package.module:Class``, imported when the network is built: most of these packages import slowly."""

    def build() -> nn.Module:
        package, _, name = path.partition(":")
        return getattr(importlib.import_module(package), name)(*arguments, **options)

    return Network(build, inputs)


# diffusers: as its pipelines and training scripts call them, with a tensor of timesteps.


def _diffused(*shape: int, tokens: int = 0, width: int = 0, **more: Callable[[int, torch.dtype], Any]) -> MakeInputs:
    """A noised image, timesteps and, with ``tokens``, a text of as many embeddings; ``more`` are other arguments."""

    def inputs(batch: int, small: bool, dtype: torch.dtype) -> Inputs:
        named = {name: make(batch, dtype) for name, make in more.items()}
        if tokens:
            named["encoder_hidden_states"] = _random(batch + 1, batch, tokens, width, dtype=dtype)
        return (_random(batch, batch, *shape, dtype=dtype),), {"timestep": _whole(1000, batch), **named}

    return inputs


def _extra(*shape: int) -> Callable[[int, torch.dtype], Tensor]:
    return lambda batch, dtype: _random(batch + 2, batch, *shape, dtype=dtype)


def _flux_inputs(batch: int, small: bool, dtype: torch.dtype) -> Inputs:
    rows = torch.zeros(16, 3)
    rows[:, 1], rows[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    return (), {
        "hidden_states": _random(batch, batch, 16, 16, dtype=dtype),
        "encoder_hidden_states": _random(batch + 1, batch, 8, 32, dtype=dtype),
        "pooled_projections": _random(batch + 2, batch, 32, dtype=dtype),
        "timestep": _random(batch + 3, batch, dtype=dtype).sigmoid(),
        "img_ids": rows.to(dtype),
        "txt_ids": torch.zeros(8, 3, dtype=dtype),
    }


def _sizes(batch: int, dtype: torch.dtype) -> dict[str, Any]:
    return {"resolution": None, "aspect_ratio": None}


_BLOCKS = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
_CROSS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
}
_CODER = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    **_BLOCKS,
}
_DIT = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "sample_size": 16, "patch_size": 2}

DIFFUSERS = {
    "unet2d": _made(
        "diffusers:UNet2DModel",
        _diffused(3, 32, 32),
        sample_size=32,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        **_BLOCKS,
    ),
    "unet2d_condition": _made(
        "diffusers:UNet2DConditionModel", _diffused(4, 32, 32, tokens=7, width=32), sample_size=32, **_CROSS, **_BLOCKS
    ),
    "unet2d_condition_sdxl": _made(
        "diffusers:UNet2DConditionModel",
        _diffused(
            4,
            32,
            32,
            tokens=7,
            width=32,
            added_cond_kwargs=lambda batch, dtype: {
                "text_embeds": _random(batch + 2, batch, 32, dtype=dtype),
                "time_ids": _random(batch + 3, batch, 6, dtype=dtype),
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
    "unet3d_condition": _made(
        "diffusers:UNet3DConditionModel",
        _diffused(4, 4, 16, 16, tokens=7, width=32),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        **_BLOCKS,
    ),
    "controlnet": _made(
        "diffusers:ControlNetModel",
        _diffused(4, 16, 16, tokens=7, width=32, controlnet_cond=_extra(3, 128, 128)),
        down_block_types=_CROSS["down_block_types"],
        cross_attention_dim=32,
        attention_head_dim=8,
        conditioning_embedding_out_channels=(8, 16, 16, 32),
        **_BLOCKS,
    ),
    "autoencoder_kl": _made("diffusers:AutoencoderKL", _pixels(3, 64, 64, small=(3, 32, 32)), **_CODER),
    "autoencoder_tiny": _made(
        "diffusers:AutoencoderTiny",
        _pixels(3, 64, 64, small=(3, 32, 32)),
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(32, 32, 32),
        num_encoder_blocks=(1, 2, 2),
        num_decoder_blocks=(2, 2, 1),
    ),
    "vq_model": _made("diffusers:VQModel", _pixels(3, 64, 64, small=(3, 32, 32)), num_vq_embeddings=64, **_CODER),
    "dit": _made(
        "diffusers:DiTTransformer2DModel",
        _diffused(4, 16, 16, class_labels=lambda batch, dtype: _whole(10, batch)),
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=10,
        norm_num_groups=8,
        **_DIT,
    ),
    "pixart": _made(
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
    "sd3": _made(
        "diffusers:SD3Transformer2DModel",
        _diffused(16, 16, 16, tokens=7, width=32, pooled_projections=_extra(64)),
        joint_attention_dim=32,
        caption_projection_dim=64,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
        **_DIT,
    ),
    "flux": _made(
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
    "sana": _made(
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

# monai: volumes of one channel, where the network has a choice.

_VOLUME = _pixels(1, 32, 32, 32)
_PLAIN = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}


def _monai(name: str, inputs: MakeInputs = _VOLUME, *arguments: Any, **options: Any) -> Network:
    return _made(f"monai.networks.nets:{name}", inputs, *arguments, **options)


class _Reconstruction(nn.Module):
    """``forward`` of these draws the latent variables; without the noise, users call ``reconstruct``."""

    def __init__(self, coder: Any) -> None:
        super().__init__()
        self.coder = coder

    def forward(self, x: Tensor) -> Tensor:
        return self.coder.reconstruct(x)


def _reconstructing(name: str, **options: Any) -> Network:
    whole = _monai(name, **options)
    return Network(lambda: _Reconstruction(whole.build()), whole.inputs)


MONAI = {
    "unet": _monai("UNet", channels=(16, 32, 64, 128), strides=(2, 2, 2), num_res_units=2, **_PLAIN),
    "basic_unet": _monai("BasicUNet", features=(16, 16, 32, 64, 128, 16), **_PLAIN),
    "basic_unet_plus_plus": _monai("BasicUNetPlusPlus", features=(16, 16, 32, 64, 128, 16), **_PLAIN),
    "dynunet": _monai(
        "DynUNet",
        kernel_size=(3, 3, 3, 3),
        strides=(1, 2, 2, 2),
        upsample_kernel_size=(2, 2, 2),
        filters=(16, 32, 64, 128),
        deep_supervision=True,
        res_block=True,
        **_PLAIN,
    ),
    "segresnet": _monai("SegResNet", init_filters=8, **_PLAIN),
    "unetr": _monai(
        "UNETR",
        in_channels=1,
        out_channels=2,
        img_size=(32, 32, 32),
        feature_size=8,
        hidden_size=96,
        mlp_dim=192,
        num_heads=4,
    ),
    "swin_unetr": _monai("SwinUNETR", _pixels(1, 64, 64, 64), in_channels=1, out_channels=2, feature_size=12),
    "swin_unetr_v2": _monai(
        "SwinUNETR", _pixels(1, 64, 64), in_channels=1, out_channels=2, feature_size=24, use_v2=True, spatial_dims=2
    ),
    "attention_unet": _monai("AttentionUnet", channels=(16, 32, 64, 128), strides=(2, 2, 2), **_PLAIN),
    "densenet121": _monai("DenseNet121", init_features=16, growth_rate=8, **_PLAIN),
    "vnet": _monai("VNet", **_PLAIN),
    "vit": _monai(
        "ViT",
        in_channels=1,
        img_size=(32, 32, 32),
        patch_size=(8, 8, 8),
        hidden_size=96,
        mlp_dim=192,
        num_layers=4,
        num_heads=4,
        classification=True,
    ),
    "vit_autoencoder": _monai(
        "ViTAutoEnc",
        in_channels=1,
        img_size=(32, 32, 32),
        patch_size=(4, 4, 4),
        hidden_size=96,
        mlp_dim=192,
        num_layers=4,
        num_heads=4,
    ),
    "flexible_unet": _monai("FlexibleUNet", _pixels(3, 64, 64), in_channels=3, out_channels=2, backbone="efficientnet-b0"),
    "highresnet": _monai("HighResNet", **_PLAIN),
    "mednext": _monai(
        "MedNeXt", init_filters=8, kernel_size=3, blocks_down=(1, 1, 1, 1), blocks_up=(1, 1, 1, 1), blocks_bottleneck=1, **_PLAIN
    ),
    "autoencoder_kl": _reconstructing(
        "AutoencoderKL",
        num_res_blocks=1,
        channels=(16, 32, 32),
        attention_levels=(False, False, True),
        norm_num_groups=8,
        **_PLAIN,
    ),
    "diffusion_unet": _monai(
        "DiffusionModelUNet",
        lambda batch, small, dtype: ((_random(batch, batch, 1, 32, 32, dtype=dtype), _whole(1000, batch)), {}),
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        num_res_blocks=1,
        channels=(32, 64, 64),
        attention_levels=(False, True, True),
        norm_num_groups=8,
    ),
    "resnet": _monai(
        "ResNet",
        block="basic",
        layers=[2, 2, 2, 2],
        block_inplanes=[16, 32, 64, 128],
        spatial_dims=3,
        n_input_channels=1,
        num_classes=4,
    ),
    "ahnet": _monai("AHNet", _pixels(1, 64, 64, 64), layers=(1, 1, 1, 1), psp_block_num=1, **_PLAIN),
}

# segmentation_models_pytorch: every decoder over three encoders, where the decoder takes the encoder.

ENCODERS = ("resnet18", "timm-efficientnet-b0", "mit_b0")
DECODERS = {
    "Unet": ENCODERS,
    "UnetPlusPlus": ENCODERS[:2],
    "MAnet": ENCODERS,
    "Linknet": ENCODERS[:2],
    "FPN": ENCODERS,
    "PSPNet": ENCODERS,
    "PAN": ENCODERS,
    "DeepLabV3": ENCODERS[:2],
    "DeepLabV3Plus": ENCODERS[:2],
    "UPerNet": ENCODERS,
    "Segformer": ENCODERS,
    "DPT": ("tu-vit_tiny_patch16_224",),
}


def _segmented(decoder: str, encoder: str) -> Network:
    options: dict[str, Any] = {"encoder_name": encoder, "encoder_weights": None, "classes": 4}
    if encoder.startswith("tu-vit"):
        return _made(f"segmentation_models_pytorch:{decoder}", _pixels(3, 64, 64), dynamic_img_size=True, **options)
    small = (3, 128, 128) if decoder == "PAN" else (3, 64, 64)  # PAN pools its deepest map three times more
    return _made(f"segmentation_models_pytorch:{decoder}", _pixels(3, 128, 128, small=small), **options)


SEGMENTATION = {
    f"{decoder.lower()}_{encoder}": _segmented(decoder, encoder) for decoder, encoders in DECODERS.items() for encoder in encoders
}

# vit_pytorch: README's examples, narrower and shallower where those have hundreds of millions of parameters.

_SQUARE = {"image_size": 64, "num_classes": 10, "patch_size": 8}
_TRUNK = {"dim": 96, "depth": 3, "heads": 4, "mlp_dim": 192, "dim_head": 24}
_NOISE = {"dropout": 0.1, "emb_dropout": 0.1}


def _vit(path: str, inputs: MakeInputs | None = None, **options: Any) -> Network:
    return _made(f"vit_pytorch.{path}", inputs or _pixels(3, 64, 64), **options)


VIT_PYTORCH = {
    "maxvit": _vit("max_vit:MaxViT", _pixels(3, 224, 224), num_classes=10, dim=64, depth=(2, 2, 5, 2)),
    "crossformer": _vit(
        "crossformer:CrossFormer", _pixels(3, 224, 224), num_classes=10, dim=(32, 64, 128, 256), depth=(1, 1, 2, 1)
    ),
    "nest": _vit(
        "nest:NesT", image_size=64, patch_size=4, dim=48, heads=3, num_hierarchies=3, block_repeats=(1, 1, 2), num_classes=10
    ),
    "cvt": _vit("cvt:CvT", num_classes=10, s1_emb_dim=32, s2_emb_dim=64, s3_emb_dim=128, s3_depth=3),
    "levit": _vit(
        "levit:LeViT",
        _pixels(3, 128, 128),
        image_size=128,
        num_classes=10,
        dim=(64, 96, 128),
        depth=2,
        heads=(2, 3, 4),
        mlp_mult=2,
        dropout=0.1,
    ),
    "t2t": _vit("t2t:T2TViT", image_size=64, num_classes=10, dim=96, depth=3, heads=4, mlp_dim=192, dim_head=24),
    "xcit": _vit("xcit:XCiT", cls_depth=2, local_patch_kernel_size=3, layer_dropout=0.05, **_SQUARE, **_TRUNK, **_NOISE),
    "regionvit": _vit("regionvit:RegionViT", _pixels(3, 224, 224), num_classes=10, dim=(32, 64, 128, 256), depth=(1, 1, 2, 1)),
    "scalable_vit": _vit(
        "scalable_vit:ScalableViT",
        _pixels(3, 256, 256),
        num_classes=10,
        dim=32,
        heads=(2, 4, 8, 16),
        depth=(1, 1, 2, 1),
        ssa_dim_key=(40, 40, 40, 32),
        reduction_factor=(8, 4, 2, 1),
        window_size=(64, 32, None, None),
        dropout=0.1,
    ),
    "sep_vit": _vit(
        "sep_vit:SepViT",
        _pixels(3, 224, 224),
        num_classes=10,
        dim=32,
        dim_head=16,
        heads=(1, 2, 4, 8),
        depth=(1, 1, 2, 1),
        dropout=0.1,
    ),
    "twins_svt": _vit(
        "twins_svt:TwinsSVT",
        _pixels(3, 224, 224),
        num_classes=10,
        s1_emb_dim=32,
        s2_emb_dim=64,
        s3_emb_dim=96,
        s4_emb_dim=128,
        s3_depth=2,
        s4_depth=1,
    ),
    "mobile_vit": _vit(
        "mobile_vit:MobileViT",
        _pixels(3, 128, 128),
        image_size=(128, 128),
        dims=[96, 120, 144],
        channels=[16, 32, 48, 48, 64, 64, 80, 80, 96, 96, 384],
        num_classes=10,
    ),
    "vit": _vit("vit:ViT", **_SQUARE, **_TRUNK, **_NOISE),
    "simple_vit": _vit("simple_vit:SimpleViT", **_SQUARE, **_TRUNK),
    "simple_vit_registers": _vit("simple_vit_with_register_tokens:SimpleViT", **_SQUARE, **_TRUNK),
    "vit_3d": _vit(
        "vit_3d:ViT",
        _pixels(3, 8, 64, 64),
        image_size=64,
        image_patch_size=16,
        frames=8,
        frame_patch_size=2,
        num_classes=10,
        **_TRUNK,
        **_NOISE,
    ),
    "vivit": _vit(
        "vivit:ViViT",
        _pixels(3, 8, 64, 64),
        image_size=64,
        image_patch_size=16,
        frames=8,
        frame_patch_size=2,
        num_classes=10,
        dim=96,
        spatial_depth=2,
        temporal_depth=2,
        heads=4,
        mlp_dim=192,
        dim_head=24,
    ),
    "deepvit": _vit("deepvit:DeepViT", **_SQUARE, **_TRUNK, **_NOISE),
    "cait": _vit("cait:CaiT", cls_depth=2, layer_dropout=0.05, **_SQUARE, **_TRUNK, **_NOISE),
    "cct": _made(
        "vit_pytorch.cct:CCT",
        _pixels(3, 64, 64),
        img_size=64,
        embedding_dim=96,
        n_conv_layers=2,
        num_layers=3,
        num_heads=4,
        mlp_ratio=2.0,
        num_classes=10,
        positional_embedding="learnable",
    ),
    "cross_vit": _vit(
        "cross_vit:CrossViT",
        image_size=64,
        num_classes=10,
        sm_dim=48,
        lg_dim=96,
        sm_patch_size=8,
        sm_enc_mlp_dim=96,
        lg_enc_depth=2,
        lg_enc_mlp_dim=192,
        depth=2,
    ),
    "pit": _vit(
        "pit:PiT", image_size=64, patch_size=8, num_classes=10, dim=96, depth=(2, 2, 2), heads=4, mlp_dim=192, dim_head=24
    ),
    "rvt": _vit("rvt:RvT", **_SQUARE, **_TRUNK, **_NOISE),
    "small_dataset_vit": _vit("vit_for_small_dataset:ViT", **_SQUARE, **_TRUNK, **_NOISE),
    "patch_merger_vit": _vit("vit_with_patch_merger:ViT", patch_merge_layer=1, **_SQUARE, **_TRUNK, **_NOISE),
    "simple_vit_fft": _vit("simple_vit_with_fft:SimpleViT", freq_patch_size=8, **_SQUARE, **_TRUNK),
    "normalized_vit": _vit("normalized_vit:nViT", **_SQUARE, **_TRUNK),
}

# open_clip: the tower of images and the tower of texts, called as one network.


def _clip(vision: dict[str, Any], text: dict[str, Any], size: int) -> Network:
    def build() -> nn.Module:
        return importlib.import_module("open_clip").CLIP(embed_dim=64, vision_cfg=vision, text_cfg=text)

    def inputs(batch: int, small: bool, dtype: torch.dtype) -> Inputs:
        return (_random(batch, batch, 3, size, size, dtype=dtype), _whole(200, batch, 16)), {}

    return Network(build, inputs)


_TEXT = {"context_length": 16, "vocab_size": 200, "width": 64, "heads": 4, "layers": 3}
CLIP = {
    "clip_vit": _clip({"image_size": 64, "patch_size": 16, "width": 96, "layers": 3, "head_width": 24}, _TEXT, 64),
    "clip_resnet": _clip({"image_size": 64, "width": 16, "layers": [1, 2, 2, 1], "head_width": 16}, _TEXT, 64),
}


def _detector() -> Network:
    def build() -> nn.Module:
        effdet = importlib.import_module("effdet")
        config = effdet.get_efficientdet_config("tf_efficientdet_d0")
        config.image_size = [128, 128]
        return effdet.EfficientDet(config, pretrained_backbone=False)

    return Network(build, _pixels(3, 128, 128))


IMAGES: dict[str, Network] = {
    **{f"diffusers_{name}": network for name, network in DIFFUSERS.items()},
    **{f"monai_{name}": network for name, network in MONAI.items()},
    **{f"smp_{name}": network for name, network in SEGMENTATION.items()},
    **{f"vit_pytorch_{name}": network for name, network in VIT_PYTORCH.items()},
    **{f"open_clip_{name}": network for name, network in CLIP.items()},
    "effdet_d0": _detector(),
}
