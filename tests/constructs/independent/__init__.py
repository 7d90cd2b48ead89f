"""Constructs as real code has them, and an oracle that shares no code with the library."""
