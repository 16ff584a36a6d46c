"""The HTTP API: routes, statuses and limits.

Owns the mapping from requests to the engine link and from refusals to statuses; every
error is {"error": one line, "kind": ...}. Promises that nothing is half done on bad input.
The app of each listener has only the routes that are for whom it is:

    unix      all; access is decided by the socket's file mode alone
    loopback  what only reads and cannot make the engine work, and the dashboard
    tls       what other hosts ask for: totals, VMs, sketches, metrics. All else is 403
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, Field, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from vmdedup.api.body import BoundedBody, problem
from vmdedup.api.dashboard.headers import SecureHeaders
from vmdedup.api.dashboard.routes import dashboard_routes
from vmdedup.api.engine_link import EngineLink, RefusedByEngineError
from vmdedup.api.historian import Historian
from vmdedup.api.openapi import JSON, Operation, Query, document
from vmdedup.history.series import LONGEST_S, MAX_POINTS
from vmdedup.ipc.protocol import (
    JSON_INT_MAX,
    MAX_EVENTS,
    MAX_REQUESTS,
    Attach,
    Command,
    CompareWithKsm,
    ControlValues,
    Detach,
    Detached,
    ErrorKind,
    EventList,
    FreshReport,
    Health,
    MergeNow,
    ReadContentSources,
    ReadSketch,
    Refusal,
    Register,
    Registration,
    SetControls,
    Snapshot,
    UnmergeVms,
    Unregister,
    VmName,
)
from vmdedup.models import (
    ContentSources,
    History,
    Model,
    SharingReport,
    Unmerged,
    VmList,
    VmListing,
    VmSketch,
)
from vmdedup.units import DEFAULT_RATE, RATES, require_rate

_MAX_WAIT_S = 60.0

_STATUS: dict[ErrorKind, int] = {
    "usage": 422,
    "not-found": 404,
    "conflict": 409,
    "busy": 503,
    "unfinished": 503,
    "gone": 503,
    "failed": 500,
    "forbidden": 403,
}
_TLS_READS = {"/v1/vms", "/v1/health", "/metrics"}
"""Beside report and sketch. VMs tell which monitor is whose, for rules by VMID."""

_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
_READ = (422, 503)
_WRITE = (404, 408, 409, 413, 422, 500, 503)

_Result = TypeVar("_Result", bound=Model)

Listener = Literal["unix", "loopback", "tls"]


class EventsQuery(Query):
    """Which events."""

    since: Annotated[
        int, Field(ge=0, le=JSON_INT_MAX, description="only events after this seq")
    ] = 0
    limit: Annotated[int, Field(ge=1, le=MAX_EVENTS)] = 100
    wait_s: Annotated[
        float,
        Field(
            ge=0,
            le=_MAX_WAIT_S,
            allow_inf_nan=False,
            description="longest wait for a first event, seconds",
        ),
    ] = 0.0


class HistoryQuery(Query):
    """Which samples."""

    since_s: Annotated[
        int, Field(ge=1, le=LONGEST_S, description="time back from now, seconds")
    ] = 3600
    max_points: Annotated[
        int, Field(ge=1, le=MAX_POINTS, description="most samples; more are averaged evenly")
    ] = 500
    vm: Annotated[
        str | None, Field(max_length=1024, description="VM by its name; all together without")
    ] = None


class SketchQuery(Query):
    """Which sketch."""

    vm: VmName
    rate: Annotated[
        int,
        Field(
            description="contents for each one in the sample; coarser if that is too long",
            json_schema_extra={"enum": [*RATES]},
        ),
        AfterValidator(require_rate),
    ] = DEFAULT_RATE


class ReportQuery(Query):
    """Which report."""

    fresh: Annotated[
        bool, Field(description="whether to read from the kernel now, not the last snapshot")
    ] = False


def make_app(link: EngineLink, historian: Historian, listener: Listener) -> ASGIApp:
    """The app behind the Unix socket, the port on loopback, or the one with client certificates."""
    operations = _operations(link, historian, listener)
    routes = _routes(operations)

    async def schema(_: Request) -> Response:
        return JSONResponse(document(operations, version=link.version))

    routes.append(Route("/openapi.json", schema))
    middleware = []
    if listener == "loopback":
        routes += dashboard_routes(link)
        # A page in a browser of this host must not read it under a name of its own.
        allowed = ["127.0.0.1", "localhost"]
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=allowed))
    if listener == "tls":
        routes.append(_all_else_is_forbidden(operations))
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={
            RefusedByEngineError: _on_refusal,
            HTTPException: _on_http_error,
            Exception: _on_surprise,
        },
    )
    return BoundedBody(app) if listener == "unix" else SecureHeaders(BoundedBody(app))


def _operations(link: EngineLink, historian: Historian, listener: Listener) -> list[Operation]:
    reads = _reads(link, historian)
    if listener == "unix":
        sketch = _sketch(link, at_once=MAX_REQUESTS)
        return [*reads, _report(link), sketch, *_looks(link), *_changes(link)]
    if listener == "loopback":
        return [*reads, _snapshot_report(link)]
    reads = [each for each in reads if each.path in _TLS_READS]
    # One at a time: others who ask the engine for something are not kept waiting.
    return [*reads, _snapshot_report(link), _sketch(link, at_once=1)]


def _all_else_is_forbidden(operations: Sequence[Operation]) -> Route:
    paths = ", ".join(sorted(each.path for each in operations))

    async def refuse(request: Request) -> Response:
        return problem(
            403,
            "forbidden",
            f"{request.method} {request.url.path}: this listener only gives {paths}; for all else"
            " ask the daemon on its host, or over ssh://",
        )

    return Route("/{path:path}", refuse, methods=_METHODS)


def _routes(operations: Sequence[Operation]) -> list[BaseRoute]:
    """One route for each path, so that a wrong method gets the list of right ones."""
    by_path: dict[str, dict[str, Operation]] = {}
    for each in operations:
        by_path.setdefault(each.path, {})[each.method] = each

    def route(path: str, methods: dict[str, Operation]) -> Route:
        async def serve(request: Request) -> Response:
            operation = methods["GET" if request.method == "HEAD" else request.method]
            try:
                given = await _input(operation, request)
            except ValidationError as error:
                return _bad_input("query" if operation.takes_query else "body", error)
            return await operation.call(given)

        return Route(path, serve, methods=list(methods))

    return [route(path, methods) for path, methods in by_path.items()]


async def _input(operation: Operation, request: Request) -> BaseModel | None:
    """The operation's input. Raises ValidationError, HTTPException."""
    if operation.takes is None:
        return None
    if operation.takes_query:
        return operation.takes.model_validate(dict(request.query_params))
    body = await request.body()
    if operation.may_be_empty and body.strip() in (b"", b"null"):
        return operation.takes()
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if body and kind != JSON:
        raise HTTPException(422, f"body: its type is {kind or 'not given'}, send {JSON}")
    return operation.takes.model_validate_json(body)


