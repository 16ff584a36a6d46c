"""The host's memory and swap, from the kernel's text."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmdedup.engine.cold_paging import why_not
from vmdedup.linux import meminfo, swap
from vmdedup.linux.swap import Swap, SwapDevice
from vmdedup.settings import Settings

pytestmark = pytest.mark.unit

_SWAPS = """\
Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority
/dev/zram0                              partition\t3000\t\t1000\t\t100
/dev/vda2                               partition\t5000\t\t0\t\t-2
/swap\\040file                           file\t\t700\t\t0\t\t-3
"""


def test_free_swap_on_zram_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    amounts = {"MemAvailable": 9, "SwapFree": 7700 * 1024, "MemTotal": 20}
    monkeypatch.setattr(meminfo, "amounts", lambda *names: [amounts[name] for name in names])
    swaps = tmp_path / "swaps"
    monkeypatch.setattr(swap, "_SWAPS", swaps)
    assert swap.host_room_bytes() == (9, 7700 * 1024, 20)
    swaps.write_text(_SWAPS)
    assert swap.host_room_bytes() == (9, 5700 * 1024, 20)
    amounts["SwapFree"] = 1024  # read a moment later
    assert swap.host_room_bytes() == (9, 0, 20)


_ZRAM = SwapDevice("/dev/zram0", 3000, 0, 100)
_FULL_ZRAM = SwapDevice("/dev/zram0", 3000, 3000, 100)
_DISK = SwapDevice("/dev/vda2", 5000, 0, -2)


@pytest.mark.parametrize(
    ("devices", "has_zswap", "may", "may_at_once"),
    [
        ((), False, False, False),
        ((_ZRAM, _DISK), False, True, True),
        ((_ZRAM,), True, True, True),
        ((_DISK,), True, True, False),
        ((_DISK,), False, False, False),
        ((_FULL_ZRAM, _DISK), False, False, False),
        ((_FULL_ZRAM,), False, False, False),
    ],
)
def test_short_memory_is_helped_by_zram_alone(
    devices: tuple[SwapDevice, ...], has_zswap: bool, may: bool, may_at_once: bool
) -> None:
    """Free swap elsewhere counts as memory that is there: using it up changes nothing."""
    found = Swap(devices, has_zswap, held_bytes=0)
    assert (why_not(found, Settings()) is None) == may
    assert (why_not(found, Settings(), at_once=True) is None) == may_at_once
    anywhere = Settings(cold_any_swap=True)
    assert (why_not(found, anywhere) is None) == bool(found.next_devices)
    assert (why_not(found, anywhere, at_once=True) is None) == may_at_once
