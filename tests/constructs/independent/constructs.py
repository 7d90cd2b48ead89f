"""All constructs: importing this registers them."""

import importlib
from pathlib import Path

from .registry import CASES

for _file in sorted(Path(__file__).parent.glob("constructs_*.py")):
    importlib.import_module(f"{__package__}.{_file.stem}")

__all__ = ["CASES"]
