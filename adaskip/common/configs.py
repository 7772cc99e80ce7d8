"""Finds the YAML files under `configs/`, so that no other module needs to know where data lies."""

from __future__ import annotations

from typing import Any

import yaml

from adaskip.common.paths import PACKAGE, package_checkout

CONFIG_DIR = PACKAGE / "packaged_configs" if package_checkout() is None else PACKAGE.parent / "configs"
"""`configs/` of the checkout; the copy of it that a wheel holds (see `setup.py`)."""


class ConfigError(ValueError):
    """A configuration file is missing, unreadable, or not a mapping."""


def load_yaml(name: str) -> dict[str, Any]:
    """Read `configs/<name>` (the ending `.yaml` may be left out) as a mapping.

    Raises:
        ConfigError: the file is missing, is not YAML, or is not a mapping; one line naming the file.
    """
    path = CONFIG_DIR / (name if name.endswith(".yaml") else f"{name}.yaml")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path} is missing: adaskip reads configs/ of its checkout, or the copy in its wheel; install it again"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping, not {type(content).__name__}")
    return content
