"""Finding the numbers of a module that its smaller tensors need: those its forward reads, tried until the outputs agree."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Protocol

from torch import nn

from stp_fx.errors import WriteBackError
from stp_fx.writeback.obstacles import Failure, Seen, message_of
from stp_fx.writeback.reads import Holder, Key, Watched
from stp_fx.writeback.sizes import KINDS, Sizes

__all__ = ["Numbers", "find_numbers"]

_FORWARDS, _COMBINATIONS = 300, 100_000
"""How many forwards are run, and how many combinations looked at, at most. A network with three ambiguous numbers takes ten
forwards or so."""

_log = logging.getLogger(__name__)

Value = tuple[int, ...]
Numbers = dict[tuple[str, str], Value]
"""The new value of each attribute that changes, by the path of its holder and its name."""


class Accepts(Protocol):
    """``None`` if a module is as wanted, and else why not; ``explained`` adds where the attempt that came furthest failed."""

    def __call__(self, model: nn.Module) -> Failure | None: ...

    def explained(self, model: nn.Module, failure: Failure, sizes: Sizes) -> Failure: ...


@dataclasses.dataclass(frozen=True)
class _Decision:
    """An attribute that all holders of a family have, and what to try for it, likely values first: one value a holder."""

    key: Key
    holders: tuple[Holder, ...]
    choices: tuple[tuple[Value, ...], ...]
    old: tuple[Value, ...]

    def apply(self, choice: int) -> None:
        for holder, value in zip(self.holders, self.choices[choice]):
            holder.put(self.key[1], value)

    def changes(self, choice: int) -> Numbers:
        values = zip(self.holders, self.choices[choice], self.old)
        return {(h.path, self.key[1]): new for h, new, old in values if new != old}


def find_numbers(twin: nn.Module, sizes: Sizes, settled: set[tuple[str, str]], check: Accepts) -> Numbers:
    """The numbers with which ``twin``, which is changed, passes ``check``; those ``settled`` stay (holders' paths, attributes).

    An attribute that the forward reads may become what the plan made of an axis, or of a factor of an axis, of that length below
    the same module. Combinations come in the order of how far they are from the likeliest values; what failed is not tried again
    with other values of attributes that were not read by then.

    Raises:
        WriteBackError: no combination works; names the numbers, and where the most promising attempt failed.
    """
    watched = Watched(twin)
    decided: dict[Key, _Decision | None] = {}
    failed: list[dict[Key, int]] = []
    best: tuple[tuple[int, bool], Failure, dict[Key, int]] | None = None
    for _ in range(_FORWARDS):
        active = [d for d in decided.values() if d is not None]
        chosen = next(_untried(active, failed), None)
        if chosen is None:
            break
        for decision in active:
            decision.apply(chosen[decision.key])
        watched.start()
        failure = check(twin)
        read = watched.read()
        fresh = [key for key in read if key not in decided]
        decided |= {key: _decision(key, watched, sizes, settled) for key in fresh}
        if any(decided[key] for key in fresh):
            continue  # the forward ran with their old values, which are tried again in their turn
        if failure is None:
            return {name: value for d in active for name, value in d.changes(chosen[d.key]).items()}
        reached = (len(read), failure.module is None)  # an attempt that only differs at the end has come further
        if best is None or reached > best[0]:
            best = (reached, failure, chosen)
        _log.debug("%s: %s", {key[1]: n for key, n in chosen.items()}, failure)
        failed.append({key: chosen[key] for key in read if key in chosen})
    seen = [Seen(h, d.key[1], d.old[k], d.choices[0][k]) for d in decided.values() if d for k, h in enumerate(d.holders)]
    seen = [each for each in seen if each.tried != each.old]
    failure = None
    if best is not None:
        for decision in filter(None, decided.values()):
            decision.apply(best[2].get(decision.key, decision.choices.index(decision.old)))
        failure = check.explained(twin, best[1], sizes)
    raise WriteBackError(*message_of(failure, twin, seen, sizes))


def _untried(active: list[_Decision], failed: list[dict[Key, int]]) -> Iterator[dict[Key, int]]:
    """Combinations that do not contain a failed one, by the sum of the ranks of their choices."""
    looked = 0
    for total in range(sum(len(d.choices) - 1 for d in active) + 1):
        for ranks in _ranks([len(d.choices) for d in active], total):
            chosen = {d.key: rank for d, rank in zip(active, ranks)}
            if not any(all(chosen[key] == rank for key, rank in bad.items()) for bad in failed):
                yield chosen
            looked += 1
            if looked > _COMBINATIONS:
                return


def _ranks(lengths: list[int], total: int) -> Iterator[tuple[int, ...]]:
    if not lengths:
        if not total:
            yield ()
        return
    for first in range(min(lengths[0] - 1, total) + 1):
        for rest in _ranks(lengths[1:], total - first):
            yield (first, *rest)


def _decision(key: Key, watched: Watched, sizes: Sizes, settled: set[tuple[str, str]]) -> _Decision | None:
    """``None`` if no number of the attribute describes an axis that got shorter."""
    holders = tuple(h for h in watched.families[key[0]] if h.numbers(key[1]) and (h.path, key[1]) not in settled)
    old = tuple(h.numbers(key[1]) for h in holders)
    found = [[sizes.what_became(number, h.places) for number in value] for h, value in zip(holders, old)]
    whole = [_values(kind, rank, found, old) for kind in KINDS for rank in range(3)]
    longest = max(map(len, old), default=0)
    single = [_only(k, choice, old) for choice in whole for k in range(longest)] if 1 < longest < 4 else []
    choices = [c for c in dict.fromkeys([*whole, *single]) if c != old]
    return _Decision(key, holders, (choices[0], old, *choices[1:]), old) if choices else None


def _values(kind: str, rank: int, found: list[list[dict[str, list[int]]]], old: tuple[Value, ...]) -> tuple[Value, ...]:
    """The new numbers of a holder by ``kind``, or by another kind where that one has none."""

    def one(became: dict[str, list[int]], number: int) -> int:
        values = became.get(kind) or next((became[k] for k in KINDS if k in became), [number])
        return values[min(rank, len(values) - 1)]

    return tuple(tuple(map(one, parts, value)) for parts, value in zip(found, old))


def _only(position: int, choice: tuple[Value, ...], old: tuple[Value, ...]) -> tuple[Value, ...]:
    """The choice at one position of a sequence, the old numbers elsewhere."""
    return tuple((*was[:position], *now[position : position + 1], *was[position + 1 :]) for now, was in zip(choice, old))
