"""The error of exports."""

from __future__ import annotations


class ExportError(ValueError):
    """A plan, a checkpoint or a target cannot be exported; the message is one line that says what is allowed."""
