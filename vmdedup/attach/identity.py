"""A VM's identity: name, process, owner, version, and the threads never to inject into.

Owns `VmIdentity` and the check that the process behind a monitor really is a
QEMU with a virtual machine in it. Reads only.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vmdedup.attach import replies
from vmdedup.attach.monitor import Monitor, one_line
from vmdedup.errors import AttachError, MonitorError, VmGoneError
from vmdedup.linux.process import Process, ProcessId


@dataclass(frozen=True)
class VmPolicy:
    """Policy for merging a VM from its own description (a libvirt domain's metadata)."""

    trust_domain: str | None = None
    exclude: bool = False
    priority: int = 0
    """VMs with a higher priority are looked at and merged first."""
    cold_never: bool = False
    """Whether its memory is never paged out, as the VM must answer at once."""
    problem: str | None = None
    """Why the policy could not be understood; the VM is then excluded."""


@dataclass(frozen=True)
class VmIdentity:
    """A running VM, for as long as its process lives."""

    name: str
    """QEMU's `-name`, or the file name of the monitor's socket if it has none."""
    pid: int
    start_ticks: int
    socket_path: Path | None
    uid: int
    """Effective uid of the QEMU process."""
    qemu_version: tuple[int, int, int]
    excluded_thread_ids: frozenset[int]
    """Threads that touch guest memory: main thread, vCPUs, I/O threads. Never inject there."""
    uuid: str | None = None
    """UUID of the libvirt domain; `None` for a VM reached by its socket."""
    monitor_address: str | None = None
    """How another process of ours reaches the monitor: the socket's path, or URI#UUID."""
    policy: VmPolicy = VmPolicy()
    keeps_monitor: bool = True
    """Whether the connection to its socket is kept; else it is left after each turn."""
    cgroups: tuple[str, ...] = ()
    """Paths of the QEMU process in the cgroup hierarchies."""

    @property
    def process_id(self) -> ProcessId:
        """Identity of the QEMU process: its pid alone may belong to another process by now."""
        return ProcessId(self.pid, self.start_ticks)


def identify(
    monitor: Monitor,
    process: Process,
    *,
    socket_path: Path | None = None,
    uuid: str | None = None,
    monitor_address: str | None = None,
    policy: VmPolicy = VmPolicy(),
) -> VmIdentity:
    """Ask for the VM's identity; sets `vm` of the monitor and the process to its name.

    Raises AttachError if the peer is not a QEMU with a virtual machine.
    """
    cpus = _cpus_of_qemu(monitor, process)
    name = monitor.query("query-name", replies.NameReply).name
    chosen = one_line(name or (socket_path.name if socket_path else f"pid {process.pid}"), 120)
    identity = VmIdentity(
        name=chosen,
        pid=process.pid,
        start_ticks=process.identity.start_ticks,
        socket_path=socket_path,
        uid=_effective_uid(process),
        cgroups=process.cgroups(),
        qemu_version=monitor.version,
        excluded_thread_ids=frozenset(_excluded(monitor, process, cpus)),
        uuid=uuid,
        monitor_address=str(socket_path.absolute()) if socket_path else monitor_address,
        policy=policy,
        keeps_monitor=not monitor.misses_events,
    )
    monitor.vm = process.vm = chosen
    return identity


def excluded_threads(monitor: Monitor, process: Process) -> set[int]:
    """Main, vCPU and I/O threads now; CPU hot-plug adds more."""
    return _excluded(monitor, process, monitor.query("query-cpus-fast", replies.CpusFast))


def _excluded(monitor: Monitor, process: Process, cpus: list[replies.CpuFast]) -> set[int]:
    others = monitor.query_if_known("query-iothreads", replies.IoThreads, [])
    return {process.pid} | {one.thread_id for one in cpus} | {one.thread_id for one in others}


def _effective_uid(process: Process) -> int:
    words = process.status().get("Uid", "").split()
    if len(words) < 2:
        raise VmGoneError(process.vm, "the VM's process ended", pid=process.pid)
    return int(words[1])


def _cpus_of_qemu(monitor: Monitor, process: Process) -> list[replies.CpuFast]:
    """Its CPUs; AttachError unless the peer runs a QEMU program and answers as a machine."""
    try:
        program = os.readlink(f"/proc/{process.pid}/exe")
    except PermissionError as error:
        reason = "its process may not be looked at (run as root)"
        raise AttachError(monitor.vm, reason, pid=process.pid) from error
    except OSError as error:
        raise VmGoneError(monitor.vm, "the VM's process ended", pid=process.pid) from error
    if "qemu" not in program:
        reason = f"not a QEMU (the socket belongs to {one_line(program, 120)})"
        raise AttachError(monitor.vm, reason, pid=process.pid)
    try:
        return monitor.query("query-cpus-fast", replies.CpusFast)
    except MonitorError as error:
        if error.error_class != "CommandNotFound":
            raise
        reason = "not a virtual machine (its monitor knows no CPUs)"
        raise AttachError(monitor.vm, reason, pid=process.pid) from error
