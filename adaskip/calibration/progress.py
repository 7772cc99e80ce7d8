"""What a search has measured so far, kept in a file: a search that was stopped goes on where it was.

One JSON line per divergence, behind a line that says of which search they are. A search depends on nothing but these
numbers, so that it takes the same way again, and only what is missing is measured. The file only ever grows: a line
that was torn is passed over, and lines of another search stay for that. Who has saved what a search found deletes it.
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
    """A divergence in nats, and what the forward took."""

    divergence: float
    seconds: float


class Progress:
    """The measure of a search: it runs each set on each prompt once, and keeps what came of it in the file at `path`.

    run: divergence of a set on one prompt. identity: what the search depends on. path: None keeps nothing beyond the
    process. num_prompts: lines of further prompts are passed over.
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
    """Keep other processes from the progress file at `path`; None is no file.

    Raises:
        LockedError: another process searches with it.
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
    """What the file at `path` holds of the search that `head` names, which the lines to come are said to be of."""
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
    """A line's set, prompt and measurement; None for one that was torn or damaged, which is measured again."""
    try:
        entry = json.loads(line)
        chosen = frozenset(Sublayer(kind, layer) for kind, layer in entry["set"])
        prompt, divergence, seconds = entry["prompt"], float(entry["divergence"]), float(entry["seconds"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    whole = all(type(layer) is int and layer >= 0 and kind in get_args(SublayerKind) for kind, layer in chosen)
    if not whole or type(prompt) is not int or prompt < 0:
        return None
    if not divergence >= 0 or not 0 <= seconds < math.inf:  # an infinite divergence is one that overflowed
        return None
    return (chosen, prompt), Measured(divergence, seconds)
