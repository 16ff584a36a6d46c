"""Listings, plans and funnels: descriptions of VMs that need no merge.

Owns the conversion of attached VMs and nominations to the models of `vms`, `run
--dry-run` and `explain`. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from vmdedup.accounting.memory_places import Place, memory_after
from vmdedup.attach.identity import VmIdentity
from vmdedup.core.counters import funnel
from vmdedup.core.nominate import Nomination, VmNomination
from vmdedup.core.rmap import OWN, ZERO
from vmdedup.errors import RefusedError, UsageError, VmError
from vmdedup.guest.mapping_state import HELD
from vmdedup.linux.pagemap import SWAPPED
from vmdedup.models import (
    DomainPlan,
    FindingListing,
    Funnel,
    MergePlan,
    VmListing,
    VmPlan,
)
from vmdedup.policy.domains import domain_of
from vmdedup.settings import Settings
from vmdedup.units import PAGE_BYTES
from vmdedup.vm.attached_vm import AttachedVm

_COMMON_SEED = 0
"""One seed for all trust domains, to compare contents across them."""

Nominations = Sequence[tuple[str, list[AttachedVm], Nomination]]
"""For each trust domain: its name, its VMs, and the nomination of a pass."""


def vm_listing(vm: AttachedVm) -> VmListing:
    """An attached VM with its backends and findings."""
    return VmListing(
        name=vm.name,
        pid=vm.pid,
        qmp=_socket(vm.identity),
        monitor=_monitor(vm.identity),
        uuid=vm.identity.uuid,
        qemu_version=_version(vm.identity),
        trust_domain=vm.domain,
        mergeable=vm.refusal is None,
        reason=present_reason(vm),
        left_to_unmerge_pages=vm.left_to_unmerge_pages,
        leaves_domain=vm.leaves_domain,
        backends=vm.backend_listings(),
        findings=[
            FindingListing(key=each.key, verdict=each.verdict.name.lower(), reason=each.reason)
            for each in vm.findings
        ],
    )


def present_reason(vm: AttachedVm) -> str | None:
    """Why an attached VM is not merged now, or how it could be merged better; `None` if neither."""
    return vm.hindrance or vm.refusal or vm.failure or vm.hint


def refused_listing(identity: VmIdentity, error: VmError, settings: Settings) -> VmListing:
    """A VM that was reached but must not be merged."""
    try:
        domain = domain_of(identity, settings.domains)
    except RefusedError:
        domain = None
    return VmListing(
        name=identity.name,
        pid=identity.pid,
        qmp=_socket(identity),
        monitor=_monitor(identity),
        uuid=identity.uuid,
        qemu_version=_version(identity),
        trust_domain=domain,
        mergeable=False,
        reason=error.reason,
    )


def unreachable_listing(
    name: str, pid: int | None, reason: str, uuid: str | None = None
) -> VmListing:
    """A VM that was named or found, but whose monitor could not be reached."""
    return VmListing(
        name=name,
        pid=pid,
        qmp=None,
        uuid=uuid,
        qemu_version=None,
        trust_domain=None,
        mergeable=False,
        reason=reason,
    )


def _socket(identity: VmIdentity) -> str | None:
    return None if identity.socket_path is None else str(identity.socket_path)


def _monitor(identity: VmIdentity) -> Literal["kept", "shared"] | None:
    if identity.socket_path is None:
        return None
    return "kept" if identity.keeps_monitor else "shared"


def _version(identity: VmIdentity) -> str:
    return ".".join(map(str, identity.qemu_version))


def merge_plan(
    nominations: Nominations,
    vma_budget: Callable[[AttachedVm], int],
    refused: list[VmListing],
    places: Sequence[Place],
) -> MergePlan:
    """The plan of all domains as a model. `places`: where what is merged may need memory."""
    vms, domains = [], []
    for domain, attached, nomination in nominations:
        saved = 0
        for vm, planned in zip(attached, nomination.vms, strict=True):
            assert vm.scan.state is not None
            assert vm.domain is not None
            zero = int(planned.taken.length[planned.taken.slot == ZERO].sum())
            others = vm.scan.state.process_vmas - vm.scan.state.ram_vmas
            vms.append(
                VmPlan(
                    name=vm.name,
                    pid=vm.pid,
                    uuid=vm.identity.uuid,
                    trust_domain=vm.domain,
                    mergeable_pages=planned.taken.pages - zero,
                    zero_pages=zero,
                    deferred_pages=len(planned.deferred),
                    vmas_now=vm.scan.state.process_vmas,
                    vmas_after=others + planned.choice.vmas_after,
                    vma_budget=others + vma_budget(vm),
                )
            )
            saved += planned.taken.pages
        domains.append(
            DomainPlan(
                trust_domain=domain,
                vms=[vm.name for vm in attached],
                new_store_pages=len(nomination.new),
                saved_pages=saved - len(nomination.new),
            )
        )
    saved_bytes = sum(domain.saved_pages for domain in domains) * PAGE_BYTES
    memory = memory_after(
        places,
        {vm.pid: vm.mergeable_pages + vm.zero_pages for vm in vms},
        sum(domain.new_store_pages for domain in domains),
    )
    return MergePlan(
        saved_bytes=saved_bytes, vms=vms, domains=domains, refused=refused, memory=memory
    )


def funnel_of(vm: AttachedVm, nominations: Nominations, everyone: Sequence[AttachedVm]) -> Funnel:
    """How one VM's RAM is spread. Raises UsageError if the VM was dropped meanwhile."""
    planned = _planned(vm, nominations)
    state = vm.scan.state
    assert state is not None
    own = state.slot == OWN
    return funnel(
        vm.name,
        vm.scan.columns,
        absent=np.flatnonzero(own & ((state.categories & HELD) == 0)),
        swapped=np.flatnonzero(own & ((state.categories & SWAPPED) != 0)),
        deferred=planned.deferred,
        kept_in_huge=planned.kept,
        pending=planned.taken.page_slots()[0],
        other_domain=_held_elsewhere(vm, planned.unshared, everyone),
    )


def _planned(vm: AttachedVm, nominations: Nominations) -> VmNomination:
    for _, vms, nomination in nominations:
        if vm in vms:
            return nomination.vms[vms.index(vm)]
    raise UsageError(f"{vm.name}: it ended while it was examined")


def _held_elsewhere(
    vm: AttachedVm, page: npt.NDArray[np.int64], everyone: Sequence[AttachedVm]
) -> npt.NDArray[np.int64]:
    """Which of these pages have an equal only in another trust domain.

    Each domain has its own seed, so contents are compared by new digests.
    """
    others = [other for other in everyone if other.domain != vm.domain]
    if not others or not len(page):
        return page[:0]
    mine = vm.scan.digests(page, _COMMON_SEED)
    found = np.zeros(len(page), dtype=np.bool_)
    for other in others:
        assert other.scan.state is not None
        every_page = np.arange(other.space.pages)
        held = np.flatnonzero(
            other.scan.readable(other.scan.state, every_page) | other.scan.state.merged
        )
        found |= np.isin(mine, other.scan.digests(held, _COMMON_SEED))
    return page[found]
