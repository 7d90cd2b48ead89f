"""Charts with matplotlib, which is optional."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stp_fx.errors import InputError
from stp_fx.paths import path_of, replacing

__all__ = ["chart"]


@contextmanager
def chart(path: str | pathlib.Path, width: float, height: float) -> Iterator[Any]:
    """Axes to draw on, of a figure of so many inches that is written to ``path``; the suffix says the format.

    Raises:
        InputError: no path, matplotlib is not installed, or it does not know the suffix.
        FileError: the file cannot be written.
    """
    target = path_of(path)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("a plot needs matplotlib: pip install matplotlib (or stp-fx[demo])") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    known = figure.canvas.get_supported_filetypes()
    suffix = pathlib.Path(target).suffix.lstrip(".").lower()
    if suffix not in known:
        raise InputError(f"cannot plot to {pathlib.Path(target).name!r}: the suffix must be one of .{', .'.join(sorted(known))}")
    yield figure.add_subplot()
    with replacing(target) as partial:
        figure.savefig(partial, dpi=150, format=suffix)
