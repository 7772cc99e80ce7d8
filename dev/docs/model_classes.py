"""Writes docs/model-classes.md: every causal language model of transformers, accepted or refused.

From the root of a checkout: `python -m dev.docs.model_classes` checks the classes of the installed transformers, saves
their states in dev/docs/class_states, and writes the page from all saved releases. Each class is made tiny and random;
an accepted one is compared with the same model whose skipped sublayers put out zero, as in
tests/integration/test_every_class.py.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version

from adaskip.core.blocks import UnsupportedModelError, find_structure
from tests.integration.test_every_class import CLASSES, check_against_zeroed, tiny_model
from tests.integration.test_other_models import VISION

PAGE, STATES = Path("docs/model-classes.md"), Path("dev/docs/class_states")
HEAD = """# Model classes

Every causal language model of transformers, made as a tiny random model of four layers by
`python -m dev.docs.model_classes` in a checkout, with each release below. An accepted class generated the same tokens
as the same model whose skipped sublayers put out zero, with logits within 1e-4, for plans of attention, FFN, both, and
whole layers. A class can have several forms, so a model is checked again when it is used: what counts is its own
configuration. Of the unknown classes no tiny model could be made, so nothing is known about them.

| transformers | torch | Python | classes | accepted | refused | unknown |
|---|---|---|---|---|---|---|
{releases}
"""
TAIL = """
## Other ways of having a model

The same comparison, in `tests/integration/test_other_models.py` and `tests/engines/test_torchao.py`:

| model | state |
|---|---|
| Vision-language models, their language model: {vision} | accepted |
| bitsandbytes 8-bit and 4-bit weights, torchao int8 weights, with and without int8 activations | accepted |
| PEFT: LoRA and similar adapters | accepted |
| PEFT: prompt tuning, prefix tuning | refused: they put learnt tokens before the prompt |
| Mixtures of experts | as in the first table, where `Moe` or `Mixtral` is in the name |
"""


def main() -> None:
    """Check all classes of the installed transformers, save their states and write the page."""
    record = {
        "versions": {
            "transformers": transformers.__version__,
            "torch": torch.__version__.partition("+")[0],
            "python": platform.python_version(),
        },
        "classes": {name.removesuffix("Config"): state(name) for name in sorted(CLASSES)},
    }
    text = json.dumps(record, indent=1) + "\n"
    (STATES / f"{transformers.__version__}.json").write_text(text, encoding="utf-8")
    PAGE.write_text(page(saved_records()), encoding="utf-8")


def state(name: str) -> tuple[str, str]:
    """accepted, refused or unknown, and the structure or reason; AssertionError if skipping differs from zeroing."""
    try:
        model = tiny_model(CLASSES[name])
    except Exception as error:  # whatever a class raises that cannot be made tiny
        return "unknown", f"cannot be made tiny ({type(error).__name__})"
    try:
        structure = find_structure(model)
    except UnsupportedModelError as error:
        line, _, _ = " ".join(str(error).split()).partition(" (pre-norm: ")  # the list of all structures
        return "refused", line
    check_against_zeroed(model, structure)
    return "accepted", structure.name


def saved_records() -> list[dict[str, Any]]:
    """The saved states of all releases, newest first."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in STATES.glob("*.json")]
    return sorted(records, key=lambda record: Version(record["versions"]["transformers"]), reverse=True)


def page(records: list[dict[str, Any]]) -> str:
    """The page: all classes of the first record's release, and what differs in each of the others."""
    newest, *others = records
    parts = [HEAD.format(releases="\n".join(map(_release, records))), _heading(newest), *_table(newest["classes"])]
    for record in others:
        parts += [_heading(record), *_differences(record["classes"], newest["classes"])]
    vision = ", ".join(name.removesuffix("Config") for name in VISION)
    return "\n".join([*parts, TAIL.format(vision=vision)])


def _release(record: dict[str, Any]) -> str:
    states = [state for state, _ in record["classes"].values()]
    counts = [len(states), *(states.count(state) for state in ("accepted", "refused", "unknown"))]
    return f"| {' | '.join(map(str, (*record['versions'].values(), *counts)))} |"


def _heading(record: dict[str, Any]) -> str:
    return f"\n## transformers {record['versions']['transformers']}\n"


def _differences(classes: dict[str, Any], newest: dict[str, Any]) -> Iterator[str]:
    """The classes that the newest release has and this one lacks, and those whose state or structure differs."""
    lacking = ", ".join(name for name in newest if name not in classes)
    yield f"It lacks {lacking}. The other classes are as above, except:\n"
    same = [name for name, row in classes.items() if _outcome(row) == _outcome(newest.get(name, ("absent", "")))]
    yield from _table({name: row for name, row in classes.items() if name not in same})


def _outcome(row: Sequence[str]) -> tuple[str, str]:
    """State and structure: the wording of a refusal may change."""
    state, told = row
    return state, told if state == "accepted" else ""


def _table(classes: dict[str, Any]) -> Iterator[str]:
    yield "| configuration | state | structure, or why not |\n|---|---|---|"
    for name, (state, told) in classes.items():
        yield f"| {name} | {state} | {told.replace('|', chr(92) + '|')} |"


if __name__ == "__main__":
    main()
