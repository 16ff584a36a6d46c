"""Opening a session on a VM: live if possible, else with stops.

Owns what a session needs inside QEMU while it lasts: the borrowed thread's
scratch memory and the userfaultfd. Promises that both are gone on every way out,
and that a VM that cannot be write-protected falls back to stops with a hint.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from vmdedup import faults
from vmdedup.attach.discover import Attachment
from vmdedup.attach.identity import VmIdentity
from vmdedup.attach.lent_fds import take_back_stale
from vmdedup.attach.monitor import Monitor
from vmdedup.core.gate_size import USUAL, BatchSize, GateSize
from vmdedup.errors import (
    AttachError,
    DisturbedError,
    InjectionError,
    MergeError,
    MonitorError,
    UnprotectedError,
    UnsupportedError,
)
from vmdedup.guardian.resume import locked
from vmdedup.guardian.runtime_dir import StopNote
from vmdedup.guest.dirty_tracking import DirtyTracking
from vmdedup.guest.mapping_state import open_ram_file
from vmdedup.inject.guard import Guard
from vmdedup.inject.remote import Landmarks, RemoteThread, stale_scratch
from vmdedup.linux.process import Process, read_process_id
from vmdedup.linux.userfaultfd import (
    FEATURE_WP_UNPOPULATED,
    TRACKING_FEATURES,
    Userfault,
)
from vmdedup.policy.hazards import WRITES_IN_PAUSE
from vmdedup.remap import burst
from vmdedup.remap.borrowed_thread import (
    NO_STUB,
    borrow_of,
    borrow_thread,
    borrowed,
    reads_in_place,
)
from vmdedup.remap.context import Host
from vmdedup.remap.gate import Session
from vmdedup.remap.live import LiveSession
from vmdedup.remap.stopped import StoppedSession
from vmdedup.remap.take_userfaultfd import create_userfault, unused_userfaults
from vmdedup.units import PAGE_BYTES
from vmdedup.vm.attached_vm import AttachedVm
from vmdedup.vm.lent import Lend, LentFds

_LEAST_GAP_BYTES = 16 * PAGE_BYTES
"""Smallest gap between two ranges that are registered separately. The pages of narrower gaps
are read again afterwards, which costs less than another registration."""
_MOST_GAPS = 1024

Ranges = npt.NDArray[np.int64]

_NOTE_WAIT_S = 5.0
"""Longest wait for a guardian that is resuming the VM now: it gives up a monitor that we hold
within 2 s."""
_NOTE_POLL_S = 0.01

_NO_WRITE_PROTECT = (
    "merged only while stopped: its RAM file lies on a filesystem without userfaultfd"
    " write protection; put it on tmpfs, or use a memfd"
)


def finish_predecessor(host: Host, found: Attachment) -> None:
    """Wait until nothing that a killed predecessor launched inside the VM still runs.

    Call it before anything is learnt of the VM: descriptors left there look like its own.
    Scratch mappings show that a predecessor was there; borrowing the thread waits for its
    batch to end and removes them. Descriptors that it had lent are taken back. A VM
    that we have paused ourselves, and then lost, is resumed. Raises VmError.
    """
    vm = found.identity.name
    if stale_scratch(found.process.pid, vm=vm):
        with borrow_of(host, vm, found.process, found.monitor, Landmarks(), ()):
            pass
    # SAFETY: resume only now. Calls launched in a pause have no protection of their own, so
    # the guest may not write before they have ended.
    _resume_noted(host, found)
    take_back_stale(found.monitor)


def resume_given_up(host: Host, vm: AttachedVm) -> None:
    """Resume a VM that we gave up in a pause, over our own monitor, which answers again.

    The guardian may have no other: a QMP socket serves one client. Raises VmError.
    """
    if host.runtime.is_noted(vm.pid, vm.identity.start_ticks):
        _resume_noted(host, vm)


class _Noted(Protocol):
    """The VM that a stop note names: an attachment or an attached VM."""

    @property
    def monitor(self) -> Monitor: ...
    @property
    def process(self) -> Process: ...
    @property
    def identity(self) -> VmIdentity: ...


def _resume_noted(host: Host, found: _Noted) -> None:
    identity = found.process.identity
    if host.runtime.pauses(identity.pid):
        return  # until there is memory; that pause is ended by itself
    file = host.runtime.note_path(identity.pid, identity.start_ticks)
    deadline = time.monotonic() + _NOTE_WAIT_S
    while file.exists():
        with locked(file) as is_ours:
            if is_ours:
                # SAFETY: the note's name alone says that the VM was ours to resume: its
                # content may be damaged. Killed before the note is removed: the guardian finds
                # a VM that runs.
                found.monitor.resume_left_paused()
                file.unlink(missing_ok=True)
                return
        if time.monotonic() > deadline:
            reason = "a guardian is just resuming it after a pause; vmdedup tries again later"
            raise AttachError(found.identity.name, reason, pid=identity.pid)
        time.sleep(_NOTE_POLL_S)


def start_dirty_tracking(host: Host, vm: AttachedVm, *, foreground: bool = False) -> None:
    """Track what the guest writes from now on, if the kernel can. Raises VmError.

    `foreground`: all written pages are looked at next, and then merged.
    """
    settings = host.settings
    if vm.scan.dirty_tracking is not None or not (settings.has("wp-async") and vm.pagemap.use_scan):
        return
    # If this kernel cannot, or not here and now, every look reads every page.
    with (
        suppress(UnsupportedError, OSError, InjectionError, MergeError),
        borrowed(host, vm, keep=foreground and reads_in_place(host, vm)) as remote,
    ):
        userfault = create_userfault(vm, remote, TRACKING_FEATURES)
        vm.scan.dirty_tracking = DirtyTracking(userfault, vm.pagemap, vm.space)
        faults.reached("tracked")


class Approach(NamedTuple):
    """The resources of a VM that any session needs, whichever pages will be armed."""

    remote: RemoteThread
    """The borrowed thread, which runs the session's calls."""
    lend: Lend
    lent: LentFds
    """What is lent to the VM, of which it makes copies."""
    userfault: Userfault | None
    """The VM's userfaultfd, which protects nothing yet; `None` if the kernel cannot make one."""
    guard: Guard | None
    live: bool
    """Whether the session runs without stopping the VM."""

    def give(self, lent: Sequence[int]) -> list[int]:
        """Have the VM keep its own copies of the lent descriptors and of the guard's socket.

        Call it once, before anything is launched that uses them. Returns the numbers of the
        copies of `lent`. Raises as `LentFds.copies`.
        """
        if self.guard is None:
            return self.lent.copies(self.remote, lent)
        lent = [*lent, self.lend(self.guard.theirs, "guard")]
        *own, guard = self.lent.copies(self.remote, lent)
        self.guard.lent(guard)
        return own


