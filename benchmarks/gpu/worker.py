"""Measure one group of cases in a separate process: python -m benchmarks.gpu.worker JOB ROWS

A line is written to ROWS before and after every case, so that the parent process knows which case failed. Exceptions
of a case become its row; a process that is killed (by a kernel fault or the out-of-memory killer) is detected from its
last line.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.cases import Case, RunSettings

# what -> module and function that sets up a group; each imports only what it needs
OPENERS = {
    "ceiling": ("ceilings", "open_ceiling"),
    "attention": ("attention", "open_attention"),
    "part": ("parts", "open_part"),
    "image": ("images", "open_image"),
    "fusion": ("fusions", "open_fusion"),
    "dev": ("dev", "open_dev"),
    "batching": ("batching", "open_batching"),
}


def main(argv: list[str]) -> int:
    job = json.loads(Path(argv[0]).read_text())
    settings = RunSettings(**job["settings"])
    cases = [Case(**case) for case in job["cases"]]
    with Path(argv[1]).open("a") as rows:

        def say(line: dict[str, Any]) -> None:
            rows.write(json.dumps(line) + "\n")
            rows.flush()

        import torch

        from benchmarks.gpu.clock import describe

        torch.set_grad_enabled(False)
        if settings.device.startswith("cuda") and not torch.cuda.is_available():
            say({"fatal": f"torch {torch.__version__} finds no CUDA GPU here; a dry run: --device cpu --size tiny"})
            return 1
        say({"device": describe(settings.device)})
        measure: Any = None
        for case in cases:
            if time.time() > job["deadline"]:
                break
            say({"begin": case.id})
            begin = time.perf_counter()
            try:
                module, opener = OPENERS[case.what]
                if measure is None:
                    opened = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), opener)
                    measure = opened(settings, case.subject, case.mode)
                row = {"state": "measured"} | measure(case)
            except Exception as error:  # a row must record any failure
                row = failure(error)
                measure = None  # the failed call may have left half a model behind
                gc.collect()
            say({"row": {"id": case.id, **row, "took": round(time.perf_counter() - begin, 1)}})
    return 0


def failure(error: Exception) -> dict[str, Any]:
    """Convert an exception to a row."""
    from benchmarks.gpu.clock import Unavailable

    if isinstance(error, Unavailable):
        return {"state": "unavailable", "reason": str(error)}
    said = f"{type(error).__name__}: {error}".strip().splitlines()
    if "out of memory" in said[0].lower():
        return {"state": "out of memory", "reason": said[0][:300]}
    return {"state": "failed", "reason": " ".join(line.strip() for line in said[:3])[:300]}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
