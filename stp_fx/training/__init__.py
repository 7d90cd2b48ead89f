"""Training beside pruning: schedules of ratios, and regularizers that make unimportant units small."""

from stp_fx.training import schedules

__all__ = ["schedules"]
