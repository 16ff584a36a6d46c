"""The dashboard behind nginx with a login, by the shipped configuration, in a real browser."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.harness.browser import Page, browser_missing
from tests.harness.nginx import PASSWORD, USER, Nginx, nginx_missing
from tests.service.daemon import free_port
from tests.service.engine import ScriptedEngine
from tests.service.test_dashboard import SHOWN_NAMES, picture
from tests.service.test_dashboard_routes import PATHS
from vmdedup.ipc.protocol import Event

pytestmark = pytest.mark.process

ALL_PATHS = (*PATHS, "/", "/v1/report", "/v1/events", "/metrics", "/openapi.json", "/nowhere")
Need = Callable[[str | None], None]


@pytest.fixture
def proxy(own_tcp_engine: ScriptedEngine, tmp_path: Path, need: Need) -> Iterator[Nginx]:
    need(nginx_missing())
    upstream_port = own_tcp_engine.api.tcp_port
    assert upstream_port is not None
    base = tmp_path / "nginx"
    base.mkdir()
    with Nginx(base, free_port(), upstream_port) as running:
        yield running


def test_nothing_is_shown_without_the_password(proxy: Nginx) -> None:
    for password in (None, "wrong", "", f"{PASSWORD} "):
        with proxy.client(password) as client:
            for path in ALL_PATHS:
                answer = client.get(path)
                assert answer.status_code == 401, (password, path)
                assert "vmdedup" in answer.headers["www-authenticate"]
                assert "dashboard" not in answer.text


def test_with_the_password_all_is_as_on_the_port(
    proxy: Nginx, own_tcp_engine: ScriptedEngine
) -> None:
    direct = f"http://127.0.0.1:{own_tcp_engine.api.tcp_port}"
    with proxy.client(PASSWORD) as client:
        assert client.get("/").headers["location"] == "/dashboard/"
        for path in PATHS:
            answer, straight = client.get(path), client.get(direct + path)
            assert answer.status_code == 200, path
            assert answer.content == straight.content
            for name in ("content-security-policy", "content-type", "cache-control"):
                assert answer.headers[name] == straight.headers[name]
        assert client.post("/v1/controls", json={"values": {"run": 0}}).status_code == 403
    assert own_tcp_engine.commands == []


def test_an_event_that_is_waited_for_comes_through(
    proxy: Nginx, own_tcp_engine: ScriptedEngine
) -> None:
    event = Event(seq=1, unix_s=1, kind="attached", message="web")
    with proxy.client(PASSWORD) as client:
        timer = threading.Timer(1, own_tcp_engine.push, [event])
        timer.start()
        answer = client.get("/v1/events", params={"since": 0, "wait_s": 25})
        timer.join()
    assert [event["message"] for event in answer.json()["events"]] == ["web"]


def test_the_password_stays_with_nginx(tmp_path: Path, need: Need) -> None:
    """Another upstream in vmdedup's place, that tells what reaches it."""
    need(nginx_missing())
    told: list[dict[str, str]] = []

    class Upstream(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            told.append({name.lower(): value for name, value in self.headers.items()})
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Upstream) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with (
                Nginx(tmp_path, free_port(), server.server_port) as proxy,
                proxy.client(PASSWORD) as client,
            ):
                assert client.get("/").status_code == 200
        finally:
            server.shutdown()
            thread.join()
    (headers,) = told
    assert headers["host"] == "127.0.0.1"
    assert "authorization" not in headers


def login(proxy: Nginx, password: str) -> str:
    """The proxy's address with user and password in it."""
    return proxy.url.replace("//", f"//{USER}:{quote(password)}@")


def test_the_page_stays_live_behind_the_login(
    proxy: Nginx, own_tcp_engine: ScriptedEngine, tmp_path: Path, need: Need
) -> None:
    need(browser_missing())
    with Page(tmp_path / "profile") as page:
        page.resize(1200, 900)
        page.tell("Security.setIgnoreCertificateErrors", ignore=True)
        page.open(login(proxy, "wrong"))
        assert page.value("document.getElementById('vm-table')") is None
        # As a browser's own dialogue leaves it: known for this address from here on.
        page.open(login(proxy, PASSWORD))
        page.complaints.clear()
        page.open(proxy.url)
        page.wait(f"{SHOWN_NAMES}.sort().join() === 'db,web'")
        own_tcp_engine.names = ["web", "db", "cache"]
        own_tcp_engine.push()
        page.wait(f"{SHOWN_NAMES}.sort().join() === 'cache,db,web'")
        page.value("document.querySelector('#vm-table tbody a').click()")
        page.wait("!document.getElementById('detail').hidden")
        picture(page, "behind-nginx")
        assert page.complaints == []
