"""`lossless(model, strategy)`: a custom decoding method for `generate`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from adaskip.core.context import patches_for
from adaskip.core.hf import CACHE, pad_token_of
from adaskip.core.model_plan import strategy_of
from adaskip.core.plan import SkipPlan
from adaskip.core.strategy import Strategy
from adaskip.core.token_ids import end_token_ids
from adaskip.core.wrappers import unwrapped
from adaskip.speculative.accepting import Acceptance
from adaskip.speculative.batch_checks import check_batch
from adaskip.speculative.batch_forwards import BatchForwards
from adaskip.speculative.batch_rounds import BatchRounds, Row
from adaskip.speculative.checks import check_request
from adaskip.speculative.choice import BatchNoise, Greedy, RowSampling, Sampling
from adaskip.speculative.drafting import Drafting, FixedLength
from adaskip.speculative.forwards import ForwardRunner
from adaskip.speculative.generate_call import SignatureOfDecodingMethod, streamer_of_generate
from adaskip.speculative.lossless_generate import lossless_generate
from adaskip.speculative.ngrams import NGrams
from adaskip.speculative.processors import check_stateless, for_draft, for_row
from adaskip.speculative.rounds import Rounds
from adaskip.speculative.skipped_model import SkippedModel
from adaskip.speculative.statistics import DraftStatistics
from adaskip.speculative.step_costs import StepCosts

MOST_SETS = 4
"""Sets that may draft in one request; each costs tries while it does not pay."""


def lossless(
    model: Any,
    strategy: Strategy | SkipPlan | Sequence[Strategy | SkipPlan],
    *,
    gamma: int | None = None,
    streamer: BaseStreamer | None = None,
    stateless: Iterable[type] = (),
) -> LosslessDecoder:
    """Decode with drafts of the skipped model and of n-grams, and the full model as verifier. Two ways to use it:

        model.generate(**inputs, custom_generate=lossless(model, strategy))

        with lossless(model, strategy):  # for code that calls the model's generate: pipelines, other libraries
            model.generate(**inputs, streamer=streamer, stop_strings=["User:"], tokenizer=tokenizer)

    Greedy decoding returns the tokens of the full model, sampling those that the full model samples with the same seed,
    whatever is drafted. Logits processors, stopping criteria and streamers work as in `generate`: each is called once
    per token, in order. Supported are one sequence and batches of up to 8 rows, with or without left padding, on a
    dynamic KV cache; everything else raises ValueError. In a batch only n-grams draft, processors, criteria and
    attention must be known to work row by row (`check_batch`), and there is no streamer.

    The output is identical in exact arithmetic. Verifying several tokens at once sums in a different order than one at
    a time, so if two tokens are equally likely up to rounding, either may be chosen, as with another batch size or
    kernel. Such ties are very rare in float32; in bfloat16 many long answers meet one.

    model: may be a wrapper whose `generate` runs the model's own: PEFT, `torch.compile`.
    strategy: its `decode_plan` drafts. Online learning is off, since verification corrects a wrong draft.
    A plan drafts with its set, an empty plan leaves all drafts to n-grams; if it was made for other weights of this
    shape, a warning is logged. Of several, up to `MOST_SETS`, each draft is made with the one that promises the most
    tokens per second: give a few budgets of one strategy where the best one is not known.
    gamma: number of tokens of every draft, all by the skipped model, which then has one strategy; default: source and
    length follow from the times and acceptance rates of the request (`Drafting`).
    streamer: used for calls of `generate` without a streamer.
    stateless: further classes of logits processors that keep no state between calls. Like the stateless processors of
    transformers they are applied to drafts, too, so that more drafted tokens are accepted. A class that does keep state
    makes the output wrong.

    `stop_strings` and `token_healing` need a tokenizer, which transformers does not pass to a `custom_generate`: use
    them inside the context, or pass `StopStringCriteria(tokenizer, stop_strings)` in stopping_criteria.

    A model runs one request at a time: a request from a second thread raises ValueError, and the first continues.
    Continuous batching (`generate_batch`, `cache_implementation="paged"`) does not use decoding methods: it runs the
    full model, even inside the context.

    Raises UnsupportedModelError and ValueError like `skipping`.
    """
    given: Any = strategy if isinstance(strategy, Sequence) and not isinstance(strategy, str) else [strategy]
    if not 1 <= len(given) <= MOST_SETS:
        raise ValueError(f"lossless drafts with 1 to {MOST_SETS} strategies or plans; got {len(given)}")
    strategies = drafting_strategies(model, given)
    if gamma is not None and (not isinstance(gamma, int) or gamma < 1 or len(strategies) > 1):
        raise ValueError(
            f"gamma must be a whole number above 0, with one strategy or plan; got {gamma!r}, with {len(strategies)}"
        )
    return LosslessDecoder(model, strategies, gamma=gamma, streamer=streamer, stateless=check_stateless(stateless))


def drafting_strategies(model: Any, given: Sequence[Strategy | SkipPlan]) -> list[Strategy]:
    """The strategies and those of plans; ValueError if one skips nothing in an answer or is for another model."""
    strategies = [strategy_of(each, unwrapped(model), allow_other_weights=True) for each in given]
    if idle := [each.name for each in strategies if each.is_prompt_only]:
        raise ValueError(
            f"lossless drafts with the skipped model, but {idle[0]} skips nothing in an answer, as its set keeps the "
            "K/V; allowed: the same set without keeps_kv"
        )
    for strategy in strategies:
        patches_for(unwrapped(model), strategy)
    return strategies


class LosslessDecoder:
    """A decoding method for `generate`, and a context manager.

    statistics: of all requests so far; last_request: of the latest one. A copy of it works for a copy of the model.
    """

    __signature__ = SignatureOfDecodingMethod()

    def __init__(
        self,
        model: Any,
        strategies: Sequence[Strategy],
        *,
        gamma: int | None,
        streamer: BaseStreamer | None,
        stateless: frozenset[type],
    ):
        self.model: PreTrainedModel = unwrapped(model)
        self.strategies, self.gamma, self.streamer, self.stateless = strategies, gamma, streamer, stateless
        self.costs: defaultdict[int, StepCosts] = defaultdict(StepCosts)  # by number of rows
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

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs,
    ) -> GenerateDecoderOnlyOutput | Tensor:
        """Called by `generate`. input_ids: [B, S]. Returns what `generate` returns for one beam."""
        if model is not self.model:
            raise ValueError("this lossless(...) was made for another model object; make one for this model")
        given = streamer_of_generate()
        if given is not None and self.streamer is not None and given is not self.streamer:
            raise ValueError("lossless(...) and generate were given different streamers; pass only one")
        check_request(model, input_ids, generation_config, model_kwargs)
        arguments = (model, input_ids, generation_config, model_kwargs, logits_processor, stopping_criteria)
        return self._batch(*arguments) if len(input_ids) > 1 else self._sequence(*arguments, given)

    def _sequence(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        config: GenerationConfig,
        model_kwargs: dict[str, Any],
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        given: BaseStreamer | None,
    ) -> GenerateDecoderOnlyOutput | Tensor:
        """Decode one sequence with drafts of both sources. input_ids: [1, S]. given: the streamer of `generate`."""
        streamer = self.streamer if given is None else given
        request = DraftStatistics(requests=1)
        with patches_for(model, self.strategies[0]).install() as patches:
            self.last_request = request
            forwards = ForwardRunner(model, patches, input_ids, config, model_kwargs)
            choose = Sampling(input_ids.device) if config.do_sample else Greedy()
            accept = Acceptance(choose=choose, process=processors, stop=criteria, config=config, streamer=streamer)
            ends = () if config.eos_token_id is None else end_token_ids(model, config.eos_token_id)
            process = for_draft(processors, self.stateless)
            skipped = [
                SkippedModel(forwards, strategy, process=process, choose=choose, ends=ends)
                for strategy in self.strategies
                if strategy.skipped or self.gamma
            ]
            rounds = Rounds(
                forwards=forwards,
                drafting=self.drafting(skipped, input_ids),
                accept=accept,
                max_length=config.max_length,
                statistics=request,
            )
            if given is None and streamer is not None:
                streamer.put(input_ids.cpu())
            try:
                sequences = rounds.run(input_ids)
            finally:
                forwards.stop_recording()
        self.statistics += request
        if not config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,  # pyright: ignore[reportArgumentType]
            scores=accept.scores,  # pyright: ignore[reportArgumentType]
            logits=accept.logits,  # pyright: ignore[reportArgumentType]
            **{CACHE: forwards.cache},  # pyright: ignore[reportArgumentType]
        )

    def _batch(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        config: GenerationConfig,
        model_kwargs: dict[str, Any],
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
    ) -> Tensor:
        """Decode several rows with drafts of n-grams. input_ids: [B, S]. Returns prompts and answers, [B, S']."""
        check_batch(model, input_ids, config, model_kwargs, processors, criteria, self.stateless)
        if self.gamma is not None or self.streamer is not None:
            raise ValueError("gamma and streamer are for one sequence at a time; make a lossless(...) without them")
        request = DraftStatistics(requests=1)
        with patches_for(model, self.strategies[0]).install() as patches:
            self.last_request = request
            forwards = BatchForwards(model, patches, input_ids, config, model_kwargs)
            rows: list[Row] = []
            noise = BatchNoise(len(input_ids), lambda: [i for i, row in enumerate(rows) if not row.finished])
            for i in range(len(input_ids)):
                chosen = RowSampling(noise, i) if config.do_sample else Greedy()
                accept = Acceptance(choose=chosen, process=for_row(processors, i), stop=criteria, config=config)
                rows.append(Row(input_ids[i : i + 1], forwards.live[i], accept))
            costs = self.costs[len(rows)]
            costs.new_request()
            rounds = BatchRounds(
                forwards=forwards,
                rows=rows,
                costs=costs,
                max_length=config.max_length,
                pad_token_id=pad_token_of(config),
                statistics=request,
            )
            sequences = rounds.run(input_ids)
        self.statistics += request
        return sequences

    def drafting(self, skipped: Sequence[SkippedModel], input_ids: Tensor) -> Drafting | FixedLength:
        """What decides on the drafts of a request. input_ids: its prompt, [1, S]."""
        if self.gamma is not None:
            return FixedLength(skipped[0], self.gamma)
        self.costs[1].new_request()
        return Drafting([NGrams(input_ids[0].tolist()), *skipped], self.costs[1])
