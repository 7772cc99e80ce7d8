"""`lossless(model, strategy)`: the decoding method to give `generate`."""

from __future__ import annotations

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from adaskip.patching import patches_of
from adaskip.speculative.checks import check_request
from adaskip.speculative.draft_length import AdaptiveDraftLength, FixedDraftLength
from adaskip.speculative.forwards import Forwards
from adaskip.speculative.rounds import Rounds
from adaskip.speculative.statistics import DraftStatistics
from adaskip.strategies.base import Strategy


def lossless(
    model: PreTrainedModel,
    strategy: Strategy,
    *,
    gamma: int | None = None,
    draft_cost: float | None = None,
    streamer: BaseStreamer | None = None,
) -> LosslessDecoder:
    """What to give `model.generate` as `custom_generate`: the full model's output, drafted by the skipped model.

    Greedy decoding gives the tokens of the full model; sampling draws from the full model's distribution (other draws
    than without drafting, the same ones for the same seed). Logits processors and stopping criteria act as in
    `generate`, token by token; processors act on the draft, too, and must keep no state. One sequence at a time, with
    or without left padding, on a dynamic KV cache; anything else is refused with a ValueError.

    Identical means: in exact arithmetic. Verifying several tokens at once sums in another order than one at a time, so
    where two tokens are equally likely up to rounding, either may win, as with any other batch size or kernel. float32
    leaves hardly any such ties, bfloat16 some.

    strategy: its `decode_plan` drafts; online learning is off, since the verification mends what the draft gets wrong.
    gamma: tokens of every draft; default: as many as pay, by the acceptance seen so far (`AdaptiveDraftLength`).
    draft_cost: time that one drafted token costs, in decode steps of the full model; default: the share of sublayers
    that still run, as if all sublayers cost alike and verifying a few tokens cost as much as decoding one.
    streamer: give it here; transformers does not pass it on from `generate` to a `custom_generate`.

    Raises UnsupportedModelError and ValueError as `skipping` does.
    """
    return LosslessDecoder(model, strategy, gamma=gamma, draft_cost=draft_cost, streamer=streamer)


class LosslessDecoder:
    """A decoding method for `generate`. statistics: of all its requests; last_request: of the latest one."""

    def __init__(
        self,
        model: PreTrainedModel,
        strategy: Strategy,
        *,
        gamma: int | None,
        draft_cost: float | None,
        streamer: BaseStreamer | None,
    ):
        self.model, self.strategy, self.gamma, self.streamer = model, strategy, gamma, streamer
        self.patches = patches_of(model)
        num_layers = len(self.patches.patches)
        if strategy.num_layers != num_layers:
            raise ValueError(
                f"strategy {strategy.name} was made for {strategy.num_layers} layers, "
                f"{type(model).__name__} has {num_layers}"
            )
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
        check_request(model, input_ids, logits_processor, generation_config, model_kwargs)
        self.last_request = DraftStatistics(requests=1)
        forwards = Forwards(model, self.patches, input_ids, generation_config, model_kwargs)
        rounds = Rounds(
            forwards=forwards,
            strategy=self.strategy,
            length=AdaptiveDraftLength(self.draft_cost) if self.gamma is None else FixedDraftLength(self.gamma),
            process=logits_processor,
            stop=stopping_criteria,
            config=generation_config,
            streamer=self.streamer,
            statistics=self.last_request,
        )
        with self.patches.install():
            try:
                sequences = rounds.run(input_ids)
            finally:
                forwards.stop_recording()
        self.statistics += self.last_request
        if not generation_config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,  # pyright: ignore[reportArgumentType]
            scores=rounds.scores,  # pyright: ignore[reportArgumentType]
            logits=rounds.logits,  # pyright: ignore[reportArgumentType]
            past_key_values=forwards.cache,
        )
