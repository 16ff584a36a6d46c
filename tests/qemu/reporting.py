"""Linux guests that report their free pages, and rounds of using, freeing and using memory anew.

A round is driven from a thread of its own for each guest, while the test runs passes. Owns
what a round does; each page that is not as it must be counts as wrong.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from tests.harness.images import Guest, image
from tests.harness.kernel import ram_areas
from tests.harness.monitor import qmp
from tests.harness.vm import Backend, Vm
from tests.qemu.conftest import Boot
from tests.qemu.fleet import Member, name_of
from tests.qemu.serving import Serving

MIB = 1 << 20
EVERY_BACKEND = [  # but shared RAM without a file, which may have no balloon
    Backend("memfd", share=True, mib=96),
    Backend("memfd", share=False, mib=96),
    Backend("ram", share=False, mib=96),
    Backend("file", share=True, mib=96),
    Backend("file", share=False, mib=96),
]
BUSY = {"mib": 8, "rewrite_per_s": 128, "check_per_s": 8192}
KINDS = ("", "init_on_free=1")
"""Linux's default, which relies on no zeroes; and one that does."""
POISONS = "page_poison=1"
"""A kernel that fills what it frees, and checks that before use. Debian's cloud kernels cannot;
the stock one can."""
CORRUPT = "pagealloc: memory corruption"
"""What such a kernel says of a page that does not hold its filling (mm/page_poison.c)."""
LONGEST_S = 120
REPORTED_S = 3
"""Linux reports what was freed two seconds later."""
_KEEP_MIB, _TAKE_MIB = 12, 16
_BOOT_MIB = 192
"""kexec holds the next kernel, unpacked, beside the present one."""
_PAUSE_S = 0.1
"""Between passes: else on few processors the guests do little."""
_DISCARD, _LENGTH = "ram_block_discard_range", re.compile(r"\+ 0x([0-9a-f]+)")


def guest_of(kernel: str) -> Guest:
    """The guest whose kernel can do that."""
    return "stock" if kernel == POISONS else "tiny"


def command_line(kernel: str) -> str:
    """A guest's, with the kernel's own words; it reports free pages of every size."""
    return image(guest_of(kernel)).command_line(
        BUSY, kernel, "page_reporting.page_reporting_order=0"
    )


def start(
    boot: Boot, backend: Backend, kernel: str, device: str = "", extra: Sequence[str] = ()
) -> Vm:
    """Start a Linux guest that reports free pages of every size."""
    balloon = f"virtio-balloon-pci,free-page-reporting=on{device}"
    arguments = ["-device", balloon, "-append", command_line(kernel), *extra]
    name = f"{name_of(backend)}-{kernel.partition('=')[0] or 'default'}"
    thp = backend.kind == "ram"
    guest = guest_of(kernel)
    return boot(guest, ready=False, name=name, backend=backend, extra=arguments, thp=thp)


def when_ready(vms: Sequence[Vm]) -> list[Member]:
    """Wait for guests that were started side by side."""
    for vm in vms:
        vm.wait_ready()
    return [Member(vm, ram_areas(vm.pid, [each.mib for each in vm.backends])) for vm in vms]


def reporting_vm(boot: Boot, backend: Backend, kernel: str, device: str = "") -> Member:
    """A Linux guest that reports free pages of every size."""
    return when_ready([start(boot, backend, kernel, device)])[0]


def number(vm: Vm, command: str, start: str) -> int:
    """What the tiny guest says to a command of its own."""
    return int(vm.ask(command, start))


def give_back(members: Sequence[Member]) -> None:
    """Each guest uses memory, frees it, and reports it."""
    for member in members:
        number(member.vm, f"take {_TAKE_MIB}", "taken=")
    for member in members:
        member.vm.ask("drop", "dropped")
    time.sleep(REPORTED_S)


def stale_pages(members: Sequence[Member]) -> int:
    """Pages of newly allocated memory that are not zero, though the guest relies on it."""
    return sum(number(member.vm, f"fresh {_TAKE_MIB}", "stale=") for member in members)


@dataclass
class Figures:
    """What rounds did, and found."""

    rounds: int = 0
    """Of single guests."""
    wrong_pages: int = 0
    kexecs: int = 0
    resets: int = 0
    discarded_bytes: int = 0
    """What guests reported, and QEMU discarded."""
    most_merged_pages: int = 0


