"""Fingerprints of a checkpoint's files besides its weights: configuration, end tokens, tokenizer.

They distinguish runs without loading a model.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from adaskip.core.config_identity import config_fingerprint
from adaskip.models.errors import ModelError, one_line
from adaskip.models.gguf_file import is_gguf

FIELDS = ("config_fingerprint", "config_quantization", "config_stop_token_ids", "tokenizer_files")
"""The fields returned by `model_files`."""
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)
GGUF_HEADER_BYTES = 32 * 2**20
"""The metadata at the beginning of a GGUF file, which includes the tokenizer, is smaller than this."""


def model_files(path: Path, config: PreTrainedConfig) -> dict[str, Any]:
    """The `FIELDS` of a folder or GGUF file with configuration `config`, as JSON values.

    config_quantization: the quantisation that the configuration asks for, None for none. config_stop_token_ids: the end
    tokens that transformers takes from the checkpoint. tokenizer_files: SHA-256 over names and bytes.

    Raises:
        ModelError: `generation_config.json` is not JSON.
    """
    quantised = getattr(config, "quantization_config", None)
    return {
        "config_fingerprint": config_fingerprint(config),
        "config_quantization": quantised if isinstance(quantised, dict) else None,
        "config_stop_token_ids": _stop_token_ids(path, config),
        "tokenizer_files": tokenizer_fingerprint(path),
    }


def tokenizer_fingerprint(path: Path) -> str:
    """SHA-256 over names and bytes of a folder's tokenizer files, or over the header of a GGUF file."""
    digest = hashlib.sha256()
    if is_gguf(path):
        with path.open("rb") as handle:
            digest.update(handle.read(GGUF_HEADER_BYTES))
        return digest.hexdigest()
    for file in sorted(file for pattern in TOKENIZER_FILES for file in path.glob(pattern) if file.is_file()):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(path).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _stop_token_ids(path: Path, config: PreTrainedConfig) -> list[int]:
    """The end tokens of `generation_config.json` if it exists, else of the configuration."""
    file = path / "generation_config.json"
    ids = getattr(config.get_text_config(decoder=True), "eos_token_id", None)
    if not is_gguf(path) and file.is_file():
        try:
            ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise ModelError(f"{file} is invalid: {one_line(error)}") from None
    return [] if ids is None else sorted(ids) if isinstance(ids, (list, tuple)) else [ids]
