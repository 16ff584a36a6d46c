"""What VMs that run already share, by the fixture of vmdedup.pytest_plugin.

`vmdedup` merges them and is the typed report; pytest is told which VMs with
--vmdedup-qmp, or by a fixture vmdedup_vms of one's own.
"""

from __future__ import annotations

from vmdedup.models import SharingReport


def test_memory_is_shared(vmdedup: SharingReport) -> None:
    """At least 10% of what the VMs held before merging."""
    present_bytes = sum(vm.present_bytes for vm in vmdedup.vms)
    assert vmdedup.host.saved_bytes > 0.1 * present_bytes


def test_nobody_was_paused(vmdedup: SharingReport) -> None:
    """All of it happened live."""
    assert vmdedup.host.stopped_ms == 0
