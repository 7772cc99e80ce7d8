"""Selects the logits processors that may be applied to a draft.

A drafted token may be rejected, so a processor with state (a position in a grammar, token counts, a second KV cache)
must never see it. Copying a processor is not safe in general: its state may be in a class, a closure or another
library. So only stateless processors are applied to a draft. All others see each kept token once, in order, in the
verification. Leaving a processor out of the draft lowers the acceptance rate but never changes the output: a draft may
be sampled from any distribution.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor
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
    "WatermarkLogitsProcessor",  # it seeds its generator from the tokens in every call
)
STATELESS = frozenset(getattr(logits_process, name) for name in _NAMES if hasattr(logits_process, name))
"""Processors of transformers whose result depends only on the token ids and scores of the call. Not included:
classifier-free guidance and SynthID (state), `PrefixConstrainedLogitsProcessor` (calls a function of the user's)."""

PADS = "prompt_ignore_length"


def check_stateless(classes: Iterable[type]) -> frozenset[type]:
    """The user's stateless processor classes as a set; ValueError for anything that is not such a class."""
    given = tuple(classes)
    if wrong := [each for each in given if not (isinstance(each, type) and "__call__" in dir(each))]:
        raise ValueError(f"stateless must list classes of logits processors, which define __call__; got {wrong}")
    return frozenset(given)


def for_draft(processors: LogitsProcessorList, stateless: frozenset[type]) -> LogitsProcessorList:
    """The processors that are applied to drafts; subclasses are left out, since they may keep state."""
    return LogitsProcessorList(each for each in processors if type(each) in STATELESS | stateless)


def for_row(processors: LogitsProcessorList, row: int) -> LogitsProcessorList:
    """The processors for one row of a batch: the repetition penalty holds a number of pads for each row."""
    own = LogitsProcessorList()
    for processor in processors:
        pads: Any = getattr(processor, PADS, None)
        if isinstance(pads, Tensor):
            processor = copy.copy(processor)
            setattr(processor, PADS, pads[row : row + 1])
        own.append(processor)
    return own
