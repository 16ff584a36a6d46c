"""The /dev/zero that zero pages are merged onto.

Owns one open file of it for each trust domain, for as long as this process lives.
"""

from __future__ import annotations

import os
from functools import cache


def open_zero_device(domain: str) -> int:
    """A read-only descriptor of /dev/zero, for a VM of a trust domain to map privately.

    It is always of the domain's one open file, as with `StableStore.open_read_only`. The flags
    and locks of a file shared by domains would let one domain signal to another.
    """
    return os.dup(_zero_device(domain))


@cache
def _zero_device(_domain: str) -> int:
    return os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC)
