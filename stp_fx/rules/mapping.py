"""A factor mapping applied to a call: it unifies the factors that carry one letter, and states those of the results."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from stp_fx.errors import InputError
from stp_fx.rules.call import OpCall
from stp_fx.rules.domain import Dim, Dims, dim_size, fixed_dim, has_ids
from stp_fx.rules.notation import Pattern, TensorPattern, Token, is_letter, parse

__all__ = [
    "BIAS",
    "BUFFER",
    "SCALE",
    "FactorMapping",
    "Role",
    "apply_pattern",
    "contract_pattern",
    "tensor_arguments",
    "tensor_results",
    "weight",
]

Role = tuple[str, int | None, int | None]
"""The role of a stored tensor in an op (weight, scale, bias, buffer), and a weight's output and input dimension."""

SCALE: Role = ("scale", None, None)
BIAS: Role = ("bias", None, None)
BUFFER: Role = ("buffer", None, None)


def weight(out: int | None, into: int | None = None) -> Role:
    """The role of a weight with these output and input dimensions."""
    return ("weight", out, into)


@functools.lru_cache(maxsize=4096)
def tensor_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of each argument of an op that is one tensor, or may be."""
    kinds = ("Tensor", "Optional[Tensor]")
    return tuple((k, a.name) for k, a in enumerate(func._schema.arguments) if str(a.type) in kinds)


@functools.lru_cache(maxsize=4096)
def tensor_results(func: Any) -> tuple[int, ...]:
    """Positions of an op's results that are tensors."""
    return tuple(k for k, r in enumerate(func._schema.returns) if str(r.type) in ("Tensor", "Optional[Tensor]"))


