"""`python speed/roofline.py`: predictions for any models on every known GPU, as tables, JSON and a figure."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from adaskip.common.commands import study
from adaskip.common.files import write_text_atomic
from adaskip.common.options import check_options, option
from adaskip.common.paths import given_or_default
from adaskip.common.provenance import git_commit, versions
from adaskip.models.source import find_source
from adaskip.profiles.assumed import ASSUMED, assumed_profile
from adaskip.profiles.importance import ImportanceProfile
from adaskip.roofline import ModelShape, known_ceilings, known_devices, measure_ceilings
from adaskip.runs.cells import MODELS
from adaskip.runs.config import DTYPES, MODEL_HELP
from adaskip.runs.job import find_profile
from adaskip.studies.bench.settings import RESULTS_DIR, Workload
from adaskip.studies.limits.launches import Launches
from adaskip.studies.limits.predictions import (
    PAPER_DEVICE,
    Device,
    compare,
    crossovers,
    explain,
    read_measured,
    ways,
)
from adaskip.studies.limits.report import Roofline, plot_sublayers
from adaskip.studies.tables.paper import load_paper

STEM = "roofline"
OUTPUT_DIR = "speed/results/roofline"
PLACES = ("measured_dir", "output_dir")
"""Options that name folders and do not affect predictions."""


@dataclass(frozen=True, kw_only=True)
class RooflineConfig:
    """The options of `speed/roofline.py`."""

    models: tuple[str, ...] = option(MODEL_HELP, MODELS, aliases=["--model"], distinct=True)
    devices: tuple[str, ...] = option(
        f"GPUs by their data sheets: {', '.join(known_devices())}; the figure shows the first",
        known_devices(),
        distinct=True,
    )
    measure: bool = option(
        "also predict for a device of this machine, whose ceilings are measured in a few seconds", False
    )
    device: str | None = option("torch device for --measure; default: cuda if available, else cpu")
    dtype: str = option(f"dtype for --measure: {', '.join(DTYPES)}", "bfloat16", choices=DTYPES)
    budgets: tuple[int, ...] = option("numbers of sublayers to skip", (8, 12, 16), least=1, distinct=True)
    prompt_tokens: int = option("prompt length in tokens", 8000, least=1)
    new_tokens: int = option("tokens generated after each prompt", 512, least=2)
    batch_size: int = option("prompts per batch", 1, least=1)
    profile: str | None = option("saved importance profile, for exactly one model; default: sets like the paper's")
    measured_dir: str | None = option(
        f"folder of the benchmark's results, to compare with predictions; default: {RESULTS_DIR}"
    )
    output_dir: str | None = option(f"output folder; default: {OUTPUT_DIR}")

    def __post_init__(self) -> None:
        check_options(self)
        for model in self.models:
            find_source(model)
        for device in self.devices:
            known_ceilings(device)
        if self.profile is not None and len(self.models) != 1:
            raise ValueError(
                f"--profile needs exactly one model, but --models has {len(self.models)}: {' '.join(self.models)}"
            )
        if self.device is not None and not self.measure:
            raise ValueError("--device needs --measure")


def main(doc: str | None) -> int:
    """Run the script; returns the exit code. doc: its docstring."""
    return study(doc, RooflineConfig, _run)


def _run(config: RooflineConfig) -> int:
    print("wrote " + ", ".join(map(str, write(config, predict_all(config)))))
    return 0


def predict_all(config: RooflineConfig) -> Roofline:
    """All predictions of a configuration."""
    devices = [Device(known_ceilings(name)) for name in config.devices]
    if config.measure:
        dtype = getattr(torch, config.dtype)
        present = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        devices.append(Device(measure_ceilings(present, dtype), dtype.itemsize))
    work = Workload(config.prompt_tokens, config.new_tokens, config.batch_size)
    papers, asked = PAPER_DEVICE in config.devices, ways(config.budgets)
    shapes, operators, predictions, explained, crossed = {}, {}, [], [], []
    for source in map(find_source, config.models):
        model, shape = source.name, ModelShape.of(source.config)
        profile = assumed_profile(shape.num_layers)
        if config.profile is not None:
            profile = ImportanceProfile.load(find_profile(config.profile, ImportanceProfile))
        launches = Launches(source.config)
        shapes[model], operators[model] = shape, launches.by_kind()
        crossed += crossovers(model, shape, devices[0].ceilings)
        for device in devices:
            predictions += compare(model, shape, device, work, asked, profile)
        if papers and model in load_paper().models:
            explained += explain(model, shape, Device(known_ceilings(PAPER_DEVICE)), work, profile, launches)
    measured = read_measured(given_or_default(config.measured_dir, RESULTS_DIR))
    skip_set = ASSUMED if config.profile is None else f"profile {Path(config.profile).name}"
    return Roofline(work, devices, shapes, skip_set, predictions, explained, crossed, operators, measured)


def write(config: RooflineConfig, roofline: Roofline) -> list[Path]:
    """Write `roofline.md`, `.json` and the figure `sublayers` into the output folder; returns their paths."""
    out_dir = given_or_default(config.output_dir, OUTPUT_DIR)
    figure = plot_sublayers(roofline.shapes, roofline.devices[0].ceilings, out_dir / "sublayers")
    models = list(roofline.shapes)
    manifest = {
        "made_by": "speed/roofline.py",
        "config": {**{name: value for name, value in asdict(config).items() if name not in PLACES}, "models": models},
        "versions": versions(),
        "git_commit": git_commit(),
    }
    record = {"manifest": manifest, **roofline.to_dict()}
    return [
        write_text_atomic(out_dir / f"{STEM}.md", roofline.to_markdown(figure[0].name)),
        write_text_atomic(out_dir / f"{STEM}.json", json.dumps(record, indent=1, allow_nan=False) + "\n"),
        *figure,
    ]
