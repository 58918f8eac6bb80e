"""The plans of an artifact as jobs for child processes, and what to tell when a compiler crashes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kit.compilers import COMPILERS, Compiler, activate
from kit.cuda_device import CudaDevice
from kit.errors import CheckFailed
from kit.ports import Ports
from runtimes.trt.build import apart
from runtimes.trt.build.apart import Tick, Work
from runtimes.trt.build.options import EngineOptions, PlannedPlan
from runtimes.trt.record import PlanRecord

KILLED = (signal.SIGKILL, signal.SIGTERM)


@dataclass(frozen=True)
class Job:
    """One plan to build."""

    plan: PlannedPlan
    graph: Path
    ports: Ports
    options: EngineOptions
    out: Path
    compiler: str
    device: CudaDevice
    timings: Path  # folder of kernel timings


def build(job: Job, tick: Tick) -> PlanRecord:
    """Build a plan in this process, which must not have loaded another TensorRT."""
    row = COMPILERS[job.compiler]
    activate(row)
    from runtimes.trt.build.build import build_plan  # imports TensorRT
    from runtimes.trt.build.timing import TimingCache

    cache = TimingCache(job.timings, job.device) if row.timing_cache else None
    return build_plan(job.plan, job.graph, job.ports, job.options, job.out, cache, tick, row)


def build_all(
    jobs: Sequence[Job],
    version: str,
    tick: Callable[[int, float, str], None],
    done: Callable[[PlanRecord], None],
) -> list[PlanRecord]:
    """Build plans in child processes; raises CheckFailed that names the part if the compiler crashes."""
    records: dict[int, PlanRecord] = {}

    def keep(place: int, record: PlanRecord) -> None:
        records[place] = record
        done(record)

    works = [Work(job.plan.file, build, (job,)) for job in jobs]
    try:
        apart.run(works, workers(jobs), tick, keep)
    except apart.Died as error:
        job = jobs[works.index(error.work)]
        raise CheckFailed(died(job.plan, job.options, COMPILERS[job.compiler], version, error)) from None
    return [records[place] for place in range(len(jobs))]


def workers(jobs: Sequence[Job]) -> int:
    """Return how many plans are built at a time.

    Plans without weights are small jobs, one per core. With weights, one has most of the memory; and TensorRT measures
    kernels on the GPU, where two builds would disturb each other.
    """
    small = all(COMPILERS[job.compiler].targets and job.options.weights == "inputs" for job in jobs)
    return max(1, len(os.sched_getaffinity(0))) if small else 1


def died(plan: PlannedPlan, options: EngineOptions, row: Compiler, version: str, error: apart.Died) -> str:
    """Describe the death of the compiler's process, and what to try."""
    what = f"{plan.file}: {row.title} {version}"
    if error.signal is None:
        return f"{what} left the build of the {plan.part} without a reason (its messages are above)"
    if error.signal in KILLED:
        smaller = "" if options.weights == "inputs" else ", or use --weights inputs, which reads no weights"
        return (
            f"{what} was killed ({error.signal.name}) while it built the {plan.part}; Linux does this when memory runs "
            f"out: free memory, build fewer at a time with --parts{smaller}"
        )
    return (
        f"{what} crashed ({error.signal.name}) while it built the {plan.part}. This is an error of the compiler for "
        f"this graph: try other --sides or --profile, another recipe or --attention, or another version of {row.title}"
    )
