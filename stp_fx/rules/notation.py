"""The factor notation, in the spirit of einops: ``"n (g c) *, (g o) c *, (g o) -> n (g o) *"``.

Tensors are separated by commas, dimensions by spaces. A letter names a factor: where it occurs again, the factors are
removed together. The tokens:

| token | dimension |
|---|---|
| ``c`` | one factor |
| ``(g c)`` | a compound of factors, outer to inner |
| ``c?``, ``(g c)?`` | that factor, or absent, or of size one: an operand that broadcasts from the right |
| ``..`` | any number of dimensions that pass through position by position |
| ``_`` | one dimension that the op does not map one to one; what it carries is pinned, and a result's is fixed |
| ``*`` | any number of such dimensions (kernel and spatial ones) |
| ``1`` | a dimension of size one |

Nothing after the arrow is one result without dimensions (``"k, k -> "``).
"""

from __future__ import annotations

import dataclasses
import functools
import re

from stp_fx.errors import InputError

__all__ = ["Pattern", "TensorPattern", "Token", "is_letter", "parse"]

Token = tuple[str, ...]
_OPTIONAL = "?"
_WORD = re.compile(r"\(|\)\??|\.\.|[A-Za-z]\w*\??|[*_1]")


@dataclasses.dataclass(frozen=True)
class TensorPattern:
    """The dimensions of one tensor. ``optional`` flags the tokens with a question mark; ``run`` is where ``..`` or ``*`` is."""

    tokens: tuple[Token, ...]
    optional: tuple[bool, ...]
    run: int | None

    @functools.cached_property
    def broadcasts(self) -> bool:
        """Whether the tensor may lack dimensions."""
        return any(self.optional)

    @functools.cached_property
    def letters(self) -> frozenset[str]:
        """The letters of all dimensions."""
        return frozenset(letter for token in self.tokens for letter in token if is_letter(letter))


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A parsed factor mapping."""

    text: str
    inputs: tuple[TensorPattern, ...]
    outputs: tuple[TensorPattern, ...]

    @functools.cached_property
    def letters(self) -> tuple[str, ...]:
        """All letters, in order of appearance; those of operands that only broadcast come last."""
        return _in_order([*(t for t in self.inputs if not t.broadcasts), *self.outputs, *self.inputs])

    @functools.cached_property
    def contracted(self) -> tuple[str, ...]:
        """Letters that inputs have and no output has, in order of appearance."""
        kept = frozenset().union(*(t.letters for t in self.outputs))
        return tuple(letter for letter in _in_order(self.inputs) if letter not in kept)


def _in_order(tensors: tuple[TensorPattern, ...] | list[TensorPattern]) -> tuple[str, ...]:
    found = (letter for t in tensors for token in t.tokens for letter in token if is_letter(letter))
    return tuple(dict.fromkeys(found))


def is_letter(word: str) -> bool:
    """Whether a word of a token is a letter (a name of a factor), and no sign of the notation."""
    return word[:1].isalpha()


@functools.cache
def parse(text: str) -> Pattern:
    """Parses a factor mapping.

    Raises:
        InputError: no arrow, unbalanced parentheses, an unknown token, two runs in one tensor, or a letter that only results
            have.
    """
    left, arrow, right = text.partition("->")
    if not arrow:
        raise _wrong(text, "has no arrow")
    inputs = tuple(_tensor(part, text) for part in left.split(",")) if left.strip() else ()
    pattern = Pattern(text, inputs, tuple(_tensor(part, text) for part in right.split(",")))
    given = frozenset().union(*(t.letters for t in pattern.inputs))
    fresh = [letter for letter in _in_order(pattern.outputs) if letter not in given]
    if fresh:
        raise _wrong(text, f"has the letter '{fresh[0]}' in a result and in no input")
    if any(t.broadcasts for t in pattern.outputs):
        raise _wrong(text, "has an optional dimension in a result")
    return pattern


def _wrong(text: str, what: str) -> InputError:
    return InputError(f"the factor mapping '{text}' {what}; write it like 'm k, k n -> m n'")


def _tensor(part: str, text: str) -> TensorPattern:
    if part.count("(") != part.count(")"):
        raise _wrong(text, "has unbalanced parentheses")
    words = _WORD.findall(part)
    if "".join(words) != "".join(part.split()):
        raise _wrong(text, f"has a token in '{part.strip()}' that is none of the notation")
    tokens: list[Token] = []
    optional: list[bool] = []
    compound: list[str] | None = None
    for word in words:
        if word == "(":
            if compound is not None:
                raise _wrong(text, "has nested parentheses")
            compound = []
        elif word[0] == ")":
            if not compound:
                raise _wrong(text, "has unbalanced parentheses" if compound is None else "has empty parentheses")
            tokens.append(tuple(compound))
            optional.append(word.endswith(_OPTIONAL))
            compound = None
        elif compound is not None:
            if not is_letter(word) or word.endswith(_OPTIONAL):
                raise _wrong(text, f"has '{word}' inside parentheses, where only letters may be")
            compound.append(word)
        else:
            tokens.append((word.rstrip(_OPTIONAL),))
            optional.append(word.endswith(_OPTIONAL))
    if compound is not None:
        raise _wrong(text, "has unbalanced parentheses")
    runs = [k for k, token in enumerate(tokens) if token[0] in ("..", "*")]
    if len(runs) > 1:
        raise _wrong(text, f"has two runs ('..', '*') in '{part.strip()}'")
    return TensorPattern(tuple(tokens), tuple(optional), runs[0] if runs else None)
