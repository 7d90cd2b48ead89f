"""stp_fx: structured pruning for PyTorch as a compiler would do it."""

from stp_fx import criteria, errors, passes
from stp_fx.api import ChannelGraph, Cost, Report, analyze, apply_plan, compare, cost, plan_of, prune_graph, trace
from stp_fx.errors import StpFxError
from stp_fx.selection import PrunePlan

__all__ = [
    "ChannelGraph",
    "Cost",
    "PrunePlan",
    "Report",
    "StpFxError",
    "analyze",
    "apply_plan",
    "compare",
    "cost",
    "criteria",
    "errors",
    "passes",
    "plan_of",
    "prune_graph",
    "trace",
]

__version__ = "0.1.0"
