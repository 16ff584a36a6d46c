"""x86-64: registers and signal frames, as bytes.

Owns, with `stub`, everything that is specific to the architecture. Pure: nothing here
touches a process. There are two ways to run system calls, and both end by themselves
once a thread's registers point at them: the loop stub (`stub`), and

- a *sigreturn chain*: signal frames in memory. Each frame loads the registers of one
  call at a `syscall; ret`; the `ret` jumps to libc's rt_sigreturn, which loads
  the next frame. The last frame restores the thread as it was. Needs no executable
  memory. Frame layout: arch/x86/include/uapi/asm/sigcontext.h and
  asm-generic/ucontext.h; how the kernel reads it: arch/x86/kernel/signal_64.c.

Refuses nothing; the callers decide which threads may be changed.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vmdedup.inject.gadgets import Gadgets, StoreGadget
from vmdedup.linux.syscalls import NR

RED_ZONE_BYTES = 128
"""Size of the area below rsp that leaf functions use (System V ABI 3.2.2)."""

WORD = 8
_ALL_SIGNALS = 0xFFFF_FFFF_FFFF_FFFF
_USER_CS = 0x33

# Values that an interrupted call leaves in rax (include/linux/errno.h).
_ERESTARTSYS = -512
_ERESTARTNOINTR = -513
_ERESTARTNOHAND = -514
_ERESTART_RESTARTBLOCK = -516
_RESTARTS = (_ERESTARTSYS, _ERESTARTNOINTR, _ERESTARTNOHAND, _ERESTART_RESTARTBLOCK)
_SYSCALL_BYTES = 2

_FUTEX_WAIT_BITSET = 9
_FUTEX_COMMAND = 0x7F


# fmt: off
_REGISTER_NAMES = (
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx",
    "rsi", "rdi", "orig_rax", "rip", "cs", "rflags", "rsp", "ss", "fs_base", "gs_base",
    "ds", "es", "fs", "gs",
)
# fmt: on


class Registers(ctypes.Structure):
    """`struct user_regs_struct`, as PTRACE_GETREGSET NT_PRSTATUS gives it."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in _REGISTER_NAMES)
    r15: int
    r14: int
    r13: int
    r12: int
    rbp: int
    rbx: int
    r11: int
    r10: int
    r9: int
    r8: int
    rax: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    orig_rax: int
    rip: int
    cs: int
    rflags: int
    rsp: int
    ss: int
    fs_base: int
    gs_base: int
    ds: int
    es: int
    fs: int
    gs: int

    def copy(self) -> Registers:
        """An independent copy."""
        return Registers.from_buffer_copy(self)

    @property
    def is_64_bit(self) -> bool:
        """Whether the thread runs 64-bit code right now."""
        return self.cs == _USER_CS


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def interrupted_call(registers: Registers) -> int | None:
    """The system call that was interrupted and will restart, else `None`."""
    if _signed(registers.orig_rax) >= 0 and _signed(registers.rax) in _RESTARTS:
        return registers.orig_rax
    return None


def waits_with_timeout(registers: Registers) -> bool:
    """Whether the interrupted call can continue only by restart_syscall(2)."""
    return (
        interrupted_call(registers) is not None and _signed(registers.rax) == _ERESTART_RESTARTBLOCK
    )


def restarts_after_sigreturn(registers: Registers) -> bool:
    """Whether the interrupted call continues correctly after an rt_sigreturn.

    rt_sigreturn drops the state that restart_syscall(2) needs ("always make any
    pending restarted system calls return -EINTR", arch/x86/kernel/signal_64.c),
    so a relative timeout is lost. FUTEX_WAIT_BITSET takes an absolute timeout, so
    repeating the call is the same wait. Every other restart repeats the call anyway.
    """
    return not waits_with_timeout(registers) or _is_absolute_futex(registers)


def _is_absolute_futex(registers: Registers) -> bool:
    return registers.orig_rax == NR.FUTEX and registers.rsi & _FUTEX_COMMAND == _FUTEX_WAIT_BITSET


def resumed(registers: Registers, *, keeps_restart_block: bool) -> Registers:
    """The registers with which the thread continues as if nothing had happened.

    Makes the changes that the kernel makes when it leaves an interrupted call
    (arch_do_signal_or_restart). `keeps_restart_block` is `False` if the thread
    will pass through rt_sigreturn; see `restarts_after_sigreturn`.
    """
    result = registers.copy()
    result.orig_rax = _ALL_SIGNALS  # -1: in no system call
    if interrupted_call(registers) is None:
        return result
    result.rip -= _SYSCALL_BYTES
    result.rax = registers.orig_rax
    if waits_with_timeout(registers) and keeps_restart_block:
        result.rax = NR.RESTART_SYSCALL
    return result


# --- signal frames ---------------------------------------------------------------

FRAME_WORDS = 38
"""Size of `struct ucontext` up to and including the signal mask, in words of 8 bytes."""
FRAME_BYTES = FRAME_WORDS * WORD

_UC_FLAGS = 0x7  # UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS
_STACK_FLAGS = 3
# fmt: off
_CONTEXT = (
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rdi", "rsi", "rbp", "rbx",
    "rdx", "rax", "rcx", "rsp", "rip", "rflags",
)
# fmt: on
_WORD_OF = {name: 5 + index for index, name in enumerate(_CONTEXT)}
_SEGMENTS, _FPSTATE, _SIGMASK = 23, 28, 37
_ARGUMENTS = ("rax", "rdi", "rsi", "rdx", "r10", "r8", "r9")

