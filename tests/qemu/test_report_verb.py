"""`vmdedup report` on real VMs without a daemon: every format says the same, and judges."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.vm import Backend
from tests.qemu.conftest import Boot, MakeSettings
from tests.qemu.fleet import Member, attached, boot_fleet, merge, paths
from vmdedup.models import SharingReport
from vmdedup.report.parts import PARTS, ram_parts
from vmdedup.settings import Settings

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("needs_root")]

COMMAND = [sys.executable, "-c", "from vmdedup.cli.main import main; main()", "report"]


@pytest.fixture
def own(settings: MakeSettings) -> Settings:
    return settings()


@pytest.fixture
def members(own: Settings, boot: Boot) -> Iterator[list[Member]]:
    """Two merged VMs that write nothing; they find no error at the end."""
    backends = [Backend(share=True, mib=16), Backend("ram", share=False, mib=16)]
    fleet = boot_fleet(boot, backends, parameters={"mib": 4, "hold": 1})
    merge(own, fleet)
    yield fleet
    for member in fleet:
        member.vm.wait_passes(1)
        assert member.vm.errors == 0


def report(
    own: Settings, members: list[Member], *words: str, code: int = 0
) -> subprocess.CompletedProcess[str]:
    qmp = [word for path in paths(members) for word in ("--qmp", path)]
    done = subprocess.run(
        [*COMMAND, *qmp, *words],
        capture_output=True,
        text=True,
        check=False,
        env={
            "VMDEDUP_RUNTIME_DIR": str(own.runtime_dir),
            "VMDEDUP_STORE_DIR": str(own.store_dir),
        },
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_formats_files_and_judgement(own: Settings, members: list[Member], tmp_path: Path) -> None:
    names = [member.name for member in members]
    table = report(own, members).stdout
    assert max(map(len, table.splitlines())) <= 100
    assert "\nall " in table
    markdown = report(own, members, "--format", "markdown").stdout
    page = tmp_path / "report.html"
    assert report(own, members, "-o", str(page)).stdout == ""
    baseline = tmp_path / "baseline.json"
    report(own, members, "-o", str(baseline))
    saved = SharingReport.model_validate_json(baseline.read_bytes())
    assert [vm.name for vm in saved.vms] == names
    assert saved.host.saved_bytes > 0
    for text in (table, markdown, page.read_text()):
        assert all(name in text for name in names)
    report(own, members, "--fail-under", "1%", "--baseline", str(baseline), "--tolerance", "100")
    document = json.loads(baseline.read_text())
    document["vms"][1]["saved_bytes"] = document["vms"][1]["present_bytes"]
    baseline.write_text(json.dumps(document))
    worse = report(own, members, "--baseline", str(baseline), code=3)
    assert f"vmdedup: {names[1]}: " in worse.stderr
    assert f"vmdedup: {names[0]}: " not in worse.stderr
    assert "shares less" in worse.stdout
    report(own, members, "--fail-under", "99%", "--format", "html", code=3)
    again = report(own, members[:1], "--from", str(baseline), "--qmp", "x", code=2)
    assert "exclude each other" in again.stderr
    report(own, [], "--from", str(baseline), "--format", "markdown")


def test_parts_and_contents_are_the_kernels(own: Settings, members: list[Member]) -> None:
    with attached(own, members) as dedup:
        found = dedup.run(until_converged=True, timeout_s=40)
    for vm in found.vms:
        parts = ram_parts(vm)
        assert list(parts) == list(PARTS)
        assert sum(parts.values()) == vm.ram_bytes == 16 << 20
        assert vm.absent_pages
        assert vm.unique_pages is not None
        assert vm.volatile_pages is not None
    zero = next(row for row in found.contents if row.what == "zero")
    assert (zero.pages, zero.vms) == (found.host.zero_pages, 2)
    assert found.contents == sorted(found.contents, key=lambda row: -row.pages)
    assert all(row.pages >= 2 for row in found.contents)


def test_breaks_are_counted_as_events(own: Settings, members: list[Member]) -> None:
    with attached(own, members) as dedup:
        first = dedup.run(passes=1)
        assert first.host.cow_breaks is not None
        members[0].vm.ask("go", "going")
        members[0].vm.wait_passes(1)
        second = dedup.run(passes=3)
    assert second.host.cow_breaks is not None
    assert second.host.cow_breaks > first.host.cow_breaks
    assert sum(vm.cow_breaks or 0 for vm in second.vms) == second.host.cow_breaks
