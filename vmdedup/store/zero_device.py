"""The /dev/zero that zero pages are merged onto.

Owns one open file of it for each trust domain, for as long as this process lives.
"""

from __future__ import annotations

import os
from functools import cache


def open_zero_device(domain: str) -> int:
    """A read-only descriptor of /dev/zero, for a VM of a trust domain to map privately.

    Always of one open file for the domain, as with `StableStore.open_read_only`: its flags
    and locks would be a way to signal from one domain to another.
    """
    return os.dup(_zero_device(domain))


@cache
def _zero_device(_domain: str) -> int:
    return os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC)
