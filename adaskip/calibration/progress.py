"""Keeps the measurements of a search in a file, so that a stopped search can continue.

The file has one JSON line per answer of the full model and per divergence, after a line that identifies the search.
A search is a deterministic function of these, so a repeated search takes the same steps and measures only what is
missing. The file only grows: truncated lines are ignored, and lines of other searches stay for those. The caller
deletes the file after it has saved the result of the search.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from adaskip.calibration.search import Set
from adaskip.common.locks import exclusive
from adaskip.core.plan import Sublayer, SublayerKind

Key = tuple[Set, int]


@dataclass(frozen=True)
class Measured:
    """A divergence in nats, and the time of its measurement."""

    divergence: float
    seconds: float


@dataclass(frozen=True)
class Answer:
    """Token ids of the full model's greedy answer to a prompt, and the time of its generation."""

    token_ids: list[int]
    seconds: float


class Progress:
    """Measures divergences for a search, each set on each prompt once, and keeps them in the file at `path`.

    run: returns the divergence of a set on one prompt. path: None keeps nothing after the process. identity: all that
    the divergences depend on. num_prompts: lines of prompts with a larger index are ignored.
    """

    def __init__(
        self,
        run: Callable[[Set, int], float],
        path: Path | None,
        identity: Mapping[str, Any],
        num_prompts: int | None = None,
    ):
        self.run, self.path = run, path
        self.known: dict[Key, Measured] = {}
        self.known_answers: dict[int, Answer] = {}
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        for entry in _continued(path, json.dumps({"search": identity}, sort_keys=True)):
            if (answer := _answer(entry)) is not None:
                self.known_answers.setdefault(*answer)
            elif (measured := _measured(entry)) is not None and (num_prompts is None or measured[0][1] < num_prompts):
                self.known.setdefault(*measured)

    def __call__(self, chosen: Set, which: Sequence[int]) -> list[float]:
        """Divergence of `chosen` on each of the prompts `which`."""
        return [self._measured(chosen, prompt).divergence for prompt in which]

    def answers(
        self, number: int, generate: Callable[[Container[int]], Iterator[Mapping[int, list[int]]]]
    ) -> list[list[int]]:
        """The full model's answers to prompts 0 to `number` - 1.

        generate: makes the answers batch by batch, by prompt, without batches whose prompts are all among the given.
        The prompts of a batch share its time.
        """
        began = time.perf_counter()
        for batch in generate(self.known_answers):
            seconds = (time.perf_counter() - began) / len(batch)
            for prompt, token_ids in batch.items():
                self.known_answers[prompt] = Answer(token_ids, seconds)
                if self.path is not None:
                    _append(self.path, json.dumps({"answer": token_ids, "prompt": prompt, "seconds": seconds}))
            began = time.perf_counter()
        return [self.known_answers[prompt].token_ids for prompt in range(number)]

    def _measured(self, chosen: Set, prompt: int) -> Measured:
        key = chosen, prompt
        if key not in self.known:
            began = time.perf_counter()
            divergence = self.run(*key)
            self.known[key] = Measured(divergence, time.perf_counter() - began)
            if self.path is not None:
                _append(self.path, _line(key, self.known[key]))
        return self.known[key]

    @property
    def seconds(self) -> float:
        """Time of all measurements and answers."""
        return sum(each.seconds for each in (*self.known.values(), *self.known_answers.values()))


@contextmanager
def held(path: Path | None) -> Iterator[None]:
    """Lock the progress file at `path`; None means that there is no file.

    Raises:
        LockedError: another process uses the file.
    """
    if path is None:
        yield
        return
    with exclusive(path.with_name(f"{path.name}.lock"), of=path):
        yield


def _line(key: Key, measured: Measured) -> str:
    chosen, prompt = key
    sublayers = sorted((sublayer.kind, sublayer.layer) for sublayer in chosen)
    return json.dumps({"set": sublayers, "prompt": prompt, **asdict(measured)})


def _append(path: Path, line: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def _continued(path: Path, head: str) -> list[Any]:
    """The entries in the file at `path` of the search that `head` identifies, without truncated and damaged lines.

    Appends `head` if needed, so that lines appended later belong to this search.
    """
    content = path.read_bytes().decode("utf-8", errors="replace") if path.is_file() else ""
    entries: list[Any] = []
    of = ""
    for line in content.split("\n"):
        if line.startswith('{"search"'):
            of = line
        elif of == head:
            with suppress(ValueError, RecursionError):
                entries.append(json.loads(line))
    if content and not content.endswith("\n"):
        _append(path, "")
    if of != head:
        _append(path, head)
    return entries


def _answer(entry: Any) -> tuple[int, Answer] | None:
    """The prompt and the answer of an entry; None for any other entry."""
    try:
        token_ids, prompt, seconds = entry["answer"], entry["prompt"], float(entry["seconds"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
    whole = isinstance(token_ids, list) and all(type(x) is int and x >= 0 for x in (*token_ids, prompt))
    return (prompt, Answer(token_ids, seconds)) if whole and 0 <= seconds < math.inf else None


def _measured(entry: Any) -> tuple[Key, Measured] | None:
    """The set, prompt and measurement of an entry; None for a damaged one, which is measured again."""
    try:
        chosen = frozenset(Sublayer(kind, layer) for kind, layer in entry["set"])
        prompt, divergence, seconds = entry["prompt"], float(entry["divergence"]), float(entry["seconds"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
    whole = all(type(layer) is int and layer >= 0 and kind in get_args(SublayerKind) for kind, layer in chosen)
    if not whole or type(prompt) is not int or prompt < 0:
        return None
    if not divergence >= 0 or not 0 <= seconds < math.inf:  # a divergence may be infinite, after an overflow
        return None
    return (chosen, prompt), Measured(divergence, seconds)
