"""The ledger of random networks: which ones the laws have been held to, shard by shard, and what came of it.

    python -m tests.properties.ledger --frontend fx --shards 0-19 [--networks 100] [--out benchmarks/results/fuzz-ledger]

A shard is a number of networks drawn from one seed; the same shard draws the same networks (of the same version of the library
and of Hypothesis). Each shard that has run is one line of ``OUT.jsonl``, with the versions, and is not run again; ``OUT.md`` has
the sums. A violation does not end the run: it is in the line of its shard, with the code that builds the network. Such a shard is
run again, and its last line counts.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import platform
import subprocess
import time
import traceback
from typing import Any

import hypothesis
import torch
from hypothesis import given, seed

import stp_fx
from stp_fx.testing import Recipe, Request, networks, requests, token_networks
from stp_fx.testing.laws import check_laws

from .budget import shard_settings
from .test_laws import case_of

FRONT_ENDS = ("fx", "export")
FIRST_SEED = 10**6
"""Shards 0, 1, ... have the seeds from here on, none of which `make test` or `make fuzz` has."""


def run_shard(frontend: str, shard: int, count: int) -> dict[str, Any]:
    """Holds ``count`` networks to all laws; the line of the ledger."""
    tally: collections.Counter[str] = collections.Counter()
    violations: list[dict[str, str]] = []
    start = time.perf_counter()

    @seed(FIRST_SEED + shard)
    @shard_settings(count)
    @given(networks() | networks() | networks() | token_networks(), requests())
    def each(recipe: Recipe, request: Request) -> None:
        try:
            tally.update([check_laws(case_of(recipe, request, frontend)).label])
        except Exception as error:  # every violation is written down, and the next network drawn
            where = traceback.extract_tb(error.__traceback__)[-1]
            violations.append(
                {"error": f"{type(error).__name__}: {error}"[:2000], "at": f"{where.filename}:{where.lineno}",
                 "recipe": repr(recipe), "request": repr(request)}
            )  # fmt: skip
        tally.update(["networks"])

    each()
    return {
        "frontend": frontend, "shard": shard, "seed": FIRST_SEED + shard, "asked": count, "networks": tally.pop("networks", 0),
        "outcomes": dict(tally), "violations": violations, "seconds": round(time.perf_counter() - start, 1),
        "date": time.strftime("%Y-%m-%d"), "commit": _commit(), "stp_fx": stp_fx.__version__, "torch": torch.__version__,
        "hypothesis": hypothesis.__version__, "python": platform.python_version(),
    }  # fmt: skip


def _commit() -> str:
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()


def lines_of(path: pathlib.Path) -> list[dict[str, Any]]:
    """What the ledger holds."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def summary(lines: list[dict[str, Any]]) -> str:
    """The sums as a page: a row for each front end, torch and library version."""
    every = lines
    lines = list({(line["frontend"], line["shard"]): line for line in every}.values())
    rows: dict[tuple[str, ...], collections.Counter[str]] = {}
    shards: dict[tuple[str, ...], list[int]] = {}
    for line in lines:
        key = (line["frontend"], line["torch"], line["python"], line["stp_fx"])
        row = rows.setdefault(key, collections.Counter())
        row.update({"networks": line["networks"], "violations": len(line["violations"]), "seconds": line["seconds"]})
        row.update({f"outcome {label}": number for label, number in line["outcomes"].items()})
        shards.setdefault(key, []).append(line["shard"])
    labels = sorted({label for row in rows.values() for label in row if label.startswith("outcome ")})
    head = ["front end", "torch", "Python", "stp_fx", "shards", "networks", *(x.removeprefix("outcome ") for x in labels),
            "violations", "s a network"]  # fmt: skip
    table = [head, ["---"] * len(head)]
    for key, row in sorted(rows.items()):
        rate = row["seconds"] / max(row["networks"], 1)
        table.append([*key, _ranges(shards[key]), f"{row['networks']:,}", *(f"{row[label]:,}" for label in labels),
                      str(row["violations"]), f"{rate:.2f}"])  # fmt: skip
    total, bad = sum(line["networks"] for line in lines), sum(len(line["violations"]) for line in lines)
    dates = sorted({line["date"] for line in lines})
    earlier = sum(len(line["violations"]) for line in every) - bad
    said = f"{total:,} random networks, {bad} violations; {dates[0]} to {dates[-1]}." if lines else "Nothing has run."
    said += f" Earlier lines have {earlier} violations, whose shards were run again after a repair." if earlier else ""
    body = "\n".join("| " + " | ".join(row) + " |" for row in table)
    return (
        f"# Random networks held to the laws\n\n{said}\n\n{body}\n\n"
        "A shard is drawn from the seed 1,000,000 + its number. `make ledger` runs more; one line a shard, with its commit,\n"
        "is in `fuzz-ledger.jsonl`. The laws: ARCHITECTURE.md, section 8.\n"
    )


def _ranges(numbers: list[int]) -> str:
    ordered, parts = sorted(set(numbers)), []
    while ordered:
        last = next((k for k in range(len(ordered)) if ordered[k] != ordered[0] + k), len(ordered)) - 1
        parts.append(f"{ordered[0]}-{ordered[last]}" if last else str(ordered[0]))
        ordered = ordered[last + 1 :]
    return ", ".join(parts)


def _range(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frontend", choices=FRONT_ENDS, default="fx")
    parser.add_argument("--shards", type=_range, default=range(1))
    parser.add_argument("--networks", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=1e9, help="no shard is begun after this time")
    parser.add_argument("--out", default="benchmarks/results/fuzz-ledger")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = pathlib.Path(f"{arguments.out}.jsonl")
    start = time.monotonic()
    for shard in arguments.shards:
        if time.monotonic() - start > 60 * arguments.minutes:
            break
        known = {(line["frontend"], line["shard"]): line for line in lines_of(path)}.get((arguments.frontend, shard))
        if known is not None and not known["violations"]:
            continue
        line = run_shard(arguments.frontend, shard, arguments.networks)
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print({key: value for key, value in line.items() if key != "violations"}, *line["violations"], sep="\n", flush=True)
        pathlib.Path(f"{arguments.out}.md").write_text(summary(lines_of(path)))


if __name__ == "__main__":
    main()
