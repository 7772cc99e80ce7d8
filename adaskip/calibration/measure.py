"""Offline importance learning: runs prompts through the full model and measures every sublayer.

Paper: Eq. (2), (3), as means over the tokens of all calibration prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from adaskip.common.provenance import library_versions
from adaskip.core import hf
from adaskip.core.blocks import execution_device, find_decoder
from adaskip.core.decoding import plain_generate
from adaskip.core.patching import ModelPatches, patches_of
from adaskip.core.same_model import identity
from adaskip.core.similarity import RecentNorms, cosine_and_ratio
from adaskip.core.token_ids import end_token_ids, is_end, left_padded, right_padded
from adaskip.core.wrappers import unwrapped
from adaskip.profiles.importance import UNITS, ImportanceProfile, SublayerMeans


@dataclass(frozen=True)
class Measurement:
    """Sums over the tokens of one prompt (or of its answer), on the model's device.

    sums: float32 [U, M, 2]: unit (attention, ffn, layer), decoder layer, (similarity, ratio of norms). tokens: their
    number, 0-dim. windows: the same sums over the first N tokens of an answer, by N; an answer may be shorter than N.
    """

    sums: Tensor
    tokens: Tensor
    windows: Mapping[int, Measurement] = field(default_factory=dict)

    def means(self) -> Tensor:
        """Token means, float64 [U, M, 2] on the CPU; NaN if there was no token."""
        return self.sums.double().cpu() / self.tokens.double().cpu()


class _RowSums:
    """A `SublayerProbe` that sums similarity and ratio over the tokens of each row, without synchronisation."""

    def __init__(self, num_layers: int, windows: Sequence[int] = ()):
        self.num_layers = num_layers
        self.windows = frozenset(windows)
        self.mask: Tensor | None = None  # [B, S], the tokens of the next forward that are measured
        self.tokens: Tensor | None = None  # [B]
        self.sums: dict[tuple[str, int], Tensor] = {}  # each [2, B]
        self.norms = RecentNorms()
        self.num_forwards = 0
        self.snapshots: dict[int, tuple[dict[tuple[str, int], Tensor], Tensor]] = {}  # by number of forwards

    def record(self, kind: str, layer: int, a: Tensor, b: Tensor, change: Tensor | None) -> None:
        assert self.mask is not None
        mask = self.mask.to(a.device)
        if a.shape[1] != mask.shape[1]:  # a model that dropped its cache reads all tokens again; the last are new
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
            self.snapshots[self.num_forwards] = (dict(self.sums), self.tokens)  # the tensors never change in place

    def measurements(self) -> Iterator[Measurement]:
        """One measurement per row, of 0 tokens if nothing was recorded."""
        if self.tokens is None:
            assert self.mask is not None
            sums = self.mask.new_zeros((len(UNITS), self.num_layers, 2), dtype=torch.float32)
            nothing = Measurement(sums, self.mask.new_zeros((), dtype=torch.long))
            yield from [replace(nothing, windows=dict.fromkeys(sorted(self.windows), nothing))] * len(self.mask)
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
    """A stopping criterion that never stops. From the first token on, it makes the probe measure the live rows."""

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
    """Yield the sums of IO similarity and scale for each prompt, measured on the full model, in order.

    model: a stock model, or a wrapper that `wrappers.unwrapped` supports; active adapters are applied. prompts: token
    ids, each 1-D. phase: "prefill" measures the tokens of the prompts, "decode" the tokens of the full model's greedy
    answers, of at most `max_new_tokens` tokens each; an answer that ends at once has none. windows: in phase "decode",
    also measure the first N tokens of each answer, for every N in `windows`. eos_token_ids: end tokens; default: those
    of the model's generation config, whose other settings are ignored. All tokens of an answer are measured as inputs,
    so the last one is not.

    No value is copied to the host. Raises ValueError for an empty prompt, and for windows in phase "prefill".
    Paper: the inner sums of Eq. (2) and (3); with windows also of Eq. (5).
    """
    if phase not in ("prefill", "decode"):
        raise ValueError(f"phase of a measurement must be prefill or decode; got {phase!r}")
    if windows and (phase == "prefill" or min(windows) < 1):
        raise ValueError(
            f"windows are numbers of decoded tokens, each at least 1, in phase decode; got {list(windows)} in phase "
            f"{phase}"
        )
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
    """Run one prefill without logits. Rows are padded on the right, where causal attention ignores the pads."""
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
    """Generate greedy answers without measuring the prompts. Rows are padded on the left."""
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

    prompts: token ids, each 1-D, at least one. model_name, dataset, data_ids: recorded in the profile.
    weights_fingerprint: that of the model; None to compute it. The other arguments are those of `measure`. The means
    are over tokens, not over prompts. Raises ValueError if there is nothing to measure, and before the measurement if
    the weights have no fingerprint.
    Paper: Eq. (2), (3).
    """
    about = _about(model, weights_fingerprint, model_name, dataset, data_ids)
    begins = _Beginnings(unwrapped(model), prompts)
    options = {"max_new_tokens": max_new_tokens, "eos_token_ids": eos_token_ids}
    measured = list(measure(model, begins, phase=phase, batch_size=batch_size, **options))
    tokens = int(sum(m.tokens for m in measured))
    if not tokens:
        raise ValueError(
            f"calibration found no {'generated' if phase == 'decode' else 'prompt'} tokens; use longer prompts"
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
    """The fields of a profile that record the model and the data."""
    model = unwrapped(model)
    return {
        **identity(model, model_name, weights),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": hf.attn_implementation(model),
        "dataset": str(dataset),
        "data_ids": tuple(str(i) for i in data_ids),
        "versions": library_versions(),
    }


class _Beginnings:
    """Iterates over the prompts and records whether all of them begin with BOS; None for a model without BOS."""

    def __init__(self, model: PreTrainedModel, prompts: Iterable[Tensor | Sequence[int]]):
        bos = getattr(model.config.get_text_config(decoder=True), "bos_token_id", None)
        self.prompts, self.bos = prompts, bos
        self.with_bos: bool | None = None

    def __iter__(self) -> Iterator[Tensor | Sequence[int]]:
        for prompt in self.prompts:
            if self.bos is not None and len(prompt):
                self.with_bos = self.with_bos is not False and bool(torch.as_tensor(prompt)[0].eq(self.bos).all())
            yield prompt
