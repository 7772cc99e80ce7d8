"""The tokenizer of an exported folder, which stock classes must load: remote code is never run, nor copied."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from adaskip.engines.errors import ExportError
from adaskip.engines.registry import Export

logger = logging.getLogger(__name__)

CONFIG = "tokenizer_config.json"
FILES = (CONFIG, "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
"""A folder with one of these has a tokenizer."""
TEXT = "The quick brown fox, 12.5 km:  it's a test.\n\n你好 é"


def check_tokenizer(export: Export) -> None:
    """Raise ExportError for a checkpoint whose tokenizer needs remote code, unless another takes its place."""
    if export.tokenizer is None and needs_code(export.source.folder):
        raise ExportError(
            f"the tokenizer of {export.source.folder} needs remote code, which is never run nor copied; allowed: "
            f"InternLM's, or stock ones (no auto_map in {CONFIG})"
        )


def needs_code(folder: Path) -> bool:
    """Whether the tokenizer of a folder is a class of remote code."""
    file = folder / CONFIG
    if not file.is_file():
        return False
    try:
        named = json.loads(file.read_text(encoding="utf-8")).get("auto_map") or {}
    except (ValueError, AttributeError):
        raise ExportError(f"{file} is not a JSON object") from None
    return bool(named.get("AutoTokenizer") if isinstance(named, dict) else named) and _loaded(folder) is None


def write_tokenizer(export: Export, target: Path) -> None:
    """Put the tokenizer that was given, if any, in the place of the copied one."""
    if export.tokenizer is None:
        return
    for file in {
        file for pattern in ("tokenizer*", "*.model", "special_tokens_map.json") for file in target.glob(pattern)
    }:
        file.unlink()
    export.tokenizer.save_pretrained(target)


def verify_tokenizer(export: Export, target: Path) -> None:
    """Raise ExportError unless a stock class loads the exported tokenizer, and it makes the tokens of the source's."""
    if not any((export.source.folder / name).is_file() for name in FILES):
        return
    source = export.tokenizer or _loaded(export.source.folder)
    if source is None:
        logger.warning("the tokenizer of %s cannot be loaded here: it was copied unchecked", export.source.folder)
        return
    found = _loaded(target, config=export.source.config)  # that of the folder may be one that only our classes know
    if found is None or found(TEXT).input_ids != source(TEXT).input_ids:
        said = "cannot be loaded by stock classes" if found is None else "makes other tokens than the source's"
        raise ExportError(f"the tokenizer of the exported folder {said}")


def _loaded(folder: Path, **options: Any) -> PreTrainedTokenizerBase | None:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # transformers raises many kinds, also of missing packages
        logger.debug("%s: %s", folder, error)
        return None
