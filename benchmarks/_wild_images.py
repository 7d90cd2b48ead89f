"""Networks on images and volumes from other libraries, for ``coverage.py wild``: small configurations, random weights."""

from __future__ import annotations

from _coverage_networks import Network

__all__ = ["IMAGES"]

IMAGES: dict[str, Network] = {}
