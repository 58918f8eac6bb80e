"""Several requests in one engine call: who shares a call, who fails, and who is retried."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kit.engine import Array
from kit.errors import EngineError
from kit.ports import Port, Ports
from serve.stage import EngineModel, run_together

PORTS = Ports(inputs=(Port("x", "fp32", ("batch", "tokens")),), outputs=(Port("y", "fp32", ("batch", "tokens")),))
POISON = 13.0


class Doubler:
    """An engine that doubles its input, and fails when a row holds POISON or there are too many rows."""

    def __init__(self, most: int = 99) -> None:
        self.ports = PORTS
        self.most = most
        self.calls: list[int] = []

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        x: Any = inputs["x"]
        self.calls.append(len(x))
        if len(x) > self.most:
            raise EngineError("out of memory")
        if (x == POISON).any():
            raise EngineError("poison")
        return {"y": 2 * x}


def request(value: float, tokens: int = 3, rows: int = 1) -> dict[str, Array]:
    return {"x": np.full((rows, tokens), value, np.float32)}


def outcome(result: Any) -> Any:
    return str(result) if isinstance(result, EngineError) else result["y"][:, 0].tolist()


def test_requests_of_one_shape_share_a_call_and_get_their_own_rows() -> None:
    engine = Doubler()
    results = run_together(engine, [request(1, rows=2), request(2, tokens=5), request(3)])
    assert [outcome(result) for result in results] == [[2, 2], [4], [6]]
    assert sorted(engine.calls) == [1, 3]


def test_a_poison_request_fails_alone() -> None:
    engine = Doubler()
    results = run_together(engine, [request(1), request(POISON), request(3)])
    assert [outcome(result) for result in results] == [[2], "poison", [6]]
    assert engine.calls == [3, 1, 2, 1, 1]


def test_a_failed_group_does_not_disturb_the_others() -> None:
    engine = Doubler()
    results = run_together(engine, [request(1), request(POISON, tokens=5), request(3)])
    assert [outcome(result) for result in results] == [[2], "poison", [6]]
    assert engine.calls == [2, 1], "a request that fails alone is not retried"


def test_a_batch_that_is_too_large_runs_one_by_one() -> None:
    results = run_together(Doubler(most=1), [request(1), request(2)])
    assert [outcome(result) for result in results] == [[2], [4]]


def test_a_model_answers_every_request_of_a_batch_with_its_own_result(caplog: pytest.LogCaptureFixture) -> None:
    model = EngineModel()
    model.engine = Doubler()

    class TritonError(Exception):
        INVALID_ARG, INTERNAL = 3, 13

        def __init__(self, message: str, code: int) -> None:
            super().__init__(message)
            self.code = code

    model.pb = SimpleNamespace(
        Tensor=lambda name, values: (name, values.tolist()),
        TritonError=TritonError,
        InferenceResponse=lambda tensors=None, error=None: error or dict(tensors),
        get_input_tensor_by_name=lambda request, name: SimpleNamespace(as_numpy=lambda: request[name]),
    )
    good, bad = model.execute([request(1, tokens=1), request(POISON, tokens=1)])
    assert good == {"y": [[2.0]]}
    assert (str(bad), bad.code) == ("EngineError: poison", TritonError.INTERNAL)
    assert "an engine call with 2 requests failed, retrying with half: poison" in caplog.text
