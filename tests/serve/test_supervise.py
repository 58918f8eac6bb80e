"""A supervised server: processes that die or are stopped, stops with requests in flight, clients that leave."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from benchmarks import malformed
from kit.errors import Flux2Error, RequestError, ServerError, UnavailableError
from pipeline.images import decode, encode
from serve.client import Client, ImageResponse, Progress, fields_to_inputs
from serve.launch import Server
from serve.processes import stubs
from tests.conftest import ByFamily
from tests.serve.test_server import metrics

pytestmark = pytest.mark.server
SMALL: dict[str, Any] = {"prompt": "a cat", "seed": 1, "steps": 2, "width": 64, "height": 64}
LONG = SMALL | {"steps": 100}
ROOT = Path(__file__).parents[2]
HEAL_SECONDS = 60.0  # far above what is measured (docs/serving): this machine may be busy


@pytest.fixture(scope="module")
def supervised(deployment_of: ByFamily, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run a server of this module's own: its processes are killed."""
    log = tmp_path_factory.mktemp("supervised") / "triton.log"
    with Server(deployment_of("klein"), log=log, on_event=EVENTS.append) as running:
        yield running
        running_prefix = running._shm_prefix
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(running_prefix)]


EVENTS: list[str] = []


def until(condition: Callable[[], Any], seconds: float = HEAL_SECONDS) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, EVENTS
        time.sleep(0.02)
    return value


def until_healed(server: Server, heals: int) -> None:
    until(lambda: server.ledger.heals > heals and is_ready(server))


def is_ready(server: Server) -> bool:
    url = f"http://{server.ports.host}:{server.ports.http}/v2/health/ready"
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def send_many(server: Server, count: int, pool: ThreadPoolExecutor, **fields: Any) -> list[Any]:
    def one(seed: int) -> Any:
        with Client(server.url) as client:
            try:
                return client.generate(LONG | fields | {"seed": seed}, timeout=HEAL_SECONDS).images
            except Flux2Error as error:
                return error

    return [pool.submit(one, seed) for seed in range(count)]


@pytest.mark.parametrize(
    "model",
    ["tokenizer", "text_encoder", "vae_encoder", "denoiser", "vae_decoder", "image_encoder", "flux2", "flux2_stream"],
)
def test_a_killed_model_is_healed_and_only_requests_in_it_fail(model: str, supervised: Server) -> None:
    with Client(supervised.url) as client:
        expected = client.generate(SMALL, timeout=HEAL_SECONDS).images
    heals, server = supervised.ledger.heals, supervised.pid
    with ThreadPoolExecutor(4) as pool:
        edits = (
            {"images": [encode(np.full((64, 64, 3), len(EVENTS), np.uint8), "png")]} if model == "vae_encoder" else {}
        )
        flying = send_many(supervised, 4, pool, **edits)
        time.sleep(0.3)
        os.kill(stubs(server)[model].pid, signal.SIGKILL)
        until(lambda: not is_ready(supervised), 10)
        until_healed(supervised, heals)
        answers = [future.result() for future in flying]
    lost = [answer for answer in answers if isinstance(answer, Exception)]
    for error in lost:
        assert isinstance(error, (UnavailableError, ServerError)), error
    if model not in ("denoiser", "flux2", "flux2_stream"):
        assert not lost  # their part of a request is done again
        assert supervised.pid == server
    assert model in EVENTS[-1]
    with Client(supervised.url) as client:
        assert client.generate(SMALL, timeout=HEAL_SECONDS).images == expected


def test_requests_lost_in_the_denoiser_are_told_to_try_again(supervised: Server) -> None:
    heals = supervised.ledger.heals
    with ThreadPoolExecutor(3) as pool:
        flying = send_many(supervised, 3, pool, width=128, height=128)
        until(lambda: supervised.ledger.in_flight(), 20)
        time.sleep(0.3)
        os.kill(stubs(supervised.pid)["denoiser"].pid, signal.SIGKILL)
        errors = [str(f.result()) for f in flying if isinstance(f.result(), Exception)]
    assert set(errors) == {"a process of the server ended during this request; it is restarted, try again"}
    until_healed(supervised, heals)


