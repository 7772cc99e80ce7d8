"""Finds the folder or GGUF file of a checkpoint and checks its files before a model is built.

A folder, a Hub cache folder and a Hub id are resolved to a local folder, a GGUF file to itself. Errors are reported in
one line before loading, rather than in a traceback after minutes of loading.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import zipfile
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open

from adaskip.models.errors import ModelError, one_line
from adaskip.models.gguf_file import check_gguf, is_gguf
from adaskip.models.packaged import is_packaged, packaged_file

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
COMMIT = re.compile(r"[0-9a-f]{40}")
METADATA_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
WEIGHT_FILES: dict[str, str] = {"safetensors": "model*.safetensors", "bin": "pytorch_model*.bin"}
SAMPLED_BLOCKS = 256
BLOCK_BYTES = 4096
WeightFormat = Literal["safetensors", "bin", "gguf"]


def find_folder(
    checkpoint: str | Path, revision: str | None = None, *, offline: bool = True, only_config: bool = False
) -> Path:
    """The local folder for a folder, a Hub cache folder (`models--org--name`) or a Hub id; for a GGUF file, itself.

    Args:
        checkpoint: an existing folder, a `.gguf` file, `org/name`, `org/name@revision`, or `package:name/file.gguf`.
        revision: commit, branch or tag of a Hub id without one; None: main. For a package, its version.
        offline: look for a Hub id only in the local cache.
        only_config: download only the config.json of a Hub id.

    Raises:
        ModelError: there is no such folder or package, or the Hub id is not in the cache or cannot be downloaded.
    """
    if is_packaged(checkpoint):
        return packaged_file(str(checkpoint), revision)
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        return _snapshot_in_cache(path)
    if path.is_file() and is_gguf(path):
        return path
    if path.exists():
        raise ModelError(
            f"checkpoint {str(checkpoint)!r} is a file, but must be a folder with config.json and weights, or a .gguf "
            "file"
        )
    if not isinstance(checkpoint, str) or not HUB_ID.fullmatch(checkpoint):
        raise ModelError(f"checkpoint folder {str(checkpoint)!r} does not exist")
    repo, _, own_revision = checkpoint.partition("@")
    return _from_hub(repo, own_revision or revision or "main", offline, only_config)


def _snapshot_in_cache(folder: Path) -> Path:
    """The snapshot in a Hub cache folder: the one named in `refs/main`, or the only one. Other folders: unchanged."""
    snapshots = folder / "snapshots"
    if (folder / "config.json").is_file() or not snapshots.is_dir():
        return folder
    main = folder / "refs" / "main"
    if main.is_file() and (named := snapshots / main.read_text(encoding="utf-8").strip()).is_dir():
        return named
    found = sorted(path for path in snapshots.iterdir() if path.is_dir())
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ModelError(f"{folder} must contain one snapshot or name one in refs/main; found: {names}")
    return found[0]


def _from_hub(repo: str, revision: str, offline: bool, only_config: bool) -> Path:
    """Download metadata and safetensors; .bin files only if there are no safetensors."""
    if only_config:
        return _download(repo, revision, offline, ["config.json"])
    folder = _download(repo, revision, offline, [*METADATA_FILES, WEIGHT_FILES["safetensors"]])
    if not any(folder.glob(WEIGHT_FILES["safetensors"])):
        folder = _download(repo, revision, offline, [*METADATA_FILES, WEIGHT_FILES["bin"]])
    return folder


def _download(repo: str, revision: str, offline: bool, patterns: list[str]) -> Path:
    help_line = (
        f"give a local folder (--checkpoint DIR), download it (--checkpoint {repo}, or "
        f"`hf download {repo} --revision {revision}`), or use the embedded models (--testbed)"
    )
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, local_files_only=offline))
    except LocalEntryNotFoundError:
        unreachable = "" if offline else " and the Hub cannot be reached"
        raise ModelError(
            f"{repo} (revision {revision}) is neither a folder nor in the local Hub cache{unreachable}: {help_line}"
        ) from None
    except GatedRepoError:
        raise ModelError(
            f"{repo} is gated: accept its licence at https://huggingface.co/{repo} and run `hf auth login`, "
            f"or give a local folder (--checkpoint DIR), or use the embedded models (--testbed)"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(f"{repo!r} is neither a local folder nor a model on the Hub: {help_line}") from None
    except Exception as error:  # the Hub client passes on errors of its HTTP library
        raise ModelError(f"{repo} (revision {revision}): download failed ({one_line(error)}): {help_line}") from error


def commit_of(folder: Path) -> str | None:
    """The commit in the name of a Hub snapshot folder; None for any other folder."""
    return folder.name if COMMIT.fullmatch(folder.name) else None


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint folder, with at least a `model_type`."""
    path = folder / "config.json"
    if not path.is_file():
        held = ", ".join(file.name for file in sorted(folder.glob("*.gguf")))
        hint = f"; to load one of its GGUF files, name the file itself: {held}" if held else ""
        raise ModelError(f"{folder} has no config.json, so it is not a checkpoint in the Hugging Face layout{hint}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {one_line(error)}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"{path} has no model_type")
    return config


def has_weights(path: Path) -> bool:
    """Whether there is any weight file, even an incomplete one."""
    return is_gguf(path) or any(file for pattern in WEIGHT_FILES.values() for file in path.glob(pattern))


def check_weights(path: Path) -> WeightFormat:
    """The format of the weights in a folder (safetensors are preferred) or GGUF file, after a check of each file.

    Raises:
        ModelError: no weights, a shard of the index is missing, or a file is damaged.
    """
    if is_gguf(path):
        check_gguf(path)
        return "gguf"
    kinds: tuple[WeightFormat, ...] = ("safetensors", "bin")
    for kind in kinds:
        if files := sorted(path.glob(WEIGHT_FILES[kind])):
            _check_shards(path, kind)
            for file in files:
                _check_safetensors(file) if kind == "safetensors" else _check_bin(file)
            return kind
    raise ModelError(f"{path} has no weights: neither {' nor '.join(WEIGHT_FILES.values())}")


def weight_files_fingerprint(path: Path) -> str:
    """SHA-256 over name, size and `SAMPLED_BLOCKS` evenly spaced blocks of every weight file; nothing is loaded.

    Raises:
        ModelError: no usable weights (see `check_weights`).
    """
    digest = hashlib.sha256()
    kind = check_weights(path)
    for file in [path] if kind == "gguf" else sorted(path.glob(WEIGHT_FILES[kind])):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as handle:
            for number in range(SAMPLED_BLOCKS):
                handle.seek(number * size // SAMPLED_BLOCKS)
                digest.update(handle.read(BLOCK_BYTES))
    return digest.hexdigest()


def _check_shards(folder: Path, kind: str) -> None:
    index = folder / ("model.safetensors.index.json" if kind == "safetensors" else "pytorch_model.bin.index.json")
    if not index.is_file():
        return
    try:
        shards = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is not a weight index: {one_line(error)}") from None
    missing = sorted(name for name in shards if not (folder / name).is_file())
    if missing:
        raise ModelError(f"{folder} lacks {len(missing)} of {len(shards)} weight files, first {missing[0]}")


def _check_safetensors(path: Path) -> None:
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} is truncated or not a safetensors file ({path.stat().st_size} bytes; {one_line(error)}): download "
            "it again"
        ) from None


def _check_bin(path: Path) -> None:
    """Raise ModelError for a truncated zip archive of torch.save. Files of torch before 1.6 are not zip archives."""
    with path.open("rb") as handle:
        begins_like_zip = handle.read(4) == b"PK\x03\x04"
    if begins_like_zip and not zipfile.is_zipfile(path):
        raise ModelError(f"{path} is truncated ({path.stat().st_size} bytes): download it again")
