"""The daemon at work on VMs of the platforms, for a while: what is done to them, what is seen.

A course starts the VMs as the platforms do, and the daemon with the settings file that
docs/deployments.md has for them. Then guests use, free and reuse memory, and tools ask over the
monitors. In a long course the daemon is restarted or killed too. Counts every page that is not
as its guest wrote it.
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from tests.chaos.daemons import patiently
from tests.harness.kernel import becomes_true, mappings
from tests.harness.libvirtd import Libvirtd
from tests.harness.pages import page
from tests.harness.tool import Tool
from tests.platforms.machines import (
    Incus,
    Machine,
    Proxmox,
    kubevirt,
    number_said,
)
from tests.service.daemon import Directories
from vmdedup.client import ServiceError
from vmdedup.models import VmListing

PLATFORMS = ("proxmox", "kubevirt", "kubevirt-libvirt", "incus")
_KEEP_MIB = 8
_REPORTED_S = 3
_TOOL_PAUSE_S = 1.0
_TELL_S = 30
_PATIENCE_S = 180
"""The host may be busy."""
_ALL_SHARE = '[[domains]]\nname = "*"\ndomain = "tests"\n'


@dataclass
class Figures:
    """What was done, and what was seen."""

    vms: int = 0
    seconds: float = 0.0
    events: dict[str, int] = field(default_factory=dict)
    wrong_pages: int = 0
    """Pages that a guest had written, or takes for zeroes, and that were not so."""
    guest_checks: int = 0
    merged_pages: dict[str, int] = field(default_factory=dict)
    """By VM: most pages on the store or the zero page, by the kernel's word."""
    store_pages: dict[str, int] = field(default_factory=dict)
    monitors: dict[str, str | None] = field(default_factory=dict)
    hints: dict[str, str | None] = field(default_factory=dict)
    """What `vms` says of a VM that is merged in part."""
    tool_answers: int = 0
    tool_longest_s: float = 0.0
    tool_failures: list[str] = field(default_factory=list)
    left_pages: int = 0
    """Pages still ours after an unmerge of everything."""
    events_seen: dict[str, int] = field(default_factory=dict)
    """Events of the daemon, by kind."""
    unexpected: list[str] = field(default_factory=list)

    def problems(self) -> list[str]:
        """What must not be, in words; empty when all is well."""
        found = [*self.unexpected, *self.tool_failures]
        if self.wrong_pages:
            found.append(f"{self.wrong_pages} wrong pages")
        if self.left_pages:
            found.append(f"{self.left_pages} pages are left after the unmerge")
        if not self.guest_checks:
            found.append("no guest has checked anything")
        return found


def settings_of(platform: str) -> str:
    """The settings file that the documentation has for a platform."""
    heading = {"proxmox": "Proxmox VE", "incus": "Incus, LXD, lima, GNS3, quickemu"}
    section = heading.get(platform, "KubeVirt")
    blocks = page("docs/deployments.md").blocks
    (text,) = [b.text for b in blocks if b.section == section and b.language == "toml"]
    return text


