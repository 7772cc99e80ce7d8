"""Reads arguments of the running `generate` that it does not pass on to a custom decoding method.

transformers passes neither streamer nor tokenizer nor assistant model to a `custom_generate`, but its frame has them.
"""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from typing import Any

from transformers.generation.streamers import BaseStreamer

from adaskip.core.hf import GENERATE_LOCALS, generate_arguments

TOKENIZER: ContextVar[Any] = ContextVar("TOKENIZER")
"""The tokenizer given to the running `generate`; set only inside `with lossless(model, strategy)`."""
UNSET = object()


def streamer_of_generate() -> BaseStreamer | None:
    """The streamer given to the running `generate`, which has already sent the prompt to it; None for none.

    Raises ValueError if it cannot be determined, and for arguments that a custom decoding method cannot support.
    """
    given = generate_arguments()
    if given is None or not given.keys() >= GENERATE_LOCALS:
        raise ValueError(
            "lossless(...) must be called by the generate method of transformers, whose streamer it reads; this call "
            "is not"
        )
    if given["assistant_model"] is not None:
        raise ValueError("lossless drafts with the model itself; leave assistant_model out")
    if given["synced_gpus"]:
        raise ValueError(
            "lossless does not support synced_gpus: its number of steps depends on the accepted drafts of each GPU"
        )
    return given["streamer"]


class SignatureOfDecodingMethod:
    """The `__signature__` of a decoding method: that of its `__call__`, unless `generate` needs a tokenizer.

    `generate` drops its tokenizer, inspects the signature of the decoding method, and then fails because the tokenizer
    is missing. Reading the signature is the last chance to tell the user the real reason.
    """

    def __get__(self, method: object | None, owner: type) -> inspect.Signature:
        if method is not None and TOKENIZER.get(UNSET) is UNSET:
            _refuse_what_needs_a_tokenizer((generate_arguments() or {}).get("generation_config"))
        raise AttributeError("__signature__")  # `inspect` then uses __call__


def _refuse_what_needs_a_tokenizer(config: Any) -> None:
    ways = {
        "stop_strings": ", or pass StopStringCriteria(tokenizer, stop_strings) in stopping_criteria",
        "token_healing": "",
    }
    for option, other_way in ways.items():
        if getattr(config, option, None):
            raise ValueError(
                f"{option} needs a tokenizer, which generate does not pass on to a custom_generate; call generate "
                f"inside `with lossless(model, strategy):`{other_way}"
            )
