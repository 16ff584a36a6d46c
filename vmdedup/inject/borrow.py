"""Borrowing an idle thread: hold it, run a chain on its own stack, release it.

Owns the conditions under which a thread may be borrowed: it waits in futex, is not
traced, is 64-bit, and nothing injected earlier is still under way on it.
Promises that every wait has a bound, and that on every path out the thread continues
with exactly the registers, signal mask and extended state it had.

Refuses (InjectionError, `started` False) any unsafe use, with the reason in plain words.
Refuses a process whose system call filters might answer one of our calls with a signal
(RefusedError), for as long as that process lives.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vmdedup.errors import InjectionError, RefusedError, StuckError, VmGoneError
from vmdedup.inject.filters import filtered
from vmdedup.inject.gadgets import Gadgets, find_gadgets
from vmdedup.inject.ptrace import NO_PERMISSION, Stop, Tracee
from vmdedup.inject.table import free_gap
from vmdedup.inject.threads import (
    ThreadId,
    call_name,
    current_call,
    refusal,
    stack_pointer,
    thread_status,
)
from vmdedup.inject.x86_64 import (
    FRAME_BYTES,
    RED_ZONE_BYTES,
    Registers,
    Thread,
    chain,
    chain_bytes,
    entering,
    extended_state,
    interrupted_call,
    restarts_after_sigreturn,
    resumed,
)
from vmdedup.linux import bounded
from vmdedup.linux.maps import Maps, Vma, read_maps
from vmdedup.linux.process import Process
from vmdedup.linux.realtime import urgent
from vmdedup.linux.syscall_batch import call_columns
from vmdedup.linux.syscalls import NR

Uint64s = npt.NDArray[np.uint64]
FaultPoint = Callable[[str], None]

HEADROOM_BYTES = 8192
"""Bytes left free on the stack below our own data: room for a signal frame."""

_STOP_REASONS = {
    Stop.SIGNAL: "a signal is being delivered to it",
    Stop.GROUP: "the process is stopped (SIGSTOP)",
}
_STOP_TIMEOUT_S = 2.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.0001, 0.005
_CLOCK_MONOTONIC = 1
_NOT_YET = b"\xff" * 16
"""Not a valid time, as nanoseconds are below a billion."""
_ELFCLASS64 = b"\x02"
_CODE_MOST_BYTES = 64 << 20
_GADGET_BYTES = 48
"""Bytes compared at each gadget; no gadget is longer."""

_Found = tuple[Gadgets, tuple[bytes, ...]]
"""Gadgets, and the code at their addresses."""

_found_in: dict[tuple[int, ...], _Found] = {}
"""Gadgets by file, as if its code began at address 0. All VMs run the same libc; reading and
searching it takes some 5 ms for each VM."""
_MOST_FILES = 16


class HangWatch(Protocol):
    """A watchdog that releases a held thread if we hang."""

    def watching(self) -> AbstractContextManager[object]:
        """Watch us in the block, while a thread may stand still because of us."""

    def beat(self) -> None:
        """Show that we live."""


class Unwatched:
    """A `Watch` that does nothing."""

    def watching(self) -> AbstractContextManager[object]:
        """Do nothing."""
        return nullcontext()

    def beat(self) -> None:
        """Do nothing."""


@dataclass
class Landmarks:
    """Facts of a process that do not change, so that they are searched for only once.

    Kept by a caller that borrows the process's thread repeatedly. The code is checked each
    time, since the process may execute another program. A stack or a gap that has changed
    makes a call fail, and is then searched for again.
    """

    gadgets: Gadgets | None = None
    code: tuple[bytes, ...] = ()
    """The bytes found at the gadgets."""
    stack: Vma | None = None
    thread: ThreadId | None = None
    """QEMU's RCU thread."""
    gap: int = 0
    """Address where scratch memory was put; `0`: none yet."""
    filters: tuple[str, str] = ("0", "")
    """Seccomp mode of the thread and its number of filters, when they were judged."""
    denial: str | None = None
    """Why calls would not pass the filters, `None` if they pass."""

    def forget(self) -> None:
        """Forget everything but the thread, so that it is searched for again."""
        self.gadgets, self.code, self.stack, self.gap = None, (), None, 0
        self.filters, self.denial = ("0", ""), None


