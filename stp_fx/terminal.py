"""The console of the library: rich, imported here alone, and only when something is printed.

Importing rich draws from Python's random numbers. They are put back, so that a seed set before a call holds after it.
"""

from __future__ import annotations

import random

_before = random.getstate()

from rich import box  # noqa: E402
from rich.console import Console, Group, RenderableType  # noqa: E402
from rich.markup import escape  # noqa: E402
from rich.progress import Progress  # noqa: E402
from rich.table import Table  # noqa: E402
from rich.text import Text  # noqa: E402

random.setstate(_before)

__all__ = ["Console", "Group", "Progress", "RenderableType", "Table", "Text", "box", "escape"]
