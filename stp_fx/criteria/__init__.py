"""Criteria: how important each unit of a group is. Pure functions of groups and the tensors they touch."""

from __future__ import annotations

import importlib
import pkgutil

from stp_fx.criteria.auto import Auto, Chosen
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
from stp_fx.criteria.bn_scale import BnScale
from stp_fx.criteria.cost_aware import CostAware
from stp_fx.criteria.costs import ActivationBytes, CostModel, Latency, Macs, Params, Table
from stp_fx.criteria.fpgm import Fpgm
from stp_fx.criteria.hessian import Hessian
from stp_fx.criteria.magnitude import Magnitude, lamp
from stp_fx.criteria.norms import power_sums
from stp_fx.criteria.random import Random
from stp_fx.criteria.reconstruction import Reconstruction
from stp_fx.criteria.reduce import NORMALIZERS, REDUCTIONS, normalize_scores, reduce_scores, sum_by_unit
from stp_fx.criteria.scores import Scores, score
from stp_fx.criteria.taylor import Taylor
from stp_fx.criteria.variance import Variance

# A new criterion is one file of this folder: it is found by being there.
for _found in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_found.name}")

__all__ = [
    "NORMALIZERS",
    "REDUCTIONS",
    "ActivationBytes",
    "Auto",
    "BnScale",
    "Chosen",
    "CostAware",
    "CostModel",
    "Criterion",
    "Fpgm",
    "Hessian",
    "Latency",
    "Macs",
    "Magnitude",
    "Params",
    "Random",
    "Reconstruction",
    "ScoreContext",
    "Scores",
    "Table",
    "Taylor",
    "Variance",
    "as_criterion",
    "known_criteria",
    "lamp",
    "needs_of",
    "normalize_scores",
    "power_sums",
    "reduce_scores",
    "register",
    "resolve",
    "score",
    "score_groups",
    "sum_by_unit",
]
