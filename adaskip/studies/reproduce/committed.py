"""The profiles of the committed results, so that nothing is calibrated or searched again."""

from __future__ import annotations

import tarfile
from collections.abc import Mapping
from pathlib import Path

from adaskip.common.files import write_bytes_atomic
from adaskip.common.paths import default_path
from adaskip.runs.config import RunConfig
from adaskip.runs.profiles import selection_stem
from adaskip.strategies import needs_profile, selection_method

ARCHIVE = "results/testbed/runs.tar.xz"
"""Runs and profiles of the committed results."""
FOLDER = "profiles/"
"""Folder of the profiles in the archive."""


class ProfilesError(ValueError):
    """The committed profiles cannot be read."""


def read_profiles(archive: Path | None = None) -> dict[str, bytes]:
    """The committed profiles by file name.

    Raises:
        ProfilesError: the archive is missing, damaged, or holds none.
    """
    path = archive or default_path(ARCHIVE)
    anew = "FULL=1 calibrates and searches again"
    try:
        with tarfile.open(path) as opened:
            members = [member for member in opened if member.isfile() and member.name.startswith(FOLDER)]
            found = {Path(member.name).name: opened.extractfile(member) for member in members}
            profiles = {name: handle.read() for name, handle in found.items() if handle is not None}
    except FileNotFoundError:
        raise ProfilesError(f"{path} is missing, so there are no committed profiles; {anew}") from None
    except (tarfile.TarError, EOFError, OSError) as error:
        reason = str(error).split("\n")[0].rstrip(":")
        raise ProfilesError(f"{path} cannot be read ({reason}); {anew}") from None
    if not profiles:
        raise ProfilesError(f"{path} contains no {FOLDER}; {anew}")
    return profiles


def keep_profiles(profiles: Mapping[str, bytes], folder: Path) -> None:
    """Write the profiles into `folder`; existing files are kept."""
    for name, content in profiles.items():
        if not (folder / name).is_file():
            write_bytes_atomic(folder / name, content)


def profile_of(cell: RunConfig, folder: Path) -> str | None:
    """The profile in `folder` for a cell of the testbed; None for a strategy that needs none.

    Raises:
        ProfilesError: there is none, or more than one.
    """
    if not needs_profile(cell.strategy):
        return None
    method = selection_method(cell.strategy)
    selected = "" if method is None else f"{selection_stem(method, cell.phase)}-"
    found = sorted(folder.glob(f"{cell.model}-{selected}????????.json"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ProfilesError(f"{folder} should hold one profile of {cell.model} for {cell.strategy}; it has: {names}")
    return str(found[0])
