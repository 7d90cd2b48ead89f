"""Networks of ultralytics, from their YAMLs, for ``coverage.py wild``: boxes, masks, keypoints, turned boxes, classes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable

import torch
from _coverage_networks import Inputs, Network
from torch import nn

__all__ = ["DETECTION"]

NAMES = (
    *("yolov8n", "yolov9t", "yolov10n", "yolo11n", "yolo12n", "yolo26n"),
    *("yolov5n", "yolov3-tiny", "yolo11n-seg", "yolo11n-pose", "yolo11n-obb", "yolo11n-cls", "yolo26n-seg"),
    "rtdetr-resnet50",
)


def _build(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        os.environ.setdefault("YOLO_OFFLINE", "true")  # read when the package is imported: nothing is downloaded
        os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.gettempdir())
        from ultralytics import RTDETR, YOLO

        return (RTDETR if name.startswith("rtdetr") else YOLO)(f"{name}.yaml").model

    return build


def _inputs(batch: int, small: bool, dtype: torch.dtype) -> Inputs:
    """Sides are multiples of 32, and have the 300 positions that RT-DETR picks."""
    generator = torch.Generator().manual_seed(batch)
    side = 160 if small else 320
    return (torch.randn(batch, 3, side, side, generator=generator, dtype=dtype),), {}


DETECTION: dict[str, Network] = {name: Network(_build(name), _inputs) for name in NAMES}