def test_a_killed_server_is_started_anew(supervised: Server) -> None:
    heals, server = supervised.ledger.heals, supervised.pid
    os.kill(server, signal.SIGKILL)
    until_healed(supervised, heals)
    assert supervised.pid != server
    assert "tritonserver ended with code -9; the server serves again after" in EVENTS[-1]
    with Client(supervised.url) as client:
        assert client.generate(SMALL, timeout=HEAL_SECONDS).images


@pytest.mark.parametrize("name", ["denoiser", "tritonserver"])
def test_a_stopped_process_is_continued_before_anyone_notices(name: str, supervised: Server) -> None:
    pid = supervised.pid if name == "tritonserver" else stubs(supervised.pid)[name].pid
    with ThreadPoolExecutor(2) as pool:
        flying = send_many(supervised, 2, pool)
        os.kill(pid, signal.SIGSTOP)
        assert all(not isinstance(future.result(), Exception) for future in flying)
    assert any(f"the process of {name} (pid {pid}) was stopped and has been continued" == event for event in EVENTS)


def test_a_request_that_ends_two_processes_is_rejected(supervised: Server) -> None:
    poison = LONG | {"prompt": "poison", "width": 128, "height": 128}
    for _ in range(2):
        heals = supervised.ledger.heals
        with ThreadPoolExecutor(1) as pool, Client(supervised.url) as client:
            future = pool.submit(client.generate, poison, HEAL_SECONDS)
            until(lambda: supervised.ledger.in_flight(), 20)
            time.sleep(0.2)
            os.kill(stubs(supervised.pid)["denoiser"].pid, signal.SIGKILL)
            with pytest.raises(UnavailableError):
                future.result()
        until_healed(supervised, heals)
    with Client(supervised.url) as client:
        with pytest.raises(Flux2Error, match="this request has ended a process of the server twice"):
            client.generate(poison, timeout=HEAL_SECONDS)
        assert client.generate(SMALL, timeout=HEAL_SECONDS).images


def test_cancelled_and_late_requests_stop_within_a_step(supervised: Server) -> None:
    before = metrics(supervised)
    client = grpc.InferenceServerClient(supervised.url)
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    calls = [
        client.async_infer(
            "flux2",
            fields_to_inputs(LONG | {"seed": n, "width": 256, "height": 256}),
            callback=lambda result, error: answers.put(error),
        )
        for n in range(4)
    ]
    until(lambda: supervised.ledger.in_flight(), 20)
    for call in calls:
        call.cancel()
    until(lambda: supervised.ledger.occupied == 0, 20)
    with pytest.raises(InferenceServerException, match="Deadline"):
        client.infer("flux2", fields_to_inputs(LONG | {"width": 256, "height": 256}), client_timeout=0.3)
    until(lambda: supervised.ledger.occupied == 0, 20)
    client.close()
    cancelled = before["flux2_cancellations_total"] + 5  # metrics are sent a moment later
    after = until(lambda: (m := metrics(supervised))["flux2_cancellations_total"] >= cancelled and m, 10)
    assert after["flux2_steps_total"] - before["flux2_steps_total"] < 5 * 100 / 2


def test_a_deadline_travels_with_a_request(supervised: Server) -> None:
    client = grpc.InferenceServerClient(supervised.url)
    with pytest.raises(InferenceServerException) as caught:
        client.infer("flux2", fields_to_inputs(LONG | {"width": 256, "height": 256}), timeout=100_000)
    client.close()
    assert "UNAVAILABLE" in str(caught.value.status())


def test_a_stream_reports_steps_and_then_the_image(supervised: Server) -> None:
    with Client(supervised.url) as plain:
        (expected,) = plain.generate(SMALL | {"steps": 12}, timeout=HEAL_SECONDS).images
    client = grpc.InferenceServerClient(supervised.url)
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    client.async_stream_infer("flux2_stream", fields_to_inputs(SMALL | {"steps": 12}))
    steps = []
    while True:
        result, error = answers.get(timeout=HEAL_SECONDS)
        assert error is None
        image = result.as_numpy("image")
        if image is not None:
            break
        steps.append((int(result.as_numpy("step")[0]), int(result.as_numpy("steps")[0])))
    assert bytes(image[0]) == expected
    assert steps == sorted(set(steps))
    assert all(total == 12 and 0 < step < 12 for step, total in steps)
    client.async_stream_infer("flux2_stream", fields_to_inputs(SMALL | {"steps": 0}))
    result, error = answers.get(timeout=HEAL_SECONDS)
    assert "steps: 0 is not between 1 and 100" in str(error)
    client.async_stream_infer("flux2_stream", fields_to_inputs(LONG | {"width": 256, "height": 256}))
    until(lambda: supervised.ledger.in_flight(), 20)
    client.stop_stream(cancel_requests=True)
    until(lambda: supervised.ledger.occupied == 0, 20)
    client.close()


