"""What vmdedup does on one kernel: every way to merge on every backend, and what comes between.

The kernel is that of VMDEDUP_KERNEL (`6.1`, `6.12`, `newest`). Everything runs in one host;
VMs in it are emulated twice over, so they are small, few and quiet.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.harness.host import Host
from tests.hosts.inner import InnerVm
from tests.hosts.unit import Unit
from tests.kernels.conftest import Note
from tests.kernels.payload import RUN

pytestmark = [pytest.mark.kernels, pytest.mark.timeout(2400)]

BACKENDS = {
    "memfd-on": "memfd,share=on",
    "memfd-off": "memfd,share=off",
    "file-on": "file,mem-path=/dev/shm/file-on,share=on",
    "file-off": "file,mem-path=/dev/shm/file-off,share=off",
    "ram-off": "ram,share=off",
    "ram-on": "ram,share=on",
}
PROCESS_TESTS = " ".join(
    f"tests/process/test_{name}.py"
    for name in ("batches", "burst", "callloop", "discard", "fill", "guard", "join", "tracking")
)
LEAST_PAGES = 500
"""Of each VM: three quarters of its 4 MiB are the same everywhere, repeated or zero."""
_LIMIT_S = 900.0
_PATIENT = "VMDEDUP_HANG_LIMIT_MS=10000"
"""Where this host's own processor is busy, an engine in it stands still for more than a second:
its guardian cannot tell that from a hang, and kills it."""
_CHECK = {"live": "userfaultfd write protection", "incremental": "asynchronous write protection"}


def asked(host: Host, *words: str) -> Any:
    """What a verb says, as JSON; none of these fails."""
    command = f"{_PATIENT} vmdedup {' '.join(words)} --json"
    return json.loads(host.run(command, within_s=_LIMIT_S))


@pytest.fixture(scope="module")
def vms(host: Host) -> Iterator[list[InnerVm]]:
    """One on each backend."""
    started = [
        InnerVm(host, name, backend=backend, seed=number, mib=4, rewrite_per_s=2, check_per_s=40)
        for number, (name, backend) in enumerate(BACKENDS.items(), 1)
    ]
    for vm in started:
        vm.wait_ready()
    yield started
    for vm in started:
        vm.end()


def unharmed(vms: list[InnerVm]) -> None:
    """Each has looked at pages since, and found none wrong."""
    for vm in vms:
        vm.wait_checks(64)
        assert (vm.errors, vm.serial.complaints()) == (0, [])


@pytest.fixture(scope="module")
def features(host: Host) -> dict[str, bool]:
    """What doctor says of this kernel."""
    found = asked(host, "doctor")["checks"]
    return {
        name: next(one["verdict"] for one in found if one["name"] == check) == "fine"
        for name, check in _CHECK.items()
    }


def test_doctor_names_what_the_kernel_has(
    host: Host, features: dict[str, bool], note: Note
) -> None:
    """By its version, which only this test asks: live from 5.19 on, incremental from 6.7 on."""
    release = host.run("uname -r").strip()
    major, minor = (int(number) for number in release.split(".")[:2])
    note(release=release, qemu=host.run("qemu-system-x86_64 --version").split()[3])
    assert features == {"live": (major, minor) >= (5, 19), "incremental": (major, minor) >= (6, 7)}


def test_processes(host: Host, note: Note) -> None:
    done = host.ask(f"{RUN} -m 'not alone' {PROCESS_TESTS}", within_s=1800)
    assert done.code == 0, done.out[-6000:] + done.err[-1000:]
    note(process=done.out.strip().splitlines()[-1].split(" in ")[0])


def test_live_on_every_backend(
    host: Host, vms: list[InnerVm], features: dict[str, bool], note: Note
) -> None:
    """Merged, reported by a fresh process, gone on with after a kill -9, swapped out, unmerged."""
    merged = asked(host, "run", "--passes=3", "--timeout=600")
    assert all(vm.store_pages() >= LEAST_PAGES // 4 for vm in vms)
    assert (merged["host"]["stopped_ms"] == 0) == features["live"]
    rows = {row["name"]: row for row in asked(host, "report")["vms"]}
    assert all(rows[name]["merged_pages"] > 0 for name in BACKENDS), rows
    unharmed(vms)
    _kill_one_that_merges(host)
    unharmed(vms)
    _swap_out(host, vms)
    assert asked(host, "verify")["ok"]
    unharmed(vms)
    assert all(not row["remaining_pages"] for row in asked(host, "unmerge")["vms"])
    assert all(vm.store_pages() == 0 for vm in vms)
    unharmed(vms)
    note(live="yes" if features["live"] else "no")
    note(incremental="yes" if features["incremental"] else "no")


def _kill_one_that_merges(host: Host) -> None:
    """kill -9 of an engine and of its guardian, at its first merge; another goes on."""
    asked(host, "unmerge")
    host.run("rm -f /run/vmdedup/trapped; mkdir -p /run/vmdedup")
    host.write("/run/vmdedup/trap", "launched kill")
    killed = host.ask("python3 /payload/inside/trap.py run --passes=3", within_s=_LIMIT_S)
    assert killed.code == 137, killed.out + killed.err
    asked(host, "run", "--passes=3", "--timeout=600")


def _swap_out(host: Host, vms: list[InnerVm]) -> None:
    """Half of what each VM holds, onto a file."""
    host.run("fallocate -l 256M /swap && chmod 600 /swap && mkswap -q /swap && swapon /swap")
    for vm in vms:
        group = f"/sys/fs/cgroup/system.slice/{vm.unit}.service"
        host.ask(f"echo 24M > {group}/memory.reclaim")
    swapped = host.run("grep -h VmSwap /proc/[0-9]*/status | awk '{s += $2} END {print s}'")
    assert int(swapped) > 1024


def test_in_pauses_on_every_backend(host: Host, vms: list[InnerVm], note: Note) -> None:
    merged = asked(host, "run", "--passes=3", "--timeout=600", "--mask=userfaultfd-wp")
    assert all(vm.store_pages() >= LEAST_PAGES // 4 for vm in vms)
    assert merged["host"]["stopped_ms"] > 0
    unharmed(vms)
    left = asked(host, "unmerge", "--mask=userfaultfd-wp")["vms"]
    assert all(not row["remaining_pages"] for row in left)
    unharmed(vms)
    assert [vm.run_state() for vm in vms] == ["running"] * len(vms)
    note(pauses="yes")


def test_the_unit(host: Host, vms: list[InnerVm], unit: Unit, note: Note) -> None:
    """Started, restarted, stopped, upgraded: the merges stay, and each engine finds them."""
    two = vms[:2]
    for vm in vms[2:]:
        vm.end()
    unit.start()
    unit.wait_merged(*two)
    engine = unit.main_pid
    unit.systemctl("restart")
    unit.wait_restarted(engine)
    unit.wait_followed(*two)
    unit.systemctl("stop")
    unit.wait_all_gone()
    unit.wait_merged(*two, pages=LEAST_PAGES // 4)
    folder = host.run("echo /usr/local/lib/python3.*/dist-packages").strip()
    host.run(
        f"rm -r {folder}/vmdedup {folder}/vmdedup-*.dist-info; cp -a /payload/site/. {folder}/"
    )
    unit.start()
    unit.wait_followed(*two)
    unit.wait_merged(*two, pages=LEAST_PAGES // 4)
    unharmed(two)
    assert "Traceback" not in unit.journal()
    note(unit="yes")
