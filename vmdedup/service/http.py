"""The HTTP API: routes, statuses, limits and the OpenAPI schema.

Owns the mapping from requests to the engine link and from refusals to
statuses; every error is {"error": one line, "kind": ...}. Promises that a body
over MAX_BODY_BYTES is refused before it is read, that nothing is half done on
bad input, and that the read-only app has no route for changes and no way to
make the engine work; it alone has the dashboard. Access is decided by the socket's file mode alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vmdedup.dashboard.headers import SecureHeaders
from vmdedup.dashboard.routes import dashboard_routes
from vmdedup.history.series import LONGEST_S, MAX_POINTS
from vmdedup.models import History, Model, SharingReport, Unmerged, VmList, VmListing
from vmdedup.service import metrics
from vmdedup.service.historian import Historian
from vmdedup.service.link import EngineLink, RefusedByEngineError
from vmdedup.service.protocol import (
    JSON_INT_MAX,
    MAX_EVENTS,
    Attach,
    ControlValues,
    Detach,
    Detached,
    ErrorKind,
    EventList,
    FreshReport,
    Health,
    MergeNow,
    Refusal,
    Register,
    Registration,
    SetControls,
    Snapshot,
    UnmergeVms,
    Unregister,
)

MAX_BODY_BYTES = 256 << 10
_BODY_LIMIT_S = 10.0
_MAX_WAIT_S = 60.0
_JSON = "application/json"

_STATUS: dict[ErrorKind, int] = {
    "usage": 422,
    "not-found": 404,
    "conflict": 409,
    "busy": 503,
    "gone": 503,
    "failed": 500,
}


class Problem(Model):
    """The body of every error."""

    error: str
    kind: ErrorKind


def _documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Problem} for status in statuses}


_READ = _documented(422, 503)
_WRITE = _documented(404, 408, 409, 413, 422, 500, 503)

Since = Annotated[int, Query(ge=0, le=JSON_INT_MAX, description="only events after this seq")]
Limit = Annotated[int, Query(ge=1, le=MAX_EVENTS)]
WaitS = Annotated[
    float, Query(ge=0, le=_MAX_WAIT_S, allow_inf_nan=False, description="wait for a first event")
]
SinceS = Annotated[int, Query(ge=1, le=LONGEST_S, description="how far back from now, seconds")]
MaxPoints = Annotated[
    int, Query(ge=1, le=MAX_POINTS, description="most samples; more are averaged evenly")
]
Fresh = Annotated[bool, Query(description="read from the kernel now, not the last snapshot")]


def make_app(link: EngineLink, historian: Historian, *, read_only: bool) -> ASGIApp:
    """The app behind the Unix socket, or (`read_only`) the one behind a TCP port."""
    app = FastAPI(
        title="vmdedup",
        summary="Merge the identical memory of running QEMU VMs, and see who shares what.",
        version=link.version,
        docs_url=None,
        redoc_url=None,
    )
    app.include_router(_read_routes(link, historian))
    app.include_router(_snapshot_report(link) if read_only else _report(link))
    if not read_only:
        app.include_router(_control_routes(link))
        app.include_router(_vm_routes(link))
    app.add_exception_handler(RefusedByEngineError, _on_refusal)
    app.add_exception_handler(RequestValidationError, _on_bad_input)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_surprise)
    if read_only:
        app.router.routes.extend(dashboard_routes(link))
        # A page in a browser of this host must not read it under a name of its own.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
        return SecureHeaders(_BoundedBody(app))
    return _BoundedBody(app)


def _json(model: Model) -> bytes:
    return model.model_dump_json().encode()


def _read_routes(link: EngineLink, historian: Historian) -> APIRouter:
    router = APIRouter(tags=["read"], responses=_READ)

    async def part(name: str, make: Callable[[Snapshot], Model]) -> Response:
        return Response(await link.part(name, lambda it: _json(make(it))), media_type=_JSON)

    @router.get("/v1/vms", response_model=VmList)
    async def vms() -> Response:
        """VMs found, their backends, mergeable or refused and why."""
        return await part("vms", lambda snapshot: snapshot.vms)

    @router.get("/v1/controls", response_model=ControlValues)
    async def controls() -> Response:
        """Every control with its value."""
        return await part("controls", lambda snapshot: snapshot.controls)

    @router.get("/v1/events", response_model=EventList)
    async def events(since: Since = 0, limit: Limit = 100, wait_s: WaitS = 0.0) -> Response:
        """What happened, the oldest first."""
        return Response(_json(await link.events(since, limit, wait_s)), media_type=_JSON)

    @router.get("/v1/health", response_model=Health)
    async def health() -> Response:
        """Who serves, and how old its knowledge is."""
        found = await link.health()
        health = found.model_copy(update={"history": historian.health()})
        return Response(_json(health), media_type=_JSON)

    @router.get("/v1/history", response_model=History)
    async def history(since_s: SinceS = 3600, max_points: MaxPoints = 500) -> Response:
        """What was saved when, the oldest first."""
        return Response(_json(await historian.read(since_s, max_points)), media_type=_JSON)

    @router.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def prometheus() -> Response:
        """Metrics in Prometheus' text format."""
        text = await link.part("metrics", lambda it: metrics.exposition(it, link.version))
        return Response(text, media_type=metrics.CONTENT_TYPE)

    return router


