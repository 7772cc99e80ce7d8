"""Chooses tokens from scores, greedily or by sampling, for drafts and for the full model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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


class BatchNoise:
    """The random numbers with which `torch.multinomial` samples the tokens of a batch, one block [B, V] per step.

    Stock `generate` draws a block for all rows at every step. Rows that got more tokens by drafts need later blocks
    than the others; so each block is drawn once, when the first row needs it, and kept until the others have used it.
    """

    def __init__(self, rows: int, unfinished: Callable[[], Iterable[int]]):
        self.rows, self.unfinished = rows, unfinished
        self.blocks: list[dict[int, Tensor]] = []

    def row(self, row: int, token: int, probabilities: Tensor) -> Tensor:
        """The numbers of the row's token with this index, [1, V] like `probabilities`."""
        if token == len(self.blocks):
            block = probabilities.new_empty((self.rows, probabilities.shape[1])).exponential_()
            self.blocks.append({each: block[each : each + 1].clone() for each in self.unfinished()})
        return self.blocks[token].pop(row)


class RowSampling:
    """A token of one row of a batch, as `generate` samples it with this seed."""

    def __init__(self, noise: BatchNoise, row: int):
        self.noise, self.row, self.tokens = noise, row, 0

    def __call__(self, scores: Tensor) -> Tensor:
        """scores: processed, [1, V]. Returns a token id, [1]."""
        probabilities = scores.softmax(dim=-1)
        if not probabilities.isfinite().all():
            raise RuntimeError(f"the scores of row {self.row} give no probabilities: they contain inf or nan")
        noise = self.noise.row(self.row, self.tokens, probabilities)
        self.tokens += 1
        return (probabilities / noise).argmax(dim=-1)
