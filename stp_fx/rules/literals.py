"""Python calls that reach ops: what a shorter axis changes in their numbers, and what the analysis may do to them.

Rules describe ATen; a graph holds ``torch.reshape``, ``x.view``, ``x[:, :8]``. An entry lists these calls. A *handler* renews
the numbers of one call after channels are removed. A call without a handler follows the shapes of its operands, or is strict:
what it cuts is pinned, since nobody could put its numbers right.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx, nn

from stp_fx.ir.train_eval import AutogradCall, ModeSwitch
from stp_fx.registry import Registry
from stp_fx.rules.domain import TensorDims
from stp_fx.rules.edit import Edit, Signature

__all__ = [
    "CALLS",
    "Edit",
    "Policy",
    "PythonCalls",
    "TensorDims",
    "calls_of",
    "edits",
    "fixed_numbers",
    "follows",
    "handler_for",
    "keeps",
    "module_calls_of",
    "modules",
    "policy_of",
    "reach",
]


class Policy(enum.Enum):
    """The changes of literals inside one graph node."""

    EDITABLE = "its literals can be rewritten"
    FOLLOWS = "its sizes follow its operands"
    KEEPS = "views inside follow its operands, but new axes are numbers of its own"
    STRICT = "its sizes cannot be rewritten"
    OPAQUE = "a module that hides how it uses its parameters"


Handler = Callable[[Edit], None]
_PLAIN = Signature.of("input")


@dataclasses.dataclass(frozen=True, eq=False)
class PythonCalls:
    """Functions, names of methods, or module types that are called in one way.

    ``handler`` renews numbers after channels are removed. ``signature`` names the arguments. ``sizes`` are those that are sizes
    or positions of axes, which the handler renews; every other number keeps the value that it had before.
    """

    targets: tuple[Any, ...]
    policy: Policy
    handler: Handler | None = None
    signature: Signature = _PLAIN
    sizes: frozenset[str] = frozenset()


CALLS: Registry[PythonCalls] = Registry("Python call", "list it with one op only")
"""By function, name of method, or module type."""


def edits(handler: Handler, *targets: Any, takes: str, sizes: str = "") -> PythonCalls:
    """Calls whose numbers ``handler`` renews.

    ``takes`` names the arguments in order, aliases apart by slashes, an argument that may be spelled out by a star:
    ``"input *shape/size"``. ``sizes`` are the names of those that are sizes or positions.
    """
    return PythonCalls(targets, Policy.EDITABLE, handler, Signature.of(takes), frozenset(sizes.split()))


def follows(*targets: Any) -> PythonCalls:
    """Calls without sizes of their own."""
    return PythonCalls(targets, Policy.FOLLOWS)


def keeps(*targets: Any) -> PythonCalls:
    """Calls that view their operands in other ways, and whose new axes have lengths of their own."""
    return PythonCalls(targets, Policy.KEEPS)


def modules(handler: Handler, *types: type[nn.Module], takes: str = "input", policy: Policy = Policy.FOLLOWS) -> PythonCalls:
    """Modules whose attributes (``out_channels``, ``normalized_shape`` ...) ``handler`` renews; ``takes`` as in :func:`edits`."""
    return PythonCalls(types, policy, handler, Signature.of(takes))


def reach(calls: PythonCalls, owner: str) -> None:
    """Enters calls into the table."""
    for target in calls.targets:
        CALLS.add(target, calls, owner=owner)


def calls_of(node: fx.Node) -> PythonCalls | None:
    """The entry of the table for a node that calls a function or a method."""
    return CALLS.find(node.target) if node.op in ("call_function", "call_method") else None


def handler_for(node: fx.Node) -> Handler | None:
    """The handler of a node that calls a function or a method."""
    calls = calls_of(node)
    return None if calls is None else calls.handler


def module_calls_of(module: nn.Module) -> PythonCalls | None:
    """The entry of the table for a module's type or its nearest base."""
    return next((found for base in type(module).__mro__ if (found := CALLS.find(base)) is not None), None)


def fixed_numbers(node: fx.Node) -> Iterator[int | str]:
    """Positions and keywords of a call's arguments whose numbers are neither sizes nor positions of axes."""
    calls = calls_of(node)
    for where in (*range(len(node.args)), *node.kwargs):
        if calls is None or not calls.sizes or calls.signature.name_at(where) not in calls.sizes:
            yield where


_PLAIN_MODULES = ("torch.nn.modules.", "torchvision.ops.")


def policy_of(node: fx.Node, module: nn.Module | None) -> Policy:
    """How the analysis may treat literals inside ``node``; ``module`` is the submodule of a ``call_module``."""
    if isinstance(module, AutogradCall):
        return Policy.OPAQUE
    if isinstance(module, ModeSwitch):
        calls = CALLS.find(module.function)
        return Policy.FOLLOWS if calls is not None and calls.policy is Policy.FOLLOWS else Policy.STRICT
    if node.op == "call_module" and module is not None:
        calls = module_calls_of(module)
        if calls is not None:
            return calls.policy
        if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
            return Policy.OPAQUE
        return Policy.KEEPS if type(module).__module__.startswith(_PLAIN_MODULES) else Policy.STRICT
    calls = calls_of(node)
    return Policy.STRICT if calls is None else calls.policy
