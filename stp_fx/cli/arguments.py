"""Options that several commands share, and their values: a captured graph, data, a selection."""

from __future__ import annotations

import argparse
import dataclasses
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import fx

from stp_fx.api import trace
from stp_fx.cli.inputs import InputShape, example_of_call, example_of_shapes, input_shape, key_value, named_ratio, shapes_of
from stp_fx.cli.models import Loaded, load_model, load_weights
from stp_fx.cli.objects import called, named_object
from stp_fx.cli.output import Output
from stp_fx.criteria import known_criteria
from stp_fx.errors import InputError, TraceError
from stp_fx.io import load
from stp_fx.io.loading import recorded_call
from stp_fx.ir.validation import Validate
from stp_fx.measure.calibration import limited
from stp_fx.progress import carrying
from stp_fx.selection.selection import Selection, default_of

__all__ = [
    "VALIDATE",
    "add_command",
    "add_data",
    "add_selection",
    "captured",
    "data_of",
    "example_for",
    "loaded_model",
    "loss_of",
    "needs_data",
    "selection_of",
]

_IMAGE = (1, 3, 224, 224)
VALIDATE: dict[str, Validate] = {"auto": "auto", "yes": True, "no": False}
_MODEL = """\
MODEL is one of
  package.module:factory    a function or class that is called without
                            arguments (or with --factory-arg), or a module;
                            packages in the current folder are found
  path/to/file.py:factory   the same, from a file
  resnet50                  a name of torchvision's (or torchvision:resnet50);
                            its weights are random, see --weights
  timm:convnext_tiny        a name of timm's, likewise
"""


