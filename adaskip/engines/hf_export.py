"""Export for transformers: a plain shorter checkpoint of whole layers, else folded weights beside their plan."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from adaskip.core.blocks import decoder_layers
from adaskip.core.plan import SkipPlan
from adaskip.engines.checkpoint import write_checkpoint
from adaskip.engines.errors import ExportError
from adaskip.engines.families import LAYER_TENSOR, Edit, family_of
from adaskip.engines.loading import load_without, marked_config, read_config
from adaskip.engines.registry import Export
from adaskip.engines.shorter import shortened
from adaskip.engines.verify import LOADED_AS, allowed_distance, compare

logger = logging.getLogger(__name__)


def check(export: Export) -> None:
    """Raise ExportError for what cannot be folded, and for quantised or float64 checkpoints."""
    edit_of(export)
    if export.source.is_quantised:
        raise ExportError(
            f"{export.source.folder} holds quantised weights; export the checkpoint that they were made of"
        )
    allowed_distance(export.source, export.folded)
    if export.folded.is_whole_layers:
        shortened(export.source.config, export.folded.live_layers)


def edit_of(export: Export) -> Edit:
    """What becomes of each tensor of the source."""
    return Edit(export.folded, family_of(export.source.model_type), export.source.tensor_files)


def write(export: Export, target: Path) -> None:
    """Fill `target` with the smaller checkpoint."""
    folded, source = export.folded, export.source
    if folded.is_whole_layers:
        places = {layer: place for place, layer in enumerate(folded.live_layers)}
        config, rename = shortened(source.config, folded.live_layers), lambda name: renumbered(name, places)
        if (source.config.rope_parameters or {}).get("rope_type") == "dynamic":
            logger.warning(
                "stock classes raise the base of dynamic NTK rope with each token above %d; adaskip.from_pretrained "
                "keeps that of the prompt, as skipping does",
                source.config.max_position_embeddings,
            )
    else:
        config, rename = marked_config(source.model_type, skipped(export)), str
    write_checkpoint(source, target, edit_of(export), config=config, rename=rename)


def verify(export: Export, target: Path) -> dict[str, Any]:
    """Compare logits; of a shorter checkpoint also every setting of its layers with that of the source's layer."""
    if not export.folded.is_whole_layers:
        config, plan = read_config(target)
        return compare(export.source, export.strategy, lambda: load_without(target, config, plan, **LOADED_AS))
    live, depth = export.folded.live_layers, export.folded.num_layers

    def settings(model: PreTrainedModel) -> list[dict[str, Any]]:
        layers = list(decoder_layers(model))
        return [_settings(layer) for layer in ([layers[i] for i in live] if len(layers) == depth else layers)]

    def load() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(target, trust_remote_code=False, **LOADED_AS).eval()

    return compare(export.source, export.strategy, load, settings=settings)


def skipped(export: Export) -> SkipPlan:
    """The plan without its scales, which are in the weights."""
    return SkipPlan(export.strategy.skipped.attention, export.strategy.skipped.ffn)


def renumbered(name: str, places: dict[int, int]) -> str:
    """The name of a tensor whose layer moves to another place."""
    match = LAYER_TENSOR.fullmatch(name)
    return name if match is None else f"model.layers.{places[int(match[1])]}.{match[2]}"


def _settings(layer: nn.Module) -> dict[str, Any]:
    """The plain attributes of a layer and its parts, such as a sliding window; not its place."""
    return {
        f"{path}.{name}": value
        for path, module in layer.named_modules()
        for name, value in vars(module).items()
        if name != "layer_idx" and isinstance(value, (bool, int, float, str))
    }
