"""Networks of torchvision, timm and Hugging Face: traced, pruned to half of their channels, checked.

    python benchmarks/coverage.py torchvision [--models resnet18,vit_b_16] [--out STEM]
    python benchmarks/coverage.py torchvision-more       # segmentation, video, optical flow, detection
    python benchmarks/coverage.py timm
    python benchmarks/coverage.py transformers           # Hugging Face, from small configurations
    python benchmarks/coverage.py wild                   # diffusers, monai, ultralytics and others; needs the extra "wild"

Each network runs in a process of its own (``_coverage_worker.py``), with random weights *and* random normalisation
statistics, so that the equations are not true only because there is no signal. Checked for each:

- ``output``: the traced network gives the module's own outputs (eval mode; on smaller images than it was traced with,
  where a network takes any size).
- ``shapes``: pruned at ratio 0.5, the outputs keep their shapes in eval and train mode.
- ``batch``: the same at another batch size than the recorded one.
- ``step``: one SGD step on the pruned network, every parameter that had a gradient before has a finite one.
- ``law``: in double precision, masking a plan and removing it give equal outputs, to 1e-9 of the largest output (RAFT, whose
  code makes float32 grids: in single precision, to 1e-4). The plan covers the groups that the analysis calls exact; where
  there are others, ``exact`` says how many of how many.
- ``cost``: MACs and parameters of the traced and of the pruned network, counted by PyTorch's flop counter and by
  summing tensor sizes, are those that stp_fx states for it, and for the same plan when it is only masked.
- ``whole``: of a detector only the backbone is traced; with it pruned in its place, the whole detects and trains.
- ``touched``: at least 30 % of the MACs went.
- ``validated``: the library's own checks of capture and removal, as they are by default (``validate="auto"``), find no difference
  in either mode and pin no group. ``checks``: how many there were, their forward passes and seconds; the others, such as sizes
  that a network does not take, are named in the JSON.
"""

from __future__ import annotations

import argparse
import collections
import json
from pathlib import Path
from typing import Any

from _common import RESULTS, machine, markdown_machine, markdown_table, run_child, wide_console, write
from _coverage_networks import COLLECTIONS
from rich.table import Table

from stp_fx.ir.train_eval import ALONE

CHECKS = ("output", "shapes", "batch", "step", "law", "cost", "validated")
LEAST = 0.3
"""Of the MACs; ratio 0.5 takes about three quarters from a network whose layers are all free."""
HEADER = ("network", "status", "front end", "groups", "exact", "units", "pinned", "MACs", "after", "parameters", "after",
          "law error", "batch", "step", "validated", "checks", "prune s", "all s", "peak GB")  # fmt: skip


def main() -> None:
    args = _arguments()
    console = wide_console()
    every = COLLECTIONS[args.collection]()
    names = [name for name in every if not args.models or name.rpartition(":")[2] in args.models.split(",")]
    stem = args.out or RESULTS / f"coverage-{args.collection}"
    add = args.add or args.validation
    results = json.loads(stem.with_suffix(".json").read_text())["networks"] if add else {}
    for position, name in enumerate(names, 1):
        known = results.get(name) if args.validation else None
        results[name] = run_network(name, args.timeout, args.memory, known)
        console.print(f"{position:3}/{len(names)}  {name:24} {results[name]['status']}")
        _report(stem, results, len({*names, *results}))
    console.print(_rich_table(results))
    passed = sum(result["status"] == "ok" for result in results.values())
    console.print(f"{passed} of {len(results)} networks pass every check")
    raise SystemExit(passed != len(results))