class Course:
    """VMs of some platforms, and a daemon that was told of none of them. A context manager."""

    def __init__(self, platforms: Sequence[str], *, seed: int = 1) -> None:
        self._platforms = platforms
        self._random = random.Random(seed)
        self._exits = ExitStack()
        self._vms: list[Machine] = []
        self._tools: list[Tool] = []
        self._arguments: list[str] = []
        self.figures = Figures()

    def __enter__(self) -> Course:
        with ExitStack() as exits:
            self._directories = exits.enter_context(Directories())
            for platform in self._platforms:
                self._start(exits, platform)
            for vm in self._vms:
                if isinstance(vm, Incus):
                    vm.resume()
                vm.wait_ready()
            self.figures.vms = len(self._vms)
            self._directories.write(self._settings())
            self._begin_daemon()
            exits.callback(self._end_daemon)
            for vm in self._vms:
                if isinstance(vm, Proxmox | Incus):
                    tool = Tool(vm.qmp_path, pause_s=_TOOL_PAUSE_S)
                    self._tools.append(exits.enter_context(tool))
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def _start(self, exits: ExitStack, platform: str) -> None:
        """A VM, or two where free pages are reported: as it is, and with what has all merged.

        The first relies on zeroes in what it has reported, where it is told that it may.
        """
        if platform == "incus":
            self._vms.append(exits.enter_context(Incus(1)))
            return
        for number, page_poison, kernel in ((1, True, "init_on_free=1"), (2, False, "")):
            vm: Machine
            if platform == "proxmox":
                disks = self._directories.base
                vm = Proxmox(100 + number, disks, kernel=kernel, page_poison=page_poison)
            else:
                pod = exits.enter_context(Libvirtd(pod=True))
                own = platform == "kubevirt"
                vm = kubevirt(pod, number, own_socket=own, page_poison=page_poison, kernel=kernel)
                if not own:
                    self._arguments = ["--libvirt", pod.uri]
            exits.callback(vm.close)
            self._vms.append(vm)
            if self._arguments:
                return  # a daemon follows one libvirt, and each pod has its own

    def _settings(self) -> str:
        """What is documented for these platforms; a rule lets all VMs share."""
        texts = sorted({settings_of(platform) for platform in self._platforms})
        rules = [text for text in texts if text.startswith("[[")]
        return "".join([*(text for text in texts if text not in rules), _ALL_SHARE, *rules])

    def _begin_daemon(self) -> None:
        self._daemon = patiently(self._directories, *self._arguments)

    def _end_daemon(self) -> None:
        self._daemon.kill()

    # --- what happens ---------------------------------------------------------------

    def run(self, seconds: float, *, long: bool = False) -> Figures:
        """Wait until all are merged; then things happen for so long; at last unmerge all."""
        figures, events = self.figures, Counter[str]()
        self._merge()
        self._note_rows()
        happenings: dict[str, tuple[int, Callable[[], None]]] = {
            "reuse": (6, self._reuse),
            "load": (4, self._load),
            "unmerge": (1, self._unmerge_one),
        }
        if long:
            happenings |= {"restart": (1, self._restart), "kill": (1, self._kill)}
            happenings |= {"balloon": (2, self._balloon)}
        names, weights = list(happenings), [weight for weight, _ in happenings.values()]
        began = told = time.monotonic()
        while time.monotonic() - began < seconds:
            name = self._random.choices(names, weights)[0] if events else "reuse"
            events[name] += 1
            try:
                happenings[name][1]()
            except Exception as error:  # whatever it is belongs into the figures
                figures.unexpected.append(f"{name}: {type(error).__name__}: {error}"[:2000])
            self._look_round()
            if time.monotonic() - told > _TELL_S:
                told = time.monotonic()
                told_s = f"{told - began:6.0f} s, {figures.wrong_pages} wrong"
                print(told_s, dict(events), file=sys.stderr, flush=True)
        figures.seconds = round(time.monotonic() - began, 1)
        figures.events = dict(events)
        self._finish()
        return figures

    def _any(self) -> Machine:
        return self._random.choice(self._vms)

    def _reuse(self) -> None:
        """A guest uses memory with content, frees it, reports it, and takes it anew."""
        vm = self._any()
        assert number_said(vm, f"keep {_KEEP_MIB}", "kept=") == _KEEP_MIB
        time.sleep(self._random.uniform(1, 4))
        self.figures.wrong_pages += number_said(vm, "look", "wrong=")
        time.sleep(self._random.uniform(0, 2))
        self.figures.wrong_pages += number_said(vm, "look", "wrong=")
        vm.ask("end", "ended")
        time.sleep(_REPORTED_S)
        self.figures.wrong_pages += number_said(vm, f"fresh {_KEEP_MIB}", "stale=")

    def _load(self) -> None:
        self._any().set_rewrite_rate(self._random.choice([0, 50, 500, 2000]))

    def _unmerge_one(self) -> None:
        self._ask(lambda: self._daemon.client.unmerge([self._any().name]))

    def _balloon(self) -> None:
        """As Proxmox does when its host runs short; `keep` still has the memory it waits for."""
        vm = self._random.choice([each for each in self._vms if isinstance(each, Proxmox)])
        vm.balloon_to(self._random.choice([92, 94, 96]))

    def _restart(self) -> None:
        self._daemon.end()
        self._daemon.kill()
        self._begin_daemon()

    def _kill(self) -> None:
        self._daemon.kill()
        self._begin_daemon()

    @staticmethod
    def _ask(question: Callable[[], object]) -> None:
        try:
            question()
        except ServiceError as error:  # it may just look for its VMs
            print(f"refused: {error}", file=sys.stderr)

    # --- what is seen ----------------------------------------------------------------

    def _rows(self) -> dict[int | None, VmListing]:
        return {row.pid: row for row in self._daemon.client.vms().vms}

    def _are_mergeable(self) -> bool:
        rows = self._rows()
        return all(vm.pid in rows and rows[vm.pid].mergeable for vm in self._vms)

    def _merge(self) -> None:
        attached = becomes_true(self._are_mergeable, _PATIENCE_S)
        assert attached, (self._rows(), self._directories.log.read_text())
        self._daemon.client.merge(timeout_s=60)
        assert becomes_true(self._are_merged, _PATIENCE_S), self._daemon.client.vms()

    def _are_merged(self) -> bool:
        self._look_round()
        return all(self.figures.merged_pages[vm.name] > 200 for vm in self._vms)

    def _note_rows(self) -> None:
        for vm in self._vms:
            row = self._rows()[vm.pid]
            self.figures.monitors[vm.name] = row.monitor
            self.figures.hints[vm.name] = row.reason

    def _look_round(self) -> None:
        most = self.figures
        for vm in self._vms:
            if not vm.alive:
                most.unexpected.append(f"{vm.name} ended: {vm.transcript()}")
                continue
            ours = [each for each in mappings(vm.pid) if each.is_ours]
            # Mapped shared, the store serves to compare in place.
            stores = [m for m in ours if m.is_store and m.permissions.endswith("p")]
            for noted, found in ((most.merged_pages, ours), (most.store_pages, stores)):
                pages = sum(each.pages for each in found)
                noted[vm.name] = max(noted.get(vm.name, 0), pages)

    def _finish(self) -> None:
        figures = self.figures
        assert becomes_true(self._are_mergeable, _PATIENCE_S), self._rows()
        for event in self._daemon.client.events().events:
            figures.events_seen[event.kind] = figures.events_seen.get(event.kind, 0) + 1
        for tool in self._tools:
            figures.tool_answers += tool.answered
            figures.tool_longest_s = max(figures.tool_longest_s, tool.longest_s)
            figures.tool_failures += tool.failures
        assert becomes_true(self._is_unmerged, _PATIENCE_S)
        self._daemon.end()
        if "Traceback" in (said := self._directories.log.read_text()):
            figures.unexpected.append(said[said.index("Traceback") :][:3000])
        for vm in self._vms:
            vm.set_rewrite_rate(100)
            vm.wait_passes(1)
            figures.guest_checks += vm.status().checks
            figures.wrong_pages += vm.errors
            figures.unexpected += vm.serial.complaints()

    def _is_unmerged(self) -> bool:
        self._daemon.client.set(run=2)
        ours = [m for vm in self._vms for m in mappings(vm.pid) if m.is_ours]
        self.figures.left_pages = sum(m.pages for m in ours)
        return not ours
