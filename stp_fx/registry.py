"""Registries: names that stand for values (criteria, regularizers, schedules, op rules), written once for all of them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from stp_fx.errors import InputError

__all__ = ["Registry"]

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class Registry(Generic[T]):
    """Keys to values, each with the place in the code that registered it.

    ``what`` names the kind in errors ("criterion"), ``taken`` is the hint of the error where another module has a key. The same
    module may register a key again, which replaces the value: a notebook's cell can be run twice. Another module may not.

    >>> shapes = Registry[str]("shape")
    >>> shapes.add("square", "four sides", owner="geometry")
    >>> shapes.get("square")
    'four sides'
    """

    def __init__(self, what: str, taken: str = "choose another name") -> None:
        self._what, self._taken = what, taken
        self._values: dict[Hashable, T] = {}
        self._owners: dict[Hashable, str] = {}

    def add(self, key: Hashable, value: T, *, owner: str) -> None:
        """Lets ``key`` stand for ``value``; ``owner`` is the name of the module that asks for it.

        Raises:
            InputError: another module has registered the key.
        """
        known = self._owners.get(key)
        if known is not None and known != owner:
            raise InputError(
                f"{self._what} {_shown(key)} is already registered by {known}, and {owner} registers it again; {self._taken}"
            )
        self._values[key], self._owners[key] = value, owner

    def register(self, *keys: Hashable) -> Callable[[F], F]:
        """A decorator: ``keys`` stand for the class or function under it."""

        def add(value: F) -> F:
            for key in keys:
                self.add(key, value, owner=getattr(value, "__module__", "?"))  # type: ignore[arg-type]
            return value

        return add

    def find(self, key: Hashable) -> T | None:
        """The value of ``key``, or None."""
        return self._values.get(key)

    def get(self, key: Hashable, hint: str = "") -> T:
        """The value of ``key``.

        Raises:
            InputError: an unknown key; names the known ones, and the close ones first.
        """
        if key not in self._values:
            names = sorted(map(str, self._values))
            close = difflib.get_close_matches(str(key), names, n=2)
            guess = f", did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise InputError(
                f"unknown {self._what} {key!r}{guess or ';'} known names: {', '.join(names)}{'. ' * bool(hint)}{hint}"
            )
        return self._values[key]

    def names(self) -> tuple[str, ...]:
        """All keys as text, sorted."""
        return tuple(sorted(map(str, self._values)))

    def items(self) -> Mapping[Hashable, T]:
        """All entries (a copy)."""
        return dict(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[Hashable]:
        return iter(dict(self._values))


def _shown(key: Hashable) -> str:
    return repr(key) if isinstance(key, str) else str(key)
