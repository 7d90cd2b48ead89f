"""Rewrites: how masks, removed channels and compensation change the tensors and the calls of a graph."""
