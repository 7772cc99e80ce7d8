"""AdaSkip: training-free sublayer skipping for long-context LLMs on stock transformers models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"
"""The only definition of the version; pyproject.toml and manifests of runs read it from here."""

if TYPE_CHECKING:
    from adaskip.benchmarks.protocol import Benchmark, Task, benchmark_option, register_benchmark
    from adaskip.calibration.measure import calibrate
    from adaskip.calibration.refine import refine_scales
    from adaskip.calibration.select import select
    from adaskip.core.blocks import BlockStructure, Sublayers, register_structure
    from adaskip.core.context import skipping
    from adaskip.core.in_place_cache import InPlaceCache
    from adaskip.core.look import Look
    from adaskip.core.model_plan import make_plan
    from adaskip.core.plan import Budget, SkipPlan
    from adaskip.core.strategy import Strategy, strategy_option
    from adaskip.models.pretrained import from_pretrained
    from adaskip.profiles.importance import ImportanceProfile
    from adaskip.profiles.selection import SelectionProfile
    from adaskip.speculative import choose_draft, lossless
    from adaskip.strategies import (
        POP,
        AdaSkip,
        BlockInfluence,
        BlockPruner,
        CalibratedSkip,
        CosineWindow,
        EarlyExit,
        EvoPress,
        FixedPlan,
        LeastSkip,
        MostSkip,
        SkipDecode,
        UnifiedSkipping,
        register_strategy,
    )

# Modules of the public names that are not in `strategies`. Each is imported at first use, so that `import adaskip` does
# not import torch.
_HOMES = {
    "from_pretrained": "adaskip.models.pretrained",
    "make_plan": "adaskip.core.model_plan",
    "calibrate": "adaskip.calibration.measure",
    "ImportanceProfile": "adaskip.profiles.importance",
    "Budget": "adaskip.core.plan",
    "SkipPlan": "adaskip.core.plan",
    "skipping": "adaskip.core.context",
    "InPlaceCache": "adaskip.core.in_place_cache",
    "Look": "adaskip.core.look",
    "Strategy": "adaskip.core.strategy",
    "strategy_option": "adaskip.core.strategy",
    **dict.fromkeys(("Benchmark", "Task", "benchmark_option", "register_benchmark"), "adaskip.benchmarks.protocol"),
    **dict.fromkeys(("BlockStructure", "Sublayers", "register_structure"), "adaskip.core.blocks"),
    "SelectionProfile": "adaskip.profiles.selection",
    "refine_scales": "adaskip.calibration.refine",
    "select": "adaskip.calibration.select",
    **dict.fromkeys(("choose_draft", "lossless"), "adaskip.speculative"),
}

__all__ = [
    "POP",
    "AdaSkip",
    "Benchmark",
    "BlockInfluence",
    "BlockPruner",
    "BlockStructure",
    "Budget",
    "CalibratedSkip",
    "CosineWindow",
    "EarlyExit",
    "EvoPress",
    "FixedPlan",
    "ImportanceProfile",
    "InPlaceCache",
    "LeastSkip",
    "Look",
    "MostSkip",
    "SelectionProfile",
    "SkipDecode",
    "SkipPlan",
    "Strategy",
    "Sublayers",
    "Task",
    "UnifiedSkipping",
    "__version__",
    "benchmark_option",
    "calibrate",
    "choose_draft",
    "from_pretrained",
    "lossless",
    "make_plan",
    "refine_scales",
    "register_benchmark",
    "register_strategy",
    "register_structure",
    "select",
    "skipping",
    "strategy_option",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'adaskip' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "adaskip.strategies")), name)