def _json(model: Model) -> Response:
    return Response(model.model_dump_json(), media_type=JSON)


async def _part(link: EngineLink, name: str, make: Callable[[Snapshot], Model]) -> Response:
    """A part of the last snapshot, serialised once for all clients."""
    content = await link.part(name, lambda it: make(it).model_dump_json().encode())
    return Response(content, media_type=JSON)


def _reads(link: EngineLink, historian: Historian) -> list[Operation]:
    async def vms(_: None) -> Response:
        """VMs found, their backends, mergeable or refused and why."""
        return await _part(link, "vms", lambda snapshot: snapshot.vms)

    async def controls(_: None) -> Response:
        """Every control with its value."""
        return await _part(link, "controls", lambda snapshot: snapshot.controls)

    async def events(query: EventsQuery) -> Response:
        """Events, the oldest first."""
        return _json(await link.events(query.since, query.limit, query.wait_s))

    async def health(_: None) -> Response:
        """The server, the engine behind it, and the age of its snapshot."""
        found = await link.health()
        return _json(found.model_copy(update={"history": historian.health()}))

    async def history(query: HistoryQuery) -> Response:
        """Samples of the savings, the oldest first."""
        return _json(await historian.read(query.since_s, query.max_points, query.vm))

    async def prometheus(_: None) -> Response:
        """Metrics in Prometheus' text format."""
        # Imported here: it takes 2 MiB of this process, needed only if it is scraped.
        from vmdedup.api import metrics

        text = await link.part("metrics", lambda it: metrics.exposition(it, link.version))
        return Response(text, media_type=metrics.CONTENT_TYPE)

    return [
        Operation("GET", "/v1/vms", "read", vms, VmList, _READ),
        Operation("GET", "/v1/controls", "read", controls, ControlValues, _READ),
        Operation("GET", "/v1/events", "read", events, EventList, _READ, EventsQuery),
        Operation("GET", "/v1/health", "read", health, Health, _READ),
        Operation("GET", "/v1/history", "read", history, History, _READ, HistoryQuery),
        Operation("GET", "/metrics", "read", prometheus, None, _READ),
    ]


