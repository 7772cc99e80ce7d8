"""The paper's models by name, and any other checkpoint, as stock transformers models ready to generate.

`configs/models.yaml` says where the weights are and how prompts are wrapped. Loading is offline unless a Hub id is
asked for by name, never runs a checkpoint's code, and ends in a model or in one line that says what to do.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from adaskip.common.configs import load_yaml
from adaskip.core.blocks import decoder_layers
from adaskip.core.packed_sdpa import register_packed
from adaskip.models import internlm
from adaskip.models.chat import check_chat, wrapper
from adaskip.models.checkpoints import (
    ModelError,
    check_weights,
    commit_of,
    find_folder,
    has_weights,
    one_line,
    read_config,
    said_in_one_line,
    weight_files_fingerprint,
)
from adaskip.models.rope import fix_dynamic_rope
from adaskip.profiles.fingerprint import weights_fingerprint

__all__ = [
    "LoadedModel",
    "ModelError",
    "ModelSpec",
    "architecture",
    "check_checkpoint",
    "load_model",
    "placement",
    "prompt_limit",
    "registry",
    "weight_files",
    "weights_fingerprint",
]

logger = logging.getLogger(__name__)

ANSWER_ROOM = 512  # the longest answer of any LongBench task


@dataclass(frozen=True)
class ModelEntry:
    """One model of `configs/models.yaml`; the fields are explained there."""

    checkpoint: str
    max_prompt_tokens: int
    revision: str = "main"
    chat: str = "none"
    stop_tokens: tuple[str, ...] = ()
    stop_strings: tuple[str, ...] = ()
    shape: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check_chat(self.chat)
        if self.max_prompt_tokens < 2:
            raise ModelError(f"max_prompt_tokens of {self.checkpoint} must be at least 2, not {self.max_prompt_tokens}")
        object.__setattr__(self, "stop_tokens", tuple(self.stop_tokens))
        object.__setattr__(self, "stop_strings", tuple(self.stop_strings))


@dataclass(frozen=True)
class ModelSpec:
    """What a run has to know of a loaded model besides its weights."""

    name: str
    """Key in `configs/models.yaml`, or the checkpoint's own name."""
    checkpoint: str
    """Folder or Hub id the weights came from."""
    revision: str | None
    """Commit of a Hub snapshot; None for an ordinary folder."""
    weight_files: str
    """`checkpoints.weight_files_fingerprint` of the folder."""
    max_prompt_tokens: int
    """Longest prompt before wrapping; a longer one loses its middle."""
    chat_template: str | None
    """Wrapper text with one `{prompt}`, or `{prompt|trim}` where the wrapper drops white space around it, or None."""
    stop_token_ids: tuple[int, ...]
    """Every token that ends an answer."""
    stop_strings: tuple[str, ...]
    """Texts at which an answer is cut off."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, its tokenizer, and how to prompt it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    spec: ModelSpec


@lru_cache(maxsize=1)
def registry() -> dict[str, ModelEntry]:
    """The models of `configs/models.yaml` by name."""
    known = {field.name for field in fields(ModelEntry)}
    entries = {}
    for name, values in load_yaml("models").items():
        if unknown := sorted(set(values) - known):
            raise ModelError(f"configs/models.yaml: unknown field {unknown[0]!r} of {name}; known: {sorted(known)}")
        entries[name] = ModelEntry(**values)
    return entries


def get_entry(name: str) -> ModelEntry:
    """The registry's entry called `name`; ModelError with a suggestion if there is none."""
    models = registry()
    if name not in models:
        close = get_close_matches(name, models, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ModelError(f"unknown model {name!r}: {hint}known are {', '.join(models)}")
    return models[name]


def architecture(name: str, checkpoint: str | Path | None = None) -> PreTrainedConfig:
    """The configuration of a checkpoint, no weights read; without one, the published one of a model of the registry.

    The network is touched only for a Hub id given as `checkpoint`, of which config.json is got.
    """
    if checkpoint is not None:
        entry = get_entry(name)
        revision = entry.revision if checkpoint == entry.checkpoint else None
        folder = find_folder(checkpoint, revision, offline=False, only_config=True)
        return _model_config(folder, read_config(folder))
    shape = get_entry(name).shape
    if shape is None:
        raise ModelError(f"configs/models.yaml says no shape of {name}")
    with said_in_one_line(f"configs/models.yaml: the shape of {name} is not usable"):
        fields = {field: value for field, value in shape.items() if field != "model_type"}
        return internlm.llama_config(fields) if shape["model_type"] == internlm.MODEL_TYPE else LlamaConfig(**fields)


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
    """Load a model, its tokenizer and what `configs/models.yaml` says about it.

    Args:
        name: llama, internlm or vicuna; None with a checkpoint that is none of them.
        checkpoint: a folder, a Hub cache folder, or `org/name[@revision]`; None: the registry's.
        device: where the model goes; None: cuda where there is one, else cpu.
        dtype: of the weights; None: bfloat16, on the CPU float32.
        attn_implementation: transformers' attention backend; None: its choice.
        device_map: accelerate's device map, e.g. "auto", instead of `device`.
        chat: "none", "template" (the tokenizer's own chat template) or a text with `{prompt}`; None: the registry's.
        max_prompt_tokens: longest prompt before wrapping; None: `prompt_limit`, with a warning below the registry's.
        offline: use the local Hub cache only; None: yes, unless `checkpoint` is a Hub id.

    Raises:
        ModelError: anything wrong with these arguments or the checkpoint, in one line.
    """
    if name is None and checkpoint is None:
        raise ModelError(f"give a model name ({', '.join(registry())}) or a checkpoint")
    entry = get_entry(name) if name is not None else None
    if chat is not None:
        check_chat(chat)
    where = placement(device, dtype, device_map)
    folder, source = _find(entry, checkpoint, offline)
    raw = read_config(folder)
    config = _model_config(folder, raw)
    limit = max_prompt_tokens or prompt_limit(config, name)
    entry = entry or ModelEntry(source, limit)
    if max_prompt_tokens is None and limit < entry.max_prompt_tokens:
        logger.warning(
            "%s was made for fewer tokens than %s: prompts are cut at %d, not at %d",
            *(source, name, limit, entry.max_prompt_tokens),
        )
    register_packed()
    tokenizer = _load_tokenizer(folder, raw)
    chat_template = wrapper(chat or entry.chat, tokenizer)
    model = _load_weights(folder, config, attn_implementation, where)
    spec = ModelSpec(
        name=name or Path(source).name,
        checkpoint=source,
        revision=commit_of(folder),
        weight_files=weight_files_fingerprint(folder),
        max_prompt_tokens=limit,
        chat_template=chat_template,
        stop_token_ids=_stop_token_ids(entry.stop_tokens, model, tokenizer),
        stop_strings=entry.stop_strings,
    )
    # A run decodes greedily: of the checkpoint's own settings only the special tokens are kept.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=list(spec.stop_token_ids), pad_token_id=tokenizer.pad_token_id
    )
    return LoadedModel(model, tokenizer, spec)


