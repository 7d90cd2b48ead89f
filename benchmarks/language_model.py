"""Perplexity of a small language model right after one-shot pruning, without labels and without training it on.

    python benchmarks/language_model.py [--targets 0.3,0.5,0.7] [--resume] [--out benchmarks/results/language_model]
    python benchmarks/language_model.py train [--steps 900] [--stop 400] [--resume]          # trains the checkpoint: ten minutes

The model and its text: ``_language.py``. Methods are compared on books that neither train nor calibrate; the best of each line is
then tried on the test books. All read the same calibration text.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, machine, markdown_machine, markdown_table, wide_console, write
from _language import CHOSEN_ON, TEST, calibration, model, perplexity

import stp_fx

Cell = dict[str, Any]
DATA = ("variance", "reconstruction")
REPAIRED: dict[str, dict[str, Any]] = {
    "least squares": {"scope": "isomorphic", "compensation": "least_squares"},
    "sequential": {"scope": "isomorphic", "compensation": "sequential"},
    "rotated, sequential": {"scope": "isomorphic", "compensation": "sequential", "basis": "rotate"},
    "optimal, sequential": {"allocation": "optimal", "compensation": "sequential"},
    "rotated, optimal, sequential": {"allocation": "optimal", "compensation": "sequential", "basis": "rotate"},
}
METHODS: dict[str, list[dict[str, Any]]] = {
    "magnitude": [{"criterion": "magnitude", "scope": scope} for scope in ("local", "isomorphic")],
    **{line: [{"criterion": criterion, **options} for criterion in DATA] for line, options in REPAIRED.items()},
}
"""By line of the table, arguments of ``prune_graph``. Lines that train after the sequential repair take its best plan."""
TRAINED = {"sequential, block-wise": "blockwise", "sequential, distillation": "distillation"}
SEQUENTIAL = ("sequential", "rotated, sequential", "optimal, sequential", "rotated, optimal, sequential")
SEQUENCES, LENGTH = 128, 128
WINDOWS = 96  # of text, in each split


def fill(cell: Cell, target: float, lines: list[str], criteria: list[str], written: Callable[[], None]) -> None:
    """Tries the methods that a cell lacks."""
    gm, batches = traced(), calibration(SEQUENCES, LENGTH)
    for line in lines:
        options = METHODS[line] if line in METHODS else _trained(cell, TRAINED[line])
        for each in options:
            name = ", ".join(map(str, each.values()))
            if name in cell.get(line, {}) or each["criterion"] not in criteria:
                continue
            found: Cell = cell.setdefault(line, {}).setdefault(name, {"options": each})
            start = time.process_time()
            try:
                pruned = stp_fx.prune_graph(gm, ratio=target, target="macs", calibration=batches, validate=False, **each)
            except stp_fx.errors.StpFxError as error:  # a method that refuses is a finding
                found["error"] = f"{type(error).__name__}: {error}"
                continue
            found |= {"seconds": time.process_time() - start, "chosen on": perplexity(pruned, "chosen on", WINDOWS)}
            found["test"] = perplexity(pruned, "test", WINDOWS)
            found["macs left"] = stp_fx.cost(pruned).macs / stp_fx.cost(gm).macs
            print(f"{target:.0%}: {line}: {name}: {found}", flush=True)
            written()


def _trained(cell: Cell, repair: str) -> list[dict[str, Any]]:
    """The best plan with the sequential repair, repaired by training after it."""
    tried = [each for line in SEQUENTIAL for each in cell.get(line, {}).values() if "chosen on" in each]
    if not tried:
        return []
    return [{**min(tried, key=lambda each: each["chosen on"])["options"], "compensation": repair}]


def traced() -> Any:
    # Transformers goes another way for a batch of one.
    return stp_fx.trace(model(), calibration(2, LENGTH)[0], outputs="logits")


def best(found: Cell) -> tuple[str, Cell] | None:
    """The method of a line that is best on the books on which methods are chosen."""
    tried = {name: each for name, each in found.items() if "chosen on" in each}
    name = min(tried, key=lambda each: tried[each]["chosen on"], default=None)
    return None if name is None else (name, tried[name])


def report(out: Path, results: dict[str, Any]) -> str:
    """Written after every method; gives the table."""
    cells = dict(sorted(results["cells"].items()))
    lines = list(dict.fromkeys(line for line in (*METHODS, *TRAINED) for cell in cells.values() if line in cell))
    rows = []
    for line in lines:
        chosen = [best(cell.get(line, {})) for cell in cells.values()]
        rows.append([line, *("-" if each is None else f"{each[1]['test']:.2f} ({each[0]})" for each in chosen)])
    table = markdown_table(("perplexity of the test books (how)", *(f"{key} of MACs removed" for key in cells)), rows)
    methods = list(dict.fromkeys((line, name) for cell in cells.values() for line, tried in cell.items() for name in tried))
    every = [[f"{line}: {name}", *(_entry(cell.get(line, {}).get(name)) for cell in cells.values())] for line, name in methods]
    errors = {(key, name): each["error"] for key, cell in cells.items() for tried in cell.values() for name, each in tried.items()
              if "error" in each}  # fmt: skip
    text = f"""# A small language model, right after one-shot pruning

