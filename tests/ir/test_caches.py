"""Language models are captured as users call them: without the cache that their configuration asks for."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

import stp_fx
from stp_fx.ir import provenance_of

IDS = torch.randint(0, 90, (2, 9))


def models() -> dict[str, Any]:
    transformers = pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 90}
    return {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2)),
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=90)),
        "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)),
    }


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_plain_arguments(name: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = models()[name]().eval()
    with caplog.at_level(logging.INFO):
        gm = stp_fx.trace(model, IDS)
    assert provenance_of(gm).frontend == "fx"
    assert model.config.use_cache is True
    assert "use_cache=False" in caplog.text
    pruned = stp_fx.prune_graph(gm, ratio=0.5, products="outer")
    validation = provenance_of(pruned).validation
    assert {"eval", "train", "masked = removed"} <= set(validation.ran), validation
    torch.testing.assert_close(gm(IDS[:1]).logits, model(IDS[:1]).logits)


def test_a_cache_that_is_asked_for_stays_asked_for() -> None:
    class Config:
        def __init__(self, **values: Any) -> None:
            self.__dict__.update(values)

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
            self.config = Config(use_cache=True, text_config=Config(use_cache=True), other=1)

        def forward(self, x: torch.Tensor) -> Any:
            y = self.a(x)
            kept = self.config.use_cache, self.config.text_config.use_cache  # type: ignore[attr-defined]
            return (self.b(y), y) if any(kept) else self.b(y)

    model = Keeps().eval()
    gm = stp_fx.trace(model, torch.randn(2, 4))
    assert isinstance(gm(torch.randn(2, 4)), torch.Tensor)
    assert (model.config.use_cache, model.config.text_config.use_cache) == (True, True)
    written = stp_fx.write_back(stp_fx.prune_graph(gm, ratio=0.5), model)
    assert written.a.weight.shape == (4, 4)
