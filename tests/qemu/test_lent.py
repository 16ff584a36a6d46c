"""QEMU closes what it was lent, and opens other files under the numbers, before it is copied.

QEMU before 10 does so when a monitor disconnects, libvirtd's for one. Here another client
does it, at each descriptor that is lent for a merge or an unmerge.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.monitor import connected
from tests.harness.vm import Backend
from tests.qemu.conftest import Boot, MakeSettings
from tests.qemu.fleet import Member, assert_nothing_of_ours, attached, boot_fleet
from tests.qemu.serving import merged_pages, serving
from tests.service.daemon import assert_unharmed
from vmdedup import faults

pytestmark = pytest.mark.qemu

BUSY = {"mib": 4, "rewrite_per_s": 64, "check_per_s": 8192}
_OTHER_FILES = 4
"""More than are lent at once: the lowest free number is used next, whichever that is."""


@pytest.fixture(autouse=True)
def no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts back what a test sets."""
    monkeypatch.setattr(faults, "hook", None)


def exchange_at(member: Member, folder: Path, which: int, done: list[int]) -> Callable[[str], None]:
    """A hook: all that was lent is exchanged once, right after the `which`-th was lent.

    `done` gets how many pages were merged then.
    """
    lent: list[str] = []

    def hook(reached: str) -> None:
        if reached != "lent":
            return
        lent.append(reached)
        if len(lent) == which:
            with connected(member.vm.test_qmp_path) as execute:
                for found in execute("query-fdsets"):
                    execute("remove-fd", **{"fdset-id": found["fdset-id"]})
                for number in range(_OTHER_FILES):
                    name = f"other{number}"
                    out = {"out": str(folder / name)}
                    execute("chardev-add", id=name, backend={"type": "file", "data": out})
            done.append(merged_pages(member))

    return hook


def close_others(member: Member) -> None:
    with connected(member.vm.test_qmp_path) as execute:
        for chardev in execute("query-chardev"):
            if chardev["label"].startswith("other"):
                execute("chardev-remove", id=chardev["label"])


@pytest.mark.parametrize("backend", [Backend("ram", share=False, mib=16), Backend(mib=16)])
def test_no_other_file_is_mapped_for_what_was_lent(
    settings: MakeSettings, boot: Boot, backend: Backend, tmp_path: Path
) -> None:
    (member,) = boot_fleet(boot, [backend], parameters=BUSY)
    own = settings()
    merging: list[int] = []
    unmerging: list[int] = []
    for which in range(1, 6):
        merging.clear()
        with serving(own, [member]) as served:
            faults.hook = exchange_at(member, tmp_path, which, merging)
            for _ in range(3):
                served.pass_once()
                if merging:
                    break
            faults.hook = None
            if not merging:  # fewer are lent
                break
            assert "add-fd" in (served.troubles()[0] or ""), which
            assert merged_pages(member) <= merging[0], which
            close_others(member)
            assert served.merge() > 100, which
        unmerging.clear()
        with attached(own, [member]) as dedup:
            faults.hook = exchange_at(member, tmp_path, which, unmerging)
            (left,) = dedup.unmerge().vms
            faults.hook = None
            close_others(member)
            if unmerging:
                assert "add-fd" in (left.reason or ""), which
                assert left.restored_pages == 0, which
                assert dedup.unmerge().store_removed
    assert which > 2
    with attached(own, [member]) as dedup:
        assert dedup.unmerge().store_removed
    assert_unharmed(member.vm)
    assert_nothing_of_ours(member)
