"""Exports a model under a plan to an engine: checked before, written whole or not at all, verified after writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adaskip.common.folders import check_new, check_new_file, new_file, new_folder
from adaskip.core.plan import PLAN_FILE
from adaskip.engines.registry import Export, engine
from adaskip.engines.tokenizers import check_tokenizer, verify_tokenizer, write_tokenizer

REPORT = "adaskip_export.json"
"""What an export says of itself in its folder, beside the plan."""


def export_to(name: str, export: Export, output: str | Path, *, verify: bool = True) -> dict[str, Any]:
    """Export to an engine of `registry.ENGINES`, into the folder `output`, which is new or empty; for an engine that
    takes a single file (`SUFFIX`), into the new file `output`.

    verify: load both models afterwards, one after the other, and compare their logits on a prompt, and of a folder the
    tokens of its tokenizer.

    Returns what also stands in the folder's report. Raises ValueError for what cannot be exported, before anything is
    written, or differs from the plan, and OSError for a full disk; then nothing is left at `output`.
    """
    chosen = engine(name)
    one_file = (suffix := getattr(chosen, "SUFFIX", "")) != ""
    if not str(output).endswith(suffix):
        raise ValueError(f"{output} is no name for an export to {name}, which is one file; allowed: names in {suffix}")
    (check_new_file if one_file else check_new)(Path(output))
    chosen.check(export)
    if not one_file:
        check_tokenizer(export)
    with (new_file if one_file else new_folder)(output) as target:
        chosen.write(export, target)
        if not one_file:
            write_tokenizer(export, target)
        if verify and not one_file:
            verify_tokenizer(export, target)
        report = {
            "engine": name,
            "model_type": export.source.model_type,
            "num_layers": export.folded.num_layers,
            "num_skipped": len(export.strategy.skipped),
            "skipped": export.strategy.skipped.to_dict(),
            "scales_in_weights": export.folded.is_scaled,
            "verified": chosen.verify(export, target) if verify else None,
        }
        if not one_file:
            export.strategy.skipped.save(target / PLAN_FILE)
            (target / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report
