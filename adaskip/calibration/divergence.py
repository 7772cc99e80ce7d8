"""KL divergence between the next-token distributions of the skipped and the full model, on calibration prompts.

Each prompt is followed by the full model's own greedy answer, which `generate.generate` makes independently of the
model's generation config. The phase decides what runs under the plan and where distributions are compared. In prefill,
prompt and answer run under the plan, and both are compared. In decode, only the answer does, over K/V of the prompt
that the full model computed once. In e2e, both run under the plan, and the answer is compared. A plan that keeps the
K/V, for prefill alone, runs over the prompt without its last token; the answer is the full model's over those K/V.
With `keep_kv`, every plan does, and the answer alone is compared.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from adaskip.calibration.streams import Kept, KeptStreams
from adaskip.core.blocks import execution_device, find_decoder
from adaskip.core.generate import generate
from adaskip.core.hf import CACHE
from adaskip.core.patching import patches_of
from adaskip.core.plan import EMPTY_PLAN, Phase, SkipPlan
from adaskip.core.wrappers import unwrapped

OBJECTIVE_VERSION = 2
"""Version of the objective computed here. Bump it when the objective changes: kept selections of another version are
searched again."""
ANSWER_TOKENS = 128
"""Maximum length of a greedy answer."""
BATCH_TOKENS = 8192
"""Maximum number of tokens, of prompts and answers, in a batch of greedy answers; a longer prompt is alone."""
PROMPT_POSITIONS = 64
"""In prefill, the number of evenly spaced positions of each prompt that are compared."""
ROWS_AT_ONCE = 16
"""Distributions that are compared at once: so few stay in a CPU's cache."""
RESIDENT = 4
"""The K/V of this many prompts, which a search uses most, stay on the model's device; the K/V of the others are kept on
the CPU. For 20 prompts of 7000 tokens and a model of Vicuna-7B's shape they take 73 GB."""


@dataclass(frozen=True)
class Passage:
    """A calibration prompt with its answer, the compared positions, and the full model's distributions there.

    ids: [1, T], the tokens that run under the plan. read: the number of those that are prompt, without its last one.
    dense: K/V of the tokens before them, from the full model.
    positions: [N], compared positions in ids. weights: [N], their weights, with sum 1; in prefill the prompt and the
    answer get half each, unless the answer alone is compared. reference: [N, V], log-probabilities of the full model.
    """

    ids: Tensor
    read: int
    dense: DynamicCache | None
    positions: Tensor
    weights: Tensor
    reference: Tensor


