"""How many random networks: a quick profile, and `make fuzz` (``--hypothesis-profile=fuzz``, or STP_FX_FUZZ=2000)."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

FUZZ = 2000

settings.register_profile("fuzz", max_examples=FUZZ)


def wanted_examples(quick: int) -> int:
    """Networks in all: STP_FX_FUZZ if it is set, else the fuzz profile's number, else ``quick``."""
    if count := os.environ.get("STP_FX_FUZZ"):
        return int(count)
    return FUZZ if settings.get_current_profile_name() == "fuzz" else quick


def shard_settings(examples: int) -> settings:
    """Settings of one shard: a fixed number of examples, the same every time; shrinking one takes minutes."""
    fuzzing = bool(os.environ.get("STP_FX_FUZZ")) or settings.get_current_profile_name() == "fuzz"
    return settings(
        max_examples=examples,
        phases=(Phase.generate, Phase.shrink) if fuzzing else (Phase.generate,),
        database=None,
        deadline=None,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
