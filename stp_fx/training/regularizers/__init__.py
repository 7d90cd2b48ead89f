"""Regularizers: penalties that make unimportant units small while the network trains."""

import importlib
import pkgutil

from stp_fx.training.regularizers.base import BaseRegularizer, Regularizer, known_regularizers, register, resolve
from stp_fx.training.regularizers.entropy import VarianceEntropy
from stp_fx.training.regularizers.gmp import GMP
from stp_fx.training.regularizers.growing import GrowingReg
from stp_fx.training.regularizers.norms import BNScaleL1, GroupLasso, WeightL21

# A new regularizer is one file of this folder: it is found by being there.
for _found in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_found.name}")

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
