"""What every command is wrapped in: mistakes and stops become one line and an exit code.

A user's mistake is one line and exit code 2; a run that stops half-way (out of memory, disk full) is one line and exit
code 1; a signal is 128 plus its number. With ADASKIP_DEBUG=1 in the environment the traceback is shown instead. Of
several processes only the main one speaks.
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
    """SIGINT or SIGTERM arrived."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def script(module: str, *arguments: str | None) -> int:
    """What a script does: call `main` of a module, which is imported here, so that an optional package that it needs
    and that is missing is one line, too; returns its exit code."""
    return guarded(lambda: importlib.import_module(module).main(*arguments))


def study(doc: str | None, config: type[Config], execute: Callable[[Config], int]) -> int:
    """The whole life of a script that is a study, with the options of `config`; returns its exit code.

    doc: the script's docstring, whose first line describes it in the help text.
    """
    return guarded(lambda: _study((doc or "").split("\n")[0], config, execute, sys.argv))


def _study(description: str, config: type[Config], execute: Callable[[Config], int], argv: Sequence[str]) -> int:
    Processes().require_one(argv[0])
    parser = Parser(prog=argv[0], description=description, allow_abbrev=False)
    add_options(parser, config)
    given = vars(parser.parse_args(argv[1:]))
    return execute(resolve(config, given, given.pop("config")))


def guarded(command: Callable[[], int]) -> int:
    """Run `command` and turn what may go wrong into one line and an exit code."""
    if not sys.stderr.isatty():
        disable_progress_bar()  # transformers draws its loading bar into log files, too
    handlers = {number: signal.signal(number, _raise_signalled) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return command()
    except Signalled as stopped:
        _tell(f"stopped by {signal.Signals(stopped.number).name}; the same command continues")
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
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def _raise_signalled(number: int, frame: FrameType | None) -> NoReturn:
    raise Signalled(number)
