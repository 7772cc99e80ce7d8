"""Keeps the measurements of a search in a file, so that a stopped search can continue.

The file has one JSON line per divergence, after a line that identifies the search. A search is a deterministic function
of these numbers, so a repeated search takes the same steps and measures only what is missing. The file only grows:
truncated lines are ignored, and lines of other searches stay for those. The caller deletes the file after it has saved
the result of the search.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            found = _continued(path, json.dumps({"search": identity}, sort_keys=True))
            self.known = {key: value for key, value in found.items() if num_prompts is None or key[1] < num_prompts}

    def __call__(self, chosen: Set, which: Sequence[int]) -> list[float]:
        """Divergence of `chosen` on each of the prompts `which`."""
        return [self._measured(chosen, prompt).divergence for prompt in which]

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
        return sum(measured.seconds for measured in self.known.values())


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


def _continued(path: Path, head: str) -> dict[Key, Measured]:
    """The measurements in the file at `path` of the search that `head` identifies.

    Appends `head` if needed, so that lines appended later belong to this search.
    """
    content = path.read_bytes().decode("utf-8", errors="replace") if path.is_file() else ""
    known: dict[Key, Measured] = {}
    of = ""
    for line in content.split("\n"):
        if line.startswith('{"search"'):
            of = line
        elif of == head and (entry := _entry(line)) is not None:
            known.setdefault(*entry)
    if content and not content.endswith("\n"):
        _append(path, "")
    if of != head:
        _append(path, head)
    return known


def _entry(line: str) -> tuple[Key, Measured] | None:
    """The set, prompt and measurement of a line; None for a truncated or damaged line, which is measured again."""
    try:
        entry = json.loads(line)
        chosen = frozenset(Sublayer(kind, layer) for kind, layer in entry["set"])
        prompt, divergence, seconds = entry["prompt"], float(entry["divergence"]), float(entry["seconds"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    whole = all(type(layer) is int and layer >= 0 and kind in get_args(SublayerKind) for kind, layer in chosen)
    if not whole or type(prompt) is not int or prompt < 0:
        return None
    if not divergence >= 0 or not 0 <= seconds < math.inf:  # a divergence may be infinite, after an overflow
        return None
    return (chosen, prompt), Measured(divergence, seconds)
