"""`with skipping(model, strategy): model.generate(...)`: sublayer skipping on a stock transformers model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from adaskip.core.compiled import MAX_STEP_GRAPHS
from adaskip.core.hf import NEXT_STEP
from adaskip.core.model_plan import strategy_of
from adaskip.core.patching import patches_of
from adaskip.core.plan import SkipPlan
from adaskip.core.session import SkippingSession
from adaskip.core.strategy import Strategy
from adaskip.core.token_ids import end_token_ids
from adaskip.core.wrappers import unwrapped


@contextmanager
def skipping(
    model: PreTrainedModel,
    strategy: Strategy | SkipPlan,
    *,
    allow_other_weights: bool = False,
    eos_token_id: int | list[int] | None = None,
    max_step_graphs: int = MAX_STEP_GRAPHS,
) -> Iterator[SkippingSession]:
    """Skip sublayers of `model` as `strategy`, or a plan, says, as long as the context lasts.

    Works with `generate` (greedy, sampling, beams, chunked prefill, dynamic and static cache, left-padded batches) and
    with direct calls. State belongs to the request, which is as long-lived as its KV cache; the model is restored
    exactly on exit. A cache filled inside the context lacks the K/V of skipped attention and is of no use outside. With
    `output_attentions` only live attentions return weights: the tuple has one entry for each of them, in order.

    model: also one wrapped by `torch.compile`, PEFT (LoRA and the like) or DistributedDataParallel; skipping takes
    hold of the transformers model inside. Copies and pickles of a model made inside the context are refused.
    strategy: of a plan its set is skipped in the phase it was made for, e2e where it says none.
    allow_other_weights: use a plan that was made for other weights, another adapter or configuration of this shape.
    eos_token_id: tokens that end a row, for the learning window of a batch; default: the model's generation config.
    Give it here, too, if you give `generate` another one.
    max_step_graphs: where `generate` compiles, the first so many sets of sublayers of the model get a graph of the
    whole step; later sets run from graphs of single layers, which serve them all.

    Prompt or answer: a forward counts by what reaches the decoder. In a direct call one token on a filled cache is a
    decode step and everything else prompt, unless `session.prefilling()` or `session.decoding()` declares it. Where a
    model drops its KV cache on the way (Phi-3 with longrope), prompt and answer are read again as a prompt.

    Threads: the context holds for the model object, in every thread. Several threads may run requests of their own;
    their forwards take turns, with the output each would have alone. A `generate` that began before the context, or
    outlives it, is refused at its next step. A hook that waits for another thread's forward would wait for ever.

    Refused before anything runs: continuous batching (`generate_batch`, a paged cache), `assistant_early_exit`, and
    assisted decoding under a strategy whose plan changes between prompt and answer or in the answer. A compiled model
    cannot be called directly (the choice of the plan would become part of the graph); `generate` compiles around it.

    Raises UnsupportedModelError for blocks that cannot be skipped and ValueError if the strategy was made for another
    number of layers or the plan for another model, the model is in training mode, or the context is nested.
    """
    model = unwrapped(model)
    if not hasattr(model, NEXT_STEP):
        raise ValueError(f"{type(model).__name__} cannot generate; give the model with its language-model head")
    patches = patches_of(model)
    strategy = strategy_of(strategy, model, allow_other_weights=allow_other_weights)
    if strategy.num_layers != len(patches.patches):
        raise ValueError(
            f"strategy {strategy.name} was made for {strategy.num_layers} layers, "
            f"{type(model).__name__} has {len(patches.patches)}"
        )
    patches.check(strategy.skipped)
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
