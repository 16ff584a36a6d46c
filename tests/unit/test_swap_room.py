"""The host's memory and swap, from the kernel's text."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmdedup.linux import meminfo, swap

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
