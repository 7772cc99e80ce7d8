"""What a search has measured so far, kept in a file: a search that was stopped goes on where it was.

One JSON line per divergence, behind a first line that says of which search they are. A search depends on nothing but
these numbers, so that it takes the same way again, and only what is missing is measured.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adaskip.files import write_text_atomic
from adaskip.plan import Sublayer
from adaskip.selection.search import Set

Key = tuple[Set, int]


@dataclass(frozen=True)
class Measured:
    """A divergence in nats, and what the forward took."""

    divergence: float
    seconds: float


class Progress:
    """The measure of a search: it runs each set on each prompt once, and keeps what came of it in the file at `path`.

    run: divergence of a set on one prompt. identity: what the search depends on; a file of another one is replaced.
    path: None keeps nothing beyond the process.
    """

    def __init__(self, run: Callable[[Set, int], float], path: Path | None, identity: Mapping[str, Any]):
        self.run, self.path = run, path
        self.known: dict[Key, Measured] = {}
        if path is not None:
            self.known = _continued(path, json.dumps({"search": identity}, sort_keys=True) + "\n")

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
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(_line(key, self.known[key]))
        return self.known[key]

    @property
    def seconds(self) -> float:
        return sum(measured.seconds for measured in self.known.values())

    def end(self) -> None:
        """The search has its result: what led there is needed no more."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _line(key: Key, measured: Measured) -> str:
    chosen, prompt = key
    sublayers = sorted((sublayer.kind, sublayer.layer) for sublayer in chosen)
    return json.dumps({"set": sublayers, "prompt": prompt, **asdict(measured)}) + "\n"


def _continued(path: Path, head: str) -> dict[Key, Measured]:
    """What the file at `path` holds of the search that `head` names; a torn last line is dropped."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    whole = [line for line in lines if line.endswith("\n")]
    kept = whole if whole[:1] == [head] else [head]
    if kept != lines:
        write_text_atomic(path, "".join(kept))
    known = {}
    for line in kept[1:]:
        entry = json.loads(line)
        chosen = frozenset(Sublayer(kind, layer) for kind, layer in entry["set"])
        known[chosen, entry["prompt"]] = Measured(entry["divergence"], entry["seconds"])
    return known
