"""The changes that a change of basis makes to the structure of a graph, as plain data, for another process to repeat.

Values are not recorded: a file holds those. A record is a JSON text: a norm that was written out and is a call now, a LayerNorm
that is an RMSNorm, a tied parameter that is two.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import fx

from stp_fx.analysis.norm_calls import norm_calls
from stp_fx.errors import FileError, NothingToRotateError
from stp_fx.ir.provenance import with_provenance
from stp_fx.rewrite.basis.centre import to_rms_norm
from stp_fx.rewrite.basis.ties import untied
from stp_fx.rewrite.basis.written_norms import FusedNorm, fuse_norm

__all__ = ["record_of", "replay"]


def record_of(change: FusedNorm | str | tuple[str, Collection[str]]) -> str:
    """``change``: a fused norm, the node of a norm that became an RMSNorm, or a tied parameter and calls that got their own."""
    if isinstance(change, FusedNorm):
        return json.dumps({"fused": dataclasses.asdict(change)})
    if isinstance(change, str):
        return json.dumps({"rms": change})
    name, nodes = change
    return json.dumps({"untied": name, "nodes": sorted(nodes)})


def replay(gm: fx.GraphModule, records: Sequence[str]) -> None:
    """Makes the recorded changes of structure in ``gm``, in place.

    Raises:
        FileError: a record that is none, or that does not fit the graph.
    """
    for text in records:
        try:
            _repeat(gm, json.loads(text))
        except (AttributeError, KeyError, StopIteration, TypeError, ValueError, NothingToRotateError) as error:
            raise FileError(
                f"damaged, or of another network: a change of basis does not fit it: {text[:120]} ({error})"
            ) from error
    if records:
        gm.recompile()
        with_provenance(gm, basis=tuple(records))


def _repeat(gm: fx.GraphModule, change: dict[str, Any]) -> None:
    if "fused" in change:
        fuse_norm(gm, FusedNorm(**change["fused"]))
    elif "rms" in change:
        to_rms_norm(gm, next(norm for norm in norm_calls(gm) if norm.node.name == change["rms"]))
    else:
        untied(gm, change["untied"], _nodes(gm, change["nodes"]))


def _nodes(gm: fx.GraphModule, names: Iterable[str]) -> list[fx.Node]:
    by_name = {node.name: node for node in gm.graph.nodes}
    return [by_name[name] for name in names]
