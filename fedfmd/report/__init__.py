"""Finished runs compared: statistics, tables, pictures and pages."""

LIBRARIES = ("bokeh", "matplotlib", "scipy")
"""What pictures and statistics need, beyond what an edge device has installed."""
