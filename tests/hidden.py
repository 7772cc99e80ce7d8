"""Runs Python as if packages were not installed: `tests/hidden.py PACKAGE,... -c CODE`, `-m MODULE` or a script.

A hidden package cannot be found, as `importlib.util.find_spec` is told, too; its distribution still has a version.
"""

import runpy
import sys
from collections.abc import Sequence
from typing import Any


class Hiding:
    """A finder that does not find some packages."""

    def __init__(self, finder: Any, packages: Sequence[str]):
        self.finder, self.packages = finder, packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        hidden = name.partition(".")[0] in self.packages
        return None if hidden else self.finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


def hide(packages: Sequence[str]) -> None:
    """From here on these packages are not found."""
    sys.meta_path[:] = [Hiding(finder, packages) for finder in sys.meta_path]  # pyright: ignore[reportArgumentType]


def main() -> None:
    hide(sys.argv[1].split(","))
    kind, arguments = sys.argv[2], sys.argv[3:]
    if kind == "-c":
        exec(arguments[0], {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [kind, *arguments]
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    main()
