"""THE table of hazards: what makes merging a VM unsafe, and what is done about it.

Pure. Each row has the hazard, how it is seen in `Facts`, the answer, and the line for
the user. That line names the device or property and what to change. Every reason
in a VM's nature to refuse or restrict it stands here. `attach/ranges.py` refuses
single backends while it looks for their addresses; those reasons are listed here for
completeness, as are the hazards that the merge itself deals with.

If a hazard appears on a VM that is already merged, its answer also decides what
becomes of the merges. If a device reads or writes the RAM file, they must be undone
(UNMERGE_FIRST). A balloon that hands pages back may show the guest a store page again
although it relies on zeroes; a page on /dev/zero stays right, whatever is discarded
(ZERO_ONLY). If a device has pinned memory, the merges must stay: pinning made the page
the guest's own (the kernel breaks copy-on-write before a long-term pin), and another
remap would separate the two again.

Kernel KSM is a hazard because of its effect on write protection: when it merges a
page, the userfaultfd bit of its page table entry is lost (mm/ksm.c: replace_page makes
a new entry; seen on 6.18), so a guest could write between compare and remap.

Kernel vhost (vhost-net, vhost-vsock) is allowed: its worker writes guest memory
through user addresses (copy_to_iter, copy_to_user in drivers/vhost), so it
faults on write protection and on copy-on-write like a vCPU. It pins pages
only for zero-copy transmission (vhost-net's experimental_zcopytx, off by
default), which reads pages and never writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from vmdedup.attach import replies
from vmdedup.attach.monitor import Monitor
from vmdedup.attach.ranges import Region
from vmdedup.linux.process import Process
from vmdedup.policy import signs
from vmdedup.policy.facts import Facts, collect
from vmdedup.settings import DEFAULT_DRAIN_TRUSTED, Versions


class Verdict(IntEnum):
    """The answer to a hazard, mildest first; the strongest of all findings counts."""

    ALLOW = 0
    ZERO_ONLY = 1
    """Only zero pages are merged; pages already on a store are unmerged at once."""
    STOP_ONLY = 2
    """Merged only while the VM is stopped."""
    PAUSE = 3
    """Until it is over, nothing new is scanned or merged, and userfaultfds are released."""
    UNMERGE_FIRST = 4
    """Nothing is merged; pages already merged are unmerged at once."""
    REFUSE = 5
    """Nothing is merged; pages already merged stay so."""


@dataclass(frozen=True)
class Hazard:
    """A row of the table."""

    key: str
    verdict: Verdict
    what: str
    seen_by: str
    reason: str
    matches: Callable[[Facts], Iterable[signs.Match]]
    unmerge_stopped: bool = False
    """Whether merged pages may be unmerged only while the VM, devices included, is stopped."""


@dataclass(frozen=True)
class Finding:
    """A row that applies to a VM, or (with `backend`) to one of its backends."""

    key: str
    verdict: Verdict
    reason: str
    backend: str | None = None


WRITES_IN_PAUSE = "writes-in-pause"
"""Key of the row that only matters to sessions that protect nothing (`remap.session`)."""
REPORTS_FREE_PAGES = "reports-free-pages"
"""Key of the row that only matters to the account of a VM (`accounting.sharing_report`)."""
USERFAULT_IN_USE = "userfault-in-use"
"""Key of the row that a store page waits for too: the kernel lets one userfaultfd protect a
mapping, and a remap would take QEMU's protection away, which is what its snapshot relies on."""

PREALLOCATED = "preallocated"
"""Key of the row that does not hold for backends registered by hand (`vm.attached_vm`)."""

