"""The entry point: arguments, errors, exit codes."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import stp_fx
from stp_fx.cli import analyze, compare, doctor, draw, explore, prune, sweep
from stp_fx.cli.files import CheckFailed
from stp_fx.cli.objects import importable
from stp_fx.cli.output import Output
from stp_fx.errors import NothingToPruneError, StpFxError, TargetError

__all__ = ["main"]

_CODES = """\
exit codes:
  0  done
  1  the request cannot be met: nothing to prune, a target out of reach, a check
     that failed (--at-most); nothing was written
  2  bad usage or input: an unknown model, layer or option, an unreadable file
  3  an unexpected failure; --debug shows where

Results go to standard output, notes and progress to standard error.
`stp-fx COMMAND --help` explains a command, with examples.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (by default the process's own) and returns the exit code; never raises SystemExit."""
    try:
        args = _parser().parse_args(argv)
    except SystemExit as stop:  # --help, --version and bad usage have printed their text
        return stop.code if isinstance(stop.code, int) else 2
    output = Output(as_json=args.json, quiet=args.quiet)
    try:
        with importable(os.getcwd()), _logging(args):
            return args.run(args, output)
    except BrokenPipeError:
        # The pipe is closed (`| head`). Output that Python still buffers must not fail again as the process ends.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("stp-fx: interrupted", file=sys.stderr)
        return 130
    except (StpFxError, OSError) as error:
        return _failed(error, args.debug, 1 if isinstance(error, (CheckFailed, NothingToPruneError, TargetError)) else 2)
    except Exception as error:
        return _failed(error, args.debug, 3)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stp-fx",
        description="Structured pruning of PyTorch models: removes channels as a compiler\nremoves dead code.",
        epilog="start here:\n  stp-fx analyze resnet18\n  stp-fx prune resnet18 --ratio 0.5 --dry-run\n\n" + _CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"stp-fx {stp_fx.__version__}")
    # Plain text above keeps its line breaks, which are for terminals of 80 columns.
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (analyze, prune, compare, sweep, draw, explore, doctor):
        command.add(commands)
    return parser


def _failed(error: Exception, debug: bool, code: int) -> int:
    if debug:
        traceback.print_exception(error)
    words = " ".join(str(error).split()) or type(error).__name__
    if code == 3:
        words = f"unexpected {type(error).__name__}: {words}" + ("" if debug else " (--debug shows where)")
    print(f"stp-fx: {words}", file=sys.stderr)
    return code


@contextlib.contextmanager
def _logging(args: argparse.Namespace) -> Iterator[None]:
    """Logs and warnings as lines on standard error; torch's logs of failures that become our errors, with --debug alone."""
    ours, level = logging.getLogger("stp_fx"), logging.getLogger("stp_fx").level
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    torchs = [] if args.debug else [(each, each.level) for each in logging.getLogger("torch").handlers]
    ours.addHandler(handler)
    ours.setLevel(logging.INFO if args.verbose else logging.ERROR if args.quiet else logging.WARNING)
    for each, _ in torchs:
        each.setLevel(logging.CRITICAL + 1)
    show = warnings.showwarning
    warnings.showwarning = _ignored if args.quiet else _warned
    try:
        yield
    finally:
        warnings.showwarning = show
        for each, before in torchs:
            each.setLevel(before)
        ours.setLevel(level)
        ours.removeHandler(handler)


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return prefix + record.getMessage()


def _warned(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def _ignored(*_: Any) -> None:
    pass
