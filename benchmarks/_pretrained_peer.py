"""torch-pruning 1.6.1 on the networks of ``_pretrained.py``: what its user has to say, and the repairs that they can make."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
from _pretrained_network import Network
from torch import Tensor, nn

import stp_fx

__all__ = ["VARIANTS", "macs", "to_target"]

NEAR = 0.995  # of the MACs allowed: near enough to end the search


@dataclasses.dataclass(frozen=True)
class Variant:
    """How a user may call it: options for its pruner, and what they mend afterwards."""

    options: Callable[[nn.Module, float], dict[str, Any]]
    repair: Callable[[nn.Module, Any], None] = lambda model, pruner: None


def _in_features(model: Any, pruner: Any) -> None:
    model.in_features = model.classifier.in_features


def _attentions(model: Any) -> list[Any]:
    return [layer.attention.self for layer in model.bert.encoder.layer]


def _held(model: Any) -> list[nn.Module]:
    """For the embedding to keep its width: all that writes to the residual stream."""
    layers = [module for layer in model.bert.encoder.layer for module in (layer.attention.output.dense, layer.output.dense)]
    return [model.bert.embeddings.word_embeddings, *layers]


def _heads(model: Any) -> dict[nn.Module, int]:
    return {m: a.num_attention_heads for a in _attentions(model) for m in (a.query, a.key, a.value)}


def _numbers(model: Any, pruner: Any) -> None:
    """The peer changes layers, not the numbers in the modules around them."""
    for attention in _attentions(model):
        attention.num_attention_heads = pruner.num_heads[attention.query]
        attention.attention_head_size = attention.query.out_features // attention.num_attention_heads


VARIANTS: dict[str, dict[str, Variant]] = {
    "crepe": {
        "as it comes": Variant(lambda model, ratio: {"ignored_layers": [model.classifier]}),
        "in_features set": Variant(lambda model, ratio: {"ignored_layers": [model.classifier]}, _in_features),
        "conv6 whole": Variant(lambda model, ratio: {"ignored_layers": [model.classifier, model.conv6]}),
    },
    "minilm": {
        "as it comes": Variant(lambda model, ratio: {"num_heads": _heads(model)}),
        "all widths, numbers set": Variant(lambda model, ratio: {"num_heads": _heads(model)}, _numbers),
        "MLP": Variant(lambda model, ratio: {"ignored_layers": [*_held(model), *_heads(model)]}),
        "MLP and heads": Variant(
            lambda model, ratio: {
                "ignored_layers": _held(model), "num_heads": _heads(model), "prune_num_heads": True,
                "prune_head_dims": False, "head_pruning_ratio": ratio,
            },
            _numbers,
        ),
        "MLP and head widths": Variant(
            lambda model, ratio: {"ignored_layers": _held(model), "num_heads": _heads(model)}, _numbers
        ),
    },
    "resemblyzer": {"as it comes": Variant(lambda model, ratio: {"ignored_layers": [model.linear]})},
    "silero": {"as it comes": Variant(lambda model, ratio: {"ignored_layers": [model.final_conv]})},
    "g2p": {"as it comes": Variant(lambda model, ratio: {"ignored_layers": [model.fc]})},
}  # fmt: skip


def to_target(network: Network, variant: Variant, everywhere: bool, limit: float) -> tuple[nn.Module | None, str]:
    """Bisection over its ratio: the largest network with at most so many MACs, or what it failed with."""
    low, high, best = 0.0, 0.95, None
    error = "no ratio up to 0.95 removes as much"
    for _ in range(8):
        ratio = (low + high) / 2
        try:
            pruned = _once(network, variant, everywhere, ratio)
            left = macs(pruned, network.example)
        except Exception as failure:  # whatever a peer fails with is a finding
            error = f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
            low = ratio
            continue
        if left > limit:
            low = ratio
            continue
        high, best = ratio, pruned
        if left > NEAR * limit:
            break
    return best, error


def _once(network: Network, variant: Variant, everywhere: bool, ratio: float) -> nn.Module:
    import torch_pruning as tp

    model = copy.deepcopy(network.model)
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(
            model, network.example, importance=importance, pruning_ratio=ratio, global_pruning=everywhere,
            **variant.options(model, ratio),
        )  # fmt: skip
        pruner.step()
    variant.repair(model, pruner)
    with torch.no_grad():
        out = model(*network.example)
    if len(out) != len(network.example[0]):
        raise ValueError(f"it gives {len(out)} rows for {len(network.example[0])} inputs")
    return model


def macs(model: nn.Module, example: tuple[Tensor, ...]) -> int:
    return stp_fx.cost(stp_fx.trace(model, example)).macs
