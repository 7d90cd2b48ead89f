"""Graphs without whole layers in the original class: containers, configs and indices, by what is computed in double precision."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import stp_fx
from stp_fx.errors import WriteBackError
from stp_fx.passes import RemoveBlocks

IDS = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))
GIVEN = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def language_model(name: str) -> Any:
    """A network of four small layers, with weights that make attention anything but uniform."""
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    torch.manual_seed(0)
    common: dict[str, Any] = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "max_position_embeddings": 64, "initializer_range": 0.2,
    }  # fmt: skip
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, num_key_value_heads=2)).eval()
    if name == "qwen3":
        kinds = ["sliding_attention", "full_attention"] * 2
        more = {"num_key_value_heads": 2, "head_dim": 8, "layer_types": kinds, "sliding_window": 4, "use_sliding_window": True}
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**common, **more)).eval()
    if name == "qwen3_moe":
        more = {"num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        config = transformers.Qwen3MoeConfig(**common, **more, mlp_only_layers=[2])
        return transformers.Qwen3MoeForCausalLM(config).eval()
    if name == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(**common)).eval()
    raise KeyError(name)


def shortened(module: nn.Module, *names: str, example: Any = (), **kwargs: Any) -> fx.GraphModule:
    return RemoveBlocks(names)(stp_fx.trace(module, example, kwargs=kwargs or None)).graph_module


class _Hands(nn.Module):
    """An entry that hands on what it is given."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.attention_type = getattr(like, "attention_type", None)

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return x


def without_entries(module: nn.Module, *names: str) -> nn.Module:
    """The original in double precision, in which entries hand on what they are given."""
    result = copy.deepcopy(module)
    for name in names:
        result.set_submodule(name, _Hands(module.get_submodule(name)))
    return result.double()


