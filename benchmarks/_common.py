"""The common parts of the benchmarks: facts about the machine, children with limits on time and memory, result files."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console

RESULTS = Path(__file__).parent / "results"
_POLL = 0.1  # seconds between two looks at a child


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a child ended: its JSON answer, or why there is none. ``peak`` is its largest resident memory in bytes."""

    answer: dict[str, Any] | None
    reason: str
    seconds: float
    peak: int

    @property
    def ended(self) -> bool:
        return self.answer is not None


def run_child(arguments: Sequence[str], *, seconds: float, gigabytes: float = 20.0) -> Outcome:
    """Run ``python ARGUMENTS`` until it ends or takes more time or memory than allowed; read its last line."""
    start, peak, reason = time.perf_counter(), 0, ""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen([sys.executable, *arguments], stdout=out, stderr=err)
        process = psutil.Process(child.pid)
        while child.poll() is None:
            peak = max(peak, _resident(process))
            if time.perf_counter() - start > seconds:
                reason = f"no end within {seconds:.0f} s"
            elif peak > gigabytes * 1e9:
                reason = f"over {gigabytes:g} GB after {time.perf_counter() - start:.0f} s"
            if reason:
                child.kill()
            time.sleep(_POLL)
        taken = time.perf_counter() - start
        out.seek(0)
        err.seek(0)
        if not reason and child.returncode == 0:
            return Outcome(json.loads(out.read().strip().splitlines()[-1]), "", taken, peak)
        complaint = (err.read().strip() or "said nothing").splitlines()[-1]
        return Outcome(None, reason or f"exit code {child.returncode}: {complaint[:200]}", taken, peak)


def _resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.Error:  # it ended between two looks
        return 0


def reset_peak() -> None:
    """Let :func:`peak_resident` start anew, on Linux; elsewhere the peak is that of the whole process."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def peak_resident() -> int:
    """Largest resident memory of this process in bytes, since :func:`reset_peak`."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource  # not on every system that has no /proc either

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def wide_console() -> Console:
    """A console on which the tables are not folded, however narrow the terminal or the log file."""
    console = Console(highlight=False)
    return Console(highlight=False, width=max(console.width, 190))


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def median(times: Sequence[float]) -> float | None:
    return statistics.median(times) if times else None


def machine() -> dict[str, str]:
    """Where and how a run was made: without this, its figures say little."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    arguments = [word for word, before in zip(sys.argv[1:], sys.argv) if "--out" not in (word, before)]
    return {
        "command": shlex.join(["python", os.path.relpath(sys.argv[0]), *arguments]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "cpu": f"{_cpu_name()}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB",
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": installed("torchvision"),
        "stp-fx": installed("stp-fx"),
        "torch-pruning": installed("torch-pruning"),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A markdown table; the first ``left`` columns are text, the others numbers, set to the right."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def markdown_machine(facts: dict[str, str]) -> str:
    return "\n".join(f"- {name}: `{value}`" for name, value in facts.items())


def write(stem: Path, markdown: str, data: dict[str, Any]) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".md").write_text(markdown.rstrip() + "\n")
    stem.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
