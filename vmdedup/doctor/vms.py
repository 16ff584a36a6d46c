"""The obstacles to merging each VM, or to merging it live.

Pure but for two looks at the host: which QEMU is installed, and whether libvirt is
here. The VMs come as `vmdedup vms` lists them. Merging cannot work on a host where every
VM is refused; a host without VMs does not count as one.
"""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from vmdedup.doctor.words import fine, note, problem
from vmdedup.models import CheckedThing, VmList, VmListing
from vmdedup.report.words import number_of, size

_VMS = "vms"
_LIBVIRT_SOCKETS = (
    Path("/run/libvirt/libvirt-sock"),
    Path("/run/libvirt/virtqemud-sock"),
)
_VERSION_S = 10


def vm_checks(found: VmList) -> Iterator[CheckedThing]:
    """QEMU, libvirt, each VM, and all of them together."""
    yield _qemu(found)
    yield from _libvirt(found)
    for vm in found.vms:
        yield _vm(vm)
    if not found.vms:
        remedy = "start one with a QMP socket for vmdedup: -qmp unix:PATH,server=on,wait=off"
        yield note(_VMS, "VMs", "no running QEMU found on this host", remedy)
    elif not any(vm.mergeable for vm in found.vms):
        remedy = "see the reason of each above"
        yield problem(_VMS, "VMs", "none of those found may merge", remedy)


def _qemu(found: VmList) -> CheckedThing:
    running = Counter(vm.qemu_version for vm in found.vms if vm.qemu_version is not None)
    if running:
        said = ", ".join(
            f"{version} ({number_of(vms, 'VM')})" for version, vms in sorted(running.items())
        )
        return fine(_VMS, "QEMU", said)
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        return note(_VMS, "QEMU", "not installed here, and none runs", "7.2 to 10.x merge live")
    done = subprocess.run(
        [program, "--version"], capture_output=True, text=True, check=False, timeout=_VERSION_S
    )
    return fine(_VMS, "QEMU", done.stdout.partition("\n")[0] or program)


def _libvirt(found: VmList) -> Iterator[CheckedThing]:
    if not any(path.exists() for path in _LIBVIRT_SOCKETS):
        return
    if find_spec("libvirt") is None:
        remedy = "pip install 'vmdedup[libvirt]', to reach domains without a second QMP socket"
        yield note(_VMS, "libvirt", "runs here; its Python binding is not installed", remedy)
    else:
        yield fine(_VMS, "libvirt", "runs here; --libvirt qemu:///system reaches its domains")
    crowded = Counter(
        vm.trust_domain for vm in found.vms if (vm.trust_domain or "").startswith("uid:")
    )
    for domain, vms in sorted(crowded.items(), key=str):
        if vms > 1:
            remedy = "libvirt runs all domains under one uid: name trust domains ([[domains]])"
            yield note(_VMS, f"trust domain {domain}", f"{vms} VMs by default", remedy)


def _vm(vm: VmListing) -> CheckedThing:
    name = vm.name if vm.pid is None else f"{vm.name} (pid {vm.pid})"
    if not vm.mergeable:
        # Not a problem of the host: others merge.
        return note(_VMS, name, "not merged", vm.reason or "no reason known")
    merging = [backend for backend in vm.backends if backend.mergeable]
    said = f"{size(sum(backend.size_bytes for backend in merging))} may merge"
    left = [f"{each.id}: {each.reason}" for each in vm.backends if each.reason]
    hints = [hint for hint in (vm.reason, *left) if hint]
    return note(_VMS, name, said, "; ".join(hints)) if hints else fine(_VMS, name, said)
