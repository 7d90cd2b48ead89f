"""``torch.export`` without what it prints."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from stp_fx.ir.patches import LOCK

__all__ = ["quiet_export"]


@contextmanager
def quiet_export() -> Iterator[None]:
    """A block in which ``torch.export`` prints nothing: neither the graph of what has failed, nor this thread's log records.

    What has failed is told by the exception.
    """
    from torch.export import _trace

    thread = threading.get_ident()

    def passes(record: logging.LogRecord) -> bool:
        return record.levelno < logging.WARNING or record.thread != thread

    with LOCK, ExitStack() as undo:
        # of that module alone, where it prints the graph of what has failed; exports may be nested
        undo.callback(setattr, _trace, "print", getattr(_trace, "print", print))
        setattr(_trace, "print", lambda *_, **__: None)  # noqa: B010
        for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch")]:
            logging.getLogger(name).addFilter(passes)
            undo.callback(logging.getLogger(name).removeFilter, passes)
        undo.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="The tensor attributes? .* assigned during export")
        yield
