"""`with lossless(model, strategy):` makes every `generate` call of the model draft and verify, even in pipelines."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from adaskip.core.blocks import restore_attribute
from adaskip.core.hf import HEALING, STOPPING
from adaskip.core.patching import patches_of
from adaskip.speculative.generate_call import TOKENIZER


class _Override:
    """A method of one model object while the context lasts. Refuses copies: a copy of the model would keep it."""

    def __init__(self, stock: Any):
        self.stock = stock
        functools.update_wrapper(self, stock)  # pyright: ignore[reportArgumentType]

    def __reduce_ex__(self, protocol):
        raise ValueError("the model is inside `with lossless(...)`; copy or pickle it outside of the context")


class _Generate(_Override):
    """`generate` with `decoder` as its decoding method."""

    def __init__(self, stock: Any, decoder: Callable[..., Any]):
        super().__init__(stock)
        self.decoder = decoder

    def __call__(self, *args, tokenizer: Any = None, custom_generate: Any = None, **kwargs):
        if custom_generate is not None and custom_generate is not self.decoder:
            raise ValueError("inside `with lossless(...)` generate uses lossless; leave custom_generate out")
        if kwargs.get("cache_implementation") == "paged":
            raise ValueError("lossless needs a dynamic KV cache; got cache_implementation='paged'")
        before = TOKENIZER.set(tokenizer)
        try:
            return self.stock(*args, custom_generate=self.decoder, **kwargs)
        finally:
            TOKENIZER.reset(before)


class _WithTokenizer(_Override):
    """A method that `generate` calls without its tokenizer; this override adds the tokenizer."""

    def __call__(self, *args, **kwargs):
        bound = inspect.signature(self.stock).bind(*args, **kwargs)
        if bound.arguments.get("tokenizer") is None:
            bound.arguments["tokenizer"] = TOKENIZER.get(None)
        return self.stock(*bound.args, **bound.kwargs)


@contextmanager
def lossless_generate(model: PreTrainedModel, decoder: Callable[..., Any]) -> Iterator[None]:
    """A context in which `model.generate` uses `decoder`; on exit the model is restored exactly.

    Raises ValueError if the model is already inside such a context, or inside `skipping`.
    """
    with patches_of(model).drafts():
        overrides = {
            "generate": _Generate(model.generate, decoder),
            **{name: _WithTokenizer(getattr(model, name)) for name in (STOPPING, HEALING)},
        }
        own = {name: model.__dict__.get(name) for name in overrides}
        try:
            model.__dict__.update(overrides)
            yield
        finally:
            for name, value in own.items():
                restore_attribute(model, name, value)
