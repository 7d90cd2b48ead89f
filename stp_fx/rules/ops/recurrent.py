"""Recurrent modules stay calls: on meta tensors they come down to products, splits and pointwise ops, step by step.

They cut their own values into gates and start from zeros of their own, all renewed with their hidden size.
"""

from __future__ import annotations

from torch import nn

from stp_fx.rules.edit import Edit
from stp_fx.rules.literals import Policy, modules, reach

__all__: list[str] = []


def _layers(edit: Edit) -> None:
    """All layers and directions share one hidden size; the gates are blocks of it, which a unit leaves together."""
    module, states = edit.module, edit.result[1]
    module.input_size = edit.size(edit.source[-1])
    if isinstance(module, nn.LSTM):
        hidden, cell = states
        module.hidden_size = edit.size(cell.dims[-1])
        module.proj_size = edit.size(hidden.dims[-1]) if module.proj_size else 0
    else:
        module.hidden_size = edit.size(states.dims[-1])


def _cell(edit: Edit) -> None:
    edit.module.input_size = edit.size(edit.source[-1])
    result = edit.result[0] if isinstance(edit.result, list) else edit.result
    edit.module.hidden_size = edit.size(result.dims[-1])


reach(modules(_layers, nn.LSTM, nn.GRU, nn.RNN, policy=Policy.EDITABLE), __name__)
reach(modules(_cell, nn.LSTMCell, nn.GRUCell, nn.RNNCell, policy=Policy.EDITABLE), __name__)
