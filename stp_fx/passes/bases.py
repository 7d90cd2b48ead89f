"""Changes of basis by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import fx

from stp_fx.checks import is_a, shown
from stp_fx.errors import InputError, NothingToRotateError
from stp_fx.measure.calibration import reiterable
from stp_fx.passes.base import GraphPass
from stp_fx.passes.rotate_heads import RotateHeads
from stp_fx.passes.rotate_residual import RotateResidual

__all__ = ["BasisName", "check_basis_name", "in_basis"]

BasisName = Literal["rotate"]


def in_basis(gm: fx.GraphModule, name: str | None, calibration: Iterable[Any] | None) -> fx.GraphModule:
    """``gm`` in another basis: "rotate" turns residual streams and heads, as far as either can be; None is ``gm`` itself.

    ``calibration``: data for principal components, if there is any.

    Raises:
        InputError: an unknown name.
        NothingToRotateError: neither streams nor heads can be turned; says why.
    """
    check_basis_name(name)
    if name is None:
        return gm
    batches = None if calibration is None else reiterable(calibration)
    passes: tuple[GraphPass, ...] = (RotateResidual(batches), RotateHeads(batches))
    reasons: list[str] = []
    for each in passes:
        try:
            gm = each(gm).graph_module
        except NothingToRotateError as error:
            reasons.append(str(error))
    if len(reasons) == len(passes):
        raise NothingToRotateError("; ".join(reasons))
    return gm


def check_basis_name(name: object) -> None:
    """Raises for what is no name of a basis.

    Raises:
        InputError: names the known ones.
    """
    if name is not None and (not is_a(name, str) or name != "rotate"):
        raise InputError(f"unknown basis {shown(name)}; known: None, 'rotate'")
