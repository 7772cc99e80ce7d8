"""Folders that appear with all of their files or not at all, and single files too large to be written at once."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adaskip.common.files import TEMPORARY, check_writable, left_behind, sync_folder
from adaskip.common.locks import exclusive


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """A temporary folder beside `output`, to be filled, that takes its name at the end; after an error it is deleted.

    What a killed process left of an earlier attempt at `output` is deleted first.

    Raises:
        ValueError: `output` exists and is not an empty folder, cannot be made, or is being written by another process.
    """
    output = Path(output).resolve()
    check_new(output)
    with scratch_folder(output) as folder:
        yield folder
        folder.chmod(0o755)
        for path in folder.rglob("*"):
            _finish(path)
        os.replace(folder, output)
    sync_folder(output.parent)


@contextmanager
def scratch_folder(output: Path, purpose: str = "") -> Iterator[Path]:
    """A temporary folder beside `output`, for one process at a time, that is deleted at the end.

    What a killed process left of one for the same purpose is deleted first.
    """
    prefix = f".{output.name}{purpose}."
    output.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(output.parent / f"{prefix}lock", of=output):
        for torn in left_behind(output.parent, prefix):
            shutil.rmtree(torn)
        folder = Path(tempfile.mkdtemp(dir=output.parent, prefix=prefix, suffix=TEMPORARY))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def new_file(output: str | Path) -> Iterator[Path]:
    """The path of a file to be written in a temporary folder beside `output`; at the end it takes that name.

    Raises ValueError as `check_new_file`, or where another process is writing `output`.
    """
    output = Path(os.path.abspath(output))
    check_new_file(output)
    with scratch_folder(output) as folder:
        file = folder / output.name
        yield file
        _finish(file)
        os.replace(file, output)
    sync_folder(output.parent)


def check_new_file(output: Path) -> None:
    """Raise ValueError unless nothing is at `output` and a file can be written there."""
    if output.exists():
        raise ValueError(f"{output} exists; give the name of a new file or delete it first")
    check_writable(output)


def check_new(output: Path) -> None:
    """Raise ValueError unless a folder can be made at `output`: nothing is there, or an empty folder."""
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty; give a new folder or delete it first")
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; give the name of a new folder")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise ValueError(f"{output} cannot be written: {error.strerror or error}") from None


def _finish(path: Path) -> None:
    """Bring a file or folder to disk; every user may read a file, as usual."""
    if path.is_dir():
        sync_folder(path)
        return
    path.chmod(0o644)
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
