"""Run groups of cases in separate processes, so that a failing case does not affect the others."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.gpu.cases import Case, RunSettings
from kit.errors import UsageError

WORKER = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.worker"]
POLL = 0.1  # seconds

Row = dict[str, Any]


@dataclass
class Found:
    """Output of the processes of a run."""

    device: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)


def measure(
    cases: Sequence[Case],
    settings: RunSettings,
    deadline: float,
    case_seconds: float,
    done: Callable[[Found, Row], None],
    worker: Sequence[str] = WORKER,
) -> Found:
    """Measure cases in order until the deadline (in time.time()); `done` is called with every row.

    A case that kills its process or takes more than `case_seconds` becomes a row with its reason, and the rest of its
    group continues in another process. A case interrupted by the deadline has no row and is measured the next time.
    """
    found = Found()
    for _, group in groupby(cases, key=lambda case: case.group):
        left = list(group)
        while left and time.time() < deadline:
            rows = _one_process(left, settings, deadline, case_seconds, found, worker)
            for row in rows:
                found.rows.append(row)
                done(found, row)
            finished = {row["id"] for row in rows}
            if not finished:
                break
            left = [case for case in left if case.id not in finished]
    return found


def _one_process(
    cases: Sequence[Case],
    settings: RunSettings,
    deadline: float,
    case_seconds: float,
    found: Found,
    worker: Sequence[str],
) -> list[Row]:
    """Run a process for the cases of one group; returns its rows, plus one for a case that ended it."""
    with tempfile.TemporaryDirectory(prefix="flux2-gpu-") as scratch:
        job, lines, errors = (Path(scratch) / name for name in ("job.json", "rows.jsonl", "stderr"))
        plain = {"settings": asdict(settings), "cases": [asdict(case) for case in cases], "deadline": deadline}
        job.write_text(json.dumps(plain))
        lines.touch()
        begun = time.time()
        with errors.open("w") as stderr:
            process = subprocess.Popen(
                [*worker, str(job), str(lines)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr
            )
            reason = None
            try:
                while process.poll() is None and reason is None:
                    time.sleep(POLL)
                    since = max(begun, lines.stat().st_mtime)  # time of the last line: a case begins or ends with one
                    if time.time() > deadline:
                        reason = "deadline"
                    elif time.time() - since > case_seconds:
                        reason = f"took more than {case_seconds:.0f} s"
            finally:
                if process.poll() is None:
                    process.kill()
                code = process.wait()
        said = [json.loads(line) for line in _whole_lines(lines)]
        fatal = next((line["fatal"] for line in said if "fatal" in line), None)
        if fatal:
            raise UsageError(fatal)
        found.device = next((line["device"] for line in said if "device" in line), found.device)
        rows: list[Row] = [line["row"] for line in said if "row" in line]
        lost = _lost(said, cases)
        if lost and reason != "deadline" and (code or reason):
            last = errors.read_text(errors="replace").strip().splitlines()[-1:] or [""]
            ended = f"signal {-code}" if code < 0 else f"code {code}"
            why = reason or f"its process ended with {ended}: {last[0][:200]}"
            rows.append({"id": lost, "state": "failed", "reason": why})
        return rows


def _lost(said: Iterable[dict[str, Any]], cases: Sequence[Case]) -> str | None:
    """Return the case that was started but not finished, or the next one if the process ended between two cases."""
    ended = {line["row"]["id"] for line in said if "row" in line}
    return next((case.id for case in cases if case.id not in ended), None)


def _whole_lines(path: Path) -> list[str]:
    """Read the lines that were completely written."""
    text = path.read_text()
    return text[: text.rfind("\n") + 1].splitlines()
