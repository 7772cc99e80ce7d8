"""The process of one engine and model: reads a line for each generation, answers with a line of times.

`python -m adaskip.studies.engines.worker MODULE SETTINGS`, SETTINGS being JSON. What the engine prints goes to standard
error. The process ends with its standard input.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "process": time.process_time}


def main(module: str, settings: str) -> None:
    """Load the model, answer with what is known of it, then time one generation after another."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        times = importlib.import_module(module).Times(**json.loads(settings))
        _answer(answers, times.describe())
        for line in sys.stdin:
            request = json.loads(line)
            gc.collect()
            _answer(answers, times.run(request["ids"], request["new_tokens"], CLOCKS[request["clock"]]))


def _answer(answers: Any, record: dict[str, Any]) -> None:
    print(json.dumps(record), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
