"""What holds for all tests."""

from __future__ import annotations

import torch

for _accelerator in ("cuda", "xpu", "mtia"):
    _module = getattr(torch, _accelerator, None)
    if hasattr(_module, "manual_seed_all") and not _module.is_available():
        # `torch.manual_seed` formats the stack for each of them, to seed it once it is there: half a millisecond a call, and 64
        # calls for one of the independent constructs.
        _module.manual_seed_all = lambda seed: None
