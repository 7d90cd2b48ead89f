"""Measurements: calibration data run through a graph, and what was read of it (statistics, gradients, seconds)."""
