"""The hazard table on given facts, and trust domains."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

import vmdedup
from vmdedup.attach.identity import VmIdentity
from vmdedup.attach.ranges import Region
from vmdedup.errors import RefusedError
from vmdedup.policy.domains import NONE, ZERO_ONLY, crowded_default_domains, domain_of
from vmdedup.policy.facts import Device, Facts, parse_netdevs
from vmdedup.policy.hazards import (
    HAZARDS,
    REPORTS_FREE_PAGES,
    Finding,
    Unmerging,
    Verdict,
    as_markdown,
    judge,
    must_unmerge,
    reason,
    refused_backends,
    stop_only,
    unmerging,
    verdict,
    zero_only,
)
from vmdedup.policy.mappers import Mapper
from vmdedup.settings import DomainRule, Versions
from vmdedup.units import Hva

pytestmark = pytest.mark.unit

CLEAN = Facts(version=(7, 2, 22))
REGION = Region(
    backend="ram0",
    kind="file",
    share=True,
    merge=True,
    dump=True,
    policy="default",
    host_nodes=(),
    size_bytes=1 << 20,
    start=Hva(0x7F0000000000),
    ram_file=(1, 2),
    ram_offset_bytes=0,
    ram_fd=5,
    filesystem="tmpfs",
)


PRIVATE = replace(REGION, kind="ram", share=False, ram_file=None, filesystem="")
BY_HAND = replace(PRIVATE, merge=False)


def device(kind: str, **properties: str | bool) -> Facts:
    named = {name.replace("_", "-"): value for name, value in properties.items()}
    return replace(CLEAN, devices=(Device("d0", kind, named),))


def test_nothing_found_is_allowed() -> None:
    assert judge(CLEAN) == []
    assert verdict([]) is Verdict.ALLOW
    assert reason([]) is None


@pytest.mark.parametrize(
    ("facts", "key", "word", "stopped"),
    [
        (
            replace(device("virtio-balloon-pci"), regions=(replace(REGION, ram_fd=None),)),
            "balloon-without-file",
            "memory-backend-memfd",
            False,
        ),
        (device("vhost-user-fs-pci"), "vhost-user", "vhost-user-fs-pci", True),
        (replace(CLEAN, netdev_types=(("n0", "vhost-user"),)), "vhost-user", "n0", True),
        (replace(CLEAN, objects=(("c0", "cryptodev-vhost-user"),)), "vhost-user", "c0", True),
        (replace(CLEAN, mappers=(Mapper("ram0", 42, "virtiofsd"),)), "other-mapper", "42", True),
        (replace(CLEAN, aliases=("0x1000",)), "second-mapping", "0x1000", True),
        (
            replace(CLEAN, capabilities=frozenset({"x-ignore-shared"}), regions=(REGION,)),
            "ignore-shared",
            "x-ignore-shared",
            False,
        ),
    ],
)
def test_a_hazard_that_needs_the_memory_back(
    facts: Facts, key: str, word: str, stopped: bool
) -> None:
    (finding,) = judge(facts)
    assert (finding.key, finding.backend) == (key, None)
    assert word in finding.reason
    assert verdict([finding]) is Verdict.UNMERGE_FIRST
    assert unmerging([finding], on_store=True) == Unmerging(None, stopped=stopped)


@pytest.mark.parametrize(
    ("facts", "key", "word"),
    [
        (device("vfio-pci"), "pinned-device", "vfio-pci (d0)"),
        (device("vhost-scsi-pci"), "pinned-device", "vhost-scsi"),
        (device("vhost-vdpa-device-pci"), "pinned-device", "vhost-vdpa"),
        (replace(CLEAN, netdev_types=(("n0", "vhost-vdpa"),)), "pinned-device", "n0"),
        (replace(CLEAN, open_paths=frozenset({"/dev/vfio/12"})), "pinned-device", "/dev/vfio/12"),
        (replace(CLEAN, block_drivers=(("disk", "nvme"),)), "pinned-drive", "disk"),
        (
            replace(CLEAN, block_drivers=(("d", "virtio-blk-vhost-vdpa"),)),
            "pinned-drive",
            "virtio-blk-vhost-vdpa",
        ),
        (device("virtio-gpu-gl-pci", blob=True), "gpu-blob", "blob=on"),
        (replace(CLEAN, unknown_exports=("virtio-9p-pci (d0)",)), "9p-remote", "unknown"),
        (
            replace(CLEAN, shared_folders=(("/srv", "ext4"), ("/srv/n", "nfs4"))),
            "9p-remote",
            "/srv/n on filesystem nfs4",
        ),
        (replace(CLEAN, shared_folders=(("/n", "nfs4"),)), "9p-remote", "nfs4"),
        (replace(CLEAN, pinned_kib=4), "pinned-memory", "4 KiB"),
        (replace(CLEAN, registered_buffers=3), "registered-buffers", "3 io_uring"),
        (replace(CLEAN, confidential="/objects/sev0"), "confidential", "sev0"),
        (replace(CLEAN, nested_runs=9), "nested", "nested_run 9"),
        (replace(CLEAN, replay_mode="record"), "record-replay", "record"),
        (replace(CLEAN, run_state="colo"), "colo", "COLO"),
        (replace(CLEAN, tracer_pid=77), "debugger", "77"),
        (replace(CLEAN, shadow_stack=True), "shadow-stack", "shadow"),
    ],
)
def test_a_hazard_refuses_the_vm_and_names_its_cause(facts: Facts, key: str, word: str) -> None:
    (finding,) = judge(facts)
    assert (finding.key, finding.backend) == (key, None)
    assert word in finding.reason
    assert verdict([finding]) is Verdict.REFUSE
    assert reason([finding]) == finding.reason
    assert unmerging([finding], on_store=True).refusal == finding.reason


PAUSING = [
    replace(CLEAN, migration_status="active"),
    replace(CLEAN, capabilities=frozenset({"background-snapshot"})),
    replace(CLEAN, ksm_runs=True, regions=(PRIVATE,)),
]
REPORTING = judge(device("virtio-balloon-pci", free_page_reporting=True))


@pytest.mark.parametrize("facts", PAUSING)
def test_what_pauses_merging_keeps_no_store_page_from_going_home(facts: Facts) -> None:
    findings = [*judge(facts), *REPORTING]
    assert verdict(findings) is Verdict.PAUSE
    assert must_unmerge(findings, on_store=True)
    assert unmerging(findings, on_store=True).refusal is None
    pinned = [*findings, *judge(replace(CLEAN, pinned_kib=4))]
    assert not must_unmerge(pinned, on_store=True)
    assert "VmPin" in (unmerging(pinned, on_store=True).refusal or "")


@pytest.mark.parametrize("facts", PAUSING)
def test_a_userfaultfd_of_qemu_keeps_store_pages_where_they_are(facts: Facts) -> None:
    findings = [*judge(replace(facts, own_userfaults=1)), *REPORTING]
    assert "(it has 1 of its own)" in (unmerging(findings, on_store=True).refusal or "")


def test_nor_does_an_unmerge_that_must_come_first() -> None:
    by_file = replace(CLEAN, capabilities=frozenset({"x-ignore-shared"}), own_userfaults=1)
    findings = judge(replace(by_file, regions=(REGION,)))
    assert verdict(findings) in (Verdict.UNMERGE_FIRST, Verdict.PAUSE)
    assert "(it has 1 of its own)" in (unmerging(findings, on_store=True).refusal or "")


@pytest.mark.parametrize("facts", PAUSING[:2])
def test_what_pauses_merging_leaves_zero_pages_alone(facts: Facts) -> None:
    """However the balloon discards them, they read as zeroes."""
    findings = [*judge(facts), *REPORTING]
    assert not must_unmerge(findings, on_store=False)
    assert unmerging(findings, on_store=False).refusal == judge(facts)[0].reason


def test_a_stronger_finding_does_not_make_a_vm_live() -> None:
    untried = Finding("untried", Verdict.STOP_ONLY, "its QEMU was not tried")
    stronger = Finding("migration", Verdict.UNMERGE_FIRST, "it is about to migrate")
    assert verdict([untried, stronger]) is not Verdict.STOP_ONLY
    assert stop_only([stronger, untried]) == ["its QEMU was not tried"]
    assert stop_only([stronger]) == []


@pytest.mark.parametrize("poison", [{}, {"page_poison": True}])
def test_with_free_page_reporting_zero_pages_are_merged(poison: dict[str, bool]) -> None:
    finding, told = judge(device("virtio-balloon-pci", free_page_reporting=True, **poison))
    assert (told.key, told.verdict) == (REPORTS_FREE_PAGES, Verdict.ALLOW)
    assert verdict([finding, told]) is Verdict.ZERO_ONLY
    assert "d0" in finding.reason
    assert zero_only([finding]) == [finding.reason]
    assert unmerging([finding], on_store=True).refusal is None


def test_without_page_poison_only_the_account_knows_less() -> None:
    found = judge(device("virtio-balloon-pci", free_page_reporting=True, page_poison=False))
    assert [(each.key, each.verdict) for each in found] == [(REPORTS_FREE_PAGES, Verdict.ALLOW)]


@pytest.mark.parametrize(
    "facts",
    [
        device("virtio-balloon-pci", free_page_reporting=False),
        replace(device("virtio-balloon-pci"), regions=(REGION, PRIVATE)),
        device("virtio-gpu-pci", blob=False),
        device("vhost-vsock-pci"),
        device("nvme", pmrdev=""),
        replace(CLEAN, netdev_types=(("n0", "tap"),), open_paths=frozenset({"/dev/vhost-net"})),
        replace(CLEAN, shared_folders=(("/srv", "ext4"),)),
        replace(CLEAN, capabilities=frozenset({"x-ignore-shared"})),
        replace(CLEAN, migration_status="completed", run_state="paused"),
        replace(CLEAN, version=(10, 2, 0)),
        replace(CLEAN, version=(11, 1, 3)),
        replace(CLEAN, ksm_runs=True, regions=(REGION, BY_HAND)),
        replace(CLEAN, objects=(("rng0", "rng-random"), ("cryptodev0", "cryptodev-backend"))),
        replace(CLEAN, regions=(REGION, replace(REGION, filesystem="memfd"))),
    ],
)
def test_what_only_looks_like_a_hazard_is_allowed(facts: Facts) -> None:
    assert judge(facts) == []


@pytest.mark.parametrize(
    ("facts", "answer"),
    [
        (replace(CLEAN, version=(7, 1, 0)), Verdict.STOP_ONLY),
        (replace(CLEAN, version=(11, 2, 0)), Verdict.STOP_ONLY),
        (replace(CLEAN, regions=(replace(REGION, filesystem="ext4"),)), Verdict.STOP_ONLY),
        (replace(CLEAN, migration_status="active"), Verdict.PAUSE),
        (replace(CLEAN, migration_status="postcopy-active"), Verdict.PAUSE),
        (replace(CLEAN, run_state="save-vm"), Verdict.PAUSE),
        (replace(CLEAN, dump_status="active"), Verdict.PAUSE),
        (replace(CLEAN, capabilities=frozenset({"background-snapshot"})), Verdict.PAUSE),
        (replace(CLEAN, own_userfaults=1), Verdict.PAUSE),
        (replace(CLEAN, ksm_runs=True, regions=(PRIVATE,)), Verdict.PAUSE),
        (
            replace(CLEAN, ksm_runs=True, ksm_takes_all=True, regions=(BY_HAND,)),
            Verdict.PAUSE,
        ),
        (replace(CLEAN, migration_mode="cpr-transfer"), Verdict.UNMERGE_FIRST),
    ],
)
def test_milder_answers(facts: Facts, answer: Verdict) -> None:
    findings = judge(facts)
    assert len(findings) == 1
    assert verdict(findings) is answer


@pytest.mark.parametrize(
    ("version", "trusted", "live"),
    [
        ((11, 0, 0), ((7, 2), (11, 99)), True),
        ((6, 2, 0), ((6, 2), (10, 99)), True),
        ((6, 1, 9), ((6, 2), (10, 99)), False),
        ((10, 0, 2), ((7, 2), (9, 99)), False),
        ((10, 0, 2), ((10, 0), (10, 0)), True),
    ],
)
def test_the_setting_alone_says_where_draining_is_trusted(
    version: tuple[int, int, int], trusted: Versions, live: bool
) -> None:
    findings = judge(replace(CLEAN, version=version, drain_trusted=trusted))
    assert [one.key for one in findings] == ([] if live else ["untried-version"])
    assert verdict(findings) is (Verdict.ALLOW if live else Verdict.STOP_ONLY)


def test_the_strongest_answer_counts() -> None:
    facts = replace(device("vfio-pci"), version=(12, 0, 0), migration_status="active")
    findings = judge(facts)
    assert {one.verdict for one in findings} == {
        Verdict.REFUSE,
        Verdict.PAUSE,
        Verdict.STOP_ONLY,
    }
    assert verdict(findings) is Verdict.REFUSE
    assert "vfio" in (reason(findings) or "")


def test_whether_merges_may_be_taken_back() -> None:
    """A device that has pinned pages forbids it, whatever else asks for it."""
    wanted = replace(device("vhost-user-blk-pci"), migration_status="active")
    assert unmerging(judge(wanted), on_store=True) == Unmerging(None, stopped=True)
    pinned = replace(wanted, pinned_kib=4)
    assert "VmPin" in (unmerging(judge(pinned), on_store=True).refusal or "")
    migrating = replace(CLEAN, migration_status="active")
    assert "migration is active" in (unmerging(judge(migrating), on_store=True).refusal or "")
    beside_ksm = replace(CLEAN, ksm_runs=True, regions=(PRIVATE,))
    assert unmerging(judge(beside_ksm), on_store=True) == Unmerging(None, stopped=True)
    assert (
        unmerging(judge(replace(beside_ksm, own_userfaults=1)), on_store=True).refusal is not None
    )
    assert not must_unmerge(judge(beside_ksm), on_store=True)
    assert unmerging(
        judge(device("hv-balloon", memdev="/objects/ram1")), on_store=True
    ) == Unmerging(None, stopped=False)


@pytest.mark.parametrize(
    "facts",
    [
        device("hv-balloon", memdev="/objects/ram1"),
        device("virtio-mem-pci", memdev="/objects/ram1", prealloc=True),
        replace(CLEAN, persistent_backends=frozenset({"ram1"})),
    ],
)
def test_other_backends_in_special_use(facts: Facts) -> None:
    assert set(refused_backends(judge(facts))) == {"ram1"}
    assert verdict(judge(facts)) is Verdict.ALLOW


def test_a_backend_in_special_use_is_left_out_alone() -> None:
    findings = judge(device("hv-balloon", memdev="/objects/ram1"))
    assert verdict(findings) is Verdict.ALLOW
    assert reason(findings) is None
    assert "hv-balloon (d0)" in refused_backends(findings)["ram1"]


def test_virtio_mem_is_merged_where_it_can_discard_merged_pages() -> None:
    pool = device("virtio-mem-pci", memdev="/objects/ram1", prealloc=False)
    for region in (REGION, PRIVATE):
        filed = replace(pool, regions=(replace(region, backend="ram1"),))
        assert judge(filed) == []
    bare = replace(REGION, backend="ram1", ram_fd=None)
    findings = judge(replace(pool, regions=(REGION, bare)))
    assert set(refused_backends(findings)) == {"ram1"}
    assert "memory-backend-memfd" in refused_backends(findings)["ram1"]
    assert judge(replace(pool, regions=(replace(bare, backend="ram0"),))) == []


def test_network_backends_are_read() -> None:
    text = (
        "nic: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\n"
        " \\ n0: index=0,type=vhost-user,vhost-user0 to chr0\n"
    )
    assert parse_netdevs(text) == (("nic", "nic"), ("n0", "vhost-user"))


def test_the_table_prints_every_row_once() -> None:
    lines = as_markdown().splitlines()
    assert len(lines) == 2 + len(HAZARDS)
    assert len({row.key for row in HAZARDS}) == len(HAZARDS)
    assert all(line.count("|") == 4 for line in lines)


def test_the_table_names_code_that_exists() -> None:
    package = Path(vmdedup.__file__).parent
    named = [name for row in HAZARDS for name in re.findall(r"[\w/]+\.py", row.seen_by)]
    assert named
    assert [name for name in named if not (package / name).exists()] == []


VM = VmIdentity("web-1", 10, 99, None, 107, (7, 2, 0), frozenset({10}))


def test_the_default_domain_is_the_uid() -> None:
    assert domain_of(VM) == "uid:107"


def test_the_first_matching_rule_names_the_domain() -> None:
    rules = [
        DomainRule(domain="db", name="db-*"),
        DomainRule(domain="web", name="web-*", uid=107),
        DomainRule(domain="rest"),
    ]
    assert domain_of(VM, rules) == "web"
    assert domain_of(replace(VM, uid=0), rules) == "rest"
    assert domain_of(replace(VM, name="db-7"), rules) == "db"


def test_none_refuses_and_zero_only_is_passed_on() -> None:
    with pytest.raises(RefusedError, match="never merged"):
        domain_of(VM, [DomainRule(domain=NONE)])
    assert domain_of(VM, [DomainRule(domain=ZERO_ONLY)]) == ZERO_ONLY


@pytest.mark.parametrize("name", ["", "a/b", "uid:0", "a\nb"])
def test_a_domain_name_that_can_not_be_a_file_is_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        DomainRule(domain=name)


def test_several_vms_in_a_default_domain_are_pointed_out() -> None:
    vms = [VM, replace(VM, name="web-2"), replace(VM, name="x", uid=0)]
    assert crowded_default_domains(vms) == {"uid:107": ["web-1", "web-2"]}
    assert crowded_default_domains(vms, [DomainRule(domain="web", name="web-*")]) == {}
