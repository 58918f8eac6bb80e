"""What `benchmarks clients` reads from other people's tools, and what it says when one cannot run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.clients import runs, tools
from benchmarks.clients.command import compare, table
from benchmarks.clients.runs import Job, Result
from benchmarks.serving.loads import Outcome
from kit.commands import flux2
from kit.errors import CheckFailed


def job(into: Path) -> Job:
    return Job("localhost:1", "localhost:2", {"prompt": "a cat", "steps": 4}, 2, 30, 1.0, None, into)


def test_perf_analyzer_reports_microseconds(tmp_path: Path) -> None:
    path = tmp_path / "output.csv"
    path.write_text(
        "Concurrency,Inferences/Second,Client Send,p50 latency,p90 latency,p95 latency,p99 latency\n"
        "2,7.09028,264,258659,428452,485295,535342\n"
    )
    assert runs.read_perf_analyzer(path, job(tmp_path)) == Result(7.09028, 0.258659, 0.485295, 30, 0)


def test_aiperf_reports_milliseconds_and_errors(tmp_path: Path) -> None:
    path = tmp_path / "profile_export_aiperf.json"
    latency = {"unit": "ms", "p50": 304.0, "p95": 371.0, "count": 20}
    counts = {"completed_request_count": {"avg": 21.0}, "request_count": {"avg": 20.0}}
    path.write_text(json.dumps({"request_throughput": {"avg": 6.2}, "request_latency": latency, **counts}))
    assert runs.read_aiperf(path) == Result(6.2, 0.304, 0.371, 20, 1)


def test_locust_reports_milliseconds_of_all_requests(tmp_path: Path) -> None:
    path = tmp_path / "output_stats.csv"
    path.write_text(
        "Type,Name,Request Count,Failure Count,Requests/s,50%,95%\n"
        "POST,/generate,16,0,4.5,370,790\n,Aggregated,17,1,4.6,380,800\n"
    )
    assert runs.read_locust(path) == Result(4.6, 0.38, 0.8, 17, 1)


@pytest.mark.parametrize(("seconds", "agrees"), [(0.21, True), (0.23, False)])
def test_a_tool_agrees_if_throughput_and_median_latency_are_within_a_tenth(seconds: float, agrees: bool) -> None:
    own = [[Outcome(0.2 * n, 0.2, b"") for n in range(10)]] * 2
    found = compare(Result(5.0, seconds, 0.3, 30, 0), own)
    assert found["own"]["per_second"] == [pytest.approx(5.0), pytest.approx(5.0)]
    assert found["ratio_to_own"]["throughput"] == 1.0
    assert found["agrees"] is agrees


def test_a_tool_that_fails_is_told_with_its_last_line(tmp_path: Path) -> None:
    program = "print('starting'); print('no such model'); raise SystemExit(3)"
    with pytest.raises(CheckFailed, match=r"ended with code 3: no such model; see .*console.txt"):
        runs._run([sys.executable, "-c", program], job(tmp_path))
    assert (tmp_path / "console.txt").read_text() == "starting\nno such model\n"


def test_a_package_that_cannot_be_had_is_told_in_words() -> None:
    with pytest.raises(CheckFailed, match="made-up-tool cannot be had from the package index: ERROR"):
        tools._pip(["install", "--no-index", "made-up-tool"], "made-up-tool")


def test_perf_analyzer_finds_the_libraries_that_it_needs() -> None:
    assert tools._library("libb64").is_file()
    with pytest.raises(CheckFailed, match="nvidia-pytriton brings no libnone"):
        tools._library("libnone")


def test_the_table_names_tools_that_failed_and_those_that_differ() -> None:
    own = [[Outcome(0.2 * n, 0.2, b"") for n in range(10)]] * 2
    rows = {"locust": compare(Result(5.0, 0.3, 0.4, 30, 2), own), "aiperf": {"failed": "aiperf cannot be had"}}
    text = table({"concurrency": 4, "tools": rows})
    assert "aiperf cannot be had" in text
    assert "1.00, 1.50  differs by more than 10 %" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tool", "wrk"], "--tool wrk: there are: perf_analyzer, perf_analyzer-http, aiperf, locust"),
        (["--requests", "2"], "--requests must be at least 3"),
    ],
)
def test_wrong_use_is_told(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert flux2(["benchmarks", "clients", "deploy", "--into", str(tmp_path / "new"), *words]) == 2
    assert message in capsys.readouterr().err
