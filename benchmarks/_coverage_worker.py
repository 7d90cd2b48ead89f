"""One network of the coverage run: ``python _coverage_worker.py NAME`` prints one line of JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torchvision
from _common import timed
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

import stp_fx

BATCH, OTHER_BATCH, RATIO = 2, 3, 0.5
LAW_TOLERANCE = 1e-9
# What the module's own factory needs to build quickly and without warnings.
OPTIONS: dict[str, dict[str, Any]] = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}
TIMM = "timm:"
IMAGE = {"inception_v3": 299}
# In double precision, smaller images where the network takes them: the law is about channels, not about pixels.
SMALL_IMAGE = {"inception_v3": 96}
FIXED_IMAGE = ("vit_", "maxvit")
# Padding to whole windows follows the image size and is fixed by the trace, so these are traced anew for smaller images.
IMAGE_IN_TRACE = ("swin",)


def build(name: str) -> nn.Module:
    """The network in eval mode, float32; every parameter and statistic random, so that no channel is dead by chance."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if name.startswith(TIMM):
            import timm

            model = timm.create_model(name.removeprefix(TIMM)).eval()
        else:
            model = torchvision.models.get_model(name, weights=None, **OPTIONS.get(name, {})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            _randomise(parameter)
        _calibrate(model, images(4, image_size(name, small=True)))
    return model


def _randomise(parameter: Tensor) -> None:
    """Norm scales away from 1, shifts away from 0; no all-zero weights, no layer scale of 1e-6."""
    constant = bool((parameter == parameter.flatten()[0]).all())
    if constant and parameter.flatten()[0] > 0:
        parameter.uniform_(0.5, 1.5)
    elif constant or parameter.ndim == 1:
        parameter.normal_(0, 0.2)


def _calibrate(model: nn.Module, batch: Tensor) -> None:
    """Running statistics near those of random images, so that a signal reaches the output, then moved off them."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    model(batch)
    for norm, momentum in zip(norms, momenta):
        norm.eval().momentum = momentum
        norm.running_mean += 0.2 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
        norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.5, 1.5)


def image_size(name: str, small: bool = False) -> int:
    if name.startswith(TIMM):
        import timm

        return timm.get_pretrained_cfg(name.removeprefix(TIMM)).input_size[-1]
    native = IMAGE.get(name, 224)
    return native if not small or name.startswith(FIXED_IMAGE) else SMALL_IMAGE.get(name, 64)


def images(batch: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch), dtype=dtype)


def flatten(outputs: Any) -> list[Tensor]:
    """The tensors of an output: GoogLeNet and Inception return tuples in train mode."""
    return [outputs] if isinstance(outputs, Tensor) else [item for item in outputs if isinstance(item, Tensor)]


def shapes(outputs: Any) -> list[tuple[int, ...]]:
    return [tuple(item.shape) for item in flatten(outputs)]


def counted_macs(module: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates by PyTorch's own counter, which knows nothing of stp_fx.

    Run on meta tensors: nothing is computed, and ``nn.MultiheadAttention`` does not take its fused path, which the
    counter does not see into.
    """
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        torch.func.functional_call(module, meta, (torch.empty_like(example, device="meta"),))
    return counter.get_total_flops() // 2


def counted_params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@dataclasses.dataclass
class Run:
    """What was found out so far. A check that fails does not stop those that do not need it."""

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


def check_outputs(run: Run, model: nn.Module, gm: fx.GraphModule, example: Tensor) -> None:
    with run.check("output") as expect, torch.no_grad():
        theirs, ours = model(example), gm(example)
        expect(shapes(theirs) == shapes(ours), f"traced: {shapes(ours)}, module: {shapes(theirs)}")
        error = relative_error(flatten(theirs)[0], flatten(ours)[0])
        run.facts["trace_error"] = error
        expect(error <= 1e-5, f"traced outputs differ by {error:.1e}")


def check_runs(run: Run, gm: fx.GraphModule, pruned: fx.GraphModule, size: int) -> None:
    """Shapes in both modes, at both batch sizes, against the traced network in the same mode."""
    with torch.no_grad():
        wanted = {mode: shapes(gm.train(mode)(images(BATCH, size))) for mode in (False, True)}
        for name, batch in (("shapes", BATCH), ("batch", OTHER_BATCH)):
            with run.check(name) as expect:
                for mode, of_traced in wanted.items():
                    found = shapes(pruned.train(mode)(images(batch, size)))
                    right = found == [(batch, *shape[1:]) for shape in of_traced]
                    expect(right, f"batch {batch}, {'train' if mode else 'eval'}: {found}, traced: {of_traced}")
    gm.eval()
    pruned.eval()


def check_step(run: Run, pruned: fx.GraphModule, size: int) -> None:
    with run.check("step") as expect:
        pruned.train()
        parameters = [p for p in pruned.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=1e-6)
        outputs = flatten(pruned(images(BATCH, size)))
        loss = sum(nn.functional.cross_entropy(output, torch.arange(BATCH)) for output in outputs)
        loss.backward()
        without = [name for name, p in pruned.named_parameters() if p.requires_grad and p.grad is None]
        run.facts["parameters_without_gradient"] = without
        unused = ("aux1.", "aux2.", "AuxLogits.")  # traced in eval mode, they are not part of the graph
        without = [name for name in without if not name.startswith(unused)]
        expect(not without, f"no gradient for {without[:3]}")
        expect(all(bool(p.grad.isfinite().all()) for p in parameters if p.grad is not None), "a gradient is not finite")
        optimizer.step()
        pruned.eval()


def check_cost(run: Run, model: nn.Module, gm: fx.GraphModule, pruned: fx.GraphModule, example: Tensor) -> None:
    with run.check("cost") as expect:
        own = counted_macs(model, example)
        masked = stp_fx.apply_plan(gm, stp_fx.plan_of(pruned), mask=True)
        before, after, predicted = stp_fx.cost(gm), stp_fx.cost(pruned), stp_fx.cost(masked)
        run.facts |= {
            "macs_before": before.macs // BATCH,
            "macs_after": after.macs // BATCH,
            "params_before": before.params,
            "params_after": after.params,
        }
        measured = counted_macs(pruned, example), counted_params(pruned)
        expect(before.macs == own, f"MACs of the network: {before.macs:,}, counted {own:,}")
        expect(before.params == counted_params(gm), f"parameters: {before.params:,}, counted {counted_params(gm):,}")
        for label, cost in (("stated", after), ("predicted", predicted)):
            expect(cost.macs == measured[0], f"MACs after: {label} {cost.macs:,}, counted {measured[0]:,}")
            expect(cost.params == measured[1], f"parameters after: {label} {cost.params:,}, counted {measured[1]:,}")


def check_law(run: Run, model: nn.Module) -> None:
    """``masked(x) == removed(x)`` in double precision, on a plan over the exact groups. Changes the model's dtype."""
    with run.check("law") as expect, torch.no_grad():
        example = images(BATCH, image_size(run.name, small=True), torch.float64)
        gm = stp_fx.trace(model.double(), example)
        inexact = inexact_axes(stp_fx.analyze(gm))
        removed = stp_fx.prune_graph(gm, criterion="magnitude", ratio=RATIO, ignore=inexact)
        after, plan = removed(example), stp_fx.plan_of(removed)
        del removed
        before = gm(example)
        masked = stp_fx.apply_plan(gm, plan, mask=True)(example)
        error = max(relative_error(a, b) for a, b in zip(flatten(masked), flatten(after)))
        effect = max(relative_error(a, b) for a, b in zip(flatten(before), flatten(after)))
        run.facts |= {"law_error": error, "law_effect": effect, "law_axes": len(plan.kept)}
        expect(error <= LAW_TOLERANCE, f"masked and removed differ by {error:.1e} of the largest output")
        expect(effect > 1e-6, f"pruning changed the output by {effect:.1e} only: the law was not put to a test")


def relative_error(expected: Tensor, found: Tensor) -> float:
    return ((expected - found).abs().max() / expected.abs().max()).item()


def inexact_axes(graph: stp_fx.ChannelGraph) -> list[str]:
    """What to ignore so that only exact groups are pruned: the others, by their names."""
    return [group.name for group in graph.groups if not group.exact]


def pinned_axes(graph: stp_fx.ChannelGraph) -> int:
    """How many axes of parameters and buffers no group touches: they cannot lose an index."""
    touched = {member.axis.name for group in graph.groups for member in group.members}
    return sum(axis.name not in touched for axis in graph.axes)


def main(name: str) -> None:
    run = Run(name)
    model = build(name)
    gm: fx.GraphModule | None
    pruned: fx.GraphModule | None
    example = images(BATCH, image_size(name))
    # What is computed in full is computed on small images where the traced network takes them.
    size = image_size(name, small=not name.startswith(IMAGE_IN_TRACE))
    with run.check("prune"):
        trace_seconds, gm = timed(lambda: stp_fx.trace(model, example))
        prune_seconds, pruned = timed(lambda: stp_fx.prune_graph(gm, criterion="magnitude", ratio=RATIO))
        graph = stp_fx.analyze(gm)
        run.facts |= {
            "trace_seconds": trace_seconds,
            "prune_seconds": trace_seconds + prune_seconds,
            "groups": len(graph.groups),
            "exact_groups": sum(group.exact for group in graph.groups),
            "units": sum(group.size for group in graph.groups),
            "pinned_axes": pinned_axes(graph),
        }
        check_outputs(run, model, gm, images(BATCH, size))
        check_cost(run, model, gm, pruned, example)
        check_runs(run, gm, pruned, size)
        check_step(run, pruned, size)
    gm = pruned = None  # frees what the check below needs
    check_law(run, model)
    print(json.dumps({**run.facts, "checks": run.checks, "errors": run.errors}))


if __name__ == "__main__":
    main(*sys.argv[1:])
