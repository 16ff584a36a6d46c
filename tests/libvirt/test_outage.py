"""libvirt's daemon ends, is away, hangs and comes back; the domains and merges stay."""

from __future__ import annotations

import pytest

from tests.harness.kernel import becomes_true
from tests.harness.libvirtd import Domain, Libvirtd
from tests.libvirt.conftest import Start
from tests.libvirt.domains import (
    assert_unharmed,
    following,
    is_attached,
    merge,
    policy,
    row,
    store_pages,
)
from tests.service.daemon import ALLOWANCE, Daemon, Directories

pytestmark = pytest.mark.libvirt

_NOTICED_S = 10 * ALLOWANCE
"""Two missed keepalives, and one command that waits for its answer."""


def _connected(daemon: Daemon) -> bool:
    health = daemon.client.health().engine.libvirt
    assert health is not None
    assert health.connected == (health.reason is None)
    return health.connected


def _is_said(daemon: Daemon, domain: Domain) -> bool:
    """Whether the report says of the domain that libvirt is away."""
    reasons = [vm.reason for vm in daemon.client.report().vms if vm.uuid == domain.uuid]
    return any(reason is not None and "merged pages stay merged" in reason for reason in reasons)


def _is_in(daemon: Daemon, domain: Domain, trust_domain: str) -> bool:
    """Whether the domain is listed in that trust domain."""
    found = row(daemon, domain)
    return found is not None and found.trust_domain == trust_domain


def test_libvirtd_restarts_is_away_and_hangs(
    directories: Directories, libvirtd: Libvirtd, start: Start
) -> None:
    with following(directories, libvirtd) as daemon:
        one, other = start("one"), start("other")
        merge(daemon, one, other)
        merged = store_pages(one)

        libvirtd.end()
        libvirtd.start()
        assert becomes_true(lambda: len(daemon.happened("libvirt")) >= 3, _NOTICED_S)
        assert becomes_true(lambda: is_attached(daemon, one), _NOTICED_S)
        assert store_pages(one) > merged // 2

        libvirtd.kill()
        assert becomes_true(lambda: not _connected(daemon), _NOTICED_S)
        assert becomes_true(lambda: _is_said(daemon, one), _NOTICED_S)
        assert store_pages(one) > merged // 2
        assert_unharmed(one, other)
        # One ends, and another's policy changes, while nobody can tell.
        other.close()
        libvirtd.start()
        policy(one, "<policy trust-domain='later'/>")
        assert becomes_true(lambda: _connected(daemon), _NOTICED_S)
        assert becomes_true(lambda: row(daemon, other) is None, _NOTICED_S)
        assert becomes_true(lambda: _is_in(daemon, one, "later"), _NOTICED_S)

        with libvirtd.hung():
            assert becomes_true(lambda: not _connected(daemon), _NOTICED_S)
            # The engine answers all the same.
            daemon.client.report(fresh=True)
            assert becomes_true(lambda: _is_said(daemon, one), _NOTICED_S)
            assert_unharmed(one)
        assert becomes_true(lambda: _connected(daemon), 3 * _NOTICED_S)
        more = start("more")
        policy(more, "<policy trust-domain='later'/>")
        assert becomes_true(lambda: _is_in(daemon, more, "later"), _NOTICED_S)
        merge(daemon, one, more)
        assert_unharmed(one, more)


def test_a_daemon_started_without_libvirt_waits_for_it(
    directories: Directories, libvirtd: Libvirtd, start: Start
) -> None:
    domain = start("early")
    libvirtd.kill()
    with following(directories, libvirtd) as daemon:
        assert not _connected(daemon)
        assert becomes_true(lambda: bool(daemon.happened("libvirt")), ALLOWANCE)
        libvirtd.start()
        assert becomes_true(lambda: is_attached(daemon, domain), _NOTICED_S)
