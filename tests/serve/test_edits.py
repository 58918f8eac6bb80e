"""The real tritonserver edits: references, masks, mixed batches, shared references, and wrong images."""

from __future__ import annotations

import base64
import io
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kit.errors import RequestError, ServerError
from pipeline.images import decode
from pipeline.local import LocalPipeline
from serve.client import Client, ImageResponse
from serve.launch import Server
from tests.conftest import ByFamily
from tests.pipeline.test_parity_edits import half_mask, picture, png
from tests.serve.test_server import post

pytestmark = pytest.mark.server
SECONDS = 120.0


def edit(*images: bytes, **more: Any) -> dict[str, Any]:
    return {"prompt": "make it blue", "seed": 5, "steps": 4, "images": list(images)} | more


A, B, C = png(picture(64, 96, 1)), png(picture(64, 96, 2)), png(picture(101, 70, 3))
MASK = png(half_mask(101, 70))
REQUESTS: list[dict[str, Any]] = [
    edit(A),
    edit(B),  # as large as the one before
    edit(A, C),
    edit(C, A),
    edit(C, mask=MASK, strength=0.7),
    edit(C, B, mask=MASK, num_images=2),
    edit(A, width=64, height=64, steps=9),
    {"prompt": "a house", "seed": 5, "steps": 4, "width": 64, "height": 96},
    {"prompt": "a house", "seed": 5, "steps": 12, "width": 64, "height": 192},  # as many tokens as the first one
]


