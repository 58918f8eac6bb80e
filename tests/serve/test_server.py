"""The real tritonserver: requests alone, in shared batches, and invalid ones."""

from __future__ import annotations

import base64
import json
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from kit.errors import RequestError
from pipeline.images import decode
from pipeline.local import LocalPipeline
from serve.client import Client
from serve.launch import Server
from tests.conftest import ByFamily

pytestmark = pytest.mark.server

REQUESTS: list[dict[str, Any]] = [
    {"prompt": "a red fox", "seed": 1, "steps": 20, "width": 64, "height": 64},
    {"prompt": "two dogs", "seed": 2, "steps": 4, "width": 96, "height": 128},
    {"prompt": "a house", "seed": 3, "steps": 8, "width": 64, "height": 64},
    {"prompt": "a boat", "seed": 4, "steps": 4, "width": 64, "height": 64, "num_images": 2},
    {"prompt": "a tree", "seed": 5, "steps": 20, "width": 96, "height": 128},
    {"prompt": "a road", "seed": 6, "steps": 8, "width": 128, "height": 96},
]


def metrics(server: Server) -> dict[str, float]:
    """Read the denoiser's own metrics by name."""
    url = f"http://{server.ports.host}:{server.ports.metrics}/metrics"
    with urllib.request.urlopen(url, timeout=10) as response:
        lines = response.read().decode().splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("flux2_") and "{" not in line}


def occupancy(server: Server, before: dict[str, float]) -> float:
    """Return the mean number of live requests per execution since `before` was read."""
    now = metrics(server)
    name = "flux2_denoiser_live_requests"
    return (now[f"{name}_sum"] - before[f"{name}_sum"]) / (now[f"{name}_count"] - before[f"{name}_count"])


def test_an_image_has_the_same_bytes_alone_and_in_shared_batches(server: Server) -> None:
    with Client(server.url) as client, ThreadPoolExecutor(len(REQUESTS)) as pool:
        alone = [client.generate(request, timeout=60).images for request in REQUESTS]
        before = metrics(server)
        waiting = []
        for request in REQUESTS:
            waiting.append(pool.submit(client.generate, request, 60))
            time.sleep(0.03)  # requests arrive while others are denoised
        together = [future.result().images for future in waiting]
        assert occupancy(server, before) > 1
    assert [len(images) for images in alone] == [1, 1, 1, 2, 1, 1]
    assert together == alone


def test_the_server_generates_the_same_images_as_the_local_pipeline(server: Server, artifact_of: ByFamily) -> None:
    local = LocalPipeline(artifact_of("klein"))
    with Client(server.url) as client:
        for request in REQUESTS[:4]:
            served = [decode(image) for image in client.generate(request, timeout=60).images]
            assert np.array_equal(np.stack(served), local.generate(request).pixels)


def test_the_returned_seed_reproduces_the_image(server: Server) -> None:
    fields = {"prompt": "a cat", "steps": 2, "width": 64, "height": 64}
    with Client(server.url) as client:
        first, second = (client.generate(fields, timeout=60) for _ in range(2))
        assert first.images != second.images  # the seeds are random
        assert client.generate(fields | {"seed": first.seed}, timeout=60).images == first.images


@pytest.mark.parametrize(("name", "magic"), [("png", b"\x89PNG"), ("jpeg", b"\xff\xd8\xff"), ("webp", b"RIFF")])
def test_formats(name: str, magic: bytes, server: Server) -> None:
    with Client(server.url) as client:
        (image,) = client.generate(REQUESTS[1] | {"output_format": name}, timeout=60).images
    assert image.startswith(magic)
    assert decode(image).shape == (128, 96, 3)


def post(server: Server, endpoint: str, body: dict[str, Any]) -> Any:
    """Send JSON to the HTTP port and parse the response as strict JSON in UTF-8."""
    url = f"http://{server.ports.host}:{server.ports.http}/v2/models/flux2/{endpoint}"
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read().decode("utf-8"))


class TestHttp:
    """JSON over HTTP, with images in base64."""

    FIELDS = REQUESTS[1] | {"response_encoding": "base64"}

    def test_generate_answers_in_json(self, server: Server) -> None:
        with Client(server.url) as client:
            (expected,) = client.generate(REQUESTS[1], timeout=60).images
        assert base64.b64decode(post(server, "generate", self.FIELDS)["image"], validate=True) == expected

    def test_infer_answers_in_json(self, server: Server) -> None:
        kinds = {"prompt": "BYTES", "response_encoding": "BYTES", "seed": "INT64"}
        inputs = [
            {"name": name, "shape": [1], "datatype": kinds.get(name, "INT32"), "data": [value]}
            for name, value in self.FIELDS.items()
        ]
        with Client(server.url) as client:
            (expected,) = client.generate(REQUESTS[1], timeout=60).images
        outputs = {output["name"]: output["data"] for output in post(server, "infer", {"inputs": inputs})["outputs"]}
        assert base64.b64decode(outputs["image"][0], validate=True) == expected

    def test_the_client_decodes_base64(self, server: Server) -> None:
        with Client(server.url) as client:
            plain, encoded = (client.generate(fields, timeout=60) for fields in (REQUESTS[1], self.FIELDS))
        assert encoded.images == plain.images


