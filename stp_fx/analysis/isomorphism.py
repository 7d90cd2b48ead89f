"""Which groups have the same structure, so that their scores can be compared.

Fang et al., "Isomorphic pruning for vision models", ECCV 2024 (arXiv 2407.04616): units of different structures have scores
on different scales, those of one structure rank fairly against each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stp_fx.analysis.groups import Group, Member

__all__ = ["isomorphism_classes"]


def isomorphism_classes(groups: Sequence[Group], shapes: Mapping[str, tuple[int, ...]]) -> list[int]:
    """One number a group, in order of first appearance; equal for groups of the same structure.

    The structure is the multiset of axes that a group touches: what the tensor does, its shape (without the axis's own
    length, which may be shared with other groups), which dimension it is, and how many positions a unit has there. Names
    and places in the network do not count. ``shapes`` gives every tensor's shape.
    """
    seen: dict[tuple[object, ...], int] = {}
    return [seen.setdefault(_structure(group, shapes), len(seen)) for group in groups]


def _structure(group: Group, shapes: Mapping[str, tuple[int, ...]]) -> tuple[object, ...]:
    return (group.size, *sorted(_touch(member, group, shapes) for member in group.members))


def _touch(member: Member, group: Group, shapes: Mapping[str, tuple[int, ...]]) -> tuple[object, ...]:
    axis = member.axis
    others = tuple(size for dim, size in enumerate(shapes[axis.tensor]) if dim != axis.dim)
    return (axis.role, axis.side, axis.dim, len(shapes[axis.tensor]), others, len(member.index) // max(group.size, 1))
