"""A lock file that dies with its process, so that a killed run never leaves a folder locked."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


class LockedError(ValueError):
    """Another living process holds the lock."""


@contextmanager
def exclusive(path: str | Path, *, wait: bool = False, of: str | Path | None = None) -> Iterator[None]:
    """Hold the lock file `path`; it is made when missing, with its folder, and removed on release, with the
    folders made for it that are still empty.

    Args:
        wait: wait for the holder to let go instead of raising.
        of: what the lock is of, in the error's words; None for the folder that it lies in.

    Raises:
        LockedError: another process holds it; one line naming that process and its host.
    """
    made = [folder for folder in Path(path).parents if not folder.exists()]
    handle = _acquire(Path(path), wait, of)
    try:
        handle.truncate(0)
        handle.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        handle.flush()
        yield
    finally:
        Path(path).unlink(missing_ok=True)
        handle.close()
        with suppress(OSError):  # something was put there
            for folder in made:
                folder.rmdir()


def _acquire(path: Path, wait: bool, of: str | Path | None) -> IO[str]:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = path.open("a+", encoding="utf-8")
        except FileNotFoundError:  # the last holder removed the empty folder
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            handle.seek(0)
            holder = _describe(handle.read())
            handle.close()
            raise LockedError(f"{of or path.parent} is in use by {holder}; wait for it to end or stop it") from None
        if _is_current(handle, path):
            return handle
        handle.close()  # the last holder removed the file while we waited for it


def _is_current(handle: IO[str], path: Path) -> bool:
    try:
        return os.fstat(handle.fileno()).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def _describe(content: str) -> str:
    try:
        holder = json.loads(content)
        return f"process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError):  # the holder has the lock and has not yet written its name
        return "another process"
