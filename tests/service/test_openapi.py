"""The API against its own OpenAPI schema: every answer is documented, no input breaks it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from requests.adapters import HTTPAdapter
from schemathesis import GenerationMode
from schemathesis.core.result import Ok
from urllib3.connection import HTTPConnection
from urllib3.connectionpool import HTTPConnectionPool

from tests.service.engine import ScriptedEngine
from vmdedup.ipc.protocol import Command, ControlValues, SetControls
from vmdedup.models import Model

pytestmark = pytest.mark.process


class _UnixPool(HTTPConnectionPool):
    """urllib3 over a Unix socket, which requests (schemathesis' transport) lacks."""

    def __init__(self, path: Path) -> None:
        super().__init__("vmdedup")
        self._path = path

    def _new_conn(self) -> HTTPConnection:
        path = self._path

        class Connection(HTTPConnection):
            def _new_conn(self) -> socket.socket:
                sock = socket.socket(socket.AF_UNIX)
                sock.connect(str(path))
                return sock

        return Connection("vmdedup")


class _UnixAdapter(HTTPAdapter):
    def __init__(self, path: Path) -> None:
        self._pool = _UnixPool(path)
        super().__init__()

    def get_connection_with_tls_context(self, *_: Any, **__: Any) -> HTTPConnectionPool:
        return self._pool

    def close(self) -> None:
        self._pool.close()
        super().close()


@pytest.fixture
def session(engine: ScriptedEngine) -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.mount("http://vmdedup", _UnixAdapter(engine.api.path))
        yield session


@pytest.mark.parametrize("mode", GenerationMode)
def test_the_api_keeps_to_its_schema(
    engine: ScriptedEngine, http: httpx.Client, session: requests.Session, mode: GenerationMode
) -> None:
    engine.answer = lambda command: _agree(engine, command)
    document = http.get("/openapi.json").json()
    events = document["paths"]["/v1/events"]["get"]
    # A valid wait is a minute of waiting: tests/service/test_api.py has its own test of it.
    events["parameters"] = [it for it in events["parameters"] if it["name"] != "wait_s"]
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url="http://vmdedup")
    for check in ("positive_data_acceptance", "negative_data_rejection"):
        # A list of long names may be too long in all, which no schema can say.
        rule = getattr(schema.config.checks, check)
        rule.expected_statuses = [*rule.expected_statuses, "413"]
    tried = set()
    for found in schema.get_all_operations():
        assert isinstance(found, Ok)
        operation = found.ok()
        takes_input = len(operation.body) + len(operation.query)
        if takes_input or mode is GenerationMode.POSITIVE:
            tried.add((operation.method, operation.path))
            _examine(operation, session, mode)
    assert ("post", "/v1/merge-now") in tried
    assert len(tried) == (18 if mode is GenerationMode.POSITIVE else 13)


def _agree(engine: ScriptedEngine, command: Command) -> Model:
    """Which names controls have is not in the schema: take all of them."""
    if isinstance(command, SetControls):
        return ControlValues(values=command.values)
    return engine.obey(command)


def _examine(operation: Any, session: requests.Session, mode: GenerationMode) -> None:
    checked = 0

    @given(operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=25,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def examine(case: Any) -> None:
        nonlocal checked
        case.call_and_validate(session=session)
        checked += 1

    examine()
    assert checked


def test_the_schema_is_made_from_the_report_models(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    assert {"SharingReport", "VmReport", "HostReport", "VmList", "Problem"} <= set(schemas)
    assert "HTTPValidationError" not in schemas
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert "422" in operation["responses"], (method, path)
