"""Training beside pruning: the manager that interleaves passes with a loop, schedules of ratios, and regularizers that make
unimportant units small."""

from stp_fx.training import regularizers, schedules
from stp_fx.training.manager import PATPassManager

__all__ = ["PATPassManager", "regularizers", "schedules"]
