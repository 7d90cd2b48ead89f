"""What each ATen op does to channels: one entry per op, read by the analysis and by the cost model."""

from stp_fx.rules import (
    attention,
    contraction,
    creation,
    index,
    join,
    module_literals,
    norm,
    piece_literals,
    pool,
    shape,
    size_literals,
)
from stp_fx.rules.domain import FIXED, Context, Dim, Dims, Factor, dim_size, fixed_dim, fixed_dims, has_ids
from stp_fx.rules.notation import Pattern, parse
from stp_fx.rules.pointwise import is_pointwise, pointwise
from stp_fx.rules.registry import apply_pattern, registered, rule, rule_for
from stp_fx.rules.schema import tensors_in

__all__ = [
    "FIXED",
    "Context",
    "Dim",
    "Dims",
    "Factor",
    "Pattern",
    "apply_pattern",
    "attention",
    "contraction",
    "creation",
    "dim_size",
    "fixed_dim",
    "fixed_dims",
    "has_ids",
    "index",
    "is_pointwise",
    "join",
    "module_literals",
    "norm",
    "parse",
    "piece_literals",
    "pointwise",
    "pool",
    "registered",
    "rule",
    "rule_for",
    "shape",
    "size_literals",
    "tensors_in",
]
