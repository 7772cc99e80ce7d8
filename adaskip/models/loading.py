"""Loads models of `configs/models.yaml` by name, and any other checkpoint, as stock transformers models.

`configs/models.yaml` defines where the weights are and how prompts are wrapped. Loading is offline unless the user
gives a Hub id, never runs code of a checkpoint, and reports errors in one line.
"""

from __future__ import annotations

import logging
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from adaskip.core import hf
from adaskip.core.blocks import decoder_layers
from adaskip.core.fingerprint import weights_fingerprint
from adaskip.core.packed_sdpa import register_packed
from adaskip.models import internlm
from adaskip.models.chat import check_chat, wrapper
from adaskip.models.checkpoints import check_weights, commit_of, read_config, weight_files_fingerprint
from adaskip.models.companion_files import tokenizer_fingerprint
from adaskip.models.errors import ModelError, one_line, said_in_one_line
from adaskip.models.gguf_file import forget_quantisation, gguf_options, is_gguf
from adaskip.models.internlm_stock import stock_tokenizer
from adaskip.models.registry import ModelEntry
from adaskip.models.rope import fix_dynamic_rope
from adaskip.models.source import ModelSource, find_source

logger = logging.getLogger(__name__)

ANSWER_ROOM = 512  # tokens; the longest answer of any task of the paper's benchmark


