"""Domains come, change and go, and the daemon follows by itself."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from tests.harness.kernel import becomes_true
from tests.harness.libvirtd import Domain, Libvirtd
from tests.libvirt.conftest import Start
from tests.libvirt.domains import (
    assert_nothing_of_ours,
    assert_unharmed,
    following,
    is_attached,
    merge,
    policy,
    row,
    store_pages,
    wait_attached,
)
from tests.service.daemon import ALLOWANCE, Daemon, Directories

pytestmark = pytest.mark.libvirt

_ATTACHED_WITHIN_S = 3.0
_TOGETHER = 8
_SOON_S = 8 * ALLOWANCE
"""On a busy machine a pass takes seconds, and events wait for its end."""


def test_a_domain_in_libvirts_default_sandbox_is_merged_live(
    directories: Directories, libvirtd: Libvirtd, start: Start
) -> None:
    one = start("one", metadata="")
    status = Path(f"/proc/{one.pid}/status").read_text()
    assert "Uid:\t64055\t" in status
    assert "Seccomp:\t2" in status
    assert "CapEff:\t0000000000000000" in status
    own = Path(f"/proc/{one.pid}/ns/mnt").readlink()
    assert own != Path("/proc/self/ns/mnt").readlink()
    assert own != Path(f"/proc/{libvirtd.pid}/ns/mnt").readlink()
    with following(directories, libvirtd) as daemon:
        two = start("two")
        merge(daemon, one, two)
        listed = row(daemon, one)
        assert listed is not None
        assert (listed.name, listed.uuid, listed.qmp) == ("one", one.uuid, None)
        report = daemon.client.report(fresh=True)
        assert {(vm.name, vm.uuid, vm.stops) for vm in report.vms} == {
            ("one", one.uuid, 0),
            ("two", two.uuid, 0),
        }
        shown = report.to_libvirt(daemon.client.controls().values)
        assert shown["shm_pages_sharing"] == report.host.pages_sharing
        assert set(shown) == _parameters(libvirtd)
        health = daemon.client.health().engine.libvirt
        assert health is not None
        assert health.connected
        assert any("trust-domain" in line for line in daemon.happened("warning"))
        assert_unharmed(one, two)
        done = daemon.client.unmerge([one.uuid])
        assert [(vm.name, vm.uuid, vm.remaining_pages) for vm in done.vms] == [("one", one.uuid, 0)]
        daemon.client.unmerge()
        assert_unharmed(one, two)
        daemon.end()
        assert_nothing_of_ours(one, two)


def _parameters(libvirtd: Libvirtd) -> set[str]:
    """The names that libvirt itself uses."""
    lines = libvirtd.virsh("node-memory-tune").splitlines()[1:]
    return {f"shm_{line.split()[0].removeprefix('shm_')}" for line in lines}


def test_events_are_followed(directories: Directories, libvirtd: Libvirtd, start: Start) -> None:
    with following(directories, libvirtd) as daemon:
        domain = start("changing", usb="piix3-uhci")
        wait_attached(daemon, domain)

        def told(what: str) -> bool:
            return becomes_true(
                lambda: any(what in line for line in daemon.happened("domain")), _SOON_S
            )

        domain.virsh("suspend")
        assert told("suspended paused")
        assert domain.run_state() == "paused"
        domain.virsh("resume")
        assert told("resumed unpaused")
        domain.virsh("reset")
        assert told("reboot")
        tablet = libvirtd.base / "files/tablet.xml"
        tablet.write_text("<input type='tablet' bus='usb'/>")
        domain.virsh("attach-device", str(tablet))
        assert told("device plugged")
        domain.virsh("detach-device", str(tablet))
        assert told("device unplugged")
        assert is_attached(daemon, domain)
        domain.virsh("destroy")
        assert told("stopped destroyed")
        assert becomes_true(lambda: row(daemon, domain) is None, _SOON_S)


def test_policy_in_the_metadata_is_followed(
    directories: Directories, libvirtd: Libvirtd, start: Start
) -> None:
    element = "<v:policy xmlns:v='urn:vmdedup:policy:1' trust-domain='shop' priority='5'/>"
    with following(directories, libvirtd) as daemon:
        one, two = start("one", ready=False), start("two", metadata=element)
        wait_attached(daemon, one, two)

        def domain_becomes(name: str | None) -> bool:
            def is_so() -> bool:
                found = row(daemon, two)
                return found is not None and found.trust_domain == name

            return becomes_true(is_so, _SOON_S)

        assert domain_becomes("shop")
        # The one with the higher priority is looked at first.
        assert [vm.name for vm in daemon.client.report(fresh=True).vms] == ["two", "one"]
        daemon.client.merge(timeout_s=60)
        assert store_pages(two) > 0
        policy(two, "<policy exclude='yes'/>")
        assert domain_becomes(None)
        assert store_pages(two) == 0
        assert "metadata" in str(getattr(row(daemon, two), "reason", None))
        policy(two, "<policy trust-domian='shop'/>")
        assert becomes_true(
            lambda: "trust-domian" in str(getattr(row(daemon, two), "reason", None)), _SOON_S
        ), daemon.client.events()
        policy(two, "<policy trust-domain='bank'/>")
        assert domain_becomes("bank")
        policy(two, None)
        assert domain_becomes("uid:64055")
        assert_unharmed(one, two)


def test_a_refused_domain_is_taken_when_the_reason_is_over(
    directories: Directories, libvirtd: Libvirtd, start: Start
) -> None:
    """libvirt tells of no event then."""
    domain = start("refused")
    shared_files = {"capability": "x-ignore-shared", "state": True}
    domain.qmp("migrate-set-capabilities", capabilities=[shared_files])
    with following(directories, libvirtd) as daemon:
        assert becomes_true(lambda: _is_refused(daemon, domain), _SOON_S)
        shared_files["state"] = False
        domain.qmp("migrate-set-capabilities", capabilities=[shared_files])
        wait_attached(daemon, domain)


def _is_refused(daemon: Daemon, domain: Domain) -> bool:
    found = row(daemon, domain)
    return found is not None and not found.mergeable


def test_a_domain_that_was_let_go_of_is_left_alone_until_named(
    directories: Directories, libvirtd: Libvirtd, start: Start
) -> None:
    with following(directories, libvirtd) as daemon:
        domain = start("given")
        wait_attached(daemon, domain)
        daemon.client.detach(domain.uuid)
        assert row(daemon, domain) is None
        time.sleep(1)
        before_s = daemon.cpu_s()
        time.sleep(3)
        assert daemon.cpu_s() - before_s < 0.3  # nothing is due: it waits
        wait_attached(daemon, start("other"))
        assert row(daemon, domain) is None
        daemon.client.attach("given")
        assert is_attached(daemon, domain)


@pytest.mark.alone
def test_eight_started_at_once_are_soon_attached(
    directories: Directories, libvirtd: Libvirtd, start: Start
) -> None:
    with following(directories, libvirtd) as daemon:
        domains: list[Domain] = []
        threads = [
            threading.Thread(
                target=lambda number=number: domains.append(start(f"hot{number}", ready=False))
            )
            for number in range(_TOGETHER)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(domains) == _TOGETHER
        wait_attached(daemon, *domains, within_s=_ATTACHED_WITHIN_S * ALLOWANCE)
        events = daemon.client.events().events
        begun = {e.vm: e.unix_s for e in events if e.message.startswith("started")}
        taken = {e.vm: e.unix_s for e in events if e.kind == "attached"}
        took_s = [taken[domain.name] - begun[domain.name] for domain in domains]
        print(f"attached within {max(took_s):.2f} s of running")
        assert max(took_s) < _ATTACHED_WITHIN_S * ALLOWANCE
