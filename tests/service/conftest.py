"""Running API servers, each with a scripted engine that has pushed once; real VMs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.harness.vm import Backend, Vm
from tests.qemu.conftest import Boot, boot, need, needs_root
from tests.service.daemon import Directories
from tests.service.engine import ScriptedEngine
from vmdedup.client import Client

__all__ = ["boot", "need", "needs_root"]


SHARED = Backend("memfd", share=True, mib=16)
PRIVATE = Backend("ram", share=False, mib=16)
QUIET = {"mib": 4, "rewrite_per_s": 4, "check_per_s": 8192}

Start = Callable[..., Vm]


@pytest.fixture
def start(boot: Boot) -> Start:
    """Starts a small VM; guests share half of their worker's pages."""
    seeds = iter(range(1, 100))

    def start(backend: Backend | Sequence[Backend] = SHARED, **options: Any) -> Vm:
        parameters = {"seed": next(seeds), **QUIET, **options.pop("parameters", {})}
        return boot("bare", backend=backend, parameters=parameters, **options)

    return start


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
def own_tcp_engine(tmp_path: Path) -> Iterator[ScriptedEngine]:
    """One for this test alone, on a loopback port too."""
    with ScriptedEngine(tmp_path, tcp_port=0) as running:
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
