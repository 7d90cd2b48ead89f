"""A network that is never in memory as a whole: planned, cut and repaired shard by shard.

    python benchmarks/shards.py [--layers 22] [--sequences 8] [--tokens 64] [--ratio 0.5] [--out benchmarks/results/shards]

A Llama of transformers in the shape of TinyLlama (width 2048, 5632 in the MLP, 32 heads, 4 for keys and values, 32,000 tokens),
with random weights in bfloat16 whose output channels fall off as those of trained networks do. A part of its parameters is
removed: it is traced on the meta device in float32, scored by magnitude, and cut with and without sequential repair. The files
lie in a temporary folder, which is deleted. One thread.

Each row is a process of its own. Memory is its largest resident memory (``getrusage``), with Python, PyTorch and transformers in
it; times are seconds of the processor and of the clock.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, machine, markdown_machine, markdown_table, run_child, write
from safetensors import safe_open
from safetensors.torch import save_file

HEADER = ("step", "parameters", "read GB", "written GB", "processor s", "clock s", "peak GB")
SHARD = 500_000_000
STEPS = ("make", "plan by magnitude", "cut", "cut and repair")


def model_of(layers: int) -> torch.nn.Module:
    """On the meta device, but for the rotary frequencies, which no checkpoint has."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=4, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config).eval()


def captured(layers: int) -> Any:
    import stp_fx

    model = model_of(layers)
    gm = stp_fx.trace(model, torch.zeros(2, 16, dtype=torch.int64, device="meta"), validate=False)
    real = type(model.model.rotary_emb)(model.config)  # type: ignore[operator,union-attr,arg-type]
    for name, buffer in real.named_buffers():
        if hasattr(gm.model.rotary_emb, name):
            setattr(gm.model.rotary_emb, name, buffer)
    return gm


def make(layers: int, whole: Path) -> None:
    """Writes the checkpoint, a shard at a time."""
    whole.mkdir()
    shard: dict[str, torch.Tensor] = {}
    size = number = 0
    for name, tensor in model_of(layers).state_dict().items():
        shard[name] = (torch.ones(tensor.shape) if "norm" in name else _weight(tensor.shape, "embed" in name)).bfloat16()
        size += 2 * tensor.numel()
        if size > SHARD:
            save_file(shard, whole / f"model-{number:05}.safetensors")
            shard, size, number = {}, 0, number + 1
    save_file(shard, whole / f"model-{number:05}.safetensors")


def _weight(shape: torch.Size, embedding: bool) -> torch.Tensor:
    """Random numbers whose output channels fall off, in any order, so that activations have few strong directions, as those of
    trained networks have: what channels have in common is what a repair lives on."""
    channels = shape[1] if embedding else shape[0]
    scale = (1 + torch.randperm(channels)).float().rsqrt() * channels**0.5 / 100
    return torch.randn(shape) * (scale if embedding else scale[:, None])


def worker(step: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One row; leaves the plan in the folder for the next."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    processor, wall = time.process_time(), time.perf_counter()
    whole, plan = folder / "whole", folder / "plan.json"
    if step == "make":
        make(options.layers, whole)
        return _facts(processor, wall, None, whole)
    import stp_fx

    gm = captured(options.layers)
    if step.startswith("plan"):
        plan.write_text(stp_fx.plan_shards(gm, whole, "magnitude", options.ratio, target="params").to_json())
        return _facts(processor, wall, whole, None)
    batches = [torch.randint(0, 32000, (options.sequences, options.tokens))]
    repair: dict[str, Any] = {"compensation": "sequential", "calibration": batches} if step.endswith("repair") else {}
    target = folder / step.replace(" ", "-")
    stp_fx.prune_shards(gm, stp_fx.PrunePlan.from_json(plan.read_text()), whole, target, max_shard_bytes=SHARD, **repair)
    facts = _facts(processor, wall, whole, target)
    if repair:
        facts["changed"] = _changed(folder / "cut", target)
        shutil.rmtree(target)
    return facts


def _facts(processor: float, wall: float, source: Path | None, target: Path | None) -> dict[str, Any]:
    sizes = {
        kind: 0 if each is None else sum(file.stat().st_size for file in each.iterdir())
        for kind, each in (("read", source), ("written", target))
    }
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {**sizes, "processor": time.process_time() - processor, "wall": time.perf_counter() - wall, "peak": peak}


def _changed(before: Path, after: Path) -> int:
    """How many tensors the repair has changed."""
    count = 0
    for path in sorted(after.glob("*.safetensors")):
        with safe_open(path, "pt") as new, safe_open(before / path.name, "pt") as old:
            count += sum(not torch.equal(new.get_tensor(name), old.get_tensor(name)) for name in new.keys())  # noqa: SIM118
    return count


def row(step: str, done: dict[str, Any]) -> list[str]:
    size = done["written"] or done["read"]
    gigabytes = [f"{done[kind] / 1e9:.2f}" if done[kind] else "-" for kind in ("read", "written")]
    return [
        step,
        f"{size / 2e9:.2f} G",
        *gigabytes,
        f"{done['processor']:.0f}",
        f"{done['wall']:.0f}",
        f"{done['peak'] / 1e9:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--ratio", type=float, default=0.5, help="of the parameters")
    parser.add_argument("--out", type=Path, default=RESULTS / "shards")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worker(options.worker[0], Path(options.worker[1]), options)))
        return
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="stp_fx_shards_") as folder:
        for step in STEPS:
            numbers = [
                part for name in ("layers", "sequences", "tokens", "ratio") for part in (f"--{name}", str(vars(options)[name]))
            ]
            done = run_child([__file__, *numbers, "--worker", step, folder], seconds=86400, gigabytes=12)
            if done.answer is None:
                sys.exit(f"{step}: {done.reason}")
            found[step] = done.answer
            print(*zip(HEADER, row(step, done.answer), strict=True), flush=True)
    facts = machine()
    about = (__doc__ or "").strip().split("\n\n")[2:]
    changed = found[STEPS[-1]]["changed"]
    calibration = f"Calibration: {options.sequences} sequences of {options.tokens} tokens; the repair changed {changed} tensors."
    table = markdown_table(HEADER, [row(*each) for each in found.items()])
    text = "\n\n".join(("# Pruning shard by shard", markdown_machine(facts), *about, calibration, table))
    write(options.out, text, {"machine": facts, "options": {k: str(v) for k, v in vars(options).items()}, "rows": found})


if __name__ == "__main__":
    main()
