"""Keeping a pruned network: one safetensors file that holds its tensors and the plan, and runs no code when it is read.

The file holds no architecture. Its tensors are named as in the network's ``state_dict`` and any program that reads safetensors
can read them; :func:`load` builds the shortened network around them from the original one.
"""

from stp_fx.io.loading import load
from stp_fx.io.saving import save
from stp_fx.io.shard_plans import plan_shards
from stp_fx.io.shards import prune_shards

__all__ = ["load", "plan_shards", "prune_shards", "save"]
