"""Packages that only some features need: which extra of adaskip brings each, and one line where one is missing.

The library (calibrate, skip, select, lossless) needs none of them. What needs one imports it where it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

EXTRAS = {
    **dict.fromkeys(("datasets", "matplotlib", "rich", "rouge", "rouge_score", "scipy", "sentencepiece"), "paper"),
    "gguf": "gguf",
    "jieba": "zh",
    "vllm": "vllm",
}
"""The extra of adaskip that brings a package, by the name that it is imported by."""


class MissingPackageError(ImportError):
    """An optional package is not installed; one line with the command that installs it."""


@contextmanager
def optional_import() -> Iterator[None]:
    """Around the import of an optional package: `MissingPackageError` where it is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (told := missing_package(error)) is None:
            raise
        raise told from None


def missing_package(error: ImportError) -> MissingPackageError | None:
    """What to tell of a failed import; None where no extra of adaskip would help."""
    if isinstance(error, MissingPackageError):
        return error
    package = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or package not in EXTRAS:
        return None
    line = f"{package} is not installed, which this needs: pip install 'adaskip[{EXTRAS[package]}]'"
    return MissingPackageError(line, name=error.name)