class OutputDivergence:
    """Mean KL(full || skipped) of the next-token distributions, in nats, for each prompt.

    A measurement runs only the layers from which its plan differs from one of those measured last on the same prompt
    (`calibration.streams`).

    keep_kv: compare what strategies with keep_kv=True compute, at the positions that their answers use. Every plan then
    keeps the K/V and runs over the prompt without its last token. The full model, too, reads that part first, so that a
    plan without an effect has a divergence of exactly 0.
    answers: token ids of the full model's greedy answers (`greedy_answers`), if they are known. In decode, prompts
    without an answer are left out, as there is nothing to compare. num_forwards, num_tokens, seconds: cost of the calls
    so far, including the full model's answers if these were not given.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Tensor],
        phase: Phase,
        *,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        answers: Sequence[Sequence[int]] | None = None,
        keep_kv: bool = False,
    ):
        if not prompts:
            raise ValueError("selection needs at least one calibration prompt")
        self.model = model = unwrapped(model)
        self.phase: Phase = phase
        self.keep_kv = keep_kv
        self.num_forwards = self.num_tokens = 0
        self.seconds = 0.0
        self._patches = patches_of(model)
        if keep_kv:
            self._check_keeps_kv()
            self._patches.check_writes_kv(range(len(self._patches.layers)))
        with self._counting(), torch.no_grad():
            if answers is None:
                ends = {"eos_token_ids": eos_token_ids, "pad_token_id": pad_token_id}
                made = {i: answer for batch in greedy_answers(model, prompts, **ends) for i, answer in batch.items()}
                answers = [made[i] for i in range(len(prompts))]
                self.num_forwards += sum(len(answer) + 1 for answer in answers)
                self.num_tokens += sum(map(len, prompts)) + sum(map(len, answers))
            both = [pair for pair in zip(prompts, answers, strict=True) if phase != "decode" or len(pair[1])]
            self.passages = [self._passage(*pair, resident=i < RESIDENT) for i, pair in enumerate(both)]
        if not self.passages:
            raise ValueError(
                f"phase decode compares answers, but the full model gives none to any of the {len(prompts)} prompts; "
                "use prompts that it answers"
            )
        kept = Kept.of(self._patches, sum(passage.ids.numel() for passage in self.passages))
        parts = 2 if keep_kv else 1  # the prompt and the answer, or both in one forward
        self._streams = [tuple(KeptStreams(self._patches, kept) for _ in range(parts)) for _ in self.passages]

    def __len__(self) -> int:
        """Number of prompts compared."""
        return len(self.passages)

    @torch.no_grad()
    def __call__(self, plan: SkipPlan, which: Sequence[int] | None = None) -> list[float]:
        """Divergence under `plan` on each prompt, or on the prompts with indices `which`.

        Raises ValueError for a plan that keeps the K/V in another phase than prefill.
        """
        if plan.keeps_kv:
            self._check_keeps_kv()
        with self._counting(), self._patches.install():
            divergences = [self._divergence(plan, i) for i in (range(len(self)) if which is None else which)]
            return torch.stack(divergences).tolist()

    def _check_keeps_kv(self) -> None:
        if self.phase != "prefill":
            raise ValueError(f"a plan that keeps the K/V is measured in phase 'prefill', not in {self.phase!r}")

    def _divergence(self, plan: SkipPlan, number: int) -> Tensor:
        passage = self.passages[number]
        if plan.keeps_kv or self.keep_kv:
            logits = self._logits_over_kept(plan, number)
        else:
            (stream,) = self._streams[number]
            with stream.running(plan):
                logits = self._logits(passage.ids, _view(passage.dense), passage.positions)
        divergence = _kl(passage.reference, logits) @ passage.weights
        divergence = torch.nan_to_num(divergence, nan=torch.inf, posinf=torch.inf)  # overflow counts as infinite
        return divergence.clamp(min=0.0)  # rounding may make the sum slightly negative

    def _logits_over_kept(self, plan: SkipPlan, number: int) -> Tensor:
        """[N, V], of the prompt under the plan, then of the full model over the K/V that it kept."""
        passage, patches, parts = self.passages[number], self._patches, []
        ids, read, early = passage.ids, passage.read, passage.positions < passage.read
        last = len(patches.layers) - 1
        if self.keep_kv:  # of the prompt's last layer, only the K/V are used
            prompt, answer = self._streams[number]
            plan = plan.union(SkipPlan.of_layers([last], keeps_kv=True))
        else:  # one plan among others that lose the K/V: nothing to continue from
            nothing = Kept(interval=last + 1, states=1)
            prompt, answer = KeptStreams(patches, nothing), KeptStreams(patches, nothing)
        start, cache = min(prompt.start(plan), answer.start(plan)), DynamicCache(config=self.model.config)
        if start:  # the layers below write no K/V, and no layer reads them
            patches.release(cache, SkipPlan.of_layers(range(start)))
        if read:
            with prompt.running(plan, start):
                if self.keep_kv:
                    self._read(ids[:, :read], cache)
                else:
                    parts.append(self._logits(ids[:, :read], cache, passage.positions[early]))
        with answer.running(plan, start, applied=EMPTY_PLAN):
            parts.append(self._logits(ids[:, read:], cache, passage.positions[~early] - read))
        return torch.cat(parts)

    def _passage(self, prompt: Tensor, answer: Sequence[int], *, resident: bool) -> Passage:
        ids = torch.cat([prompt, torch.tensor(answer, dtype=prompt.dtype, device=prompt.device)])[None]
        ids = ids.to(execution_device(self.model))
        start = len(prompt) if self.phase == "decode" else 0
        read = max(len(prompt) - 1 - start, 0)
        positions, weights = _positions(len(prompt), ids.shape[1], self.phase, answer_only=self.keep_kv)
        positions = positions - start  # on the CPU: the last layer may be on another device than the first
        first = read if self.keep_kv else start
        cache = DynamicCache(config=self.model.config) if first else None
        if cache is not None:
            self._read(ids[:, :first], cache)
        logits = self._logits(ids[:, first:], _view(cache), positions + start - first)
        reference = logits.float().log_softmax(dim=-1)
        dense = cache if start else None
        if dense is not None and not resident:
            layers: list[Any] = dense.layers
            for layer in layers:
                layer.keys, layer.values = layer.keys.cpu(), layer.values.cpu()
        return Passage(ids[:, start:], read, dense, positions, weights.to(reference.device), reference)

    def _read(self, ids: Tensor, cache: DynamicCache) -> None:
        """Fill the empty `cache` with the K/V of `ids`."""
        self._count(ids)
        find_decoder(self.model)(input_ids=ids, **{CACHE: cache}, use_cache=True)

    def _logits(self, ids: Tensor, cache: DynamicCache | None, positions: Tensor) -> Tensor:
        """[N, V]. cache: K/V of the tokens before `ids`, which grow."""
        self._count(ids)
        model: Any = self.model
        output = model(input_ids=ids, **{CACHE: cache}, use_cache=cache is not None, logits_to_keep=positions)
        return output.logits[0]

    def _count(self, ids: Tensor) -> None:
        self.num_forwards += 1
        self.num_tokens += ids.numel()

    @contextmanager
    def _counting(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start


def _kl(log_p: Tensor, logits: Tensor) -> Tensor:
    """KL(p || softmax(logits)) in nats for each row, float32 [N]; both [N, V]."""
    parts = zip(log_p.split(ROWS_AT_ONCE), logits.split(ROWS_AT_ONCE), strict=True)
    kl_div = partial(torch.nn.functional.kl_div, reduction="none", log_target=True)
    return torch.cat([kl_div(rows.float().log_softmax(dim=-1), p).sum(dim=-1) for p, rows in parts])


def greedy_answers(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    *,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    known: Container[int] = (),
) -> Iterator[dict[int, list[int]]]:
    """Token ids of the full model's greedy answers by index of the prompt, without end tokens, batch by batch.

    An answer has at most `ANSWER_TOKENS`. The prompts of a batch have one length, since padding would change rotary
    angles that depend on the length. known: indices of known answers; a batch of these alone is left out.
    """
    for batch in _batches(prompts):
        if all(i in known for i in batch):
            continue
        answers = generate(
            unwrapped(model),
            None,
            [prompts[i] for i in batch],
            max_new_tokens=ANSWER_TOKENS,
            eos_token_ids=eos_token_ids,
            pad_token_id=pad_token_id,
        )
        yield {i: answer.token_ids for i, answer in zip(batch, answers, strict=True)}


def _batches(prompts: Sequence[Tensor]) -> list[list[int]]:
    """Indices of prompts of one length, at most `BATCH_TOKENS` with their answers, in each batch."""
    batches: list[list[int]] = []
    for length in sorted({len(prompt) for prompt in prompts}):
        alike = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        rows = max(1, BATCH_TOKENS // (length + ANSWER_TOKENS))
        batches += [alike[start : start + rows] for start in range(0, len(alike), rows)]
    return batches


def _positions(prompt_length: int, length: int, phase: Phase, *, answer_only: bool) -> tuple[Tensor, Tensor]:
    """The compared positions and their weights. answer_only: no others in the prompt than its last, also in prefill.

    The last position of the prompt predicts the first token of the answer, which in decode comes from the full model.
    """
    answer = torch.arange(prompt_length - (phase != "decode"), length)
    if phase != "prefill" or answer_only or prompt_length < 2:
        return answer, torch.full((len(answer),), 1.0 / len(answer))
    prompt = torch.linspace(0, prompt_length - 2, PROMPT_POSITIONS).round().long().unique()
    weights = [torch.full((len(part),), 0.5 / len(part)) for part in (prompt, answer)]
    return torch.cat([prompt, answer]), torch.cat(weights)


def _view(cache: DynamicCache | None) -> DynamicCache | None:
    """A cache with the same K/V, on the layers' original devices, that can grow without changing `cache`.

    This works because this module's caches are stock's, whose layers concatenate and never write in place.
    """
    if cache is None:
        return None
    view = copy.copy(cache)
    layers: list[Any] = [copy.copy(layer) for layer in cache.layers]
    for layer in layers:
        layer.keys, layer.values = layer.keys.to(layer.device), layer.values.to(layer.device)
    view.layers = layers
    return view