def test_requests_with_and_without_sigmas_share_batches(server: Server, artifact_of: ByFamily) -> None:
    local = LocalPipeline(artifact_of("klein"))
    turbo = {"prompt": "a cat", "seed": 4, "width": 64, "height": 64}
    requests: list[dict[str, Any]] = [
        turbo | {"sigmas": [1.0, 0.65, 0.43, 0.29, 0.1]},
        turbo | {"sigmas": [1.0, 0.5]},
        turbo | {"steps": 5},
    ]
    with Client(server.url) as client, ThreadPoolExecutor(len(requests)) as pool:
        served = list(pool.map(lambda fields: client.generate(fields, timeout=60).images[0], requests))
    for fields, image in zip(requests, served, strict=True):
        assert np.array_equal(decode(image)[None], local.generate(fields).pixels)
    assert served[0] != served[2]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"width": 100}, "width: 100 is not a multiple of 16; nearest: 96 or 112"),
    ({"height": 4096}, "height: 4096 is not between 64 and 2048 pixels"),
    ({"steps": 0}, "steps: 0 is not between 1 and 100"),
    ({"steps": -3}, "steps: -3 is not between 1 and 100"),
    ({"prompt": ""}, "prompt: '' is empty; say what to generate"),
    ({"prompt": "x" * 600}, "prompt: 6.. tokens with the chat template; the limit is 512, shorten the text by"),
    ({"prompt": b"\xff\xfe"}, "prompt: byte 0 is not valid UTF-8"),
    ({"output_format": "gif"}, "output_format: 'gif' is not one of png, jpeg, webp"),
    ({"guidance": float("nan")}, "guidance: nan is not between 0 and 20"),
    ({"seed": -1}, "seed: -1 is not between 0 and"),
    ({"num_images": 99}, "num_images: 99 is not between 1 and 4"),
    ({"negative_prompt": "fog"}, "negative_prompt: 'fog' has no effect"),
]


def test_every_invalid_request_gets_its_reason_and_does_not_disturb_others(server: Server) -> None:
    with Client(server.url) as client, ThreadPoolExecutor(8) as pool:
        expected = client.generate(REQUESTS[0], timeout=60).images
        valid = pool.submit(client.generate, REQUESTS[0], 60)
        wrong = [pool.submit(client.generate, REQUESTS[0] | fields, 60) for fields, _ in WRONG]
        for future, (_, message) in zip(wrong, WRONG, strict=True):
            with pytest.raises(RequestError, match=message):
                future.result()
        assert valid.result().images == expected


def raw(name: str, shape: list[int], kind: str, values: Any) -> Any:
    tensor = grpc.InferInput(name, shape, kind)
    tensor.set_data_from_numpy(values)
    return tensor


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([("width", [1], "INT64", np.array([64], np.int64))], ("width", "INT64", "INT32")),
        ([("steps", [1], "FP32", np.array([4], np.float32))], ("steps", "FP32", "INT32")),
        ([("width", [2], "INT32", np.array([64, 64], np.int32))], ("width", "[2]", "[1]")),
        ([("colour", [1], "INT32", np.array([1], np.int32))], ("colour",)),
    ],
)
def test_wrong_types_and_shapes_are_named(inputs: list[Any], words: tuple[str, ...], server: Server) -> None:
    prompt = raw("prompt", [1], "BYTES", np.array([b"a cat"], np.object_))
    client = grpc.InferenceServerClient(server.url)
    with pytest.raises(InferenceServerException) as caught:
        client.infer("flux2", [prompt, *(raw(*entry) for entry in inputs)])
    client.close()
    assert "INVALID_ARGUMENT" in str(caught.value.status())
    for word in words:
        assert word in caught.value.message(), caught.value.message()


def test_a_request_without_a_prompt_is_rejected(server: Server) -> None:
    client = grpc.InferenceServerClient(server.url)
    with pytest.raises(InferenceServerException, match="prompt: '' is empty; say what to generate") as caught:
        client.infer("flux2", [raw("steps", [1], "INT32", np.array([4], np.int32))])
    client.close()
    assert "INVALID_ARGUMENT" in str(caught.value.status())


def test_the_ensemble_is_also_served_over_http(server: Server) -> None:
    url = f"http://{server.ports.host}:{server.ports.http}/v2/models/flux2"
    with urllib.request.urlopen(url, timeout=10) as response:
        assert b'"name":"prompt"' in response.read()
