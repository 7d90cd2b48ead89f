"""Back to the original class: the smaller tensors in a copy of the module that was traced."""

from stp_fx.writeback.write_back import write_back

__all__ = ["write_back"]
