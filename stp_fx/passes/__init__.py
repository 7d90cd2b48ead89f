"""Passes: collect, score, select, compensate, mask, remove. Each is a frozen dataclass, callable on a captured GraphModule."""

import importlib
import pkgutil

from stp_fx.passes.artifacts import Artifacts, Outcome
from stp_fx.passes.base import GraphPass, known_passes
from stp_fx.passes.collect_gradients import CollectGradients
from stp_fx.passes.collect_statistics import CollectStatistics
from stp_fx.passes.compensate_least_squares import CompensateLeastSquares
from stp_fx.passes.compensate_mean import CompensateMean
from stp_fx.passes.distill import Distill
from stp_fx.passes.layer_norm_to_rms_norm import LayerNormToRMSNorm
from stp_fx.passes.mask import MaskChannels
from stp_fx.passes.mask_blocks import MaskBlocks
from stp_fx.passes.measure_damage import MeasureDamage
from stp_fx.passes.pipeline import Pipeline
from stp_fx.passes.recalibrate import RecalibrateBatchNorm
from stp_fx.passes.reconstruct_blockwise import ReconstructBlockwise
from stp_fx.passes.reconstruct_sequentially import ReconstructSequentially
from stp_fx.passes.remove import RemoveChannels
from stp_fx.passes.remove_blocks import RemoveBlocks
from stp_fx.passes.rotate_heads import RotateHeads
from stp_fx.passes.rotate_residual import RotateResidual
from stp_fx.passes.score import ScoreUnits
from stp_fx.passes.select import SelectUnits
from stp_fx.passes.select_blocks import SelectBlocks
from stp_fx.passes.unmask import UnmaskChannels
from stp_fx.passes.update_variance import UpdateBatchNormVariance
from stp_fx.report.mean_check import MeanCheck, mean_check
from stp_fx.selection.latency_model import LatencyModel, latency_model
from stp_fx.selection.memory_model import MemoryModel, memory_model

# A new pass is one file of this folder: it is found by being there.
for _found in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_found.name}")

__all__ = [
    "Artifacts",
    "CollectGradients",
    "CollectStatistics",
    "CompensateLeastSquares",
    "CompensateMean",
    "Distill",
    "GraphPass",
    "LatencyModel",
    "LayerNormToRMSNorm",
    "MaskBlocks",
    "MaskChannels",
    "MeanCheck",
    "MeasureDamage",
    "MemoryModel",
    "Outcome",
    "Pipeline",
    "RecalibrateBatchNorm",
    "ReconstructBlockwise",
    "ReconstructSequentially",
    "RemoveBlocks",
    "RemoveChannels",
    "RotateHeads",
    "RotateResidual",
    "ScoreUnits",
    "SelectBlocks",
    "SelectUnits",
    "UnmaskChannels",
    "UpdateBatchNormVariance",
    "known_passes",
    "latency_model",
    "mean_check",
    "memory_model",
]
