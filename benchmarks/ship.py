"""Is the pruned network really faster: eager, compiled by inductor, in ONNX Runtime; one thread, one image.

    python benchmarks/ship.py [--models resnet50,vit_b_16] [--rounds 15] [--no-compile]

Each network at random weights, half of its MACs (or of its measured latency) removed by several options; all variants and the
original take turns in one process. The realised share is the speed-up over the ideal, which is the MACs before over the MACs
after. Outputs of the ONNX session are held against the graph's. Compiled are the original and the variant that realises most.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from _common import RESULTS, machine, markdown_machine, markdown_table, run_child, wide_console, write
from _ship_worker import NETWORKS

TARGET = 0.85
HEADER = ("network", "option", "MACs left", "eager ms", "speed-up", "realised", "ONNX ms", "speed-up", "realised",
          "compiled ms", "speed-up", "realised")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(NETWORKS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "ship", help="result files, without suffix")
    args = parser.parse_args()
    console = wide_console()
    results: dict[str, dict[str, Any]] = {}
    for name in args.models.split(","):
        worker = str(Path(__file__).with_name("_ship_worker.py"))
        outcome = run_child([worker, name, str(args.rounds), str(not args.no_compile)], seconds=1800, gigabytes=20)
        if outcome.answer is None:
            raise SystemExit(f"{name}: {outcome.reason}")
        results[name] = outcome.answer
        for row in _rows(name, results[name]):
            console.print(" | ".join(row))
        _report(results, args.out)


def _rows(name: str, result: dict[str, Any]) -> list[list[str]]:
    macs, rows = result["macs"], []
    for variant in macs:
        row = [name, variant, f"{macs[variant] / macs['before']:.1%}"]
        for route in ("eager", "onnx", "compiled"):
            seconds = result["seconds"].get(route, {})
            if variant not in seconds:
                row += ["-"] * 3
                continue
            faster = seconds["before"] / seconds[variant]
            share = faster / (macs["before"] / macs[variant])
            row += [f"{1e3 * seconds[variant]:.1f}", f"{faster:.2f}", f"{share:.0%}"]
        rows.append(row)
    return rows


def _best(result: dict[str, Any], route: str) -> float:
    """The largest realised share among the options."""
    macs, seconds = result["macs"], result["seconds"].get(route, {})
    shares = [seconds["before"] / t * macs[v] / macs["before"] for v, t in seconds.items() if v != "before"]
    return max(shares, default=0.0)


def _report(results: dict[str, dict[str, Any]], stem: Path) -> None:
    routes = ("eager", "onnx", "compiled")
    best = [[name, *(f"{_best(result, route):.0%}" for route in routes)] for name, result in results.items()]
    met = {route: sum(_best(result, route) >= TARGET for result in results.values()) for route in routes}
    counts = ", ".join(f"{route} {count}" for route, count in met.items())
    text = f"""# Latency of pruned networks

{markdown_machine(machine())}

Medians; all variants of a network in turns in one process, one image, one thread.

{markdown_table(HEADER, [row for name, result in results.items() for row in _rows(name, result)], left=2)}

The best option of each network; on how many networks it realises {TARGET:.0%} of the ideal: {counts}.

{markdown_table(("realised share", *routes), best, left=1)}
"""
    write(stem, text, {"machine": machine(), "networks": results})


if __name__ == "__main__":
    main()