def lend_ram_files(vm: AttachedVm, lend: Lend, *, only_shared: bool = False) -> dict[int, int]:
    """The descriptor numbers of the regions' RAM files inside QEMU, by the region's index.

    A file is lent if QEMU keeps no descriptor of it. `only_shared`: only those of share=on
    regions. Raises OSError, MonitorError.
    """
    numbers = {}
    for index, region in enumerate(vm.regions):
        if only_shared and not region.share:
            continue
        if region.ram_fd is not None:
            numbers[index] = region.ram_fd
        elif region.ram_file is not None:
            fd = open_ram_file(vm.pid, region, os.O_RDWR if region.share else os.O_RDONLY)
            try:
                numbers[index] = lend(fd, "ram")
            finally:
                os.close(fd)
    return numbers


@contextmanager
def approach(
    host: Host, vm: AttachedVm, *, stopped: bool = False, foreground: bool = False
) -> Iterator[Approach]:
    """Prepare everything for a session on `vm`. Raises VmError.

    `stopped` asks for stops even if a live session is possible. `foreground`: another look
    follows soon.
    """
    with ExitStack() as exits:
        lend = exits.enter_context(vm.lent.lending())
        keep = foreground and reads_in_place(host, vm)
        remote = exits.enter_context(borrowed(host, vm, keep=keep))
        why_stopped = None if remote.uses_stub else NO_STUB
        userfault = guard = None
        if remote.uses_stub and host.settings.has("userfaultfd-wp"):
            try:
                wanted = FEATURE_WP_UNPOPULATED if host.settings.has("wp-unpopulated") else 0
                created = create_userfault(vm, remote, optional=wanted)
                userfault = exits.enter_context(created)
            except UnsupportedError as error:
                why_stopped = f"merged only while stopped: {error}"
            else:
                guard = exits.enter_context(Guard(userfault.fd))
        vm.note_live_hindrance(why_stopped)
        yield Approach(remote, lend, vm.lent, userfault, guard, vm.live and not stopped)
        if keep:
            remote.own([])


@contextmanager
def open_session(
    host: Host, vm: AttachedVm, approached: Approach, ranges: Ranges
) -> Iterator[Session]:
    """Open a session on `vm`. Raises VmError.

    `ranges`: the (start, end) addresses that will be armed, shape (n, 2). They are registered
    in stretches; the wide gaps between these stay tracked.
    """
    spans = stretches(ranges, vm.space.spans())
    with ExitStack() as exits:
        if vm.scan.dirty_tracking is not None:
            exits.enter_context(vm.scan.dirty_tracking.handed_over(spans))
        protection = _enter_live(host, vm, approached, spans, exits)
        session: LiveSession | StoppedSession
        if protection is not None and approached.live:
            session = protection
        else:
            stopped = _stopped(host, vm, approached.remote, protection)
            session = exits.enter_context(stopped)
        try:
            yield session
        finally:
            vm.scan.remapped()
            exits.close()
            faults.reached("session-closed")
            vm.totals.add(session.timings)