@dataclass
class Passes:
    """How many passes there were, for the threads that drive guests."""

    serving: Serving
    done: int = 0

    def run(self) -> int:
        """One more; how many pages stand merged."""
        merged = self.serving.merge(passes=1)
        self.done += 1
        return merged

    def await_some(self, count: int = 3) -> None:
        """Wait until so many more have begun and ended: what was there before is merged."""
        until, deadline = self.done + count + 1, time.monotonic() + LONGEST_S
        while self.done < until:
            if time.monotonic() > deadline:
                raise TimeoutError("no passes")
            time.sleep(0.02)


def is_kexec(index: int) -> bool:
    """Whether a round begins with a boot into the other kind of kernel."""
    return index % 3 == 1


def is_reset(index: int) -> bool:
    """Whether a round begins with a reset, back to the guest's own kind."""
    return index % 3 == 2


@dataclass
class Rebooting:
    """A guest that reports free pages, and boots from one kind of kernel to the other."""

    vm: Vm
    other: str
    """The kind of kernel that it boots into."""
    log: Path
    """Where QEMU notes what it discards."""

    def round(self, index: int, passes: Passes) -> int:
        """One round; the pages that were wrong."""
        if is_kexec(index):
            self.vm.begin_anew(lambda: self.vm.ask(f"boot {command_line(self.other)}", "ready "))
        elif is_reset(index):
            qmp(self.vm.test_qmp_path, "set-action", reboot="reset")
            self.vm.begin_anew(lambda: qmp(self.vm.test_qmp_path, "system_reset"))
        wrong = self._use(passes)
        number(self.vm, f"take {_TAKE_MIB}", "taken=")
        passes.await_some()
        self.vm.ask("drop", "dropped")
        time.sleep(REPORTED_S)
        wrong += number(self.vm, f"fresh {_TAKE_MIB}", "stale=")
        wrong += self._use(passes)
        return wrong + self.vm.errors + self.vm.serial.text().count(CORRUPT)

    def _use(self, passes: Passes) -> int:
        """Keep memory with content while it is merged, check it twice, and free it."""
        assert number(self.vm, f"keep {_KEEP_MIB}", "kept=") == _KEEP_MIB
        passes.await_some()
        wrong = number(self.vm, "look", "wrong=")
        wrong += number(self.vm, "look", "wrong=")
        self.vm.ask("end", "ended")
        return wrong


def rebooting_vm(
    boot: Boot, folder: Path, backend: Backend, kinds: Sequence[str], device: str = ""
) -> Rebooting:
    """Start a guest with its other kernel on its disks, whose discards QEMU notes."""
    base, other = kinds
    files = image(guest_of(other))
    extra = []
    for file in (files.kernel, files.initrd):
        extra += ["-drive", f"file={file},format=raw,if=virtio,readonly=on"]
    log = folder / f"{name_of(backend)}.log"
    extra += ["-trace", _DISCARD, "-D", str(log)]
    vm = start(boot, replace(backend, mib=_BOOT_MIB), base, device, extra)
    return Rebooting(vm, other, log)


def run_rounds(served: Serving, guests: Sequence[Rebooting], rounds: int) -> Figures:
    """Drive all guests through so many rounds while passes run; each round is of all guests."""
    figures, passes = Figures(), Passes(served)
    with ThreadPoolExecutor(len(guests)) as threads:
        for index in range(rounds):
            driven = [threads.submit(each.round, index, passes) for each in guests]
            while not all(each.done() for each in driven):
                figures.most_merged_pages = max(figures.most_merged_pages, passes.run())
                time.sleep(_PAUSE_S)
            figures.wrong_pages += sum(each.result() for each in driven)
            figures.rounds += len(guests)
            figures.kexecs += len(guests) * is_kexec(index)
            figures.resets += len(guests) * is_reset(index)
            print(figures, flush=True)
    figures.discarded_bytes = sum(discarded_bytes(each.log) for each in guests)
    return figures


def discarded_bytes(log: Path) -> int:
    """The discards in a log of QEMU's."""
    with log.open() as lines:
        found = [_LENGTH.search(line) for line in lines if _DISCARD in line]
    return sum(int(each[1], 16) for each in found if each is not None)
