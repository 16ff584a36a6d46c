"""An engine in a mount namespace of its own, which has ended since: the next one takes over.

As after a restart of the systemd unit (ProtectSystem= makes one), or of a container. What
was opened there has other names for everybody else.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.harness.kernel import mappings
from tests.harness.vm import Backend
from tests.qemu.conftest import Boot, MakeSettings
from tests.qemu.fleet import Member, assert_nothing_of_ours, boot_fleet, frozen, paths
from tests.service.daemon import COMMAND
from vmdedup.deduplicator import Deduplicator
from vmdedup.settings import Settings

pytestmark = pytest.mark.qemu

HELD = {"mib": 4, "hold": 1, "check_per_s": 8192}
OWN_DEVICES = (
    "mkdir {0}/dev && mount -t tmpfs dev {0}/dev && mknod {0}/dev/zero c 1 5 && chmod 666"
    " {0}/dev/zero && mount --bind {0}/dev/zero /dev/zero"
)


def merge_elsewhere(own: Settings, fleet: list[Member], prepare: str, *, killed: bool) -> None:
    """Merge from a namespace that is gone afterwards."""
    environment = {
        **os.environ,
        "VMDEDUP_RUNTIME_DIR": str(own.runtime_dir),
        "VMDEDUP_STORE_DIR": str(own.store_dir),
    }
    sockets = [word for path in paths(fleet) for word in ("--qmp", path)]
    verb = " ".join([f"'{word}'" for word in [*COMMAND, "run", "--passes", "3", *sockets]])
    script = f"{prepare} && {verb} >/dev/null" + (" && kill -9 $$" if killed else "")
    namespace = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
    done = subprocess.run(namespace, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == (-9 if killed else 0), done.stderr


def zero_names(member: Member) -> set[str]:
    return {m.path for m in mappings(member.pid) if m.path.endswith("zero") and m.inode}


@pytest.mark.parametrize("prepare", ["true", OWN_DEVICES], ids=["shared-dev", "own-dev"])
@pytest.mark.parametrize("killed", [False, True], ids=["ended", "killed"])
def test_the_next_engine_takes_over(
    settings: MakeSettings, boot: Boot, tmp_path: Path, prepare: str, killed: bool
) -> None:
    own = settings()
    fleet = boot_fleet(
        boot,
        [Backend(mib=16), Backend("ram", share=False, mib=16), Backend("file", mib=16)],
        parameters=HELD,
    )
    with frozen(fleet):
        before = [member.snapshot() for member in fleet]
        merge_elsewhere(own, fleet, prepare.format(tmp_path), killed=killed)
        assert any("/dev/zero" not in zero_names(member) for member in fleet)
        with Deduplicator(own) as dedup:
            rows = dedup.attach(paths(fleet)).vms
            assert [row.reason for row in rows if not row.mergeable] == []
            report = dedup.report()
            assert report.host.zero_pages > 500
            assert report.host.pages_sharing > 500
            assert dedup.verify().ok
            dedup.run(passes=2)
            assert dedup.report().host.zero_pages >= report.host.zero_pages
            done = dedup.unmerge()
            assert [row.remaining_pages for row in done.vms] == [0] * len(fleet)
            assert done.store_removed
        for member, snapshot in zip(fleet, before, strict=True):
            assert member.still_holds(snapshot)
    for member in fleet:
        assert_nothing_of_ours(member)
        member.vm.wait_passes(1)
        assert member.vm.errors == 0
