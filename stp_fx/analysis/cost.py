"""The cost of a captured graph as it is; masked units count as removed. ``Survivors`` has the cost under a plan."""

from __future__ import annotations

from torch import fx

from stp_fx.analysis.build import analyze
from stp_fx.analysis.bypass import channels_of
from stp_fx.analysis.counts import Cost
from stp_fx.ir.provenance import provenance_of

__all__ = ["Cost", "cost", "parameter_names"]


def cost(gm: fx.GraphModule) -> Cost:
    """The cost of a captured graph; a masked graph counts what is alive.

    Where data say how many positions are selected (``nonzero``, a mask as an index, tokens sent to an expert by number), all
    are counted: an upper bound, and not what one example costs.

    Raises:
        InputError: ``gm`` carries no recorded example inputs.
    """
    masked = provenance_of(gm).masked
    if masked is not None:
        gm, masked = channels_of(gm, masked)
    return analyze(gm).survivors(masked, partial=True).cost


def parameter_names(gm: fx.GraphModule) -> list[str]:
    """Parameters, tied ones under their first name."""
    return [name for name, _ in gm.named_parameters()]
