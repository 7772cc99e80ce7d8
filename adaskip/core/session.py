"""The state of one `skipping` context: chooses the plan under which each forward of the model runs.

The plan is chosen before masks and positions are built: in `prepare_inputs_for_generation` if `generate` runs, in the
decoder's own forward if the (uncompiled) model is called directly. One `Step` holds all that a forward needs; it
belongs to the thread that runs it, and the forwards of several threads take turns.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from transformers import CompileConfig, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from adaskip.core.blocks import find_decoder
from adaskip.core.boundary import Split
from adaskip.core.calls import GenerateCalls, Place
from adaskip.core.compiled import StepKind, compiled_steps
from adaskip.core.hf import CACHE, COMPILED_STEPS, NEXT_STEP, PREFILL, with_cache_name
from adaskip.core.kv_cache import held_scales, restore_emptied
from adaskip.core.layer_patch import StaysInPlace
from adaskip.core.patching import NOTHING, ModelPatches
from adaskip.core.plan import EMPTY_PLAN
from adaskip.core.prompts_only import PromptsOnly
from adaskip.core.refusals import check_cache, check_grows, check_holds_all, refusals, refuse_compiled_call
from adaskip.core.request import Request, RequestTrace
from adaskip.core.step import Here, Step
from adaskip.core.strategy import Strategy


class SkippingSession(StaysInPlace):
    """One `skipping` context, which tracks the requests that run through the model."""

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
        self.decoder = find_decoder(model)
        self.calls = GenerateCalls(patches)
        self._requests: WeakKeyDictionary[Cache, Request] = WeakKeyDictionary()
        self._last: Request | None = None
        self._here = Here()
        self._turn = threading.RLock()
        self._running: Step | None = None
        self._stock_forward: Any = self.decoder.forward
        self._signature = inspect.signature(self._stock_forward)
        self._prompts_only = PromptsOnly(strategy)

    @property
    def last_request(self) -> RequestTrace:
        """A record of the request of the latest step in any thread. Raises ValueError before the first request."""
        if self._last is None:
            raise ValueError("no request has run in this context yet")
        return self._last.trace

    def trace(self, cache: Cache) -> RequestTrace:
        """A record of the request with this KV cache. Raises ValueError if no request of this context has it."""
        if cache not in self._requests:
            raise ValueError("this KV cache belongs to no request of this context")
        return self._requests[cache].trace

    def prefilling(self):
        """A context in which direct calls of this thread are chunks of a prompt, even one token on a filled cache."""
        return self._declared("prefill")

    def decoding(self):
        """A context in which direct calls of this thread are decode steps, even of several tokens (a verification)."""
        return self._declared("decode")

    @contextmanager
    def _declared(self, kind: StepKind) -> Iterator[None]:
        before, self._here.kind = self._here.kind, kind
        try:
            yield
        finally:
            self._here.kind = before

    def overrides(self) -> dict[str, Any]:
        """The replacements, by name, for methods of the model while the context lasts."""
        stock_generate: Any = self.model.generate
        own = {
            "generate": self.calls.counted(stock_generate, self._check_call, self._forget_prepared),
            NEXT_STEP: self._wrapped_prepare(),
            COMPILED_STEPS: self.get_compiled_call,
        }
        return {**own, **refusals(self.model, self.strategy), PREFILL: self._marked_prefill()}

    def stay(self) -> None:
        """Make this a context that the model never leaves."""
        self.for_good = True
        self.patches.stay()

    def end(self, replaced: list[Place]) -> None:
        """End the context: wait for a running forward, restore what was `replaced`, and refuse every later step."""
        with self._turn:
            self.calls.end(replaced)
        self._prompts_only.warn()

    def _check_call(self) -> Callable[[], None]:
        """Called before a `generate`; returns a function that checks after it that the plan was applied."""
        self._here.prepared = None
        before = self._here.num_forwards

        def check() -> None:
            if self._here.num_forwards == before:
                raise ValueError(
                    f"{type(self.model).__name__} generated without the forward of its {type(self.decoder).__name__}: "
                    "nothing was skipped, the answer is the full model's"
                )

        return check

    def _forget_prepared(self) -> None:
        """Called when a `generate` has returned or failed: a step that it prepared and never ran holds its cache."""
        self._here.prepared = None

    def _marked_prefill(self) -> Callable[..., Any]:
        stock = getattr(self.model, PREFILL)

        @functools.wraps(stock)
        def prefill(*args, **kwargs):
            before, self._here.prefilling = self._here.prefilling, True
            try:
                return stock(*args, **kwargs)
            finally:
                self._here.prefilling = before

        return prefill

    def _wrapped_prepare(self) -> Callable[..., Any]:
        """The model's own `prepare_inputs_for_generation`, preceded by the choice of the step's plan."""
        stock: Any = self.model.prepare_inputs_for_generation

        @functools.wraps(stock)
        def prepare_inputs_for_generation(input_ids, *args, **kwargs):  # generate passes everything else by keyword
            self._check_open()
            cache = kwargs.get(CACHE)
            uncached = cache is None and kwargs.get("use_cache") is False
            if uncached and self.strategy.phase != "prefill":
                raise ValueError(f"phase {self.strategy.phase!r} needs the KV cache; call generate with use_cache=True")
            first = kwargs.get("is_first_iteration", False)
            whole = kwargs.get("next_sequence_length") is None and (self._here.prefilling or input_ids.shape[1] > 1)
            began_here = first or self.calls.here or (cache is None and not uncached)
            step = self._begin("prefill" if first or whole else "decode", cache, began_here=began_here)
            model_inputs = stock(input_ids, *args, **kwargs)
            ids = model_inputs.get("input_ids")
            step.tokens = ref(model_inputs["inputs_embeds"] if ids is None else ids)
            self._here.prepared = step
            return model_inputs

        return prepare_inputs_for_generation

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Callable[..., Any]:
        """Replaces the model's method of this name: returns the callable for the compiled steps of `generate`."""
        steps = compiled_steps(self.patches, compile_config)

        def compiled_call(**inputs):
            step = self._here.prepared
            if step is None or inputs.get(CACHE) is not step.cache:
                return self.model(**inputs)  # the model dropped its cache, so no graph fits this forward
            self._here.prepared = None

            def run():
                self._here.compiled = True
                try:
                    return steps.run(self.patches, step.kind, self.model, inputs, self.max_step_graphs)
                finally:
                    self._here.compiled = False

            return self._run(step, inputs.get("input_ids"), run)

        return compiled_call

    def forward(self, *args, **kwargs) -> Any:
        """The decoder's forward under the plan of its step, with the arguments and result of the stock forward."""
        if torch.compiler.is_compiling():
            if not self.patches.in_compiled_step:
                refuse_compiled_call()
            return self._stock_forward(*args, **kwargs)
        if self._here.compiled:  # a step through graphs of single layers, which already has its turn
            self._here.compiled = False
            return self._stock_forward(*args, **kwargs)
        prepared, self._here.prepared = self._here.prepared, None
        if prepared is not None and prepared.cache is not None and kwargs.get(CACHE) is prepared.cache:
            ids = kwargs.get("input_ids")
            if ids is not None and ids is prepared.tokens():  # the usual step
                return self._run(prepared, ids, self._forward_of(prepared, args, kwargs))
        return self._direct(prepared, args, kwargs)

    def _direct(self, prepared: Step | None, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run a forward whose plan depends on the arguments that reach the decoder."""
        options = self._named(args, kwargs)
        ids, embeds = options.get("input_ids"), options.get("inputs_embeds")
        tokens = embeds if ids is None else ids
        if tokens is None:
            return self._stock_forward(*args, **kwargs)  # which raises an error that names the missing argument
        given = cache = options.get(CACHE)
        if given is not None:
            check_cache(given)
        if cache is None and self._uses_cache(options):
            cache = DynamicCache(config=self.decoder.config)  # the decoder would make the same one, but only later
        if prepared is not None and prepared.is_for(tokens):
            step = prepared if given is prepared.cache else self._read_again(prepared, cache, tokens.shape[1])
            ids = step.token_ids() if ids is None else ids
            if given is None and cache is not None:
                self._requests[cache] = step.request
        else:
            step = self._begin(self._kind_of_direct_call(cache, tokens.shape[1]), cache)
        if cache is not given:
            args, kwargs = (), {**options, CACHE: cache}
        return self._run(step, ids, self._forward_of(step, args, kwargs))

    def _forward_of(self, step: Step, args: tuple, kwargs: dict[str, Any]) -> Callable[[], Any]:
        """The decoder's forward of a step; under a plan that keeps the K/V, the last token runs in the full model."""
        if not step.plan.keeps_kv:
            return functools.partial(self._stock_forward, *args, **kwargs)
        split = Split.of(self._named(args, kwargs), self.decoder.config)
        return functools.partial(split.run, self._stock_forward, lambda: self.patches.apply(EMPTY_PLAN))

    def _named(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call of the decoder by name."""
        bound = self._signature.bind_partial(*args, **with_cache_name(kwargs)).arguments
        return {**bound.pop("kwargs", {}), **bound}

    def _uses_cache(self, options: dict[str, Any]) -> bool:
        asked = options.get("use_cache")
        return bool(getattr(self.decoder.config, "use_cache", False) if asked is None else asked)

    def _kind_of_direct_call(self, cache: Cache | None, num_tokens: int) -> StepKind:
        """One token on a filled cache, or several declared so, are a decode step; everything else is prompt."""
        declared = self._here.kind
        if cache is None or declared == "prefill" or (declared is None and num_tokens > 1):
            return "prefill"
        # For one token a known static cache on CUDA counts as filled: reading its length would synchronise.
        known = self._requests.get(cache)
        if num_tokens == 1 and known is not None and known.num_forwards and _length_is_on_cuda(cache):
            return "decode"
        return "decode" if int(cache.get_seq_length()) > 0 else "prefill"

    def _run(self, step: Step, ids: Tensor | None, forward: Callable[[], Any]) -> Any:
        """Wait for the turn, run `forward` under the plan of `step`, and add to its learning window."""
        with self._turn:
            self._check_open()
            if self.decoder.training:
                raise ValueError(f"{type(self.model).__name__} was put in training mode inside skipping(...)")
            if self._running is not None:
                raise ValueError(
                    "the model was called from inside its own forward, which is not supported inside skipping(...)"
                )
            ffns = NOTHING if step.window is None else step.window.ffns
            turn, self._running, self._last = self.patches.turn, step, step.request
            turn.thread = threading.get_ident()
            try:
                self.patches.apply(step.plan, ffns)
                if not step.request.num_forwards:
                    self.patches.check_in_place(self.decoder)
                output = forward()
                self._here.num_forwards += 1
                step.request.num_forwards += 1
                self._prompts_only.count(step)
                if step.window is not None:
                    step.window.add(self.patches.take_ffn_io(), ids)
                return output
            except BaseException:
                if ffns:
                    self.patches.take_ffn_io()  # do not count a step that failed half-way
                raise
            finally:
                self._running = turn.thread = None

    def _begin(self, kind: StepKind, cache: Cache | None, *, began_here: bool = True) -> Step:
        """Choose the plan of the next forward, and free K/V that it no longer needs.

        began_here: whether the call may use a cache that no request of this context has filled.
        """
        request = None if cache is None else self._requests.get(cache)
        if request is None or kind == "prefill":
            kind, request = self._request_of(kind, cache, request, began_here)
        return self._step(kind, request, cache)

    def _request_of(
        self, kind: StepKind, cache: Cache | None, known: Request | None, began_here: bool
    ) -> tuple[StepKind, Request]:
        """(kind of the forward, its request): a new request if the cache is empty or unknown."""
        if cache is not None:
            check_cache(cache)
        filled = cache is not None and int(cache.get_seq_length()) > 0
        if known is None and not began_here and (cache is None or filled):
            raise ValueError(
                "a generate that began before skipping(...) was entered is still running on this model in another "
                "thread; enter the context after it is done"
            )
        if cache is None:
            return "prefill", Request(self.strategy, self.eos_token_ids)  # without a cache every call is a new prompt
        if known is not None and filled:
            if kind == "prefill":
                known.begin_turn()
            return kind, known
        if not filled:
            kind = "prefill"  # on an empty cache, whatever the caller declared
            restore_emptied(cache)
        request = Request(self.strategy, self.eos_token_ids, held=self.patches.held(cache))
        self._requests[cache] = request
        return kind, request

    def _step(self, kind: StepKind, request: Request, cache: Cache | None) -> Step:
        plan = request.prefill() if kind == "prefill" else request.decode()
        if plan.keeps_kv and cache is not None:
            check_grows(cache)
        if cache is not None and request.released is not plan:
            if request.strategy.is_prompt_only:
                check_holds_all(cache)
            if self.patches.scales_by_slot(plan.attention_only()) != held_scales(cache):
                self.patches.release(cache, plan)
            request.released = plan
        return Step(kind, request, cache, plan, request.window if kind == "decode" else None)

    def _read_again(self, prepared: Step, cache: Cache | None, num_tokens: int) -> Step:
        """The model dropped or replaced the request's cache: read prompt and answer so far as a new prefill."""
        if cache is not None and int(cache.get_seq_length()) > 0:
            raise ValueError(
                f"{type(self.model).__name__} replaced the request's KV cache by another filled one, which is not "
                "supported inside skipping(...)"
            )
        before = 0 if prepared.cache is None else int(prepared.cache.get_seq_length())
        if num_tokens <= before:
            raise ValueError(
                f"{type(self.model).__name__} dropped the KV cache of {before} tokens and continues with {num_tokens} "
                "tokens, without the earlier ones (a bug of this transformers release, fixed in later ones)"
            )
        prepared.request.start_anew()
        return self._step("prefill", prepared.request, cache)

    def _check_open(self) -> None:
        if self.calls.ended:
            raise ValueError("this skipping(...) context has ended; its requests cannot continue")


def _length_is_on_cuda(cache: Cache) -> bool:
    length = cache.get_seq_length()
    return isinstance(length, Tensor) and length.is_cuda
