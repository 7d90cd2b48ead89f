"""How fast the engine is, beside torch-pruning 1.6.1 and beside the floor; how time and memory grow.

    python benchmarks/engine.py [--only networks|growth] [--networks resnet50,swin_t] [--out benchmarks/results/engine]

Networks: each in a process of its own (``_engine_worker.py``), where stp_fx (trace, analysis, scores, plan, removal),
torch-pruning (dependency graph to ``step()``; its copy of the model is made off the clock) and the floor take turns,
with one thread, the same seed and the same model; medians. Growth: every point is a process of its own, so that its
peak memory is its own. The larger half of a curve's points gives the fitted exponent: small ones show the constant,
not the growth.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import RESULTS, machine, markdown_machine, markdown_table, run_child, wide_console, write
from _families import MEANING, SIZES
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

WORKER = str(Path(__file__).with_name("_engine_worker.py"))
# name: rounds of the peer. swin_t has none: it has been seen to run on without an end, and gets a process with limits.
NETWORKS = {
    "resnet50": 3,
    "vit_b_16": 3,
    "convnext_base": 3,
    "vgg16_bn": 3,
    "densenet121": 3,
    "densenet201": 1,
    "swin_t": 0,
}
CONTESTANTS = ("stp_fx", "torch-pruning", "floor")
COLORS = {"stp_fx": "#2f6f9f", "torch-pruning": "#c4622d", "floor": "#8a8a8a"}
NETWORK_HEADER = ("network", "stp_fx s", "trace", "analysis", "prune", "torch-pruning s", "times faster", "floor s",
                  "floors", "bare floor s", "parameters", "stp_fx", "torch-pruning")  # fmt: skip


def measure_network(name: str, rounds: int, peer_limit: float) -> dict[str, Any]:
    """Medians of one network; ``peer_reason`` says why the peer has none."""
    together = run_child([WORKER, "network", name, str(rounds), str(NETWORKS.get(name, 1))], seconds=1200)
    result = together.answer or {"error": together.reason}
    if together.ended and not NETWORKS.get(name, 1):
        alone = run_child([WORKER, "peer", name], seconds=peer_limit, gigabytes=12)
        result |= alone.answer or {"peer_reason": f"{alone.reason}, {alone.peak / 1e9:.1f} GB"}
    return result


def measure_growth(family: str, rounds: int, limit: float, console: Console) -> dict[str, list[dict[str, Any]]]:
    """Points of one family, per contestant; a contestant that takes too long at one size is spared the larger ones."""
    curves: dict[str, list[dict[str, Any]]] = {contestant: [] for contestant in CONTESTANTS}
    for contestant, points in curves.items():
        for size in SIZES[family]:
            outcome = run_child([WORKER, "point", contestant, family, str(size), str(rounds)], seconds=limit)
            point = outcome.answer or {"error": outcome.reason}
            points.append({"size": size, **point})
            shown = f"{point['seconds']:.3f} s, {point['peak_bytes'] / 1e6:.0f} MB" if outcome.ended else outcome.reason
            console.print(f"  {family:9} {contestant:14} {size:5}  {shown}")
            if not outcome.ended:
                break
    return curves


def exponent(points: list[dict[str, Any]], key: str) -> float | None:
    """Slope of log ``key`` over log size, fitted to the larger half of the points; None for fewer than three."""
    measured = [(point["size"], point[key]) for point in points if point.get(key)]
    largest = measured[-max(3, len(measured) // 2) :]
    if len(largest) < 3:
        return None
    sizes, values = np.log(np.array(largest, dtype=float)).T
    return float(np.polyfit(sizes, values, 1)[0])


def network_cells(name: str, result: dict[str, Any]) -> list[str]:
    if "error" in result:
        return [name, result["error"], *["-"] * (len(NETWORK_HEADER) - 2)]
    mine, theirs, least = result["ours"], result.get("peer"), result["floor"]
    runs = result.get("peer_result", {})
    broken = "" if runs.get("runs", "yes") == "yes" else " (does not run)"
    return [
        name,
        f"{mine:.2f}",
        *(f"{result[part]:.2f}" for part in ("trace", "analysis", "prune")),
        f"{theirs:.2f}" if theirs else result.get("peer_reason", "-"),
        f"{theirs / mine:.1f}" if theirs else "-",
        f"{least:.3f}",
        f"{mine / least:.1f}",
        f"{result['bare_floor']:.3f}",
        f"{result['parameters'] / 1e6:.2f} M",
        f"{result['ours_result']['parameters'] / 1e6:.2f} M",
        f"{runs['parameters'] / 1e6:.2f} M{broken}" if runs else "-",
    ]


GROWTH_HEADER = ("family", "contestant", "sizes", "s at the largest", "exponent", "peak MB there", "exponent")


def growth_rows(growth: dict[str, dict[str, list[dict[str, Any]]]]) -> list[list[str]]:
    rows = []
    for family, curves in growth.items():
        for contestant, points in curves.items():
            ended = [point for point in points if "seconds" in point]
            if not ended:
                rows.append([family, contestant, points[0].get("error", "-") if points else "-", *["-"] * 4])
                continue
            last = ended[-1]
            stopped = f" (at {points[-1]['size']}: {points[-1]['error']})" if "error" in points[-1] else ""
            slopes = [exponent(points, key) for key in ("seconds", "peak_bytes")]
            seconds, memory = (f"{slope:.2f}" if slope is not None else "-" for slope in slopes)
            rows.append([family, contestant, f"{ended[0]['size']} to {last['size']}{stopped}", f"{last['seconds']:.3f}",
                         seconds, f"{last['peak_bytes'] / 1e6:.0f}", memory])  # fmt: skip
    return rows


def plot(growth: dict[str, dict[str, list[dict[str, Any]]]], path: Path) -> None:
    """Seconds above, peak memory below, one column a family; both axes logarithmic."""
    figure = Figure(figsize=(3.6 * len(growth), 6.4), layout="constrained")
    grid = figure.subplots(2, len(growth), squeeze=False)
    for column, (family, curves) in enumerate(growth.items()):
        for row, (key, scale, label) in enumerate((("seconds", 1, "seconds"), ("peak_bytes", 1e-6, "peak memory, MB"))):
            axes = grid[row][column]
            for contestant, points in curves.items():
                ended = [point for point in points if point.get(key)]
                slope = exponent(points, key)
                legend = contestant + (f"  n^{slope:.2f}" if slope is not None else "")
                xs, ys = [point["size"] for point in ended], [point[key] * scale for point in ended]
                axes.loglog(xs, ys, "o-", color=COLORS[contestant], markersize=3.5, linewidth=1.4, label=legend)
            axes.grid(True, which="major", linewidth=0.4, alpha=0.5)
            axes.set_xticks(SIZES[family], [str(size) for size in SIZES[family]], fontsize=7)
            axes.minorticks_off()
            axes.set_xlabel("n", fontsize=8)
            axes.set_ylabel(label, fontsize=8)
            axes.tick_params(labelsize=8)
            axes.legend(fontsize=7, frameon=False)
            if row == 0:
                axes.set_title(f"{family}: {MEANING[family]}", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


VALIDATION_HEADER = ("network", "off s", "on s", "times", "forward passes", "checks s", "one forward s", "largest difference",
                     "checked", "left out")  # fmt: skip


def validation_cells(name: str, result: dict[str, Any]) -> list[str]:
    """The cost of the checks of capture and removal, which are on by default."""
    if "error" in result:
        return [name, result["error"], *["-"] * (len(VALIDATION_HEADER) - 2)]
    found = result["validation"]
    worst = max(found["differences"].values(), default=0.0)
    return [
        name,
        f"{result['ours']:.2f}",
        f"{result['validated']:.2f}",
        f"{result['validated'] / result['ours']:.1f}",
        str(found["forwards"]),
        f"{found['seconds']:.2f}",
        f"{result['forward']:.3f}",
        f"{worst:.1e}",
        ", ".join(found["ran"]),
        ", ".join(found["left_out"]) or "-",
    ]


NETWORK_NOTE = """\
One thread, ratio 0.5, magnitude; medians of runs that take turns. Floor: `vector_norm` of every weight over its inputs
and over its outputs, and a copy of the kept weights; `floors`: stp_fx over it. Bare floor: every weight read once, and the
copy. Parameters: of the network, and left by each."""
VALIDATION_NOTE = """\
Trace and prune with `validate=False` (as above) and with the default, `validate="auto"`: model and graph are run in both modes,
with another batch and in another size, and the masked graph beside the smaller one. `checks s`: what these runs take."""
GROWTH_NOTE = """\
Peak memory: largest resident size during the call, less that before it. Exponents: fitted to the larger half of the
points."""


def report(stem: Path, networks: dict[str, Any], growth: dict[str, Any]) -> None:
    text = ["# Engine: time and memory", markdown_machine(machine())]
    if networks:
        rows = [network_cells(name, result) for name, result in networks.items()]
        text += [NETWORK_NOTE, markdown_table(NETWORK_HEADER, rows)]
        rows = [validation_cells(name, result) for name, result in networks.items()]
        text += ["## Validation on and off", VALIDATION_NOTE, markdown_table(VALIDATION_HEADER, rows)]
    if growth:
        families = "\n".join(f"- {family}: {MEANING[family]}" for family in growth)
        text += ["## Growth", f"![log-log plots]({stem.name}.png)", families]
        text += [markdown_table(GROWTH_HEADER, growth_rows(growth), left=3), GROWTH_NOTE]
    write(stem, "\n\n".join(text), {"machine": machine(), "networks": networks, "growth": growth})


def show(title: str, header: tuple[str, ...], rows: list[list[str]], console: Console) -> None:
    table = Table(title=title)
    for position, column in enumerate(header):
        table.add_column(column, justify="right" if position else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("networks", "growth"), help="default: both")
    parser.add_argument("--networks", default=",".join(NETWORKS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--families", default=",".join(SIZES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of stp_fx and the floor (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=60, help="seconds for one point of growth (default: %(default)s)")
    parser.add_argument("--peer-limit", type=float, default=110, help="seconds for the peer on swin_t (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "engine", help="result files, without suffix")
    return parser.parse_args()


def main() -> None:
    args, console = arguments(), wide_console()
    torch.set_num_threads(1)  # as every worker does; for the record in the results
    networks: dict[str, Any] = {}
    growth: dict[str, Any] = {}
    if args.only != "growth":
        for name in args.networks.split(","):
            networks[name] = measure_network(name, args.rounds, args.peer_limit)
            console.print("  " + "  ".join(network_cells(name, networks[name])))
            report(args.out, networks, growth)
        show("One thread, ratio 0.5", NETWORK_HEADER, [network_cells(*pair) for pair in networks.items()], console)
    if args.only != "networks":
        for family in args.families.split(","):
            growth[family] = measure_growth(family, 3, args.limit, console)
            report(args.out, networks, growth)
        plot(growth, args.out.with_suffix(".png"))
        show("Growth", GROWTH_HEADER, growth_rows(growth), console)


if __name__ == "__main__":
    main()