@dataclasses.dataclass(frozen=True)
class FactorMapping:
    """A pattern, and what it does not say.

    - ``roles``: what the pattern's tensors are to the op, by position.
    - ``sizes``: the length of a letter that no dimension tells; the name of an argument, or a function of the call.
    - ``cost``: multiply-accumulates per combination of the letters, if the op sums over a letter; a number or a function.
    - ``products``: the contractions of an op that has several, as ``"b h s t d over d"``; without it, one over all letters.
    - ``inexact``: a reason for each letter, or ``".."``, that the op normalises over.
    - ``pins``: a reason for each letter whose positions the op looks up by number.
    - ``distance``: a term of the sums is zero only where all operands are (a difference), not where one is (a product).

    >>> FactorMapping("m k, k n -> m n").parsed.contracted
    ('k',)
    """

    pattern: str
    roles: Mapping[int, Role] = dataclasses.field(default_factory=dict)
    sizes: Mapping[str, str | Callable[[OpCall], int]] = dataclasses.field(default_factory=dict)
    cost: int | Callable[[OpCall], int] = 1
    products: tuple[str, ...] | None = None
    inexact: Mapping[str, str] = dataclasses.field(default_factory=dict)
    pins: Mapping[str, str] = dataclasses.field(default_factory=dict)
    distance: bool = False

    @functools.cached_property
    def parsed(self) -> Pattern:
        """The pattern, parsed."""
        return parse(self.pattern)

    @functools.cached_property
    def contractions(self) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
        """(letters, contracted letters) of each contraction."""
        if self.products is not None:
            parts = (text.partition(" over ") for text in self.products)
            return tuple((tuple(letters.split()), tuple(over.split())) for letters, _, over in parts)
        over = tuple(letter for letter in self.parsed.contracted if letter not in self.pins)
        return ((self.parsed.letters, over),) if over else ()

    @functools.cached_property
    def carriers(self) -> Mapping[str, tuple[int, ...]]:
        """The inputs that have a letter, by position."""
        return {
            letter: tuple(k for k, t in enumerate(self.parsed.inputs) if letter in t.letters) for letter in self.parsed.letters
        }

    def check(self, func: Any) -> None:
        """Holds the mapping against an op's schema.

        Raises:
            InputError: another number of tensors, a letter that the pattern lacks, an argument that the op lacks, or compound
                dimensions of unknown lengths.
        """
        arguments = func._schema.arguments
        lists = [a.name for a in arguments if "List" in str(a.type) and "Tensor" in str(a.type)]
        if lists:
            raise InputError(
                f"rule of {func}: argument '{lists[0]}' is a list of tensors; write a function in place of a pattern"
            )
        names = [name for _, name in tensor_arguments(func)]
        self._check_count(func, len(self.parsed.inputs), names, "inputs")
        results = [f"result {k}" for k in tensor_results(func)]
        if results or self.parsed.outputs[0].tokens:  # nothing after the arrow may be no result, or one without dimensions
            self._check_count(func, len(self.parsed.outputs), results, "results")
        for what, letters in (("sizes", self.sizes), ("inexact", self.inexact), ("pins", self.pins)):
            for letter in letters:
                self._check_letter(func, letter, what)
        for letters, over in self.contractions:
            for letter in (*letters, *over):
                self._check_letter(func, letter, "products")
        for position in self.roles:
            if not 0 <= position < len(names):
                raise InputError(f"rule of {func}: roles has position {position}, the pattern has tensors 0 to {len(names) - 1}")
        known = [a.name for a in arguments]
        for letter, name in self.sizes.items():
            if isinstance(name, str) and name not in known:
                raise InputError(
                    f"rule of {func}: the size of '{letter}' is argument '{name}', which the op lacks; it has {', '.join(known)}"
                )
        self._check_sizes(func)

    def _check_count(self, func: Any, count: int, names: list[str], side: str) -> None:
        if count != len(names):
            raise InputError(
                f"rule of {func}: the pattern '{self.pattern}' has {count} {side}, the op has {len(names)} "
                f"({', '.join(names)}); describe each tensor, by '*' if its dimensions are none of channels"
            )

    def _check_letter(self, func: Any, letter: str, what: str) -> None:
        run = letter == ".." and what == "inexact" and any(("..",) in t.tokens for t in self.parsed.inputs)
        if letter not in self.parsed.letters and not run:
            raise InputError(
                f"rule of {func}: {what} names '{letter}', which the pattern '{self.pattern}' lacks; "
                f"its letters are {' '.join(self.parsed.letters) or 'none'}"
            )

    def _check_sizes(self, func: Any) -> None:
        """Whether the lengths of all letters follow from dimensions of one letter, ``sizes``, and division."""
        tokens = [token for t in self.parsed.inputs for token in t.tokens if is_letter(token[0])]
        known = {*self.sizes, *(token[0] for token in tokens if len(token) == 1)}
        for _ in tokens:
            for token in tokens:
                unknown = [letter for letter in token if letter not in known]
                known.update(unknown if len(unknown) == 1 else ())
        for token in tokens:
            unknown = [letter for letter in token if letter not in known]
            if unknown:
                raise InputError(
                    f"rule of {func}: nothing tells the sizes of {' and '.join(map(repr, unknown))} in '({' '.join(token)})' of "
                    f"the pattern '{self.pattern}'; name the argument that does with sizes={{'{unknown[0]}': 'argument'}}"
                )

    def __call__(self, call: OpCall) -> None:
        """Applies the mapping to a call: a mapping is a rule."""
        args, kwargs = call.args, call.kwargs
        count = len(args)
        inputs = [args[k] if k < count else kwargs.get(name) for k, name in tensor_arguments(call.func)]
        out = call.out
        self.apply(call, inputs, [out[k] for k in tensor_results(call.func)] if isinstance(out, (tuple, list)) else (out,))

    def apply(
        self, call: OpCall, inputs: Sequence[torch.Tensor | None], outputs: Sequence[torch.Tensor | None]
    ) -> dict[str, Dim]:
        """Applies the mapping to the given tensors of a call; ``None`` for an absent one. Returns each letter's factors."""
        parsed = self.parsed
        binding = _Binding(call, self)
        for letter, size in self.sizes.items():
            binding.sizes[letter] = int(call[size] if isinstance(size, str) else size(call))
        binding.learn_sizes(inputs)
        binding.bind_all(inputs)
        letters = binding.letters
        for position, (role, out, into) in self.roles.items():
            tensor = inputs[position]
            if tensor is not None:
                call.reads(tensor, role, out, into)
        for letter, reason in self.inexact.items():
            for dim in (binding.passing or ()) if letter == ".." else (letters.get(letter, ()),):
                call.inexact(dim, reason)
        for letter, reason in self.pins.items():
            call.pin(letters.get(letter, ()), reason)
        for tensor, described in zip(outputs, parsed.outputs, strict=False):  # an op may have no result
            if isinstance(tensor, torch.Tensor) and tensor.numel():  # an empty one is a result that the op left out
                call.assign(tensor, binding.build(tensor, described))
        if self.contractions:
            cost = self.cost if isinstance(self.cost, int) else self.cost(call)
            for each, over in self.contractions:
                over = [letter for letter in over if letter in letters]
                carriers = [[t for k in self.carriers[letter] if (t := inputs[k]) is not None] for letter in over]
                dims = [letters[k] for k in each if k in letters]
                call.contract(dims, [letters[k] for k in over], cost, carriers, distance=self.distance)
        return letters


