"""What every criterion says by definition, in loops over units; shares no arithmetic with the library."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from criteria_networks import CONV_READERS, Case
from torch import Tensor

import stp_fx
from stp_fx.analysis.groups import Group, Member

Local = list[list[float]]
RIDGE = 1e-4


# -- from local scores to scores -----------------------------------------------------------------------------------------


def reduced(local: Local, reduction: str) -> list[float]:
    columns = list(zip(*local, strict=True))
    if reduction in ("first", "gate"):
        return [column[0] for column in columns]
    how: Callable[[Sequence[float]], float] = {
        "mean": lambda c: sum(c) / len(c), "max": max, "sum": sum, "prod": math.prod,
    }[reduction]  # fmt: skip
    return [how(column) for column in columns]


def normalized(scores: list[float], normalizer: str) -> list[float]:
    mean = sum(scores) / len(scores)
    if normalizer == "mean":
        return [s / mean for s in scores]
    if normalizer == "max":
        return [s / max(scores) for s in scores]
    if normalizer == "gaussian":
        deviation = math.sqrt(sum((s - mean) ** 2 for s in scores) / len(scores))
        return [(s - mean) / deviation if deviation > 1e-12 * max(map(abs, scores)) else 0.0 for s in scores]
    if normalizer == "lamp":
        return [s * s / sum(t * t for t in scores if t >= s) for s in scores]
    return scores


# -- slices of weights ---------------------------------------------------------------------------------------------------


def members(group: Group, roles: Sequence[str], reduction: str) -> list[Member]:
    """Axes in these roles; an output axis alone for "first"."""
    found = [m for m in group.members if m.axis.role in roles]
    if reduction in ("first", "gate"):
        return [next((m for m in found if m.axis.role == "weight"), found[0])]
    return found


def entries(member: Member, unit: int, tensor: Tensor) -> list[float]:
    """All numbers of a tensor that a unit holds on an axis, in order."""
    result: list[float] = []
    for position, owner in zip(member.index.tolist(), member.unit.tolist(), strict=True):
        if owner == unit:
            result += tensor.detach().select(member.axis.dim, position).flatten().tolist()
    return result


def weights_local(
    case: Case, group: Group, reduction: str, of: Callable[[str, Member, int], float], roles: Sequence[str]
) -> Local:
    return [[of(m.axis.tensor, m, unit) for unit in range(group.size)] for m in members(group, roles, reduction)]


def magnitude(case: Case, group: Group, reduction: str) -> Local:
    named = case.model.state_dict()
    return weights_local(
        case, group, reduction, lambda n, m, u: math.sqrt(sum(w * w for w in entries(m, u, named[n]))), ("weight", "scale")
    )


def bn_scale(case: Case, group: Group, reduction: str) -> Local:
    named = case.model.state_dict()
    return weights_local(case, group, reduction, lambda n, m, u: sum(abs(w) for w in entries(m, u, named[n])), ("scale",))


def fpgm(case: Case, group: Group, reduction: str) -> Local:
    named = case.model.state_dict()

    def distances(name: str, m: Member, unit: int) -> float:
        mine = entries(m, unit, named[name])
        return sum(math.dist(mine, entries(m, other, named[name])) for other in range(group.size))

    return weights_local(case, group, reduction, distances, ("weight",))


def gradients(case: Case) -> dict[str, Tensor]:
    """Mean over batches of the gradient of the cross-entropy."""
    total: dict[str, Tensor] = {}
    for x, y in case.batches:
        case.model.zero_grad()
        F.cross_entropy(case.model(x), y).backward()
        for name, p in case.model.named_parameters():
            assert p.grad is not None
            total[name] = total.get(name, torch.zeros_like(p)) + p.grad / len(case.batches)
    case.model.zero_grad()
    return total


def fisher(case: Case) -> dict[str, Tensor]:
    """Mean over samples of the squared gradient."""
    total: dict[str, Tensor] = {}
    samples = [(x[k : k + 1], y[k : k + 1]) for x, y in case.batches for k in range(len(x))]
    for x, y in samples:
        case.model.zero_grad()
        F.cross_entropy(case.model(x), y).backward()
        for name, p in case.model.named_parameters():
            assert p.grad is not None
            total[name] = total.get(name, torch.zeros_like(p)) + p.grad**2 / len(samples)
    case.model.zero_grad()
    return total


def taylor(case: Case, group: Group, reduction: str, elementwise: bool = False) -> Local:
    named, found = case.model.state_dict(), gradients(case)

    def change(name: str, m: Member, unit: int) -> float:
        products = [w * g for w, g in zip(entries(m, unit, named[name]), entries(m, unit, found[name]), strict=True)]
        return sum(map(abs, products)) if elementwise else abs(sum(products))

    return weights_local(case, group, reduction, change, ("weight", "scale"))


def hessian(case: Case, group: Group, reduction: str, diagonal: dict[str, Tensor] | None = None) -> Local:
    named, found = case.model.state_dict(), fisher(case) if diagonal is None else diagonal

    def rise(name: str, m: Member, unit: int) -> float:
        pairs = zip(entries(m, unit, named[name]), entries(m, unit, found[name]), strict=True)
        return max(0.0, sum(w * w * h for w, h in pairs) / 2)

    return weights_local(case, group, reduction, rise, ("weight", "scale"))


# -- what consumers read ---------------------------------------------------------------------------------------------------


def observed(case: Case, module: str) -> Tensor:
    """Everything that a module was given: [observations, channels]."""
    seen: list[Tensor] = []
    hook = case.model.get_submodule(module).register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for x, _ in case.batches:
            case.model(x)
    hook.remove()
    return torch.cat([value.movedim(1, -1).reshape(-1, value.shape[1]) for value in seen])


def variance(case: Case, group: Group, reduction: str) -> Local:
    result: Local = []
    for module, positions in CONV_READERS[group.name]:
        values = observed(case, module)
        row = []
        for unit in range(group.size):
            each = []
            for p in positions(unit):
                xs = values[:, p].tolist()
                mean = sum(xs) / len(xs)
                each.append(sum(x * x for x in xs) / len(xs) - mean * mean)
            row.append(sum(each) / len(each))
        result.append(row)
    return result


def residual_error(covariance: Tensor, weight: Tensor, gone: list[int]) -> float:
    """Mean squared error, over outputs, of the best linear use of what stays; ``weight`` is [positions, outputs]."""
    if not gone:
        return 0.0
    kept = [p for p in range(len(covariance)) if p not in gone]
    left = covariance[gone][:, gone]
    if kept:
        known = covariance[kept][:, kept]
        left = left - covariance[gone][:, kept] @ torch.linalg.solve(known, covariance[kept][:, gone])
    return float(torch.trace(weight[gone].T @ left @ weight[gone]))


def covariance_of(values: Tensor) -> Tensor:
    found = torch.cov(values.T, correction=0).reshape(values.shape[1], -1)
    return found + RIDGE * found.diagonal().mean() * torch.eye(len(found), dtype=found.dtype)


def greedy(
    size: int, sites: Sequence[tuple[Tensor, Tensor, Callable[[int], list[int]]]], join: Callable[[list[float]], float]
) -> list[float]:
    """Removes the cheapest unit again and again, each time solving every regression from scratch."""
    scores, gone, total = [0.0] * size, [], 0.0
    while len(gone) < size:
        best, cheapest = math.inf, -1
        for unit in range(size):
            if unit in gone:
                continue
            rises = []
            for covariance, weight, positions in sites:
                before = [p for u in gone for p in positions(u)]
                after = residual_error(covariance, weight, before + positions(unit))
                rises.append(after - residual_error(covariance, weight, before))
            if join(rises) < best:
                best, cheapest = join(rises), unit
        total += best
        scores[cheapest] = total
        gone.append(cheapest)
    return scores


def reconstruction(case: Case, group: Group, reduction: str) -> list[float]:
    named, sites = case.model.state_dict(), []
    for module, positions in CONV_READERS[group.name]:
        weight = named[f"{module}.weight"].movedim(1, 0).flatten(1)
        sites.append((covariance_of(observed(case, module)), weight, positions))
    return greedy(group.size, sites, lambda rises: reduced([[r] for r in rises], reduction)[0])


# -- cost ------------------------------------------------------------------------------------------------------------------


def saved_macs(case: Case, group: Group) -> float:
    """MACs that go when the group's first unit goes alone, by costing that plan."""
    graph = stp_fx.analyze(case.gm)
    removed = torch.zeros(graph.units, dtype=torch.bool).numpy()
    removed[group.units[0]] = True
    return graph.survivors().macs - graph.survivors_without(removed).macs


def cost_aware(case: Case, group: Group, reduction: str, normalizer: str) -> list[float]:
    base = normalized(reduced(magnitude(case, group, reduction), reduction), normalizer)
    share = saved_macs(case, group) / max(saved_macs(case, other) for other in case.groups)
    return [0.5 * b + 0.5 * (1 - share) for b in base]


# -- all of them -------------------------------------------------------------------------------------------------------------

LOCAL: dict[str, Callable[[Case, Group, str], Local]] = {
    "magnitude": magnitude, "bn_scale": bn_scale, "fpgm": fpgm, "taylor": taylor, "hessian": hessian, "variance": variance,
    "auto": magnitude,  # for ConvNet's norms, where nothing is said of a repair
}  # fmt: skip


def reference(name: str, case: Case, group: Group, reduction: str, normalizer: str) -> list[float]:
    if name == "mac_aware":
        return cost_aware(case, group, reduction, normalizer)
    if name == "reconstruction":
        return normalized(reconstruction(case, group, reduction), normalizer)
    return normalized(reduced(LOCAL[name](case, group, reduction), reduction), normalizer)