def add_command(
    commands: Any, name: str, run: Any, summary: str, about: str, examples: str, usage: str = ""
) -> argparse.ArgumentParser:
    """A subcommand on one model, with the options that all of them have."""
    parser = commands.add_parser(
        name,
        help=summary,
        usage=usage or f"stp-fx {name} MODEL [options]",
        description=textwrap.dedent(about).strip() + "\n\n" + _MODEL,
        epilog="examples:\n" + textwrap.indent(textwrap.dedent(examples).strip(), "  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    model = parser.add_argument_group("the model")
    model.add_argument("model", metavar="MODEL", help="the model, see above")
    model.add_argument(
        "--input", "-i", dest="inputs", action="append", type=input_shape, metavar="[NAME=][DTYPE:]SHAPE",
        help="an example input: 1,3,224,224 or int64:1,128 or mask=bool:1,128; once for every argument of the model. "
        "Default: 1,3,224,224, or timm's recommendation",
    )  # fmt: skip
    model.add_argument(
        "--factory-arg", "-a", action="append", type=key_value, default=[], metavar="KEY=VALUE",
        help="an argument for the factory, a Python literal or else a string: num_classes=10",
    )  # fmt: skip
    model.add_argument(
        "--weights", "-w", metavar="FILE",
        help="weights: .safetensors, or a checkpoint of torch.save (read with weights_only: no code is run)",
    )  # fmt: skip
    model.add_argument(
        "--from", dest="start", metavar="FILE.stp", help="start from the result of an earlier `prune -o FILE.stp` of this model"
    )
    model.add_argument(
        "--frontend", choices=("auto", "fx", "export"), default="auto",
        help="how the model is captured: torch.fx, torch.export, or the first of the two that succeeds (default)",
    )  # fmt: skip
    model.add_argument(
        "--validate", choices=tuple(VALIDATE), default="auto",
        help="run the model beside its graph, and the masked graph beside the smaller one, and compare: within 30 seconds "
        "(auto, default), whatever it takes (yes), or not at all (no)",
    )  # fmt: skip
    model.add_argument("--device", default="cpu", help="where the model runs: cpu (default), cuda, cuda:1 ...")
    output = parser.add_argument_group("messages")
    output.add_argument("--json", action="store_true", help="one JSON object on standard output, for scripts")
    output.add_argument("--quiet", "-q", action="store_true", help="nothing on standard error but errors")
    output.add_argument("--verbose", "-v", action="store_true", help="log each step on standard error")
    output.add_argument("--debug", action="store_true", help="errors with their traceback")
    return parser


def add_selection(parser: argparse.ArgumentParser, group: Any = None, *, without: Sequence[str] = ()) -> None:
    """The options by which prune and sweep choose units: the criterion, and the fields of :class:`stp_fx.Selection` but for
    ``without``."""
    group = group or parser.add_argument_group("removal")
    group.add_argument(
        "--criterion", "-c", default="magnitude", metavar="NAME",
        help=f"how importance is measured (default: magnitude): {', '.join(known_criteria())}",
    )  # fmt: skip
    for option in dataclasses.fields(Selection):
        if option.name not in without:
            names = [f"--{option.name.replace('_', '-')}", *_SHORT.get(option.name, ())]
            group.add_argument(*names, dest=option.name, help=option.metadata["help"], **_parsed(option))


_SHORT = {"ratio": ("-r",), "target": ("-t",)}
_METAVARS = {"round_to": "N", "target": "COST"}
_HINTS = get_type_hints(Selection)


def _parsed(option: dataclasses.Field[Any]) -> dict[str, Any]:
    """How argparse reads a field, from its type and default."""
    kind, default = _HINTS[option.name], default_of(option)
    if option.metadata["form"] == "NAME=RATIO":
        return {"action": "append", "type": named_ratio, "default": [], "metavar": "NAME=RATIO"}
    if option.metadata["form"]:
        return {"action": "append", "default": [], "metavar": option.metadata["form"]}
    if _texts(kind):
        return {"choices": _texts(kind), "default": default, "metavar": _METAVARS.get(option.name)}
    return {
        "type": kind,
        "default": default,
        "metavar": _METAVARS.get(option.name, "R" if kind is float else kind.__name__.upper()),
    }


def _texts(kind: Any) -> tuple[str, ...]:
    """The texts that a type allows: those of a ``Literal``, also as one of several alternatives."""
    kinds = [kind] if get_origin(kind) is Literal else get_args(kind)
    return tuple(text for each in kinds if get_origin(each) is Literal for text in get_args(each))


def add_data(parser: argparse.ArgumentParser, name: str, help: str) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        name, dest="data", metavar="MODULE:NAME", help=f"{help}; a list, a DataLoader, or a function that makes one"
    )
    group.add_argument("--batches", type=int, metavar="N", help="read the first N batches only")
    group.add_argument(
        "--loss", metavar="MODULE:NAME",
        help="a function (graph, batch) -> scalar; default: cross-entropy on (input, target) batches",
    )  # fmt: skip


def captured(
    args: argparse.Namespace, output: Output, file: str | None = None
) -> tuple[Loaded, fx.GraphModule, list[InputShape]]:
    """The model of the command line, its graph, and the inputs that it was captured with: those of ``--input``, or else those
    that ``file``, a pruned network of this model, has recorded."""
    loaded = loaded_model(args, output)
    call = None if args.inputs or file is None else recorded_call(file)
    if call is None:
        positional, named, inputs = example_for(args, loaded)
    else:
        positional, named = example_of_call(call)
        inputs = shapes_of(positional, named)
    with output.stage(f"capturing {args.model}"):
        try:
            gm = trace(
                loaded.model, positional, kwargs=named or None, frontend=args.frontend, validate=VALIDATE[args.validate],
                outputs=None if call is None else call.outputs or None,
            )  # fmt: skip
        except (TraceError, InputError) as error:
            if args.inputs or call is not None:
                raise
            raise type(error)(f"{error}. It was captured with the default --input {inputs[0]}; give the model's own") from error
    if args.start:
        with output.stage(f"loading {args.start}"):
            gm = load(args.start, gm)
        loaded = dataclasses.replace(loaded, random=False)
    return loaded, gm, inputs


def loaded_model(args: argparse.Namespace, output: Output) -> Loaded:
    """The model of the command line, with its weights, on its device."""
    with output.stage(f"loading {args.model}"):
        loaded = load_model(args.model, dict(args.factory_arg))
        if args.weights:
            load_weights(loaded.model, args.weights)
        _move(loaded.model, args.device)
    return loaded


def example_for(args: argparse.Namespace, loaded: Loaded) -> tuple[tuple[Any, ...], dict[str, Any], list[InputShape]]:
    """Positional and named arguments of ``--input``, or of the model's usual size."""
    inputs = args.inputs or [InputShape((1, *loaded.size) if loaded.size else _IMAGE)]
    return *example_of_shapes(inputs), inputs


def data_of(args: argparse.Namespace, option: str) -> Iterable[Any] | None:
    """The batches that ``--calibration`` or ``--data`` names; a callable that is not iterable is called."""
    if args.data is None:
        return None
    found = named_object(args.data, option)
    if callable(found) and not hasattr(found, "__iter__"):
        found = called(found, args.data, option)
    if args.batches is not None and args.batches < 1:
        raise InputError(f"--batches must be at least 1; got {args.batches}")
    if not isinstance(found, (Iterable, torch.Tensor)):
        raise InputError(f"{option}: {args.data} is a {type(found).__name__}; it has to give batches (a list, a DataLoader)")
    return carrying(found if args.batches is None else limited(found, args.batches), False if args.quiet else None)


def needs_data(args: argparse.Namespace, data: object, option: str) -> None:
    """Refuses an allocation that is measured without data to measure it on; ``option`` gives them."""
    if args.allocation == "optimal" and data is None:
        raise InputError(f"--allocation optimal measures damages: give {option} MODULE:NAME, an iterable of batches")


def loss_of(args: argparse.Namespace) -> Any:
    if args.loss is None:
        return None
    found = named_object(args.loss, "--loss")
    if not callable(found):
        raise InputError(f"--loss: {args.loss} is a {type(found).__name__}; it has to be a function (graph, batch) -> scalar")
    return found


def selection_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options of :func:`add_selection` as arguments of ``prune_graph`` and ``sweep``."""
    found = {"criterion": args.criterion}
    for option in dataclasses.fields(Selection):
        if hasattr(args, option.name):
            value = getattr(args, option.name)
            if option.metadata["form"]:
                value = dict(value) if option.metadata["form"] == "NAME=RATIO" else tuple(value)
            found[option.name] = value
    return found


def _move(model: torch.nn.Module, device: str) -> None:
    try:
        model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device: {device!r} cannot be used: {str(error).splitlines()[0]}") from error