class _Binding:
    """Letters on their way from inputs to outputs."""

    def __init__(self, call: OpCall, mapping: FactorMapping) -> None:
        self.call, self.mapping = call, mapping
        self.sizes: dict[str, int] = {}
        self.letters: dict[str, Dim] = {}
        self.passing: list[Dim] | None = None

    def learn_sizes(self, inputs: Sequence[torch.Tensor | None]) -> None:
        """Lengths of letters: given, those of dimensions of one letter, then what division leaves of compounds."""
        sizes, compounds = self.sizes, []
        for tensor, described in zip(inputs, self.mapping.parsed.inputs, strict=True):
            if tensor is None or described.broadcasts:
                continue
            for size, token in zip(tensor.shape, self._spread(tensor, described), strict=True):
                first, *more = token
                if more:
                    compounds.append((size, token))
                elif is_letter(first):
                    sizes.setdefault(first, int(size))
        for _ in compounds:
            for size, token in compounds:
                unknown = [letter for letter in token if letter not in sizes]
                if len(unknown) == 1:
                    sizes[unknown[0]] = int(size) // max(math.prod(sizes.get(letter, 1) for letter in token), 1)

    def bind_all(self, inputs: Sequence[torch.Tensor | None]) -> None:
        """Lets the factors of all inputs meet; operands that broadcast meet what the others are."""
        pairs = [(t, d) for t, d in zip(inputs, self.mapping.parsed.inputs, strict=True) if t is not None]
        for tensor, described in pairs:
            if not described.broadcasts:
                self._bind(tensor, described)
        for tensor, described in pairs:
            if described.broadcasts:
                self._bind(tensor, described)

    def _bind(self, tensor: torch.Tensor, described: TensorPattern) -> None:
        passing: list[Dim] = []
        dims = self.call.dims(tensor)
        for k, (dim, token) in enumerate(zip(dims, self._spread(tensor, described), strict=True)):
            first = token[0]
            if first == "..":
                passing.append(dim)
            elif first in ("*", "_"):
                if has_ids(dim):
                    self.call.pin(dim, f"kernel or spatial positions ('{first}' in {self.mapping.pattern})")
            elif is_letter(first) and not (described.broadcasts and tensor.shape[k] == 1):
                self._meet(token, dim, tensor, k)
            elif first == "1" and tensor.shape[k] != 1:
                raise self._misfit(tensor, f"has size {tensor.shape[k]} in dimension {k}, where the pattern has '1'")
        if described.run is not None and described.tokens[described.run] == ("..",):
            self._meet_passing(passing, tensor)

    def _meet(self, token: Token, dim: Dim, tensor: torch.Tensor, k: int) -> None:
        sizes = self.sizes
        missing = [letter for letter in token if letter not in sizes]
        if missing:
            raise self._misfit(tensor, f"leaves the sizes of {' and '.join(map(repr, missing))} open")
        if math.prod(sizes[letter] for letter in token) != tensor.shape[k]:
            lengths = " ".join(f"{letter}={sizes[letter]}" for letter in token)
            raise self._misfit(tensor, f"has size {tensor.shape[k]} in dimension {k}, where the pattern has {lengths}")
        pieces = (dim,) if len(token) == 1 else self.call.regroup([dim], [sizes[letter] for letter in token])
        for letter, piece in zip(token, pieces, strict=True):
            known = self.letters.get(letter)
            self.letters[letter] = piece if known is None else self.call.unify(known, piece)

    def _meet_passing(self, passing: list[Dim], tensor: torch.Tensor) -> None:
        if self.passing is None:
            self.passing = passing
            return
        known = self.passing
        for k in range(1, min(len(passing), len(known)) + 1):
            mine, other = dim_size(known[-k]), dim_size(passing[-k])
            if mine == other:
                known[-k] = self.call.unify(known[-k], passing[-k])
            elif mine == 1:
                known[-k] = passing[-k]
            elif other != 1:
                raise self._misfit(tensor, f"has size {other}, another tensor has {mine} in the same dimension of '..'")
        self.passing = passing[: max(len(passing) - len(known), 0)] + known

    def build(self, tensor: torch.Tensor, described: TensorPattern) -> Dims:
        """The factors of a result."""
        result: list[Dim] = []
        passing = iter(self.passing or ())
        for k, token in enumerate(self._spread(tensor, described)):
            first, size = token[0], int(tensor.shape[k])
            if first == "..":
                dim = next(passing, fixed_dim(size))
            elif is_letter(first):
                dim = self.letters[first] if len(token) == 1 else tuple(f for letter in token for f in self.letters[letter])
            else:
                dim = fixed_dim(size)
            if dim_size(dim) != size:
                found = f"result has size {size} in dimension {k}, where the pattern has '{' '.join(token)}' of {dim_size(dim)}"
                raise InputError(f"rule of {self.call.func}: the {found}; write '_' or '*' for what does not map one to one")
            result.append(dim)
        return tuple(result)

    def _spread(self, tensor: torch.Tensor, described: TensorPattern) -> tuple[Token, ...]:
        """A token for each dimension; a run takes as many as are left over, an operand that broadcasts lacks the first ones."""
        tokens, rank = described.tokens, tensor.dim()
        if described.run is not None and rank >= len(tokens) - 1:
            at = described.run
            return tokens[:at] + (tokens[at],) * (rank - len(tokens) + 1) + tokens[at + 1 :]
        if rank < len(tokens) and all(described.optional[: len(tokens) - rank]):
            return tokens[len(tokens) - rank :]
        if rank != len(tokens):
            raise self._misfit(tensor, f"has {rank} dimensions, the pattern gives it {len(tokens)}")
        return tokens

    def _misfit(self, tensor: torch.Tensor, what: str) -> InputError:
        call = self.call
        name = next((n for n, value in call.bound.items() if value is tensor), "a result")
        return InputError(
            f"rule of {call.func}: '{name}' of shape {tuple(tensor.shape)} {what}; pattern: '{self.mapping.pattern}'. "
            "Write one token for each dimension, '..' for those that pass through, '_' or '*' for those that are pinned"
        )


