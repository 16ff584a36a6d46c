"""Another host's daemon: the client and the verbs through a real sshd, and what can go wrong."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness.kernel import becomes_true
from tests.harness.sshd import Sshd, sshd_missing
from tests.qemu.conftest import Need
from tests.service.daemon import verb, why_unreachable
from tests.service.engine import ScriptedEngine
from vmdedup.client import (
    AsyncClient,
    Client,
    ServiceConflictError,
    ServiceError,
    ServiceUnreachableError,
    ServiceUsageError,
)

pytestmark = pytest.mark.service

Open = Callable[..., Sshd]


@pytest.fixture
def open_sshd(tmp_path: Path, need: Need, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Starts an sshd in front of a runtime directory; the last one's keys are the user's."""
    need(sshd_missing())
    opened: list[Sshd] = []

    def start(runtime: Path, *, installed: bool = True) -> Sshd:
        folder = tmp_path / f"sshd{len(opened)}"
        sshd = Sshd(folder, {"VMDEDUP_RUNTIME_DIR": str(runtime)}, installed=installed)
        opened.append(sshd.__enter__())
        monkeypatch.setenv("PATH", f"{sshd.user_programs}:{os.environ['PATH']}")
        return sshd

    yield start
    for sshd in opened:
        sshd.__exit__()


@pytest.fixture
def sshd(engine: ScriptedEngine, open_sshd: Open) -> Sshd:
    return open_sshd(engine.api.path.parent)


def children() -> list[str]:
    """The processes that this one has started and that still run."""
    listed = subprocess.run(
        ["ps", "-ww", "-o", "args=", "--ppid", str(os.getpid())],
        capture_output=True,
        text=True,
        check=False,
    )
    return [line for line in listed.stdout.splitlines() if "ssh" in line and " bridge" in line]


def test_the_client_does_all_it_does_here(sshd: Sshd, engine: ScriptedEngine) -> None:
    with Client(sshd.url) as service:
        assert service.place == sshd.url
        assert service.health().engine.engine_pid == os.getpid()
        assert [vm.name for vm in service.vms().vms] == ["web", "db"]
        assert service.merge(["web"], timeout_s=3).vms
        assert service.report().schema_version == 1
        # A path is one of the other host: it is not looked up here.
        service.attach("vms/new.qmp")
        assert engine.commands[-1].model_dump() == {"qmp": "vms/new.qmp"}
        with pytest.raises(ServiceConflictError):
            service.attach("/run/vms/web.qmp")
        with pytest.raises(ServiceUsageError, match="nobody"):
            service.detach("nobody")
        assert len(children()) == 1  # one login serves all of these
    assert children() == []


def test_the_async_client_asks_several_things_at_once(sshd: Sshd) -> None:
    async def use() -> None:
        async with AsyncClient(sshd.url) as service:
            found = await asyncio.gather(*(service.vms() for _ in range(8)))
            assert [len(each.vms) for each in found] == [2] * 8
            assert len(children()) <= 4

    asyncio.run(use())
    assert children() == []


def test_verbs_take_the_host_from_option_and_environment(sshd: Sshd) -> None:
    assert "run=" in verb("--host", sshd.url, "get").stdout
    assert verb("get", "run", VMDEDUP_HOST=sshd.url).stdout == "1\n"
    assert "web" in verb("--host", sshd.url, "vms").stdout
    assert '"schema_version"' in verb("--host", sshd.url, "report", "--json").stdout
    known = ["--known", "/only/there"]
    assert "/only/there" in verb("--host", sshd.url, "explain", "--contents", *known).stdout
    done = verb("--host", sshd.url, "explain", "web", code=2)
    assert "looks at the host it runs on" in done.stderr
    assert "run=0" in verb("--host", sshd.url, "set", "run=0").stdout
    verb("--host", sshd.url, "unmerge", "web")
    # The option is stronger.
    verb("--host", sshd.url, "get", VMDEDUP_HOST="ssh://nowhere.invalid")


def test_the_library_takes_the_environments_host(
    sshd: Sshd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMDEDUP_HOST", sshd.url)
    with Client() as service:
        assert service.health().version


def test_what_is_missing_there_is_named(open_sshd: Open, tmp_path: Path) -> None:
    assert "no service at" in why_unreachable(open_sshd(tmp_path / "nowhere").url)
    assert "no vmdedup there" in why_unreachable(open_sshd(tmp_path, installed=False).url)


def test_a_host_that_is_not_known_or_refuses_us_is_named(sshd: Sshd) -> None:
    (sshd.base / "known_hosts").write_text("")
    assert "host key is not known" in why_unreachable(sshd.url)
    sshd.know_host("other_key")
    assert "host key has changed" in why_unreachable(sshd.url)
    sshd.know_host()
    authorized = sshd.base / "authorized_keys"
    keys = authorized.read_text()
    authorized.write_text("")
    assert "accepts no key of yours" in why_unreachable(sshd.url)
    authorized.write_text(keys)
    with Client(sshd.url) as service:  # and then it works
        assert service.health().version
    done = verb("--host", "ssh://root@127.0.0.1:1", "get", code=1)
    assert done.stderr.count("\n") == 1
    assert "Connection refused" in done.stderr


def test_a_broken_connection_is_told_and_the_next_call_works(sshd: Sshd) -> None:
    def cut() -> None:
        assert becomes_true(lambda: len(children()) == 1, 20)
        listed = subprocess.run(
            ["pgrep", "-P", str(os.getpid()), "-f", " bridge"], capture_output=True, check=True
        )
        for pid in listed.stdout.split():
            os.kill(int(pid), 9)

    with Client(sshd.url) as service:
        cutting = threading.Thread(target=cut)
        cutting.start()
        with pytest.raises(ServiceUnreachableError, match="ended"):
            service.events(since=(1 << 53) - 1, wait_s=60)
        cutting.join()
        assert service.health().version


@pytest.mark.parametrize(
    ("says", "told"),
    [
        ("printf 'HTTP/1.1 200 OK\\r\\n\\r\\n'; exec yes", "over [0-9]+ bytes"),
        ("exec yes", "connection ended"),
        ("exec cat", "connection ended"),
        ("echo nonsense", "connection ended"),
        ("printf 'HTTP/1.1 200 OK\\r\\n\\r\\n[7]'", "not an answer of this version"),
        ("printf '\\033[31mred\\n' >&2; exit 3", r" \[31mred"),
        ("exec sleep 60", "not answer in time"),
        (
            "printf 'HTTP/1.1 200 OK\\r\\n\\r\\n'; while echo; do sleep 0.1; done",
            "not answer in time",
        ),
    ],
)
def test_a_host_that_answers_nonsense(
    open_sshd: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, told: str
) -> None:
    sshd = open_sshd(tmp_path, installed=False)
    sshd.install("vmdedup", says)
    if "in time" in told:
        monkeypatch.setattr("vmdedup.client._READ_LIMIT_S", 2.0)
    with Client(sshd.url) as service, pytest.raises(ServiceError, match=told) as failure:
        service.events()
    assert str(failure.value).isprintable()
    assert children() == []
