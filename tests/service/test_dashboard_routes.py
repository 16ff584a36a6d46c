"""What the loopback port serves to a browser: the page and its files, and what it forbids."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest

from tests.service.engine import ScriptedEngine
from vmdedup.linux.smaps import process_pss_bytes
from vmdedup.report.shipped import plotly_path

pytestmark = pytest.mark.process

PATHS = (
    "/dashboard/",
    "/dashboard/dashboard.js",
    "/dashboard/figures.js",
    "/dashboard/page.css",
    "/dashboard/icon.svg",
    "/dashboard/state.json",
    "/dashboard/vm.json?vm=web",
)


@pytest.fixture
def port(engine: ScriptedEngine) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{engine.api.tcp_port}", timeout=30) as client:
        yield client


def test_every_answer_forbids_what_a_page_does_not_need(port: httpx.Client) -> None:
    for path in (*PATHS, "/v1/report", "/nowhere", "/"):
        headers = port.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert not re.search(r"https?:|\*", policy)
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["cache-control"]
        assert "access-control-allow-origin" not in headers


def test_the_page_is_read_and_nothing_else(engine: ScriptedEngine, port: httpx.Client) -> None:
    assert port.get("/").headers["location"] == "/dashboard/"
    for path in PATHS:
        answer, head = port.get(path), port.head(path)
        assert (answer.status_code, head.status_code) == (200, 200), path
        assert head.content == b""
        assert head.headers["content-type"] == answer.headers["content-type"]
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            assert port.request(method, path).status_code == 405
    assert engine.commands == []
    assert port.get("/dashboard/vm.json", params={"vm": "nobody"}).status_code == 404
    assert port.get("/dashboard/vm.json").status_code == 404


def test_only_the_page_s_own_files_are_served(port: httpx.Client, http: httpx.Client) -> None:
    for path in (
        "routes.py",
        "..%2froutes.py",
        "%2e%2e/routes.py",
        "widgetbundle.js",
        "report.html.j2",
    ):
        assert port.get(f"/dashboard/{path}").status_code == 404, path
    assert http.get("/dashboard/").status_code == 404, "the Unix socket is for programs"


def test_a_strange_host_name_is_turned_away(port: httpx.Client) -> None:
    for path in PATHS:
        for name in (
            "rebound.example",
            "127.0.0.1.rebound.example",
            "",
            "localhost.rebound.example",
        ):
            assert port.get(path, headers={"Host": name}).status_code == 400, (path, name)
        assert port.get(path, headers={"Host": "localhost:8080"}).status_code == 200


def test_files_are_asked_for_once(engine: ScriptedEngine, port: httpx.Client) -> None:
    first = port.get("/dashboard/dashboard.js")
    known = {"If-None-Match": first.headers["etag"]}
    again = port.get("/dashboard/dashboard.js", headers=known)
    assert (again.status_code, again.content) == (304, b"")
    assert port.get("/dashboard/figures.js", headers=known).status_code == 200


def test_plotly_is_the_installed_package_s_own_and_streamed(
    engine: ScriptedEngine, port: httpx.Client
) -> None:
    script = plotly_path()
    if script is None:
        pytest.skip("plotly is not installed")
    address = "/dashboard/" + port.get("/dashboard/state.json").json()["charts"]["script"]
    for _ in range(3):
        answer = port.get(address)
        assert answer.content == script.read_bytes()
    assert "immutable" in answer.headers["cache-control"]
    assert "max-age=31536000" in answer.headers["cache-control"]
    assert process_pss_bytes(engine.api.pid) <= 64 << 20


def test_names_from_guests_are_text_in_json(engine: ScriptedEngine, port: httpx.Client) -> None:
    evil = "<img src=x onerror=alert(1)>\u202e"
    engine.names = [evil, "a/b?c#d"]
    engine.push()
    while port.get("/dashboard/state.json").json()["vms"][0]["name"] != evil:
        pass
    for name in engine.names:
        answer = port.get("/dashboard/vm.json", params={"vm": name})
        assert answer.headers["content-type"] == "application/json"
        assert answer.json()["report"]["name"] == name
