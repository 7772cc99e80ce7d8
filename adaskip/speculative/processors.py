"""Which logits processors may see a draft.

A drafted token may be rejected, and a processor that keeps state (the place in a grammar, counts of tokens, a second KV
cache) must never have seen it. No copy is safe in general: state can live in a class, a closure or another library. So
a draft is processed only by those that keep none; all others see each kept token once, in order, in the verification.
Leaving one out of the draft costs accepted tokens, never correctness: a draft may be drawn from any distribution.
"""

from __future__ import annotations

from collections.abc import Iterable

from transformers import LogitsProcessorList
from transformers.generation import logits_process

_NAMES = (
    *("EncoderNoRepeatNGramLogitsProcessor", "EncoderRepetitionPenaltyLogitsProcessor", "EpsilonLogitsWarper"),
    *("EtaLogitsWarper", "ExponentialDecayLengthPenalty", "ForcedBOSTokenLogitsProcessor"),
    *("ForcedEOSTokenLogitsProcessor", "InfNanRemoveLogitsProcessor", "LogitNormalization"),
    *("MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor", "MinPLogitsWarper"),
    *("NoBadWordsLogitsProcessor", "NoRepeatNGramLogitsProcessor", "RepetitionPenaltyLogitsProcessor"),
    *("SequenceBiasLogitsProcessor", "SuppressTokensAtBeginLogitsProcessor", "SuppressTokensLogitsProcessor"),
    *("TemperatureLogitsWarper", "TopHLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "TypicalLogitsWarper"),
    "WatermarkLogitsProcessor",  # its generator is seeded afresh from the tokens in every call
)
STATELESS = frozenset(getattr(logits_process, name) for name in _NAMES if hasattr(logits_process, name))
"""Those of transformers whose scores depend on the token ids and scores of the call alone. Not among them: classifier-
free guidance and SynthID (state), `PrefixConstrainedLogitsProcessor` (calls a function of the user's)."""


def check_stateless(classes: Iterable[type]) -> frozenset[type]:
    """The user's classes of processors without state; raises ValueError for what is no class of processors."""
    given = tuple(classes)
    if wrong := [each for each in given if not (isinstance(each, type) and "__call__" in dir(each))]:
        raise ValueError(f"stateless names classes of logits processors, whose objects can be called; got {wrong}")
    return frozenset(given)


def for_draft(processors: LogitsProcessorList, stateless: frozenset[type]) -> LogitsProcessorList:
    """The processors that act on a draft: of exactly these classes, since a subclass may keep state."""
    return LogitsProcessorList(each for each in processors if type(each) in STATELESS | stateless)
