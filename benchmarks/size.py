"""Networks that do not fit the machine: traced, analysed, planned and rewritten on the meta device.

    python benchmarks/size.py [--kinds llama,vit,hf-llama] [--layers 10,20,40]

The shapes of Llama 3 70B (80 layers; also Hugging Face's own class) and ViT-22B (48 layers), in full and with fewer layers. Every
run is a process of its own; peak memory is that of the process, with Python and PyTorch in it.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from _common import RESULTS, machine, markdown_machine, markdown_table, run_child, wide_console, write

FULL = {"llama": 80, "hf-llama": 80, "vit": 48}
SECONDS, GIGABYTES = 60.0, 4.0
HEADER = ("network", "layers", "parameters", "after", "groups", "units", "trace s", "analyse s", "plan and rewrite s", "total s",
          "peak GB", "plan MB")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(FULL))
    parser.add_argument("--layers", default="10,20,40", help="smaller depths, for the growth")
    args = parser.parse_args()
    console = wide_console()
    results: dict[str, dict[str, Any]] = {}
    for kind in args.kinds.split(","):
        for layers in [*(int(n) for n in args.layers.split(",") if n), FULL[kind]]:
            worker = str(Path(__file__).with_name("_size_worker.py"))
            outcome = run_child([worker, kind, str(layers)], seconds=600, gigabytes=20)
            results[f"{kind} {layers}"] = {
                **(outcome.answer or {"error": outcome.reason}), "kind": kind, "layers": layers, "peak_bytes": outcome.peak,
            }  # fmt: skip
            console.print(f"{kind} {layers}: {_row(results[f'{kind} {layers}'])}")
            _report(results)
    full = [r for r in results.values() if r["layers"] == FULL[r["kind"]]]
    met = all("total" in r and r["total"] < SECONDS and r["peak_bytes"] < GIGABYTES * 1e9 for r in full)
    raise SystemExit(not met)


def _row(result: dict[str, Any]) -> list[str]:
    if "error" in result:
        return [result["kind"], str(result["layers"]), result["error"], *["-"] * (len(HEADER) - 3)]
    seconds = result["seconds"]
    return [
        result["kind"], str(result["layers"]), f"{result['params_before'] / 1e9:.1f} G", f"{result['params_after'] / 1e9:.1f} G",
        f"{result['groups']:,}", f"{result['units']:,}", f"{seconds['trace']:.1f}", f"{seconds['analyse']:.1f}",
        f"{seconds['plan and rewrite']:.1f}", f"{result['total']:.1f}", f"{result['peak_bytes'] / 1e9:.1f}",
        f"{result['plan_bytes'] / 1e6:.1f}",
    ]  # fmt: skip


def _exponent(found: list[dict[str, Any]]) -> str:
    """Slope of log time over log layers, by least squares."""
    if len(found) < 2:
        return "-"
    x, y = ([math.log(r[key]) for r in found] for key in ("layers", "total"))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)
    return f"{slope:.2f}"


def _report(results: dict[str, dict[str, Any]]) -> None:
    kinds = dict.fromkeys(r["kind"] for r in results.values())
    growth = [[kind, _exponent([r for r in results.values() if r["kind"] == kind and "total" in r])] for kind in kinds]
    text = f"""# Large networks on the meta device

{markdown_machine(machine())}

Half of every group goes, at random (there are no weights to score); bfloat16. Target: {SECONDS:.0f} s and {GIGABYTES:.0f} GB
in full.

{markdown_table(HEADER, [_row(r) for r in results.values()], left=1)}

How the total grows with the number of layers (1 is linear):

{markdown_table(("network", "exponent"), growth, left=1)}
"""
    write(RESULTS / "size", text, {"machine": machine(), "runs": results})


if __name__ == "__main__":
    main()
