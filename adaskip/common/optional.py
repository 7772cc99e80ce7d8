"""Optional packages: which extra of adaskip installs each, and a one-line error if one is missing.

The library (calibrate, skip, select, lossless) needs none of them. Code that needs one imports it where it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

EXTRAS = {
    **dict.fromkeys(
        ("datasets", "matplotlib", "pandas", "rich", "rouge", "rouge_score", "scipy", "sentencepiece"), "paper"
    ),
    "gguf": "gguf",
    "jieba": "zh",
    "lm_eval": "lm-eval",
    "vllm": "vllm",
}
"""The extra of adaskip that installs each package, by import name."""


class MissingPackageError(ImportError):
    """An optional package is not installed; the message has the command that installs it."""


class UnsupportedReleaseError(ImportError):
    """An installed package is of a release that adaskip does not work with."""


@contextmanager
def optional_import() -> Iterator[None]:
    """A context for the import of an optional package; raises `MissingPackageError` if it is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (told := missing_package(error)) is None:
            raise
        raise told from None


def missing_package(error: ImportError) -> ImportError | None:
    """The error to show in one line for a failed import; None if no extra of adaskip installs the package."""
    if isinstance(error, MissingPackageError | UnsupportedReleaseError):
        return error
    package = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or package not in EXTRAS:
        return None
    line = f"this needs the package {package}, which is not installed: pip install 'adaskip[{EXTRAS[package]}]'"
    return MissingPackageError(line, name=error.name)
