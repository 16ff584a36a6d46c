"""The loop stub: machine code that runs a table of calls on a thread inside QEMU.

Owns its bytes, and the parts of the table's layout that the code contains. It is
position-independent x86-64 code that takes rows from a table right behind its page and
restores the thread's registers from that table's header. It ends by itself, without
rt_sigreturn. Until its last instructions it does not use the stack. Pure: nothing here
touches a process.

With a guard (see `guard`): receive it, or begin no call. For each row while CANCEL
is 0: run the call, store the result; end early if the result is below the value that
was in its place (its floor). Then close the guard, set END and DONE, wake the futex. If the
thread is kept, do the same again when the next guard comes. Once none comes, restore all
registers from the header. rip and the flags go through the stack below the red zone,
so that a signal at any instant finds a valid stack. BUSY is cleared when only
`ret 128` is left, which no longer needs the table.

A negative number in a row is not a system call: `COMPARE` and `DIGEST` read pages in place,
see `in_place`. They use eight vector registers (SSE2, which every x86-64 has) and restore
them before the next row; the upper halves of AVX stay as they are. `GUARD_IOCTL` is an ioctl
on the received guard; the row has its number in the third word.

JUSTIFICATION beside the chain (`x86_64`), which builds the memory that the stub needs: only
the stub begins no call without its guard. With chains alone every VM would be merged in pauses
(`remap.borrowed_thread.NO_STUB` says why), in 2.4 times the time and 3.0 times the CPU, and
unmerged in 3.7 times the time (`python -m tests.benchmark.ways`, four frozen Debian guests).
All users lose without it. Without the chain, hosts that deny QEMU executable memory (SELinux,
MemoryDenyWriteExecute=) lose: nothing would be merged there.
"""

from __future__ import annotations

from vmdedup.inject.x86_64 import RED_ZONE_BYTES, WORD

COMPARE, DIGEST, GUARD_IOCTL = -1, -2, -3
"""Values of a row's first word in place of a system call's number."""

# fmt: off
SAVED_REGISTERS = (
    "rip", "rflags", "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)
# fmt: on
"""Order in the table's header from which the stub restores them."""

STUB_STACK_BYTES = RED_ZONE_BYTES + 2 * WORD
"""How far below rsp the stub writes."""

STUB = bytes.fromhex(
    "833dd9100000007c34c70535110000ffffffff48c705f2100000180000008b3dbc100000488d35bd100000ba"
    "00000040b82f0000000f054883f8fc74cc488d1dbc110000488b2d85100000833d8e100000007c15833ded10"
    "0000007d0cc7057110000000000000eb42833db00f0000007539488b03488b7b08488b7310488b53184c8b53"
    "204c8b43284c8b4b304885c00f88e40000000f05483b433848894338488d5b407c054839eb75be8b3d971000"
    "0085ff7807b8030000000f0548891d650f0000c7054b0f000001000000b8ca000000488d3d3f0f0000be0100"
    "0000baffffff7f0f05833dec0f0000000f8517ffffff488d642480ff35430f0000ff35450f00009d488b0545"
    "0f0000488b1d460f0000488b0d470f0000488b15480f0000488b35490f0000488b3d4a0f0000488b2d4b0f00"
    "004c8b054c0f00004c8b0d4d0f00004c8b154e0f00004c8b1d4f0f00004c8b25500f00004c8b2d510f00004c"
    "8b35520f00004c8b3d530f0000c705990e000000000000c280004883f8fd75128b3dc20f0000b8100000000f"
    "05e906ffffff0f1105e70f00000f110df00f00000f1115f90f00000f111d021000000f11250b1000000f112d"
    "141000000f11351d1000000f113d261000004883f8ff0f858100000031c041b801000000660fefc04989f1b9"
    "40000000660f6f0f660f6f5710660f6f5f20660f6f673066410fef0966410fef511066410fef592066410fef"
    "6130660febca660febdc660febc1660febc34883c7404983c140ffc975ba660fefc9660f74c1660fd7c881f9"
    "ffff000074034c09c04d01c04c01d648ffca758ce910030000b8b179379e660f6ef8660f70ff004d8d8a8000"
    "0000f3410f6f82c0000000f3410f6f8ad0000000f3410f6f92e0000000f3410f6f9af00000004c89d0b93f00"
    "0000660f6f27f30f6f28660fefec660f70f531660ff4ee660f70e44e660fd4c4660fd4c5660f6f6710f30f6f"
    "6810660fefec660f70f531660ff4ee660f70e44e660fd4cc660fd4cd660f6f6720f30f6f6820660fefec660f"
    "70f531660ff4ee660f70e44e660fd4d4660fd4d5660f6f6730f30f6f6830660fefec660f70f531660ff4ee66"
    "0f70e44e660fd4dc660fd4dd4883c7404883c008ffc90f84d10000004c39c80f8559ffffff660f6fe0660f73"
    "d42f660fefc4f3410f6fa280000000660fefc4660f70e831660ff4c7660ff4ef660f73f520660fd4c5660f6f"
    "e1660f73d42f660fefccf3410f6fa290000000660fefcc660f70e931660ff4cf660ff4ef660f73f520660fd4"
    "cd660f6fe2660f73d42f660fefd4f3410f6fa2a0000000660fefd4660f70ea31660ff4d7660ff4ef660f73f5"
    "20660fd4d5660f6fe3660f73d42f660fefdcf3410f6fa2b0000000660fefdc660f70eb31660ff4df660ff4ef"
    "660f73f520660fd4dd4c89d0e991feffff498d4279660f6f27f30f6f28660fefec660f70f531660ff4ee660f"
    "70e44e660fd4c4660fd4c5660f6f6710f30f6f6810660fefec660f70f531660ff4ee660f70e44e660fd4cc66"
    "0fd4cd660f6f6720f30f6f6820660fefec660f70f531660ff4ee660f70e44e660fd4d4660fd4d5660f6f6730"
    "f30f6f6830660fefec660f70f531660ff4ee660f70e44e660fd4dc660fd4dd4883c74049bb0070a8bc5e189b"
    "77f3410f6f620b660fefc466480f7ec0660f6dc066490f7ec049f7e04831d04901c3f3410f6f621b660fefcc"
    "66480f7ec8660f6dc966490f7ec849f7e04831d04901c3f3410f6f622b660fefd466480f7ed0660f6dd26649"
    "0f7ed049f7e04831d04901c3f3410f6f623b660fefdc66480f7ed8660f6ddb66490f7ed849f7e04831d04901"
    "c34c89d848c1e8254931c348b8f979379e916756164c0fafd84c89d848c1e8204931c3488b43184c89184883"
    "c0084889431848ffce0f8507fdffff31c00f1005140c00000f100d1d0c00000f1015260c00000f101d2f0c00"
    "000f1025380c00000f102d410c00000f10354a0c00000f103d530c0000e9f6faffff"
)
"""Its source is tests/process/stub.S, which the tests assemble and compare."""
