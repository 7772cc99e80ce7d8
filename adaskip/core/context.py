"""`with skipping(model, strategy): model.generate(...)`: sublayer skipping on a stock transformers model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from adaskip.core.compiled import MAX_STEP_GRAPHS
from adaskip.core.hf import NEXT_STEP, has_unguarded_graphs
from adaskip.core.model_plan import strategy_of
from adaskip.core.patching import ModelPatches, patches_of, refuse_for_good
from adaskip.core.plan import SkipPlan
from adaskip.core.session import SkippingSession
from adaskip.core.strategy import Strategy
from adaskip.core.token_ids import end_token_ids
from adaskip.core.wrappers import unwrapped

logger = logging.getLogger(__name__)


@contextmanager
def skipping(
    model: PreTrainedModel,
    strategy: Strategy | SkipPlan,
    *,
    allow_other_weights: bool = False,
    eos_token_id: int | list[int] | None = None,
    max_step_graphs: int = MAX_STEP_GRAPHS,
) -> Iterator[SkippingSession]:
    """Skip sublayers of `model` according to a strategy or plan while the context lasts.

    Works with `generate` (greedy, sampling, beams, chunked prefill, dynamic and static caches, left-padded batches) and
    with direct calls. State belongs to a request, which lives as long as its KV cache; the model is restored exactly on
    exit. A cache filled inside the context lacks the K/V of skipped attentions and cannot be used outside, unless the
    strategy keeps them. With `output_attentions` only live attentions return weights: the tuple has one entry for each
    of them, in order.

    model: may be wrapped by `torch.compile`, PEFT (LoRA and similar) or DistributedDataParallel; the transformers model
    inside the wrapper is patched. Copying or pickling a model inside the context is refused.
    strategy: a strategy, or a plan, which is used in the phase it was made for (e2e if it does not say).
    allow_other_weights: accept a plan that was made for other weights, another adapter or configuration of this shape.
    eos_token_id: tokens that end a row, used by the learning window of a batch; default: those of the model's
    generation config. Give it here, too, if you pass a different one to `generate`.
    max_step_graphs: if `generate` compiles, this many sets of sublayers of the model get a graph of the whole step;
    later sets run through graphs of single layers, which all sets share.

    Prompt or answer: in a direct call, one token on a filled cache is a decode step and everything else is prompt,
    unless `session.prefilling()` or `session.decoding()` declares otherwise. If a model drops its KV cache half-way
    (Phi-3 with longrope), prompt and answer so far are read again as a prompt.

    Threads: the context applies to the model object, in every thread. Several threads may run their own requests;
    their forwards take turns, and each gets the output it would get alone. A `generate` that began before the context,
    or outlives it, is refused at its next step. A hook that waits for the forward of another thread would deadlock.

    Refused before anything runs: continuous batching (`generate_batch`, a paged cache), `assistant_early_exit`, and
    assisted decoding under a strategy whose plan changes between prompt and answer or during the answer. A compiled
    model cannot be called directly (the choice of the plan would become part of the graph); use `generate`, which
    compiles a graph per plan.

    Raises UnsupportedModelError for layers that cannot be skipped, and ValueError if the strategy was made for another
    number of layers or the plan for another model, the model is in training mode, or the context is nested.
    """
    model = unwrapped(model)
    _check_head(model)
    refuse_for_good(model)  # before a plan is compared with its weights, some of which are absent
    strategy = strategy_of(strategy, model, allow_other_weights=allow_other_weights)
    patches = patches_for(model, strategy)
    for plan in (strategy.skipped, strategy.prefill_plan):
        patches.check(plan)
    if has_unguarded_graphs():
        logger.warning(
            "Python 3.13.0: a compiled model that was called before skipping(...) does not notice it, and skips "
            "nothing if it is called directly; call the model itself or generate, or use Python 3.13.1"
        )
    session = SkippingSession(model, strategy, patches, end_token_ids(model, eos_token_id), max_step_graphs)
    with patches.install(exclusive=False):
        overrides = session.overrides()
        decoder = session.decoder
        own = [(model, name, model.__dict__.get(name)) for name in overrides]
        own.append((decoder, "forward", decoder.__dict__.get("forward")))
        try:
            model.__dict__.update(overrides)
            decoder.__dict__["forward"] = session.forward
            yield session
        finally:
            session.end(own)


def patches_for(model: PreTrainedModel, strategy: Strategy) -> ModelPatches:
    """The patches of a model; ValueError if it cannot generate or the strategy is for another number of layers."""
    _check_head(model)
    patches = patches_of(model)
    if strategy.num_layers != len(patches.patches):
        raise ValueError(
            f"strategy {strategy.name} was made for {strategy.num_layers} layers, "
            f"{type(model).__name__} has {len(patches.patches)}"
        )
    return patches


def _check_head(model: PreTrainedModel) -> None:
    if not hasattr(model, NEXT_STEP):
        raise ValueError(f"{type(model).__name__} cannot generate; pass the model with its language-model head")
