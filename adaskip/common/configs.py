"""Reads the YAML files of `configs/`, whether the package runs from a checkout or a wheel."""

from __future__ import annotations

from copy import deepcopy
from functools import lru_cache
from typing import Any

import yaml

from adaskip.common.paths import PACKAGE, package_checkout

CONFIG_DIR = PACKAGE / "packaged_configs" if package_checkout() is None else PACKAGE.parent / "configs"
"""`configs/` of the checkout, or the copy of it inside an installed wheel (see `setup.py`)."""


class ConfigError(ValueError):
    """A configuration file is missing, unreadable, or not a mapping."""


def load_yaml(name: str) -> dict[str, Any]:
    """Read `configs/<name>` (the suffix `.yaml` is optional) as a mapping.

    Raises:
        ConfigError: the file is missing, is not YAML, or is not a mapping.
    """
    path = CONFIG_DIR / (name if name.endswith(".yaml") else f"{name}.yaml")
    try:
        content = deepcopy(_parsed(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ConfigError(
            f"{path} is missing: adaskip reads configs/ of its checkout, or the copy in its wheel; reinstall adaskip"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping, not {type(content).__name__}")
    return content


@lru_cache(maxsize=16)
def _parsed(text: str) -> Any:
    """The content of a YAML text; cached, because a run reads the same files many times and parsing them is slow."""
    return yaml.safe_load(text)
