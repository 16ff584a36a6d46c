"""The host's limits and settings, as far as merging depends on them.

Reads /proc, /sys and the directories of the settings; makes none of them. Each
check has the finding, and the remedy if that is not fine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from vmdedup.attach.discover import running_qemus
from vmdedup.doctor.words import fine, note, problem
from vmdedup.linux.filesystems import is_on_tmpfs
from vmdedup.linux.limits import address_space_left_bytes, commit_left_bytes, max_map_count
from vmdedup.linux.pagemap import has_pagemap_scan
from vmdedup.linux.swap import Swap, memory_pressure_percent, read_swap
from vmdedup.models import CheckedThing
from vmdedup.report.words import count, number_of, size
from vmdedup.settings import Settings
from vmdedup.vm.ram_files import RamFiles

_LIMITS, _HOST = "limits", "host"
_USUAL_MAX_MAP_COUNT = 65530
_VMAS_PER_GIB = 43_000
"""Measured: mappings of 1 GiB of non-zero guest memory that is merged as a whole."""
_LITTLE_STORE_BYTES = 256 << 20
_KSM = Path("/sys/kernel/mm/ksm/run")
_BLOCK = Path("/sys/block")
_ZSWAP_COMPRESSOR = Path("/sys/module/zswap/parameters/compressor")
_THP = Path("/sys/kernel/mm/transparent_hugepage")


def host_checks(settings: Settings, *, daemon_pid: int | None) -> Iterator[CheckedThing]:
    """Limits, directories, and other services on this host."""
    yield _max_map_count(settings)
    yield _store(settings.store_dir)
    yield from _memory()
    yield _promises()
    yield _address_space()
    yield _runtime(settings.runtime_dir, daemon_pid)
    yield _huge_pages()
    yield _ksm()
    yield _cold_pages(settings)


def _max_map_count(settings: Settings) -> CheckedThing:
    most = max_map_count()
    room = (most - settings.vma_headroom) / _VMAS_PER_GIB
    found = f"{most:,}: about {room:.1f} GiB of merged non-zero memory in a VM"
    if most > _USUAL_MAX_MAP_COUNT:
        return fine(_LIMITS, "vm.max_map_count", found)
    remedy = "for larger VMs: sysctl vm.max_map_count=1000000"
    return note(_LIMITS, "vm.max_map_count", found, remedy)


def _store(directory: Path) -> CheckedThing:
    place = next(each for each in (directory, *directory.parents) if each.exists())
    if not is_on_tmpfs(place):
        remedy = "set store_dir to a directory on tmpfs, for instance /dev/shm/vmdedup"
        return problem(_LIMITS, "store directory", f"{directory} is not on tmpfs", remedy)
    found = os.statvfs(place)
    ram_files = RamFiles(place)
    room = ram_files.room()
    said = f"{directory}: {size(room.free_bytes)} of {size(found.f_blocks * found.f_frsize)} free"
    remedy = f"free some, or make it larger: mount -o remount,size=50% {_mount_point(place)}"
    if ram_files.count:
        said += f"; {number_of(ram_files.count, 'RAM file')} on the same tmpfs may still need"
        said += f" {size(room.promised_bytes)}, which the store leaves to them"
        remedy += ", or set store_dir to a tmpfs of its own"
    if room.left_bytes < _LITTLE_STORE_BYTES:
        return note(_LIMITS, "store directory", said, remedy)
    return fine(_LIMITS, "store directory", said)


def _mount_point(place: Path) -> Path:
    return next(each for each in (place, *place.parents) if each.is_mount())


def _runtime(directory: Path, daemon_pid: int | None) -> CheckedThing:
    if daemon_pid is not None:
        return fine(_HOST, "daemon", f"runs (pid {daemon_pid}), socket in {directory}")
    if not directory.exists():
        parent = next(each for each in directory.parents if each.exists())
        if not os.access(parent, os.W_OK):
            remedy = "run as root, or set runtime_dir"
            return problem(_HOST, "daemon", f"{directory} cannot be made", remedy)
        return fine(_HOST, "daemon", "does not run; verbs work by themselves")
    mode = directory.stat()
    if mode.st_uid != os.geteuid() or mode.st_mode & 0o022:
        remedy = f"chown root {directory}; chmod 700 {directory}"
        return problem(_HOST, "daemon", f"{directory} is open to others", remedy)
    return fine(_HOST, "daemon", f"does not run; {directory} is ready for it")


def _memory() -> Iterator[CheckedThing]:
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    amount = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) == 3}
    available, total = amount["MemAvailable"], amount["MemTotal"]
    said = f"{size(available)} of {size(total)} available"
    if available < total // 20:
        remedy = "an unmerge takes as much memory as was saved, and goes only as far as is safe"
        yield note(_LIMITS, "memory", said, remedy)
    else:
        yield fine(_LIMITS, "memory", said)
    used = amount["SwapTotal"] - amount["SwapFree"]
    if not amount["SwapTotal"]:
        remedy = "guests that write much merged memory at once need it back: leave some free"
        yield note(_LIMITS, "swap", "none", remedy)
    elif used > amount["SwapTotal"] // 2:
        remedy = "swapped pages are left alone; more memory, or fewer VMs, would let them merge"
        yield note(_LIMITS, "swap", f"{size(used)} of {size(amount['SwapTotal'])} in use", remedy)
    else:
        yield fine(_LIMITS, "swap", f"{size(used)} of {size(amount['SwapTotal'])} in use")


def _promises() -> CheckedThing:
    left_bytes = commit_left_bytes()
    if left_bytes is None:
        return fine(_LIMITS, "vm.overcommit_memory", "the host promises memory without a limit")
    said = f"2: the host may promise {size(max(0, left_bytes))} more"
    remedy = (
        "merged pages of share=on memory count against it once more: raise"
        " vm.overcommit_ratio, or sysctl vm.overcommit_memory=0"
    )
    return note(_LIMITS, "vm.overcommit_memory", said, remedy)


def _address_space() -> CheckedThing:
    """Limits of visible QEMUs: merging maps some memory inside them."""
    limited = []
    for found in running_qemus():
        with suppress(OSError):  # another user's, or gone
            left_bytes = address_space_left_bytes(found.pid or 0)
            if left_bytes is not None:
                limited.append(f"pid {found.pid} has {size(max(0, left_bytes))} left")
    if not limited:
        return fine(_LIMITS, "RLIMIT_AS", "no QEMU has a limit of its address space")
    remedy = "merging takes some of it: prlimit --pid PID --as=unlimited"
    return note(_LIMITS, "RLIMIT_AS", "; ".join(limited), remedy)


def _huge_pages() -> CheckedThing:
    chosen = {name: _chosen(_THP / name) for name in ("enabled", "shmem_enabled")}
    said = ", ".join(f"{name} {choice}" for name, choice in chosen.items() if choice)
    if chosen["enabled"] == "always" or chosen["shmem_enabled"] in ("always", "force"):
        remedy = "merging splits those with huge_page_density savable pages; guests get slower"
        return note(_HOST, "transparent huge pages", said, remedy)
    return fine(_HOST, "transparent huge pages", said or "not built in")


def _chosen(path: Path) -> str | None:
    try:
        return path.read_text().split("[")[1].split("]")[0]
    except (OSError, IndexError):
        return None


def _ksm() -> CheckedThing:
    try:
        run = int(_KSM.read_text())
        sharing = int(_KSM.with_name("pages_sharing").read_text())
    except OSError:
        return fine(_HOST, "KSM", "not built in")
    if run == 1:
        remedy = f"turn it off, so that no page is scanned twice: echo 2 > {_KSM}"
        return note(_HOST, "KSM", f"runs beside us, {count(sharing)} pages_sharing", remedy)
    if sharing:
        remedy = f"these pages are KSM's and not merged here: echo 2 > {_KSM} gives them back"
        return note(_HOST, "KSM", f"stopped, still {count(sharing)} pages_sharing", remedy)
    return fine(_HOST, "KSM", "off")


def _cold_pages(settings: Settings) -> CheckedThing:
    """Where cold pages would go, and whether that is fast."""
    name, swap, controls = "cold pages", read_swap(), settings.controls
    wanted = controls.cold_after_s or controls.shortage_page_out
    if wanted and not has_pagemap_scan():
        remedy = "run a kernel that tells which pages were written: Linux 6.7"
        return note(_HOST, name, "none is paged out: there is no PAGEMAP_SCAN", remedy)
    is_fast = swap.is_memory or (settings.cold_any_swap and swap.next_devices)
    pressure = "PSI is on" if memory_pressure_percent() is not None else "PSI is off"
    said = f"they would go to {swap.what or 'no swap'}; {pressure}"
    if compressors := ", ".join(_compressors(swap)):
        said += f"; compressed by {compressors}"
    if not wanted:
        return fine(_HOST, name, f"off (cold_after_s is 0); {said}")
    if not is_fast:
        remedy = "swap to zram, or switch zswap on; or set cold_any_swap if the swap is fast"
        return note(_HOST, name, f"{said}: none is paged out", remedy)
    if controls.shortage_page_out and not swap.is_zram:
        remedy = "swap to zram: other swap counts as memory already, so shortage_page_out leaves it"
        return note(_HOST, name, f"{said}: none is paged out for short memory", remedy)
    return fine(_HOST, name, said)


def _compressors(swap: Swap) -> Iterator[str]:
    """The algorithm wherever pages are compressed, with zram's others: `lz4 (or zstd)`."""
    with suppress(OSError):
        if swap.has_zswap:
            yield _ZSWAP_COMPRESSOR.read_text().strip()
    for device in swap.next_devices:
        with suppress(OSError):
            if device.is_zram:
                algorithms = _BLOCK / Path(device.path).name / "comp_algorithm"
                others = [name for name in algorithms.read_text().split() if name[0] != "["]
                yield f"{_chosen(algorithms)} (or {', '.join(others) or 'no other'})"
