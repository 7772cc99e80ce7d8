"""Errors that several packages raise or catch."""

from __future__ import annotations


class RunError(RuntimeError):
    """A run stopped half-way; its results so far are kept, and running the same command again continues it."""
