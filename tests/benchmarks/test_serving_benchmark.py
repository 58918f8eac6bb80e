"""The parts of `benchmarks serving` that need no server; tests/serve/test_serving_benchmark.py runs it against one."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving import scrape
from benchmarks.serving.capacity import Alone, Capacity, interpolate, throughput, times_in_flight
from benchmarks.serving.command import hourly_price, numbers, table
from benchmarks.serving.loads import Outcome, poisson_times, rate
from benchmarks.serving.mix import DEFAULT, draw, read_mix
from benchmarks.serving.points import Terms, _facts
from benchmarks.serving.policies import policy_names
from benchmarks.serving.prediction import predict
from kit.errors import UsageError
from planner.queueing import replay


def write(path: Path, mix: Any) -> Path:
    path.write_text(json.dumps(mix))
    return path


def test_the_default_mix_has_short_long_and_large_requests() -> None:
    classes = read_mix(None)
    assert [one.name for one in classes] == list(DEFAULT)
    assert classes[0].request(9) == {**classes[0].fields, "seed": 1}


def test_a_mix_may_name_files_for_fields_that_are_images(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"png")
    path = write(
        tmp_path / "mix.json", {"edit": {"share": 1, "fields": {"prompt": "x", "images": [{"file": "a.png"}]}}}
    )
    assert read_mix(path)[0].fields == {"prompt": "x", "images": [b"png"]}


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ([], "expected an object of classes"),
        ({"a": {"share": 1}}, "a: a class has `share`, a number, and `fields`, an object"),
        ({"a": {"share": 0, "fields": {}}}, "a: share 0 is not a positive number"),
        ({"a": {"share": 1, "fields": {"seed": 1}}}, "the benchmark chooses the seeds"),
        ({"a": {"share": 1, "fields": {"images": [{"file": "none.png"}]}}}, "none.png: No such file"),
        ({"a": {"share": 1, "fields": {"images": [{"url": "x"}]}}}, 'or {"file": NAME}'),
    ],
)
def test_a_wrong_mix_is_rejected(mix: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        read_mix(write(tmp_path / "mix.json", mix))
    assert message in str(error.value)


def test_the_shares_of_a_mix_hold_in_every_stretch() -> None:
    classes = read_mix(None)
    order = draw(classes, 60)
    assert Counter(order) == {0: 40, 1: 10, 2: 10}
    assert Counter(order[:12]) == {0: 8, 1: 2, 2: 2}
    assert order == draw(classes, 60)


def test_a_poisson_stream_has_its_rate_and_repeats() -> None:
    due = poisson_times(50, 100)
    assert len(due) == pytest.approx(5000, rel=0.05)
    assert due == poisson_times(50, 100)
    assert due == sorted(due)


METRICS = """# HELP flux2_images_total images returned
flux2_images_total{model="flux2",version="1"} 4
flux2_steps_total{model="denoiser"} 40
flux2_denoiser_engine_calls_total{model="denoiser"} 20
flux2_denoiser_engine_rows_total{model="denoiser"} 40
flux2_step_seconds_bucket{le="0.1"} 20
flux2_step_seconds_sum 1.5
flux2_step_seconds_count 20
flux2_request_seconds_sum 4.0
flux2_request_seconds_count 4
flux2_queue_seconds_sum 0.4
flux2_queue_seconds_count 4
flux2_rejections_total{reason="invalid"} 1
flux2_rejections_total{reason="overload"} 2
nv_inference_request_success{model="vae_decoder",version="1"} 4
nv_inference_request_duration_us{model="vae_decoder",version="1"} 800000
"""


def test_two_readings_of_metrics_tell_the_stages_of_a_request() -> None:
    found = scrape.breakdown({}, scrape.parse(METRICS))
    assert found["request_seconds_mean"] == 1.0
    assert found["stages_seconds"]["queue"] == 0.1
    assert found["stages_seconds"]["vae_decoder"] == 0.2
    assert found["stages_seconds"]["denoiser"] == 0.7
    assert found["rows_per_call"] == 2
    assert found["rejections"] == 3
    half = {key: value / 2 for key, value in scrape.parse(METRICS).items()}
    assert scrape.breakdown(half, scrape.parse(METRICS))["request_seconds_mean"] == 1.0
    assert found["step_seconds_mean"] == 0.075


def test_a_port_without_metrics_is_named() -> None:
    with pytest.raises(UsageError, match="127.0.0.1:1: no metrics of a server .*--metrics-url"):
        scrape.read("127.0.0.1:1")


def test_throughput_leaves_out_the_end_of_a_closed_loop() -> None:
    # two workers of speed 0.75 each: six requests of one second of work, then a lone one at speed 1
    step = 1 / 0.75
    pairs = [Outcome(n // 2 * step, step, b"") for n in range(6)]
    outcomes = [*pairs, Outcome(3 * step, 1.0, b"")]
    times = times_in_flight(outcomes)
    assert times[1] == pytest.approx(1.0)
    assert times[2] == pytest.approx(3 * step)
    assert throughput(2, 7.0, times, {1: 1.0}) == pytest.approx(1.5)
    assert interpolate({1: 1.0, 4: 2.5}, 2) == pytest.approx(1.5)
    assert rate(outcomes) == pytest.approx(7 / (3 * step + 1))


def terms() -> Terms:
    classes = read_mix(None)
    twins = {(one.name, seed): f"{one.name} {seed}".encode() for one in classes for seed in range(8)}
    return Terms(classes, Alone({"short": [0.1], "long": [0.7], "large": [0.2]}, twins), [2.0, 3.0], 0.9)


def test_a_load_is_told_by_class_with_goodput_cost_and_images_that_differ() -> None:
    common = terms()
    order = draw(common.classes, 12)
    outcomes = []
    for number, kind in enumerate(order):
        one = common.classes[kind]
        image = common.alone.twins[one.name, number % 8]
        seconds = 2.5 * common.alone.median(one.name)  # within three times, not within two
        outcomes.append(Outcome(number * 0.5, seconds, image, number=number))
    outcomes[3] = Outcome(1.5, 0.1, None, "UNAVAILABLE: try again in 0.7 s", number=3)
    outcomes[4] = Outcome(2.0, 0.1, b"another image", number=4)
    found = _facts(common, outcomes, order, {})
    assert found["errors"] == {"UNAVAILABLE: try again in N s": 1}
    assert found["images_that_differ"] == 1
    assert sum(one["requests"] for one in found["classes"].values()) == 11
    assert found["goodput_per_minute"]["2"] < found["goodput_per_minute"]["3"] == found["images_per_minute"]
    assert found["dollars_per_1000_images"] == pytest.approx(0.9 / found["images_per_minute"] / 60 * 1000, rel=0.01)


def test_a_poisson_stream_has_a_request_however_short_it_is() -> None:
    assert poisson_times(0.001, 0.5) == [0.5]


def test_the_planner_serves_the_same_arrivals() -> None:
    alone = {"short": [0.1], "long": [0.7], "large": [0.2]}
    order = draw(read_mix(None), 50)
    arrivals = [(0.3 * n, alone[list(alone)[kind]][0]) for n, kind in enumerate(order)]
    told = replay(arrivals, [1.0])
    samples = [[at, kind, seconds] for (at, _), kind, seconds in zip(arrivals, order, told, strict=True)]
    capacity = {"gains_by_requests_in_flight": [1.0, 1.0], "step_seconds": 0.0}
    facts = {"mix": DEFAULT, "alone_seconds": alone, "capacity": capacity}
    found = predict(facts, samples)
    assert found["all"]["error"] == pytest.approx(0, abs=0.001)
    assert [row["error"] for row in found["classes"].values()] == pytest.approx([0, 0, 0], abs=0.001)
    slower = predict(facts, [[at, kind, 2 * seconds] for at, kind, seconds in samples])
    assert slower["all"]["error"] == pytest.approx(-0.5, abs=0.001)


def test_capacity_is_that_of_the_fewest_requests_that_saturate() -> None:
    capacity = Capacity([0.9, 1.5, 1.53], 0.5, 0.0)
    assert capacity.per_second == pytest.approx(3.0)
    assert capacity.gains[1] == pytest.approx(1.5 / 0.9)


def test_options_are_checked() -> None:
    assert numbers("0.3,1", "--loads") == [0.3, 1]
    with pytest.raises(UsageError, match="--loads 0.3,x: expected positive numbers"):
        numbers("0.3,x", "--loads")
    with pytest.raises(UsageError, match="--policies x: there are: steps, requests, one"):
        policy_names("steps,x")
    assert hourly_price(None, "l4") == pytest.approx(0.8, rel=0.3)
    assert hourly_price(2.0, None) == 2.0


def test_the_table_has_a_row_for_each_load_and_policy() -> None:
    common = terms()
    order = draw(common.classes, 6)
    outcomes = [
        Outcome(n * 0.5, 0.2, common.alone.twins[common.classes[kind].name, n], number=n)
        for n, kind in enumerate(order)
    ]
    server = {"rows_per_call": 1.5, "stages_seconds": {"queue": 0.001}}
    row = {"load": 0.8, "arrivals": "poisson", **_facts(common, outcomes, order, server)}
    samples = [[o.sent, order[o.number], o.seconds] for o in outcomes]
    facts: dict[str, Any] = {
        "mix": DEFAULT,
        "alone_seconds": common.alone.seconds,
        "capacity": {"requests_per_second": 5.0, "gains_by_requests_in_flight": [1.0]},
        "loads": [row],
        "policies": {"one": {**row, "saturated_per_second": 4.0}},
    }
    row["planner"] = predict({**facts, "capacity": {**facts["capacity"], "step_seconds": 0.0}}, samples)
    text = table(facts)
    assert "capacity: 5.00 requests a second" in text
    assert "0.200 0.200 0.200" in text
    assert "policy one: 4.00 requests a second" in text
    assert "rows a call 1.50" in text