HAZARDS: tuple[Hazard, ...] = (
    Hazard(
        "free-page-reporting",
        Verdict.ZERO_ONLY,
        "virtio-balloon with free-page-reporting=on, except with page-poison=off: the guest may "
        "take pages that it has discarded for zeroes",
        "qom-get free-page-reporting, page-poison",
        "{device}: with free-page-reporting=on only zero pages are merged; set page-poison=off "
        "on it (-global virtio-balloon-device.page-poison=off), or free-page-reporting=off",
        signs.page_poison,
    ),
    Hazard(
        "balloon-without-file",
        Verdict.UNMERGE_FIRST,
        "virtio-balloon beside shared memory without a file (memory-backend-ram,share=on up to "
        "QEMU 9): merged pages cannot be discarded",
        "device types, descriptors of the RAM files",
        "{device} cannot take merged pages of memory backend {memory}; back it by "
        "memory-backend-memfd, or remove the device",
        signs.balloon_without_file,
    ),
    Hazard(
        "pinned-device",
        Verdict.REFUSE,
        "VFIO, vDPA, vhost-scsi, RDMA: the device keeps writing to the old page",
        "device types, netdevs, open /dev/vfio, /dev/iommu, /dev/vhost-vdpa*, /dev/vhost-scsi",
        "{device} pins guest memory for good; remove the device",
        signs.pinning,
    ),
    Hazard(
        "vhost-user",
        Verdict.UNMERGE_FIRST,
        "vhost-user, virtiofsd, vfio-user, multi-process QEMU: another process writes guest memory",
        "device types, netdevs, objects",
        "{device} shares guest memory with another process; remove the device",
        signs.vhost_user,
        unmerge_stopped=True,
    ),
    Hazard(
        "other-mapper",
        Verdict.UNMERGE_FIRST,
        "any other process that maps the RAM file",
        "/proc/*/maps",
        "process {pid} ({name}) also maps the RAM file of backend {file}; end it",
        signs.mappers,
        unmerge_stopped=True,
    ),
    Hazard(
        "second-mapping",
        Verdict.UNMERGE_FIRST,
        "QEMU maps a RAM file a second time",
        "/proc/PID/maps",
        "QEMU maps its RAM file a second time at {address}; remove the device that does",
        signs.aliases,
        unmerge_stopped=True,
    ),
    Hazard(
        "pinned-drive",
        Verdict.REFUSE,
        "`nvme://` and libblkio drives",
        "query-named-block-nodes",
        "drive {node} (driver {driver}) pins guest memory for good; use a file or host device",
        signs.pinning_drives,
    ),
    Hazard(
        "gpu-blob",
        Verdict.REFUSE,
        "virtio-gpu with blob=on",
        "qom-get blob",
        "{device}: blob=on pins guest memory for the display; set blob=off",
        signs.devices("virtio-gpu", "virtio-vga", on="blob"),
    ),
    Hazard(
        "9p-remote",
        Verdict.REFUSE,
        "virtio-9p of a folder that is on, or has below it, a filesystem that is not local; or "
        "that the command line does not name",
        "-fsdev and -virtfs, /proc/PID/mountinfo",
        "{device} exports {path} on filesystem {filesystem}, which may read and write guest "
        "memory directly; export a local filesystem with -fsdev local,id=…,path=…",
        signs.remote_folders,
    ),
    Hazard(
        "pinned-memory",
        Verdict.REFUSE,
        "memory pinned by anything else",
        "VmPin in /proc/PID/status",
        "{value} KiB of its memory are pinned (VmPin); remove the device that pins them",
        signs.positive("pinned_kib"),
    ),
    Hazard(
        "registered-buffers",
        Verdict.REFUSE,
        "io_uring with registered buffers",
        "UserBufs in /proc/PID/fdinfo",
        "{value} io_uring buffers are registered (UserBufs) and bypass write protection; use "
        "aio=threads or aio=native",
        signs.positive("registered_buffers"),
    ),
    Hazard(
        "confidential",
        Verdict.REFUSE,
        "SEV, TDX, guest_memfd: encrypted or private guest memory",
        "confidential-guest-support, query-sev, open guest_memfd",
        "guest memory is private to the guest ({object}); start it without confidential-guest-"
        "support",
        signs.confidential,
    ),
    Hazard(
        "nested",
        Verdict.REFUSE,
        "nested virtualization in use (KVM pins control pages of the inner guest)",
        "query-stats nested_run",
        "the guest runs guests of its own (nested_run {value}); switch vmx/svm off in its CPU "
        "model and restart it",
        signs.positive("nested_runs"),
    ),
    Hazard(
        "record-replay",
        Verdict.REFUSE,
        "record/replay",
        "query-replay",
        "record/replay is on (mode {mode}); start it without rr=",
        signs.replay,
    ),
    Hazard(
        "colo",
        Verdict.REFUSE,
        "COLO replication",
        "query-migrate-capabilities, run state",
        "COLO replication is set up (x-colo); switch it off",
        signs.colo,
    ),
    Hazard(
        "debugger",
        Verdict.REFUSE,
        "a debugger on the QEMU process",
        "TracerPid in /proc/PID/status",
        "process {value} traces it already (a debugger); detach it",
        signs.positive("tracer_pid"),
    ),
    Hazard(
        "shadow-stack",
        Verdict.REFUSE,
        "user shadow stacks in the QEMU process",
        "x86_Thread_features in /proc/PID/status",
        "it runs with user shadow stacks; start it with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off",
        signs.shadow_stack,
    ),
    Hazard(
        "seccomp",
        Verdict.REFUSE,
        "a system call filter in QEMU that may end it, or fail, at a call of ours (QEMU's own "
        "`-sandbox` does not)",
        "inject/filters.py, when QEMU's thread is first borrowed",
        "",
        signs.elsewhere,
    ),
    Hazard(
        "ignore-shared",
        Verdict.UNMERGE_FIRST,
        "migration by the RAM file: x-ignore-shared, CPR (the file is empty where merged)",
        "query-migrate-capabilities, query-migrate-parameters",
        "{what} moves guest memory by its file, which is empty where merged; switch it off",
        signs.file_migration,
    ),
    Hazard(
        "own-userfault",
        Verdict.PAUSE,
        "background snapshot and postcopy need userfaultfd themselves",
        "query-migrate-capabilities",
        "{what} needs userfaultfd for itself; merging goes on when that is over",
        signs.own_userfault,
    ),
    Hazard(
        USERFAULT_IN_USE,
        Verdict.PAUSE,
        "a userfaultfd of QEMU's own (nothing is unmerged beside it either)",
        "/proc/PID/fd",
        "QEMU (it has {value} of its own) needs userfaultfd for itself; merging goes on when that "
        "is over",
        signs.positive("own_userfaults"),
    ),
    Hazard(
        "kernel-ksm",
        Verdict.PAUSE,
        "the kernel's KSM merging the same private memory (it lifts write protection unseen)",
        "/sys/kernel/mm/ksm/run",
        "the kernel's KSM runs and merges {memory} too; merging goes on after "
        "`echo 2 > /sys/kernel/mm/ksm/run`",
        signs.kernel_ksm,
        unmerge_stopped=True,
    ),
    Hazard(
        "migration",
        Verdict.PAUSE,
        "migration (RDMA and zero-copy included, which pin), savevm and dump while they run",
        "query-migrate, query-status, query-dump",
        "{what}; merging goes on when it is over",
        signs.migration,
    ),
    Hazard(
        "ordinary-filesystem",
        Verdict.STOP_ONLY,
        "RAM file on an ordinary filesystem (no synchronous write protection)",
        "/proc/PID/mountinfo",
        "backend {backend} lies on {filesystem}; a memfd or a file on tmpfs would merge live",
        signs.ordinary_filesystem,
    ),
    Hazard(
        "untried-version",
        Verdict.STOP_ONLY,
        "a QEMU version whose drain was not tried (outside of the setting `drain_trusted`)",
        "the QMP greeting",
        "draining was not tried on QEMU {version}; the setting drain_trusted says {trusted}",
        signs.untried_version,
    ),
    Hazard(
        "virtio-mem",
        Verdict.REFUSE,
        "virtio-mem of shared memory without a file (memory-backend-ram,share=on up to QEMU 9): "
        "merged blocks cannot be unplugged",
        "qom-get memdev, descriptors of the RAM files",
        "{device} cannot unplug merged pages of shared memory without a file; back it by "
        "memory-backend-memfd",
        signs.virtio_mem_without_file,
    ),
    Hazard(
        PREALLOCATED,
        Verdict.REFUSE,
        "virtio-mem with prealloc=on (merged if its backend is registered by hand)",
        "qom-get prealloc",
        "prealloc=on of {device} keeps its memory present; set prealloc=off, or register it",
        signs.preallocating,
    ),
    Hazard(
        "hv-balloon",
        Verdict.REFUSE,
        "hv-balloon: plugs and unplugs pages of its backend",
        "qom-get memdev",
        "{device} plugs and unplugs its pages; use virtio-mem or a pc-dimm",
        signs.backends_of("hv-balloon"),
    ),
    Hazard(
        "persistent-memory",
        Verdict.REFUSE,
        "NVDIMM, virtio-pmem, CXL, NVMe PMR, pmem=on: the file is the data",
        "qom-get memdev, pmem",
        "{device}: its file must keep its content",
        signs.persistent,
    ),
    Hazard(
        "ivshmem",
        Verdict.REFUSE,
        "ivshmem: shared with other VMs on purpose",
        "qom-get memdev",
        "{device} shares it with other VMs",
        signs.backends_of("ivshmem"),
    ),
    Hazard(
        "backend-nature",
        Verdict.REFUSE,
        "merge=off, hugetlbfs, ROM, prealloc=on, mem-lock=on",
        "attach/ranges.py, per backend",
        "",
        signs.elsewhere,
    ),
    Hazard(
        "halted",
        Verdict.PAUSE,
        "the QEMU process is stopped (SIGSTOP) or its cgroup, of either version, is frozen",
        "policy/watch.py",
        "",
        signs.elsewhere,
    ),
    Hazard(
        WRITES_IN_PAUSE,
        Verdict.ALLOW,
        "virtio-9p, passed-through or host-fed USB, virtio-serial: they write while a VM is "
        "paused (refused where it is merged only while stopped and nothing protects its pages)",
        "device types",
        "{device} writes guest memory while the VM is paused, and its pages cannot be "
        "protected then; remove the device, or back its RAM by a memfd or tmpfs",
        signs.devices(*signs.WRITE_IN_PAUSE),
    ),
    Hazard(
        "plugged-blocks",
        Verdict.ALLOW,
        "virtio-mem: plugged blocks (what it has unplugged of merged pages is not counted as "
        "saved, and is mapped back)",
        "query-memory-devices",
        "",
        signs.elsewhere,
    ),
    Hazard(
        "balloon",
        Verdict.ALLOW,
        "plain virtio-balloon (merged pages in it are not counted as saved)",
        "query-balloon",
        "",
        signs.elsewhere,
    ),
    Hazard(
        REPORTS_FREE_PAGES,
        Verdict.ALLOW,
        "free page reporting (the report says how many merged pages the guest may have given back)",
        "qom-get free-page-reporting",
        "{device}: merged pages that the guest reports as free still count as saved",
        signs.page_reporting,
    ),
    Hazard(
        "kernel-vhost",
        Verdict.ALLOW,
        "vhost-net, vhost-vsock in the kernel (write through user addresses, pin nothing)",
        "drivers/vhost",
        "",
        signs.elsewhere,
    ),
    Hazard(
        "own-buffers",
        Verdict.ALLOW,
        "AF_XDP, netmap, TPM emulators, gdbstub, SPICE (their own buffers, or QEMU's addresses)",
        "by source",
        "",
        signs.elsewhere,
    ),
    Hazard(
        "direct-io",
        Verdict.ALLOW,
        "direct I/O in flight (every VM is drained before its gates)",
        "remap/live.py",
        "",
        signs.elsewhere,
    ),
    Hazard(
        "huge-pages",
        Verdict.ALLOW,
        "transparent huge pages of any size (split, then counted; merged memory takes none)",
        "guest/large_folios.py, remap/small_pages.py",
        "",
        signs.elsewhere,
    ),
    Hazard(
        "swap",
        Verdict.ALLOW,
        "swapped pages (not read in; a swapped copy-on-write page is told from a marker)",
        "linux/pagemap.py, guest/mapping_state.py",
        "",
        signs.elsewhere,
    ),
    Hazard(
        "core-dump",
        Verdict.ALLOW,
        "a core dump of the QEMU process (has merged pages only with bit 2 of coredump_filter; "
        "dump-guest-memory has all)",
        "core(5)",
        "",
        signs.elsewhere,
    ),
    Hazard(
        "memory-failure",
        Verdict.ALLOW,
        "an uncorrectable memory error in a shared page (hits every VM that shares it, as with "
        "KSM; max_page_sharing bounds that)",
        "mm/memory-failure.c",
        "",
        signs.elsewhere,
    ),
    Hazard(
        "gone",
        Verdict.ALLOW,
        "the VM exits, its pid is reused, its monitor breaks (dropped, the others go on)",
        "linux/process.py",
        "",
        signs.elsewhere,
    ),
    Hazard(
        "little-memory",
        Verdict.ALLOW,
        "unmerge with too little memory, or onto a full filesystem (checked first, then done as "
        "far as is safe)",
        "remap/unmerge.py",
        "",
        signs.elsewhere,
    ),
)


