"""Selection: from scores to a plan. Which units are removed for a ratio or a cost, under the constraints on every group."""

from __future__ import annotations

from stp_fx.analysis.plan import PrunePlan
from stp_fx.selection.arguments import TARGETS, Cost
from stp_fx.selection.choice import Choice, choose, select
from stp_fx.selection.products import PRODUCT_OPTIONS, carriers
from stp_fx.selection.ratios import merge_ratios
from stp_fx.selection.result import Selected, Shortfall
from stp_fx.selection.scope import SCOPES, UnitOrder, local_fraction, order_units
from stp_fx.selection.selection import Selection
from stp_fx.selection.target import select_units

__all__ = [
    "PRODUCT_OPTIONS",
    "SCOPES",
    "TARGETS",
    "Choice",
    "Cost",
    "PrunePlan",
    "Selected",
    "Selection",
    "Shortfall",
    "UnitOrder",
    "carriers",
    "choose",
    "local_fraction",
    "merge_ratios",
    "order_units",
    "select",
    "select_units",
]
