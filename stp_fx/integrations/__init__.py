"""PATPassManager inside other libraries' training loops: ``lightning``, ``transformers``, ``accelerate``.

Each is a module of its own that needs the library of its name (``pip install "stp-fx[lightning]"``); nothing is imported
here.
"""

__all__: list[str] = []
