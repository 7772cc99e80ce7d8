"""`lossless(model, strategy)`: the decoding method to give `generate`."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from adaskip.core.model_plan import strategy_of
from adaskip.core.patching import ModelPatches, patches_of
from adaskip.core.plan import SkipPlan
from adaskip.core.strategy import Strategy
from adaskip.core.wrappers import unwrapped
from adaskip.speculative.checks import check_request
from adaskip.speculative.draft_length import AdaptiveDraftLength, FixedDraftLength
from adaskip.speculative.forwards import Forwards
from adaskip.speculative.generate_call import SignatureOfDecodingMethod, streamer_of_generate
from adaskip.speculative.lossless_generate import lossless_generate
from adaskip.speculative.processors import check_stateless, for_draft
from adaskip.speculative.rounds import Rounds
from adaskip.speculative.statistics import DraftStatistics


def lossless(
    model: Any,
    strategy: Strategy | SkipPlan,
    *,
    gamma: int | None = None,
    draft_cost: float | None = None,
    streamer: BaseStreamer | None = None,
    stateless: Iterable[type] = (),
) -> LosslessDecoder:
    """The full model's output, drafted by the skipped model. Two ways to use it:

        model.generate(**inputs, custom_generate=lossless(model, strategy))

        with lossless(model, strategy):  # whoever calls the model's generate: pipelines, other libraries
            model.generate(**inputs, streamer=streamer, stop_strings=["User:"], tokenizer=tokenizer)

    Greedy decoding gives the tokens of the full model; sampling draws from the full model's distribution (other draws
    than without drafting, the same ones for the same seed). Logits processors, stopping criteria and streamers act as
    in `generate`: each is called once for every token, in order. One sequence at a time, with or without left padding,
    on a dynamic KV cache; anything else is refused with a ValueError.

    Identical means: in exact arithmetic. Verifying several tokens at once sums in another order than one at a time, so
    where two tokens are equally likely up to rounding, either may win, as with any other batch size or kernel. float32
    leaves hardly any such ties, bfloat16 some.

    model: also a wrapper whose `generate` runs the model's own: PEFT, `torch.compile`.
    strategy: its `decode_plan` drafts; online learning is off, since the verification mends what the draft gets wrong.
    Of a plan, its set drafts, also one made for other weights of this shape, with a warning.
    gamma: tokens of every draft; default: as many as pay, by the acceptance seen so far (`AdaptiveDraftLength`).
    draft_cost: time that one drafted token costs, in decode steps of the full model; default: the share of sublayers
    that still run, as if all sublayers cost alike and verifying a few tokens cost as much as decoding one.
    streamer: for calls of `generate` that are given none.
    stateless: further classes of logits processors that keep no state from call to call. They act on drafts, too, as
    the stateless ones of transformers do, and more drafted tokens are accepted. One that does keep state makes the
    output wrong.

    `stop_strings` and `token_healing` need a tokenizer, which transformers passes to no `custom_generate`: use them
    inside the context, or give `StopStringCriteria(tokenizer, stop_strings)` among the stopping_criteria.

    One request of a model runs at a time: a second thread's is refused with a ValueError, and the first goes on.
    Continuous batching (`generate_batch`, `cache_implementation="paged"`) knows no decoding methods: it runs the full
    model, inside the context, too.

    Raises UnsupportedModelError and ValueError as `skipping` does.
    """
    strategy = strategy_of(strategy, unwrapped(model), allow_other_weights=True)
    return LosslessDecoder(
        model, strategy, gamma=gamma, draft_cost=draft_cost, streamer=streamer, stateless=check_stateless(stateless)
    )


class LosslessDecoder:
    """A decoding method for `generate`, and a context. statistics: of all its requests; last_request: of the latest.

    A copy decodes for a copy of the model.
    """

    __signature__ = SignatureOfDecodingMethod()

    def __init__(
        self,
        model: Any,
        strategy: Strategy,
        *,
        gamma: int | None,
        draft_cost: float | None,
        streamer: BaseStreamer | None,
        stateless: frozenset[type],
    ):
        self.model: PreTrainedModel = unwrapped(model)
        self.strategy, self.gamma, self.streamer, self.stateless = strategy, gamma, streamer, stateless
        if not hasattr(self.model, "prepare_inputs_for_generation"):
            raise ValueError(
                f"{type(self.model).__name__} cannot generate; give the model with its language-model head"
            )
        num_layers = len(self._patches().patches)
        if gamma is not None and (gamma < 1 or draft_cost is not None):
            raise ValueError(
                f"gamma is a fixed draft length of at least 1 token, without draft_cost; got {gamma}, {draft_cost}"
            )
        if draft_cost is not None and not draft_cost > 0:
            raise ValueError(f"draft_cost is a positive multiple of a decode step; got {draft_cost}")
        live = 1.0 - len(strategy.skipped) / (2 * num_layers)
        self.draft_cost = live if draft_cost is None else draft_cost
        self.statistics = DraftStatistics()
        self.last_request = DraftStatistics()
        self._context: AbstractContextManager[None] | None = None

    def __enter__(self) -> LosslessDecoder:
        context = lossless_generate(self.model, self)
        context.__enter__()
        self._context = context
        return self

    def __exit__(self, *exception) -> None:
        assert self._context is not None
        context, self._context = self._context, None
        context.__exit__(*exception)

    def _patches(self) -> ModelPatches:
        """Of the model as it is now: it may have been changed, or this decoder copied together with it."""
        patches = patches_of(self.model)
        if self.strategy.num_layers != len(patches.patches):
            raise ValueError(
                f"strategy {self.strategy.name} was made for {self.strategy.num_layers} layers, "
                f"{type(self.model).__name__} has {len(patches.patches)}"
            )
        return patches

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs,
    ) -> GenerateDecoderOnlyOutput | Tensor:
        """Called by `generate`. input_ids: [1, S]. Returns what `generate` returns for one beam."""
        if model is not self.model:
            raise ValueError("this lossless(...) was made for another model object; make one for the model at hand")
        given = streamer_of_generate()
        if given is not None and self.streamer is not None and given is not self.streamer:
            raise ValueError("lossless(...) and generate were given two streamers; give one of them one")
        check_request(model, input_ids, generation_config, model_kwargs)
        request = DraftStatistics(requests=1)
        with self._patches().install() as patches:
            self.last_request = request
            forwards = Forwards(model, patches, input_ids, generation_config, model_kwargs)
            rounds = Rounds(
                forwards=forwards,
                strategy=self.strategy,
                length=AdaptiveDraftLength(self.draft_cost) if self.gamma is None else FixedDraftLength(self.gamma),
                process=logits_processor,
                process_draft=for_draft(logits_processor, self.stateless),
                stop=stopping_criteria,
                config=generation_config,
                streamer=self.streamer if given is None else given,
                statistics=request,
            )
            if given is None and self.streamer is not None:
                self.streamer.put(input_ids.cpu())
            try:
                sequences = rounds.run(input_ids)
            finally:
                forwards.stop_recording()
        self.statistics += request
        if not generation_config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,  # pyright: ignore[reportArgumentType]
            scores=rounds.scores,  # pyright: ignore[reportArgumentType]
            logits=rounds.logits,  # pyright: ignore[reportArgumentType]
            past_key_values=forwards.cache,
        )
