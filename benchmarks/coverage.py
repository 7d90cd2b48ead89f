"""Every classification network that torchvision ships, and a list from timm: traced, pruned to half of its channels, checked.

    python benchmarks/coverage.py torchvision [--models resnet18,vit_b_16] [--out STEM]
    python benchmarks/coverage.py timm

Each network runs in a process of its own (``_coverage_worker.py``), with random weights *and* random normalisation
statistics, so that the equations are not true for want of a signal. Checked for each:

- ``output``: the traced network gives the module's own outputs (eval mode; on smaller images than it was traced with,
  where a network takes any size).
- ``shapes``: pruned at ratio 0.5, the outputs keep their shapes in eval and train mode.
- ``batch``: the same at another batch size than the recorded one.
- ``step``: one SGD step on the pruned network, every parameter that had a gradient before has a finite one.
- ``law``: in double precision, masking a plan and removing it give equal outputs, to 1e-9 of the largest output. The
  plan covers the groups that the analysis calls exact; where there are others, ``exact`` says how many of how many.
- ``cost``: MACs and parameters of the traced and of the pruned network, counted by PyTorch's flop counter and by
  summing tensor sizes, are those that stp_fx states for it, and for the same plan when it is only masked.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torchvision
from _common import RESULTS, machine, markdown_machine, markdown_table, run_child, wide_console, write
from rich.table import Table

TIMM = [
    "resnet50",
    "resnetv2_50",
    "convnext_tiny",
    "deit_small_patch16_224",
    "vit_base_patch16_224",
    "swin_tiny_patch4_window7_224",
    "mobilenetv4_conv_small",
    "efficientnet_b0",
    "levit_128",
    "repvgg_a0",
    "ghostnet_100",
    "hrnet_w18",
    "dpn68",
    "res2net50_26w_4s",
    "skresnet18",
    "tresnet_m",
    "coatnet_0_224",
    "poolformer_s12",
    "mixer_b16_224",
    "pit_ti_224",
    "twins_svt_small",
    "edgenext_small",
    "nfnet_f0",
    "cspdarknet53",
]
CHECKS = ("output", "shapes", "batch", "step", "law", "cost")
HEADER = ("network", "status", "groups", "exact", "units", "pinned", "MACs", "after", "parameters", "after",
          "law error", "batch", "step", "prune s", "all s", "peak GB")  # fmt: skip


def main() -> None:
    args = _arguments()
    console = wide_console()
    every = torchvision.models.list_models(module=torchvision.models) if args.collection == "torchvision" else TIMM
    prefix = "timm:" if args.collection == "timm" else ""
    names = [prefix + name for name in (args.models.split(",") if args.models else every)]
    stem = args.out or RESULTS / f"coverage-{args.collection}"
    results = {}
    for position, name in enumerate(names, 1):
        results[name] = run_network(name, args.timeout, args.memory)
        console.print(f"{position:3}/{len(names)}  {name:24} {results[name]['status']}")
        _report(stem, results, len(names))
    console.print(_rich_table(results))
    passed = sum(result["status"] == "ok" for result in results.values())
    console.print(f"{passed} of {len(names)} networks pass every check")
    raise SystemExit(passed != len(names))


def run_network(name: str, timeout: float, gigabytes: float) -> dict[str, Any]:
    worker = str(Path(__file__).with_name("_coverage_worker.py"))
    outcome = run_child([worker, name], seconds=timeout, gigabytes=gigabytes)
    result = outcome.answer or {"checks": {}, "errors": {"process": outcome.reason}}
    failed = [check for check in CHECKS if not result["checks"].get(check)]
    errors = result["errors"]
    reasons = [f"{check}: {errors.get(check, 'not reached')}" for check in failed if check in errors or not errors]
    result["status"] = "; ".join(reasons or [f"{k}: {v}" for k, v in errors.items()]) or "ok"
    return {**result, "seconds": outcome.seconds, "peak_bytes": outcome.peak}


def _cells(name: str, result: dict[str, Any]) -> list[str]:
    def get(key: str, form: str = "{}") -> str:
        return form.format(result[key]) if result.get(key) is not None else "-"

    def tick(check: str) -> str:
        return "yes" if result["checks"].get(check) else "no"

    return [
        name,
        result["status"],
        get("groups"),
        get("exact_groups"),
        get("units", "{:,}"),
        get("pinned_axes"),
        *(_millions(result.get(key)) for key in ("macs_before", "macs_after", "params_before", "params_after")),
        get("law_error", "{:.1e}"),
        tick("batch"),
        tick("step"),
        get("prune_seconds", "{:.2f}"),
        get("seconds", "{:.0f}"),
        f"{result['peak_bytes'] / 1e9:.1f}",
    ]


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
    text = f"""# Coverage: classification networks of {stem.name.rpartition("-")[2]}

{passed} of {total} networks pass every check ({len(results)} run). Magnitude, local, ratio 0.5; MACs for one image.

{markdown_machine(machine())}

{markdown_table(HEADER, [_cells(name, result) for name, result in results.items()], left=2)}

What each column checks: the docstring of `benchmarks/coverage.py`. `exact`: groups that the analysis calls exact, which
the law is checked on. `pinned`: axes of parameters that cannot lose a single index. `prune s`: trace and prune. `all s`
and `peak GB`: the whole process with all checks, double precision included.
"""
    write(stem, text, {"machine": machine(), "networks": results})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("collection", choices=("torchvision", "timm"))
    parser.add_argument("--models", help="comma-separated names (default: all)")
    parser.add_argument("--out", type=Path, help="result files, without suffix")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one network (default: %(default)s)")
    parser.add_argument("--memory", type=float, default=20.0, help="gigabytes for one network (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
