"""Finds files by name: a path, a file published with this package, or a repository on the Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from adaskip.common.files import write_text_atomic
from adaskip.common.paths import PACKAGE

PUBLISHED = PACKAGE / "profiles" / "published"
"""Profiles, selections and plans that are part of the package: `<name>.json`."""
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def published() -> dict[str, Path]:
    """The published files by name."""
    return dict(sorted((path.stem, path) for path in PUBLISHED.glob("*.json")))


def find_file(given: str | Path, file_name: str, *, revision: str | None = None) -> Path:
    """The file that `given` names: a file, a folder with `file_name`, a published name, or `org/name` on the Hub.

    A repository is downloaded unless HF_HUB_OFFLINE is set; without a connection, an earlier download is used.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a folder without `file_name`, or a repository that cannot be read.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        if not (path / file_name).is_file():
            raise ValueError(f"{path} has no {file_name}")
        return path / file_name
    if path.exists():
        return path
    if (named := published().get(str(given))) is not None:
        return named
    if REPOSITORY.fullmatch(str(given)) and path.suffix != ".json":
        with _hub_errors(str(given), file_name):
            return Path(hf_hub_download(str(given), file_name, revision=revision))
    close = get_close_matches(str(given), published(), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    names = ", ".join(published()) or "none"
    raise FileNotFoundError(
        f"{given} is not a file, a folder with {file_name}, org/name on the Hub or a published name{hint} "
        f"(published: {names})"
    )


def download_folder(repo: str) -> Path:
    """Download all files of a repository on the Hub; raises ValueError like `find_file`."""
    if not REPOSITORY.fullmatch(repo):
        raise ValueError(f"{repo!r} is neither a folder here nor org/name on the Hub")
    with _hub_errors(repo, "any file"):
        return Path(snapshot_download(repo))


@contextmanager
def _hub_errors(repo: str, wanted: str) -> Iterator[None]:
    """Turn exceptions of the Hub client into a ValueError."""
    try:
        yield
    except GatedRepoError:
        raise ValueError(f"{repo} is gated: accept its licence at its page and run `hf auth login`") from None
    except (RepositoryNotFoundError, EntryNotFoundError) as error:
        what = "no such repository" if isinstance(error, RepositoryNotFoundError) else f"it has no {wanted}"
        raise ValueError(f"{repo!r} is neither a file or folder here nor usable from the Hub: {what}") from None
    except Exception as error:  # the Hub client passes on errors of its HTTP library
        told = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{repo!r} is neither a file or folder here nor available from the Hub: {told}") from error


def write_files(folder: str | Path, files: Mapping[str, str]) -> Path:
    """Write `files` (text by file name) to a folder, each atomically; creates the folder and returns it."""
    for name, text in files.items():
        write_text_atomic(Path(folder) / name, text)
    return Path(folder)


def pushed_file(repo_id: str, file_name: str, *, token: str | None = None, revision: str | None = None) -> Path | None:
    """A file of a repository on the Hub, downloaded; None where there is no such repository, revision or file."""
    try:
        return Path(hf_hub_download(repo_id, file_name, token=token, revision=revision))
    except (LocalEntryNotFoundError, GatedRepoError) as error:
        told = " ".join(str(error).split())[:300]
        raise ValueError(f"{file_name} of {repo_id!r} cannot be read from the Hub: {told}") from error
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        return None


def push_files(
    repo_id: str,
    files: Mapping[str, str],
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload with adaskip",
) -> str:
    """Commit `files` (text by file name) to a model repository on the Hub, created if missing; returns the URL."""
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    operations = [CommitOperationAdd(name, text.encode("utf-8")) for name, text in files.items()]
    commit = api.create_commit(repo_id, operations, commit_message=commit_message, revision=revision)
    return commit.commit_url


def read_record(
    path: str | Path, expected_format: str, what: str, error: type[ValueError] = ValueError
) -> dict[str, Any]:
    """The fields of a JSON file, without the field `format`.

    Raises FileNotFoundError if there is no file, and `error` if its format is not `expected_format`. what: the name of
    that format in the error.
    """
    record = _read_json(path, error)
    found = record.pop("format", None) if isinstance(record, dict) else type(record).__name__
    if found != expected_format:
        raise error(f"{path} is not {what}: format is {found!r}, expected {expected_format!r}")
    return record


def read_format(path: str | Path) -> str | None:
    """The field `format` of a JSON file, None if it has none. Raises ValueError if the file is not JSON."""
    record = _read_json(path, ValueError)
    return record.get("format") if isinstance(record, dict) else None


def _read_json(path: str | Path, error: type[ValueError]) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as wrong:  # including numbers with more digits than Python parses
        raise error(f"{path} is not JSON: {wrong}") from wrong
