"""The routes over the real socket: state, changes, statuses, limits."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.service.conftest import over
from tests.service.engine import CONTROLS, ScriptedEngine, sharing, vm_report
from vmdedup.api.body import MAX_BODY_BYTES
from vmdedup.client import Client, ServiceError
from vmdedup.ipc.protocol import (
    MAX_EVENTS,
    MAX_REQUESTS,
    Attach,
    Command,
    Detach,
    Event,
    FreshReport,
    MergeNow,
    Refusal,
    Register,
    SetControls,
    UnmergeVms,
    Unregister,
)
from vmdedup.models import Model, SharingReport

pytestmark = pytest.mark.process

CHANGES = {
    "/v1/controls": {"values": {"run": 0}},
    "/v1/register": {"vm": "web", "backend": "ram0"},
    "/v1/unregister": {"vm": "web", "backend": "ram0"},
    "/v1/attach": {"qmp": "/run/vms/new.qmp"},
    "/v1/detach": {"vm": "web"},
    "/v1/unmerge": {"vms": ["web"]},
    "/v1/merge-now": {"vms": ["web"], "timeout_s": 5},
}


def problem(response: httpx.Response) -> tuple[int, str]:
    """The status and the kind of an error, which is one line."""
    answer = response.json()
    assert set(answer) == {"error", "kind"}
    assert answer["error"]
    assert "\n" not in answer["error"]
    return response.status_code, answer["kind"]


def test_reads_come_from_the_snapshot(engine: ScriptedEngine, client: Client) -> None:
    snapshot = engine.snapshot()
    assert client.report() == snapshot.report
    assert client.vms() == snapshot.vms
    assert client.controls() == snapshot.controls
    health = client.health()
    assert health.engine.engine_pid == snapshot.health.engine_pid
    assert health.server_pid == engine.api.pid
    assert engine.commands == []


def test_a_new_snapshot_replaces_the_old(engine: ScriptedEngine, client: Client) -> None:
    assert [vm.name for vm in client.report().vms] == ["web", "db"]
    engine.names.append("cache")
    seq = time.monotonic_ns() // 1_000_000
    engine.push(Event(seq=seq, unix_s=0, kind="attached", vm="cache", message="attached"))
    assert client.events(since=seq - 1, wait_s=10).events[0].vm == "cache"
    assert [vm.name for vm in client.report().vms] == ["web", "db", "cache"]


def test_reads_before_the_first_snapshot_wait_then_say_busy(tmp_path: Any) -> None:
    with ScriptedEngine(tmp_path) as engine, over(engine.api.path) as http:
        response = http.get("/v1/report")
        assert problem(response) == (503, "busy")
        assert response.headers["Retry-After"]
        engine.push()
        assert http.get("/v1/report").status_code == 200


def test_each_command_reaches_the_engine(engine: ScriptedEngine, client: Client) -> None:
    assert client.set(run=2, sleep_millisecs=50).values["run"] == 2
    assert client.register("web", "ram0", offset_bytes=4096).complete
    client.unregister("web", "ram0", length_bytes=8192)
    assert client.attach("/run/vms/new.qmp").name == "new"
    assert client.detach("web").merged_pages == 3000
    assert client.unmerge().store_removed
    assert client.merge(["db"], timeout_s=7).vms[0].name == "db"
    assert client.report(fresh=True).host.full_scans == 3
    assert engine.commands == [
        SetControls(values={"run": 2, "sleep_millisecs": 50}),
        Register(vm="web", backend="ram0", offset_bytes=4096),
        Unregister(vm="web", backend="ram0", length_bytes=8192),
        Attach(qmp="/run/vms/new.qmp"),
        Detach(vm="web"),
        UnmergeVms(),
        MergeNow(vms=["db"], timeout_s=7),
        FreshReport(),
    ]


def test_a_client_reads_its_own_write(client: Client) -> None:
    for sleep_ms in range(1, 50):
        client.set(sleep_millisecs=sleep_ms)
        assert client.controls().values["sleep_millisecs"] == sleep_ms


def test_put_sets_controls_as_post_does(http: httpx.Client) -> None:
    response = http.put("/v1/controls", json={"values": {"run": 0}})
    assert response.json()["values"]["run"] == 0


def test_controls_are_set_all_or_none(engine: ScriptedEngine, http: httpx.Client) -> None:
    body = {"values": {"run": 0, "rum": 1}}
    assert problem(http.post("/v1/controls", json=body)) == (422, "usage")
    assert http.get("/v1/controls").json()["values"] == CONTROLS
    assert engine.controls == CONTROLS


@pytest.mark.parametrize("path", CHANGES)
def test_an_unknown_vm_is_not_found(engine: ScriptedEngine, http: httpx.Client, path: str) -> None:
    engine.names.remove("web")
    expected = 200 if path in ("/v1/controls", "/v1/attach") else 404
    response = http.post(path, json=CHANGES[path])
    assert response.status_code == expected
    if expected == 404:
        assert problem(response) == (404, "not-found")
        assert "web" in response.json()["error"]


def test_a_vm_that_is_attached_already_is_a_conflict(http: httpx.Client) -> None:
    response = http.post("/v1/attach", json={"qmp": "/run/vms/web.qmp"})
    assert problem(response) == (409, "conflict")


@pytest.mark.parametrize(
    ("kind", "status"), [("usage", 422), ("conflict", 409), ("busy", 503), ("failed", 500)]
)
def test_each_refusal_has_its_status(
    engine: ScriptedEngine, http: httpx.Client, kind: Any, status: int
) -> None:
    engine.answer = lambda _: Refusal(kind=kind, message="not\nso")
    response = http.post("/v1/detach", json={"vm": "web"})
    assert problem(response) == (status, kind)
    assert response.json()["error"] == "not so"


@pytest.mark.parametrize("path", CHANGES)
@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"vm": "\\ud800", "backend": "ram0"}',
        b'{"values": {"\\ud800": 1}}',
        b'{"vms": ["\\ud800"], "qmp": "\\ud800"}',
        b'{"timeout_s": NaN, "vm": 1, "qmp": 2, "values": []}',
        b'{"surprise": 1}',
        b"[" * 20_000,
        b'{"timeout_s": ' + b"9" * 10_000 + b"}",
    ],
)
def test_bad_input_is_refused_before_the_engine_sees_it(
    engine: ScriptedEngine, http: httpx.Client, path: str, content: bytes
) -> None:
    headers = {"Content-Type": "application/json"}
    response = http.post(path, content=content, headers=headers)
    assert problem(response) == (422, "usage")
    assert engine.commands == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/merge-now", {"timeout_s": 0}),
        ("/v1/merge-now", {"timeout_s": 1e9}),
        ("/v1/merge-now", {"vms": []}),
        ("/v1/unmerge", {"vms": ["x" * 300]}),
        ("/v1/register", {"vm": "web", "backend": "ram0", "offset_bytes": -1}),
        ("/v1/register", {"vm": "web", "backend": "ram0", "length_bytes": 1 << 53}),
        ("/v1/controls", {"values": {}}),
        ("/v1/controls", {"values": {"run": 1.5}}),
        ("/v1/controls", {"values": {"run": None}}),
        ("/v1/controls", {"values": {"run": True}}),
        ("/v1/merge-now", {"timeout_s": "5"}),
        ("/v1/merge-now", {"timeout_s": True}),
        ("/v1/register", {"vm": "web", "backend": "ram0", "offset_bytes": "0"}),
        ("/v1/controls", {"values": {"run": 1 << 70}}),
        ("/v1/attach", {"qmp": ""}),
    ],
)
def test_values_out_of_range_are_refused(
    engine: ScriptedEngine, http: httpx.Client, path: str, body: object
) -> None:
    assert problem(http.post(path, json=body)) == (422, "usage")
    assert engine.commands == []


def test_a_body_of_another_type_is_refused(engine: ScriptedEngine, http: httpx.Client) -> None:
    content = json.dumps({"vm": "web"}).encode()
    response = http.post("/v1/detach", content=content, headers={"Content-Type": "text/plain"})
    assert problem(response) == (422, "usage")
    assert engine.commands == []


@pytest.mark.parametrize("path", ["/v1/controls", "/v1/report", "/nowhere"])
@pytest.mark.parametrize("size_bytes", [MAX_BODY_BYTES + 1, 8 << 20])
@pytest.mark.parametrize("announced", [True, False])
def test_a_huge_body_is_refused(
    engine: ScriptedEngine, http: httpx.Client, path: str, size_bytes: int, announced: bool
) -> None:
    pieces = (b" " * 65536 for _ in range(-(-size_bytes // 65536)))
    content = b" " * size_bytes if announced else pieces
    assert problem(http.post(path, content=content)) == (413, "usage")
    assert http.get("/v1/health").status_code == 200
    assert engine.commands == []


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "TRACE"])
@pytest.mark.parametrize("path", [path for path in CHANGES if path != "/v1/controls"])
def test_a_wrong_method_is_refused(
    engine: ScriptedEngine, http: httpx.Client, method: str, path: str
) -> None:
    response = http.request(method, path)
    assert response.status_code == 405
    assert response.headers["Allow"] == "POST"
    assert engine.commands == []


def test_an_unknown_path_is_not_found(http: httpx.Client) -> None:
    assert problem(http.get("/v1/nothing")) == (404, "not-found")


def test_no_body_is_all_vms_for_a_merge_only(engine: ScriptedEngine, http: httpx.Client) -> None:
    assert http.post("/v1/merge-now").status_code == 200
    assert engine.commands == [MergeNow()]
    for path in CHANGES.keys() - {"/v1/merge-now"}:
        assert problem(http.post(path)) == (422, "usage")
        assert problem(http.post(path, json=None, content=b"null")) == (422, "usage")


def test_merge_now_waits_while_others_are_served(engine: ScriptedEngine, client: Client) -> None:
    begun = threading.Event()

    def answer(command: Command) -> Model | None:
        if isinstance(command, MergeNow):
            begun.set()
            return None
        return Refusal(kind="conflict", message="merging")

    engine.answer = answer
    with ThreadPoolExecutor(1) as pool, Client(engine.api.path) as other:
        merging = pool.submit(other.merge, ["web"])
        assert begun.wait(10)
        with pytest.raises(ServiceError, match="merging"):
            client.detach("web")
        assert client.report().converged
        assert not merging.done()
        report = sharing([vm_report("web")])
        engine.api.channel.reply(engine.waiting[0].id, report)
        assert merging.result(10) == report


def test_two_writers_at_once_both_get_their_own_answer(engine: ScriptedEngine) -> None:
    def write(control: str) -> list[object]:
        with Client(engine.api.path) as writer:
            return [writer.set(**{control: value}).values[control] for value in range(200)]

    with ThreadPoolExecutor(2) as pool:
        written = list(pool.map(write, ["pages_to_scan", "sleep_millisecs"]))
    assert written == [list(range(200))] * 2
    assert len(engine.commands) == 400
    assert engine.controls["pages_to_scan"] == engine.controls["sleep_millisecs"] == 199


def test_more_requests_than_can_wait_are_busy(engine: ScriptedEngine, client: Client) -> None:
    engine.answer = lambda _: None
    with ThreadPoolExecutor(MAX_REQUESTS) as pool:
        waiting = [pool.submit(_merge, engine) for _ in range(MAX_REQUESTS)]
        deadline = time.monotonic() + 30
        while len(engine.waiting) < MAX_REQUESTS:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(ServiceError) as refused:
            client.detach("web")
        assert (refused.value.status, refused.value.kind) == (503, "busy")
        for request in engine.waiting:
            engine.api.channel.reply(request.id, sharing([]))
        assert [each.result(30).vms for each in waiting] == [[]] * MAX_REQUESTS
    engine.answer = engine.obey
    assert client.detach("web").vm == "web"


def _merge(engine: ScriptedEngine) -> SharingReport:
    with Client(engine.api.path) as client:
        return client.merge()


def test_events_are_kept_in_order_and_waited_for(own_engine: ScriptedEngine) -> None:
    with Client(own_engine.api.path) as client:
        _check_events(own_engine, client)


def _check_events(engine: ScriptedEngine, client: Client) -> None:
    for seq in range(1, MAX_EVENTS + 200, 2):
        engine.push(*(Event(seq=seq + more, unix_s=0, kind="x", message="x") for more in (0, 1)))
    last = MAX_EVENTS + 200
    client.events(since=last - 1, wait_s=10)
    kept = client.events()
    assert [event.seq for event in kept.events] == list(range(201, last + 1))
    assert client.events(since=500, limit=2).next_since == 502
    assert client.events(since=last).next_since == last

    with ThreadPoolExecutor(1) as pool, Client(engine.api.path) as other:
        waiting = pool.submit(other.events, last, wait_s=20)
        engine.push(Event(seq=last + 5, unix_s=0, kind="gone", vm="web", message="ended"))
        assert [event.seq for event in waiting.result(20).events] == [last + 5]


def test_the_tcp_port_only_reads(engine: ScriptedEngine) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{engine.api.tcp_port}") as http:
        for path in ("/v1/vms", "/v1/report", "/v1/controls", "/v1/events", "/v1/health"):
            assert http.get(path).status_code == 200
        assert http.get("/metrics").status_code == 200
        for path, body in CHANGES.items():
            for method in ("POST", "PUT"):
                assert http.request(method, path, json=body).status_code in (404, 405)
        assert http.get("/v1/report", params={"fresh": "true"}).status_code == 200
        schema = http.get("/openapi.json").json()
        assert {method for path in schema["paths"].values() for method in path} == {"get"}
        stranger = http.get("/v1/report", headers={"Host": "rebound.example"})
        assert stranger.status_code == 400
    assert engine.commands == []