def judge(facts: Facts) -> list[Finding]:
    """Every row that applies, in the table's order."""
    return [
        Finding(row.key, row.verdict, row.reason.format_map(match), match.get("backend"))
        for row in HAZARDS
        for match in row.matches(facts)
    ]


def examine(
    monitor: Monitor,
    process: Process,
    regions: Sequence[Region],
    *,
    ignore_pids: Collection[int] = (),
    drain_trusted: Versions = DEFAULT_DRAIN_TRUSTED,
    listed: Sequence[replies.QomProperty] | None = None,
) -> list[Finding]:
    """Collect the facts (`facts.collect`) and judge them; raises as that does."""
    return judge(
        collect(
            monitor,
            process,
            regions,
            ignore_pids=ignore_pids,
            drain_trusted=drain_trusted,
            listed=listed,
        )
    )


def verdict(findings: Iterable[Finding]) -> Verdict:
    """The strongest answer for the VM as a whole.

    A REFUSE that names a backend only takes that backend out: `refused_backends`.
    """
    return max((one.verdict for one in findings if not _of_backend(one)), default=Verdict.ALLOW)


def zero_only(findings: Iterable[Finding]) -> list[str]:
    """Why only zero pages may be merged, a line each; empty if others may be too."""
    return [one.reason for one in findings if one.verdict == Verdict.ZERO_ONLY]


