"""Keeping huge pages out of remapped memory.

A merged run of zeroes has no page until the guest writes. Then the kernel may allocate a huge
page for one byte (mm/memory.c: alloc_anon_folio), and khugepaged may collapse written pages
with all the unwritten ones around them (mm/khugepaged.c: max_ptes_none). Neither happens to
mappings with VM_NOHUGEPAGE. Store pages need it less: a write to one takes one page in any
case (mm/memory.c: do_cow_fault).

Owns the way to tell this kernel: by mmap itself, or by one more call for each run of zeroes.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from dataclasses import dataclass
from functools import cache

from vmdedup.linux import mman
from vmdedup.linux.smaps import flagged_vmas
from vmdedup.units import PAGE_BYTES


@dataclass(frozen=True)
class SmallPages:
    """How new mappings are kept free of huge pages. `map_flag`: a flag of mmap, `0` for none."""

    map_flag: int
    by_advice: bool
    """Whether runs of zeroes need a madvise as well."""

    @classmethod
    @cache
    def of_this_kernel(cls, *, use_map_stack: bool = True) -> SmallPages:
        """The way that works here, tried on our own memory.

        Since Linux 6.7 mmap's MAP_STACK is enough (include/linux/mman.h: calc_vm_flag_bits).
        `use_map_stack=False` does not use that flag.
        """
        flag = mman.MAP_STACK if use_map_stack else 0
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | flag
        with mmap.mmap(-1, PAGE_BYTES, flags=flags) as page:
            anchor = ctypes.c_char.from_buffer(page)
            address = ctypes.addressof(anchor)
            del anchor
            own = (vma for vma in flagged_vmas("vmdedup", os.getpid()) if address < vma.end)
            if "nh" in next(own).flags:
                return cls(flag, by_advice=False)
            try:
                page.madvise(mman.MADV_NOHUGEPAGE)
            except OSError as error:  # uncovered: takes a kernel without huge pages
                if error.errno != errno.EINVAL:
                    raise
                return cls(0, by_advice=False)  # this kernel has no huge pages
        return cls(0, by_advice=True)
