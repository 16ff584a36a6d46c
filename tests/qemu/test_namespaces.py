"""Engines in mount namespaces and roots of their own, one after the other, on the same VMs.

As after a restart of the systemd unit (ProtectSystem= makes a namespace), or of a container.
What was opened there has other names for everybody else, and no name at all once it has ended.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.harness.capabilities import root_missing
from tests.harness.kernel import mappings
from tests.harness.vm import Backend
from tests.qemu.conftest import Boot, MakeSettings
from tests.qemu.fleet import Member, assert_nothing_of_ours, boot_fleet, frozen, paths
from vmdedup.deduplicator import Deduplicator
from vmdedup.settings import Settings

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(300)]

HELD = {"mib": 4, "hold": 1, "check_per_s": 8192}
BACKENDS = [Backend(mib=16), Backend("ram", share=False, mib=16), Backend("file", mib=16)]

ENGINE = """
import json, os, signal, sys
from vmdedup import Deduplicator, Settings

end, *sockets = sys.argv[1:]
with Deduplicator(Settings()) as dedup:
    rows = dedup.attach(sockets).vms
    found = dedup.report().host
    verified = dedup.verify().ok
    unmerged = dedup.unmerge()
    merged = dedup.run(passes=3).host
    print(json.dumps({
        "refused": [row.reason for row in rows if not row.mergeable],
        "hints": [vm.hint for vm in dedup.report().vms],
        "found": [found.zero_pages, found.pages_sharing],
        "verified": verified,
        "remaining": sum(row.remaining_pages for row in unmerged.vms),
        "merged": [merged.zero_pages, merged.pages_sharing],
    }), flush=True)
    if end == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
"""

_OWN_DEVICES = (
    "mkdir -p {0}/dev && mount -t tmpfs dev {0}/dev && mknod {0}/dev/zero c 1 5"
    " && mount --bind {0}/dev/zero /dev/zero"
)
_OWN_ROOT = "mkdir -p {0}/root && mount --rbind / {0}/root && cd {0}/root"
_CONTAINER = (
    " && mount -t tmpfs own mnt && mkdir mnt/store mnt/old && mount --bind {1} mnt/store"
    " && mount -t tmpfs own dev && mkdir dev/shm && for each in null zero urandom userfaultfd;"
    " do ! [ -e /dev/$each ] || { touch dev/$each && mount --bind /dev/$each dev/$each; }; done"
    " && umount dev/zero && rm dev/zero && mknod dev/zero c 1 5"
    " && pivot_root . mnt/old && umount -l /mnt/old && export VMDEDUP_STORE_DIR=/mnt/store"
)


@dataclass(frozen=True)
class Place:
    """Where an engine runs: what is unshared, and how that is furnished, as shell words."""

    name: str
    unshared: str = "--mount"
    prepare: str = "true"
    enter: str = ""


PLACES = (
    Place("host", unshared=""),
    Place("namespace"),
    Place("own-dev", prepare=_OWN_DEVICES),
    Place("own-root", prepare=_OWN_ROOT, enter="chroot ."),
    Place(
        "container",
        unshared="--mount --uts --ipc --net --cgroup",
        prepare=_OWN_ROOT + _CONTAINER,
    ),
)
LAPS = (1, 2)
"""Strides through five places: in one lap all end by themselves, in the other by SIGKILL.

1 to 4 would have each come after each other one.
"""


@dataclass(frozen=True)
class Answer:
    """What an engine found, and what it left."""

    refused: list[str]
    hints: list[str | None]
    found: list[int]
    verified: bool
    remaining: int
    merged: list[int]


def run_in(place: Place, own: Settings, fleet: list[Member], folder: Path, end: str) -> Answer:
    """Take over what is merged, unmerge it, merge it again, and end there."""
    environment = {
        **os.environ,
        "VMDEDUP_RUNTIME_DIR": str(own.runtime_dir),
        "VMDEDUP_STORE_DIR": str(own.store_dir),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    engine = shlex.join([sys.executable, "-c", ENGINE, end, *paths(fleet)])
    prepare = place.prepare.replace("{0}", str(folder)).replace("{1}", str(own.store_dir))
    command = ["sh", "-c", f"{prepare} && exec {place.enter} {engine}"]
    if place.unshared:
        command = ["unshare", *place.unshared.split(), "--propagation", "private", *command]
    done = subprocess.run(
        command, env=environment, cwd="/", check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == (-signal.SIGKILL if end == "killed" else 0), done.stderr
    return Answer(**json.loads(done.stdout))


def zero_names(fleet: list[Member]) -> set[str]:
    zeroes = (m.path for member in fleet for m in mappings(member.pid) if m.inode)
    return {path for path in zeroes if path.endswith("zero")}


def test_each_takes_over_from_each_other(
    settings: MakeSettings, boot: Boot, tmp_path: Path, need: Callable[[str | None], None]
) -> None:
    need(root_missing())
    own = settings()
    own.store_dir.mkdir(mode=0o700)
    fleet = boot_fleet(boot, BACKENDS, parameters=HELD)
    names: set[str] = set()
    with frozen(fleet):
        before = [member.snapshot() for member in fleet]
        merged = [0, 0]
        for lap in LAPS:
            for step in range(len(PLACES)):
                place = PLACES[lap * step % len(PLACES)]
                folder = tmp_path / f"{lap}-{step}"
                folder.mkdir()
                end = "ended" if lap % 2 else "killed"
                answer = run_in(place, own, fleet, folder, end)
                assert not answer.refused, place
                assert (answer.found, answer.verified, answer.remaining) == (merged, True, 0), place
                merged = answer.merged
                assert min(merged) > 200, place
                names |= zero_names(fleet)
        assert len(names) > 1, "all namespaces named the zero device alike"
        with Deduplicator(own) as dedup:
            dedup.attach(paths(fleet))
            done = dedup.unmerge()
            assert [row.remaining_pages for row in done.vms] == [0] * len(fleet)
            assert done.store_removed
        for member, snapshot in zip(fleet, before, strict=True):
            assert member.still_holds(snapshot)
    for member in fleet:
        assert_nothing_of_ours(member)
        member.vm.wait_passes(1)
        assert member.vm.errors == 0


def test_a_container_without_the_device_merges_others_vms_in_pauses(
    settings: MakeSettings, boot: Boot, tmp_path: Path, need: Callable[[str | None], None]
) -> None:
    """Their QEMUs may make no userfaultfd by themselves."""
    need(root_missing())
    own = settings()
    own.store_dir.mkdir(mode=0o700)
    fleet = boot_fleet(boot, BACKENDS[:2], parameters=HELD, uid=65534)
    place = PLACES[-1]
    without = replace(place, prepare=place.prepare.replace(" userfaultfd", ""))
    answer = run_in(without, own, fleet, tmp_path, "ended")
    assert not answer.refused
    assert min(answer.merged) > 200
    for hint in answer.hints:
        assert hint is not None
        assert "merged only while stopped" in hint
        assert "/dev/userfaultfd: No such file or directory" in hint
    with Deduplicator(own) as dedup:
        dedup.attach(paths(fleet))
        assert [row.remaining_pages for row in dedup.unmerge().vms] == [0, 0]
    for member in fleet:
        assert_nothing_of_ours(member)
        member.vm.wait_passes(1)
        assert member.vm.errors == 0
