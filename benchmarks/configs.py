"""Which selections the configuration of a Hugging Face class can express: pruned, written back, saved, loaded, compared.

    python benchmarks/configs.py [--models bert,llama] [--out STEM]

Every network of ``coverage.py transformers`` and ``transformers-more``, at half of the channels (or of the MACs), with the
criterion "magnitude". A cell says which share of the MACs is left when the model that ``from_pretrained`` builds from what
``save_pretrained`` wrote gives the outputs of the pruned graph; otherwise why not. Networks that hand out hidden states beside
their logits are captured twice, as they are and with ``outputs="logits"``.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, machine, markdown_machine, markdown_table, wide_console, write
from _coverage_transformers import TRANSFORMERS
from torch import Tensor, fx, nn

import stp_fx

SELECTIONS: dict[str, dict[str, Any]] = {
    "uniform": {"uniform": True},
    'uniform, target="macs"': {"uniform": True, "target": "macs"},
    'products="outer"': {"products": "outer"},
    'products="none"': {"products": "none"},
    "default": {},
}
BATCH = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(TRANSFORMERS), help="comma-separated (default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS / "configs", help="result files, without suffix")
    args = parser.parse_args()
    logging.getLogger("stp_fx").setLevel(logging.ERROR)
    console, results = wide_console(), dict[str, dict[str, str]]()
    for name in args.models.split(","):
        build, inputs, _ = TRANSFORMERS[name]
        torch.manual_seed(0)
        model, given = build().eval(), inputs(BATCH, torch.float32)
        for kept in (None, "logits") if _hands_out_more(model, given) else (None,):
            label = f"{name}, logits" if kept else name
            results[label] = _row(model, given, kept)
            console.print(label, results[label])
            _report(args.out, results)


def _row(model: nn.Module, given: dict[str, Tensor], kept: str | None) -> dict[str, str]:
    try:
        gm = stp_fx.trace(model, (), kwargs=given, outputs=kept)
    except stp_fx.errors.StpFxError as error:
        return dict.fromkeys(SELECTIONS, f"not captured: {_short(error)}")
    return {label: _cell(gm, model, given, options) for label, options in SELECTIONS.items()}


def _hands_out_more(model: nn.Module, given: dict[str, Tensor]) -> bool:
    """Whether the output has hidden states beside the logits."""
    with torch.no_grad():
        output = model(**given)
    return "logits" in output and any(k != "logits" and isinstance(v, Tensor) for k, v in output.items())


def _cell(gm: fx.GraphModule, model: Any, given: dict[str, Tensor], options: dict[str, Any]) -> str:
    try:
        pruned = stp_fx.prune_graph(gm, "magnitude", 0.5, **options)
        written: Any = stp_fx.write_back(pruned, model)
    except stp_fx.errors.StpFxError as error:
        return _short(error)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        written.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder).eval()
        theirs, ours = loaded(**given), pruned(**given)
    for key, value in ours.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(theirs[key], value, rtol=1e-3, atol=1e-4)
    return f"{stp_fx.cost(pruned).macs / stp_fx.cost(gm).macs:.0%}"


def _short(error: Exception) -> str:
    """The kind of what stands in the way, without the names of one layer."""
    text = str(error)
    for words, said in (
        ("share no divisor", "no: sizes share no divisor"),
        ("is out of reach", "no: target out of reach"),
        ("is built as nothing", "no: a tensor that the config does not build"),
        ("is built as", "no: shapes"),
        ("is not saved but computed", "no: a buffer that is computed"),
        (" is computed as", "no: a scale that is computed"),
        ("its output", "no: another function"),
    ):
        if words in text:
            return said
    return f"no: {type(error).__name__}"


def _report(stem: Path, results: dict[str, dict[str, str]]) -> None:
    rows = [[name, *row.values()] for name, row in results.items()]
    counts = [
        [label, f"{sum(not row[label].startswith('no') for row in results.values())} of {len(results)}"] for label in SELECTIONS
    ]
    text = f"""# What the configurations of Hugging Face can express

{markdown_machine(machine())}

Half of the channels (or MACs), "magnitude". A cell: the MACs left, where `save_pretrained` and `from_pretrained` give a model
with the outputs of the pruned graph; otherwise what is in the way. How it is run: the docstring of `benchmarks/configs.py`.

{markdown_table(("network", *SELECTIONS), rows, left=1)}

{markdown_table(("selection", "networks"), counts, left=1)}
"""
    write(stem, text, {"machine": machine(), "networks": results})


if __name__ == "__main__":
    main()
