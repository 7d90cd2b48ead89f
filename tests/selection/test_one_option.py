"""An option of the selection is one field: every call that selects, and both commands, take it from there."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import pytest

import stp_fx
from stp_fx.cli.main import _parser
from stp_fx.selection.selection import Selection, SelectionOptions, SharedOptions, default_of

FIELDS = {each.name: each for each in dataclasses.fields(Selection)}
CALLS: dict[str, tuple[Callable[..., Any], set[str]]] = {
    "prune_graph": (stp_fx.prune_graph, set()),
    "PATPassManager": (stp_fx.PATPassManager, set()),
    "prune_submodule": (stp_fx.prune_submodule, set()),
    "sweep": (stp_fx.sweep, {"ratio"}),  # takes `ratios`, a list: one network for each
}


@pytest.mark.parametrize("call", CALLS)
def test_every_field_is_an_argument_with_the_same_default(call: str) -> None:
    function, without = CALLS[call]
    parameters = inspect.signature(function).parameters
    for name, option in FIELDS.items():
        if name in without:
            continue
        assert name in parameters, f"{call} does not take {name}"
        if call != "sweep" or name != "ratios":
            default = parameters[name].default
            assert default is inspect.Parameter.empty or default == default_of(option), f"{call}: {name}={default!r}"


@pytest.mark.parametrize("command", ["prune", "sweep"])
def test_every_field_is_an_option_of_the_command_with_its_help(command: str) -> None:
    commands = next(a for a in _parser()._actions if hasattr(a, "choices") and a.choices and command in a.choices)
    options = {action.dest: action for action in commands.choices[command]._actions}
    for name, option in FIELDS.items():
        if command == "sweep" and name in ("ratio", "ratios"):
            continue
        assert name in options, f"{command} has no option for {name}: {sorted(options)}"
        assert str(option.metadata["help"]).split(" (")[0] in str(options[name].help)


def test_the_typed_dicts_name_all_fields_but_the_ratio() -> None:
    assert set(get_type_hints(SelectionOptions)) == FIELDS.keys() - {"ratio"}
    assert set(get_type_hints(SharedOptions)) == FIELDS.keys() - {"ratio", "ratios"}


@pytest.mark.parametrize("call", CALLS)
def test_a_name_that_is_no_field_is_refused_with_those_that_are(call: str) -> None:
    with pytest.raises(stp_fx.errors.InputError, match=r"has no argument 'round_too'.*round_to"):
        CALLS[call][0](None, round_too=4)
