from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from stp_fx.analysis.groups import Group


@pytest.fixture(scope="session")
def make_groups() -> Callable[..., list[Group]]:
    """Groups of the given sizes over units 0..total in a scattered order, so that positions and unit ids differ."""

    def make(sizes: Sequence[int], exact: Sequence[bool] | None = None) -> list[Group]:
        ids = np.random.default_rng(0).permutation(sum(sizes))
        starts = np.cumsum([0, *sizes])
        return [
            Group(
                k + 10,
                f"g{k}",
                np.sort(ids[starts[k] : starts[k + 1]]).astype(np.int64),
                (),
                exact=exact is None or exact[k],
            )
            for k in range(len(sizes))
        ]

    return make
