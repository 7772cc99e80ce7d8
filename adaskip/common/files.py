"""Atomic file writes: a reader sees the old file or the new one, never a part, even after a power failure."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path

TEMPORARY = ".tmp"
"""Suffix of temporary files and folders while they are being written."""
RANDOM_PART = "[a-z0-9_]{8}"
"""What `tempfile` puts between prefix and suffix."""


def write_bytes_atomic(path: str | Path, data: bytes) -> Path:
    """Write `data` to `path` through a temporary file in the same folder and an atomic rename.

    On return the new file is on disk, so that its inputs may be deleted. An error leaves no file and no new folder; an
    OSError names `path`.
    """
    path = Path(path)
    missing = [folder for folder in path.parents if not folder.exists()]
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        for folder in missing:
            with suppress(OSError):  # not empty: another process uses it
                folder.rmdir()
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise
    sync_folder(path.parent)
    return path


def write_text_atomic(path: str | Path, text: str) -> Path:
    """Write `text` to `path` as UTF-8, atomically."""
    return write_bytes_atomic(path, text.encode("utf-8"))


def remove_torn(path: str | Path) -> None:
    """Delete temporary files that killed writers of `path` left behind; call it only as the single writer of `path`."""
    path = Path(path)
    for temporary in left_behind(path.parent, f".{path.name}."):
        temporary.unlink(missing_ok=True)


def left_behind(folder: Path, prefix: str) -> list[Path]:
    """The temporary files and folders of exactly this prefix, and not those of a longer name, as `out.v2` for `out`."""
    name = re.compile(re.escape(prefix) + RANDOM_PART + re.escape(TEMPORARY))
    return [path for path in folder.iterdir() if name.fullmatch(path.name)] if folder.is_dir() else []


def sync_folder(folder: Path) -> None:
    """Flush renames in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # the file system cannot sync folders
            raise
    finally:
        os.close(descriptor)


def check_writable(path: Path) -> None:
    """Raise ValueError unless a file can be written at `path`; creates its folder."""
    if path.is_dir() or not path.name:
        raise ValueError(f"{path} is a folder; give the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from None
