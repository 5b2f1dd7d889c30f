"""Finished runs compared: statistics, tables, pictures and a page."""

LIBRARIES = ("matplotlib", "scipy")
"""What pictures and statistics need, beyond what an edge device has installed."""
