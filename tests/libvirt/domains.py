"""What the tests ask of domains and of the daemon that follows them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.harness.kernel import becomes_true, mappings
from tests.harness.libvirtd import Domain, Libvirtd
from tests.service.daemon import ALLOWANCE, Daemon, Directories, running
from vmdedup.models import VmListing

NAMESPACE = "urn:vmdedup:policy:1"


@contextmanager
def following(directories: Directories, libvirtd: Libvirtd, *arguments: str) -> Iterator[Daemon]:
    """A daemon that follows this libvirt."""
    with running(directories, "--libvirt", libvirtd.uri, *arguments) as daemon:
        yield daemon


def row(daemon: Daemon, domain: Domain) -> VmListing | None:
    """How a domain is listed now."""
    rows = [each for each in daemon.client.vms().vms if each.uuid == domain.uuid]
    assert len(rows) <= 1
    return rows[0] if rows else None


def is_attached(daemon: Daemon, domain: Domain) -> bool:
    found = row(daemon, domain)
    return found is not None and found.mergeable and found.pid == domain.pid


def wait_attached(daemon: Daemon, *domains: Domain, within_s: float = 8 * ALLOWANCE) -> None:
    def all_are() -> bool:
        return all(is_attached(daemon, domain) for domain in domains)

    assert becomes_true(all_are, within_s), daemon.client.vms()


def store_pages(domain: Domain) -> int:
    """Pages of a domain's QEMU that its kernel maps from a store."""
    return sum(m.pages for m in mappings(domain.pid) if m.is_store)


def merge(daemon: Daemon, *domains: Domain, least_pages: int = 200) -> None:
    """Have these domains merged, as the kernel sees it."""
    wait_attached(daemon, *domains)
    daemon.client.merge([domain.name for domain in domains], timeout_s=60)
    assert min(map(store_pages, domains)) > least_pages


def assert_unharmed(*domains: Domain) -> None:
    """The guests have checked all of their memory once more, and it was right."""
    for domain in domains:
        domain.wait_passes(1)
        assert (domain.errors, domain.serial.complaints()) == (0, [])


def assert_nothing_of_ours(*domains: Domain) -> None:
    """No mapping, no descriptor and no descriptor set of ours is left in the QEMUs."""
    for domain in domains:
        assert [m for m in mappings(domain.pid) if m.is_ours] == []
        assert fd_sets(domain) == []
        links = [os.readlink(fd) for fd in Path(f"/proc/{domain.pid}/fd").iterdir()]
        assert "anon_inode:[userfaultfd]" not in links
        assert [link for link in links if "vmdedup" in link] == []


def fd_sets(domain: Domain) -> list[str]:
    """The labels of descriptor sets of ours in a QEMU."""
    sets = json.loads(domain.qmp("query-fdsets"))["return"]
    labels = [entry.get("opaque", "") for each in sets for entry in each["fds"]]
    return [label for label in labels if "vmdedup" in label]


def policy(domain: Domain, element: str | None) -> None:
    """Set the domain's policy, or remove it, as a user does."""
    words = ["--remove"] if element is None else ["--key", "vmdedup", "--set", element]
    domain.virsh("metadata", NAMESPACE, *words)