def _find(entry: ModelEntry | None, checkpoint: str | Path | None, offline: bool | None) -> tuple[Path, str]:
    """The local folder and what was asked for; the network is touched only for a Hub id given as `checkpoint`."""
    source = checkpoint if checkpoint is not None else entry.checkpoint if entry else ""
    revision = entry.revision if entry and source == entry.checkpoint else None
    return find_folder(source, revision, offline=checkpoint is None if offline is None else offline), str(source)


def weight_files(name: str, checkpoint: str | Path | None = None) -> str | None:
    """The weight files' fingerprint of what `load_model` would load; None where they are not on this machine."""
    try:
        folder, _ = _find(get_entry(name), checkpoint, offline=True)
    except ModelError:
        return None
    return weight_files_fingerprint(folder) if has_weights(folder) else None


def check_checkpoint(name: str, checkpoint: str | Path | None = None) -> None:
    """Refuse what `load_model` would refuse for its configuration or weight files; a Hub id is downloaded as there.

    Raises:
        ModelError: the checkpoint is not to be had, or is no causal language model, or its weights are damaged.
    """
    folder, _ = _find(get_entry(name), checkpoint, offline=None)
    _model_config(folder, read_config(folder))
    check_weights(folder)


def placement(
    device: str | torch.device | None, dtype: str | torch.dtype | None, device_map: str | dict[str, Any] | None
) -> dict[str, Any]:
    """The arguments of `from_pretrained` that say where the weights go and in which dtype."""
    if device is not None and device_map is not None:
        raise ModelError("device and device_map both say where the model goes: give one of them")
    has_cuda = torch.cuda.is_available()
    try:
        where = torch.device(device or ("cuda" if has_cuda else "cpu"))
    except RuntimeError as error:
        raise ModelError(f"unknown device {device!r}: {one_line(error)}") from None
    if where.type == "cuda" and not has_cuda:
        raise ModelError(f"device {str(where)!r} asked for, but torch {torch.__version__} sees no CUDA device; use cpu")
    on_cpu = where.type == "cpu" and (device_map is None or not has_cuda)
    chosen = dtype or (torch.float32 if on_cpu else torch.bfloat16)
    if isinstance(chosen, str):
        chosen = getattr(torch, chosen, None)
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise ModelError(f"unknown dtype {dtype!r}: allowed are float32, bfloat16, float16")
    if device_map is None and where.type != "cpu":
        device_map = {"": where}  # straight onto the device, without a copy in main memory
    return {"dtype": chosen, "device_map": device_map}


