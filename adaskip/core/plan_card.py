"""Text about a plan: a map of its sublayers, a summary of its origin, and the model card of a saved plan."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaskip.core.plan_origin import PlanOrigin

if TYPE_CHECKING:
    from adaskip.core.plan import SkipPlan

SKIPPED, LIVE = "#", "."
LAYERS_PER_LINE = 100
IN_THE_FILE = ("weights_fingerprint", "config_fingerprint", "versions")
"""Fields of a profile's provenance that are only in the plan's file, not in its summary."""

CARD = """---
library_name: adaskip
{base_model}tags:
- adaskip
- sublayer-skipping
---

# Skip plan for {model}

{skipped}, in the place of each `h <- scale * h`.

```text
{plan_map}
```

```python
from adaskip import SkipPlan, skipping
from adaskip.models.loading import load_model

loaded = load_model(checkpoint={name})  # a stock model of transformers
model, tokenizer = loaded.model, loaded.tokenizer
plan = SkipPlan.from_pretrained(".")  # this folder; or org/name on the Hub
inputs = tokenizer("The capital of France is", return_tensors="pt").to(model.device)
with skipping(model, plan):
    output = model.generate(**inputs, max_new_tokens=16)
print(tokenizer.decode(output[0]))
```

| | |
|---|---|
{rows}
"""

CARD_FILE = "README.md"
OURS = re.compile(r"---\s*\n(?:(?!---).*\n)*library_name:\s*adaskip\s*\n")
"""How the cards begin that adaskip writes, also after edits on the Hub."""


def check_card(file: Path, name: str | None = None) -> None:
    """Raise ValueError for a README.md that adaskip did not write. name: what the message calls it."""
    if file.is_file() and not OURS.match(file.read_text(encoding="utf-8", errors="replace")):
        raise ValueError(
            f"{name or file} was not written by adaskip and would be replaced by the plan's model card; give another "
            "folder or repository, or move it away"
        )


def plan_map(plan: SkipPlan, num_layers: int) -> str:
    """Two rows, attention and FFN, with one character per layer: `#` is skipped, `.` runs."""
    lines = []
    for start in range(0, num_layers, LAYERS_PER_LINE):
        layers = range(start, min(start + LAYERS_PER_LINE, num_layers))
        lines.append(f"{'layer':11}" + "".join(f"{layer:<10}" for layer in layers if layer % 10 == 0).rstrip())
        for kind in ("attention", "ffn"):
            skipped = getattr(plan, kind)
            lines.append(f"{kind:11}" + "".join(SKIPPED if layer in skipped else LIVE for layer in layers))
    return "\n".join(lines)


def summary(plan: SkipPlan, origin: PlanOrigin) -> dict[str, str]:
    """The properties of a plan and its origin, by heading."""
    scales = [scale for scale in plan.scales.values() if isinstance(scale, float)]
    spans = f"{min(scales):.3f} to {max(scales):.3f}" if scales else "all 1"
    return {
        "model": f"{origin.model} ({origin.num_layers} layers)",
        "phase": origin.phase,
        "skipped": f"{len(plan)} of {2 * origin.num_layers} sublayers",
        "strategy": _text({"name": origin.strategy, **origin.options}),
        "budget": _text(origin.budget),
        "scales": "affine" if len(scales) < len(plan.scales) else spans,
        "profile": "none" if origin.profile is None else _text(origin.profile, leave_out=IN_THE_FILE),
        "weights": origin.weights_fingerprint,
        "configuration": origin.config_fingerprint,
        "adapter": origin.adapter or "none",
        "made with": _text(origin.versions),
    }


def model_card(plan: SkipPlan, origin: PlanOrigin) -> str:
    """The README.md of a saved plan."""
    told = summary(plan, origin)
    return CARD.format(
        base_model=f"base_model: {origin.model.partition('@')[0]}\n" if origin.on_hub else "",
        model=origin.model,
        name=json.dumps(origin.model),
        skipped=f"Skips {told['skipped']} in phase {origin.phase}",
        plan_map=plan_map(plan, origin.num_layers),
        rows="\n".join(f"| {heading} | {text} |" for heading, text in told.items()),
    )


def _text(record: Mapping[str, Any], leave_out: Collection[str] = ()) -> str:
    """A mapping on one line; lists of more than three entries are shown by their length."""
    parts = []
    for name, value in record.items():
        if name in leave_out:
            continue
        if isinstance(value, (list, tuple)):
            value = f"{len(value)} entries" if len(value) > 3 else " ".join(map(str, value))
        if value not in (None, ""):
            parts.append(f"{name} {value}")
    return ", ".join(parts)
