"""Measurements on a graph: statistics and gradients over calibration data, seconds."""
