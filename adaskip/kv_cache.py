"""Deprecated path of `adaskip.core.kv_cache`, for code written for 0.1; to be removed in 0.3."""

import warnings

from adaskip.core.kv_cache import *  # noqa: F403

warnings.warn("adaskip.kv_cache is adaskip.core.kv_cache now", DeprecationWarning, stacklevel=2)