class BorrowedThread:
    """One idle thread of another process.

    `hold` stops it; then exactly one of `release`, `start` or `run_on_stack`
    resumes it. `require_futex=False` accepts the thread in any state, which
    is for tests: a thread that is not idle may be in a restartable sequence or
    touch guest memory.
    """

    def __init__(
        self,
        process: Process,
        tid: int,
        *,
        require_futex: bool,
        hold_timeout_s: float,
        fault: FaultPoint,
        watch: HangWatch,
        landmarks: Landmarks,
    ) -> None:
        self._process = process
        self.tid = tid
        self._require_futex = require_futex
        self._hold_timeout_s = hold_timeout_s
        self._fault = fault
        self._watch = watch
        self._watched = ExitStack()
        self._tracee = Tracee(process.vm, process.pid, tid, beat=watch.beat)
        self._registers: Registers | None = None
        self._maps: Maps | None = None
        self.landmarks = landmarks
        self._stack_chain = range(0)
        self._end_mark = 0
        status = thread_status(process.vm, process.pid, tid)
        if (reason := refusal(status)) is not None:
            raise self.error(reason)
        self._require_64_bit()
        self.gadgets = self._known_gadgets() or self._find_gadgets()
        self._require_unfiltered(status)

    @property
    def maps(self) -> Maps:
        """The process' mappings, read when they are first needed."""
        if self._maps is None:
            self._maps = self._read_maps()
        return self._maps

    def survey(self) -> None:
        """Find all landmarks that are not known yet, without touching the thread."""
        self.free_gap()
        if self.landmarks.stack is None:
            sp = stack_pointer(self._process.pid, self.tid)
            self.landmarks.stack = None if sp is None else self._mapping_at(sp)

    def free_gap(self) -> int:
        """Address at which scratch memory may be put, see `table.free_gap`."""
        landmarks = self.landmarks
        landmarks.gap = landmarks.gap or free_gap(self.maps)
        return landmarks.gap

    def error(self, reason: str, *, started: bool = False) -> InjectionError:
        """An InjectionError about this process."""
        return InjectionError(self._process.vm, reason, pid=self._process.pid, started=started)

    @property
    def is_held(self) -> bool:
        """Whether the thread is stopped by us."""
        return self._registers is not None

    @property
    def registers(self) -> Registers:
        """Registers of the held thread."""
        if self._registers is None:
            raise RuntimeError("the thread is not held: call hold() first")
        return self._registers

    def _require_unfiltered(self, status: dict[str, str]) -> None:
        """Raise RefusedError if a system call filter may answer our calls with a denial.

        `status`: the thread's. Filters are never removed, so they are judged again only if
        their number changes.
        """
        filters = (status.get("Seccomp", "0"), status.get("Seccomp_filters", ""))
        landmarks = self.landmarks
        if filters != landmarks.filters:
            landmarks.denial = None if filters[0] == "0" else self._denied_by(filters[1])
            landmarks.filters = filters
        if landmarks.denial is not None:
            raise RefusedError(
                self._process.vm, landmarks.denial, pid=self._process.pid, key="seccomp"
            )

    def _denied_by(self, count: str) -> str | None:
        """Why the thread's `count` filters would deny our calls, `None` if they allow them."""
        with self._watch.watching(), urgent():
            try:
                # SAFETY: nothing is changed. Killed here: the thread continues, its call restarted.
                self._tracee.seize()
                self._require_ours()
                self._tracee.interrupt(_STOP_TIMEOUT_S)
                return filtered(self._process, self._tracee, count)
            finally:
                self._tracee.detach()

    # --- hold and release -------------------------------------------------------

    def hold(
        self,
        *,
        for_chain: bool,
        in_use: Callable[[], str | None] = lambda: None,
        still_there: Callable[[Registers], str | None] = lambda _: None,
    ) -> None:
        """Stop the thread where it may be borrowed; tries again until then, with a bound.

        `in_use` is called before attaching and `still_there` with the stopped
        thread's registers: both give the reason to wait, or `None`. `for_chain`
        also waits out calls that rt_sigreturn would cut short. Raises
        InjectionError, VmGoneError; the thread then continues as it was.
        """
        if self.is_held:
            raise RuntimeError("the thread is held already")
        deadline = time.monotonic() + self._hold_timeout_s
        pause_s = _FIRST_PAUSE_S
        while True:
            self._process.require_alive()
            reason = (
                in_use()
                or self._chain_runs()
                or self._not_idle()
                or self._try_hold(for_chain, still_there)
            )
            if reason is None:
                return
            if time.monotonic() >= deadline:
                raise self.error(f"thread {self.tid} could not be used: {reason}")
            # Interrupting again at once would keep the thread from making progress.
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _chain_runs(self) -> str | None:
        """The reason to wait if the chain on the stack runs, maybe below a signal handler."""
        if self._end_mark and self.read(self._end_mark, len(_NOT_YET)) == _NOT_YET:
            return "injected calls are still running"
        return None

    def _not_idle(self) -> str | None:
        """The reason to wait if /proc says that the thread is busy; does not disturb it."""
        if not self._require_futex:
            return None
        number = current_call(self._process.pid, self.tid)
        return None if number == NR.FUTEX else f"not idle ({call_name(number)})"

    def _try_hold(
        self, for_chain: bool, still_there: Callable[[Registers], str | None]
    ) -> str | None:
        """Stop the thread; returns the reason if it had to be resumed again, `None` if held."""
        self.release()  # of an earlier stop that came too late
        self._watched.enter_context(self._watch.watching())
        self._watched.enter_context(urgent())
        try:
            # SAFETY: attaching and stopping change nothing in the target. Killed
            # anywhere up to set_registers: the thread continues, its call is restarted.
            self._tracee.seize()
            self._require_ours()
            self._fault("seized")
            reason = self._examine(self._tracee.interrupt(_STOP_TIMEOUT_S), for_chain, still_there)
            self._fault("stopped")
        except BaseException:
            self.release()
            raise
        if reason is not None:
            self.release()
        return reason

    def _require_ours(self) -> None:
        """Raise unless the seized thread is the VM's: its number may have been reused.

        Seizing alone changes nothing, and `release` lets another process's thread go. If the
        thread is listed while its pinned process still lives, it has been the VM's all along.
        """
        is_listed = self._process.path(f"task/{self.tid}").exists()
        self._process.require_alive()
        if not is_listed:
            raise self.error(f"thread {self.tid} ended")

    def _examine(
        self, stop: Stop, for_chain: bool, still_there: Callable[[Registers], str | None]
    ) -> str | None:
        """The reason why the stopped thread cannot be used; if `None`, its registers are kept."""
        if stop is not Stop.TRAP:
            return _STOP_REASONS[stop]
        registers = self._tracee.registers()
        if self._require_futex and interrupted_call(registers) != NR.FUTEX:
            reason: str | None = "not idle (no longer in futex)"
        elif self.gadgets.in_chain(registers.rip) and registers.rsp in self._stack_chain:
            reason = "injected calls are still running"  # uncovered: they end in microseconds
        elif for_chain and not restarts_after_sigreturn(registers):
            reason = "in a timed wait that could not be resumed"
        else:
            reason = still_there(registers)
        if reason is None:
            self._stack_chain, self._end_mark = range(0), 0
            self._registers = registers
        return reason

    def release(self) -> None:
        """Resume the thread as it was; does nothing if it is not held."""
        self._registers = None
        try:
            self._tracee.detach()
        finally:
            self._watched.close()

    def start(self, registers: Registers) -> None:
        """Set the held thread's registers and resume it at once."""
        try:
            # SAFETY: one system call sets all registers, or none. Everything that they
            # lead to is in the target's memory, ends by itself and restores the
            # thread as it was. Killed before: nothing has happened. Killed after:
            # everything happens.
            self._tracee.set_registers(registers)
            self._fault("regs-set")
        finally:
            self.release()
        self._fault("detached")

    # --- the stack ---------------------------------------------------------------

    def require_stack(self, below_bytes: int) -> None:
        """Raise unless `below_bytes` may be written below the held thread's red zone."""
        lowest = self.registers.rsp - RED_ZONE_BYTES - below_bytes - HEADROOM_BYTES
        stack = self.landmarks.stack
        if stack is None or not stack.start <= lowest < stack.end:
            stack = self._mapping_at(self.registers.rsp)
        if stack is None or lowest < stack.start:
            self._maps = None  # it may have grown since
            stack = self._mapping_at(self.registers.rsp)
        if stack is None or not stack.permissions.startswith("rw"):
            raise self.error(f"thread {self.tid} has no usable stack")
        if lowest < stack.start:
            raise self.error(f"thread {self.tid} has too little stack left")
        self.landmarks.stack = stack

    def _mapping_at(self, address: int) -> Vma | None:
        around = self.maps.within(address, address + 1)
        return around.row(0) if len(around) else None

    def data_address(self, size_bytes: int) -> int:
        """Address where `run_on_stack` will put `size_bytes` bytes of data."""
        return (self.registers.rsp - RED_ZONE_BYTES - len(_NOT_YET) - size_bytes) & ~63

    def thread(self) -> Thread:
        """The state that a chain must restore at its end."""
        return Thread(
            registers=resumed(self.registers, keeps_restart_block=False),
            signal_mask=self._tracee.signal_mask(),
            extended_state=extended_state(self._tracee.extended_state()),
        )

    def run_on_stack(self, calls: Uint64s, data: bytes = b"") -> None:
        """Start these calls (n, 7) as a chain on the held thread's own stack.

        Returns at once, without results: look at the effects once `hold` succeeds
        again. `data` is at `data_address(len(data))` while the calls run.
        """
        with self._released_on_error():
            thread = self.thread()
            top = self.data_address(len(data))
            # The last call reads the clock into the mark. Nothing else changes the mark
            # before the chain has ended: a handler's stack is below the frames.
            mark = top + len(data)
            last = np.array(
                [[NR.CLOCK_GETTIME, _CLOCK_MONOTONIC, mark, 0, 0, 0, 0]], dtype=np.uint64
            )
            calls = np.concatenate([calls, last])
            base = (top - chain_bytes(len(calls), len(thread.extended_state), None)) & ~63
            self.require_stack(self.registers.rsp - base)
            frames = chain(base, calls, thread, self.gadgets)
            self.write(base, frames.ljust(top - base, b"\0") + data + _NOT_YET)
            self._fault("frames-written")
            self._stack_chain, self._end_mark = range(base, mark), mark
            target = entering(self.registers, self.gadgets.restorer, rsp=base)
        self.start(target)

    def start_chain(self, content: bytes) -> None:
        """Start a chain that lies elsewhere in the target; `content` as built for there.

        Its first frame is entered through a copy on the thread's own stack, so
        that an earlier signal finds room below.
        """
        with self._released_on_error():
            base = (self.registers.rsp - RED_ZONE_BYTES - FRAME_BYTES) & ~63
            self.require_stack(self.registers.rsp - base)
            self.write(base, content[:FRAME_BYTES])
            self._fault("entry-written")
            target = entering(self.registers, self.gadgets.restorer, rsp=base)
        self.start(target)

    @contextmanager
    def _released_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.release()
            raise

    # --- memory ---------------------------------------------------------------

    def write(self, address: int, content: bytes) -> None:
        """Write into the target."""
        local = np.frombuffer(content, dtype=np.uint8)
        # SAFETY: writes only below the red zone of the held thread's stack, which is
        # memory that nothing reads. Killed here: unused bytes there differ.
        if self._copied(NR.PROCESS_VM_WRITEV, local, [(address, len(content))]) != [len(content)]:
            raise self.error(f"thread {self.tid}: its stack could not be written")

    def read(self, address: int, size_bytes: int) -> bytes:
        """Read from the target; b"" if nothing is mapped there, short if only a part is."""
        return self.read_all([(address, size_bytes)])[0]

    def read_all(self, places: Sequence[tuple[int, int]]) -> list[bytes]:
        """As `read` for several (address, bytes), in one batch."""
        local = np.empty(sum(size_bytes for _, size_bytes in places), dtype=np.uint8)
        copied = self._copied(NR.PROCESS_VM_READV, local, places)
        found, first = [], 0
        for (_, size_bytes), count in zip(places, copied, strict=True):
            found.append(local[first : first + count].tobytes())
            first += size_bytes
        return found

    def _copied(
        self, call: NR, local: npt.NDArray[np.uint8], places: Sequence[tuple[int, int]]
    ) -> list[int]:
        """How many bytes were copied for each place; `0` if nothing is mapped there."""
        vm, pid = self._process.vm, self._process.pid
        theirs = np.array(places, dtype=np.uint64)
        ours = theirs.copy()
        ours[:, 0] = local.ctypes.data + np.cumsum(theirs[:, 1]) - theirs[:, 1]
        vector = np.arange(len(places)) * theirs.strides[0]
        here, there = ours.ctypes.data + vector, theirs.ctypes.data + vector
        rows = call_columns(call, pid, here, 1, there, 1, 0)
        try:
            copied = bounded.run(vm, pid, rows, ours, theirs, local)
        except StuckError as error:
            raise self.error(error.reason) from error
        if (copied == -errno.ESRCH).any():
            raise VmGoneError(vm, "the VM's process ended", pid=pid)
        if (copied == -errno.EPERM).any():
            raise self.error("its memory may not be accessed: Operation not permitted")
        counts: list[int] = copied.clip(min=0).tolist()
        return counts

    def _require_64_bit(self) -> None:
        try:
            with open(self._process.path("exe"), "rb") as file:
                elf_class = file.read(5)[4:]
        except PermissionError as error:
            raise self.error(NO_PERMISSION) from error
        except OSError as error:
            raise VmGoneError(
                self._process.vm, "the VM's process ended", pid=self._process.pid
            ) from error
        if elf_class != _ELFCLASS64:
            raise self.error("it is a 32-bit process")

    def _read_maps(self) -> Maps:
        try:
            return read_maps(self._process.vm, self._process.pid)
        except PermissionError as error:
            raise self.error(NO_PERMISSION) from error

    def _known_gadgets(self) -> Gadgets | None:
        """The gadgets found earlier, if their code is still there."""
        known = self.landmarks.gadgets
        if known is not None and self._code_at(known) == self.landmarks.code:
            return known
        self.landmarks.forget()
        return None

    def _code_at(self, gadgets: Gadgets) -> tuple[bytes, ...]:
        return tuple(self.read_all([(at, _GADGET_BYTES) for at in gadgets.addresses()]))

    def _find_gadgets(self) -> Gadgets:
        """Look in libc's code, else in the executable's own (a static program)."""
        try:
            executable = os.readlink(self._process.path("exe"))
        except FileNotFoundError as error:
            raise VmGoneError(
                self._process.vm, "the VM's process ended", pid=self._process.pid
            ) from error
        permissions, paths = self.maps.permissions, self.maps.path
        code = [
            self.maps.row(index)
            for index, may in enumerate(permissions)
            if may.startswith("r-x") and (_is_libc(paths[index]) or paths[index] == executable)
        ]
        for vma in sorted(code, key=lambda vma: not _is_libc(vma.path)):
            found = self._gadgets_of_file(vma) or self._searched(vma)
            if found is not None:
                self.landmarks.gadgets, self.landmarks.code = found
                return found[0]
        raise self.error("its libc has no signal restorer that could be used")

    def _gadgets_of_file(self, vma: Vma) -> _Found | None:
        """The gadgets that another process had in the same file, if the code here is equal."""
        known = _found_in.get(_file_of(vma))
        if known is None:
            return None
        gadgets, code = known[0].moved(vma.start), known[1]
        # The other process may have changed its copy, so the code must be equal here.
        return (gadgets, code) if self._code_at(gadgets) == code else None

    def _searched(self, vma: Vma) -> _Found | None:
        content = self.read(vma.start, min(vma.end - vma.start, _CODE_MOST_BYTES))
        gadgets = find_gadgets(0, content)
        if gadgets is None:
            return None
        # From the same read: a process that changes its code meanwhile must not mislead us
        # in another one.
        code = tuple(content[at : at + _GADGET_BYTES] for at in gadgets.addresses())
        while len(_found_in) >= _MOST_FILES:
            _found_in.pop(next(iter(_found_in)))
        _found_in[_file_of(vma)] = gadgets, code
        return gadgets.moved(vma.start), code


def _file_of(vma: Vma) -> tuple[int, ...]:
    return vma.device, vma.inode, vma.offset_bytes, vma.end - vma.start


def _is_libc(path: str) -> bool:
    name = os.path.basename(path)
    return name.startswith(("libc.so", "libc-", "ld-musl"))
