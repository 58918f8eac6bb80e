"""Requests that no sane client sends, made at random from a seed: protobuf messages over gRPC, bodies over HTTP."""

from __future__ import annotations

import json
import random
import struct
import urllib.error
import urllib.request
from collections import Counter
from typing import Any

import grpc  # type: ignore[import-untyped]
from tritonclient.grpc import service_pb2, service_pb2_grpc

from pipeline.request import FIELDS

TYPES = ("BYTES", "INT32", "INT64", "FP32", "FP16", "BOOL", "UINT8", "NOTHING", "")
HUGE = [2**62]  # in JSON it ends Triton 24.10: std::length_error in its HTTP frontend, before any model is asked
SHAPES: tuple[list[int], ...] = ([1], [1], [1], [0], [2], [1, 1], [-1], HUGE, [])
TEXTS = (b"", b"a cat", b"\xff\xfe", b"\0", b"x" * 5000, "ü✂".encode() * 40, b"png", b"base64", b"{}")
NUMBERS = (0, 1, 4, 64, 100, -1, 2**31 - 1, -(2**31))
OUTPUTS = ("image", "seed_used", "nothing", "")
ANSWERED = ("OK", "INVALID_ARGUMENT", "UNAVAILABLE", "NOT_FOUND", "UNIMPLEMENTED", "DEADLINE_EXCEEDED")


def message(chance: random.Random) -> Any:
    """Return a ModelInferRequest for one of the models, wrong in some ways."""
    request = service_pb2.ModelInferRequest(
        model_name=chance.choice(
            ("flux2", "flux2", "flux2", "denoiser", "prompt_stage", "vae_encoder", "flux2_stream", "nobody")
        ),
        model_version=chance.choice(("", "", "1", "7", "x")),
        id=chance.choice(("", "id", "i" * 300)),
    )
    names = [field.name for field in FIELDS] + ["ticket", "checked_ticket", "unknown"]
    for name in ("prompt", *chance.sample(names, chance.randint(0, 4))):
        tensor = request.inputs.add(name=name, datatype=chance.choice(TYPES), shape=chance.choice(SHAPES))
        if name == "prompt" and chance.random() < 0.5:
            tensor.datatype, tensor.shape[:] = "BYTES", [1]
        request.raw_input_contents.append(_content(chance, tensor.datatype))
    if chance.random() < 0.1 and request.raw_input_contents:
        del request.raw_input_contents[-1]
    for key, value in (("priority_class", "urgent"), ("priority_class", "batch")):
        if chance.random() < 0.1:
            request.parameters[key].string_param = value
    if chance.random() < 0.1:
        request.parameters["sequence_id"].int64_param = chance.randint(0, 3)
        request.parameters["sequence_start"].bool_param = chance.random() < 0.5
        request.parameters["sequence_end"].bool_param = chance.random() < 0.5
    if chance.random() < 0.1:
        request.parameters["timeout"].int64_param = chance.choice((-5, 0, 1, 1000))
    if chance.random() < 0.2:
        request.outputs.add(name=chance.choice(OUTPUTS))
    return request


def _content(chance: random.Random, datatype: str) -> bytes:
    if datatype == "BYTES" and chance.random() < 0.7:
        text = chance.choice(TEXTS)
        return struct.pack("<I", len(text)) + text
    if datatype in ("INT32", "INT64", "FP32") and chance.random() < 0.7:
        if datatype == "FP32":
            return struct.pack("<f", chance.choice((0.0, 1.0, float("nan"), float("inf"), -3.0)))
        return struct.pack("<i" if datatype == "INT32" else "<q", chance.choice(NUMBERS))
    return chance.randbytes(chance.choice((0, 1, 3, 4, 8, 64, 4000)))


def body(chance: random.Random) -> bytes:
    """Return the body of an HTTP request, wrong in some ways."""
    if chance.random() < 0.3:
        return chance.choice(
            (b"", b"{", b"[]", b"null", b'{"inputs": 3}', b"\xff" * 50, b"[" * 3000, b'{"inputs": [{}]}')
        )
    values: tuple[Any, ...] = (None, -1, 1e300, "x", "x" * 5000, [], [[1]], {}, True, "a cat", [1, 2], 64)
    inputs = [
        {
            "name": chance.choice([*(field.name for field in FIELDS), "unknown", "", 5]),
            "shape": chance.choice([shape for shape in SHAPES if shape != HUGE]),
            "datatype": chance.choice(TYPES),
            "data": chance.choice((values, [chance.choice(values)], chance.choice(values))),
        }
        for _ in range(chance.randint(0, 4))
    ]
    return json.dumps(
        {"inputs": inputs, chance.choice(("id", "parameters", "outputs")): chance.choice(values)}
    ).encode()


def send(grpc_url: str, http_url: str, count: int, seed: int = 0) -> Counter[str]:
    """Send so many messages over gRPC and as many bodies over HTTP; returns how often each status came."""
    chance = random.Random(seed)
    seen: Counter[str] = Counter()
    with grpc.insecure_channel(grpc_url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for _ in range(count):
            try:
                stub.ModelInfer(message(chance), timeout=20)
                seen["gRPC OK"] += 1
            except grpc.RpcError as error:
                seen[f"gRPC {error.code().name}"] += 1
                if error.code().name not in ANSWERED:
                    seen[f"gRPC {error.code().name}: {str(error.details())[:100]}"] += 1
    for _ in range(count):
        path = chance.choice(("flux2/infer", "flux2/generate", "flux2_stream/generate_stream", "denoiser/infer"))
        request = urllib.request.Request(f"http://{http_url}/v2/models/{path}", body(chance))
        try:
            with urllib.request.urlopen(request, timeout=20) as response:
                response.read()
                seen[f"HTTP {response.status}"] += 1
        except urllib.error.HTTPError as error:
            seen[f"HTTP {error.code}"] += 1
        except OSError as error:
            seen[f"HTTP {type(error).__name__}"] += 1
    return seen
