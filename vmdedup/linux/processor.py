"""What the processor can, by the kernel's names for it (/proc/cpuinfo). Reads only."""

from __future__ import annotations

from vmdedup.linux.proc_file import read_record

X86_64_V2 = frozenset(("cx16", "lahf_lm", "pni", "popcnt", "sse4_1", "sse4_2", "ssse3"))
"""What the x86-64 psABI adds at its level v2; SSE3 is `pni` in the kernel's words."""


def processor_flags() -> frozenset[str]:
    """Of the first processor; empty where the kernel names none. Raises OSError."""
    for line in read_record("/proc/cpuinfo").splitlines():
        name, _, words = line.partition(":")
        if name.strip() == "flags":
            return frozenset(words.split())
    return frozenset()
