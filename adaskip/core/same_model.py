"""Identifies the model that a profile or plan was made for, and checks that another model is the same."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from adaskip.core.adapters import active_adapters
from adaskip.core.config_identity import config_fingerprint
from adaskip.core.fingerprint import weights_fingerprint
from adaskip.core.wrappers import unwrapped

logger = logging.getLogger(__name__)


def identity(model: nn.Module, name: str | None = None, fingerprint: str | None = None) -> dict[str, Any]:
    """The fields of a profile or plan that identify its model: model (a name), weights_fingerprint,
    config_fingerprint, adapter, hidden_size.

    name: default: that of the checkpoint. fingerprint: of the weights; None to compute it.
    """
    weights = fingerprint or weights_fingerprint(model)
    inner: Any = unwrapped(model)
    return {
        "model": str(name or getattr(inner.config, "name_or_path", "") or type(inner).__name__),
        "weights_fingerprint": weights,
        "adapter": active_adapters(inner),
        **config_identity(inner.config),
    }


def config_identity(config: Any) -> dict[str, Any]:
    """The part of `identity` that depends on the configuration: config_fingerprint and hidden_size."""
    hidden_size = config.get_text_config(decoder=True).hidden_size
    return {"config_fingerprint": config_fingerprint(config), "hidden_size": hidden_size}


def check_same_model(
    record: Any,
    known: Mapping[str, Any],
    num_layers: int,
    *,
    what: str,
    again: str,
    allow_other_weights: bool = False,
    error: type[ValueError] = ValueError,
) -> None:
    """Raise `error` unless `record` was made for this model.

    The number of layers and, if recorded, the hidden size must be equal. So must the fingerprint of the weights and, if
    recorded, the active adapter and the fingerprint of the configuration; with allow_other_weights, differences in
    these are only warned about.

    record: has `num_layers` and the fields of `identity`. known, num_layers: those of the model. what, again: the kind
    of the record and what to do instead, for the message.
    """
    if record.num_layers != num_layers:
        raise error(f"{what} of {record.model} has {record.num_layers} layers, but the model has {num_layers}")
    if record.hidden_size not in (None, known["hidden_size"]):
        raise error(
            f"{what} of {record.model} has hidden size {record.hidden_size}, but the model has {known['hidden_size']}"
        )
    differences = list(_differences(record, known))
    if not differences:
        return
    told = f"{what} was made for {record.model}{', and '.join(differences)}"
    if not allow_other_weights:
        raise error(
            f"{told}; {again}, or accept the difference with allow_other_weights=True (command line: "
            "--allow-other-weights)"
        )
    logger.warning("%s (%s); it is used anyway, because other weights are allowed", told, known["model"])


def _differences(record: Any, known: Mapping[str, Any]) -> Iterator[str]:
    """Describe differences in weights, adapter and configuration. None in a record means not recorded."""
    weights, adapter, config = (known[name] for name in ("weights_fingerprint", "adapter", "config_fingerprint"))
    if weights != record.weights_fingerprint:
        yield f" with weights {record.weights_fingerprint}, but this model's weights are {weights}"
    if record.adapter not in (None, adapter):
        yield f" with active adapter {record.adapter or 'none'!r}, but this model has {adapter or 'none'!r}"
    if record.config_fingerprint not in (None, config):
        yield (
            f" with another configuration (such as rope, windows or norms: its fingerprint is "
            f"{record.config_fingerprint}, this model's is {config})"
        )
