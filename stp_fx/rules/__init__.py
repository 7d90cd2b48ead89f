"""The effect of each ATen op on channels: one entry per op, read by the analysis and by the cost model."""

from stp_fx.rules import ops
from stp_fx.rules.call import OpCall, dim_list, tensors_in
from stp_fx.rules.domain import FIXED, Context, Dim, Dims, Factor, TensorDims, dim_size, fixed_dim, fixed_dims, has_ids
from stp_fx.rules.mapping import BIAS, BUFFER, SCALE, FactorMapping, apply_pattern, contract_pattern, weight
from stp_fx.rules.notation import Pattern, parse
from stp_fx.rules.pointwise import is_pointwise, pointwise
from stp_fx.rules.registry import Entry, entries, entry_of, overloads, registered, rule, rule_for
from stp_fx.rules.samples import arguments

__all__ = [
    "BIAS",
    "BUFFER",
    "FIXED",
    "SCALE",
    "Context",
    "Dim",
    "Dims",
    "Entry",
    "Factor",
    "FactorMapping",
    "OpCall",
    "Pattern",
    "TensorDims",
    "apply_pattern",
    "arguments",
    "contract_pattern",
    "dim_list",
    "dim_size",
    "entries",
    "entry_of",
    "fixed_dim",
    "fixed_dims",
    "has_ids",
    "is_pointwise",
    "ops",
    "overloads",
    "parse",
    "pointwise",
    "registered",
    "rule",
    "rule_for",
    "tensors_in",
    "weight",
]
