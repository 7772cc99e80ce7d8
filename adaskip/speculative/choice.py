"""Chooses tokens from scores, greedily or by sampling, for drafts and for the full model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Greedy:
    """The most likely token."""

    def __call__(self, scores: Tensor) -> Tensor:
        """scores: processed, [1, V]. Returns a token id, [1]."""
        return scores.argmax(dim=-1)

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """A context for drafting."""
        yield


class Sampling:
    """A token sampled as `generate` samples it, with one draw of torch's generator per kept token.

    A draft is sampled with the random numbers that the full model will use at the same positions: the generator is set
    back before the verification. So the full model samples what it would sample alone with this seed, and it often
    samples the drafted token.
    """

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self, scores: Tensor) -> Tensor:
        return torch.multinomial(scores.softmax(dim=-1), num_samples=1)[0]

    @contextmanager
    def ahead(self) -> Iterator[None]:
        devices = [] if self.device.type == "cpu" else [self.device]
        kind = "cuda" if self.device.type == "cpu" else self.device.type
        with torch.random.fork_rng(devices, device_type=kind):
            yield
