"""Files that a command writes, each whole or not at all; and the failure of a check."""

from __future__ import annotations

import pathlib

from torch import fx

from stp_fx.analysis.plan import PrunePlan
from stp_fx.api import analyze, plan_of
from stp_fx.errors import FileError, StpFxError
from stp_fx.paths import replacing

__all__ = ["CheckFailed", "read_plan", "write_plan"]


class CheckFailed(StpFxError):
    """The work was done, but its result fails the check that was asked for."""


def write_plan(pruned: fx.GraphModule, path: pathlib.Path) -> None:
    """The plan as JSON, which :meth:`PrunePlan.from_json` reads."""
    with replacing(str(path)) as partial:
        pathlib.Path(partial).write_text(plan_of(pruned).to_json() + "\n", encoding="utf-8")


def read_plan(path: str, gm: fx.GraphModule) -> PrunePlan:
    """The plan in the file that ``--plan`` names, of the graph's axes.

    Raises:
        FileError: the file cannot be read.
        PlanError: it holds no plan, or one for other axes.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"--plan: {path!r} cannot be read: {error}") from error
    return PrunePlan.from_json(text, {(axis.tensor, axis.dim): axis.size for axis in analyze(gm).axes})
