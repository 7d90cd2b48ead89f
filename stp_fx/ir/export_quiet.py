"""``torch.export`` without what it prints."""

from __future__ import annotations

import logging
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from stp_fx.ir._torch_compat import as_newest_exports
from stp_fx.ir.patches import LOCK

__all__ = ["quiet_export"]


_ASSIGNED = "The tensor attributes? .* assigned during export"


@contextmanager
def quiet_export() -> Iterator[list[str]]:
    """A block in which ``torch.export`` prints nothing: neither the graph of the failure, nor this thread's log records.

    The exception tells of the failure. The block gives a list. After the block, the list holds the attributes to which the
    forward assigned tensors: ``torch.export`` warns of these, and puts them back.
    """
    from torch.export import _trace

    thread = threading.get_ident()
    written: list[str] = []
    shown: list[warnings.WarningMessage] = []

    def passes(record: logging.LogRecord) -> bool:
        return record.levelno < logging.WARNING or record.thread != thread

    with LOCK, ExitStack() as undo:
        # of that module alone, where it prints the graph of what has failed; exports may be nested
        undo.callback(setattr, _trace, "print", getattr(_trace, "print", print))
        setattr(_trace, "print", lambda *_, **__: None)  # noqa: B010
        for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch")]:
            logging.getLogger(name).addFilter(passes)
            undo.callback(logging.getLogger(name).removeFilter, passes)
        undo.callback(lambda: _tell(shown, written))
        shown = undo.enter_context(warnings.catch_warnings(record=True))
        warnings.filterwarnings("always", message=_ASSIGNED)
        undo.enter_context(as_newest_exports())
        yield written


def _tell(caught: list[warnings.WarningMessage], written: list[str]) -> None:
    """Takes the names out of what ``torch.export`` says of assignments, and shows all other warnings."""
    for each in caught:
        text = str(each.message)
        if re.match(_ASSIGNED, text):
            written += re.findall(r"self\.([\w.]+)", text)
        else:
            warnings.showwarning(each.message, each.category, each.filename, each.lineno)
