"""`adaskip calibrate --faster-at`: ties of a search are decided by the predicted time of requests of a given length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adaskip.common.provenance import device_name
from adaskip.core.hf import attn_implementation
from adaskip.core.plan import Phase
from adaskip.models.loading import LoadedModel, check_positions
from adaskip.roofline import ModelShape
from adaskip.runs.calibrate_config import CalibrateConfig
from adaskip.runs.choose_by_speedup import Predictor, Request
from adaskip.runs.loading import Loading


@dataclass(frozen=True)
class TiesByTime:
    """The request whose time decides ties. on: the device of `--speedup-on`, None for the one that holds the model."""

    request: Request
    on: str | None

    def identity(self, loaded: LoadedModel) -> dict[str, Any]:
        """What the chosen sets depend on besides the divergences. Measured ceilings are not part of it: they vary."""
        on = device_name(loaded.model.device) if self.on is None else self.on
        return {"faster_at": self.request.prompt_tokens, "new_tokens": self.request.new_tokens, "speedup_on": on}

    def options(self, loaded: LoadedModel, phase: Phase) -> dict[str, Any]:
        """The options of `select`; the profile records the request and the ceilings."""
        model = loaded.model
        predictor = Predictor.on(
            *(self.on, model.device, model.dtype, attn_implementation(model)),
            shape=ModelShape.of(model.config),
            phase=phase,
            requests=[self.request],
        )
        ceilings, request = predictor.ceilings, self.request
        settings = {"faster_at": request.prompt_tokens, "new_tokens": request.new_tokens}
        settings |= {"tflops": ceilings.matmul_flops / 1e12, "gb_s": ceilings.bandwidth / 1e9}
        return {"faster": predictor.speedup, "settings": settings}


def find_ties(config: CalibrateConfig, loading: Loading) -> TiesByTime | None:
    """What `--faster-at` asks for; None without it. ValueError if the model has too few positions."""
    if config.faster_at is None:
        return None
    assert config.select is not None, "was checked"
    new_tokens = 1 if config.select == "prefill" else config.setup.phases[config.select].max_new_tokens
    check_positions(loading.source.config, config.faster_at, new_tokens, f"--faster-at {config.faster_at}")
    return TiesByTime(Request(config.faster_at, new_tokens), config.speedup_on)
