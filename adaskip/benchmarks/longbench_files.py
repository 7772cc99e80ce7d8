"""Where LongBench's records come from: a folder of jsonl, a data.zip, or the Hub's pinned data.zip.

Lines are parsed one by one with `json`, not with `datasets`' JSON reader: that reader guesses column types even where
they are given, turns the text "2012-01-01" into "2012-01-01 00:00:00", fills a missing field with null, and cannot say
which line is broken. What was parsed and checked becomes a `datasets.Dataset` (`longbench.load_records`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from huggingface_hub import hf_hub_download

from adaskip.benchmarks.protocol import HUB, BenchmarkError, MissingDataError
from adaskip.common.configs import load_yaml


class LongBenchError(BenchmarkError):
    """A LongBench task, record or data source is invalid."""


@dataclass(frozen=True)
class JsonlFile:
    """One set of records: a jsonl file, or a jsonl member of a zip archive."""

    path: Path
    member: str | None = None

    def __str__(self) -> str:
        return f"{self.path}" if self.member is None else f"{self.path}!{self.member}"

    @property
    def set_name(self) -> str:
        """`trec`, or `trec_e` for LongBench-E's."""
        return Path(self.member or self.path).stem

    def records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (line number, JSON object) in file order; blank lines are skipped.

        Raises:
            LongBenchError: a line is not a JSON object in UTF-8, or the archive is damaged; file and line are named.
        """
        number = 0
        try:
            with self._open() as handle:
                for number, line in enumerate(handle, start=1):
                    if line.strip():
                        yield number, _parse_object(line, f"{self}:{number}")
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise LongBenchError(f"{self}: cannot be read after line {number} ({error})") from None

    def _open(self) -> IO[bytes]:
        return self.path.open("rb") if self.member is None else zipfile.ZipFile(self.path).open(self.member)


def _parse_object(line: bytes, place: str) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise LongBenchError(f"{place}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise LongBenchError(f"{place}: not valid JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(value, dict):
        raise LongBenchError(f"{place}: a record must be a JSON object, not {type(value).__name__}")
    return value


def list_sets(source: str | Path | None = None) -> dict[str, JsonlFile]:
    """The sets in a source, by name (`trec`, `trec_e`, ...).

    Args:
        source: a folder with `<set>.jsonl` files (also in its `data/` or its `data.zip`), a zip of them, `"hub"` to
            download the Hub's archive, or None for the one in the local Hub cache, without using the network.

    Raises:
        LongBenchError: there is no such source, it contains no jsonl file, or the Hub's archive is unavailable.
    """
    if source is None or source == HUB:
        return _sets_in_zip(hub_archive(download=source == HUB))
    path = Path(source)
    if path.is_dir():
        return _sets_in_folder(path)
    if path.is_file():
        return _sets_in_zip(path)
    raise LongBenchError(f"no LongBench data at {path}: give a folder of <task>.jsonl files, a data.zip, or {HUB!r}")


def _sets_in_folder(folder: Path) -> dict[str, JsonlFile]:
    for candidate in (folder, folder / "data"):
        found = {file.set_name: file for file in map(JsonlFile, sorted(candidate.glob("*.jsonl")))}
        if found:
            return found
    archive = folder / "data.zip"
    if archive.is_file():
        return _sets_in_zip(archive)
    raise LongBenchError(f"folder {folder} contains no <task>.jsonl files, no data/<task>.jsonl files and no data.zip")


def _sets_in_zip(path: Path) -> dict[str, JsonlFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [
                name for name in archive.namelist() if name.endswith(".jsonl") and not name.startswith("__MACOSX")
            ]
    except (zipfile.BadZipFile, OSError) as error:
        raise LongBenchError(f"{path} is neither a folder nor a readable zip archive ({error})") from None
    if not members:
        raise LongBenchError(f"archive {path} contains no .jsonl files")
    return {file.set_name: file for file in (JsonlFile(path, member) for member in members)}


@cache
def hub_archive(download: bool = False) -> Path:
    """The Hub's data.zip at the pinned revision in the local Hub cache, checked against its sha256.

    Args:
        download: download it if it is missing.
    """
    pin = load_yaml("longbench")["hub"]
    try:
        with _quiet_hub():
            options = {"repo_type": "dataset", "revision": pin["revision"], "local_files_only": not download}
            path = Path(hf_hub_download(pin["repo"], pin["file"], **options))
    except Exception as error:  # the Hub's client passes on errors of the HTTP library it happens to use
        if not download:
            raise MissingDataError(
                f"{pin['file']} of {pin['repo']} at {pin['revision'][:7]} is not in the local Hub cache; "
                f"give {HUB!r} to download it, or a local data.zip or folder of <task>.jsonl files; "
                "--data-dir takes any of these, --testbed the embedded models and tasks"
            ) from None
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise LongBenchError(
            f"cannot get {pin['file']} of {pin['repo']} at {pin['revision'][:7]} from the Hub ({reason}). "
            f"Without a network, pass a local data.zip or a folder of <task>.jsonl files instead"
        ) from None
    check_sha256(path, pin["sha256"])
    return path


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Silence the Hub client's warning per retry: if all fail, our error says so."""
    hub_logger = logging.getLogger("huggingface_hub")
    level = hub_logger.level
    hub_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hub_logger.setLevel(level)


def check_sha256(path: Path, expected: str) -> None:
    """Raise LongBenchError unless the file's sha256 is `expected`."""
    with path.open("rb") as handle:
        actual = hashlib.file_digest(handle, "sha256").hexdigest()
    if actual != expected:
        raise LongBenchError(f"{path} has sha256 {actual}, expected {expected}: delete it and download it again")
