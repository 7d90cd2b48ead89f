"""Checks of arguments at run time.

They take any object: annotations promise a type that callers without a type checker may not keep.
"""

from __future__ import annotations

import numbers
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeGuard, cast

from stp_fx.errors import InputError

__all__ = [
    "MOST",
    "arguments_by_name",
    "check_callable",
    "check_flag",
    "check_seed",
    "check_whole",
    "is_a",
    "is_choice",
    "is_number",
    "is_whole",
    "listed_argument",
    "shown",
]

MOST = 10**6
"""Steps, epochs, runs, draws."""
_LONGEST = 200
"""Letters of a value that an error message shows."""


def is_a(value: object, *kinds: type) -> bool:
    """Whether ``value`` is of one of these classes."""
    return isinstance(value, kinds)


def is_number(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a real number that a float can hold, of Python or NumPy; a bool is none, NaN and infinities are."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


def is_whole(value: object) -> TypeGuard[int]:
    """Whether ``value`` is an integer, of Python or NumPy; a bool is none."""
    return not isinstance(value, bool) and isinstance(value, numbers.Integral)


def is_choice(value: object, known: Collection[str]) -> TypeGuard[str]:
    """Whether ``value`` is one of these texts; what is no text at all is never compared."""
    return isinstance(value, str) and value in known


def shown(value: object) -> str:
    """``repr(value)`` for an error message: short, and without fail."""
    try:
        text = repr(value)
    except Exception:  # nested too deeply, or an object whose own code fails
        return f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def check_flag(argument: str, value: object) -> bool:
    """The value, if it is True or False: the truth of a tensor or a text is rarely what was meant.

    Raises:
        InputError: names ``argument``.
    """
    if not isinstance(value, bool):
        raise InputError(f"`{argument}` is True or False; got {shown(value)}")
    return value


def check_callable(argument: str, value: Any, form: str) -> Any:
    """The value, if it can be called or is None.

    Raises:
        InputError: names ``argument``, and the ``form`` of the call.
    """
    if value is not None and not callable(value):
        raise InputError(f"`{argument}` is a callable {form}; got {shown(value)}")
    return value


def check_seed(value: object) -> None:
    """Refuses what is no seed.

    Raises:
        InputError: no whole number from 0.
    """
    if not is_whole(value) or value < 0:
        raise InputError(f"a seed is an integer of at least 0; got {shown(value)}")


def check_whole(argument: str, value: object, least: int) -> None:
    """Refuses what is no whole number from ``least`` to a million: loops of more than that never end.

    Raises:
        InputError: names ``argument``.
    """
    if not is_whole(value) or not least <= value <= MOST:
        raise InputError(f"`{argument}` is a whole number from {least} to {MOST:,}; got {shown(value)}")


def arguments_by_name(value: object, argument: str = "kwargs") -> dict[str, Any]:
    """Arguments of a call by name; of None, none.

    Raises:
        InputError: no mapping of names; names ``argument``.
    """
    if value is None:
        return {}
    given = cast("Mapping[Any, Any]", value)
    if not is_a(value, Mapping) or not all(isinstance(key, str) for key in given):
        raise InputError(f"`{argument}` maps names of arguments to their values; got {shown(value)}")
    return dict(given)


def listed_argument(argument: str, value: object, wanted: str) -> tuple[Any, ...]:
    """The items of an iterable argument; ``wanted`` says what to give.

    Raises:
        InputError: text, something that cannot be iterated, or that fails meanwhile; names ``argument``.
    """
    if is_a(value, str, bytes) or not is_a(value, Iterable):
        raise InputError(f"`{argument}` holds {shown(value)}: {wanted}")
    try:
        return tuple(cast("Iterable[Any]", value))
    except Exception as error:  # a closed file, a generator that fails, a tensor without dimensions
        raise InputError(f"`{argument}`, a {type(value).__name__}, cannot be read ({shown(error)}): {wanted}") from error
