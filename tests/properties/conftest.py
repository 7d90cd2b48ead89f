"""Counts what the random networks had to offer, over all tests and processes, and prints it at the end."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

import pytest

from . import budget  # noqa: F401 - registers the profile before `--hypothesis-profile` is read

_tally = pytest.StashKey[collections.Counter[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_tally] = collections.Counter()


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[collections.Counter[str]]:
    """Counts what a test has seen; the totals of all tests and processes are printed at the end."""
    counter: collections.Counter[str] = collections.Counter()
    yield counter
    request.config.stash[_tally].update(counter)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["stp_fx_tally"] = dict(session.config.stash[_tally])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    node.config.stash[_tally].update(getattr(node, "workeroutput", {}).get("stp_fx_tally", {}))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    counter = terminalreporter.config.stash.get(_tally, collections.Counter())
    networks = counter.pop("networks", 0)
    if not networks:
        return
    parts = [f"{counter[k]} {k}" for k in sorted(counter) if not k.startswith("kind ")]
    terminalreporter.write_line(f"random networks: {networks}, of which {', '.join(parts)}")
    kinds = {k.removeprefix("kind "): v for k, v in counter.items() if k.startswith("kind ")}
    if kinds:
        rare = ", ".join(f"{k} {v}" for k, v in sorted(kinds.items(), key=lambda item: item[1])[:8])
        terminalreporter.write_line(f"kinds of blocks in them: {len(kinds)}; the rarest: {rare}")
