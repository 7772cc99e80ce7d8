"""A run's folder: a manifest and one JSONL file per task, held by one process, safe against SIGKILL at any moment.

A record is complete once its line ends in a newline. Batches are the unit of work: after a kill, a torn line and an
unfinished batch are cut off, so that the same batches are made again and the result equals an uninterrupted run's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from adaskip.files import write_bytes_atomic, write_text_atomic
from adaskip.locks import exclusive

MANIFEST = "manifest.json"
JOURNAL = ("started", "finished", "resumed")
"""Manifest fields that tell when, not what."""
ENVIRONMENT = ("git_commit", "device_name", "threads", "profile", "checkpoint")
"""Manifest fields that may differ when a run is continued: they name places, not what is computed."""


class FolderError(ValueError):
    """The folder holds another run than the one asked for, or files that are no records."""


class RunFolder:
    """`<output_dir>/<run name>/<N>-sublayers/`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def lock(self) -> AbstractContextManager[None]:
        """Hold the folder; a second process is refused with a `LockedError`."""
        return exclusive(self.path / ".lock")

    def read_manifest(self) -> dict[str, Any] | None:
        try:
            manifest = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise FolderError(
                f"{self.path / MANIFEST} is not JSON ({error}); delete {self.path} to start again"
            ) from None
        if not isinstance(manifest, dict):
            raise FolderError(f"{self.path / MANIFEST} is not a manifest; delete {self.path} to start again")
        return manifest

    def check(self, wanted: Mapping[str, Any]) -> None:
        """Refuse to mix runs: every field of `wanted` must equal the manifest's, if there is one.

        A finished run may have been made with other versions; an unfinished one must be continued with its own.
        """
        held = self.read_manifest()
        if held is None:
            return
        free = {*JOURNAL, *ENVIRONMENT} | ({"versions"} if held.get("finished") else set())
        differing = [name for name in wanted if name not in free and held.get(name) != wanted[name]]
        if differing:
            changes = "; ".join(f"{name} was {_short(held.get(name))}, is {_short(wanted[name])}" for name in differing)
            raise FolderError(
                f"{self.path} holds a run with another configuration ({changes}): "
                "choose another --output-dir, or delete that folder"
            )

    def start(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest, or note in the one already there that its run is continued."""
        self.check(manifest)
        held = self.read_manifest()
        if held is None:
            self._write_manifest({**manifest, "started": _now(), "finished": None, "resumed": []})
        elif not held["finished"]:
            resumed = {"at": _now(), "git_commit": manifest.get("git_commit")}
            self._write_manifest({**held, "resumed": [*held["resumed"], resumed]})

    def finish(self) -> None:
        """Mark the run finished, once."""
        manifest = self.read_manifest()
        assert manifest is not None, "start() comes before finish()"
        if not manifest["finished"]:
            self._write_manifest({**manifest, "finished": _now()})

    def records_path(self, task: str) -> Path:
        return self.path / f"{task}.jsonl"

    def recover(self, task: str, ids: Sequence[str], batch_size: int) -> int:
        """Cut off what a killed process left half done and return how many of the samples `ids` are done.

        Raises:
            FolderError: a whole line is no record, or not the record of the sample in its place.
        """
        path = self.records_path(task)
        content = path.read_bytes() if path.exists() else b""
        lines = content.split(b"\n")[:-1]  # what follows the last newline is torn, or nothing
        for index, line in enumerate(lines):
            _check_line(path, index, line, ids)
        done = len(lines) if len(lines) == len(ids) else len(lines) // batch_size * batch_size
        kept = b"".join(line + b"\n" for line in lines[:done])
        if kept != content:
            write_bytes_atomic(path, kept)
        return done

    def append(self, task: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Add one batch's records and return only when they are on disk."""
        content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        with self.records_path(task).open("ab") as handle:
            handle.write(content.encode("utf-8"))
            handle.flush()
            os.fsync(handle.fileno())

    def _write_manifest(self, manifest: Mapping[str, Any]) -> None:
        write_text_atomic(self.path / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def _check_line(path: Path, index: int, line: bytes, ids: Sequence[str]) -> None:
    try:
        record = json.loads(line)
        found = record["id"]
    except (ValueError, KeyError, TypeError):
        raise FolderError(f"line {index + 1} of {path} is no record; delete {path.parent} to start again") from None
    if index >= len(ids) or found != ids[index]:
        expected = repr(ids[index]) if index < len(ids) else f"the end after {len(ids)} records"
        raise FolderError(
            f"line {index + 1} of {path} is sample {found!r}, expected {expected}; delete {path.parent} to start again"
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
