"""Whatever can be exported compiles, or is refused before a build: families, parts, recipes, types, attention, GPUs.

`make compile` compiles every combination; the ordinary suite a selection in which each value of each field appears.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.runtimes.compiling import FAMILIES, FORMS, GPUS, RECIPES, every, selected
from tests.runtimes.rtx import FOLDER, needs_rtx

EVERY = os.environ.get("COMPILE") == "all"
# What is refused although a compiler would take it: fp32 activations need twelve times the memory of bf16 on a GPU.
POLICY = "with fp32 activations, which is for a CPU"


def compiled(cases: list[dict[str, str]], work: Path) -> list[dict[str, Any]]:
    """Compile cases in a process of its own; a crash of the compiler ends the list."""
    path = os.pathsep.join([str(FOLDER), str(Path(__file__).parents[2])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.runtimes.compiling", str(work)]
    given = "\n".join(map(json.dumps, cases)) + "\n"
    done = subprocess.run(
        command,
        env=environment,
        input=given,
        capture_output=True,
        text=True,
        timeout=7200 if EVERY else 500,
        check=False,
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == len(cases), f"{cases[len(found)]}: {done.stderr[-500:]} (exit code {done.returncode})"
    return found


def test_the_selection_has_every_value_of_every_field() -> None:
    cases = selected()
    assert {case["gpu"] for case in cases} == set(GPUS)
    assert {case["recipe"] for case in cases} >= {*RECIPES, "bf16", "fp32"}
    assert {(case["dtype"], case["attention"]) for case in cases} == set(FORMS)
    assert {case["family"] for case in cases} == set(FAMILIES)
    known = [json.dumps(case, sort_keys=True) for case in every()]
    assert all(json.dumps({k: v for k, v in c.items() if k != "parts"}, sort_keys=True) in known for c in cases)


@needs_rtx
@pytest.mark.timeout(7200 if EVERY else 600)
def test_what_can_be_exported_compiles_or_is_refused(tmp_path: Path) -> None:
    wrong = []
    for case in compiled(every() if EVERY else selected(), tmp_path):
        failed = {part: why for part, why in case["compiled"].items() if why}
        words = " ".join(case[key] for key in ("family", "dtype", "attention", "recipe", "gpu"))
        if failed and case["refused"] is None:
            wrong.append(f"{words}: accepted, but {failed}")
        if not failed and case["refused"] and POLICY not in case["refused"]:
            wrong.append(f"{words}: refused ({case['refused']}), but it compiles")
        if not failed and case["missed"]:
            wrong.append(f"{words}: in a wider type: {case['missed']}")
    assert not wrong, "\n".join(wrong)