FXSAVE_BYTES = 512
_SW_BYTES_AT = 464
_MAGIC1, _MAGIC2 = 0x46505853, 0x46505845
_XTILEDATA, _XTILEDATA_BYTES = 1 << 18, 8192
_XSTATE_ALIGNMENT = 64


def frame(registers: Registers, signal_mask: int, fpstate: int) -> npt.NDArray[np.uint64]:
    """One signal frame, uint64 of shape (FRAME_WORDS,).

    `fpstate` is the address of the extended state, `0` to initialise it. The
    alternate signal stack stays as it is: its flags are SS_ONSTACK and SS_DISABLE
    at once, which sigaltstack refuses, and rt_sigreturn ignores that refusal
    (restore_altstack in kernel/signal.c: "squash all but EFAULT").
    """
    words = np.zeros(FRAME_WORDS, dtype=np.uint64)
    words[0] = _UC_FLAGS
    words[3] = _STACK_FLAGS
    for name, index in _WORD_OF.items():
        words[index] = getattr(registers, name)
    words[_SEGMENTS] = registers.cs | registers.gs << 16 | registers.fs << 32 | registers.ss << 48
    words[_FPSTATE] = fpstate
    words[_SIGMASK] = signal_mask
    return words


def extended_state(xsave: bytes) -> bytes:
    """The answer of `Tracee.extended_state` in the form of a signal frame.

    Adds `struct _fpx_sw_bytes` and both magic numbers. Tile data is left out
    unless it is in use: the kernel would refuse a size that the thread has no
    permission for, and then restore SSE only.

    Without XSAVE a frame has the plain FXSAVE area: rt_sigreturn then reads no magic and
    passes the 512 bytes to FXRSTOR (__fpu_restore_sig and restore_fpregs_from_user in
    arch/x86/kernel/fpu/signal.c). rt_sigreturn does not read the flag UC_FP_XSTATE.
    """
    if len(xsave) == FXSAVE_BYTES:
        return xsave
    (features,) = struct.unpack_from("<Q", xsave, _SW_BYTES_AT)
    (in_use,) = struct.unpack_from("<Q", xsave, FXSAVE_BYTES)
    size = len(xsave)
    if features & _XTILEDATA and not in_use & _XTILEDATA:
        features &= ~_XTILEDATA
        size -= _XTILEDATA_BYTES
    state = bytearray(xsave[:size])
    struct.pack_into("<IIQI28x", state, _SW_BYTES_AT, _MAGIC1, size + 4, features, size)
    return bytes(state) + struct.pack("<I", _MAGIC2)


@dataclass(frozen=True)
class Thread:
    """The state that a chain must restore: registers as `resumed`, mask, extended state."""

    registers: Registers
    signal_mask: int
    extended_state: bytes


def chain_bytes(calls: int, extended_state_bytes: int, store: StoreGadget | None) -> int:
    """Most bytes that `chain` needs, at any alignment."""
    unit = _unit_words(store) * WORD
    return calls * unit + FRAME_BYTES + _XSTATE_ALIGNMENT + extended_state_bytes


def chain(
    base: int,
    calls: npt.NDArray[np.uint64],
    thread: Thread,
    gadgets: Gadgets,
    slots: Sequence[int] | None = None,
) -> bytes:
    """A chain of calls (n, 7) that ends as `thread`, to be written at `base`.

    An rt_sigreturn with rsp = `base` starts it. All signals are blocked from
    then until the last frame. With `slots` each call's result is stored at its
    slot's address in the target (needs `gadgets.store`), else results are dropped.
    """
    store = gadgets.store if slots is not None else None
    unit = _unit_words(store)
    entry = thread.registers.copy()
    entry.rip = gadgets.syscall_ret
    words = np.zeros((len(calls), unit), dtype=np.uint64)
    words[:, :FRAME_WORDS] = frame(entry, _ALL_SIGNALS, 0)
    for column, name in enumerate(_ARGUMENTS):
        words[:, _WORD_OF[name]] = calls[:, column]
    starts = base + np.arange(len(calls), dtype=np.uint64) * np.uint64(unit * WORD)
    words[:, _WORD_OF["rsp"]] = starts + np.uint64(FRAME_BYTES)
    words[:, -1] = gadgets.restorer
    if store is not None and slots is not None:
        # Unsigned arithmetic wraps as the processor's addressing does.
        displacement = np.uint64(store.displacement & _ALL_SIGNALS)
        words[:, _WORD_OF[store.base]] = np.array(slots, dtype=np.uint64) - displacement
        words[:, FRAME_WORDS] = store.address
    last = base + words.nbytes
    fpstate = -(-(last + FRAME_BYTES) // _XSTATE_ALIGNMENT) * _XSTATE_ALIGNMENT
    end = frame(thread.registers, thread.signal_mask, fpstate).tobytes()
    padding = bytes(fpstate - last - FRAME_BYTES)
    return words.tobytes() + end + padding + thread.extended_state


def _unit_words(store: StoreGadget | None) -> int:
    """Words of one frame and of the stack behind it that its `ret`s take."""
    return FRAME_WORDS + (1 if store is None else 2 + store.skipped_words)


def entering(registers: Registers, rip: int, *, rsp: int | None = None) -> Registers:
    """Registers with which the thread runs at `rip`, outside of any system call."""
    result = registers.copy()
    result.orig_rax = _ALL_SIGNALS
    result.rax = 0
    result.rip = rip
    if rsp is not None:
        result.rsp = rsp
    return result
