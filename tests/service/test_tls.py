"""HTTPS for other hosts: real certificates on both sides, who gets in, and what he may ask."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.harness.capabilities import fleet_extra_missing
from tests.harness.certificates import Authority, openssl_missing
from tests.harness.kernel import becomes_true
from tests.harness.skips import require
from tests.qemu.conftest import Need
from tests.service.daemon import Directories, free_port, running, verb, why_unreachable
from tests.service.engine import ScriptedEngine
from tests.service.test_api import CHANGES
from tests.service.test_fleet import fleet, listed
from vmdedup.api.bounded_listener import MOST_OPEN
from vmdedup.client import AsyncClient, Client, ServiceError
from vmdedup.daemon.api_process import ApiServer, TlsListener
from vmdedup.errors import UsageError
from vmdedup.ipc.protocol import ReadSketch
from vmdedup.tls import TlsFiles

pytestmark = pytest.mark.service

ALLOWED = {"/metrics", "/v1/health", "/v1/report", "/v1/vms"}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    require(openssl_missing())
    return Authority(tmp_path_factory.mktemp("ca") / "own", "the fleet's")


@pytest.fixture(scope="module")
def server_files(authority: Authority) -> TlsFiles:
    return authority.issue("server", usage="serverAuth")


@pytest.fixture(scope="module")
def client_files(authority: Authority) -> TlsFiles:
    return authority.issue("client", usage="clientAuth")


@pytest.fixture(scope="module")
def shared(
    tmp_path_factory: pytest.TempPathFactory, server_files: TlsFiles
) -> Iterator[ScriptedEngine]:
    listener = TlsListener("127.0.0.1", 0, server_files)
    with ScriptedEngine(tmp_path_factory.mktemp("api"), tls=listener) as running:
        yield running


@pytest.fixture
def tls_engine(shared: ScriptedEngine) -> ScriptedEngine:
    shared.reset()
    shared.push()
    return shared


def use(files: TlsFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make these the user's certificates."""
    monkeypatch.setenv("VMDEDUP_CERT_PATH", str(files.certificate.parent))


@pytest.fixture
def url(tls_engine: ScriptedEngine, client_files: TlsFiles, monkeypatch: pytest.MonkeyPatch) -> str:
    """The listener, with a good client's certificate in the environment."""
    use(client_files, monkeypatch)
    return f"https://127.0.0.1:{tls_engine.api.tls_port}"


def test_a_client_with_a_certificate_reads(url: str, tls_engine: ScriptedEngine) -> None:
    with Client(url) as service:
        assert service.health().engine.engine_pid == os.getpid()
        assert [vm.name for vm in service.report().vms] == ["web", "db"]
        assert [vm.name for vm in service.vms().vms] == ["web", "db"]
        assert service.sketch("web", rate=256).vm == "web"
    # Only the sketch is the engine's work; a fresh report would be.
    assert tls_engine.commands == [ReadSketch(vm="web", rate=256)]

    async def ask() -> str:
        async with AsyncClient(url) as service:
            return (await service.health()).version

    assert asyncio.run(ask())


def test_verbs_read_through_it(url: str, client_files: TlsFiles) -> None:
    place = str(client_files.certificate.parent)
    assert "web" in verb("--host", url, "vms", VMDEDUP_CERT_PATH=place).stdout
    assert "web" in verb("report", VMDEDUP_HOST=url, VMDEDUP_CERT_PATH=place).stdout
    refused = verb("--host", url, "set", "run=0", code=1, VMDEDUP_CERT_PATH=place).stderr
    assert "this listener only gives /metrics, /v1/health" in refused
    assert refused.count("\n") == 1


def over(files: TlsFiles, url: str) -> httpx.Client:
    return httpx.Client(base_url=url, verify=files.client_context(), trust_env=False)


def test_metrics_are_scraped(url: str, client_files: TlsFiles) -> None:
    with over(client_files, url) as http:
        scraped = http.get("/metrics")
        assert scraped.status_code == 200
        assert 'vmdedup_saved_bytes{vm="web"}' in scraped.text


def test_whatever_steers_is_forbidden(
    url: str, client_files: TlsFiles, tls_engine: ScriptedEngine
) -> None:
    with over(client_files, url) as http:
        for path, body in CHANGES.items():
            for method in ("POST", "PUT", "DELETE"):
                refused = http.request(method, path, json=body)
                assert refused.status_code == 403
                answer = refused.json()
                assert answer["kind"] == "forbidden"
                assert "\n" not in answer["error"]
                assert f"{method} {path}" in answer["error"]
        for path in ALLOWED:
            assert http.get(path).status_code == 200
            assert http.head(path).status_code == 200
            assert http.post(path, json={}).status_code == 403
        for path in ("/v1/controls", "/v1/events", "/v1/history", "/", "/dashboard/", "/nothing"):
            assert http.get(path).status_code == 403
        assert http.get("/v1/report", params={"fresh": "true"}).status_code == 200
        schema = http.get("/openapi.json").json()
        assert set(schema["paths"]) == ALLOWED | {"/v1/sketch"}
    assert tls_engine.commands == []


