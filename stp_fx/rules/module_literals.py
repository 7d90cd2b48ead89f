"""Attributes of modules that state their sizes, renewed from the factors of what goes in and comes out."""

from __future__ import annotations

from torch import nn

from stp_fx.rules.literals import Edit, module_literal
from stp_fx.rules.size_literals import living_groups

__all__: list[str] = []


@module_literal(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def _conv(edit: Edit) -> None:
    module = edit.module
    rank = len(module.kernel_size) + 1  # channels come before the spatial dimensions, batched or not
    source = edit.source[-rank]
    if module.groups > 1:
        module.groups = living_groups(edit, source, module.groups)
    module.in_channels = edit.size(source)
    module.out_channels = edit.size(edit.result_dims()[-rank])


@module_literal(nn.Linear)
def _linear(edit: Edit) -> None:
    edit.module.in_features = edit.size(edit.source[-1])
    edit.module.out_features = edit.size(edit.result_dims()[-1])


@module_literal(nn.Bilinear)
def _bilinear(edit: Edit) -> None:
    edit.module.in1_features = edit.size(edit.operands[0].dims[-1])
    edit.module.in2_features = edit.size(edit.operands[1].dims[-1])
    edit.module.out_features = edit.size(edit.result_dims()[-1])


@module_literal(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
def _batch_norm(edit: Edit) -> None:
    edit.module.num_features = edit.size(edit.result_dims()[1])


@module_literal(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def _instance_norm(edit: Edit) -> None:
    rank = {"1": 2, "2": 3, "3": 4}[type(edit.module).__name__[-2]]
    edit.module.num_features = edit.size(edit.result_dims()[-rank])


@module_literal(nn.LayerNorm, nn.RMSNorm)
def _layer_norm(edit: Edit) -> None:
    rank = len(edit.module.normalized_shape)
    edit.module.normalized_shape = tuple(edit.size(dim) for dim in edit.result_dims()[-rank:])


@module_literal(nn.GroupNorm)
def _group_norm(edit: Edit) -> None:
    edit.module.num_groups = living_groups(edit, edit.source[1], edit.module.num_groups)
    edit.module.num_channels = edit.size(edit.source[1])


@module_literal(nn.PReLU)
def _prelu(edit: Edit) -> None:
    if edit.module.num_parameters > 1:
        edit.module.num_parameters = edit.size(edit.source[1])


@module_literal(nn.Embedding, nn.EmbeddingBag)
def _embedding(edit: Edit) -> None:
    edit.module.embedding_dim = edit.size(edit.result_dims()[-1])


@module_literal(nn.ChannelShuffle)
def _channel_shuffle(edit: Edit) -> None:
    edit.module.groups = living_groups(edit, edit.source[1], edit.module.groups)


@module_literal(nn.LSTM, nn.GRU, nn.RNN)
def _recurrent(edit: Edit) -> None:
    """All layers and directions share one hidden size; the gates are blocks of it, which a unit leaves together."""
    module, states = edit.module, edit.result[1]
    module.input_size = edit.size(edit.source[-1])
    if isinstance(module, nn.LSTM):
        hidden, cell = states
        module.hidden_size = edit.size(cell.dims[-1])
        module.proj_size = edit.size(hidden.dims[-1]) if module.proj_size else 0
    else:
        module.hidden_size = edit.size(states.dims[-1])


@module_literal(nn.LSTMCell, nn.GRUCell, nn.RNNCell)
def _recurrent_cell(edit: Edit) -> None:
    edit.module.input_size = edit.size(edit.source[-1])
    result = edit.result[0] if isinstance(edit.result, list) else edit.result
    edit.module.hidden_size = edit.size(result.dims[-1])
