"""Running API servers, each with a scripted engine that has pushed once; real VMs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.qemu.conftest import boot, need
from tests.service.daemon import Directories
from tests.service.engine import ScriptedEngine
from vmdedup.service.client import Client

__all__ = ["boot", "need"]


@pytest.fixture
def directories() -> Iterator[Directories]:
    """Name it before `boot`: the VMs then end before their store goes."""
    with Directories() as own:
        yield own


@pytest.fixture(scope="session")
def shared_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedEngine]:
    with ScriptedEngine(tmp_path_factory.mktemp("api"), tcp_port=0) as running:
        yield running


@pytest.fixture
def engine(shared_engine: ScriptedEngine) -> ScriptedEngine:
    """One for all tests, as it was at its start; its server must outlive the test."""
    shared_engine.reset()
    shared_engine.push()
    return shared_engine


@pytest.fixture
def own_engine(tmp_path: Path) -> Iterator[ScriptedEngine]:
    """One for this test alone, which may end it."""
    with ScriptedEngine(tmp_path) as running:
        running.push()
        yield running


@pytest.fixture
def client(engine: ScriptedEngine) -> Iterator[Client]:
    with Client(engine.api.path) as connected:
        yield connected


@pytest.fixture
def http(engine: ScriptedEngine) -> Iterator[httpx.Client]:
    """Raw HTTP, for what `Client` would never send."""
    with over(engine.api.path) as connected:
        yield connected


def over(path: Path) -> httpx.Client:
    transport = httpx.HTTPTransport(uds=str(path))
    return httpx.Client(transport=transport, base_url="http://vmdedup", timeout=30)
