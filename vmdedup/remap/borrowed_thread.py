"""QEMU's idle RCU thread, borrowed: for one session, or over several stages of a pass.

Owns who may borrow it and when it is released; `inject.remote` owns what it does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

from vmdedup import faults
from vmdedup.attach.identity import excluded_threads
from vmdedup.attach.monitor import Monitor
from vmdedup.errors import InjectionError
from vmdedup.inject.in_place import WORKSPACE_BYTES, reads_safely
from vmdedup.inject.remote import Landmarks, RemoteThread, find_idle_thread
from vmdedup.linux.process import Process
from vmdedup.remap.context import Host
from vmdedup.vm.attached_vm import AttachedVm


def borrow_thread(host: Host, vm: AttachedVm) -> RemoteThread:
    """QEMU's idle RCU thread as a context manager, to run system calls on. Raises VmError."""
    means = (vm.process, vm.monitor, vm.landmarks, vm.space.spans())
    return borrow_of(host, vm.name, *means)


@contextmanager
def borrowed(host: Host, vm: AttachedVm, *, keep: bool = False) -> Iterator[RemoteThread]:
    """QEMU's thread, ready to run calls in the block. Raises VmError.

    `keep`: if it runs by stub, its scratch memory stays for the next such block, until
    `AttachedVm.let_thread_go`; making that memory takes milliseconds.
    """
    remote, vm.thread = vm.thread, None
    if remote is None:
        remote = borrow_thread(host, vm)
        remote.open()
    with ExitStack() as exits:
        exits.push(remote)
        yield remote
        if keep and remote.uses_stub:
            exits.pop_all()
            vm.thread = remote


def reads_in_place(host: Host, vm: AttachedVm) -> bool:
    """Whether the VM's own thread, if it runs by stub, may read the VM's pages."""
    is_safe = all(reads_safely(region.filesystem) for region in vm.regions)
    return is_safe and host.settings.has("in-place")


def ready_thread(host: Host, vm: AttachedVm) -> None:
    """Prepare the VM's thread for a look in place, and for the merge that follows at once.

    If that is not possible, pages are copied to be looked at. Raises VmError.
    """
    if vm.thread is None and reads_in_place(host, vm):
        with suppress(InjectionError), borrowed(host, vm, keep=True):
            pass


_MOST_CALLS = 1024
"""Most calls in one batch: more than twice the runs of the largest merging gate. Batches
outside of gates make many calls at once."""


NO_STUB = (
    "merged only while stopped: it gets no executable memory (denied, or a limit of descriptors"
    " or mappings), and without that calls cannot hold the write protection until they have ended"
)
"""Observed: of 40 chains whose launcher was killed in a live gate, one lost a guest's write."""


def borrow_of(
    host: Host,
    vm: str,
    process: Process,
    monitor: Monitor,
    landmarks: Landmarks,
    beside: Sequence[tuple[int, int]],
) -> RemoteThread:
    """As `borrow_thread`, for a VM of which only these values are known. Raises VmError."""
    landmarks.thread = find_idle_thread(
        process.pid,
        partial(excluded_threads, monitor, process),
        vm=vm,
        known=landmarks.thread,
    )
    return RemoteThread(
        vm,
        process.pid,
        landmarks.thread.tid,
        stub=host.settings.has("stub"),
        max_calls=_MOST_CALLS,
        workspace_bytes=WORKSPACE_BYTES,
        fault_point=lambda step: faults.reached(f"inject-{step}"),
        watch=host.guardian,
        landmarks=landmarks,
        beside=beside,
    )
