"""KSM's settings and counters, /sys/kernel/mm/ksm.

Owns the settings for the time of a benchmark. Promises to put back exactly what
was there, on every path, `kill -9` included (`restoring`). Refuses to start where
KSM shares pages of other processes, because its `run=2` would unmerge those too.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.benchmark.errors import BenchError
from tests.benchmark.restoring import Restoring
from vmdedup.closing import Closing

DIRECTORY = Path("/sys/kernel/mm/ksm")

KERNEL_DEFAULTS: dict[str, str] = {
    "advisor_mode": "none",
    "pages_to_scan": "100",
    "sleep_millisecs": "20",
    "use_zero_pages": "0",
    "smart_scan": "1",
}
FULL_SPEED = {**KERNEL_DEFAULTS, "pages_to_scan": "100000", "sleep_millisecs": "0"}

# The advisor refuses writes to pages_to_scan while it is on: it goes first, and last again.
_STEERED = ("pages_to_scan", "sleep_millisecs", "use_zero_pages", "smart_scan")
RMAP_ITEM_BYTES = 64
STABLE_NODE_BYTES = 64
"""struct ksm_rmap_item and struct ksm_stable_node (mm/ksm.c, 64 bit)."""


@dataclass(frozen=True)
class Counters:
    """What KSM counts over all processes."""

    pages_shared: int
    pages_sharing: int
    pages_unshared: int
    pages_volatile: int
    zero_pages: int
    full_scans: int

    @property
    def saved_pages(self) -> int:
        """Pages that exist once instead of often."""
        return self.pages_sharing + self.zero_pages


def counters() -> Counters:
    """KSM's counters as they are now."""
    return Counters(
        pages_shared=_number("pages_shared"),
        pages_sharing=_number("pages_sharing"),
        pages_unshared=_number("pages_unshared"),
        pages_volatile=_number("pages_volatile"),
        zero_pages=_number("ksm_zero_pages"),
        full_scans=_number("full_scans"),
    )


@dataclass(frozen=True)
class Share:
    """What KSM does for some processes, as of all that it does."""

    saved_pages: int
    merging_pages: int
    foreign_pages: int
    """Pages of other processes that it merges meanwhile: they take its time too."""


def share_of(pids: Collection[int]) -> Share:
    """From /proc/PID/ksm_stat; exact while KSM merges nobody else's pages.

    The kernel does not count whose a shared page is; where others have some, the
    shared pages are divided as the merged ones are.
    """
    merging = zero = 0
    for pid in pids:
        stat = _process(pid)
        merging += stat.get("ksm_merging_pages", 0)
        zero += stat.get("ksm_zero_pages", 0)
    shared = _number("pages_shared")
    everything = max(merging, shared + _number("pages_sharing"))
    if not merging:
        return Share(zero, 0, everything)
    return Share(merging - shared * merging // everything + zero, merging, everything - merging)


def rmap_items(pid: int) -> int:
    """Pages of a process that KSM keeps an rmap_item for."""
    return _process(pid).get("ksm_rmap_items", 0)


def _process(pid: int) -> dict[str, int]:
    """The numbers of /proc/PID/ksm_stat (kernel 6.1; more of them since 6.14)."""
    try:
        lines = Path(f"/proc/{pid}/ksm_stat").read_text().splitlines()
    except OSError as error:
        raise BenchError(f"/proc/{pid}/ksm_stat: {error.strerror}") from error
    pairs = (line.rsplit(maxsplit=1) for line in lines)
    return {name.rstrip(":"): int(value) for name, value in pairs if value.lstrip("-").isdigit()}


def ksmd_pid() -> int:
    """The kernel thread's process id. BenchError when there is none."""
    for comm in Path("/proc").glob("[0-9]*/comm"):
        try:
            if comm.read_text() == "ksmd\n":
                return int(comm.parent.name)
        except OSError:
            continue
    raise BenchError("this kernel has no KSM (no ksmd)")


class KsmSettings(Closing):
    """KSM's settings, ours until `close`; a context manager. Raises BenchError.

    SAFETY: for as long as this lives KSM works as the benchmark says, on every process
    that has registered memory. A kill right here has everything put back (`restoring`).
    """

    def __init__(self) -> None:
        if not (DIRECTORY / "run").exists():
            raise BenchError(f"this kernel has no KSM ({DIRECTORY} is missing)")
        now = counters()
        if now.pages_shared:
            raise BenchError(
                f"KSM shares {now.pages_sharing} pages of this host already, which the benchmark"
                " would have to unmerge: end those processes, or unmerge with"
                f" echo 2 > {DIRECTORY}/run"
            )
        self.before: dict[str, str] = {}
        self._restoring = Restoring(DIRECTORY, self._values)

    def _values(self) -> list[str]:
        """What was there, in an order in which the kernel takes it back."""
        self.before = read_settings()
        words = ["advisor_mode=none", *(f"{name}={it}" for name, it in self.before.items())]
        return sorted(words, key=_order_of_restoring)

    def close(self) -> None:
        """Put back what was there. Raises BenchError when that is not how it is then."""
        self._restoring.close()
        if read_settings() != self.before:
            raise BenchError(f"KSM's settings could not be put back; they were {self.before}")

    def use(self, settings: Mapping[str, str]) -> None:
        """Set these; `run` is not among them."""
        _write("advisor_mode", "none")
        for name in _STEERED:
            _write(name, settings[name])
        if settings["advisor_mode"] != "none":
            _write("advisor_mode", settings["advisor_mode"])

    def run(self) -> None:
        """Let ksmd scan."""
        _write("run", "1")

    def rest(self) -> None:
        """Stop scanning; what is merged stays merged."""
        _write("run", "0")

    def unmerge(self) -> float:
        """Unmerge everything; the processor seconds it took, which are the writer's."""
        began = time.thread_time()
        _write("run", "2")
        return time.thread_time() - began


def read_settings() -> dict[str, str]:
    """The settings that a benchmark changes, as they are now."""
    found = {}
    for name in ("advisor_mode", *_STEERED, "run"):
        path = DIRECTORY / name
        if path.exists():
            text = path.read_text().strip()
            found[name] = text.partition("[")[2].partition("]")[0] if "[" in text else text
    return found


def _order_of_restoring(word: str) -> int:
    name, _, value = word.partition("=")
    if name == "advisor_mode":
        return 0 if value == "none" else 2
    return 3 if name == "run" else 1


def _number(name: str) -> int:
    try:
        return int((DIRECTORY / name).read_text())
    except FileNotFoundError:
        return 0


def _write(name: str, value: str) -> None:
    path = DIRECTORY / name
    try:
        path.write_text(value)
    except FileNotFoundError:
        if KERNEL_DEFAULTS.get(name) == value:
            return
        raise BenchError(f"this kernel's KSM has no {name}") from None
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror} (run as root)") from error
