"""The behaviour of every command when its reader closes the pipe."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kit import cli

MANY = "from kit import cli; import sys; sys.exit(cli.report(lambda: print('line\\n' * {lines}), False))"


@pytest.mark.parametrize("lines", [10, 1_000_000])
def test_a_reader_that_leaves_is_no_error(lines: int) -> None:
    """Ten lines are still buffered when the command ends; a million break the pipe on the way."""
    command = [sys.executable, "-c", MANY.format(lines=lines)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(30) == cli.UNREAD