def run_network(name: str, timeout: float, gigabytes: float, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """All checks; of a network with a ``known`` result, the library's own alone."""
    worker = str(Path(__file__).with_name("_coverage_worker.py"))
    outcome = run_child([worker, name, *(["validation"] if known else [])], seconds=timeout, gigabytes=gigabytes)
    result = outcome.answer or {"checks": {}, "errors": {"process": outcome.reason}}
    if known:
        result = {**known, **result, **{key: {**known[key], **result[key]} for key in ("checks", "errors")}}
    errors, checks = result["errors"], result["checks"]
    if "macs_after" in result:
        removed = 1 - result["macs_after"] / result["macs_before"]
        checks["touched"] = removed >= LEAST
        if not checks["touched"]:
            errors["touched"] = f"{removed:.0%} of the MACs went; pinned: {result['pinned']}"
    failed = [check for check in dict.fromkeys((*CHECKS, *checks)) if not checks.get(check)]
    reasons = [f"{check}: {errors.get(check, 'not reached')}" for check in failed if check in errors or not errors]
    result["status"] = "; ".join(reasons or [f"{k}: {v}" for k, v in errors.items()]) or "ok"
    return {**result, **({} if known else {"seconds": outcome.seconds, "peak_bytes": outcome.peak})}


def _cells(name: str, result: dict[str, Any]) -> list[str]:
    def get(key: str, form: str = "{}") -> str:
        return form.format(result[key]) if result.get(key) is not None else "-"

    def tick(check: str) -> str:
        return "yes" if result["checks"].get(check) else "no"

    return [
        name,
        _outcome(result),
        get("frontend"),
        get("groups"),
        get("exact_groups"),
        get("units", "{:,}"),
        get("pinned_axes"),
        *(_millions(result.get(key)) for key in ("macs_before", "macs_after", "params_before", "params_after")),
        get("law_error", "{:.1e}"),
        tick("batch"),
        tick("step"),
        get("validation_error", "{:.1e}"),
        f"{len(result['validation']['ran'])}, {result['validation_forwards']}, {result['validation_seconds']:.1f} s"
        if "validation" in result
        else "-",
        get("prune_seconds", "{:.2f}"),
        get("seconds", "{:.0f}"),
        f"{result['peak_bytes'] / 1e9:.1f}",
    ]


def _outcome(result: dict[str, Any]) -> str:
    """In a word or two; the reasons have a table of their own."""
    failed = [check for check, passed in result["checks"].items() if not passed] or [*result["errors"]]
    return "announced" if _is_announced(result) else "ok" if result["status"] == "ok" else f"failed: {', '.join(failed)}"


def _millions(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:,.2f} M"


def _rich_table(results: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="ratio 0.5, magnitude, local")
    for position, column in enumerate(HEADER):
        table.add_column(column, justify="left" if position < 2 else "right", max_width=40 if position == 1 else None)
    for name, result in results.items():
        table.add_row(*_cells(name, result))
    return table


def _report(stem: Path, results: dict[str, dict[str, Any]], total: int) -> None:
    """Written after every network, so that an interrupted run leaves what it found."""
    passed = sum(result["status"] == "ok" for result in results.values())
    earlier = sum("validation" not in result and "groups" in result for result in results.values())
    older = f" {earlier} rows, those without `validated`, are of an earlier run." if earlier else ""
    announced = [name for name, result in results.items() if _is_announced(result)]
    told = f" Of the others {len(announced)} are refused with the library's own reason, below." if announced else ""
    text = f"""# Coverage: {stem.name.removeprefix("coverage-")}

{passed} of {total} networks pass every check ({len(results)} run).{told} Magnitude, local, ratio 0.5; MACs for one image.{older}

{markdown_machine(machine())}

{markdown_table(HEADER, [_cells(name, result) for name, result in results.items()], left=3)}

{_not_passed(results)}{_longest(results)}\
Why axes are pinned, over all of these networks (an axis with several reasons counts for the first):

{markdown_table(("reason", "axes", "networks"), _reasons(results), left=1)}

The checks of each column: the docstring of `benchmarks/coverage.py`. `validated`: the
largest difference found, relative. `exact`: groups that the analysis calls exact, which
the law is checked on. `pinned`: axes of parameters that cannot lose a single index. `prune s`: trace and prune. `all s`
and `peak GB`: the whole process with all checks, double precision included.
"""
    write(stem, text, {"machine": machine(), "networks": results})


def _is_announced(result: dict[str, Any]) -> bool:
    """Whether the library says itself, before anything is pruned, what it does not take, and nothing else fails."""
    failed = [check for check, passed in result["checks"].items() if not passed]
    in_one_mode = failed == ["validated"] and bool(_alone(result))
    return in_one_mode or (bool(failed) and "cannot be captured" in result["errors"].get("prune", ""))


def _alone(result: dict[str, Any]) -> list[str]:
    """The library's reason for leaving out a mode."""
    return [note for note in result.get("notes", ()) if note.startswith(ALONE)]


def _not_passed(results: dict[str, dict[str, Any]]) -> str:
    rows = [
        [name, "announced", "; ".join(_alone(result)) or result["errors"]["prune"]]
        if _is_announced(result)
        else [name, "failed", result["status"]]
        for name, result in results.items()
        if result["status"] != "ok"
    ]
    if not rows:
        return ""
    text = "Not passed, with the reason. Announced: an error or a warning of `trace` says so, and what to do."
    return f"{text}\n\n{markdown_table(('network', 'how', 'reason'), rows, left=3)}\n\n"


def _longest(results: dict[str, dict[str, Any]]) -> str:
    """Those that take longest to trace and prune, and how many take longer than 10 s and 20 of their own forward passes."""
    clocked = {name: result for name, result in results.items() if "prune_seconds" in result}
    measured = {name: result for name, result in clocked.items() if "prune_cpu_seconds" in result}
    if not measured:
        return ""
    seconds = {name: result["prune_cpu_seconds"] for name, result in measured.items()}
    allowed = {name: 10 + 20 * result["forward_cpu_seconds"] for name, result in measured.items()}
    over = [name for name in measured if seconds[name] > allowed[name]]
    others = {name: result["prune_seconds"] for name, result in clocked.items() if name not in measured}
    rest = f" The other {len(others)}, by the clock: {max(others.values()):.1f} s at most." if others else ""
    rows = [
        [name, f"{seconds[name]:.2f}", f"{measured[name]['forward_cpu_seconds']:.2f}", f"{allowed[name]:.1f}"]
        for name in sorted(measured, key=seconds.__getitem__, reverse=True)[:10]
    ]
    table = markdown_table(("network", "trace and prune s", "forward s", "10 + 20 forwards"), rows, left=1)
    named = ", ".join(over) or "none"
    return f"""Over 10 s + 20 forward passes to trace and prune: {named}, of {len(measured)} measured in seconds of a
processor, torch's own imports included.{rest} The longest of those measured:

{table}

"""


def _reasons(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    axes: collections.Counter[str] = collections.Counter()
    networks: collections.Counter[str] = collections.Counter()
    for result in results.values():
        axes.update(result.get("pinned", {}))
        networks.update(result.get("pinned", {}).keys())
    return [[reason, f"{count:,}", str(networks[reason])] for reason, count in axes.most_common()]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("collection", choices=tuple(COLLECTIONS))
    parser.add_argument("--models", help="comma-separated names (default: all)")
    parser.add_argument("--add", action="store_true", help="into the results that are there, in place of a new table")
    parser.add_argument(
        "--validation", action="store_true", help="the library's own checks alone, into the results that are there"
    )
    parser.add_argument("--out", type=Path, help="result files, without suffix")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one network (default: %(default)s)")
    parser.add_argument("--memory", type=float, default=20.0, help="gigabytes for one network (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
