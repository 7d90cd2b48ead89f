"""Runs all constructs on both front ends and writes table.md: `python -m tests.constructs.independent.run [names]`."""

import platform
import sys
import time
from pathlib import Path

import torch

from . import constructs
from .oracle import check
from .registry import Case

FRONTENDS = ("auto", "export")


def row(case: Case, results: dict) -> str:
    """One line of the table."""
    share = max((r.share for r in results.values()), default=0)
    cells = [results[f].verdict if f in results else "" for f in FRONTENDS]
    return f"| {case.name} | {case.cause} | {cells[0]} | {cells[1]} | {share:.0%} |"


def one(case: Case, frontends=FRONTENDS, log=None) -> dict:
    """The results of one construct by front end; prints what was found."""
    results = {}
    for frontend in frontends:
        start = time.time()
        try:
            results[frontend] = check(case, frontend)
        except Exception as e:
            print(f"HARNESS {case.name} {frontend}: {type(e).__name__}: {e}", file=log, flush=True)
            continue
        r = results[frontend]
        print(f"{r.verdict:18} {case.name} {frontend} {time.time() - start:.1f}s share {r.share:.2f}", file=log, flush=True)
        if r.base != "refused":
            for text in [x for x in r.log if x.startswith("does not take")][:1]:
                print(f"      {text[:200]}", file=log, flush=True)
        for kind, text in r.findings[:7]:
            print(f"      {kind}: {text}", file=log, flush=True)
        if r.base in ("nothing-pruned", "refused") or r.verdict in ("SILENT", "FOREIGN", "WRONG-LOUD"):
            print(f"      log: {' | '.join(x for x in r.log if x)[:600]}", file=log, flush=True)
    return results


def summary(rows: list[str]) -> str:
    """What stands above the table: the command, the machine, and how many of each verdict."""
    cells = [[cell.strip() for cell in each.split("|")[1:-1]] for each in rows[2:]]
    lines = [
        "# Constructs by somebody who has not read the library's code",
        "",
        f"`python -m tests.constructs.independent.run`, {time.strftime('%Y-%m-%d')}, one thread, {platform.machine()}, Python "
        f"{platform.python_version()}, torch {torch.__version__}. {len(cells)} constructs.",
        "",
        "WRONG-LOUD: what the graph does not hold (state of Python from call to call, hooks on gradients, and what torch.export",
        "drops), of which the log tells. SILENT: other numbers without a word. FOREIGN: an exception that is not the library's.",
        "",
        "| verdict | fx | export |",
        "| --- | ---: | ---: |",
    ]
    for verdict in ("ok", "pruned-inexact-ok", "nothing-pruned", "refused", "WRONG-LOUD", "FOREIGN", "SILENT"):
        lines.append(f"| {verdict} | {sum(c[2] == verdict for c in cells)} | {sum(c[3] == verdict for c in cells)} |")
    return "\n".join([*lines, "", *rows]) + "\n"


def main(names: list[str]) -> None:
    """All constructs, or those whose names are given; the table is written for all alone."""
    torch.set_num_threads(1)
    cases = [constructs.CASES[n] for n in names] if names else list(constructs.CASES.values())
    rows = ["| construct | cause | fx | export | pruned |", "| --- | --- | --- | --- | --- |"]
    for case in cases:
        rows.append(row(case, one(case)))
        if not names:
            (Path(__file__).parent / "table.md").write_text(summary(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