@dataclass(frozen=True)
class ModelSpec:
    """The properties of a loaded model that a run needs besides its weights."""

    name: str
    """Name in `configs/models.yaml`, or the checkpoint's own name."""
    checkpoint: str
    """Folder or Hub id of the weights."""
    revision: str | None
    """Commit of a Hub snapshot; None for an ordinary folder."""
    weight_files: str
    """`checkpoints.weight_files_fingerprint` of the folder."""
    max_prompt_tokens: int
    """Maximum prompt length before the chat wrapper is added; longer prompts lose their middle."""
    chat_template: str | None
    """Wrapper text with one `{prompt}`, or `{prompt|trim}` if the wrapper strips white space around it, or None."""
    stop_token_ids: tuple[int, ...]
    """Every token that ends an answer."""
    stop_strings: tuple[str, ...]
    """Strings at which an answer is truncated."""
    tokenizer_files: str | None = None
    """`companion_files.tokenizer_fingerprint` of the folder; None if unknown."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, with its tokenizer and specification."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: ModelSpec

    @property
    def pad_token_id(self) -> int:
        """The token that pads batches; 0 if the tokenizer has none, as masked tokens may be any."""
        pad: Any = self.tokenizer.pad_token_id
        return 0 if pad is None else pad

    @cached_property
    def weights_fingerprint(self) -> str:
        """`weights_fingerprint` of the model as loaded; computed once, because it takes time."""
        return weights_fingerprint(self.model)


def architecture(name: str, checkpoint: str | Path | None = None) -> PreTrainedConfig:
    """The configuration of the model that `load_model` would load, without reading weights (`ModelSource.config`)."""
    return find_source(name, checkpoint).config


def load_model(
    name: str | None = None,
    checkpoint: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    chat: str | None = None,
    max_prompt_tokens: int | None = None,
    offline: bool | None = None,
) -> LoadedModel:
    """Load a model, its tokenizer and its settings in `configs/models.yaml`.

    Args:
        name: a name of `configs/models.yaml`, or weights: `org/name[@revision]`, a folder, or a .gguf file; may be None
            if `checkpoint` is given.
        checkpoint: weights, as above, to use for the model of that name; None: those of the registry.
        device: device of the model; None: cuda if available, else cpu.
        dtype: dtype of the weights; None: bfloat16, on the CPU float32.
        attn_implementation: attention backend of transformers; None: its default.
        device_map: accelerate's device map, e.g. "auto", instead of `device`.
        chat: "none", "template" (the tokenizer's chat template) or a text with `{prompt}`; None: that of the registry.
        max_prompt_tokens: maximum prompt length before the chat wrapper is added; None: `prompt_limit`, with a warning
            if it is below the registry's.
        offline: use only the local Hub cache; None: yes, unless a Hub id is given here.

    Raises:
        ModelError: an argument is invalid or the checkpoint cannot be used.
    """
    return load_source(
        find_source(name, checkpoint, offline=offline),
        device=device,
        dtype=dtype,
        attn_implementation=attn_implementation,
        device_map=device_map,
        chat=chat,
        max_prompt_tokens=max_prompt_tokens,
    )


def load_source(
    source: ModelSource,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    chat: str | None = None,
    max_prompt_tokens: int | None = None,
) -> LoadedModel:
    """`load_model` for a `ModelSource`; other arguments and errors are the same."""
    if chat is not None:
        check_chat(chat)
    where = placement(device, dtype, device_map)
    folder, entry = source.path, source.entry
    config = deepcopy(source.own_config)
    limit = max_prompt_tokens or prompt_limit(config, entry)
    if max_prompt_tokens is None and entry is not None and limit < entry.max_prompt_tokens:
        logger.warning(
            "%s has fewer positions than %s: prompts are cut to %d tokens instead of %d",
            *(source.checkpoint, source.name, limit, entry.max_prompt_tokens),
        )
    register_packed()
    tokenizer = load_tokenizer(folder)
    chat_template = wrapper(chat or source.chat, tokenizer)
    if attn_implementation is not None:
        where["attn_implementation"] = attn_implementation
    model = load_weights(folder, config, where)
    spec = ModelSpec(
        name=source.name,
        checkpoint=source.checkpoint,
        revision=commit_of(folder),
        weight_files=source.weight_files or weight_files_fingerprint(folder),
        max_prompt_tokens=limit,
        chat_template=chat_template,
        stop_token_ids=_stop_token_ids(() if entry is None else entry.stop_tokens, model, tokenizer),
        stop_strings=source.stop_strings,
        tokenizer_files=tokenizer_fingerprint(folder),
    )
    # Runs decode greedily, so only the special tokens of the checkpoint's generation config are kept.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=list(spec.stop_token_ids), pad_token_id=tokenizer.pad_token_id
    )
    return LoadedModel(model, tokenizer, spec)


def placement(
    device: str | torch.device | None, dtype: str | torch.dtype | None, device_map: str | dict[str, Any] | None
) -> dict[str, Any]:
    """The arguments of `from_pretrained` for device and dtype of the weights."""
    if device is not None and device_map is not None:
        raise ModelError("device and device_map both place the model: give only one of them")
    has_cuda = torch.cuda.is_available()
    try:
        where = torch.device(device or ("cuda" if has_cuda else "cpu"))
    except RuntimeError as error:
        raise ModelError(f"unknown device {device!r}: {one_line(error)}") from None
    if where.type == "cuda" and not has_cuda:
        raise ModelError(
            f"device {str(where)!r} requested, but torch {torch.__version__} finds no CUDA device; use cpu"
        )
    on_cpu = where.type == "cpu" and (device_map is None or not has_cuda)
    chosen = dtype or (torch.float32 if on_cpu else torch.bfloat16)
    if isinstance(chosen, str):
        chosen = getattr(torch, chosen, None)
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise ModelError(f"unknown dtype {dtype!r}: allowed are float32, bfloat16, float16")
    if device_map is None and where.type != "cpu":
        device_map = {"": where}  # load to the device directly, without a copy in main memory
    return {"dtype": chosen, "device_map": device_map}


def load_weights(folder: Path, config: PreTrainedConfig, options: dict[str, Any]) -> PreTrainedModel:
    """The model with all weights from the folder or GGUF file; .bin files are read with
    `torch.load(weights_only=True)`.

    options: further arguments of transformers' `from_pretrained`. Raises ModelError for weights missing or damaged.
    """
    # InternLM's weights have LLaMA's names; the auto class would ask for remote code because of `auto_map`.
    model_class: Any = LlamaForCausalLM if config.model_type == "llama" else AutoModelForCausalLM
    kind = check_weights(folder)
    options = {**options, **gguf_options(folder), "local_files_only": True}
    if kind == "gguf":
        options["quantization_config"] = GgufConfig(dequantize=True)  # even if kernels for packed weights are installed
    else:
        options["use_safetensors"] = kind == "safetensors"
    with said_in_one_line(f"{folder} cannot be loaded"), hf.quiet_gguf_bar():
        model, info = model_class.from_pretrained(config=config, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"{folder} lacks {len(missing)} weights of {type(model).__name__}, first {missing[0]}")
    if unexpected := sorted(info["unexpected_keys"]):
        logger.warning("%s: %d weights are not used, first %s", folder, len(unexpected), unexpected[0])
    decoder_layers(model)  # raises if there are none
    fix_dynamic_rope(model)
    if kind == "gguf":
        forget_quantisation(model)
    return model.eval().requires_grad_(False)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or GGUF file, with left padding; without a pad token, the end of text is used.

    Raises:
        ModelError: it cannot be read.
    """
    return deepcopy(_read_tokenizer(folder, tokenizer_fingerprint(folder)))


def template_wrapper(folder: Path) -> str | None:
    """The wrapper text that the chat template of a folder or GGUF file makes (`chat.wrapper`).

    Raises:
        ModelError: it has no usable chat template.
    """
    return _template_wrapper(folder, tokenizer_fingerprint(folder))


@lru_cache(maxsize=4)
def _template_wrapper(folder: Path, fingerprint: str) -> str | None:
    return wrapper("template", _read_tokenizer(folder, fingerprint))


def exportable_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """InternLM's tokenizer with the same ids in files that name no remote code; None for others. Raises ModelError."""
    tokenizer = load_tokenizer(folder) if read_config(folder)["model_type"] == internlm.MODEL_TYPE else None
    return None if not isinstance(tokenizer, internlm.InternLMTokenizer) else stock_tokenizer(tokenizer)


@lru_cache(maxsize=2)
def _read_tokenizer(folder: Path, fingerprint: str) -> PreTrainedTokenizerBase:
    """Cached, because reading it from a GGUF file takes seconds, and it is also needed before the model is loaded."""
    is_internlm = not is_gguf(folder) and read_config(folder)["model_type"] == internlm.MODEL_TYPE
    if is_internlm and not (folder / "tokenizer.model").is_file():
        raise ModelError(f"{folder} has no tokenizer.model, the SentencePiece model of InternLM's tokenizer")
    with said_in_one_line(f"the tokenizer in {folder} cannot be loaded"):
        if is_internlm:
            tokenizer: Any = internlm.InternLMTokenizer.from_pretrained(folder, local_files_only=True)
        else:
            named = gguf_options(folder)
            tokenizer = AutoTokenizer.from_pretrained(**named, local_files_only=True, trust_remote_code=False)
    if not tokenizer("The 1st.", add_special_tokens=False).input_ids:
        raise ModelError(
            f"the tokenizer in {folder} turns text into no tokens: {type(tokenizer).__name__} cannot read its files"
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def prompt_limit(config: PreTrainedConfig, entry: ModelEntry | None = None) -> int:
    """Maximum prompt length, before the chat wrapper is added, of a checkpoint with this configuration.

    It is the number of positions minus the room for an answer; for a model of the registry, at most the limit of its
    entry, and with dynamic NTK exactly that limit.
    """
    most = positions_limit(config)
    if entry is not None:
        return entry.max_prompt_tokens if most is None else min(entry.max_prompt_tokens, most)
    return _room(int(config.get_text_config().max_position_embeddings)) if most is None else most


def positions_limit(config: PreTrainedConfig) -> int | None:
    """The number of positions of a checkpoint, including scaled rope, minus the room for an answer (at most half).

    None with dynamic NTK, which extends the positions to any prompt length.
    """
    positions = positions_of(config)
    return None if positions is None else _room(positions)


def positions_of(config: PreTrainedConfig) -> int | None:
    """The number of positions of a checkpoint, including scaled rope; None with dynamic NTK."""
    text_config = config.get_text_config()
    positions = int(text_config.max_position_embeddings)
    rope = getattr(text_config, "rope_parameters", None) or {}
    kind = rope.get("rope_type")
    if kind in ("linear", "yarn"):
        unscaled = rope.get("original_max_position_embeddings") or positions
        positions = max(positions, int(unscaled * (rope.get("factor") or 1.0)))
    return None if kind == "dynamic" else positions


def check_positions(config: PreTrainedConfig, prompt_tokens: int, new_tokens: int, option: str) -> None:
    """Raise ValueError, which names `option`, if a request is longer than the model's positions."""
    needed, positions = prompt_tokens + new_tokens - 1, positions_of(config)  # the last token is not read
    if positions is not None and needed > positions:
        raise ValueError(f"{option}, with {new_tokens} new tokens, needs {needed} positions; the model has {positions}")


def _room(positions: int) -> int:
    return max(positions - ANSWER_ROOM, positions // 2)


def _stop_token_ids(
    stop_tokens: tuple[str, ...], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """Ids of those `stop_tokens` that are in the vocabulary, of the end of text, and of the checkpoint's end tokens."""
    vocabulary = tokenizer.get_vocab()
    own = model.generation_config.eos_token_id if model.generation_config else None
    ids = [vocabulary[token] for token in stop_tokens if token in vocabulary]
    ids += [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return tuple(dict.fromkeys(token for token in ids if token is not None))
