"""Changes of basis by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from stp_fx.checks import is_a, shown
from stp_fx.errors import InputError
from stp_fx.measure.calibration import reiterable
from stp_fx.passes.base import GraphPass
from stp_fx.passes.rotate_residual import RotateResidual

__all__ = ["BasisName", "basis_named"]

BasisName = Literal["rotate"]


def basis_named(name: str | None, calibration: Iterable[Any] | None) -> GraphPass | None:
    """The pass that changes the basis; None for none. ``calibration``: data, if there is any.

    Raises:
        InputError: an unknown name.
    """
    if name is None:
        return None
    if not is_a(name, str) or name != "rotate":
        raise InputError(f"unknown basis {shown(name)}; known: None, 'rotate'")
    return RotateResidual(None if calibration is None else reiterable(calibration))
