"""Networks of transformers on images, sound and words with images, for ``coverage.py wild``."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from _coverage_networks import Inputs, Network
from _wild_inputs import (
    ids,
    images,
    lazily,
    named,
    of_class,
    one_query,
    pixels,
    pixels_and_words,
    seeded,
    with_image,
)
from torch import Tensor, nn

__all__ = ["VISION"]

_WIDE = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_VISION = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_SMALL_IMAGE = {**_VISION, "image_size": 32, "patch_size": 8}
_TEXT = {**_WIDE, "max_position_embeddings": 32}
_ENDS = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 1}
_HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
_DETECTOR = {**_HEADS, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 5}
_WAVES = {
    "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, **_VISION,
}  # fmt: skip


def _res_net(*stages: str) -> Any:
    return hf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1], out_features=list(stages))


def _own_backbone(*stages: str) -> dict[str, Any]:
    return {"backbone_config": _res_net(*stages), "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}


def _rt_detr() -> dict[str, Any]:
    backbone = hf.RTDetrResNetConfig(
        embedding_size=16, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    return {
        "backbone_config": backbone, "encoder_hidden_dim": 32, "encoder_in_channels": [16, 32, 32], "encoder_ffn_dim": 64,
        "encoder_attention_heads": 4, "d_model": 32, "num_queries": 6, "decoder_in_channels": [32, 32, 32],
        "decoder_ffn_dim": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_n_points": 2,
        "feat_strides": [8, 16, 32], "num_denoising": 0, "num_labels": 5,
    }  # fmt: skip


def _swin(**more: Any) -> dict[str, Any]:
    return {"image_size": 64, "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [2, 2, 2, 2], "window_size": 2, **more}


_STAGES = ["stage1", "stage2", "stage3", "stage4"]
_MASKS = {
    "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 64, "encoder_layers": 1,
    "decoder_layers": 2, "num_attention_heads": 4, "dim_feedforward": 64, "num_queries": 5, "num_labels": 4,
}  # fmt: skip


def _mask_former() -> nn.Module:
    decoder = hf.DetrConfig(**{**_DETECTOR, "decoder_layers": 2})
    config = hf.MaskFormerConfig(
        fpn_feature_size=32, mask_feature_size=32, backbone_config=hf.SwinConfig(**_swin(out_features=_STAGES)),
        decoder_config=decoder, num_labels=4,
    )  # fmt: skip
    return hf.MaskFormerForInstanceSegmentation(config)


def _sam() -> nn.Module:
    vision = {**_VISION, "output_channels": 16, "image_size": 64, "patch_size": 16, "window_size": 2, "mlp_dim": 128}
    vision |= {"global_attn_indexes": [1], "num_pos_feats": 8}
    prompt = {"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 8}
    decoder = {"hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    return hf.SamModel(hf.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder))


def _prompted(batch: int, small: bool, dtype: torch.dtype) -> Inputs:
    points = torch.rand(batch, 1, 2, 2, generator=seeded(batch), dtype=dtype) * 64
    return (), {**pixels(64)(batch, small, dtype)[1], "input_points": points}


def _grounding() -> nn.Module:
    text = hf.BertConfig(**_TEXT)
    vision = hf.SwinConfig(**_swin(out_features=_STAGES[1:]))
    config = hf.GroundingDinoConfig(
        backbone_config=vision, text_config=text, num_feature_levels=3, disable_custom_kernels=True, max_text_len=16,
        encoder_n_points=2, decoder_n_points=2, fusion_dropout=0.0, **_DETECTOR,
    )  # fmt: skip
    return hf.GroundingDinoForObjectDetection(config)


def _one_former() -> nn.Module:
    config = hf.OneFormerConfig(
        backbone_config=hf.SwinConfig(**_swin(out_features=_STAGES)), conv_dim=32, mask_dim=32, hidden_dim=32,
        encoder_feedforward_dim=64, encoder_layers=1, decoder_layers=2, num_attention_heads=4, dim_feedforward=64,
        num_queries=5,
        num_labels=4, task_seq_len=8, text_encoder_width=32, text_encoder_context_length=8, text_encoder_num_layers=1,
        text_encoder_vocab_size=128, is_training=False, query_dec_layers=1,
    )  # fmt: skip
    return hf.OneFormerForUniversalSegmentation(config)


def _with_task(batch: int, small: bool, dtype: torch.dtype) -> Inputs:
    return (), {**pixels(64)(batch, small, dtype)[1], "task_inputs": ids(batch, 8).to(dtype)}


DETECTION: dict[str, Network] = {
    "conditional_detr": lazily(
        lambda: hf.ConditionalDetrForObjectDetection(
            hf.ConditionalDetrConfig(**_own_backbone("stage2"), **_DETECTOR)
        ),
        pixels(64),
    ),
    "deformable_detr": lazily(
        lambda: hf.DeformableDetrForObjectDetection(
            hf.DeformableDetrConfig(
                **_own_backbone(*_STAGES[1:]), num_feature_levels=3, encoder_n_points=2, decoder_n_points=2,
                disable_custom_kernels=True, **_DETECTOR,
            )
        ),
        pixels(64),
    ),
    "rt_detr": lazily(lambda: hf.RTDetrForObjectDetection(hf.RTDetrConfig(**_rt_detr())), pixels(64), torch.float32),
    "rt_detr_v2": lazily(lambda: hf.RTDetrV2ForObjectDetection(hf.RTDetrV2Config(**_rt_detr())), pixels(64), torch.float32),
    "yolos": of_class(
        "YolosForObjectDetection", pixels(32), num_labels=4, num_detection_tokens=5, **{**_SMALL_IMAGE, "image_size": [32, 32]}
    ),
    "owlvit": of_class(
        "OwlViTForObjectDetection", pixels_and_words(32, one_query), text_config=_TEXT | {"pad_token_id": 0},
        vision_config=_SMALL_IMAGE, projection_dim=64,
    ),
    "grounding_dino": lazily(_grounding, pixels_and_words(64), torch.float32),
}  # fmt: skip

SEGMENTATION: dict[str, Network] = {
    "mask2former": lazily(
        lambda: hf.Mask2FormerForUniversalSegmentation(
            hf.Mask2FormerConfig(backbone_config=hf.SwinConfig(**_swin(out_features=_STAGES)), **_MASKS)
        ),
        pixels(64),
        torch.float32,
    ),
    "maskformer": lazily(_mask_former, pixels(64)),
    "oneformer": lazily(_one_former, _with_task, torch.float32),
    "sam": lazily(_sam, _prompted),
    "upernet": lazily(
        lambda: hf.UperNetForSemanticSegmentation(
            hf.UperNetConfig(
                backbone_config=hf.ConvNextConfig(hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1], out_features=_STAGES),
                hidden_size=32, use_auxiliary_head=False, num_labels=4,
            )
        ),
        pixels(64),
    ),
    "clipseg": of_class(
        "CLIPSegForImageSegmentation", pixels_and_words(32), text_config=_TEXT | _ENDS, vision_config=_SMALL_IMAGE,
        projection_dim=32, reduce_dim=16, extract_layers=[0, 1], decoder_num_attention_heads=4, decoder_intermediate_size=32,
    ),
}  # fmt: skip

_DEEPER = {**_SMALL_IMAGE, "num_hidden_layers": 4}
_EVERY_STAGE = {"out_features": _STAGES, "reshape_hidden_states": False}


def _zoe() -> nn.Module:
    backbone = hf.BeitConfig(
        **_DEEPER, **_EVERY_STAGE, use_relative_position_bias=True,
    )  # fmt: skip
    config = hf.ZoeDepthConfig(
        backbone_config=backbone, neck_hidden_sizes=[16, 16, 32, 32], fusion_hidden_size=32, bottleneck_features=32,
        num_relative_features=16, bin_embedding_dim=32, num_attractors=[4, 2, 2, 1], num_patch_transformer_layers=1,
        patch_transformer_hidden_size=32, patch_transformer_intermediate_size=64,
    )  # fmt: skip
    return hf.ZoeDepthForDepthEstimation(config)


def _depth_anything() -> nn.Module:
    backbone = hf.Dinov2Config(
        **{**_DEEPER, "image_size": 28, "patch_size": 7}, **_EVERY_STAGE,
    )  # fmt: skip
    config = hf.DepthAnythingConfig(
        backbone_config=backbone, patch_size=7, reassemble_hidden_size=64, neck_hidden_sizes=[16, 16, 32, 32],
        fusion_hidden_size=32,
        head_hidden_size=16,
    )  # fmt: skip
    return hf.DepthAnythingForDepthEstimation(config)


DEPTH: dict[str, Network] = {
    "dpt": of_class(
        "DPTForDepthEstimation", pixels(32), **_DEEPER, backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16, 16, 32, 32], fusion_hidden_size=32, is_hybrid=False,
    ),
    "depth_anything": lazily(_depth_anything, pixels(28)),
    "glpn": of_class(
        "GLPNForDepthEstimation", pixels(64), hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1], num_attention_heads=[1,
        2, 2, 4],
        decoder_hidden_size=16,
    ),
    "zoedepth": lazily(_zoe, pixels(32)),
}  # fmt: skip

HEARING: dict[str, Network] = {
    "ast": of_class("ASTForAudioClassification", named("input_values", 48, 16), max_length=48, num_mel_bins=16, patch_size=8,
                    frequency_stride=8, time_stride=8, **_VISION),
    "wav2vec2_conformer": of_class("Wav2Vec2ConformerForCTC", named("input_values", 800), vocab_size=32, **_WAVES),
    "hubert": of_class("HubertForCTC", named("input_values", 800), vocab_size=32, **_WAVES),
    "sew": of_class("SEWForCTC", named("input_values", 800), vocab_size=32, squeeze_factor=2, **_WAVES),
    "unispeech": of_class("UniSpeechForCTC", named("input_values", 800), vocab_size=32, **_WAVES),
    "encodec": of_class("EncodecModel", named("input_values", 1, 800), num_filters=8, hidden_size=32, codebook_size=16,
                        codebook_dim=32, num_residual_layers=1),
    "whisper_encoder": of_class(
        "WhisperForAudioClassification", named("input_features", 80, 40), d_model=64, encoder_layers=2, decoder_layers=2,
        max_source_positions=20, classifier_proj_size=32, **_HEADS,
    ),
    "clap": of_class(
        "ClapAudioModelWithProjection", named("input_features", 1, 64, 16), "ClapAudio", patch_embeds_hidden_size=16,
        hidden_size=32,
        depths=[1, 1], num_attention_heads=[2, 2], window_size=4, num_mel_bins=16, spec_size=64, patch_size=4,
        num_hidden_layers=2,
        patch_stride=[4, 4], projection_dim=32, enable_fusion=False,
    ),
}  # fmt: skip


def _llava() -> nn.Module:
    vision = hf.CLIPVisionConfig(**_SMALL_IMAGE)
    text = hf.LlamaConfig(num_key_value_heads=2, **_WIDE)
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=3))


def _clip() -> nn.Module:
    return hf.CLIPModel(hf.CLIPConfig(text_config=_TEXT | _ENDS, vision_config=_SMALL_IMAGE, projection_dim=32))


def _siglip() -> nn.Module:
    return hf.SiglipModel(hf.SiglipConfig(text_config=_TEXT, vision_config=_SMALL_IMAGE))


class Named(nn.Module):
    """A model of whose outputs those of these names are wanted: others have the batch twice, or an entry for each image."""

    def __init__(self, model: nn.Module, *names: str) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(**inputs)
        return tuple(outputs[name] for name in self.names)


TOGETHER: dict[str, Network] = {
    "clip": lazily(lambda: Named(_clip(), "image_embeds", "text_embeds"), pixels_and_words(32)),
    "siglip": lazily(lambda: Named(_siglip(), "image_embeds", "text_embeds"), pixels_and_words(32)),
    "blip": of_class(
        "BlipForImageTextRetrieval", pixels_and_words(32), text_config=_TEXT | {"encoder_hidden_size": 64},
        vision_config=_SMALL_IMAGE, image_text_hidden_size=32,
    ),
    "llava": lazily(lambda: Named(_llava(), "logits"), pixels_and_words(32, with_image)),
}  # fmt: skip

BACKBONES: dict[str, Network] = {
    "swinv2": images("Swinv2", 64, **{**_swin(), "window_size": 4, "depths": [1, 1], "num_heads": [2, 2]}),
    "convnextv2": images("ConvNextV2", 64, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1]),
    "pvt_v2": images("PvtV2", 64, image_size=64, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1],
    num_attention_heads=[1, 2, 2, 4]),
    "levit": images("Levit", 64, image_size=64, hidden_sizes=[32, 48, 64], num_attention_heads=[2, 3, 4], depths=[1, 1, 1],
                    key_dim=[8, 8, 8]),
    "hiera": images("Hiera", 64, image_size=[64, 64], embed_dim=16, depths=[1, 1, 1], num_heads=[1, 2, 4],
    masked_unit_size=[4, 4],
                    query_stride=[2, 2], num_query_pool=2),
    "dinov2_registers": images("Dinov2WithRegisters", 32, num_register_tokens=2, **_SMALL_IMAGE),
    "focalnet": images("FocalNet", 64, image_size=64, embed_dim=16, hidden_sizes=[16, 32], depths=[1, 1], focal_levels=[2, 2],
                       focal_windows=[3, 3]),
    "cvt": images("Cvt", 64, embed_dim=[16, 32], num_heads=[1, 2], depth=[1, 2], patch_sizes=[7, 3], patch_stride=[4, 2],
                  patch_padding=[2, 1], mlp_ratio=[2.0, 2.0], attention_drop_rate=[0.0, 0.0], drop_rate=[0.0, 0.0],
                  drop_path_rate=[0.0, 0.1], qkv_bias=[True, True], cls_token=[False, True],
                  qkv_projection_method=["dw_bn"] * 2,
                  kernel_qkv=[3, 3], padding_kv=[1, 1], stride_kv=[2, 2], padding_q=[1, 1], stride_q=[1, 1]),
}  # fmt: skip

VISION: dict[str, Network] = DETECTION | SEGMENTATION | DEPTH | HEARING | TOGETHER | BACKBONES
