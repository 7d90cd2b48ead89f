"""Criteria: how important each unit of a group is. Pure functions of groups and the tensors they touch."""

from __future__ import annotations

from stp_fx.criteria.base import (
    Criterion,
    ScoreContext,
    as_criterion,
    known_criteria,
    needs_of,
    register,
    resolve,
    score_groups,
)
from stp_fx.criteria.magnitude import Magnitude, lamp
from stp_fx.criteria.norms import power_sums
from stp_fx.criteria.random import Random
from stp_fx.criteria.reduce import NORMALIZERS, REDUCTIONS, normalize_scores, reduce_scores, sum_by_unit

__all__ = [
    "NORMALIZERS",
    "REDUCTIONS",
    "Criterion",
    "Magnitude",
    "Random",
    "ScoreContext",
    "as_criterion",
    "known_criteria",
    "lamp",
    "needs_of",
    "normalize_scores",
    "power_sums",
    "reduce_scores",
    "register",
    "resolve",
    "score_groups",
    "sum_by_unit",
]
