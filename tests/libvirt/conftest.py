"""One libvirtd for all tests, domains that end with their test, the daemon at work on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import pytest

from tests.harness.capabilities import root_missing
from tests.harness.libvirtd import Domain, Libvirtd, missing
from tests.harness.skips import require
from tests.qemu.conftest import settings
from tests.service.daemon import Directories

__all__ = ["settings"]

pytest.register_assert_rewrite("tests.libvirt.domains")


class Start(Protocol):
    """Starts a domain, with Domain's arguments; waits for it unless `ready=False`."""

    def __call__(self, name: str, *, ready: bool = True, **options: Any) -> Domain: ...


@pytest.fixture(scope="session")
def own_libvirtd() -> Iterator[Libvirtd]:
    require(root_missing() or missing())
    with Libvirtd() as running:
        yield running


@pytest.fixture
def libvirtd(own_libvirtd: Libvirtd) -> Iterator[Libvirtd]:
    """Running, whatever the test before did to it."""
    yield own_libvirtd
    own_libvirtd.revive()


@pytest.fixture
def start(libvirtd: Libvirtd) -> Iterator[Start]:
    started: list[Domain] = []

    def begin(name: str, *, ready: bool = True, **options: Any) -> Domain:
        parameters = {"mib": 4, "seed": len(started) + 1, **options.pop("parameters", {})}
        domain = libvirtd.domain(name, parameters=parameters, **options)
        started.append(domain)
        if ready:
            domain.wait_ready()
        return domain

    try:
        yield begin
    finally:
        for domain in started:
            print(f"--- {domain.name}\n{domain.transcript()}")
            domain.close()


@pytest.fixture
def directories() -> Iterator[Directories]:
    """Name it before `start`: the domains then end before their store goes."""
    with Directories() as own:
        yield own


@pytest.fixture
def need() -> Callable[[str | None], None]:
    """`need(kvm_missing())` skips with the reason; VMDEDUP_REQUIRE=1 makes it a failure."""

    return require
