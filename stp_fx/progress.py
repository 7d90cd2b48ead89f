"""Progress of long work: a bar on standard error, or calls of a function.

The choice travels with the calibration data (:func:`carrying`), so that no pass and no measurement needs an argument for it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from stp_fx.checks import shown
from stp_fx.errors import InputError

__all__ = ["Progress", "carrying", "progress_of", "stepped", "steps"]

T = TypeVar("T")

Progress = bool | Callable[[str, int, int | None], object] | None
"""None: a bar on a terminal. True: a bar, also in a notebook or a log. False: nothing. A function: ``(work, done, total)`` after
every step, and once before the first; ``total`` is None where it is not known."""


def carrying(data: Any, progress: Progress) -> Any:
    """``data``, which carries the choice of ``progress`` to everything that reads it; None for None.

    Raises:
        InputError: ``progress`` is neither None, True, False, nor a function.
    """
    if progress is not None and not isinstance(progress, bool) and not callable(progress):
        raise InputError(f"`progress` is {shown(progress)}; give None, True, False, or a function (work, done, total)")
    return data if progress is None or data is None else _Watched(data, progress)


def progress_of(data: Any) -> Progress:
    """The choice that ``data`` carries."""
    return data.progress if isinstance(data, _Watched) else None


@contextlib.contextmanager
def steps(work: str, total: int | None, progress: Progress = None) -> Iterator[Callable[[], None]]:
    """A block with ``total`` steps; gives the function to call after each of them."""
    if callable(progress):
        yield _Told(work, total, progress)
        return
    if progress is False or (progress is None and not sys.stderr.isatty()):
        yield _nothing  # older versions of rich print a line for a bar that is disabled
        return
    from stp_fx.terminal import Console
    from stp_fx.terminal import Progress as Bar

    with Bar(transient=progress is None, console=Console(stderr=True)) as bar:
        task = bar.add_task(work, total=total)
        yield lambda: bar.advance(task)


def _nothing() -> None:
    """Nobody is told."""


def stepped(work: str, entries: Sequence[T], progress: Progress = None) -> Iterator[T]:
    """``entries``, a step each."""
    with steps(work, len(entries), progress) as done:
        for entry in entries:
            yield entry
            done()


class _Told:
    """Tells a function of every step."""

    def __init__(self, work: str, total: int | None, function: Callable[[str, int, int | None], object]) -> None:
        self._work, self._total, self._function, self._done = work, total, function, 0
        function(work, 0, total)

    def __call__(self) -> None:
        self._done += 1
        self._function(self._work, self._done, self._total)


class _Watched:
    """Calibration data with a choice of progress; otherwise the data themselves."""

    def __init__(self, data: Iterable[Any], progress: Progress) -> None:
        self._data, self.progress = data, progress

    def __iter__(self) -> Iterator[Any]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._data, name)