def test_without_a_certificate_nobody_gets_in(
    url: str, client_files: TlsFiles, tls_engine: ScriptedEngine
) -> None:
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context = ssl.create_default_context(cafile=client_files.ca)
        context.maximum_version = version
        with (
            pytest.raises(httpx.TransportError),
            httpx.Client(base_url=url, verify=context, trust_env=False) as http,
        ):
            http.get("/v1/health")
    with pytest.raises(httpx.TransportError), httpx.Client(trust_env=False) as http:
        http.get(url.replace("https", "http") + "/v1/health")
    assert tls_engine.commands == []


def test_tls_1_1_is_refused(url: str, client_files: TlsFiles) -> None:
    context = client_files.client_context()
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="deprecated"):
        context.minimum_version = ssl.TLSVersion.TLSv1
    with pytest.warns(DeprecationWarning, match="deprecated"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    host, port = url.removeprefix("https://").split(":")
    with (
        socket.create_connection((host, int(port))) as plain,
        pytest.raises(OSError, match=r"version|protocol"),
    ):
        context.wrap_socket(plain, server_hostname=host)


@pytest.mark.parametrize("usage", ["clientAuth", "serverAuth"])
def test_a_certificate_of_another_ca_or_purpose_is_refused(
    url: str, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, usage: str
) -> None:
    """Another CA's client, and the own CA's server as a client."""
    if usage == "clientAuth":
        files = Authority(tmp_path / "other", "somebody").issue("client", usage=usage)
        files.ca.write_bytes(authority.certificate.read_bytes())
    else:
        files = authority.issue("server-as-client", usage=usage)
    use(files, monkeypatch)
    told = why_unreachable(url)
    assert re.search(r"look at cert\.pem: .*alert|perhaps its client_ca|reset", told)


def test_a_server_of_another_ca_or_name_is_not_believed(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client_files: TlsFiles
) -> None:
    other = Authority(tmp_path / "other", "somebody").issue("client")
    use(other, monkeypatch)
    assert "its certificate is not believed" in why_unreachable(url)
    use(client_files, monkeypatch)
    line = why_unreachable(url.replace("127.0.0.1", "127.0.0.2"))
    assert "refused" in line  # nothing listens there
    assert "is not believed: IP address mismatch" in why_unreachable(
        url.replace("127.0.0.1", "[::ffff:127.0.0.1]")
    )


def test_clients_that_hang_hold_up_nobody(
    url: str, tls_engine: ScriptedEngine, client_files: TlsFiles
) -> None:
    """Strangers that say nothing or half a handshake, and clients that send half a request."""
    host, port = url.removeprefix("https://").split(":")
    with ExitStack() as exits:
        for number in range(2 * MOST_OPEN):
            silent = exits.enter_context(socket.create_connection((host, int(port))))
            silent.sendall(b"\x16\x03\x01\x02\x00" if number % 2 else b"")
        context = client_files.client_context()
        for _ in range(MOST_OPEN):
            plain = socket.create_connection((host, int(port)))
            slow = exits.enter_context(context.wrap_socket(plain, server_hostname=host))
            slow.sendall(b"GET /v1/health HT")
        with Client(url) as service:
            assert service.health().version
        with Client(tls_engine.api.path) as local:
            assert local.set(run=0).values["run"] == 0
        pid = tls_engine.api.pid
        assert becomes_true(lambda: established(pid) <= MOST_OPEN + 8, 10)


def established(pid: int) -> int:
    """Sockets that a process has open."""
    return sum(
        os.readlink(link).startswith("socket:")
        for link in Path(f"/proc/{pid}/fd").iterdir()
        if link.is_symlink()
    )


def test_one_sketch_at_a_time(url: str, tls_engine: ScriptedEngine) -> None:
    """However many ask for one, the engine has a single request of theirs."""
    tls_engine.answer = lambda _: None

    async def ask() -> None:
        async with AsyncClient(url) as service:
            tasks = [asyncio.create_task(service.sketch("web")) for _ in range(20)]
            while not tls_engine.waiting:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)
            assert len(tls_engine.waiting) == 1
            # It still answers what needs no engine.
            assert (await service.health()).version
            tls_engine.answer = tls_engine.obey
            (first,) = tls_engine.waiting
            result = tls_engine.obey(first.command)
            tls_engine.api.channel.reply(first.id, result)
            assert len(await asyncio.gather(*tasks)) == 20

    asyncio.run(ask())


