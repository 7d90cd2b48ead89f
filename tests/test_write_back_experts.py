"""Hugging Face: a class with fewer experts has a config that says so; it generates, and loads in a fresh process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import stp_fx

transformers = pytest.importorskip("transformers", exc_type=ImportError)

IDS = torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(0))
LAYERS, EXPERTS, REMOVED = 2, 6, [1, 4]
COMMON = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


def mixtral() -> Any:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**COMMON, num_local_experts=EXPERTS))


def qwen3_moe() -> Any:
    more = {"head_dim": 8, "num_experts": EXPERTS, "moe_intermediate_size": 8, "norm_topk_prob": True}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**COMMON, **more))


def without(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The logits of the class where the router's logits of the removed experts are ``-inf``."""
    linear, routers = F.linear, {id(layer.mlp.gate.weight) for layer in model.model.layers}

    def routed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        result = linear(x, weight, bias)
        return result.index_fill(-1, torch.tensor(REMOVED), -torch.inf) if id(weight) in routers else result

    with mock.patch.object(F, "linear", routed):
        return model(ids).logits


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="older code of transformers asks how many tokens an expert has")
@pytest.mark.parametrize(("build", "field"), [(mixtral, "num_local_experts"), (qwen3_moe, "num_experts")])
def test_fewer_experts(build: Any, field: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build().eval()
    gm = stp_fx.trace(model, IDS, outputs="logits")
    plan = stp_fx.analyze(gm).plan_for({f"model.layers.{k}.mlp.gate": REMOVED for k in range(LAYERS)})
    pruned, masked = stp_fx.apply_plan(gm, plan), stp_fx.apply_plan(gm, plan, mask=True)
    more = torch.randint(0, 32, (3, 9))
    with torch.no_grad():
        expected = without(model, more)
        assert (expected - model(more).logits).abs().max() > 0.1, "the removed experts were chosen before"
        for graph in (pruned, masked):
            torch.testing.assert_close(graph(more).logits, expected, rtol=1e-4, atol=1e-5)
    written: Any = stp_fx.write_back(pruned, model, IDS)
    assert getattr(written.config, field) == EXPERTS - len(REMOVED)
    with torch.no_grad():
        torch.testing.assert_close(written(more).logits, expected, rtol=1e-4, atol=1e-5)
    written.save_pretrained(tmp_path / "model")
    torch.save(more, tmp_path / "ids.pt")
    torch.save(expected, tmp_path / "expected.pt")
    program = f"""
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r}).eval()
ids, expected = (torch.load({str(tmp_path)!r} + "/" + name) for name in ("ids.pt", "expected.pt"))
with torch.no_grad():
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
assert model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
