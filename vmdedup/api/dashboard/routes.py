"""The dashboard's routes: the page, its files, Plotly's, and the figures.

Owns which files are served: those named here and no others, whatever the request.
Promises that everything comes from the last snapshot, so that no viewer makes the
engine work. Files are streamed from disk, since the server's memory counts: Plotly's
JavaScript is the installed package's, and each browser asks for it once (its address
changes with it). GET and HEAD only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from mmap import ACCESS_READ, mmap
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from vmdedup.api.dashboard.document import Charts, detail_of, state_of
from vmdedup.api.engine_link import EngineLink
from vmdedup.api.openapi import JSON
from vmdedup.ipc.protocol import Snapshot
from vmdedup.report.shipped import asset_path, plotly_path

_PATH = "/dashboard"
_ASSETS = Path(__file__).with_name("assets")
_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_YEAR_S = 365 * 24 * 3600
_REVALIDATE = "no-cache"
_FOR_GOOD = f"private, max-age={_YEAR_S}, immutable"
_SHEET_ID = re.compile(rb"""getElementById\(["']([0-9a-f]{64})["']\)""")


def dashboard_routes(link: EngineLink) -> Sequence[BaseRoute]:
    """The routes, answering from this link."""
    plotly = plotly_path()
    charts = None if plotly is None else _charts(plotly)
    files = {path.name: path for path in _ASSETS.iterdir() if path.suffix in _TYPES}
    page = files.pop("dashboard.html")
    files |= {name: asset_path(name) for name in ("page.css", "figures.js")}

    async def state(_: Request) -> Response:
        def make(snapshot: Snapshot) -> bytes:
            return state_of(snapshot, link.version, charts).model_dump_json().encode()

        return Response(await link.part("dashboard", make), media_type=JSON)

    async def vm(request: Request) -> Response:
        detail = detail_of(await link.snapshot(), request.query_params.get("vm", ""))
        if detail is None:
            problem = {"error": "no VM of that name", "kind": "not-found"}
            return JSONResponse(problem, 404)
        return Response(detail.model_dump_json(), media_type=JSON)

    routes: list[BaseRoute] = [
        Route("/", lambda _: RedirectResponse(f"{_PATH}/")),
        Route(_PATH, lambda _: RedirectResponse(f"{_PATH}/")),
        Route(f"{_PATH}/", partial(_file, page, _REVALIDATE)),
        Route(f"{_PATH}/state.json", state),
        Route(f"{_PATH}/vm.json", vm),
    ]
    for name, path in files.items():
        routes.append(Route(f"{_PATH}/{name}", partial(_file, path, _REVALIDATE)))
    if plotly is not None:
        routes.append(Route(f"{_PATH}/plotly.min.js", partial(_file, plotly, _FOR_GOOD)))
    return routes


def _charts(script: Path) -> Charts:
    """Plotly's address, which changes with the installed version, and its sheets.

    Its map library adds a style sheet as it loads, unless an element has the sheet's id.
    The page draws no maps, and its policy would refuse the sheet and complain.
    """
    found = script.stat()
    with script.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        ids = sorted({match[1].decode() for match in _SHEET_ID.finditer(content)})
    address = f"plotly.min.js?v={found.st_mtime_ns:x}-{found.st_size:x}"
    return Charts(script=address, sheet_ids=ids)


async def _file(path: Path, caching: str, request: Request) -> Response:
    """A file from disk, or 304 if the browser's copy is current."""
    found = path.stat()
    response = FileResponse(
        path,
        media_type=_TYPES[path.suffix],
        stat_result=found,
        headers={"Cache-Control": caching},
    )
    known = request.headers.get("if-none-match", "").split(",")
    if response.headers["etag"] in (each.strip().removeprefix("W/") for each in known):
        kept = {name: response.headers[name] for name in ("etag", "cache-control")}
        return Response(status_code=304, headers=kept)
    return response
