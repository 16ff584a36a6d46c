"""Fixtures around real VMs: `boot` starts them, `need` skips honestly, `qemu` is which QEMU."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.harness.capabilities import root_missing
from tests.harness.images import Guest
from tests.harness.qemus import (
    Qemu,
    backports_missing,
    backports_path,
    chosen_qemus,
    hidden_from_others,
)
from tests.harness.skips import require
from tests.harness.vm import Vm
from vmdedup.settings import Settings

pytest.register_assert_rewrite("tests.qemu.fleet")


class Boot(Protocol):
    """Starts a VM, with Vm's arguments; waits for it unless `ready=False`."""

    def __call__(self, guest: Guest = "tiny", *, ready: bool = True, **options: Any) -> Vm: ...


Need = Callable[[str | None], None]


class MakeSettings(Protocol):
    """Settings of this test's own directories, with these settings changed."""

    def __call__(self, **changed: Any) -> Settings: ...


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests run on the QEMUs that are chosen for them."""
    core = metafunc.definition.get_closest_marker("both_qemus") is not None
    qemus = chosen_qemus(core)
    if qemus != ("installed",):
        metafunc.parametrize("qemu", qemus, indirect=True)


@pytest.fixture(autouse=True)
def qemu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, need: Need) -> Qemu:
    """Which QEMU whatever the test starts is; it comes first in PATH."""
    chosen: Qemu = getattr(request, "param", "installed")
    if chosen == "backports":
        need(backports_missing())
        monkeypatch.setenv("PATH", backports_path())
    return chosen


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[MakeSettings]:
    """Settings whose store and runtime directory go with the test.

    Name it before `boot` where VMs end still merged: they then end first.
    """
    store_dir = Path(f"/dev/shm/vmdedup-test-{secrets.token_hex(6)}")
    own: dict[str, Any] = {
        "runtime_dir": tmp_path / "run",
        "store_dir": store_dir,
        # The engine is this process, which a busy host may keep waiting.
        "hang_limit_ms": 10_000,
    }
    try:
        yield lambda **changed: Settings(**(own | changed))
    finally:
        shutil.rmtree(store_dir, ignore_errors=True)


@pytest.fixture
def boot(need: Need) -> Iterator[Boot]:
    """VMs that end with the test. Boot many with `ready=False`, then wait for each."""
    running: list[Vm] = []

    def start(guest: Guest = "tiny", *, ready: bool = True, **options: Any) -> Vm:
        options.setdefault("name", f"{guest}{len(running)}")
        if options.get("uid") is not None:
            need(hidden_from_others())
        vm = Vm(guest, **options)
        running.append(vm)
        if ready:
            vm.wait_ready()
        return vm

    try:
        yield start
    finally:
        for vm in running:
            print(f"--- {vm.name}\n{vm.transcript()}")  # shown by pytest when the test failed
            vm.close()


@pytest.fixture
def need() -> Need:
    """`need(kvm_missing())` skips with the reason; VMDEDUP_REQUIRE=1 makes it a failure."""

    return require


@pytest.fixture
def needs_root(need: Need) -> None:
    """Skips for any other user; for a whole module: `pytest.mark.usefixtures`."""
    need(root_missing())
