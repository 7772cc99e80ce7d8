"""Writes docs/model-classes.md: every causal language model of the installed transformers, accepted or refused.

From the root of a checkout: `python -m dev.docs.model_classes`. Each class is made tiny and random; what is accepted is
compared with the same model whose skipped sublayers put out zero, as tests/integration/test_every_class.py does.
"""

from __future__ import annotations

from pathlib import Path

import transformers

from adaskip.core.blocks import UnsupportedModelError, find_structure
from tests.integration.test_every_class import CLASSES, check_against_zeroed, tiny_model
from tests.integration.test_other_models import VISION

PAGE = Path("docs/model-classes.md")
HEAD = """# Model classes

Every causal language model of transformers {version}, made as a tiny random model of four layers by
`python -m dev.docs.model_classes` in a checkout. An accepted class generated the same tokens as the same model whose
skipped sublayers put out zero, with logits within 1e-4, for plans of attention, FFN, both, and whole layers. A class
can have several forms, so a model is checked again when it is used: what counts is its own configuration.

{accepted} of {all} classes are accepted and {refused} are refused. {others} could not be made tiny, so nothing is known
about them.
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
| Mixtures of experts | as in the table above, where `Moe` or `Mixtral` is in the name |
"""


def main() -> None:
    """Check all classes and write the page."""
    rows = {name: state(name) for name in sorted(CLASSES)}
    kinds = [row[0] for row in rows.values()]
    counts = {kind: kinds.count(kind) for kind in ("accepted", "refused")}
    counts |= {"all": len(kinds), "others": kinds.count("unknown"), "version": transformers.__version__}
    lines = [f"| {name.removesuffix('Config')} | {kind} | {told} |" for name, (kind, told) in rows.items()]
    table = "\n".join(["| configuration | state | structure, or why not |", "|---|---|---|", *lines])
    vision = ", ".join(name.removesuffix("Config") for name in VISION)
    PAGE.write_text(f"{HEAD.format(**counts)}\n{table}\n{TAIL.format(vision=vision)}", encoding="utf-8")


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
        return "refused", line.replace("|", "\\|")
    check_against_zeroed(model, structure)
    return "accepted", structure.name


if __name__ == "__main__":
    main()
