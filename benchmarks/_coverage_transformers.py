"""Hugging Face's networks from small configurations, for the coverage run: nothing is downloaded, weights are random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

__all__ = ["NAMED", "TRANSFORMERS"]

Named = dict[str, Tensor]
Entry = tuple[Callable[[], nn.Module], Callable[[int, torch.dtype], Named], dict[str, Any]]

hf.logging.set_verbosity_error()

_NO_CACHE = {"use_cache": False}
_WIDE = {"vocab_size": 128, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 256}
_GROUPED = {**_WIDE, "num_key_value_heads": 2}
_HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
_BOTH = {"vocab_size": 128, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, **_HEADS}
_VISION = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 256}


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _words(batch: int, dtype: torch.dtype) -> Named:
    return {"input_ids": torch.randint(5, 120, (batch, 16), generator=_seeded(batch))}


def _masked_words(batch: int, dtype: torch.dtype) -> Named:
    return {**_words(batch, dtype), "attention_mask": torch.ones(batch, 16, dtype=torch.int64)}


def _pairs(batch: int, dtype: torch.dtype) -> Named:
    return {**_words(batch, dtype), "decoder_input_ids": torch.randint(5, 120, (batch, 8), generator=_seeded(9 + batch))}


def _pixels(size: int) -> Callable[[int, torch.dtype], Named]:
    return lambda batch, dtype: {"pixel_values": torch.randn(batch, 3, size, size, generator=_seeded(batch), dtype=dtype)}


def _spectra(batch: int, dtype: torch.dtype) -> Named:
    return {
        "input_features": torch.randn(batch, 80, 40, generator=_seeded(batch), dtype=dtype),
        "decoder_input_ids": torch.randint(5, 120, (batch, 8), generator=_seeded(9 + batch)),
    }


def _sound(batch: int, dtype: torch.dtype) -> Named:
    return {"input_values": torch.randn(batch, 800, generator=_seeded(batch), dtype=dtype)}


def _causal(name: str, **config: Any) -> Entry:
    """A language model by the stem of its classes' names."""
    build = getattr(hf, f"{name}ForCausalLM")
    return lambda: build(getattr(hf, f"{name}Config")(**config)), _words, _NO_CACHE


def _classifier(name: str, inputs: Any = _words, kind: str = "SequenceClassification", **config: Any) -> Entry:
    build = getattr(hf, f"{name}For{kind}")
    return lambda: build(getattr(hf, f"{name}Config")(**config)), inputs, {}


def _image_classifier(name: str, size: int, **config: Any) -> Entry:
    return _classifier(name, _pixels(size), "ImageClassification", **config)


def _translator(name: str, **config: Any) -> Entry:
    build = getattr(hf, f"{name}ForConditionalGeneration")
    return lambda: build(getattr(hf, f"{name}Config")(**config)), _pairs, _NO_CACHE


def _detr() -> nn.Module:
    backbone = hf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], out_features=["stage2"])
    sizes = {**_HEADS, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 5}
    options = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
    return hf.DetrForObjectDetection(hf.DetrConfig(backbone_config=backbone, **options, **sizes))


NAMED: dict[str, Entry] = {
    "bert": _classifier("Bert", _masked_words, **_WIDE),
    "gpt2": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=128, n_embd=128, n_layer=4, n_head=8)), _words, _NO_CACHE),
    "llama": _causal("Llama", **_GROUPED),
    "vit": _image_classifier("ViT", 64, image_size=64, patch_size=8, **_VISION),
    "t5": _translator("T5", vocab_size=128, d_model=128, d_kv=16, num_layers=3, num_heads=8, d_ff=256),
    "segformer": _classifier("Segformer", _pixels(64), "SemanticSegmentation", num_labels=5),
}
TRANSFORMERS: dict[str, Entry] = {
    **NAMED,
    "distilbert": _classifier("DistilBert", vocab_size=128, dim=128, n_layers=4, n_heads=8, hidden_dim=256),
    "roberta": _classifier("Roberta", kind="MaskedLM", **_WIDE),
    "albert": _classifier("Albert", embedding_size=32, **_WIDE),
    "electra": _classifier("Electra", kind="PreTraining", embedding_size=32, **_WIDE),
    "deberta_v2": _classifier("DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"], **_WIDE),
    "mobilebert": _classifier(
        "MobileBert", vocab_size=128, hidden_size=64, embedding_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, intra_bottleneck_size=32,
    ),
    "xlnet": (
        lambda: hf.XLNetForSequenceClassification(hf.XLNetConfig(vocab_size=128, d_model=64, n_layer=2, n_head=4, d_inner=128)),
        _words, {"use_mems": False},
    ),
    "mistral": _causal("Mistral", **_GROUPED),
    "qwen2": _causal("Qwen2", **_GROUPED),
    "qwen3": _causal("Qwen3", head_dim=16, **_GROUPED),
    "gemma": _causal("Gemma", head_dim=16, **_GROUPED),
    "gemma2": _causal("Gemma2", head_dim=16, **_GROUPED),
    "opt": _causal(
        "OPT", vocab_size=128, hidden_size=128, num_hidden_layers=4, num_attention_heads=8, ffn_dim=256, word_embed_proj_dim=128
    ),
    "gpt_neox": _causal("GPTNeoX", **_WIDE),
    "gptj": _causal("GPTJ", vocab_size=128, n_embd=128, n_layer=4, n_head=8, rotary_dim=8),
    "bloom": _causal("Bloom", vocab_size=128, hidden_size=128, n_layer=4, n_head=8),
    "falcon": _causal("Falcon", vocab_size=128, hidden_size=128, num_hidden_layers=4, num_attention_heads=8),
    "phi": _causal("Phi", **_WIDE),
    "phi3": _causal("Phi3", pad_token_id=0, **_GROUPED),
    "mamba": _causal("Mamba", vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=8),
    "llama_classifier": _classifier("Llama", pad_token_id=0, use_cache=False, **_GROUPED),
    "mt5": _translator("MT5", vocab_size=128, d_model=128, d_kv=16, num_layers=3, num_heads=8, d_ff=256),
    "bart": _translator("Bart", **_BOTH),
    "whisper": (
        lambda: hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(
                max_source_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, **_BOTH
            )
        ),
        _spectra, _NO_CACHE,
    ),
    "wav2vec2": (
        lambda: hf.Wav2Vec2ForCTC(
            hf.Wav2Vec2Config(
                conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=16,
                num_conv_pos_embedding_groups=4, **_VISION,
            )
        ),
        _sound, {},
    ),
    "clip_vision": (
        lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(image_size=32, patch_size=8, **_VISION)), _pixels(32), {},
    ),
    "swin": _image_classifier(
        "Swin", 64, image_size=64, patch_size=4, embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=4
    ),
    "convnext": _image_classifier("ConvNext", 64, hidden_sizes=[16, 32, 64, 64], depths=[1, 1, 1, 1]),
    "dinov2": _image_classifier("Dinov2", 28, image_size=28, patch_size=7, **_VISION),
    "beit": _image_classifier("Beit", 32, image_size=32, patch_size=8, **_VISION),
    "resnet": _image_classifier("ResNet", 32, embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2]),
    "mobilevit": _image_classifier("MobileViT", 64, image_size=64),
    "detr": (_detr, _pixels(64), {}),
}  # fmt: skip