def require_undisturbed(vm: AttachedVm) -> None:
    """The *look*: raise DisturbedError unless the VM is as it was examined.

    SAFETY: runs between the drain and the first gate of every session, whichever way pages
    are remapped. A device that pinned pages before they were armed is visible by then. One
    that pins pages afterwards excludes them, as pinning breaks the protection.
    """
    if vm.has_news_for_gates():
        reason = "its devices or its state have just changed; it is examined again first"
        raise DisturbedError(vm.name, "look", reason, pid=vm.pid)


def stretches(ranges: Ranges, regions: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Address ranges joined over narrow gaps, so that they are few; all (start, end).

    They are never joined over the end of a region: between two regions lies no guest RAM.
    """
    start, end = ranges[np.argsort(ranges[:, 0])].T
    ends = np.sort([region_end for _, region_end in regions])
    region = np.searchsorted(ends, start, side="right")
    gap_bytes = start[1:] - end[:-1]
    wide = np.flatnonzero(gap_bytes >= _LEAST_GAP_BYTES)
    widest = wide[np.argsort(-gap_bytes[wide], kind="stable")[:_MOST_GAPS]]
    breaks = np.union1d(widest, np.flatnonzero(np.diff(region))) + 1
    first, last = np.append(0, breaks), np.append(breaks, len(start)) - 1
    return list(zip(start[first].tolist(), end[last].tolist(), strict=True))


def _enter_live(
    host: Host,
    vm: AttachedVm,
    approached: Approach,
    spans: Sequence[tuple[int, int]],
    exits: ExitStack,
) -> LiveSession | None:
    """A live session, or `None` if the kernel cannot protect what backs this VM."""
    if approached.userfault is None or approached.guard is None:
        return None
    live = LiveSession(
        vm.name,
        vm.pid,
        spans=spans,
        remote=approached.remote,
        userfault=approached.userfault,
        guard=approached.guard,
        pagemap=vm.pagemap,
        monitor=vm.monitor,
        guardian=host.guardian,
        size=GateSize(_most(host), host.settings.gate_target_ms),
        deadline_ms=host.settings.controls.gate_deadline_ms,
        drain_timeout_ms=host.settings.drain_timeout_ms,
        look=partial(require_undisturbed, vm),
        bursts=host.settings.has("compiled-gates") and burst.is_available(),
    )
    try:
        return exits.enter_context(live)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise MergeError(vm.name, "arm", str(error), pid=vm.pid) from error
        if vm.live:  # uncovered: takes a kernel that protects less than the examination expects
            vm.note_live_hindrance(_NO_WRITE_PROTECT, for_good=True)
        return None


def _stopped(
    host: Host, vm: AttachedVm, remote: RemoteThread, protection: LiveSession | None
) -> StoppedSession:
    if protection is None:
        for finding in vm.findings:
            if finding.key == WRITES_IN_PAUSE:
                raise UnprotectedError(vm.name, "stop", finding.reason, pid=vm.pid)
    if host.runtime.is_noted(vm.pid, vm.identity.start_ticks):
        # SAFETY: the guardian may resume the VM at any moment; only we may end our pause.
        reason = "it is still to be resumed after an earlier pause, by the guardian"
        raise MergeError(vm.name, "stop", reason, pid=vm.pid)
    address = vm.identity.monitor_address
    if address is None:  # uncovered: every way to attach knows the path
        reason = "its monitor has no path, over which it could be resumed after a crash of ours"
        raise MergeError(vm.name, "stop", reason, pid=vm.pid)
    note = StopNote(
        vm=vm.name,
        pid=vm.pid,
        start_ticks=vm.identity.start_ticks,
        monitor_path=address,
        thread_id=remote.tid,
        engine_pid=os.getpid(),
        engine_start_ticks=read_process_id(os.getpid()).start_ticks,
    )
    return StoppedSession(
        vm.name,
        remote=remote,
        pagemap=vm.pagemap,
        monitor=vm.monitor,
        guardian=host.guardian,
        runtime=host.runtime,
        note=note,
        size=USUAL.at_most(_most(host)),
        budget_ms=host.settings.stop_budget_ms,
        look=partial(require_undisturbed, vm),
        protection=protection,
    )


def _most(host: Host) -> BatchSize:
    return BatchSize(host.settings.gate_runs, host.settings.gate_pages)


def survey(host: Host, vm: AttachedVm) -> None:
    """Find in QEMU what sessions will need, so that the first one does not take longer.

    What cannot be found now is looked for again by that session. Raises VmGoneError.
    """
    vm.may_hold_userfaults = bool(unused_userfaults(vm))
    with suppress(InjectionError, MonitorError, UnsupportedError):
        borrow_thread(host, vm).survey()
