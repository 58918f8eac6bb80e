"""Deployments of tiny checkpoints, and one running server for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from kit.variants import Family
    from serve.launch import Server
    from tests.conftest import ByFamily, Once


@pytest.fixture(scope="session")
def deployment_of(artifact_of: ByFamily, once: Once) -> ByFamily:
    """Write the deployment of a family."""

    @cache
    def make(family: Family) -> Path:
        from pipeline.request import Limits
        from serve.repository import write_repository
        from serve.settings import Tuning

        artifact = artifact_of(family)
        return once(f"deployments/{family}", lambda out: write_repository(artifact, out, Limits(), Tuning()))

    return make


@pytest.fixture(scope="session")
def server(deployment_of: ByFamily, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run one real tritonserver with the tiny klein for all tests that need one."""
    from serve.launch import Server

    with Server(deployment_of("klein"), log=tmp_path_factory.mktemp("server") / "triton.log") as running:
        yield running
