"""Rewrites the safetensors files of a checkpoint one by one, so that no more than one of them is in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from adaskip.engines.errors import ExportError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a checkpoint folder; `model.safetensors` before an index, as transformers has it.

    Raises:
        ExportError: there are no safetensors files, or one is missing or damaged.
    """
    index = folder / INDEX
    if index.is_file() and not (folder / WEIGHTS).is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ExportError(f"{index} is not a weight index: {error}") from None
        files = [folder / name for name in names]
    else:
        files = [folder / WEIGHTS]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ExportError(f"{folder} lacks {missing[0]}; a checkpoint of safetensors files is needed (not .bin)")
    found = {}
    for file in files:
        with _opened(file) as shard:
            found |= dict.fromkeys(shard.keys(), file)
    return found


def read_tensor(files: dict[str, Path], name: str) -> Tensor:
    """One tensor of a checkpoint. files: as of `tensor_files`."""
    with _opened(files[name]) as shard:
        return shard.get_tensor(name)


def rewrite(
    files: dict[str, Path],
    target: Path,
    *,
    rename: Callable[[str], str | None],
    change: Callable[[str, Tensor], Tensor],
) -> None:
    """Write the tensors of a checkpoint into the folder `target`: a file for each source file that something is left
    of, and an index where there are several.

    Args:
        files: as of `tensor_files`.
        rename: the new name of a tensor, None to leave it out.
        change: the new content of a tensor of this (old) name.

    Raises:
        OSError: a file cannot be written, as on a full disk.
    """
    by_file: dict[Path, dict[str, str]] = {}
    for name, file in files.items():
        if (new := rename(name)) is not None:
            by_file.setdefault(file, {})[name] = new
    names = _names(len(by_file))
    where, num_bytes, num_elements = {}, 0, 0
    for (file, renamed), name in zip(by_file.items(), names, strict=True):
        with _opened(file) as shard:
            tensors = {new: change(old, shard.get_tensor(old)).contiguous() for old, new in renamed.items()}
        where |= dict.fromkeys(tensors, name)
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
        num_elements += sum(tensor.numel() for tensor in tensors.values())
        with disk_errors(target / name):
            save_file(tensors, target / name, metadata={"format": "pt"})
        del tensors
    if len(names) > 1:
        metadata = {"total_parameters": num_elements, "total_size": num_bytes}
        index = {"metadata": metadata, "weight_map": dict(sorted(where.items()))}
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _names(count: int) -> list[str]:
    if count == 1:
        return [WEIGHTS]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


@contextmanager
def _opened(file: Path) -> Iterator:
    try:
        with safe_open(file, framework="pt") as shard:
            yield shard
    except SafetensorError as error:
        raise ExportError(f"{file} is truncated or no safetensors file ({error}): get it again") from None


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """What safetensors raises when it cannot write, as on a full disk, as an OSError that names the file or folder."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
