"""Deprecated path of `adaskip.core.blocks`, for code written for 0.1; to be removed in 0.3."""

import warnings

from adaskip.core.blocks import *  # noqa: F403
from adaskip.core.blocks import UnsupportedModelError as UnsupportedModelError
from adaskip.core.hf import forward_name as forward_attribute  # noqa: F401

warnings.warn("adaskip.blocks is adaskip.core.blocks now", DeprecationWarning, stacklevel=2)
