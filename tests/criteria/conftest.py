from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
import torch

from stp_fx.analysis.groups import Axis, Group, Member

# (tensor name, dim, role, {position: unit})
Touch = tuple[str, int, str, Mapping[int, int]]
MakeGroup = Callable[..., Group]


@pytest.fixture
def make_group() -> MakeGroup:
    """Builds a group from the tensors it touches."""

    def make(tensors: Mapping[str, torch.Tensor], touches: Sequence[Touch], units: int, index: int = 0) -> Group:
        members = []
        for name, dim, role, positions in touches:
            order = sorted(positions)
            axis = Axis(name, dim, tensors[name].shape[dim], role)
            members.append(Member(axis, np.array(order, dtype=np.int64), np.array([positions[k] for k in order], dtype=np.int64)))
        return Group(index, f"group{index}", np.arange(units, dtype=np.int64), tuple(members))

    return make


@pytest.fixture
def identity() -> Callable[[int], dict[int, int]]:
    return lambda size: {k: k for k in range(size)}
