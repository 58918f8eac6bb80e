"""What every command line of the kit does the same way: errors to exit codes, facts to JSON."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any, TextIO

from kit.errors import CheckFailed, Flux2Error

INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended
UNREAD = 141  # and for one whose reader left, as `head` does


def report(step: Callable[[], Mapping[str, Any] | None], as_json: bool) -> int:
    """Run a step and return the exit code; with `as_json` the facts it returns are the last line of stdout.

    0 done, 1 a check or contract failed, 2 wrong use or bad input, 130 interrupted, 141 the reader of the output is
    gone. Errors that the kit raises on purpose and those of the file system become one line on stderr (and in the
    JSON); all others are bugs and keep their traceback.
    """
    try:
        code = _report(step, as_json)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        for stream in (sys.stdout, sys.stderr):
            _drop_if_broken(stream)
        return UNREAD


def _report(step: Callable[[], Mapping[str, Any] | None], as_json: bool) -> int:
    """Run a step, print its error or facts, and return the exit code; a broken pipe is left to the caller."""
    found: Mapping[str, Any] = {}
    try:
        facts = step()
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except SystemExit as left:  # argparse has printed a help text or the version
        if left.code not in (None, 0):
            raise
        return 0
    except Flux2Error as error:
        code, message = error.exit_code, str(error)
        found = error.facts if isinstance(error, CheckFailed) else {}
    except KeyboardInterrupt:
        code, message = INTERRUPTED, "interrupted; unfinished output was removed"
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        code, message = 2, f"{error.strerror or error}{where}"
    else:
        if as_json and facts is not None:
            print(json.dumps(facts), flush=True)
        return 0
    print(f"error: {message}", file=sys.stderr, flush=True)
    if as_json:
        print(json.dumps({**found, "error": message, "exit_code": code}), flush=True)
    return code


def option(default: Any, about: str) -> Any:
    """Return a dataclass field that a command line offers as an option, with its default and help text."""
    return field(default=default, metadata={"about": about})


def _drop_if_broken(stream: TextIO) -> None:
    """Send to nowhere what is still buffered for a reader that left, so that Python does not complain at its end."""
    try:
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):  # a stand-in for a stream has no descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
