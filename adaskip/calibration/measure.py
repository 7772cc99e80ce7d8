"""Offline importance learning: run prompts through the full model and measure every sublayer.

Paper: Eq. (2), (3), token-weighted means over all calibration prompts.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from adaskip.core import hf
from adaskip.core.blocks import execution_device, find_decoder
from adaskip.core.decoding import plain_generate
from adaskip.core.patching import ModelPatches, patches_of
from adaskip.core.same_model import identity
from adaskip.core.similarity import RecentNorms, cosine_and_ratio
from adaskip.core.token_ids import end_token_ids, is_end, left_padded, right_padded
from adaskip.core.wrappers import unwrapped
from adaskip.profiles.importance import ImportanceProfile, SublayerMeans

UNITS = ("attention", "ffn", "layer")


@dataclass(frozen=True)
class Measurement:
    """Sums over the tokens of one prompt (or of its answer), on the model's device.

    sums: float32 [U, M, 2]: unit (attention, ffn, layer), decoder layer, (similarity, ratio of norms). tokens: 0-dim.
    windows: the same sums over an answer's first tokens, by how many those are; an answer may have had fewer.
    """

    sums: Tensor
    tokens: Tensor
    windows: Mapping[int, Measurement] = field(default_factory=dict)

    def means(self) -> Tensor:
        """Token means, float64 [U, M, 2] on the CPU; NaN if there was no token."""
        return self.sums.double().cpu() / self.tokens.double().cpu()


class _RowSums:
    """Probe that sums similarity and ratio over the tokens of each row, without asking the device for anything."""

    def __init__(self, num_layers: int, windows: Sequence[int] = ()):
        self.num_layers = num_layers
        self.windows = frozenset(windows)
        self.mask: Tensor | None = None  # [B, S], the tokens of the coming forward that count
        self.tokens: Tensor | None = None  # [B]
        self.sums: dict[tuple[str, int], Tensor] = {}  # each [2, B]
        self.norms = RecentNorms()
        self.num_forwards = 0
        self.snapshots: dict[int, tuple[dict[tuple[str, int], Tensor], Tensor]] = {}  # by number of forwards

    def record(self, kind: str, layer: int, a: Tensor, b: Tensor, change: Tensor | None) -> None:
        assert self.mask is not None
        mask = self.mask.to(a.device)
        if a.shape[1] != mask.shape[1]:  # a model that dropped its cache reads all again; the last tokens are the new
            last = slice(-mask.shape[1], None)
            a, b, change = a[:, last], b[:, last], None if change is None else change[:, last]
        step = torch.stack([(x * mask).sum(dim=-1) for x in cosine_and_ratio(a, b, change, self.norms)])
        known = self.sums.get((kind, layer))
        self.sums[kind, layer] = step if known is None else known + step
        if (kind, layer) == ("layer", 0):  # once per forward
            counted = self.mask.sum(dim=-1)
            self.tokens = counted if self.tokens is None else self.tokens + counted
        if (kind, layer) == ("layer", self.num_layers - 1):
            self._end_forward()

    def _end_forward(self) -> None:
        self.norms.forget()
        self.num_forwards += 1
        if self.num_forwards in self.windows:
            assert self.tokens is not None
            self.snapshots[self.num_forwards] = (dict(self.sums), self.tokens)  # sums are replaced, never changed

    def measurements(self) -> Iterator[Measurement]:
        """One per row; none if nothing was recorded."""
        if self.tokens is None:
            return
        whole = (self.sums, self.tokens)
        windows = {size: list(self._rows(*self.snapshots.get(size, whole))) for size in sorted(self.windows)}
        for row, measured in enumerate(self._rows(*whole)):
            yield replace(measured, windows={size: rows[row] for size, rows in windows.items()})

    def _rows(self, sums: dict[tuple[str, int], Tensor], tokens: Tensor) -> Iterator[Measurement]:
        stacked = torch.stack(
            [torch.stack([sums[unit, i].to(tokens.device) for i in range(self.num_layers)]) for unit in UNITS]
        )  # [U, M, 2, B]
        for row in range(stacked.shape[-1]):
            yield Measurement(stacked[..., row], tokens[row])


class _MeasureAnswers(StoppingCriteria):
    """Stops nothing. `generate` calls it after each token: from the first one on, the probe sees the live rows."""

    def __init__(self, patches: ModelPatches, probe: _RowSums, eos_token_ids: Sequence[int]):
        self.patches, self.probe, self.eos_token_ids = patches, probe, eos_token_ids

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:  # pyright: ignore
        live = ~is_end(input_ids[:, -1:], self.eos_token_ids)
        self.probe.mask = live if self.probe.mask is None else self.probe.mask & live
        self.patches.set_probe(self.probe)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    prompts: Iterable[Tensor | Sequence[int]],
    *,
    phase: Literal["prefill", "decode"] = "prefill",
    batch_size: int = 1,
    max_new_tokens: int = 64,
    eos_token_ids: int | Sequence[int] | None = None,
    windows: Sequence[int] = (),
) -> Iterator[Measurement]:
    """IO similarity and scale sums of each prompt, measured on the full model, one by one.

    prompts: token ids, 1-D. phase: "prefill" measures the prompts' tokens, "decode" the tokens of greedy answers of at
    most `max_new_tokens` tokens to them, and apart the first tokens of each answer, as many as each of `windows` says.
    An answer is the full model's own: one sequence, no logits processors, one token per forward over a KV cache,
    whatever the model's generation config says. Each of its tokens but the last is measured, as the input it is. From
    that config come only the end tokens, and only if `eos_token_ids` are not given. model: a stock model, or a wrapper
    that `blocks.unwrapped` knows; its active adapters take part.
    No value leaves the device. Raises ValueError for an empty prompt, and for windows in phase "prefill".
    Paper: the inner sums of Eq. (2) and (3); with windows also of Eq. (5).
    """
    if phase not in ("prefill", "decode"):
        raise ValueError(f"phase of a measurement is prefill or decode; got {phase!r}")
    if windows and (phase == "prefill" or min(windows) < 1):
        raise ValueError(f"windows are counts of decoded tokens, each at least 1; got {list(windows)} in phase {phase}")
    model = unwrapped(model)
    patches = patches_of(model)
    for rows in _batches(prompts, batch_size):
        with patches.install():
            probe = _RowSums(len(patches.patches), windows)
            if phase == "prefill":
                _run_prompts(model, patches, probe, rows)
            else:
                _run_answers(model, patches, probe, rows, max_new_tokens, end_token_ids(model, eos_token_ids))
        yield from probe.measurements()


def _batches(prompts: Iterable[Tensor | Sequence[int]], batch_size: int) -> Iterator[list[Tensor]]:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")
    rows: list[Tensor] = []
    for number, prompt in enumerate(prompts):
        row = torch.as_tensor(prompt, dtype=torch.long)
        if row.dim() != 1 or not len(row):
            raise ValueError(
                f"prompt {number} must be a non-empty 1-D sequence of token ids; got shape {tuple(row.shape)}"
            )
        rows.append(row)
        if len(rows) == batch_size:
            yield rows
            rows = []
    if rows:
        yield rows


def _run_prompts(model: PreTrainedModel, patches: ModelPatches, probe: _RowSums, rows: list[Tensor]) -> None:
    """One prefill without logits. Pads stand on the right, where causal attention never sees them."""
    ids, probe.mask = right_padded(rows, execution_device(model))
    patches.set_probe(probe)
    find_decoder(model)(input_ids=ids, use_cache=False)


def _run_answers(
    model: PreTrainedModel,
    patches: ModelPatches,
    probe: _RowSums,
    rows: list[Tensor],
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
) -> None:
    """Greedy answers; the prompt is not measured. Pads stand on the left."""
    pad_token_id = (list(eos_token_ids) or [0])[0]
    ids, mask = left_padded(rows, pad_token_id, execution_device(model))
    plain_generate(
        model,
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(eos_token_ids) or None,
        pad_token_id=pad_token_id,
        stopping_criteria=StoppingCriteriaList([_MeasureAnswers(patches, probe, eos_token_ids)]),
    )


def calibrate(
    model: PreTrainedModel,
    prompts: Iterable[Tensor | Sequence[int]],
    *,
    model_name: str | None = None,
    dataset: str = "",
    data_ids: Iterable[str] = (),
    batch_size: int = 1,
    phase: Literal["prefill", "decode"] = "prefill",
    max_new_tokens: int = 64,
    eos_token_ids: int | Sequence[int] | None = None,
    weights_fingerprint: str | None = None,
) -> ImportanceProfile:
    """The importance of every sublayer of `model` over calibration prompts.

    prompts: token ids, 1-D, at least one. model_name, dataset, data_ids: what was measured on what, for the record.
    weights_fingerprint: the model's, where it is known; else it is computed. The other arguments are those of
    `measure`. The means are over tokens, not over prompts. Raises ValueError if there is nothing to measure, and before
    anything is measured if the weights have no fingerprint.
    Paper: Eq. (2), (3).
    """
    about = _about(model, weights_fingerprint, model_name, dataset, data_ids)
    begins = _Beginnings(unwrapped(model), prompts)
    options = {"max_new_tokens": max_new_tokens, "eos_token_ids": eos_token_ids}
    measured = list(measure(model, begins, phase=phase, batch_size=batch_size, **options))
    tokens = int(sum(m.tokens for m in measured))
    if not tokens:
        raise ValueError(
            f"calibration saw no {'generated' if phase == 'decode' else 'prompt'} token; give longer prompts"
        )
    means = torch.stack([m.sums for m in measured]).double().sum(dim=0).cpu() / tokens  # [U, M, 2]
    attention, ffn, layer = (SublayerMeans(tuple(unit[:, 0].tolist()), tuple(unit[:, 1].tolist())) for unit in means)
    return ImportanceProfile(
        attention=attention,
        ffn=ffn,
        layer=layer,
        tokens=tokens,
        phase=phase,
        prompts_begin_with_bos=begins.with_bos,
        **about,
    )


def _about(
    model: PreTrainedModel, weights: str | None, model_name: str | None, dataset: str, data_ids: Iterable[str]
) -> dict[str, Any]:
    """What a profile says of the model and the data, known before anything is measured."""
    model = unwrapped(model)
    return {
        **identity(model, model_name, weights),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": hf.attn_implementation(model),
        "dataset": str(dataset),
        "data_ids": tuple(str(i) for i in data_ids),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers")},
        },
    }


class _Beginnings:
    """The prompts, as they are; notes whether each one so far began with BOS, None for a model without BOS."""

    def __init__(self, model: PreTrainedModel, prompts: Iterable[Tensor | Sequence[int]]):
        bos = getattr(model.config.get_text_config(decoder=True), "bos_token_id", None)
        self.prompts, self.bos = prompts, bos
        self.with_bos: bool | None = None

    def __iter__(self) -> Iterator[Tensor | Sequence[int]]:
        for prompt in self.prompts:
            if self.bos is not None and len(prompt):
                self.with_bos = self.with_bos is not False and bool(torch.as_tensor(prompt)[0].eq(self.bos).all())
            yield prompt
