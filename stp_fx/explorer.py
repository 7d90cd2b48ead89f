"""``explore``: a network, its groups and what is removed from it, as one page for a browser."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

import stp_fx.views.page as pages
from stp_fx.analysis.build import analyze
from stp_fx.analysis.plan import PrunePlan
from stp_fx.checks import check_flag, is_a
from stp_fx.errors import InputError
from stp_fx.ir.provenance import provenance_of
from stp_fx.ir.stamp import stamp_of
from stp_fx.measure.latency import take_turns
from stp_fx.passes.artifacts import Artifacts
from stp_fx.paths import path_of, replacing
from stp_fx.report.compare import compare, units_left
from stp_fx.report.explored import Shown, explored

__all__ = ["Explorer", "explore"]

_RUNS = 5


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Explorer:
    """The page that :func:`stp_fx.explore` makes; a notebook shows it. ``data`` is its content, as plain data for JSON."""

    data: Mapping[str, Any]

    def to_html(self) -> str:
        """The page: one HTML document that loads nothing from elsewhere."""
        return pages.page(self.data)

    def save(self, path: str | pathlib.Path) -> pathlib.Path:
        """Writes the page, whole or not at all; returns its path.

        Raises:
            InputError: the path does not end in ``.html``.
            FileError: the file cannot be written.
        """
        target = _checked(path)
        text = self.to_html()
        with replacing(str(target)) as partial:
            pathlib.Path(partial).write_text(text, encoding="utf-8")
        return target

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(self.data[each]):,} {each}" for each in ("boxes", "scopes", "groups"))
        return f"Explorer({self.data['title']!r}: {counts})"

    def _repr_html_(self) -> str:
        return pages.framed(self.to_html())


def explore(
    gm: fx.GraphModule,
    path: str | pathlib.Path | None = None,
    *,
    pruned: fx.GraphModule | None = None,
    plan: PrunePlan | None = None,
    artifacts: Artifacts | None = None,
    latency: bool = False,
    title: str | None = None,
) -> Explorer:
    """One HTML page about a captured graph: modules that unfold, groups in colours and by name, what each channel is coupled to,
    why axes are pinned, and, of a pruned graph or a plan, what is kept and what that saves.

    The page works without a network. ``gm`` is only read, and not run unless ``latency`` is True.

    Args:
        gm: a graph that :func:`trace` returned, or that passes made of one. Masked channels are shown as removed.
        path: where the page is written (``.html``); None: nowhere, which is enough for a notebook.
        pruned: what passes made of ``gm``; the page then shows both, as :func:`compare` does.
        plan: a plan for ``gm`` that has not been carried out, in place of ``pruned``.
        artifacts: of a pipeline that ran on ``gm``: scores, damage curves, and the plan if neither of the two above is given.
        latency: measures the seconds of each layer on the recorded example (median of 5 runs), and of ``pruned`` beside it.
        title: a name for the network; that of its class if None.

    Raises:
        InputError: ``gm`` is not a captured graph, ``pruned`` does not come from it, both ``pruned`` and ``plan``, a path that
            does not end in ``.html``, or latency asked for without weights (the meta device).
        PlanError: the plan does not fit ``gm``; names the axis.
        FileError: the file cannot be written.

    Example:
        >>> from torch import nn, randn
        >>> import stp_fx
        >>> gm = stp_fx.trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), randn(1, 3, 8, 8))
        >>> stp_fx.explore(gm, plan=stp_fx.analyze(gm).plan_for({"0": [1, 5]}))
        Explorer('Sequential': 4 boxes, 0 scopes, 1 groups)
    """
    if path is not None:
        _checked(path)
    if pruned is not None and plan is not None:
        raise InputError("give `pruned` or `plan`, not both: the plan of a pruned graph is stp_fx.plan_of(pruned)")
    if plan is not None and not is_a(plan, PrunePlan):
        raise InputError(f"`plan` is a {type(plan).__name__}; give a PrunePlan (PrunePlan.from_json reads one)")
    if artifacts is not None and not is_a(artifacts, Artifacts):
        raise InputError(f"`artifacts` are a {type(artifacts).__name__}; give those of an Outcome: `pipeline(gm).artifacts`")
    provenance_of(gm)
    if artifacts is not None and pruned is None and plan is None:
        plan = artifacts.plan
    made = Explorer(_data(gm, pruned, plan, artifacts or Artifacts(), check_flag("latency", latency), title))
    if path is not None:
        made.save(path)
    return made


def _data(
    gm: fx.GraphModule,
    pruned: fx.GraphModule | None,
    plan: PrunePlan | None,
    artifacts: Artifacts,
    latency: bool,
    title: str | None,
) -> dict[str, Any]:
    known = provenance_of(gm)
    for made in (artifacts.scores, artifacts.damages):
        if made is not None and made.stamp is not None and made.stamp.structure != stamp_of(gm).structure:
            raise InputError("`artifacts` were made from another graph: give those of a pipeline that ran on `gm`")
    report = provenance_of(pruned).report if pruned is not None else artifacts.report or known.report
    totals, units = _totals(gm, pruned, plan, latency)
    scores = {} if report is None else {g.name: (g.lowest, g.highest) for g in report.groups}
    if artifacts.scores is not None:
        pairs = zip(artifacts.scores.groups, artifacts.scores.values, strict=True)
        scores |= {group.name: (float(values.min()), float(values.max())) for group, values in pairs}
    shown_ = Shown(
        units,
        known.plan or PrunePlan({}, {}),
        _seconds(gm, pruned) if latency else (),
        {name: ends for name, ends in scores.items() if np.isfinite(ends).all()},
        {} if artifacts.damages is None else artifacts.damages.curves,
    )
    done = known.plan if pruned is None else provenance_of(pruned).plan
    carried_out = plan or done
    facts = [("captured by", {"fx": "torch.fx", "export": "torch.export"}.get(known.frontend, known.frontend)), *_inputs(gm)]
    return {
        "title": title or type(gm).__name__,
        "facts": [*facts, *(("note", note) for note in (*known.notes, *(report.notes if report else ())))],
        "totals": totals,
        "plan": None if carried_out is None or carried_out.is_empty else carried_out.to_json(),
        **explored(gm, shown_),
    }


def _totals(
    gm: fx.GraphModule, pruned: fx.GraphModule | None, plan: PrunePlan | None, latency: bool
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Rows of the table before / after, and which units are kept (bool, one per unit)."""
    graph, known = analyze(gm), provenance_of(gm)
    if pruned is not None:
        units, report = units_left(gm, pruned), compare(gm, pruned, latency=latency)
        found = {name: value for name, value in report.to_dict().items() if name in _ROWS}
        rows = {name: (value["before"], value["after"]) for name, value in found.items()}
    else:
        left = graph.survivors(plan if plan is not None else known.masked, partial=True)
        units, whole = left.units, graph.survivors().cost
        rows = {"macs": (whole.macs, left.macs), "params": (whole.params, left.params)}
        if known.report is not None and plan is None and known.masked is None:
            rows = {"macs": known.report.macs, "params": known.report.params}
    rows = {"units": (graph.units, int(units.sum())), **rows}
    return [{"name": _ROWS[name][0], "unit": _ROWS[name][1], "values": list(pair)} for name, pair in rows.items()], units


_ROWS = {
    "units": ("units", ""),
    "macs": ("MACs", ""),
    "params": ("parameters", ""),
    "bytes": ("file size", "B"),
    "seconds": ("latency", "s"),
}


def _seconds(gm: fx.GraphModule, pruned: fx.GraphModule | None) -> tuple[Mapping[str, float], ...]:
    """Seconds of every node, before and after."""
    graphs = [gm] if pruned is None else [gm, pruned]
    if any(tensor.is_meta for each in graphs for tensor in (*each.parameters(), *each.buffers())):
        raise InputError("`latency` runs the network, and its weights are on the meta device: load them first")
    return tuple(take_turns(graphs, _RUNS))


def _inputs(gm: fx.GraphModule) -> list[tuple[str, str]]:
    names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    given = zip(names, provenance_of(gm).inputs, strict=False)
    tensors = [(name, value) for name, value in given if isinstance(value, torch.Tensor)]
    return [("input", f"{name}: {str(v.dtype).removeprefix('torch.')} {list(v.shape)}") for name, v in tensors]


def _checked(path: str | pathlib.Path) -> pathlib.Path:
    target = pathlib.Path(path_of(path))
    if target.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"cannot write the page to {target.name!r}: the name must end in .html")
    return target
