"""Passes: analyse, collect, score, select, mask, remove. Each is a frozen dataclass, callable on a captured GraphModule."""

from stp_fx.passes.base import GraphPass, Pipeline
from stp_fx.passes.collect import CollectGradients, CollectStatistics
from stp_fx.passes.mask import MaskChannels
from stp_fx.passes.remove import RemoveChannels
from stp_fx.passes.select import ScoreUnits, SelectUnits

__all__ = [
    "CollectGradients",
    "CollectStatistics",
    "GraphPass",
    "MaskChannels",
    "Pipeline",
    "RemoveChannels",
    "ScoreUnits",
    "SelectUnits",
]
