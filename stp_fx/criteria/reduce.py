"""From per-index values to one score a unit: combine indices, reduce over the group's axes, normalise in the group.

Report, section 1.3.1 (reductions) and 1.3.2 (normalisers). LAMP: Lee et al., "Layer-adaptive sparsity for the
magnitude-based pruning", arXiv 2010.07611, equation 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from stp_fx.analysis.groups import Axis, Group, Member
from stp_fx.checks import is_choice, shown
from stp_fx.errors import CriterionError, InputError

__all__ = [
    "NORMALIZERS",
    "REDUCTIONS",
    "check_choice",
    "check_combining",
    "combine",
    "first_only",
    "local_sums",
    "members_with",
    "normalize_scores",
    "reduce_scores",
    "scored_members",
    "sum_by_unit",
]

REDUCTIONS = ("mean", "max", "sum", "prod", "first", "gate")
"""How the local scores of a group's axes become one score a unit; "first" and "gate" read the first weight axis alone."""

NORMALIZERS = ("none", "mean", "max", "gaussian", "lamp")
"""How the scores of a group are scaled, so that those of different groups can be compared; all keep their order."""

# Powers of two between which a product of scores is left as it is; float64 ends at 2^1024 and 2^-1022.
_LARGEST_EXPONENT = 1000.0


def check_choice(what: str, value: object, known: Sequence[str]) -> None:
    """Raise :class:`InputError` unless ``value`` is one of ``known``."""
    if not is_choice(value, known):
        raise InputError(f"unknown {what} {shown(value)}; known: {', '.join(known)}")


def check_combining(reduction: str, normalizer: str) -> None:
    """Raise :class:`InputError` unless both names are known: the check of every criterion's two fields."""
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("normalizer", normalizer, NORMALIZERS)


def combine(local: np.ndarray, reduction: str, normalizer: str) -> torch.Tensor:
    """Local scores [axes or activation inputs, units] to the scores of a group: float64 [units], reduced and then normalised."""
    return torch.from_numpy(normalize_scores(reduce_scores(local, reduction), normalizer))


def members_with(group: Group, roles: Sequence[str]) -> tuple[Member, ...]:
    """The axes of the group that play one of ``roles``."""
    return tuple(member for member in group.members if member.axis.role in roles)


def first_only(members: tuple[Member, ...], reduction: str) -> tuple[Member, ...]:
    """All of them, or for "first" and "gate" the first weight alone."""
    if reduction not in ("first", "gate"):
        return members
    return (next((member for member in members if member.axis.role == "weight"), members[0]),)


def scored_members(
    group: Group, reduction: str, roles: Sequence[Sequence[str]] = (("weight", "scale"), ("bias", "other"))
) -> tuple[Member, ...]:
    """The axes of the group that a weight criterion reads: weights and scales; "first" and "gate": the first weight.

    ``roles`` lists the roles that are read, and those to fall back to in a group without any; a group with neither, such as one
    of buffers alone, raises :class:`CriterionError`.
    """
    found = next(filter(None, (members_with(group, choice) for choice in roles)), ())
    if not found:
        axes = ", ".join(member.axis.name for member in group.members) or "no axes at all"
        raise CriterionError(
            f"group {group.name!r} has no parameter to score, only {axes}; put it in `ignore`, or use a "
            "criterion that does not read weights"
        )
    return first_only(found, reduction)


def local_sums(group: Group, members: Sequence[Member], values: Callable[[Axis], np.ndarray]) -> np.ndarray:
    """For every member the sums of ``values(axis)`` [axis size] over each unit's positions: float64 [members, units]."""
    return np.stack([sum_by_unit(member, values(member.axis), group.size) for member in members])


def sum_by_unit(member: Member, values: np.ndarray, units: int) -> np.ndarray:
    """Add up ``values`` [axis size] over the positions of each unit: float64 [units]."""
    return np.bincount(member.unit, weights=values[member.index], minlength=units)


def reduce_scores(local: np.ndarray, reduction: str) -> np.ndarray:
    """Reduce local scores [axes, units] to [units].

    "prod" divides the whole group by one constant where the product would leave the range of float64.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    if reduction == "mean":
        return local.mean(axis=0)
    if reduction == "max":
        return local.max(axis=0)
    if reduction == "sum":
        return local.sum(axis=0)
    if reduction == "prod":
        return _product(local)
    return local[0]


def _product(local: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", over="ignore", under="ignore"):
        plain = local.prod(axis=0)
        exponents = np.log2(np.abs(local)).sum(axis=0)
    live = exponents[np.isfinite(exponents)]
    if not np.isfinite(local).all() or live.size == 0 or np.abs(live).max() <= _LARGEST_EXPONENT:
        return plain
    # Centre on the middle of the group; what is still out of range after that is 2^1000 away from its neighbours.
    centred = np.clip(exponents - (live.max() + live.min()) / 2, None, _LARGEST_EXPONENT)
    return np.sign(local).prod(axis=0) * np.exp2(centred)


def normalize_scores(scores: np.ndarray, normalizer: str) -> np.ndarray:
    """Normalise one group's scores [units]; every choice keeps their order.

    "mean" and "max" divide by the mean and the maximum, "gaussian" gives z-scores, "lamp" gives each squared score over
    the sum of the squares of all scores not smaller than it (equal scores stay equal, whatever their order).
    A group whose scores are all zero stays zero.
    """
    check_choice("normalizer", normalizer, NORMALIZERS)
    if normalizer == "none" or scores.size == 0:
        return scores
    if normalizer == "gaussian":
        spread = scores.std()
        # Equal numbers have a standard deviation of rounding noise, not of zero.
        if spread <= 1e-15 * np.abs(scores).max():
            return np.zeros_like(scores)
        return (scores - scores.mean()) / spread
    if normalizer == "lamp":
        return _lamp(scores)
    scale = scores.mean() if normalizer == "mean" else scores.max()
    return scores / scale if scale != 0 else scores


def _lamp(scores: np.ndarray) -> np.ndarray:
    if (scores < 0).any():
        raise CriterionError(
            "the lamp normalizer is for scores of magnitude; it was given negative ones: use 'gaussian' or 'none'"
        )
    largest = scores.max()
    if not np.isfinite(largest) or largest == 0:
        return scores
    order = np.argsort(scores, kind="stable")
    ordered = scores[order]
    squares = np.square(ordered / largest)
    not_smaller = np.cumsum(squares[::-1])[::-1]
    first_of_its_value = np.searchsorted(ordered, ordered, side="left")
    result = np.empty_like(scores)
    result[order] = squares / not_smaller[first_of_its_value]
    return result
