"""Skipping without loss: the skipped model drafts, the full model verifies (self-speculative decoding).

    model.generate(**inputs, custom_generate=lossless(model, strategy))

    with lossless(model, strategy):  # for those who call generate themselves: pipelines, chat programs
        model.generate(**inputs)

Both work on one KV cache. The full model reads the prompt; the draft sees the cache through a view with stand-ins for
the layers whose attention it skips, and the K/V it writes into the others is removed before the full model writes its
own. So the draft needs no prefill and no memory but for the tokens of one draft.
"""

from adaskip.speculative.decoder import LosslessDecoder, lossless

__all__ = ["LosslessDecoder", "lossless"]
