"""Fixtures around real VMs: `boot` starts them, `need` skips honestly."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import pytest

from tests.harness.images import Guest
from tests.harness.vm import Vm


class Boot(Protocol):
    """Starts a VM, with Vm's arguments; waits for it unless `ready=False`."""

    def __call__(self, guest: Guest = "tiny", *, ready: bool = True, **options: Any) -> Vm: ...


@pytest.fixture
def boot() -> Iterator[Boot]:
    """VMs that end with the test. Boot many with `ready=False`, then wait for each."""
    running: list[Vm] = []

    def start(guest: Guest = "tiny", *, ready: bool = True, **options: Any) -> Vm:
        options.setdefault("name", f"{guest}{len(running)}")
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
def need() -> Callable[[str | None], None]:
    """`need(kvm_missing())` skips with the reason; VMDEDUP_REQUIRE=1 makes it a failure."""

    def check(missing: str | None) -> None:
        if missing is None:
            return
        if os.environ.get("VMDEDUP_REQUIRE") == "1":
            pytest.fail(missing)
        pytest.skip(missing)

    return check
