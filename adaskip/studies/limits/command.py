"""`python speed/roofline.py`: predictions for the paper's models on every known GPU, as tables, JSON and a figure."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from adaskip.common.choices import check_choice
from adaskip.common.commands import study
from adaskip.common.files import write_text_atomic
from adaskip.common.options import option
from adaskip.common.paths import given_or_default
from adaskip.common.provenance import git_commit
from adaskip.models.loading import architecture
from adaskip.profiles.assumed import ASSUMED, assumed_profile
from adaskip.profiles.importance import ImportanceProfile
from adaskip.roofline.ceilings import known_ceilings, known_devices, measure_ceilings
from adaskip.roofline.shape import ModelShape
from adaskip.runs.cells import MODELS
from adaskip.runs.config import DTYPES
from adaskip.studies.bench.settings import RESULTS_DIR
from adaskip.studies.limits.comparison import PAPER_DEVICE, Device, Workload, compare, explain, ways
from adaskip.studies.limits.crossover import crossovers
from adaskip.studies.limits.figure import plot_sublayers
from adaskip.studies.limits.launches import Launches
from adaskip.studies.limits.measured import read_measured
from adaskip.studies.limits.report import Roofline
from adaskip.studies.tables.paper import load_paper

STEM = "roofline"
OUTPUT_DIR = "speed/results/roofline"
PLACES = ("measured_dir", "output_dir")
"""Options that name folders, not what is predicted."""


@dataclass(frozen=True, kw_only=True)
class RooflineConfig:
    """What is predicted for which devices."""

    models: tuple[str, ...] = option(f"models, of {', '.join(MODELS)}", MODELS)
    devices: tuple[str, ...] = option(
        f"data sheets, of {', '.join(known_devices())}; the first is drawn", known_devices()
    )
    measure: bool = option("also the ceilings measured on a device of this machine, in a few seconds", False)
    device: str | None = option("torch device that is measured; if not given, cuda where there is one, else cpu")
    dtype: str = option(f"dtype in which it is measured: {', '.join(DTYPES)}", "bfloat16")
    budgets: tuple[int, ...] = option("sublayers to skip", (8, 12, 16))
    prompt_tokens: int = option("length of the prompts", 8000)
    new_tokens: int = option("tokens generated after each", 512)
    batch_size: int = option("prompts generated together", 1)
    profile: str | None = option(
        "saved importance profile of the one model given; if not given, a set like the paper's"
    )
    measured_dir: str | None = option(
        f"folder of the benchmark's results, beside which predictions are shown; if not given, {RESULTS_DIR}"
    )
    output_dir: str | None = option(f"where the results go; if not given, {OUTPUT_DIR}")

    def __post_init__(self) -> None:
        for model in self.models:
            check_choice("model", model, MODELS)
        for device in self.devices:
            known_ceilings(device)
        check_choice("--dtype", self.dtype, DTYPES)
        for name, least in (("prompt_tokens", 1), ("new_tokens", 2), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(self, name)}")
        if self.profile is not None and len(self.models) != 1:
            raise ValueError(f"--profile is of one model, but --models has {len(self.models)}: {' '.join(self.models)}")
        if self.profile is not None and not Path(self.profile).is_file():
            raise ValueError(f"--profile {self.profile} does not exist; `adaskip calibrate` makes one")
        if self.device is not None and not self.measure:
            raise ValueError("--device says what is measured: give --measure with it")

    def all_devices(self) -> list[Device]:
        """The data sheets', then the measured one."""
        devices = [Device(known_ceilings(name)) for name in self.devices]
        if self.measure:
            dtype = getattr(torch, self.dtype)
            device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
            devices.append(Device(measure_ceilings(device, dtype), dtype.itemsize))
        return devices

    def profile_of(self, num_layers: int) -> ImportanceProfile:
        """The profile given, or one that ranks as the paper's models do."""
        return ImportanceProfile.load(self.profile) if self.profile is not None else assumed_profile(num_layers)


def main(doc: str | None) -> int:
    """The script's whole life; returns its exit code. doc: the script's docstring."""
    return study(doc, RooflineConfig, _run)


def _run(config: RooflineConfig) -> int:
    print("wrote " + ", ".join(map(str, write(config, predict_all(config)))))
    return 0


def predict_all(config: RooflineConfig) -> Roofline:
    """Every prediction `config` asks for."""
    devices = config.all_devices()
    work = Workload(config.prompt_tokens, config.new_tokens, config.batch_size)
    architectures = {model: architecture(model) for model in config.models}
    shapes = {model: ModelShape.of(architecture) for model, architecture in architectures.items()}
    profiles = {model: config.profile_of(shape.num_layers) for model, shape in shapes.items()}
    launches = {model: Launches(architecture) for model, architecture in architectures.items()}
    asked = ways(config.budgets)
    paper = load_paper().models
    return Roofline(
        work=work,
        devices=devices,
        shapes=shapes,
        skip_set=ASSUMED if config.profile is None else f"profile {Path(config.profile).name}",
        predictions=[
            prediction
            for model, shape in shapes.items()
            for device in devices
            for prediction in compare(model, shape, device, work, asked, profiles[model])
        ],
        explained=[
            explained
            for model, shape in shapes.items()
            if model in paper and PAPER_DEVICE in config.devices
            for explained in explain(
                model, shape, Device(known_ceilings(PAPER_DEVICE)), work, profiles[model], launches[model]
            )
        ],
        crossovers=[
            crossover for model, shape in shapes.items() for crossover in crossovers(model, shape, devices[0].ceilings)
        ],
        operators={model: counted.by_kind() for model, counted in launches.items()},
        measured=read_measured(given_or_default(config.measured_dir, RESULTS_DIR)),
    )


def write(config: RooflineConfig, roofline: Roofline) -> list[Path]:
    """Write `roofline.md`, `.json` and the figure `sublayers` into the output folder; the paths."""
    out_dir = given_or_default(config.output_dir, OUTPUT_DIR)
    figure = plot_sublayers(roofline.shapes, roofline.devices[0].ceilings, out_dir / "sublayers")
    record = {"manifest": _manifest(config), **roofline.to_dict()}
    return [
        write_text_atomic(out_dir / f"{STEM}.md", roofline.to_markdown(figure[0].name)),
        write_text_atomic(out_dir / f"{STEM}.json", json.dumps(record, indent=1, allow_nan=False) + "\n"),
        *figure,
    ]


def _manifest(config: RooflineConfig) -> dict[str, object]:
    versions = {name: version(name) for name in ("torch", "transformers", "adaskip")}
    return {
        "made_by": "speed/roofline.py",
        "config": {name: value for name, value in asdict(config).items() if name not in PLACES},
        "versions": {"python": platform.python_version(), **versions},
        "git_commit": git_commit(),
    }