def apply_pattern(
    call: OpCall,
    pattern: str,
    inputs: Sequence[torch.Tensor | None],
    outputs: Sequence[torch.Tensor | None],
    sizes: Mapping[str, int] | None = None,
    roles: Mapping[int, Role] | None = None,
) -> dict[str, Dim]:
    """Applies a pattern inside a rule that is a function: unifies factors, states the results', records no contraction.

    ``inputs`` and ``outputs`` may hold ``None`` for absent tensors. ``sizes`` gives the length of letters in compound
    dimensions that no other dimension tells. ``roles`` maps an input's position to (role, output dim, input dim).
    Returns the factors of each letter.

    Raises:
        InputError: another number of tensors than the pattern has, or shapes that it does not fit.
    """
    return _applied(call, pattern, inputs, outputs, sizes, roles, (), 0)


def contract_pattern(
    call: OpCall,
    pattern: str,
    inputs: Sequence[torch.Tensor | None],
    out: torch.Tensor,
    *,
    sizes: Mapping[str, int] | None = None,
    roles: Mapping[int, Role] | None = None,
    multiplier: int = 1,
) -> dict[str, Dim]:
    """As :func:`apply_pattern`, and records the contraction: ``multiplier`` x the product of all letters."""
    return _applied(call, pattern, inputs, [out], sizes, roles, None, multiplier)


def _applied(
    call: OpCall,
    pattern: str,
    inputs: Sequence[torch.Tensor | None],
    outputs: Sequence[torch.Tensor | None],
    sizes: Mapping[str, int] | None,
    roles: Mapping[int, Role] | None,
    products: tuple[str, ...] | None,
    cost: int,
) -> dict[str, Dim]:
    fixed = {letter: (lambda _, s=size: s) for letter, size in (sizes or {}).items()}
    mapping = FactorMapping(pattern, roles or {}, fixed, cost, products)
    for given, described, side in ((inputs, mapping.parsed.inputs, "inputs"), (outputs, mapping.parsed.outputs, "results")):
        if len(given) != len(described):
            raise InputError(
                f"rule of {call.func}: the pattern '{pattern}' has {len(described)} {side}, the rule gives {len(given)}; "
                "describe each tensor, by '*' if its dimensions are none of channels"
            )
    return mapping.apply(call, inputs, outputs)
