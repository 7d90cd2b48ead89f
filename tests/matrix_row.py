"""Writes the row of one pair of torch and Python into ``benchmarks/results/matrix.md``; see ``tests/matrix.sh``.

python tests/matrix_row.py TABLE LOG PACKAGES SECONDS [RERUN]    # in the environment of the pair; LOG: what pytest printed

RERUN: what pytest printed of the tests that had failed, run again after a repair.
"""

from __future__ import annotations

import datetime
import os
import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path

_HEAD = """# Versions of torch and Python

`tests/matrix.sh PAIR ...`: the suite without what is marked slow, two processes of one thread each. Packages: "newest" are those
that pip chose on the date, "lowest" the lower bounds in `pyproject.toml`. "Rerun": of those that passed, how many failed in the
run of the whole and passed later by themselves, most after a repair. Seconds are those of a machine with other work.

| torch | torchvision | Python | packages | passed | rerun | failed | skipped | seconds | date | cores |
| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | --- | ---: |
"""


def main(table: str, log: str, packages: str, seconds: str, rerun: str | None = None) -> None:
    """Puts the row of this environment into the table, in place of an older one of the same versions."""
    passed, failed, skipped = _counts(log)
    again = 0
    if rerun is not None:
        again, failed, more = _counts(rerun)
        passed, skipped = passed + again, skipped + more
    versions = (version("torch").partition("+")[0], version("torchvision").partition("+")[0], platform.python_version(), packages)
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    numbers = (passed, again, failed, skipped, seconds, date, os.cpu_count())
    path = Path(table)
    rows = {tuple(_cells(line)[:4]): line for line in _rows(path)}
    rows[versions] = f"| {' | '.join(map(str, (*versions, *numbers)))} |"
    path.write_text(_HEAD + "".join(f"{rows[key]}\n" for key in sorted(rows, key=_order)))


def _counts(log: str) -> tuple[int, int, int]:
    """How many tests passed, failed, and were skipped."""
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", _summary(Path(log).read_text()))}
    failed = counts.get("failed", 0) + counts.get("errors", 0) + counts.get("error", 0)
    return counts.get("passed", 0) + counts.get("xfailed", 0), failed, counts.get("skipped", 0)


def _summary(text: str) -> str:
    """pytest's last line; empty where it did not come so far."""
    found = [line for line in text.splitlines() if re.search(r"\d+ \w+.* in [\d.]+s", line)]
    return found[-1].partition(" in ")[0] if found else "1 error"


def _rows(path: Path) -> list[str]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in lines if re.match(r"\| \d", line)]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def _order(key: tuple[str, ...]) -> list[tuple[int, ...] | str]:
    return [*(tuple(map(int, each.split("."))) for each in key[:3]), key[3]]


if __name__ == "__main__":
    main(*sys.argv[1:])
