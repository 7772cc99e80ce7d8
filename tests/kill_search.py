"""Kills a calibration over and over, at random moments of its search and at every step of its saving.

`python -m tests.kill_search FOLDER OPTIONS OF adaskip calibrate --select`: works in FOLDER and prints how often it was
killed before it came to its end.
Each try is a fork of this process, so that no try pays for the imports.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from adaskip import cli

FILE_EVENTS = ("open", "os.rename", "os.remove", "os.chmod", "os.mkdir", "os.rmdir", "os.truncate")
"""Audit events of what changes files; each comes just before the change."""
IN_SEARCH = 30


def main(folder: Path, options: list[str]) -> None:
    torch.set_num_threads(1)
    argv, draw = [*options, "--output-dir", str(folder / "runs")], random.Random(0)
    in_search = 0
    while in_search < IN_SEARCH:
        moment = {"at_event": draw.randint(3, 20)} if in_search % 2 else {"after_s": draw.uniform(0.05, 1.0)}
        assert _try(argv, **moment), "the search ended before it was killed often enough"
        in_search += 1
    assert _try(argv, at_event=1, of=("os.rename",), where="selection"), "a profile came to its place in another way"
    measured, in_saving = _measured(folder), 1
    while _try(argv, at_event=in_saving):  # all is measured: before each file event of what is left
        in_saving += 1
        assert list(folder.glob("profiles/*-selection-*.json")) or _measured(folder) == measured, (
            "measurements are lost"
        )
    print(json.dumps({"in_search": in_search, "in_saving": in_saving}))


def _measured(folder: Path) -> int:
    """Lines of the progress file."""
    (path,) = folder.glob("profiles/*.partial.jsonl")
    return len(path.read_text().splitlines())


def _try(
    argv: list[str],
    *,
    after_s: float | None = None,
    at_event: int = 0,
    of: tuple[str, ...] = FILE_EVENTS,
    where: str = "profiles",
) -> bool:
    """Whether SIGKILL came before the end: after so many seconds, or before file event number `at_event` of such a kind
    and such a path."""
    if (child := os.fork()) == 0:
        if at_event:
            _kill_at(at_event, of, where)
        os._exit(cli.main(["calibrate", *argv]))
    if after_s is not None:
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, "a try that was not killed failed"
    return False


def _kill_at(number: int, of: tuple[str, ...], where: str) -> None:
    left = number

    def hook(event: str, arguments: tuple) -> None:
        nonlocal left
        if event in of and where in str(arguments[0]):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
