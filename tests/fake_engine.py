"""An engine for tests of the benchmark: generates nothing, and ends where it is asked for 99 tokens."""

from __future__ import annotations

import json
import sys
from pathlib import Path


class Times:
    """The bytes of K/V are those of the layers that have an attention, at one byte a token."""

    def __init__(self, model, draft, **settings):
        print("an engine that talks")
        config = json.loads((Path(model) / "config.json").read_text())
        self.live = config["num_hidden_layers"] - len(config.get("adaskip", {"attention": []})["attention"])
        self.draft, self.settings = draft, settings

    def describe(self):
        return {"version": "1.0", "kv_capacity_tokens": 1200 // self.live, "settings": self.settings}

    def run(self, ids, new_tokens, now):
        if new_tokens == 99:
            sys.exit("no place for 99 tokens")
        start = now()
        kv_bytes = self.live * len(ids) * (len(ids[0]) + new_tokens)
        drafted = {} if self.draft is None else {"drafted": 8, "accepted": 6}
        return {
            **{"ttft_s": now() - start + 0.1 * self.live, "steps_s": [0.01 * self.live], "kv_bytes": kv_bytes},
            **{"peak_memory_bytes": None, **drafted},
        }
