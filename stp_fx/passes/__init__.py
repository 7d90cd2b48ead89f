"""Passes: analyse, collect, score, select, mask, remove. Each is a frozen dataclass, callable on a captured GraphModule."""

from stp_fx.passes.base import GraphPass, Pipeline
from stp_fx.passes.collect import CollectGradients, CollectStatistics
from stp_fx.passes.compensate import CompensateLeastSquares, CompensateMean
from stp_fx.passes.mask import MaskChannels
from stp_fx.passes.recalibrate import RecalibrateBatchNorm, UpdateBatchNormVariance
from stp_fx.passes.remove import RemoveChannels
from stp_fx.passes.select import ScoreUnits, SelectUnits
from stp_fx.passes.unmask import UnmaskChannels
from stp_fx.report.mean_check import MeanCheck, mean_check
from stp_fx.selection.latency_model import LatencyModel, latency_model

__all__ = [
    "CollectGradients",
    "CollectStatistics",
    "CompensateLeastSquares",
    "CompensateMean",
    "GraphPass",
    "LatencyModel",
    "MaskChannels",
    "MeanCheck",
    "Pipeline",
    "RecalibrateBatchNorm",
    "RemoveChannels",
    "ScoreUnits",
    "SelectUnits",
    "UnmaskChannels",
    "UpdateBatchNormVariance",
    "latency_model",
    "mean_check",
]
