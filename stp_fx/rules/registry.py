"""The table from ATen op to rule, and the one place where a pattern is applied.

Registering is decorating::

    @rule("aten.mm.default", "aten.foo.default")
    def _mm(ctx, func, args, kwargs, out): ...

An op's overload name is its key. A rule states the factors of the results, and what lives and dies together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from stp_fx.rules.domain import Context, Dim, Dims, dim_size, fixed_dim, has_ids
from stp_fx.rules.notation import Pattern, Token, parse

__all__ = ["Rule", "apply_pattern", "registered", "rule", "rule_for"]

Rule = Callable[[Context, Any, tuple[Any, ...], dict[str, Any], Any], None]

_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a function as the rule of the named overloads (``"aten.mm.default"``)."""

    def register(function: Rule) -> Rule:
        for name in names:
            if name in _RULES:
                raise ValueError(f"two rules for {name}")
            _RULES[name] = function
        return function

    return register


def rule_for(func: Any) -> Rule | None:
    """The rule of an op overload, or ``None``."""
    return _RULES.get(str(func))


def registered() -> Mapping[str, Rule]:
    """All rules by overload name (read only)."""
    return dict(_RULES)


def apply_pattern(
    ctx: Context,
    pattern: str,
    inputs: Sequence[torch.Tensor | None],
    outputs: Sequence[torch.Tensor | None],
    sizes: Mapping[str, int] | None = None,
    roles: Mapping[int, tuple[str, int | None, int | None]] | None = None,
) -> dict[str, Dim]:
    """Unifies the factors that carry one letter, over all tensors, and states the outputs' factors.

    ``inputs`` and ``outputs`` may hold ``None`` for absent tensors. ``sizes`` gives the length of letters in compound
    dimensions that no other dimension tells. ``roles`` maps an input's position to (role, output dim, input dim).
    Returns the factors of each letter.
    """
    parsed = parse(pattern)
    binding = _Binding(ctx, dict(sizes or {}))
    pairs = [(t, dims) for t, dims in zip(inputs, parsed.inputs, strict=False) if t is not None]
    for tensor, dims in pairs:
        binding.learn_sizes(tensor.shape, dims)
    for tensor, dims in pairs:
        binding.bind(ctx.dims(tensor), tuple(tensor.shape), dims, pattern)
    for position, (role, out, into) in (roles or {}).items():
        if position < len(inputs) and inputs[position] is not None:
            ctx.reads(inputs[position], role, out, into)  # type: ignore[arg-type]
    for tensor, dims in zip(outputs, parsed.outputs, strict=False):
        if isinstance(tensor, torch.Tensor):
            ctx.assign(tensor, binding.build(tuple(tensor.shape), dims))
    return binding.letters


class _Binding:
    """Letters on their way from inputs to outputs."""

    def __init__(self, ctx: Context, sizes: dict[str, int]) -> None:
        self.ctx = ctx
        self.sizes = sizes
        self.letters: dict[str, Dim] = {}
        self.passing: list[Dim] | None = None

    def learn_sizes(self, shape: Sequence[int], dims: tuple[Token, ...]) -> None:
        for size, token in _spread(shape, dims):
            if len(token) == 1 and token[0].isalpha():
                self.sizes.setdefault(token[0], int(size))
        for size, token in _spread(shape, dims):
            unknown = [letter for letter in token if letter not in self.sizes]
            if len(token) > 1 and len(unknown) == 1:
                known = 1
                for letter in token:
                    known *= self.sizes.get(letter, 1)
                self.sizes[unknown[0]] = int(size) // known

    def bind(self, factors: Dims, shape: Sequence[int], dims: tuple[Token, ...], pattern: str) -> None:
        passing = []
        for factor_list, token in _spread(factors, dims):
            if token == ("..",):
                passing.append(factor_list)
            elif token in (("*",), ("_",)):
                if has_ids(factor_list):
                    self.ctx.pin(factor_list, f"kernel or spatial positions ('{token[0]}' in {pattern})")
            elif token != ("1",):
                pieces = self.ctx.regroup([factor_list], [self.sizes[letter] for letter in token])
                for letter, piece in zip(token, pieces, strict=True):
                    self._meet(letter, piece)
        if ("..",) in dims:
            self._meet_passing(passing)

    def build(self, shape: Sequence[int], dims: tuple[Token, ...]) -> Dims:
        result: list[Dim] = []
        passing = iter(self.passing or ())
        for size, token in _spread(shape, dims):
            if token == ("..",):
                result.append(next(passing))
            elif token[0] in ("*", "_", "1"):
                result.append(fixed_dim(int(size)))
            else:
                result.append(tuple(factor for letter in token for factor in self.letters[letter]))
        return tuple(result)

    def _meet(self, letter: str, piece: Dim) -> None:
        known = self.letters.get(letter)
        self.letters[letter] = piece if known is None else self.ctx.unify(known, piece)

    def _meet_passing(self, passing: list[Dim]) -> None:
        if self.passing is None:
            self.passing = passing
            return
        for k in range(1, min(len(passing), len(self.passing)) + 1):
            if dim_size(passing[-k]) == dim_size(self.passing[-k]):
                self.passing[-k] = self.ctx.unify(self.passing[-k], passing[-k])


def _spread(values: Sequence[Any], dims: tuple[Token, ...]) -> list[tuple[Any, Token]]:
    """Pairs each dimension with its token; a run (``*``, ``..``) takes as many dimensions as are left over."""
    runs = [k for k, token in enumerate(dims) if token in (("*",), ("..",))]
    if not runs:
        return list(zip(values, dims, strict=True))
    at, spare = runs[0], len(values) - (len(dims) - 1)
    tokens = dims[:at] + (dims[at],) * spare + dims[at + 1 :]
    return list(zip(values, tokens, strict=True))


def letters_of(pattern: Pattern) -> tuple[str, ...]:
    """All letters of a pattern, contracted or not, in order of appearance."""
    seen: dict[str, None] = {}
    for tensor in (*pattern.inputs, *pattern.outputs):
        for dim in tensor:
            seen.update({letter: None for letter in dim if letter.isalpha()})
    return tuple(seen)
