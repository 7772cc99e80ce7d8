"""Methods of other papers that choose sets: each takes what it needs from `Asked` and returns `Found`.

They use no scales. The cost that they return is their own; AdaSkip's calibration, beside which it is stated, is not in
it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from adaskip.calibration import blockpruner, evopress
from adaskip.calibration.cosine_window import layer_angles, windows
from adaskip.calibration.divergence import OutputDivergence, greedy_answers
from adaskip.calibration.progress import Progress
from adaskip.calibration.search import Choice, Set
from adaskip.common.choices import check_choice
from adaskip.core.blocks import decoder_layers
from adaskip.core.plan import Phase, SkipPlan
from adaskip.core.wrappers import unwrapped
from adaskip.profiles.selection import METHODS, SEARCH


@dataclass(frozen=True)
class Asked:
    """The sets that a method is asked for.

    counts: numbers of sublayers. settings: all numbers of the method. identity, progress_path: of the measurements that
    are kept; see `Progress`.
    """

    model: PreTrainedModel
    prompts: Sequence[Tensor]
    phase: Phase
    counts: Sequence[int]
    settings: Mapping[str, float]
    eos_token_ids: Sequence[int]
    pad_token_id: int
    identity: Mapping[str, Any]
    progress_path: Path | None
    show_progress: bool

    @property
    def num_layers(self) -> int:
        return len(decoder_layers(unwrapped(self.model)))

    @property
    def stops(self) -> dict[str, Any]:
        return {"eos_token_ids": self.eos_token_ids, "pad_token_id": self.pad_token_id}

    def answers(self, progress: Progress) -> list[list[int]]:
        """Token ids of the full model's greedy answers; `progress` keeps them."""
        return progress.answers(
            len(self.prompts), lambda known: greedy_answers(self.model, self.prompts, **self.stops, known=known)
        )

    def progress(self, measure: Callable[[SkipPlan, int], float], method: str) -> Progress:
        """Measures sets without scales. measure: of a plan on one prompt."""
        phase = {} if METHODS[method].by_phase else {"phase": None}

        def of_set(chosen: Set, prompt: int) -> float:
            return measure(SkipPlan.of_sublayers(dict.fromkeys(chosen, 1.0)), prompt)

        identity = {**self.identity, **phase, "method": method, "scales": None}
        return Progress(of_set, self.progress_path, identity, num_prompts=len(self.prompts))


@dataclass(frozen=True)
class Found:
    """The chosen set for each number of sublayers, and what the method has cost."""

    choices: Mapping[int, Choice]
    num_forwards: int
    num_tokens: int
    seconds: float


@dataclass(frozen=True)
class Peer:
    """A method. settings: its numbers, with defaults.

    most_forwards: the maximum number of forwards on calibration prompts, from the number of layers, the number of
    prompts, and the numbers of sublayers.
    """

    choose: Callable[[Asked], Found]
    most_forwards: Callable[[int, int, Sequence[int]], int]
    settings: Mapping[str, float] = field(default_factory=dict)


def counts_of(method: str, up_to: int, budgets: Sequence[int] | None) -> list[int]:
    """The numbers of sublayers that a method makes sets for; ValueError for those that it cannot make."""
    check_choice("method", method, METHODS)
    possible = METHODS[method].counts(up_to)
    if budgets is not None and method == SEARCH:
        raise ValueError("method search makes a set for every number of sublayers up to up_to; leave budgets out")
    counts = sorted(set(possible if budgets is None else budgets))
    wrong = [count for count in counts if count not in possible]
    if wrong or not counts:
        step = METHODS[method].step
        given = f"up_to {up_to}" + ("" if budgets is None else f" and budgets {', '.join(map(str, budgets))}")
        raise ValueError(f"method {method} makes sets of multiples of {step} sublayers, up to up_to; given: {given}")
    return counts


def settings_of(method: str, given: Mapping[str, float]) -> dict[str, float]:
    """The numbers of a method, the given ones and its defaults; ValueError for an unknown or impossible one."""
    known = {} if method == SEARCH else PEERS[method].settings
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"method {method} has no setting {unknown[0]}; allowed: {', '.join(known) or 'none'}")
    settings = {**known, **given}
    if "effort" in settings and not 0 < settings["effort"] <= 10:
        raise ValueError(f"effort must be above 0 and at most 10; got {settings['effort']:g}")
    return settings


def _cosine_window(asked: Asked) -> Found:
    began = time.perf_counter()
    choices = windows(layer_angles(asked.model, asked.prompts), asked.counts, "cosine_window")
    return Found(choices, len(asked.prompts), sum(map(len, asked.prompts)), time.perf_counter() - began)


def _blockpruner(asked: Asked) -> Found:
    prompts = asked.prompts
    progress = asked.progress(blockpruner.TextLoss(asked.model, prompts), "blockpruner")
    choices = blockpruner.prune(
        progress,
        [len(prompt) - 1 for prompt in prompts],
        num_layers=asked.num_layers,
        up_to=max(asked.counts),
        found_by="blockpruner",
        show_progress=asked.show_progress,
    )
    tokens = sum(len(prompts[i]) for _, i in progress.known)
    wanted = {count: choices[count] for count in asked.counts}
    return Found(wanted, len(progress.known), tokens, progress.seconds)


def _evopress(asked: Asked) -> Found:
    prompts = asked.prompts
    progress = asked.progress(lambda plan, i: divergence(plan, [i])[0], "evopress")
    answers = asked.answers(progress)
    divergence = OutputDivergence(asked.model, prompts, asked.phase, answers=answers, **asked.stops)
    setup = divergence.num_forwards, divergence.num_tokens, divergence.seconds
    pairs = zip(prompts, answers, strict=True)
    lengths = [len(prompt) + len(answer) for prompt, answer in pairs if len(answer) or asked.phase != "decode"]
    choices = {
        count: evopress.evolve(
            progress,
            lengths,
            num_layers=asked.num_layers,
            count=count,
            effort=asked.settings["effort"],
            seed=int(asked.settings["seed"]),
            found_by="evopress",
            show_progress=asked.show_progress,
        )
        for count in asked.counts
    }
    answered, run = sum(map(len, answers)), [passage.ids.numel() for passage in divergence.passages]
    return Found(
        choices,
        num_forwards=len(prompts) + answered + setup[0] + len(progress.known),
        num_tokens=sum(map(len, prompts)) + answered + setup[1] + sum(run[i] for _, i in progress.known),
        seconds=setup[2] + progress.seconds,
    )


PEERS: Mapping[str, Peer] = {
    "cosine_window": Peer(_cosine_window, lambda num_layers, num_prompts, counts: num_prompts),
    "blockpruner": Peer(
        _blockpruner,
        lambda num_layers, num_prompts, counts: blockpruner.most_measured(num_layers, num_prompts, max(counts)),
    ),
    "evopress": Peer(_evopress, evopress.most_measured, {"effort": evopress.EFFORT, "seed": 0}),
}
"""By the name of the method, which is that of the strategy."""