def greedy(graph: fx.GraphModule, ids: torch.Tensor, steps: int) -> torch.Tensor:
    for _ in range(steps):
        with torch.no_grad():
            scores = next(iter(graph(input_ids=ids, attention_mask=torch.ones_like(ids)).values()))
        ids = torch.cat([ids, scores[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize(
    ("name", "gone", "field", "value"),
    [
        ("llama", (1,), "num_hidden_layers", 3),
        ("qwen3", (0, 2), "layer_types", ["full_attention"] * 2),
        pytest.param(
            "qwen3_moe",
            (1,),
            "mlp_only_layers",
            [1],
            marks=pytest.mark.skipif(
                not hasattr(torch.nn.functional, "grouped_mm"), reason="older code asks how many tokens an expert has"
            ),
        ),
    ],
)
def test_language_models_without_layers(name: str, gone: tuple[int, ...], field: str, value: Any) -> None:
    model = language_model(name)
    names = [f"model.layers.{k}" for k in gone]
    pruned = shortened(model, *names, **GIVEN, use_cache=False)
    before = copy.deepcopy(model.config.to_dict())
    result: Any = stp_fx.write_back(pruned, model)
    assert type(result) is type(model)
    assert getattr(result.config, field) == value
    assert result.config.num_hidden_layers == len(result.model.layers) == 4 - len(gone)
    assert model.config.to_dict() == before
    assert [layer.self_attn.layer_idx for layer in result.model.layers] == list(range(4 - len(gone)))
    dtype, near = (torch.float32, 1e-5) if name == "qwen3_moe" else (torch.float64, 1e-9)  # torch's grouped_mm knows no double
    with torch.no_grad():
        found = copy.deepcopy(result).to(dtype)(**GIVEN, use_cache=False).logits
        wanted = without_entries(model, *names).to(dtype)(**GIVEN, use_cache=False).logits
        torch.testing.assert_close(found, wanted, rtol=near, atol=near)
    for cached in (True, False):
        tokens = result.generate(**GIVEN, max_new_tokens=5, do_sample=False, use_cache=cached, pad_token_id=0, eos_token_id=None)
        assert torch.equal(tokens, greedy(pruned, IDS, 5))


FRESH = """
import sys, torch, transformers
model = transformers.LlamaForCausalLM.from_pretrained("small").eval()
given = torch.load("given.pt")
with torch.no_grad():
    logits = model(**given).logits
tokens = model.generate(**given, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
torch.save((logits, tokens, len(model.model.layers), "stp_fx" in sys.modules), "out.pt")
"""


def test_layers_and_channels_survive_a_fresh_process(tmp_path: Path) -> None:
    model = language_model("llama")
    pruned = stp_fx.prune_graph(shortened(model, "model.layers.0", "model.layers.2", **GIVEN, use_cache=False), products="outer")
    result: Any = stp_fx.write_back(pruned, model)
    assert (result.config.num_hidden_layers, result.config.hidden_size, result.config.num_key_value_heads) == (2, 16, 1)
    result.save_pretrained(tmp_path / "small")
    torch.save(GIVEN, tmp_path / "given.pt")
    subprocess.run([sys.executable, "-c", FRESH], check=True, capture_output=True, cwd=tmp_path)
    logits, tokens, count, ours = torch.load(tmp_path / "out.pt")
    assert (count, ours) == (2, False)
    with torch.no_grad():
        torch.testing.assert_close(logits, next(iter(pruned(**GIVEN).values())), rtol=1e-4, atol=1e-4)
    assert torch.equal(tokens, greedy(pruned, IDS, 5))


def vision(name: str) -> tuple[nn.Module, torch.Tensor, tuple[str, ...]]:
    models = pytest.importorskip("torchvision", exc_type=ImportError).models
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    if name == "resnet":
        return models.resnet50(num_classes=5, width_per_group=8).eval(), x, ("layer2.1", "layer3.4")
    if name == "vit":
        return models.VisionTransformer(32, 8, 3, 2, 16, 32, num_classes=5).eval(), x, ("encoder.layers.encoder_layer_1",)
    if name == "swin":
        return models.SwinTransformer([4, 4], 16, [2, 2], [2, 2], [4, 4], num_classes=5).eval(), x, ("features.1.0",)
    setting = models.convnext.CNBlockConfig
    return models.ConvNeXt([setting(8, 16, 3), setting(16, None, 2)], num_classes=5).eval(), x, ("features.1.0", "features.3.1")


@pytest.mark.parametrize("name", ["resnet", "vit", "swin", "convnext"])
def test_vision_models_without_layers(name: str) -> None:
    module, x, gone = vision(name)
    pruned = shortened(module, *gone, example=x)
    result: Any = stp_fx.write_back(pruned, module)
    assert type(result) is type(module)
    assert sum(p.numel() for p in result.parameters()) == sum(p.numel() for p in pruned.parameters())
    with torch.no_grad():
        found = copy.deepcopy(result).double()(x.double())
        torch.testing.assert_close(found, without_entries(module, *gone)(x.double()), rtol=1e-9, atol=1e-9)
    if name == "resnet":
        smaller = stp_fx.prune_graph(pruned)
        torch.testing.assert_close(stp_fx.write_back(smaller, module)(x), smaller(x), rtol=1e-4, atol=1e-4)


def test_a_branch_of_a_layer_that_stays_is_refused() -> None:
    model = language_model("llama")
    pruned = shortened(model, "model.layers.1.mlp", **GIVEN, use_cache=False)
    with pytest.raises(WriteBackError, match=r"'?model\.layers\.1\.mlp'?.*'model\.layers\.1\.\S+'.*[Rr]emove all blocks"):
        stp_fx.write_back(pruned, model)


def test_a_layer_that_ends_in_a_norm_is_refused() -> None:
    model = language_model("bert")
    pruned = shortened(model, "bert.encoder.layer.1", "bert.encoder.layer.1.attention", **GIVEN)
    with pytest.raises(WriteBackError, match=r"LayerNorm\.weight'.*ends in a norm"):
        stp_fx.write_back(pruned, model)


class _Layer(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.inner = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.inner(x)) / (self.index + 1)


class _Stack(nn.Module):
    """Layers that compute with their positions, or are read by them."""

    def __init__(self, chosen: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(0 if chosen else k) for k in range(4))
        self.chosen = chosen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = []
        for layer in self.layers:
            x = layer(x)
            outputs.append(x)
        return x + outputs[1] if self.chosen else x


@pytest.mark.parametrize(("chosen", "gone"), [(False, "layers.0"), (True, "layers.0")])
def test_positions_that_mean_something_else_are_refused(chosen: bool, gone: str) -> None:
    torch.manual_seed(0)
    module, x = _Stack(chosen), torch.randn(2, 6)
    pruned = shortened(module, gone, example=x)
    with pytest.raises(WriteBackError):
        stp_fx.write_back(pruned, module)


def test_the_last_layers_can_always_go() -> None:
    torch.manual_seed(0)
    module, x = _Stack(False).double(), torch.randn(2, 6, dtype=torch.double)
    pruned = shortened(module, "layers.2", "layers.3", example=x)
    result: Any = stp_fx.write_back(pruned, module)
    assert (len(result.layers), len(module.layers)) == (2, 4)  # type: ignore[arg-type]
    torch.testing.assert_close(result(x), without_entries(module, "layers.2", "layers.3")(x))
    assert not {id(p) for p in result.parameters()} & {id(p) for p in (*module.parameters(), *pruned.parameters())}
