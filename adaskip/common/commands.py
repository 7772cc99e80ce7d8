"""Runs commands and scripts so that every error ends in one line on standard error and an exit code.

A user's mistake exits with code 2, a run that stops half-way (out of memory, disk full) with 1, and a signal with 128
plus its number. With ADASKIP_DEBUG=1 in the environment the traceback is shown instead. If several processes were
launched, only the main one prints.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from transformers.utils.logging import disable_progress_bar

from adaskip.common.errors import RunError
from adaskip.common.optional import missing_package
from adaskip.common.options import Config, Parser, add_options, resolve
from adaskip.common.processes import Processes, leave_together

USER_MISTAKE = 2
STOPPED = 1


class Signalled(BaseException):
    """Raised when SIGINT or SIGTERM arrives."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def script(module: str, *arguments: str | None) -> int:
    """Call `main(*arguments)` of a module and return its exit code.

    The module is imported inside, so that a missing optional package is also reported in one line.
    """
    return guarded(lambda: importlib.import_module(module).main(*arguments))


def study(doc: str | None, config: type[Config], execute: Callable[[Config], int]) -> int:
    """Parse the options of `config`, call `execute` with them, and return the exit code.

    doc: the script's docstring; its first line is the description in the help text.
    """
    return guarded(lambda: _study((doc or "").split("\n")[0], config, execute, sys.argv))


def _study(description: str, config: type[Config], execute: Callable[[Config], int], argv: Sequence[str]) -> int:
    Processes().require_one(argv[0])
    parser = Parser(prog=argv[0], description=description, allow_abbrev=False)
    add_options(parser, config)
    given = vars(parser.parse_args(argv[1:]))
    return execute(resolve(config, given, given.pop("config")))


def guarded(command: Callable[[], int]) -> int:
    """Run `command` and turn expected errors into one line and an exit code."""
    if not sys.stderr.isatty():
        disable_progress_bar()  # otherwise transformers draws its loading bar into log files
    handlers = {number: signal.signal(number, _raise_signalled) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return command()
    except Signalled as stopped:
        _tell(f"stopped by {signal.Signals(stopped.number).name}; run the same command again to continue")
        return 128 + stopped.number
    except (ValueError, RunError, OSError) as error:
        if os.environ.get("ADASKIP_DEBUG") == "1":
            raise
        _tell(f"error: {' '.join(str(error).split())}")
        leave_together()
        return USER_MISTAKE if isinstance(error, ValueError) else STOPPED
    except ImportError as error:
        if (missing := missing_package(error)) is None:
            raise
        _tell(f"error: {missing}")
        leave_together()
        return USER_MISTAKE
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _tell(line: str) -> None:
    if os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1":
        print(line, file=sys.stderr)


def _raise_signalled(number: int, frame: FrameType | None) -> NoReturn:
    raise Signalled(number)
