"""Changes that are made together or not at all.

Whatever can fail is done before: a :class:`Change` holds values that are ready, and making it is an assignment. The only failure
left is an exception from outside, such as the KeyboardInterrupt of a signal, which Python raises between any two instructions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

__all__ = ["Change", "commit", "entry"]

_ATTEMPTS = 3
_ABSENT = object()


@dataclasses.dataclass(frozen=True)
class Change:
    """``make`` and ``undo`` may both be called any number of times, also after having been left in the midst."""

    make: Callable[[], object]
    undo: Callable[[], object]


def entry(mapping: MutableMapping[Any, Any], key: object, value: object) -> Change:
    """``mapping[key] = value``; undone, the mapping has what it has now."""
    before = mapping.get(key, _ABSENT)

    def make() -> None:
        mapping[key] = value

    def undo() -> None:
        if before is _ABSENT:
            mapping.pop(key, None)
        else:
            mapping[key] = before

    return Change(make, undo)


def commit(changes: Sequence[Change]) -> None:
    """Makes all changes. An exception that arrives meanwhile is raised when all of them are made; where a change fails again and
    again, all are undone, and its exception is raised."""
    made, arrived = _all([each.make for each in changes])
    if not made:
        _all([each.undo for each in reversed(changes)])
    if arrived is not None:
        raise arrived


def _all(calls: Sequence[Callable[[], object]]) -> tuple[bool, BaseException | None]:
    """Whether all calls have been made, from the first on as often as it takes, and the last exception that arrived meanwhile."""
    arrived: BaseException | None = None
    for _ in range(_ATTEMPTS):
        try:
            for each in calls:
                each()
            return True, arrived
        except BaseException as error:  # a signal's too: half of the changes would be worse than a moment's delay
            arrived = error
    return False, arrived