def stop_only(findings: Iterable[Finding]) -> list[str]:
    """Why a VM may be merged only while it is stopped, a line each; empty if it may be live."""
    return [one.reason for one in findings if one.verdict == Verdict.STOP_ONLY]


def reason(findings: Iterable[Finding]) -> str | None:
    """The line for the strongest finding of the VM as a whole; `None` if there is none."""
    rest = [one for one in findings if not _of_backend(one)]
    return max(rest, key=lambda one: one.verdict).reason if rest else None


def refused_backends(findings: Iterable[Finding]) -> dict[str, str]:
    """Backends that must not be merged, with the reason."""
    return {one.backend: one.reason for one in findings if one.backend and _of_backend(one)}


def must_unmerge(findings: Iterable[Finding], *, on_store: bool) -> bool:
    """Whether pages must be unmerged now, whatever merging pauses for.

    `on_store`: whether any page maps a store. ZERO_ONLY is milder than PAUSE for future merges,
    but not for such pages: the guest may take one for zeroes during a migration as well.
    """
    rest = [one for one in findings if not _of_backend(one)]
    worst = verdict(rest)
    takes_for_zeroes = on_store and bool(zero_only(rest))
    return worst == Verdict.UNMERGE_FIRST or (worst < Verdict.REFUSE and takes_for_zeroes)


