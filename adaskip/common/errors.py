"""Errors that several packages raise or catch."""

from __future__ import annotations


class RunError(RuntimeError):
    """A run stopped half-way; what it has made is kept, and the same command continues it."""
