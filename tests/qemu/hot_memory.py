"""A Linux guest with virtio-mem devices, and what its memory takes by the kernel's word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.harness.images import image
from tests.harness.kernel import Area, anonymous_bytes, our_pages, ram_areas, ram_file_bytes
from tests.harness.monitor import qmp
from tests.harness.vm import Backend, Vm
from tests.qemu.conftest import Boot
from tests.qemu.fleet import Member
from tests.qemu.serving import Serving

MIB = 1 << 20
SHARED = Backend("memfd", share=True, mib=96)
BUSY = {"mib": 4, "rewrite_per_s": 64, "check_per_s": 4096}
PLUGGED_MIB = 16
MOVABLE = "memhp_default_state=online_movable"
"""The kernel's own memory cannot move, so a block with some of it cannot be unplugged."""
_FIRST_ADDRESS = 4 << 30
_APART = 1 << 30
"""Linux takes whole sections of 128 MiB, so each device begins at one of its own."""


@dataclass(frozen=True)
class Pool:
    """A virtio-mem device and its backend; sizes differ, so that each is found by its own."""

    number: int
    backend: str
    options: str = ""

    @property
    def id(self) -> str:
        return f"pool{self.number}"

    @property
    def mib(self) -> int:
        return 256 + 2 * self.number

    def arguments(self) -> list[str]:
        # QEMU makes a file in that folder, and removes its name at once.
        path = ",mem-path=/dev/shm" if self.backend.startswith("file") else ""
        backend = f"memory-backend-{self.backend}{path},id={self.id},size={self.mib}M"
        address = _FIRST_ADDRESS + self.number * _APART
        device = f"virtio-mem-pci,id=vm{self.number},memdev={self.id},memaddr={address}"
        return ["-object", backend, "-device", f"{device},requested-size=0{self.options}"]


POOLS = [
    Pool(0, "memfd,share=on"),
    Pool(1, "memfd,share=off"),
    Pool(2, "file,share=on"),
    Pool(3, "file,share=off"),
    Pool(4, "ram,share=off,reserve=off"),
]
BARE = Pool(5, "ram,share=on")
"""Up to QEMU 9 it has no file."""


class HotVm:
    """A Linux guest whose memory comes and goes."""

    def __init__(self, member: Member, pools: Sequence[Pool]) -> None:
        self.member = member
        self.vm: Vm = member.vm
        self.pools = pools
        areas = ram_areas(member.pid, [pool.mib for pool in pools])
        self.area = dict(zip([pool.id for pool in pools], areas, strict=True))

    def ask(self, command: str, /, **arguments: Any) -> Any:
        return qmp(self.vm.test_qmp_path, command, **arguments)

    def request(self, mib: int, pools: Sequence[Pool] | None = None) -> None:
        """Have the guest plug or unplug blocks until each device has so much."""
        for pool in self.pools if pools is None else pools:
            path = f"/machine/peripheral/vm{pool.number}"
            self.ask("qom-set", path=path, property="requested-size", value=mib * MIB)

    def sizes_mib(self) -> dict[str, int]:
        listed = [one["data"] for one in self.ask("query-memory-devices")]
        return {one["memdev"].rsplit("/", 1)[-1]: one["size"] // MIB for one in listed}

    def has(self, mib: int) -> bool:
        return set(self.sizes_mib().values()) == {mib}

    def number(self, command: str, answer: str) -> int:
        return int(self.vm.ask(command, answer))

    def wrong_pages(self) -> int:
        return self.number("look", "wrong=")

    def ours(self, pool: Pool) -> int:
        """Pages of a pool that we have mapped."""
        return our_pages(self.member.pid, self.area[pool.id])

    def held_bytes(self, pool: Pool) -> int:
        """Memory that a pool occupies: in its RAM file, and anonymous."""
        return held_bytes(self.member.pid, self.area[pool.id])

    def unharmed(self) -> None:
        self.vm.wait_passes(1)
        assert self.vm.errors == 0, self.vm.serial.complaints()
        log = (self.vm.directories.run / "qemu.log").read_text()
        assert [line for line in log.splitlines() if "private file mappings" not in line] == []


def held_bytes(pid: int, area: Area) -> int:
    return anonymous_bytes(pid, area) + (ram_file_bytes(pid, area) or 0)


def hot_vm(
    boot: Boot,
    pools: Sequence[Pool] = POOLS,
    *,
    kernel: str = MOVABLE,
    extra: Sequence[str] = (),
    ready: bool = True,
) -> HotVm:
    """A Linux guest; no block is plugged yet."""
    extra = [*extra, "-m", f"{SHARED.mib}M,slots=8,maxmem=16G"]
    extra += ["-append", image("tiny").command_line(BUSY, kernel)]
    for pool in pools:
        extra += pool.arguments()
    vm = boot("tiny", ready=ready, backend=SHARED, extra=extra, name="hot")
    qmp(vm.test_qmp_path, "query-status")  # answers once all memory is there
    return HotVm(Member(vm, ram_areas(vm.pid, [SHARED.mib])), pools)


def passes_until(served: Serving, condition: Callable[[], bool], most: int = 150) -> None:
    """Run passes without a pause, so that blocks come and go amid merges."""
    for _ in range(most):
        served.merge(passes=1)
        if condition():
            return
    raise AssertionError("it did not come about")


def resize(served: Serving, vm: HotVm, mib: int) -> None:
    """Have each device plug or unplug until it has so much, amid passes."""
    vm.request(mib)
    passes_until(served, lambda: vm.has(mib))


def unplug_all(served: Serving, vm: HotVm) -> None:
    """The guest gives up what it keeps, and all blocks."""
    vm.vm.ask("end", "ended")
    resize(served, vm, 0)


def plug_and_keep(served: Serving, vm: HotVm, kept_mib: int) -> None:
    """Plug blocks amid passes, have the guest use nearly all of them, and merge."""
    resize(served, vm, PLUGGED_MIB)
    assert vm.number(f"keep {kept_mib}", "kept=") == kept_mib
    served.merge(passes=4)
    assert [pool.id for pool in vm.pools if vm.ours(pool) < 500] == []
    assert vm.wrong_pages() == 0


def wait_given_back(served: Serving, vm: HotVm) -> None:
    """Some passes later all is given back: one may read a page that is just being unplugged."""
    held = (vm.held_bytes, vm.ours)
    passes_until(served, lambda: not any(each(pool) for pool in vm.pools for each in held), 6)
    assert_given_back(vm)


def assert_given_back(vm: HotVm) -> None:
    """Unplugged blocks take no memory, and nothing of ours is mapped there."""
    assert {pool.id: vm.held_bytes(pool) for pool in vm.pools} == {p.id: 0 for p in vm.pools}
    assert {pool.id: vm.ours(pool) for pool in vm.pools} == {p.id: 0 for p in vm.pools}
