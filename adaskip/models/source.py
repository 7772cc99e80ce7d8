"""Resolves `--model` and `--checkpoint`: a model of `configs/models.yaml`, a Hub id, a folder, or a GGUF file.

A `ModelSource` looks for the files at most once, when they are first needed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from adaskip.models import internlm
from adaskip.models.checkpoints import (
    HUB_ID,
    check_weights,
    find_folder,
    has_weights,
    read_config,
    weight_files_fingerprint,
)
from adaskip.models.companion_files import model_files
from adaskip.models.errors import ModelError, said_in_one_line
from adaskip.models.gguf_file import is_gguf, read_gguf_config
from adaskip.models.packaged import is_packaged
from adaskip.models.registry import ModelEntry, registry, unknown_model

NOT_IN_NAMES = re.compile(r"[^\w.+-]+")
"""Characters that are replaced by `_` in the name of a run."""
LOCAL_PREFIXES = ("/", "./", "../", "~")


@dataclass(frozen=True)
class ModelSource:
    """The weights of one model; they are located at first use, and the result is kept.

    name: the model's name in run names. entry: its entry in `configs/models.yaml`, None if it has none. checkpoint:
    folder, GGUF file, Hub id, or file in a package. revision: commit, branch or tag of a Hub id, or version of a
    package. offline: look for a Hub id only in the local cache.
    """

    name: str
    entry: ModelEntry | None
    checkpoint: str
    revision: str | None = None
    offline: bool = True

    @property
    def is_local(self) -> bool:
        """Whether the checkpoint is a file or folder, rather than a Hub id or a file in a missing package."""
        if is_packaged(self.checkpoint):
            return self.here is not None
        return Path(self.checkpoint).expanduser().exists() or not HUB_ID.fullmatch(self.checkpoint)

    @cached_property
    def here(self) -> Path | None:
        """The folder or GGUF file on this machine, None if there is none; does not use the network."""
        try:
            return find_folder(self.checkpoint, self.revision)
        except ModelError:
            return None

    @cached_property
    def path(self) -> Path:
        """The folder or GGUF file; a Hub id is downloaded unless `offline`.

        Raises:
            ModelError: it does not exist, or cannot be downloaded.
        """
        if (self.offline or self.is_local) and self.here is not None:
            return self.here
        return find_folder(self.checkpoint, self.revision, offline=self.offline)

    @cached_property
    def weight_files(self) -> str | None:
        """The fingerprint of the weight files; None if they are not on this machine."""
        found = vars(self).get("path") or self.here
        return weight_files_fingerprint(found) if found is not None and has_weights(found) else None

    @property
    def model_files(self) -> dict[str, Any]:
        """The fingerprints of the other files (see `companion_files`); empty if they are not on this machine.

        Raises:
            ModelError: its configuration or generation configuration is invalid.
        """
        found = vars(self).get("path") or self.here
        if found is None or not has_weights(found):
            return {}
        config = vars(self).get("own_config") or (self.own_config if self.is_local else read_architecture(found))
        return model_files(found, config)

    @cached_property
    def own_config(self) -> PreTrainedConfig:
        """The checkpoint's own configuration; a Hub id is downloaded for it unless `offline`."""
        return read_architecture(self.path)

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The configuration, without reading weights: the checkpoint's own, or the published one for a model of the
        registry without a given checkpoint. For a Hub id only config.json is downloaded."""
        if self.is_local:
            return self.own_config
        entry = self.entry
        if self.offline and entry is not None and entry.shape is not None and entry.checkpoint == self.checkpoint:
            return _published(self.name, entry.shape)
        return read_architecture(find_folder(self.checkpoint, self.revision, offline=self.offline, only_config=True))

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.config.get_text_config().num_hidden_layers

    @property
    def chat(self) -> str:
        """The default chat wrapper."""
        return "none" if self.entry is None else self.entry.chat

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Strings at which an answer is truncated."""
        return () if self.entry is None else self.entry.stop_strings

    def check(self) -> None:
        """Check configuration and weight files as loading would; a Hub id is downloaded for that.

        Raises:
            ModelError: the checkpoint is not available or not a causal language model, or its weights are damaged.
        """
        assert self.own_config is not None, "reads it"
        check_weights(self.path)


