"""Groups of channels: how many of them keep a channel."""

from __future__ import annotations

from stp_fx.rules.domain import Dim
from stp_fx.rules.edit import Edit

__all__ = ["living_groups"]


def living_groups(edit: Edit, dim: Dim, groups: int) -> int:
    """How many of the ``groups`` outer blocks of a dimension keep any position."""
    return int(edit.keep(dim).reshape(groups, -1).any(axis=1).sum())
