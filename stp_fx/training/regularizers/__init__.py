"""Regularizers: what makes the units that will go small, or the others large, while the network trains."""

from stp_fx.training.regularizers.base import BaseRegularizer, Regularizer, known_regularizers, register, resolve
from stp_fx.training.regularizers.entropy import VarianceEntropy
from stp_fx.training.regularizers.growing import GMP, GrowingReg
from stp_fx.training.regularizers.norms import BNScaleL1, GroupLasso, WeightL21

__all__ = [
    "GMP",
    "BNScaleL1",
    "BaseRegularizer",
    "GroupLasso",
    "GrowingReg",
    "Regularizer",
    "VarianceEntropy",
    "WeightL21",
    "known_regularizers",
    "register",
    "resolve",
]
