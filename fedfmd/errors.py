"""Errors that a user can mend; their text is one line that names the cause and the fix."""

from __future__ import annotations


class FedfmdError(Exception):
    """Base of the errors below: shown without a traceback."""


class SettingsError(FedfmdError, ValueError):
    """A setting that can't be used; nothing was started. Names the key, the value and what is allowed."""


class RunError(FedfmdError, RuntimeError):
    """A run that can't go on; its finished rounds are kept."""
