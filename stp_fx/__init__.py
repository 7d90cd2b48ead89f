"""stp_fx: structured pruning for PyTorch as a compiler would do it."""

from stp_fx import criteria, errors, passes
from stp_fx.api import (
    Block,
    ChannelGraph,
    Cost,
    Report,
    RunReport,
    Selection,
    Sensitivity,
    Sweep,
    Validation,
    analyze,
    apply_plan,
    blocks_of,
    compare,
    cost,
    estimate_keep_ratio,
    plan_of,
    prune_graph,
    report_of,
    score_blocks,
    sensitivity,
    sweep,
    trace,
)
from stp_fx.errors import StpFxError
from stp_fx.explorer import Explorer, explore
from stp_fx.io import load, plan_shards, prune_shards, save
from stp_fx.selection import PrunePlan
from stp_fx.submodule import prune_submodule
from stp_fx.training import Distillation, PATPassManager, regularizers, schedules
from stp_fx.writeback import write_back

__all__ = [
    "Block",
    "ChannelGraph",
    "Cost",
    "Distillation",
    "Explorer",
    "PATPassManager",
    "PrunePlan",
    "Report",
    "RunReport",
    "Selection",
    "Sensitivity",
    "StpFxError",
    "Sweep",
    "Validation",
    "analyze",
    "apply_plan",
    "blocks_of",
    "compare",
    "cost",
    "criteria",
    "errors",
    "estimate_keep_ratio",
    "explore",
    "load",
    "passes",
    "plan_of",
    "plan_shards",
    "prune_graph",
    "prune_shards",
    "prune_submodule",
    "regularizers",
    "report_of",
    "save",
    "schedules",
    "score_blocks",
    "sensitivity",
    "sweep",
    "trace",
    "write_back",
]

__version__ = "0.1.0"
