"""One exception hierarchy: every error names the culprit, what was found, and the way out."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator

__all__ = [
    "CriterionError",
    "FileError",
    "FunctionChangedError",
    "InputError",
    "NothingToPruneError",
    "NothingToRotateError",
    "PassError",
    "PlanError",
    "RewriteError",
    "StpFxError",
    "TargetError",
    "TraceError",
    "VerificationError",
    "WriteBackError",
]


class StpFxError(Exception):
    """Base of every error that stp_fx raises on purpose."""

    if sys.version_info < (3, 11):

        def add_note(self, note: str) -> None:
            """Adds a line to the text; from Python 3.11 on, every exception has notes."""
            self.args = (f"{self}\n{note}", *self.args[1:])


class InputError(StpFxError, ValueError):
    """An argument is out of range, unknown, or of the wrong shape or type."""


class TargetError(InputError):
    """A cost target is out of reach under the constraints given; the message says what is in reach."""


class TraceError(StpFxError):
    """A module could not be captured as a graph."""


class FileError(StpFxError, ValueError):
    """A file cannot be written, or is no file of :func:`stp_fx.save`, damaged, newer, or of another model."""


class NothingToPruneError(StpFxError):
    """The graph has no unit that the request allows to remove; the message says why."""


class NothingToRotateError(StpFxError):
    """A change of basis was asked for, and no set of channels allows one; the message says why."""


class CriterionError(StpFxError, ValueError):
    """A criterion cannot score what it was given (integer or NaN weights, missing data)."""


class PlanError(StpFxError, ValueError):
    """A plan does not fit the graph: unknown tensors, indices out of range, coupled axes that disagree."""


class RewriteError(StpFxError):
    """A rewrite did not give the shapes that the analysis promised; the input graph is unchanged."""


class FunctionChangedError(RewriteError):
    """Removing some groups changes what the network computes, as a run on the example shows; ``groups`` names them. Nothing has
    been changed."""

    def __init__(self, message: str, groups: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.groups = groups

    def __reduce__(self) -> tuple[type[FunctionChangedError], tuple[str, tuple[str, ...]]]:
        return type(self), (str(self), self.groups)


class VerificationError(StpFxError):
    """A graph is not well formed: lint, a dangling parameter, or a meta run that fails."""


class PassError(StpFxError):
    """A pass of a pipeline failed; names the pass and the ones that ran before it."""


class WriteBackError(StpFxError):
    """The original class cannot express a pruned graph; ``constants`` names what is in the way, one line each."""

    def __init__(self, message: str, constants: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.constants = constants

    def __reduce__(self) -> tuple[type[WriteBackError], tuple[str, tuple[str, ...]]]:
        return type(self), (str(self), self.constants)


@contextlib.contextmanager
def translated(kind: type[StpFxError], message: Callable[[str], str]) -> Generator[None]:
    """Around code that is not ours: what it raises becomes an error of ``kind``; an error of ours stays what it is.

    ``message`` is given the exception's class and text.
    """
    try:
        yield
    except StpFxError:
        raise
    except Exception as error:  # whatever somebody else's code raises
        raise kind(message(f"{type(error).__name__}: {error}")) from error
