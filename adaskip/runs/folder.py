"""The folder of a run: a manifest and the records of each task, locked by one run, safe against SIGKILL at any time.

Every process of a run appends to its own part files, `parts/<task>.<rank>-<host>-<pid>.jsonl`. They are merged at the
start and at the end of a run: `<task>.jsonl` has the records in the order of the samples, and `times/<task>.jsonl` has
their timings. So the records of equal runs are byte-identical, however many processes made them.

A record is complete if its line ends in a newline. Batches are the unit of work: after a kill, truncated lines and
incomplete batches are dropped and the same batches run again, so the result equals that of an uninterrupted run.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from adaskip.common.files import remove_torn, write_bytes_atomic, write_text_atomic
from adaskip.common.locks import exclusive
from adaskip.models.companion_files import FIELDS

MANIFEST = "manifest.json"
JOURNAL = ("started", "finished", "resumed")
"""Manifest fields with times, which do not describe what was run."""
ENVIRONMENT = ("git_commit", "device_name", "threads", "processes", "profile", "checkpoint", "weight_files")
"""Manifest fields that may differ when a run is continued: they describe where it runs, not what it computes."""
RESUMED = ("git_commit", "device_name", "threads", "processes")
"""Those that are recorded when a run is continued."""
OPTIONAL = frozenset({"benchmark", *FIELDS})
"""Manifest fields that older runs may lack."""
TIMES = ("ttft_s", "tpot_ms")
"""Record fields that differ from run to run."""


class FolderError(ValueError):
    """The folder contains a run with another configuration, or files that are not records."""


class RunFolder:
    """`<output_dir>/<run name>/<N>-sublayers/`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def lock(self) -> AbstractContextManager[None]:
        """A context that locks the folder; raises `LockedError` if another process has locked it."""
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

    def check(self, wanted: Mapping[str, Any], *, continues: bool = False) -> None:
        """Refuse to mix runs: every field of `wanted` must equal the manifest's, if there is one.

        A finished run may have been made with other versions; a run that continues must do so with its own.
        """
        held = self.read_manifest()
        if held is None:
            return
        free = {*JOURNAL, *ENVIRONMENT, *(OPTIONAL - held.keys())} | (
            {"versions"} if held.get("finished") and not continues else set()
        )
        if changes := _changes(held, wanted, free):
            raise FolderError(
                f"{self.path} holds a run with another configuration ({changes}): "
                "choose another --output-dir, or delete that folder"
            )

    def start(self, manifest: Mapping[str, Any], size: Mapping[str, Any] | None = None) -> None:
        """Write the manifest, or record in the existing one that the run is continued.

        size: the fields that change if the run continues with more samples; None if it does not. A finished run that
        starts again lacks records.
        """
        self.check(manifest, continues=True)
        remove_torn(self.path / MANIFEST)
        held = self.read_manifest()
        if held is None:
            self._write_manifest({**manifest, **(size or {}), "started": _now(), "finished": None, "resumed": []})
        else:
            resumed = {"at": _now(), **{name: manifest.get(name) for name in RESUMED}}
            changed = {**(size or {}), "finished": None, "resumed": [*held["resumed"], resumed]}
            self._write_manifest({**held, **changed})

    def finish(self) -> None:
        """Mark the run as finished, if it is not yet."""
        manifest = self.read_manifest()
        assert manifest is not None, "start() comes before finish()"
        if not manifest["finished"]:
            self._write_manifest({**manifest, "finished": _now()})

    def records_path(self, task: str) -> Path:
        return self.path / f"{task}.jsonl"

    def times_path(self, task: str) -> Path:
        return self.path / "times" / f"{task}.jsonl"

    def part_paths(self, task: str) -> list[Path]:
        """The part files of a task that are not merged yet; their records include the timings."""
        return sorted(self.path.glob(f"parts/{task}.*.jsonl"))

    def append(self, task: str, records: Sequence[Mapping[str, Any]], rank: int = 0) -> None:
        """Append the records of one batch to this process's part file; returns when they are on disk."""
        path = self.path / "parts" / f"{task}.{rank}-{socket.gethostname()}-{os.getpid()}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as handle:
            handle.write(_as_lines(records))
            handle.flush()
            os.fsync(handle.fileno())

    def merge(self, task: str, ids: Sequence[str], batch_size: int) -> list[int]:
        """Merge the complete batches of all processes; returns the index of the first sample of each missing batch.

        Part files are removed only after the merged files are written.

        Args:
            ids: ids of the task's samples in the order of the data.

        Raises:
            FolderError: a complete line is not a record, or not the record of one of these samples.
        """
        for path in (self.records_path(task), self.times_path(task)):
            remove_torn(path)
        parts = self.part_paths(task)
        place = {name: index for index, name in enumerate(ids)}
        if len(place) < len(ids):
            raise FolderError(f"the {len(ids)} samples of {task} have only {len(place)} different ids")
        times = {line["id"]: line for line in _read_lines(self.times_path(task), place)}
        found: dict[int, dict[str, Any]] = {}
        for path in (self.records_path(task), *parts):
            for record in _read_lines(path, place):
                found.setdefault(place[record["id"]], {**times.get(record["id"], {}), **record})
        missing = _missing_batches(found, len(ids), batch_size)
        whole = [found[index] for index in sorted(found) if index - index % batch_size not in missing]
        taken = [{name: record[name] for name in ("id", *TIMES)} for record in whole if TIMES[0] in record]
        _write_if_changed(self.times_path(task), _as_lines(taken))
        stripped = ({name: value for name, value in record.items() if name not in TIMES} for record in whole)
        _write_if_changed(self.records_path(task), _as_lines(stripped))
        for path in parts:
            path.unlink()
        if parts and not any(parts[0].parent.iterdir()):
            parts[0].parent.rmdir()
        return sorted(missing)

    def _write_manifest(self, manifest: Mapping[str, Any]) -> None:
        write_text_atomic(self.path / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def check_alike(manifests: Sequence[Mapping[str, Any]]) -> None:
    """Refuse processes with different manifests. manifests: by rank, the main process first."""
    for rank, manifest in enumerate(manifests):
        if changes := _changes(manifests[0], manifest, ENVIRONMENT):
            raise FolderError(f"process {rank} of this launch differs from the main one ({changes})")


def _changes(held: Mapping[str, Any], wanted: Mapping[str, Any], free: Iterable[str]) -> str:
    """A description of the fields of `wanted`, except `free`, that differ from `held`; empty if none do."""
    differing = [name for name in wanted if name not in free and held.get(name) != wanted[name]]
    return "; ".join(f"{name} was {_short(held.get(name))}, is {_short(wanted[name])}" for name in differing)


def _missing_batches(found: Iterable[int], num_samples: int, batch_size: int) -> set[int]:
    return {index - index % batch_size for index in set(range(num_samples)) - set(found)}


def _read_lines(path: Path, place: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """Yield the records of the complete lines of a file; text after the last newline is a truncated line."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            known = record["id"] in place
        except (ValueError, KeyError, TypeError):
            raise FolderError(f"line {number} of {path} is not a record; delete that file to make it again") from None
        if not known:
            raise FolderError(
                f"line {number} of {path} is of sample {record['id']!r}, which the data does not contain; "
                "delete that file to make it again"
            )
        yield record


def _as_lines(records: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode("utf-8")


def _write_if_changed(path: Path, content: bytes) -> None:
    if content != (path.read_bytes() if path.exists() else b""):
        write_bytes_atomic(path, content)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
