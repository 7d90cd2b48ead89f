"""Files that a command writes, each whole or not at all; and the failure of a check."""

from __future__ import annotations

import os
import pathlib
import secrets

from torch import fx

from stp_fx.api import plan_of
from stp_fx.errors import StpFxError

__all__ = ["CheckFailed", "write_plan"]


class CheckFailed(StpFxError):
    """The work was done, but its result fails the check that was asked for."""


def write_plan(pruned: fx.GraphModule, path: pathlib.Path) -> None:
    """The plan as JSON, which :meth:`PrunePlan.from_json` reads."""
    partial = path.with_name(f".{path.name}-{secrets.token_hex(8)}.tmp")
    try:
        partial.write_text(plan_of(pruned).to_json() + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
