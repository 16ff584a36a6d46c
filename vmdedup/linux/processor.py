"""The processor's features, by the kernel's names (/proc/cpuinfo). Reads only."""

from __future__ import annotations

from vmdedup.linux.proc_file import read_record

X86_64_V2 = frozenset(("cx16", "lahf_lm", "pni", "popcnt", "sse4_1", "sse4_2", "ssse3"))
"""Features that the x86-64 psABI adds at its level v2; the kernel calls SSE3 `pni`."""


def processor_flags() -> frozenset[str]:
    """Flags of the first processor; empty if the kernel names none. Raises OSError."""
    for line in read_record("/proc/cpuinfo").splitlines():
        name, _, words = line.partition(":")
        if name.strip() == "flags":
            return frozenset(words.split())
    return frozenset()