{markdown_machine(machine())}

Perplexity of a token in {WINDOWS} windows of text, lower is better. Unpruned: {results["unpruned"]["test"]:.2f} on the test books
({", ".join(TEST)}),
{results["unpruned"]["chosen on"]:.2f} on the books on which the best method of each line and column is chosen
({", ".join(CHOSEN_ON)}); {results["untrained"]:.0f} would be a guess. {results["parameters"]:,} parameters; the model and its
text are described in `benchmarks/_language.py`. Calibration: {SEQUENCES} sequences of {LENGTH} tokens of the training books. The
repairs that train take the best plan of all that were repaired sequentially, and begin with that repair.

{table}

## Every method

Perplexity of the books on which methods are chosen / **of the test books** (processor seconds of all that `prune_graph` does; one
thread, on a machine that did other work).

{markdown_table(("method", *cells), every)}
{"".join(f"{chr(10)}- {key}, {name}: `{error}`" for (key, name), error in errors.items())}
"""
    write(out, text, {"machine": machine(), **results})
    return table


def _entry(found: Cell | None) -> str:
    if found is None or "chosen on" not in found:
        return "-"
    return f"{found['chosen on']:.2f} / **{found['test']:.2f}** ({found['seconds']:.0f} s)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=("prune", "train"), default="prune")
    parser.add_argument("--steps", type=int, default=900, help="of the training's schedule")
    parser.add_argument("--stop", type=int, help="of the training: after so many steps")
    parser.add_argument("--targets", default="0.3,0.5,0.7", help="fractions of the MACs to remove")
    parser.add_argument("--lines", default=";".join((*METHODS, *TRAINED)), help="of the table, with semicolons in between")
    parser.add_argument("--criteria", default=",".join(("magnitude", *DATA)))
    parser.add_argument("--resume", action="store_true", help="keep what the result file has; of the training, the checkpoint")
    parser.add_argument("--out", type=Path, default=RESULTS / "language_model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.command == "train":
        from _language_training import train

        return train(arguments.steps, arguments.stop, arguments.resume)
    kept = arguments.out.with_suffix(".json")
    results: dict[str, Any] = json.loads(kept.read_text()) if arguments.resume and kept.exists() else {}
    if "unpruned" not in results:
        whole = model()
        results |= {
            "unpruned": {split: perplexity(whole, split, WINDOWS) for split in ("chosen on", "test")},
            "parameters": sum(p.numel() for p in whole.parameters()),
            "untrained": whole.config.vocab_size,
            "cells": {},
        }
    for target in map(float, arguments.targets.split(",")):
        cell = results["cells"].setdefault(f"{target:.0%}", {})
        fill(cell, target, arguments.lines.split(";"), arguments.criteria.split(","), lambda: report(arguments.out, results))
    wide_console().print(report(arguments.out, results))


if __name__ == "__main__":
    main()
