"""HTTP, both clients, the command line and docs/api.md have the same calls.

The OpenAPI document is the list: it is made from the operations that are served. A new
operation, call or verb is added to the others too, or gets a reason in one of these tables.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import typer

from tests.harness.pages import page
from vmdedup.api.http import make_app
from vmdedup.cli.main import app
from vmdedup.client import AsyncClient, Client
from vmdedup.errors import VmdedupError
from vmdedup.ipc.protocol import SOCKET_NAME

pytestmark = pytest.mark.unit

GROUP: Any = typer.main.get_command(app)
VERBS: Mapping[str, Any] = GROUP.commands


class Request(NamedTuple):
    method: str
    path: str


CALLS: Mapping[str, Mapping[str, Any]] = {
    "report": {"fresh": True},
    "vms": {},
    "controls": {},
    "health": {},
    "events": {"since": 1, "limit": 2, "wait_s": 3.0},
    "history": {"since_s": 60, "max_points": 2, "vm": "web"},
    "sketch": {"vm": "web", "rate": 256},
    "content_sources": {"known": ["/boot/vmlinuz"]},
    "compare_with_ksm": {},
    "set": {"run": 1},
    "merge": {"vms": ["web"], "timeout_s": 3.0},
    "unmerge": {"vms": ["web"]},
    "register": {"vm": "web", "backend": "ram0", "offset_bytes": 0, "length_bytes": 4096},
    "unregister": {"vm": "web", "backend": "ram0", "offset_bytes": 0, "length_bytes": 4096},
    "attach": {"qmp": "/run/vms/web.qmp"},
    "detach": {"vm": "web"},
}
"""The clients' calls, each with everything that it can be given."""

NO_CALL = {
    Request("GET", "/metrics"): "text for Prometheus, which has its own client",
    Request("PUT", "/v1/controls"): "the same as POST",
}

VERB_OF: Mapping[Request, Sequence[str]] = {
    Request("GET", "/v1/report"): ["report"],
    Request("GET", "/v1/vms"): ["vms"],
    Request("GET", "/v1/controls"): ["get"],
    Request("GET", "/v1/events"): ["events"],
    Request("GET", "/v1/history"): ["history"],
    Request("POST", "/v1/content-sources"): ["explain", "--contents", "--known", "/"],
    Request("GET", "/v1/ksm-comparison"): ["report", "--compare", "KSM"],
    Request("POST", "/v1/controls"): ["set", "run=1"],
    Request("POST", "/v1/merge-now"): ["merge"],
    Request("POST", "/v1/unmerge"): ["unmerge"],
    Request("POST", "/v1/register"): ["register", "web", "ram0"],
    Request("POST", "/v1/unregister"): ["unregister", "web", "ram0"],
    Request("POST", "/v1/attach"): ["attach", "/run/vms/web.qmp"],
    Request("POST", "/v1/detach"): ["detach", "web"],
}

NO_VERB = {
    **NO_CALL,
    Request("GET", "/v1/sketch"): "numbers for whoever compares VMs of several hosts",
    Request("GET", "/v1/health"): "`top` shows it among others, `doctor` asks for the engine's pid",
}

NO_REQUEST = {
    "run": "it is the daemon, or works instead of one",
    "doctor": "looks at this host, whether or not a daemon runs",
    "top": "shows the answers to several requests together",
    "analyze": "reads VMs and images that no daemon has",
    "assert": "judges the report, which `report` asks for",
    "verify": "checks the daemon's work, so it must not ask the daemon",
    "resume": "is for the time when no daemon runs any more",
    "schema": "prints what is installed with it",
    "fleet": "asks many hosts, for several things",
    "bridge": "carries requests that another host has made",
}


