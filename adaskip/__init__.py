"""AdaSkip: training-free sublayer skipping for long-context LLMs on stock transformers models."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from adaskip.calibration import calibrate
    from adaskip.importance import ImportanceProfile
    from adaskip.plan import Budget, SkipPlan
    from adaskip.skipping import skipping
    from adaskip.speculative import lossless
    from adaskip.strategies import AdaSkip, EarlyExit, LeastSkip, MostSkip, SkipDecode, UnifiedSkipping

# Names of the library and the modules they come from; loaded at first use, so that `import adaskip` needs no torch.
_HOMES = {
    "calibrate": "adaskip.calibration",
    "ImportanceProfile": "adaskip.importance",
    "Budget": "adaskip.plan",
    "SkipPlan": "adaskip.plan",
    "skipping": "adaskip.skipping",
    "lossless": "adaskip.speculative",
    **dict.fromkeys(
        ("AdaSkip", "EarlyExit", "LeastSkip", "MostSkip", "SkipDecode", "UnifiedSkipping"), "adaskip.strategies"
    ),
}

__all__ = [
    "AdaSkip",
    "Budget",
    "EarlyExit",
    "ImportanceProfile",
    "LeastSkip",
    "MostSkip",
    "SkipDecode",
    "SkipPlan",
    "UnifiedSkipping",
    "__version__",
    "calibrate",
    "lossless",
    "skipping",
]


class _Package(ModuleType):
    """Importing `adaskip.skipping` would put that module in the place of the function `adaskip.skipping`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'adaskip' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