def _model_config(folder: Path, raw: dict[str, Any]) -> PreTrainedConfig:
    """The folder's configuration if it is of a causal language model that transformers has a class for."""
    model_type, classes = raw["model_type"], raw.get("architectures") or []
    with said_in_one_line(f"{folder / 'config.json'} is not usable"):
        if model_type == internlm.MODEL_TYPE:
            return internlm.llama_config(raw)
        expected = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
        if expected is None or (classes and expected not in classes):
            raise ModelError(
                f"{folder} holds {', '.join(classes) or 'no named class'} of type {model_type!r}, which is no causal "
                f"language model of transformers {transformers.__version__} (remote code is never run)"
            )
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _load_weights(
    folder: Path, config: PreTrainedConfig, attn_implementation: str | None, where: dict[str, Any]
) -> PreTrainedModel:
    """The model with every weight from the folder: safetensors, or .bin read with `torch.load(weights_only=True)`."""
    # InternLM's weights carry LLaMA's names; the automatic class would ask for remote code because of `auto_map`.
    model_class: Any = LlamaForCausalLM if config.model_type == "llama" else AutoModelForCausalLM
    options = {**where, "use_safetensors": check_weights(folder) == "safetensors", "local_files_only": True}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    with said_in_one_line(f"{folder} cannot be loaded"):
        model, info = model_class.from_pretrained(folder, config=config, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"{folder} lacks {len(missing)} weights of {type(model).__name__}, first {missing[0]}")
    if unexpected := sorted(info["unexpected_keys"]):
        logger.warning("%s: %d weights are not used, first %s", folder, len(unexpected), unexpected[0])
    decoder_layers(model)  # refuses a model without
    fix_dynamic_rope(model)
    return model.eval().requires_grad_(False)


def _load_tokenizer(folder: Path, raw: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, padding in front; where it has no pad token the end of text serves."""
    is_internlm = raw["model_type"] == internlm.MODEL_TYPE
    if is_internlm and not (folder / "tokenizer.model").is_file():
        raise ModelError(f"{folder} has no tokenizer.model, the SentencePiece model of InternLM's tokenizer")
    with said_in_one_line(f"the tokenizer in {folder} cannot be loaded"):
        if is_internlm:
            tokenizer: Any = internlm.InternLMTokenizer.from_pretrained(folder, local_files_only=True)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def prompt_limit(config: PreTrainedConfig, name: str | None = None) -> int:
    """Longest prompt before wrapping of a checkpoint with this configuration.

    Of any checkpoint, the positions it was made for, scaled rope included, less the room for an answer (at most half).
    Of one that stands for the model `name` of the registry, no more than the registry's limit; and just that with
    dynamic NTK, which stretches the positions as far as a prompt goes.
    """
    text_config = config.get_text_config()
    positions = int(text_config.max_position_embeddings)
    rope = getattr(text_config, "rope_parameters", None) or {}
    kind = rope.get("rope_type")
    if kind in ("linear", "yarn"):
        unscaled = rope.get("original_max_position_embeddings") or positions
        positions = max(positions, int(unscaled * (rope.get("factor") or 1.0)))
    own = max(positions - ANSWER_ROOM, positions // 2)
    if name is None:
        return own
    published = get_entry(name).max_prompt_tokens
    return published if kind == "dynamic" else min(published, own)


def _stop_token_ids(
    stop_tokens: tuple[str, ...], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """Ids of the named tokens this vocabulary has, the tokenizer's end of text, and the checkpoint's own end tokens."""
    vocabulary = tokenizer.get_vocab()
    own = model.generation_config.eos_token_id if model.generation_config else None
    ids = [vocabulary[token] for token in stop_tokens if token in vocabulary]
    ids += [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return tuple(dict.fromkeys(token for token in ids if token is not None))