def _snapshot_report(link: EngineLink) -> APIRouter:
    router = APIRouter(tags=["read"], responses=_READ)

    @router.get("/v1/report", response_model=SharingReport)
    async def report() -> Response:
        """What each VM shares, as of the last snapshot."""
        content = await link.part("report", lambda snapshot: _json(snapshot.report))
        return Response(content, media_type=_JSON)

    return router


def _report(link: EngineLink) -> APIRouter:
    router = APIRouter(tags=["read"], responses=_documented(422, 500, 503))

    @router.get("/v1/report", response_model=SharingReport)
    async def report(fresh: Fresh = False) -> Response:
        """What each VM shares."""
        if fresh:
            content = _json(await link.ask(FreshReport(), SharingReport))
        else:
            content = await link.part("report", lambda snapshot: _json(snapshot.report))
        return Response(content, media_type=_JSON)

    return router


def _control_routes(link: EngineLink) -> APIRouter:
    router = APIRouter(tags=["controls"], responses=_WRITE)

    @router.put("/v1/controls", operation_id="put_controls")
    @router.post("/v1/controls", operation_id="post_controls")
    async def set_controls(body: SetControls) -> ControlValues:
        """Change controls, all of them or none; answers with every control."""
        return await link.ask(body, ControlValues)

    return router


def _vm_routes(link: EngineLink) -> APIRouter:
    router = APIRouter(tags=["VMs"], responses=_WRITE)

    @router.post("/v1/register")
    async def register(body: Register) -> Registration:
        """Make a range of a memory backend mergeable."""
        return await link.ask(body, Registration)

    @router.post("/v1/unregister")
    async def unregister(body: Unregister) -> Registration:
        """Unmerge a range of a memory backend and leave it alone."""
        return await link.ask(body, Registration)

    @router.post("/v1/attach")
    async def attach(body: Attach) -> VmListing:
        """Attach to the VM behind a QMP socket."""
        return await link.ask(body, VmListing)

    @router.post("/v1/detach")
    async def detach(body: Detach) -> Detached:
        """Let go of a VM; what is merged stays merged."""
        return await link.ask(body, Detached)

    @router.post("/v1/unmerge")
    async def unmerge(body: UnmergeVms) -> Unmerged:
        """Give pages their own memory back."""
        return await link.ask(body, Unmerged)

    @router.post("/v1/merge-now")
    async def merge_now(body: MergeNow | None = None) -> SharingReport:
        """Merge until the VMs have converged or the time is over; then the report."""
        return await link.ask(body or MergeNow(), SharingReport)

    return router


def _problem(
    status: int, kind: ErrorKind, message: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    # What a client sent may hold half a surrogate pair, which is no text to send back.
    line = " ".join(message.split()).encode(errors="replace").decode()
    return JSONResponse({"error": line, "kind": kind}, status, headers=headers)


async def _on_refusal(_: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedByEngineError)
    refusal: Refusal = error.refusal
    headers = {"Retry-After": "1"} if refusal.kind == "busy" else None
    return _problem(_STATUS[refusal.kind], refusal.kind, refusal.message, headers)


async def _on_bad_input(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    where = ".".join(str(step) for step in problem["loc"])
    return _problem(422, "usage", f"{where}: {problem['msg']}")


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    # FastAPI's 400 is a body that could not be parsed at all: bad input like any other.
    status = 422 if error.status_code == 400 else error.status_code
    kind: ErrorKind = "not-found" if status == 404 else "usage"
    return _problem(status, kind, str(error.detail), dict(error.headers or {}))


async def _on_surprise(_: Request, error: Exception) -> Response:
    return _problem(500, "failed", f"unexpected {type(error).__name__} in the API server")


class _BoundedBody:
    """ASGI middleware: the whole body first, or 413, or 408 when it does not come."""

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
            answer = _problem(408, "usage", "the body did not come", {"Connection": "close"})
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
