"""Networks on images and volumes from other libraries, for ``coverage.py wild``: small configurations, random weights."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import torch
from _coverage_networks import Inputs, Network
from _wild_common import MakeInputs, called, made, pixels, random, whole
from _wild_diffusers import DIFFUSERS
from torch import Tensor, nn

__all__ = ["IMAGES"]

# monai: volumes of one channel, where the network has a choice.

_VOLUME = pixels(1, 32, 32, 32)
_PLAIN: dict[str, Any] = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}


def _monai(name: str, inputs: MakeInputs = _VOLUME, *arguments: Any, **options: Any) -> Network:
    return made(f"monai.networks.nets:{name}", inputs, *arguments, **options)


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
    # Windows shift along all three axes at its first two resolutions, and the deepest map keeps more than one position.
    "swin_unetr": _monai("SwinUNETR", pixels(1, 64, 32, 32), in_channels=1, out_channels=2, feature_size=12),
    "swin_unetr_v2": _monai(
        "SwinUNETR", pixels(1, 64, 64), in_channels=1, out_channels=2, feature_size=24, use_v2=True, spatial_dims=2
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
    "flexible_unet": _monai("FlexibleUNet", pixels(3, 64, 64), in_channels=3, out_channels=2, backbone="efficientnet-b0"),
    "highresnet": _monai("HighResNet", pixels(1, 16, 16, 16), **_PLAIN),
    "mednext": _monai(
        "MedNeXt", init_filters=8, kernel_size=3, blocks_down=(1, 1, 1, 1), blocks_up=(1, 1, 1, 1), blocks_bottleneck=1, **_PLAIN
    ),
    "autoencoder_kl": called(
        _monai(
            "AutoencoderKL",
            num_res_blocks=1,
            channels=(16, 32, 32),
            attention_levels=(False, False, True),
            norm_num_groups=8,
            **_PLAIN,
        ),
        lambda network, x: network.reconstruct(x),
    ),
    "diffusion_unet": _monai(
        "DiffusionModelUNet",
        lambda batch, small, dtype: ((random(batch, batch, 1, 32, 32, dtype=dtype), whole(1000, batch)), {}),
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
    "ahnet": _monai("AHNet", pixels(1, 64, 64, 64), layers=(1, 1, 1, 1), psp_block_num=1, **_PLAIN),
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
        return made(f"segmentation_models_pytorch:{decoder}", pixels(3, 64, 64), dynamic_img_size=True, **options)
    small = (3, 128, 128) if decoder == "PAN" else (3, 64, 64)  # PAN pools its deepest map three times more
    return made(f"segmentation_models_pytorch:{decoder}", pixels(3, 128, 128, small=small), **options)


SEGMENTATION = {
    f"{decoder.lower()}_{encoder}": _segmented(decoder, encoder) for decoder, encoders in DECODERS.items() for encoder in encoders
}

# vit_pytorch: README's examples, narrower and shallower where those have hundreds of millions of parameters. Without
# `layer_dropout`, which drops layers at random in evaluation too: such a network differs from call to call, and is refused.

_SQUARE: dict[str, Any] = {"image_size": 64, "num_classes": 10, "patch_size": 8}
_TRUNK: dict[str, Any] = {"dim": 96, "depth": 3, "heads": 4, "mlp_dim": 192, "dim_head": 24}
_NOISE: dict[str, Any] = {"dropout": 0.1, "emb_dropout": 0.1}


def _vit(path: str, inputs: MakeInputs | None = None, **options: Any) -> Network:
    return made(f"vit_pytorch.{path}", inputs or pixels(3, 64, 64), **options)


VIT_PYTORCH = {
    "maxvit": _vit("max_vit:MaxViT", pixels(3, 224, 224), num_classes=10, dim=64, depth=(2, 2, 5, 2)),
    "crossformer": dataclasses.replace(
        _vit("crossformer:CrossFormer", pixels(3, 224, 224), num_classes=10, dim=(32, 64, 128, 256), depth=(1, 1, 2, 1)),
        dtype=torch.float32,
    ),  # its code makes float32 positions
    "nest": _vit(
        "nest:NesT", image_size=64, patch_size=4, dim=48, heads=3, num_hierarchies=3, block_repeats=(1, 1, 2), num_classes=10
    ),
    "cvt": _vit("cvt:CvT", num_classes=10, s1_emb_dim=32, s2_emb_dim=64, s3_emb_dim=128, s3_depth=3),
    "levit": _vit(
        "levit:LeViT",
        pixels(3, 128, 128),
        image_size=128,
        num_classes=10,
        dim=(64, 96, 128),
        depth=2,
        heads=(2, 3, 4),
        mlp_mult=2,
        dropout=0.1,
    ),
    "t2t": _vit("t2t:T2TViT", image_size=64, num_classes=10, dim=96, depth=3, heads=4, mlp_dim=192, dim_head=24),
    "xcit": _vit("xcit:XCiT", cls_depth=2, local_patch_kernel_size=3, **_SQUARE, **_TRUNK, **_NOISE),
    "regionvit": _vit("regionvit:RegionViT", pixels(3, 224, 224), num_classes=10, dim=(32, 64, 128, 256), depth=(1, 1, 2, 1)),
    "scalable_vit": _vit(
        "scalable_vit:ScalableViT",
        pixels(3, 256, 256),
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
        pixels(3, 224, 224),
        num_classes=10,
        dim=32,
        dim_head=16,
        heads=(1, 2, 4, 8),
        depth=(1, 1, 2, 1),
        dropout=0.1,
    ),
    "twins_svt": _vit(
        "twins_svt:TwinsSVT",
        pixels(3, 224, 224),
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
        pixels(3, 128, 128),
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
        pixels(3, 8, 64, 64),
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
        pixels(3, 8, 64, 64),
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
    "cait": _vit("cait:CaiT", cls_depth=2, **_SQUARE, **_TRUNK, **_NOISE),
    "cct": made(
        "vit_pytorch.cct:CCT",
        pixels(3, 64, 64),
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


class _Towers(nn.Module):
    """Both embeddings, without the learnt temperature, which has no batch."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        return self.clip(images, texts)[:2]


def _clip(vision: dict[str, Any], text: dict[str, Any], size: int) -> Network:
    def build() -> nn.Module:
        return _Towers(importlib.import_module("open_clip").CLIP(embed_dim=64, vision_cfg=vision, text_cfg=text))

    def inputs(batch: int, small: bool, dtype: torch.dtype) -> Inputs:
        return (random(batch, batch, 3, size, size, dtype=dtype), whole(200, batch, 16)), {}

    return Network(build, inputs)


_TEXT: dict[str, Any] = {"context_length": 16, "vocab_size": 200, "width": 64, "heads": 4, "layers": 3}
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

    return Network(build, pixels(3, 128, 128))


IMAGES: dict[str, Network] = {
    **{f"diffusers_{name}": network for name, network in DIFFUSERS.items()},
    **{f"monai_{name}": network for name, network in MONAI.items()},
    **{f"smp_{name}": network for name, network in SEGMENTATION.items()},
    **{f"vit_pytorch_{name}": network for name, network in VIT_PYTORCH.items()},
    **{f"open_clip_{name}": network for name, network in CLIP.items()},
    "effdet_d0": _detector(),
}