@dataclass(frozen=True)
class Unmerging:
    """How merged pages may be unmerged; not at all if `refusal` says why."""

    refusal: str | None
    stopped: bool


def unmerging(findings: Iterable[Finding], *, on_store: bool) -> Unmerging:
    """How pages may be unmerged under the strongest findings on the VM as a whole.

    A device that has pinned pages forbids unmerging. So does a reason to pause merging. If
    pages must be unmerged now (`must_unmerge`), only QEMU's own userfaultfd does.
    """
    rest = [one for one in findings if not _of_backend(one)]
    worst = verdict(rest)
    stopped = {row.key for row in HAZARDS if row.unmerge_stopped}
    forbidding = [one for one in rest if one.key == USERFAULT_IN_USE]
    if worst in (Verdict.PAUSE, Verdict.REFUSE) and not must_unmerge(rest, on_store=on_store):
        forbidding = [one for one in rest if one.verdict == worst and one.key not in stopped]
    if forbidding:
        return Unmerging(reason(forbidding), stopped=False)
    return Unmerging(None, stopped=not stopped.isdisjoint(one.key for one in rest))


def _of_backend(finding: Finding) -> bool:
    return finding.backend is not None and finding.verdict == Verdict.REFUSE


def as_markdown() -> str:
    """The table of docs/hazards.md."""
    words = {
        Verdict.ALLOW: "allowed",
        Verdict.ZERO_ONLY: "zero pages only",
        Verdict.STOP_ONLY: "merged while stopped",
        Verdict.PAUSE: "scanning pauses",
        Verdict.UNMERGE_FIRST: "unmerge first",
        Verdict.REFUSE: "refused",
    }
    lines = ["| hazard | seen by | answer |", "|---|---|---|"]
    lines += [f"| {row.what} | {row.seen_by} | {words[row.verdict]} |" for row in HAZARDS]
    return "\n".join(lines) + "\n"
