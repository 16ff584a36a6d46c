"""Whether a process's system call filters allow the calls that we run inside it.

Owns the list of those calls, and a small interpreter of the kernel's filter programs
(classic BPF over `struct seccomp_data`). For the kernel an injected call is the process's own:
a filter's answer KILL ends the VM. So the filters are run on each call of the list before the
first injection. Pure: `ptrace` reads the filters.

Promises never to say that a call passes if it may not. Values that differ from call to call
(addresses, lengths, descriptors) are unknown here. If a filter branches on one, both ways
are followed, and the strictest answer counts, as it does among several filters
(kernel/seccomp.c: seccomp_run_filters).
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from vmdedup.linux.syscalls import NR

ARCH_X86_64 = 0xC000_003E
"""AUDIT_ARCH_X86_64 (include/uapi/linux/audit.h)."""

_ACTION = 0xFFFF_0000
_ALLOW, _LOG, _ERRNO = 0x7FFF_0000, 0x7FFC_0000, 0x0005_0000
_ACTION_NAMES = {
    0x8000_0000: "KILL_PROCESS",
    0x0000_0000: "KILL_THREAD",
    0x0003_0000: "TRAP",
    _ERRNO: "ERRNO",
    0x7FC0_0000: "USER_NOTIF",
    0x7FF0_0000: "TRACE",
    _LOG: "LOG",
    _ALLOW: "ALLOW",
}
"""include/uapi/linux/seccomp.h: SECCOMP_RET_*."""


@dataclass(frozen=True)
class Call:
    """A call that a session may run. `arguments`: the first ones; `None` or absent: any value."""

    number: NR
    arguments: tuple[int | None, ...] = ()
    may_fail: bool = False
    """Whether a session has another way if the filter answers ERRNO."""

    @property
    def name(self) -> str:
        """The name of the system call."""
        return self.number.name.lower()

    def covers(self, row: Sequence[int]) -> bool:
        """Whether a row (number, then its arguments) is such a call."""
        return row[0] == self.number and all(
            wanted is None or wanted == found
            for wanted, found in zip(self.arguments, row[1:], strict=False)
        )


def _calls() -> Iterator[Call]:
    read, write, executable = 1, 2, 4
    shared, private, fixed, anonymous = 0x01, 0x02, 0x10, 0x20
    no_reserve, populate, stack, no_replace = 0x4000, 0x8000, 0x2_0000, 0x10_0000
    # Making and removing scratch memory (scratch, remote). Older kernels take other flags for
    # both files. Without executable memory calls run as a chain, which is slower.
    for flags in (0x3, 0xB):
        yield Call(NR.MEMFD_CREATE, (None, flags))
    yield Call(NR.MEMFD_CREATE, (None, 0x13), may_fail=True)
    yield Call(NR.MMAP, (None, None, read | write, shared | no_replace, None, 0))
    code = (None, None, read | executable, private | no_replace, None, 0)
    yield Call(NR.MMAP, code, may_fail=True)
    yield Call(NR.MREMAP, (None, 0, None, 1))
    yield Call(NR.MUNMAP)
    yield Call(NR.CLOSE)
    yield Call(NR.FCNTL, (None, fcntl.F_DUPFD_CLOEXEC, 1))
    # The first and last calls of batches. The call that the thread then resumes is its own.
    yield Call(NR.CLOCK_GETTIME, (1,))
    yield Call(NR.GETPID)
    yield Call(NR.FUTEX, (None, 1, 0x7FFF_FFFF))
    yield Call(NR.RECVMSG, (None, None, 0x4000_0000))
    yield Call(NR.RT_SIGRETURN)
    yield Call(NR.RESTART_SYSCALL)
    # The userfaultfd (take_userfaultfd): from the device if this call fails.
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    yield Call(NR.USERFAULTFD, (flags,), may_fail=True)
    yield Call(NR.IOCTL, (None, 0xAA00, flags))
    # Merging (merge, compare), unmerging (unmerge), and setting QEMU's flags again (advice).
    # If the filter denies mbind, QEMU has set no policy either.
    protection = read | write
    for flags in (no_reserve, no_reserve | stack, anonymous, 0):
        yield Call(NR.MMAP, (None, None, protection, private | fixed | flags))
    for flags in (shared | fixed, shared | fixed | populate):
        yield Call(NR.MMAP, (None, None, protection, flags))
    yield Call(NR.MMAP, (None, None, read, shared | fixed, None, 0))
    yield Call(NR.MREMAP, (None, None, None, 7))
    for advice in (10, 12, 14, 15, 16):
        yield Call(NR.MADVISE, (None, None, advice))
    for mode in (1, 2, 3):
        yield Call(NR.MBIND, (None, None, mode, None, 65, 0), may_fail=True)


CALLS = tuple(_calls())
"""Every system call that any session may run inside a process."""


@lru_cache(maxsize=64)
def denial(filters: tuple[bytes, ...]) -> str | None:
    """The first of `CALLS` that these filters deny, and their answer; `None` if all pass.

    `filters`: programs as arrays of `struct sock_filter`. The VMs of a host mostly have
    the same filters, so the last answers are cached.
    """
    for call in CALLS:
        action = strictest(filters, call)
        if action not in (_ALLOW, _LOG) and not (call.may_fail and action == _ERRNO):
            return f"{call.name} with {_ACTION_NAMES.get(action, 'KILL_PROCESS')}"
    return None


def strictest(filters: Sequence[bytes], call: Call) -> int:
    """The worst action that the kernel may take on the call: one of SECCOMP_RET_*."""
    worst = _ALLOW
    for program in filters:
        try:
            answers = possible_answers(program, call)
        except UndecidableError:
            return 0x8000_0000
        for answer in answers:
            worst = min(worst, answer & _ACTION, key=_as_signed)
    return worst


def _as_signed(action: int) -> int:
    """The action as a signed number: KILL_PROCESS, the strictest, alone has the sign bit."""
    return action - (1 << 32) if action >> 31 else action


# --- the interpreter --------------------------------------------------------------

_WORD = 0xFFFF_FFFF
_DATA_BYTES = 64
"""sizeof(struct seccomp_data): nr, arch, instruction_pointer, six arguments."""
_ARGUMENTS_AT = 16
_MEMORY_WORDS = 16
_MOST_STATES = 50_000

# Instruction classes and modes (include/uapi/linux/bpf_common.h).
_LD, _LDX, _ST, _STX, _ALU, _JMP, _RET, _MISC = range(8)
_IMM, _ABS, _MEM, _LEN = 0x00, 0x20, 0x60, 0x80
_BY_X = 0x08
_RETURNS_A = 0x10
_TXA = 0x80
_JA = 0x00
_JUMPS = {
    0x10: lambda a, b: a == b,
    0x20: lambda a, b: a > b,
    0x30: lambda a, b: a >= b,
    0x40: lambda a, b: a & b != 0,
}
_DIV, _NEG = 0x30, 0x80
_ARITHMETIC = {
    0x00: lambda a, b: a + b,
    0x10: lambda a, b: a - b,
    0x20: lambda a, b: a * b,
    _DIV: lambda a, b: a // b,
    0x40: lambda a, b: a | b,
    0x50: lambda a, b: a & b,
    0x60: lambda a, b: a << (b & 31),
    0x70: lambda a, b: a >> (b & 31),
    0xA0: lambda a, b: a ^ b,
}

Word = int | None
"""A 32-bit value, `None` if it is not known."""

_Instruction = tuple[int, int, int, int]
"""`struct sock_filter`: code, jt, jf, k."""


class UndecidableError(ValueError):
    """The program cannot be followed: it is invalid, or has too many paths."""


class _State(NamedTuple):
    at: int
    a: Word
    x: Word
    memory: tuple[Word, ...]


def possible_answers(program: bytes, call: Call) -> frozenset[int]:
    """Every value that the program may return for the call. Raises UndecidableError."""
    instructions = list(struct.iter_unpack("=HBBI", program))
    data = _data_of(call)
    answers: set[int] = set()
    waiting = [_State(0, 0, 0, (0,) * _MEMORY_WORDS)]
    seen: set[_State] = set()
    while waiting:
        state = waiting.pop()
        if state in seen:
            continue
        seen.add(state)
        if not state.at < len(instructions) or len(seen) > _MOST_STATES:
            raise UndecidableError("no valid filter, or too many ways through it")
        instruction = instructions[state.at]
        if (answer := _returned(instruction, state)) is not None:
            answers.add(answer)
        else:
            waiting += _step(instruction, state, data)
    return frozenset(answers)


def _data_of(call: Call) -> dict[int, Word]:
    """`struct seccomp_data` by offset; the instruction pointer is not known."""
    data: dict[int, Word] = dict.fromkeys(range(0, _DATA_BYTES, 4))
    data[0], data[4] = int(call.number), ARCH_X86_64
    for index, value in enumerate(call.arguments):
        if value is not None:
            low = _ARGUMENTS_AT + 8 * index
            data[low], data[low + 4] = value & _WORD, value >> 32 & _WORD
    return data


def _returned(instruction: _Instruction, state: _State) -> int | None:
    """The value that the program returns here; `None` if it continues."""
    code, _, _, k = instruction
    if code & 0x07 == _ALU and code & 0xF0 == _DIV and code & _BY_X and state.x == 0:
        return 0  # net/core/filter.c: bpf_convert_filter
    if code & 0x07 != _RET:
        return None
    if not code & _RETURNS_A:
        return k
    if state.a is None:
        raise UndecidableError("it returns what is not known here")
    return state.a


def _step(instruction: _Instruction, state: _State, data: dict[int, Word]) -> list[_State]:
    """The states that may follow."""
    code, if_true, if_false, k = instruction
    kind, by = code & 0x07, state.x if code & _BY_X else k
    after = state._replace(at=state.at + 1)
    if kind == _JMP:
        return _jumped(code & 0xF0, by, (k, if_true, if_false), after)
    if kind in (_ST, _STX):
        memory = list(state.memory)
        memory[_slot(k)] = state.a if kind == _ST else state.x
        return [after._replace(memory=tuple(memory))]
    if kind == _MISC:
        return [after._replace(a=state.x) if code & _TXA else after._replace(x=state.a)]
    if kind == _ALU:
        return [after._replace(a=_computed(code & 0xF0, state.a, by))]
    value = _loaded(code & 0xE0, k, state, data)
    return [after._replace(a=value) if kind == _LD else after._replace(x=value)]


def _slot(k: int) -> int:
    if k >= _MEMORY_WORDS:
        raise UndecidableError("no such word of memory")
    return k


def _loaded(mode: int, k: int, state: _State, data: dict[int, Word]) -> Word:
    if mode == _IMM:
        return k
    if mode == _LEN:
        return _DATA_BYTES
    if mode == _MEM:
        return state.memory[_slot(k)]
    if mode != _ABS or k not in data:
        raise UndecidableError("no such load")
    return data[k]


def _computed(operation: int, a: Word, by: Word) -> Word:
    if operation == _NEG:
        return None if a is None else -a & _WORD
    if operation not in _ARITHMETIC or (operation == _DIV and by in (None, 0)):
        raise UndecidableError("no such operation, or a division by what is not known here")
    return None if a is None or by is None else _ARITHMETIC[operation](a, by) & _WORD


def _jumped(operation: int, by: Word, targets: tuple[int, int, int], after: _State) -> list[_State]:
    always, if_true, if_false = targets
    if operation == _JA:
        return [after._replace(at=after.at + always)]
    if operation not in _JUMPS:
        raise UndecidableError("no such jump")
    ways = [after._replace(at=after.at + way) for way in (if_true, if_false)]
    if after.a is None or by is None:
        return ways
    return [ways[0 if _JUMPS[operation](after.a, by) else 1]]
