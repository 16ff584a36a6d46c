"""Code that every program has, found in another process and used in place.

Owns the byte patterns of a system call, of a signal return and of a store. Reads bytes
only. Without the store a chain cannot deliver results; the stub needs only the other two.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

_WORD_BYTES = 8

_SYSCALL_RET = b"\x0f\x05\xc3"
_RESTORER = bytes.fromhex("48c7c00f0000000f05")
"""`mov $15, %rax; syscall`: what every libc passes as sa_restorer."""

# mov %rax, disp8(%base) for a base that no system call takes or clobbers, then
# only pops, `add $n, %rsp` and `xor %eax, %eax`, then ret.
_STORE = re.compile(
    rb"(?P<store>\x48\x89(?:\x03|[\x43\x45].)|\x49\x89(?:\x04\x24|\x44\x24.|[\x45-\x47].|[\x06\x07]))"
    rb"(?P<tail>(?:[\x58-\x5b\x5d-\x5f]|\x41[\x58-\x5f]|\x31\xc0"
    rb"|\x48\x83\xc4[\x08\x10\x18\x20\x28\x30\x38\x40]){0,6})\xc3",
    re.DOTALL,
)
_LOW_BASES = {3: "rbx", 5: "rbp"}
_HIGH_BASES = {4: "r12", 5: "r13", 6: "r14", 7: "r15"}
_ONE_BYTE_POPS = range(0x58, 0x60)


@dataclass(frozen=True)
class StoreGadget:
    """Code that stores rax at `base` + `displacement`, drops `skipped_words`, returns."""

    address: int
    base: str
    displacement: int
    skipped_words: int


@dataclass(frozen=True)
class Gadgets:
    """Addresses of instructions in the target's own code."""

    syscall_ret: int
    restorer: int
    store: StoreGadget | None
    """The store, `None` if there is no such code; only the fallback, the chain, needs it."""

    def moved(self, by: int) -> Gadgets:
        """The same gadgets in code that begins `by` bytes higher."""
        store = self.store
        if store is not None:
            store = replace(store, address=store.address + by)
        return Gadgets(self.syscall_ret + by, self.restorer + by, store)

    def addresses(self) -> list[int]:
        """The address of each gadget."""
        store = [] if self.store is None else [self.store.address]
        return [self.syscall_ret, self.restorer, *store]

    def in_chain(self, rip: int) -> bool:
        """Whether `rip` is inside a gadget, as in a thread that runs a chain."""
        if 0 <= rip - self.syscall_ret <= len(_SYSCALL_RET):
            return True
        if 0 <= rip - self.restorer <= len(_RESTORER):
            return True
        return self.store is not None and 0 <= rip - self.store.address < 32


def find_gadgets(address: int, code: bytes) -> Gadgets | None:
    """Look in `code`, mapped executable at `address`; `None` if a needed gadget is missing."""
    syscall_ret, restorer = code.find(_SYSCALL_RET), code.find(_RESTORER)
    if syscall_ret < 0 or restorer < 0:
        return None
    store = _STORE.search(code)
    found = Gadgets(syscall_ret, restorer, _store_gadget(store) if store else None)
    return found.moved(address)


def _store_gadget(match: re.Match[bytes]) -> StoreGadget:
    store, tail = match["store"], match["tail"]
    mod, low = store[2] >> 6, store[2] & 7
    bases = _LOW_BASES if store[0] == 0x48 else _HIGH_BASES
    displacement = int.from_bytes(store[-1:], signed=True) if mod == 1 else 0
    skipped, at = 0, 0
    while at < len(tail):
        if tail[at] in _ONE_BYTE_POPS:
            skipped, at = skipped + 1, at + 1
        elif tail[at] == 0x41:
            skipped, at = skipped + 1, at + 2
        elif tail[at] == 0x48:
            skipped, at = skipped + tail[at + 3] // _WORD_BYTES, at + 4
        else:
            at += 2  # xor %eax, %eax
    return StoreGadget(match.start(), bases[low], displacement, skipped)
