"""What our processes take: their own memory, not the store's that they have mapped."""

from __future__ import annotations

import mmap

from vmdedup.linux.smaps import process_pss_bytes
from vmdedup.units import MIB

_MOST_NOISE_BYTES = 4 * MIB


def _filled(flags: int) -> mmap.mmap:
    memory = mmap.mmap(-1, 32 * MIB, flags=flags)
    memory.write(b"\x01" * len(memory))
    return memory


def test_own_memory_counts() -> None:
    before = process_pss_bytes()
    with _filled(mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS):
        assert process_pss_bytes() - before >= 32 * MIB - _MOST_NOISE_BYTES


def test_shared_memory_is_somebody_elses() -> None:
    before = process_pss_bytes()
    with _filled(mmap.MAP_SHARED | mmap.MAP_ANONYMOUS):
        assert abs(process_pss_bytes() - before) <= _MOST_NOISE_BYTES


def test_a_process_that_is_gone_takes_nothing() -> None:
    assert process_pss_bytes(2**22) == 0
