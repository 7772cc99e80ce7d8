"""Checks a name against a list of allowed names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def check_choice(what: str, given: str, allowed: Iterable[str]) -> str:
    """Return `given` if it is in `allowed`; else raise a ValueError that suggests the nearest name and lists all."""
    allowed = tuple(allowed)
    if given in allowed:
        return given
    close = difflib.get_close_matches(str(given).lower(), allowed, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"unknown {what} {given!r}.{hint} Allowed: {', '.join(allowed)}")
