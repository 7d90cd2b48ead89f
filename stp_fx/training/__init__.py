"""Training beside pruning: the manager that interleaves passes with a loop, schedules of ratios, regularizers that make
unimportant units small, and distillation."""

from stp_fx.training import regularizers, schedules
from stp_fx.training.distillation import Distillation
from stp_fx.training.manager import PATPassManager

__all__ = ["Distillation", "PATPassManager", "regularizers", "schedules"]
