"""``stp-fx doctor``: what a report of a problem needs: versions, and the smallest part of a model that cannot be captured."""

from __future__ import annotations

import argparse
import inspect
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

import torch
from torch import nn

import stp_fx
from stp_fx.api import trace
from stp_fx.cli.arguments import VALIDATE, add_command, captured, example_for, loaded_model
from stp_fx.cli.files import CheckFailed
from stp_fx.cli.output import Output
from stp_fx.errors import InputError, StpFxError
from stp_fx.ir.call import described
from stp_fx.terminal import Text

__all__ = ["add"]

Calls = Mapping[str, tuple[tuple[Any, ...], dict[str, Any]]]
"""The arguments of the first call of each module, by path."""

NEEDED = ("torch", "torchvision", "numpy", "scipy", "networkx", "pydot", "safetensors", "rich", "typing_extensions")
OPTIONAL = (
    "accelerate", "einops", "lightning", "matplotlib", "onnx", "onnxruntime", "onnxscript", "scikit-learn", "timm", "torchao",
    "transformers", "ultralytics",
)  # fmt: skip
_LINES = 60
"""Lines of a forward that are shown."""


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "doctor",
        run,
        "versions, and the smallest part of a model that cannot be captured",
        """
        Prints what a report of a problem needs: versions, platform, optional
        packages. With MODEL it also captures the model; if that fails, it finds
        the smallest module that fails alone, and prints its code and a program
        that shows the failure. Weights and data are never printed.
        """,
        """
        stp-fx doctor
        stp-fx doctor net.py:make --input 1,1,28,28 > report.txt
        stp-fx doctor --json | jq .versions
        """,
        usage="stp-fx doctor [MODEL] [options]",
    )
    next(action for action in parser._actions if action.dest == "model").nargs = "?"


def run(args: argparse.Namespace, output: Output) -> int:
    found: dict[str, Any] = {"command": "doctor", "model": args.model, **_environment()}
    if args.model is None:
        output.result(found, Text(_text(found), no_wrap=True))
        return 0
    try:
        captured(args, output)
    except StpFxError as error:
        with output.stage("looking for the smallest part that fails"):
            found["failure"] = _failure(args, output, error)
        output.result(found, Text(_text(found), no_wrap=True))
        raise CheckFailed(f"{args.model} cannot be captured: see the report") from error
    found["failure"] = None
    output.result(found, Text(_text(found), no_wrap=True))
    return 0


def _environment() -> dict[str, Any]:
    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    versions = {name: version(name) for name in NEEDED} | {"torch": torch.__version__}  # with what it was built for
    optional = {name: version(name) for name in OPTIONAL}
    accelerators = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {
        "versions": {"stp_fx": stp_fx.__version__, "python": platform.python_version(), **versions},
        "optional": {name: each for name, each in optional.items() if each is not None},
        "missing": [name for name, each in optional.items() if each is None],
        "platform": f"{platform.platform()}, {platform.machine()}, {torch.get_num_threads()} threads",
        "accelerators": accelerators,
        "graphviz": shutil.which("dot") is not None,
        "command_line": ["stp-fx", *sys.argv[1:]],
    }


def _failure(args: argparse.Namespace, output: Output, error: StpFxError) -> dict[str, Any]:
    """The error, and the smallest called module that cannot be captured on its own with the arguments of its first call."""
    found: dict[str, Any] = {"error": str(error), "part": None}
    try:
        loaded = loaded_model(args, output)
        positional, named, _ = example_for(args, loaded)
        calls = _first_calls(loaded.model, positional, named)
    except Exception as other:
        return {**found, "stopped": f"the model itself fails: {type(other).__name__}: {str(other)[:500]}"}
    path, shown = "", str(error)
    while True:
        failing = next(_failing(loaded.model, path, calls, args), None)
        if failing is None:
            break
        path, shown = failing
    return {**found, "part": _part(loaded.model, path, calls[path], shown)}


