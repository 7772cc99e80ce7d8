"""The configuration of a model that lacks some of its layers as a whole: every field that counts or lists layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from adaskip.engines.errors import ExportError

PER_LAYER = frozenset({"layer_types", "no_rope_layers", "mlp_layer_types"})
"""Lists with an entry for each layer."""
FIRST_LAYERS = frozenset({"max_window_layers", "first_k_dense_replace"})
"""Numbers of layers from the first one on that are of another kind than the rest."""
NO_LAYERS = frozenset({"eos_token_id", "bos_token_id", "pad_token_id", "architectures"})
"""Lists that say nothing of layers, however long."""


def shortened(config: PreTrainedConfig, live: Sequence[int]) -> dict[str, Any]:
    """The fields of `config` that differ in a model of its layers `live` alone.

    Lists are written out, also those that the configuration derives from a pattern: over fewer layers the pattern would
    come out differently.

    Raises:
        ExportError: a list has an entry for each layer, as far as one can tell, and is not known here.
    """
    depth = config.num_hidden_layers
    fields: dict[str, Any] = {"num_hidden_layers": len(live)}
    for name, value in config.to_dict().items():
        if name in PER_LAYER and value is not None:
            fields[name] = [value[layer] for layer in live]
        elif name in FIRST_LAYERS and value is not None:
            fields[name] = sum(layer < value for layer in live)
        elif isinstance(value, (list, tuple)) and len(value) == depth and name not in NO_LAYERS:
            raise ExportError(
                f"field {name} of {type(config).__name__} seems to have an entry for each of the {depth} layers, and "
                f"what becomes of it in a shorter model is not known; known: {', '.join(sorted(PER_LAYER))}"
            )
    return fields
