"""What the C library's heap keeps of what was freed, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.process

PROGRAM = """
import threading
import numpy as np
from vmdedup.linux import malloc

def resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) // 256

def work():
    arrays = [np.ones(512 << 10, dtype=np.uint8) for _ in range(40)]
    large = np.ones(64 << 20, dtype=np.uint8)

malloc.give_back()
work()
start = resident_mib()
malloc.{first}()
threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
    thread.join()
kept = resident_mib() - start
malloc.give_back()
print(kept, resident_mib() - start)
"""


def grown_mib(first: str) -> list[int]:
    """MiB more than before: after work on two threads, and after giving back."""
    command = [sys.executable, "-c", PROGRAM.format(first=first)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [int(word) for word in done.stdout.split()]


def test_what_is_freed_in_haste_stays_until_it_is_given_back() -> None:
    """Once, not for each thread; and what is large goes at once."""
    kept, left = grown_mib("keep")
    assert 10 < kept < 40
    assert left < 5


def test_at_leisure_nothing_stays() -> None:
    kept, left = grown_mib("give_back")
    assert kept < 5
    assert left < 5
