"""Where the contents of real guests come from, counted once more by the tests' own reading."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from hashlib import blake2b
from pathlib import Path

import pytest

from tests.harness.images import image
from tests.harness.kernel import ZERO_CONTENT, ram_areas, snapshot
from tests.harness.vm import Backend
from tests.qemu.conftest import Boot, MakeSettings
from tests.qemu.test_analyze import PAGE, pause
from vmdedup.deduplicator import Deduplicator
from vmdedup.models import ContentSources, SourcePages

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("needs_root")]

MIB = 96


def digests_of(file: Path) -> set[bytes]:
    """Distinct non-zero pages of a file, by the tests' own digest."""
    data = file.read_bytes()
    pages = (data[at : at + PAGE].ljust(PAGE, b"\0") for at in range(0, len(data), PAGE))
    return {blake2b(page, digest_size=16).digest() for page in pages} - {ZERO_CONTENT}


def test_counts_are_those_of_another_reading(
    settings: MakeSettings, boot: Boot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    guest = image("tiny")
    assert guest.initrd is not None
    script = "zcat -f $1 | cpio -id --quiet bin/busybox"
    subprocess.run(["sh", "-c", script, "sh", guest.initrd], cwd=tmp_path, check=True)
    busybox = digests_of(tmp_path / "bin/busybox")
    kinds = [Backend("memfd", share=True, mib=MIB), Backend("ram", share=False, mib=MIB)]
    vms = [
        boot("tiny", backend=kind, parameters={"mib": 8, "seed": seed}, ready=False)
        for seed, kind in enumerate(kinds, 1)
    ]
    for vm in vms:
        vm.wait_ready()
        pause(vm)
    held = [snapshot(vm.pid, ram_areas(vm.pid, [MIB])) for vm in vms]
    known = [str(guest.initrd), str(guest.kernel)]
    own = settings()

    def looked() -> ContentSources:
        with Deduplicator(own) as dedup:
            dedup.attach([str(vm.qmp_path) for vm in vms], merging=False)
            return dedup.content_sources(known)

    found = looked()
    assert [each.kind for each in found.known] == ["initrd", "kernel"]
    for told, mine in zip(found.vms, held, strict=True):
        content = [each for each in mine.contents if each != ZERO_CONTENT]
        assert sum(row.shared_pages + row.unique_pages for row in told.sources) == len(content)
        (row,) = (row for row in told.sources if row.part == "bin/busybox")
        assert row.shared_pages + row.unique_pages == sum(each in busybox for each in content)
        assert row.shared_pages > 100
    times = Counter(each for mine in held for each in mine.contents if each != ZERO_CONTENT)
    assert found.shared_pages == sum(number for number in times.values() if number > 1)
    assert 0 < found.explained_pages <= found.shared_pages
    (pair,) = found.pairs
    common = set(held[0].contents) & set(held[1].contents) - {ZERO_CONTENT}
    assert sum(row.pages for row in pair.sources) == len(common)

    with Deduplicator(own) as dedup:
        dedup.attach([str(vm.qmp_path) for vm in vms])
        dedup.run(until_converged=True)
    merged = looked()
    assert sources(merged) == sources(found)
    with Deduplicator(own) as dedup:
        dedup.attach([str(vm.qmp_path) for vm in vms])
        dedup.unmerge()


def sources(found: ContentSources) -> list[list[SourcePages]]:
    return [sorted(vm.sources, key=str) for vm in found.vms]


def test_the_verb_and_the_page(boot: Boot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    guest = image("tiny")
    vm = boot("tiny", backend=Backend(mib=MIB), parameters={"mib": 4})

    def run(*words: str) -> str:
        command = [sys.executable, "-c", "from vmdedup.cli.main import main; main()", *words]
        command += ["--known", str(guest.initrd), "--qmp", str(vm.qmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "initrd: bin/busybox" in run("explain", "--contents")
    document = ContentSources.model_validate(json.loads(run("explain", "--contents", "--json")))
    assert document.vms[0].name == vm.name
    page = tmp_path / "page.html"
    run("report", "-o", str(page))
    assert "bin/busybox" in page.read_text()
