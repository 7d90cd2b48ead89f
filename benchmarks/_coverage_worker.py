"""One network of the coverage run: ``python _coverage_worker.py NAME`` prints one line of JSON."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from _common import timed
from _counted import counted_macs, counted_params
from _coverage_networks import Inputs, Network, network
from torch import Tensor, fx, nn

import stp_fx
from stp_fx.ir.caches import without_caches
from stp_fx.ir.provenance import provenance_of
from stp_fx.ir.train_eval import ALONE

BATCH, OTHER_BATCH, RATIO = 2, 3, 0.5
SEEDS = 8
LAW_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Relative to the largest output."""


def build(subject: Network) -> nn.Module:
    """The network in eval mode, float32, of the first seed whose outputs are all finite and none the same everywhere.

    Every parameter and statistic is random, so that no channel is constant by chance. If no seed gives such outputs, some are
    constant by the network's own code; the seed is then the one with the fewest.
    """
    silent: dict[int, int] = {}
    for seed in range(SEEDS):
        model = _random(subject, seed)
        silent[seed] = _silent_outputs(model, subject)
        if not silent[seed]:
            return model
    return _random(subject, min(silent, key=silent.__getitem__))


def _random(subject: Network, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = subject.build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            _randomise(parameter)
        part = model.get_submodule(subject.part) if subject.part else model
        _calibrate(part, subject)
    return model


def _silent_outputs(model: nn.Module, subject: Network) -> int:
    """How many outputs no comparison says anything about: a head of ReLUs may give zeros alone."""
    part = model.get_submodule(subject.part) if subject.part else model
    with torch.no_grad():
        outputs = flatten(call(part, subject.inputs(BATCH, subject.resizable, torch.float32), subject))
    return sum(not o.isfinite().all() or (o.numel() > 1 and bool((o == o.flatten()[0]).all())) for o in outputs)


def _randomise(parameter: Tensor) -> None:
    """Norm scales away from 1, shifts away from 0; no all-zero weights, no layer scale of 1e-6."""
    constant = bool((parameter == parameter.flatten()[0]).all())
    if constant and parameter.flatten()[0] > 0:
        parameter.uniform_(0.5, 1.5)
    elif constant or parameter.ndim == 1:
        parameter.normal_(0, 0.2)


def _calibrate(model: nn.Module, subject: Network) -> None:
    """Running statistics near those of random inputs, so that a signal reaches the output, then moved off them."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    call(model, subject.inputs(4, True, torch.float32), subject)
    for norm, momentum in zip(norms, momenta):
        norm.eval().momentum = momentum
        norm.running_mean += 0.2 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
        norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.5, 1.5)


def call(module: nn.Module, inputs: Inputs, subject: Network | None = None) -> Any:
    """A traced graph takes no constants any more; the original does, and is called as it is captured: without a cache."""
    positional, named = inputs
    with without_caches(module):
        return module(*positional, **named, **(subject.constants if subject else {}))


def flatten(outputs: Any) -> list[Tensor]:
    """The floating tensors of an output, however it nests them."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def shapes(outputs: Any) -> list[tuple[int, ...]]:
    return [tuple(item.shape) for item in flatten(outputs)]


@dataclasses.dataclass
class Run:
    """The findings so far. A check that fails does not stop those that do not need it."""

    name: str
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    checks: dict[str, bool] = dataclasses.field(default_factory=dict)
    errors: dict[str, str] = dataclasses.field(default_factory=dict)

    @contextmanager
    def check(self, name: str) -> Iterator[Callable[[bool, str], None]]:
        self.checks[name] = True

        def expect(truth: bool, otherwise: str) -> None:
            if not truth:
                self.checks[name] = False
                self.errors.setdefault(name, otherwise)

        try:
            yield expect
        except Exception as error:
            traceback.print_exc()
            lines = str(error).strip().splitlines() or ["no message"]
            expect(False, f"{type(error).__name__}: {lines[0][:300]}")


def trace(subject: Network, model: nn.Module, inputs: Inputs, validate: str | bool = False) -> fx.GraphModule:
    positional, named = inputs
    return stp_fx.trace(model, positional, kwargs={**named, **subject.constants}, validate=validate)


def check_validation(run: Run, model: nn.Module, inputs: Inputs, subject: Network) -> None:
    """The library's own checks, which users have by default: they find no difference, and pin nothing."""
    with run.check("validated") as expect:
        gm = trace(subject, model, inputs, validate="auto")
        report = stp_fx.report_of(stp_fx.prune_graph(gm, criterion="magnitude", ratio=RATIO))
        found = report.validation
        assert found is not None
        run.facts |= {
            "validation": found.to_dict(),
            "validation_error": max(found.differences.values(), default=None),
            "validation_forwards": found.forwards,
            "validation_seconds": found.seconds,
        }
        announced = [note for note in provenance_of(gm).notes if note.startswith(ALONE)]
        expect(not found.differs, "; ".join(announced) or f"differs: {dict(found.differs)}")
        pinned = [note for note in report.notes if note.startswith("pinned, since")]
        expect(not pinned, "; ".join(pinned))


def check_outputs(run: Run, model: nn.Module, gm: fx.GraphModule, inputs: Inputs, subject: Network) -> None:
    with run.check("output") as expect, torch.no_grad():
        theirs, ours = call(model, inputs, subject), call(gm, inputs)
        expect(shapes(theirs) == shapes(ours), f"traced: {shapes(ours)}, module: {shapes(theirs)}")
        error = largest_error(theirs, ours)
        run.facts["trace_error"] = error
        expect(error <= 1e-5, f"traced outputs differ by {error:.1e}")


def check_runs(run: Run, gm: fx.GraphModule, pruned: fx.GraphModule, inputs: Callable[[int], Inputs]) -> None:
    """Shapes in both modes, at both batch sizes, against the traced network in the same mode."""
    with torch.no_grad():
        wanted = {mode: shapes(call(gm.train(mode), inputs(BATCH))) for mode in (False, True)}
        for name, batch in (("shapes", BATCH), ("batch", OTHER_BATCH)):
            with run.check(name) as expect:
                for mode, of_traced in wanted.items():
                    found = shapes(call(pruned.train(mode), inputs(batch)))
                    right = found == [with_batch(shape, batch) for shape in of_traced]
                    expect(right, f"batch {batch}, {'train' if mode else 'eval'}: {found}, traced: {of_traced}")
    gm.eval()
    pruned.eval()


def with_batch(shape: tuple[int, ...], batch: int) -> tuple[int, ...]:
    """A shape of another batch, which is the first dimension of the recorded batch's size: decoders stack layers before it."""
    at = shape.index(BATCH) if BATCH in shape else 0
    return (*shape[:at], batch, *shape[at + 1 :])


def check_step(run: Run, gm: fx.GraphModule, pruned: fx.GraphModule, inputs: Inputs) -> None:
    with run.check("step") as expect:
        parameters = [p for p in pruned.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=1e-6)
        without = _without_gradient(pruned, inputs)
        run.facts["parameters_without_gradient"] = without
        lost = set(without) - set(_without_gradient(gm, inputs)) if without else ()
        expect(not lost, f"no gradient for {sorted(lost)[:3]}")
        expect(all(bool(p.grad.isfinite().all()) for p in parameters if p.grad is not None), "a gradient is not finite")
        optimizer.step()
        gm.zero_grad()


def _without_gradient(gm: fx.GraphModule, inputs: Inputs) -> list[str]:
    sum(output.square().mean() for output in flatten(call(gm.train(), inputs))).backward()
    gm.eval()
    return [name for name, p in gm.named_parameters() if p.requires_grad and p.grad is None]


def check_cost(run: Run, model: nn.Module, gm: fx.GraphModule, pruned: fx.GraphModule, inputs: Inputs, subject: Network) -> None:
    with run.check("cost") as expect:
        own = counted_macs(model, inputs, subject, original=True)
        masked = stp_fx.apply_plan(gm, stp_fx.plan_of(pruned), mask=True)
        before, after, predicted = stp_fx.cost(gm), stp_fx.cost(pruned), stp_fx.cost(masked)
        run.facts |= {
            "macs_before": before.macs // BATCH,
            "macs_after": after.macs // BATCH,
            "params_before": before.params,
            "params_after": after.params,
        }
        measured = counted_macs(pruned, inputs, subject), counted_params(pruned)
        expect(before.macs == own, f"MACs of the network: {before.macs:,}, counted {own:,}")
        expect(before.params == counted_params(gm), f"parameters: {before.params:,}, counted {counted_params(gm):,}")
        for label, cost in (("stated", after), ("predicted", predicted)):
            expect(cost.macs == measured[0], f"MACs after: {label} {cost.macs:,}, counted {measured[0]:,}")
            expect(cost.params == measured[1], f"parameters after: {label} {cost.params:,}, counted {measured[1]:,}")


def check_law(run: Run, model: nn.Module, subject: Network) -> None:
    """``masked(x) == removed(x)``, in double precision where the module can do it, on a plan over the exact groups.

    Changes the model's dtype.
    """
    with run.check("law") as expect, torch.no_grad():
        inputs = subject.inputs(BATCH, True, subject.dtype)
        gm = trace(subject, model.to(subject.dtype), inputs)
        graph = stp_fx.analyze(gm)
        inexact = inexact_axes(graph)
        if len(inexact) == len(graph.groups):
            run.facts["law_not_applicable"] = f"no group is exact: {graph.groups[0].notes}"
            return
        removed = stp_fx.prune_graph(gm, criterion="magnitude", ratio=RATIO, ignore=inexact, validate=False)
        after, plan = call(removed, inputs), stp_fx.plan_of(removed)
        del removed
        before = call(gm, inputs)
        masked = call(stp_fx.apply_plan(gm, plan, mask=True), inputs)
        error, effect = largest_error(masked, after), largest_error(before, after)
        run.facts |= {"law_error": error, "law_effect": effect, "law_axes": len(plan.kept), "law_dtype": str(subject.dtype)}
        expect(error <= LAW_TOLERANCE[subject.dtype], f"masked and removed differ by {error:.1e} of the largest output")
        expect(effect > 1e-6, f"pruning changed the output by {effect:.1e} only: the law was not put to a test")


def check_whole(run: Run, model: nn.Module, subject: Network) -> None:
    """A model of which only a part is pruned still detects, and trains."""
    with run.check("whole") as expect:
        images = subject.whole(BATCH)
        pruned = stp_fx.prune_submodule(model, subject.part, images, "magnitude", RATIO)
        with torch.no_grad():
            found = pruned(images)
        expect(len(found) == BATCH and all(bool(v.isfinite().all()) for v in pytree.tree_leaves(found)), "detections")
        boxes = [{"boxes": torch.tensor([[8.0, 8.0, 80.0, 80.0]]), "labels": torch.tensor([1])}] * BATCH
        loss = sum(pruned.train()(images, boxes).values())
        loss.backward()
        expect(bool(loss.isfinite()), f"the training loss is {loss}")


def forward_seconds(model: nn.Module, inputs: Inputs, subject: Network) -> float:
    """The processor time of a call of the network, which other processes on the machine do not lengthen."""
    with torch.no_grad():
        call(model, inputs, subject)
        before = time.process_time()
        call(model, inputs, subject)
    return time.process_time() - before


def largest_error(expected: Any, found: Any) -> float:
    """Over all outputs, relative to the largest value of each; infinite where one of them is not finite."""
    errors = [relative_error(a, b) for a, b in zip(flatten(expected), flatten(found), strict=True)]
    return math.inf if any(map(math.isnan, errors)) else max(errors)


def relative_error(expected: Tensor, found: Tensor) -> float:
    difference, largest = (expected - found).abs().max().item(), expected.abs().max().item()
    return difference / largest if largest else math.inf if difference else 0.0


def inexact_axes(graph: stp_fx.ChannelGraph) -> list[str]:
    """The names to ignore so that only exact groups are pruned."""
    return [group.name for group in graph.groups if not group.exact]


def pinned_axes(graph: stp_fx.ChannelGraph) -> dict[str, int]:
    """How many axes of parameters and buffers cannot lose an index, by the first reason that the analysis gives."""
    touched = {member.axis.name for group in graph.groups for member in group.members}
    counts: collections.Counter[str] = collections.Counter()
    for axis in graph.axes:
        if axis.name not in touched:
            reason = graph.pin_reasons(axis.name)[0]
            counts[re.sub(r" \(nodes? '.*", "", reason)] += 1
    return dict(counts.most_common())


def main(name: str, only: str = "") -> None:
    run, subject = Run(name), network(name)
    whole = build(subject)
    model = whole.get_submodule(subject.part) if subject.part else whole
    if only == "validation":
        check_validation(run, model, subject.inputs(BATCH, False, torch.float32), subject)
        print(json.dumps({**run.facts, "checks": run.checks, "errors": run.errors}))
        return
    gm: fx.GraphModule | None
    pruned: fx.GraphModule | None
    example = subject.inputs(BATCH, False, torch.float32)

    def inputs(batch: int) -> Inputs:
        """Full computations use small inputs where the traced network takes them."""
        return subject.inputs(batch, subject.resizable, torch.float32)

    with run.check("prune"):
        forward_cpu = forward_seconds(model, example, subject)
        before = time.process_time()
        trace_seconds, gm = timed(lambda: trace(subject, model, example))
        prune_seconds, pruned = timed(lambda: stp_fx.prune_graph(gm, criterion="magnitude", ratio=RATIO, validate=False))
        prune_cpu = time.process_time() - before
        graph = stp_fx.analyze(gm)
        pinned = pinned_axes(graph)
        run.facts |= {
            "frontend": provenance_of(gm).frontend,
            "trace_seconds": trace_seconds,
            "prune_seconds": trace_seconds + prune_seconds,
            "prune_cpu_seconds": prune_cpu,
            "forward_cpu_seconds": forward_cpu,
            "groups": len(graph.groups),
            "exact_groups": sum(group.exact for group in graph.groups),
            "units": sum(group.size for group in graph.groups),
            "pinned_axes": sum(pinned.values()),
            "pinned": pinned,
            "notes": provenance_of(gm).notes,
        }
        check_outputs(run, model, gm, inputs(BATCH), subject)
        check_cost(run, model, gm, pruned, example, subject)
        check_runs(run, gm, pruned, inputs)
        check_step(run, gm, pruned, inputs(BATCH))
    gm = pruned = None  # frees what the checks below need
    check_validation(run, model, example, subject)
    if subject.part:
        check_whole(run, whole, subject)
    check_law(run, model, subject)
    print(json.dumps({**run.facts, "checks": run.checks, "errors": run.errors}))


if __name__ == "__main__":
    main(*sys.argv[1:])
