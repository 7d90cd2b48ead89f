"""Hugging Face classes with plain arguments: encoder and decoder, by-products, tensors that no forward reaches, adapters."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stp_fx
from stp_fx.errors import InputError, WriteBackError

transformers = pytest.importorskip("transformers", exc_type=ImportError)

TOKENS = torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(1))
SOUND = torch.randn(2, 16, 40, generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
BOTH = {
    "vocab_size": 97, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip


def whisper() -> tuple[Any, dict[str, Tensor]]:
    config = transformers.WhisperConfig(num_mel_bins=16, max_source_positions=20, max_target_positions=32, **BOTH)
    return transformers.WhisperForConditionalGeneration(config), {"input_features": SOUND, "decoder_input_ids": TOKENS}


def bart() -> tuple[Any, dict[str, Tensor]]:
    config = transformers.BartConfig(max_position_embeddings=32, **BOTH)
    return transformers.BartForConditionalGeneration(config), {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :5]}


@pytest.mark.parametrize("build", [whisper, bart])
def test_an_encoder_and_its_decoder_come_back(build: Any, tmp_path: Path) -> None:
    """The numbers of heads are two fields that no shape shows."""
    torch.manual_seed(0)
    model, given = build()
    gm = stp_fx.trace(model.eval(), (), kwargs=given, outputs="logits")
    pruned = stp_fx.prune_graph(gm, ratio=0.5, target="macs", uniform=True)
    assert stp_fx.cost(pruned).macs <= 0.5 * stp_fx.cost(gm).macs
    written = stp_fx.write_back(pruned, model)
    assert (written.config.d_model, written.config.encoder_attention_heads, written.config.decoder_attention_heads) == (32, 2, 2)
    written.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(**given).logits, pruned(**given)["logits"])
    first = next(iter(given.values()))[:1]
    assert loaded.generate(first, max_new_tokens=3, do_sample=False).shape[0] == 1


def test_tensors_that_the_forward_does_not_reach_are_built_anew(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        image_size=16, patch_size=8, mlp_ratio=2, hidden_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.Dinov2ForImageClassification(config).eval()
    pruned = stp_fx.prune_graph(model, ratio=0.5, uniform=True, example_inputs=PIXELS)
    with caplog.at_level(logging.WARNING, "stp_fx"):
        written = stp_fx.write_back(pruned, model)
    assert "does not reach dinov2.embeddings.mask_token" in caplog.text
    assert "initialised anew" in caplog.text
    assert written.dinov2.embeddings.mask_token.shape == (1, 32)
    written.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(PIXELS).logits, pruned(PIXELS)["logits"])
    assert torch.equal(loaded.dinov2.embeddings.mask_token, written.dinov2.embeddings.mask_token)


class Adapted(nn.Module):
    """Wraps a model and lends its attributes, as libraries of adapters do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.down, self.up = inner, nn.Linear(97, 4, bias=False), nn.Linear(4, 97, bias=False)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits = self.inner(input_ids).logits
        return logits + self.up(self.down(logits))


def test_adapters_are_to_be_merged_first() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = Adapted(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))).eval()
    pruned = stp_fx.prune_graph(model, ratio=0.5, uniform=True, example_inputs=TOKENS)
    with pytest.raises(WriteBackError, match=r"Adapted wraps a model whose LlamaConfig .* merge them into the weights first"):
        stp_fx.write_back(pruned, model)
    written = stp_fx.write_back(pruned, model, strict_config=False)
    torch.testing.assert_close(written(TOKENS), pruned(TOKENS))


class Packed(torch.Tensor):
    """Says that it is floating, and keeps bytes and a scale."""

    @staticmethod
    def __new__(cls, numbers: Tensor, scale: Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)

    def __init__(self, numbers: Tensor, scale: Tensor) -> None:
        self.numbers, self.scale = numbers, scale

    def __tensor_flatten__(self) -> Any:
        return ["numbers", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, _: Any, size: Any, stride: Any) -> Any:
        return Packed(inner["numbers"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Packed(args[0].numbers, args[0].scale)
        raise NotImplementedError(str(func))


def test_quantised_weights_are_refused_by_name() -> None:
    x = torch.randn(2, 16)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    net[2].weight = nn.Parameter(Packed(torch.ones(8, 32, dtype=torch.int8), torch.ones(8)), requires_grad=False)
    with pytest.raises(InputError, match=r"'2\.weight' is quantised.*prune before quantising"):
        stp_fx.trace(net, x)


def test_weights_quantised_by_torchao_are_refused_by_name() -> None:
    quantization = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    quantization.quantize_(net, quantization.Int8WeightOnlyConfig())
    with pytest.raises(InputError, match=r"'0\.weight' is quantised.*prune before quantising"):
        stp_fx.trace(net, torch.randn(2, 16))