def find_source(
    model: str | None = None, checkpoint: str | Path | None = None, *, offline: bool | None = None
) -> ModelSource:
    """Resolve `model` and `checkpoint`; nothing is read or downloaded yet.

    Args:
        model: a name of `configs/models.yaml`, or weights: a Hub id, a folder, a .gguf file, or package:name/file.gguf.
        checkpoint: weights to use for the model of that name; without `model`, the same as `model`.
        offline: look for a Hub id only in the local cache; None: yes, unless it was given here.

    Raises:
        ModelError: neither is given, the model is unknown, or both name weights.
    """
    if model is None and checkpoint is None:
        raise ModelError(f"give a model ({', '.join(registry())}, a Hub id, a folder or a .gguf file) or a checkpoint")
    if model is not None and (entry := registry().get(model)) is not None:
        source = str(checkpoint or entry.checkpoint)
        revision = entry.revision if source == entry.checkpoint else None
        return ModelSource(model, entry, source, revision, checkpoint is None if offline is None else offline)
    if model is not None and checkpoint is not None:
        _check_unlisted(model)
        raise ModelError(
            f"--model {model} and --checkpoint {checkpoint} both name weights: give only one of them, or use "
            f"--checkpoint with one of the models {', '.join(registry())}"
        )
    source = model if model is not None else str(checkpoint)
    if checkpoint is None:
        _check_unlisted(source)
    listed = next((entry for entry in registry().values() if entry.checkpoint == source.partition("@")[0]), None)
    revision = listed.revision if listed is not None else None
    return ModelSource(name_of(source), listed, source, revision, bool(offline))


def named_source(name: str) -> ModelSource:
    """The model that a saved plan or profile names: a name of `configs/models.yaml`, or any weights."""
    return find_source(name) if name in registry() else find_source(checkpoint=name)


def name_of(source: str) -> str:
    """The name of unlisted weights in run names: the last part of a Hub id, or the name of the folder or file.

    For example `Qwen2.5-7B-Instruct` for `Qwen/Qwen2.5-7B-Instruct@main`, for a folder of that name, and for a folder
    of the Hub cache (`models--Qwen--Qwen2.5-7B-Instruct`, or a snapshot in it).
    """
    path = Path(source).expanduser()
    if is_packaged(source):
        name = path.stem
    elif path.exists():
        path = path.resolve()
        cached = [part for part in path.parts if part.startswith("models--")]
        name = cached[-1].split("--")[-1] if cached and path.is_dir() else path.name
        name = Path(name).stem if is_gguf(path) else name
    else:
        name = source.partition("@")[0].rpartition("/")[2]
    return NOT_IN_NAMES.sub("_", name)


def _check_unlisted(given: str) -> None:
    """Refuse a name that cannot be weights, or whose runs would have the name of a model in the registry."""
    path = Path(given).expanduser()
    if not given.strip():
        raise unknown_model(given)
    if not path.exists() and not is_packaged(given):
        if given.startswith(LOCAL_PREFIXES) or given.lower().endswith(".gguf"):
            raise ModelError(f"model {given!r} does not exist: no such folder or .gguf file")
        if not HUB_ID.fullmatch(given):
            raise unknown_model(given)
    if path.is_file() and not is_gguf(path):
        raise ModelError(
            f"model {given!r} is a file, but must be a folder with config.json and weights, or a .gguf file"
        )
    if (name := name_of(given)) in registry():
        raise ModelError(
            f"the runs of {given!r} would have the name of model {name} in configs/models.yaml: use --model {name} "
            f"--checkpoint {given} to run it as that model, or rename the folder"
        )


def read_architecture(path: Path) -> PreTrainedConfig:
    """The configuration of a folder or GGUF file.

    Raises:
        ModelError: it is not a causal language model that transformers supports.
    """
    if is_gguf(path):
        config = read_gguf_config(path)
        _check_causal(path, config.model_type, config.architectures or [])
        return config
    raw = read_config(path)
    with said_in_one_line(f"{path / 'config.json'} is not usable"):
        if raw["model_type"] == internlm.MODEL_TYPE:
            return internlm.llama_config(raw)
        _check_causal(path, raw["model_type"], raw.get("architectures") or [])
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def _check_causal(path: Path, model_type: str, classes: list[str]) -> None:
    expected = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    registered: Any = MODEL_FOR_CAUSAL_LM_MAPPING  # also what AutoModelForCausalLM.register has added
    if expected is None and model_type in CONFIG_MAPPING and CONFIG_MAPPING[model_type] in registered:
        expected = registered[CONFIG_MAPPING[model_type]].__name__
    if expected is None or (classes and expected not in classes):
        raise ModelError(
            f"{path} contains {', '.join(classes) or 'no named class'} of type {model_type!r}, which is not a causal "
            f"language model of transformers {transformers.__version__} (remote code is never run)"
        )


def _published(name: str, shape: Any) -> PreTrainedConfig:
    """The published configuration of a model, from `configs/models.yaml`."""
    with said_in_one_line(f"configs/models.yaml: the shape of {name} is not usable"):
        fields = {field: value for field, value in shape.items() if field != "model_type"}
        return internlm.llama_config(fields) if shape["model_type"] == internlm.MODEL_TYPE else LlamaConfig(**fields)