@pytest.mark.parametrize("encoding", ["bytes", "base64"])
def test_the_client_streams_progress_previews_and_the_image(encoding: str, supervised: Server) -> None:
    wanted = SMALL | {"steps": 40, "width": 128, "height": 96, "response_encoding": encoding}
    with Client(supervised.url) as client:
        expected = client.generate(wanted, timeout=HEAL_SECONDS)
        *progress, last = client.stream(wanted, timeout=HEAL_SECONDS)
    assert isinstance(last, ImageResponse)
    assert (last.images, last.seed) == (expected.images, expected.seed)
    assert all(isinstance(step, Progress) and step.steps == 40 for step in progress)
    previews = [step.preview for step in progress if isinstance(step, Progress) and step.preview is not None]
    assert previews
    for preview in previews:
        assert decode(preview).shape == (12, 16, 3)
    assert len(set(previews)) > 1
    until(lambda: not list(supervised.ledger.path.parent.glob("*.png")), 5)


def test_errors_of_a_stream_are_those_of_a_request(supervised: Server) -> None:
    with Client(supervised.url) as client:
        with pytest.raises(RequestError, match="steps: 0 is not between 1 and 100"):
            next(client.stream(SMALL | {"steps": 0}, timeout=HEAL_SECONDS))
        with pytest.raises(ServerError, match="did not answer within 0.5 s; the request was cancelled"):
            list(client.stream(LONG | {"width": 256, "height": 256}, timeout=0.5))
        until(lambda: supervised.ledger.occupied == 0, 20)
        stream = client.stream(LONG | {"width": 256, "height": 256}, timeout=HEAL_SECONDS)
        next(stream)
        stream.close()
        until(lambda: supervised.ledger.occupied == 0, 20)


@pytest.mark.parametrize("call", ["generate", "stream"])
def test_the_work_of_a_killed_client_ends(call: str, supervised: Server) -> None:
    fields = LONG | {"width": 256, "height": 256}
    sends = f"""
import sys
from serve.client import Client
with Client("{supervised.url}") as client:
    list(client.{call}({fields!r}, timeout=600))
"""
    process = subprocess.Popen([sys.executable, "-c", sends], cwd=ROOT)
    try:
        until(lambda: supervised.ledger.in_flight(), 60)
    finally:
        process.kill()
        process.wait()
    until(lambda: supervised.ledger.occupied == 0, 20)
    with Client(supervised.url) as client:
        assert client.generate(SMALL, timeout=HEAL_SECONDS).images


@pytest.mark.parametrize("name", ["prompt", "negative_prompt", "output_format", "response_encoding"])
def test_a_huge_text_is_refused_in_a_short_sentence(name: str, supervised: Server) -> None:
    fields = SMALL | {name: "x" * 20_000_000}
    with Client(supervised.url) as client:
        for send in (lambda: client.generate(fields, timeout=60), lambda: list(client.stream(fields, timeout=60))):
            with pytest.raises(RequestError, match=name) as caught:
                send()
            assert len(str(caught.value)) < 250
        assert supervised.ledger.occupied == 0
        assert client.generate(SMALL, timeout=HEAL_SECONDS).images


def texts(*values: bytes, batched: bool = False) -> Any:
    array = np.array(values, np.object_)
    return array[None] if batched else array


STRANGERS: dict[str, dict[str, Any]] = {
    "denoiser": {"checked_ticket": np.array([[12345]]), "action": texts(b"fetch", batched=True)},
    "prompt_stage": {
        "checked_ticket": np.array([[12345]]),
        "action": texts(b"bring", batched=True),
        "item_keys": texts(b"prompt:x", batched=True),
        "text": texts(b"a cat"),
        "field": texts(b"prompt"),
    },
    "vae_encoder": {
        "ticket": np.array([12345]),
        "image": texts(b"x"),
        "field": texts(b"images[0]"),
        "role": texts(b"reference"),
        "size": np.zeros(2, np.int32),
    },
}


