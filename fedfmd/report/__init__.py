"""Finished runs compared: statistics, tables, pictures and a page."""
