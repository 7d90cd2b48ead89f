"""Selection: from scores to a plan. Which units go for a ratio, a cost, and the constraints on every group."""

from __future__ import annotations

from stp_fx.analysis.plan import PrunePlan
from stp_fx.selection.arguments import TARGETS, Cost
from stp_fx.selection.products import PRODUCT_OPTIONS, carriers
from stp_fx.selection.scope import SCOPES, UnitOrder, local_fraction, order_units
from stp_fx.selection.target import select

__all__ = [
    "PRODUCT_OPTIONS",
    "SCOPES",
    "TARGETS",
    "Cost",
    "PrunePlan",
    "UnitOrder",
    "carriers",
    "local_fraction",
    "order_units",
    "select",
]
