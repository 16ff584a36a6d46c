"""A userfaultfd of QEMU's address space that only this process holds.

QEMU's borrowed thread makes it, we take it, and QEMU's copy is closed at once. Owns both ways
of making it, and the search for what a killed predecessor left. Promises that QEMU keeps
neither a userfaultfd nor the device.
"""

from __future__ import annotations

import errno
import os
import time

from vmdedup import faults
from vmdedup.errors import MergeError, UnsupportedError, VmGoneError
from vmdedup.inject.guard import Guard
from vmdedup.inject.remote import RemoteThread
from vmdedup.inject.stub import GUARD_IOCTL
from vmdedup.linux.descriptors import descriptor_links, userfaultfds
from vmdedup.linux.syscalls import NR, pidfd_getfd
from vmdedup.linux.userfaultfd import SYNCHRONOUS_FEATURES, USERFAULTFD_IOC_NEW, Userfault
from vmdedup.remap.borrowed_thread import NO_STUB
from vmdedup.vm.attached_vm import AttachedVm

_SECOND_LOOK_S = 0.01


def create_userfault(
    vm: AttachedVm,
    remote: RemoteThread,
    features: int = SYNCHRONOUS_FEATURES,
    *,
    optional: int = 0,
) -> Userfault:
    """A userfaultfd of QEMU's address space that only this process holds.

    A QEMU without CAP_SYS_PTRACE may not create one by itself; its thread makes it from
    /dev/userfaultfd. (UFFD_USER_MODE_ONLY would be allowed, but then KVM's own faults fail.)
    Raises MergeError, and UnsupportedError if neither way exists here.
    """
    if vm.may_hold_userfaults:
        _close_stale_userfaults(vm, remote)
    vm.may_hold_userfaults = True
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    try:
        number = remote.call(NR.USERFAULTFD, flags)
    except PermissionError:
        number = _from_device(vm, remote, flags)
    except OSError as error:  # uncovered: takes a kernel without userfaultfd, or a full QEMU
        if error.errno == errno.ENOSYS:
            raise UnsupportedError("userfaultfd", "this kernel has no userfaultfd") from error
        raise MergeError(vm.name, "arm", f"userfaultfd: {error}", pid=vm.pid) from error
    # SAFETY: until the close below QEMU holds a copy too. Nothing is registered
    # with it yet, so a kill right here leaves an idle descriptor that protects
    # nothing; the next session closes it (`_close_stale_userfaults`).
    faults.reached("userfaultfd-created")
    try:
        fd = pidfd_getfd(vm.process.pidfd, number)
    except BaseException:
        remote.call(NR.CLOSE, number)
        raise
    try:
        remote.call(NR.CLOSE, number)
    except BaseException:
        os.close(fd)
        raise
    vm.may_hold_userfaults = False
    faults.reached("userfaultfd-taken")
    return Userfault(vm.name, vm.pid, fd, features, optional=optional)


def _close_stale_userfaults(vm: AttachedVm, remote: RemoteThread) -> None:
    """Close userfaultfds in QEMU that a predecessor made but was killed before taking.

    They lack UFFDIO_API, which the predecessor calls on its own copy. A userfaultfd of
    QEMU's own lacks it for microseconds only, so look twice.
    """
    stale = unused_userfaults(vm)
    if not stale:
        return
    time.sleep(_SECOND_LOOK_S)
    for number in stale & unused_userfaults(vm):
        # SAFETY: the descriptor protects nothing and nobody waits on it. Killed here: the
        # next session finds it again.
        remote.call(NR.CLOSE, number)


def unused_userfaults(vm: AttachedVm) -> set[int]:
    """Descriptor numbers inside QEMU of userfaultfds that were never set up."""
    try:
        found = userfaultfds(vm.pid, descriptor_links(vm.pid))
    except (FileNotFoundError, ProcessLookupError) as error:
        raise VmGoneError(vm.name, "the VM's process ended", pid=vm.pid) from error
    return {fd for fd, is_set_up in found.items() if not is_set_up}


def _from_device(vm: AttachedVm, remote: RemoteThread, flags: int) -> int:
    """Have QEMU's thread make one from /dev/userfaultfd, which QEMU itself never keeps open.

    The device lets its holder make any number of userfaultfds. So the device itself is the
    batch's guard: the thread receives it, uses it and closes it, all within microseconds.
    """
    if not remote.uses_stub:
        reason = f"{NO_STUB}; its QEMU may make no userfaultfd by itself either"
        raise UnsupportedError("userfaultfd", reason)
    try:
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError) as error:
        reason = (
            f"/dev/userfaultfd: {error.strerror}; it takes Linux 6.1, and --device in a container"
        )
        raise UnsupportedError("userfaultfd", reason) from error
    except OSError as error:  # uncovered: takes a system without free descriptors
        reason = f"/dev/userfaultfd: {error.strerror}"
        raise MergeError(vm.name, "arm", reason, pid=vm.pid) from error
    try:
        with Guard(device) as guard, vm.lent.lending() as lend:
            with vm.monitor.turn():
                (socket,) = vm.lent.copies(remote, [lend(guard.theirs, "device")])
            guard.lent(socket)
            try:
                # SAFETY: killed before the device is given: the batch begins no call. After
                # that QEMU has a userfaultfd that protects nothing (see `create_userfault`),
                # and no device.
                number = remote.call_guarded(guard, GUARD_IOCTL, 0, USERFAULTFD_IOC_NEW, flags)
            finally:
                remote.own([])
    except OSError as error:  # uncovered: the device makes one unless memory is short
        raise MergeError(vm.name, "arm", f"userfaultfd: {error}", pid=vm.pid) from error
    finally:
        os.close(device)
    return number
