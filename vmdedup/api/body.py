"""Bodies: those of requests, bounded, and those of errors, one line each.

Promises that a body over MAX_BODY_BYTES is refused before it is read.
"""

from __future__ import annotations

import asyncio

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vmdedup.ipc.protocol import ErrorKind
from vmdedup.models import Unmerged

MAX_BODY_BYTES = 256 << 10
_BODY_LIMIT_S = 10.0


def problem(
    status: int,
    kind: ErrorKind,
    message: str,
    headers: dict[str, str] | None = None,
    unmerged: Unmerged | None = None,
) -> JSONResponse:
    """The answer of an error."""
    # Text from a client may hold half a surrogate pair, which cannot be sent back.
    line = " ".join(message.split()).encode(errors="replace").decode()
    content: dict[str, object] = {"error": line, "kind": kind}
    if unmerged is not None:
        content["unmerged"] = unmerged.model_dump(mode="json")
    return JSONResponse(content, status, headers=headers)


class BoundedBody:
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
            answer = problem(
                408, "usage", "the body did not arrive in time: try again", {"Connection": "close"}
            )
            await answer(scope, receive, send)
        except _TooBigError:
            text = f"the body is over {MAX_BODY_BYTES} bytes"
            answer = problem(413, "usage", text, {"Connection": "close"})
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
