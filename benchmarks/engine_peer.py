"""One step of the transformer in optimum-intel's own OpenVINO pipeline; a contender of `benchmarks engine`.

Run by the Python of an environment that has optimum-intel, whose requirements contradict the kit's; so it imports
nothing of the kit. The folder is what OVFlux2KleinPipeline.save_pretrained wrote. It answers like
benchmarks/engine_worker.py.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FEWEST_CALLS = 3  # of a visit
WARM_UP = 2


def open_call(folder: Path, case: dict[str, Any]) -> Callable[[], Any]:
    """Return a call of the pipeline's transformer with random activations."""
    import torch
    from optimum.intel import OVFlux2KleinPipeline

    config = json.loads((folder / "transformer" / "config.json").read_text())
    options = {"INFERENCE_NUM_THREADS": str(case["threads"])} if case["threads"] else {}
    pipeline = OVFlux2KleinPipeline.from_pretrained(folder, compile=False, ov_config=options)
    rows, text = case["rows"], case["text_tokens"]
    height, width = case["height"] // 16, case["width"] // 16
    torch.manual_seed(0)
    cells = torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width), torch.arange(1))
    words = torch.cartesian_prod(torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(text))
    inputs = {
        "hidden_states": torch.randn(rows, height * width, config["in_channels"]),
        "encoder_hidden_states": torch.randn(rows, text, config["joint_attention_dim"]),
        "timestep": torch.full((rows,), 0.5),
        "img_ids": cells,
        "txt_ids": words,
    }
    ranks = {str(port.any_name): len(port.partial_shape) for port in pipeline.transformer.model.inputs}
    for name in ("img_ids", "txt_ids"):  # of the exported graph: with or without a batch axis
        if ranks.get(name) == 3:
            inputs[name] = inputs[name].expand(rows, -1, -1).contiguous()
    return lambda: pipeline.transformer(**inputs)


def main() -> None:
    """Answer lines of seconds with the seconds of calls, as benchmarks/engine_worker.py does."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak of this process alone
    answers, sys.stdout = sys.stdout, sys.stderr  # packages print while they are loaded

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    try:
        call = open_call(Path(sys.argv[1]), json.loads(sys.argv[2]))
        for _ in range(WARM_UP):
            call()
    except Exception as error:  # told to the process that asked, which names the contender
        answer({"error": f"{type(error).__name__}: {error}"})
        return
    answer({"ready": True})
    for line in sys.stdin:
        found: list[float] = []
        end = time.perf_counter() + float(line)
        while len(found) < FEWEST_CALLS or time.perf_counter() < end:
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
        answer(found)
    (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    answer({"peak": int(peak.split()[1]) * 1024})
