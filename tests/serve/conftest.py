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
    from tests.conftest import ByFamily


@pytest.fixture(scope="session")
def deployment_of(artifact_of: ByFamily, tmp_path_factory: pytest.TempPathFactory) -> ByFamily:
    """Write the deployment of a family once."""
    from pipeline.request import Limits
    from serve.repository import write_repository
    from serve.settings import Tuning

    @cache
    def make(family: Family) -> Path:
        out = tmp_path_factory.mktemp("deployments") / family
        write_repository(artifact_of(family), out, Limits(), Tuning())
        return out

    return make


@pytest.fixture(scope="session")
def server(deployment_of: ByFamily, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run one real tritonserver with the tiny klein for all tests that need one."""
    from serve.launch import Server

    with Server(deployment_of("klein"), log=tmp_path_factory.mktemp("server") / "triton.log") as running:
        yield running