def _first_calls(model: nn.Module, positional: Any, named: Mapping[str, Any]) -> Calls:
    """The arguments of the first call of each module, by path; in eval mode, without gradients."""
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    handles = []
    for path, module in model.named_modules():

        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
            calls.setdefault(path, (args, kwargs))

        handles.append(module.register_forward_pre_hook(look, with_kwargs=True))
    try:
        with torch.no_grad():
            model.eval()(*positional, **named)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _failing(model: nn.Module, path: str, calls: Calls, args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """The nearest called modules inside of ``path`` that cannot be captured alone, with their errors."""
    inside = [each for each in calls if each != path and each.startswith(path + "." if path else "")]
    nearest = [each for each in inside if not any(each.startswith(other + ".") for other in inside)]
    for each in nearest:
        positional, named = calls[each]
        try:
            trace(
                model.get_submodule(each), positional, kwargs=named, frontend=args.frontend, validate=VALIDATE[args.validate]
            )  # fmt: skip
        except InputError:
            continue  # such as a call without a tensor: it says nothing about the module
        except StpFxError as error:
            yield each, str(error)


def _part(model: nn.Module, path: str, call: tuple[tuple[Any, ...], dict[str, Any]], error: str) -> dict[str, Any]:
    module = model.get_submodule(path)
    kind = type(module)
    try:
        lines, start = inspect.getsourcelines(kind.forward)
        where = f"{inspect.getsourcefile(kind)}:{start}"
    except (OSError, TypeError):
        lines, where = [], "no source"
    more = [f"    ... {len(lines) - _LINES} more lines\n"] if len(lines) > _LINES else []
    return {
        "module": path or "(the model itself)",
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "where": where,
        "error": error,
        "forward": "".join([*lines[:_LINES], *more]),
        "program": _program(path, *call),
    }


def _program(path: str, positional: tuple[Any, ...], named: Mapping[str, Any]) -> str:
    args = "".join(f"{_code(each)}, " for each in positional)
    kwargs = "".join(f"{name!r}: {_code(each)}, " for name, each in named.items())
    lines = ["import torch, stp_fx", "", "model = ...  # as on the command line"]
    part = f"model.get_submodule({path!r})" if path else "model"
    lines.append(f"stp_fx.trace({part}, ({args.rstrip()}){f', kwargs={{{kwargs.rstrip()}}}' if kwargs else ''})")
    return "\n".join(lines)


def _code(value: Any) -> str:
    """An argument as code, without its numbers."""
    if isinstance(value, torch.Tensor):
        return f"torch.zeros({list(value.shape)}, dtype={value.dtype})"
    if type(value) in (list, tuple):
        return ("[{}]" if type(value) is list else "({},)").format(", ".join(map(_code, value)))
    if type(value) is dict:
        return "{" + ", ".join(f"{key!r}: {_code(each)}" for key, each in value.items()) + "}"
    try:
        return repr(described(value))
    except InputError:
        return f"...  # a {type(value).__name__}\n"


def _text(found: Mapping[str, Any]) -> str:
    listed = (", ".join(f"{name} {each}" for name, each in found[key].items()) for key in ("versions", "optional"))
    lines = [
        "versions:     " + next(listed),
        "optional:     " + (next(listed) or "none"),
        "not there:    " + (", ".join(found["missing"]) or "none"),
        "platform:     " + found["platform"],
        "accelerators: " + (", ".join(found["accelerators"]) or "none"),
        "Graphviz:     " + ("there" if found["graphviz"] else "not there"),
        "command line: " + " ".join(found["command_line"]),
    ]
    if "failure" not in found:
        return "\n".join(lines)
    failure = found["failure"]
    if failure is None:
        return "\n".join([*lines, "", f"{found['model']} can be captured."])
    lines += ["", f"{found['model']} cannot be captured:", failure["error"]]
    part = failure["part"]
    if part is None:
        return "\n".join([*lines, "", failure["stopped"]])
    lines += ["", f"The smallest part that cannot: {part['module']}, a {part['class']} ({part['where']})", part["error"]]
    return "\n".join([*lines, "", part["program"], "", part["forward"].rstrip()])
