"""Files that a command writes, each whole or not at all; and the failure of a check."""

from __future__ import annotations

import pathlib

from torch import fx

from stp_fx.api import plan_of
from stp_fx.errors import StpFxError
from stp_fx.paths import replacing

__all__ = ["CheckFailed", "write_plan"]


class CheckFailed(StpFxError):
    """The work was done, but its result fails the check that was asked for."""


def write_plan(pruned: fx.GraphModule, path: pathlib.Path) -> None:
    """The plan as JSON, which :meth:`PrunePlan.from_json` reads."""
    with replacing(str(path)) as partial:
        pathlib.Path(partial).write_text(plan_of(pruned).to_json() + "\n", encoding="utf-8")
