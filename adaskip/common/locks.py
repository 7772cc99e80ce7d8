"""A lock file that the system releases when its process ends, so that a killed run never leaves a folder locked."""

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
    """Hold the lock file `path` inside the context.

    The file and its folders are created if missing; on release, the file and those folders, if empty, are removed.

    Args:
        wait: wait for the holder to release the lock instead of raising.
        of: name of the locked resource in the error; None for the folder of the lock file.

    Raises:
        LockedError: another process holds the lock; names that process and its host.
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
        with suppress(OSError):  # the folder is not empty
            for folder in made:
                folder.rmdir()


def _acquire(path: Path, wait: bool, of: str | Path | None) -> IO[str]:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = path.open("a+", encoding="utf-8")
        except FileNotFoundError:  # the previous holder removed the empty folder
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            handle.seek(0)
            holder = _describe(handle.read())
            handle.close()
            raise LockedError(f"{of or path.parent} is in use by {holder}; wait until it ends, or stop it") from None
        if _is_current(handle, path):
            return handle
        handle.close()  # the previous holder removed the file while we waited for it


def _is_current(handle: IO[str], path: Path) -> bool:
    try:
        return os.fstat(handle.fileno()).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def _describe(content: str) -> str:
    try:
        holder = json.loads(content)
        return f"process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError):  # the holder has not written its name yet
        return "another process"
