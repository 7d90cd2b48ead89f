"""The factor notation, in the spirit of einops: ``"n (g c) *, (g o) c *, (g o) -> n (g o) *"``.

Tensors are separated by commas, dimensions by spaces. A letter names a factor: where it occurs again, the factors live and
die together. ``(g c)`` is a compound dimension, outer to inner. ``*`` stands for any number of dimensions that the op does
not map one to one (kernel and spatial ones): what they carry is pinned. ``..`` stands for any number of dimensions that pass
through position by position. ``_`` is one dimension that is new or given up, and fixed. ``1`` is a dimension of size one.
"""

from __future__ import annotations

import dataclasses
import functools

__all__ = ["Pattern", "parse"]

Token = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A parsed mapping; each tensor is a tuple of dimensions, each dimension one of letters; runs are ``("..",)``, ``("*",)``."""

    text: str
    inputs: tuple[tuple[Token, ...], ...]
    outputs: tuple[tuple[Token, ...], ...]

    @functools.cached_property
    def contracted(self) -> tuple[str, ...]:
        """Letters that inputs have and no output has, in order of appearance."""
        kept = {letter for tensor in self.outputs for dim in tensor for letter in dim}
        seen: dict[str, None] = {}
        for tensor in self.inputs:
            for dim in tensor:
                seen.update({letter: None for letter in dim if letter.isalpha() and letter not in kept})
        return tuple(seen)


@functools.cache
def parse(text: str) -> Pattern:
    """Parses a mapping.

    Raises:
        ValueError: no arrow, or unbalanced parentheses.
    """
    left, arrow, right = text.partition("->")
    if not arrow or text.count("(") != text.count(")"):
        raise ValueError(f"not a factor mapping: {text!r}; write it like 'm k, k n -> m n'")
    return Pattern(text, _tensors(left), _tensors(right))


def _tensors(side: str) -> tuple[tuple[Token, ...], ...]:
    return tuple(tuple(_dimensions(tensor)) for tensor in side.split(",")) if side.strip() else ()


def _dimensions(tensor: str) -> list[Token]:
    dims: list[Token] = []
    compound: list[str] | None = None
    for word in tensor.replace("(", " ( ").replace(")", " ) ").split():
        if word == "(":
            compound = []
        elif word == ")":
            dims.append(tuple(compound or ()))
            compound = None
        elif compound is not None:
            compound.append(word)
        else:
            dims.append((word,))
    return dims