@pytest.mark.parametrize("model", STRANGERS)
def test_internal_models_refuse_strangers_at_once(model: str, supervised: Server) -> None:
    inputs = []
    for name, array in STRANGERS[model].items():
        kind = {"O": "BYTES", "i": f"INT{8 * array.itemsize}"}[array.dtype.kind]
        inputs.append(grpc.InferInput(name, array.shape, kind))
        inputs[-1].set_data_from_numpy(array)
    client = grpc.InferenceServerClient(supervised.url)
    who = "VAE encoder" if model == "vae_encoder" else "denoiser"
    with pytest.raises(InferenceServerException, match=f"the {who} is internal; send requests to the model 'flux2'"):
        client.infer(model, inputs, client_timeout=HEAL_SECONDS)
    client.close()


def test_malformed_requests_harm_nobody(supervised: Server) -> None:
    """`benchmarks availability --only malformed` sends 10,000 and times a neighbour."""
    heals = supervised.ledger.heals
    seen = malformed.send(supervised.url, f"{supervised.ports.host}:{supervised.ports.http}", 150)
    # Triton's HTTP frontend answers with 500 to JSON that it cannot read
    assert {status.split(":")[0] for status in seen} <= {
        *(f"gRPC {name}" for name in malformed.ANSWERED),
        *(f"HTTP {code}" for code in (200, 400, 404, 500, 501)),
    }, seen
    assert seen["gRPC INVALID_ARGUMENT"] > 50
    assert supervised.ledger.heals == heals
    until(lambda: supervised.ledger.occupied == 0, 20)
    with Client(supervised.url) as client:
        assert client.generate(SMALL, timeout=HEAL_SECONDS).images


def test_only_the_supervisor_may_unload_a_model(supervised: Server) -> None:
    client = grpc.InferenceServerClient(supervised.url)
    with pytest.raises(InferenceServerException):
        client.unload_model("flux2")
    client.close()
    request = urllib.request.Request(
        f"http://{supervised.ports.host}:{supervised.ports.http}/v2/repository/models/flux2/unload", b"{}"
    )
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request, timeout=10)


def test_a_stop_says_not_ready_and_finishes_what_is_in_flight(deployment_of: ByFamily, tmp_path: Path) -> None:
    server = Server(deployment_of("klein"), log=tmp_path / "log")
    code: list[int | None] = []
    with ThreadPoolExecutor(3) as pool:
        server.__enter__()
        flying = send_many(server, 3, pool)
        until(lambda: len(server.ledger.in_flight()) == 3, 20)
        stopping = threading.Thread(target=lambda: code.append(server.stop()))
        stopping.start()
        until(lambda: not is_ready(server), 10)
        images = [future.result() for future in flying]
        stopping.join(60)
    assert all(isinstance(found, list) for found in images), images
    assert code == [0]


def test_a_stop_does_not_wait_for_what_a_dead_process_owed(deployment_of: ByFamily, tmp_path: Path) -> None:
    server = Server(deployment_of("klein"), log=tmp_path / "log", exit_timeout=30)
    server.__enter__()
    heals = server.ledger.heals
    for model in ("text_encoder", "vae_decoder", "tokenizer"):
        with ThreadPoolExecutor(6) as pool:
            flying = send_many(server, 6, pool)
            time.sleep(0.2)
            os.kill(stubs(server.pid)[model].pid, signal.SIGKILL)
            until_healed(server, heals)
            heals = server.ledger.heals
            for future in flying:
                future.result()
    start = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - start < 15


def test_a_second_signal_ends_the_drain(deployment_of: ByFamily, tmp_path: Path) -> None:
    server = Server(deployment_of("klein"), log=tmp_path / "log")
    hurry = threading.Event()
    hurry.set()
    with ThreadPoolExecutor(1) as pool:
        server.__enter__()
        flying = send_many(server, 1, pool, width=1024, height=1024)
        until(lambda: server.ledger.in_flight(), 20)
        start = time.monotonic()
        server.stop(600, hurry)
        assert time.monotonic() - start < 60
        assert isinstance(flying[0].result(), Flux2Error)