def test_the_fleet_is_asked_through_it(
    url: str, client_files: TlsFiles, tmp_path: Path, need: Need
) -> None:
    hosts = listed(tmp_path, ("a", url), ("away", "https://127.0.0.1:1"))
    where = str(client_files.certificate.parent)
    found, said = fleet("report", *hosts, certificates=where)
    assert [(row["host"], row["vms"]) for row in found["hosts"]] == [("a", 2), ("away", 0)]
    assert "Connection refused" in said
    found, said = fleet("report", *hosts, code=2)
    assert "VMDEDUP_CERT_PATH" in said
    need(fleet_extra_missing())
    found, _ = fleet("similar", *hosts, certificates=where)
    assert [len(kind["vms"]) for kind in found["kinds"]] == [2]


def refusal(folder: Path, files: TlsFiles) -> str:
    with pytest.raises(UsageError) as refused:
        ApiServer(folder, tls=TlsListener("127.0.0.1", 0, files))
    assert list(folder.iterdir()) == []
    said = str(refused.value)
    assert said.startswith("setting api_tls: ")
    assert "\n" not in said
    return said.removeprefix("setting api_tls: ")


def test_files_that_cannot_be_used_are_refused(tmp_path: Path, authority: Authority) -> None:
    run = tmp_path / "run"
    run.mkdir()
    good, other = authority.issue("good"), authority.issue("other")
    for mode in (0o644, 0o640, 0o602):
        good.key.chmod(mode)
        assert f"{good.key}: others may read" in refusal(run, good)
    good.key.chmod(0o600)
    if os.geteuid() == 0:
        os.chown(good.key, 65534, -1)
        assert "or own this key" in refusal(run, good)
        os.chown(good.key, 0, -1)
    assert "key values mismatch" in refusal(run, TlsFiles(good.certificate, other.key, good.ca))
    missing = tmp_path / "none.pem"
    assert refusal(run, TlsFiles(good.certificate, missing, good.ca)).startswith(f"{missing}: No")
    assert "not a file" in refusal(run, TlsFiles(good.certificate, good.key, tmp_path))
    (tmp_path / "text").write_text("no certificate\n")
    assert refusal(run, TlsFiles(good.certificate, good.key, tmp_path / "text")).startswith(
        f"{tmp_path / 'text'}: "
    )
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UsageError, match="in use"):
        ApiServer(run, tls=TlsListener("127.0.0.1", taken.getsockname()[1], good))


def test_files_that_went_bad_cost_only_https(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is started again after its death, when the key is not what it was."""
    files = authority.issue("went-bad")
    use(authority.issue("its-client"), monkeypatch)
    with ScriptedEngine(tmp_path, tls=TlsListener("127.0.0.1", 0, files)) as engine:
        engine.push()
        with Client(f"https://127.0.0.1:{engine.api.tls_port}") as service:
            service.health()
        engine.pause()
        files.key.chmod(0o644)
        engine.api.restart()
        engine.push()
        with Client(engine.api.path) as local:
            assert local.health().version


def test_a_client_says_what_it_lacks(
    url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, authority: Authority
) -> None:
    files = authority.issue("careless")
    files.key.chmod(0o644)
    use(files, monkeypatch)
    with pytest.raises(UsageError, match="others may read"):
        Client(url)
    monkeypatch.setenv("VMDEDUP_CERT_PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"cert\.pem: No such file"):
        Client(url)
    monkeypatch.delenv("VMDEDUP_CERT_PATH")
    with pytest.raises(UsageError, match="set VMDEDUP_CERT_PATH"):
        Client(url)
    for wrong in ("https://", "https://a b", "https://u@h", "https://h/x", "https://h:0"):
        with pytest.raises(UsageError, match=r"write https://host\[:port\]"):
            Client(wrong)


def test_a_server_that_never_answers_is_given_up(
    client_files: TlsFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(client_files, monkeypatch)
    began = time.monotonic()
    with (
        socket.create_server(("127.0.0.1", 0)) as mute,
        Client(f"https://127.0.0.1:{mute.getsockname()[1]}") as service,
        pytest.raises(ServiceError, match="did not answer in time"),
    ):
        service.health()
    assert time.monotonic() - began < 60


@pytest.mark.usefixtures("needs_root")
def test_the_daemon_listens_as_its_settings_say(
    directories: Directories,
    server_files: TlsFiles,
    client_files: TlsFiles,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(client_files, monkeypatch)
    port = free_port()
    told = f'[api_tls]\naddress = "127.0.0.1"\nport = {port}\nkey = "{server_files.key}"\n'
    told += f'certificate = "{server_files.certificate}"\nclient_ca = "{server_files.ca}"\n'
    directories.write(told)
    nothing = ["--qmp", str(directories.base / "*.qmp")]
    with running(directories, *nothing) as daemon, Client(f"https://127.0.0.1:{port}") as service:
        assert service.health().engine.engine_pid == daemon.process.pid
    directories.write(told.replace("cert.pem", "none.pem"))
    said = directories.verb("run", "--config", str(directories.config), code=2).stderr
    assert "none.pem: No such file" in said