def _snapshot_report(link: EngineLink) -> Operation:
    async def report(_: None) -> Response:
        """The sharing of each VM, as of the last snapshot."""
        return await _part(link, "report", lambda snapshot: snapshot.report)

    return Operation("GET", "/v1/report", "read", report, SharingReport, _READ)


def _report(link: EngineLink) -> Operation:
    async def report(query: ReportQuery) -> Response:
        """The sharing of each VM."""
        if query.fresh:
            return _json(await link.ask(FreshReport(), SharingReport))
        return await _part(link, "report", lambda snapshot: snapshot.report)

    problems = (*_READ, 500)
    return Operation("GET", "/v1/report", "read", report, SharingReport, problems, ReportQuery)


def _sketch(link: EngineLink, *, at_once: int) -> Operation:
    gate = asyncio.Semaphore(at_once)

    async def sketch(query: SketchQuery) -> Response:
        """A sample of one VM's contents."""
        async with gate:
            return _json(await link.ask(ReadSketch(vm=query.vm, rate=query.rate), VmSketch))

    return Operation("GET", "/v1/sketch", "read", sketch, VmSketch, _WRITE, SketchQuery)


def _looks(link: EngineLink) -> list[Operation]:
    async def content_sources(command: ReadContentSources) -> Response:
        """Say from which known files the contents of memory come; reads all memory once."""
        return _json(await link.ask(command, ContentSources))

    async def ksm_comparison(_: None) -> Response:
        """The sharing of each VM, and what KSM would save; reads all memory once."""
        return _json(await link.ask(CompareWithKsm(), SharingReport))

    return [
        Operation(
            "POST",
            "/v1/content-sources",
            "read",
            content_sources,
            ContentSources,
            _WRITE,
            ReadContentSources,
        ),
        Operation("GET", "/v1/ksm-comparison", "read", ksm_comparison, SharingReport, _WRITE),
    ]


def _changes(link: EngineLink) -> list[Operation]:
    def change(takes: type[Command], name: str, tag: str, gives: type[_Result]) -> Operation:
        async def call(command: Command) -> Response:
            return _json(await link.ask(command, gives))

        call.__doc__ = takes.__doc__
        return Operation("POST", f"/v1/{name}", tag, call, gives, _WRITE, takes)

    set_controls = change(SetControls, "controls", "controls", ControlValues)
    return [
        set_controls,
        replace(set_controls, method="PUT"),
        change(Register, "register", "VMs", Registration),
        change(Unregister, "unregister", "VMs", Registration),
        change(Attach, "attach", "VMs", VmListing),
        change(Detach, "detach", "VMs", Detached),
        change(UnmergeVms, "unmerge", "VMs", Unmerged),
        replace(change(MergeNow, "merge-now", "VMs", SharingReport), may_be_empty=True),
    ]


def _bad_input(place: str, error: ValidationError) -> Response:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(map(str, (place, *first["loc"])))
    return problem(422, "usage", f"{where}: {first['msg']}")


async def _on_refusal(_: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedByEngineError)
    refusal: Refusal = error.refusal
    headers = {"Retry-After": "1"} if refusal.kind == "busy" else None
    status = _STATUS[refusal.kind]
    return problem(status, refusal.kind, refusal.message, headers, refusal.unmerged)


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind: ErrorKind = "not-found" if error.status_code == 404 else "usage"
    return problem(error.status_code, kind, str(error.detail), dict(error.headers or {}))


async def _on_surprise(_: Request, error: Exception) -> Response:
    return problem(500, "failed", f"unexpected {type(error).__name__} in the API server")
