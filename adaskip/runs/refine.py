"""`adaskip calibrate --refine`: refines the scales of a selection on the prompts of a search for its phase."""

from __future__ import annotations

from pathlib import Path

from adaskip.calibration.refine import check_refinable, refine_scales
from adaskip.common.files import check_writable
from adaskip.common.locks import exclusive
from adaskip.profiles.selection import SelectionProfile
from adaskip.runs.calibrate_config import CalibrateConfig
from adaskip.runs.calibration import find_calibration
from adaskip.runs.job import find_profile
from adaskip.runs.loading import find_loading, prepare_torch
from adaskip.runs.records import find_records


def refine_to(config: CalibrateConfig) -> tuple[SelectionProfile, tuple[Path, ...]]:
    """Write the selection `config.refine` with refined scales to `config.output`; returns it and its path."""
    assert config.refine is not None, "asked for"
    assert config.output is not None, "checked by the configuration"
    prepare_torch(config)
    output = Path(config.output)
    check_writable(output)
    selection = SelectionProfile.load(find_profile(config.refine, SelectionProfile, "--refine"))
    loading = find_loading(config, config.model, config.max_prompt_tokens)
    loading.check_limit()
    counts = config.budgets or config.setup.budgets_for(loading.num_layers)
    check_refinable(selection, counts)
    tasks = config.tasks or config.setup.phases[selection.phase].tasks
    calibration = find_calibration(config, find_records(config, loading), tasks, config.samples)
    loaded = loading.load()
    with exclusive(output.with_name(f"{output.name}.lock"), of=output):
        refined = refine_scales(
            loaded.model,
            selection,
            calibration.prompts(calibration.searched, loaded),
            counts,
            eos_token_ids=loaded.spec.stop_token_ids,
            pad_token_id=loaded.pad_token_id,
            data_ids=[sample["_id"] for _, sample in calibration.searched],
            path=output,
            show_progress=True,
            weights_fingerprint=loaded.weights_fingerprint,
        )
    return refined, (output,)
