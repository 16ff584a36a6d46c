"""What writes guest memory while a VM is paused is not lost, or the VM is refused."""

from __future__ import annotations

import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tests.harness.images import REPOSITORY
from tests.harness.kernel import PAGE_BYTES, becomes_true
from tests.harness.vm import Backend
from tests.qemu.conftest import Boot, MakeSettings
from tests.qemu.fleet import Member, attached, boot_fleet, paths
from tests.qemu.serving import merged_pages
from vmdedup import faults
from vmdedup.core.rmap import ZERO
from vmdedup.deduplicator import Deduplicator
from vmdedup.remap.merge import VmMerger

pytestmark = pytest.mark.qemu

HELD = {"mib": 4, "hold": 1, "check_per_s": 8192}
WRITTEN = b"\x5a\xa5\x3c\xc3" * 4
UNTRIED = ((1, 0), (1, 0))
"""No such QEMU: so each is merged in pauses, with all that the kernel can protect."""


@pytest.fixture(autouse=True)
def no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts back what a test sets."""
    monkeypatch.setattr(faults, "hook", None)


class Debugger:
    """A gdb client. QEMU's main loop writes guest memory for it while the VM is paused."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(20)
        self._socket.connect(str(path))
        self.ask("?")
        self.ask("Qqemu.PhyMemMode:1")

    def send(self, text: str) -> None:
        """A packet (gdb's remote serial protocol), whose answer nobody waits for."""
        self._socket.sendall(f"+${text}#{sum(text.encode()) % 256:02x}".encode())

    def hear(self) -> str:
        """The next packet."""
        found = b""
        while not (b"#" in found and len(found) >= found.index(b"#") + 3):
            found += self._socket.recv(4096)
        return found[found.index(b"$") + 1 : found.index(b"#")].decode()

    def ask(self, text: str) -> str:
        self.send(text)
        return self.hear()

    def close(self) -> None:
        self._socket.close()


@contextmanager
def debugged(member: Member, folder: Path) -> Iterator[Debugger]:
    debugger = Debugger(folder / "gdb")
    try:
        yield debugger
    finally:
        debugger.close()


def pages_at_hand() -> npt.NDArray[np.int64]:
    """The page indices of the batch whose gate is closed, as the stack tells."""
    frame = sys._getframe()
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), VmMerger) and "left" in frame.f_locals:
            left = frame.f_locals["left"]
            return np.asarray(left.page()[np.repeat(left.slot != ZERO, left.length)])
        frame = frame.f_back  # type: ignore[assignment]
    return np.empty(0, dtype=np.int64)


@pytest.mark.both_qemus
@pytest.mark.parametrize("share", [True, False])
def test_a_write_between_comparison_and_remap_is_kept(
    settings: MakeSettings, boot: Boot, tmp_path: Path, share: bool
) -> None:
    """By QEMU's main loop, as a 9p read ends or a passed-through device: `stop` holds neither."""
    extra = ["-gdb", f"unix:{tmp_path / 'gdb'},server=on,wait=off"]
    members = boot_fleet(
        boot, [Backend("memfd", share=share, mib=16)], parameters=HELD, extra=extra
    ) + boot_fleet(boot, [Backend("memfd", share=share, mib=16)], parameters=HELD, prefix="other-")
    member = members[0]
    with debugged(member, tmp_path) as debugger:
        assert becomes_true(lambda: member.run_state() == "paused")
        written: list[int] = []

        def write(reached: str) -> None:
            if reached == "verified" and not written and len(page := pages_at_hand()):
                written.append(int(page[0]))
                address = written[0] * PAGE_BYTES
                debugger.send(f"M{address:x},{len(WRITTEN):x}:{WRITTEN.hex()}")
                time.sleep(0.05)  # without protection it is done by then

        own = settings(drain_trusted=UNTRIED)
        with attached(own, [member]) as dedup:
            assert "draining was not tried" in (dedup.report().vms[0].hint or "")
            faults.hook = write
            dedup.run(passes=2)
            faults.hook = None
            assert written, "no gate came by"
            assert debugger.hear() == "OK"
            at = member.areas[0].start + written[0] * PAGE_BYTES
            assert read(member.pid, at) == WRITTEN
            assert merged_pages(member) > 500
            assert dedup.verify().ok
            dedup.unmerge()
            assert read(member.pid, at) == WRITTEN
        assert list(own.runtime_dir.glob("stopped-*")) == []


def read(pid: int, address: int) -> bytes:
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(len(WRITTEN))


def test_who_writes_in_pauses_is_refused_where_nothing_protects(
    settings: MakeSettings, boot: Boot, tmp_path: Path
) -> None:
    """RAM on an ordinary file system, and a channel on which the host may send at any time."""
    folder = Path(tempfile.mkdtemp(prefix="ram-", dir=REPOSITORY / ".cache"))
    channel = ["-device", "virtio-serial", "-device", "virtserialport,chardev=c0"]
    channel += ["-chardev", f"socket,id=c0,path={tmp_path / 'c'},server=on,wait=off"]
    backend = Backend("file", share=True, mib=16, directory=folder)
    try:
        (member,) = boot_fleet(boot, [backend], parameters=HELD, extra=channel)
        with attached(settings(), [member]) as dedup:
            (row,) = dedup.run(passes=2).vms
            assert "writes guest memory while the VM is paused" in (row.reason or row.hint or "")
            assert merged_pages(member) == 0
    finally:
        shutil.rmtree(folder)


def test_on_tmpfs_it_is_merged(settings: MakeSettings, boot: Boot, tmp_path: Path) -> None:
    channel = ["-device", "virtio-serial", "-device", "virtserialport,chardev=c0"]
    channel += ["-chardev", f"socket,id=c0,path={tmp_path / 'c'},server=on,wait=off"]
    (member,) = boot_fleet(boot, [Backend("file", mib=16)], parameters=HELD, extra=channel)
    for own in (settings(), settings(drain_trusted=UNTRIED)):
        with Deduplicator(own) as dedup:
            dedup.attach(paths([member]))
            dedup.run(passes=2)
            assert merged_pages(member) > 500
            assert dedup.unmerge().store_removed
    member.vm.wait_passes(1)
    assert member.vm.errors == 0
