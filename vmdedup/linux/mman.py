"""Flags of mmap, mremap, madvise and memfd_create, as tables of raw calls need them.

Owns the numbers of x86-64 (include/uapi/asm-generic/mman-common.h, linux/mman.h, linux/memfd.h).
Most of these calls run inside another process, by number; Python's own `mmap` has only some of
the flags.
"""

from __future__ import annotations

PROT_READ = 0x1
PROT_READ_WRITE = 0x3
PROT_READ_EXEC = 0x5

MAP_SHARED = 0x01
MAP_PRIVATE = 0x02
MAP_FIXED = 0x10
MAP_ANONYMOUS = 0x20
MAP_NORESERVE = 0x4000
MAP_POPULATE = 0x8000
MAP_STACK = 0x2_0000
MAP_FIXED_NOREPLACE = 0x10_0000

MREMAP_MAYMOVE = 1
MREMAP_FIXED = 2
MREMAP_DONTUNMAP = 4

MADV_DONTFORK = 10
MADV_MERGEABLE = 12
MADV_HUGEPAGE = 14
MADV_NOHUGEPAGE = 15
MADV_DONTDUMP = 16
MADV_COLD = 20
MADV_PAGEOUT = 21
MADV_COLLAPSE = 25

MFD_CLOEXEC = 0x1
MFD_ALLOW_SEALING = 0x2
MFD_NOEXEC_SEAL = 0x8
MFD_EXEC = 0x10
