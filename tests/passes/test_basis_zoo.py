"""A change of basis on small networks of timm and transformers with random weights: kept functions, and reasons for refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import stp_fx
from stp_fx.errors import NothingToRotateError
from stp_fx.passes import RotateResidual
from stp_fx.rewrite.basis.streams import find_streams

pytestmark = pytest.mark.slow
Made = tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def of_timm(name: str, size: int = 32, **options: Any) -> Callable[[], Made]:
    def make() -> Made:
        timm = pytest.importorskip("timm")
        sized = {} if name.startswith("convnext") else {"img_size": size}
        model = timm.create_model(name, pretrained=False, num_classes=7, **sized, **options)
        return model, (torch.randn(2, 3, size, size),), {}, None

    return make


def of_transformers(
    config: str, cls: str, inputs: Callable[[], dict[str, Any]], outputs: Any = None, **fields: Any
) -> Callable[[], Made]:
    def make() -> Made:
        transformers = pytest.importorskip("transformers")
        return getattr(transformers, cls)(getattr(transformers, config)(**fields)), (), inputs(), outputs

    return make


def ids() -> dict[str, Any]:
    return {"input_ids": torch.randint(0, 50, (2, 9))}


VIT = {"embed_dim": 48, "depth": 2, "num_heads": 3}
WHISPER = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 64, "num_mel_bins": 8, "max_source_positions": 16,
    "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
ROTATED: dict[str, Callable[[], Made]] = {
    "ViT": of_timm("vit_tiny_patch16_224", **VIT),
    "DeiT": of_timm("deit_tiny_distilled_patch16_224", **VIT),
    "BEiT": of_timm("beit_base_patch16_224", **VIT),
    "Swin": of_timm("swin_tiny_patch4_window7_224", 56, embed_dim=24, depths=(1, 1), num_heads=(2, 4)),
    "GPT-2": of_transformers("GPT2Config", "GPT2LMHeadModel", ids, n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32),
    "Llama": of_transformers("LlamaConfig", "LlamaForCausalLM", ids, **SMALL, vocab_size=64, num_key_value_heads=2),
    "Qwen3": of_transformers("Qwen3Config", "Qwen3ForCausalLM", ids, **SMALL, vocab_size=64, num_key_value_heads=2, head_dim=8),
    "Whisper": of_transformers(
        "WhisperConfig", "WhisperForConditionalGeneration",
        lambda: {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": torch.randint(3, 50, (2, 5))}, "logits", **WHISPER,
    ),
}  # fmt: skip
REFUSED: dict[str, tuple[Callable[[], Made], str]] = {
    "BERT": (
        of_transformers("BertConfig", "BertForSequenceClassification", ids, **SMALL, vocab_size=64),
        "stands between the norm",
    ),
    "ConvNeXt": (of_timm("convnext_atto", depths=(1, 1, 1, 1), dims=(16, 32, 32, 32)), "conv_dw"),
    "Gemma": (
        of_transformers("GemmaConfig", "GemmaForCausalLM", ids, **SMALL, vocab_size=64, num_key_value_heads=2, head_dim=8),
        "treats the channels one by one",
    ),
}


def captured(make: Callable[[], Made]) -> tuple[torch.fx.GraphModule, tuple[Any, ...]]:
    torch.manual_seed(0)
    model, args, kwargs, outputs = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    gm = stp_fx.trace(model.eval(), args or None, kwargs=kwargs, validate=False, outputs=outputs)
    return gm, (*args, *kwargs.values())


def numbers(gm: torch.fx.GraphModule, inputs: tuple[Any, ...]) -> torch.Tensor:
    doubled = copy.deepcopy(gm).double()
    with torch.no_grad():
        out = doubled(*[x.double() if x.is_floating_point() else x for x in inputs])
    return out if isinstance(out, torch.Tensor) else next(iter(out.values()))


@pytest.mark.parametrize("name", ROTATED)
def test_rotated(name: str) -> None:
    """The rewrite itself compares both in double precision, to nine digits; here float32 weights are rounded, once."""
    gm, inputs = captured(ROTATED[name])
    rotated = RotateResidual()(gm).graph_module
    before = numbers(gm, inputs)
    assert float((numbers(rotated, inputs) - before).abs().max() / before.abs().max()) < 1e-5
    graph = stp_fx.analyze(rotated)
    flags = torch.zeros(graph.units, dtype=torch.bool).numpy()
    streams = [s for s in find_streams(rotated) if all(norm.kind == "rms" for norm in s.norms) and s.size > 8]
    assert streams
    for stream in streams:
        flags[stream.units[-4:]] = True
    plan = graph.plan_removing(flags)
    small, masked = stp_fx.apply_plan(rotated, plan, validate=False), stp_fx.apply_plan(rotated, plan, mask=True)
    torch.testing.assert_close(numbers(small, inputs), numbers(masked, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make, why = REFUSED[name]
    gm, _ = captured(make)
    with pytest.raises(NothingToRotateError, match="nothing can be rotated") as caught:
        RotateResidual()(gm)
    assert why in str(caught.value)
