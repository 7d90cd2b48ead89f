"""The page on troubleshooting has a part for every error."""

from __future__ import annotations

import re

from pages import ROOT

import stp_fx


def test_every_error_has_a_cause_and_a_remedy() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    parts = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|^\*\*)", text + "\n## ", re.DOTALL | re.MULTILINE))
    assert set(parts) == set(stp_fx.errors.__all__)
    for name, part in parts.items():
        assert "\n- " in part or name == "StpFxError", f"{name}: what can be done is missing"
        assert len(part.split()) > 12, name
