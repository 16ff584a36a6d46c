"""vmdedup: guest-memory deduplication for running QEMU VMs, in user space.

Linux KSM's idea, moved out of the kernel and made for VMs. Pages of guest RAM
that was registered as mergeable (a memory backend with merge=on) are compared
by digest. A page whose digest stays the same is looked up in the *stable tree*, the
published pages of a shared store. If it is not there, it is looked up in the
*unstable tree*, the other candidates of this pass. Equal pages are remapped,
MAP_PRIVATE, onto one page of the store, inside the QEMU process and while the
VM runs. The guest reads the shared page, and a write gets its own copy by the
kernel's ordinary copy-on-write. Zero pages are mapped to the kernel's zero
page.

The way of a page; each stage names its module, data flows one way:

    discover, attach      attach.discover, attach.qmp, attach.identity
      └ regions           attach.ranges          backends to host addresses
      └ hazards, domain   policy.hazards, policy.domains
    look                  vm.page_scan, guest.page_reader, core.scan
    nominate              core.stable_tree, core.unstable_tree, core.pool, core.plan,
                          core.nominate, core.news    only pages changed since the last time
    arm, drain, look      remap.session, remap.live, linux.userfaultfd
                          (or, if it must be, remap.stopped)
      └ publish           remap.publish, remap.domain_store, store.stable_store
      └ verify            remap.compare, guest.page_reader, inject.in_place
      └ gate, remap       remap.gate, remap.burst, remap.merge, inject
                          (and back: remap.unmerge, remap.unmerge_vm)
    release               remap.release          punch holes, split large folios
    account, report       guest.mapping_state, core.counters, accounting.sharing_report

`engine` knows the order of the stages, and `engine.workers` runs those of several VMs at a
time. `deduplicator` is the library's entry point, `guardian` a second process that releases
the guests if the engine hangs.

These rules keep a guest safe:

- Digests nominate, bytes decide: a page is remapped only if, with its writers
  held, it equals the published page byte for byte.
- Published pages never change, and slots are never reused while anything maps them or can
  still map them: a killed engine's calls may run late.
- A store and a VM have one engine at a time, whatever its directories and namespaces.
- The VM's devices are looked at again before the first page is remapped. By then the
  pages are protected and the requests in flight have ended.
- Only this process holds the userfaultfd that holds writers: when it dies, the kernel
  releases every guest thread.
- System calls inside QEMU run as a chain that completes by itself; `kill -9` of
  vmdedup at any instant leaves each page either unchanged or equal.
- The kernel's page tables are the only state. No journal is trusted: a fresh process
  reads from /proc which mappings show a store, and goes on.
"""

from __future__ import annotations

TYPE_CHECKING = False
"""Type checkers assume it is true; the guardian imports this module without `typing`."""

if TYPE_CHECKING:
    from typing import Any

    from vmdedup.client import AsyncClient, Client
    from vmdedup.deduplicator import Deduplicator
    from vmdedup.errors import VmdedupError
    from vmdedup.models import SharingReport
    from vmdedup.settings import Settings

__all__ = [
    "AsyncClient",
    "Client",
    "Deduplicator",
    "Settings",
    "SharingReport",
    "VmdedupError",
]

_HOME = {
    "AsyncClient": "vmdedup.client",
    "Client": "vmdedup.client",
    "Deduplicator": "vmdedup.deduplicator",
    "Settings": "vmdedup.settings",
    "SharingReport": "vmdedup.models",
    "VmdedupError": "vmdedup.errors",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the guardian must stay small."""
    if name not in _HOME:
        raise AttributeError(f"module 'vmdedup' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