@cache
def served() -> Mapping[Request, frozenset[str]]:
    """Each operation of the OpenAPI document, with the names in its query or its body."""

    class Link:
        version = "0"

    async def fetch() -> Any:
        link: Any = Link()
        transport = httpx.ASGITransport(make_app(link, link, "unix"))
        async with httpx.AsyncClient(transport=transport, base_url="http://vmdedup") as client:
            return (await client.get("/openapi.json")).json()

    document = asyncio.run(fetch())
    return {
        Request(method.upper(), path): frozenset(_fields(operation, document))
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def _fields(operation: Any, document: Any) -> Iterator[str]:
    yield from (parameter["name"] for parameter in operation.get("parameters", ()))
    if "requestBody" in operation:
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        (reference,) = re.findall(r"schemas/(\w+)", json.dumps(schema))
        yield from document["components"]["schemas"][reference]["properties"]


class Sent:
    """Notes each request that a client of this process sends, and answers it with an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.requests: dict[Request, frozenset[str]] = {}
        for transport in ("HTTPTransport", "AsyncHTTPTransport"):
            monkeypatch.setattr(httpx, transport, lambda **_: httpx.MockTransport(self._note))

    def _note(self, request: httpx.Request) -> httpx.Response:
        fields = frozenset(json.loads(request.content) if request.content else request.url.params)
        self.requests[Request(request.method, request.url.path)] = fields
        return httpx.Response(500, json={"error": "only noted", "kind": "failed"})


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    return Sent(monkeypatch)


def calls_of(client: type) -> dict[str, str]:
    """Public methods and their signatures."""
    public = inspect.getmembers(client, inspect.isfunction)
    return {name: str(inspect.signature(it)) for name, it in public if name[0] != "_"}


def test_both_clients_have_the_same_calls() -> None:
    assert calls_of(Client) == calls_of(AsyncClient)
    assert calls_of(Client).keys() - {"close"} == CALLS.keys()


def test_the_client_has_every_operation_with_all_its_fields(sent: Sent) -> None:
    with Client("/nowhere") as client:
        for name, options in CALLS.items():
            with suppress(VmdedupError):
                getattr(client, name)(**options)
    assert sent.requests == without(served(), NO_CALL)


def test_the_async_client_has_every_operation_with_all_its_fields(sent: Sent) -> None:
    async def call_all() -> None:
        async with AsyncClient("/nowhere") as client:
            for name, options in CALLS.items():
                with suppress(VmdedupError):
                    await getattr(client, name)(**options)

    asyncio.run(call_all())
    assert sent.requests == without(served(), NO_CALL)


def without(
    operations: Mapping[Request, frozenset[str]], reasons: Mapping[Request, str]
) -> dict[Request, frozenset[str]]:
    """The operations for which no reason stands; a reason for none is out of date."""
    assert reasons.keys() <= operations.keys()
    return {request: fields for request, fields in operations.items() if request not in reasons}


def test_every_operation_has_a_verb() -> None:
    assert VERB_OF.keys() == without(served(), NO_VERB).keys()
    assert {words[0] for words in VERB_OF.values()} | NO_REQUEST.keys() == VERBS.keys()


@pytest.mark.parametrize("request_", VERB_OF, ids=lambda it: f"{it.method} {it.path}")
def test_the_verb_sends_it(request_: Request, sent: Sent, tmp_path: Path) -> None:
    verb, *words = VERB_OF[request_]
    with socket.socket(socket.AF_UNIX) as daemon, suppress(VmdedupError):
        daemon.bind(str(tmp_path / SOCKET_NAME))
        daemon.listen()  # some verbs look first whether anybody does
        VERBS[verb].main([*words, "--runtime-dir", str(tmp_path)], standalone_mode=False)
    assert request_ in sent.requests


def test_the_page_lists_every_operation() -> None:
    assert documented() == served().keys() | {Request("GET", "/openapi.json")}


def documented() -> set[Request]:
    """The requests in the page's table: `METHOD /path`, and `/path` with the method before it."""
    found = set()
    for first, *_ in page("docs/api.md").rows:
        method = ""
        for code in re.findall(r"`([^`]*)`", first):
            if match := re.fullmatch(r"(?:([A-Z]+) )?(/[\w./-]+).*", code):
                method = match[1] or method
                found.add(Request(method, match[2]))
    return found


def test_the_page_shows_every_call() -> None:
    examples = "".join(
        block.text for block in page("docs/api.md").blocks if block.section == "The Python client"
    )
    assert set(re.findall(r"\bservice\.(\w+)\(", examples)) == CALLS.keys()
