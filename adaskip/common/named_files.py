"""Files that go by a name: a path, one of those published with this package, or a repository on the Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

from adaskip.common.files import write_text_atomic
from adaskip.common.paths import PACKAGE

PUBLISHED = PACKAGE / "profiles" / "published"
"""Profiles, selections and plans that come with the package: `<name>.json`."""
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def published() -> dict[str, Path]:
    """The published files by name."""
    return dict(sorted((path.stem, path) for path in PUBLISHED.glob("*.json")))


def find_file(given: str | Path, file_name: str, *, revision: str | None = None) -> Path:
    """The file that `given` names: a file, a folder that holds `file_name`, a published name, or `org/name` on the Hub.

    A repository is asked for on the network unless HF_HUB_OFFLINE is set; where it cannot be reached, a file that was
    downloaded before is taken.

    Raises:
        FileNotFoundError: there is none of that name.
        ValueError: a folder without `file_name`, or a repository that cannot be read; one line.
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
        f"{given} is no file, no folder with {file_name}, no org/name on the Hub and no published name{hint} "
        f"(published: {names})"
    )


def download_folder(repo: str) -> Path:
    """All files of a repository of the Hub. Raises ValueError, in one line, as `find_file` does."""
    if not REPOSITORY.fullmatch(repo):
        raise ValueError(f"{repo!r} is neither a folder here nor org/name on the Hub")
    with _hub_errors(repo, "any file"):
        return Path(snapshot_download(repo))


@contextmanager
def _hub_errors(repo: str, wanted: str) -> Iterator[None]:
    """Turn what the Hub's client raises into a ValueError of one line."""
    try:
        yield
    except GatedRepoError:
        raise ValueError(f"{repo} is gated: accept its licence at its page and run `hf auth login`") from None
    except (RepositoryNotFoundError, EntryNotFoundError) as error:
        what = "no such repository" if isinstance(error, RepositoryNotFoundError) else f"it has no {wanted}"
        raise ValueError(f"{repo!r} is neither a file or folder here nor usable from the Hub: {what}") from None
    except Exception as error:  # the client passes on errors of the HTTP library it happens to use
        told = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{repo!r} is neither a file or folder here nor to be had from the Hub: {told}") from error


def write_files(folder: str | Path, files: Mapping[str, str]) -> Path:
    """Write texts by file name into a folder, each whole or not at all; the folder is made. Returns it."""
    for name, text in files.items():
        write_text_atomic(Path(folder) / name, text)
    return Path(folder)


def push_files(
    repo_id: str,
    files: Mapping[str, str],
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload with adaskip",
) -> str:
    """Commit texts by file name to a model repository of the Hub, made if need be. Returns the commit's URL."""
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    operations = [CommitOperationAdd(name, text.encode("utf-8")) for name, text in files.items()]
    commit = api.create_commit(repo_id, operations, commit_message=commit_message, revision=revision)
    return commit.commit_url


def read_record(
    path: str | Path, expected_format: str, what: str, error: type[ValueError] = ValueError
) -> dict[str, Any]:
    """The fields of a JSON file of this format, but for its `format`.

    Raises FileNotFoundError if there is no file and `error` if it is not `what`.
    """
    record = _read_json(path, error)
    found = record.pop("format", None) if isinstance(record, dict) else type(record).__name__
    if found != expected_format:
        raise error(f"{path} is not {what}: format is {found!r}, expected {expected_format!r}")
    return record


def read_format(path: str | Path) -> str | None:
    """The `format` of a JSON file; None without one. Raises ValueError for what is not JSON."""
    record = _read_json(path, ValueError)
    return record.get("format") if isinstance(record, dict) else None


def _read_json(path: str | Path, error: type[ValueError]) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as wrong:  # also numbers of more digits than Python reads
        raise error(f"{path} is not JSON: {wrong}") from wrong