@pytest.fixture(scope="module")
def kv_server(deployment_of: ByFamily, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(deployment_of("klein-kv"), log=tmp_path_factory.mktemp("kv") / "triton.log") as running:
        yield running


def count(server: Server, *names: str) -> list[float]:
    """Read metrics by their name and labels."""
    url = f"http://{server.ports.host}:{server.ports.metrics}/metrics"
    time.sleep(0.5)  # metrics are sent every 0.2 s
    with urllib.request.urlopen(url, timeout=10) as response:
        lines = response.read().decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return [float(values.get(name, 0)) for name in names]


def generate(server: Server, fields: dict[str, Any]) -> list[bytes]:
    with Client(server.url) as client:
        return client.generate(fields, timeout=SECONDS).images


def test_a_mixed_batch_equals_each_request_alone_and_the_local_pipeline(server: Server, artifact_of: ByFamily) -> None:
    local = LocalPipeline(artifact_of("klein"))
    expected = [local.generate(fields).pixels for fields in REQUESTS]
    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        together = list(pool.map(lambda fields: generate(server, fields), REQUESTS))
        again = list(pool.map(lambda fields: generate(server, fields), REQUESTS))  # from the cache
    for pixels, images in zip(expected, together, strict=True):
        assert np.array_equal(np.stack([decode(image) for image in images]), pixels)
    assert together == again
    assert together[0] != together[1]
    assert together[2] != together[3]


def test_a_stream_edits_and_reports_its_steps(server: Server) -> None:
    with Client(server.url) as client:
        *_, last = client.stream(edit(A, C), timeout=SECONDS)
    assert isinstance(last, ImageResponse)
    assert last.images == generate(server, edit(A, C))


def test_json_clients_send_base64(server: Server) -> None:
    fields = edit(C, A, mask=MASK, strength=0.7, response_encoding="base64")
    texts = fields | {"images": [base64.b64encode(image).decode() for image in (C, A)]}
    texts["mask"] = base64.b64encode(MASK).decode()
    answer = base64.b64decode(post(server, "generate", texts)["image"], validate=True)
    assert [answer] == generate(server, fields)


def test_what_the_cache_skips_can_be_computed_anew_with_the_same_bytes(server: Server) -> None:
    fields = edit(A, png(picture(80, 80, 4)))
    calls = "flux2_vae_encoder_seconds_count"
    with Client(server.url) as client:
        first = client.generate(fields, timeout=SECONDS)
        (before,) = count(server, calls)
        second = client.generate(fields, timeout=SECONDS)
        assert count(server, calls) == [before]
        third = client.generate(fields, timeout=SECONDS, cache="skip")
        assert count(server, calls) == [before + 2]
    assert first.images == second.images == third.images


def bomb() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(buffer, "PNG")
    return buffer.getvalue()


WRONG: list[tuple[dict[str, Any], str]] = [
    (edit(b""), r"images\[0\]: 0 bytes; expected a PNG, JPEG or WebP image"),
    (edit(A, b"a red fox"), r"images\[1\]: 9 bytes that are not a PNG, JPEG or WebP image, nor the base64 of one"),
    (edit(A[: len(A) // 2]), r"images\[0\]: the image is damaged or truncated"),
    (edit(bomb()), r"images\[0\]: .*the limit"),
    (edit(A, A, A, A, A), "images: 5 references; .* takes at most 4"),
    (edit(A, mask=MASK), r"mask: 101 x 70 pixels; images\[0\] has 64 x 96"),
    (edit(C, mask=MASK[: len(MASK) // 2]), "mask: the image is damaged or truncated"),
    (edit(C, mask=png(Image.new("L", (101, 70)))), "mask: it has no white pixels, so nothing would be repainted"),
    (edit(mask=MASK), r"mask: there is no image to repaint; send it as images\[0\]"),
    (edit(A, strength=0.5), "strength: it has no effect without a mask; leave it out"),
    (edit(png(picture(64, 48))), r"images\[0\]: 64 x 48 pixels; each side must have at least 64"),
]


def test_wrong_images_get_one_sentence_and_do_not_disturb_others(server: Server) -> None:
    expected = generate(server, REQUESTS[0] | {"steps": 20})
    with ThreadPoolExecutor(8) as pool:
        valid = pool.submit(generate, server, REQUESTS[0] | {"steps": 20})
        wrong = [pool.submit(generate, server, fields) for fields, _ in WRONG]
        for future, (_, message) in zip(wrong, WRONG, strict=True):
            with pytest.raises(RequestError, match=f"^{message}") as caught:
                future.result()
            assert "\n" not in str(caught.value)
        assert valid.result() == expected


def test_an_edit_whose_client_left_frees_its_place(server: Server) -> None:
    with Client(server.url) as client, pytest.raises(ServerError, match="the request was cancelled"):
        client.generate(edit(A, C, steps=100, width=512, height=512), timeout=0.7)
    for _ in range(100):
        if not server.ledger.occupied:
            break
        time.sleep(0.1)
    assert not server.ledger.occupied
    assert generate(server, REQUESTS[0])


def test_klein_kv_reads_references_once_and_never_mixes_two_of_one_size(
    kv_server: Server, artifact_of: ByFamily
) -> None:
    local = LocalPipeline(artifact_of("klein-kv"))
    names = ("flux2_vae_encoder_seconds_count", "flux2_extract_seconds_count")
    requests = [edit(A), edit(B), edit(A, B), edit(B, A), {"prompt": "a house", "seed": 5, "width": 64, "height": 96}]
    expected = [local.generate(fields).pixels for fields in requests]
    with ThreadPoolExecutor(8) as pool:
        first = list(pool.map(lambda fields: generate(kv_server, fields), [*requests, *requests]))
        counted = count(kv_server, *names)
        second = list(pool.map(lambda fields: generate(kv_server, fields), requests))
    assert counted == [2, 4], "of two images and four sets of references, though each was asked for twice at once"
    assert count(kv_server, *names) == counted, "neither engine ran again"
    assert first[:5] == first[5:] == second
    for pixels, images in zip(expected, second, strict=True):
        assert np.array_equal(decode(images[0])[None], pixels)
    hits, held = count(kv_server, 'flux2_cache_hits_total{kind="keys_values"}', "flux2_cache_bytes")
    assert hits >= 4
    assert held > 0
