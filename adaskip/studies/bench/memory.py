"""Keeps freed memory: getting it back from the operating system takes a varying part of a prompt's time."""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
"""Parameters of glibc's `mallopt`."""
_MOST = 2**31 - 1


def keep_freed_memory() -> bool:
    """From now on glibc serves all threads from one heap, also large tensors, and returns up to 2 GiB of it to nobody.

    Otherwise large tensors are mapped and unmapped again and again, and their pages are zeroed at the first touch.
    Returns whether it does so; False without glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc, settings = ctypes.CDLL(None), {_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: _MOST}
    return all(libc.mallopt(parameter, value) == 1 for parameter, value in settings.items())
