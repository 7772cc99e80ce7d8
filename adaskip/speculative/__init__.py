"""Lossless skipping: the skipped model or n-grams draft, the full model verifies (speculative decoding).

    model.generate(**inputs, custom_generate=lossless(model, strategy))

    with lossless(model, strategy):  # for code that calls generate itself: pipelines, chat programs
        model.generate(**inputs)

Both models use one KV cache. The full model reads the prompt. The draft uses a view of the cache in which the layers of
skipped attentions are replaced (`SkippedLayer`); the K/V that it writes to the other layers is removed before the full
model writes its own. So the draft needs no prefill, and memory only for the tokens of one draft.
"""

from adaskip.speculative.decoder import LosslessDecoder, lossless
from adaskip.speculative.draft_choice import DraftCandidate, DraftChoice, choose_draft

__all__ = ["DraftCandidate", "DraftChoice", "LosslessDecoder", "choose_draft", "lossless"]
