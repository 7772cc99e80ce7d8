"""`with skipping(model, strategy): model.generate(...)`: sublayer skipping on a stock transformers model.

The plan of a step is chosen before masks and positions are built, in `prepare_inputs_for_generation` when `generate`
runs, in a forward pre-hook of the decoder when the (uncompiled) model is called directly.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from transformers import CompileConfig, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from adaskip.blocks import find_decoder, restore_attribute
from adaskip.compiled import MAX_STEP_GRAPHS, StepKind, compiled_steps
from adaskip.kv_cache import release_skipped, restore_emptied, skipped_layers
from adaskip.patching import NOTHING, ModelPatches, patches_of
from adaskip.request import LearningWindow, Request, RequestTrace
from adaskip.strategies.base import Strategy
from adaskip.token_ids import end_token_ids


@contextmanager
def skipping(
    model: PreTrainedModel,
    strategy: Strategy,
    *,
    eos_token_id: int | list[int] | None = None,
    max_step_graphs: int = MAX_STEP_GRAPHS,
) -> Iterator[SkippingSession]:
    """Skip sublayers of `model` as `strategy` says, as long as the context lasts.

    Works with `generate` (greedy, sampling, beams, chunked prefill, dynamic and static cache, left-padded batches) and
    with direct calls. State belongs to the request, which is as long-lived as its KV cache; the model is restored
    exactly on exit. A cache filled inside the context lacks the K/V of skipped attention and is of no use outside.

    eos_token_id: tokens that end a row, for the learning window of a batch; default: the model's generation config.
    Give it here, too, if you give `generate` another one.
    max_step_graphs: where `generate` compiles, the first so many sets of sublayers of the model get a graph of the
    whole step; later sets run from graphs of single layers, which serve them all.

    Two limits. A compiled model cannot be called directly (the choice of the plan would become part of the graph);
    `generate` compiles around it. In assisted decoding a decode step is a verification of several tokens, and so
    schedules and learning windows count verifications.

    Raises UnsupportedModelError for blocks that cannot be skipped and ValueError if the strategy was made for another
    number of layers, the model is in training mode, or the context is nested.
    """
    if not hasattr(model, "prepare_inputs_for_generation"):
        raise ValueError(f"{type(model).__name__} cannot generate; give the model with its language-model head")
    patches = patches_of(model)
    if strategy.num_layers != len(patches.patches):
        raise ValueError(
            f"strategy {strategy.name} was made for {strategy.num_layers} layers, "
            f"{type(model).__name__} has {len(patches.patches)}"
        )
    session = SkippingSession(model, strategy, patches, end_token_ids(model, eos_token_id), max_step_graphs)
    overrides = {
        "prepare_inputs_for_generation": session.wrap_prepare_inputs(),
        "get_compiled_call": session.get_compiled_call,
    }
    own = {name: model.__dict__.get(name) for name in overrides}
    with patches.install():
        hook = find_decoder(model).register_forward_pre_hook(session.before_forward, with_kwargs=True)
        try:
            model.__dict__.update(overrides)
            yield session
        finally:
            for name, value in own.items():
                restore_attribute(model, name, value)
            hook.remove()


class SkippingSession:
    """One `skipping` context: it follows the requests that run through the model."""

    def __init__(
        self,
        model: PreTrainedModel,
        strategy: Strategy,
        patches: ModelPatches,
        eos_token_ids: tuple[int, ...],
        max_step_graphs: int,
    ):
        self.model, self.strategy, self.patches, self.eos_token_ids = model, strategy, patches, eos_token_ids
        self.max_step_graphs = max_step_graphs
        self._requests: WeakKeyDictionary[Cache, Request] = WeakKeyDictionary()
        self._last: Request | None = None
        self._measuring: LearningWindow | None = None  # the window of the request whose step runs
        self._step_ids: Tensor | None = None
        self._prepared: Callable[[], Tensor | None] = lambda: None  # weakly, the input `generate` is about to run
        self._forced_kind: StepKind | None = None
        self._kind: StepKind = "prefill"
        self._signature = inspect.signature(find_decoder(model).forward)

    @property
    def last_request(self) -> RequestTrace:
        """What happened in the request of the latest step. Raises ValueError before the first one."""
        if self._last is None:
            raise ValueError("no request has run in this context yet")
        return self._last.trace

    @contextmanager
    def prefilling(self) -> Iterator[None]:
        """Direct calls inside are chunks of a prompt, also one-token chunks on a cache that is not empty."""
        self._forced_kind = "prefill"
        try:
            yield
        finally:
            self._forced_kind = None

    def wrap_prepare_inputs(self):
        """The model's own `prepare_inputs_for_generation`, preceded by the choice of the step's plan."""
        stock: Any = self.model.prepare_inputs_for_generation

        @functools.wraps(stock)
        def prepare_inputs_for_generation(input_ids, *args, **kwargs):  # generate passes all the rest by keyword
            cache = kwargs.get("past_key_values")
            if cache is None and self.strategy.phase != "prefill":
                raise ValueError(f"phase {self.strategy.phase!r} needs the KV cache; call generate with use_cache=True")
            fresh = kwargs.get("next_sequence_length") is None or kwargs.get("is_first_iteration", False)
            self._begin_step("prefill" if fresh else "decode", cache)
            model_inputs = stock(input_ids, *args, **kwargs)
            self._step_ids = model_inputs.get("input_ids")
            tokens = model_inputs["inputs_embeds"] if self._step_ids is None else self._step_ids
            self._prepared = ref(tokens)
            return model_inputs

        return prepare_inputs_for_generation

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Callable[..., Any]:
        """What `generate` runs its compiled steps by, in the place of the model's own method of that name."""
        steps = compiled_steps(self.patches, compile_config)

        def compiled_call(**inputs):
            return steps.run(self.patches, self._kind, self.model, inputs, self.max_step_graphs)

        return compiled_call

    def _is_prepared(self, tokens: Tensor) -> bool:
        """Whether the coming forward is the one `prepare_inputs_for_generation` has just chosen the plan for."""
        prepared = self._prepared()
        if prepared is None:
            return False
        moved = prepared.device != tokens.device and prepared.shape == tokens.shape  # by a device hook
        embedded = tokens.dim() == 3 and prepared.shape == tokens.shape[:2]  # by a wrapper around the decoder
        return prepared is tokens or moved or embedded

    def before_forward(self, decoder: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Forward pre-hook of the decoder: chooses the plan of a direct call."""
        if torch.compiler.is_compiling():
            if not self.patches.in_compiled_step:
                _refuse_compiled_call()
            return None
        if (ids := kwargs.get("input_ids")) is not None and ids is self._prepared():
            return None  # the usual decode step of `generate`
        bound = self._signature.bind_partial(*args, **kwargs).arguments
        options = {**bound, **bound.get("kwargs", {})}
        ids, embeds = options.get("input_ids"), options.get("inputs_embeds")
        tokens = embeds if ids is None else ids
        if tokens is None or self._is_prepared(tokens):
            return None
        cache, made = options.get("past_key_values"), {}
        if cache is None and self._uses_cache(decoder, options):
            cache = DynamicCache(config=decoder.config)  # what the decoder would make itself, but after this hook
            made["past_key_values"] = cache
        self._begin_step(self._kind_of_direct_call(cache, tokens.shape[1]), cache)
        self._step_ids = ids
        if not made:
            return None
        positional = list(self._signature.parameters)[: len(args)]
        return (), {**dict(zip(positional, args, strict=True)), **kwargs, **made}

    @staticmethod
    def _uses_cache(decoder: Any, options: dict[str, Any]) -> bool:
        asked = options.get("use_cache")
        return bool(getattr(decoder.config, "use_cache", False) if asked is None else asked)

    def _kind_of_direct_call(self, cache: Cache | None, num_tokens: int) -> StepKind:
        """A single token on a filled cache is a decode step, everything else a prompt or a chunk of one."""
        if self._forced_kind is not None:
            return self._forced_kind
        if cache is None or num_tokens > 1:
            return "prefill"
        # Asking a static cache on CUDA for its length would wait for the device: there a known cache counts as filled.
        if cache in self._requests and _length_is_on_cuda(cache):
            return "decode"
        return "decode" if int(cache.get_seq_length()) > 0 else "prefill"

    def _begin_step(self, kind: StepKind, cache: Cache | None) -> None:
        """Choose and apply the plan of the coming forward, and let go of K/V that it no longer needs."""
        self._finish_measuring()
        self._kind = kind
        request = self._last = self._request_of(cache, kind)
        plan = request.prefill() if kind == "prefill" else request.decode()
        self._measuring = request.window if kind == "decode" else None
        self.patches.apply(plan, NOTHING if self._measuring is None else self._measuring.ffns)
        if cache is not None and request.released is not plan:
            if not plan.attention <= skipped_layers(cache):
                release_skipped(cache, plan.attention, len(self.patches.patches))
            request.released = plan

    def _request_of(self, cache: Cache | None, kind: StepKind) -> Request:
        if cache is None:
            return Request(self.strategy, self.eos_token_ids)
        request = self._requests.get(cache)
        used = request is not None or bool(skipped_layers(cache))
        emptied = kind == "prefill" and used and int(cache.get_seq_length()) == 0
        if emptied:
            restore_emptied(cache)
        if request is None or emptied:
            request = Request(self.strategy, self.eos_token_ids, held=skipped_layers(cache))
            self._requests[cache] = request
        return request

    def _finish_measuring(self) -> None:
        """Fold what the previous decode step kept into the window of its request."""
        window, self._measuring = self._measuring, None
        if window is None:
            return
        ffn_io = self.patches.take_ffn_io()
        if ffn_io.keys() == window.ffns:  # a step that failed half-way does not count
            window.add(ffn_io, self._step_ids)


@torch.compiler.disable()
def _refuse_compiled_call() -> None:
    raise ValueError(
        "a compiled model was called directly inside skipping(...), where its graph would keep the plan of its first "
        "call; call the model itself, or generate with a static cache, which compiles a graph for each plan"
    )


def _length_is_on_cuda(cache: Cache) -> bool:
    length = cache.get_seq_length()
    return isinstance(length, Tensor) and length.is_cuda
