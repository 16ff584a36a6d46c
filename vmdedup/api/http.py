"""The HTTP API: routes, statuses and limits.

Owns the mapping from requests to the engine link and from refusals to statuses; every
error is {"error": one line, "kind": ...}. Promises that a body over MAX_BODY_BYTES is
refused before it is read, and that nothing is half done on bad input. The read-only app
has no route for changes and cannot make the engine work; only it has the dashboard.
Access is decided by the socket's file mode alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, Field, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vmdedup.api.dashboard.headers import SecureHeaders
from vmdedup.api.dashboard.routes import dashboard_routes
from vmdedup.api.engine_link import EngineLink, RefusedByEngineError
from vmdedup.api.historian import Historian
from vmdedup.api.openapi import JSON, Operation, Query, document
from vmdedup.history.series import LONGEST_S, MAX_POINTS
from vmdedup.ipc.protocol import (
    JSON_INT_MAX,
    MAX_EVENTS,
    Attach,
    Command,
    ControlValues,
    Detach,
    Detached,
    ErrorKind,
    EventList,
    FreshReport,
    Health,
    MergeNow,
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
    History,
    Model,
    SharingReport,
    Unmerged,
    VmList,
    VmListing,
    VmSketch,
)
from vmdedup.units import DEFAULT_RATE, RATES, require_rate

MAX_BODY_BYTES = 256 << 10
_BODY_LIMIT_S = 10.0
_MAX_WAIT_S = 60.0

_STATUS: dict[ErrorKind, int] = {
    "usage": 422,
    "not-found": 404,
    "conflict": 409,
    "busy": 503,
    "unfinished": 503,
    "gone": 503,
    "failed": 500,
}
_READ = (422, 503)
_WRITE = (404, 408, 409, 413, 422, 500, 503)

_Result = TypeVar("_Result", bound=Model)


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


def make_app(link: EngineLink, historian: Historian, *, read_only: bool) -> ASGIApp:
    """The app behind the Unix socket, or (`read_only`) the one behind a TCP port."""
    operations = _reads(link, historian)
    if read_only:
        operations.append(_snapshot_report(link))
    else:
        operations += [_report(link), _sketch(link), *_changes(link)]
    routes = _routes(operations)

    async def schema(_: Request) -> Response:
        return JSONResponse(document(operations, version=link.version))

    routes.append(Route("/openapi.json", schema))
    middleware = []
    if read_only:
        routes += dashboard_routes(link)
        # A page in a browser of this host must not read it under a name of its own.
        allowed = ["127.0.0.1", "localhost"]
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=allowed))
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={
            RefusedByEngineError: _on_refusal,
            HTTPException: _on_http_error,
            Exception: _on_surprise,
        },
    )
    return SecureHeaders(_BoundedBody(app)) if read_only else _BoundedBody(app)


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


def _sketch(link: EngineLink) -> Operation:
    async def sketch(query: SketchQuery) -> Response:
        """A sample of one VM's contents."""
        return _json(await link.ask(ReadSketch(vm=query.vm, rate=query.rate), VmSketch))

    return Operation("GET", "/v1/sketch", "read", sketch, VmSketch, _WRITE, SketchQuery)


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
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(map(str, (place, *problem["loc"])))
    return _problem(422, "usage", f"{where}: {problem['msg']}")


def _problem(
    status: int,
    kind: ErrorKind,
    message: str,
    headers: dict[str, str] | None = None,
    unmerged: Unmerged | None = None,
) -> JSONResponse:
    # Text from a client may hold half a surrogate pair, which cannot be sent back.
    line = " ".join(message.split()).encode(errors="replace").decode()
    content: dict[str, object] = {"error": line, "kind": kind}
    if unmerged is not None:
        content["unmerged"] = unmerged.model_dump(mode="json")
    return JSONResponse(content, status, headers=headers)


async def _on_refusal(_: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedByEngineError)
    refusal: Refusal = error.refusal
    headers = {"Retry-After": "1"} if refusal.kind == "busy" else None
    status = _STATUS[refusal.kind]
    return _problem(status, refusal.kind, refusal.message, headers, refusal.unmerged)


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind: ErrorKind = "not-found" if error.status_code == 404 else "usage"
    return _problem(error.status_code, kind, str(error.detail), dict(error.headers or {}))


async def _on_surprise(_: Request, error: Exception) -> Response:
    return _problem(500, "failed", f"unexpected {type(error).__name__} in the API server")


class _BoundedBody:
    """ASGI middleware: passes on whole bodies; answers 413, or 408 if the body does not come."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(_BODY_LIMIT_S):
                body = await _read_body(dict(scope["headers"]), receive)
        except TimeoutError:
            answer = _problem(
                408, "usage", "the body did not arrive in time: try again", {"Connection": "close"}
            )
            await answer(scope, receive, send)
        except _TooBigError:
            text = f"the body is over {MAX_BODY_BYTES} bytes"
            answer = _problem(413, "usage", text, {"Connection": "close"})
            await answer(scope, receive, send)
        else:
            await self._app(scope, _replay(body, receive), send)


class _TooBigError(Exception):
    """The body is over MAX_BODY_BYTES."""


async def _read_body(headers: dict[bytes, bytes], receive: Receive) -> bytes:
    announced = headers.get(b"content-length", b"0")
    if int(announced) > MAX_BODY_BYTES:
        raise _TooBigError
    body = bytearray()
    more = True
    while more:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            raise _TooBigError
        more = message.get("more_body", False)
    return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read, and then goes on as before."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
