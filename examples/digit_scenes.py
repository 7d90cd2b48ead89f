"""Scenes to detect things in: scikit-learn's digits on canvases of noise, so that nothing has to be downloaded."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

__all__ = ["SIDE", "scenes"]

SIDE = 160
"""Pixels of a canvas."""

Box = tuple[int, int, int, int]
"""Class, left, top and side, in pixels."""


def scenes(part: str, count: int) -> Iterator[tuple[Image.Image, list[Box]]]:
    """The same images each time; digits that are in "train" are not in "val"."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    chosen = order[:1400] if part == "train" else order[1400:]
    random = np.random.default_rng(1 if part == "train" else 2)
    for _ in range(count):
        yield _scene(digits.images[chosen], digits.target[chosen], random)


def _scene(digits: np.ndarray, labels: np.ndarray, random: np.random.Generator) -> tuple[Image.Image, list[Box]]:
    """Up to five digits that do not overlap, at least one."""
    canvas = random.normal(60, 20, (SIDE, SIDE)).clip(0, 255)
    boxes: list[Box] = []
    for _ in range(int(random.integers(2, 6))):
        side = int(random.integers(28, 61))
        left, top = (int(v) for v in random.integers(0, SIDE - side, 2))
        if any(max(x - left - side, left - x - s, y - top - side, top - y - s) < 0 for _, x, y, s in boxes):
            continue
        chosen = int(random.integers(len(digits)))
        boxes.append((int(labels[chosen]), left, top, side))
        digit = Image.fromarray((digits[chosen] * 255 / 16).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
        part = canvas[top : top + side, left : left + side]
        np.maximum(part, np.asarray(digit, dtype=float), out=part)
    return Image.fromarray(canvas.astype(np.uint8)).convert("RGB"), boxes
