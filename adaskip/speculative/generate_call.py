"""What the `generate` that is running was given and does not hand on to its decoding method.

transformers passes neither streamer nor tokenizer nor assistant to a `custom_generate`, but they are in its frame.
"""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from typing import Any

from transformers.generation.streamers import BaseStreamer

from adaskip.core.hf import GENERATE_LOCALS, generate_arguments

TOKENIZER: ContextVar[Any] = ContextVar("TOKENIZER")
"""What the running `generate` was given as its tokenizer; set inside `with lossless(model, strategy)` alone."""
LOST = object()


def streamer_of_generate() -> BaseStreamer | None:
    """The streamer that the running `generate` was given, which has shown it the prompt already.

    Raises ValueError where it cannot be told, and for arguments under which a custom decoding method cannot be right.
    """
    given = generate_arguments()
    if given is None or not given.keys() >= GENERATE_LOCALS:
        raise ValueError(
            "lossless(...) is called by transformers' own generate, whose streamer it looks up; this call does not "
            "come from there"
        )
    if given["assistant_model"] is not None:
        raise ValueError("lossless drafts by the model itself; leave assistant_model off")
    if given["synced_gpus"]:
        raise ValueError(
            "lossless takes as many steps as drafts are accepted, never in step with other GPUs; got synced_gpus"
        )
    return given["streamer"]


class SignatureOfDecodingMethod:
    """The `__signature__` of a decoding method: that of its `__call__`, unless `generate` needs a tokenizer.

    `generate` drops the tokenizer it was given, asks for the decoding method's signature, and then fails for want of a
    tokenizer. The signature is the last moment to tell the user the true reason.
    """

    def __get__(self, method: object | None, owner: type) -> inspect.Signature:
        if method is not None and TOKENIZER.get(LOST) is LOST:
            _refuse_what_needs_a_tokenizer((generate_arguments() or {}).get("generation_config"))
        raise AttributeError("__signature__")  # `inspect` goes on to __call__


def _refuse_what_needs_a_tokenizer(config: Any) -> None:
    ways = {
        "stop_strings": ", or give it StopStringCriteria(tokenizer, stop_strings) among the stopping_criteria",
        "token_healing": "",
    }
    for option, other_way in ways.items():
        if getattr(config, option, None):
            raise ValueError(
                f"{option} needs a tokenizer, which transformers' generate does not pass on to a custom_generate; call "
                f"generate inside `with lossless(model, strategy):`{other_way}"
            )
