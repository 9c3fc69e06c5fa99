"""Grids, observers, weight quantizers and packing."""
