"""Run several requests through one part in as few engine calls as their shapes allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from serve.engine import Array, Engine


def run_together(engine: Engine, requests: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
    """Stack the rows of requests whose arrays have equal shapes beyond the batch axis; return each one's own rows."""
    groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for index, request in enumerate(requests):
        key = tuple(request[port.name].shape[1:] for port in engine.ports.inputs)
        groups.setdefault(key, []).append(index)
    results: list[dict[str, Array]] = [{} for _ in requests]
    for members in groups.values():
        names = [port.name for port in engine.ports.inputs]
        outputs = engine.run({name: np.concatenate([requests[i][name] for i in members]) for name in names})
        start = 0
        for i in members:
            stop = start + len(requests[i][names[0]])
            results[i] = {name: value[start:stop] for name, value in outputs.items()}
            start = stop
    return results
